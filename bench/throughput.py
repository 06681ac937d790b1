"""Speed of train_gpt.py on the machine at hand, part by part, beside the targets for one H200.

    python bench/throughput.py                        every part: a GPU at the record's size, a CPU at a small one
    python bench/throughput.py kernels micro          these parts alone
    python bench/throughput.py --small --json FILE    the small size anywhere; the same numbers as JSON
    ATTENTION=varlen python bench/throughput.py micro    every knob of train_gpt.py is obeyed

Parts: `launch` (process start to the first counted step with empty caches), `ceilings` (device copy, matrix products of
the model's shapes), `kernels` (specification against fused, share of the ceiling), `micro` (a micro-batch forward and
backward, memory, profile by kernel class), `step` (optimizer step and what surrounds it), `ttt`, `gptq`.

Tables go to the console as Markdown, each as soon as it is measured; progress goes to stderr. Times are medians after a
warm-up, by CUDA events on a GPU. All data are random, never zeros: a GPU multiplies zeros faster. The packed documents
depend on --seed alone. A kernel of train_gpt.py that has no row in `CASES` below stops the part.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_gpt  # noqa: E402
from train_gpt import (  # noqa: E402
    BOS,
    GPT,
    MICRO_STEPS,
    SPEC,
    Config,
    Docs,
    Document,
    GraphedScorer,
    Kernels,
    Run,
    TestTimeScorer,
    TrainLoader,
    ValidationSet,
    WeightAverage,
)

Row = dict[str, Any]
Tables = dict[str, list[Row]]
Part = Iterator[tuple[str, list[Row]]]  # tables by name, each as soon as it is measured
Batch = tuple[Tensor, Tensor, Docs]

FIRST_WORD = 8  # the ids below are control tokens and case marks
MIX_DOCUMENTS, MIX_TOKENS, MIX_SIGMA = 117, 98304, 0.8  # sigma: 122 GFLOP of causal attention, as in the targets' mix
LOOPS = {"off": False, "on": True}


# ---- setting up ------------------------------------------------------------------------------------------------------
class Sizes(NamedTuple):
    """How much is measured."""

    kernel_repeats: int
    micro_repeats: int
    step_repeats: int
    population: int  # documents that TTT batches are planned for; a few of those batches run
    ttt_tokens: int  # in those
    long_documents: int


FULL = Sizes(20, 10, 5, 50_000, 250_000, 104)
SMALL = Sizes(3, 3, 1, 40, 1_500, 6)


class LoneRun(Run):
    """A process without a group, silent on the console."""

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def same(self, value: Any) -> Any:
        return value

    def log(self, text: str = "", console: bool = True) -> None:
        super().log(text, console=False)


@dataclass
class Bench:
    """What every part needs."""

    cfg: Config
    run: Run
    kernels: Kernels
    sizes: Sizes
    seed: int = 0
    compile_spec: bool = False
    ceilings: dict[str, float] = field(default_factory=dict)  # TF/s and TB/s, once measured

    @property
    def device(self) -> torch.device:
        return self.run.device

    def random(self, *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        """Normal numbers on the device in the compute dtype; with `grad`, an input that is differentiated."""
        x = scale * torch.randn(shape, device=self.device)
        return x.to(self.run.dtype).requires_grad_(grad)

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def lone_run(cfg: Config) -> Run:
    """Device and dtype as the program would choose them."""
    cuda = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    torch.backends.cuda.matmul.allow_tf32 = True  # as the program
    auto = torch.bfloat16 if cuda else torch.float32
    dtype = auto if cfg.compute_dtype == "auto" else getattr(torch, cfg.compute_dtype)
    return LoneRun(0, 1, torch.device("cuda", 0) if cuda else torch.device("cpu"), dtype, dist.HashStore())


def set_up(cfg: Config, sizes: Sizes, **options: Any) -> Bench:
    run = lone_run(cfg)
    torch.manual_seed(options.get("seed", 0))
    return Bench(cfg, run, train_gpt.choose_kernels(cfg, run.device), sizes, **options)


def lap(run: Run, work: Callable[[], object]) -> Callable[[], float]:
    """Runs `work`; what it returns gives the milliseconds, once the device has finished."""
    if run.device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        return lambda: begin.elapsed_time(end)
    began = time.perf_counter()
    work()
    spent = 1e3 * (time.perf_counter() - began)
    return lambda: spent


def median(laps: Iterable[Callable[[], float]]) -> float:
    return statistics.median(take() for take in laps)


def milliseconds(run: Run, work: Callable[[], object], repeats: int, head_start: bool = False) -> float:
    """Median time of `work` after a warm-up.

    head_start: the GPU first waits 20 ms, so that the host is ahead and the time is that of the kernels alone.
    """
    for _ in range(1 if run.device.type == "cpu" else 3):
        work()
    run.sync()
    if head_start and run.device.type == "cuda":
        torch.cuda._sleep(40_000_000)
    laps = [lap(run, work) for _ in range(repeats)]
    run.sync()
    return median(laps)


def seconds(run: Run, work: Callable[[], object]) -> float:
    run.sync()
    began = time.perf_counter()
    work()
    run.sync()
    return time.perf_counter() - began


# ---- data: a function of the seed ------------------------------------------------------------------------------------
def generator(seed: int, what: int) -> np.random.Generator:
    """One stream per purpose. Only uniform numbers are drawn: unlike distributions they do not change with NumPy."""
    return np.random.Generator(np.random.PCG64([seed, what]))


def log_normal(uniform: np.ndarray, sigma: float) -> np.ndarray:
    """Log-normal numbers of mean 1."""
    normal = np.array([statistics.NormalDist().inv_cdf(min(max(u, 1e-12), 1 - 1e-12)) for u in uniform])
    return np.exp(sigma * normal - sigma**2 / 2)


def random_text(rng: np.random.Generator, lengths: Sequence[int], vocab: int) -> np.ndarray:
    """Documents of so many tokens (uint16), each its BOS and words that recur by Zipf's law, as gradients feel it."""
    share = np.cumsum(1 / (np.arange(vocab - FIRST_WORD) + 3))
    words = FIRST_WORD + np.searchsorted(share / share[-1], rng.random(int(np.sum(lengths))), side="right")
    words[np.cumsum([0, *lengths[:-1]])] = BOS
    return np.minimum(words, vocab - 1).astype(np.uint16)


