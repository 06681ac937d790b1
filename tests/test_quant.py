"""Hessians, GPTQ, int8 rows, the stored form of every tensor, and banks taken apart and put together."""

from __future__ import annotations

import pytest
import torch
from support import LoneRun, documents, relative_error, tiny_config, tiny_model
from torch import Tensor

import train_gpt
from train_gpt import Coded, calibrate, gptq, int8_rows, quantize, rebank, unbank


def correlated_inputs(cols: int, seed: int = 0, rows: int = 200) -> Tensor:
    """Inputs with a few strong common directions: where passing errors on pays."""
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(rows, 4, generator=g) @ torch.randn(4, cols, generator=g)
    return common + 0.3 * torch.randn(rows, cols, generator=g)


def weighted_error(w: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    """Squared error of the outputs over all the inputs that made the Hessian."""
    d = (w - decoded).double()
    return float((d @ hessian.double() * d).sum())


@pytest.mark.parametrize("bits", [3, 4, 6, 7])
@pytest.mark.parametrize("shape", [(16, 40), (64, 24), (8, 130)])
def test_gptq_beats_rounding(bits: int, shape: tuple[int, int]) -> None:
    w, x = torch.randn(shape), correlated_inputs(shape[1])
    h = x.mT @ x
    q, scale = gptq(w, h, bits, 4.0)
    top = 2 ** (bits - 1) - 1
    rounded = (w / scale.float()[:, None]).round().clamp(-top, top) * scale.float()[:, None]
    ours = Coded("gptq", bits, q, scale, None).decode()
    assert weighted_error(w, ours, h) < 0.7 * weighted_error(w, rounded, h)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_codes_are_in_range_and_use_it(bits: int) -> None:
    w, x = torch.randn(32, 48), correlated_inputs(48)
    q, scale = gptq(w, x.mT @ x, bits, 2.0)
    top = 2 ** (bits - 1) - 1
    assert q.dtype == torch.int8
    assert q.shape == w.shape
    assert q.abs().max() == top  # two standard deviations: some entry is cut off
    assert scale.dtype == torch.float16
    assert torch.allclose(scale.float(), 2.0 * w.std(dim=1) / top, rtol=1e-3)


def test_gptq_with_white_inputs_is_rounding() -> None:
    w = torch.randn(8, 16)
    q, scale = gptq(w, torch.eye(16), 6, 12.0)
    assert torch.equal(q, (w / scale.float()[:, None]).round().to(torch.int8))


def test_blocks_do_not_change_the_codes() -> None:
    w, x = torch.randn(32, 96), correlated_inputs(96)
    whole, scale = gptq(w, x.mT @ x, 6, 12.0, block_size=96)
    for size in (1, 7, 32, 128):
        q, s = gptq(w, x.mT @ x, 6, 12.0, block_size=size)
        assert torch.equal(s, scale)
        assert (q != whole).float().mean() < 0.002  # sums in another order may tip a tie
    assert not torch.equal(whole, (w / scale.float()[:, None]).round().to(torch.int8))


def test_inputs_that_never_occur_have_zero_codes() -> None:
    w, x, dead = torch.randn(12, 20), correlated_inputs(20), [0, 7, 19]
    x[:, dead] = 0
    h = x.mT @ x
    before = h.clone()
    q, scale = gptq(w, h, 6, 12.0)
    assert not q[:, dead].any()
    assert q[:, [i for i in range(20) if i not in dead]].any(dim=0).all()
    # The scale still is that of the whole row, and the arguments are left alone.
    assert torch.allclose(scale.float(), 12.0 * w.std(dim=1) / 31, rtol=1e-3)
    assert torch.equal(h, before)


def test_empty_rows_and_no_inputs_at_all_are_harmless() -> None:
    w = torch.randn(6, 10)
    w[2] = 0
    q, scale = gptq(w, torch.zeros(10, 10), 6, 12.0)
    assert not q.any()
    x = correlated_inputs(10)
    q, scale = gptq(w, x.mT @ x, 6, 12.0)
    assert not q[2].any()
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


def test_tiny_weights_survive_the_half_precision_scale() -> None:
    w, x = 1e-6 * torch.randn(4, 16), correlated_inputs(16)
    q, scale = gptq(w, x.mT @ x, 6, 12.0)
    assert (scale > 0).all()
    assert torch.isfinite(Coded("gptq", 6, q, scale, None).decode()).all()


def test_int8_rows() -> None:
    w = torch.randn(5, 33) * torch.tensor([1e-3, 1.0, 30.0, 1e-9, 0.0])[:, None]
    q, scale = int8_rows(w)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float16
    assert (q[:3].abs().amax(dim=1) == 127).all()
    assert not q[4].any()
    decoded = Coded("rows", 8, q, scale, None).decode()
    step = w.abs().amax(dim=1, keepdim=True) / 127
    assert ((decoded - w).abs() <= 0.51 * step + 0.002 * w.abs() + 1e-8).all()


# ---- Hessians --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("looped", [False, True], ids=["plain", "looped"])
def test_hessians_are_sums_over_all_visits(looped: bool) -> None:
    model, cfg = tiny_model(), tiny_config()
    model.looped = looped
    batches = [torch.from_numpy(documents((16, 16), seed=s).astype("int64")).view(2, 16) for s in (0, 1)]
    inputs: dict[str, list[Tensor]] = {}
    for b in batches:
        model(b, tap=lambda name, x: inputs.setdefault(name, []).append(x.detach().reshape(-1, x.size(-1))))
    sums = calibrate(model, batches, LoneRun())
    assert set(sums) == set(inputs)
    for name, xs in inputs.items():
        x = torch.cat(xs)
        assert relative_error(sums[name], x.mT @ x) < 1e-5
        passes = 1 + looped * any(name.startswith(f"blocks.{i}.") for i in range(cfg.loop_start, cfg.loop_end + 1))
        assert len(x) == 2 * 32 * passes
        assert sums[name].dtype == torch.float32


def test_without_batches_the_hessians_are_zeros_of_the_right_shape() -> None:
    model = tiny_model()
    sums, full = calibrate(model, [], LoneRun()), calibrate(model, [torch.ones(1, 4, dtype=torch.long)], LoneRun())
    assert {k: v.shape for k, v in sums.items()} == {k: v.shape for k, v in full.items()}
    assert not any(v.any() for v in sums.values())


def test_calibration_is_without_gradients() -> None:
    sums = calibrate(tiny_model(), [torch.ones(1, 4, dtype=torch.long)], LoneRun())
    assert not any(v.requires_grad for v in sums.values())


# ---- stored forms ----------------------------------------------------------------------------------------------------
def quantized(**changes: object) -> tuple[dict[str, Tensor], dict[str, Coded]]:
    model = tiny_model(smear_gate_enabled=True, attn_out_gate_enabled=True, **changes)
    tokens = torch.from_numpy(documents((16,) * 8).astype("int64")).view(8, 16)
    state = model.state_dict()
    return unbank(state), quantize(state, calibrate(model, [tokens], LoneRun()), model.cfg, LoneRun())


def test_every_tensor_has_its_stored_form(capsys: pytest.CaptureFixture[str]) -> None:
    sigmas = {"mlp": 10.0, "attn": 9.0, "embed": 8.0}
    flat, coded = quantized(matrix_bits=5, embed_bits=7, **{f"{k}_clip_sigmas": v for k, v in sigmas.items()})
    assert list(coded) == list(flat)
    for name, c in coded.items():
        if name.endswith("attn_gate_w"):
            assert (c.kind, c.bits) == ("rows", 8)
        elif name == "tok_emb.weight" or ".c_" in name or ".mlp." in name or name.endswith("attn.proj.weight"):
            assert (c.kind, c.bits) == ("gptq", 7 if name == "tok_emb.weight" else 5)
            clip = next((v for k, v in sigmas.items() if f".{k}." in name), sigmas["embed"])
            want = clip * flat[name].std(dim=1) / (2 ** (c.bits - 1) - 1)
            assert torch.allclose(c.scale.float(), want, rtol=1e-3), name
        else:
            assert c.kind == "float16"
            assert torch.equal(c.values, flat[name].half())
        assert c.decode().shape == flat[name].shape
        assert c.decode().dtype == torch.float32
        assert relative_error(c.decode(), flat[name]) < 0.4, name
    log = capsys.readouterr().out
    for line in ("gptq (int5): blocks.attn.c_k.weight", "gptq (int7): tok_emb.weight", "gate_int8_row: blocks.attn"):
        assert line in log


def test_head_gates_can_stay_in_half_precision() -> None:
    _, coded = quantized(gated_attn_quant_gate=False)
    assert coded["blocks.0.attn.attn_gate_w"].kind == "float16"


def test_eight_bits_are_nearly_the_model() -> None:
    flat, coded = quantized(matrix_bits=8, embed_bits=8, mlp_clip_sigmas=5, attn_clip_sigmas=5, embed_clip_sigmas=5)
    model = tiny_model(smear_gate_enabled=True, attn_out_gate_enabled=True)
    restored = tiny_model(smear_gate_enabled=True, attn_out_gate_enabled=True)
    restored.load_state_dict(rebank({k: c.decode() for k, c in coded.items()}))
    tokens = torch.from_numpy(documents((16,), seed=4).astype("int64"))[None]
    assert relative_error(restored(tokens), model(tokens).detach()) < 0.1
    assert set(flat) == set(coded)


def test_unbank_and_rebank_are_inverse() -> None:
    state = tiny_model(smear_gate_enabled=True).state_dict()
    flat = unbank(state)
    assert not any(k.endswith("_bank") for k in flat)
    back = rebank(flat)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)


