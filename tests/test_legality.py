"""The four conditions of a legal score, on the code that scores, and for each a scorer that breaks it and is caught.

C1 a score depends on the artifact and the tokens before it alone; C2 it belongs to a distribution over the vocabulary,
fixed before its token is seen; C3 a token is scored before anything learns from it; C4 one pass, every token once.
Order is that of scoring: documents longest first, chunks of a batch side by side.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support import CPU, LoneRun, documents, tiny_model
from test_ttt import looped_model, validation
from thread_ranks import ThreadRun, on_ranks
from torch import Tensor

import train_gpt
from train_gpt import BOS, GPT, Meter, Stop, ValidationSet, adapt_and_score
from train_gpt import TestTimeScorer as Scorer

LENGTHS = (9, 2, 21, 1, 14, 5, 17, 3, 30, 8)
SWITCHES: dict[str, dict[str, Any]] = {  # everything that evaluation can be asked to do otherwise
    "as the record": {},
    "gates, two updates": dict(smear_gate_enabled=True, attn_out_gate_enabled=True, ttt_grad_steps=2),
    "sgd": dict(ttt_optimizer="sgd", ttt_beta1=0.5, ttt_lora_lr=1.0, ttt_k_lora=False),
    "cached": dict(ttt_context="cached", smear_gate_enabled=True, bigram_hash_enabled=True),
    "no bypasses, one phase, two epochs": dict(
        ttt_o_lora=False, ttt_mlp_lora=False, phased_ttt_num_phases=1, global_ttt_epochs=2,
        global_ttt_respect_doc_boundaries=False,
    ),
}  # fmt: skip
switches = pytest.mark.parametrize("switch", SWITCHES)


class Witness:
    """Sees every score on its way into the meter, and every update: (rank, position in the stream, nats)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.scored: list[tuple[int, int, float]] = []
        self.faults: list[str] = []
        self.here = threading.local()  # the chunk that a rank is at
        gather, add = Scorer.gather, Meter.add
        learn_chunk, adapt_base = Scorer.learn_chunk, train_gpt.adapt_base

        def see_chunk(scorer: Scorer, parts: Sequence[Any]) -> Any:
            places = [[] if w is None else [d.start + w.start + w.offset + 1 + i for i in range(w.count)]
                      for d, w, _ in parts]  # fmt: skip
            self.here.rank, self.here.places = scorer.run.rank, places
            return gather(scorer, parts)

        def see_score(meter: Meter, losses: Tensor, n_tokens: int, n_bytes: int) -> None:
            if losses.dim() == 2:  # of a chunk; what ranks and batches add up are numbers
                for places, row in zip(self.here.places, losses.tolist(), strict=True):
                    self.scored += [(self.here.rank, p, nats) for p, nats in zip(places, row, strict=False)]
            add(meter, losses, n_tokens, n_bytes)

        def see_learning(scorer: Scorer, *args: Any) -> None:
            self.expect_scored("adapters", itertools.chain.from_iterable(self.here.places))
            learn_chunk(scorer, *args)

        def see_base_learning(model: GPT, val: ValidationSet, scored: Sequence[Any], *args: Any) -> None:
            self.expect_scored("the base", (d.start + 1 + i for d in scored for i in range(d.n_targets)))
            adapt_base(model, val, scored, *args)

        monkeypatch.setattr(Scorer, "gather", see_chunk)
        monkeypatch.setattr(Scorer, "learn_chunk", see_learning)
        monkeypatch.setattr(Meter, "add", see_score)
        monkeypatch.setattr(train_gpt, "adapt_base", see_base_learning)

    def expect_scored(self, who: str, places: Iterator[int]) -> None:
        seen = {p for _, p, _ in self.scored}
        self.faults += [f"{who} learned from target {p} before it was scored" for p in places if p not in seen]

    def take(self) -> list[tuple[int, float]]:
        """(position, nats) since the last call, in the order of scoring."""
        rows, self.scored = [(p, nats) for _, p, nats in self.scored], []
        return rows


@pytest.fixture
def witness(monkeypatch: pytest.MonkeyPatch) -> Witness:
    return Witness(monkeypatch)


def score(tokens: np.ndarray, run: Any = None, **changes: Any) -> Meter:
    model = looped_model(**changes)
    return adapt_and_score(model, validation(tokens), model.cfg, run or LoneRun())[0]


