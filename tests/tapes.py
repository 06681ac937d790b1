"""CUDA graphs on the CPU: operators and interpreted kernels are recorded once and replayed on the same tensors.

What a graph would hold shows here, too: a number that Python computed while it was recorded, a tensor that was replaced
later. Only the reuse of memory does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gpt


class Tape(TorchDispatchMode):
    """What runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Callable[..., Any], Any, dict[str, Any], Any]] = []
        self.running = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.running:
            self.steps.append((func, args, kwargs or {}, out))
        return out

    def kernel(self, launch: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """An interpreted kernel, made of operators that are none of the program's."""
        self.running = False
        launch(*args, **kwargs)
        self.running = True
        self.steps.append((launch, args, kwargs, None))

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.steps:
            schema = getattr(func, "_schema", None)
            if schema and not schema.is_mutable and any(r.alias_info for r in schema.returns):
                continue  # a view
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True) if schema else ():
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.data.copy_(new)


def record_on_tapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of `train_gpt.captured`; what recording does to the adapters and to the cache is undone."""
    tapes: list[Tape] = []
    if train_gpt.triton is not None:
        from triton.runtime.interpreter import InterpretedFunction

        launcher = InterpretedFunction.__getitem__

        def getitem(kernel: Any, grid: Any) -> Callable[..., None]:
            launch = launcher(kernel, grid)
            return lambda *args, **kwargs: (tapes[-1].kernel if tapes else apply)(launch, *args, **kwargs)

        monkeypatch.setattr(InterpretedFunction, "__getitem__", getitem)

    def apply(launch: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        launch(*args, **kwargs)

    def captured(work: Any, pool: Any) -> Callable[[], None]:
        scorer = work.__self__.scorer
        state = [*scorer.adapters.room.values(), scorer.adapters.steps]
        state += [scorer.cache.all, scorer.cache.place] if scorer.cache else []
        before, tape = [t.clone() for t in state], Tape()
        tapes.append(tape)
        with tape:
            work()
        tapes.pop()
        for t, old in zip(state, before, strict=True):
            t.data.copy_(old)  # behind the back of autograd, as a GPU would have done none of it
        return tape.replay

    monkeypatch.setattr(train_gpt, "captured", captured)
