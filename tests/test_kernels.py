"""Fused kernels against their plain PyTorch specifications: in Triton's interpreter without a GPU, and on one."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support import LoneRun, adapters_for, documents, named, packed, relative_error, tiny_config, tiny_model
from tapes import record_on_tapes
from torch import Tensor

import train_gpt
from train_gpt import ATTENTION_KINDS, FUSED, GPT, SPEC, Docs, attention_sdpa, choose_kernels, mean_norm, mix

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_triton = pytest.mark.skipif(train_gpt.triton is None, reason="needs triton")
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9, reason="needs a Hopper GPU"
)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernel itself is tested")

ODD_SIZES = [(1, 8, 8), (33, 40, 72), (64, 32, 128), (5, 130, 17), (300, 24, 70)]  # M, D, F: beside and on the tiles
LARGE_SIZES = [(1, 64, 128), (1000, 512, 2048), (129, 264, 520), (4096, 512, 2048)]


def value_and_gradients(f: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """f(inputs) and the gradients of a fixed weighted sum of it."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = f(*leaves)
    g = torch.Generator().manual_seed(7)
    weight = torch.randn(out.shape, generator=g).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def mlp_inputs(m: int, d: int, f: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    g = torch.Generator().manual_seed(m + d + f)
    shapes, sizes = ((m, d), (f, d), (d, f)), (1.0, d**-0.5, f**-0.5)
    return [(torch.randn(s, generator=g) * k).to(device, dtype) for s, k in zip(shapes, sizes, strict=True)]


# ---- specifications --------------------------------------------------------------------------------------------------
def test_the_activation_and_its_slope() -> None:
    h = torch.tensor([-4.0, -1.0, 0.0, 1.0, 3.0], requires_grad=True)
    y = train_gpt.leaky_square(h)
    assert y.tolist() == [4.0, 0.25, 0.0, 1.0, 9.0]
    y.sum().backward()
    assert h.grad.tolist() == [-2.0, -0.5, 0.0, 2.0, 6.0]


def test_rms_has_one_epsilon_for_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([[3e-2, -4e-2, 0.0, 0.0]], dtype=dtype)
        assert train_gpt.rms(x).float().square().mean().item() == pytest.approx(1, rel=0.02)
    assert not train_gpt.rms(torch.zeros(2, 4)).any()


def test_packed_attention_is_attention_of_the_pieces() -> None:
    q, k, v = (torch.randn(20, h, 8) for h in (4, 2, 2))
    lengths = (7, 1, 12)
    out = attention_sdpa(q, k, v, packed(lengths))
    at = 0
    for n in lengths:
        scores = torch.einsum("qhk,shk->hqs", q[at : at + n], k[at : at + n].repeat_interleave(2, 1)) / 8**0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        want = torch.einsum("hqs,shk->qhk", scores.softmax(-1), v[at : at + n].repeat_interleave(2, 1))
        assert torch.allclose(out[at : at + n], want, atol=1e-5)
        at += n


def test_logits_are_capped() -> None:
    hidden, embedding = 100 * torch.randn(3, 8), torch.randn(16, 8)
    logits = train_gpt.softcapped_logits(hidden, embedding, 30.0)
    assert logits.abs().max() <= 30
    small = train_gpt.softcapped_logits(1e-3 * hidden, embedding, 30.0)
    assert torch.allclose(small, 1e-3 * hidden @ embedding.T, atol=1e-3)
    assert train_gpt.softcapped_logits(hidden.bfloat16(), embedding.bfloat16(), 30.0).dtype == torch.float32


def test_own_value_is_excluded() -> None:
    y, v = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    out = train_gpt.exclude_own_value(y, v)
    assert (out * v.repeat_interleave(2, 2)).sum(-1).abs().max() < 1e-5
    assert torch.allclose(train_gpt.exclude_own_value(out, v), out, atol=1e-5)


# ---- choice ----------------------------------------------------------------------------------------------------------
def test_the_cpu_runs_the_specification() -> None:
    chosen = choose_kernels(tiny_config(), torch.device("cpu"))
    assert chosen._replace(why="") == SPEC._replace(why="")
    assert chosen.attention.function is attention_sdpa
    assert "sdpa" in chosen.why


def test_every_kind_of_attention_can_be_asked_for() -> None:
    for kind, attention in ATTENTION_KINDS.items():
        chosen = choose_kernels(tiny_config(attention=kind, kernels="spec"), torch.device("cpu"))
        assert chosen.attention is attention


def test_a_missing_package_is_not_importable() -> None:
    assert train_gpt.importable("json")
    assert not train_gpt.importable("no_such_package.interface")


# ---- the residual stream ---------------------------------------------------------------------------------------------
DTYPES = [(torch.float32, 1e-5), (torch.float16, 3e-3)]
dtypes = pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=["fp32", "fp16"])


def numbers(*shapes: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    g = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randn(tuple(s), generator=g).to(device, dtype) for s in shapes]


STREAM_OPS = {  # fused, specification, streams, rows of weights
    "norm": (lambda x: FUSED.mean_norm(x, None), mean_norm, 1, 0),
    "mean_norm": (FUSED.mean_norm, mean_norm, 2, 0),
    "merge": (FUSED.merge, mix, 2, 2),
}


