"""Follow-up systems of scoring: off they change nothing, on they do what their formula says and read nothing ahead."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LoneRun, documents, named, packed, tiny_config
from test_kernels import interpreted, needs_triton, plain_and_fused
from test_ttt import LENGTHS, Recorder, looped_model, validation, whole_run
from torch import Tensor

import train_gpt
from train_gpt import (
    BOS,
    GPT,
    Adapters,
    Config,
    ConfigError,
    Document,
    adapt_base,
    adapter_lr,
    document_hints,
    load_config,
    mix_hints,
    plan_phases,
    windows,
)
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
    assert adapter_lr("A", 0, cfg) == 1e-4
    assert adapter_lr("A", 10, cfg) == pytest.approx(1.5e-4)
    assert adapter_lr("B", 5, cfg) == pytest.approx(4 * 1.25e-4)
    assert adapter_lr("A", None, cfg) == 1e-4
    assert {adapter_lr(side, layer, Config()) for side in "AB" for layer in (0, 7, None)} == {1e-4}


def filled(adapters: Adapters) -> Adapters:
    adapters.values.copy_(torch.randn(adapters.values.shape, generator=torch.Generator().manual_seed(3)))
    return adapters


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_step_of_every_visit_is_the_plain_step_times_its_rate(optimizer: str) -> None:
    """Learning rates multiply steps and decoupled decay alike."""
    steps = []
    changes = dict(num_layers=4, ttt_optimizer=optimizer, loop_start=1, loop_end=1, parallel_start_layer=3)
    for more in ({}, dict(ttt_lora_layer_lr_alpha=0.5, lora_plus_ratio=4.0)):
        adapters = filled(Adapters(tiny_config(**changes, **more), 2, LAYERS))
        before = adapters.values.clone()
        adapters.step(2 * before, train_gpt.adamw)
        steps.append(named(adapters, adapters.values - before))
    plain, sloped = steps
    for name in plain:
        site, side = name.split(".")
        for visit, layer in enumerate(LAYERS if site != "head" else [0]):
            rate = (1 + 0.5 * layer / 3) * (4 if side == "B" else 1)
            assert torch.allclose(sloped[name][:, visit], rate * plain[name][:, visit], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("changes", [{}, dict(ttt_beta1=0.9), dict(ttt_optimizer="sgd", ttt_beta1=0.9)], ids=str)
def test_updates_are_those_of_torch(changes: dict[str, Any]) -> None:
    """AdamW, or SGD with momentum, on the whole of the rows."""
    cfg = tiny_config(ttt_lora_lr=0.01, **changes)
    adapters = filled(Adapters(cfg, 2, LAYERS))
    theirs = adapters.values.clone().requires_grad_()
    betas = (cfg.ttt_beta1, cfg.ttt_beta2)
    if cfg.ttt_optimizer == "sgd":
        learner = torch.optim.SGD([theirs], cfg.ttt_lora_lr, betas[0], weight_decay=cfg.ttt_weight_decay)
    else:
        learner = torch.optim.AdamW([theirs], cfg.ttt_lora_lr, betas, eps=1e-10, weight_decay=cfg.ttt_weight_decay)
    for seed in range(3):
        theirs.grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(seed))
        adapters.step(theirs.grad, train_gpt.adamw)
        learner.step()
    assert torch.allclose(adapters.values, theirs, rtol=1e-5, atol=1e-6)
    assert adapters.live.data_ptr() == adapters.values.data_ptr()  # in float32 they are one


@needs_triton
@interpreted
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_interpreted_update(beta1: float) -> None:
    cfg = tiny_config(ttt_lora_lr=0.01, ttt_beta1=beta1, ttt_lora_layer_lr_alpha=0.5)
    plain, fused = (filled(Adapters(cfg, 2, LAYERS, dtype=torch.bfloat16)) for _ in range(2))
    for seed in range(3):
        gradient = torch.randn(plain.values.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
        plain.step(gradient, train_gpt.adamw)
        fused.step(gradient, train_gpt.adamw_fused)
    for name in ("values", "second", *(["first"] if beta1 else [])):
        assert torch.allclose(getattr(fused, name), getattr(plain, name), rtol=1e-5, atol=1e-7), name
    assert torch.allclose(fused.live.float(), fused.values, rtol=2**-7)  # the interpreter cuts instead of rounding


def test_documents_leave_with_all_that_is_theirs() -> None:
    adapters = filled(Adapters(tiny_config(ttt_beta1=0.5), 3, LAYERS))
    adapters.step(adapters.values.clone(), train_gpt.adamw)
    parts = ("values", "first", "second")
    want = {name: getattr(adapters, name)[[2, 0]].clone() for name in parts}
    adapters.keep(torch.tensor([2, 0]))
    assert all(torch.equal(getattr(adapters, name), want[name]) for name in parts)
    assert torch.equal(adapters.live, want["values"]) and adapters.steps == 1


def test_rates_that_are_all_one_learn_as_the_default(recorder: Recorder) -> None:
    plain, split = losses_of(recorder), losses_of(recorder, ttt_lora_layer_lr_alpha=1e-12)
    assert all(split[p] == pytest.approx(plain[p], abs=1e-5) for p in plain)
    sloped = losses_of(recorder, ttt_lora_layer_lr_alpha=0.5)
    assert any(abs(sloped[p] - plain[p]) > 1e-4 for p in plain)


def test_the_scale_is_alpha_over_rank(recorder: Recorder) -> None:
    cfg, plain = tiny_config(ttt_lora_alpha=6), tiny_config()  # rank 3
    (a, b), (c, d) = (filled(Adapters(x, 2, LAYERS)).pairs()[1] for x in (cfg, plain))
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


# ---- Tap-In ----------------------------------------------------------------------------------------------------------
def slow_hint(x: Sequence[int], t: int, start: int, cfg: Config) -> tuple[int, float]:
    """The hint after x[: t + 1] and its share, candidate by candidate; reads nothing behind t."""
    best, hint, share = 0, 0, 0.0
    ranges = [(start, t, cfg.tapin_mix_w), (0, start, cfg.tapin_v6_cross_w)]
    for low, high, base in ranges[: 1 + cfg.tapin_cross_enabled]:
        found = []
        for p in range(low, high):
            length = 0
            while length < min(cfg.tapin_max_match, p + 1) and x[p - length] == x[t - length]:
                length += 1
            found.append(length)
        longest = max(found, default=0)
        if longest < cfg.tapin_min_match or longest <= best:
            continue
        best, hint = longest, x[low + found.index(longest) + 1]
        votes = sum(x[p] == x[t] and x[p + 1] == hint for p in range(low, high))
        share = min(0.5, base * (1 + 0.15 * (best - cfg.tapin_min_match)) * (1 + 0.2 * math.log(votes)))
    return hint, share


texts = st.lists(st.integers(0, 3), min_size=1, max_size=60) | st.integers(1, 4).flatmap(
    lambda n: st.lists(st.integers(8, 8 + n), min_size=1, max_size=25).map(lambda x: x * 3)
)


@settings(max_examples=300, deadline=None)
@given(x=texts, context=st.integers(1, 70), low=st.integers(1, 4), more=st.integers(0, 9), cross=st.booleans())
def test_hints_are_those_of_the_slow_matcher(x: list[int], context: int, low: int, more: int, cross: bool) -> None:
    cfg = Config(tapin_min_match=low, tapin_max_match=low + more, tapin_cross_enabled=cross)
    starts = np.maximum(np.arange(len(x)) + 1 - context, 0)
    hints = document_hints(np.array(x), starts, cfg)
    for t in range(len(x)):
        token, share = slow_hint(x, t, int(starts[t]), cfg)
        assert hints.shares[t] == pytest.approx(share, rel=1e-6), t
        assert share == 0 or hints.tokens[t] == token, t


def test_a_later_token_changes_no_hint() -> None:
    x = np.random.RandomState(0).randint(0, 4, 200)
    starts, cfg = np.maximum(np.arange(200) - 30, 0), Config(tapin_min_match=2)
    before = document_hints(x, starts, cfg)
    assert (before.shares > 0).sum() > 100
    for t in (20, 77, 150, 199):
        other = x.copy()
        other[t:] = 9
        after = document_hints(other, starts, cfg)
        assert np.array_equal(before.tokens[:t], after.tokens[:t])
        assert np.array_equal(before.shares[:t], after.shares[:t])


def test_repeated_text_costs_little() -> None:
    """A document of one token is the worst case: 20,000 tokens match everywhere at every length."""
    began = time.monotonic()
    x = np.full(20_000, 8)
    hints = document_hints(x, np.maximum(np.arange(len(x)) - 2048, 0), Config())
    assert hints.shares[-1] == 0.5
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("changes", [{}, dict(tapin_ent_min=3.0), dict(tapin_v4_top_k=3)], ids=str)
def test_mixtures_are_distributions(changes: dict[str, Any]) -> None:
    """Summed over every target there could be; where a hint counts does not depend on the target."""
    cfg, v, g = Config(**changes), 40, torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 5, v, generator=g)
    tokens, shares = torch.randint(0, v, (2, 5), generator=g), torch.tensor([0.5, 0.1, 0.0, 0.02, 0.3]).repeat(2, 1)
    total, seen = torch.zeros(2, 5), []
    for target in range(v):
        targets = torch.full((2, 5), target)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 5)
        mixed, counts = mix_hints(logits, targets, losses, tokens, shares, cfg)
        total += (-mixed).exp()
        seen.append(counts)
        w = torch.where(counts, shares, 0.0)
        assert torch.allclose((-mixed).exp(), (1 - w) * (-losses).exp() + w * (tokens == target), atol=1e-6)
    assert torch.allclose(total, torch.ones(2, 5), atol=1e-5)
    assert all(torch.equal(c, seen[0]) for c in seen)
    p = logits.softmax(-1)
    entropy, rank = -(p * p.log()).sum(-1), (logits > logits.gather(-1, tokens[..., None])).sum(-1)
    want = (shares > 0) & (entropy >= cfg.tapin_ent_min) & (rank < cfg.tapin_v4_top_k)
    assert torch.equal(seen[0], want)
    assert not changes or want.sum() < 8, "the condition decides something"


REPEATING = np.concatenate([np.append(BOS, np.tile(np.arange(20, 20 + n), 6)) for n in (3, 7, 5)]).astype(np.uint16)
TAPIN = dict(tapin_enabled=True, tapin_min_match=1, tapin_mix_w=0.3, tapin_v6_cross_w=0.3, tapin_v4_top_k=128)


@pytest.mark.parametrize("context", ["rerun", "cached"])
def test_hints_change_scores_and_nothing_that_is_learned(recorder: Recorder, context: str) -> None:
    """Undone with the hints' own shares, the scores are those of a run without: the adapters learned the same."""
    results = []
    for changes in ({}, TAPIN, TAPIN | dict(tapin_mix_w=0.0, tapin_v6_cross_w=0.0)):
        meter = whole_run(REPEATING, ttt_context=context, **changes)
        results.append((meter, recorder.take()))
    (plain_meter, plain), (mixed_meter, mixed), (_, none) = results
    assert none == plain, "a share of 0 is no hint, to the bit"
    assert mixed_meter.nats < plain_meter.nats, "this text repeats"
    cfg, val = looped_model(ttt_context=context, **TAPIN).cfg, validation(REPEATING)
    changed = 0
    for d in val.documents():
        x = REPEATING[d.start : d.start + d.n_targets].astype(np.int64)
        plan = windows(d.n_targets, cfg.ttt_chunk_size, cfg.ttt_eval_seq_len)
        hints = document_hints(x, np.repeat([w.start for w in plan], [w.count for w in plan]), cfg)
        for i in range(d.n_targets):
            at, hit = d.start + 1 + i, hints.tokens[i] == val.tokens[d.start + 1 + i]
            want = -math.log((1 - hints.shares[i]) * math.exp(-plain[at]) + hints.shares[i] * hit)
            assert mixed[at] == pytest.approx(want, abs=1e-4)
            changed += hints.shares[i] > 0
    assert changed > 50