def mix_lengths(seed: int, total: int = MIX_TOKENS, documents: int = MIX_DOCUMENTS) -> np.ndarray:
    """Log-normal lengths that sum to `total`."""
    raw = log_normal(generator(seed, 0).random(documents), MIX_SIGMA)
    lengths = np.maximum((raw * total / raw.sum()).astype(np.int64), 2)
    lengths[lengths.argmax()] += total - lengths.sum()
    return lengths


def packed_mix(
    seed: int, total: int = MIX_TOKENS, documents: int = MIX_DOCUMENTS, vocab: int = Config.vocab_size
) -> np.ndarray:
    """A micro-batch for `packed_row`: `total` tokens (uint16) and the next document's BOS.

    The documents have 840 tokens on average; `packed_row` cuts them into pieces of TRAIN_SEQ_LEN.
    """
    text = random_text(generator(seed, 1), mix_lengths(seed, total, documents), vocab)
    return np.append(text, BOS).astype(np.uint16)


def mix_for(b: Bench) -> np.ndarray:
    """The packed mix at the size of the configuration."""
    total = b.cfg.micro_batch_tokens
    return packed_mix(b.seed, total, max(1, round(total * MIX_DOCUMENTS / MIX_TOKENS)), b.cfg.vocab_size)


def mix_batch(b: Bench) -> Batch:
    return train_gpt.packed_row(mix_for(b), b.cfg.train_seq_len, b.device)


def mix_docs(b: Bench) -> Docs:
    """The boundaries of the packed mix with what all visits of a forward pass share, as `GPT.trunk` prepares them."""
    cfg, docs = b.cfg, mix_batch(b)[2]
    group = cfg.num_heads // cfg.num_kv_heads
    return docs._replace(spans=b.kernels.attention.spans(docs, cfg.micro_batch_tokens, group))


