"""Follow-up systems of training: off they change nothing, on they do what their formula says, in every kind of run."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipeline_tools import UNMINIFIED, make_shards, run, together
from support import TOKENIZER, LoneRun, documents, packed, tiny_config, tiny_model
from test_optim import with_gradients
from torch import Tensor

import train_gpt
from train_gpt import Config, Optimizer, ValidationSet, role_of, signed_power_, training_fraction, wd_multiplier


def stepped(wd_mul: float | None = None, seed: int = 5, **changes: Any) -> dict[str, Tensor]:
    """The weights of the tiny model after one step."""
    model = tiny_model()
    optimizer = Optimizer(model, tiny_config(**changes), LoneRun())
    with_gradients(model, seed=seed)
    optimizer.clip(optimizer.reduce())
    optimizer.update(0.8, 0.9, *([] if wd_mul is None else [wd_mul]))
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def trained(folder: Path, dataset: Path, **changes: Any) -> dict[str, Tensor]:
    """The averaged weights of a few steps of training."""
    cfg = tiny_config(data_path=dataset, iterations=4, warmup_steps=1, val_loss_every=0, **changes)
    folder.mkdir()
    torch.manual_seed(0)
    model = train_gpt.GPT(cfg).place(torch.device("cpu"))
    tokens = train_gpt.read_shard(train_gpt.val_files(cfg)[0])
    val = ValidationSet(tokens, np.ones(len(tokens), np.int64))
    train_gpt.train(cfg, LoneRun(folder), model, val)
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are equal to the bit."""
    assert a.keys() == b.keys()
    return {n for n in a if torch.equal(a[n], b[n])}


# ---- weight decay ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("final", [0.0, 0.1, 0.5, 2.0])
def test_weight_decay_is_whole_until_the_taper_and_exact_at_its_end(final: float) -> None:
    cfg = Config(wd_taper_start_frac=0.7, wd_taper_final_mult=final)
    assert [wd_multiplier(cfg, f) for f in (0.0, 0.35, 0.7)] == [1, 1, 1]
    assert wd_multiplier(cfg, 0.85) == pytest.approx((1 + final) / 2)
    assert wd_multiplier(cfg, 1.0) == wd_multiplier(cfg, 1.2) == final


def test_the_taper_follows_the_clock_as_the_steps() -> None:
    """It is a function of the fraction that the learning rate has, whichever way that is counted."""
    by_steps = tiny_config(wd_taper_start_frac=0.7, max_wallclock_seconds=0, iterations=100)
    by_clock = tiny_config(wd_taper_start_frac=0.7, max_wallclock_seconds=54, iterations=20_000)
    for i in range(101):
        a = wd_multiplier(by_steps, training_fraction(by_steps, i, 1e9))
        b = wd_multiplier(by_clock, training_fraction(by_clock, 7, i / 2))
        assert a == pytest.approx(b)


def test_no_taper_by_default() -> None:
    assert all(wd_multiplier(Config(), f / 50) == 1.0 for f in range(60))
    assert same(stepped(), stepped(1.0)) == set(stepped())


def test_the_taper_scales_the_decay_of_the_matrices_alone() -> None:
    before = {n: p.detach() for n, p in tiny_model().named_parameters()}
    whole, half = stepped(), stepped(0.5)
    for n in before:
        if role_of(n).optimizer == "muon":
            assert torch.allclose(half[n] - whole[n], 0.026 * 0.8 * 0.095 * 0.5 * before[n], atol=1e-6), n
            assert not torch.equal(half[n], whole[n])
        else:
            assert torch.equal(half[n], whole[n]), n


def test_training_tapers(tmp_path: Path, dataset: Path) -> None:
    """At fraction 0 and 0.25 of four steps there is no taper yet, later there is; priming has none."""
    seen: list[float] = []
    inner = Optimizer.update

    def watch(optimizer: Optimizer, lr_mul: float, momentum: float, wd_mul: float = 1.0) -> None:
        seen.append(wd_mul)
        inner(optimizer, lr_mul, momentum, wd_mul)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "update", watch)
        on = trained(tmp_path / "on", dataset, wd_taper_start_frac=0.25, wd_taper_final_mult=0)
    assert seen == pytest.approx([1, 1, 1, 1, 2 / 3, 1 / 3])
    off = trained(tmp_path / "off", dataset, wd_taper_final_mult=0)
    assert {n for n in on if n not in same(on, off)} >= {n for n in on if role_of(n).optimizer == "muon"}


# ---- power of the gradient -------------------------------------------------------------------------------------------
def test_the_power_keeps_signs_and_zeros() -> None:
    x = torch.tensor([-4.0, -1.0, -0.0, 0.0, 1e-30, 9.0])
    y = signed_power_(x.clone(), 0.5)
    assert torch.allclose(y, torch.tensor([-2.0, -1.0, 0.0, 0.0, 1e-15, 3.0]))
    assert torch.allclose(signed_power_(x.clone(), 1.0), x)
    low = signed_power_(x.bfloat16(), 0.9)
    assert low.dtype == torch.bfloat16
    assert torch.allclose(low.float(), x.sign() * x.abs() ** 0.9, rtol=1e-2, atol=1e-30)


def test_the_power_is_that_of_muons_clipped_gradient() -> None:
    """The step is the plain one on gradients that were clipped and raised by hand; AdamW's stays as it was."""
    ours, plain = stepped(muon_grad_power=0.8), stepped()
    model = tiny_model()
    optimizer = Optimizer(model, tiny_config(), LoneRun())
    with_gradients(model)
    optimizer.clip(optimizer.reduce())
    for p in optimizer.banks:
        p.grad.copy_(p.grad.sign() * p.grad.abs() ** 0.8)
    optimizer.update(0.8, 0.9)
    for n, p in model.named_parameters():
        assert torch.allclose(ours[n], p, atol=1e-6), n
        assert torch.equal(ours[n], plain[n]) == (role_of(n).optimizer != "muon"), n