def test_hints_read_nothing_ahead(recorder: Recorder) -> None:
    """As without them: a token changes no score before it, nor any of another document of its batch."""
    model = looped_model(**TAPIN)
    scorer = Scorer(model, validation(REPEATING), model.cfg, LoneRun())
    scorer.run_batch(scorer.val.documents())
    before = recorder.take()
    for t in (5, 20, 40, 70):
        other = REPEATING.copy()
        other[t] = 90
        scorer = Scorer(model, validation(other), model.cfg, LoneRun())
        scorer.run_batch(scorer.val.documents())
        after = recorder.take()
        changed = {p for p in before if after[p] != before[p]}
        mine = next(d for d in scorer.val.documents() if d.start <= t < d.start + d.n_targets)
        assert t in changed
        assert changed <= set(range(t, mine.start + mine.n_targets + 1))


def test_the_log_says_how_often_hints_count(capsys: pytest.CaptureFixture[str]) -> None:
    whole_run(REPEATING, **TAPIN)
    line = re.search(r"tapin: hints counted at (\d+) of 92 targets \((.*)%\)", capsys.readouterr().out)
    assert 50 < int(line[1]) < 92
    assert float(line[2]) == pytest.approx(100 * int(line[1]) / 92, abs=0.01)
    whole_run(REPEATING)
    assert "tapin" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["TAPIN_TOP_K", "TAPIN_CROSS_W", "TAPIN_BOOST_PER_MATCH", "TAPIN_V4_MIN_MATCH"])