def test_unbanked_names_are_the_matrices_they_say() -> None:
    state = tiny_model().state_dict()
    flat, n = unbank(state), 6
    for i in range(n):
        rows = {"attn.c_q": state["qo_bank"][i], "attn.proj": state["qo_bank"][n + i], "attn.c_k": state["kv_bank"][i],
                "attn.c_v": state["kv_bank"][n + i], "mlp.fc": state["mlp_up_bank"][i],
                "mlp.proj": state["mlp_down_bank"][i]}  # fmt: skip
        for name, want in rows.items():
            assert torch.equal(flat[f"blocks.{i}.{name}.weight"], want), name
    assert len(flat) == len(state) - 4 + 6 * n


def test_every_matrix_uses_the_hessian_of_its_own_input() -> None:
    model = tiny_model()
    sums = calibrate(model, [torch.from_numpy(documents((16,)).astype("int64"))[None]], LoneRun())
    sites = {"attn.c_q": "attn_in", "attn.c_k": "attn_in", "attn.c_v": "attn_in", "attn.proj": "attn_out",
             "mlp.fc": "mlp_in", "mlp.proj": "mlp_out"}  # fmt: skip
    flat = unbank(model.state_dict())
    for i in range(6):
        for name, site in sites.items():
            weight = f"blocks.{i}.{name}.weight"
            assert train_gpt.hessian_key(weight) == f"blocks.{i}.{site}"
            assert sums[f"blocks.{i}.{site}"].size(0) == flat[weight].size(1)
    assert train_gpt.hessian_key("tok_emb.weight") == "head"
    assert sums["head"].size(0) == flat["tok_emb.weight"].size(1)