def write_shard(path: Path, values: np.ndarray) -> None:
    """256 int32 of header, then uint16."""
    header = np.zeros(train_gpt.SHARD_HEADER, "<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, len(values)
    path.write_bytes(header.tobytes() + np.asarray(values, "<u2").tobytes())


def write_dataset(b: Bench, folder: Path) -> Config:
    """Two steps of training text, every micro-batch the packed mix, which also is the validation text; the settings."""
    mix = mix_for(b)
    write_shard(folder / "fineweb_train_000000.bin", np.tile(mix, 2 * MICRO_STEPS))
    write_shard(folder / "fineweb_val_000000.bin", mix)
    write_shard(folder / "fineweb_val_bytes_000000.bin", np.where(mix == BOS, 0, 3))
    return replace(b.cfg, data_path=str(folder))


@contextlib.contextmanager
def dataset(b: Bench) -> Iterator[Config]:
    """A temporary data set, in a folder that also takes the log."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        b.run.folder = Path(folder)
        try:
            yield write_dataset(b, b.run.folder)
        finally:
            b.run.folder = None


@torch.no_grad()
def random_model(b: Bench) -> GPT:
    """The model of the settings, no parameter at zero."""
    train_gpt.seed_everything(b.seed)
    model = GPT(b.cfg, b.kernels, b.run.dtype).place(b.device)
    for name, p in model.named_parameters():
        if name.endswith("_bank"):
            p.normal_(std=p.size(-1) ** -0.5)
        elif name == "tok_emb.weight":
            p.normal_(std=0.05)
        else:
            p.add_(0.02 * torch.randn_like(p))
    return model


# ---- ceilings --------------------------------------------------------------------------------------------------------
def ceilings(b: Bench) -> Part:
    """Copy of a hidden tensor of the MLP, the model's matrix products; the best rate of each kind is the ceiling."""
    cfg, rows = b.cfg, []
    m, d, f = cfg.micro_batch_tokens, cfg.model_dim, cfg.hidden_dim
    with torch.no_grad():
        source = b.random(m, f, grad=False)
        target = torch.empty_like(source)
        ms = milliseconds(b.run, lambda: target.copy_(source), b.sizes.kernel_repeats, head_start=True)
        n_bytes = 2 * source.numel() * source.element_size()
        rows.append({"work": f"copy {n_bytes / 2e6:.0f} MB", "ms": ms, "rate": n_bytes / ms / 1e9, "unit": "TB/s"})
        for k, n in ((d, d), (d, f), (f, d), (d, cfg.vocab_size)):
            x, w = b.random(m, k, grad=False), b.random(n, k, grad=False)
            ms = milliseconds(b.run, lambda x=x, w=w: x @ w.mT, b.sizes.kernel_repeats, head_start=True)
            rows.append({"work": f"GEMM {m}x{k}x{n}", "ms": ms, "rate": 2 * m * k * n / ms / 1e9, "unit": "TF/s"})
    for unit in ("TF/s", "TB/s"):
        b.ceilings[unit] = max(row["rate"] for row in rows if row["unit"] == unit)
    yield "ceilings", rows


# ---- kernels ---------------------------------------------------------------------------------------------------------
class Cost(NamedTuple):
    """What a pass cannot do without: matrix products, and each input read and each output written once."""

    flops: float
    bytes: float


class Case(NamedTuple):
    """Arguments of a kernel at the size of a micro-batch; tensors made with `grad` are differentiated."""

    args: tuple[Any, ...]
    forward: Cost
    backward: Cost | None = None  # None: there is no backward pass


def stream_bytes(b: Bench) -> int:
    """Of one tensor of the residual stream."""
    return b.cfg.micro_batch_tokens * b.cfg.model_dim * b.run.dtype.itemsize


def streams(b: Bench, count: int) -> list[Tensor]:
    """Tensors like the residual stream, (1, T, D)."""
    return [b.random(1, b.cfg.micro_batch_tokens, b.cfg.model_dim) for _ in range(count)]


def attention_case(b: Bench) -> Case:
    """q (T, H, K), k and v (T, G, K) and the boundaries of the packed mix."""
    cfg, docs = b.cfg, mix_docs(b)
    heads = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
    q, k, v = (b.random(cfg.micro_batch_tokens, h, cfg.head_dim) for h in heads)
    pairs = (docs.cu_seqlens.diff().double() ** 2).sum().item() / 2  # the causal half
    flops, n_bytes = 4 * cfg.model_dim * pairs, 2 * (q.numel() + k.numel()) * q.element_size()
    # Backward makes the scores once more and four products from them; it reads q, k, v, out, grad, writes dq, dk, dv.
    return Case((q, k, v, docs), Cost(flops, n_bytes), Cost(2.5 * flops, 2 * n_bytes))


class Products(NamedTuple):
    """What a block multiplies in a forward pass, per token and in all."""

    matrices: float
    attention: float


def block_flops(b: Bench) -> Products:
    cfg, docs = b.cfg, mix_batch(b)[2]
    width = 2 * cfg.model_dim + 2 * cfg.num_kv_heads * cfg.head_dim + 2 * cfg.hidden_dim
    pairs = (docs.cu_seqlens.diff().double() ** 2).sum().item() / 2
    return Products(2 * cfg.micro_batch_tokens * cfg.model_dim * width, 4 * cfg.model_dim * pairs)


def block_inputs(b: Bench) -> tuple[Any, ...]:
    """Weights, constants and context of a layer in the middle of the model, with lanes, no adapters, no tap."""
    model, docs, layer = random_model(b), mix_docs(b), b.cfg.num_layers // 2
    w = model.layers()[layer]._replace(
        post=model.parallel_post_lambdas[layer], keep=model.parallel_resid_lambdas[layer]
    )
    w = train_gpt.LayerWeights(*(t.detach().requires_grad_() for t in w))
    rope = train_gpt.rotary_tables(b.cfg, b.cfg.micro_batch_tokens, False, b.device, b.run.dtype)
    context = train_gpt.Context(rope, docs, b.kernels.attention)
    return w, model.layer_constants[layer], context, train_gpt.NO_DELTAS, None


def block_case(b: Bench, lanes: int) -> Case:
    """One visit: 9 streams forward and 15 backward that no order of work avoids, and the hidden tensors of the MLP."""
    flops, hidden = block_flops(b), 2 * b.cfg.hidden_dim / b.cfg.model_dim
    n_bytes = stream_bytes(b)
    forward = Cost(sum(flops), (9 + hidden) * n_bytes)
    backward = Cost(2 * flops.matrices + 2.5 * flops.attention, (15 + 2 * hidden) * n_bytes)
    return Case((*streams(b, lanes + 1), *block_inputs(b)), forward, backward)


def serial_case(b: Bench) -> Case:
    return block_case(b, 1)


def two_lane_case(b: Bench) -> Case:
    return block_case(b, 2)


def merge_case(b: Bench) -> Case:
    x, kept = streams(b, 2)
    weights = torch.randn(2, b.cfg.model_dim, device=b.device, requires_grad=True)
    return Case((x, kept, weights), Cost(0, 3 * stream_bytes(b)), Cost(0, 5 * stream_bytes(b)))


def mean_norm_case(b: Bench) -> Case:
    return Case(tuple(streams(b, 2)), Cost(0, 3 * stream_bytes(b)), Cost(0, 3 * stream_bytes(b)))


def loss_case(b: Bench) -> Case:
    (hidden,), targets = streams(b, 1), mix_batch(b)[1]
    embedding = b.random(b.cfg.vocab_size, b.cfg.model_dim, scale=0.3)
    flops, n_bytes = 2 * hidden.size(1) * embedding.numel(), stream_bytes(b)
    args = (hidden, embedding, targets, b.cfg.logit_softcap)
    return Case(args, Cost(flops, n_bytes), Cost(2 * flops, 2 * n_bytes))


def adamw_case(b: Bench) -> Case:
    """The adapters of a full batch of test-time training, with the loop on."""
    c = b.cfg
    plan = train_gpt.plan_depth(c.num_layers, c.num_loops, c.loop_start, c.loop_end, c.parallel_start_layer)
    rows = train_gpt.Adapters(c, c.ttt_batch_size, [v.layer for v in plan], b.run.dtype, b.device)
    constants = train_gpt.AdamW(c.ttt_beta1, c.ttt_beta2, 1e-10, c.ttt_weight_decay)
    gradient = b.random(*rows.values.shape, grad=False)
    args = (constants, rows.steps + 1, rows.rates, gradient, rows.values, rows.live.detach(), rows.first, rows.second)
    return Case(args, Cost(0, gradient.numel() * (16 + 2 * gradient.element_size())))


CASES: dict[str, Callable[[Bench], Case]] = {  # one row per field of `Kernels` that is a function
    "attention": attention_case,
    "serial": serial_case,
    "two_lane": two_lane_case,
    "merge": merge_case,
    "mean_norm": mean_norm_case,
    "loss": loss_case,
    "adamw": adamw_case,
}


def kernel_fields() -> list[str]:
    """The fields of `Kernels` that hold functions, or None where there is no function."""
    return [name for name in Kernels._fields if not isinstance(getattr(SPEC, name), bool | int | float | str)]


def require_cases() -> None:
    """Raises LookupError unless every kernel has a case and every case a kernel."""
    if missing := [name for name in kernel_fields() if name not in CASES]:
        raise LookupError(f"kernels without a case: {', '.join(missing)}; add them to CASES in bench/throughput.py")
    if stale := [name for name in CASES if name not in Kernels._fields]:
        raise LookupError(f"cases without a kernel in train_gpt.py: {', '.join(stale)}; rename or remove them")


def versions(b: Bench, name: str) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """Specification, and what the program runs instead of it, if anything."""
    spec, chosen = getattr(SPEC, name), getattr(b.kernels, name)
    return torch.compile(spec) if b.compile_spec else spec, None if chosen is spec else chosen


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in tensors(part)] if isinstance(value, tuple | list) else []