def test_names_that_nothing_reads_are_refused_with_the_right_one(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: set TAPIN_"):
        load_config({name: "2"})


# ---- embeddings that exist while scoring -----------------------------------------------------------------------------
EVAL = dict(eval_hash_emb_enabled=True, eval_hash_emb_buckets=64, eval_loop_emb_enabled=True)


def begun(model: GPT) -> GPT:
    for switch in model.switches:
        switch.begin_scoring(model)
    return model


def with_embeddings(**changes: Any) -> GPT:
    """A looped model whose eval embeddings are not zero."""
    model, g = begun(looped_model(**EVAL, **changes)), torch.Generator().manual_seed(4)
    for switch in model.switches:
        switch.vectors.copy_(torch.randn(switch.vectors.shape, generator=g))
    return model


def text_row(*lengths: int) -> Tensor:
    return torch.from_numpy(documents(lengths).astype("int64"))[None]


def test_pairs_are_hashed_and_masked_at_document_starts() -> None:
    model, tokens = with_embeddings(), text_row(5, 1, 4)
    zeros = torch.zeros(1, 10, 32)
    pairs = model.switches[0]
    added, table, ids = pairs.embed(model, zeros, tokens, None), pairs.vectors, tokens[0].tolist()
    for t in range(10):
        first = t == 0 or ids[t] == BOS
        want = torch.zeros(32) if first else table[(2039 * ids[t - 1] + ids[t]) % 64]
        assert torch.equal(added[0, t], want), t
    assert sum(i == BOS for i in ids) == 3


def test_every_pass_has_its_vector_where_it_enters_the_loop() -> None:
    model, tokens = with_embeddings(num_loops=2), text_row(9)
    passes = model.switches[1].vectors
    assert len(passes) == 3
    passes.requires_grad_(True)
    logits = model(tokens)
    logits.square().sum().backward()
    assert passes.grad.abs().amax(1).min() > 1e-3
    with torch.no_grad():
        for i in range(3):
            passes[i].add_(1)
            assert not torch.allclose(model(tokens), logits, atol=1e-3), i
            passes[i].sub_(1)
    model.looped = False
    assert len(begun(model).switches[1].vectors) == 1, "without the loop there is one entry"


@pytest.mark.parametrize("packed_row", [False, True])
def test_new_embeddings_change_nothing(packed_row: bool) -> None:
    plain, model, tokens = looped_model(), looped_model(**EVAL), text_row(6, 5)
    docs = packed((6, 5)) if packed_row else None
    begun(model)
    assert torch.equal(model(tokens, docs=docs), plain(tokens, docs=docs))
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]