def test_power_one_is_no_power() -> None:
    assert same(stepped(muon_grad_power=1.0), stepped()) == set(stepped())


# ---- losses weighted by bytes ----------------------------------------------------------------------------------------
class Loader:
    """One step of made-up micro-batches."""

    def __init__(self) -> None:
        self.run = LoneRun()
        rows = [torch.from_numpy(documents([9, 7, 17], seed=i).astype("int64")) for i in range(8)]
        self.batches = [(r[None, :32], r[None, 1:33], packed([9, 7, 16])) for r in rows]

    def next_step(self) -> list[tuple[Tensor, Tensor, train_gpt.Docs]]:
        return self.batches


def gradients(weights: Tensor | None) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a training step."""
    model, grads = tiny_model(), {}
    optimizer = Optimizer(model, tiny_config(), LoneRun())
    optimizer.update = lambda *_: grads.update({n: p.grad.clone() for n, p in model.named_parameters()})
    return train_gpt.train_step(train_gpt.MicroBatch(model, weights), optimizer, Loader(), 1.0, 0.9).item(), grads


def test_the_weighted_loss_is_the_formula() -> None:
    weights = torch.randint(1, 16, (128,)).float()
    (loss, grads), model, want = gradients(weights), tiny_model(), 0.0
    for inputs, targets, docs in Loader().batches:
        ce, w = model(inputs, targets, docs=docs, reduction="none"), weights[targets]
        want = want + (ce * w).sum() / w.sum() / 8
    want.backward()
    assert loss == pytest.approx(want.item(), rel=1e-6)
    scale = Optimizer(model, tiny_config(), LoneRun())
    scale.clip(scale.reduce())
    assert all(torch.allclose(grads[n], p.grad, atol=1e-6) for n, p in model.named_parameters())
    plain = gradients(None)
    assert abs(loss - plain[0]) > 1e-3
    assert not torch.allclose(grads["qo_bank"], plain[1]["qo_bank"], atol=1e-5)


def test_equal_weights_are_no_weights() -> None:
    ours, plain = gradients(torch.full((128,), 3.0)), gradients(None)
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    assert all(torch.allclose(ours[1][n], g, atol=1e-6) for n, g in plain[1].items())


def test_weights_are_the_bytes_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = Config(bpb_weighted_loss_enabled=True, tokenizer_path=str(TOKENIZER))
    weights = train_gpt.byte_weights(cfg, LoneRun())
    assert capsys.readouterr().out == "bpb_weighted_loss: enabled=True mean_weight=5.010 min=1 max=16\n"
    sp = train_gpt.load_tokenizer(cfg)
    for text in ("the", "\u2581the", "\u2581", "e", "<s>", "<0x41>"):
        want = 1 if text.startswith("<") else max(1, len(text.removeprefix("\u2581").encode()))
        assert weights[sp.piece_to_id(text)] == want, text
    assert train_gpt.byte_weights(Config(tokenizer_path="missing"), LoneRun()) is None


def test_evaluation_knows_no_weights(dataset: Path) -> None:
    tokens = train_gpt.read_shard(dataset / "fineweb_val_000000.bin")
    val = ValidationSet(tokens, np.ones(len(tokens), np.int64))
    scores = [
        train_gpt.evaluate(tiny_model(), val, tiny_config(bpb_weighted_loss_enabled=on), LoneRun(), "test").bpb
        for on in (False, True)
    ]
    assert scores[0] == scores[1]


# ---- together --------------------------------------------------------------------------------------------------------
ALL_ON = dict(
    WD_TAPER_START_FRAC=0.5, WD_TAPER_FINAL_MULT=0.2, MUON_GRAD_POWER=0.9, BPB_WEIGHTED_LOSS_ENABLED=1,
    TTT_LORA_LAYER_LR_ALPHA=0.5, LORA_PLUS_RATIO=2, TTT_LORA_ALPHA=6, EVAL_HASH_EMB_ENABLED=1, EVAL_LOOP_EMB_ENABLED=1,
    EVAL_HASH_EMB_BUCKETS=256, TAPIN_ENABLED=1, TAPIN_MIN_MATCH=2,
)  # fmt: skip


def test_two_processes_do_as_one_with_everything_on(tmp_path: Path) -> None:
    """Training, artifact and phased scoring; and that each switch was on in both runs."""
    data = make_shards(tmp_path / "data", 0, 12_000, (9, 3, 14, 6, 22, 4, 11))
    one, two = together({
        n: partial(run, tmp_path / n, data, {"world": world, **UNMINIFIED}, **ALL_ON)
        for n, world in (("one", 1), ("two", 2))
    }).values()  # fmt: skip
    one.ok(), two.ok()
    assert max(abs(two.losses[s] - one.losses[s]) for s in one.losses) < 1e-3
    for key in ("bpb_float", "bpb_quantized", "bpb_ttt"):
        assert two.result[key] == pytest.approx(one.result[key], rel=2e-3), key
    hints = [re.search(r"^tapin: .*", r.log, re.M)[0] for r in (one, two)]
    assert all("bpb_weighted_loss: enabled=True" in r.log for r in (one, two))
    counted = [int(h.split()[4]) for h in hints]
    assert counted[0] > 20
    assert counted[1] == pytest.approx(counted[0], abs=3), "whether a token is among the likeliest is a close call"
