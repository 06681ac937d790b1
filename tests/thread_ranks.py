"""Several ranks as threads of one process: the real code, without the seconds that a process group takes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from support import LoneRun
from torch import Tensor


class Meeting:
    """Where the ranks exchange one value each; one that fails lets the others fail instead of wait."""

    def __init__(self, world: int):
        self.barrier, self.values = threading.Barrier(world), [None] * world

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


class GreedyQueue:
    """The store of the ranks, in which one takes all it can before the others get anything: the least even queue."""

    def __init__(self, rank: int, first: int, store: Any, done: dict[str, threading.Event]):
        self.rank, self.first, self.store, self.done = rank, first, store, done
        self.key = ""

    def add(self, key: str, n: int) -> int:
        event = self.done.setdefault(key, threading.Event())
        if self.rank != self.first:
            event.wait()
        self.key = key
        return self.store.add(key, n)

    def finished(self) -> None:
        """The first rank meets the others only when its queue is empty."""
        if self.rank == self.first and self.key:
            self.done[self.key].set()


class ThreadRun(LoneRun):
    """One of `world` ranks."""

    def __init__(self, rank: int, meeting: Meeting, queue: GreedyQueue | Any):
        super().__init__(rank=rank, world=meeting.barrier.parties)
        self.meeting, self.store = meeting, queue

    def gather(self, value: Any) -> list[Any]:
        if isinstance(self.store, GreedyQueue):
            self.store.finished()
        return self.meeting.exchange(self.rank, value)

    def same(self, value: Any) -> Any:
        return self.gather(value)[0]

    def agree(self, *values: float) -> list[float]:
        return [max(column) for column in zip(*self.gather(values), strict=True)]

    def add_in_order(self, total: Tensor, x: Tensor) -> None:
        for part in self.gather(x.clone()):
            total += part

    def sum(self, x: Tensor) -> Tensor:
        assert x.is_contiguous(), "NCCL refuses it, gloo sums other memory"
        parts = self.gather(x.clone())
        return x.copy_(torch.stack(parts).sum(0))


T = TypeVar("T")


def on_ranks(world: int, work: Callable[[ThreadRun], T], greedy: int | None = None) -> list[T]:
    """`work` on every rank at once, results in rank order. greedy: the rank that empties each queue first."""
    meeting, store, done = Meeting(world), dist.HashStore(), {}

    def one(rank: int) -> T:
        torch.set_num_threads(1)
        try:
            return work(ThreadRun(rank, meeting, store if greedy is None else GreedyQueue(rank, greedy, store, done)))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        futures = [pool.submit(one, rank) for rank in range(world)]
    failed = [f.exception() for f in futures if f.exception()]
    for error in failed:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [f.result() for f in futures]