def test_embeddings_learn_with_the_base_at_their_rate() -> None:
    """The first step is SGD on the joint, clipped gradient, ten times as long for them; then nothing learns."""
    val, changes = validation(documents((9, 6), seed=2)), dict(eval_hash_emb_lr_mult=10.0, global_ttt_grad_clip=0.5)
    results = []
    for by_hand in (False, True):
        model = looped_model(**EVAL, **changes)
        params, extra = list(model.parameters()), [s.vectors for s in begun(model).switches]
        if by_hand:
            for p in params + extra:
                p.requires_grad_(True)
            text = torch.from_numpy(np.append(val.tokens[:9], BOS).astype("int64"))[None]
            model(text[:, :-1], text[:, 1:]).backward()
            torch.nn.utils.clip_grad_norm_(params + extra, 0.5)
            rate = model.cfg.global_ttt_lr
            results.append([p.detach() - rate * p.grad for p in params] + [-10 * rate * t.grad for t in extra])
        else:
            adapt_base(model, val, [Document(0, 9)], model.cfg, LoneRun(), 1)
            assert not any(p.requires_grad for p in params + extra)
            results.append([p.detach().clone() for p in params + extra])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))
    assert all(t.abs().max() > 1e-4 for t in results[0][-2:])


def test_embeddings_that_do_not_learn_change_no_score(recorder: Recorder) -> None:
    plain, same = losses_of(recorder), losses_of(recorder, **EVAL, eval_hash_emb_lr_mult=0.0)
    order = [d.start + 1 + i for p in plan_phases(validation(documents(LENGTHS)).documents(), tiny_config())[:1]
             for b in p.batches for d in b for i in range(d.n_targets)]  # fmt: skip
    learned = losses_of(recorder, **EVAL)
    assert learned.keys() == plain.keys() == same.keys()
    assert all(learned[p] == plain[p] == same[p] for p in order), "nothing is learned before the first phase ends"
    later = [p for p in plain if p not in order]
    assert sum(abs(learned[p] - plain[p]) > 1e-4 for p in later) > len(later) / 2


