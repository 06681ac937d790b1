"""Test-time training: nothing learns before it is scored, everything is scored once, batches change nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LoneRun, documents, named, tiny_config, tiny_model
from tapes import record_on_tapes
from torch import Tensor

import train_gpt
from train_gpt import (
    BOS,
    Adapters,
    Config,
    Document,
    Meter,
    Stop,
    ValidationSet,
    adapt_and_score,
    adapt_base,
    plan_phases,
    windows,
)
from train_gpt import TestTimeScorer as Scorer  # under its own name it would look like a class of tests

VISITED = [0, 1, 2, 3, 2, 3, 4, 5]  # layers, by the tiny model's looped plan
LENGTHS = (9, 2, 21, 1, 14, 5, 17, 3, 30, 8)  # shorter than a chunk, longer than the context, a lone document start


def validation(tokens: np.ndarray) -> ValidationSet:
    counts = np.random.RandomState(1).randint(1, 6, len(tokens))
    return ValidationSet(tokens, np.where(tokens == BOS, 0, counts).astype(np.int64))


class Recorder:
    """Loss of every target as the meter gets it, in the order of scoring, by its position in the stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.rows: list[tuple[int, float]] = []
        self.parts: Sequence[Any] = []  # documents and windows of the chunk at hand
        gather, add = Scorer.gather, Meter.add

        def remember(scorer: Scorer, parts: Sequence[Any]) -> Any:
            self.parts = parts
            return gather(scorer, parts)

        def record(meter: Meter, losses: Tensor, n_tokens: int, n_bytes: int) -> None:
            if losses.dim() == 2:  # of a chunk; sums of whole batches are numbers
                for (doc, window, _), row in zip(self.parts, losses.tolist(), strict=True):
                    if window is not None:
                        first = doc.start + window.start + window.offset + 1
                        self.rows += [(first + i, row[i]) for i in range(window.count)]
            add(meter, losses, n_tokens, n_bytes)

        monkeypatch.setattr(Scorer, "gather", remember)
        monkeypatch.setattr(Meter, "add", record)

    def take(self) -> dict[int, float]:
        """What was scored since the last call; each target once."""
        rows, self.rows = self.rows, []
        losses = dict(rows)
        assert len(losses) == len(rows), "a target was scored twice"
        return losses


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


CHUNK, CONTEXT = 6, 16
# Time goes by visits and chunks here: five visits, with a loop, a skip and a two-lane layer among them.
SMALL = dict(num_layers=4, loop_start=1, loop_end=1, parallel_start_layer=3, xsa_last_n=4, ttt_chunk_size=CHUNK,
             ttt_eval_seq_len=CONTEXT)  # fmt: skip


def looped_model(**changes: Any) -> train_gpt.GPT:
    model = tiny_model(**{**SMALL, **changes})
    model.looped = True
    return model.requires_grad_(False)


# ---- windows ---------------------------------------------------------------------------------------------------------
@settings(max_examples=200, deadline=None)
@given(n=st.integers(0, 300), chunk=st.integers(1, 60), extra=st.integers(0, 100))
def test_windows_score_every_target_once_with_all_context_that_fits(n: int, chunk: int, extra: int) -> None:
    context = chunk + extra
    rows = windows(n, chunk, context)
    scored = [w.start + w.offset + i for w in rows for i in range(w.count)]
    assert scored == list(range(n))
    for w in rows:
        assert 0 < w.count <= chunk
        assert w.offset + w.count == w.length <= context
        assert w.start >= 0
        assert w.start == 0 or w.length == context, "context is only cut when it is full"
    assert all(w.count == chunk for w in rows[:-1])