# ---- C1: nothing at or behind a position changes a score before it ---------------------------------------------------
def leaks(tokens: np.ndarray, rescore: Callable[[np.ndarray], list[tuple[int, float]]]) -> list[str]:
    """Replaces everything that is scored from some moment on, for moments all over the run; compares what was before.

    Document starts stay: they are what orders the documents.
    """
    before, faults = rescore(tokens), []
    for at in range(1, len(before), max(1, len(before) // 5)):
        later = np.array([p for p, _ in before[at:] if tokens[p] != BOS])
        other = tokens.copy()
        other[later] = 8 + (other[later] - 8 + 1 + later % 50) % 119  # another ordinary token
        after = rescore(other)
        pairs = zip(before[:at], after[:at], strict=True)
        faults += [f"the score of {old[0]} changed with those from {at} on" for old, new in pairs if old != new]
        assert [x for _, x in before[at:]] != [x for _, x in after[at:]] or not len(later), "the change has no effect"
    return faults


def ttt_scores(witness: Witness, **changes: Any) -> Callable[[np.ndarray], list[tuple[int, float]]]:
    def rescore(tokens: np.ndarray) -> list[tuple[int, float]]:
        score(tokens, **changes)
        return witness.take()

    return rescore


@switches
def test_c1_test_time_training(witness: Witness, switch: str) -> None:
    """Through chunks, batches, phases and base learning."""
    assert leaks(documents(LENGTHS), ttt_scores(witness, **SWITCHES[switch])) == []


def plain_scores(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Callable[[np.ndarray], list[tuple[int, float]]]:
    model, rows = tiny_model(**changes), []
    monkeypatch.setattr(Meter, "add", lambda meter, losses, n_tokens, n_bytes: rows.append(losses.tolist()))
    monkeypatch.setattr(Meter, "expect", lambda *_: None)

    def rescore(tokens: np.ndarray) -> list[tuple[int, float]]:
        rows.clear()
        train_gpt.evaluate(model, validation(tokens), model.cfg, LoneRun(), "test")
        return list(enumerate(itertools.chain.from_iterable(rows), 1))

    return rescore


@pytest.mark.parametrize("smear", [False, True])
def test_c1_plain_evaluation(monkeypatch: pytest.MonkeyPatch, smear: bool) -> None:
    tokens = documents((30, 9, 2, 17, 1, 44))
    assert leaks(tokens, plain_scores(monkeypatch, smear_gate_enabled=smear)) == []


def learn_first(scorer: Scorer, chunk: Any, adapters: Any, cache: Any) -> Tensor:
    """A step on the chunk, then its score; whoever only asks sees no step."""
    if not torch.is_grad_enabled():
        return forward(scorer, chunk, adapters)
    loss = forward(scorer, chunk, adapters)
    (gradient,) = torch.autograd.grad((loss * chunk.scored).sum(), adapters.live)
    adapters.values -= 0.05 * gradient
    return forward(scorer, chunk, adapters)


def forward(scorer: Scorer, chunk: Any, adapters: Any) -> Tensor:
    return scorer.model(chunk.inputs, chunk.targets, adapters=adapters, at=chunk.at, reduction="none")


def share_adapters(scorer: Scorer, chunk: Any, adapters: Any, cache: Any) -> Tensor:
    """Documents of a batch learn from one another: the score of one depends on the later chunks of another."""
    losses = forward(scorer, chunk, adapters)
    adapters.values.data += 0.2 * (adapters.values.mean(0) - adapters.values)
    return losses + 1e-3 * chunk.inputs.float().mean()  # and from their text


def read_the_target(scorer: Scorer, chunk: Any, adapters: Any, cache: Any) -> Tensor:
    """What an n-gram channel does that is gated on the class of the token it predicts: a bonus for some targets."""
    return forward(scorer, chunk, adapters) - 0.1 * (chunk.targets > 64)


def spread_over_bytes(scorer: Scorer, chunk: Any, adapters: Any, cache: Any) -> Tensor:
    """Half of each token's probability comes from a table of its bytes, which knows nothing of the other tokens."""
    p = forward(scorer, chunk, adapters).neg().exp()
    return -(0.5 * p + 0.5 * 0.9 ** (1 + chunk.targets % 3)).log()


@pytest.mark.parametrize("cheat", [learn_first, share_adapters])
def test_c1_is_seen_to_be_broken(witness: Witness, monkeypatch: pytest.MonkeyPatch, cheat: Any) -> None:
    monkeypatch.setattr(Scorer, "score_chunk", cheat)
    assert leaks(documents(LENGTHS), ttt_scores(witness))


# ---- C2: a distribution, fixed before the target is seen -------------------------------------------------------------
def totals_of_probability(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Tensor:
    """At sampled places, the sum over all tokens of exp(-nats) that scoring would give each: asked before the score."""
    inner, sums, calls = Scorer.score_chunk, [], itertools.count()

    def ask_all(scorer: Scorer, chunk: Any, adapters: Any, cache: Any) -> Tensor:
        if next(calls) % 3 == 1:
            for place in (0, chunk.at.size(1) // 2):
                every = torch.arange(scorer.cfg.vocab_size).expand(len(chunk.at), -1)
                wide = chunk._replace(targets=every, at=chunk.at[:, place : place + 1].expand_as(every))
                with torch.no_grad():
                    sums.append(inner(scorer, wide, adapters, cache).double().neg().exp().sum(1))
        return inner(scorer, chunk, adapters, cache)

    monkeypatch.setattr(Scorer, "score_chunk", ask_all)
    score(documents(LENGTHS), **changes)
    return torch.cat(sums)


@switches
def test_c2_test_time_training(monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    sums = totals_of_probability(monkeypatch, **SWITCHES[switch])
    assert len(sums) >= 10
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)


def test_c2_plain_evaluation() -> None:
    model = tiny_model(smear_gate_enabled=True)
    tokens = documents((30, 9, 2, 17))
    inputs, targets, docs = train_gpt.packed_row(tokens, model.cfg.eval_seq_len, CPU)
    with torch.no_grad():
        sums = sum(
            model(inputs, torch.full_like(targets, v), docs=docs, reduction="none").double().neg().exp()
            for v in range(model.cfg.vocab_size)
        )
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)


@pytest.mark.parametrize("cheat", [read_the_target, spread_over_bytes])
def test_c2_is_seen_to_be_broken(monkeypatch: pytest.MonkeyPatch, cheat: Any) -> None:
    monkeypatch.setattr(Scorer, "score_chunk", cheat)
    sums = totals_of_probability(monkeypatch)
    assert (sums > 1.01).any()


# ---- C3: scored first, learned from second ---------------------------------------------------------------------------
def weights_at_scores(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every change of adapters or base between two scores that is not an update Witness has checked."""
    faults: list[str] = []
    score_chunk, learn_chunk, base = Scorer.score_chunk, Scorer.learn_chunk, train_gpt.adapt_base
    known: dict[str, Any] = {}

    def state(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.detach().clone() for t in tensors]

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(x.shape != y.shape or torch.equal(x, y) for x, y in zip(a, b, strict=True))

    def scoring(scorer: Scorer, chunk: Any, adapters: Any, cache: Any) -> Tensor:
        now, mine = state(list(scorer.model.parameters())), state([adapters.values])
        if not same(known.setdefault("base", now), now):
            faults.append("the base changed outside of its learning")
        if known.get("adapters of") == adapters.steps.item() > 0 and not same(known["adapters"], mine):
            faults.append("adapters changed outside of their learning")
        losses = score_chunk(scorer, chunk, adapters, cache)
        if not same(state([adapters.values]), mine):
            faults.append("adapters changed while scoring")
        return losses

    def learning(scorer: Scorer, chunk: Any, losses: Any) -> None:
        adapters = scorer.adapters
        learn_chunk(scorer, chunk, losses)
        known["adapters of"], known["adapters"] = adapters.steps.item(), state([adapters.values])

    def base_learning(*args: Any) -> None:
        base(*args)
        known.pop("base", None)

    monkeypatch.setattr(Scorer, "score_chunk", scoring)
    monkeypatch.setattr(Scorer, "learn_chunk", learning)
    monkeypatch.setattr(train_gpt, "adapt_base", base_learning)
    return faults


@pytest.mark.parametrize("switch", ["as the record", "sgd", "cached"])
def test_c3_only_what_is_scored_is_learned(witness: Witness, monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    hidden = weights_at_scores(monkeypatch)
    score(documents(LENGTHS), **SWITCHES[switch])
    assert len(witness.take()) == sum(LENGTHS) - 1
    assert witness.faults + hidden == []


def test_c3_is_seen_to_be_broken(witness: Witness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scorer, "score_chunk", learn_first)
    hidden = weights_at_scores(monkeypatch)
    score(documents(LENGTHS[:3]))
    assert "adapters changed while scoring" in hidden
    val, model = validation(documents(LENGTHS)), looped_model()
    train_gpt.adapt_base(model, val, val.documents()[3:], model.cfg, LoneRun(), 1)  # as before any scoring
    assert any("the base learned from target" in fault for fault in witness.faults)


# ---- C4: one pass, every token once ----------------------------------------------------------------------------------
TEXTS = {
    "many": LENGTHS,
    "one document": (8,),
    "fewer than ranks": (12, 5, 7),
    "empty documents": (1, 1, 6, 1, 1, 1),
    "nothing but starts": (1, 1, 1),
    "longer than the context": (150, 3, 40),
}


def on_all_ranks(tokens: np.ndarray, world: int, greedy: int | None = None, **changes: Any) -> list[Meter]:
    """The total as each rank has it."""
    model = looped_model(**changes)

    def work(run: ThreadRun) -> Meter:
        mine = copy.deepcopy(model)
        return adapt_and_score(mine, validation(tokens), mine.cfg, run)[0]

    return on_ranks(world, work, greedy)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("text", TEXTS)
def test_c4_every_token_once(witness: Witness, text: str, world: int) -> None:
    tokens = documents(TEXTS[text])
    val = validation(tokens)
    # The last rank gets all batches: the others meet it in every collective with empty hands.
    for greedy in (None, world - 1) if world > 1 else (None,):
        totals = on_all_ranks(tokens, world, greedy)
        ranks = {rank for rank, *_ in witness.scored}
        rows = witness.take()
        assert sorted(p for p, _ in rows) == list(range(1, len(tokens)))
        nats = totals[0].nats.item()
        assert {(t.tokens, t.bytes, t.nats.item()) for t in totals} == {(val.n_targets, val.n_bytes, nats)}
        assert nats == pytest.approx(sum(x for _, x in rows), rel=1e-6)
        assert greedy is None or ranks == {greedy}
    assert witness.faults == []


@pytest.mark.parametrize("changes", [{}, dict(skip_gates_enabled=False)], ids=["gated skips", "added skips"])
def test_c4_base_learning_sums_the_same_gradients_on_ranks(changes: dict[str, Any]) -> None:
    """`ThreadRun.sum` takes, as NCCL does, no tensor with holes."""
    tokens = documents(LENGTHS)
    alone = score(tokens, **changes)
    for total in on_all_ranks(tokens, 2, **changes):
        assert total.nats.item() == pytest.approx(alone.nats.item(), rel=1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_c4_plain_evaluation_for_any_number_of_ranks(world: int) -> None:
    model, val = tiny_model(), validation(documents((30, 9, 2, 17, 1, 44)))
    alone = train_gpt.evaluate(model, val, model.cfg, LoneRun(), "test")
    totals = on_ranks(world, lambda run: train_gpt.evaluate(model, val, model.cfg, run, "test"))
    assert {(t.tokens, t.bytes) for t in totals} == {(val.n_targets, val.n_bytes)}
    assert all(t.nats.item() == pytest.approx(alone.nats.item(), rel=1e-12) for t in totals)


def test_c4_a_batch_scored_twice_is_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Scorer.run_batch
    calls = itertools.count()

    def twice(scorer: Scorer, docs: Sequence[Any]) -> Meter:
        meter = inner(scorer, docs)
        if next(calls) == 1:
            meter.merge(inner(scorer, docs))
        return meter

    monkeypatch.setattr(Scorer, "run_batch", twice)
    with pytest.raises(Stop, match="1") as stop:
        score(documents(LENGTHS))
    assert "no score" in stop.value.sentence


def test_c4_a_rank_that_takes_a_batch_and_loses_it_is_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a lost file counter did in the public script: the rank saw an empty queue and scored nothing."""
    inner = Scorer.run_batch

    def lose(scorer: Scorer, docs: Sequence[Any]) -> Meter:
        return Meter() if scorer.run.rank == 1 else inner(scorer, docs)

    monkeypatch.setattr(Scorer, "run_batch", lose)
    with pytest.raises(Stop) as stop:
        on_all_ranks(documents(LENGTHS), 2, greedy=1)
    assert "no score" in stop.value.sentence