class Passes(NamedTuple):
    forward: Callable[[], object]
    both: Callable[[], object]


def passes(function: Callable[..., Any], case: Case) -> Passes:
    """The kernel forward, and forward and backward with random gradients of what it returns."""
    inputs = [t for t in tensors(case.args) if t.requires_grad]
    with torch.no_grad():
        gradients = [torch.randn_like(t) for t in tensors(function(*case.args))]

    def both() -> None:
        pairs = zip(tensors(function(*case.args)), gradients, strict=True)
        outputs, theirs = zip(*((out, grad) for out, grad in pairs if out.requires_grad), strict=True)
        torch.autograd.grad(outputs, inputs, theirs, allow_unused=True)

    return Passes(lambda: function(*case.args), both)


@torch.no_grad()
def difference(ours: Callable[..., Any], theirs: Callable[..., Any], case: Case) -> float:
    """Largest relative distance of the results, each from inputs of its own: some kernels write over theirs."""
    pairs = zip(*(tensors(f(*copy.deepcopy(case.args))) for f in (ours, theirs)), strict=True)
    return max(((a.float() - e.float()).norm() / e.float().norm()).item() for a, e in pairs)


def achieved(b: Bench, cost: Cost, ms: float) -> Row:
    """The rate, and the share of the ceiling: the least time for the scarcer of products and traffic over the time."""
    compute, memory = cost.flops / b.ceilings["TF/s"] / 1e9, cost.bytes / b.ceilings["TB/s"] / 1e9  # ms
    unit, amount = ("TF/s", cost.flops) if compute >= memory else ("TB/s", cost.bytes)
    return {"rate": amount / ms / 1e9, "unit": unit, "share": max(compute, memory) / ms}


def kernel_rows(b: Bench, name: str) -> list[Row]:
    """Forward, and forward + backward, of one kernel; rate and share are those of the version that the program runs."""
    spec, fused = versions(b, name)
    case, rows = CASES[name](b), []
    timed = [passes(f, case) for f in (spec, fused) if f is not None]
    plan = [("forward", "forward", case.forward)]
    if case.backward is not None:
        plan.append(("forward + backward", "both", Cost(*map(sum, zip(case.forward, case.backward, strict=True)))))
    for label, key, cost in plan:
        ms = [milliseconds(b.run, getattr(p, key), b.sizes.kernel_repeats, head_start=True) for p in timed]
        row = {"kernel": name, "pass": label, "spec ms": ms[0], "fused ms": ms[1] if fused else None,
               "times": ms[0] / ms[1] if fused else None, **achieved(b, cost, ms[-1])}  # fmt: skip
        rows.append(row | {"difference": difference(fused, spec, case) if fused else None})
    return rows


def kernels(b: Bench) -> Part:
    """Every kernel, eager: specification (with --compile as torch.compile makes it) against what the program runs."""
    require_cases()
    if not b.ceilings:
        yield from ceilings(b)
    rows, errors = [], []
    for name in CASES:
        try:
            rows += kernel_rows(b, name)
        except Exception as e:  # the others are still worth their time
            errors.append(e)
        b.free()
    if rows:
        yield "kernels", rows
    if errors:
        raise ExceptionGroup("some kernels cannot be measured", errors)


# ---- micro-batch -----------------------------------------------------------------------------------------------------
def micro(b: Bench) -> Part:
    """A micro-batch of the packed mix, forward and backward; the gradients add up as in training."""
    model, batch = random_model(b), mix_batch(b)
    gradients, rows = train_gpt.micro_batches(b.cfg, b.run, model), []
    work = lambda: gradients(batch)
    for loop, model.looped in LOOPS.items():
        first = seconds(b.run, work)
        if b.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ms = milliseconds(b.run, work, b.sizes.micro_repeats)
        row = {"loop": loop, "ms": ms, "tok/s": 1e3 * b.cfg.micro_batch_tokens / ms, "first call s": first}
        rows.append(row | {"peak GiB": b.run.peak_memory_mib() / 1024})
    yield "micro", rows
    rows = []
    for loop, model.looped in LOOPS.items():
        rows += [{"loop": loop, **row} for row in profile(b, work)]
    yield "profile", rows


# First match counts, our own kernels before all. Names: cuBLAS (nvjet, xmma, cutlass), FlashAttention 2 to 4, what
# torch.compile generates, PyTorch's own, and on a CPU the operators.
KERNEL_CLASSES = (
    ("GEMM", r"triton_tem"),
    ("reductions", r"triton_(red|per)_"),
    ("pointwise", r"triton_poi_"),
    ("attention", r"flash|fmha|attn|attention"),
    ("GEMM", r"gemm|gemv|nvjet|cutlass|cublas|splitk|aten::(addmm|addbmm|bmm|baddbmm|mm|_scaled_mm)$"),
    ("copies", r"memcpy|memset|copy|aten::(cat|stack|fill_|zero_)$|CatArray"),
    ("reductions", r"reduce|softmax|norm|nll_loss|aten::(sum|mean)$"),
    ("pointwise", r"elementwise|aten::(add|sub|mul|div|pow|lerp|neg|where|tanh|leaky_relu|sigmoid|clamp)"),
)


def own_kernels() -> list[str]:
    """Names of the Triton kernels in train_gpt.py."""
    return sorted(n for n, f in vars(train_gpt).items() if type(f).__module__.startswith("triton.runtime"))


def kernel_class(name: str) -> str:
    own = [k for k in own_kernels() if name == k or name.startswith(f"{k}_")]
    if own:
        return max(own, key=len)
    return next((label for label, words in KERNEL_CLASSES if re.search(words, name, re.I)), "other")