# ---- which documents of a batch go on --------------------------------------------------------------------------------
@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=70), cached=st.booleans())
def test_a_batch_shrinks_and_every_window_comes_once(lengths: list[int], cached: bool) -> None:
    scorer = SimpleNamespace(cfg=tiny_config(**SMALL), cached=cached)
    docs = [Document(1000 * i, n) for i, n in enumerate(lengths)]
    rows, seen = [*range(len(docs))], {d: [] for d in docs}
    for i, (kept, parts) in enumerate(Scorer.schedule(scorer, docs)):
        rows = rows if kept is None else [rows[at] for at in kept]
        assert [docs[r] for r in rows] == [d for d, *_ in parts]
        active = [(d, w, more) for d, w, more in parts if w is not None]
        for d, w, more in active:
            seen[d].append(w)
            assert more == (CHUNK * (i + 1) < d.n_targets)
        assert len(parts) < max(2 * len(active), 3)
        if not cached and CHUNK * i >= CONTEXT:
            assert len(parts) <= max(1.25 * len(active), 2)
    assert seen == {d: windows(d.n_targets, CHUNK, 0 if cached else CONTEXT) for d in docs}


# ---- phases ----------------------------------------------------------------------------------------------------------
@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=40),
    prefix=st.integers(0, 30),
    phases=st.integers(1, 6),
    size=st.integers(1, 9),
)
def test_phases_hold_every_document_once_longest_first(lengths: list[int], prefix: int, phases: int, size: int) -> None:
    starts = [0, *itertools.accumulate(lengths)]
    docs = [Document(a, n) for a, n in zip(starts, lengths, strict=False)]
    cfg = tiny_config(phased_ttt_prefix_docs=prefix, phased_ttt_num_phases=phases, ttt_batch_size=size)
    plan = plan_phases(docs, cfg)
    order = [d for p in plan for batch in p.batches for d in batch]
    assert order == sorted(docs, key=lambda d: (-d.n_targets, d.start))
    assert len(plan) == phases + 1
    assert sum(len(b) for p in plan[:-1] for b in p.batches) == min(prefix, len(docs))
    assert all(0 < len(b) <= size for p in plan for b in p.batches)
    # Numbers count batches from the shortest documents, as the public log does.
    numbers = [n for p in plan for n in p.numbers]
    assert numbers == list(range(len(numbers), 0, -1))
    assert all(len(p.numbers) == len(p.batches) for p in plan)


def test_phases_of_the_record() -> None:
    docs = [Document(i, 1 + i % 97) for i in range(50_000)]
    plan = plan_phases(docs, Config())
    assert list(itertools.accumulate(sum(map(len, p.batches)) for p in plan)) == [666, 1333, 2000, 50_000]
    assert all(len(b) == 64 for b in plan[3].batches)


def test_single_batches_can_be_asked_for() -> None:
    docs = [Document(i, 10 + i) for i in range(20)]
    cfg = tiny_config(ttt_eval_batches="1,4")
    (phase,) = train_gpt.only_batches(plan_phases(docs, cfg), cfg)
    assert phase.numbers == [1, 4]
    assert max(d.n_targets for d in phase.batches[0]) < min(d.n_targets for d in phase.batches[1])
    assert train_gpt.only_batches(plan_phases(docs, tiny_config()), tiny_config()) == plan_phases(docs, tiny_config())
    last = max(n for p in plan_phases(docs, cfg) for n in p.numbers)
    with pytest.raises(Stop) as stop:
        train_gpt.only_batches(plan_phases(docs, cfg), tiny_config(ttt_eval_batches="1,99"))
    assert stop.value.sentence == f"TTT_EVAL_BATCHES: there is no batch 99: choose from 1 to {last}"


def test_a_share_of_the_documents_is_drawn_by_the_seed() -> None:
    val = validation(documents([5] * 40))
    draws = [train_gpt.sampled_documents(val, tiny_config(val_doc_fraction=0.25, seed=s)) for s in (1, 1, 2)]
    assert len(draws[0]) == 10
    assert draws[0] == draws[1] != draws[2]
    assert len(train_gpt.sampled_documents(val, tiny_config())) == 40


# ---- score before learn ----------------------------------------------------------------------------------------------
def one_batch(tokens: np.ndarray, model: train_gpt.GPT) -> None:
    val = validation(tokens)
    Scorer(model, val, model.cfg, LoneRun()).run_batch(val.documents())


contexts = pytest.mark.parametrize("context", ["rerun", "cached"])


