"""Hessians, GPTQ, int8 rows, the stored form of every tensor, and banks taken apart and put together."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support import LoneRun, documents, relative_error, tiny_config, tiny_model
from torch import Tensor

import train_gpt
from train_gpt import (
    Coded,
    Config,
    Stop,
    calibrate,
    gptq,
    gptq_batches,
    hessian_key,
    int8_rows,
    quantize,
    rebank,
    share_of,
    unbank,
)


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


def hessians_of(n: int, cols: int) -> Tensor:
    x = torch.stack([correlated_inputs(cols, seed) for seed in range(n)])
    return x.mT @ x


@pytest.mark.parametrize(("rows", "cols"), [(16, 40), (40, 150)])
def test_a_batch_is_its_problems_one_by_one(rows: int, cols: int) -> None:
    w, h = torch.randn(2, 3, rows, cols), hessians_of(6, cols).view(2, 3, cols, cols)
    h[1, 2, 5] = h[1, 2, :, 5] = 0  # an input that never occurs in one problem alone
    q, scale = gptq(w, h, 6, 12.0)
    assert q.shape == w.shape
    assert scale.shape == w.shape[:-1]
    for i in range(2):
        for j in range(3):
            alone = gptq(w[i, j], h[i, j], 6, 12.0)
            assert torch.equal(q[i, j], alone[0])
            assert torch.equal(scale[i, j], alone[1])


def test_stacked_rows_are_quantized_as_alone() -> None:
    w, h = torch.randn(48, 40), hessians_of(1, 40)[0]
    q, scale = gptq(w, h, 6, 12.0)
    parts = [gptq(rows, h, 6, 12.0) for rows in w.split([32, 8, 8])]
    assert torch.equal(q, torch.cat([p[0] for p in parts]))
    assert torch.equal(scale, torch.cat([p[1] for p in parts]))


def test_blocks_report_their_columns() -> None:
    done: list[int] = []
    gptq(torch.randn(4, 20), torch.eye(20), 6, 12.0, block_size=8, tick=done.append)
    assert done == [8, 16, 20]


def test_a_hessian_that_is_not_positive_definite_gets_more_damping_alone() -> None:
    w, h, said = torch.randn(2, 8, 12), hessians_of(2, 12), []
    h[1] = torch.eye(12)
    h[1, 0, 1] = h[1, 1, 0] = 1.05  # eigenvalue -0.05: 1 % of the mean diagonal does not lift it, 10 % do
    q, scale = gptq(w, h, 6, 12.0, say=said.append)
    assert len(said) == 1
    assert said[0].startswith("1 of 2 Hessians are not positive definite")
    assert torch.equal(q[0], gptq(w[0], h[0], 6, 12.0)[0])
    assert ((q[1] * scale[1].float()[:, None] - w[1]).abs() < 10 * scale[1].float()[:, None]).all()


@pytest.mark.parametrize("h", [torch.full((5, 5), math.nan), -torch.eye(5)], ids=["nan", "negative"])
def test_a_hopeless_hessian_is_an_error(h: Tensor) -> None:
    with pytest.raises(ValueError, match="not finite"):
        gptq(torch.randn(3, 5), h, 6, 12.0, say=lambda _: None)


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
    counts = sums.pop("tokens")
    assert torch.equal(counts, torch.stack(batches).flatten().bincount(minlength=cfg.vocab_size).float())
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
    knobs = {f"{k}_clip_sigmas": v for k, v in sigmas.items()} | {"embed_step_power": 0.0, "matrix_step_power": 0.0}
    flat, coded = quantized(matrix_bits=5, embed_bits=7, scale_bits=10, **knobs)
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


# ---- batches and ranks -----------------------------------------------------------------------------------------------
def record_shapes() -> dict[str, Tensor]:
    banks = dict(qo_bank=(22, 512, 512), kv_bank=(22, 256, 512), mlp_up_bank=(11, 2048, 512),
                 mlp_down_bank=(11, 512, 2048), skip_weights=(8, 512))  # fmt: skip
    shapes = banks | {"tok_emb.weight": (8192, 512), "blocks.0.attn.attn_gate_w": (8, 512)}
    return unbank({k: torch.empty(s, device="meta") for k, s in shapes.items()})


def test_the_matrices_of_the_record_are_five_batches() -> None:
    flat = record_shapes()
    batches = gptq_batches(flat, Config())
    assert [(b.columns, b.bits, len(b.stacks)) for b in batches] == [
        (2048, 6, 11), (512, 7, 1), (512, 6, 11), (512, 6, 11), (512, 6, 11)]  # fmt: skip
    names = [name for b in batches for stack in b.stacks for name in stack]
    assert len(names) == len(set(names)) == 67
    assert set(names) == {name for name in flat if name not in ("skip_weights", "blocks.0.attn.attn_gate_w")}
    for b in batches:
        for stack in b.stacks:
            assert len({hessian_key(name) for name in stack}) == 1
        assert len({sum(len(flat[name]) for name in stack) for stack in b.stacks}) == 1


@pytest.mark.parametrize(("world", "most"), [(1, 4096), (2, 2048), (4, 2048), (8, 2048)])
def test_every_batch_is_one_ranks_and_the_load_is_even(world: int, most: int) -> None:
    batches = gptq_batches(record_shapes(), Config())
    shares = [share_of(rank, world, batches) for rank in range(world)]
    assert sorted(map(str, sum(shares, []))) == sorted(map(str, batches))
    assert max(sum(b.columns for b in share) for share in shares) == most


class Collected(Exception):
    pass


class OneOfMany(LoneRun):
    """A rank whose `gather` hands in its value and stops there; rank 0, the last to come, gets all of them."""

    def __init__(self, rank: int, world: int, values: dict[int, object]):
        super().__init__(rank=rank, world=world)
        self.values = values

    def gather(self, value: object) -> list[object]:
        self.values[self.rank] = value
        if self.rank:
            raise Collected
        return [self.values[rank] for rank in range(self.world)]


@pytest.mark.parametrize("world", [2, 8])
def test_any_number_of_ranks_computes_the_same_codes(world: int) -> None:
    model = tiny_model()
    state, sums = model.state_dict(), calibrate(model, [torch.arange(1, 65).view(4, 16)], LoneRun())
    alone, values = quantize(state, sums, model.cfg, LoneRun()), {}
    for rank in range(1, world):
        with pytest.raises(Collected):
            quantize(state, sums, model.cfg, OneOfMany(rank, world, values))
    together = quantize(state, sums, model.cfg, OneOfMany(0, world, values))
    assert list(together) == list(alone)
    for name, one in alone.items():
        for a, b in zip(one, together[name], strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, name


def logged_errors(folder: Path) -> dict[str, tuple[int, float]]:
    """Name -> (bits, relative error), of a run that quantized once."""
    (row,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert row["kind"] == "quantization"
    return {name: (bits, error) for name, bits, error in row["rows"]}


@pytest.mark.parametrize("mode", ["baseline", "full"])
def test_the_logged_errors_are_those_of_the_artifact(mode: str, tmp_path: Path) -> None:
    """Also of rotated weights, whose decoder turns them back. A gate that is still zero has no error."""
    model, run = tiny_model(spinquant_mode=mode), LoneRun(tmp_path)
    state, cfg = model.state_dict(), model.cfg
    state["blocks.2.attn.attn_gate_w"].zero_()
    coded = quantize(state, calibrate(model, [torch.arange(1, 65).view(4, 16)], run), cfg, run)
    decoded, *_ = train_gpt.unpack(train_gpt.pack(coded, 1, cfg))
    for switch in train_gpt.switches(cfg):
        decoded = switch.decode(decoded, run)
    weights, decoded, errors = unbank(state), unbank(decoded), logged_errors(tmp_path)
    assert errors.keys() == {name for name, c in coded.items() if c.kind != "float16"}
    assert len(errors) == 6 * 6 + 1 + 6
    assert errors.pop("blocks.2.attn.attn_gate_w") == (8, 0)
    for name, (bits, error) in errors.items():
        assert bits == coded[name].bits
        assert error == pytest.approx(relative_error(decoded[name], weights[name]), rel=1e-4), name
        assert 1e-4 < error < 0.5, name


def test_batches_give_the_codes_of_each_matrix_alone() -> None:
    flat, coded = quantized()
    model = tiny_model(smear_gate_enabled=True, attn_out_gate_enabled=True)
    tokens = torch.from_numpy(documents((16,) * 8).astype("int64")).view(8, 16)
    sums = calibrate(model, [tokens], LoneRun())
    steps = train_gpt.relative_steps(train_gpt.gptq_batches(flat, model.cfg), flat, sums["tokens"], model.cfg)
    for name, c in coded.items():
        if c.kind == "gptq":
            clip = next((v for k, v in {"mlp": 12.0, "attn": 13.0}.items() if f".{k}." in name), 15.0)
            more = dict(damping=0.5 if name == "tok_emb.weight" else 0.01, steps=steps[name], scale_bits=4)
            q, scale = gptq(flat[name], sums[hessian_key(name)], c.bits, clip, **more)
            assert torch.equal(c.codes, q), name
            assert torch.equal(c.scale, scale), name
            assert c.codes.untyped_storage().nbytes() == c.codes.numel(), "not a view of its batch"


def test_steps_of_the_embedding_fall_with_the_count_of_a_token() -> None:
    counts = torch.tensor([0.0, 3, 3, 10, 84])
    steps = train_gpt.token_steps(counts, 0.25)
    assert abs(steps.log().mean().item()) < 1e-6
    assert torch.allclose(steps / steps[0], (1 + counts / 20) ** -0.25)
    assert torch.equal(train_gpt.token_steps(torch.zeros(4), 0.25), torch.ones(4))
    model = tiny_model()
    sums = calibrate(model, [torch.ones(4, 16, dtype=torch.long)], LoneRun())
    flat = unbank(model.state_dict())
    coded = lambda **knobs: quantize(model.state_dict(), sums, tiny_config(scale_bits=10, **knobs), LoneRun())
    codes = [coded(embed_step_power=power)["tok_emb.weight"] for power in (0.0, 0.25)]
    ratio = codes[1].scale.float() / codes[0].scale.float()
    assert ratio[1] < 0.4 and torch.allclose(ratio[2:], ratio[:1], rtol=2e-3) and 1 < ratio[0] < 1.1
    errors = [(c.decode() - flat["tok_emb.weight"]).square().mean(1) for c in codes]
    assert errors[1][1] < 0.2 * errors[0][1]
    for knobs in (dict(embed_clip_sigmas=1.5), dict(embed_step_power=1.0)):
        c = coded(**knobs)["tok_emb.weight"]
        assert (c.scale.float() * 63 * 1.001 >= flat["tok_emb.weight"].abs().amax(1)).all(), "no weight is out of range"


def test_steps_of_the_matrices_fall_with_the_cost_of_their_errors() -> None:
    model = tiny_model()
    flat, cfg = unbank(model.state_dict()), model.cfg
    batches = train_gpt.gptq_batches(flat, cfg)
    names = {f"blocks.{i}.{m}.weight": (m, i) for m in train_gpt.MATRICES for i in range(cfg.num_layers)}
    for power in (0.0, 0.5):
        changed = tiny_config(matrix_step_power=power)
        steps = train_gpt.relative_steps(batches, flat, torch.ones(cfg.vocab_size), changed)
        assert all(len(steps[name]) == len(flat[name]) for name in [*names, "tok_emb.weight"])
        logs = sum(steps[name][0].log().item() * flat[name].numel() for name in names)
        assert abs(logs) < 1e-3 * sum(flat[name].numel() for name in names), "as many bits as with equal steps"
        products = set()
        for name, (matrix, i) in names.items():
            cost = train_gpt.MATRICES[matrix].costs[0 if i < cfg.loop_start else 1 if i <= cfg.loop_end else 2]
            products.add(round(cost**power * steps[name][0].item(), 4))
            assert (steps[name] == steps[name][0]).all()
        assert len(products) == 1
    assert steps["blocks.0.attn.c_q.weight"][0] > 1 > steps["blocks.0.attn.c_v.weight"][0]


def test_scales_have_few_bits() -> None:
    torch.manual_seed(0)
    w, h = torch.randn(64, 40), hessians_of(1, 40)[0]
    results = (p, exact), (q, scale) = gptq(w, h, 6, 12.0), gptq(w, h, 6, 12.0, scale_bits=4)
    mantissas = scale.view(torch.int16) & 1023
    assert (mantissas % 64 == 0).all() and len(mantissas.unique()) > 4
    assert ((scale / exact).float() - 1).abs().max() <= 1 / 32 + 1e-3
    theirs, ours = (relative_error(codes * s.float()[:, None], w) for codes, s in results)
    assert ours < 1.1 * theirs and not torch.equal(p, q)
    assert torch.equal(gptq(w, h, 6, 12.0, scale_bits=10)[1], exact)
    zero = gptq(torch.zeros(3, 40), h, 6, 12.0, scale_bits=4)
    assert (zero[1] > 0).all() and not zero[0].any()


def test_trouble_with_hessians_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    sums = calibrate(model, [torch.arange(1, 65).view(4, 16)], LoneRun())
    sums["head"] = torch.eye(32)
    sums["head"][0, 1] = sums["head"][1, 0] = 1.55
    quantize(model.state_dict(), sums, model.cfg, LoneRun())
    assert "GPTQ: tok_emb.weight and its like: 1 of 1 Hessians are not positive definite" in capsys.readouterr().out
    sums["head"].fill_(math.nan)
    with pytest.raises(Stop) as stopped:
        quantize(model.state_dict(), sums, model.cfg, LoneRun())
    assert "not finite" in stopped.value.sentence