def late_kernels(recorded: torch.profiler.profile) -> list[Any]:
    """What ran on the GPU in the second half of equal runs, by its start."""
    cuda = torch.autograd.DeviceType.CUDA
    events = [e for e in recorded.events() if e.device_type == cuda and not getattr(e, "is_user_annotation", False)]
    return sorted(events, key=lambda e: e.time_range.start)[len(events) // 2 :]


def device_times(run: Run, recorded: torch.profiler.profile) -> Iterator[tuple[str, float, int]]:
    """(name, milliseconds, launches): late kernels of the GPU, or operators without what they call."""
    if run.device.type == "cuda":
        for e in late_kernels(recorded):
            yield e.name, e.time_range.elapsed_us() / 1e3, 1
    else:
        for e in recorded.key_averages():
            yield e.key, e.self_cpu_time_total / 1e3, e.count


def idle_time(recorded: torch.profiler.profile) -> float:
    """Milliseconds between the first and the last of the late kernels in which nothing runs on the GPU."""
    idle, until = 0.0, math.inf
    for e in late_kernels(recorded):
        idle += max(e.time_range.start - until, 0.0)
        until = e.time_range.end if until == math.inf else max(until, e.time_range.end)
    return idle / 1e3


def profile(b: Bench, work: Callable[[], object]) -> list[Row]:
    """Kernel time and launches of `work` by class, and the time between kernels.

    On a GPU of the second half of twice as many runs: under load it slows down to keep its power limit, an H200 to
    1,700 MHz at 690 W, and the first runs are faster than those that are timed.
    """
    cuda, repeats = b.device.type == "cuda", b.sizes.micro_repeats
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    for _ in range(2):  # the first in another loop mode runs as it is, the second is recorded as a graph
        work()
    b.run.sync()
    with torch.profiler.profile(activities=[activity]) as recorded:
        for _ in range(2 * repeats if cuda else repeats):
            work()
        b.run.sync()
    sums: dict[str, list[float]] = {}
    for name, ms, launches in device_times(b.run, recorded):
        entry = sums.setdefault(kernel_class(name), [0.0, 0])
        entry[0] += ms / repeats
        entry[1] += launches / repeats
    total = [sum(column) for column in zip(*sums.values(), strict=True)]
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])
    rows = [{"class": label, "ms": ms, "share": ms / max(total[0], 1e-9), "launches": round(launches)}
            for label, (ms, launches) in [*ordered, ("all", total)]]  # fmt: skip
    if cuda:
        rows.append({"class": "between kernels", "ms": idle_time(recorded) / repeats, "share": None, "launches": None})
    return rows


# ---- optimizer step --------------------------------------------------------------------------------------------------
class Training(NamedTuple):
    """What the training loop holds, and one turn of that loop."""

    model: GPT
    gradients: train_gpt.MicroBatch
    optimizer: train_gpt.Optimizer
    average: WeightAverage
    turn: Callable[[TrainLoader], None]


def training(b: Bench, cfg: Config) -> Training:
    """`turn` repeats the body of `train`: clock, step, average, log."""
    model = random_model(b)
    gradients = train_gpt.micro_batches(cfg, b.run, model)
    optimizer, average = train_gpt.Optimizer(model, cfg, b.run), WeightAverage(model, cfg.ema_decay)
    watch, progress = train_gpt.Stopwatch(), train_gpt.Progress(step=10)  # the first five steps are logged at once
    log = train_gpt.TrainLog(model, b.run, watch)

    def turn(loader: TrainLoader) -> None:
        b.run.agree(watch.seconds(), b.run.stop_signal)
        # A hundredth of the learning rate: the weights stay what they are.
        loss = b.run.sum(train_gpt.train_step(gradients, optimizer, loader, 0.01, cfg.muon_momentum))
        average.update()
        progress.step += 1
        log.add(progress, loss, 0.01)

    return Training(model, gradients, optimizer, average, turn)


def step_row(b: Bench, cfg: Config, t: Training, loop: str) -> Row:
    """A step against eight micro-batches alone, in turns, so that a slow drift of the clock rate cancels."""
    loader, batch = TrainLoader(cfg, b.run), mix_batch(b)

    def eight() -> None:
        t.optimizer.zero_grad()
        for _ in range(MICRO_STEPS):
            t.gradients(batch)

    t.turn(loader)
    eight()
    t.optimizer.zero_grad()
    pairs = []
    for _ in range(b.sizes.step_repeats):  # without a wait between them: the host stays ahead
        pairs.append((lap(b.run, lambda: t.turn(loader)), lap(b.run, eight)))
        t.optimizer.zero_grad()
    b.run.sync()
    loader.close()
    step, alone = (median(column) for column in zip(*pairs, strict=True))
    extra = statistics.median(a() - e() for a, e in pairs)
    return {"loop": loop, "step ms": step, "8 micro-batches ms": alone, "difference ms": extra,
            "tok/s": 1e3 * cfg.train_batch_tokens / step}  # fmt: skip


def optimizer_rows(b: Bench, t: Training) -> list[Row]:
    """The parts of a step after its micro-batches, each queued behind one: the host is ahead as in training."""
    batch, laps = mix_batch(b), []
    parts = {
        "gradient norm and clip": lambda: t.optimizer.clip(t.optimizer.reduce()),
        "Muon and AdamW": lambda: t.optimizer.update(0.01, b.cfg.muon_momentum),
        "weight average": t.average.update,
    }
    for _ in range(b.sizes.step_repeats + 1):
        t.gradients(batch)
        laps.append([lap(b.run, work) for work in parts.values()])
    b.run.sync()
    times = [median(column) for column in zip(*laps[1:], strict=True)]
    rows = [{"part": part, "ms": ms} for part, ms in zip(parts, times, strict=True)]
    return [*rows, {"part": "together", "ms": sum(times)}]


