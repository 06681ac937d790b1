"""Follow-up systems of scoring: off they change nothing, on they do what their formula says and read nothing ahead."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support import LoneRun, documents, tiny_config
from test_ttt import LENGTHS, Recorder, looped_model, validation, whole_run
from torch import Tensor

from train_gpt import Adapters, Config, adapter_lr, adapter_optimizer, keep_documents
from train_gpt import TestTimeScorer as Scorer  # under its own name it would look like a class of tests


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def losses_of(recorder: Recorder, **changes: Any) -> dict[int, float]:
    """Every target's loss in a whole run of phased test-time training."""
    whole_run(documents(LENGTHS), **changes)
    return recorder.take()


# ---- learning rates and scale of the adapters ------------------------------------------------------------------------
LAYERS = [0, 1, 1, 2, 3]  # of the visits of the small looped model


def test_rates_have_the_slope_and_the_ratio() -> None:
    cfg = Config(ttt_lora_layer_lr_alpha=0.5, lora_plus_ratio=4.0)
    assert adapter_lr("q.A.0", cfg) == 1e-4
    assert adapter_lr("q.A.10", cfg) == pytest.approx(1.5e-4)
    assert adapter_lr("mlp_bypass.B.5", cfg) == pytest.approx(4 * 1.25e-4)
    assert adapter_lr("head.A", cfg) == 1e-4
    assert {adapter_lr(name, Config()) for name in ("q.A", "k.B", "head.B")} == {1e-4}


def test_one_group_of_the_same_tensors_by_default() -> None:
    cfg = tiny_config()
    adapters = Adapters(cfg, 3, 5, layers=LAYERS)
    (group,) = adapter_optimizer(adapters, cfg).param_groups
    assert group["lr"] == cfg.ttt_lora_lr
    assert [id(p) for p in group["params"]] == [id(p) for p in adapters.parameters()]
    assert set(adapters.tensors) == {f"{s}.{side}" for s in adapters.slots for side in "AB"}


def filled(adapters: Adapters) -> Adapters:
    """The same numbers for a visit, whichever tensor holds them."""
    adapters.scale, scale, g = 1.0, adapters.scale, torch.Generator().manual_seed(3)
    for name in adapters.slots:
        for t in itertools.chain(*adapters._pairs(name, torch.float32)):
            t.copy_(torch.randn(t.shape, generator=g))
    adapters.scale = scale
    return adapters


def by_visit(adapters: Adapters) -> dict[tuple[str, str], list[Tensor]]:
    sides = itertools.product(adapters.slots, "AB")
    return {(n, s): [t.detach().clone() for t in adapters._side(n, s, torch.float32)] for n, s in sides}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_step_of_every_visit_is_the_plain_step_times_its_rate(optimizer: str) -> None:
    """Learning rates multiply steps and decoupled decay alike; a slot per layer changes no visit's numbers."""
    steps = []
    changes = dict(num_layers=4, ttt_optimizer=optimizer, loop_start=1, loop_end=1, parallel_start_layer=3)
    for more in ({}, dict(ttt_lora_layer_lr_alpha=0.5, lora_plus_ratio=4.0)):
        cfg = tiny_config(**changes, **more)
        adapters = filled(Adapters(cfg, 2, 5, layers=LAYERS))
        before = by_visit(adapters)
        learner = adapter_optimizer(adapters.requires_grad(), cfg)
        sum((t**2).sum() for t in adapters.parameters()).backward()
        learner.step()
        after = by_visit(adapters)
        steps.append({k: [a - b for a, b in zip(after[k], before[k], strict=True)] for k in before})
    plain, sloped = steps
    for name, side in plain:
        for layer, a, b in zip(LAYERS if name != "head" else [0], plain[name, side], sloped[name, side], strict=True):
            rate = (1 + 0.5 * layer / 3) * (4 if side == "B" else 1)
            assert torch.allclose(b, rate * a, rtol=1e-4, atol=1e-6), (name, side, layer)