@needs_triton
@interpreted
@dtypes
@pytest.mark.parametrize("d", [8, 24, 512, 700])
@pytest.mark.parametrize("op", STREAM_OPS)
def test_interpreted_stream(op: str, d: int, dtype: torch.dtype, tolerance: float) -> None:
    fused, plain, streams, rows = STREAM_OPS[op]
    inputs = numbers(*[(3, 5, d)] * streams, dtype=dtype) + numbers(*[(rows, d)] * (rows > 0))
    ours = value_and_gradients(fused, *inputs)
    exact = value_and_gradients(plain, *(t.float() for t in inputs))
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == (torch.float32 if a.shape == (rows, d) else dtype)
        assert (a.float() - b).norm() <= tolerance * (1 + b.norm())


@gpu
@needs_cuda
@needs_triton
@pytest.mark.parametrize("op", STREAM_OPS)
def test_fused_stream(op: str) -> None:
    fused, plain, streams, rows = STREAM_OPS[op]
    inputs = numbers(*[(2, 3001, 512)] * streams, dtype=torch.bfloat16, device="cuda")
    inputs += numbers(*[(rows, 512)] * (rows > 0), device="cuda")
    within_twice_the_error(fused, plain, inputs, [str(i) for i in range(len(inputs))])


# ---- the MLP's products ----------------------------------------------------------------------------------------------
def mlp_products(x: Tensor, up: Tensor, grad: Tensor, down: Tensor) -> list[Tensor]:
    """Both kernels: pre-activation by what is kept of it, activation, gradient of the former from the output's."""
    kept, act = train_gpt.up_leaky(x, up)
    assert kept is act
    return [pre_activation(kept), act, train_gpt.down_leaky(grad, down, kept)[0]]


def pre_activation(kept: Tensor) -> Tensor:
    """The number of which `kept` is the leaky square; its last bit is set where that was negative."""
    bits = kept.view(torch.int32 if kept.dtype == torch.float32 else torch.int16)
    return torch.where(bits % 2 == 1, -2.0, 1.0).to(kept.dtype) * kept.sqrt()


def plain_products(x: Tensor, up: Tensor, grad: Tensor, down: Tensor) -> list[Tensor]:
    pre = (x @ up.T).requires_grad_()
    act = train_gpt.leaky_square(pre)
    return [pre.detach(), act.detach(), *torch.autograd.grad(act, pre, grad @ down)]