@contexts
@pytest.mark.parametrize("grad_steps", [1, 2])
def test_a_token_changes_no_score_before_it(recorder: Recorder, grad_steps: int, context: str) -> None:
    smear = context == "rerun"
    model = looped_model(
        smear_gate_enabled=smear, attn_out_gate_enabled=True, ttt_grad_steps=grad_steps, ttt_context=context
    )
    tokens = documents(LENGTHS[:5], vocab=128)
    one_batch(tokens, model)
    before = recorder.take()
    docs = validation(tokens).documents()
    for t in (3, 8, 12, 15, 20, 30, 40):
        assert tokens[t] != BOS
        mine = next(d for d in docs if d.start <= t < d.start + d.n_targets)
        other = tokens.copy()
        other[t] = 9 if tokens[t] != 9 else 10
        one_batch(other, model)
        after = recorder.take()
        changed = {p for p in before if after[p] != before[p]}
        # Bit-identical: every earlier target, and every target of the other documents of the batch.
        assert changed <= set(range(t, mine.start + mine.n_targets + 1))
        assert t in changed
        assert len(changed) > 1, "later targets do depend on it"


@contexts
def test_learning_does_change_later_chunks(recorder: Recorder, context: str) -> None:
    """Otherwise the property above would hold for a scorer that never learns."""
    tokens = documents(LENGTHS)
    losses = []
    for rate in (0.0, 0.05):
        one_batch(tokens, looped_model(ttt_lora_lr=rate, ttt_context=context))
        losses.append(recorder.take())
    first = {d.start + 1 + i for d in validation(tokens).documents() for i in range(min(d.n_targets, CHUNK))}
    assert all((losses[0][p] == losses[1][p]) == (p in first) for p in losses[0])


def whole_run(tokens: np.ndarray, **changes: Any) -> Meter:
    model = looped_model(**changes)
    return adapt_and_score(model, validation(tokens), model.cfg, LoneRun())[0]


def test_a_token_changes_no_score_of_documents_before_it(recorder: Recorder) -> None:
    """Through all phases, with the base model learning between them."""
    tokens = documents(LENGTHS)
    whole_run(tokens)
    before = recorder.take()
    order = list(before)
    batches = [b for p in plan_phases(validation(tokens).documents(), tiny_config()) for b in p.batches]
    batch_of = {d.start + 1 + i: k for k, b in enumerate(batches) for d in b for i in range(d.n_targets)}
    assert [batch_of[p] for p in order] == sorted(batch_of.values()), "batches follow one another"
    learned_from = 0
    for t in (4, 20, 40, 60, 75, 90):
        assert tokens[t] != BOS
        other = tokens.copy()
        other[t] = 9 if tokens[t] != 9 else 10
        whole_run(other)
        after = recorder.take()
        assert list(after) == order
        changed = [p for p in order if after[p] != before[p]]
        assert t in changed
        doc = next(d for d in validation(tokens).documents() if d.start < t <= d.start + d.n_targets)
        for p in changed:
            inside = t <= p <= doc.start + doc.n_targets
            assert inside or batch_of[p] > batch_of[t], "a score that was final has changed"
        learned_from += any(batch_of[p] > batch_of[t] for p in changed)
    assert learned_from, "no later document felt the base model's learning"


# ---- everything once -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "lengths",
    [(5,), (2,), (40,), (1, 1, 2), (4, 4, 4), (3, 50, 1, 1, 6), LENGTHS],
    ids=str,
)
@contexts
def test_every_target_is_scored_once(recorder: Recorder, lengths: tuple[int, ...], context: str) -> None:
    tokens = documents(lengths)
    val = validation(tokens)
    meter = whole_run(tokens, ttt_context=context)
    losses = recorder.take()
    assert sorted(losses) == list(range(1, len(tokens)))
    assert (meter.tokens, meter.bytes) == (val.n_targets, val.n_bytes)
    assert meter.nats.item() == pytest.approx(sum(losses.values()), rel=1e-6)