def test_embeddings_are_gone_after_scoring_and_fresh_in_every_run(recorder: Recorder) -> None:
    model, val = looped_model(**EVAL), validation(documents(LENGTHS))
    saved = {n: p.clone() for n, p in model.state_dict().items()}
    runs = []
    for _ in range(2):
        train_gpt.adapt_and_score(model, val, model.cfg, LoneRun())
        assert all(s.vectors is None for s in model.switches)
        runs.append(recorder.take())
        model.load_state_dict(saved)
    assert runs[0] == runs[1]


def test_embeddings_learn_from_scored_documents_alone(recorder: Recorder) -> None:
    """Through all phases, a token changes no score of its batch's other documents or of a batch before it."""
    tokens, changes = documents(LENGTHS), EVAL | dict(eval_hash_emb_lr_mult=10.0)
    whole_run(tokens, **changes)
    before = recorder.take()
    docs = validation(tokens).documents()
    batches = [b for p in plan_phases(docs, tiny_config()) for b in p.batches]
    batch_of = {d.start + 1 + i: k for k, b in enumerate(batches) for d in b for i in range(d.n_targets)}
    felt = 0
    for t in (4, 40, 90):
        other = tokens.copy()
        other[t] = 9 if tokens[t] != 9 else 10
        whole_run(other, **changes)
        after = recorder.take()
        mine = next(d for d in docs if d.start < t <= d.start + d.n_targets)
        changed = [p for p in before if after[p] != before[p]]
        assert all(t <= p <= mine.start + mine.n_targets or batch_of[p] > batch_of[t] for p in changed)
        felt += any(batch_of[p] > batch_of[t] for p in changed)
    assert felt


# ---- together --------------------------------------------------------------------------------------------------------
EVERYTHING = {**EVAL, **TAPIN, "ttt_lora_layer_lr_alpha": 0.5, "lora_plus_ratio": 2.0, "ttt_lora_alpha": 4.0}


@needs_triton
@interpreted
def test_fused_kernels_score_and_learn_the_same(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """All switches of scoring, in a short phased run: documents of two phases and what the base learned from them."""
    changes = {**EVERYTHING, "ttt_chunk_size": 6, "ttt_eval_seq_len": 16, "phased_ttt_prefix_docs": 2}
    monkeypatch.setattr(train_gpt, "warm_up_ttt", lambda *_: None)  # interpreted kernels take a minute for it
    tokens, runs = documents((9, 7, 5)), []
    for model in plain_and_fused(changes):
        model.requires_grad_(False)
        train_gpt.adapt_and_score(model, validation(tokens), model.cfg, LoneRun())
        runs.append((recorder.take(), [p.detach().clone() for p in model.parameters()]))
    (plain, weights), (fused, others) = runs
    assert all(fused[p] == pytest.approx(plain[p], rel=1e-3, abs=1e-3) for p in plain)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(weights, others, strict=True))