if train_gpt.triton is not None:
    triton, tl = train_gpt.triton, train_gpt.tl

    @triton.jit
    def mark_kernel(h_ptr, kept_ptr, n, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        h = tl.load(h_ptr + at, mask=at < n, other=0.0)
        kept = train_gpt.activation(h, 0.0, 0.0, 0.0, 0.0, False, kept_ptr.dtype.element_ty)
        tl.store(kept_ptr + at, kept, mask=at < n)


def product_inputs(m: int, d: int, f: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    x, up, down = mlp_inputs(m, d, f, dtype, device)
    return [x, up, torch.roll(x, 1, 0), down]


@needs_triton
@interpreted
@dtypes
@pytest.mark.parametrize("size", ODD_SIZES, ids=str)
def test_interpreted_mlp_products(size: tuple[int, int, int], dtype: torch.dtype, tolerance: float) -> None:
    """bfloat16 is left to the GPU: the interpreter's products of it are not to be trusted."""
    inputs = product_inputs(*size, dtype)
    ours, exact = mlp_products(*inputs), plain_products(*(t.float() for t in inputs))
    for name, a, b in zip(("pre", "act", "d_pre"), ours, exact, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) < tolerance, name


@needs_triton
@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_interpreted_marks(dtype: torch.dtype) -> None:
    """What is kept of a number tells it, its sign too; rounding to bfloat16 favors no side."""
    size = torch.linspace(0.05, 60.0, 4001).exp2() if dtype == torch.bfloat16 else torch.linspace(0.1, 100.0, 4001)
    h = torch.cat([torch.zeros(1), size, -size])
    kept, exact = torch.empty(len(h), dtype=dtype), train_gpt.leaky_square(h)
    mark_kernel[(1,)](h, kept, len(h), triton.next_power_of_2(len(h)))
    bits = kept.view(torch.int32 if dtype == torch.float32 else torch.int16)
    assert torch.equal(bits % 2 == 1, h < 0)
    assert ((pre_activation(kept).float() - h).abs() <= 1.5 * torch.finfo(dtype).eps * h.abs()).all()
    bias = ((kept.float() - exact) / exact)[1:].view(2, -1).mean(1)
    assert (bias.abs() < (0.05 if dtype == torch.bfloat16 else 1) * torch.finfo(dtype).eps).all()


@gpu
@needs_cuda
@needs_triton
@pytest.mark.parametrize("size", [*ODD_SIZES[1:3], *LARGE_SIZES], ids=str)
def test_mlp_products(size: tuple[int, int, int]) -> None:
    inputs = product_inputs(*size, torch.bfloat16, "cuda")
    ours, plain = mlp_products(*inputs), plain_products(*inputs)
    exact = plain_products(*(t.float() for t in inputs))
    for name, a, b, c in zip(("pre", "act", "d_pre"), ours, plain, exact, strict=True):
        assert relative_error(a.cpu(), c.cpu()) <= 2 * relative_error(b.cpu(), c.cpu()) + 1e-6, name


# ---- 8 bits ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def rounded_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter loses the carry where a number rounds up to a power of two: 31.9 becomes 16 in 8 bits."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    theirs = interpreter._convert_float

    def convert(x: Any, given: Any, wanted: Any, mode: Any) -> Any:
        if wanted != train_gpt.tl.float8e4nv:
            return theirs(x, given, wanted, mode)
        return torch.from_numpy(x).to(train_gpt.FLOAT8).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


right_rounding = pytest.mark.usefixtures("rounded_as_on_a_gpu")


def float8_inputs(m: int, d: int, f: int, dtype: torch.dtype, device: str = "cpu") -> list[Any]:
    """A stream and its norm in 8 bits, scaled as in a third layer, and a matrix in both forms."""
    x, up, _ = mlp_inputs(m, d, f, dtype, device)
    n8, scale = torch.empty_like(x, dtype=train_gpt.FLOAT8), 3**-0.5
    _, n, _ = train_gpt.mix_norm_forward(x, None, None, scale, False, n8)
    return [n, n8, up, *train_gpt.float8_of([up], train_gpt.float8_factor(d))]


@needs_triton
@interpreted
@right_rounding
@dtypes
@pytest.mark.parametrize("d", [16, 80, 512])
def test_interpreted_norm_in_8_bits(d: int, dtype: torch.dtype, tolerance: float) -> None:
    """Three bits behind the point: half a unit is 1/16 of the least number with this exponent."""
    n, n8, *_ = float8_inputs(37, d, 32, dtype)
    assert torch.equal(n, train_gpt.mix_norm_forward(mlp_inputs(37, d, 32, dtype)[0], None, None, 3**-0.5, False)[1])
    exact, kept = n.float(), n8.float() / train_gpt.float8_factor(d)
    assert ((kept - exact).abs() <= (1 / 16 + tolerance) * exact.abs() + 2**-10 / train_gpt.float8_factor(d)).all()
    assert relative_error(kept, exact) < 0.03


@pytest.mark.parametrize("d", [16, 32, 96, 256, 512, 768, 4096])
def test_a_normed_row_always_fits_into_8_bits(d: int) -> None:
    """The worst row has one number only."""
    most = train_gpt.float8_factor(d) * train_gpt.rms(1e3 * torch.eye(d)).max().item()
    assert train_gpt.FLOAT8_MAX / 2 - 1 < most <= train_gpt.FLOAT8_MAX


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matrices_in_8_bits(dtype: torch.dtype) -> None:
    matrices = [(s * torch.randn(24, 32)).to(dtype) for s in (1.0, 1e-4, 0.0)]
    for matrix, (codes, scale, one) in zip(matrices, train_gpt.float8_of(matrices, 16.0), strict=True):
        kept = 16 * scale * codes.float()
        assert codes.shape == (32, 32) and not codes[24:].float().any()
        assert torch.isfinite(kept).all() and one == 1
        assert codes.float().abs().max() == (train_gpt.FLOAT8_MAX if matrix.any() else 0)
        assert (kept[:24] - matrix).norm() <= 0.03 * matrix.norm()


@needs_triton
@interpreted
@right_rounding
@pytest.mark.parametrize("size", [(1, 16, 8), (33, 48, 72), (64, 32, 128), (300, 24, 70)], ids=str)
def test_interpreted_products_in_8_bits(size: tuple[int, int, int]) -> None:
    """Those of the numbers that the 8 bits stand for; rows of 24 bytes go by address."""
    n, n8, up, w = float8_inputs(*size, torch.float32)
    codes = w.codes[: len(up)]
    want = w.scale * n8.float() @ codes.float().T
    for f in (None, train_gpt.Xielu(0.8, 0.5, 0.2, 0.4)):
        kept, act = train_gpt.up_leaky(n8, codes, f, w.scale, n.dtype)
        assert kept.dtype == act.dtype == n.dtype
        assert relative_error(kept if f else pre_activation(kept), want) < 1e-5
        assert relative_error(act, (f or train_gpt.leaky_square)(want)) < 1e-5
    assert relative_error(want, n @ up.T) < 0.06
    if size[1] % 16 == 0:
        merged = train_gpt.float8_product(n8[None], w, len(up), n.dtype)
        assert merged.shape == (1, *want.shape) and merged.stride(1) % 16 == 0
        assert relative_error(merged[0], want) < 1e-5


def gradient_in_8_bits(m: int, d: int, f: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """`down_leaky` writes its result twice, and the product with one is near that with the other."""
    x, up, grad, down = product_inputs(m, d, f, dtype, device)
    kept, _ = train_gpt.up_leaky(x, up)
    grad, factor = grad / m / train_gpt.MICRO_STEPS, train_gpt.float8_gradient_factor(m)
    alone, none = train_gpt.down_leaky(grad, down, kept)
    d_pre, d_pre8 = train_gpt.down_leaky(grad, down, kept, factor=factor)
    assert none is None and torch.equal(alone, d_pre)
    assert relative_error(d_pre8.cpu().float() / factor, d_pre.cpu()) < 0.04
    if f % 16 == 0:
        (w,) = train_gpt.float8_of([up.t()], factor)
        assert relative_error(train_gpt.float8_product(d_pre8, w, d, dtype).cpu(), (d_pre @ up).cpu()) < 0.06


@needs_triton
@interpreted
@right_rounding
@pytest.mark.parametrize("size", [(1, 16, 8), (33, 48, 72), (64, 32, 128), (300, 24, 70)], ids=str)
def test_interpreted_gradient_in_8_bits(size: tuple[int, int, int]) -> None:
    gradient_in_8_bits(*size, torch.float32)


@gpu
@needs_hopper
@needs_triton
@pytest.mark.parametrize("size", [(129, 64, 128), (1000, 512, 2048), (4096, 512, 2048)], ids=str)
def test_gradient_in_8_bits(size: tuple[int, int, int]) -> None:
    gradient_in_8_bits(*size, torch.bfloat16, "cuda")


@gpu
@needs_hopper
@needs_triton
@pytest.mark.parametrize("size", [(129, 64, 128), (1000, 512, 1032), (4096, 512, 2048)], ids=str)
def test_products_in_8_bits(size: tuple[int, int, int]) -> None:
    n, n8, up, w = float8_inputs(*size, torch.bfloat16, "cuda")
    want = w.scale * n8.float() @ w.codes[: len(up)].float().T
    kept, act = train_gpt.up_leaky(n8, w.codes[: len(up)], None, w.scale, n.dtype)
    merged = train_gpt.float8_product(n8, w, len(up), n.dtype)
    for ours, exact in ((pre_activation(kept), want), (act, train_gpt.leaky_square(want)), (merged, want)):
        assert relative_error(ours.cpu(), exact.cpu()) < 0.01
    assert relative_error(n8.cpu().float() / train_gpt.float8_factor(size[1]), n.cpu()) < 0.03


# ---- fused blocks in a model -----------------------------------------------------------------------------------------
MODELS: dict[str, dict[str, Any]] = {
    "record": {},
    "own value stays": dict(xsa_last_n=2),
    "no head gates": dict(gated_attn_enabled=False),
    "one lane leaves": dict(parallel_final_lane="attn"),
    "serial": dict(parallel_start_layer=0),
    "skips added": dict(skip_gates_enabled=False),
    "narrow gates, smear": dict(attn_out_gate_enabled=True, smear_gate_enabled=True),
    "narrow gates read q": dict(attn_out_gate_enabled=True, attn_out_gate_src="q"),
    "all heads own": dict(num_kv_heads=4),
    "narrow gates alone": dict(attn_out_gate_enabled=True, gated_attn_enabled=False),
    "xielu": dict(xielu_enabled=True),
    "bigram, alpha, passes": dict(bigram_hash_enabled=True, recur_alpha_enabled=True, cross_pass_xsa_enabled=True),
}


def plain_and_fused(changes: dict[str, Any], attention: str = "triton") -> tuple[GPT, GPT]:
    plain = tiny_model(**changes)
    fused = GPT(plain.cfg, FUSED._replace(attention=ATTENTION_KINDS[attention]))
    fused.load_state_dict(plain.state_dict())
    plain.looped = fused.looped = True
    return plain, fused


@needs_triton
@interpreted
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dense", [False, True], ids=["packed", "rows"])
def test_interpreted_model_is_the_plain_model(name: str, dense: bool, attention: str = "triton") -> None:
    tokens, docs = torch.from_numpy(documents((9, 7)).astype("int64"))[None], packed((9, 7))
    if dense:
        tokens, docs = tokens.view(2, 8), None
    models = plain_and_fused(MODELS[name], attention)
    losses = []
    for model in models:
        loss = model(tokens, tokens.roll(-1, 1), docs=docs)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (key, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if a.grad is None:
            assert b.grad is None, key
        else:  # a gradient next to nothing is a difference of larger ones
            assert (b.grad - a.grad).norm() < 1e-4 * a.grad.norm() + 1e-8, key


@needs_triton
@interpreted
@pytest.mark.parametrize("dense", [False, True], ids=["packed", "rows"])
def test_interpreted_blocks_work_with_foreign_attention(dense: bool) -> None:
    test_interpreted_model_is_the_plain_model("record", dense, "sdpa")


@needs_triton
@interpreted
@pytest.mark.parametrize("name", ["record", "narrow gates, smear", "narrow gates read q", "one lane leaves"])
def test_interpreted_adapters_learn_the_same(name: str) -> None:
    """Frozen weights, low-rank pairs at every site: the path of test-time training."""
    tokens = torch.from_numpy(documents((8, 8)).astype("int64")).view(2, 8)
    results = []
    for model in plain_and_fused(MODELS[name]):
        model.requires_grad_(False)
        adapters = adapters_for(model, 2)
        adapters.values.add_(torch.randn(adapters.values.shape, generator=torch.Generator().manual_seed(3)), alpha=0.1)
        losses = model(tokens, tokens.roll(-1, 1), adapters=adapters, reduction="none")
        losses.sum().backward()
        results.append({"loss": losses.detach(), **named(adapters, adapters.live.grad)})
    for key, want in results[0].items():
        assert relative_error(results[1][key], want) < 1e-4, key


@needs_triton
@interpreted
@pytest.mark.parametrize("name", ["record", "narrow gates, smear", "one lane leaves"])
def test_interpreted_blocks_show_calibration_the_same_inputs(name: str) -> None:
    plain, fused = (
        train_gpt.calibrate(model, [torch.from_numpy(documents((8, 8)).astype("int64")).view(2, 8)], LoneRun())
        for model in plain_and_fused(MODELS[name])
    )
    assert plain.keys() == fused.keys()
    assert {key: h.shape for key, h in plain.items()} == {key: h.shape for key, h in fused.items()}
    for key, want in plain.items():
        assert relative_error(fused[key], want) < 1e-4, key


@needs_triton
@interpreted
def test_interpreted_adapters_learn_the_same_from_a_cached_context() -> None:
    """Keys of earlier chunks are read where they lie, in a ring that is full after two of five chunks."""
    tokens = torch.from_numpy(documents((20, 20)).astype("int64")).view(2, 20)
    before, results = torch.cat((tokens[:, :1], tokens[:, :1], tokens), 1), []
    for model in plain_and_fused({}):
        model.requires_grad_(False)
        adapters, cache = adapters_for(model, 2), train_gpt.Cache(model.cfg, len(model.plan))
        adapters.values.add_(0.1)
        cache.restart(2)
        for i, part in enumerate(tokens.split(4, dim=1)):
            adapters.live.grad = None
            inputs, targets = before[:, 4 * i : 4 * i + 4 + train_gpt.AHEAD], part.roll(-1, 1)
            losses = model(inputs, targets, adapters=adapters, reduction="none", cache=cache)
            losses.sum().backward()
            cache.commit()
        assert cache.room == 8 and cache.unused == 0
        results.append({"loss": losses.detach(), **named(adapters, adapters.live.grad)})
    for key, want in results[0].items():
        assert relative_error(results[1][key], want) < 1e-4, key


@needs_triton
@interpreted
def test_interpreted_kept_context_can_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels read the ring in place, no number of the moment is left."""
    from test_ttt import looped_model, replayed_difference

    model = looped_model(ttt_context="cached", ttt_eval_seq_len=14, num_layers=2, num_loops=0, parallel_start_layer=1)
    model.kernels = train_gpt.FUSED._replace(attention=ATTENTION_KINDS["triton"])
    record_on_tapes(monkeypatch)
    assert replayed_difference(model, (18, 5)) < 1e-3


@needs_triton
@interpreted
def test_interpreted_scoring_needs_no_gradients() -> None:
    tokens, docs = torch.from_numpy(documents((9, 7)).astype("int64"))[None], packed((9, 7))
    with torch.no_grad():
        plain, fused = (m(tokens, tokens.roll(-1, 1), docs=docs, reduction="none") for m in plain_and_fused({}))
    assert torch.allclose(plain, fused, atol=1e-5)


def in_8_bits(model: GPT, *knobs: str) -> GPT:
    """The same weights in a model with these knobs at 1."""
    other = GPT(dataclasses.replace(model.cfg, **dict.fromkeys(knobs, True)), model.kernels, model.dtype)
    other.load_state_dict(model.state_dict())
    other.looped = model.looped
    return other


def product_in_8_bits(x: Tensor, weight: Tensor, factor: float) -> Tensor:
    """x (..., K) times weight (N, K) transposed, both rounded as 8 bits round them."""
    (w,) = train_gpt.float8_of([weight], factor)
    x8 = (factor * x).clamp(-train_gpt.FLOAT8_MAX, train_gpt.FLOAT8_MAX).to(train_gpt.FLOAT8)
    return w.scale * x8.float() @ w.codes[: len(weight)].float().T


class RoundedProduct(torch.autograd.Function):
    """A product whose result or whose input's gradient has gone through 8 bits, or both."""

    @staticmethod
    def forward(ctx, x, weight, forward, backward):
        ctx.save_for_backward(x, weight)
        ctx.rounds = backward
        return product_in_8_bits(x, weight, train_gpt.float8_factor(x.size(-1))) if forward else x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        factor = train_gpt.float8_gradient_factor(x[..., 0].numel())
        dx = product_in_8_bits(grad, weight.T, factor) if ctx.rounds else grad @ weight
        return dx, grad.flatten(0, -2).T @ x.flatten(0, -2), None, None


@needs_triton
@interpreted
@right_rounding
@pytest.mark.parametrize("name", ["record", "no head gates", "narrow gates, smear", "serial", "xielu"])
@pytest.mark.parametrize("knobs", [("fp8_forward",), ("fp8_backward",), ("fp8_forward", "fp8_backward")], ids="+".join)
def test_interpreted_training_in_8_bits(name: str, knobs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the same loss and gradients, and those of a specification that rounds."""

    def matmul(x: Tensor, weight: Tensor, site: str, tap: Any) -> Tensor:
        forward = "fp8_forward" in knobs and site in ("attn_in", "mlp_in")
        return RoundedProduct.apply(x, weight, forward, "fp8_backward" in knobs and site == "mlp_in")

    tokens, docs = torch.from_numpy(documents((9, 7)).astype("int64"))[None], packed((9, 7))
    plain, fused = plain_and_fused(MODELS[name])
    losses, grads = [], []
    for model in (plain, in_8_bits(fused, *knobs), plain):
        model.zero_grad()
        loss = model(tokens, tokens.roll(-1, 1), docs=docs)
        loss.backward()
        losses.append(loss.item())
        grads.append(torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]))
        monkeypatch.setattr(train_gpt, "matmul", matmul)
    assert losses[1] == pytest.approx(losses[0], rel=0.01 if "fp8_forward" in knobs else 1e-5)
    assert torch.cosine_similarity(grads[1], grads[0], dim=0) > 0.98
    assert relative_error(grads[1], grads[0]) > 1e-3
    assert losses[1] == pytest.approx(losses[2], rel=1e-4)
    assert relative_error(grads[1], grads[2]) < 1e-2  # a number between two codes may go either way


@needs_triton
@interpreted
def test_interpreted_scores_and_test_time_training_have_no_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = plain_and_fused({})[1]
    tokens = torch.from_numpy(documents((8, 8)).astype("int64")).view(2, 8)
    other = in_8_bits(fused, "fp8_forward", "fp8_backward")
    monkeypatch.setattr(train_gpt, "float8_of", lambda *_: pytest.fail("called"))
    with torch.no_grad():
        assert torch.equal(fused(tokens), other(tokens))
    assert torch.equal(fused(tokens), other.eval()(tokens))
    adapters = adapters_for(fused, 2)
    assert [train_gpt.new_model(fused.cfg, LoneRun(), new).training for new in (False, True)] == [False, True]
    frozen = other.train().requires_grad_(False)
    assert torch.equal(fused(tokens, adapters=adapters), frozen(tokens, adapters=adapters))


def within_twice_the_error(
    fused: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Tensor], names: Sequence[str],
    slack: float = 1e-6,
) -> None:  # fmt: skip
    """The fused result may be at most twice as far from float32 as the specification in the same dtype is."""
    exact = value_and_gradients(plain, *(t.float() for t in inputs))
    same_dtype = value_and_gradients(plain, *inputs)
    ours = value_and_gradients(fused, *inputs)
    for name, a, b, c in zip(("out", *names), ours, same_dtype, exact, strict=True):
        assert torch.isfinite(a).all(), name
        assert relative_error(a.cpu(), c.cpu()) <= 2 * relative_error(b.cpu(), c.cpu()) + slack, name


# ---- attention -------------------------------------------------------------------------------------------------------
def normed(lengths: Sequence[int], heads: tuple[int, int], size: int, gain: float) -> list[Tensor]:
    """q, k and v of packed documents, as the model makes them."""
    g = torch.Generator().manual_seed(sum(lengths))
    q, k, v = (torch.randn(sum(lengths), h, size, generator=g) for h in (*heads, heads[1]))
    return [gain * train_gpt.rms(q), train_gpt.rms(k), v]


@needs_triton
@interpreted
@pytest.mark.parametrize("lengths", [(1,), (64,), (20, 1, 37), (5, 6, 7, 3), (70, 33)], ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("gain", [1.0, 19.0])
def test_interpreted_attention(lengths: tuple[int, ...], heads: tuple[int, int], gain: float) -> None:
    """Without a running maximum, also where scores reach 76."""
    docs, inputs = packed(lengths, n_more=3), normed(lengths, heads, 16, gain)
    ours, want = (
        value_and_gradients(lambda *qkv, kind=kind: ATTENTION_KINDS[kind](*qkv, docs), *inputs)
        for kind in ("triton", "sdpa")
    )
    for a, b in zip(ours, want, strict=True):
        assert torch.isfinite(a).all()
        assert (a - b).norm() < 2e-5 * b.norm() + 1e-5 * gain


@needs_triton
@interpreted
def test_interpreted_attention_survives_wild_gains() -> None:
    """Scores up to 120: right where a row has any key that it does not shun, and finite everywhere."""
    docs, inputs = packed((70, 33)), normed((70, 33), (4, 2), 16, 30.0)
    ours, want = (
        value_and_gradients(lambda *qkv, kind=kind: ATTENTION_KINDS[kind](*qkv, docs), *inputs)
        for kind in ("triton", "sdpa")
    )
    assert all(torch.isfinite(t).all() for t in ours)
    assert relative_error(ours[0][30:70], want[0][30:70]) < 1e-4


@needs_triton
@interpreted
@pytest.mark.parametrize("lengths", [(1,), (9, 1, 30), (64,)], ids=str)
def test_the_tables_of_attention_say_what_sees_what(lengths: tuple[int, ...]) -> None:
    docs, n, attention = packed(lengths, n_more=2), sum(lengths), ATTENTION_KINDS["triton"]
    spans, (m, k, keys) = attention.spans(docs, n, 2), attention.tile(False, 2)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    sees = (document[:, None] == document) & torch.ones(n, n).tril().bool()
    for table, mask, block, partners in ((spans.queries, sees, m, k), (spans.keys, sees.T, keys, m)):
        for tile, (low, high, a, b) in enumerate(table.tolist()):
            part = mask[tile * block : (tile + 1) * block]
            seen = part.any(0).nonzero().flatten()
            assert low <= seen.min() and seen.max() < high
            assert low <= a <= b <= high
            assert all(x % partners == 0 for x in (low, high, a, b))
            assert part[:, a:b].all()
            whole = [x for x in range(0, n - partners + 1, partners) if part[:, x : x + partners].all()]
            assert set(whole) <= set(range(a, b, partners))


@gpu
@needs_cuda
@pytest.mark.parametrize("lengths", [(64,), (1, 1, 2), (100, 1, 333, 57, 21), (700, 1300, 48)], ids=str)
@pytest.mark.parametrize("heads", [(8, 4), (4, 4), (8, 1)], ids=str)
@pytest.mark.parametrize("kind", train_gpt.ATTENTION_MODULES)
def test_attention_kernels(kind: str, heads: tuple[int, int], lengths: tuple[int, ...]) -> None:
    module = train_gpt.ATTENTION_MODULES[kind]
    if not train_gpt.importable(module):
        pytest.skip(f"needs {module}")
    boundaries = packed(lengths, n_more=64 - len(lengths))
    docs = Docs(boundaries.cu_seqlens.cuda(), boundaries.max_len)
    inputs = [t.to("cuda", torch.bfloat16) for t in normed(lengths, heads, 64, 5.0)]

    def run(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v: attention(q, k, v, docs)

    # Ours rounds every weight of a row, also the largest, which others make 1: that shows in rows of one or two keys.
    slack = 1e-2 if kind == "triton" else 1e-6
    within_twice_the_error(run(ATTENTION_KINDS[kind]), run(attention_sdpa), inputs, ("q", "k", "v"), slack)


# ---- the whole model -------------------------------------------------------------------------------------------------
def losses_and_gradients(
    model: GPT, lengths: Sequence[int], seeds: Sequence[int] = (0,)
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses (seeds,) of packs of random documents, one for each seed, and the gradients of each (seeds, ...)."""
    device, losses, grads = model.qo_bank.device, [], []
    boundaries = packed(lengths, n_more=64 - len(lengths))
    docs = Docs(boundaries.cu_seqlens.to(device), boundaries.max_len)
    for seed in seeds:
        tokens = torch.from_numpy(documents(lengths, seed).astype("int64"))[None].to(device)
        model.zero_grad()
        loss = model(tokens, tokens.roll(-1, 1), docs=docs)
        loss.backward()
        losses.append(loss.item())
        grads.append({n: p.grad.float().cpu() for n, p in model.named_parameters()})
    return torch.tensor(losses), {n: torch.stack([g[n] for g in grads]) for n in grads[0]}


def largest_error(ours: Tensor, want: Tensor) -> tuple[float, float]:
    """Relative errors of gradients (packs, ...): of all as one, and the largest of a pack or of a matrix of a bank.

    The latter is 0 for a few numbers alone: bf16 turns the four of a `q_gain` by 0.3 to 17 %, as the pack may be.
    """
    parts = []
    if want[0].numel() >= 256:
        for axis in (0, 1) if want.ndim == 4 else (0,):
            parts += [relative_error(a, b) for a, b in zip(ours.unbind(axis), want.unbind(axis), strict=True)]
    return relative_error(ours, want), max(parts, default=0.0)


@gpu
@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("looped", [False, True], ids=["plain", "looped"])
def test_chosen_model_is_the_specification(looped: bool) -> None:
    changes: dict[str, Any] = dict(model_dim=256, rope_dims=16)
    cuda, exact = torch.device("cuda"), tiny_model(**changes).cuda()
    results = {}
    models = {
        "exact": exact,
        "plain": GPT(exact.cfg, SPEC, torch.bfloat16),
        "chosen": GPT(exact.cfg, choose_kernels(tiny_config(**changes), cuda), torch.bfloat16),
    }
    for name, model in models.items():
        model.load_state_dict(exact.state_dict())
        model.looped = looped
        if name != "exact":
            model.place(cuda)
        results[name] = losses_and_gradients(model, (120, 33, 1, 102), range(8))
    assert models["chosen"].kernels.fused
    loss, grads = results["exact"]
    ours, plain = ((results[k][0] / loss - 1).abs().max() for k in ("chosen", "plain"))
    assert ours <= 2 * plain + 1e-3
    for name, want in grads.items():
        ours, plain = (largest_error(results[k][1][name], want) for k in ("chosen", "plain"))
        assert all(a <= 2 * b + 0.02 for a, b in zip(ours, plain, strict=True)), (name, ours, plain)
    ours, plain = (
        sum((results[k][1][n] - g).square().sum() for n, g in grads.items()).sqrt() for k in ("chosen", "plain")
    )
    assert ours <= 2 * plain


@gpu
@needs_hopper
@pytest.mark.slow
@pytest.mark.parametrize("looped", [False, True], ids=["plain", "looped"])
def test_training_in_8_bits_goes_the_same_way(looped: bool) -> None:
    cuda, cfg = torch.device("cuda"), tiny_config(model_dim=256, rope_dims=16)
    model = GPT(cfg, choose_kernels(cfg, cuda), torch.bfloat16)
    model.load_state_dict(tiny_model(model_dim=256, rope_dims=16).state_dict())
    model.looped = looped
    models = in_8_bits(model, "fp8_forward", "fp8_backward"), model
    results = [losses_and_gradients(m.place(cuda), (120, 33, 1, 102)) for m in models]
    (loss, ours), (want, theirs) = results
    assert loss.item() == pytest.approx(want.item(), rel=0.01) and loss != want
    ours, theirs = (torch.cat([g.flatten() for g in grads.values()]) for grads in (ours, theirs))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99


def kernels_built() -> int:
    """Compiled variants of all Triton kernels."""
    ours = [k for k in vars(train_gpt).values() if isinstance(k, train_gpt.triton.runtime.jit.JITFunction)]
    return sum(len(variants[0]) for k in ours for variants in k.device_caches.values())


@gpu
@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {}, pytest.param(dict(fp8_forward=True, fp8_backward=True), marks=needs_hopper),
    dict(smear_gate_enabled=True, bigram_hash_enabled=True),
], ids=str)  # fmt: skip
def test_a_graph_does_what_its_micro_batch_does_and_builds_nothing_after_the_second(changes: dict[str, Any]) -> None:
    """Two rows, then two with the loop on, of other documents each; gradients add up, and so do those after a reset."""
    cfg, cuda = tiny_config(model_dim=256, rope_dims=16, **changes), torch.device("cuda")
    models = [GPT(cfg, choose_kernels(cfg, cuda), torch.bfloat16).place(cuda) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    works = [train_gpt.MicroBatch(models[0]), train_gpt.GraphedMicroBatch(models[1])]
    built = 0
    for step, lengths in enumerate([(120, 33, 103), (256,), (7, 240, 9), (1, 255), (100, 156), (30, 226), (128, 128)]):
        boundaries = packed(lengths, n_more=64 - len(lengths))
        tokens = torch.from_numpy(documents(lengths).astype("int64"))[None].cuda()
        batch = tokens, tokens.roll(-1, 1), Docs(boundaries.cu_seqlens.cuda(), boundaries.max_len)
        for model in models:
            model.looped = step >= 3
            if step == 2:
                model.zero_grad()
        want, got = (work(batch).item() for work in works)
        assert got == pytest.approx(want, rel=1e-5)
        for (name, p), q in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
            assert (p.grad is None) == (q[1].grad is None), name
            if p.grad is not None:
                assert (p.grad - q[1].grad).norm() <= 1e-2 * p.grad.norm() + 1e-6, name
        if step in (1, 4):
            built = kernels_built()
        assert step in (0, 3) or kernels_built() == built
    assert built > 10


@gpu
@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("context", ["rerun", "cached"])
def test_graphs_of_test_time_training_do_what_its_chunks_do_and_build_nothing(
    context: str, deterministic: bool, request: pytest.FixtureRequest
) -> None:
    """Documents that end at different times, longer than the context, in batches of two sizes."""
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(deterministic)
    changes = dict(ttt_lora_rank=16, ttt_chunk_size=16, ttt_eval_seq_len=128, ttt_batch_size=8, ttt_lora_lr=1e-3)
    cfg, cuda = tiny_config(model_dim=256, rope_dims=16, ttt_context=context, **changes), torch.device("cuda")
    model = GPT(cfg, choose_kernels(cfg, cuda), torch.bfloat16)
    model.load_state_dict(tiny_model(model_dim=256, rope_dims=16).state_dict())
    model.place(cuda).requires_grad_(False)
    model.looped, run = True, LoneRun(device=cuda)
    tokens = documents((300, 200, 150, 90, 70, 60, 33, 20, 18, 17, 16, 15, 9))
    val = train_gpt.ValidationSet(tokens, (tokens != train_gpt.BOS).astype("int64"))
    docs = val.documents()
    plain, graphed = (kind(model, val, cfg, run) for kind in (train_gpt.TestTimeScorer, train_gpt.GraphedScorer))
    batches = [docs[:8], docs[8:], docs[:8]]
    want = [plain.run_batch(batch).loss for batch in batches]
    built = kernels_built()
    graphed.prepare(batches)
    graphed.record(graphed.shapes(batches))
    shapes = len(graphed.recorded)
    got = [graphed.run_batch(batch).loss for batch in batches]
    assert got == pytest.approx(want, rel=2e-3) and (got[0] == got[2] or not deterministic)
    assert len(graphed.recorded) == shapes > (5 if context == "rerun" else 1) and kernels_built() == built > 10