def test_text_before_the_first_document_start_is_scored(recorder: Recorder) -> None:
    tokens = np.concatenate([[9, 10, 11], documents([6, 4])]).astype(np.uint16)
    whole_run(tokens)
    assert sorted(recorder.take()) == list(range(1, len(tokens)))


def test_a_meter_that_misses_a_target_gives_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    full = train_gpt.windows
    monkeypatch.setattr(train_gpt, "windows", lambda n, chunk, context: full(n, chunk, context)[: 1 + (n <= 2 * CHUNK)])
    with pytest.raises(Stop) as stop:
        whole_run(documents([30, 4]))
    assert "no score" in stop.value.sentence


@contexts
@pytest.mark.parametrize(
    "neighbors",
    [{}, dict(smear_gate_enabled=True, bigram_hash_enabled=True), dict(eval_hash_emb_enabled=True)],
    ids=str,
)
def test_scores_are_those_of_the_plain_model_when_nothing_learns(
    monkeypatch: pytest.MonkeyPatch, recorder: Recorder, context: str, neighbors: dict[str, Any]
) -> None:
    """Also where a token's vector depends on the one before, which may belong to the chunk before."""

    def vectors(switch: Any, model: train_gpt.GPT) -> None:  # that are not zero
        switch.vectors = torch.randn(97, model.cfg.model_dim, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(train_gpt.EvalHashEmbedding, "begin_scoring", vectors)
    frozen = dict(ttt_lora_lr=0.0, global_ttt_lr=0.0, ttt_eval_seq_len=64, ttt_context=context, **neighbors)
    tokens, model = documents(LENGTHS), looped_model(**frozen)
    meter = adapt_and_score(model, validation(tokens), model.cfg, LoneRun())[0]
    losses, want = recorder.take(), {}
    for switch in model.switches:
        switch.begin_scoring(model)
    for d in validation(tokens).documents():
        text = torch.from_numpy(tokens[d.start : d.start + d.n_targets + 1].astype("int64"))[None]
        for i, loss in enumerate(model(text[:, :-1], text[:, 1:], reduction="none")[0].tolist()):
            want[d.start + 1 + i] = loss
    assert losses.keys() == want.keys()
    assert all(losses[p] == pytest.approx(want[p], abs=1e-4) for p in want)
    assert meter.bpb == pytest.approx(sum(want.values()) / np.log(2) / validation(tokens).n_bytes, rel=1e-5)


def test_context_is_cut_to_the_window(recorder: Recorder) -> None:
    model = looped_model(ttt_lora_lr=0.0)
    tokens = documents([30])
    one_batch(tokens, model)
    losses = recorder.take()
    for w in windows(29, CHUNK, CONTEXT):
        text = torch.from_numpy(tokens[w.start : w.start + w.length + 1].astype("int64"))[None]
        want = model(text[:, :-1], text[:, 1:], reduction="none")[0, w.offset :]
        ours = [losses[w.start + w.offset + 1 + i] for i in range(w.count)]
        assert torch.allclose(torch.tensor(ours), want, atol=1e-4)


def test_a_kept_context_slides_along(recorder: Recorder) -> None:
    """With one visit to attention, what is kept is what a window of that many positions would see."""
    changes = dict(ttt_lora_lr=0.0, num_layers=1, num_loops=0, parallel_start_layer=0, ttt_eval_seq_len=12)
    tokens, losses = documents([40]), []
    for context in ("rerun", "cached"):
        model = tiny_model(**{**SMALL, **changes, "ttt_context": context}).requires_grad_(False)
        one_batch(tokens, model)
        losses.append(recorder.take())
    full = [w for w in windows(39, CHUNK, 12) if w.count == CHUNK]
    compared = [w.start + w.offset + CHUNK for w in full]  # the last target of a chunk sees as many keys in both
    assert len(compared) == 6
    assert all(losses[0][p] == pytest.approx(losses[1][p], abs=1e-5) for p in compared)


# ---- batches ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [{}, dict(ttt_beta1=0.5), dict(ttt_optimizer="sgd", ttt_beta1=0.5, ttt_lora_lr=1.0), dict(ttt_mlp_lora=False),
     dict(ttt_context="cached")],
    ids=str,
)  # fmt: skip
def test_documents_together_score_as_alone(recorder: Recorder, changes: dict[str, Any]) -> None:
    """Rows leave the batch as their documents finish, and their optimizer state with them."""
    model = looped_model(**changes)
    val = validation(documents(LENGTHS))
    docs = sorted(val.documents(), key=lambda d: d.n_targets)
    scorer = Scorer(model, val, model.cfg, LoneRun())
    together = scorer.run_batch(docs)
    batched = recorder.take()
    alone = [scorer.run_batch([d]) for d in docs]
    single = recorder.take()
    assert batched.keys() == single.keys()
    assert all(batched[p] == pytest.approx(single[p], abs=1e-5, rel=1e-5) for p in batched)
    assert together.bytes == sum(m.bytes for m in alone) == val.n_bytes


