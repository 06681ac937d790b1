"""Follow-up systems of training: off they change nothing, on they do what their formula says, in every kind of run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import LoneRun, tiny_config, tiny_model
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
    val = ValidationSet(tokens, torch.ones(len(tokens), dtype=torch.int64).numpy())
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