def step(b: Bench) -> Part:
    """A whole step of the training loop: loader, 8 micro-batches, clip, optimizer, average, log."""
    with dataset(b) as cfg:
        t = training(b, cfg)
        rows = []
        for loop, t.model.looped in LOOPS.items():
            rows.append(step_row(b, cfg, t, loop))
        yield "step", rows
        yield "optimizer", optimizer_rows(b, t)


# ---- test-time training ----------------------------------------------------------------------------------------------
def context_scale(b: Bench) -> float:
    """Documents shrink with the context window."""
    return b.cfg.ttt_eval_seq_len / Config.ttt_eval_seq_len


def fineweb_batches(b: Bench) -> list[list[int]]:
    """Lengths of the documents of a few batches that stand for the validation set.

    Its documents are log-normal with a mean of 957 tokens and batched by the program; of each of up to four equal
    shares of the batches the one of the most typical length is taken, so that the mean is right.
    """
    raw = log_normal(generator(b.seed, 2).random(b.sizes.population), 1.0)
    lengths = np.maximum((957 * context_scale(b) * raw).astype(np.int64), 2).tolist()
    starts = itertools.accumulate(lengths, initial=0)
    documents = [Document(start, n) for start, n in zip(starts, lengths, strict=False)]
    batches = [batch for phase in train_gpt.plan_phases(documents, b.cfg) for batch in phase.batches if batch]
    batches = [[d.n_targets for d in batch] for batch in batches]
    typical = sum(lengths) / len(batches)
    count = min(max(1, round(b.sizes.ttt_tokens / typical)), 4, len(batches))
    edges = [len(batches) * i // count for i in range(count + 1)]
    shares = [batches[a:e] for a, e in itertools.pairwise(edges)]
    means = [sum(map(sum, share)) / sum(map(len, share)) for share in shares]
    distance = lambda batch, mean: abs(statistics.mean(batch) - mean)
    return [min(s, key=lambda batch, m=mean: distance(batch, m)) for s, mean in zip(shares, means, strict=True)]


def long_lengths(b: Bench) -> list[int]:
    """4,230 to 20,000 tokens, 6,500 on average, half of them below 5,500: a Pareto distribution, longest first."""
    low, high, alpha = 4230 * context_scale(b), 20_000 * context_scale(b), 2.5
    u = generator(b.seed, 3).random(b.sizes.long_documents)
    lengths = low * (1 - u * (1 - (low / high) ** alpha)) ** (-1 / alpha)
    return sorted((int(n) for n in lengths), reverse=True)


def text_of(b: Bench, lengths: Sequence[int]) -> tuple[ValidationSet, list[Document]]:
    """Random documents of these lengths."""
    text = np.append(random_text(generator(b.seed, 4), lengths, b.cfg.vocab_size), BOS).astype(np.uint16)
    val = ValidationSet(text, np.where(text == BOS, 0, 3).astype(np.int64))
    starts = itertools.accumulate(lengths, initial=0)
    documents = [Document(start, n) for start, n in zip(starts, lengths, strict=False)]
    return val, documents


def run_documents(b: Bench, scorer: TestTimeScorer, lengths: Sequence[int]) -> float:
    """Seconds of `run_batch` on one batch, prepared for. Raises ValueError unless all is scored and finite."""
    val, documents = text_of(b, lengths)
    scorer, meter = scorer.over(val), train_gpt.Meter()
    if isinstance(scorer, GraphedScorer):  # of thousands of batches, the first few pay for it
        scorer.record(scorer.shapes([documents]))
    spent = seconds(b.run, lambda: meter.merge(scorer.run_batch(documents)))
    if meter.tokens != sum(lengths) or not math.isfinite(meter.loss):
        raise ValueError(f"scored {meter.tokens} of {sum(lengths)} tokens with a loss of {meter.loss}")
    return spent


def ttt_row(b: Bench, scorer: TestTimeScorer, label: str, batches: Sequence[Sequence[int]]) -> Row:
    spent = sum(run_documents(b, scorer, lengths) for lengths in batches)
    tokens, n = sum(map(sum, batches)), sum(map(len, batches))
    return {"documents": label, "number": n, "mean tokens": tokens / n, "seconds": spent, "tok/s": tokens / spent}


def long_batches(b: Bench) -> list[list[int]]:
    """Equal batches as the program makes them, longest documents first."""
    lengths = long_lengths(b)
    size = math.ceil(len(lengths) / math.ceil(len(lengths) / b.cfg.ttt_batch_size))
    return [lengths[i : i + size] for i in range(0, len(lengths), size)]


def ttt_profile(b: Bench, scorer: TestTimeScorer, lengths: Sequence[int]) -> list[Row]:
    """Of one chunk at the full window, scored and learned from; without Tap-In."""
    val, documents = text_of(b, lengths)
    scorer = scorer.over(val)
    scorer.restart(len(documents))
    if cache := scorer.cache:  # as full as it gets
        cache.seen = cache.room
        cache.place.fill_(cache.room)
    full = math.ceil(b.cfg.ttt_eval_seq_len / b.cfg.ttt_chunk_size)
    _, parts = next(itertools.islice(scorer.schedule(documents), full, None))
    chunk = scorer.gather(parts)

    def work() -> None:
        scorer.learn_chunk(chunk, scorer.score_chunk(chunk, scorer.adapters, cache))
        if cache:
            cache.commit()

    return [{"documents": len(parts), "inputs": chunk.inputs.size(1), **row} for row in profile(b, work)]


def ttt(b: Bench) -> Part:
    """Test-time training with the loop on: warm-up, documents as in FineWeb, long documents, profile."""
    model = random_model(b).requires_grad_(False)
    model.looped = b.cfg.num_loops > 0
    batches = fineweb_batches(b)
    text, documents = text_of(b, batches[-1])
    scorer = train_gpt.ttt_scorer(model, text, b.cfg, b.run)
    largest = [Document(0, 2 * b.cfg.ttt_eval_seq_len)] * max(len(b) for b in (*batches, *long_batches(b)))
    warm = seconds(b.run, lambda: train_gpt.warm_up_ttt(scorer, [largest]))
    model.requires_grad_(False)
    first = run_documents(b, scorer, batches[-1])  # the shortest once, untimed
    rows = [{"part": "warm_up_ttt", "seconds": warm}, {"part": "first batch", "seconds": first}]
    if isinstance(scorer, GraphedScorer):
        known, begin = len(scorer.recorded), time.perf_counter()
        shapes = [shape for lengths in batches for shape in scorer.shapes([text_of(b, lengths)[1]])]
        scorer.record(shapes)
        number = len(scorer.recorded) - known
        rows.append({"part": f"recording {number} shapes, on the clock", "seconds": time.perf_counter() - begin})
    yield "ttt warm-up", rows
    yield "ttt", [ttt_row(b, scorer, "as in FineWeb", batches)]
    yield "ttt long", [ttt_row(b, scorer, "long", long_batches(b))]
    yield "ttt profile", ttt_profile(b, scorer, long_batches(b)[0])


# ---- quantization ----------------------------------------------------------------------------------------------------
def random_hessians(b: Bench, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """x^T x of random inputs for every matrix that GPTQ quantizes, keyed as `calibrate` keys them."""
    names = [n for n in flat if n == "tok_emb.weight" or any(n.endswith(f".{m}.weight") for m in train_gpt.MATRICES)]
    widths = {train_gpt.hessian_key(name): flat[name].size(1) for name in names}
    out = {"tokens": 1e4 / torch.arange(1, b.cfg.vocab_size + 1, device=b.device)}  # as in any text, by Zipf
    for key, width in widths.items():
        x = torch.randn(2 * width, width, device=b.device) * (0.5 + torch.rand(width, device=b.device))
        out[key] = x.mT @ x
    return out


def gptq(b: Bench) -> Part:
    """All matrices, after one small one that wakes the linear-algebra library."""
    state = {name: p.detach() for name, p in random_model(b).state_dict().items()}
    flat = train_gpt.unbank(state)
    hessians = random_hessians(b, flat)
    probe = torch.randn(64, 64, device=b.device)
    train_gpt.gptq(probe, probe.mT @ probe, 6, 12.0)
    coded: dict[str, Any] = {}
    spent = seconds(b.run, lambda: coded.update(train_gpt.quantize(state, hessians, b.cfg, b.run)))
    matrices = [c for c in coded.values() if c.kind == "gptq"]
    weights = sum(c.codes.numel() for c in matrices)
    yield "gptq", [{"matrices": len(matrices), "weights": weights, "seconds": spent}]


# ---- launch ----------------------------------------------------------------------------------------------------------
MILESTONES = {  # lines of the log
    "weights on the device": r"model_params:",
    "first step": r"warmup_step: 1/",
    "first step with the loop": r"loop_warmup_step: 1/",
}
LAUNCH_LIMIT = 590  # seconds


def environment(cfg: Config, folder: Path) -> dict[str, str]:
    """Of a process with these settings and nothing compiled."""
    knobs = {f.name.upper() for f in fields(Config)}
    env = {k: v for k, v in os.environ.items() if k not in knobs}
    for f in fields(Config):
        value = getattr(cfg, f.name)
        if value != f.default:
            env[f.name.upper()] = str(int(value) if isinstance(value, bool) else value)
    caches = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUTE_DSL_CACHE_DIR", "CUDA_CACHE_PATH",
              "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "XDG_CACHE_HOME", "TMPDIR")  # fmt: skip
    if not torch.cuda.is_available():
        env["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    for name in caches:
        env[name] = str(folder / name.lower())
        Path(env[name]).mkdir()
    return env


def watch_launch(env: Mapping[str, str]) -> dict[str, float]:
    """Starts the program; seconds from there to each milestone and to the end of the first step. Kills it then."""
    began, seen, tail = time.perf_counter(), {}, []
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_gpt.py")], env=dict(env), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    kill = lambda: process.poll() is None and os.killpg(process.pid, signal.SIGKILL)
    limit = threading.Timer(LAUNCH_LIMIT, kill)
    limit.start()
    try:
        for line in process.stdout:
            now = time.perf_counter() - began
            tail = [*tail[-20:], line]
            seen.update({name: now for name, start in MILESTONES.items() if name not in seen and re.match(start, line)})
            if re.match(r"1/\d+ train_loss", line):
                return seen | {"end": now}
    finally:
        limit.cancel()
        kill()
        process.wait()
        process.stdout.close()
    raise RuntimeError(f"no training step within {LAUNCH_LIMIT} s; the log ends in\n" + "".join(tail))


def launch(b: Bench) -> Part:
    """A run of two steps in a process of its own with empty caches, up to the first counted step."""
    with dataset(b) as cfg:
        folder = b.run.folder
        cfg = replace(cfg, run_dir=str(folder / "run"), iterations=2, max_wallclock_seconds=0.0, val_loss_every=0,
                      tokenizer_path=str(ROOT / "tokenizer" / "caseops_8192.model"))  # fmt: skip
        seen = watch_launch(environment(cfg, folder))
        lines = (json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines())
        first = next(line["train_s"] for line in lines if line["kind"] == "train")
    seen["first counted step"] = seen.pop("end") - first
    yield "launch", [{"up to": name, "seconds": at} for name, at in seen.items()]


# ---- report ----------------------------------------------------------------------------------------------------------
PARTS: dict[str, Callable[[Bench], Part]] = {  # launch first: the program wants the GPU's memory free
    "launch": launch, "ceilings": ceilings, "kernels": kernels, "micro": micro, "step": step, "ttt": ttt, "gptq": gptq,
}  # fmt: skip

TITLES = {
    "launch": "From process start with empty caches",
    "ceilings": "Ceilings",
    "kernels": "Kernels: specification and what the program runs; rate and share of the ceiling are the latter's",
    "micro": "Micro-batch, forward + backward",
    "profile": "Kernel time of a micro-batch by class",
    "step": "Optimizer step: the difference is clipping, optimizer, weight average, log and loader",
    "optimizer": "After the micro-batches of a step",
    "ttt warm-up": "Test-time training, before the first score (kernels already cached are not built again)",
    "ttt": "Test-time training, a few of the batches of documents as in FineWeb",
    "ttt long": "Test-time training, long documents",
    "ttt profile": "Kernel time of a chunk of test-time training at the full window by class",
    "gptq": "GPTQ of all matrices",
}


class Target(NamedTuple):
    """A line of the summary: where its figure stands, and what is wanted on one H200 at the record's size."""

    label: str
    table: str
    where: dict[str, str]
    column: str
    public: str
    must: float
    goal: float


TARGETS = (
    Target("micro-batch, loop off, ms", "micro", {"loop": "off"}, "ms", "76.3", 58, 48),
    Target("micro-batch, loop on, ms", "micro", {"loop": "on"}, "ms", "113.7", 87, 72),
    Target("launch to first counted step, s", "launch", {"up to": "first counted step"}, "seconds", "390", 120, 60),
    Target("peak memory, loop on, GiB", "micro", {"loop": "on"}, "peak GiB", "40.0", 40, 30),
    Target("clip, optimizer, average, ms", "optimizer", {"part": "together"}, "ms", "4.2 and more", 8, 4),
    Target("step less its micro-batches, loop off, ms", "step", {"loop": "off"}, "difference ms", "4.2 and more", 8, 4),
    Target("step less its micro-batches, loop on, ms", "step", {"loop": "on"}, "difference ms", "4.2 and more", 8, 4),
    Target("TTT, as in FineWeb, tok/s", "ttt", {"documents": "as in FineWeb"}, "tok/s", "15,000", 30_000, 100_000),
    Target("TTT, long documents, tok/s", "ttt long", {"documents": "long"}, "tok/s", "2,500", 20_000, 100_000),
    Target("TTT warm-up, s", "ttt warm-up", {"part": "warm_up_ttt"}, "seconds", "198", 60, 20),
    Target("GPTQ of all matrices, s", "gptq", {}, "seconds", "10 to 12", 5, 2),
)  # fmt: skip


def measured(results: Tables, target: Target) -> float | None:
    """The figure of a target."""
    for row in results.get(target.table, []):
        if all(row[k] == v for k, v in target.where.items()):
            return row[target.column]
    return None


def verdict(value: float, target: Target) -> str:
    more_is_better = target.goal > target.must
    reached = [value >= limit if more_is_better else value <= limit for limit in (target.goal, target.must)]
    return "goal" if reached[0] else "must" if reached[1] else "missed"


def summary(results: Tables, judge: bool) -> list[Row]:
    """The targets of which a figure was measured; `judge` only where it is of the record's size on a GPU."""
    rows = []
    for target in TARGETS:
        value = measured(results, target)
        if value is not None:
            rows.append({"": target.label, "measured": value, "public record": target.public, "must": target.must,
                         "goal": target.goal, "reached": verdict(value, target) if judge else None})  # fmt: skip
    return rows


def cell(value: Any) -> str:
    """Four significant digits, thousands separated; - for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(title: str, rows: Sequence[Row]) -> str:
    columns = list(rows[0])
    numeric = [any(isinstance(row[c], int | float) for row in rows) for c in columns]
    lines = [columns, ["--:" if n else "---" for n in numeric], *([cell(row[c]) for c in columns] for row in rows)]
    return f"\n**{title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(b: Bench) -> Row:
    """What ran where."""
    cuda = b.device.type == "cuda"
    changed = {f.name: getattr(b.cfg, f.name) for f in fields(Config) if getattr(b.cfg, f.name) != f.default}
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} thread(s)",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {getattr(train_gpt.triton, '__version__', None)}",
        "commit": train_gpt.git_commit()[:12], "dtype": str(b.run.dtype).removeprefix("torch."),
        "kernels": b.kernels.why, "seed": b.seed,
        "changed knobs": " ".join(f"{k.upper()}={v}" for k, v in changed.items()) or "none: the record",
    }  # fmt: skip


def run_parts(b: Bench, names: Sequence[str], show: Callable[[str, list[Row]], None]) -> tuple[Tables, list[str]]:
    """All tables, and the names of parts that failed: what a machine can measure is not lost with what it cannot."""
    results: Tables = {}
    failed = []
    for name in (n for n in PARTS if n in names):
        print(f"{name} ...", file=sys.stderr, flush=True)
        began = time.perf_counter()
        try:
            for table, rows in PARTS[name](b):
                results[table] = rows
                show(table, rows)
        except Exception:
            traceback.print_exc()
            failed.append(name)
        b.free()
        print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return results, failed


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed of train_gpt.py on this machine, beside the targets.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; none: all")
    parser.add_argument("--small", action="store_true", help="the demo's size; always so on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the tables there")
    parser.add_argument("--seed", type=int, default=0, help="of documents and weights (default 0)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the specifications of the kernels")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 when a part failed."""
    args = arguments(argv)
    small = args.small or not torch.cuda.is_available() or os.environ.get("DEVICE") == "cpu"
    try:
        cfg = train_gpt.load_config({"PRESET": "demo", **os.environ} if small else os.environ)
    except train_gpt.ConfigError as e:
        print(e, file=sys.stderr)
        return 1
    if small:  # the tensors are tiny, and beside other processes threads wait for one another, up to ten times as long
        torch.set_num_threads(1)
    b = set_up(cfg, SMALL if small else FULL, seed=args.seed, compile_spec=args.compile)
    about = machine(b)
    print("\n".join(f"{key}: {value}" for key, value in about.items()), flush=True)
    show = lambda table, rows: print(markdown(TITLES[table], rows), flush=True)
    results, failed = run_parts(b, args.parts or list(PARTS), show)
    if rows := summary(results, judge=not small):
        title = "Summary, targets for one H200" + (" (small size: not comparable)" if small else "")
        print(markdown(title, rows), flush=True)
        results["summary"] = rows
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "small": small, "tables": results, "failed": failed}))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