def test_rows_leave_as_documents_finish(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    sizes = []
    inner = Scorer.score_chunk

    def count(scorer: Scorer, chunk: Any, *rest: Any) -> Tensor:
        sizes.append(len(chunk.inputs))
        return inner(scorer, chunk, *rest)

    monkeypatch.setattr(Scorer, "score_chunk", count)
    one_batch(documents([40, 3, 3, 3, 3, 20, 3, 9]), looped_model())
    assert sizes[0] == 8
    assert sizes[-1] == 2
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("step", [5, 12, 64])
def test_padding_of_the_windows_changes_nothing(recorder: Recorder, step: int) -> None:
    """Kernels want round lengths, so windows are filled up behind their last token."""
    model, val = looped_model(), validation(documents(LENGTHS[:6]))
    scorer = Scorer(model, val, model.cfg, LoneRun())
    scorer.run_batch(val.documents())
    exact, scorer.window_step = recorder.take(), step
    scorer.run_batch(val.documents())
    padded = recorder.take()
    assert all(padded[p] == pytest.approx(exact[p], abs=1e-4) for p in exact)


@contexts
@pytest.mark.parametrize("grad_steps", [1, 2])
def test_recorded_chunks_score_and_learn_the_same(recorder: Recorder, grad_steps: int, context: str) -> None:
    """The shapes are those of graphs on a GPU; here they run as they are, from inputs that stay in place."""
    model, val = looped_model(ttt_grad_steps=grad_steps, ttt_context=context), validation(documents(LENGTHS))
    docs, results = val.documents(), []
    for kind in (Scorer, train_gpt.GraphedScorer):
        scorer = kind(model, val, model.cfg, LoneRun())
        if context == "rerun":
            scorer.window_step = 4
        for batch in (docs[:3], docs[3:6], docs[6:], docs[:3]):
            scorer.run_batch(batch)
        results.append(recorder.rows)
        recorder.rows = []
    assert results[0] == results[1]
    shapes = scorer.shapes([docs[:3], docs[3:6], docs[6:]])
    assert set(scorer.recorded) <= set(shapes)  # those from before the largest batch were in memory since given up
    scorer.recorded.clear()
    scorer.prepare([docs[:3], docs[3:6], docs[6:]])
    assert list(scorer.recorded) == shapes[:1] and math.prod(shapes[0]) == max(map(math.prod, shapes))
    scorer.record(shapes)
    assert list(scorer.recorded) == shapes
    scorer.run_batch([docs[8]] * 40)
    assert {n for n, _ in scorer.recorded} == {40}
    widths = {width for _, width in shapes}
    many = len(set(shapes)) >= 5 and all(width % 4 == 0 for width in widths)
    assert many or (context, widths) == ("cached", {train_gpt.AHEAD + CHUNK})


@pytest.mark.parametrize(
    "changes",
    [{}, dict(ttt_grad_steps=2), dict(smear_gate_enabled=True, bigram_hash_enabled=True), dict(ttt_beta1=0.9),
     dict(attn_out_gate_enabled=True, attn_out_gate_src="q"), dict(ttt_optimizer="sgd", ttt_beta1=0.5)],
    ids=str,
)  # fmt: skip
def test_replayed_chunks_score_and_learn_the_same(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    """Nothing that a graph would hold is of one call alone; the base changes in place between two batches."""
    record_on_tapes(monkeypatch)
    assert replayed_difference(looped_model(**changes)) < 1e-4


def replayed_difference(model: train_gpt.GPT, lengths: Sequence[int] = (21, 17, 9, 8, 14, 4)) -> float:
    """Largest difference in nats of a batch, as it is and replayed."""
    val, totals, half = validation(documents(lengths)), [], len(lengths) // 2
    docs, weights = val.documents(), [p.clone() for p in model.parameters()]
    first, second = docs[:half], docs[half:]
    for kind in (Scorer, train_gpt.GraphedScorer):
        scorer = kind(model, val, model.cfg, LoneRun())
        scorer.prepare([first, second])
        totals.append([scorer.run_batch(batch).nats.item() for batch in (first, second, first)])
        for p in model.parameters():
            p.data.mul_(1.05)
        totals[-1].append(scorer.run_batch(first).nats.item())
        for p, w in zip(model.parameters(), weights, strict=True):
            p.data.copy_(w)
    assert scorer.recorded and totals[0][0] == totals[0][2] != totals[0][3]
    return max(abs(a - b) for a, b in zip(*totals, strict=True))


def test_a_replay_tells_numbers_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The specification cuts a kept context by a number that Python counts: no graph may hold it."""
    record_on_tapes(monkeypatch)
    assert replayed_difference(looped_model(ttt_context="cached")) > 1e-2


def test_graphs_are_for_what_stays_the_same() -> None:
    model, run = looped_model(), LoneRun()
    run.device = torch.device("cuda")
    fused = lambda kind: train_gpt.FUSED._replace(attention=train_gpt.ATTENTION_KINDS[kind])
    for kind, allowed in (("triton", True), ("varlen", True), ("sdpa", False)):
        model.kernels = fused(kind)
        assert train_gpt.graphable(model.cfg, run, model) == allowed
    model.kernels = train_gpt.SPEC
    assert not train_gpt.graphable(model.cfg, run, model)
    for knob, allowed in (("smear_gate_enabled", True), ("cross_pass_xsa_enabled", True), ("recur_homotopy", False)):
        other = looped_model(**{knob: True})
        other.kernels = fused("triton")
        assert train_gpt.graphable(other.cfg, run, other) == allowed


@pytest.mark.parametrize(
    ("changes", "graphs"),
    [({}, True), (dict(ttt_context="cached"), True), (dict(cross_pass_xsa_enabled=True), True),
     (dict(cross_pass_xsa_enabled=True, ttt_context="cached"), False), (dict(tapin_enabled=True), False)],
    ids=str,
)  # fmt: skip
def test_which_scorer_a_gpu_gets(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], graphs: bool) -> None:
    monkeypatch.setattr(train_gpt, "graphable", lambda *_: True)
    model = looped_model(**changes)
    model.kernels = train_gpt.FUSED._replace(attention=train_gpt.ATTENTION_KINDS["triton"])
    scorer = train_gpt.ttt_scorer(model, validation(documents((9, 5))), model.cfg, LoneRun())
    assert isinstance(scorer, train_gpt.GraphedScorer) == graphs


def test_windows_are_padded_to_few_lengths() -> None:
    lengths = {train_gpt.padded_window(n, 64) for n in range(1, 2049)}
    assert len(lengths) == 16 and max(lengths) == 2048
    assert all(n <= train_gpt.padded_window(n, 64) < n + max(64, n / 4) for n in range(1, 5000))
    assert [train_gpt.padded_window(n, 1) for n in (1, 100, 2047)] == [1, 100, 2047]


def test_adapters_start_alike_and_from_the_seed() -> None:
    made = (
        Adapters(tiny_config(), 3, VISITED), Adapters(tiny_config(), 2, VISITED),
        Adapters(tiny_config(seed=1), 2, VISITED),
    )  # fmt: skip
    a, b, c = (named(x, x.values) for x in made)
    for name in ("q.A", "head.A"):
        x = a[name]
        assert torch.equal(x[0], x[2])
        assert torch.equal(x[:2], b[name])
        assert not torch.equal(b[name], c[name])
        assert x.abs().max() <= 32**-0.5
    assert a["k.B"].shape == (3, 8, 16, 3)
    assert a["head.B"].shape == (3, 1, 128, 3)


def test_adapters_start_again_and_grow() -> None:
    adapters = Adapters(tiny_config(ttt_beta1=0.9), 1, VISITED)
    start = adapters.values.clone()
    adapters.step(torch.ones_like(adapters.values), train_gpt.adamw)
    assert not torch.equal(adapters.values, start)
    for n in (1, 3, 2):
        adapters.restart(n)
        assert torch.equal(adapters.values, start.expand(n, -1)) and torch.equal(adapters.live, adapters.values)
        assert adapters.steps == adapters.first.abs().sum() == adapters.second.abs().sum() == 0


@pytest.mark.parametrize(
    ("knob", "site"), [("ttt_k_lora", "k"), ("ttt_o_lora", "attn_bypass"), ("ttt_mlp_lora", "mlp_bypass")]
)
def test_sites_can_be_left_out(knob: str, site: str) -> None:
    full, less = (
        {f"{p.site}.{p.side}" for p in Adapters(tiny_config(**{knob: on}), 1, VISITED).pieces} for on in (True, False)
    )
    assert full - less == {f"{site}.A", f"{site}.B"}


# ---- base learning ---------------------------------------------------------------------------------------------------
def weights(model: train_gpt.GPT) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def learned(val: ValidationSet, docs: Sequence[Document], **changes: Any) -> list[Tensor]:
    model = looped_model(**changes)
    adapt_base(model, val, docs, model.cfg, LoneRun(), 1)
    assert not any(p.requires_grad for p in model.parameters())
    return weights(model)


def by_hand(rows: Callable[[train_gpt.GPT], Tensor], **changes: Any) -> list[Tensor]:
    """One step of SGD on a mean loss: the first, so without momentum."""
    model = looped_model(**changes)
    model.requires_grad_(True)
    rows(model).backward()
    params = list(model.parameters())
    norm = torch.cat([p.grad.flatten() for p in params]).norm()
    factor = min(1.0, model.cfg.global_ttt_grad_clip / (norm.item() + 1e-6))
    return [p.detach() - model.cfg.global_ttt_lr * factor * p.grad for p in params]


def test_base_learning_keeps_documents_apart() -> None:
    """One step equals SGD on pieces as rows of their own: cut at every document start and every EVAL_SEQ_LEN tokens."""
    val = validation(documents((9, 14, 6), seed=2))
    docs, edges = val.documents()[:2], (0, 9, 16, 23)
    text = torch.from_numpy(np.append(val.tokens[:23], BOS).astype("int64"))

    def separate(model: train_gpt.GPT) -> Tensor:
        pieces = [(text[None, a:b], text[None, a + 1 : b + 1]) for a, b in itertools.pairwise(edges)]
        return torch.cat([model(x, y, reduction="none") for x, y in pieces], dim=1).mean()

    ours, want = learned(val, docs), by_hand(separate)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, want, strict=True))
    start = weights(looped_model())
    assert all(not torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, start, strict=True))


def test_base_learning_can_ignore_boundaries() -> None:
    val = validation(documents((9, 7, 6), seed=2))
    docs, changes = val.documents()[:2], dict(global_ttt_respect_doc_boundaries=False)

    def joined(model: train_gpt.GPT) -> Tensor:
        text = torch.from_numpy(np.append(val.tokens[:16], BOS).astype("int64"))[None]
        return model(text[:, :-1], text[:, 1:])

    ours, want = learned(val, docs, **changes), by_hand(joined, **changes)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, want, strict=True))
    apart = learned(val, docs)
    assert not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, apart, strict=True))


@pytest.mark.parametrize("lengths", [(2, 3), (60, 3), (48, 1), (100,), (30, 90, 5)], ids=str)
def test_base_learning_is_deterministic_for_any_text(lengths: tuple[int, ...]) -> None:
    val = validation(documents(lengths))
    a, b = learned(val, val.documents()), learned(val, val.documents())
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(torch.isfinite(x).all() for x in a)
    assert any(not torch.equal(x, y) for x, y in zip(a, weights(looped_model()), strict=True))


def test_base_learning_reads_the_scored_documents_alone() -> None:
    tokens = documents((9, 14, 6, 11), seed=2)
    docs = [validation(tokens).documents()[i] for i in (0, 2)]
    other = tokens.copy()
    other[12:20] = 9
    a, b = (learned(validation(t), docs) for t in (tokens, other))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    other = tokens.copy()
    other[3] = 9
    assert not all(torch.equal(x, y) for x, y in zip(a, learned(validation(other), docs), strict=True))


def test_more_epochs_learn_more() -> None:
    val = validation(documents((40, 30)))
    losses = []
    for epochs in (1, 4):
        model = looped_model(global_ttt_epochs=epochs)
        adapt_base(model, val, val.documents(), model.cfg, LoneRun(), 1)
        text = torch.from_numpy(val.tokens[:40].astype("int64"))[None]
        losses.append(model(text[:, :-1], text[:, 1:]).item())
    assert losses[1] < losses[0]


def test_base_learning_rate_is_a_cosine_after_a_warm_up() -> None:
    cfg = Config()
    assert train_gpt.base_lr(cfg, 0, 11) == pytest.approx(1e-3)
    assert train_gpt.base_lr(cfg, 5, 11) == pytest.approx(5e-4)
    assert train_gpt.base_lr(cfg, 10, 11) == pytest.approx(0, abs=1e-12)
    assert train_gpt.base_lr(cfg, 0, 1) == pytest.approx(1e-3)
    warm = Config(global_ttt_warmup_chunks=4, global_ttt_warmup_start_lr=2e-4)
    assert [train_gpt.base_lr(warm, i, 11) for i in range(5)] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert train_gpt.base_lr(warm, 10, 11) == pytest.approx(0, abs=1e-12)
    assert train_gpt.base_lr(warm, 1, 2) < 1e-3


# ---- plain evaluation and the meter ----------------------------------------------------------------------------------
def test_meter_is_the_formula() -> None:
    a, b = Meter(), Meter()
    a.add(torch.tensor([1.0, 2.0]), 2, 5)
    b.add(torch.tensor(0.5), 1, 3)
    a.merge(b)
    assert (a.tokens, a.bytes) == (3, 8)
    assert a.loss == pytest.approx(3.5 / 3)
    assert a.bpb == pytest.approx(3.5 / (np.log(2) * 8))
    a.expect(3, 8)
    with pytest.raises(Stop):
        a.expect(3, 9)


@pytest.mark.parametrize("row_tokens", [16, 32, 256])
def test_evaluation_scores_the_whole_stream(row_tokens: int) -> None:
    tokens = documents((9, 30, 2, 17, 1, 44))
    val, model = validation(tokens), looped_model(val_batch_tokens=8 * row_tokens)
    assert model.cfg.val_row_tokens == row_tokens
    score = train_gpt.evaluate(model, val, model.cfg, LoneRun(), "test")
    assert (score.tokens, score.bytes) == (val.n_targets, val.n_bytes)
    nats = 0.0
    for a in range(0, val.n_targets, row_tokens):
        row = tokens[a : min(a + row_tokens, val.n_targets) + 1]
        edges = [i for i in range(len(row) - 1) if i == 0 or row[i] == BOS]
        for start, end in itertools.pairwise([*edges, len(row) - 1]):
            for at in range(start, end, 16):  # pieces of EVAL_SEQ_LEN
                text = torch.from_numpy(row[at : min(at + 16, end) + 1].astype("int64"))[None]
                nats += model(text[:, :-1], text[:, 1:], reduction="none").sum().item()
    assert score.nats.item() == pytest.approx(nats, rel=1e-5)