def test_documents_leave_every_group() -> None:
    cfg = tiny_config(ttt_lora_layer_lr_alpha=0.5, lora_plus_ratio=4.0)
    adapters = filled(Adapters(cfg, 3, 5, layers=LAYERS)).requires_grad()
    learner = adapter_optimizer(adapters, cfg)
    sum((t**2).sum() for t in adapters.parameters()).backward()
    learner.step()
    rates = {id(t): adapter_lr(name, cfg) for name, t in adapters.tensors.items()}
    groups = [[rates[id(p)] for p in g["params"]] for g in learner.param_groups]
    want = {name: t.detach()[:, [2, 0]].clone() for name, t in adapters.tensors.items()}
    keep_documents(adapters, learner, torch.tensor([2, 0]))
    assert all(torch.equal(adapters.tensors[name], want[name]) for name in want)
    rates = {id(t): adapter_lr(name, cfg) for name, t in adapters.tensors.items()}
    assert [[rates[id(p)] for p in g["params"]] for g in learner.param_groups] == groups
    assert all(learner.state[p]["exp_avg"].shape == p.shape for g in learner.param_groups for p in g["params"])


def test_adapters_start_alike_with_and_without_rates_by_layer() -> None:
    plain, split = (Adapters(tiny_config(ttt_lora_layer_lr_alpha=x), 2, 5, layers=LAYERS) for x in (0, 0.5))
    for name in plain.slots:
        for a, b in zip(plain._side(name, "A", torch.float32), split._side(name, "A", torch.float32), strict=True):
            assert torch.equal(a, b)


def test_rates_that_are_all_one_learn_as_the_default(recorder: Recorder) -> None:
    plain, split = losses_of(recorder), losses_of(recorder, ttt_lora_layer_lr_alpha=1e-12)
    assert all(split[p] == pytest.approx(plain[p], abs=1e-5) for p in plain)
    sloped = losses_of(recorder, ttt_lora_layer_lr_alpha=0.5)
    assert any(abs(sloped[p] - plain[p]) > 1e-4 for p in plain)


def test_the_scale_is_alpha_over_rank(recorder: Recorder) -> None:
    cfg, plain = tiny_config(ttt_lora_alpha=6), tiny_config()  # rank 3
    (a, b), (c, d) = (filled(Adapters(x, 2, 5)).head(torch.float32) for x in (cfg, plain))
    assert torch.allclose(b @ a, 2 * (d @ c))
    at_rank = losses_of(recorder, ttt_lora_alpha=3)
    assert at_rank == losses_of(recorder)
    twice = losses_of(recorder, ttt_lora_alpha=6)
    assert any(abs(twice[p] - at_rank[p]) > 1e-4 for p in twice)


def test_new_adapters_change_nothing_whatever_the_scale(recorder: Recorder) -> None:
    frozen = dict(ttt_lora_lr=0.0, global_ttt_lr=0.0)
    assert losses_of(recorder, ttt_lora_alpha=9, ttt_lora_layer_lr_alpha=1, **frozen) == losses_of(recorder, **frozen)


@pytest.mark.parametrize(
    "changes", [dict(ttt_lora_layer_lr_alpha=0.5, lora_plus_ratio=2.0), dict(ttt_lora_alpha=6)], ids=str
)
@pytest.mark.parametrize("context", ["rerun", "cached"])
def test_documents_together_learn_as_alone(recorder: Recorder, changes: dict[str, Any], context: str) -> None:
    model = looped_model(ttt_context=context, ttt_beta1=0.5, **changes)
    val = validation(documents(LENGTHS))
    scorer = Scorer(model, val, model.cfg, LoneRun())
    scorer.run_batch(val.documents())
    together = recorder.take()
    for d in val.documents():
        scorer.run_batch([d])
    alone = recorder.take()
    assert all(together[p] == pytest.approx(alone[p], abs=1e-5, rel=1e-5) for p in alone)
