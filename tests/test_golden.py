"""Agreement with the public record's code: logits, losses, gradients, adapters, Hessians, GPTQ, Muon, windows.

`golden_small.npz` stands beside this file. Its `gptq.*`, `muon.*` and `windows` entries are copies from that code; its
`seeded.*` entries were computed with train_gpt.py at a time when it agreed with the full set, on a model whose weights
`support.tiny_model` draws. Where the full set is at hand (../shared/golden), all of it is compared. To write the small
file anew: `PYTHONPATH=. python tests/test_golden.py`, which first demands agreement with the full set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from support import ROOT, LoneRun, adapters_for, documents, named, packed, relative_error, tiny_model
from torch import Tensor

import train_gpt
from train_gpt import GPT, Docs

SMALL_FILE = ROOT / "tests" / "golden_small.npz"
FULL_FILE = ROOT.parent / "shared" / "golden" / "golden.npz"
Golden = Mapping[str, np.ndarray]
full_set = pytest.mark.skipif(not FULL_FILE.exists(), reason="the full set of values is not here")
MODES = ("plain", "looped")
SITES = dict(q="q_loras", k="k_loras", v="v_loras", attn_bypass="o_loras", mlp_bypass="mlp_loras")


@pytest.fixture(scope="module")
def full() -> Golden:
    return np.load(FULL_FILE)


@pytest.fixture(scope="module")
def small() -> Golden:
    return np.load(SMALL_FILE)


# ---- the full set ----------------------------------------------------------------------------------------------------
def public_model(z: Golden, mode: str) -> GPT:
    env = dict(pair.split("=") for pair in z["env"].tolist())
    model = GPT(train_gpt.load_config({**env, "TTT_LORA_RANK": "4"}))
    model.load_state_dict({k.removeprefix("state."): torch.from_numpy(z[k]) for k in z if k.startswith("state.")})
    model.looped = mode == "looped"
    return model


def public_text(z: Golden) -> tuple[Tensor, Tensor, Docs]:
    cu = torch.from_numpy(z["cu_seqlens"])
    return torch.from_numpy(z["tokens"]), torch.from_numpy(z["targets"]), Docs(cu, int(cu.diff().max()))


@full_set
@pytest.mark.parametrize("mode", MODES)
def test_logits(full: Golden, mode: str) -> None:
    model, (tokens, _, docs) = public_model(full, mode), public_text(full)
    with torch.no_grad():
        assert relative_error(model(tokens.view(2, 48)), full[f"{mode}.logits_dense"]) < 1e-5
        assert relative_error(model(tokens, docs=docs), full[f"{mode}.logits_packed"]) < 1e-5


@full_set
@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradients(full: Golden, mode: str) -> None:
    model, (tokens, targets, docs) = public_model(full, mode), public_text(full)
    loss = model(tokens, targets, docs=docs)
    loss.backward()
    assert loss.item() == pytest.approx(float(full[f"{mode}.loss_packed"]), rel=1e-5)
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters()}
    want = {n: pytest.approx(float(full[f"{mode}.grad_norm.{n}"]), rel=1e-4, abs=1e-9) for n in norms}
    assert norms == want


@full_set
def test_adapted_token_losses(full: Golden) -> None:
    model, (tokens, targets, _) = public_model(full, "looped"), public_text(full)
    adapters = adapters_for(model, 2)
    values = named(adapters, adapters.values)
    for name, public in SITES.items():
        for side in "AB":
            rows = [torch.from_numpy(full[f"ttt.lora.{public}.{i}.{side}"]) for i in range(len(model.plan))]
            assert values[f"{name}.{side}"].shape == torch.stack(rows, 1).shape
            values[f"{name}.{side}"].copy_(torch.stack(rows, 1))
    for side in "AB":
        values[f"head.{side}"][:, 0] = torch.from_numpy(full[f"ttt.lora.lm_head_lora.{side}"])
    with torch.no_grad():
        losses = model(tokens.view(2, 48), targets.view(2, 48), adapters=adapters, reduction="none")
    assert relative_error(losses, full["ttt.token_loss"]) < 1e-5


@full_set
def test_hessians(full: Golden) -> None:
    model, (tokens, *_) = public_model(full, "looped"), public_text(full)
    sums = train_gpt.calibrate(model, [tokens.view(2, 48)], LoneRun())
    names = [k.removeprefix("hessian_diag.") for k in full if k.startswith("hessian_diag.")]
    assert len(names) == 67
    for name in names:
        ours = sums[train_gpt.hessian_key(name)].diagonal()
        assert relative_error(ours, full[f"hessian_diag.{name}"]) < 1e-5, name


# ---- the small set: public numbers -----------------------------------------------------------------------------------
def test_gptq_integers_and_scales(small: Golden) -> None:
    q, scale = train_gpt.gptq(torch.from_numpy(small["gptq.w"]), torch.from_numpy(small["gptq.h"]), 6, 12.0, 32)
    assert scale.dtype == torch.float16
    assert np.array_equal(scale.numpy(), small["gptq.scale"])
    assert np.count_nonzero(q.numpy() != small["gptq.q"]) <= 4  # of 8192: ties may round either way elsewhere


def check_muon(z: Golden) -> None:
    gradient, weight = torch.from_numpy(z["muon.grad"]).float(), torch.from_numpy(z["muon.weight"]).float()
    momentum = torch.zeros_like(gradient).bfloat16()
    for step, g in ((1, gradient), (2, gradient / 2)):
        update = train_gpt.muon_update(g, momentum, 0.95, 5, row_normalize=True)
        weight = weight * (1 - 0.026 * 0.095) - 0.026 * update
        after = torch.from_numpy(z[f"muon.after_step{step}"]).float()
        assert relative_error(weight, after) < 1e-2
        # The step alone is a small part of the weight; the public code orthogonalizes in bfloat16, the CPU in float32.
        before = torch.from_numpy(z["muon.weight"]).float()
        assert relative_error(before - weight, before - after) < 5e-2


def test_muon_steps(small: Golden) -> None:
    check_muon(small)


@full_set
def test_muon_steps_of_all_matrices(full: Golden) -> None:
    muon = {k: full[k] for k in full if k.startswith("muon.")}
    check_muon({**muon, "muon.weight": full["state.mlp_up_bank"]})


def test_windows(small: Golden) -> None:
    rows = small["windows"].tolist()
    assert len(rows) == 40
    for n_targets, chunk, *window in rows:
        assert list(train_gpt.windows(n_targets, 48, 2048)[chunk]) == window


# ---- the small set: a seeded model -----------------------------------------------------------------------------------
def seeded_values(mode: str) -> dict[str, np.ndarray]:
    """Everything a model computes, on weights and text that are drawn from frozen streams."""
    model = tiny_model(7, smear_gate_enabled=False)
    model.looped = mode == "looped"
    lengths = (9, 14, 1, 16)
    tokens = torch.from_numpy(documents(lengths, seed=11).astype(np.int64))[None]
    targets, docs = tokens.roll(-1, dims=1), packed(lengths)
    with torch.no_grad():
        values = {"dense": model(tokens.view(2, 20))[:, ::4], "packed": model(tokens, docs=docs)[:, ::4]}
    loss = model(tokens, targets, docs=docs)
    loss.backward()
    values |= {"loss": loss.detach()} | {f"grad_norm.{n}": p.grad.norm() for n, p in model.named_parameters()}
    adapters, rng = adapters_for(model, 2), np.random.RandomState(13)
    for _, part in sorted(named(adapters, adapters.values).items()):
        visits_first = part.transpose(0, 1)
        visits_first.copy_(torch.from_numpy(0.2 * rng.standard_normal(visits_first.shape).astype(np.float32)))
    with torch.no_grad():
        values["ttt"] = model(tokens.view(2, 20), targets.view(2, 20), adapters=adapters, reduction="none")
    sums = train_gpt.calibrate(model, [tokens.view(2, 20)], LoneRun())
    values |= {f"hessian_diag.{name}": h.diagonal() for name, h in sums.items() if h.dim() == 2}
    return {f"seeded.{mode}.{k}": v.numpy() for k, v in values.items()}


@pytest.mark.parametrize("mode", MODES)
def test_seeded_model(small: Golden, mode: str) -> None:
    ours = seeded_values(mode)
    assert set(ours) == {k for k in small if k.startswith(f"seeded.{mode}.")}
    wrong = {k: relative_error(torch.from_numpy(v), small[k]) for k, v in ours.items()}
    assert {k: e for k, e in wrong.items() if not e < 1e-4} == {}


# ---- writing the small set -------------------------------------------------------------------------------------------
def write_small() -> None:
    z = np.load(FULL_FILE)
    checks: list[Callable[..., None]] = [test_logits, test_loss_and_gradients]
    for check in checks:
        for mode in MODES:
            check(z, mode)
    test_adapted_token_losses(z)
    test_hessians(z)
    copied = {k: z[k] for k in ("gptq.w", "gptq.h", "gptq.q", "gptq.scale")}
    copied["windows"] = z["windows"].astype(np.int32)
    matrices = slice(3, 5)  # of 11
    for name in ("muon.grad", "muon.after_step1", "muon.after_step2"):
        copied[name] = z[name][matrices].astype(np.float16)
    copied["muon.weight"] = z["state.mlp_up_bank"][matrices].astype(np.float16)
    np.savez_compressed(SMALL_FILE, **copied, **seeded_values("plain"), **seeded_values("looped"))


if __name__ == "__main__":
    write_small()
