"""What the unit tests share: a tiny model, synthetic shards, and one process that needs no process group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import train_gpt
from train_gpt import BOS, GPT, Adapters, Config, Run

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "tokenizer" / "caseops_8192.model"
CPU = torch.device("cpu")

# Six layers of width 32 that still have everything: a loop, U-net skips, two lanes, grouped heads, partial rotation.
TINY = dict(
    vocab_size=128, num_layers=6, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=2.0, rope_dims=4, gate_window=8,
    loop_start=2, loop_end=3, num_loops=1, parallel_start_layer=4, xsa_last_n=6, max_wallclock_seconds=0.0,
    iterations=10, train_batch_tokens=8 * 32, train_seq_len=16, eval_seq_len=16, val_batch_tokens=8 * 32,
    warmup_steps=1, gptq_calibration_batches=3, ttt_chunk_size=4, ttt_eval_seq_len=12, ttt_batch_size=3,
    ttt_lora_rank=3, ttt_lora_lr=0.05, phased_ttt_prefix_docs=4, phased_ttt_num_phases=2, global_ttt_chunk_tokens=48,
    global_ttt_lr=0.05,
)  # fmt: skip


def tiny_config(**changes: Any) -> Config:
    values = {**TINY, **changes}
    return train_gpt.load_config({k.upper(): str(int(v) if isinstance(v, bool) else v) for k, v in values.items()})


@torch.no_grad()
def tiny_model(seed: int = 0, **changes: Any) -> GPT:
    """A model with every parameter off its initial value, so that no gate or zero matrix hides a mistake.

    The numbers come from NumPy's legacy generator, whose stream is frozen.
    """
    model = GPT(tiny_config(**changes))
    rng = np.random.RandomState(seed)
    for name, p in sorted(model.named_parameters()):
        noise = torch.from_numpy(rng.standard_normal(tuple(p.shape)).astype(np.float32))
        if name.endswith("_bank"):
            p.copy_(noise / p.size(-1) ** 0.5)
        elif name == "tok_emb.weight":
            p.copy_(0.3 * noise)
        elif "gate" in name:
            p.copy_(0.5 * noise)
        elif name.endswith("q_gain"):
            p.copy_(2 + 0.3 * noise)
        elif name.endswith("resid_mix"):
            p.copy_(torch.tensor([[0.9], [0.2]]) + 0.1 * noise)
        else:
            p.copy_(1 + 0.2 * noise)
    return model


class LoneRun(Run):
    """A rank that answers for itself: no process group. `world` > 1 is for code that only reads it."""

    def __init__(self, folder: Path | None = None, rank: int = 0, world: int = 1, device: torch.device = CPU):
        super().__init__(rank, world, device, torch.float32, dist.HashStore(), folder)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def same(self, value: Any) -> Any:
        return value


def write_shard(path: Path, tokens: Sequence[int] | np.ndarray) -> Path:
    """A token shard, or a byte sidecar: 256 int32 of header, then uint16."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


def documents(lengths: Sequence[int], seed: int = 0, vocab: int = 128) -> np.ndarray:
    """Documents of so many tokens, each its BOS and random text, one after another (uint16)."""
    rng = np.random.RandomState(seed)
    return np.concatenate([np.append(BOS, rng.randint(BOS + 7, vocab, n - 1)) for n in lengths]).astype(np.uint16)


def write_dataset(folder: Path, n_train: int = 3, steps_per_shard: int = 3, seed: int = 0) -> Path:
    """Training shards of a few steps of `TINY` each, a validation shard and its byte sidecar."""
    rng = np.random.RandomState(seed)
    for i in range(n_train):
        lengths = rng.randint(2, 40, 400)
        stream = documents(lengths, seed + i)[: steps_per_shard * (TINY["train_batch_tokens"] + 8) + 5 + i]
        # A shard may begin inside a document; reading starts at its first BOS.
        write_shard(folder / f"fineweb_train_{i:06d}.bin", np.concatenate([[9, 10, 11][:i], stream]))
    val = documents([13, 2, 30, 1, 7, 21], seed + 100)
    write_shard(folder / "fineweb_val_000000.bin", val)
    counts = np.where(val == BOS, 0, rng.randint(1, 6, len(val)))
    write_shard(folder / "fineweb_val_bytes_000000.bin", counts)
    return folder


def packed(lengths: Sequence[int], n_more: int = 2) -> train_gpt.Docs:
    """Boundaries of documents with these many inputs, padded as the loader pads them."""
    edges = np.concatenate([[0], np.cumsum(lengths)])
    cu = np.append(edges, np.full(n_more, edges[-1])).astype(np.int32)
    return train_gpt.Docs(torch.from_numpy(cu), int(max(lengths)))


def relative_error(ours: Tensor, theirs: Tensor | np.ndarray) -> float:
    theirs = torch.as_tensor(theirs).double()
    return float((ours.detach().double() - theirs).norm() / theirs.norm())


def named(adapters: Adapters, rows: Tensor) -> dict[str, Tensor]:
    """SITE.SIDE -> (N, S, ., .): views of rows (N, P), values, moments or gradients, by site and its S visits."""
    groups = [(".".join(key), [*same]) for key, same in itertools.groupby(adapters.pieces, lambda p: p[:2])]
    parts = rows.split([len(same) * math.prod(same[0].shape) for _, same in groups], 1)
    return {k: part.unflatten(1, (len(same), *same[0].shape)) for (k, same), part in zip(groups, parts, strict=True)}


def adapters_for(model: GPT, n_docs: int) -> Adapters:
    """New ones for documents that `model` scores."""
    return Adapters(model.cfg, n_docs, [v.layer for v in model.plan], model.dtype)
