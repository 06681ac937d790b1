#!/usr/bin/env python3
"""Parameter Golf in one file: tokens in, bits per byte out.

Trains a language model for at most 600 s, packs it with this file into at most 16,000,000 bytes and scores it:

    shards -> train -> EMA -> calibrate -> GPTQ -> pack -> (artifact) -> unpack -> evaluate -> phased TTT -> bpb

    torchrun --standalone --nproc_per_node=8 train_gpt.py     the record run: every default is the record's value
    PRESET=demo DATA_PATH=... python train_gpt.py             all parts at a size a laptop trains in minutes
    python train_gpt.py --help                                every knob; each is an environment variable

Contents
     1. Imports and probes
     2. Config
     3. Runtime
     4. Kernels
     5. Data
     6. Model
     7. Optimizer
     8. Evaluation
     9. Training
    10. Quantization
    11. Packing
    12. Test-time training
    13. Pipeline
    14. Switches

Shapes are written (B, T, D): B rows, T positions, D width, H query heads, G key/value heads, K head dim, F hidden width
of the MLP, V vocabulary, L layers, R adapter rank, N documents. Among the kernels N is also tokens, R the query heads
of a group, H / G, and S the size of one stream, N D numbers.
"""

# --------------------------------------------------------------------------------------------------------------------
# 1. IMPORTS AND PROBES: importing this file has no side effects and needs no GPU package
# --------------------------------------------------------------------------------------------------------------------
from __future__ import annotations

import ast
import builtins
import contextlib
import copy
import difflib
import fnmatch
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import lzma
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

# Its functions take the process group of the moment of their import as a default and so keep it: imported later, by the
# optimizer, that is a group whose threads outlive the interpreter, which aborted every fourth run of two processes.
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # the CPU build of PyTorch comes without it
    triton = None

BOS = 1  # the <s> of the tokenizer: every document starts with it
MICRO_STEPS = 8  # one optimizer step is 8 micro-batches, spread over 1, 2, 4 or 8 ranks
ARTIFACT_LIMIT = 16_000_000  # bytes, code plus weights
BUDGET_SECONDS = 600  # of training, and again of evaluation


# --------------------------------------------------------------------------------------------------------------------
# 2. CONFIG: a knob is a typed field, its default the record's value, its comment the manual
# --------------------------------------------------------------------------------------------------------------------
class ConfigError(ValueError):
    """What is wrong with the settings, one problem a line."""


@dataclass(frozen=True)
class Config:
    # fmt: off
    # Run and stages
    preset: str = ""                     # replaces defaults: `demo`; variables that are set still win
    seed: int = 42                       # of initialization, adapters and sampling; the record ran 42, 0 and 1234
    run_id: str = ""                     # name of the run; empty: date, time and seed
    run_dir: str = ""                    # folder of everything the run writes; empty: runs/{RUN_ID}
    artifact_dir: str = ""               # the public script's name for RUN_DIR
    from_stage: str = ""                 # start at calibrate, quantize, pack, evaluate or ttt from what RUN_DIR holds
    resume: bool = False                 # continue training from the checkpoint in RUN_DIR
    checkpoint_every: int = 1000         # steps between training checkpoints (0.5 s each); 0: only when it is stopped
    save_pre_gptq: bool = False          # also write pre_gptq.pt: the averaged float weights, flat: a tensor per matrix
    eval_only_checkpoint: str = ""       # state dict to quantize, pack and score instead of training
    eval_only_artifact: str = ""         # artifact to score; needs no training data
    deterministic: bool = False          # same bits for same seed, machine and ranks; TTT for any number of ranks
    audit: bool = False                  # check the rules on samples while scoring and write audit.json
    device: str = "auto"                 # auto, cuda or cpu
    compute_dtype: str = "auto"          # activations: bfloat16 or float32; auto: bfloat16 on a GPU, float32 on a CPU
    kernels: str = "auto"                # auto: the fastest that runs here; spec: plain PyTorch everywhere
    attention: str = "auto"              # auto, triton (our own), fa3, fa4, varlen or sdpa
    cuda_graphs: bool = True             # micro-batches and chunks of test-time training are graphs, where possible

    # Data
    data_dir: str = "./data/"            # root of data sets and tokenizers
    data_path: str = ""                  # folder with the shards; empty: the public place below DATA_DIR
    tokenizer_path: str = ""             # SentencePiece model; empty: the public place below DATA_DIR
    caseops_enabled: bool = True         # CaseOps shards with a byte sidecar; 0: plain shards, bytes by table
    vocab_size: int = 8192               # must equal the tokenizer's

    # Length and batch
    iterations: int = 20000              # optimizer steps at most
    max_wallclock_seconds: float = 600.0  # training budget; 0: none, schedules then follow the step count
    gptq_reserve_seconds: float = 4.0    # part of that budget kept for calibration
    train_batch_tokens: int = 786432     # tokens of an optimizer step, all ranks together
    train_seq_len: int = 2048            # longer documents are cut into pieces of this many tokens
    eval_seq_len: int = 2048             # the same for plain evaluation and base learning
    val_batch_tokens: int = 524288       # tokens of eight evaluation rows; a row is what one forward pass takes
    val_loss_every: int = 4000           # steps between validations during training; 0: only at the end
    train_log_every: int = 500           # steps between lines of the training log
    warmup_steps: int = 20               # untimed steps in each loop mode to prime the kernels; all state rolls back
    val_doc_fraction: float = 1.0        # share of the validation documents that TTT scores

    # Model
    num_layers: int = 11                 # physical layers
    model_dim: int = 512                 # width D
    num_heads: int = 8                   # query heads H
    num_kv_heads: int = 4                # key/value heads G
    mlp_mult: float = 4.0                # hidden width of the MLP over D
    tie_embeddings: bool = True          # only 1: an untied head would need 4 MB more
    tied_embed_init_std: float = 0.005   # normal initialization of the embedding
    logit_softcap: float = 30.0          # logits = cap * tanh(logits / cap)
    rope_base: float = 1e4               # rotary base
    rope_dims: int = 16                  # rotated dimensions of each head
    rope_yarn: bool = False              # stretch the rotary base for dense rows longer than TRAIN_SEQ_LEN
    ln_scale: bool = True                # layer i sees its normed input times 1/sqrt(i+1)
    qk_gain_init: float = 5.0            # initial gain of the normed queries
    xsa_last_n: int = 11                 # last layers whose heads drop the component along their own value
    skip_gates_enabled: bool = True      # gate the U-net skips; 0: add them
    num_loops: int = 2                   # extra passes over the looped layers
    loop_start: int = 3                  # first looped layer
    loop_end: int = 5                    # last looped layer
    enable_looping_at: float = 0.35      # fraction of training at which the loop starts
    parallel_start_layer: int = 8        # from here attention and MLP run on two lanes; 0: never
    parallel_final_lane: str = "mean"    # what leaves the lanes: mean, attn or mlp
    gated_attn_enabled: bool = True      # sigmoid gate per head, read from the attention input
    gated_attn_init_std: float = 0.005   # its initialization

    # Optimizer
    matrix_lr: float = 0.026             # Muon, all matrices
    scalar_lr: float = 0.02              # AdamW, gains, scales and gates
    tied_embed_lr: float = 0.03          # AdamW, embedding
    min_lr: float = 0.0                  # floor of the learning-rate multiplier
    warmdown_frac: float = 0.75          # last part of training over which the learning rate falls to MIN_LR
    muon_momentum: float = 0.97          # Nesterov momentum
    muon_momentum_warmup_start: float = 0.92  # momentum at the first step
    muon_momentum_warmup_steps: int = 1500    # steps until MUON_MOMENTUM
    muon_backend_steps: int = 5          # Newton-Schulz iterations
    muon_row_normalize: bool = True      # scale rows to unit length before orthogonalizing
    muon_wd: float = 0.095               # decoupled weight decay of the matrices
    adam_wd: float = 0.02                # of the scalars
    embed_wd: float = 0.085              # of the embedding
    beta1: float = 0.9                   # AdamW
    beta2: float = 0.95                  # AdamW
    adam_eps: float = 1e-8               # AdamW
    grad_clip_norm: float = 0.3          # norm of the whole gradient, averaged over ranks; 0: no clipping
    ema_decay: float = 0.9965            # cap of the weight average's decay, which grows with the steps done

    # Quantization and packing
    compressor: str = "rans"             # rans, brotli, lzma or zstd: all lossless
    gptq_calibration_batches: int = 16   # micro-batches of training text for the Hessians
    matrix_bits: int = 6                 # matrices
    embed_bits: int = 7                  # embedding
    embed_clip_sigmas: float = 15.0      # range in standard deviations of each row: embedding
    embed_step_power: float = 0.25       # its steps fall with this power of how often a token is seen; 0: all alike
    embed_damping: float = 0.5           # what GPTQ adds to the diagonal of its Hessian, in means of that
    mlp_clip_sigmas: float = 12.0        # MLP matrices
    attn_clip_sigmas: float = 13.0       # attention matrices
    matrix_step_power: float = 0.4       # steps of a matrix fall with this power of what its errors cost; 0: all alike
    scale_bits: int = 4                  # mantissa bits of the scales of rows, 10 of a half float at most
    gated_attn_quant_gate: bool = True   # store the head gates as int8 rows

    # Test-time training
    ttt_enabled: bool = True             # score with phased test-time training after the plain evaluation
    ttt_lora_rank: int = 96              # rank R of the adapters
    ttt_lora_lr: float = 1e-4            # adapter learning rate
    ttt_chunk_size: int = 48             # tokens scored before each update
    ttt_eval_seq_len: int = 2048         # context window
    ttt_context: str = "rerun"           # rerun: each chunk sees its window anew; cached: keys and values are kept
    ttt_batch_size: int = 64             # documents side by side
    ttt_grad_steps: int = 1              # updates per chunk
    ttt_weight_decay: float = 0.5        # decoupled, adapters
    ttt_beta1: float = 0.0               # Adam, or the momentum of sgd
    ttt_beta2: float = 0.999             # Adam
    ttt_k_lora: bool = True              # adapt keys
    ttt_mlp_lora: bool = True            # bypass around the MLP
    ttt_o_lora: bool = True              # bypass around the attention
    ttt_optimizer: str = "adam"          # adam or sgd
    ttt_eval_batches: str = ""           # score only these batches (1 has the shortest documents): a debugging aid
    phased_ttt_prefix_docs: int = 2000   # documents, longest first, that the base model also learns from
    phased_ttt_num_phases: int = 3       # times it does so, each after scoring a further share of them
    global_ttt_lr: float = 1e-3          # its learning rate, falling along a cosine
    global_ttt_momentum: float = 0.9     # its momentum, fresh in every phase
    global_ttt_epochs: int = 1           # passes over each chunk of text
    global_ttt_chunk_tokens: int = 32768  # text of one step of that schedule
    global_ttt_batch_seqs: int = 32      # sequences per rank and optimizer step
    global_ttt_warmup_start_lr: float = 0.0  # where a linear warm-up starts
    global_ttt_warmup_chunks: int = 0    # chunks it takes
    global_ttt_grad_clip: float = 1.0    # gradient norm
    global_ttt_respect_doc_boundaries: bool = True  # attention stays inside documents

    # Follow-up systems, all off (what each is worth: LOG.md)
    fp8_forward: bool = False            # training multiplies with W_qkv and W_up in 8 bits, forward; Hopper GPUs
    fp8_backward: bool = False           # and with W_up for the gradient of its input
    attn_out_gate_enabled: bool = False  # narrow gate per head on the first GATE_WINDOW channels
    attn_out_gate_src: str = "proj"      # what it reads: proj (the attention input) or q (the raw queries)
    smear_gate_enabled: bool = False     # mix in the previous token's embedding, never across documents
    gate_window: int = 12                # channels that the narrow gates read
    qk_gain_per_layer: str = ""          # initial gains by layer, separated by commas; replaces QK_GAIN_INIT
    xielu_enabled: bool = False          # the activation of PR #1648, its scalars by depth, instead of the leaky square
    bigram_hash_enabled: bool = False    # add a hashed table of token pairs to the embedding; 250 KB in the artifact
    bigram_hash_buckets: int = 16384     # its rows
    bigram_hash_dim: int = 32            # and their width
    bigram_hash_prime_a: int = 36313     # hash: PRIME_A * token XOR PRIME_B * previous token
    bigram_hash_prime_b: int = 27191     # its second factor
    loop_curriculum: str = ""            # extra passes by fraction, like 0.35:1,0.6:2; replaces ENABLE_LOOPING_AT
    recur_homotopy: bool = False         # let the loop come in along a sigmoid of the fraction, not at once
    recur_homotopy_tmid: float = 0.5     # its middle; it starts 5 TAU before and ends 5 TAU after
    recur_homotopy_tau: float = 0.03     # its width
    recur_alpha_enabled: bool = False    # a repeated visit moves the stream by alpha times what the layer would
    recur_alpha_form: str = "learned"    # learned, frozen (stored with the weights) or literal (part of the settings)
    recur_alpha_values: str = "1"        # start of alpha, one for all or NUM_LOOPS rows of looped layers: 1,1.2;1,0.9
    cross_pass_xsa_enabled: bool = False  # heads drop a learned part of what they wrote in the pass before
    recur_diag_p2p_cos: int = 0          # validation rows on which passes are compared at each validation; 0: none
    wd_taper_start_frac: float = 0.0     # fraction of training from which MUON_WD falls along a line; 0: it never does
    wd_taper_final_mult: float = 0.5     # what is left of it at the end
    muon_grad_power: float = 1.0         # Muon's gradient g becomes sign(g) |g|^p before its momentum
    bpb_weighted_loss_enabled: bool = False  # weight training losses by the bytes of their tokens: a negative control
    ttt_lora_layer_lr_alpha: float = 0.0  # adapters of layer l of L learn at TTT_LORA_LR * (1 + this * l / (L - 1))
    lora_plus_ratio: float = 1.0         # learning rate of the adapters' B over that of A
    ttt_lora_alpha: float = 0.0          # adapters add alpha / rank times B A; 0: B A, as the record
    tapin_enabled: bool = False          # Tap-In: mix what followed a match earlier in the document into TTT's scores
    tapin_min_match: int = 3             # tokens that have to match
    tapin_max_match: int = 100           # longer matches count as this long
    tapin_mix_w: float = 0.02            # share of the hint in the mixture, before it grows with match and votes
    tapin_ent_min: float = 0.0           # only where the model's entropy is at least this, in nats
    tapin_v4_top_k: int = 1000           # only tokens among the model's K most likely
    tapin_cross_enabled: bool = True     # also match text of the document that has left the context window
    tapin_v6_cross_w: float = 0.06       # TAPIN_MIX_W of such matches
    eval_hash_emb_enabled: bool = False  # TTT: add a vector for each pair of neighbors, learned by the base SGD
    eval_hash_emb_buckets: int = 16384   # vectors; pairs are hashed to them
    eval_hash_emb_lr_mult: float = 10.0  # learning rate of both eval embeddings over GLOBAL_TTT_LR
    eval_loop_emb_enabled: bool = False  # TTT: the same for each pass of the loop, where it enters LOOP_START
    hotstart_fp_ckpt: str = ""           # float weights to rotate, quantize, pack and score; also writes final.json
    spinquant_mode: str = "baseline"     # rotate weights for GPTQ alone: internal_only, full or port_1695
    spinquant_enabled: bool = False      # follows SPINQUANT_MODE; 1 without a mode is port_1695, its public name
    spinquant_seed: int = 42             # of the rotations
    spinquant_sites: str = "attn_in,attn_proj_in,mlp_in,mlp_proj_in"  # inputs that port_1695 (full: the last) rotates
    # fmt: on

    @property
    def float_checkpoint(self) -> str:
        return self.hotstart_fp_ckpt or self.eval_only_checkpoint

    @property
    def qk_gains(self) -> list[float]:
        return numbers(self.qk_gain_per_layer)

    @property
    def looped_layers(self) -> int:
        return self.loop_end - self.loop_start + 1 if self.num_loops else 0

    @property
    def recur_alphas(self) -> list[list[float]]:
        """(NUM_LOOPS, looped layers)."""
        rows = [numbers(row) for row in self.recur_alpha_values.split(";")]
        return [rows[0] * self.looped_layers] * self.num_loops if rows == [rows[0][:1]] else rows

    @property
    def loop_stages(self) -> list[tuple[float, int]]:
        """(fraction, extra passes from there on), ascending."""
        if not self.loop_curriculum:
            onset = self.recur_homotopy_tmid - 5 * self.recur_homotopy_tau
            return [(max(onset, 0.0) if self.recur_homotopy else self.enable_looping_at, self.num_loops)]
        stages = (stage.split(":") for stage in self.loop_curriculum.split(","))
        return [(float(at), int(loops)) for at, loops in stages]

    @property
    def fp8(self) -> str:
        """The first knob that asks for products in 8 bits, or nothing."""
        return "FP8_FORWARD" if self.fp8_forward else "FP8_BACKWARD" if self.fp8_backward else ""

    @property
    def micro_batch_tokens(self) -> int:
        return self.train_batch_tokens // MICRO_STEPS

    @property
    def step_tokens(self) -> int:
        """What an optimizer step takes from the stream: every micro-batch needs one target more."""
        return self.train_batch_tokens + MICRO_STEPS

    @property
    def val_row_tokens(self) -> int:
        return max(self.val_batch_tokens // MICRO_STEPS // self.eval_seq_len, 1) * self.eval_seq_len

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def shard_dir(self) -> Path:
        if self.data_path:
            return Path(self.data_path)
        root = Path(self.data_dir) / "datasets"
        if not self.caseops_enabled:
            return root / f"fineweb10B_sp{self.vocab_size}"
        return root / "fineweb10B_sp8192_caseops/datasets/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"

    @property
    def tokenizer_file(self) -> Path:
        if self.tokenizer_path:
            return Path(self.tokenizer_path)
        root = Path(self.data_dir)
        if not self.caseops_enabled:
            return root / f"tokenizers/fineweb_{self.vocab_size}_bpe.model"
        name = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
        return root / "datasets/fineweb10B_sp8192_caseops/datasets/tokenizers" / name


PRESETS: dict[str, dict[str, Any]] = {
    "demo": dict(
        num_layers=5, model_dim=96, num_heads=4, num_kv_heads=2, mlp_mult=3.0, loop_start=1, loop_end=2, num_loops=1,
        parallel_start_layer=3, xsa_last_n=5, iterations=100, max_wallclock_seconds=0.0, train_batch_tokens=4096,
        train_seq_len=512, eval_seq_len=512, val_batch_tokens=4096, val_loss_every=0, train_log_every=20,
        warmup_steps=1, checkpoint_every=40, muon_momentum_warmup_steps=60, gptq_calibration_batches=8,
        ttt_eval_seq_len=256, ttt_chunk_size=64, ttt_lora_rank=8, ttt_lora_lr=2e-3, ttt_batch_size=16,
        phased_ttt_prefix_docs=6, global_ttt_chunk_tokens=2048,
    ),
}  # fmt: skip

IS_SUBMISSION = False  # a submission is this program without what only its makers need
LEFT_OUT: dict[str, Any] = {}  # knobs that it lacks, and the values it was built for

RETIRED = {  # names of the public script that never did, or no longer do, anything
    "EVAL_STRIDE": "no evaluation used it",
    "ROPE_TRAIN_SEQ_LEN": "ROPE_YARN uses TRAIN_SEQ_LEN",
    "EMBED_LR": "only an untied embedding used it; set TIED_EMBED_LR",
    "CONTROL_TENSOR_NAME_PATTERNS": "the ROLES table decides what trains how",
    "TAPIN_V4_ENTROPY_MAX": "nothing was ever compared with it",
    "MATRIX_CLIP_SIGMAS": "every matrix has a knob of its own: ATTN_, MLP_ or EMBED_CLIP_SIGMAS",
}

REFUSED = {  # public names that would have to do something, and why they cannot, or what does it here
    "TTT_WARM_START_A": "which batches a rank scored before would decide what a document's adapters start from, so the "
    "score would depend on the number of ranks and on their speed: leave it out",
    "TAPIN_TOP_K": "set TAPIN_V4_TOP_K, the name that the public program read",
    "TAPIN_CROSS_W": "set TAPIN_V6_CROSS_W, the name that the public program read",
    "TAPIN_BOOST_PER_MATCH": "set TAPIN_MIX_W, the name that the public program read",
    "TAPIN_V4_BOOST_PER_MATCH": "set TAPIN_MIX_W",
    "TAPIN_V4_ENABLED": "set TAPIN_ENABLED",
    "TAPIN_V4_ENTROPY_MIN": "set TAPIN_ENT_MIN",
    "TAPIN_V4_MIN_MATCH": "set TAPIN_MIN_MATCH",
    "TAPIN_V4_MAX_MATCH": "set TAPIN_MAX_MATCH",
    "TAPIN_V6_CROSS": "set TAPIN_CROSS_ENABLED",
}

BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def numbers(text: str) -> list[float]:
    """ "1.5,2" -> [1.5, 2.0]; nothing -> []. Raises ValueError."""
    return [float(x) for x in text.split(",")] if text.strip() else []


def parse_knob(name: str, kind: str, text: str) -> Any:
    """One environment value as bool, int, float or str. Raises ValueError with a sentence."""
    try:
        value = {"bool": lambda: BOOLEANS[text.strip().lower()], "int": lambda: int(text.replace("_", "")),
                 "float": lambda: float(text), "str": lambda: text}[kind]()  # fmt: skip
        if kind == "float" and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        want = {"bool": "0 or 1", "int": "a whole number", "float": "a number"}[kind]
        raise ValueError(f"{name}={text!r}: give {want}") from None


def misspelt(env: Mapping[str, str], known: set[str]) -> list[str]:
    """Sentences for variables that look like a knob but are none."""
    rows = []
    for name in sorted(set(env) - known):
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if close:
            rows.append(
                f"{name} is not a knob; did you mean {close[0]}? (unset {name} if it is meant for another program)"
            )
    return rows


def load_config(env: Mapping[str, str]) -> Config:
    """The settings that `env` (names in upper case) asks for. Raises ConfigError naming every problem at once."""
    knobs = {f.name.upper(): f for f in fields(Config)}
    problems = [] if IS_SUBMISSION else misspelt(env, {*knobs, *RETIRED, *REFUSED})
    if not IS_SUBMISSION:
        problems += [
            f"{name}: {why}" for name, why in REFUSED.items() if BOOLEANS.get(env.get(name, "0").lower(), True)
        ]
    preset = env.get("PRESET", "")
    if preset and preset not in PRESETS:
        problems.append(f"PRESET={preset!r}: there is only {', '.join(PRESETS)}")
    problems += [
        f"{name} was left out of this submission, built for {value}: unset it, or run the whole program"
        for name, value in LEFT_OUT.items()
        if env.get(name, "") not in ("", str(value), str(int(value)) if isinstance(value, bool) else "")
    ]
    values: dict[str, Any] = dict(PRESETS.get(preset, {}))
    for name in sorted(knobs.keys() & env.keys()):
        try:
            values[knobs[name].name] = parse_knob(name, str(knobs[name].type), env[name])
        except ValueError as e:
            problems.append(str(e))
    if "SPINQUANT_MODE" in knobs:  # each of the two says what the other is
        mode = values.setdefault("spinquant_mode", "port_1695" if values.get("spinquant_enabled") else "baseline")
        values.setdefault("spinquant_enabled", mode != "baseline")
    cfg = Config(**values)
    problems += [sentence for bad, sentence in config_rules(cfg) if bad]
    if problems:
        raise ConfigError("\n".join(problems))
    return cfg


def config_rules(c: Config) -> list[tuple[bool, str]]:
    """(is it broken, what to do) for every setting that would fail late, be ignored or change the result silently."""
    choices = dict(
        device=("auto", "cuda", "cpu"), compute_dtype=("auto", "bfloat16", "float32"), kernels=("auto", "spec"),
        attention=("auto", *ATTENTION_KINDS), parallel_final_lane=("mean", "attn", "mlp"),
        attn_out_gate_src=("proj", "q"), compressor=tuple(COMPRESSORS), ttt_optimizer=("adam", "sgd"),
        ttt_context=("rerun", "cached"), spinquant_mode=("baseline", "internal_only", "full", "port_1695"),
        recur_alpha_form=("learned", "frozen", "literal"), from_stage=("", *STAGES[1:]),
    )  # fmt: skip
    choose = lambda k, of: f"{k.upper()}={getattr(c, k)!r}: choose one of {', '.join(a for a in of if a)}"
    named = [(getattr(c, k) not in allowed, choose(k, allowed)) for k, allowed in choices.items()]
    positive = (
        "iterations", "train_batch_tokens", "train_seq_len", "eval_seq_len", "val_batch_tokens", "num_layers",
        "model_dim", "num_heads", "num_kv_heads", "vocab_size", "ttt_chunk_size", "ttt_eval_seq_len", "ttt_batch_size",
        "ttt_lora_rank", "ttt_grad_steps", "phased_ttt_num_phases", "gptq_calibration_batches",
        "global_ttt_chunk_tokens", "global_ttt_batch_seqs", "global_ttt_epochs", "logit_softcap", "mlp_mult",
        "rope_dims", "gate_window", "muon_backend_steps",
    )  # fmt: skip
    signs = [(getattr(c, k) <= 0, f"{k.upper()} must be above 0, not {getattr(c, k)}") for k in positive]
    signs += [(getattr(c, f.name) < 0, f"{f.name.upper()} must not be below 0, but is {getattr(c, f.name)}")
              for f in fields(c) if f.name.endswith(("_lr", "_wd", "_decay"))]  # fmt: skip
    signs += [(not 0 <= getattr(c, k) <= 999, f"{k.upper()} must lie in 0..999")  # the rules below make lists of these
              for k in ("num_layers", "num_loops", "loop_start", "loop_end")]  # fmt: skip
    if any(bad for bad, _ in signs):
        return named + signs  # the rules below divide by these
    in_lanes = c.num_loops > 0 and 0 < c.parallel_start_layer <= c.loop_end
    return named + follow_up_rules(c) + [
        (not c.tie_embeddings, "TIE_EMBEDDINGS=0: an untied head has no optimizer and does not fit; set it to 1"),
        (c.train_batch_tokens % MICRO_STEPS != 0, f"TRAIN_BATCH_TOKENS must be divisible by {MICRO_STEPS}"),
        (not c.eval_only_artifact and c.micro_batch_tokens < c.train_seq_len,
         "TRAIN_BATCH_TOKENS / 8 must be at least TRAIN_SEQ_LEN"),
        (c.model_dim % c.num_heads != 0, "MODEL_DIM must be divisible by NUM_HEADS"),
        (c.num_heads % c.num_kv_heads != 0, "NUM_HEADS must be divisible by NUM_KV_HEADS"),
        (c.rope_dims % 2 == 1 or c.rope_dims > c.head_dim, f"ROPE_DIMS must be even and at most {c.head_dim}"),
        (c.rope_yarn and c.rope_dims == 2, "ROPE_YARN=1 needs ROPE_DIMS above 2"),
        (c.num_loops > 0 and not 0 <= c.loop_start <= c.loop_end < c.num_layers,
         f"LOOP_START..LOOP_END must lie in 0..{c.num_layers - 1}"),
        (in_lanes, "a looped layer in the two-lane part loses a branch: set LOOP_END below PARALLEL_START_LAYER"),
        (c.gate_window > c.model_dim, "GATE_WINDOW must be at most MODEL_DIM"),
        (c.ttt_eval_seq_len < c.ttt_chunk_size, "TTT_EVAL_SEQ_LEN must be at least TTT_CHUNK_SIZE"),
        (c.ttt_context == "cached" and c.rope_yarn,
         "TTT_CONTEXT=cached does not know the length of the row: set it to rerun, or ROPE_YARN=0"),
        (c.global_ttt_chunk_tokens < c.eval_seq_len, "GLOBAL_TTT_CHUNK_TOKENS must be at least EVAL_SEQ_LEN"),
        (not (0 <= c.embed_step_power <= 1 and 0 <= c.matrix_step_power <= 1 and c.embed_damping > 0),
         "EMBED_STEP_POWER and MATRIX_STEP_POWER must lie in [0, 1], EMBED_DAMPING above 0"),
        (not (2 <= c.matrix_bits <= 8 and 2 <= c.embed_bits <= 8 and 0 <= c.scale_bits <= 10),
         "MATRIX_BITS and EMBED_BITS must lie in 2..8, SCALE_BITS in 0..10"),
        (not 0 < c.val_doc_fraction <= 1, "VAL_DOC_FRACTION must lie in (0, 1]"),
        (not 0 <= c.ema_decay < 1, "EMA_DECAY must lie in [0, 1)"),
        (c.warmdown_frac <= 0, "WARMDOWN_FRAC must be above 0"),
        (0 < c.max_wallclock_seconds <= c.gptq_reserve_seconds,
         "MAX_WALLCLOCK_SECONDS must exceed GPTQ_RESERVE_SECONDS"),
        (bool(c.run_dir and c.artifact_dir), "RUN_DIR and ARTIFACT_DIR mean the same: set one"),
        (bool(c.from_stage or c.resume) and not (c.run_dir or c.artifact_dir), "FROM_STAGE and RESUME need RUN_DIR"),
        (sum(map(bool, (c.eval_only_checkpoint, c.hotstart_fp_ckpt, c.eval_only_artifact, c.from_stage, c.resume))) > 1,
         "choose one of EVAL_ONLY_CHECKPOINT, HOTSTART_FP_CKPT, EVAL_ONLY_ARTIFACT, FROM_STAGE and RESUME"),
        (any(not b.strip().isdigit() for b in c.ttt_eval_batches.split(",")) and c.ttt_eval_batches != "",
         f"TTT_EVAL_BATCHES={c.ttt_eval_batches!r}: give batch numbers like 5,250,500"),
        *proof_rules(c),
        *switch_rules(c),
    ]  # fmt: skip


def proof_rules(c: Config) -> list[tuple[bool, str]]:
    """As `config_rules`, for DETERMINISTIC and AUDIT."""
    trains = not (c.from_stage or c.eval_only_artifact or c.float_checkpoint)
    return [
        (c.deterministic and trains and c.max_wallclock_seconds > 0,
         "DETERMINISTIC=1 needs steps instead of a clock: set MAX_WALLCLOCK_SECONDS=0"),
        (c.deterministic and c.attention in ("fa3", "fa4"),
         f"ATTENTION={c.attention} sums gradients in any order: DETERMINISTIC=1 needs auto, triton, varlen or sdpa"),
        (IS_SUBMISSION and c.audit, "a submission has no AUDIT: set it beside the whole program"),
    ]  # fmt: skip


def follow_up_rules(c: Config) -> list[tuple[bool, str]]:
    """The same for the follow-up systems."""
    return [
        (not 0 <= c.wd_taper_start_frac < 1, "WD_TAPER_START_FRAC must lie in [0, 1); 0 is off"),
        (c.wd_taper_final_mult < 0, "WD_TAPER_FINAL_MULT must be 0 or more"),
        (c.lora_plus_ratio < 0 or c.ttt_lora_layer_lr_alpha < -1,
         "LORA_PLUS_RATIO must be 0 or more and TTT_LORA_LAYER_LR_ALPHA at least -1: no learning rate is negative"),
        (c.ttt_lora_alpha < 0, "TTT_LORA_ALPHA must be 0 or more"),
        (not 1 <= c.tapin_min_match <= c.tapin_max_match, "TAPIN_MIN_MATCH must lie in 1..TAPIN_MAX_MATCH"),
        (not (0 <= c.tapin_mix_w <= 0.5 and 0 <= c.tapin_v6_cross_w <= 0.5),
         "TAPIN_MIX_W and TAPIN_V6_CROSS_W must lie in [0, 0.5]"),
        (c.eval_hash_emb_buckets < 1, "EVAL_HASH_EMB_BUCKETS must be at least 1"),
        (c.eval_loop_emb_enabled and c.num_loops == 0, "EVAL_LOOP_EMB_ENABLED=1 needs a loop: set NUM_LOOPS"),
        (c.tapin_v4_top_k < 1, "TAPIN_V4_TOP_K must be at least 1"),
        (c.muon_grad_power <= 0, f"MUON_GRAD_POWER must be above 0, not {c.muon_grad_power}"),
        (c.fp8 and (c.kernels == "spec" or c.device == "cpu" or c.compute_dtype == "float32"),
         f"{c.fp8}=1 is a part of the fused kernels: it needs a GPU, KERNELS=auto and COMPUTE_DTYPE=auto"),
        (c.fp8 and c.model_dim % 16 != 0, f"{c.fp8}=1 needs MODEL_DIM divisible by 16"),
        (c.fp8_backward and c.hidden_dim % 16 != 0, "FP8_BACKWARD=1 needs MLP_MULT * MODEL_DIM divisible by 16"),
    ]  # fmt: skip


def manual() -> list[tuple[str, str, str, str]]:
    """(section, knob, default, explanation) of every knob, read from the comments of Config."""
    section, comments = "", {}
    for line in inspect.getsource(Config).splitlines():
        if m := re.match(r"    # ([A-Z].*)$", line):
            section = m[1]
        elif m := re.match(r"    (\w+): \w+ = .*?  # (.*)$", line):
            comments[m[1]] = (section, m[2])
    rows = []
    for f in fields(Config):
        default = int(f.default) if isinstance(f.default, bool) else f.default
        where, text = comments[f.name]
        rows.append((where, f.name.upper(), str(default), text))
    return rows


def print_help() -> None:
    print(__doc__)
    last = None
    for section, name, default, text in manual():
        if section != last:
            print(f"\n{section}")
            last = section
        print(f"  {name:<36}{default or '(empty)':<10} {text}")
    for name, values in PRESETS.items():
        print(f"\nPRESET={name}: " + " ".join(f"{k.upper()}={v}" for k, v in values.items()))


# --------------------------------------------------------------------------------------------------------------------
# 3. RUNTIME: ranks, clocks, the run folder, and every check that can fail before the work starts
# --------------------------------------------------------------------------------------------------------------------
class Stop(SystemExit):
    """Ends the run with one sentence on the console; raise it on every rank."""

    def __init__(self, sentence: str, code: int = 1):
        super().__init__(code)
        self.sentence = sentence


# PyTorch is renaming these two; both names do the same.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Run:
    """This process's place among the ranks, its device, and the run folder that rank 0 writes."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    store: Any
    folder: Path | None = None
    started: float = field(default_factory=time.monotonic)
    stop_signal: int = 0
    training: bool = False  # only the training loop can put a signal off until its checkpoint is written
    stage_name: str = ""  # what is under way, for messages
    _progress_at: float = 0.0
    _complained: bool = False

    @property
    def main(self) -> bool:
        return self.rank == 0

    def log(self, text: str = "", console: bool = True) -> None:
        if self.main and console:
            print(text, flush=True)
        if self.main and self.folder and self.folder.is_dir():  # a run that is refused makes none
            self._append("log.txt", text)

    def _append(self, name: str, line: str) -> None:
        """A full disk costs lines, not the run."""
        try:
            with open(self.folder / name, "a") as f:
                f.write(line + "\n")
        except OSError as e:
            if not self._complained:
                print(f"WARNING: {self.folder / name} cannot be written: {e.strerror}", flush=True)
            self._complained = True

    def metric(self, kind: str, **values: Any) -> None:
        """Appends one line to metrics.jsonl."""
        if self.main and self.folder:
            row = {"kind": kind, "t": round(time.monotonic() - self.started, 3), **values}
            self._append("metrics.jsonl", json.dumps(row))

    def progress(self, what: str, done: float, total: float, since: float, every: float = 2) -> None:
        """At most one line in `every` seconds, with the time that is left at the speed since `since`."""
        now = time.monotonic()
        if now - max(self._progress_at, since) < every or done <= 0:
            return
        self._progress_at = now
        left = (now - since) * (total - done) / done
        self.log(f"  {what}: {done / total:.0%} eta {left:.0f}s")

    def agree(self, *values: float) -> list[float]:
        """The largest value over the ranks, element by element; host side, so the GPU queue keeps running."""
        box = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(box, dist.ReduceOp.MAX)
        return box.tolist()

    def sum(self, x: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def add_in_order(self, total: Tensor, x: Tensor) -> None:
        """Adds every rank's `x` to `total`, one after another: the same bits on any number of ranks."""
        every = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(every, x) if self.world > 1 else every[0].copy_(x)
        for part in every:
            total += part

    def gather(self, value: Any) -> list[Any]:
        """One small Python object per rank, in rank order, on every rank."""
        if self.world == 1:  # Gloo's thread would start OpenMP threads of its own: more than cores, so that all sleep
            return [value]
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value)
        return box

    def same(self, value: Any) -> Any:
        """Rank 0's object, everywhere."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def barrier(self) -> None:
        self.agree(0.0)

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_memory_mib(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() >> 20
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, float]]:
        """Times a stage on all ranks; the yielded dict holds its seconds afterwards."""
        clock: dict[str, float] = {}
        self.stage_name = name
        self.barrier()
        began = time.monotonic()
        yield clock
        self.sync()
        self.barrier()
        clock["seconds"] = time.monotonic() - began
        self.metric("stage", name=name, seconds=round(clock["seconds"], 3))
        self.log(f"stage {name}: {clock['seconds']:.1f}s")

    def alone(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, everywhere. Raises Stop on every rank if a file cannot be written."""
        value, problem = None, ""
        if self.main:
            try:
                value = work()
            except OSError as e:
                problem = f"cannot write to {self.folder}: {e.strerror}; what was finished before is kept there"
        value, problem = self.same((value, problem))
        if problem:
            raise Stop(problem)
        return value

    def save(self, name: str, write: Callable[[Any], None]) -> None:
        """Rank 0 writes a file of the run folder, whole or not at all."""
        self.alone(lambda: write_atomically(self.folder / name, write))


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """`write(file)` into a temporary file beside `path`, then fsync and rename. One process writes to a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed
        left.unlink(missing_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def start_run(cfg: Config) -> Run:
    """Joins the process group (there always is one), picks device, dtype and run folder."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
        # torchrun's own store outlives a restart: addresses and counters of the last attempt are still in it.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    else:
        store, rank, world = dist.HashStore(), 0, 1
    cuda = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise Stop("DEVICE=cuda, but PyTorch sees no GPU: install a CUDA build, or set DEVICE=cpu", 2)
    if MICRO_STEPS % world:
        raise Stop(
            f"{world} processes: choose 1, 2, 4 or {MICRO_STEPS}, so that they share {MICRO_STEPS} micro-batches", 2
        )
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        # bf16 operands have fewer mantissa bits than TF32: for them TF32 products are exact.
        torch.backends.cuda.matmul.allow_tf32 = True
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    dtype = {"auto": torch.bfloat16 if cuda else torch.float32, "bfloat16": torch.bfloat16, "float32": torch.float32}
    run = Run(rank, world, device, dtype[cfg.compute_dtype], store)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: on_signal(run, n))
    seed_everything(cfg.seed)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it
    run_id = cfg.run_id or time.strftime("%Y%m%d-%H%M%S") + f"-seed{cfg.seed}"
    run.folder = Path(run.same(str(cfg.run_dir or cfg.artifact_dir or f"runs/{run_id}")))
    return run


class Interrupted(BaseException):
    """A signal outside the training loop; its argument is the number."""


def on_signal(run: Run, number: int) -> None:
    """The first signal during training asks for a checkpoint; any other ends the process at once."""
    if not run.training or run.stop_signal:
        raise Interrupted(number)
    run.stop_signal = number


def open_folder(run: Run) -> None:
    """Makes the run folder, once nothing else speaks against the run, and tries to write there."""
    problem = ""
    if run.main:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(run.folder / "probe", lambda f: f.write(b"x"))
            (run.folder / "probe").unlink()
        except OSError as e:
            problem = f"cannot write to the run folder {run.folder}: {e.strerror}; set RUN_DIR to a writable one"
    if problem := run.same(problem):
        raise Stop(problem, 2)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def preflight(cfg: Config, run: Run, needs_training_data: bool) -> None:
    """Every check that needs no model, on rank 0, all problems at once. Raises Stop on every rank."""
    checks = environment_problems(cfg, run), input_problems(cfg, run), data_problems(cfg, needs_training_data)
    problems = list(itertools.chain(*checks)) if run.main else []
    if problems := run.same(problems):
        raise Stop("\n".join(["cannot start:", *(f"  - {p}" for p in problems)]), 2)


def input_problems(cfg: Config, run: Run) -> Iterator[str]:
    """Files that the asked-for start needs and that are not there or belong to another model."""
    needs = {"": [], "calibrate": ["01_weights.pt"], "quantize": ["01_weights.pt", "02_hessians.pt"],
             "pack": ["03_coded.pt"], "evaluate": [ARTIFACT_NAME], "ttt": [ARTIFACT_NAME]}[cfg.from_stage]  # fmt: skip
    rows = [(f"FROM_STAGE={cfg.from_stage}", run.folder / name, "start from an earlier stage") for name in needs]
    if cfg.resume:
        rows.append(("RESUME=1", run.folder / "checkpoint.pt", "start the run without RESUME"))
    stage_files = [path for _, path, _ in rows if path.suffix == ".pt"]
    for name in ("eval_only_checkpoint", "hotstart_fp_ckpt", "eval_only_artifact"):
        if path := getattr(cfg, name):
            rows.append((name.upper(), Path(path), "give the path of an existing file"))
    for asked, path, remedy in rows:
        if not path.is_file():
            yield f"{asked} needs {path}, which is not there: {remedy}"
        elif path in stage_files:
            try:
                load_stage_file(cfg, run, path.name, asked, map_location="cpu", mmap=True)  # reads no tensor
            except Stop as stop:
                yield stop.sentence
                return  # the next file would say the same


def environment_problems(cfg: Config, run: Run) -> Iterator[str]:
    wanted = {"sentencepiece": "sentencepiece", "brotli": "brotli"}
    if not IS_SUBMISSION and not cfg.eval_only_artifact and cfg.from_stage not in ("evaluate", "ttt"):
        wanted["python_minifier"] = "python-minifier"
    if cfg.compressor == "zstd":
        wanted["zstandard"] = "zstandard"
    for module, package in wanted.items():
        if importlib.util.find_spec(module) is None:
            yield f"the package {package} is missing: pip install {package}"
    # weights and their average in float32, both optimizer states, and the artifact
    need = 6 * 4 * estimated_parameters(cfg) + 2 * ARTIFACT_LIMIT
    folder = run.folder.absolute()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if os.path.exists(p))).free
    if free < need:
        yield f"{run.folder} has {free >> 20} MiB free and the run may write {need >> 20}: free some or set RUN_DIR"
    if cfg.attention in ATTENTION_MODULES and not importable(ATTENTION_MODULES[cfg.attention]):
        yield f"ATTENTION={cfg.attention} needs the module {ATTENTION_MODULES[cfg.attention]}: install it, or take auto"
    if cfg.attention not in ("auto", "sdpa") and (run.device.type == "cpu" or run.dtype == torch.float32):
        yield f"ATTENTION={cfg.attention} runs on a GPU in bfloat16 alone: take auto or sdpa"
    elif cfg.attention == "triton" and not (hopper(run.device) and TritonAttention.fits(cfg)):
        yield "ATTENTION=triton needs a Hopper GPU, heads of 16 to 128 channels, 1, 2, 4 or 8 in a group: take auto"
    if cfg.fp8 and not (hopper(run.device) and choose_kernels(cfg, run.device).fused):
        yield f"{cfg.fp8}=1 needs a Hopper GPU or a later one, and triton: set it to 0"
    if run.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        if cfg.max_wallclock_seconds > 0 and free < 0.8 * total:
            remedy = "end it first, or set MAX_WALLCLOCK_SECONDS=0 where time does not count"
            yield f"another process holds {(total - free) >> 20} MiB of this GPU: {remedy}"


def estimated_parameters(cfg: Config) -> int:
    d, kv = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
    return cfg.vocab_size * d + cfg.num_layers * (2 * d * d + 2 * kv * d + 2 * d * cfg.hidden_dim)


def data_problems(cfg: Config, needs_training_data: bool) -> Iterator[str]:
    """Missing, broken or too small shards, and a tokenizer or sidecar that does not belong to them."""
    val, sidecar, train = val_files(cfg), sidecar_files(cfg), train_files(cfg)
    if not val:
        below = sorted({p.parent for p in cfg.shard_dir.glob("datasets/*/fineweb_val_*.bin")})  # of --out, say
        remedy = "set DATA_PATH, or make shards with prepare_caseops_data.py (make demo does, for a first try)"
        remedy = f"set DATA_PATH={below[0]}" if below else remedy
        yield f"no fineweb_val_*.bin in {cfg.shard_dir}: {remedy}"
    if cfg.caseops_enabled and len(sidecar) != len(val):
        counts = f"{len(val)} validation shards but {len(sidecar)} byte sidecars (val_bytes)"
        yield f"{counts} in {cfg.shard_dir}: prepare them again"
    if needs_training_data and not train:
        yield f"no fineweb_train_*.bin in {cfg.shard_dir}: set DATA_PATH"
    sizes = {}
    for path in val + sidecar + (train if needs_training_data else []):
        try:
            sizes[path] = len(read_shard(path))
        except (OSError, ValueError) as e:
            yield str(e)
    for tokens, counts in zip(val, sidecar, strict=False):
        if {tokens, counts} <= sizes.keys() and sizes[tokens] != sizes[counts]:
            yield f"{counts} has {sizes[counts]} entries, {tokens} has {sizes[tokens]}: prepare both again"
    if needs_training_data and train and all(p not in sizes or usable_tokens(p) < cfg.step_tokens for p in train):
        need = f"a step of {cfg.step_tokens} tokens"
        yield f"no training shard holds {need}: make larger ones or lower TRAIN_BATCH_TOKENS"
    yield from tokenizer_problems(cfg)
    if not IS_SUBMISSION:
        yield from manifest_problems(cfg)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def manifest_problems(cfg: Config) -> Iterator[str]:
    """Where the files are not those that the manifest.json beside them names, if there is one of our preparation."""
    path = cfg.shard_dir / "manifest.json"
    try:
        manifest = json.loads(path.read_text()) if path.is_file() and cfg.caseops_enabled else {}
        rows = {row["name"]: row for row in manifest.get("files", [])}
        tokenizer = manifest["tokenizer"]["sha256"] if rows else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        yield f"{path} cannot be read ({type(e).__name__}): prepare the shards again, or remove it"
        return
    here = {p.name: p for p in val_files(cfg) + sidecar_files(cfg) + train_files(cfg)}
    for name in sorted(n for n in rows.keys() - here.keys() if "_val_" in n):
        yield f"{path} names {name}, which is not there: copy it again"
    for name, p in here.items() if rows else ():
        if name not in rows:
            yield f"{path} does not name {p}: it is of another data set"
        # reading all training text would take longer than a step of training
        elif p.stat().st_size != rows[name]["bytes"] or ("_val_" in name and file_sha256(p) != rows[name]["sha256"]):
            yield f"{p} is not the file that {path.name} names (size or sha256): copy it again"
    if tokenizer and cfg.tokenizer_file.is_file() and file_sha256(cfg.tokenizer_file) != tokenizer:
        yield f"{cfg.tokenizer_file} is not the tokenizer of the shards in {cfg.shard_dir}: set TOKENIZER_PATH"


def tokenizer_fingerprint(cfg: Config) -> str:
    """The first half of the model's sha256; empty where there is none."""
    return file_sha256(cfg.tokenizer_file)[:32] if cfg.tokenizer_file.is_file() else ""


def tokenizer_problems(cfg: Config) -> Iterator[str]:
    if not cfg.tokenizer_file.is_file():
        yield f"no tokenizer at {cfg.tokenizer_file}: set TOKENIZER_PATH"
    elif importlib.util.find_spec("sentencepiece"):
        size = load_tokenizer(cfg).vocab_size()
        if size != cfg.vocab_size:
            yield f"{cfg.tokenizer_file} has {size} pieces but VOCAB_SIZE is {cfg.vocab_size}: set one to fit the other"


def load_tokenizer(cfg: Config) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(cfg.tokenizer_file))


def git_commit() -> str:
    try:
        here = Path(__file__).resolve().parent
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


# --------------------------------------------------------------------------------------------------------------------
# 4. KERNELS: the specification in plain PyTorch first, the fused version under it, one chooser at the end
# --------------------------------------------------------------------------------------------------------------------
class Docs(NamedTuple):
    """Where packed documents begin and end in a row of T tokens."""

    cu_seqlens: Tensor  # int32, ascending from 0 to T, padded with T to a fixed length
    max_len: int  # no piece is longer
    key_cu: Tensor | None = None  # the same of keys and values, where there are more of them than queries
    key_max: int = 0
    unused: Tensor | None = None  # how many of each piece's keys, from its first on, hold nothing yet
    spans: Spans | None = None  # the same as tables, where the attention wants them

    @property
    def keys(self) -> tuple[Tensor, int]:
        return (self.cu_seqlens, self.max_len) if self.key_cu is None else (self.key_cu, self.key_max)


RMS_EPS = 1.2e-7  # float32's, written out so that every device and PyTorch version uses the same


def rms(x: Tensor) -> Tensor:
    """x over its root mean square along the last dimension, no gain (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of whole rows. q (B, T, H, K), k and v (B, S, G, K) -> (B, T, H, K): q are the last T of S."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    (t, s), grouped = (q.size(2), k.size(2)), q.size(1) != k.size(1)
    mask = None if t == s else torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, docs: Docs) -> Tensor:
    """Specification of packed attention: each piece attends to itself alone. q (T, H, K), k and v (T, G, K)."""
    rows, columns = (itertools.pairwise(sorted(set(cu.tolist()))) for cu in (docs.cu_seqlens, docs.keys[0]))
    pieces = [
        dense_attention(q[None, a:b], k[None, c:d], v[None, c:d]) for (a, b), (c, d) in zip(rows, columns, strict=True)
    ]
    return torch.cat(pieces, dim=1)[0]


def attention_varlen(q: Tensor, k: Tensor, v: Tensor, docs: Docs) -> Tensor:
    """PyTorch's own varlen kernel (FlashAttention-2)."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}
    cu, n = docs.keys
    return varlen_attn(q, k, v, docs.cu_seqlens, cu, docs.max_len, n, **causal, **grouped)


def flash_lengths(docs: Docs) -> dict[str, Any]:
    """The arguments of Dao's kernels; with fewer queries than keys theirs are the last ones."""
    cu, n = docs.keys
    return dict(cu_seqlens_q=docs.cu_seqlens, cu_seqlens_k=cu, max_seqlen_q=docs.max_len, max_seqlen_k=n, causal=True)


def attention_fa3(q: Tensor, k: Tensor, v: Tensor, docs: Docs) -> Tensor:
    """FlashAttention-3 (arXiv 2407.08608), Hopper."""
    from flash_attn_interface import flash_attn_varlen_func

    out = flash_attn_varlen_func(q, k, v, **flash_lengths(docs))
    return out[0] if isinstance(out, tuple) else out


def attention_fa4(q: Tensor, k: Tensor, v: Tensor, docs: Docs) -> Tensor:
    """FlashAttention-4 (the flash-attn-4 package, CuTe DSL), Hopper and later."""
    from flash_attn.cute import flash_attn_varlen_func

    out = flash_attn_varlen_func(q, k, v, **flash_lengths(docs))
    return out[0] if isinstance(out, tuple) else out


def whole_rows(tokens: Tensor, past: int = 0, unused: Tensor | None = None) -> Docs:
    """The boundaries of rows (B, T) that are one document each, laid end to end; keys have `past` more in each row."""
    b, t = tokens.shape
    edges = torch.arange(b + 1, dtype=torch.int32, device=tokens.device)
    return Docs(edges * t, t, edges * (past + t) if past else None, past + t, unused)


class RawHeads(NamedTuple):
    """The merged projection (..., W) of which queries and keys were made, how, and room for its gradient."""

    merged: Tensor
    d_merged: Tensor  # the values' columns already hold what exclude_own_value adds to them
    rstd: Tensor  # (N, H + G) in float32: 1 / rms of each query and key head
    gain: Tensor  # (H,)
    rope: tuple[Tensor, Tensor]
    layer: Layer


class PackedAttention:
    """A kind of packed attention as a differentiable function and, for fused blocks, as its two passes.

    The passes have the H heads of queries as G groups of R: q, out and their gradients are (T, G, R, K). A `past` has
    the keys and values of earlier chunks, which have no gradient.
    """

    in_place = False  # whether a past is read where it lies

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor, Docs], Tensor], waits: bool = False):
        """waits: the host reads the boundaries, which a CUDA graph cannot wait for."""
        self.function, self.waits = function, waits

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, docs: Docs) -> Tensor:
        return self.function(q, k, v, docs)

    def rows(self, tokens: Tensor, cache: Cache | None) -> Docs:
        """The boundaries of rows (B, T) that are one document each, with what `cache` has of them."""
        return whole_rows(tokens, cache.n_kept if cache else 0)

    def spans(self, docs: Docs, n_queries: int, heads: int) -> Spans | None:
        """What of the boundaries the kernels of all visits want ready-made."""

    def keys(self, k: Tensor, v: Tensor, past: Past | None) -> Iterable[Tensor]:
        """Keys and values (S, G, K) that the chunk's own, (T, G, K), are the last of in each row."""
        if past is None:
            return k, v
        return (t.flatten(0, 1) for t in past.extend(*(t.unflatten(0, (past.n_docs, -1)) for t in (k, v))))

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """Room for (T, G, R, K) in the order in which the kernel wants it."""
        return like.new_empty(shape)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, docs: Docs, past: Past | None = None
    ) -> tuple[Tensor, Any]:
        """-> out and what `backward` needs: here the graph of the function itself."""
        leaves = [t.detach().requires_grad_() for t in (q.flatten(1, 2), *self.keys(k, v, past))]
        with torch.enable_grad():
            out = self.function(*leaves, docs)
        return out.detach().view_as(q), (leaves, out)

    def backward(self, grad: Tensor, out: Tensor, delta: Tensor, state: Any, docs: Docs) -> list[Tensor]:
        """-> gradients of q, k and v. delta (G, T, R): out . grad of each head, in float32."""
        leaves, graph = state
        dq, dk, dv = torch.autograd.grad(graph, leaves, grad.flatten(1, 2))
        return [dq.view_as(out), dk, dv]

    def backward_raw(self, grad: Tensor, out: Tensor, delta: Tensor, state: Any, docs: Docs, raw: RawHeads) -> Tensor:
        """`backward` on through rotation and norm: fills the columns of raw.d_merged; -> gradient of the gain."""
        dq, dk, dv = self.backward(grad, out, delta, state, docs)
        b, t = raw.merged.shape[:2]  # the chunk's own keys and values are the last of each row
        dk, dv = (x.unflatten(0, (b, -1))[:, -t:].flatten(0, 1) for x in (dk, dv))
        return prepare_backward(raw, dq, dk, dv)


class FlashAttention4(PackedAttention):
    """Calls the two kernels themselves."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, docs: Docs, past: Past | None = None
    ) -> tuple[Tensor, Any]:
        from flash_attn.cute.interface import _flash_attn_fwd

        k, v = self.keys(k, v, past)
        out, lse, *_ = _flash_attn_fwd(q.flatten(1, 2), k, v, return_lse=True, **flash_lengths(docs))
        return out.view_as(q), (q, k, v, lse)

    def backward(self, grad: Tensor, out: Tensor, delta: Tensor, state: Any, docs: Docs) -> list[Tensor]:
        from flash_attn.cute.interface import _flash_attn_bwd

        q, k, v, lse = state
        q, out, grad = (t.flatten(1, 2) for t in (q, out, grad))
        dq, dk, dv, *_ = _flash_attn_bwd(q, k, v, out, grad, lse, **flash_lengths(docs))
        return [dq.unflatten(1, (k.size(1), -1)), dk, dv]


# Our own attention lives off two facts. Queries and keys are normed, so a score is at most |q|: its exponential neither
# overflows nor vanishes with all others of its row while |q| < 80 (|q| = 8 gain, gains begin at 5; beyond, |q| - 64 is
# taken off, and only a row that shuns all its keys is lost). So the running maximum of flash attention (arXiv
# 2205.14135) falls away with its rescaling, at K = 64 half of the work beside the products. And the heads of a group
# share their keys: 32 tokens of two heads are the 64 rows of a warp group, so that little is computed in vain beside
# short documents. Tiles follow the packed row, not the documents; a table says which keys a tile sees at all, and
# which of them all its tokens see. Two backward kernels, one per side, compute the scores twice instead of adding up
# the queries' gradients with atomics: no float32 buffer, and the same sums every time. On an H200, a record
# micro-batch (123 GFLOP forward): 0.34 ms forward (360 TFLOP/s), 0.414 (queries) + 0.669 (keys) backward;
# FlashAttention-4 0.52 and 1.35. On to the raw queries and keys, through norm, rotation and gain, both backward kernels
# together 1.210, where that was a step of its own 1.327. One backward kernel with atomics 1.09 for the two; tiles of
# 64 tokens and keys 0.37 and 0.54 + 1.37; of 128 keys 0.43 and 0.57 + 0.98; a fourth stage of operands 0.35 and
# 0.44 + 0.72.
class Spans(NamedTuple):
    """What sees what, in int32: a token sees keys `first` to `last` of all there are, and of the T keys of its own row,
    which alone have gradients, `own` to itself.

    The tables have four numbers a tile: partners from the first to the second (whole tiles) concern it, those from the
    third to the fourth all of it.
    """

    first: Tensor  # (T,)
    last: Tensor  # (T,)
    own: Tensor  # (T,)
    queries: Tensor  # (ceil(T / M), 4)
    keys: Tensor  # (ceil(T / N), 4): the own ones


if triton is not None:
    SCORE_LIMIT, LOG2_E = tl.constexpr(64.0), tl.constexpr(1.4426950408889634)

    @triton.jit
    def span_kernel(first_ptr, last_ptr, tiles_ptr, size, BLOCK: tl.constexpr, PARTNERS: tl.constexpr):
        """One row of a table of `Spans`: BLOCK tokens against tiles of PARTNERS."""
        at = tl.minimum(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), size - 1)
        first, last = tl.load(first_ptr + at), tl.load(last_ptr + at)
        low, high = tl.min(first, 0) // PARTNERS * PARTNERS, tl.max(last, 0) // PARTNERS * PARTNERS + PARTNERS
        whole = tl.minimum((tl.max(first, 0) + PARTNERS - 1) // PARTNERS * PARTNERS, high)
        to = tiles_ptr + tl.program_id(0) * 4
        tl.store(to, low)
        tl.store(to + 1, high)
        tl.store(to + 2, whole)
        tl.store(to + 3, tl.maximum((tl.min(last, 0) + 1) // PARTNERS * PARTNERS, whole))

    @triton.jit
    def tile_span(tiles_ptr, tile):
        row = tiles_ptr + tile * 4
        return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)

    @triton.jit
    def seen(first_ptr, last_ptr, token, T, key):
        """The mask (tokens, keys); without `last` a token sees keys up to its own."""
        first = tl.load(first_ptr + token, mask=token < T, other=0)[:, None]
        if last_ptr is None:
            last = tl.where(token < T, token, -1)[:, None]
        else:
            last = tl.load(last_ptr + token, mask=token < T, other=-1)[:, None]
        return (key[None, :] >= first) & (key[None, :] <= last)

    @triton.jit
    def rotation(cos_ptr, sin_ptr, position, live, K: tl.constexpr, HALF: tl.constexpr):
        """Cosines and sines (N, K / 2 HALF, HALF) of the pairs of columns HALF apart: 1 and 0 but for the first."""
        pair, c = tl.arange(0, K // (2 * HALF))[None, :, None], tl.arange(0, HALF)[None, None, :]
        at, turned = position[:, None, None] * HALF + c, live[:, None, None] & (pair == 0)
        cos = tl.load(cos_ptr + at + 0 * pair, mask=turned, other=1.0).to(tl.float32)
        return cos, tl.load(sin_ptr + at + 0 * pair, mask=turned, other=0.0).to(tl.float32)

    @triton.jit
    def raw_gradient(g, x, factor, cos, sin, N: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr):
        """From gradients g (N, K) of normed and rotated rows x to those of the raw rows, and each row's g . x.

        factor: gain / rms. The norm's gradient is the same on either side of the rotation, so that one rotation back is
        all; a thread has both columns of a pair in its registers.
        """
        along = tl.sum(g * x, 1)
        g = factor[:, None] * (g - x * (along / K)[:, None])
        a, b = tl.split(tl.permute(tl.reshape(g, (N, K // (2 * HALF), 2, HALF)), (0, 1, 3, 2)))
        turned = tl.permute(tl.join(a * cos - b * sin, b * cos + a * sin), (0, 1, 3, 2))
        return tl.reshape(turned, (N, K)), along

    @triton.jit
    def attention_kernel(  # noqa: PLR0913
        q, k, v, out_ptr, lse_ptr, first_ptr, last_ptr, tiles_ptr, T, scale,
        R: tl.constexpr, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ):  # fmt: skip
        """M tokens of the R heads of a group; keys in tiles of N, first those that all see, then the others.

        lse: the base-2 logarithm of each row's sum, from which backward makes the weights again.
        """
        tile, group = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
        low, high, a, b = tile_span(tiles_ptr, tile)
        row, base = tl.arange(0, M * R), (group * T + tile * M) * R
        queries = q.load([base, 0])
        kind = out_ptr.dtype.element_ty
        length = tl.sqrt(tl.sum(queries.to(tl.float32) * queries.to(tl.float32), 1))
        shift = tl.maximum(length - SCORE_LIMIT, 0.0) * LOG2_E
        factor = scale * LOG2_E
        acc, total = tl.zeros((M * R, K), tl.float32), tl.zeros((M * R,), tl.float32)
        for at in range(a, b, N):
            p = tl.exp2(tl.dot(queries, k.load([at, group * K]).T) * factor - shift[:, None]).to(kind)
            total += tl.sum(p.to(tl.float32), 1)  # of the weights as they multiply the values
            acc = tl.dot(p, v.load([at, group * K]), acc)
        token = tile * M + row // R
        for step in range(low, high - (b - a), N):
            at = tl.where(step < a, step, step + (b - a))
            p = tl.exp2(tl.dot(queries, k.load([at, group * K]).T) * factor - shift[:, None])
            p = tl.where(seen(first_ptr, last_ptr, token, T, at + tl.arange(0, N)), p, 0.0).to(kind)
            total += tl.sum(p.to(tl.float32), 1)
            acc = tl.dot(p, v.load([at, group * K]), acc)
        total = tl.maximum(total, 1e-37)
        tl.store(lse_ptr + base + row, shift + tl.log2(total), mask=token < T)
        at = (base + row)[:, None].to(tl.int64) * K + tl.arange(0, K)[None, :]
        tl.store(out_ptr + at, (acc / total[:, None]).to(kind), mask=(token < T)[:, None])

    @triton.jit
    def attention_query_kernel(  # noqa: PLR0913
        q, k, v, grad, lse_ptr, delta_ptr, dq_ptr, q_group, first_ptr, last_ptr, tiles_ptr, T, scale,
        rstd_ptr, gain_ptr, cos_ptr, sin_ptr, dgain_ptr, length, TOKEN: tl.constexpr,
        G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
        HALF: tl.constexpr,
    ):  # fmt: skip
        """Gradient of the queries, by the tiles of the forward kernel; of the raw ones and the gains, given a rotation.

        dgain (tiles, H): sums of a program, the tokens' part of the gradient of each head's gain.
        """
        tile, group = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
        low, high, a, b = tile_span(tiles_ptr, tile)
        row, base = tl.arange(0, M * R), (group * T + tile * M) * R
        token = tile * M + row // R
        queries, g = q.load([base, 0]), grad.load([base, 0])
        kind = dq_ptr.dtype.element_ty
        lse = tl.load(lse_ptr + base + row, mask=token < T, other=0.0)[:, None]
        delta = tl.load(delta_ptr + base + row, mask=token < T, other=0.0)[:, None]
        factor = scale * LOG2_E
        acc = tl.zeros((M * R, K), tl.float32)
        for at in range(a, b, N):
            keys = k.load([at, group * K])
            s, dp = tl.dot(queries, keys.T), tl.dot(g, v.load([at, group * K]).T)
            ds = tl.exp2(s * factor - lse) * (dp - delta)
            acc = tl.dot(ds.to(kind), keys, acc)
        for step in range(low, high - (b - a), N):
            at = tl.where(step < a, step, step + (b - a))
            keys = k.load([at, group * K])
            s, dp = tl.dot(queries, keys.T), tl.dot(g, v.load([at, group * K]).T)
            mask = seen(first_ptr, last_ptr, token, T, at + tl.arange(0, N))
            ds = tl.where(mask, tl.exp2(s * factor - lse) * (dp - delta), 0.0)
            acc = tl.dot(ds.to(kind), keys, acc)
        acc *= scale
        head, live = group * R + row % R, token < T
        if cos_ptr is not None:
            rstd = tl.load(rstd_ptr + token * (G * R + G) + head, mask=live, other=0.0)
            cos, sin = rotation(cos_ptr, sin_ptr, token % length, live, K, HALF)
            gain = tl.load(gain_ptr + head).to(tl.float32)
            x = queries.to(tl.float32) * tl.where(gain == 0.0, 0.0, 1.0 / gain)[:, None]
            acc, along = raw_gradient(acc, x, rstd * gain, cos, sin, M * R, K, HALF)
            j = tl.arange(0, R)
            of_head = live[:, None] & (row[:, None] % R == j[None, :])
            tl.store(dgain_ptr + tile * G * R + group * R + j, tl.sum(tl.where(of_head, along[:, None], 0.0), 0))
        at = (token.to(tl.int64) * TOKEN + group * q_group + row % R * K)[:, None] + tl.arange(0, K)[None, :]
        tl.store(dq_ptr + at, acc.to(kind), mask=live[:, None])

    @triton.jit
    def attention_key_kernel(  # noqa: PLR0913
        q, k, v, grad, lse_ptr, delta_ptr, dk_ptr, dv_ptr, own_ptr, tiles_ptr, T, scale,
        rstd_ptr, cos_ptr, sin_ptr, length, TOKEN: tl.constexpr, ADD_VALUES: tl.constexpr,
        G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
        HALF: tl.constexpr,
    ):  # fmt: skip
        """Gradients of N own keys and values, from all heads of their group; all products transposed: keys are rows.

        Given a rotation, of the raw keys. ADD_VALUES: to what stands where the gradient of the values goes.
        """
        tile, group = tl.program_id(0), tl.program_id(1)
        low, high, a, b = tile_span(tiles_ptr, tile)
        row, key = tl.arange(0, M * R), tile * N + tl.arange(0, N)
        kind = dk_ptr.dtype.element_ty
        keys, values = k.load([tile * N, group * K]), v.load([tile * N, group * K])
        factor = scale * LOG2_E
        dk, dv = tl.zeros((N, K), tl.float32), tl.zeros((N, K), tl.float32)
        for at in range(a, b, M):
            base = (group * T + at) * R
            queries, g = q.load([base, 0]), grad.load([base, 0])
            lse, delta = tl.load(lse_ptr + base + row), tl.load(delta_ptr + base + row)
            p = tl.exp2(tl.dot(keys, queries.T) * factor - lse[None, :])
            dp = tl.dot(values, g.T)
            dv = tl.dot(p.to(kind), g, dv)
            dk = tl.dot((p * (dp - delta[None, :])).to(kind), queries, dk)
        for step in range(low, high - (b - a), M):
            at = tl.where(step < a, step, step + (b - a))
            base, token = (group * T + at) * R, at + row // R
            queries, g = q.load([base, 0]), grad.load([base, 0])
            lse = tl.load(lse_ptr + base + row, mask=token < T, other=0.0)
            delta = tl.load(delta_ptr + base + row, mask=token < T, other=0.0)
            p = tl.exp2(tl.dot(keys, queries.T) * factor - lse[None, :])
            p = tl.where(seen(own_ptr, None, token, T, key).T, p, 0.0)
            dp = tl.dot(values, g.T)
            dv = tl.dot(p.to(kind), g, dv)
            dk = tl.dot((p * (dp - delta[None, :])).to(kind), queries, dk)
        live = key < T
        at = (key.to(tl.int64) * TOKEN + group * K)[:, None] + tl.arange(0, K)[None, :]
        dk *= scale
        if cos_ptr is not None:
            rstd = tl.load(rstd_ptr + key * (G * R + G) + G * R + group, mask=live, other=0.0)
            cos, sin = rotation(cos_ptr, sin_ptr, key % length, live, K, HALF)
        if ADD_VALUES:
            dv += tl.load(dv_ptr + at, mask=live[:, None], other=0.0).to(tl.float32)
        tl.store(dv_ptr + at, dv.to(kind), mask=live[:, None])
        if cos_ptr is not None:
            x = k.load([tile * N, group * K]).to(tl.float32)
            dk, _ = raw_gradient(dk, x, rstd, cos, sin, N, K, HALF)
        tl.store(dk_ptr + at, dk.to(kind), mask=live[:, None])


class TritonAttention(PackedAttention):
    """Our own, for Hopper and later."""

    in_place = True

    def __init__(self) -> None:
        super().__init__(lambda *args: PackedAttentionFunction.apply(self, *args))

    @staticmethod
    def fits(cfg: Config) -> bool:
        """Tiles have powers of two for sides, and a head at least the 16 channels of a matrix instruction."""
        return cfg.head_dim in (16, 32, 64, 128) and cfg.num_heads // cfg.num_kv_heads in (1, 2, 4, 8)

    @staticmethod
    def tile(on_gpu: bool, heads: int) -> tuple[int, int, int]:
        """M tokens, whose R heads are the 64 rows of a warp group; keys at a time; keys of a program."""
        return (64 // heads, 32, 64) if on_gpu else (4, 8, 16)

    def rows(self, tokens: Tensor, cache: Cache | None) -> Docs:
        return whole_rows(tokens, cache.room, cache.unused) if cache else whole_rows(tokens)

    def spans(self, docs: Docs, n_queries: int, heads: int) -> Spans:
        cu, (key_cu, _) = docs.cu_seqlens, docs.keys
        token = torch.arange(n_queries, dtype=torch.int32, device=cu.device)
        end = torch.searchsorted(cu, token, right=True)
        own, first, last = cu[end - 1], key_cu[end - 1], token + key_cu[end] - cu[end]
        if docs.unused is not None:
            first = first + docs.unused
        (m, n, keys), tables = self.tile(cu.is_cuda, heads), []
        for low, high, block, partners in ((first, last, m, n), (token, cu[end] - 1, keys, m)):
            tables.append(cu.new_empty(triton.cdiv(n_queries, block), 4))
            span_kernel[(len(tables[-1]),)](low, high, tables[-1], n_queries, block, partners)
        return Spans(first, last, own, *tables)

    def empty(self, like: Tensor, *shape: int) -> Tensor:
        """A group's tokens and heads follow one another: a tile is one block for the copy engine."""
        t, g, r, k = shape
        return like.new_empty(g, t, r, k).transpose(0, 1)

    @staticmethod
    def operands(m: int, n: int, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> list[Any]:
        """Descriptors of q, k, v and of more tensors like q, in tiles of m tokens and n keys."""
        into, size = TensorDescriptor.from_tensor, q.size(-1)
        q, *more = (into(t.transpose(0, 1).reshape(-1, size), [m * q.size(2), size]) for t in (q, *more))
        k, v = (t if _fits_tma(t) else t.contiguous() for t in (k.flatten(1), v.flatten(1)))
        return [q, into(k, [n, size]), into(v, [n, size]), *more]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, docs: Docs, past: Past | None = None
    ) -> tuple[Tensor, Any]:
        (t, g, r, size), s, (m, n, _) = q.shape, docs.spans, self.tile(q.is_cuda, q.size(2))
        out, lse = self.empty(q, t, g, r, size), q.new_empty(g, t, r, dtype=torch.float32)
        seen = past.whole(k, v) if past else (k, v)
        attention_kernel[(len(s.queries), g)](
            *self.operands(m, n, q, *seen), out, lse, s.first, s.last, s.queries, t, size**-0.5, r, size, m, n,
            num_warps=4, num_stages=3,
        )  # fmt: skip
        return out, (q, k, v, *seen, lse)

    def backward(self, grad: Tensor, out: Tensor, delta: Tensor, state: Any, docs: Docs) -> list[Tensor]:
        t, g, r, size = grad.shape
        grads = self.empty(grad, t, g, r, size), *(grad.new_empty(t, g, size) for _ in range(2))
        self.launch(grad, delta, state, docs.spans, grads)
        return list(grads)

    def backward_raw(self, grad: Tensor, out: Tensor, delta: Tensor, state: Any, docs: Docs, raw: RawHeads) -> Tensor:
        flat, layer = raw.d_merged.flatten(0, -2), raw.layer
        half = raw.rope[0].size(-1)
        if half & (half - 1):
            return super().backward_raw(grad, out, delta, state, docs, raw)
        q, k, v = flat.tensor_split(layer.columns, 1)[:3]
        grads = q.view(grad.shape), *(x.unflatten(1, (-1, layer.head_dim)) for x in (k, v))
        d_gain = flat.new_empty(len(docs.spans.queries), layer.heads, dtype=torch.float32)  # no atomics
        self.launch(grad, delta, state, docs.spans, grads, raw, d_gain)
        return d_gain.sum(0)

    def launch(
        self, grad: Tensor, delta: Tensor, state: Any, s: Spans, grads: Sequence[Tensor],
        raw: RawHeads | None = None, d_gain: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Fills `grads`, those of q (T, G, R, K), k and v (T, G, K), or with `raw` of what these were made of."""
        (q, k, v, *seen, lse), (t, g, r, size), (dq, dk, dv) = state, grad.shape, grads
        (m, n, keys), scale = self.tile(grad.is_cuda, r), size**-0.5
        rstd = gain = cos = sin = None
        length, half, add = 1, 0, False
        if raw is not None:
            rstd, gain, (cos, sin), add = raw.rstd, raw.gain, raw.rope, raw.layer.exclude_own_value
            length, half = len(cos), cos.size(-1)
        attention_query_kernel[(len(s.queries), g)](
            *self.operands(m, n, q, *seen, grad), lse, delta, dq, dq.stride(1), s.first, s.last, s.queries, t, scale,
            rstd, gain, cos, sin, d_gain, length, dq.stride(0), g, r, size, m, n, half,
            num_warps=4, num_stages=3, maxnreg=96,  # a fifth program per core
        )  # fmt: skip
        # 217 registers a thread leave room for two programs per core, 168 for a third.
        attention_key_kernel[(len(s.keys), g)](
            *self.operands(m, keys, q, k, v, grad), lse, delta, dk, dv, s.own, s.keys, t,
            scale, rstd, cos, sin, length, dk.stride(0), add, g, r, size, m, keys, half,
            num_warps=4, num_stages=2, maxnreg=168,
        )  # fmt: skip


class PackedAttentionFunction(torch.autograd.Function):
    """The two passes of `TritonAttention` where no fused block calls them: q (T, H, K) -> (T, H, K)."""

    @staticmethod
    def forward(ctx, attention, q, k, v, docs):
        q = q.unflatten(1, (k.size(1), -1))
        if docs.spans is None:
            docs = docs._replace(spans=attention.spans(docs, len(q), q.size(2)))
        ctx.attention, ctx.docs = attention, docs
        out, (*state, lse) = attention.forward(q, k, v, docs)
        ctx.save_for_backward(*state, lse, out)
        return out.flatten(1, 2)

    @staticmethod
    def backward(ctx, grad):
        *state, out = ctx.saved_tensors
        grad = grad.reshape(out.shape)
        delta = (grad.float() * out).sum(-1).transpose(0, 1).contiguous()
        dq, dk, dv = ctx.attention.backward(grad, out, delta, state, ctx.docs)
        return None, dq.flatten(1, 2), dk, dv, None


ATTENTION_KINDS = dict(
    triton=TritonAttention(),
    fa3=PackedAttention(attention_fa3),
    fa4=FlashAttention4(attention_fa4),
    varlen=PackedAttention(attention_varlen),
    sdpa=PackedAttention(attention_sdpa, waits=True),
)
ATTENTION_MODULES = dict(
    triton="triton", fa3="flash_attn_interface", fa4="flash_attn.cute.interface", varlen="torch.nn.attention.varlen"
)


def leaky_square(h: Tensor) -> Tensor:
    """The activation: leaky ReLU with slope 1/2, squared; h^2 above zero, h^2 / 4 below."""
    return F.leaky_relu(h, 0.5).square()


class Xielu(NamedTuple):
    """Another: h (a_p h + b_p) above zero, h (a_n h + b_n) below (PR #1648); (1, 0, 1/4, 0) is the leaky square."""

    a_p: float
    b_p: float
    a_n: float
    b_n: float

    def __call__(self, h: Tensor) -> Tensor:
        return h * torch.where(h > 0, self.a_p * h + self.b_p, self.a_n * h + self.b_n)


# Both products of the MLP that touch its hidden tensor (M, F), with the activation in the epilogue of one and its
# derivative in that of the other. K = D is only 512, eight blocks of 64, so what counts is that results leave while the
# next tile's operands arrive, and how many there are: 0.4 GB each. So the leaky square keeps no pre-activation. The
# activation tells it but for the sign, which takes the place of the last of 16 bits. On an H100, M = 98,304: 0.370 and
# 0.507 ms, with a pre-activation 0.447 and 0.479, by address 0.59 and 0.57; cuBLAS without any epilogue 0.317, with a
# kernel of its own for the activation 0.58 and 0.71. Forward, operands may have 8 bits; what a unit of their product is
# worth then lies behind `scale_ptr`. Backward, results may be written in 8 bits, too, times a factor.
if triton is not None:

    @triton.jit
    def leaky_tile(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
        """Tiles run down GROUP row blocks before the next column, so that a band of `a` stays in the L2 cache."""
        n_blocks = tl.cdiv(N, BLOCK_N)
        band, place = tile // (GROUP * n_blocks), tile % (GROUP * n_blocks)
        rows = min(tl.cdiv(M, BLOCK_M) - band * GROUP, GROUP)
        return (band * GROUP + place % rows) * BLOCK_M, place // rows * BLOCK_N

    @triton.jit
    def marked(act, negative, dtype: tl.constexpr):
        """act >= 0 in dtype, its last bit 1 where `negative`, else 0; rounded so that bfloat16 favors no side."""
        if dtype == tl.bfloat16:
            bits = act.to(tl.uint32, bitcast=True)
            bits = tl.where(negative, (bits & 0xFFFE0000) | 0x10000, (bits + 0x10000) & 0xFFFE0000)
            return (bits >> 16).to(tl.uint16).to(dtype, bitcast=True)
        bits = act.to(dtype).to(tl.uint32 if dtype == tl.float32 else tl.uint16, bitcast=True)
        return (bits - (bits & 1) + negative.to(bits.dtype)).to(dtype, bitcast=True)

    @triton.jit
    def activation(h, a_p, b_p, a_n, b_n, XIELU: tl.constexpr, dtype: tl.constexpr):
        """f(h) in dtype."""
        if XIELU:
            return (h * tl.where(h > 0, a_p * h + b_p, a_n * h + b_n)).to(dtype)
        return marked(tl.where(h > 0, h * h, 0.25 * h * h), h < 0, dtype)

    @triton.jit
    def activation_slope(kept, a_p, b_p, a_n, b_n, XIELU: tl.constexpr):
        """f'(h) of what is kept of h: h itself, or its leaky square, whose slope is 2 h above zero, h / 2 below."""
        if XIELU:
            h = kept.to(tl.float32)
            return tl.where(h > 0, 2.0 * a_p * h + b_p, 2.0 * a_n * h + b_n)
        bits = kept.to(tl.uint32 if kept.dtype == tl.float32 else tl.uint16, bitcast=True)
        root = tl.sqrt(kept.to(tl.float32))
        return tl.where((bits & 1) == 1, -root, 2.0 * root)

    @triton.jit
    def leaky_finish(  # noqa: PLR0913
        acc, kept, out, out8, factor, m, n, a_p, b_p, a_n, b_n, XIELU: tl.constexpr, BACKWARD: tl.constexpr
    ):
        """The end of half a tile. Forward: out = f(acc), and kept = acc for xIELU. Backward: out = acc f'(kept)."""
        if BACKWARD:
            acc *= activation_slope(kept.load([m, n]), a_p, b_p, a_n, b_n, XIELU)
            out.store([m, n], acc.to(out.dtype))
            if out8 is not None:
                out8.store([m, n], (acc * factor).to(out8.dtype))
        else:
            if XIELU:
                kept.store([m, n], acc.to(kept.dtype))
            out.store([m, n], activation(acc, a_p, b_p, a_n, b_n, XIELU, out.dtype))

    @triton.jit
    def leaky_tma_kernel(  # noqa: PLR0913
        a, b, kept, out, out8, factor, scale_ptr, M, N, K, a_p, b_p, a_n, b_n,
        XIELU: tl.constexpr, BACKWARD: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """a (M, K) times b, (N, K) transposed or in BACKWARD (K, N), through tensor descriptors; one program per core.

        128 x 256 fills a Hopper core's two warp groups, three stages of 128 bytes a row take 144 KB, forward four 192.
        The loop over tiles is flattened, so that the copy engine fetches the next tile under this one's epilogue, and
        the accumulator leaves in halves through one buffer of 32 KB.
        """
        tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            m, n = leaky_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(0, K, BLOCK_K):
                if BACKWARD:
                    acc = tl.dot(a.load([m, k]), b.load([k, n]), acc)
                else:
                    acc = tl.dot(a.load([m, k]), b.load([n, k]).T, acc)
            if scale_ptr is not None:
                acc *= scale
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            leaky_finish(left, kept, out, out8, factor, m, n, a_p, b_p, a_n, b_n, XIELU, BACKWARD)
            leaky_finish(right, kept, out, out8, factor, m, n + BLOCK_N // 2, a_p, b_p, a_n, b_n, XIELU, BACKWARD)

    @triton.jit
    def leaky_pointer_kernel(  # noqa: PLR0913
        a_ptr, b_ptr, kept_ptr, out_ptr, out8_ptr, factor, scale_ptr, M, N, K, b_stride_n, b_stride_k,
        a_p, b_p, a_n, b_n, XIELU: tl.constexpr, BACKWARD: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """The same by address: any size, any strides of b (N, K), any GPU."""
        m, n = leaky_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
        m, n, k = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        a_tile = a_ptr + (m[:, None] % M).to(tl.int64) * K + k[None, :]
        b_tile = b_ptr + (n[None, :] % N) * b_stride_n + k[:, None] * b_stride_k
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k0 in range(0, K, BLOCK_K):
            a = tl.load(a_tile, mask=k[None, :] < K - k0, other=0.0)
            b = tl.load(b_tile, mask=k[:, None] < K - k0, other=0.0)
            acc = tl.dot(a, b, acc)
            a_tile += BLOCK_K
            b_tile += BLOCK_K * b_stride_k
        if scale_ptr is not None:
            acc *= tl.load(scale_ptr)
        at = m[:, None].to(tl.int64) * N + n[None, :]
        inside = (m[:, None] < M) & (n[None, :] < N)
        if BACKWARD:
            acc *= activation_slope(tl.load(kept_ptr + at, mask=inside, other=0.0), a_p, b_p, a_n, b_n, XIELU)
            tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)
            if out8_ptr is not None:
                tl.store(out8_ptr + at, (acc * factor).to(out8_ptr.dtype.element_ty), mask=inside)
        else:
            if XIELU:
                tl.store(kept_ptr + at, acc.to(kept_ptr.dtype.element_ty), mask=inside)
            tl.store(out_ptr + at, activation(acc, a_p, b_p, a_n, b_n, XIELU, out_ptr.dtype.element_ty), mask=inside)


@functools.cache
def device_cores(device: torch.device) -> int:
    """Streaming multiprocessors; few in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _fits_tma(*tensors: Tensor) -> bool:
    """Whether the copy engine of Hopper and later can address these: 16-byte rows, one element after another."""
    capable = not tensors[0].is_cuda or hopper(tensors[0].device)
    return capable and all(
        t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors
    )


def _leaky_gemm(  # noqa: PLR0913
    a: Tensor, b: Tensor, kept: Tensor, out: Tensor, f: Xielu | None, backward: bool,
    scale: Tensor | None = None, out8: Tensor | None = None, factor: float = 0.0,
) -> None:  # fmt: skip
    """b: (F, D) forward, (D, F) backward. f: None for the leaky square. scale: of operands in 8 bits."""
    (M, K), N = a.shape, out.size(1)
    m, n, k = blocks = (128, 256, 64 if scale is None else 128) if a.is_cuda else (32, 32, 32)
    tiles, rest = triton.cdiv(M, m) * triton.cdiv(N, n), (*(f or (0.0,) * 4), f is not None, backward, *blocks, 8)
    warps = dict(num_warps=8, num_stages=3 if backward else 4)  # backward has a tile of `kept` beside the operands
    results = [kept, out] if out8 is None else [kept, out, out8]
    if _fits_tma(a, b, *results):
        into, shape = TensorDescriptor.from_tensor, [k, n] if backward else [n, k]
        kept, out, out8 = [into(t, [m, n // 2]) for t in results] + [None] * (3 - len(results))
        leaky_tma_kernel[(min(tiles, device_cores(a.device)),)](
            into(a, [m, k]), into(b, shape), kept, out, out8, factor, scale, M, N, K, *rest, **warps
        )
    else:
        strides = b.stride()[::-1] if backward else b.stride()
        leaky_pointer_kernel[(tiles,)](a, b, kept, out, out8, factor, scale, M, N, K, *strides, *rest, **warps)


def up_leaky(
    x: Tensor, up: Tensor, f: Xielu | None = None, scale: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """x (M, D), up (F, D) -> what backward needs of the pre-activation, and the activation, both (M, F).

    One tensor for both with the leaky square. Operands may have 8 bits: `scale` is theirs, `dtype` that of the results.
    """
    act = x.new_empty(x.size(0), up.size(0), dtype=dtype)
    kept = act if f is None else torch.empty_like(act)
    _leaky_gemm(x, up, kept, act, f, False, scale)
    return kept, act


def down_leaky(
    grad: Tensor, down: Tensor, kept: Tensor, f: Xielu | None = None, factor: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """grad (M, D), down (D, F), kept (M, F) by `up_leaky` -> gradient of the pre-activation (M, F).

    With a factor, also the gradient times it in 8 bits.
    """
    out, out8 = torch.empty_like(kept), torch.empty_like(kept, dtype=FLOAT8) if factor else None
    _leaky_gemm(grad, down, kept, out, f, True, None, out8, factor)
    return out, out8


# ---- 8 bits: e4m3, four significant bits and numbers up to 448 -------------------------------------------------------
# The products of the normed stream with W_qkv and W_up gain by 8 bits: the kernel that norms the stream rounds it, by a
# fixed factor, and a matrix is rounded once for all visits. On an H200 by cuBLAS, 98,304 tokens: up 0.182 instead of
# 0.302 ms, queries, keys and values 0.096 instead of 0.169. A micro-batch on an H100 takes 70.48 instead of 72.06 ms,
# with the loop 106.1 instead of 108.1. But 300 steps end 1.0 mb worse, and the time saved is worth 0.4: off by default.
# Backward, for the gradient of W_up's input: 0.159 instead of 0.294 ms on an H100, but 0.09 more for the kernel before,
# which writes that of W_up's output in 8 bits beside 16: 1 % of a micro-batch (H200, 68.1 -> 67.5 ms), worth 0.2 mb. A
# pair of 300 steps ends alike (-0.06 mb, where repeats differ by 0.1 to 0.3): off until a run of 600 s says more.
# Gradients are small, and it is known by how much: times the tokens of a step, these reach 4 after 1,500 steps; the
# root of their mean square is 0.006 to 0.04.
FLOAT8, FLOAT8_MAX = torch.float8_e4m3fn, 448.0


def float8_factor(d: int) -> float:
    """A power of two that keeps every number of a normed row of d, at most sqrt(d), within 8 bits: 16 at d = 512."""
    return 2.0 ** math.floor(math.log2(FLOAT8_MAX / d**0.5))


def float8_gradient_factor(tokens: int) -> float:
    """A power of two for gradients of one of MICRO_STEPS micro-batches: 3.5 times what was seen is in range."""
    return 32.0 * MICRO_STEPS * 2.0 ** math.floor(math.log2(tokens))


class Float8(NamedTuple):
    """A matrix (N, K) in 8 bits, to be multiplied with a stream that has 8 bits too."""

    codes: Tensor  # (N, K), zeros below up to a multiple of 16 rows
    scale: Tensor  # () in float32: what a unit of the product is worth
    one: Tensor  # () in float32


class Float8Weights(NamedTuple):
    """Matrices of a fused block that multiply in 8 bits, each where its knob is on."""

    qkv: Float8 | None = None
    up: Float8 | None = None
    up_transposed: Float8 | None = None  # (D, F), for the gradient of the normed stream


@torch.no_grad()
def float8_of(matrices: Sequence[Tensor], factor: float) -> list[Float8]:
    """Matrices (N, K) of all layers, the largest number of each at the end of the range. Stays on the device.

    factor: of the stream that they are multiplied with.
    """
    bank = torch.stack(list(matrices))
    scales = torch.linalg.vector_norm(bank, math.inf, (1, 2), dtype=torch.float32).clamp_min(1e-20) / FLOAT8_MAX
    codes = F.pad((bank / scales[:, None, None]).to(FLOAT8), (0, 0, 0, -bank.size(1) % 16))
    worth, one = F.pad((scales / factor)[:, None], (0, 3)), torch.ones_like(scales[0])
    worth = worth[:, 0]  # cuBLAS wants a scale at an address divisible by 16
    return [Float8(*row, one) for row in zip(codes, worth, strict=True)]


def float8_product(x: Tensor, w: Float8, width: int, dtype: torch.dtype) -> Tensor:
    """x (..., K) in 8 bits -> its products with the first rows of w (..., width), in rows of a multiple of 16."""
    out = torch._scaled_mm(
        x.flatten(0, -2), w.codes.t(), scale_a=w.one, scale_b=w.scale, out_dtype=dtype, use_fast_accum=True
    )
    return out.unflatten(0, x.shape[:-1])[..., :width]


# ---- the residual stream: mix with the embedding, norm, lanes, skips -------------------------------------------------
# A stream is (M, D) in the compute dtype, 100.7 MB for a record micro-batch: 25 us to read or write on an H200, so what
# counts is how often one is touched. A program holds ROWS whole rows; sums over rows (gradients of gains) stay in
# registers while a fixed number of programs walks over all rows, and are added up afterwards in a fixed order.


def mix(x: Tensor, x0: Tensor, weights: Tensor) -> Tensor:
    """x and x0 (..., D) weighted by the two rows of `weights` (2, D), which are in float32: -> as x."""
    return (weights[0] * x + weights[1] * x0).to(x.dtype)


def mean_norm(x: Tensor, lane: Tensor | None = None) -> Tensor:
    """Norm of x, or of the mean of two lanes."""
    return rms(x if lane is None else (x + lane) / 2)


def update_lanes(x: Tensor, lane: Tensor, a: Tensor, b: Tensor, keep: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    """Both lanes keep a part of themselves (keep (2,)) and take what attention and MLP made (post (2, 2): from, to)."""
    keep, post = keep[..., None], post[..., None]  # with a dimension float32 stays float32 beside bfloat16
    lanes = keep[0] * x + post[0, 0] * a + post[1, 0] * b, keep[1] * lane + post[0, 1] * a + post[1, 1] * b
    return lanes[0].to(x.dtype), lanes[1].to(x.dtype)


if triton is not None:

    @triton.jit
    def stream(ptr, at, inside):
        """A tile in float32, 0 where there is no such stream."""
        if ptr is None:  # noqa: SIM108
            tile = 0.0
        else:
            tile = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
        return tile

    @triton.jit
    def mix_norm_kernel(  # noqa: PLR0913
        x_ptr, x0_ptr, mix_ptr, u_ptr, n_ptr, n8_ptr, rstd_ptr, scale, scale8, eps, M, D,
        ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """u = mix0 x + mix1 x0 (x alone without x0); n = scale u rstd, rstd = 1 / rms(u); n8 = scale8 u rstd."""
        row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
        inside = (row[:, None] < M) & (col[None, :] < D)
        at = row[:, None].to(tl.int64) * D + col[None, :]
        u = stream(x_ptr, at, inside)
        if x0_ptr is not None:
            m0 = tl.load(mix_ptr + col, mask=col < D, other=0.0).to(tl.float32)
            m1 = tl.load(mix_ptr + D + col, mask=col < D, other=0.0).to(tl.float32)
            u = m0[None, :] * u + m1[None, :] * stream(x0_ptr, at, inside)
            u = u.to(x_ptr.dtype.element_ty).to(tl.float32)  # the norm is that of the sum as it is stored
        if u_ptr is not None:
            tl.store(u_ptr + at, u.to(u_ptr.dtype.element_ty), mask=inside)
        if n_ptr is not None:
            rstd = 1.0 / tl.sqrt(tl.sum(u * u, 1) / D + eps)
            tl.store(rstd_ptr + row, rstd, mask=row < M)
            tl.store(n_ptr + at, (u * rstd[:, None] * scale).to(n_ptr.dtype.element_ty), mask=inside)
        if n8_ptr is not None:
            tl.store(n8_ptr + at, (u * rstd[:, None] * scale8).to(n8_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def mix_norm_backward_kernel(  # noqa: PLR0913
        g_ptr, dn_ptr, n_ptr, rstd_ptr, x_ptr, x0_ptr, mix_ptr, carry_ptr, keep_ptr, g0_ptr, dx_ptr, dx0_ptr, dmix_ptr,
        scale, factor, M, D, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """du = g + norm's gradient; dx = mix0 du (without a mix: factor du) + keep carry; dx0 = g0 + mix1 du.

        dmix: sums over rows of du x and du x0.
        g, carry (gradients that reach u and x past the norm), keep (their factor, 1 without) and g0 may be absent, and
        the norm with dn.
        """
        col = tl.arange(0, BLOCK)
        if mix_ptr is not None:
            m0 = tl.load(mix_ptr + col, mask=col < D, other=0.0).to(tl.float32)
            m1 = tl.load(mix_ptr + D + col, mask=col < D, other=0.0).to(tl.float32)
        sum0, sum1 = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
        for block in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
            row = block * ROWS + tl.arange(0, ROWS)
            inside = (row[:, None] < M) & (col[None, :] < D)
            at = row[:, None].to(tl.int64) * D + col[None, :]
            du = stream(g_ptr, at, inside)
            if dmix_ptr is not None:
                x, x0 = stream(x_ptr, at, inside), stream(x0_ptr, at, inside)
            if dn_ptr is not None:
                dn = stream(dn_ptr, at, inside)
                rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)
                n = stream(n_ptr, at, inside)
                along = tl.sum(dn * n, 1) / (D * scale * scale)
                du += rstd[:, None] * scale * (dn - n * along[:, None])
            dx = factor * du
            if dmix_ptr is not None:
                sum0 += du * x
                sum1 += du * x0
            if mix_ptr is not None:
                dx = m0[None, :] * du
                if dx0_ptr is not None:
                    dx0 = m1[None, :] * du + stream(g0_ptr, at, inside)
                    tl.store(dx0_ptr + at, dx0.to(dx0_ptr.dtype.element_ty), mask=inside)
            carry = stream(carry_ptr, at, inside)
            if keep_ptr is not None:
                carry *= tl.load(keep_ptr).to(tl.float32)
            dx += carry
            if dx_ptr is not None:
                tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if dmix_ptr is not None:
            out = dmix_ptr + tl.program_id(0) * 2 * D + col
            tl.store(out, tl.sum(sum0, 0), mask=col < D)
            tl.store(out + D, tl.sum(sum1, 0), mask=col < D)

    @triton.jit
    def lanes_kernel(  # noqa: PLR0913
        x_ptr, lane_ptr, a_ptr, b_ptr, keep_ptr, post_ptr, new_x_ptr, new_lane_ptr, size, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """`update_lanes`, elementwise: four streams in, two out."""
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        x = stream(x_ptr, at, inside)
        lane = stream(lane_ptr, at, inside)
        a = stream(a_ptr, at, inside)
        b = stream(b_ptr, at, inside)
        keep0, keep1 = tl.load(keep_ptr).to(tl.float32), tl.load(keep_ptr + 1).to(tl.float32)
        a0, a1 = tl.load(post_ptr).to(tl.float32), tl.load(post_ptr + 1).to(tl.float32)
        b0, b1 = tl.load(post_ptr + 2).to(tl.float32), tl.load(post_ptr + 3).to(tl.float32)
        kind = new_x_ptr.dtype.element_ty
        tl.store(new_x_ptr + at, (keep0 * x + a0 * a + b0 * b).to(kind), mask=inside)
        tl.store(new_lane_ptr + at, (keep1 * lane + a1 * a + b1 * b).to(kind), mask=inside)

    @triton.jit
    def lanes_backward_kernel(  # noqa: PLR0913
        gx_ptr, gl_ptr, x_ptr, lane_ptr, a_ptr, b_ptr, post_ptr, da_ptr, db_ptr, sums_ptr, size, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Gradients of a and b, and per program the six products that are the gradients of keep and post.

        Six streams in, two out; those of x and lane are factors of gx and gl, applied by the kernel that reads them.
        """
        a0, a1 = tl.load(post_ptr).to(tl.float32), tl.load(post_ptr + 1).to(tl.float32)
        b0, b1 = tl.load(post_ptr + 2).to(tl.float32), tl.load(post_ptr + 3).to(tl.float32)
        keep0, keep1 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        post00, post01 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        post10, post11 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
            at = block * BLOCK + tl.arange(0, BLOCK)
            inside = at < size
            gx = stream(gx_ptr, at, inside)
            gl = stream(gl_ptr, at, inside)
            a = stream(a_ptr, at, inside)
            b = stream(b_ptr, at, inside)
            keep0 += gx * stream(x_ptr, at, inside)
            keep1 += gl * stream(lane_ptr, at, inside)
            post00 += gx * a
            post01 += gl * a
            post10 += gx * b
            post11 += gl * b
            tl.store(da_ptr + at, (a0 * gx + a1 * gl).to(da_ptr.dtype.element_ty), mask=inside)
            tl.store(db_ptr + at, (b0 * gx + b1 * gl).to(db_ptr.dtype.element_ty), mask=inside)
        out = sums_ptr + tl.program_id(0) * 6
        tl.store(out, tl.sum(keep0, 0))
        tl.store(out + 1, tl.sum(keep1, 0))
        tl.store(out + 2, tl.sum(post00, 0))
        tl.store(out + 3, tl.sum(post01, 0))
        tl.store(out + 4, tl.sum(post10, 0))
        tl.store(out + 5, tl.sum(post11, 0))


def _walkers(x: Tensor) -> int:
    """Programs of a kernel that walks over all rows: enough to fill the device, few enough to sum up cheaply."""
    return 8 * device_cores(x.device)


def _row_tile(d: int) -> dict[str, int]:
    """Whole rows of D channels in a program: 2,048 elements on four warps, two 16-byte accesses per thread."""
    block = triton.next_power_of_2(d)
    return dict(ROWS=max(1, 2048 // block), BLOCK=block, num_warps=4)


def mix_norm_forward(
    x: Tensor, x0: Tensor | None, mix: Tensor | None, scale: float, keep_sum: bool, n8: Tensor | None = None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """-> u or None, n = scale rms(u), rstd (M,) in float32; u is the mix of x and x0, or x. Reads and writes once.

    n8, room for n in 8 bits, receives n times `float8_factor`.
    """
    n, rstd = torch.empty_like(x), x.new_empty(x.numel() // x.size(-1), dtype=torch.float32)
    u = torch.empty_like(x) if keep_sum else None
    tile = _row_tile(x.size(-1))
    mix_norm_kernel[(triton.cdiv(len(rstd), tile["ROWS"]),)](
        x, x0, mix, u, n, n8, rstd, scale, scale * float8_factor(x.size(-1)), RMS_EPS, len(rstd), x.size(-1), **tile
    )
    return u, n, rstd


def mix_forward(x: Tensor, x0: Tensor, mix: Tensor) -> Tensor:
    """`mix` alone: reads two streams, writes one."""
    u, rows, tile = torch.empty_like(x), x.numel() // x.size(-1), _row_tile(x.size(-1))
    mix_norm_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        x, x0, mix, u, None, None, None, 1.0, 1.0, RMS_EPS, rows, x.size(-1), **tile
    )
    return u


class NormGradients(NamedTuple):
    """What may flow into the backward pass of `mix_norm_forward` beside the gradient of n."""

    g: Tensor | None = None  # of u
    carry: Tensor | None = None  # of x, past mix and norm
    keep: Tensor | None = None  # a factor of carry
    g0: Tensor | None = None  # of x0, from later visits


def mix_norm_backward(  # noqa: PLR0913
    dn: Tensor | None, n: Tensor | None, rstd: Tensor | None, scale: float, more: NormGradients,
    mix: Tensor | None = None, factor: float = 1.0, inputs: tuple[Tensor, Tensor] | None = None,
    want: tuple[bool, bool] = (True, False),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """-> dx, dx0 (those that `want` asks for), and dmix where the inputs (x, x0) of the mix are given.

    Without a norm dn, n and rstd are None, and the gradient of u is `more.g` alone.
    """
    like = more.g if n is None else n
    d, rows = like.size(-1), like.numel() // like.size(-1)
    dx, dx0 = (torch.empty_like(like) if w else None for w in want)
    programs, tile = min(_walkers(like), rows), _row_tile(d)
    x, x0 = inputs or (None, None)
    sums = like.new_empty(programs, 2, d, dtype=torch.float32) if inputs else None
    mix_norm_backward_kernel[(programs,)](
        more.g, dn, n, rstd, x, x0, mix, more.carry, more.keep, more.g0, dx, dx0, sums, scale, factor, rows, d,
        **tile,
    )  # fmt: skip
    return dx, dx0, sums.sum(0) if inputs else None


class FusedMeanNorm(torch.autograd.Function):
    """`mean_norm`: one kernel each way; saves n and 1 / rms."""

    @staticmethod
    def forward(ctx, x, lane):
        half = None if lane is None else x.new_full((2, x.size(-1)), 0.5)
        _, n, rstd = mix_norm_forward(x, lane, half, 1.0, keep_sum=False)
        ctx.save_for_backward(n, rstd)
        ctx.lanes = lane is not None
        return n

    @staticmethod
    def backward(ctx, grad):
        n, rstd = ctx.saved_tensors
        dx, *_ = mix_norm_backward(grad.contiguous(), n, rstd, 1.0, NormGradients(), factor=0.5 if ctx.lanes else 1.0)
        return dx, dx if ctx.lanes else None


class FusedMerge(torch.autograd.Function):
    """`mix` without a norm behind it, for skips: reads two streams and writes one, backward three and two."""

    @staticmethod
    def forward(ctx, x, kept, weights):
        ctx.save_for_backward(x, kept, weights)
        ctx.same = x is kept  # the innermost skip
        return mix_forward(x, kept, weights)

    @staticmethod
    def backward(ctx, grad):
        x, kept, weights = ctx.saved_tensors
        if ctx.same:  # all of the gradient in that of x
            weights = torch.stack((weights.sum(0), weights[1]))
        more, want = NormGradients(g=grad.contiguous()), (True, not ctx.same)
        return mix_norm_backward(None, None, None, 1.0, more, weights, inputs=(x, kept), want=want)


def lanes_forward(x: Tensor, lane: Tensor, a: Tensor, b: Tensor, keep: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    new_x, new_lane, block = torch.empty_like(x), torch.empty_like(x), 2048
    lanes_kernel[(triton.cdiv(x.numel(), block),)](x, lane, a, b, keep, post, new_x, new_lane, x.numel(), block)
    return new_x, new_lane


def lanes_backward(
    gx: Tensor, gl: Tensor, x: Tensor, lane: Tensor, a: Tensor, b: Tensor, post: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> da, db, dkeep (2,), dpost (2, 2)."""
    da, db, block = torch.empty_like(a), torch.empty_like(b), 1024
    programs = min(_walkers(x), triton.cdiv(x.numel(), block))
    sums = x.new_empty(programs, 6, dtype=torch.float32)
    lanes_backward_kernel[(programs,)](gx, gl, x, lane, a, b, post, da, db, sums, x.numel(), block)
    sums = sums.sum(0)
    return da, db, sums[:2], sums[2:].view(2, 2)


# ---- heads: norm, rotation and gain before attention, own value and gate after it ------------------------------------
# The merged projection (N, W) has rows of H K queries | G K keys | G K values | H gate logits | H narrow gate logits,
# the last two if heads have such gates.
# A tile is (ROWS, K): a row is one head of one token, 128 contiguous bytes at K = 64 in bf16, read by 8 lanes of 16
# bytes, so that a reduction over K is three shuffles. Strides are constexpr: the compiler sees that they keep the
# 16-byte alignment (as runtime integers only multiples of 16 would tell it, and W = 1032 is none).
HEAD_ROWS, HEAD_WARPS = 64, 4  # forward; backward takes half the rows

if triton is not None:

    @triton.jit
    def rotary_columns(cos_ptr, sin_ptr, position, c, mask, HALF: tl.constexpr):
        """What makes a row's rotation elementwise: rotate(x) = x * cos + x[partner] * sin, its transpose has -sin.

        Columns beyond the rotated ones have cosine 1 and sine 0; `turned` masks the loads of partners to the others.
        """
        turned = mask & (c < 2 * HALF)[None, :]
        at = position[:, None] * HALF + (c % HALF)[None, :]
        cos = tl.load(cos_ptr + at, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + at, mask=turned, other=0.0).to(tl.float32)
        return cos, tl.where((c < HALF)[None, :], sin, -sin), tl.where(c < HALF, c + HALF, c - HALF), turned

    @triton.jit
    def prepare_kernel(  # noqa: PLR0913
        qkv_ptr, gain_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, rstd_ptr, n_rows, length, q_token, q_group,
        STRIDE: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
        EPS: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Rows are the H + G query and key heads of each token. Reads 1.5 S, writes 1.5 S."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        head = row % (H + G)
        position = (row // (H + G)) % length
        token = (row // (H + G)).to(tl.int64)
        c = tl.arange(0, COLS)
        real = row < n_rows
        mask = real[:, None] & (c < K)[None, :]
        raw = qkv_ptr + token * STRIDE + head * K
        cos, sin, partner, turned = rotary_columns(cos_ptr, sin_ptr, position, c, mask, HALF)
        # The partner's column comes by a second load of the same line (16 of 128 bytes twice), from the L1 cache.
        x = tl.load(raw[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        other = tl.load(raw[:, None] + partner[None, :], mask=turned, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / K + EPS)
        tl.store(rstd_ptr + row, scale, mask=real)
        scale *= tl.load(gain_ptr + head, mask=real & (head < H), other=1.0).to(tl.float32)
        out = (x * cos + other * sin) * scale[:, None]
        to_query = q_ptr + token * q_token + head // (H // G) * q_group + head % (H // G) * K
        to = tl.where(head < H, to_query, k_ptr + (token * G + head - H) * K)
        tl.store(to[:, None] + c[None, :], out.to(q_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def prepare_backward_kernel(  # noqa: PLR0913
        qkv_ptr, gain_ptr, cos_ptr, sin_ptr, dq_ptr, dk_ptr, dv_ptr, dqkv_ptr, dgain_ptr, n_rows, length,
        q_token, q_group, STRIDE: tl.constexpr, D_STRIDE: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
        K: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr, ADD_VALUES: tl.constexpr, COLS: tl.constexpr,
        HEADS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Rows are all H + 2G heads of each token: query and key rows of d_qkv are written, dv is added to value rows.

        Recomputes the root mean square from the raw row. Reads 1.5 S raw, 2 S of dq, dk, dv and the 0.5 S that the
        gate's backward left in the value columns; writes 2 S.
        """
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        head = row % (H + 2 * G)
        position = (row // (H + 2 * G)) % length
        token = (row // (H + 2 * G)).to(tl.int64)
        c = tl.arange(0, COLS)
        real = row < n_rows
        is_value = head >= H + G
        mask = real[:, None] & (c < K)[None, :]
        cos, sin, partner, turned = rotary_columns(cos_ptr, sin_ptr, position, c, mask & (head < H + G)[:, None], HALF)
        # One load each for three kinds of rows: the pointer tells them apart. x: raw queries and keys, or the values'
        # own part of the gradient, already in place; g: dq, dk or dv.
        to = dqkv_ptr + token * D_STRIDE + head * K
        x_at = tl.where(is_value, to, qkv_ptr + token * STRIDE + head * K)
        g_at = tl.where(is_value, dv_ptr + (token * G + head - H - G) * K, dk_ptr + (token * G + head - H) * K)
        query_at = dq_ptr + token * q_token + head // (H // G) * q_group + head % (H // G) * K
        g_at = tl.where(head < H, query_at, g_at)
        x_mask = mask if ADD_VALUES else mask & (head < H + G)[:, None]
        x = tl.load(x_at[:, None] + c[None, :], mask=x_mask, other=0.0).to(tl.float32)
        g = tl.load(g_at[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        g_other = tl.load(g_at[:, None] + partner[None, :], mask=turned, other=0.0).to(tl.float32)
        # out = gain * R(x * inv), u = R^T g: d_gain = inv * (u . x), dx = gain * inv * (u - x * inv^2 * (u . x) / K)
        u = g * cos - g_other * sin
        inv = tl.rsqrt(tl.sum(x * x, 1) / K + EPS)
        dot = tl.sum(u * x, 1)
        gain = tl.load(gain_ptr + head, mask=real & (head < H), other=1.0).to(tl.float32)
        dx = (gain * inv)[:, None] * (u - x * (inv * inv * dot / K)[:, None])
        dx = tl.where(is_value[:, None], x + g, dx)
        tl.store(to[:, None] + c[None, :], dx.to(dqkv_ptr.dtype.element_ty), mask=mask)
        h = tl.arange(0, HEADS)
        partial = tl.sum(tl.where(head[:, None] == h[None, :], (inv * dot)[:, None], 0.0), 0)
        tl.store(dgain_ptr + tl.program_id(0) * H + h, partial, mask=h < H)

    @triton.jit
    def own_value(v_ptr, token, group, c, mask, STRIDE: tl.constexpr, K: tl.constexpr):
        """The unit value row of each token and group, and 1 / max(norm, 1e-12): negative where the norm is smaller."""
        v = tl.load(v_ptr + (token * STRIDE + group * K)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        norm = tl.sqrt(tl.sum(v * v, 1))
        inverse = 1 / tl.maximum(norm, 1e-12)
        return v * inverse[:, None], inverse, norm > 1e-12

    @triton.jit
    def gate_kernel(  # noqa: PLR0913
        y_ptr, v_ptr, logits_ptr, out_ptr, n_rows, y_token, y_group,
        V_STRIDE: tl.constexpr, L_STRIDE: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
        OWN: tl.constexpr, GATED: tl.constexpr, NARROW: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Rows are the G groups of each token; a group's H / G heads follow one another. Reads 1.5 S, writes 1 S."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        token, group = (row // G).to(tl.int64), row % G
        c = tl.arange(0, COLS)
        real = row < n_rows
        mask = real[:, None] & (c < K)[None, :]
        if OWN:
            own, _, _ = own_value(v_ptr, token, group, c, mask, V_STRIDE, K)
        for j in tl.static_range(H // G):
            head = group * (H // G) + j
            y_at = (token * y_token + group * y_group + j * K)[:, None] + c[None, :]
            y = tl.load(y_ptr + y_at, mask=mask, other=0.0).to(tl.float32)
            if OWN:
                y -= tl.sum(y * own, 1)[:, None] * own
            if GATED:
                logit = tl.load(logits_ptr + token * L_STRIDE + head, mask=real, other=0.0).to(tl.float32)
                y *= tl.sigmoid(logit)[:, None]
            if NARROW:
                at_narrow = logits_ptr + token * L_STRIDE + (H if GATED else 0) + head
                y *= 2 * tl.sigmoid(tl.load(at_narrow, mask=real, other=0.0).to(tl.float32))[:, None]
            at = (token * H + head)[:, None] * K + c[None, :]
            tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def gate_backward_kernel(  # noqa: PLR0913
        grad_ptr, y_ptr, v_ptr, logits_ptr, dy_ptr, delta_ptr, dv_ptr, dlogits_ptr, n_rows, y_token, y_group,
        V_STRIDE: tl.constexpr, L_STRIDE: tl.constexpr, DV_STRIDE: tl.constexpr, DL_STRIDE: tl.constexpr,
        H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, OWN: tl.constexpr, GATED: tl.constexpr,
        NARROW: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Tiles as in the forward. Recomputes the unit value and the gates; reads 2.5 S, writes 1.5 S.

        delta (G, N, R) = dy . y of each head: what the backward pass of a softmax subtracts.
        """
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        token, group = (row // G).to(tl.int64), row % G
        c = tl.arange(0, COLS)
        real = row < n_rows
        mask = real[:, None] & (c < K)[None, :]
        if OWN:
            own, inverse, unit = own_value(v_ptr, token, group, c, mask, V_STRIDE, K)
            d_own = tl.zeros((ROWS, COLS), tl.float32)
            radial = tl.zeros((ROWS,), tl.float32)
        for j in tl.static_range(H // G):
            head = group * (H // G) + j
            at = (token * H + head)[:, None] * K + c[None, :]
            grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
            y_at = (token * y_token + group * y_group + j * K)[:, None] + c[None, :]
            y = tl.load(y_ptr + y_at, mask=mask, other=0.0).to(tl.float32)
            dot = tl.sum(grad * y, 1)
            gate = tl.full((ROWS,), 1.0, tl.float32)  # the product of both
            if GATED:
                logit = tl.load(logits_ptr + token * L_STRIDE + head, mask=real, other=0.0).to(tl.float32)
                sigmoid_gate = tl.sigmoid(logit)
                gate *= sigmoid_gate
            if NARROW:
                at_narrow = token * L_STRIDE + (H if GATED else 0) + head
                half_gate = tl.sigmoid(tl.load(logits_ptr + at_narrow, mask=real, other=0.0).to(tl.float32))
                gate *= 2 * half_gate
            dy = grad
            if OWN:  # out = gate * (y - (y . own) own)
                along_y, along_grad = tl.sum(y * own, 1), tl.sum(grad * own, 1)
                dot -= along_y * along_grad
                dy -= along_grad[:, None] * own
                d_own -= (gate * along_y)[:, None] * grad + (gate * along_grad)[:, None] * y
                radial -= 2 * gate * along_y * along_grad  # d_own . own
            dy *= gate[:, None]
            tl.store(dy_ptr + y_at, dy.to(dy_ptr.dtype.element_ty), mask=mask)
            at_delta = group * (n_rows // G * (H // G)) + token * (H // G) + j
            tl.store(delta_ptr + at_delta, gate * dot, mask=real)
            d_at = dlogits_ptr + token * DL_STRIDE + head
            if GATED:
                tl.store(d_at, (dot * gate * (1 - sigmoid_gate)).to(dlogits_ptr.dtype.element_ty), mask=real)
            if NARROW:
                d_logit = (dot * gate * (1 - half_gate)).to(dlogits_ptr.dtype.element_ty)
                tl.store(d_at + (H if GATED else 0), d_logit, mask=real)
        if OWN:
            dv = inverse[:, None] * (d_own - tl.where(unit, radial, 0.0)[:, None] * own)
            dv_at = dv_ptr + (token * DV_STRIDE + group * K)[:, None] + c[None, :]
            tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def head_columns(merged: Tensor, layer: Layer) -> tuple[Tensor, Tensor | None]:
    """Values (N, G, K) and gate logits (N, H or 2 H), or None, as views of the merged projection (..., W)."""
    flat, (_, v_at, gates_at, _) = merged.flatten(0, -2), layer.columns
    logits = flat[:, gates_at:] if flat.size(1) > gates_at else None
    return flat[:, v_at:gates_at].unflatten(1, (-1, layer.head_dim)), logits


def prepare_forward(
    merged: Tensor, gain: Tensor, rope: tuple[Tensor, Tensor], layer: Layer, attention: PackedAttention
) -> tuple[Tensor, Tensor, Tensor]:
    """-> queries (N, G, R, K), normed, rotated and scaled, keys (N, G, K), normed and rotated, and `RawHeads.rstd`."""
    flat, (cos, sin) = merged.flatten(0, -2), rope
    n, h, g, k = len(flat), layer.heads, layer.kv_heads, layer.head_dim
    queries, keys = attention.empty(flat, n, g, h // g, k), flat.new_empty(n, g, k)
    rstd = flat.new_empty(n, h + g, dtype=torch.float32)
    prepare_kernel[(triton.cdiv(n * (h + g), HEAD_ROWS),)](
        flat, gain, cos, sin, queries, keys, rstd, n * (h + g), len(cos), *queries.stride()[:2], flat.stride(0), h, g,
        k, cos.size(-1), RMS_EPS, triton.next_power_of_2(k), HEAD_ROWS, num_warps=HEAD_WARPS,
    )  # fmt: skip
    return queries, keys, rstd


def prepare_backward(raw: RawHeads, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
    """Writes the query and key columns of d_merged (..., W), adds dv to its value columns; -> gradient of the gain."""
    flat, d_flat, (cos, sin) = raw.merged.flatten(0, -2), raw.d_merged.flatten(0, -2), raw.rope
    layer, gain, rows = raw.layer, raw.gain, HEAD_ROWS // 2
    n, h, g, k = len(flat), layer.heads, layer.kv_heads, layer.head_dim
    programs = triton.cdiv(n * (h + 2 * g), rows)
    partial = flat.new_empty(programs, h, dtype=torch.float32)  # no atomics: the same sum every time
    prepare_backward_kernel[(programs,)](
        flat, gain, cos, sin, dq, dk.contiguous(), dv.contiguous(), d_flat, partial, n * (h + 2 * g), len(cos),
        *dq.stride()[:2], flat.stride(0), d_flat.stride(0), h, g, k, cos.size(-1), RMS_EPS, layer.exclude_own_value,
        triton.next_power_of_2(k), triton.next_power_of_2(h), rows, num_warps=HEAD_WARPS,
    )  # fmt: skip
    return partial.sum(0)


def gate_forward(y: Tensor, merged: Tensor, layer: Layer) -> Tensor:
    """y (N, G, R, K) -> (..., H K): without each head's own value, times the head's gate."""
    v, logits = head_columns(merged, layer)
    (n, g, r, k), any_gate, rows = y.shape, logits is not None, HEAD_ROWS // 2
    out = y.new_empty(*merged.shape[:-1], g * r * k)
    gate_kernel[(triton.cdiv(n * g, rows),)](
        y, v, logits if any_gate else y, out, n * g, *y.stride()[:2], v.stride(0), logits.stride(0) if any_gate else 0,
        g * r, g, k, layer.exclude_own_value, layer.gated, layer.narrow, triton.next_power_of_2(k), rows,
        num_warps=HEAD_WARPS,
    )  # fmt: skip
    return out


def gate_backward(grad: Tensor, y: Tensor, merged: Tensor, d_merged: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """-> gradient of y (N, G, R, K) and, per head, its product with y (G, N, R) in float32.

    Writes the values' own part and that of the logits to their columns of d_merged.
    """
    (v, logits), (dv, d_logits) = head_columns(merged, layer), head_columns(d_merged, layer)
    (n, g, r, k), any_gate, rows, dy = y.shape, logits is not None, HEAD_ROWS // 2, torch.empty_like(y)
    delta = y.new_empty(g, n, r, dtype=torch.float32)
    l_stride, dl_stride = (t.stride(0) if any_gate else 0 for t in (logits, d_logits))
    gate_backward_kernel[(triton.cdiv(n * g, rows),)](
        grad, y, v, logits if any_gate else y, dy, delta, dv, d_logits if any_gate else dy, n * g, *y.stride()[:2],
        v.stride(0), l_stride, dv.stride(0), dl_stride, g * r, g, k, layer.exclude_own_value, layer.gated, layer.narrow,
        triton.next_power_of_2(k), rows, num_warps=HEAD_WARPS,
    )  # fmt: skip
    return dy, delta


def softcapped_logits(hidden: Tensor, embedding: Tensor, cap: float, more: Tensor | None = None) -> Tensor:
    """hidden (..., D), embedding (V, D) -> logits (..., V) in float32, bounded by +-cap (arXiv 2408.00118).

    more: what an adapter adds before the cap.
    """
    logits = F.linear(hidden, embedding)
    return cap * torch.tanh((logits if more is None else logits + more).float() / cap)


def softcapped_loss(
    hidden: Tensor, embedding: Tensor, targets: Tensor, cap: float, more: Tensor | None = None
) -> Tensor:
    """Cross-entropy in nats per token, float32, in the shape of `targets`."""
    logits = softcapped_logits(hidden, embedding, cap, more)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)


if triton is not None:

    @triton.jit
    def softcap_kernel(
        z_ptr, targets_ptr, loss_ptr, cap,
        V: tl.constexpr, BLOCK: tl.constexpr, BOUNDED: tl.constexpr, GRADIENT: tl.constexpr,
    ):  # fmt: skip
        """One row of V logits per program, in registers: reads it once and, for a gradient, writes it once."""
        row = tl.program_id(0).to(tl.int64)
        v = tl.arange(0, BLOCK)
        target = tl.load(targets_ptr + row)
        z_target = tl.load(z_ptr + row * V + target).to(tl.float32)
        z = tl.load(z_ptr + row * V + v, mask=v < V, other=0.0).to(tl.float32)
        t = 1 - 2 / (tl.exp(z * (2 / cap)) + 1)  # tanh; exact to 1e-7, and to +-1 where the exponential leaves float32
        c = tl.where(v < V, cap * t, -float("inf"))
        top = cap if BOUNDED else tl.max(c, 0)
        e = tl.exp(c - top)
        total = tl.sum(e, 0)
        tl.store(loss_ptr + row, tl.log(total) + top - cap * (1 - 2 / (tl.exp(z_target * (2 / cap)) + 1)))
        if GRADIENT:
            dz = (e * (1 / total) - tl.where(v == target, 1.0, 0.0)) * (1 - t * t)
            tl.store(z_ptr + row * V + v, dz.to(z_ptr.dtype.element_ty), mask=v < V)

    @triton.jit
    def scale_rows_kernel(x_ptr, factor_ptr, out_ptr, M, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        """out = factor x, one factor per row, in float32 until it is stored."""
        row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
        inside = (row[:, None] < M) & (col[None, :] < D)
        at = row[:, None].to(tl.int64) * D + col[None, :]
        factor = tl.load(factor_ptr + row, mask=row < M, other=0.0)[:, None]
        x = stream(x_ptr, at, inside) * factor
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside)


def scale_rows(x: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """x (N, D) times factor (N,) in float32. PyTorch's product of two dtypes takes 0.22 ms for 0.05 of traffic."""
    tile = _row_tile(x.size(1))
    scale_rows_kernel[(triton.cdiv(len(x), tile["ROWS"]),)](x, factor.contiguous(), out, *x.shape, **tile)
    return out


def _softcap(z: Tensor, targets: Tensor, cap: float, gradient: bool) -> Tensor:
    """Losses (N,) of the logits z (N, V) before their cap; with `gradient` z becomes d loss / dz."""
    (n, vocab), loss = z.shape, z.new_empty(len(z), dtype=torch.float32)
    block = triton.next_power_of_2(vocab)
    # 32 logits a thread; without a cap up to 40 exp(c - cap) could vanish, so the row's maximum replaces it.
    warps = min(max(block // 1024, 1), 32)
    softcap_kernel[(n,)](z, targets, loss, cap, vocab, block, cap <= 40, gradient, num_warps=warps)
    return loss


class FusedLoss(torch.autograd.Function):
    """`softcapped_loss` with the (N, V) logits moved twice: the forward kernel has each row in registers anyway and
    overwrites it with d loss / dz. The upstream gradient, one number a token, scales the narrow sides of both products.

    Saves that matrix in the logits' memory; backward recomputes nothing and runs two products.
    """

    @staticmethod
    def forward(ctx, hidden, embedding, targets, cap, gradient):
        z = F.linear(hidden, embedding)
        loss = _softcap(z, targets, cap, gradient)
        if gradient:
            ctx.save_for_backward(hidden, embedding, z)
        return loss

    @staticmethod
    def backward(ctx, grad):
        hidden, embedding, dz = ctx.saved_tensors
        d_hidden = d_embedding = None
        if ctx.needs_input_grad[0]:
            d_hidden = dz @ embedding
            scale_rows(d_hidden, grad, d_hidden)
        if ctx.needs_input_grad[1]:
            d_embedding = dz.t() @ scale_rows(hidden, grad, torch.empty_like(hidden))
        return d_hidden, d_embedding, None, None, None


def softcapped_loss_fused(hidden: Tensor, embedding: Tensor, targets: Tensor, cap: float) -> Tensor:
    gradient = torch.is_grad_enabled() and (hidden.requires_grad or embedding.requires_grad)
    flat = hidden.flatten(0, -2).contiguous()
    return FusedLoss.apply(flat, embedding.contiguous(), targets.flatten(), float(cap), gradient).view(targets.shape)


def orthogonalize(update: Tensor, steps: int) -> Tensor:
    """Nearest semi-orthogonal matrix of each of a batch, by the quintic Newton-Schulz iteration of Muon.

    update (N, rows, cols) -> the same shape, singular values in about 0.7..1.2 (Jordan et al. 2024).
    """
    a, b, c = 3.4445, -4.775, 2.0315
    x = update.bfloat16() if update.is_cuda else update.float()  # without matrix units bfloat16 is slower, not faster
    tall = x.size(-2) > x.size(-1)  # the Gram matrix is that of the shorter side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x.mT @ x if tall else x @ x.mT
        # baddbmm scales and adds inside the product: operators of their own move 2.5 GB a step, 0.6 ms at 4 TB/s. A
        # kernel for symmetric products could save 110 of 373 GFLOP, at most 0.2 ms a step: not worth its lines.
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, factor, beta=a) if tall else torch.baddbmm(x, factor, x, beta=a)
    return x


# ---- the update of test-time training's adapters ---------------------------------------------------------------------
class AdamW(NamedTuple):
    """Constants of an update (arXiv 1711.05101)."""

    beta1: float
    beta2: float
    eps: float
    decay: float

    def bias(self, steps: Tensor) -> Tensor:
        """(2,): what the moments sum up to after so many steps."""
        return 1 - torch.stack((self.beta1**steps, self.beta2**steps))


def adamw(
    c: AdamW, steps: Tensor, rates: Tensor, gradient: Tensor, values: Tensor, live: Tensor, first: Tensor | None,
    second: Tensor,
) -> Tensor:  # fmt: skip
    """Update number `steps` () of values (N, P) and moments in float32, in place; live becomes a copy in its dtype.

    rates (P,): of each column. first: None where beta1 is 0 and the moment the gradient itself.
    """
    gradient = gradient.float()
    bias = c.bias(steps).float()
    second.mul_(c.beta2).addcmul_(gradient, gradient, value=1 - c.beta2)
    if first is not None:
        gradient = first.mul_(c.beta1).add_(gradient, alpha=1 - c.beta1)
    size = (second / bias[1]).sqrt_().add_(c.eps)
    values.mul_(1 - c.decay * rates).sub_(rates * (gradient / bias[0]) / size)
    return live.copy_(values)


if triton is not None:

    @triton.jit
    def adamw_kernel(  # noqa: PLR0913
        bias_ptr, rates_ptr, grad_ptr, values_ptr, live_ptr, first_ptr, second_ptr, P, beta1, beta2, eps, decay,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """BLOCK columns of one row; its neighbors in time are the same columns of other rows, with the same rates."""
        n_rows = tl.num_programs(0) // tl.cdiv(P, BLOCK)  # as an argument, each kind of number would be another kernel
        col = tl.program_id(0) // n_rows * BLOCK + tl.arange(0, BLOCK)
        at, inside = (tl.program_id(0) % n_rows).to(tl.int64) * P + col, col < P
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rate = tl.load(rates_ptr + col, mask=inside, other=0.0)
        second = tl.load(second_ptr + at, mask=inside, other=0.0)
        second = second * beta2 + (1 - beta2) * grad * grad
        tl.store(second_ptr + at, second, mask=inside)
        if first_ptr is not None:
            first = tl.load(first_ptr + at, mask=inside, other=0.0)
            grad = first * beta1 + (1 - beta1) * grad
            tl.store(first_ptr + at, grad, mask=inside)
        size = tl.sqrt(second / tl.load(bias_ptr + 1)) + eps
        values = tl.load(values_ptr + at, mask=inside, other=0.0) * (1 - decay * rate)
        values -= rate * (grad / tl.load(bias_ptr)) / size
        tl.store(values_ptr + at, values, mask=inside)
        tl.store(live_ptr + at, values.to(live_ptr.dtype.element_ty), mask=inside)


def adamw_fused(
    c: AdamW, steps: Tensor, rates: Tensor, gradient: Tensor, values: Tensor, live: Tensor, first: Tensor | None,
    second: Tensor,
) -> Tensor:  # fmt: skip
    """20 bytes a number (28 with a first moment): at 8.4 million numbers a document the time is that of memory."""
    (n, width), block, bias = values.shape, 1024, c.bias(steps).float()
    rows = rates, gradient.contiguous(), values, live, first, second
    adamw_kernel[(n * triton.cdiv(width, block),)](bias, *rows, width, *c, block, num_warps=4)
    return live


# --------------------------------------------------------------------------------------------------------------------
# 5. DATA: shards, packed micro-batches, and the validation text with its bytes
# --------------------------------------------------------------------------------------------------------------------
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER = 20240520, 1, 256


def read_shard(path: Path) -> np.ndarray:
    """The uint16 entries of a shard, mapped, not read. Raises ValueError naming file and fault."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER)
    if len(header) < SHARD_HEADER or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise ValueError(
            f"{path} is not a token shard (magic {SHARD_MAGIC}, version {SHARD_VERSION}): prepare it again"
        )
    want, got = 4 * SHARD_HEADER + 2 * int(header[2]), path.stat().st_size
    if want != got:
        raise ValueError(
            f"{path} has {got} bytes, its header promises {want}: it is cut short or damaged, copy it again"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * SHARD_HEADER) if header[2] else np.empty(0, "<u2")


def first_document(shard: np.ndarray) -> int:
    """Where the first document of a shard starts: 0 when it holds no BOS. Reads little further than that."""
    for at in range(0, len(shard), 1 << 16):
        if len(found := np.flatnonzero(shard[at : at + (1 << 16)] == BOS)):
            return at + int(found[0])
    return 0


def usable_tokens(path: Path) -> int:
    """Tokens from a shard's first document on. Raises as read_shard."""
    shard = read_shard(path)
    return len(shard) - first_document(shard)


def _shards(cfg: Config, pattern: str) -> list[Path]:
    return sorted(cfg.shard_dir.glob(pattern))


def train_files(cfg: Config) -> list[Path]:
    return _shards(cfg, "fineweb_train_*.bin")


def train_fingerprint(cfg: Config) -> list[tuple[str, int]]:
    """What decides which text a step reads: name and bytes of every training shard."""
    return [(p.name, p.stat().st_size) for p in train_files(cfg)]


def val_files(cfg: Config) -> list[Path]:
    return [p for p in _shards(cfg, "fineweb_val_*.bin") if "_bytes_" not in p.name]


def sidecar_files(cfg: Config) -> list[Path]:
    return _shards(cfg, "fineweb_val_bytes_*.bin") if cfg.caseops_enabled else []


def pack_boundaries(tokens: np.ndarray, piece: int, capacity: int) -> np.ndarray:
    """cu_seqlens (int32) of a row: documents from their BOS, cut every `piece` tokens, padded with len(tokens).

    The length is `capacity`, doubled until the boundaries fit, so that kernels see one shape.
    """
    starts = np.union1d(np.flatnonzero(tokens == BOS), [0])
    ends = np.append(starts[1:], len(tokens))
    edges = np.concatenate([np.arange(a, b, piece) for a, b in zip(starts, ends, strict=True)])
    return padded_edges(edges, len(tokens), capacity)


def padded_edges(edges: np.ndarray, total: int, capacity: int) -> np.ndarray:
    while capacity < len(edges) + 1:
        capacity *= 2
    return np.append(edges, np.full(capacity - len(edges), total)).astype(np.int32)


def boundary_capacity(row_tokens: int) -> int:
    """Room for documents of 256 tokens on average: a power of two, at least 64."""
    return max(64, 1 << max(row_tokens // 256 - 1, 1).bit_length())


def host_row(tokens: np.ndarray, piece: int, pin: bool = False, edges: np.ndarray | None = None) -> tuple[Tensor, Docs]:
    """n+1 tokens -> an int32 row of them and the boundaries of the first n; page-locked if asked for.

    The boundaries are `edges`, of sequences no longer than `piece`, or else those of the documents.
    """
    n, row = len(tokens) - 1, torch.from_numpy(tokens.astype(np.int32))
    room = boundary_capacity(n)
    cu = pack_boundaries(tokens[:-1], piece, room) if edges is None else padded_edges(edges, n, room)
    cu = torch.from_numpy(cu)
    return (row.pin_memory(), Docs(cu.pin_memory(), piece)) if pin else (row, Docs(cu, piece))


def sent_row(row: Tensor, docs: Docs, device: torch.device) -> tuple[Tensor, Tensor, Docs]:
    """A host row -> inputs (1, n), targets (1, n) and boundaries on the device; does not wait if it is page-locked.

    One copy of int32 serves both: a quarter of the bytes of two copies of int64, into which the device widens it.
    """
    row, cu = row.to(device, non_blocking=True), docs.cu_seqlens.to(device, non_blocking=True)
    return row[None, :-1].long(), row[None, 1:].long(), docs._replace(cu_seqlens=cu)


def packed_row(
    tokens: np.ndarray, piece: int, device: torch.device, edges: np.ndarray | None = None
) -> tuple[Tensor, Tensor, Docs]:
    """n+1 tokens -> inputs (1, n), targets (1, n) and the boundaries of the inputs, on the device."""
    return sent_row(*host_row(tokens, piece, device.type == "cuda", edges), device)


SLOW_DATA_SECONDS = 5.0  # of waiting for training data are worth a line


class TrainLoader:
    """Packed micro-batches in stream order, the same text in step k for any number of ranks.

    Shards are read in sorted order, cyclically, each from its first BOS; a step takes MICRO_STEPS consecutive spans of
    micro_batch_tokens + 1 tokens, of which micro-batch m * world + rank is this rank's. A tail shorter than a step is
    dropped, and so is a shard shorter than that. The order is a function of the step alone: all that a resume needs is
    `start_step`.
    """

    def __init__(self, cfg: Config, run: Run, start_step: int = 0):
        self.cfg, self.run = cfg, run
        self.files = [p for p in train_files(cfg) if usable_tokens(p) >= cfg.step_tokens]
        self.shards = [read_shard(p) for p in self.files]
        self.spans = itertools.islice(self._step_starts(), start_step, None)
        # Batches are prepared two steps ahead: the training loop never waits for reading, packing and page-locking, but
        # only queues copies.
        self.pool = ThreadPoolExecutor(max_workers=1)
        if run.device.type == "cuda":  # a new thread is on GPU 0, and page-locking would make a context there
            self.pool.submit(torch.cuda.set_device, run.device).result()
        self.ahead = [self._order() for _ in range(2)]
        self.waited, self.next_notice = 0.0, SLOW_DATA_SECONDS

    def _order(self) -> tuple[Path, Future]:
        span = next(self.spans)
        return self.files[span[0]], self.pool.submit(self._prepare, span)

    def _step_starts(self) -> Iterator[tuple[int, int]]:
        need = self.cfg.step_tokens
        first = [first_document(s) for s in self.shards]
        while self.shards:
            for i, shard in enumerate(self.shards):
                for at in range(first[i], len(shard) - need + 1, need):
                    yield i, at

    def _prepare(self, span: tuple[int, int]) -> list[tuple[Tensor, Docs]]:
        i, at = span
        text = np.array(self.shards[i][at : at + self.cfg.step_tokens])  # all of the step: ranks see the same faults
        if not IS_SUBMISSION and (most := int(text.max())) >= self.cfg.vocab_size:
            fault = f"token {most}, outside VOCAB_SIZE={self.cfg.vocab_size}: it is damaged, copy it again"
            raise Stop(f"{self.files[i]} holds {fault}")
        n, piece, pin = self.cfg.micro_batch_tokens, self.cfg.train_seq_len, self.run.device.type == "cuda"
        mine = range(self.run.rank, MICRO_STEPS, self.run.world)
        return [host_row(text[j * (n + 1) :][: n + 1], piece, pin) for j in mine]

    def next_step(self) -> Iterator[tuple[Tensor, Tensor, Docs]]:
        """This rank's micro-batches of the next optimizer step, on the device."""
        path, rows = self.ahead.pop(0)
        if not IS_SUBMISSION:
            self._wait(path, rows)
        self.ahead.append(self._order())
        return (sent_row(*r, self.run.device) for r in rows.result())

    def _wait(self, path: Path, rows: Future) -> None:
        """Says so when all waits together have taken some seconds, twice as many, ...: while it waits, too."""
        began = time.monotonic() - self.waited
        while not wait_for([rows], max(began + self.next_notice - time.monotonic(), 0)).done:
            slow = f"waited {self.next_notice:.0f} s for training data so far, now for {path}: reading is too slow"
            if self.run.main:
                self.run.log(slow)
            else:  # the others wait for this rank, and only it knows why
                print(f"rank {self.run.rank}: {slow}", file=sys.stderr, flush=True)
            self.next_notice *= 2
        self.waited = time.monotonic() - began

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def calibration_batches(cfg: Config, run: Run) -> Iterator[Tensor]:
    """Random training windows (rows, train_seq_len) of this rank's share of the calibration batches.

    One generator draws all windows without repetition from all shards, so that the set does not depend on the ranks.
    """
    shards, length = [read_shard(p) for p in train_files(cfg)], cfg.train_seq_len
    rows = max(cfg.micro_batch_tokens // length, 1)
    rng = np.random.Generator(np.random.PCG64(0))
    phases = [int(rng.integers(min(length, max(len(s) - length, 1)))) for s in shards]
    counts = np.array([max(len(s) - p, 0) // length for s, p in zip(shards, phases, strict=True)])
    total, want = int(counts.sum()), rows * cfg.gptq_calibration_batches
    picks = rng.choice(total, size=want, replace=total < want)
    first = np.concatenate([[0], np.cumsum(counts)])
    for b in range(run.rank, cfg.gptq_calibration_batches, run.world):
        batch = []
        for pick in picks[b * rows : (b + 1) * rows]:
            i = int(np.searchsorted(first, pick, side="right")) - 1
            at = phases[i] + int(pick - first[i]) * length
            batch.append(shards[i][at : at + length].astype(np.int64))
        yield torch.from_numpy(np.stack(batch)).to(run.device)


class Document(NamedTuple):
    """A validation document: tokens[start : start + n_targets] are inputs, shifted by one they are the targets."""

    start: int
    n_targets: int


@dataclass(frozen=True)
class ValidationSet:
    """All validation tokens (uint16) and, aligned with them, the original UTF-8 bytes each one stands for (int64)."""

    tokens: np.ndarray
    token_bytes: np.ndarray

    @property
    def n_targets(self) -> int:
        return len(self.tokens) - 1

    @property
    def n_bytes(self) -> int:
        return int(self.token_bytes[1:].sum())

    def starts(self) -> np.ndarray:
        """Positions of the documents' first tokens; a BOS at the very end has no targets."""
        return np.union1d(np.flatnonzero(self.tokens == BOS), [0])

    def documents(self) -> list[Document]:
        """Every target belongs to exactly one document; the BOS that follows a document is its last target."""
        starts = self.starts()
        ends = np.append(starts[1:], self.n_targets)
        return [Document(int(a), int(b - a)) for a, b in zip(starts, ends, strict=True) if b > a]

    def fingerprint(self) -> dict[str, Any]:
        return {
            "val_sha256": hashlib.sha256(np.ascontiguousarray(self.tokens)).hexdigest(),
            "val_targets": self.n_targets,
            "val_documents": int((self.tokens == BOS).sum()),
            "val_bytes": self.n_bytes,
            "bytes_per_token": round(self.n_bytes / max(self.n_targets, 1), 6),
        }


def load_validation(cfg: Config) -> ValidationSet:
    """Tokens and byte counts. Raises Stop when they cannot belong together."""
    tokens = np.concatenate([read_shard(p) for p in val_files(cfg)])
    if not (tokens == BOS).any():
        raise Stop(f"the validation shards hold no document start (id {BOS}): prepare them again", 2)
    if int(tokens.max()) >= cfg.vocab_size:
        most = int(tokens.max())
        raise Stop(f"validation token {most} is outside VOCAB_SIZE={cfg.vocab_size}: set that of their tokenizer", 2)
    if len(tokens) < 2:
        raise Stop("the validation shards hold no target: prepare them from more text", 2)
    sp = load_tokenizer(cfg)
    marks = [i for i in range(sp.vocab_size()) if sp.id_to_piece(i) in CASEOPS_MARKS]
    if not cfg.caseops_enabled:
        if np.isin(tokens, marks).any():  # a table would count each mark as its three bytes: 9 % too many
            raise Stop("these are CaseOps shards, whose bytes are in the sidecar: set CASEOPS_ENABLED=1", 2)
        return ValidationSet(tokens, table_byte_counts(sp, tokens))
    counts = np.concatenate([read_shard(p) for p in sidecar_files(cfg)]).astype(np.int64)
    marked = counts[np.isin(tokens, marks)]
    if len(marked) and (marked > 0).mean() > 0.01:
        raise Stop(
            "the byte sidecar counts CaseOps marks as text, which inflates the bytes: prepare the shards again", 2
        )
    return ValidationSet(tokens, counts)


CASEOPS_MARKS = (
    "\ue001",
    "\ue002",
    "\ue003",
    "\ue004",
)  # title, all caps, capital next, escape: they stand for no byte


def silent_tokens(sp: Any) -> np.ndarray:
    """Whether each token stands for no text at all."""
    return np.array([sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i) for i in range(sp.vocab_size())])


def own_bytes(sp: Any) -> np.ndarray:
    """Bytes of each token without a leading space."""
    pieces = [sp.id_to_piece(i) for i in range(sp.vocab_size())]
    own = [1 if sp.is_byte(i) else len(p.removeprefix("\u2581").encode()) for i, p in enumerate(pieces)]
    return np.where(silent_tokens(sp), 0, own)


def table_byte_counts(sp: Any, tokens: np.ndarray) -> np.ndarray:
    """Bytes of each token of a plain SentencePiece stream: a leading space counts unless a document starts there."""
    silent = silent_tokens(sp)
    spaced = np.array([sp.id_to_piece(i).startswith("\u2581") for i in range(sp.vocab_size())]) & ~silent
    after_text = np.append(False, ~silent[tokens[:-1]])
    return own_bytes(sp)[tokens].astype(np.int64) + (spaced[tokens] & after_text)


# --------------------------------------------------------------------------------------------------------------------
# 6. MODEL: a precomputed order of visits, two halves of a block, one forward for everything
# --------------------------------------------------------------------------------------------------------------------
class Visit(NamedTuple):
    """One step of the trunk."""

    layer: int
    two_lane: bool  # attention and MLP on lanes of their own
    save_skip: bool  # keep the output for a U-net skip
    skip: int | None  # slot of the skip merged before this visit
    again: int  # earlier visits to the same layer


def plan_depth(n_layers: int, loops: int, start: int, end: int, lanes_from: int) -> tuple[Visit, ...]:
    """The order in which layers run: start..end passed 1 + loops times, first half encoder, second half decoder.

    Decoder step k takes the latest kept encoder output; lanes exist in the decoder from layer `lanes_from` (0: never).

    Other bands have no public result that holds: layers 3 to 6 (#1678) were never scored, and what is quoted of #1726's
    sweep over 570 steps, +0.006 to +0.163 bpb, was taken after a quantization that cost 0.18; before it four bands and
    an earlier onset lost 0.0045 to 0.0304.
    """
    looped = list(range(start, end + 1)) * loops
    order = [*range(min(end + 1, n_layers)), *looped, *range(end + 1, n_layers)]
    half = len(order) // 2
    return tuple(
        Visit(
            layer, at >= half and 0 < lanes_from <= layer, at < half, at - half if half <= at < 2 * half else None,
            order[:at].count(layer),
        )
        for at, layer in enumerate(order)
    )  # fmt: skip


# ---- blocks: the specification ---------------------------------------------------------------------------------------
class Deltas(NamedTuple):
    """What test-time training adds in one visit: low-rank pairs A (N, R, in), B (N, out, R), one per document."""

    q: tuple[Tensor, Tensor] | None = None
    k: tuple[Tensor, Tensor] | None = None
    v: tuple[Tensor, Tensor] | None = None
    attn_bypass: tuple[Tensor, Tensor] | None = None  # from the attention input to its scaled output
    mlp_bypass: tuple[Tensor, Tensor] | None = None  # from the MLP input to its scaled output
    narrow: tuple[Tensor, Tensor] | None = None  # to the narrow gates' logits, where these read the queries


NO_DELTAS = Deltas()
Tap = Callable[[str, Tensor], None]


def low_rank(x: Tensor, delta: tuple[Tensor, Tensor] | None) -> Tensor | float:
    """x (N, T, in) -> B A x (N, T, out) of each document, or 0."""
    if delta is None:
        return 0.0
    a, b = delta
    return (x @ a.mT) @ b.mT


class LayerWeights(NamedTuple):
    """Everything a visit to one layer reads, matrices in the compute dtype: a block is a pure function of these.

    The other weights are in float32: as bfloat16 each visit would have to cast its sums for their gradients.
    The scales of what attention and MLP write are folded into the matrices that write it: W_o and W_down have D rows,
    the stream has one per token.
    """

    mix: Tensor  # (2, D): weights of the residual stream and of the embedding
    q_gain: Tensor  # (H,)
    qkv: Tensor  # (D + 2 G K + gates, D): rows of queries, keys, values and of the head gates there are
    wo: Tensor  # (D, D), times attn_scale
    up: Tensor  # (F, D)
    down: Tensor  # (D, F), times mlp_scale
    post: Tensor | None  # (2, 2), where there are lanes: what attention and MLP (rows) add to them (columns)
    keep: Tensor | None  # (2,): what they keep of themselves


class Layer(NamedTuple):
    """The constants of one layer."""

    heads: int
    kv_heads: int
    head_dim: int
    depth_scale: float  # of the normed input: 1 / sqrt(layer + 1)
    exclude_own_value: bool
    gated: bool  # a gate sigmoid(z) for each head
    narrow: bool  # a gate 2 sigmoid(z) for each head, from few channels
    activation: Xielu | None  # None: the leaky square

    @property
    def columns(self) -> tuple[int, int, int, int]:
        """Where keys, values, gates and narrow gates begin in a row of the merged projection; queries begin at 0."""
        keys, width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return keys, keys + width, keys + 2 * width, keys + 2 * width + (self.heads if self.gated else 0)


def exclude_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Removes from each head's output its component along the token's own value: y (B, T, H, K), v (B, T, G, K)."""
    y = y.unflatten(2, (v.size(2), -1))
    own = F.normalize(v, dim=-1).unsqueeze(3)  # (B, T, G, 1, K)
    return (y - (y * own).sum(-1, keepdim=True) * own).flatten(2, 3)


def rotary_tables(
    cfg: Config, length: int, dense: bool, device: torch.device, dtype: torch.dtype, first: int | Tensor = 0
) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (T, 1, rope_dims / 2), of the positions from `first` on (arXiv 2104.09864)."""
    base = cfg.rope_base
    if cfg.rope_yarn and dense and length > cfg.train_seq_len:
        base *= (length / cfg.train_seq_len) ** (cfg.rope_dims / (cfg.rope_dims - 2))
    frequencies = base ** (-torch.arange(0, cfg.rope_dims, 2, device=device, dtype=torch.float32) / cfg.rope_dims)
    places = first + torch.arange(length, device=device, dtype=torch.float32)
    angles = torch.outer(places, frequencies)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the first dimensions of each head, as (first half, second half) pairs; the others pass."""
    cos, sin = rope
    half = cos.size(-1)
    x1, x2, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest), dim=-1)


AHEAD = 2  # tokens that a vector of the embedding may depend on beside its own: SmearGate reads BigramHash's


class Cache:
    """Keys and values that all visits have made of the last `room` tokens of each of N documents, without gradient.

    A ring that runs backwards: position p lies at room - 1 - p mod room. So what there is ends where the chunk's own
    keys and values, in the places behind it, begin, and a token sees one range of them; attention knows no order but
    that of the rotation. All stays in place, as CUDA graphs need it, the number of tokens so far on the device, too.
    """

    def __init__(self, cfg: Config, n_visits: int, dtype: torch.dtype = torch.float32, device: Any = "cpu"):
        self.room, self.chunk = cfg.ttt_eval_seq_len - cfg.ttt_chunk_size, cfg.ttt_chunk_size
        self.shape = self.room + self.chunk, cfg.num_kv_heads, cfg.head_dim
        self.all = self.held = torch.empty(n_visits, 2, 0, *self.shape, dtype=dtype, device=device)
        self.seen, self.place = 0, torch.zeros((), dtype=torch.int32, device=device)

    def make_room(self, n_docs: int) -> None:
        """For up to `n_docs` documents."""
        self.all = self.held = self.all[:, :, :0].clone()  # first what there was goes: both may not fit
        self.all = self.all.new_empty(*self.all.shape[:2], n_docs, *self.shape)

    def restart(self, n_docs: int) -> None:
        """`n_docs` documents that have not begun."""
        if n_docs > self.all.size(2):
            self.make_room(n_docs)
        self.held, self.seen = self.all[:, :, :n_docs], 0
        self.held.zero_()  # what is masked may not be NaN
        self.place.zero_()

    @property
    def n_kept(self) -> int:
        return min(self.seen, self.room)

    @property
    def unused(self) -> Tensor:
        """Places of the ring that hold nothing yet, on the device."""
        return self.room - self.place.clamp_max(self.room)

    def pasts(self) -> list[Past]:
        return [Past(self, visit) for visit in range(len(self.all))]

    def commit(self) -> None:
        """The chunk's own become the latest of the ring."""
        n = min(self.chunk, self.room)
        slots = self.room - 1 - (self.place + torch.arange(self.chunk - n, self.chunk, device=self.place.device)) % max(
            self.room, 1
        )
        self.held[:, :, :, slots] = self.held[:, :, :, self.room + self.chunk - n :].clone()
        self.seen += self.chunk
        self.place += self.chunk

    def keep(self, rows: Tensor) -> None:
        """Goes on with these documents alone."""
        self.all[:, :, : len(rows)] = self.held[:, :, rows]
        self.held = self.all[:, :, : len(rows)]

    def row(self, i: int) -> Cache:
        """A copy of what one document has."""
        alone = copy.copy(self)
        alone.held = self.held[:, :, i : i + 1].clone()
        return alone


class Past(NamedTuple):
    """What one visit has in a cache."""

    cache: Cache
    visit: int

    @property
    def n_docs(self) -> int:
        return self.cache.held.size(2)

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The ring, then the chunk's own keys and values (N, T, G, K), which are put there."""
        held = self.cache.held[self.visit]
        for whole, own in zip(held, (k, v), strict=True):
            whole[:, self.cache.room :].copy_(own.detach())
        return tuple(held)

    def whole(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """All of it, used or not, for k and v (N T, G, K)."""
        return tuple(t.flatten(0, 1) for t in self.write(*(t.unflatten(0, (self.n_docs, -1)) for t in (k, v))))

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """What there is and the chunk's own, with their gradients."""
        used = slice(self.cache.room - self.cache.n_kept, self.cache.room)
        held = self.write(k, v)
        return tuple(torch.cat((t[:, used], own), 1) for t, own in zip(held, (k, v), strict=True))


class Context(NamedTuple):
    """What the visits of one forward pass share, and the past of this one."""

    rope: tuple[Tensor, Tensor]
    docs: Docs | None
    attention: Any  # the attention of the chosen kernels
    past: Past | None = None
    echo: Callable[[Tensor], Tensor] | None = None  # what a switch makes of the heads' outputs (B, T, H, K)
    fp8: Float8Weights = Float8Weights()


def matmul(x: Tensor, weight: Tensor, site: str, tap: Tap | None) -> Tensor:
    """The one place where activations meet bank weights."""
    if tap is not None:
        tap(site, x)
    return F.linear(x, weight)


def attend(n: Tensor, w: LayerWeights, layer: Layer, ctx: Context, deltas: Deltas, tap: Tap | None) -> Tensor:
    """The attention half of a block. n (B, T, D), normed -> (B, T, D)."""
    merged = matmul(n, w.qkv, "attn_in", tap)
    q, k, v, gates, narrow = merged.tensor_split(layer.columns, dim=-1)
    q, k, v = q + low_rank(n, deltas.q), k + low_rank(n, deltas.k), v + low_rank(n, deltas.v)
    q, k, v = (t.unflatten(-1, (-1, layer.head_dim)) for t in (q, k, v))  # (B, T, heads, K)
    q, k = (rotate(rms(q), ctx.rope) * w.q_gain[:, None]).to(v.dtype), rotate(rms(k), ctx.rope)
    if ctx.docs is None or ctx.past:
        y = dense_attention(q, *(ctx.past.extend(k, v) if ctx.past else (k, v)))
    else:
        y = ctx.attention(*(t.flatten(0, 1) for t in (q, k, v)), ctx.docs).view_as(q)
    if layer.exclude_own_value:
        y = exclude_own_value(y, v)
    if ctx.echo is not None:
        y = ctx.echo(y)
    if layer.narrow:
        y = y * (2 * (narrow + low_rank(n, deltas.narrow)).sigmoid()).unsqueeze(-1)
    if layer.gated:
        y = y * gates.sigmoid().unsqueeze(-1)
    return matmul(y.flatten(2), w.wo, "attn_out", tap) + low_rank(n, deltas.attn_bypass)


def feed(n: Tensor, w: LayerWeights, layer: Layer, deltas: Deltas, tap: Tap | None) -> Tensor:
    """The MLP half of a block. n (B, T, D), normed -> (B, T, D)."""
    hidden = (layer.activation or leaky_square)(matmul(n, w.up, "mlp_in", tap))
    return matmul(hidden, w.down, "mlp_out", tap) + low_rank(n, deltas.mlp_bypass)


def serial_block(
    x: Tensor, x0: Tensor, w: LayerWeights, layer: Layer, ctx: Context, deltas: Deltas, tap: Tap | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention, then MLP, on one residual stream; the mix with the embedding x0 becomes the stream.

    x and x0 come back as they are: on that way a fused block adds its gradients to those of their later readers.
    """
    u = mix(x, x0, w.mix)
    u = u + attend(rms(u) * layer.depth_scale, w, layer, ctx, deltas, tap)
    return u + feed(rms(u) * layer.depth_scale, w, layer, deltas, tap), x, x0


def two_lane_block(
    x: Tensor, lane: Tensor, x0: Tensor, w: LayerWeights, layer: Layer, ctx: Context, deltas: Deltas, tap: Tap | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention reads x (mixed with x0) and MLP reads `lane`, both from before the block; both write to both."""
    a = attend(rms(mix(x, x0, w.mix)) * layer.depth_scale, w, layer, ctx, deltas, tap)
    b = feed(rms(lane) * layer.depth_scale, w, layer, deltas, tap)
    return *update_lanes(x, lane, a, b, w.keep, w.post), x0


# ---- blocks: fused ---------------------------------------------------------------------------------------------------
# The same two halves as forward and backward functions over tensors, and a block of either kind as one autograd
# function made of them. Between the matrix products every stream is read and written once; the projections that write
# to the residual stream add to it in their epilogue, where it is not needed for backward: the norm's gradient comes
# from its output. In training a micro-batch is one CUDA graph (`GraphedMicroBatch`), where that is possible; all else
# runs eagerly.
class BlockCall(NamedTuple):
    """The inputs of a fused block that are no tensors."""

    layer: Layer
    ctx: Context
    tap: Tap | None = None

    def see(self, site: str, x: Tensor) -> None:
        """As `matmul` does."""
        if self.tap is not None:
            self.tap(site, x)


def _low_rank_forward(target: Tensor, x: Tensor, delta: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """target += B A x in place, all (N, T, .); returns A x for backward."""
    if delta is None:
        return None
    z = torch.bmm(x, delta[0].mT)
    target.baddbmm_(z, delta[1].mT)
    return z


def _low_rank_targets(merged: Tensor, deltas: Deltas, layer: Layer) -> tuple[list[Tensor], list[Any]]:
    """Queries, keys, values and narrow gates of the merged projection (..., W), and what is added to each."""
    q, k, v, _, narrow = merged.tensor_split(layer.columns, dim=-1)
    return [q, k, v, narrow], [*deltas[:3], deltas.narrow]


def _low_rank_backward(
    grad: Tensor, x: Tensor, z: Tensor | None, delta: tuple[Tensor, Tensor] | None, dx: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of A and B; that of x is added to dx in place."""
    if delta is None:
        return None, None
    dz = torch.bmm(grad, delta[1])
    dx.baddbmm_(dz, delta[0])
    return torch.bmm(dz.mT, x), torch.bmm(grad.mT, z)


def _attend_forward(
    x: Tensor, x0: Tensor, w: LayerWeights, call: BlockCall, deltas: Deltas, residual: bool, train: bool
) -> tuple[Tensor, list[Tensor | None], Any]:
    """Mix, norm and attention half -> u + a (residual) or a, and what backward needs: less when no weight trains."""
    layer, ctx, _ = call
    n8 = torch.empty_like(x, dtype=FLOAT8) if ctx.fp8.qkv else None
    u, n, rstd = mix_norm_forward(x, x0, w.mix, layer.depth_scale, residual, n8)
    call.see("attn_in", n)
    merged = float8_product(n8, ctx.fp8.qkv, len(w.qkv), x.dtype) if ctx.fp8.qkv else F.linear(n, w.qkv)
    zs = [_low_rank_forward(p, n, d) for p, d in zip(*_low_rank_targets(merged, deltas, layer), strict=True)]
    q, k, heads_rstd = prepare_forward(merged, w.q_gain, ctx.rope, layer, ctx.attention)
    v, _ = head_columns(merged, layer)
    out, state = ctx.attention.forward(q, k, v, ctx.docs, ctx.past)
    y = gate_forward(out, merged, layer)
    call.see("attn_out", y)
    a = F.linear(y, w.wo) if u is None else u.flatten(0, -2).addmm_(y.flatten(0, -2), w.wo.t()).view_as(x)
    zs.append(_low_rank_forward(a, n, deltas.attn_bypass))
    return a, [n, rstd, merged, heads_rstd, out, y if train else None, *zs], state


def _attend_backward(
    grad: Tensor, saved: Sequence[Tensor | None], state: Any, w: LayerWeights, call: BlockCall, deltas: Deltas,
    train_weights: bool,
) -> tuple[Tensor, dict[str, Tensor], Deltas]:  # fmt: skip
    """-> gradient of n, of the weights by name, of the deltas of attention."""
    (layer, ctx, _), (n, _, merged, heads_rstd, out, y, *zs) = call, saved
    d_merged = torch.empty_like(merged)
    d_out, delta = gate_backward(grad @ w.wo, out, merged, d_merged, layer)
    raw = RawHeads(merged, d_merged, heads_rstd, w.q_gain, ctx.rope, layer)
    d_gain = ctx.attention.backward_raw(d_out, out, delta, state, ctx.docs, raw)
    dn = d_merged @ w.qkv
    parts, pairs = _low_rank_targets(d_merged, deltas, layer)
    rows = zip((*parts, grad), zs, (*pairs, deltas.attn_bypass), strict=True)
    d_q, d_k, d_v, d_narrow, d_bypass = (_low_rank_backward(p, n, z, d, dn) for p, z, d in rows)
    d_deltas = Deltas(d_q, d_k, d_v, d_bypass, narrow=d_narrow)
    grads = {}
    if train_weights:
        grads = dict(qkv=_outer(d_merged, n), wo=_outer(grad, y), q_gain=d_gain)
    return dn, grads, d_deltas


def _feed_forward(
    x: Tensor, w: LayerWeights, call: BlockCall, deltas: Deltas, residual: bool, train: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Norm and MLP half -> x + b, written over x (residual), or b, and what backward needs."""
    (layer, ctx, _), n8, up = call, None, [w.up, call.layer.activation]
    if ctx.fp8.up:
        n8, (codes, scale, _) = torch.empty_like(x, dtype=FLOAT8), ctx.fp8.up
        up = [codes[: len(w.up)], layer.activation, scale, x.dtype]
    _, n, rstd = mix_norm_forward(x, None, None, layer.depth_scale, False, n8)
    call.see("mlp_in", n)
    kept, act = up_leaky((n if n8 is None else n8).flatten(0, -2), *up)
    call.see("mlp_out", act)
    flat = x.flatten(0, -2)
    b = flat.addmm_(act, w.down.t()) if residual else F.linear(act, w.down)
    b = b.view_as(x)
    return b, [n, rstd, kept, act if train else None, _low_rank_forward(b, n, deltas.mlp_bypass)]


def _feed_backward(
    grad: Tensor, saved: Sequence[Tensor | None], w: LayerWeights, call: BlockCall, deltas: Deltas, train_weights: bool
) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor | None, Tensor | None]]:
    """-> gradient of n, of the weights by name, of the bypass."""
    n, _, kept, act, z = saved
    up8, factor = call.ctx.fp8.up_transposed, float8_gradient_factor(len(kept))
    d_pre, d_pre8 = down_leaky(grad.flatten(0, -2), w.down, kept, call.layer.activation, factor if up8 else 0.0)
    dn = (float8_product(d_pre8, up8, n.size(-1), n.dtype) if up8 else d_pre @ w.up).view_as(n)
    d_delta = _low_rank_backward(grad, n, z, deltas.mlp_bypass, dn)
    grads = dict(up=_outer(d_pre, n), down=_outer(grad, act)) if train_weights else {}
    return dn, grads, d_delta


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient (out, in) of a matrix from those of its outputs and its inputs."""
    return grad.flatten(0, -2).t() @ x.flatten(0, -2)


def _unflatten(tensors: Sequence[Tensor | None]) -> tuple[LayerWeights, Deltas]:
    n = len(LayerWeights._fields)
    pairs = zip(tensors[n::2], tensors[n + 1 :: 2], strict=True)
    return LayerWeights(*tensors[:n]), Deltas(*(None if a is None else (a, b) for a, b in pairs))


def _flatten(w: Iterable[Tensor | None], deltas: Deltas) -> list[Tensor | None]:
    return [*w, *(t for pair in deltas for t in (pair or (None, None)))]


def _flatten_gradients(grads: Mapping[str, Tensor], deltas: Deltas) -> list[Tensor | None]:
    """In the order of `_flatten`; None for a weight without one."""
    return _flatten((grads.get(name) for name in LayerWeights._fields), deltas)


N_ATTEND, N_FEED = 11, 5  # tensors that the two halves save


class FusedSerial(torch.autograd.Function):
    """`serial_block`."""

    @staticmethod
    def forward(ctx, call, x, x0, *tensors):
        w, deltas = _unflatten(tensors)
        ctx.call, ctx.train = call, w.qkv.requires_grad  # the weights learn together
        u, attend_saved, ctx.state = _attend_forward(x, x0, w, call, deltas, True, ctx.train)
        out, feed_saved = _feed_forward(u, w, call, deltas, True, ctx.train)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, x0, *attend_saved, *feed_saved, *tensors)
        return out, x, x0

    @staticmethod
    def backward(ctx, grad, gx, g0):
        x, x0, *saved = ctx.saved_tensors
        w, deltas = _unflatten(saved[N_ATTEND + N_FEED :])
        attend_saved, feed_saved = saved[:N_ATTEND], saved[N_ATTEND:][:N_FEED]
        want = ctx.needs_input_grad[1:3]
        train, scale, grad = ctx.train, ctx.call.layer.depth_scale, grad.contiguous()
        dn, grads, d_mlp = _feed_backward(grad, feed_saved, w, ctx.call, deltas, train)
        du, _, _ = mix_norm_backward(dn, *feed_saved[:2], scale, NormGradients(carry=grad))
        dn, more, d_attend = _attend_backward(du, attend_saved, ctx.state, w, ctx.call, deltas, train)
        dx, dx0, d_mix = mix_norm_backward(
            dn, *attend_saved[:2], scale, NormGradients(g=du, carry=gx, g0=g0), w.mix,
            inputs=(x, x0) if train else None, want=want,
        )  # fmt: skip
        grads |= more | dict(mix=d_mix)
        return None, dx, dx0, *_flatten_gradients(grads, d_attend._replace(mlp_bypass=d_mlp))


class FusedTwoLane(torch.autograd.Function):
    """`two_lane_block`."""

    @staticmethod
    def forward(ctx, call, x, lane, x0, *tensors):
        w, deltas = _unflatten(tensors)
        ctx.call, ctx.train = call, w.qkv.requires_grad  # the weights learn together
        a, attend_saved, ctx.state = _attend_forward(x, x0, w, call, deltas, False, ctx.train)
        b, feed_saved = _feed_forward(lane, w, call, deltas, False, ctx.train)
        new_x, new_lane = lanes_forward(x, lane, a, b, w.keep, w.post)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, lane, x0, a, b, *attend_saved, *feed_saved, *tensors)
        return new_x, new_lane, x0

    @staticmethod
    def backward(ctx, gx, gl, g0):
        x, lane, x0, a, b, *saved = ctx.saved_tensors
        w, deltas = _unflatten(saved[N_ATTEND + N_FEED :])
        attend_saved, feed_saved = saved[:N_ATTEND], saved[N_ATTEND:][:N_FEED]
        want, train, scale = ctx.needs_input_grad[1:4:2], ctx.train, ctx.call.layer.depth_scale
        gx, gl = (torch.zeros_like(x) if g is None else g.contiguous() for g in (gx, gl))
        da, db, d_keep, d_post = lanes_backward(gx, gl, x, lane, a, b, w.post)
        dn, grads, d_mlp = _feed_backward(db, feed_saved, w, ctx.call, deltas, train)
        d_lane, _, _ = mix_norm_backward(dn, *feed_saved[:2], scale, NormGradients(carry=gl, keep=w.keep[1:]))
        dn, more, d_attend = _attend_backward(da, attend_saved, ctx.state, w, ctx.call, deltas, train)
        dx, dx0, d_mix = mix_norm_backward(
            dn, *attend_saved[:2], scale, NormGradients(carry=gx, keep=w.keep, g0=g0), w.mix,
            inputs=(x, x0) if train else None, want=want,
        )  # fmt: skip
        grads |= more | dict(mix=d_mix, keep=d_keep, post=d_post)
        return None, dx, d_lane, dx0, *_flatten_gradients(grads, d_attend._replace(mlp_bypass=d_mlp))


def serial_block_fused(
    x: Tensor, x0: Tensor, w: LayerWeights, layer: Layer, ctx: Context, deltas: Deltas, tap: Tap | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`serial_block` by `FusedSerial`, which has no echoes."""
    if ctx.echo is not None:
        return serial_block(x, x0, w, layer, ctx, deltas, tap)
    return FusedSerial.apply(BlockCall(layer, ctx, tap), x, x0, *_flatten(w, deltas))


def two_lane_block_fused(
    x: Tensor, lane: Tensor, x0: Tensor, w: LayerWeights, layer: Layer, ctx: Context, deltas: Deltas, tap: Tap | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`two_lane_block` by `FusedTwoLane`, which has no echoes."""
    if ctx.echo is not None:
        return two_lane_block(x, lane, x0, w, layer, ctx, deltas, tap)
    return FusedTwoLane.apply(BlockCall(layer, ctx, tap), x, lane, x0, *_flatten(w, deltas))


class Kernels(NamedTuple):
    """The functions that a device runs: a row is a specification unless the chooser says otherwise."""

    attention: PackedAttention = ATTENTION_KINDS["sdpa"]
    serial: Callable[..., tuple[Tensor, Tensor, Tensor]] = serial_block
    two_lane: Callable[..., tuple[Tensor, Tensor, Tensor]] = two_lane_block
    merge: Callable[..., Tensor] = mix
    mean_norm: Callable[..., Tensor] = mean_norm
    loss: Callable[..., Tensor] = softcapped_loss
    adamw: Callable[..., Tensor] = adamw
    fused: bool = False
    why: str = "specification"


SPEC = Kernels()
FUSED = Kernels(
    serial=serial_block_fused, two_lane=two_lane_block_fused, merge=FusedMerge.apply, mean_norm=FusedMeanNorm.apply,
    loss=softcapped_loss_fused, adamw=adamw_fused, fused=True,
)  # fmt: skip


def choose_kernels(cfg: Config, device: torch.device) -> Kernels:
    """The fastest kernels that this device and these packages allow, with the reason."""
    if cfg.kernels == "spec" or device.type == "cpu" or cfg.compute_dtype == "float32":
        kind = "sdpa" if cfg.attention == "auto" else cfg.attention
        return SPEC._replace(attention=ATTENTION_KINDS[kind], why=f"attention {kind}, plain PyTorch")
    kind, why = cfg.attention, "asked for"
    if kind == "auto":
        kind, why = best_attention(cfg, hopper(device))
    if triton is None:
        return SPEC._replace(attention=ATTENTION_KINDS[kind], why=f"attention {kind} ({why}), plain PyTorch: no triton")
    return FUSED._replace(attention=ATTENTION_KINDS[kind], why=f"attention {kind} ({why}), fused blocks")


def hopper(device: torch.device) -> bool:
    """Whether this is a Hopper GPU or a later one, with a copy engine for tiles."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def best_attention(cfg: Config, on_hopper: bool) -> tuple[str, str]:
    """A kind and the reason."""
    if on_hopper and triton is not None and TritonAttention.fits(cfg):
        return "triton", "our own"
    for name in ("fa3", "fa4"):
        if on_hopper and not cfg.deterministic and importable(ATTENTION_MODULES[name]):
            return name, f"{ATTENTION_MODULES[name]} found"
    return "varlen", "deterministic" if cfg.deterministic else "no FlashAttention-3 or -4 found"


def importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except (ImportError, OSError, AttributeError):  # a broken build is as good as none
        return False
    return True


class Attention(nn.Module):
    """The parameters of one layer's attention that are not in the banks."""

    def __init__(self, cfg: Config, gain: float):
        super().__init__()
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), gain))
        if cfg.gated_attn_enabled:
            self.attn_gate_w = nn.Parameter(torch.empty(cfg.num_heads, cfg.model_dim))
            nn.init.normal_(self.attn_gate_w, std=cfg.gated_attn_init_std)
        if cfg.attn_out_gate_enabled:
            # Without random numbers, so that all else begins as it does without the gate. The public script drew some.
            self.attn_gate_proj = nn.utils.skip_init(nn.Linear, cfg.gate_window, cfg.num_heads, bias=False)
            nn.init.zeros_(self.attn_gate_proj.weight)


class Block(nn.Module):
    """The parameters of one layer that are not in the banks."""

    def __init__(self, cfg: Config, gain: float):
        super().__init__()
        self.attn = Attention(cfg, gain)
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim))))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For many small matrices: QR by eight threads pinned to four cores took 100 s, by one thread elsewhere 0.7 s."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class GPT(nn.Module):
    """The language model of PR #1736: looped layers, U-net skips, two lanes at the end, gated attention, tied head.

    `looped` is how often the looped layers run again. Parameter names and shapes are the public checkpoint contract.
    """

    def __init__(
        self, cfg: Config, kernels: Kernels = SPEC, dtype: torch.dtype = torch.float32, initialize: bool = True
    ):
        super().__init__()
        self.cfg, self.kernels, self.dtype = cfg, kernels, dtype
        self.looped = False
        n_layers, d, kv = cfg.num_layers, cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
        args = (cfg.loop_start, cfg.loop_end, cfg.parallel_start_layer)
        self.plans = [plan_depth(n_layers, loops, *args) for loops in range(cfg.num_loops + 1)]
        self.tok_emb = nn.Embedding(cfg.vocab_size, d)
        self.qo_bank = nn.Parameter(torch.empty(2 * n_layers, d, d))  # queries of all layers, then outputs
        self.kv_bank = nn.Parameter(torch.empty(2 * n_layers, kv, d))  # keys, then values
        self.mlp_up_bank = nn.Parameter(torch.empty(n_layers, cfg.hidden_dim, d))
        self.mlp_down_bank = nn.Parameter(torch.empty(n_layers, d, cfg.hidden_dim))
        n_skips = sum(v.skip is not None for v in self.plans[-1])
        self.skip_weights = nn.Parameter(torch.ones(n_skips, d))
        if cfg.skip_gates_enabled:
            self.skip_gates = nn.Parameter(torch.zeros(n_skips, d))
        self.parallel_post_lambdas = nn.Parameter(torch.ones(n_layers, 2, 2))
        self.parallel_resid_lambdas = nn.Parameter(torch.full((n_layers, 2), 1.1))
        gains = cfg.qk_gains or [cfg.qk_gain_init] * n_layers
        self.blocks = nn.ModuleList(Block(cfg, gain) for gain in gains)
        self.layer_constants = [
            Layer(
                cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, (i + 1) ** -0.5 if cfg.ln_scale else 1.0,
                i >= n_layers - cfg.xsa_last_n, cfg.gated_attn_enabled, cfg.attn_out_gate_enabled,
                xielu_of(i, n_layers) if cfg.xielu_enabled else None,
            )
            for i in range(n_layers)
        ]  # fmt: skip
        if initialize:  # for nothing where a state dict is loaded next
            with one_thread():
                self.init_weights()
        self.switches = switches(cfg)
        with torch.random.fork_rng(devices=[]):
            for switch in self.switches:
                torch.manual_seed(cfg.seed)
                switch.build(self)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Embedding N(0, 0.005^2); projections that read the stream orthogonal, those that write to it zero."""
        n = self.cfg.num_layers
        nn.init.normal_(self.tok_emb.weight, std=self.cfg.tied_embed_init_std)
        for matrix in (*self.qo_bank[:n], *self.kv_bank, *self.mlp_up_bank):
            nn.init.orthogonal_(matrix)
        self.qo_bank[n:].zero_()
        self.mlp_down_bank.zero_()

    def place(self, device: torch.device) -> GPT:
        """Moves to the device with every parameter in the dtype of its role."""
        self.to(device)
        for name, p in self.named_parameters():
            p.data = p.data.to(self.dtype if role_of(name).dtype == "compute" else torch.float32)
        return self

    @property
    def looped(self) -> int:
        """Extra passes over the looped layers: 0 to NUM_LOOPS; set to True for all of them."""
        return self._looped

    @looped.setter
    def looped(self, passes: bool | int) -> None:
        self._looped = self.cfg.num_loops if passes is True else int(passes)

    @property
    def plan(self) -> tuple[Visit, ...]:
        return self.plans[self.looped]

    def layers(self) -> list[LayerWeights]:
        """The weights of each layer, cast and joined once per forward pass; every gradient is gathered once."""
        n, dtype = self.cfg.num_layers, self.dtype
        lanes_from = min(self.cfg.parallel_start_layer, n) if self.cfg.parallel_start_layer > 0 else n

        def stack(name: str) -> Tensor:
            return torch.stack([b.get_parameter(name) for b in self.blocks])

        queries, outputs = self.qo_bank.split(n)
        rows = [queries, *self.kv_bank.split(n)]
        if self.cfg.gated_attn_enabled:
            rows.append(stack("attn.attn_gate_w"))
        if self.cfg.attn_out_gate_enabled:  # reads the first channels of the normed stream, or of the queries
            narrow, window = stack("attn.attn_gate_proj.weight"), self.cfg.gate_window
            reads_input = self.cfg.attn_out_gate_src == "proj"
            rows.append(F.pad(narrow, (0, queries.size(-1) - window)) if reads_input else narrow @ queries[:, :window])
        columns = LayerWeights(
            mix=stack("resid_mix"),
            q_gain=stack("attn.q_gain"),
            qkv=torch.cat([r.to(dtype) for r in rows], dim=1),
            wo=(stack("attn_scale").unsqueeze(-1) * outputs).to(dtype),
            up=self.mlp_up_bank.to(dtype),
            down=(stack("mlp_scale").unsqueeze(-1) * self.mlp_down_bank).to(dtype),
            post=[*[None] * lanes_from, *self.parallel_post_lambdas[lanes_from:]],
            keep=[*[None] * lanes_from, *self.parallel_resid_lambdas[lanes_from:]],
        )
        return [LayerWeights(*row) for row in zip(*map(list, columns), strict=True)]

    def skip_mixes(self) -> tuple[Tensor, ...]:
        """Weights (2, D) of the stream and of the kept encoder output for each skip: gated, or added as it is."""
        weights = self.skip_weights
        if not self.cfg.skip_gates_enabled:
            return torch.stack((torch.ones_like(weights), weights), 1).unbind()
        gates = self.skip_gates.sigmoid()
        return torch.stack((gates, (1 - gates) * weights), 1).unbind()

    def float8_layers(self, layers: Sequence[LayerWeights], tokens: int) -> Sequence[Float8Weights]:
        """The matrices of each layer in 8 bits, once per forward pass, while this model trains; for scores nothing.

        Their gradients are those of the matrices they were made from.
        """
        cfg, rows = self.cfg, [Float8Weights()] * len(layers)
        if not (cfg.fp8 and self.kernels.fused and self.training and layers[0].qkv.requires_grad):
            return rows
        if cfg.fp8_forward:
            for name in ("qkv", "up"):
                bank = float8_of([getattr(w, name) for w in layers], float8_factor(cfg.model_dim))
                rows = [row._replace(**{name: w}) for row, w in zip(rows, bank, strict=True)]
        if cfg.fp8_backward:
            bank = float8_of([w.up.t() for w in layers], float8_gradient_factor(tokens))
            rows = [row._replace(up_transposed=w) for row, w in zip(rows, bank, strict=True)]
        return rows

    def embed(self, tokens: Tensor, tap: Tap | None = None, ahead: int = 0) -> Tensor:
        """(B, T) -> (B, T - ahead, D), normed."""
        x = F.embedding(tokens, self.tok_emb.weight).to(self.dtype)
        for switch in self.switches:
            x = switch.embed(self, x, tokens, tap)
        return self.kernels.mean_norm(x[:, ahead:].contiguous(), None)

    def trunk(
        self, tokens: Tensor, docs: Docs | None, deltas: Sequence[Deltas] | None, tap: Tap | None,
        cache: Cache | None = None,
    ) -> Tensor:  # fmt: skip
        """Token ids (B, T) to final normed hidden states (B, T, D): one loop over the planned visits."""
        cfg, kernels, layers, ahead = self.cfg, self.kernels, self.layers(), AHEAD if cache else 0
        x, tokens = self.embed(tokens, tap, ahead), tokens[:, ahead:]
        rope = rotary_tables(
            cfg, tokens.size(1), docs is None, tokens.device, self.dtype, cache.place if cache else 0
        )
        if docs is None and kernels.fused:
            docs = kernels.attention.rows(tokens, cache)
        if docs is not None:
            group = cfg.num_heads // cfg.num_kv_heads
            docs = docs._replace(spans=kernels.attention.spans(docs, tokens.numel(), group))
        ctx = Context(rope, docs, kernels.attention)
        pasts = cache.pasts() if cache else itertools.repeat(None)
        visit_deltas = itertools.repeat(NO_DELTAS) if deltas is None else deltas
        float8 = self.float8_layers(layers, tokens.numel())
        skips = self.skip_mixes()

        x0, lane, kept = x, None, []
        for visit, added, past in zip(self.plan, visit_deltas, pasts, strict=False):
            where = ctx._replace(past=past, fp8=float8[visit.layer])
            for switch in self.switches:
                where = switch.attention(self, visit, where)
            args = layers[visit.layer], self.layer_constants[visit.layer], where, self.scaled(added, visit.layer)
            peek = tap and (lambda site, t, i=visit.layer: tap(f"blocks.{i}.{site}", t))
            if visit.two_lane and lane is None:
                lane = x  # before the skip, which is merged into the attention lane alone
            if visit.skip is not None:
                x = kernels.merge(x, kept.pop(), skips[visit.skip])
            if visit.two_lane:
                x, lane, x0 = kernels.two_lane(x, lane, x0, *args, peek)
            else:
                x, x0 = self.serial(visit, x, x0, kept, *args, peek)
            if visit.save_skip:
                kept.append(x)
        if lane is not None and cfg.parallel_final_lane != "mean":
            x, lane = {"attn": x, "mlp": lane}[cfg.parallel_final_lane], None
        return kernels.mean_norm(x, lane)

    def serial(self, visit: Visit, x: Tensor, x0: Tensor, kept: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
        """A visit on one stream, with what switches do before and after it."""
        before = x
        for switch in self.switches:
            x = switch.enter(self, visit, x)
        entered = x
        x, same, x0 = self.kernels.serial(x, x0, *args)
        if kept and kept[-1] is entered:  # by way of the block, which adds up the gradients of both readers
            kept[-1] = same
        for switch in self.switches:
            x = switch.leave(self, visit, before, x)
        return x, x0

    def scaled(self, deltas: Deltas, layer: int) -> Deltas:
        """The deltas as they act on the layer's matrices of `layers`: bypasses with the scales that those carry."""
        if deltas is NO_DELTAS:
            return deltas
        block, bypasses = self.blocks[layer], {}
        for name, scale in (("attn_bypass", block.attn_scale), ("mlp_bypass", block.mlp_scale)):
            if (pair := getattr(deltas, name)) is not None:
                bypasses[name] = pair[0], scale.to(self.dtype).unsqueeze(-1) * pair[1]
        if (
            self.cfg.attn_out_gate_enabled and self.cfg.attn_out_gate_src == "q"
        ):  # what they read moves with the queries
            gate, (a, b) = block.attn.attn_gate_proj.weight.to(self.dtype), deltas.q
            bypasses["narrow"] = a, gate @ b[:, : self.cfg.gate_window]
        return deltas._replace(**bypasses)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        docs: Docs | None = None,
        adapters: Adapters | None = None,
        tap: Tap | None = None,
        reduction: str = "mean",
        at: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits (B, T, V), or with targets (B, T) the loss in nats.

        docs: boundaries of packed documents (B = 1); None: every row is one text. adapters: test-time training, one set
        per row. tap(name, x): sees the input of every quantized matmul. at (B, C): only these positions are read out,
        targets is (B, C) then. reduction: `mean` gives a scalar, `none` the loss of each target. cache: what the rows'
        tokens so far left behind; these go on from there, tokens (B, AHEAD + T) with the last of those ahead.
        """
        deltas, head = adapters.pairs() if adapters is not None else (None, None)
        hidden = self.trunk(tokens, docs, deltas, tap, cache)
        if at is not None:
            hidden = hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden.size(-1)))
        if tap is not None:
            tap("head", hidden)
        embedding, cap = self.tok_emb.weight.to(self.dtype), self.cfg.logit_softcap
        more = None if head is None else low_rank(hidden, head)
        if targets is None:
            return softcapped_logits(hidden, embedding, cap, more)
        if more is None:
            loss = self.kernels.loss(hidden, embedding, targets, cap)
        else:  # few positions: the logits may stand in memory
            loss = softcapped_loss(hidden, embedding, targets, cap, more)
        return loss.mean() if reduction == "mean" else loss


class Role(NamedTuple):
    """How a parameter trains and how the artifact stores it."""

    pattern: str
    optimizer: str  # muon, or the AdamW group
    dtype: str  # float32, or compute: the dtype of the activations
    storage: str  # gptq, rows (int8 per row) or float16


# fmt: off
ROLES = (  # first match counts; a test asserts that every parameter has exactly the row it should have
    Role("*_bank",                  "muon",   "float32", "gptq"),
    Role("tok_emb.weight",          "embed",  "compute", "gptq"),
    Role("blocks.*.attn_gate_w",    "scalar", "float32", "rows"),
    Role("blocks.*",                "scalar", "float32", "float16"),
    Role("bigram.embed.weight",     "embed",  "float32", "gptq"),
    Role("bigram.proj.weight",      "muon",   "float32", "float16"),
    Role("recur_*",                 "scalar", "float32", "float16"),
    Role("skip_*",                  "scalar", "float32", "float16"),
    Role("parallel_*_lambdas",      "scalar", "float32", "float16"),
    Role("smear_*",                 "scalar", "float32", "float16"),
)
# fmt: on


def role_of(name: str) -> Role:
    for role in ROLES:
        if fnmatch.fnmatchcase(name, role.pattern):
            return role
    raise KeyError(f"parameter {name} has no row in ROLES")


# --------------------------------------------------------------------------------------------------------------------
# 7. OPTIMIZER: Muon for the banks, AdamW for the rest, schedules as pure functions, the weight average
# --------------------------------------------------------------------------------------------------------------------
def training_fraction(cfg: Config, step: int, seconds: float) -> float:
    """How much of training is done, 0..1: by the clock when there is a budget, else by steps."""
    if cfg.max_wallclock_seconds > 0:
        return seconds / (cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds)
    return step / cfg.iterations


def looped_at(cfg: Config, fraction: float) -> int:
    """Extra passes over the looped layers."""
    return max([0, *(loops for at, loops in cfg.loop_stages if fraction >= at)])


def lr_multiplier(cfg: Config, fraction: float) -> float:
    """1 until the warm-down, then a line to MIN_LR at the end."""
    return 1.0 if fraction < 1 - cfg.warmdown_frac else max((1 - fraction) / cfg.warmdown_frac, cfg.min_lr)


def wd_multiplier(cfg: Config, fraction: float) -> float:
    """1 until WD_TAPER_START_FRAC, then a line to WD_TAPER_FINAL_MULT at the end, on the learning rate's fraction.

    From #1729, which never measured it apart. A public port counted steps of ITERATIONS = 20,000, where a run makes
    4,844: there the taper would have begun at step 14,000, and its null result is of a taper that never was.
    """
    if not cfg.wd_taper_start_frac:
        return 1.0
    t = min(max((fraction - cfg.wd_taper_start_frac) / (1 - cfg.wd_taper_start_frac), 0.0), 1.0)
    return (1 - t) + t * cfg.wd_taper_final_mult


def muon_momentum(cfg: Config, step: int) -> float:
    t = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps > 0 else 1.0
    return (1 - t) * cfg.muon_momentum_warmup_start + t * cfg.muon_momentum


def signed_power_(x: Tensor, power: float) -> Tensor:
    """sign(x) |x|^power in place, entry by entry; in float32, because bfloat16 would round the power, too."""
    return torch.copysign(x.abs().float().pow_(power), x, out=x)


def muon_update(grad: Tensor, buffer: Tensor, momentum: float, steps: int, row_normalize: bool) -> Tensor:
    """Nesterov momentum, rows to unit length, orthogonalized. grad (N, rows, cols); `buffer` (bfloat16) is updated."""
    buffer.mul_(momentum).add_(grad)
    update = torch.add(grad.float(), buffer, alpha=momentum)  # in float32, without a float32 copy of the buffer
    if row_normalize:
        update.div_(update.norm(dim=-1, keepdim=True).clamp_min(1e-7))
    update = orthogonalize(update, steps)
    # A tall matrix has fewer directions than rows: the factor keeps the size of an entry's step.
    return update * (grad.size(-2) / grad.size(-1)) ** 0.5 if grad.size(-2) > grad.size(-1) else update


def by_dtype(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Lists of one dtype each: on mixed ones PyTorch's foreach functions fall back to a launch per tensor."""
    lists: dict[torch.dtype, list[Tensor]] = {}
    for t in tensors:
        lists.setdefault(t.dtype, []).append(t)
    return list(lists.values())


def joint_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Norm of all tensors together, a float32 scalar."""
    norms = [n for same in by_dtype(tensors) for n in torch._foreach_norm(same, 2, dtype=torch.float32)]
    return torch.stack(norms).norm()


class Optimizer:
    """Muon on the banks, split over the ranks by matrix, and AdamW on everything else, replicated.

    A step is `reduce` (gradients summed over ranks, so micro-batch losses must be divided by MICRO_STEPS), `clip`, and
    `update`. Each rank orthogonalizes its share of every bank and the updates are gathered while the next is computed.
    """

    def __init__(self, model: GPT, cfg: Config, run: Run):
        self.cfg, self.run = cfg, run
        named = list(model.named_parameters())
        kinds = {k: [p for n, p in named if role_of(n).optimizer == k] for k in ("muon", "embed", "scalar")}
        self.banks = sorted(kinds["muon"], key=lambda p: -p.numel())  # the largest transfer starts first
        self.others = kinds["embed"] + kinds["scalar"]
        groups = [dict(params=kinds["embed"], lr=cfg.tied_embed_lr, weight_decay=cfg.embed_wd),
                  dict(params=kinds["scalar"], lr=cfg.scalar_lr, weight_decay=cfg.adam_wd)]  # fmt: skip
        fused = run.device.type == "cuda"
        self.adam = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=fused)
        self.base_lrs = [g["lr"] for g in groups]
        self.rows = [math.ceil(len(p) / run.world) for p in self.banks]  # matrices of each bank per rank
        self.momentum = [torch.zeros(r, *p.shape[1:], dtype=torch.bfloat16, device=p.device)
                         for r, p in zip(self.rows, self.banks, strict=True)]  # fmt: skip
        self.wire = torch.bfloat16 if run.device.type == "cuda" else torch.float32
        self.shards: list[Tensor] = []

    def _padded(self, bank: Tensor, rows: int) -> Tensor:
        out = bank.new_zeros(rows * self.run.world, *bank.shape[1:], dtype=self.wire)
        out[: len(bank)] = bank
        return out

    def touched(self) -> list[Tensor]:
        """The other parameters that have a gradient: what only the loop uses has none before it starts."""
        return [p for p in self.others if p.grad is not None]

    @torch.no_grad()
    def reduce(self) -> Tensor:
        """Sums the gradients over the ranks; returns the norm of the whole gradient, a scalar tensor."""
        others = self.touched()
        if self.run.world == 1:
            self.shards = [p.grad for p in self.banks]
            return joint_norm([*self.shards, *(p.grad for p in others)])
        self.shards, waits = [], []
        for p, rows in zip(self.banks, self.rows, strict=True):
            self.shards.append(torch.empty(rows, *p.shape[1:], dtype=self.wire, device=p.device))
            waits.append(_reduce_scatter(self.shards[-1], self._padded(p.grad, rows), async_op=True))
        flat = torch.cat([p.grad.float().flatten() for p in others])  # one transfer for all the small ones
        dist.all_reduce(flat)
        for p, piece in zip(others, flat.split([p.numel() for p in others]), strict=True):
            p.grad = piece.view_as(p).to(p.dtype)
        for w in waits:
            w.wait()
        return (self.run.sum(joint_norm(self.shards).square()) + joint_norm([flat]).square()).sqrt()

    @torch.no_grad()
    def clip(self, norm: Tensor) -> None:
        """Scales the averaged gradient down to GRAD_CLIP_NORM; no host sync."""
        if self.cfg.grad_clip_norm > 0:
            scale = (self.cfg.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for grads in by_dtype([*self.shards, *(p.grad for p in self.touched())]):
                torch._foreach_mul_(grads, scale)

    @torch.no_grad()
    def update(self, lr_mul: float, momentum: float, wd_mul: float = 1.0) -> None:
        for group, lr in zip(self.adam.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * lr_mul
        c, waits = self.cfg, []
        for grad, buffer, rows in zip(self.shards, self.momentum, self.rows, strict=True):
            # After clipping, which so keeps its meaning: the norm is the gradient's, and AdamW's part is cut as before.
            # From #1682: 1.3667 against 1.3686 for p = 1 over three seeds with an sd of 0.002 to 0.003, p > 1 worse;
            # on the record 1.06994 against 1.06922: null. Unit rows and Newton-Schulz undo most of it.
            if c.muon_grad_power != 1:
                signed_power_(grad, c.muon_grad_power)
            mine = muon_update(grad, buffer, momentum, c.muon_backend_steps, c.muon_row_normalize)
            if self.run.world == 1:
                waits.append((mine, None))
                continue
            every = mine.new_empty(rows * self.run.world, *mine.shape[1:])
            waits.append((every, _all_gather(every, mine.contiguous(), async_op=True)))
        self.adam.step()  # while the last updates are gathered
        lr = c.matrix_lr * lr_mul
        for p, (update, wait) in zip(self.banks, waits, strict=True):
            if wait is not None:
                wait.wait()
            p.mul_(1 - lr * c.muon_wd * wd_mul).add_(update[: len(p)], alpha=-lr)
        self.zero_grad()

    def zero_grad(self) -> None:
        self.shards = []
        for p in (*self.banks, *self.others):
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Whole on every rank and independent of their number. A collective."""
        momentum = self.momentum
        if self.run.world > 1:
            momentum = []
            for mine, p in zip(self.momentum, self.banks, strict=True):
                every = mine.new_empty(len(mine) * self.run.world, *mine.shape[1:])
                _all_gather(every, mine)
                momentum.append(every[: len(p)])
        return {"adam": copy.deepcopy(self.adam.state_dict()), "momentum": [m.clone() for m in momentum]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        for mine, full in zip(self.momentum, state["momentum"], strict=True):
            share = full[self.run.rank * len(mine) :][: len(mine)]
            mine.zero_()[: len(share)].copy_(share)


class WeightAverage:
    """Exponential moving average of all weights, in float32.

    After t steps it spans 1 + (t / 288)^2 steps, at most 1 / (1 - EMA_DECAY): the record's 285 at the record's 4,850
    steps, two at 300, where the loss falls so fast that any longer average lags behind the weights.
    """

    def __init__(self, model: GPT, decay: float):
        self.decay, self.steps = decay, 0
        self.params = list(model.parameters())
        self.names = [n for n, _ in model.named_parameters()]
        self.values = [p.detach().float().clone() for p in self.params]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        weight = max(1 - self.decay, 1 / (1 + (self.steps / 288) ** 2))
        torch._foreach_lerp_(self.values, [p.float() for p in self.params], weight)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.values, strict=True))

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor], steps: int) -> None:
        self.steps = steps
        for name, mine in zip(self.names, self.values, strict=True):
            mine.copy_(values[name])

    @torch.no_grad()
    def apply(self) -> None:
        """The model takes the averaged weights, in the dtypes of its parameters."""
        for p, average in zip(self.params, self.values, strict=True):
            p.copy_(average)


# --------------------------------------------------------------------------------------------------------------------
# 8. EVALUATION: one meter for every score
# --------------------------------------------------------------------------------------------------------------------
class Meter:
    """Sums nats, targets and original bytes in double precision; the only place where bits per byte are computed."""

    def __init__(self, device: torch.device | str = "cpu", n_documents: int = 0):
        self.nats = torch.zeros((), dtype=torch.float64, device=device)
        self.by_document = self.nats.new_zeros(n_documents)  # filled by whoever knows what a loss belongs to
        self.tokens, self.bytes = 0, 0

    def add(self, losses: Tensor, n_tokens: int, n_bytes: int) -> None:
        """losses: nats of `n_tokens` targets that stand for `n_bytes` bytes."""
        self.nats += losses.detach().double().sum().to(self.nats.device)
        self.tokens += n_tokens
        self.bytes += n_bytes

    def merge(self, other: Meter) -> None:
        self.add(other.nats, other.tokens, other.bytes)

    def reduced(self, run: Run) -> Meter:
        """The sum over the ranks."""
        total = Meter()
        sums = torch.tensor([self.nats.item(), self.tokens, self.bytes], dtype=torch.float64)
        sums = run.sum(sums).tolist()
        total.nats.fill_(sums[0])
        total.tokens, total.bytes = int(sums[1]), int(sums[2])
        return total

    def expect(self, n_tokens: int, n_bytes: int) -> None:
        """Raises Stop unless exactly these were scored: no score without every token once."""
        if (self.tokens, self.bytes) != (n_tokens, n_bytes):
            raise Stop(f"scored {self.tokens} targets and {self.bytes} bytes of {n_tokens} and {n_bytes}: no score")

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats.item() / max(self.tokens, 1)

    @property
    def bpb(self) -> float:
        """Bits per original byte."""
        return self.nats.item() / (math.log(2) * max(self.bytes, 1))


def evaluate(model: GPT, val: ValidationSet, cfg: Config, run: Run, label: str) -> Meter:
    """Scores every validation target once, in packed rows without context across rows or documents.

    Rows are cut from the stream by position, not by rank, so the score does not depend on the number of ranks.
    """
    began, row = time.monotonic(), cfg.val_row_tokens
    starts = torch.from_numpy(val.starts()).to(run.device)
    meter = Meter(run.device, len(starts))
    n_rows = math.ceil(val.n_targets / row)
    with torch.no_grad():
        for r in range(run.rank, n_rows, run.world):
            tokens = val.tokens[r * row : (r + 1) * row + 1]
            n = len(tokens) - 1
            tokens = np.pad(tokens, (0, row - n), constant_values=BOS)  # one shape for the tail, too
            inputs, targets, docs = packed_row(tokens, cfg.eval_seq_len, run.device)
            losses = model(inputs, targets, docs=docs, reduction="none")
            meter.add(losses[0, :n], n, int(val.token_bytes[r * row + 1 : r * row + n + 1].sum()))
            number = torch.searchsorted(starts, torch.arange(r * row, r * row + n, device=run.device), right=True) - 1
            meter.by_document.index_add_(0, number, losses[0, :n].double())
            run.progress(f"evaluating {label}", r + 1, n_rows, began)
    total = meter.reduced(run)
    total.expect(val.n_targets, val.n_bytes)
    if not math.isfinite(total.loss):
        raise Stop(f"the validation loss is {total.loss} ({label}): lower the learning rates or look at the data")
    seconds = time.monotonic() - began
    run.metric(
        "eval", label=label, loss=total.loss, bpb=total.bpb, tokens=total.tokens, bytes=total.bytes, seconds=seconds
    )
    if not label.startswith("step "):
        nats = run.sum(meter.by_document.cpu()).tolist()
        run.metric("documents", label=label, nats=[round(x, 3) for x in nats])
        run.log(
            f"diagnostic {label} val_loss:{total.loss:.8f} val_bpb:{total.bpb:.8f} eval_time:{1000 * seconds:.0f}ms"
        )
    return total


# --------------------------------------------------------------------------------------------------------------------
# 9. TRAINING
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class Progress:
    """All that training needs to go on, besides tensors."""

    step: int = 0
    seconds: float = 0.0  # of counted training time
    looped: int = 0  # extra passes over the looped layers


class Stopwatch:
    """Counts training time: pauses during validation, goes on after a resume."""

    def __init__(self, seconds: float = 0.0):
        self.total, self.began = seconds, time.monotonic()

    def seconds(self) -> float:
        return self.total + time.monotonic() - self.began

    @contextlib.contextmanager
    def paused(self, run: Run) -> Iterator[None]:
        run.sync()
        self.total = self.seconds()
        yield
        run.sync()
        self.began = time.monotonic()


def byte_weights(cfg: Config, run: Run) -> Tensor | None:
    """BPB_WEIGHTED_LOSS_ENABLED: what each token's loss counts in training, its bytes and at least 1 (V,); else None.

    A negative control. Bits per byte are nats over a constant number of bytes: every token's nats count alike, and the
    plain mean is the aligned objective already. #1519 claimed -0.0194; on the record it cost +0.0619 (1.1316 against
    1.0697). As there, a CaseOps mark weighs its UTF-8 bytes, though it stands for none. Evaluation stays unweighted.
    """
    if not cfg.bpb_weighted_loss_enabled:
        return None
    weights = torch.from_numpy(np.maximum(own_bytes(load_tokenizer(cfg)), 1)).float()
    mean, low, high = weights.mean().item(), weights.min().item(), weights.max().item()
    run.log(f"bpb_weighted_loss: enabled=True mean_weight={mean:.3f} min={low:.0f} max={high:.0f}")
    return weights.to(run.device)


def training_loss(model: GPT, batch: tuple[Tensor, Tensor, Docs], weights: Tensor | None) -> Tensor:
    """Mean nats of a micro-batch's targets; with `weights` (V,) the mean weighted by target."""
    inputs, targets, docs = batch
    if weights is None:
        return model(inputs, targets, docs=docs)
    w = weights[targets]
    return (w * model(inputs, targets, docs=docs, reduction="none")).sum() / w.sum()


class MicroBatch:
    """Adds the gradients of a micro-batch's share of the step's loss to those of the parameters; returns that share."""

    def __init__(self, model: GPT, weights: Tensor | None = None):
        self.model, self.weights = model, weights

    def __call__(self, batch: tuple[Tensor, Tensor, Docs]) -> Tensor:
        loss = training_loss(self.model, batch, self.weights) / MICRO_STEPS
        loss.backward()
        return loss.detach()


class GraphedMicroBatch(MicroBatch):
    """The same as one CUDA graph: launched one by one, its hundreds of kernels wait for Python.

    On an H100 a micro-batch takes 73.67 ms (with the loop 111.2), as a graph 72.77 (109.9).

    The first micro-batch of a loop mode runs as it is and builds its kernels, the second is recorded; there is one
    graph at a time, which owns the memory of its activations. Its gradients are added to those of the parameters after
    each replay, so that these come and go as without a graph. A row with more documents than usual runs as it is.
    """

    def __init__(self, model: GPT, weights: Tensor | None = None):
        super().__init__(model, weights)
        self.looped, self.graph, self.inputs, self.loss, self.grads = -1, None, (), None, {}

    def __call__(self, batch: tuple[Tensor, Tensor, Docs]) -> Tensor:
        tensors = (*batch[:2], batch[2].cu_seqlens)
        if self.model.looped != self.looped:
            self.graph, self.grads, self.looped = None, {}, self.model.looped
            return super().__call__(batch)
        if self.graph is None:
            self.record(batch, tensors)
        if any(a.shape != b.shape for a, b in zip(self.inputs, tensors, strict=True)):
            return super().__call__(batch)
        torch._foreach_copy_(self.inputs, tensors)
        self.graph.replay()
        self.add_gradients()
        return self.loss

    def record(self, batch: tuple[Tensor, Tensor, Docs], tensors: Sequence[Tensor]) -> None:
        """Nothing runs while it is recorded. Other threads, as the loader's, may go on."""
        earlier = {p: p.grad for p in self.model.parameters()}
        for p in earlier:
            p.grad = None
        torch.cuda.empty_cache()  # the graph allocates for itself
        self.inputs, self.graph = [t.clone() for t in tensors], torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.loss = super().__call__((*self.inputs[:2], batch[2]._replace(cu_seqlens=self.inputs[2])))
        self.grads = {p: p.grad for p in earlier if p.grad is not None}
        for p, grad in earlier.items():
            p.grad = grad

    def add_gradients(self) -> None:
        first = {p for p in self.grads if p.grad is None}
        for p in first:
            p.grad = self.grads[p].clone()
        more = [p for p in self.grads if p not in first]
        sums, grads = by_dtype(p.grad for p in more), by_dtype(self.grads[p] for p in more)
        for theirs, mine in zip(sums, grads, strict=True):
            torch._foreach_add_(theirs, mine)


def graphable(cfg: Config, run: Run, model: GPT) -> bool:
    """Whether a CUDA graph may hold this model's forward and backward pass."""
    fused = cfg.cuda_graphs and run.device.type == "cuda" and model.kernels.fused
    return fused and not model.kernels.attention.waits and all(switch.steady for switch in model.switches)


def micro_batches(cfg: Config, run: Run, model: GPT, weights: Tensor | None = None) -> MicroBatch:
    return (GraphedMicroBatch if graphable(cfg, run, model) else MicroBatch)(model, weights)


def train_step(
    gradients: MicroBatch, optimizer: Optimizer, loader: TrainLoader, lr_mul: float, momentum: float,
    wd_mul: float = 1.0,
) -> Tensor:  # fmt: skip
    """One optimizer step on MICRO_STEPS micro-batches; returns this rank's share of the mean loss, on the device."""
    loss_sum = torch.zeros((), device=loader.run.device)
    for batch in loader.next_step():
        loss_sum += gradients(batch)
    optimizer.clip(optimizer.reduce())
    optimizer.update(lr_mul, momentum, wd_mul)
    return loss_sum


def prime(cfg: Config, run: Run, model: GPT, optimizer: Optimizer, gradients: MicroBatch) -> None:
    """Untimed steps in each loop mode and a calibration build every kernel; weights, momentum and data roll back."""
    if cfg.warmup_steps <= 0:
        return
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = optimizer.state_dict()
    for looped in sorted({0, *(loops for _, loops in cfg.loop_stages)}):
        model.looped = looped
        if looped:
            run.log(f"loop_warmup:enabled {describe_plan(model.plan)}")
        loader = TrainLoader(cfg, run)
        for step in range(1, cfg.warmup_steps + 1):
            train_step(gradients, optimizer, loader, 1.0, cfg.muon_momentum).item()
            if step <= 6 or step % 10 == 0 or step == cfg.warmup_steps:
                run.log(f"{'loop_' if looped else ''}warmup_step: {step}/{cfg.warmup_steps}")
        loader.close()
    if cfg.max_wallclock_seconds > 0:  # calibration is on the clock, too
        calibrate(model, itertools.islice(calibration_batches(cfg, run), 1), run)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(weights[n])
    optimizer.load_state_dict(state)
    model.looped = False


def describe_plan(plan: Sequence[Visit]) -> str:
    encoder, decoder = ([v.layer for v in plan if v.save_skip == side] for side in (True, False))
    return f"encoder:{encoder} decoder:{decoder}"


def require_finite_weights(model: GPT, step: int, run: Run) -> None:
    """Before weights are saved: a finite loss says nothing of the update that followed it. A collective."""
    finite = torch.stack([p.isfinite().all() for p in model.parameters()]).all()
    if bad := [rank for rank, good in enumerate(run.gather(bool(finite))) if not good]:
        where = f" (on rank {', '.join(map(str, bad))})" if len(bad) < run.world else ""
        stop_at_nan(f"a weight is not finite{where}", step, run)


def save_checkpoint(run: Run, model: GPT, optimizer: Optimizer, average: WeightAverage, progress: Progress) -> None:
    """Everything to continue training from here, for any number of ranks. A collective."""
    require_finite_weights(model, progress.step, run)
    state = {
        "fingerprint": shape_fingerprint(model.cfg), "progress": asdict(progress), "model": model.state_dict(),
        "average": average.state_dict(), "average_steps": average.steps, "optimizer": optimizer.state_dict(),
        "shards": train_fingerprint(model.cfg), "job": os.environ.get("TORCHELASTIC_RUN_ID", ""),
    }  # fmt: skip
    run.save("checkpoint.pt", lambda f: torch.save(state, f))


def set_checkpoint_aside(run: Run) -> None:
    """That of an earlier run is none of this one, which a restart or `stop_at_nan` would take it for. A collective."""
    old = run.folder / "checkpoint.pt"
    run.alone(lambda: old.is_file() and old.replace(old.with_name("checkpoint_before.pt")))


def load_checkpoint(cfg: Config, run: Run, model: GPT, optimizer: Optimizer, average: WeightAverage) -> Progress:
    path = run.folder / "checkpoint.pt"
    state = load_stage_file(cfg, run, path.name, "RESUME=1")
    if state["shards"] != train_fingerprint(cfg):
        raise Stop(f"{path} was trained on other shards than those in {cfg.shard_dir}: set DATA_PATH", 2)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    average.load(state["average"], state["average_steps"])
    progress = Progress(**state["progress"])
    model.looped = progress.looped
    run.log(f"resuming from {path} at step {progress.step} after {progress.seconds:.1f}s of training")
    return progress


def stop_at_nan(what: str, step: int, run: Run) -> None:
    path = run.folder / "checkpoint.pt"
    last = f"the last checkpoint is {path}, continue with RESUME=1" if path.exists() else "there is no checkpoint yet"
    raise Stop(f"{what} at step {step}: lower the learning rates or look at the data; {last}")


class Arrival:
    """A scalar on its way to the host.

    `item` waits for it alone. A tensor's own `item` waits for all that was queued, the step after it included, and then
    the GPU waits in turn until the host has something for it again.
    """

    def __init__(self, x: Tensor):
        self.value = x.detach().to("cpu", non_blocking=True)  # in page-locked memory if it comes from a GPU
        self.event = torch.cuda.Event() if x.is_cuda else None
        if self.event:
            self.event.record()

    def item(self) -> float:
        if self.event:
            self.event.synchronize()
        return self.value.item()


class TrainLog:
    """Every step's loss in metrics.jsonl, some in the log; stops the run when one is not finite.

    A loss is read after the next step has been sent, so that the GPU's queue never runs dry. It is averaged over the
    ranks, the same number everywhere: every rank stops or none does.
    """

    def __init__(self, model: GPT, run: Run, watch: Stopwatch):
        self.model, self.cfg, self.run, self.watch = model, model.cfg, run, watch
        self.began = time.monotonic() - watch.seconds()  # as if there had been no resume
        self.pending: tuple[Arrival, dict[str, Any]] | None = None

    def add(self, progress: Progress, loss: Tensor, lr_mul: float) -> None:
        self.settle()
        cfg, step = self.cfg, progress.step
        due = step <= 5 or (cfg.train_log_every > 0 and step % cfg.train_log_every == 0) or step == cfg.iterations
        if due:
            self.run.sync()  # a line's time is that of a step done, not of one queued
        tokens, seconds = step * cfg.train_batch_tokens, self.watch.seconds()
        row = dict(step=step, lr_mul=lr_mul, train_s=seconds, tokens=tokens, looped=progress.looped)
        self.pending = Arrival(loss), row
        if due:
            line = f"train_loss: {self.settle():.4f} train_time: {seconds / 60:.1f}m tok/s: {tokens / seconds:.0f}"
            self.run.log(f"{step}/{cfg.iterations} {line}")
            for text in filter(None, (switch.line(self.model) for switch in self.model.switches)):
                self.run.log(text)
        self.run.progress("training", training_fraction(cfg, step, seconds), 1.0, self.began, every=20)

    def settle(self) -> float:
        """The latest loss, checked and written."""
        if self.pending is None:
            return math.nan
        loss, row = self.pending
        self.pending, value = None, loss.item()
        if not math.isfinite(value):
            stop_at_nan(f"the training loss is {value}", row["step"], self.run)
        self.run.metric("train", loss=value, **row)
        return value


def train(cfg: Config, run: Run, model: GPT, val: ValidationSet) -> Progress:
    """Trains until ITERATIONS or the wall-clock budget; the model ends with the averaged weights."""
    if not cfg.resume:
        set_checkpoint_aside(run)
    optimizer, average = Optimizer(model, cfg, run), WeightAverage(model, cfg.ema_decay)
    gradients = micro_batches(cfg, run, model, byte_weights(cfg, run))
    prime(cfg, run, model, optimizer, gradients)
    progress = load_checkpoint(cfg, run, model, optimizer, average) if cfg.resume else Progress()
    loader = TrainLoader(cfg, run, progress.step)
    run.sync()
    run.barrier()
    watch = Stopwatch(progress.seconds)
    log, first = TrainLog(model, run, watch), progress.step
    while True:
        # Every rank follows the clock of rank 0, so schedules and the loop's onset agree to the step.
        progress.seconds, stop = run.agree(watch.seconds() if run.main else 0.0, run.stop_signal)
        step, fraction = progress.step, training_fraction(cfg, progress.step, progress.seconds)
        done = step >= cfg.iterations or (cfg.max_wallclock_seconds > 0 and fraction >= 1)
        if done or (cfg.val_loss_every > 0 and step % cfg.val_loss_every == 0):
            with watch.paused(run):
                log.settle()
                score = evaluate(model, val, cfg, run, f"step {step}")
                run.log(f"{step}/{cfg.iterations} val_loss: {score.loss:.4f} val_bpb: {score.bpb:.4f}")
                for switch in model.switches if run.main else ():
                    switch.observe(model, val, run, step)
        due = cfg.checkpoint_every > 0 and step > first and step % cfg.checkpoint_every == 0
        if stop or (due and not done):
            log.settle()
            save_checkpoint(run, model, optimizer, average, progress)
        if stop:
            name = signal.Signals(int(stop)).name
            raise Stop(
                f"stopped by {name} at step {step}: RESUME=1 RUN_DIR={run.folder} goes on, with the same knobs",
                128 + int(stop),
            )
        if done:
            break
        if (looped := looped_at(cfg, fraction)) > progress.looped:
            model.looped = progress.looped = looped
            run.log(f"layer_loop:enabled step:{step} frac:{fraction:.3f} {describe_plan(model.plan)}")
        for switch in model.switches:
            switch.schedule(fraction)
        lr_mul = lr_multiplier(cfg, fraction)
        schedules = lr_mul, muon_momentum(cfg, step), wd_multiplier(cfg, fraction)
        loss = run.sum(train_step(gradients, optimizer, loader, *schedules))
        average.update()
        progress.step += 1
        log.add(progress, loss, lr_mul)
    loader.close()
    for switch in model.switches:
        switch.schedule(1.0)
    progress.seconds = run.agree(watch.total if run.main else 0.0)[0]  # with the steps that were queued, now done
    if progress.step < cfg.iterations:
        run.log(
            f"stopping_early: wallclock_cap train_time: {1000 * progress.seconds:.0f}ms step: {step}/{cfg.iterations}"
        )
    run.log("ema:applying EMA weights")
    average.apply()
    require_finite_weights(model, progress.step, run)
    return progress


# --------------------------------------------------------------------------------------------------------------------
# 10. QUANTIZATION: Hessians of the inputs, GPTQ, int8 rows
# --------------------------------------------------------------------------------------------------------------------
class Matrix(NamedTuple):
    """Where one matrix of each layer lives and what quantizes it."""

    bank: str
    half: int  # first or second run of L matrices in the bank
    site: str  # the matmul input whose Hessian it uses
    clip: str  # the knob {clip}_clip_sigmas
    costs: tuple[float, float, float]  # of its errors, in layers before, in and after the loop


# Costs are what a million weights added to the loss at the record's steps, in mnats, one kind quantized at a time: the
# weights of one artifact with noise as float weights, 24,576 tokens of validation text, 0.1 to 0.5 standard error. With
# all matrices quantized, on 59,392 other tokens, two draws of the noise: 36.6 and 36.7 mnats with a power of 0, 32.0
# and 31.1 with 0.4, for 0.1 % more bytes; 1.5 standard error.
MATRICES = {  # public name inside a block -> place
    "attn.c_q": Matrix("qo_bank", 0, "attn_in", "attn", (0.2, 0.2, 0.2)),
    "attn.c_k": Matrix("kv_bank", 0, "attn_in", "attn", (0.8, 0.8, 0.8)),
    "attn.c_v": Matrix("kv_bank", 1, "attn_in", "attn", (1.57, 1.57, 1.57)),
    "attn.proj": Matrix("qo_bank", 1, "attn_out", "attn", (1.6, 1.6, 1.6)),
    "mlp.fc": Matrix("mlp_up_bank", 0, "mlp_in", "mlp", (0.6, 0.42, 1.4)),
    "mlp.proj": Matrix("mlp_down_bank", 0, "mlp_out", "mlp", (0.39, 0.65, 1.02)),
}


def matrix_of(name: str) -> Matrix | None:
    """What `blocks.{i}.{public name}.weight` is one of; None for all other tensors."""
    return next((m for key, m in MATRICES.items() if name.endswith(f".{key}.weight")), None)


def unbank(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Banks (2L or L, rows, cols) to one entry per matrix, `blocks.{i}.{name}.weight`; the rest as it is."""
    flat = {k: v for k, v in state.items() if not k.endswith("_bank")}
    n_layers = len(state["mlp_up_bank"])
    for i in range(n_layers):
        for name, m in MATRICES.items():
            flat[f"blocks.{i}.{name}.weight"] = state[m.bank][m.half * n_layers + i]
    return flat


def rebank(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `unbank`."""
    inner = {f".{name}.weight" for name in MATRICES}
    state = {k: v for k, v in flat.items() if not any(k.endswith(s) for s in inner)}
    n_layers = sum(k.endswith(".mlp.fc.weight") for k in flat)
    for bank in dict.fromkeys(m.bank for m in MATRICES.values()):
        names = sorted((m.half, name) for name, m in MATRICES.items() if m.bank == bank)
        state[bank] = torch.stack([flat[f"blocks.{i}.{name}.weight"] for _, name in names for i in range(n_layers)])
    return state


# Tables see no inputs: what stands for them is what the embedding is multiplied with, and what the pair table gives.
OUTPUT_TAPS = {"tok_emb.weight": "head", "bigram.embed.weight": "bigram"}


def hessian_key(name: str) -> str:
    """The tap that sees the inputs of matrix `name`."""
    if name in OUTPUT_TAPS:
        return OUTPUT_TAPS[name]
    layer, matrix = name.removeprefix("blocks.").removesuffix(".weight").split(".", 1)
    return f"blocks.{layer}.{MATRICES[matrix].site}"


@torch.no_grad()
def calibrate(model: GPT, batches: Iterable[Tensor], run: Run) -> dict[str, Tensor]:
    """Sum of x^T x (in, in), float32, over the inputs of every quantized matmul, keyed by tap name; and how often each
    token was seen (V,), `tokens`.

    The loop is on exactly when inference has it on, so looped layers sum over all their passes.
    """
    sums: dict[str, Tensor] = {}

    def tap(name: str, x: Tensor) -> None:
        x = x.reshape(-1, x.size(-1))
        if name not in sums:
            sums[name] = x.new_zeros(x.size(1), x.size(1), dtype=torch.float32)
        if x.is_cuda and x.dtype == torch.bfloat16:  # products are exact and add up in float32, without a copy of x
            sums[name] += torch.mm(x.mT, x, out_dtype=torch.float32)
        else:
            x = x.float()
            sums[name].addmm_(x.mT, x)

    # A rank without a batch of its own still knows every sum's shape: one token, counted zero times.
    model(torch.full((1, 1), BOS, device=run.device), tap=tap)
    for h in sums.values():
        h.zero_()
    sums["tokens"] = torch.zeros(model.cfg.vocab_size, device=run.device)
    for tokens in batches:
        model(tokens, tap=tap)
        sums["tokens"].index_add_(0, tokens.flatten(), torch.ones(tokens.numel(), device=run.device))
    for name in sorted(sums):
        run.sum(sums[name])
    return sums


@torch.no_grad()
def gptq(  # noqa: PLR0913
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    clip_sigmas: float,
    block_size: int = 128,
    damping: float = 0.01,
    steps: Tensor | None = None,
    scale_bits: int = 10,
    say: Callable[[str], None] = print,
    tick: Callable[[int], None] = lambda columns: None,
) -> tuple[Tensor, Tensor]:
    """Quantizes weight (..., rows, cols) column by column, each error passed on to the columns not yet done.

    hessian (..., cols, cols): sum of x^T x over the inputs. Returns int8 in +-(2^(bits-1) - 1) and a float16 scale per
    row that covers `clip_sigmas` standard deviations. Frantar et al. 2022, arXiv 2210.17323; columns are taken by
    descending Hessian diagonal. Rows do not see each other, so matrices of one input may be stacked; leading dimensions
    are independent problems, solved side by side: on a GPU a column takes the time of its launches, whatever its
    length. steps (..., rows): what each row's scale is multiplied with. scale_bits: of the scales' mantissas; with 4
    they are up to 3 % off, codes are made for what they are, and the record's artifact is 37 kB smaller. say: hears of
    Hessians that needed more damping. tick: hears how many columns are done, block by block.
    """
    shape = weight.shape
    w, h = weight.float().reshape(-1, *shape[-2:]), hessian.float().reshape(-1, shape[-1], shape[-1]).clone()
    top = 2 ** (bits - 1) - 1
    scale = clip_sigmas * w.std(dim=-1) / top
    if steps is not None:
        scale = scale * steps.view_as(scale)
    low = 1 << 10 - scale_bits  # of the bits that are dropped, one more than all
    scale = (scale.clamp_min(1e-10).half().view(torch.int16) + low // 2 & -low).view(torch.float16)
    scale = torch.where(scale == 0, torch.finfo(torch.float16).smallest_normal, scale)
    diagonal = h.diagonal(dim1=-2, dim2=-1)  # a view
    dead = diagonal == 0
    diagonal.masked_fill_(dead, 1)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    w = w.masked_fill(dead[:, None], 0).gather(-1, order[:, None].expand_as(w))
    h = h.gather(-2, order[..., None].expand_as(h)).gather(-1, order[:, None].expand_as(h))
    inverse, step = inverse_factor(h, say, damping), scale.float()
    q = torch.empty_like(w)
    for a in range(0, w.size(-1), block_size):
        b = min(a + block_size, w.size(-1))
        block, errors, inv = w[..., a:b], torch.empty_like(w[..., a:b]), inverse[:, a:b, a:b]
        for j in range(b - a):
            column = block[..., j]
            code = q[..., a + j] = (column / step).round_().clamp_(-top, top)
            error = errors[..., j] = (column - code * step).div_(inv[:, j, j, None])
            block[..., j:] -= error[..., None] * inv[:, j, None, j:]
        w[..., b:] -= errors @ inverse[:, a:b, b:]
        tick(b)
    codes = q.gather(-1, order.argsort(dim=-1)[:, None].expand_as(q))
    return codes.to(torch.int8).view(shape), scale.view(shape[:-1])


def inverse_factor(h: Tensor, say: Callable[[str], None], share: float = 0.01) -> Tensor:
    """Upper Cholesky factors of the inverses of h (N, n, n), with this share of its mean added to each diagonal.

    Where that does not make a matrix positive definite in float32, ten times as much is added, until it does. Raises
    ValueError if it never does.
    """
    mean = h.diagonal(dim1=-2, dim2=-1).mean(dim=-1, keepdim=True)
    damping = torch.full_like(mean, share)
    for _ in range(5):
        lower, failed = torch.linalg.cholesky_ex(h + torch.diag_embed((damping * mean).expand(h.shape[:-1])))
        lower[failed != 0] = torch.eye(h.size(-1), device=h.device)  # half a factor may have no inverse
        upper, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        bad = (failed != 0) | (failed_too != 0) | ~upper.isfinite().all(dim=-1).all(dim=-1)
        if not bad.any():
            return upper
        say(f"{int(bad.sum())} of {len(h)} Hessians are not positive definite: ten times the damping there")
        damping[bad] *= 10
    raise ValueError("a Hessian is not finite or not a sum of squares: calibrate again, or look at the weights")


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row to 8 bits: int8 (rows, cols) and a float16 scale per row."""
    scale = (weight.float().abs().amax(dim=1) / 127).clamp_min(1e-7).half()
    return (weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class Coded(NamedTuple):
    """One tensor as the artifact stores it: `codes` (int8) times `scale` per row, or float16 `values` alone."""

    kind: str  # gptq, rows or float16
    bits: int
    codes: Tensor | None
    scale: Tensor | None
    values: Tensor | None

    def decode(self) -> Tensor:
        if self.kind == "float16":
            return self.values.float()
        return self.codes.float() * self.scale.float()[:, None]


class Batch(NamedTuple):
    """What GPTQ takes in one call: `stacks` of equal shape, each the names of matrices with one input, row on row."""

    columns: int
    bits: int
    clip: float
    damping: float
    stacks: list[list[str]]


def gptq_batches(flat: Mapping[str, Tensor], cfg: Config) -> list[Batch]:
    """All matrices that GPTQ quantizes, in as few batches as shapes and knobs allow, the widest first.

    The record's 67 matrices make five: queries, keys and values of a layer are one stack, layers lie side by side.
    """
    stacks: dict[tuple, list[str]] = {}
    for name in flat:
        if matrix := matrix_of(name):
            knobs = cfg.matrix_bits, getattr(cfg, f"{matrix.clip}_clip_sigmas"), 0.01
        elif name == "tok_emb.weight":
            knobs = cfg.embed_bits, cfg.embed_clip_sigmas, cfg.embed_damping
        elif role_of(name).storage == "gptq":
            knobs = cfg.matrix_bits, cfg.embed_clip_sigmas, 0.01
        else:
            continue
        stacks.setdefault((hessian_key(name), *knobs), []).append(name)
    batches: dict[tuple, Batch] = {}
    for (_, *knobs), names in stacks.items():
        key = sum(len(flat[n]) for n in names), flat[names[0]].size(1), *knobs
        batches.setdefault(key, Batch(*key[1:], [])).stacks.append(names)
    return sorted(batches.values(), key=lambda b: -b.columns)


def relative_steps(
    batches: Sequence[Batch], flat: Mapping[str, Tensor], counts: Tensor, cfg: Config
) -> dict[str, Tensor]:
    """Of all matrices of `batches`, what the step of each row (rows,) is multiplied with: 1 on average, in logarithms.

    At equal bytes the loss is least where an error's cost times its square is the same everywhere, that is, for steps
    by the costs to the -1/2 (reverse water-filling). Powers of 0 give the record's steps.
    """
    names = [name for b in batches for stack in b.stacks for name in stack]
    logs, total, size = {}, 0.0, 0
    for name in names:
        if matrix := matrix_of(name):
            layer = int(name.split(".")[1])
            cost = matrix.costs[(layer >= cfg.loop_start) + (layer > cfg.loop_end)]
            logs[name] = -cfg.matrix_step_power * math.log(cost)
            total, size = total + logs[name] * flat[name].numel(), size + flat[name].numel()
    steps = {n: flat[n].new_full((len(flat[n]),), math.exp(logs[n] - total / size) if n in logs else 1) for n in names}
    if cfg.embed_step_power:
        embedding = flat["tok_emb.weight"].float()
        # Frequent tokens' finer steps may not clip: at this step a row's range ends at its largest entry.
        least = embedding.abs().amax(1) / (cfg.embed_clip_sigmas * embedding.std(dim=1)).clamp_min(1e-10)
        steps["tok_emb.weight"] = torch.maximum(token_steps(counts.to(least.device), cfg.embed_step_power), least)
    return steps


def token_steps(counts: Tensor, power: float) -> Tensor:
    """Relative steps of the embedding's rows (V,) by how often each token was seen.

    A row's error costs in proportion to how often its token is read or likely to be next; the rarest have an error that
    others see, hence 1 + the count over its mean. The Hessian is that of the head alone, and what reads the rows as
    inputs weighs all directions about alike, hence EMBED_DAMPING. With one artifact's weights the embedding's share of
    the loss fell at the same bytes from 8.3 to 2.2 mnats on the 32,768 tokens that power and damping were chosen on,
    and from 7.8 to 4.2 on 59,392 others, 0.6 standard error.
    """
    steps = (1 + counts / counts.mean().clamp_min(1e-10)) ** -power
    return steps / steps.log().mean().exp()


def share_of(rank: int, world: int, batches: Sequence[Batch]) -> list[Batch]:
    """The batches of one rank: each goes to whoever has the fewest columns so far.

    Whole batches, because a column costs the same in a large batch and in a small one, and because every number of
    ranks then computes the same codes.
    """
    shares: list[list[Batch]] = [[] for _ in range(world)]
    for b in batches:
        min(shares, key=lambda share: sum(other.columns for other in share)).append(b)
    return shares[rank]


def code_batch(
    b: Batch, flat: Mapping[str, Tensor], hessians: Mapping[str, Tensor], steps: Mapping[str, Tensor],
    **how: Any,
) -> dict[str, Coded]:  # fmt: skip
    """GPTQ of one batch, with the relative steps of each matrix's rows; `how`: see `gptq`."""
    stacked = lambda of: torch.stack([torch.cat([of[name] for name in stack]) for stack in b.stacks])
    weight, relative = stacked(flat), stacked(steps)
    hessian = torch.stack([hessians[hessian_key(stack[0])].to(weight.device) for stack in b.stacks])
    parts = [t.cpu() for t in gptq(weight, hessian, b.bits, b.clip, damping=b.damping, steps=relative, **how)]
    coded = {}
    for i, stack in enumerate(b.stacks):
        codes, scales = (t[i].split([len(flat[name]) for name in stack]) for t in parts)
        for name, q, s in zip(stack, codes, scales, strict=True):  # copies: a view is saved with its whole batch
            coded[name] = Coded("gptq", b.bits, q.clone(), s.clone(), None)
    return coded


def code_small(name: str, x: Tensor, cfg: Config) -> Coded:
    """The stored form of a tensor that GPTQ does not touch."""
    if role_of(name).storage == "rows" and cfg.gated_attn_quant_gate:
        codes, scale = int8_rows(x)
        return Coded("rows", 8, codes.cpu(), scale.cpu(), None)
    return Coded("float16", 16, None, None, x.half().cpu())


def code_share(
    share: Sequence[Batch], flat: Mapping[str, Tensor], hessians: Mapping[str, Tensor], steps: Mapping[str, Tensor],
    cfg: Config, run: Run,
) -> tuple[dict[str, Coded], list[str], str]:
    """One rank's part: its coded matrices, what GPTQ had to say, and what it failed at, if it did."""
    coded, notes, done, began = {}, [], 0, time.monotonic()
    total = sum(b.columns for b in share)
    for b in share:
        say = lambda text, like=b.stacks[0][0]: notes.append(f"{like} and its like: {text}")
        tick = lambda columns, done=done: run.progress("quantizing", done + columns, total, began)
        try:
            part = code_batch(b, flat, hessians, steps, scale_bits=cfg.scale_bits, say=say, tick=tick)
        except ValueError as e:
            return {}, notes, str(e)
        coded |= part
        done += b.columns
    return coded, notes, ""


def quantize(state: Mapping[str, Tensor], hessians: Mapping[str, Tensor], cfg: Config, run: Run) -> dict[str, Coded]:
    """Every tensor in its stored form, GPTQ split over the ranks, the result on all of them."""
    flat = unbank(state)
    for switch in switches(cfg):
        flat, hessians = switch.code(flat, hessians, run)
    batches = gptq_batches(flat, cfg)
    steps = relative_steps(batches, flat, hessians["tokens"], cfg)
    shares = run.gather(code_share(share_of(run.rank, run.world, batches), flat, hessians, steps, cfg, run))
    for note in itertools.chain.from_iterable(notes for _, notes, _ in shares):
        run.log(f"GPTQ: {note}")
    if troubles := [trouble for *_, trouble in shares if trouble]:
        raise Stop(troubles[0])
    matrices = {name: c for coded, *_ in shares for name, c in coded.items()}
    by_gptq = {name for b in batches for stack in b.stacks for name in stack}
    every = {name: matrices[name] if name in by_gptq else code_small(name, x, cfg) for name, x in flat.items()}
    log_categories(every, run)
    log_errors(every, flat, run)
    return every


def log_categories(coded: Mapping[str, Coded], run: Run) -> None:
    label = {"gptq": "gptq (int{})", "rows": "gate_int{}_row", "float16": "passthrough (float{})"}
    groups: dict[str, set[str]] = {}
    for name, c in coded.items():
        groups.setdefault(label[c.kind].format(c.bits), set()).add(re.sub(r"\.\d+", "", name))
    run.log("Quantized weights:")
    for category in sorted(groups):
        run.log(f"  {category}: {', '.join(sorted(groups[category]))}")


def log_errors(coded: Mapping[str, Coded], flat: Mapping[str, Tensor], run: Run) -> None:
    """Rank 0's rows of name, bits and |decoded - weight| / |weight| (Frobenius) of whatever has codes.

    flat: the weights as they were coded; rotated ones have the error of their originals. All zeros have none.
    """
    errors: dict[str, Tensor] = {}
    for name, c in coded.items():
        if run.main and c.kind != "float16":  # no copy makes the host wait: codes are staged, errors come all at once
            weight = flat[name].float()
            codes, scale = (t.to(weight.device, non_blocking=True) for t in (c.codes, c.scale))
            errors[name] = (codes * scale.float()[:, None] - weight).norm() / weight.norm().clamp_min(1e-10)
    values = iter(torch.stack([*errors.values()]).tolist() if errors else [])
    run.metric("quantization", rows=[[name, coded[name].bits, next(values)] for name in errors])


# --------------------------------------------------------------------------------------------------------------------
# 11. PACKING: the artifact and the submission, the two files that count
# --------------------------------------------------------------------------------------------------------------------
# An artifact is MAGIC, the SHA-256 of what follows, the length of the header (uint32), the header (deflated JSON) and
# the payload: compressed pieces of raw little-endian buffers. No pickle: reading a stranger's artifact can only fail,
# not run anything.
MAGIC = b"GOLF\x02"
PIECE = 1 << 22  # a section is compressed in pieces of this many bytes, side by side
HEADER_LIMIT, RAW_LIMIT = 1 << 20, 1 << 30  # bytes that a header, and all sections together, may unpack to
MODEL_FIELDS = (
    "vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "tied_embed_init_std",
    "logit_softcap", "rope_base", "rope_dims", "rope_yarn", "ln_scale", "xsa_last_n", "skip_gates_enabled", "num_loops",
    "loop_start", "loop_end", "parallel_start_layer", "parallel_final_lane", "gated_attn_enabled",
    "attn_out_gate_enabled", "attn_out_gate_src", "smear_gate_enabled", "gate_window", "train_seq_len",
    "xielu_enabled", "bigram_hash_enabled", "bigram_hash_buckets", "bigram_hash_dim", "bigram_hash_prime_a",
    "bigram_hash_prime_b", "recur_alpha_enabled", "recur_alpha_form", "recur_alpha_values", "cross_pass_xsa_enabled",
)  # fmt: skip
CODED_FIELDS = (*MODEL_FIELDS, "spinquant_enabled", "spinquant_mode", "spinquant_seed", "spinquant_sites")


class ArtifactError(ValueError):
    """Why a file is not a usable artifact."""


def _brotli(data: bytes) -> bytes:
    import brotli

    return brotli.compress(data, quality=11, lgwin=24)


def _unbrotli(data: bytes, size: int) -> bytes:
    import brotli

    decoder, out = brotli.Decompressor(), bytearray()
    chunk = data
    while len(out) <= size and not decoder.is_finished():
        piece = decoder.process(chunk, output_buffer_limit=size + 1 - len(out))
        if not piece and not chunk:
            break
        out += piece
        chunk = b""
    return bytes(out)


def _zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=22).compress(data)


def _unzstd(data: bytes, size: int) -> bytes:
    import zstandard

    decoder = zstandard.ZstdDecompressor(max_window_size=PIECE)
    return decoder.stream_reader(io.BytesIO(data)).read(size + 1)


def _unlzma(data: bytes, size: int) -> bytes:
    return lzma.LZMADecompressor(memlimit=1 << 27).decompress(data, size + 1)


# Range asymmetric numeral systems (Duda 2013, arXiv 1311.2540). GPTQ's codes are all but independent draws from one
# distribution, since every row is scaled by its own deviation: a dictionary coder finds nothing, and its Huffman code
# loses 1.1 % to whole bits, 171 kB of the record's artifact. LANES states of 2^16 to 2^32 take turns, so that a step is
# a handful of array operations, and share one stream of 16-bit words: 3 s to code 36 MB, 2.4 s to decode.
LANES, RANS_BITS = 256, 14
SEGMENT = 1 << 18  # bytes that share a table: rows lie sorted by their scales, on which the embedding's codes depend


def rans_table(counts: np.ndarray) -> np.ndarray:
    """Frequencies of 256 byte values, scaled to sum to 2^RANS_BITS; none that occurs becomes zero."""
    scaled = np.maximum(counts * (1 << RANS_BITS) // max(int(counts.sum()), 1), counts > 0)
    scaled[scaled.argmax()] += (1 << RANS_BITS) - scaled.sum()
    return scaled


def rans_encode(data: bytes) -> bytes:
    """For each segment which values occur (32 bytes) and their frequencies - 1 (uint16 each); the last states (uint32);
    the words."""
    heads, states, words = [], np.full(LANES, 1 << 16, np.uint64), []
    for begin in reversed(range(0, len(data), SEGMENT)):  # the decoder goes forward
        symbols = np.frombuffer(data[begin : begin + SEGMENT], np.uint8)
        frequency = rans_table(np.bincount(symbols, minlength=256))
        there, wide = frequency > 0, frequency.astype(np.uint64)
        heads.append(np.packbits(there).tobytes() + (frequency[there] - 1).astype("<u2").tobytes())
        first = (np.cumsum(frequency) - frequency).astype(np.uint64)
        filler = np.full(-len(symbols) % LANES, frequency.argmax(), np.uint8)
        for row in np.concatenate([symbols, filler]).reshape(-1, LANES)[::-1]:
            f = wide[row]
            full = states >= f << np.uint64(32 - RANS_BITS)
            words.append(states[full].astype("<u2"))
            states[full] >>= np.uint64(16)
            whole, rest = np.divmod(states, f)
            states = (whole << np.uint64(RANS_BITS)) + rest + first[row]
    return b"".join(heads[::-1]) + states.astype("<u4").tobytes() + b"".join(w.tobytes() for w in words[::-1])


def rans_decode(data: bytes, size: int) -> bytes:
    """The first `size` bytes. Raises ValueError unless the stream begins and ends as an encoder's does."""
    tables, at = [], 0
    for _ in range(0, size, SEGMENT):
        there = np.unpackbits(np.frombuffer(data[at : at + 32], np.uint8)).astype(bool)
        end = at + 32 + 2 * int(there.sum())
        if len(there) != 256 or len(data) < end + 4 * LANES:
            raise ValueError("its head is cut short")
        frequency = np.zeros(256, np.int64)
        frequency[there] = np.frombuffer(data[at + 32 : end], "<u2") + np.int64(1)
        if frequency.sum() != 1 << RANS_BITS:
            raise ValueError("its frequencies make no sense")
        tables.append(frequency)
        at = end
    if len(data) < at + 4 * LANES or (len(data) - at) % 2:
        raise ValueError("its head is cut short")
    states = np.frombuffer(data[at : at + 4 * LANES], "<u4").astype(np.uint64)
    words, used = np.frombuffer(data[at + 4 * LANES :], "<u2").astype(np.uint64), 0
    out, length = np.empty((-(-size // LANES), LANES), np.uint8), SEGMENT // LANES
    for frequency, part in zip(tables, np.split(out, range(length, len(out), length)), strict=False):
        symbol = np.repeat(np.arange(256, dtype=np.uint8), frequency)
        step = frequency[symbol].astype(np.uint64)
        offset = (np.arange(1 << RANS_BITS) - (np.cumsum(frequency) - frequency)[symbol]).astype(np.uint64)
        for row in part:
            slot = states & np.uint64((1 << RANS_BITS) - 1)
            row[:] = symbol[slot]
            states = step[slot] * (states >> np.uint64(RANS_BITS)) + offset[slot]
            low = np.flatnonzero(states < 1 << 16)
            more = words[used : used + len(low)]
            if len(more) < len(low):
                raise ValueError("it ends too soon")
            states[low] = states[low] << np.uint64(16) | more
            used += len(low)
    if used != len(words) or (states != 1 << 16).any():
        raise ValueError("it does not end where it should")
    return out.tobytes()[:size]


def _rans(data: bytes) -> bytes:
    """A piece by the coder that makes it shorter, and a byte that says which: the few half floats do have patterns."""
    return min(b"\0" + _brotli(data), b"\1" + rans_encode(data), key=len)


def _unrans(data: bytes, size: int) -> bytes:
    return (rans_decode if data[:1] == b"\1" else _unbrotli)(data[1:], size)


COMPRESSORS: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes, int], bytes]]] = {
    "brotli": (_brotli, _unbrotli),
    "lzma": (lambda d: lzma.compress(d, preset=9 | lzma.PRESET_EXTREME), _unlzma),
    "zstd": (_zstd, _unzstd),
    "rans": (_rans, _unrans),
}  # fmt: skip


def section_of(name: str, kind: str) -> str:
    """Tensors of one section share their statistics and are compressed together."""
    return re.sub(r"^blocks\.\d+\.", "", name) if kind == "gptq" else kind


def _buffers(name: str, c: Coded) -> list[tuple[str, np.ndarray]]:
    """(section, values) of one tensor, in file order."""
    if c.kind == "float16":
        return [("float16", c.values.numpy())]
    return [(section_of(name, c.kind), c.codes.numpy()[by_scale(c.scale)]), ("float16", c.scale.numpy())]


def by_scale(scale: Tensor) -> np.ndarray:
    """The order in which an artifact has a matrix's rows: those of like scale have like codes."""
    return np.argsort(scale.numpy(), kind="stable")


def shuffle_bytes(data: bytes) -> bytes:
    """Low bytes of 16-bit values, then high bytes: the high ones compress."""
    return data[0::2] + data[1::2]


def unshuffle_bytes(data: bytes) -> bytes:
    out = np.empty(len(data), np.uint8)
    half = len(data) // 2
    out[0::2], out[1::2] = np.frombuffer(data[:half], np.uint8), np.frombuffer(data[half:], np.uint8)
    return out.tobytes()


def pack(coded: Mapping[str, Coded], looped: int, cfg: Config) -> bytes:
    """The artifact as bytes: identical for identical input."""
    sections: dict[str, bytearray] = {}
    for name, c in coded.items():
        for section, values in _buffers(name, c):
            sections.setdefault(section, bytearray()).extend(np.ascontiguousarray(values).tobytes())
    raw = [shuffle_bytes(bytes(b)) if s == "float16" else bytes(b) for s, b in sections.items()]
    pieces = [b[i : i + PIECE] for b in raw for i in range(0, len(b), PIECE)]
    with ThreadPoolExecutor() as pool:  # the compressors release the interpreter lock
        packed = list(pool.map(COMPRESSORS[cfg.compressor][0], pieces))
    payload = b"".join(packed)
    defaults, names = Config(), CODED_FIELDS if cfg.spinquant_enabled else MODEL_FIELDS
    header = {
        "compressor": cfg.compressor,
        "looped": looped,
        "tokenizer": tokenizer_fingerprint(cfg),
        "config": {k: getattr(cfg, k) for k in names if getattr(cfg, k) != getattr(defaults, k)},
        "tensors": [
            [n, c.kind, c.bits, list((c.codes if c.values is None else c.values).shape)] for n, c in coded.items()
        ],
        "pieces": [len(p) for p in packed],
    }
    text = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = len(text).to_bytes(4, "little") + text + payload
    return MAGIC + hashlib.sha256(body).digest() + body


def read_header(blob: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of an artifact, checked. Raises ArtifactError."""
    if blob[: len(MAGIC)] != MAGIC:
        raise ArtifactError("not an artifact of this version of the program")
    digest, body = blob[len(MAGIC) :][:32], blob[len(MAGIC) + 32 :]
    if hashlib.sha256(body).digest() != digest:
        raise ArtifactError("it is damaged or cut short (checksum): copy the file again")
    size = 4 + int.from_bytes(body[:4], "little")
    try:
        inflate = zlib.decompressobj()
        header = json.loads(inflate.decompress(body[4:size], HEADER_LIMIT).decode())
        right = inflate.eof and header["compressor"] in list(COMPRESSORS) and isinstance(header["looped"], int)
        right = right and isinstance(header["config"], dict) and isinstance(header["tensors"], list)
        right = right and all(isinstance(n, int) and n >= 0 for n in header["pieces"])
    except (zlib.error, ValueError, KeyError, TypeError, RecursionError):
        right = False
    if not right or sum(header["pieces"]) != len(body) - size:
        raise ArtifactError("its header makes no sense")
    return header, body[size:]


def _tensor_layout(header: dict[str, Any]) -> list[tuple[str, str, int, list[tuple[str, np.dtype, tuple]]]]:
    """(name, kind, bits, its buffers as (section, dtype, shape)) in file order. Raises ArtifactError."""
    rows, total = [], 0
    for entry in header["tensors"]:
        try:
            name, kind, bits, shape = entry
            valid = isinstance(name, str) and kind in ("gptq", "rows", "float16") and isinstance(bits, int)
            valid = valid and 0 < len(shape) <= 4 and all(type(n) is int and 0 < n < 1 << 24 for n in shape)
        except (TypeError, ValueError):
            valid = False
        if not valid or (kind != "float16" and len(shape) != 2):
            raise ArtifactError(f"it describes an impossible tensor: {str(entry)[:80]}")
        buffers = [("float16", np.dtype("<f2"), tuple(shape))]
        if kind != "float16":
            codes, scales = (np.dtype("i1"), tuple(shape)), (np.dtype("<f2"), (shape[0],))
            buffers = [(section_of(name, kind), *codes), ("float16", *scales)]
        total += sum(d.itemsize * math.prod(s) for _, d, s in buffers)
        if total > RAW_LIMIT:
            raise ArtifactError(f"it would unpack to more than {RAW_LIMIT >> 20} MiB")
        rows.append((name, kind, bits, buffers))
    return rows


def unpack(blob: bytes) -> tuple[dict[str, Tensor], int, dict[str, Any]]:
    """Artifact -> (banked state dict in float32, extra passes of the loop, model settings unlike the defaults).

    Where these settings hold a SPINQUANT_MODE, the matrices are still in its coordinates.
    Raises ArtifactError in one sentence for anything damaged, cut short or impossible; allocates what the header's
    shapes need and no more than RAW_LIMIT.
    """
    header, payload = read_header(blob)
    layout = _tensor_layout(header)
    streams, at, lengths = {}, 0, iter(header["pieces"])
    for section, size in _section_sizes(layout).items():
        raw = bytearray()
        while len(raw) < size:
            n = next(lengths, 0)
            raw += _piece(payload[at : at + n], min(PIECE, size - len(raw)), section, header["compressor"])
            at += n
        streams[section] = io.BytesIO(unshuffle_bytes(bytes(raw)) if section == "float16" else bytes(raw))
    if at != len(payload) or next(lengths, None) is not None:
        raise ArtifactError("it holds more than its tensors need")
    flat = {}
    for name, kind, bits, buffers in layout:
        parts = [torch.from_numpy(np.frombuffer(streams[s].read(d.itemsize * math.prod(n)), d).reshape(n).copy())
                 for s, d, n in buffers]  # fmt: skip
        if kind == "float16":
            flat[name] = parts[0].float()
            continue
        codes, scale = parts
        codes[by_scale(scale)] = codes.clone()
        flat[name] = Coded(kind, bits, codes, scale, None).decode()
    try:
        return rebank(flat), header["looped"], header["config"]
    except (KeyError, RuntimeError):
        raise ArtifactError("it lacks a matrix of some layer") from None


def _section_sizes(layout: Iterable[tuple]) -> dict[str, int]:
    """Raw bytes of each section, in file order."""
    sizes: dict[str, int] = {}
    for *_, buffers in layout:
        for section, dtype, shape in buffers:
            sizes[section] = sizes.get(section, 0) + dtype.itemsize * math.prod(shape)
    return sizes


def section_bytes(blob: bytes) -> dict[str, int]:
    """Compressed bytes of each section of an artifact, in file order, after its header and all else before them."""
    header, payload = read_header(blob)
    lengths, sizes = iter(header["pieces"]), {"header": len(blob) - len(payload)}
    for section, size in _section_sizes(_tensor_layout(header)).items():
        sizes[section] = sum(next(lengths) for _ in range(0, size, PIECE))
    return sizes


def _piece(data: bytes, size: int, section: str, compressor: str) -> bytes:
    try:
        raw = COMPRESSORS[compressor][1](data, size)
    except Exception as e:  # each compressor has error classes of its own
        raise ArtifactError(f"its section {section} does not decompress: {e}") from None
    if len(raw) != size:
        raise ArtifactError(f"a piece of its section {section} has {len(raw)} bytes instead of {size}")
    return raw


class Specialize(ast.NodeTransformer):
    """Makes a submission of this program: constants in the place of knobs, and without what they decide.

    fixed: knob -> its value. Only conditions that are constant then are folded.
    """

    def __init__(self, fixed: Mapping[str, Any]):
        self.fixed = fixed

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(True) if node.id == "IS_SUBMISSION" and isinstance(node.ctx, ast.Load) else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        return ast.Constant(self.fixed[node.attr]) if node.attr in self.fixed else node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST | None:
        """Without the fields of Config; a switch that is off goes whole."""
        knob = next((s.value.value for s in node.body if isinstance(s, ast.Assign) and s.targets[0].id == "knob"), None)
        if knob in self.fixed:
            return None
        node.body = [s for s in node.body if not (isinstance(s, ast.AnnAssign) and s.target.id in self.fixed)]
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if isinstance(node.target, ast.Name) and node.target.id == "LEFT_OUT":
            node.value = ast.parse(repr({k.upper(): v for k, v in self.fixed.items()}), mode="eval").body
            return node
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node.keywords = [k for k in node.keywords if k.arg not in self.fixed]  # the choices that a knob has
        return self.generic_visit(node)

    def visit_Tuple(self, node: ast.Tuple) -> ast.AST:
        node.elts = [e for e in node.elts if not (isinstance(e, ast.Constant) and e.value in self.fixed)]
        return self.generic_visit(node)

    def visit_List(self, node: ast.List) -> ast.AST:
        """Without rules (False, ...) that can no longer be broken."""
        self.generic_visit(node)
        rules = [isinstance(e, ast.Tuple) and e.elts and isinstance(e.elts[0], ast.Constant) for e in node.elts]
        node.elts = [e for e, rule in zip(node.elts, rules, strict=True) if not (rule and e.elts[0].value is False)]
        return node

    def fold(self, node: ast.expr) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node, ast.BoolOp):  # a constant that decides ends the rest, one that does not falls out
            decides, last = isinstance(node.op, ast.Or), node.values[-1]
            kept = []
            for v in node.values:
                number = v is last and not isinstance(getattr(v, "value", True), bool)  # of `x or 0`
                if not isinstance(v, ast.Constant) or number:
                    kept.append(v)
                elif bool(v.value) is decides:
                    return v if not kept else ast.BoolOp(node.op, [*kept, v])
            return ast.BoolOp(node.op, kept) if len(kept) > 1 else kept[0] if kept else last
        constant = all(
            isinstance(c, ast.Constant | ast.operator | ast.unaryop | ast.cmpop) for c in ast.iter_child_nodes(node)
        )
        return ast.Constant(eval(ast.unparse(node), {})) if constant else node

    visit_BoolOp = visit_Compare = visit_UnaryOp = fold

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        return (node.body if node.test.value else node.orelse) if isinstance(node.test, ast.Constant) else node

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        return (node.body if node.test.value else node.orelse) if isinstance(node.test, ast.Constant) else node


def defined(node: ast.stmt) -> str:
    """What a statement gives a name to: a function, a class or one constant; else nothing."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    target = (
        node.target if isinstance(node, ast.AnnAssign) else node.targets[0] if isinstance(node, ast.Assign) else None
    )
    return target.id if isinstance(target, ast.Name) else ""


def bases_of(node: ast.stmt) -> list[ast.expr]:
    return node.bases if isinstance(node, ast.ClassDef) else []


def names_in(tree: ast.AST) -> Counter[str]:
    """How often a name is read anywhere below."""
    nodes = list(ast.walk(tree))
    names = Counter(n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
    return names + Counter(n.attr for n in nodes if isinstance(n, ast.Attribute))


def without_dead_code(tree: ast.Module) -> ast.Module:
    """Drops functions, methods, classes and constants whose names stand nowhere else, until there are none.

    Not the switches, which find themselves.
    """
    called_by_others = re.compile(r"__\w+__|visit_\w+|forward|backward|main")
    while True:
        names = names_in(tree)
        owners = [
            (tree, node) for node in tree.body if defined(node) and "Switch" not in map(ast.unparse, bases_of(node))
        ]
        classes = [c for c in tree.body if isinstance(c, ast.ClassDef)]
        owners += [(c, f) for c in classes for f in c.body if isinstance(f, ast.FunctionDef)]
        dead = [(owner, node) for owner, node in owners if not called_by_others.fullmatch(defined(node))
                and names[defined(node)] == names_in(node)[defined(node)]]  # fmt: skip
        if not dead:
            return tree
        for owner, node in dead:
            owner.body.remove(node)
            owner.body = owner.body or [ast.Pass()]


def specialized(source: str, cfg: Config) -> str:
    """This program without the follow-up systems that `cfg` does not use; `load_config` refuses to turn one on.

    Bytes of code are bytes of the submission, so a run pays for what it uses.
    """
    section = next(where for where, name, *_ in manual() if name == "SMEAR_GATE_ENABLED")
    default = Config()
    knobs = [name.lower() for where, name, *_ in manual() if where == section]
    fixed = {k: getattr(cfg, k) for k in knobs if getattr(cfg, k) == getattr(default, k)}
    return ast.unparse(without_dead_code(ast.fix_missing_locations(Specialize(fixed).visit(ast.parse(source)))))


def is_kernel(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(ast.unparse(d).endswith("jit") for d in node.decorator_list)


class StripAnnotations(ast.NodeTransformer):
    """Drops what only readers need: annotations of signatures and of local variables. Keeps Triton kernels as they are:

    `tl.constexpr` is an annotation that means something, and an argument under a shorter local name is none any more.
    An empty function stands in the place of each, and `kernels` has its text.
    """

    def __init__(self) -> None:
        self.kernels: list[str] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if is_kernel(node):
            self.kernels.append(ast.unparse(node))
            return ast.parse(f"def KERNEL_{len(self.kernels) - 1}_(): pass").body[0]
        every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg)
        for arg in every:
            if arg is not None:
                arg.annotation = None
        node.returns = None
        node.body = [self._plain(s) for s in node.body]
        self.generic_visit(node)
        return node

    @staticmethod
    def _plain(s: ast.stmt) -> ast.stmt:
        if isinstance(s, ast.AnnAssign) and s.value is not None and isinstance(s.target, ast.Name):
            return ast.copy_location(ast.Assign([s.target], s.value), s)
        return s


def minify(source: str, keep: Sequence[str] = ()) -> str:
    """The same program without comments, docstrings, annotations and long names; Triton kernels keep theirs, and so do
    the globals in `keep`."""
    import python_minifier

    tree, strip = ast.parse(source), StripAnnotations()
    kernels = [node for node in ast.walk(tree) if is_kernel(node)]
    fixed = {n.id for k in kernels for n in ast.walk(k) if isinstance(n, ast.Name)} | {k.name for k in kernels}
    plain = ast.unparse(ast.fix_missing_locations(strip.visit(tree)))
    shorten = functools.partial(
        python_minifier.minify, remove_annotations=False, remove_literal_statements=True, hoist_literals=False
    )
    short = shorten(
        plain, rename_locals=True, preserve_locals=["self"], rename_globals=True,
        preserve_globals=[*dir(builtins), *keep, *sorted(fixed), *(f"KERNEL_{i}_" for i in range(len(kernels)))],
    )  # fmt: skip
    for number, kernel in enumerate(strip.kernels):
        line = re.compile(rf"^(\s*)def KERNEL_{number}_\(\):.*$", re.M)
        text = shorten(kernel, rename_locals=False, rename_globals=False)
        short = line.sub(lambda m, text=text: textwrap.indent(text, m[1]), short)
    return short


STUB = """# -*- coding: latin-1 -*-
import brotli,os,runpy,tempfile
with tempfile.TemporaryDirectory() as d:
 p=os.path.join(d,"train_gpt.py");open(p,"wb").write(brotli.decompress('''{}'''.encode("latin-1")));runpy.run_path(p,run_name="__main__")
"""


def self_extracting(program: str) -> bytes:
    """A Python file that unpacks `program` into a temporary folder and runs it.

    The compressed bytes stand in a latin-1 string of several lines, few of them escaped: 1 % longer than raw, where
    base85 is 25 %. The program becomes a real file because Triton reads the source of its kernels from disk.
    """
    text = _brotli(program.encode()).decode("latin-1").replace("\\", r"\\")
    for raw, safe in (("\r", r"\r"), ("\0(?=[0-7])", r"\x00"), ("\0", r"\0"), ("'(?=''|$)", r"\'")):
        text = re.sub(raw, lambda _, safe=safe: safe, text)
    return STUB.replace("{}", text).encode("latin-1")


def build_submission(folder: Path, artifact: bytes, cfg: Config) -> dict[str, int]:
    """Writes submission/train_gpt.py and submission/final_model.int6.ptz; returns their bytes and the source's."""
    source = Path(__file__).read_text()
    started = sys.orig_argv[-len(sys.argv)]  # the script, before its arguments
    # A submission that trains again submits itself: the file that unpacked this one.
    code = Path(started).read_bytes() if IS_SUBMISSION else self_extracting(minify(specialized(source, cfg)))
    write_atomically(folder / "train_gpt.py", lambda f: f.write(code))
    write_atomically(folder / ARTIFACT_NAME, lambda f: f.write(artifact))
    return {"source_bytes": len(source.encode())} | submission_bytes(folder, artifact)


def submission_bytes(folder: Path, artifact: bytes) -> dict[str, int]:
    """What counts: the bytes of the code in `folder`, of the artifact and of both."""
    code = (folder / "train_gpt.py").stat().st_size
    return {"code_bytes": code, "artifact_bytes": len(artifact), "total_bytes": code + len(artifact)}


ARTIFACT_NAME = "final_model.int6.ptz"


# --------------------------------------------------------------------------------------------------------------------
# 12. TEST-TIME TRAINING: score a chunk, then learn from it
# --------------------------------------------------------------------------------------------------------------------
class Window(NamedTuple):
    """The context in which one chunk of a document is scored; positions count from the document's first input."""

    start: int  # first input of the window
    length: int  # inputs in it
    offset: int  # first scored position inside it
    count: int  # scored positions


def windows(n_targets: int, chunk_size: int, context: int) -> list[Window]:
    """One window per chunk of a document: up to `context` inputs ending with the chunk (0: the chunk alone)."""
    rows = []
    for begin in range(0, n_targets, chunk_size):
        end = min(begin + chunk_size, n_targets)
        start = min(begin, max(0, end - context))
        rows.append(Window(start, end - start, begin - start, end - begin))
    return rows


class AdapterMatrix(NamedTuple):
    """One low-rank matrix in a row of adapters."""

    site: str
    side: str  # A or B
    layer: int | None  # the head has none
    shape: tuple[int, int]


class Adapters:
    """A low-rank pair per visit and site and one for the head, a set for each of N documents (LoRA, arXiv 2106.09685).

    A (R, in) starts the same for every document, from the seed alone; B (out, R) starts at zero, so new adapters change
    nothing. All that belongs to a document is a row: of the `values` (N, P), in float32, of `live`, which is what a
    model reads in its own dtype and has the gradient, and of the optimizer's moments. One update serves all, and
    documents come and go in the same memory, which a CUDA graph needs.
    """

    def __init__(
        self, cfg: Config, n_docs: int, layers: Sequence[int], dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        """`layers` of the visits, in their order."""
        d, kv, rank = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim, cfg.ttt_lora_rank
        wanted = dict(q=True, k=cfg.ttt_k_lora, v=True, attn_bypass=cfg.ttt_o_lora, mlp_bypass=cfg.ttt_mlp_lora)
        outs = dict(q=d, k=kv, v=kv, attn_bypass=d, mlp_bypass=d, head=cfg.vocab_size)
        self.cfg, self.dtype = cfg, dtype
        self.scale = cfg.ttt_lora_alpha / rank if cfg.ttt_lora_alpha else 1.0
        self.visits = {name: [*layers] for name, want in wanted.items() if want} | {"head": [None]}
        self.pieces, start, g = [], [], torch.Generator().manual_seed(cfg.seed)
        for site, mine in self.visits.items():
            a = (2 * torch.rand(len(mine), rank, d, generator=g) - 1) / d**0.5
            start += [a.flatten(), torch.zeros(len(mine) * outs[site] * rank)]
            self.pieces += [AdapterMatrix(site, "A", layer, (rank, d)) for layer in mine]
            self.pieces += [AdapterMatrix(site, "B", layer, (outs[site], rank)) for layer in mine]
        self.sizes = [math.prod(p.shape) for p in self.pieces]
        rates = torch.tensor([adapter_lr(p.side, p.layer, cfg) for p in self.pieces])
        self.start = torch.cat(start).to(device)
        self.rates = rates.repeat_interleave(torch.tensor(self.sizes)).to(device)
        self.steps = torch.zeros((), dtype=torch.float64, device=device)
        self.room: dict[str, Tensor] = {}
        self.restart(n_docs)

    def make_room(self, n_docs: int) -> None:
        """For up to `n_docs` documents."""
        self.room = {}  # first what there was goes: both may not fit
        self.values = self.live = self.first = self.second = None
        wanted = dict(first=self.cfg.ttt_beta1 > 0, second=self.cfg.ttt_optimizer == "adam")
        room = lambda dtype: torch.empty(n_docs, len(self.start), dtype=dtype, device=self.start.device)
        self.room |= {name: room(torch.float32) for name in ("values", *(n for n, want in wanted.items() if want))}
        self.room["live"] = self.room["values"] if self.dtype == torch.float32 else room(self.dtype)

    def restart(self, n_docs: int) -> None:
        """`n_docs` documents that have learned nothing."""
        if not self.room or n_docs > len(self.room["values"]):
            self.make_room(n_docs)
        self.resize(n_docs)
        self.values.copy_(self.start)
        self.live.detach().copy_(self.values)
        for moment in (self.first, self.second, self.steps):
            if moment is not None:
                moment.zero_()

    def resize(self, n_docs: int) -> None:
        rows = {name: t[:n_docs] for name, t in self.room.items()}
        self.values, self.first, self.second = rows["values"], rows.get("first"), rows.get("second")
        self.live = rows["live"].detach().requires_grad_()

    def keep(self, rows: Tensor) -> None:
        """Goes on with these documents alone."""
        for t in set(self.room.values()):  # in float32 values and live are one
            t[: len(rows)] = t[rows]
        self.resize(len(rows))

    def row(self, i: int) -> Adapters:
        """Those of one document, to read."""
        alone = copy.copy(self)
        alone.live = self.live[i : i + 1]
        return alone

    def pairs(self) -> tuple[list[Deltas], tuple[Tensor, Tensor]]:
        """What each visit adds, and the head: views of `live`, split once, so that its gradient is joined once."""
        parts: dict[tuple[str, str], list[Tensor]] = {}
        for p, part in zip(self.pieces, self.live.split(self.sizes, 1), strict=True):
            matrix = part.unflatten(1, p.shape)
            scaled = matrix if p.side == "A" or self.scale == 1 else self.scale * matrix
            parts.setdefault((p.site, p.side), []).append(scaled)
        pairs = {site: [*zip(parts[site, "A"], parts[site, "B"], strict=True)] for site in self.visits}
        (head,) = pairs.pop("head")
        return [Deltas(**dict(zip(pairs, row, strict=True))) for row in zip(*pairs.values(), strict=True)], head

    @torch.no_grad()
    def step(self, gradient: Tensor, adamw: Callable[..., Tensor]) -> None:
        """One update of all documents by the gradient of `live`: AdamW, or SGD with momentum TTT_BETA1."""
        cfg = self.cfg
        if cfg.ttt_optimizer == "sgd":
            gradient = gradient.float().add(self.values, alpha=cfg.ttt_weight_decay)
            if self.first is not None:
                gradient = self.first.mul_(cfg.ttt_beta1).add_(gradient)
            self.values.addcmul_(self.rates, gradient, value=-1)
            self.live.copy_(self.values)
            return
        self.steps += 1
        constants = AdamW(cfg.ttt_beta1, cfg.ttt_beta2, 1e-10, cfg.ttt_weight_decay)
        adamw(constants, self.steps, self.rates, gradient, self.values, self.live, self.first, self.second)


def adapter_lr(side: str, layer: int | None, cfg: Config) -> float:
    """Learning rate of a matrix: a slope over the layers, and more of it for B.

    The slope is #1695's, the ratio LoRA+'s (arXiv 2402.12354), the scale TTT_LORA_ALPHA that of #1767. None was
    published apart from the changes it came with. The head has no layer and keeps TTT_LORA_LR. The decoupled decay goes
    along with the rate.
    """
    slope = cfg.ttt_lora_layer_lr_alpha * (layer or 0) / max(cfg.num_layers - 1, 1)
    return cfg.ttt_lora_lr * (1 + slope) * (cfg.lora_plus_ratio if side == "B" else 1.0)


Part = tuple[Document, Window | None, bool]  # a document, its window of a chunk if it has one, whether there are later


class Chunk(NamedTuple):
    """One chunk of N documents on the device, padded to common lengths."""

    inputs: Tensor  # (N, T), with a kept context (N, AHEAD + T)
    targets: Tensor  # (N, C)
    at: Tensor  # (N, C): positions whose next token is scored
    scored: Tensor  # (N, C): 1 where a target counts
    learn: Tensor  # (N,): 1 for documents that have later chunks
    goes_on: bool  # whether any document has
    n_tokens: int
    n_bytes: int


def upload(values: Sequence[Any], device: torch.device) -> Tensor:
    """A tensor of numbers from the host, copied when the device gets to it."""
    t = torch.tensor(values)
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t


def padded_window(length: int, step: int) -> int:
    """Kernels want sizes that divide well, the allocator few of them: steps double beyond eight of them."""
    while step > 1 and length > 8 * step:
        step *= 2
    return math.ceil(length / step) * step


class TestTimeScorer:
    """Scores batches of documents, each with adapters of its own that learn from what has been scored."""

    def __init__(self, model: GPT, val: ValidationSet, cfg: Config, run: Run):
        self.model, self.cfg, self.run = model, cfg, run
        self.cached = cfg.ttt_context == "cached"
        self.ahead = AHEAD if self.cached else 0
        self.window_step = min(64, cfg.ttt_eval_seq_len) if model.kernels.fused else 1
        if self.cached:
            self.window_step = cfg.ttt_chunk_size
        self.read(val)
        layers = [v.layer for v in model.plan]
        self.adapters = Adapters(cfg, 1, layers, model.dtype, run.device)
        self.cache = Cache(cfg, len(layers), model.dtype, run.device) if self.cached else None

    def read(self, val: ValidationSet) -> None:
        """Takes the text to score, without an audit."""
        self.val, self.tokens = val, torch.from_numpy(val.tokens.astype(np.int32)).to(self.run.device)
        self.byte_sums = np.concatenate([[0], np.cumsum(val.token_bytes)])
        self.audit: Any = None  # an Audit; named here, it would stay in the submission
        self.tapin = TapIn(self) if self.cfg.tapin_enabled else None

    def bytes_of(self, doc: Document) -> int:
        """Original bytes of a document's targets."""
        return int(self.byte_sums[doc.start + doc.n_targets + 1] - self.byte_sums[doc.start + 1])

    def prepare(self, batches: Sequence[Sequence[Document]]) -> None:
        """What is done once, off the clock, when all kernels are built: memory for the largest of `batches`."""
        self.restart(max(map(len, batches), default=1))

    def schedule(self, docs: Sequence[Document]) -> Iterator[tuple[list[int] | None, list[Part]]]:
        """For each chunk which rows of the one before go on (None: all), then the parts of those.

        The batch is halved whenever no more than half of it goes on: documents are independent, so nothing changes. At
        the full window, which long documents run again for every chunk, it shrinks in four steps from one power of two
        to the next. Each size is a graph to record, 0.08 s: more of them pay there alone.
        """
        cfg, rows = self.cfg, [*range(len(docs))]
        context = 0 if self.cached else cfg.ttt_eval_seq_len
        plans = [windows(d.n_targets, cfg.ttt_chunk_size, context) for d in docs]
        for i in range(max(map(len, plans))):
            size, kept, active = len(rows), None, [at for at, r in enumerate(rows) if i < len(plans[r])]
            while size > 2 and len(active) <= size // 2:
                size = (size + 1) // 2
            if 0 < context <= i * cfg.ttt_chunk_size:
                step = 2 ** max(len(active).bit_length() - 3, 0)
                size = min(size, max(2, math.ceil(len(active) / step) * step))
            if size < len(rows):
                kept = active + [at for at, r in enumerate(rows) if i >= len(plans[r])][: size - len(active)]
                rows = [rows[at] for at in kept]
            yield kept, [(docs[r], plans[r][i] if i < len(plans[r]) else None, i + 1 < len(plans[r])) for r in rows]

    def width(self, parts: Sequence[Part]) -> int:
        """Of the padded window that holds those of all parts."""
        return padded_window(max(w.length for _, w, _ in parts if w), self.window_step)

    def over(self, val: ValidationSet) -> TestTimeScorer:
        """This scorer, with its adapters and all it has built, on another text."""
        other = copy.copy(self)
        other.read(val)
        return other

    def run_batch(self, docs: Sequence[Document]) -> Meter:
        """All targets of `docs`, in order; a document's tokens influence only its own later chunks."""
        meter, adapters, cache = Meter(self.run.device, len(docs)), self.adapters, self.cache
        self.restart(len(docs))
        rows = torch.arange(len(docs), device=self.run.device)
        if self.tapin:
            self.tapin.read(docs)
        for kept, parts in self.schedule(docs):
            if kept is not None:
                index = upload(kept, self.run.device)
                rows = rows[index]
                adapters.keep(index)
                if cache:
                    cache.keep(index)
            chunk = self.gather(parts)
            if self.tapin:
                losses, scores = self.tapin.score_chunk(chunk, self.tapin.chunk(parts), adapters, cache)
            else:
                losses = scores = self.score_chunk(chunk, adapters, cache)
            if not IS_SUBMISSION and self.audit:
                self.audit.see(parts, chunk, scores, adapters, cache)
            meter.add(scores * chunk.scored, chunk.n_tokens, chunk.n_bytes)
            meter.by_document[rows] += (scores.detach() * chunk.scored).double().sum(1)
            self.learn_chunk(chunk, losses)
            if cache:
                cache.commit()
        return meter

    def restart(self, n_docs: int) -> None:
        self.adapters.restart(n_docs)
        if self.cache:
            self.cache.restart(n_docs)

    def score_chunk(self, chunk: Chunk, adapters: Adapters, cache: Cache | None) -> Tensor:
        """Nats (N, C) of the chunk's targets, with the adapters as they are."""
        return self.model(chunk.inputs, chunk.targets, adapters=adapters, at=chunk.at, reduction="none", cache=cache)

    def learn_chunk(self, chunk: Chunk, losses: Tensor) -> None:
        """Updates the adapters of the documents that go on, from the losses just scored."""
        if not chunk.goes_on:
            return
        for repeat in range(self.cfg.ttt_grad_steps):
            if repeat:
                losses = self.score_chunk(chunk, self.adapters, self.cache)
            self.update(chunk, losses)

    def update(self, chunk: Chunk, losses: Tensor) -> None:
        loss = ((losses * chunk.scored).mean(dim=1) * chunk.learn).sum()
        (gradient,) = torch.autograd.grad(loss, self.adapters.live)
        self.adapters.step(gradient, self.model.kernels.adamw)

    def gather(self, parts: Sequence[Part]) -> Chunk:
        """The chunk's tensors; a document without a window (finished) is a row of padding."""
        device, width = self.run.device, self.cfg.ttt_chunk_size
        none = Window(0, 0, 0, 0)
        spans = [(d.start + (w or none).start, *(w or none)[1:]) for d, w, _ in parts]
        # Pinned copies: from pageable memory the host would wait for everything that the device has yet to do.
        start, length, offset, count = upload(spans, device).unsqueeze(-1).unbind(1)  # (N, 1) each
        column = torch.arange(-self.ahead, self.width(parts), device=device)
        inputs = torch.where(column < length, self.tokens[(start + column).clamp(0, len(self.tokens) - 1)], BOS).long()
        place = torch.arange(width, device=device)
        scored, at = place < count, (offset + place).clamp_max(len(column) - self.ahead - 1)
        targets = self.tokens[(start + at + 1).clamp_max(len(self.tokens) - 1)].long()
        first = [(s + o + 1, n) for s, _, o, n in spans]
        n_bytes = sum(int(self.byte_sums[a + n] - self.byte_sums[a]) for a, n in first)
        more = [m for *_, m in parts]
        n_tokens = sum(n for _, n in first)
        return Chunk(inputs, targets, at, scored, upload(more, device), any(more), n_tokens, n_bytes)


def captured(work: Callable[[], None], pool: Any) -> Callable[[], None]:
    """`work` as a CUDA graph and a call that replays it; nothing runs while it is recorded. On the CPU `work` itself.

    Kernels that no call has needed before may be loaded then, which the strict mode forbids.
    """
    if pool is None:
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="relaxed"):
        work()
    return graph.replay


class RecordedChunk:
    """A chunk's scoring and its learning for one shape (documents, window), from inputs that stay in place.

    `scorer` is the one that all copies for other texts come from.
    """

    def __init__(self, scorer: TestTimeScorer, chunk: Chunk, pool: Any):
        self.inputs = [t.clone() for t in chunk if isinstance(t, Tensor)]
        self.chunk = chunk._replace(**dict(zip(Chunk._fields, self.inputs, strict=False)))
        self.scorer, self.losses = scorer, chunk.scored.new_zeros(())
        self.score = captured(self.run_score, pool)
        self.learn = captured(self.run_learn, pool)

    def run_score(self) -> None:
        scorer = self.scorer
        self.losses = TestTimeScorer.score_chunk(scorer, self.chunk, scorer.adapters, scorer.cache)

    def run_learn(self) -> None:
        TestTimeScorer.update(self.scorer, self.chunk, self.losses)
        self.losses = self.losses.detach()


class GraphedScorer(TestTimeScorer):
    """The same by CUDA graphs: Python needs 95 ms to launch the 2,500 kernels of a chunk, a GPU 10 to 90 to run them.

    A shape is recorded when it first comes up, on the clock. All graphs share one memory, because each pair ends before
    the next begins; the largest is recorded beforehand, so that the others find their place in what it has left.
    """

    def __init__(self, model: GPT, val: ValidationSet, cfg: Config, run: Run):
        super().__init__(model, val, cfg, run)
        self.pool = torch.cuda.graph_pool_handle() if run.device.type == "cuda" else None
        self.recorded: dict[tuple[int, int], RecordedChunk] = {}
        self.original = self

    def at(self, chunk: Chunk) -> RecordedChunk:
        shape = tuple(chunk.inputs.shape)
        if shape not in self.recorded:
            self.recorded[shape] = RecordedChunk(self.original, chunk, self.pool)
        return self.recorded[shape]

    def shapes(self, batches: Sequence[Sequence[Document]]) -> list[tuple[int, int]]:
        """Those that come up in `batches`, the largest first."""
        shapes = {(len(p), self.ahead + self.width(p)) for docs in batches for _, p in self.schedule(docs)}
        return sorted(shapes, key=lambda s: (-math.prod(s), s))

    def prepare(self, batches: Sequence[Sequence[Document]]) -> None:
        super().prepare(batches)
        self.record(self.shapes(batches)[:1])

    def record(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Without a text."""
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.long, device=self.run.device)
        for n, width in shapes:
            self.restart(n)
            inputs, targets = zeros(n, width), zeros(n, self.cfg.ttt_chunk_size)
            self.at(Chunk(inputs, targets, targets, targets > 0, zeros(n) > 0, True, 0, 0))

    def restart(self, n_docs: int) -> None:
        """A graph knows its memory by address, and more documents than ever before get other memory."""
        if n_docs > len(self.adapters.room["values"]):
            self.recorded.clear()
        super().restart(n_docs)

    def score_chunk(self, chunk: Chunk, adapters: Adapters, cache: Cache | None) -> Tensor:
        if adapters is not self.adapters:  # of an audit
            return super().score_chunk(chunk, adapters, cache)
        recorded = self.at(chunk)
        torch._foreach_copy_(recorded.inputs, [t for t in chunk if isinstance(t, Tensor)])
        recorded.score()
        return recorded.losses

    def update(self, chunk: Chunk, losses: Tensor) -> None:
        self.at(chunk).learn()


def ttt_scorer(model: GPT, val: ValidationSet, cfg: Config, run: Run) -> TestTimeScorer:
    """Graphs, where all chunks of one shape are the same work: heads of the specification, which CrossPassXsa reads,
    cut a kept context by a number of the moment."""
    in_place = model.kernels.attention.in_place and not cfg.cross_pass_xsa_enabled
    same = not cfg.tapin_enabled and (cfg.ttt_context == "rerun" or in_place)
    return (GraphedScorer if same and graphable(cfg, run, model) else TestTimeScorer)(model, val, cfg, run)


class Phase(NamedTuple):
    """Batches of documents that are scored with the same base model."""

    batches: list[list[Document]]
    numbers: list[int]  # of the batches, counted from the shortest documents: the public log's numbering


def plan_phases(documents: Sequence[Document], cfg: Config) -> list[Phase]:
    """Longest documents first; the first PREFIX_DOCS in PHASED_TTT_NUM_PHASES shares, each followed by base learning.

    A function of the documents alone: every rank knows every phase, whichever rank scores a batch. Three phases instead
    of one gained 0.0008 bpb (#1626, one seed), a fourth with other gains nothing (#1727: 1.07217 against 1.07193).
    """
    ordered = sorted(documents, key=lambda d: (-d.n_targets, d.start))
    prefix, n = min(cfg.phased_ttt_prefix_docs, len(ordered)), cfg.phased_ttt_num_phases
    edges = [0, *(prefix * (p + 1) // n for p in range(n)), len(ordered)]
    groups = []
    for a, b in itertools.pairwise(edges):
        share = ordered[a:b]
        # Equal batches: a remainder of two documents takes a sixth of a full batch's time for a fiftieth of its text.
        size = math.ceil(len(share) / max(1, math.ceil(len(share) / cfg.ttt_batch_size))) or 1
        groups.append([share[i : i + size] for i in range(0, len(share), size)])
    total = sum(map(len, groups))
    first = [0, *itertools.accumulate(map(len, groups))]
    return [Phase(g, [total - f - i for i in range(len(g))]) for g, f in zip(groups, first, strict=False)]


def sampled_documents(val: ValidationSet, cfg: Config) -> list[Document]:
    documents = val.documents()
    if cfg.val_doc_fraction < 1:
        n = max(1, round(cfg.val_doc_fraction * len(documents)))
        documents = sorted(random.Random(cfg.seed).sample(documents, n))
    return documents


def run_phase(scorer: TestTimeScorer, number: int, phase: Phase, n_batches: int, so_far: Meter, began: float) -> Meter:
    """Scores a phase's batches, each claimed by one rank from a shared counter; returns the sum over the ranks."""
    run, mine, rows = scorer.run, Meter(), []
    score = scorer.audit.run_batch if not IS_SUBMISSION and scorer.audit else scorer.run_batch
    while (claim := run.store.add(f"ttt/phase{number}", 1) - 1) < len(phase.batches):
        docs, start = phase.batches[claim], time.monotonic()
        meter = score(docs)
        lengths = [d.n_targets for d in docs]
        row = dict(phase=number, batch=phase.numbers[claim], docs=len(docs), tokens=meter.tokens, bytes=meter.bytes,
                   nats=meter.nats.item(), min_len=min(lengths), max_len=max(lengths))  # fmt: skip
        nats = [[d.start, round(x, 3)] for d, x in zip(docs, meter.by_document.tolist(), strict=False)]
        rows.append({**row, "seconds": round(time.monotonic() - start, 3), "documents": nats})
        mine.merge(meter)
        running = Meter()
        running.merge(so_far)
        running.merge(mine)
        learned = int(number > scorer.cfg.phased_ttt_num_phases)
        run.log(f"ttp: b{row['batch']}/{n_batches} bl:{meter.loss:.4f} bb:{meter.bpb:.4f} rl:{running.loss:.4f} "
                f"rb:{running.bpb:.4f} dl:{min(lengths)}-{max(lengths)} gd:{learned}")  # fmt: skip
        run.progress(f"ttt phase {number}", claim + 1, len(phase.batches), began)
    total = Meter()  # in the order of batches, not of ranks: a sum depends on its order
    for row in sorted((r for share in run.gather(rows) for r in share), key=lambda r: -r["batch"]):
        run.metric("ttt", **row)
        total.add(torch.tensor(row["nats"], dtype=torch.float64), row["tokens"], row["bytes"])
    return total


def adapt_and_score(model: GPT, val: ValidationSet, cfg: Config, run: Run) -> tuple[Meter, float]:
    """Phased test-time training: the total score and its seconds.

    Within a document each chunk is scored before the adapters learn from it; between phases the base model learns from
    documents whose every token has been scored. Raises Stop unless each target was scored exactly once.
    """
    documents = sampled_documents(val, cfg)
    phases = only_batches(plan_phases(documents, cfg), cfg)
    scorer = ttt_scorer(model, val, cfg, run)
    warm_up_ttt(scorer, [docs for phase in phases for docs in phase.batches])
    for switch in model.switches:
        switch.begin_scoring(model)  # after the warm-up, whose text is random
    scorer.audit = Audit(scorer) if not IS_SUBMISSION and cfg.audit else None
    n_batches = max((n for p in phases for n in p.numbers), default=0)
    prefix = sum(len(b) for p in phases[:-1] for b in p.batches)
    boundaries = list(itertools.accumulate(sum(map(len, p.batches)) for p in phases[:-1]))
    run.log("\nbeginning TTT eval timer")
    run.log(f"ttt_phased: total_docs:{len(documents)} prefix_docs:{prefix} suffix_docs:{len(documents) - prefix} "
            f"num_phases:{cfg.phased_ttt_num_phases} boundaries:{boundaries}")  # fmt: skip
    began, total, scored = time.monotonic(), Meter(), []
    for number, phase in enumerate(phases, 1):
        model.requires_grad_(False)
        total.merge(run_phase(scorer, number, phase, n_batches, total, began))
        scored += [d for batch in phase.batches for d in batch]
        if number < len(phases) and scored:
            seconds = time.monotonic() - began
            run.log(f"ttpp: phase:{number}/{len(phases) - 1} pd:{len(scored)} gd:{len(scored)} t:{seconds:.1f}s")
            adapt_base(model, val, scored, cfg, run, number)
            run.log(f"ttpr: phase:{number}/{len(phases) - 1} t:{time.monotonic() - began:.1f}s")
    total.expect(sum(d.n_targets for d in scored), sum(scorer.bytes_of(d) for d in scored))
    for switch in model.switches:
        switch.vectors = None
    if scorer.tapin:
        scorer.tapin.log(total.tokens)
    if cfg.val_doc_fraction == 1 and not cfg.ttt_eval_batches:
        total.expect(val.n_targets, val.n_bytes)
    if not math.isfinite(total.loss):
        raise Stop(f"the loss is {total.loss} after test-time training: lower TTT_LORA_LR or GLOBAL_TTT_LR")
    if not IS_SUBMISSION and scorer.audit:
        scorer.audit.finish(scored, total)
    return total, time.monotonic() - began


def only_batches(phases: list[Phase], cfg: Config) -> list[Phase]:
    """TTT_EVAL_BATCHES: those batches alone, by ascending length, without base learning."""
    if not cfg.ttt_eval_batches:
        return phases
    wanted = {int(n) for n in cfg.ttt_eval_batches.split(",")}
    if missing := sorted(wanted - {n for p in phases for n in p.numbers}):
        last = max((n for p in phases for n in p.numbers), default=0)
        raise Stop(f"TTT_EVAL_BATCHES: there is no batch {missing[0]}: choose from 1 to {last}", 2)
    pairs = sorted((n, b) for p in phases for n, b in zip(p.numbers, p.batches, strict=True) if n in wanted)
    return [Phase([b for _, b in pairs], [n for n, _ in pairs])]


def warm_up_ttt(scorer: TestTimeScorer, batches: Sequence[Sequence[Document]]) -> None:
    """Runs every kernel once on random tokens, so that building it is not counted as evaluation; then the scorer makes
    room for `batches`, of which it takes no more than how many and how long they are."""
    run, cfg = scorer.run, scorer.cfg
    run.log("ttt_lora:warming up compile (random tokens, no val data)")
    began = time.monotonic()
    if scorer.model.kernels.fused:
        rng = np.random.Generator(np.random.PCG64(cfg.seed))
        tokens = rng.integers(BOS + 1, cfg.vocab_size, 8 * cfg.eval_seq_len).astype(np.uint16)
        fake = ValidationSet(tokens, np.ones(len(tokens), np.int64))
        scorer.model.requires_grad_(False)
        stand_in = TestTimeScorer(scorer.model, fake, cfg, run)  # kernels are built by calls of their own
        for size, length in ((4, 3 * cfg.ttt_chunk_size), (6, 6 * cfg.ttt_chunk_size)):
            stand_in.run_batch([Document(i, length) for i in range(size)])
        weights = {n: p.detach().clone() for n, p in scorer.model.named_parameters()}
        adapt_base(scorer.model, fake, [Document(0, len(tokens) - 1)], cfg, run, 0)
        with torch.no_grad():
            for n, p in scorer.model.named_parameters():
                p.copy_(weights[n])
        del stand_in, weights  # their memory is wanted next
        scorer.prepare(batches)
        run.sync()
    run.log(f"ttt_lora:compile warmup done ({time.monotonic() - began:.1f}s)")


def base_lr(cfg: Config, chunk: int, n_chunks: int) -> float:
    """Linear warm-up, then a cosine to zero over the chunks of a phase."""
    warm = min(cfg.global_ttt_warmup_chunks, n_chunks)
    if chunk < warm:
        return cfg.global_ttt_warmup_start_lr + (cfg.global_ttt_lr - cfg.global_ttt_warmup_start_lr) * chunk / warm
    return cfg.global_ttt_lr * 0.5 * (1 + math.cos(math.pi * (chunk - warm) / max(n_chunks - warm - 1, 1)))


def adapt_base(model: GPT, val: ValidationSet, scored: Sequence[Document], cfg: Config, run: Run, phase: int) -> None:
    """SGD of all weights over the scored documents, each rank on its share of every chunk; a collective per step.

    The number of steps follows from the text alone, and a rank whose share is empty adds zero, so ranks never diverge.
    """
    text = np.concatenate([*(val.tokens[d.start : d.start + d.n_targets] for d in scored), [BOS]]).astype(np.uint16)
    model.requires_grad_(True)
    params = list(model.parameters())
    groups = [dict(params=params, times=1.0)]
    if more := [s.vectors.requires_grad_() for s in model.switches if s.vectors is not None]:
        groups.append(dict(params=more, times=cfg.eval_hash_emb_lr_mult))
        params = params + more
    optimizer = torch.optim.SGD(groups, lr=cfg.global_ttt_lr, momentum=cfg.global_ttt_momentum)
    seq, chunk_tokens = cfg.eval_seq_len, cfg.global_ttt_chunk_tokens
    n_chunks = math.ceil((len(text) - 1) / chunk_tokens)
    n_shares = MICRO_STEPS if cfg.deterministic else run.world
    share = min(math.ceil(chunk_tokens / seq / n_shares), cfg.global_ttt_batch_seqs) * seq
    began = time.monotonic()
    for chunk in range(n_chunks):
        end = min((chunk + 1) * chunk_tokens, len(text) - 1)
        lr = base_lr(cfg, chunk, n_chunks)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["times"]
        steps = [*range(chunk * chunk_tokens, end, share * n_shares)]
        for start in steps * cfg.global_ttt_epochs:
            shares = range(start, start + share * n_shares, share)
            loss, grads = base_gradients(model, params, text[: end + 1], shares, cfg, run)
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            nn.utils.clip_grad_norm_(params, cfg.global_ttt_grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        mean_loss = run.sum(loss).item()
        if phase:
            run.metric("base_sgd", phase=phase, chunk=chunk, lr=lr, loss=mean_loss)
            run.progress(f"base learning {phase}", chunk + 1, n_chunks, began)
    for p in params:
        p.requires_grad_(False)


def base_gradients(
    model: GPT, params: Sequence[Tensor], text: np.ndarray, shares: range, cfg: Config, run: Run
) -> tuple[Tensor, list[Tensor | None]]:
    """This rank's part of the mean loss of all shares, and the gradients of the whole.

    shares: where in the text each begins, as long as the step of the range or until the text ends: one share per rank.
    DETERMINISTIC: MICRO_STEPS shares, whatever the ranks, whose gradients are added in their order.
    """
    end = len(text) - 1
    n_targets = min(shares.stop, end) - shares.start
    sums = [torch.zeros_like(p) for p in params] if cfg.deterministic else []
    seen = torch.zeros((), device=run.device)
    for start in shares[run.rank :: run.world]:
        a, b = min(start, end), min(start + shares.step, end)
        loss = base_loss(model, text[a : b + 1], shares.step, cfg, run) / n_targets
        # None where a switch acts in repeated visits that this model does not make
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        grads = [None if g is None else g.contiguous() for g in grads]  # for the sum over ranks
        seen += loss.detach()
        for i, grad in enumerate(grads):
            if grad is not None:
                run.add_in_order(sums[i], grad) if sums else run.sum(grad)
    return seen, [None if grad is None else total for total, grad in zip(sums or grads, grads, strict=True)]


def base_loss(model: GPT, tokens: np.ndarray, row: int, cfg: Config, run: Run) -> Tensor:
    """Summed nats of the targets in `tokens` (n inputs and one target more), padded to `row` inputs."""
    n = max(len(tokens) - 1, 0)
    tokens = np.pad(tokens, (0, row + 1 - len(tokens)), constant_values=BOS)
    # Sequences are cut on one grid whatever the ranks' shares: every number of ranks learns from the same pieces.
    edges = np.arange(0, row, cfg.eval_seq_len)
    if cfg.global_ttt_respect_doc_boundaries:
        edges = np.union1d(edges, np.flatnonzero(tokens[:-1] == BOS))
    inputs, targets, docs = packed_row(tokens, cfg.eval_seq_len, run.device, edges)
    counts = (torch.arange(row, device=run.device) < n)[None]
    return (model(inputs, targets, docs=docs, reduction="none") * counts).sum()


# --------------------------------------------------------------------------------------------------------------------
# 13. PIPELINE: stages, resume, report, main
# --------------------------------------------------------------------------------------------------------------------
STAGES = ("train", "calibrate", "quantize", "pack", "evaluate", "ttt")
TRAINED = ("steps", "train_seconds", "looped")  # numbers of the training that go with its weights from file to file


def shape_fingerprint(cfg: Config, fields: Sequence[str] = MODEL_FIELDS) -> dict[str, Any]:
    """The settings that decide every tensor's shape and meaning."""
    return {k: getattr(cfg, k) for k in fields} | {"tokenizer": tokenizer_fingerprint(cfg)}


def load_stage_file(
    cfg: Config, run: Run, name: str, asked: str, fields: Sequence[str] = MODEL_FIELDS, **how: Any
) -> dict[str, Any]:
    """A file that an earlier stage left in the run folder. Raises Stop if it is missing, broken or of another model."""
    path = run.folder / name
    try:
        state = torch.load(path, weights_only=True, **{"map_location": run.device, **how})
        theirs = state["fingerprint"]
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # torch raises many kinds for a damaged file
        raise Stop(f"{asked} cannot read {path} ({type(e).__name__}): start from an earlier stage", 2) from None
    ours = shape_fingerprint(cfg, fields)
    theirs = shape_fingerprint(Config(), fields) | theirs  # a file may be older than a setting
    if differ := [f"{k.upper()}={theirs[k]} there, {ours[k]} here" for k in ours if theirs[k] != ours[k]]:
        remedy = "set the knobs of that run (its run.json has them)"
        raise Stop(f"{path} belongs to another model: {'; '.join(differ)}; {remedy}", 2)
    return state


def new_model(cfg: Config, run: Run, initialize: bool = False) -> GPT:
    """On the device, with weights by the seed, to train, or with whatever memory holds, to be loaded and scored."""
    seed_everything(cfg.seed)
    return GPT(cfg, choose_kernels(cfg, run.device), run.dtype, initialize).place(run.device).train(initialize)


def train_stage(cfg: Config, run: Run, val: ValidationSet, result: dict[str, Any]) -> GPT:
    """Trains, scores the averaged weights and saves them."""
    model = new_model(cfg, run, initialize=True)
    run.log(f"kernels: {model.kernels.why}")
    run.log(f"model_params:{sum(p.numel() for p in model.parameters())}")
    if cfg.max_wallclock_seconds > 0:
        budget = cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds
        run.log(f"gptq:reserving {cfg.gptq_reserve_seconds:.0f}s, effective={1000 * budget:.0f}ms")
    run.training = True
    with run.stage("train"):
        progress = train(cfg, run, model, val)
    reserved = torch.cuda.max_memory_reserved() >> 20 if run.device.type == "cuda" else run.peak_memory_mib()
    run.log(f"peak memory allocated: {run.peak_memory_mib()} MiB reserved: {reserved} MiB")
    result.update(steps=progress.step, train_seconds=progress.seconds, looped=progress.looped)
    numbers = {k: result[k] for k in TRAINED}
    state = {"fingerprint": shape_fingerprint(cfg), "model": model.state_dict(), **numbers}
    run.save("01_weights.pt", lambda f: torch.save(state, f))
    run.training = False  # from here a signal ends the process at once
    if stop := int(run.agree(run.stop_signal)[0]):  # asked for after the last step
        raise Interrupted(stop)
    score_float(cfg, run, model, val, result)
    return model


def score_float(cfg: Config, run: Run, model: GPT, val: ValidationSet, result: dict[str, Any]) -> None:
    with run.stage("evaluate float") as clock:
        score = evaluate(model, val, cfg, run, "pre-quantization post-ema")
    result.update(bpb_float=score.bpb, loss_float=score.loss, float_seconds=clock["seconds"])


def restored_model(cfg: Config, run: Run, result: dict[str, Any]) -> GPT:
    """The model of 01_weights.pt."""
    model, state = new_model(cfg, run), load_stage_file(cfg, run, "01_weights.pt", f"FROM_STAGE={cfg.from_stage}")
    model.load_state_dict(state["model"])
    model.looped = state["looped"]
    result.update({k: state[k] for k in TRAINED})
    return model


def checkpoint_model(cfg: Config, run: Run) -> GPT:
    """The model of a float checkpoint: our 01_weights.pt, or a public state dict (loop on, as the record scores)."""
    path = cfg.float_checkpoint
    asked = f"{'HOTSTART_FP_CKPT' if cfg.hotstart_fp_ckpt else 'EVAL_ONLY_CHECKPOINT'}={path}"
    try:
        file = torch.load(path, map_location=run.device, weights_only=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:
        raise Stop(f"{asked} cannot be read ({type(e).__name__})", 2) from None
    model = new_model(cfg, run)
    try:
        model.load_state_dict(banked(file, model.state_dict()))
    except ValueError as e:
        raise Stop(f"{asked} does not fit the settings: {e}", 2) from None
    model.looped = file.get("looped", True)  # a public checkpoint does not say: it was trained with the loop
    return model


def banked(file: Any, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with exactly the names and shapes of `like` from what a checkpoint file holds.

    That is a state dict or a dict with one under `state_dict` or `model`, in banks or with a name per matrix. Raises
    ValueError naming whatever is missing, unknown or of another shape.
    """
    if isinstance(file, Mapping):
        file = next((file[k] for k in ("state_dict", "model") if isinstance(file.get(k), Mapping)), file)
    named = isinstance(file, Mapping) and all(isinstance(k, str) and isinstance(x, Tensor) for k, x in file.items())
    if not named:
        raise ValueError("it holds no state dict, neither at its top nor under state_dict or model")
    flat = not any(k.endswith("_bank") for k in file)
    want = unbank(like) if flat else like
    shapes = [f"{k} {tuple(file[k].shape)} instead of {tuple(x.shape)}" for k, x in want.items()
              if k in file and file[k].shape != x.shape]  # fmt: skip
    troubles = {"it lacks": sorted(want.keys() - file.keys()), "it has the unknown": sorted(file.keys() - want.keys()),
                "other shapes:": shapes}  # fmt: skip
    if any(troubles.values()):
        some = lambda names: ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise ValueError("; ".join(f"{what} {some(names)}" for what, names in troubles.items() if names))
    return rebank(file) if flat else dict(file)


def calibrate_stage(cfg: Config, run: Run, model: GPT, result: dict[str, Any]) -> dict[str, Tensor]:
    run.log("GPTQ:collecting Hessians from calibration data...")
    with run.stage("calibrate") as clock:
        hessians = calibrate(model, calibration_batches(cfg, run), run)
    n_matrices = len(MATRICES) * cfg.num_layers + 1
    run.log(f"GPTQ:collected {n_matrices} Hessians in {clock['seconds']:.1f}s")
    result["calibrate_seconds"] = clock["seconds"]
    state = {"fingerprint": shape_fingerprint(cfg), "hessians": hessians, "calibrate_seconds": clock["seconds"]}
    run.save("02_hessians.pt", lambda f: torch.save(state, f))
    return hessians


def quantize_stage(
    cfg: Config, run: Run, model: GPT, hessians: Mapping[str, Tensor], result: dict[str, Any]
) -> dict[str, Coded]:
    state = {k: v.detach() for k, v in model.state_dict().items()}
    run.save("final_model.pt", lambda f: torch.save(state, f))
    if cfg.save_pre_gptq:
        run.save("pre_gptq.pt", lambda f: torch.save(unbank(state), f))
    with run.stage("quantize") as clock:
        coded = quantize(state, hessians, cfg, run)
    result["quantize_seconds"] = clock["seconds"]
    if run.main:
        run.log(f"Serialized model: {(run.folder / 'final_model.pt').stat().st_size} bytes")
    file = {"fingerprint": shape_fingerprint(cfg, CODED_FIELDS), "coded": {k: tuple(c) for k, c in coded.items()},
            **{k: result.get(k) for k in (*TRAINED, "calibrate_seconds")}}  # fmt: skip
    run.save("03_coded.pt", lambda f: torch.save(file, f))
    return coded


def pack_stage(cfg: Config, run: Run, coded: Mapping[str, Coded], result: dict[str, Any]) -> bytes:
    """Writes the artifact and the submission; a size over the limit is reported now and fails the run at its end."""
    with run.stage("pack") as clock:
        artifact = run.alone(lambda: pack(coded, result["looped"], cfg))
        run.save(ARTIFACT_NAME, lambda f: f.write(artifact))
        sizes = run.alone(lambda: build_submission(run.folder / "submission", artifact, cfg))
    source = sizes.pop("source_bytes")
    result.update(pack_seconds=clock["seconds"], **sizes)
    run.metric("sections", bytes=section_bytes(artifact), code=sizes["code_bytes"])
    run.log(f"Code size (uncompressed): {source} bytes")
    run.log(f"Code size (compressed): {sizes['code_bytes']} bytes")
    run.log(f"Serialized model quantized+{cfg.compressor}: {sizes['artifact_bytes']} bytes")
    run.log(f"Total submission size quantized+{cfg.compressor}: {sizes['total_bytes']} bytes")
    if (over := sizes["total_bytes"] - ARTIFACT_LIMIT) > 0:
        run.log(
            f"ERROR: the submission is {over} bytes over {ARTIFACT_LIMIT}: raise the *_CLIP_SIGMAS or lower EMBED_BITS"
        )
    return artifact


def model_from_artifact(cfg: Config, run: Run, blob: bytes) -> GPT:
    """The scoring half starts here: nothing but the artifact says what the model is."""
    try:
        state, looped, settings = unpack(blob)
        shape = {k: getattr(Config(), k) for k in CODED_FIELDS}
        if read_header(blob)[0].get("tokenizer", "") not in ("", tokenizer_fingerprint(cfg)):
            raise ArtifactError(f"its tokens are those of another tokenizer than {cfg.tokenizer_file}")
        if any(k not in shape or type(v) is not type(shape[k]) for k, v in settings.items()):
            raise ArtifactError("its settings are not those of a model")
        shape |= settings
        mine = replace(cfg, **shape)
        if broken := [sentence for bad, sentence in config_rules(mine) if bad]:
            raise ArtifactError(f"its settings cannot work: {broken[0]}")
        if sum(state[k].numel() for k in state) < estimated_parameters(mine):
            raise ArtifactError("it holds fewer weights than its settings need")
        if not 0 <= looped <= mine.num_loops:
            raise ArtifactError(f"it asks for {looped} extra passes of {mine.num_loops}")
        if mine.vocab_size != cfg.vocab_size:
            raise ArtifactError(f"it has a vocabulary of {mine.vocab_size}: set VOCAB_SIZE and a tokenizer to match")
        model = new_model(mine, run)
        for switch in model.switches:
            state = switch.decode(state, run)
        model.load_state_dict(state)
    except torch.OutOfMemoryError:  # says nothing of the artifact
        raise
    except (ArtifactError, ArithmeticError, RuntimeError, TypeError, ValueError) as e:
        raise Stop(f"cannot use this artifact: {e}", 2) from None
    model.looped = looped
    return model


def score_stages(run: Run, model: GPT, val: ValidationSet, result: dict[str, Any], first: str) -> None:
    """Plain evaluation and test-time training of the artifact's model."""
    cfg = model.cfg
    result["looped"] = model.looped
    run.log(f"artifact: looped={model.looped} kernels: {model.kernels.why}")
    if first != "ttt":
        with run.stage("evaluate") as clock:
            score = evaluate(model, val, cfg, run, "quantized")
        result.update(bpb_quantized=score.bpb, loss_quantized=score.loss, eval_seconds=clock["seconds"])
    if not cfg.ttt_enabled:
        return
    with run.stage("ttt"):
        score, seconds = adapt_and_score(model, val, cfg, run)
    run.log(f"quantized_ttt_phased val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f} eval_time:{1000 * seconds:.0f}ms")
    run.log(f"total_eval_time:{seconds:.1f}s")
    partial = cfg.val_doc_fraction < 1 or bool(cfg.ttt_eval_batches)
    result.update({"bpb_ttt_partial" if partial else "bpb_ttt": score.bpb, "loss_ttt": score.loss})
    result["ttt_seconds"] = seconds


def artifact_to_score(cfg: Config, run: Run) -> bytes:
    path = Path(cfg.eval_only_artifact) if cfg.eval_only_artifact else run.folder / ARTIFACT_NAME
    try:
        return path.read_bytes()
    except OSError as e:
        raise Stop(f"cannot read the artifact {path}: {e.strerror}", 2) from None


def pipeline(cfg: Config, run: Run) -> dict[str, Any]:
    """Runs the stages from the first that is asked for; returns the numbers of the result block."""
    first = cfg.from_stage or "train"
    if cfg.float_checkpoint:
        first = "calibrate"
    elif cfg.eval_only_artifact:
        first = "evaluate"
    at = STAGES.index(first)
    preflight(cfg, run, needs_training_data=at <= STAGES.index("calibrate"))
    val = load_validation(cfg)
    result: dict[str, Any] = {"seed": cfg.seed, "world": run.world}
    makes, model = at <= STAGES.index("pack"), None  # or else an artifact is there
    if cfg.float_checkpoint:
        model = checkpoint_model(cfg, run)
    elif not makes:
        blob = artifact_to_score(cfg, run)
        model = model_from_artifact(cfg, run, blob)
        if cfg.from_stage:
            result.update(run.alone(lambda: earlier_figures(run, blob)))
    open_folder(run)  # what is refused has been refused: nothing was written before
    describe_run(cfg, run, val)
    for switch in switches(cfg):
        switch.begin(run)
    if makes:
        blob = make_artifact(cfg, run, val, result, at, model)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        model = model_from_artifact(cfg, run, blob)
    score_stages(run, model, val, result, first)
    result["peak_memory_mib"] = run.peak_memory_mib()
    for switch in switches(cfg):
        switch.finish(run, result)
    return result


def earlier_figures(run: Run, artifact: bytes) -> dict[str, Any]:
    """Bytes and seconds of the stages that made this artifact, where their files are: budgets hold for it, too."""
    code = run.folder / "submission" / "train_gpt.py"
    figures = submission_bytes(code.parent, artifact) if code.is_file() else {}
    try:
        coded = torch.load(run.folder / "03_coded.pt", "cpu", mmap=True, weights_only=True)
    except Exception:  # missing, or damaged in one of many ways: scoring needs the artifact alone
        return figures
    return figures | figures_of(coded)


def figures_of(coded: Mapping[str, Any]) -> dict[str, Any]:
    """What 03_coded.pt knows of the stages before it."""
    return {k: coded[k] for k in (*TRAINED, "calibrate_seconds") if coded.get(k) is not None}


def make_artifact(
    cfg: Config, run: Run, val: ValidationSet, result: dict[str, Any], at: int, model: GPT | None
) -> bytes:
    """The training half: weights, Hessians, codes, artifact, each from its stage or from the file that stage left.

    model: that of a float checkpoint.
    """
    if at == STAGES.index("pack"):
        state = load_stage_file(cfg, run, "03_coded.pt", "FROM_STAGE=pack", CODED_FIELDS, map_location="cpu")
        result.update(figures_of(state))
        return pack_stage(cfg, run, {k: Coded(*parts) for k, parts in state["coded"].items()}, result)
    if model:
        run.log(f"EVAL_ONLY_BYPASS: loading {cfg.float_checkpoint}, skipping training")
        run.log(f"EVAL_ONLY_BYPASS: model loaded, compiled, looping_active={model.looped > 0}")
        result.update(looped=model.looped)
        score_float(cfg, run, model, val, result)
    elif at == 0:
        model = train_stage(cfg, run, val, result)
    else:
        model = restored_model(cfg, run, result)
    if at <= STAGES.index("calibrate"):
        hessians = calibrate_stage(cfg, run, model, result)
    else:
        state = load_stage_file(cfg, run, "02_hessians.pt", "FROM_STAGE=quantize")
        hessians, result["calibrate_seconds"] = state["hessians"], state["calibrate_seconds"]
    return pack_stage(cfg, run, quantize_stage(cfg, run, model, hessians, result), result)


def describe_run(cfg: Config, run: Run, val: ValidationSet) -> None:
    """The head of the log, and run.json: what ran, where, on which data."""
    changed = {f.name: getattr(cfg, f.name) for f in fields(cfg) if getattr(cfg, f.name) != f.default}
    gpu = f"CPU, {torch.get_num_threads()} threads"
    if run.device.type == "cuda":
        gpu = torch.cuda.get_device_name(run.device)
    info = {
        "config": {f.name: getattr(cfg, f.name) for f in fields(cfg)},
        "changed": changed,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                     "triton": getattr(triton, "__version__", None)},
        "device": gpu, "world": run.world, "dtype": str(run.dtype), "commit": git_commit(), "data": val.fingerprint(),
        "tokenizer": tokenizer_fingerprint(cfg),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }  # fmt: skip
    run.save("run.json", lambda f: f.write(json.dumps(info, indent=1).encode()))
    run.log("=" * 100, console=False)
    continues = cfg.from_stage or cfg.resume
    run.log("(source: as above)" if continues else Path(__file__).read_text(), console=False)
    run.log("=" * 100, console=False)
    run.log("Hyperparameters:", console=False)
    for name in sorted(info["config"]):
        run.log(f"  {name}: {info['config'][name]}", console=False)
    run.log(f"run {run.folder} on {run.world} x {gpu}, {info['dtype']}, commit {info['commit'][:12] or 'unknown'}, "
            f"torch {torch.__version__}")  # fmt: skip
    run.log("changed knobs: " + (" ".join(f"{k.upper()}={v}" for k, v in changed.items()) or "none: the defaults"))
    for name in [] if IS_SUBMISSION else sorted(set(RETIRED) & set(os.environ)):
        run.log(f"WARNING: {name} has no effect: {RETIRED[name]}")
    data = info["data"]
    run.log(f"train_shards: {len(train_files(cfg))}")
    run.log(f"val_tokens: {val.n_targets}")
    run.log(f"val data: sha256 {data['val_sha256'][:16]} documents {data['val_documents']} bytes {data['val_bytes']} "
            f"bytes/token {data['bytes_per_token']} tokenizer {info['tokenizer'][:16]}")  # fmt: skip


def report(cfg: Config, run: Run, result: dict[str, Any]) -> bool:
    """The result block, the last lines of the log; says whether the run keeps all budgets.

    Training that was asked to go by steps alone, MAX_WALLCLOCK_SECONDS=0, has no budget of seconds.
    """
    run.metric("result", **result)
    info = run.alone(lambda: json.loads((run.folder / "run.json").read_text()))
    run.save("run.json", lambda f: f.write(json.dumps(info | {"result": result}, indent=1).encode()))
    names = dict(
        bpb_float="float (EMA)", bpb_quantized="quantized", bpb_ttt="after TTT", bpb_ttt_partial="TTT, partial"
    )
    run.log("\nresult")
    run.log("| stage | bpb |\n|---|---|")
    for key, label in names.items():
        if key in result:
            run.log(f"| {label} | {result[key]:.5f} |")
    if result.get("bpb_ttt", 0) > result.get("bpb_quantized", math.inf):
        run.log("WARNING: test-time training made the score worse: raise TTT_WEIGHT_DECAY or lower TTT_LORA_LR")
    training = result.get("train_seconds", 0) + result.get("calibrate_seconds", 0)
    gates = [
        ("artifact bytes", result.get("total_bytes"), ARTIFACT_LIMIT),
        ("train + calibration seconds", training, BUDGET_SECONDS if cfg.max_wallclock_seconds > 0 else math.inf),
        ("evaluation seconds", result.get("ttt_seconds", result.get("eval_seconds")), BUDGET_SECONDS),
    ]
    run.log("\n| budget | used | limit | |\n|---|---|---|---|")
    for label, used, limit in gates:
        if used:
            end = f"{limit} | {'pass' if used <= limit else 'FAIL'}" if limit < math.inf else "none set |"
            run.log(f"| {label} | {round(used, 1)} | {end} |")
    run.log(f"\nseed {cfg.seed}, {result.get('steps', '-')} steps, {run.world} x {run.device.type}")
    run.log(f"peak memory {result['peak_memory_mib']} MiB, whole run {time.monotonic() - run.started:.0f}s")
    run.log(f"files in {run.folder}")
    return all(not used or used <= limit for _, used, limit in gates)


def print_sizes(folder: str) -> None:
    """Bytes of the submission by part; `folder` is the run whose artifact counts, or empty."""
    blob = Path(folder, ARTIFACT_NAME).read_bytes() if folder else b""
    sections = section_bytes(blob) if folder else {}
    source = Path(__file__).read_text()
    whole = self_extracting(minify(specialized(source, Config())))
    print(f"{'source':<40}{len(source.encode()):>12}")
    print(f"{'minified':<40}{len(minify(source)):>12}")
    print(f"{'submission/train_gpt.py':<40}{len(whole):>12}")
    print("sections, each compressed alone, so that they sum to more, and with what a submission leaves out:")
    parts = re.split(r"^# -{20,}\n# (\d+\. .*?)(?::.*)?\n(?:# .*\n)*# -{20,}\n", source, flags=re.M)
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        print(f"  {title:<38}{len(_brotli(minify(body).encode())):>12}")
    if not folder:
        print("without an artifact; name a run folder to add it: make size RUN=runs/demo")
        return
    print(f"{folder + '/' + ARTIFACT_NAME:<40}{len(blob):>12}")
    print("of which:")
    for name, size in sections.items():
        print(f"  {name:<38}{size:>12}")
    print(f"{'headroom':<40}{ARTIFACT_LIMIT - len(whole) - len(blob):>12}")


USAGE = "usage: train_gpt.py [--help | --size [RUN_FOLDER]]    settings are environment variables: see --help"


def obey_arguments(args: Sequence[str]) -> int:
    """What a command line with arguments asks for; returns the exit code."""
    if args in (["--help"], ["-h"]):
        print_help()
    elif args[0] == "--size" and len(args) <= 2:
        try:
            print_sizes(args[1] if len(args) == 2 else "")
        except (OSError, ArtifactError) as e:
            print(f"cannot read an artifact in {args[1]}: {e}", file=sys.stderr)
            return 2
    else:
        print(USAGE, file=sys.stderr)
        return 2
    return 0


MEMORY_KNOBS = {  # of each stage, by the first word of its name
    "train": "CUDA_GRAPHS to 0, or TRAIN_BATCH_TOKENS, or VAL_BATCH_TOKENS if it was validating",
    "calibrate": "TRAIN_BATCH_TOKENS", "evaluate": "VAL_BATCH_TOKENS",
    "ttt": "TTT_BATCH_SIZE, or GLOBAL_TTT_BATCH_SEQS if the base was learning",
}  # fmt: skip


def lack_of_memory(e: BaseException | None) -> BaseException | None:
    """The lack of memory that an exception is or comes from.

    After one, the end of a graph's recording fails, too; and drivers and libraries have errors of their own for it.
    """
    while e is not None and "out of memory" not in str(e):
        e = e.__context__
    return e


def died(run: Run, sentence: str) -> int:
    """The end of a rank that the others wait for: says so where they look, and ends without waiting for them."""
    try:
        earlier = run.store.get("died") if run.store.check(["died"]) else b""
        run.store.set("died", f"rank {run.rank}: {sentence}")
    except RuntimeError:  # the store died with its rank
        earlier = b"rank 0 (it no longer answers)"
    cause = f"; the first to fail was {earlier.decode()}" if earlier else ""
    print(f"rank {run.rank}: {sentence}{cause}", file=sys.stderr, flush=True)
    if run.world > 1:
        os._exit(1)  # leaving the process group would wait for the others
    return 1


def after_restart(cfg: Config, run: Run) -> Config:
    """Under `torchrun --max-restarts`: from the second attempt on, RESUME=1 if this very job left a checkpoint."""
    attempt, job = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), os.environ.get("TORCHELASTIC_RUN_ID", "")
    if attempt == 0 or cfg.from_stage:
        return cfg
    path = run.folder / "checkpoint.pt"  # without RUN_DIR every attempt has a folder of its own
    mine = run.alone(lambda: path.is_file() and torch.load(path, "cpu", mmap=True, weights_only=True)["job"] == job)
    run.log(f"attempt {attempt + 1} of this job: " + ("from its checkpoint" if mine else "from the start"))
    return replace(cfg, resume=cfg.resume or bool(mine))


def main() -> int:
    """Exit code 0: scored within the budgets; 1: failed; 2: bad settings or input; 3: scored, but over a budget."""
    if not IS_SUBMISSION and sys.argv[1:]:
        return obey_arguments(sys.argv[1:])
    first = os.environ.get("RANK", "0") == "0"
    try:
        cfg = load_config(os.environ)
    except ConfigError as e:
        if first:
            print("these settings cannot work:", *str(e).splitlines(), sep="\n  - ", file=sys.stderr)
        return 2
    return play(cfg, first)


def play(cfg: Config, first: bool) -> int:
    """One run from its process group to its exit code."""
    run = None
    try:
        run = start_run(cfg)
        cfg = after_restart(cfg, run)
        result = pipeline(cfg, run)
        return 0 if report(cfg, run, result) else 3
    except Stop as stop:
        if run is not None:
            run.log(stop.sentence)
        elif first:
            print(stop.sentence, file=sys.stderr)
        return stop.code
    except Exception as e:
        stage = run.stage_name or "preparation" if run else ""
        if run and (lack := lack_of_memory(e)):
            knob = MEMORY_KNOBS.get(stage.split(" ")[0], "what else runs on this GPU")
            said = re.split(r"\. |\n", str(lack))[0]
            return died(run, f"out of memory in stage {stage}: lower {knob} ({said})")
        if run is None or run.world == 1:
            raise
        traceback.print_exc()
        return died(run, f"{type(e).__name__} in {stage}: {str(e)[:200]}")
    except Interrupted as stop:
        name = signal.Signals(stop.args[0]).name
        run.log(f"stopped by {name}: FROM_STAGE goes on from the finished stages in {run.folder}, with the same knobs")
        return 128 + stop.args[0]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------------------------
# 14. SWITCHES: follow-up systems, all off; the record never comes here
# --------------------------------------------------------------------------------------------------------------------
class Switch:
    """A follow-up system, turned on by its knob. Its methods are called where the pipeline says their names.

    A subclass overrides those it needs; here they change nothing. Tensors and parameters of a switch are built after
    all others and from random numbers of their own, so that runs with and without it differ by nothing else. A
    submission carries only the switches that its run has on.
    """

    knob = ""
    steady = True  # the same kernels on the same memory in every forward pass: a CUDA graph may hold them
    vectors: Tensor | None = None  # learn with the base model while test-time training scores

    def __init__(self, cfg: Config):
        self.cfg = cfg

    def build(self, model: GPT) -> None:
        """Adds parameters to the model; ROLES says how they train and where they are stored."""

    def embed(self, model: GPT, x: Tensor, tokens: Tensor, tap: Tap | None) -> Tensor:
        """x (B, T, D), the embedding of tokens (B, T), before its norm."""
        return x

    def attention(self, model: GPT, visit: Visit, ctx: Context) -> Context:
        """What the attention of a visit works with."""
        return ctx

    def enter(self, model: GPT, visit: Visit, x: Tensor) -> Tensor:
        """The stream (B, T, D) that a serial block gets."""
        return x

    def leave(self, model: GPT, visit: Visit, before: Tensor, x: Tensor) -> Tensor:
        """The stream that a serial block gives, and the one before it, after the skip merge."""
        return x

    def schedule(self, fraction: float) -> None:
        """Before each training step, and with 1 after the last."""

    def line(self, model: GPT) -> str:
        """For the training log, after the loss."""
        return ""

    def observe(self, model: GPT, val: ValidationSet, run: Run, step: int) -> None:
        """At each validation during training, on rank 0."""

    def begin_scoring(self, model: GPT) -> None:
        """Before test-time training scores its first document."""

    def code(
        self, flat: Mapping[str, Tensor], hessians: Mapping[str, Tensor], run: Run
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Weights by public name and Hessians, as quantization gets them."""
        return flat, hessians

    def decode(self, state: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """The banked weights that the artifact gave."""
        return state

    def begin(self, run: Run) -> None:
        """Before the first stage, with the run folder open."""

    def finish(self, run: Run, result: Mapping[str, Any]) -> None:
        """After the last."""


def switches(cfg: Config) -> list[Switch]:
    """Those that are on, in the order of this section."""
    return [kind(cfg) for kind in Switch.__subclasses__() if getattr(cfg, kind.knob)]


def switch_rules(c: Config) -> list[tuple[bool, str]]:
    """As `config_rules`, for the follow-up systems."""
    try:
        gains, alphas, stages = c.qk_gains, c.recur_alphas, c.loop_stages
    except ValueError:
        return [(True, "cannot read a list: give QK_GAIN_PER_LAYER as 2.3,2.9,..., RECUR_ALPHA_VALUES as 1 or as "
                       "1,1.2;1,0.9 and LOOP_CURRICULUM as 0.35:1,0.6:2")]  # fmt: skip
    loops = [n for _, n in stages]
    per_pass = c.recur_homotopy or c.recur_alpha_enabled or c.cross_pass_xsa_enabled or c.recur_diag_p2p_cos
    shape = f"RECUR_ALPHA_VALUES needs {c.num_loops} rows of {c.looped_layers} numbers, or one number for all"
    return [
        (len(gains) not in (0, c.num_layers), f"QK_GAIN_PER_LAYER needs {c.num_layers} numbers, has {len(gains)}"),
        (bool(per_pass) and c.num_loops == 0, "RECUR_ and CROSS_PASS_ switches need NUM_LOOPS above 0"),
        (c.recur_alpha_enabled and [len(row) for row in alphas] != [c.looped_layers] * c.num_loops, shape),
        (stages != sorted(stages) or loops != sorted(loops) or loops[-1] != c.num_loops or loops[0] < 0,
         f"LOOP_CURRICULUM must rise, in fractions and in passes, and end at NUM_LOOPS={c.num_loops}"),
        (bool(c.loop_curriculum) and c.recur_homotopy, "choose one of LOOP_CURRICULUM and RECUR_HOMOTOPY"),
        (c.recur_homotopy and not 0 < c.recur_homotopy_tau <= (1 - c.recur_homotopy_tmid) / 5,
         "RECUR_HOMOTOPY_TAU must be above 0 and let the loop be whole, at TMID + 5 TAU, before training ends"),
        (c.bigram_hash_enabled and min(c.bigram_hash_buckets, c.bigram_hash_dim) <= 0,
         "BIGRAM_HASH_BUCKETS and BIGRAM_HASH_DIM must be above 0"),
        (c.spinquant_enabled != (c.spinquant_mode != "baseline"),
         f"SPINQUANT_ENABLED={c.spinquant_enabled:d} contradicts SPINQUANT_MODE={c.spinquant_mode}: set one of them"),
        (not 0 <= c.spinquant_seed < 2147483648, "SPINQUANT_SEED must lie in 0..2147483647"),
        (c.spinquant_enabled and max(c.model_dim, c.hidden_dim) > 8192,
         "SPINQUANT_MODE rotates at most 8192 channels: set it to baseline"),
    ]  # fmt: skip


def blend(before: Tensor, after: Tensor, weight: Tensor | float) -> Tensor:
    """before + weight (after - before), in float32 and rounded once."""
    return torch.lerp(before.float(), after.float(), weight).to(after.dtype)


# PR #1648: fixed scalars of the record's eleven layers, found by training them; no score is public.
XIELU = tuple(map(Xielu._make, zip(
    (0.103, 0.196, 1.415, 1.196, 1.485, 1.546, 1.337, 1.727, 1.495, 0.988, 0.917),
    (0.126, 0.07, 0.0, 0.0, 0.0, 0.002, 0.017, 0.067, 0.005, 0.058, 0.568),
    (0.39, 0.578, 0.363, 0.491, 0.536, 0.548, 0.579, 0.983, 1.058, 0.935, 0.845),
    (0.785, 0.638, 0.405, 0.377, 0.314, 0.289, 0.313, 0.571, 0.42, 0.286, 0.52), strict=True,
)))  # fmt: skip


def xielu_of(layer: int, n_layers: int) -> Xielu:
    """The scalars of that depth: those of PR #1648 are for eleven layers."""
    return XIELU[round(layer * (len(XIELU) - 1) / max(n_layers - 1, 1))]


class BigramHash(Switch):
    """A table of hashed token pairs, projected and added to the embedding (PR #1716); nothing at first.

    Of #1716 itself nothing can be said: no optimizer group held its table, which stayed zero. A port that trained it
    lost 0.0025 bpb at the end of training. A document's first token is paired with itself.
    """

    knob = "bigram_hash_enabled"

    def build(self, model: GPT) -> None:
        c = self.cfg
        embed, proj = (
            nn.Embedding(c.bigram_hash_buckets, c.bigram_hash_dim),
            torch.zeros(1, c.model_dim, c.bigram_hash_dim),
        )
        model.bigram = nn.ModuleDict(dict(embed=embed, proj=nn.ParameterDict(dict(weight=proj))))

    def embed(self, model: GPT, x: Tensor, tokens: Tensor, tap: Tap | None) -> Tensor:
        c = self.cfg
        last = torch.where(tokens == BOS, tokens, torch.cat((tokens[:, :1], tokens[:, :-1]), dim=1))
        row = (c.bigram_hash_prime_a * tokens ^ c.bigram_hash_prime_b * last) % c.bigram_hash_buckets
        pair = F.embedding(row, model.bigram["embed"].weight)
        if tap is not None:
            tap("bigram", pair)
        return x + F.linear(pair.to(x.dtype), model.bigram["proj"]["weight"][0].to(x.dtype))


class SmearGate(Switch):
    """Mixes a gated part of the previous token's embedding into each, never across documents (PR #1667, #1851)."""

    knob = "smear_gate_enabled"

    def build(self, model: GPT) -> None:
        model.smear_gate = nn.Linear(self.cfg.gate_window, 1, bias=False)
        nn.init.zeros_(model.smear_gate.weight)
        model.smear_lambda = nn.Parameter(torch.zeros(1))

    def embed(self, model: GPT, x: Tensor, tokens: Tensor, tap: Tap | None) -> Tensor:
        w, strength = model.smear_gate.weight.to(x.dtype), model.smear_lambda.to(x.dtype)
        gate = strength * F.linear(x[:, 1:, : self.cfg.gate_window], w).sigmoid()
        gate = gate * (tokens[:, 1:, None] != BOS)  # a document's first token has no predecessor
        return torch.cat((x[:, :1], x[:, 1:] + gate * x[:, :-1]), dim=1)


class EvalHashEmbedding(Switch):
    """A vector for each hashed pair of neighbors, zero at first, that TTT's base learning teaches (#1555).

    Like that of the loop's passes it learns from scored documents alone, is no parameter of the model and in no
    artifact. Published in 1.07636 bpb with Tap-In, never measured apart.
    """

    knob = "eval_hash_emb_enabled"
    steady = False  # there are no vectors before scoring begins

    def begin_scoring(self, model: GPT) -> None:
        table = model.tok_emb.weight
        self.vectors = table.new_zeros(self.cfg.eval_hash_emb_buckets, table.size(1), dtype=torch.float32)

    def embed(self, model: GPT, x: Tensor, tokens: Tensor, tap: Tap | None) -> Tensor:
        """A text's or window's first token has no predecessor, nor has a document's."""
        if self.vectors is None:
            return x
        row = (2039 * tokens[:, :-1] + tokens[:, 1:]) % len(self.vectors)
        pairs = F.embedding(row, self.vectors) * (tokens[:, 1:, None] != BOS)
        return torch.cat((x[:, :1], x[:, 1:] + pairs.to(x.dtype)), dim=1)


class EvalLoopEmbedding(Switch):
    """The same for each pass of the loop, added where it begins."""

    knob = "eval_loop_emb_enabled"
    steady = False

    def begin_scoring(self, model: GPT) -> None:
        self.vectors = model.tok_emb.weight.new_zeros(model.looped + 1, model.cfg.model_dim, dtype=torch.float32)

    def enter(self, model: GPT, visit: Visit, x: Tensor) -> Tensor:
        begins = self.vectors is not None and visit.layer == self.cfg.loop_start
        return x + self.vectors[visit.again].to(x.dtype) if begins else x


class RecurHomotopy(Switch):
    """Repeated visits come in along a sigmoid of the training fraction (PR #1663), which has no control run."""

    knob = "recur_homotopy"
    steady = False  # the weight is a number of the moment
    weight = 1.0

    def schedule(self, fraction: float) -> None:
        z = (fraction - self.cfg.recur_homotopy_tmid) / self.cfg.recur_homotopy_tau
        self.weight = 1.0 if z >= 5 else 1 / (1 + math.exp(-max(z, -5.0)))

    def leave(self, model: GPT, visit: Visit, before: Tensor, x: Tensor) -> Tensor:
        return blend(before, x, self.weight) if visit.again and self.weight < 1 else x


class RecurAlpha(Switch):
    """A repeated visit moves the stream by alpha times what its layer would (PR #1714); 1 is the record, 0 skips it.

    alpha is float32 wherever it is used: in every public run it was rounded to bfloat16. None of those, 1.06622 to
    1.06900 bpb after test-time training, is better than ten runs without (1.06499, standard deviation 0.00074).
    """

    knob = "recur_alpha_enabled"
    steady = False  # its hook sees gradients add up
    norm: Tensor | float = 0.0

    def build(self, model: GPT) -> None:
        values = torch.tensor(self.cfg.recur_alphas)
        if self.cfg.recur_alpha_form == "learned":
            model.recur_alpha = nn.Parameter(values)
            model.recur_alpha.register_post_accumulate_grad_hook(self.keep_norm)
        elif self.cfg.recur_alpha_form == "frozen":
            model.register_buffer("recur_alpha", values)

    def keep_norm(self, alpha: Tensor) -> None:
        self.norm = alpha.grad.norm()

    def leave(self, model: GPT, visit: Visit, before: Tensor, x: Tensor) -> Tensor:
        if not visit.again:
            return x
        table = self.cfg.recur_alphas if self.cfg.recur_alpha_form == "literal" else model.recur_alpha
        return blend(before, x, table[visit.again - 1][visit.layer - self.cfg.loop_start])

    def line(self, model: GPT) -> str:
        if self.cfg.recur_alpha_form != "learned":
            return ""
        return f"recur_alpha: values={model.recur_alpha.tolist()} grad_norm={float(self.norm):.6f}"


class CrossPassXsa(Switch):
    """In a repeated visit each head drops beta times its component along what it wrote in the pass before.

    An idea of the follow-up study that it never ran; beta starts at zero.
    """

    knob = "cross_pass_xsa_enabled"

    def build(self, model: GPT) -> None:
        model.recur_xsa_beta = nn.Parameter(torch.zeros(self.cfg.num_loops, self.cfg.looped_layers, self.cfg.num_heads))
        self.kept: dict[int, Tensor] = {}

    def attention(self, model: GPT, visit: Visit, ctx: Context) -> Context:
        at = visit.layer - self.cfg.loop_start
        if not model.looped or not 0 <= at < self.cfg.looped_layers:
            return ctx

        def echo(y: Tensor) -> Tensor:
            if visit.again:
                unit = F.normalize(self.kept.pop(visit.layer), dim=-1)
                beta = model.recur_xsa_beta[visit.again - 1, at].to(y.dtype).unsqueeze(-1)
                y = y - beta * (y * unit).sum(-1, keepdim=True) * unit
            if visit.again < model.looped:
                self.kept[visit.layer] = y
            return y

        return ctx._replace(echo=echo)


class PassSimilarity(Switch):
    """Compares what a looped layer does in a pass with what it did in the one before, on validation rows.

    Cosines are means over tokens: of the steps delta = block(x) - x, of the outputs, and of each head's output. It
    runs without gradients beside the training, which it cannot change. No public run has ever had it on.
    """

    knob = "recur_diag_p2p_cos"
    active = False

    def attention(self, model: GPT, visit: Visit, ctx: Context) -> Context:
        if not self.active:
            return ctx
        before = ctx.echo or (lambda y: y)

        def echo(y: Tensor) -> Tensor:
            y = before(y)
            self.compare(visit, heads=y.float())
            return y

        return ctx._replace(echo=echo)

    def leave(self, model: GPT, visit: Visit, before: Tensor, x: Tensor) -> Tensor:
        if self.active:
            self.compare(visit, delta=x.float() - before.float(), output=x.float())
        return x

    def compare(self, visit: Visit, **now: Tensor) -> None:
        for name, y in now.items():
            past = self.past.get((visit.layer, name))
            self.past[visit.layer, name] = y
            if past is not None:
                key = visit.again, visit.layer
                cosine = F.cosine_similarity(y, past, dim=-1)
                mean = cosine.flatten(0, -2).mean(0) if name == "heads" else cosine.mean()
                self.sums.setdefault((f"cos_{name}", *key), []).append(mean)
                if name == "delta":
                    self.sums.setdefault(("norm_ratio", *key), []).append(y.norm() / past.norm().clamp_min(1e-30))

    @torch.no_grad()
    def observe(self, model: GPT, val: ValidationSet, run: Run, step: int) -> None:
        self.sums: dict[tuple, list[Tensor]] = {}
        self.active, n = True, self.cfg.eval_seq_len
        for r in range(min(self.cfg.recur_diag_p2p_cos, (val.n_targets - 1) // n + 1)):
            self.past: dict[tuple, Tensor] = {}
            inputs, _, docs = sent_row(*host_row(val.tokens[r * n : (r + 1) * n + 1], n), run.device)
            model(inputs, docs=docs)
        self.active, self.past = False, {}
        rows = [dict(what=what, again=again, layer=layer, value=torch.stack(values).mean(0).tolist())
                for (what, again, layer), values in self.sums.items()]  # fmt: skip
        if rows:
            run.metric("p2p_cos", step=step, rows=rows)
            text = " ".join(f"{r['again']}.L{r['layer']}:{r['value']:.4f}" for r in rows if r["what"] == "cos_delta")
            run.log(f"p2p_cos: {text}")


Blocks = tuple[tuple[int, int], ...]  # (size, seed) of the rotations along the diagonal of a larger one; (): none


class SpinQuant(Switch):
    """GPTQ in other coordinates (Liu et al. 2024, arXiv 2405.16406).

    A matrix is coded as P^T W Q with the Hessian Q^T H Q of its inputs x Q, and decoded as P (...) Q^T. Turning x at
    run time instead, as PR #1695 does, is the same function: (x Q)(W Q)^T = x W^T, whatever rounding makes of W Q. So
    the model, its kernels, adapters and base learning stay as they are (SGD with momentum and a norm clip takes the
    same step in any orthonormal coordinates), every part is exact before rounding, and the artifact pays for a mode and
    a seed. attn_scale and mlp_scale are not folded into the rows of the outputs: the adapters' bypasses share them.

    Public evidence: none of it helps. Five variants lie within 9e-5 bpb after TTT, though with Hessians of the unlooped
    network, and port_1695 costs 16 kB. None turned the embedding, as `full` does: 0.0006 and 0.0002 bpb better after
    300 steps (seeds 42 and 0; the latter with steps by costs, which leave less to gain), 0.0007 after 1,500 (seed 42).
    """

    knob = "spinquant_enabled"
    modes: dict[str, dict[str, tuple[str, str]]] = {  # matrix -> (what turns its rows, what turns its columns)
        "internal_only": {"attn.c_v": ("values", ""), "attn.proj": ("", "queries")},
        "port_1695": {
            "attn.c_q": ("", "attn_in"), "attn.c_k": ("", "attn_in"), "attn.c_v": ("", "attn_in"),
            "attn.proj": ("", "attn_proj_in"), "mlp.fc": ("", "mlp_in"), "mlp.proj": ("", "mlp_proj_in"),
        },
        "full": {
            "attn.c_q": ("", "stream"), "attn.c_k": ("", "stream"), "attn.c_v": ("values", "stream"),
            "attn.proj": ("stream", "queries"), "mlp.fc": ("", "stream"), "mlp.proj": ("stream", "mlp_proj_in"),
            "tok_emb": ("", "stream"),
        },
    }  # fmt: skip
    sites = ("attn_in", "attn_proj_in", "mlp_in", "mlp_proj_in")

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        asked = {s.strip() for s in cfg.spinquant_sites.split(",")} - {"", "none"}
        self.table = self.modes.get(cfg.spinquant_mode, {})
        self.known, self.unknown = [s for s in self.sites if s in asked], sorted(asked - set(self.sites))

    def blocks(self, what: str, layer: int) -> Blocks:
        """One rotation for all layers, but one per layer and key/value group for what the heads mix."""
        cfg = self.cfg
        if what in ("values", "queries"):
            times = cfg.num_heads // cfg.num_kv_heads if what == "queries" else 1
            seeds = [cfg.spinquant_seed + 1000 * layer + group for group in range(cfg.num_kv_heads)]
            return tuple((cfg.head_dim, seed) for seed in seeds for _ in range(times))
        if not what or (what in self.sites and what not in self.known):
            return ()
        digest = hashlib.sha256(f"{cfg.spinquant_seed}:{what}".encode()).digest()
        return ((cfg.hidden_dim if what == "mlp_proj_in" else cfg.model_dim, int.from_bytes(digest[:4], "big")),)

    def rotations(self) -> dict[str, tuple[Blocks, Blocks]]:
        """Of every matrix that the mode turns, by its public name: the rotations of its rows and of its columns.

        Matrices of one input have the same rotation of columns, so they still share a Hessian and a GPTQ stack.
        """
        turns = {}
        for (matrix, (rows, columns)), i in itertools.product(self.table.items(), range(self.cfg.num_layers)):
            pair = self.blocks(rows, i), self.blocks(columns, i)
            if any(pair):
                turns[f"blocks.{i}.{matrix}.weight" if matrix in MATRICES else f"{matrix}.weight"] = pair
        return turns

    @staticmethod
    @functools.cache
    def orthogonal(size, seed):
        """Q of the QR factors of random signs times a Hadamard matrix, cut to (size, size); float64.

        The signs come from NumPy's legacy generator, whose stream is frozen: the decoder has to find the same ones.
        """
        h = torch.ones(1, 1, dtype=torch.float64)
        while len(h) < size:
            h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
        signs = torch.from_numpy(np.random.RandomState(seed).choice((-1.0, 1.0), (size, 1)))
        return torch.linalg.qr(signs * h[:size, :size] / size**0.5).Q

    def turned(self, x: Tensor, rows: Blocks, columns: Blocks, back: bool = False) -> Tensor:
        """P^T x Q in float32, back: P x Q^T; x (rows, columns).

        In between float64, 0.1 TFLOP in all: TF32 would cost more than rounding.
        """
        x = x.double()
        p, q = (torch.block_diag(*(self.orthogonal(*b) for b in blocks)).to(x.device) for blocks in (rows, columns))
        if rows:
            x = (p if back else p.mT) @ x
        if columns:
            x = x @ (q.mT if back else q)
        return x.float()

    def spin(self, flat: Mapping[str, Tensor], back: bool = False) -> dict[str, Tensor]:
        """The matrices in the coordinates in which they are coded; back: out of them."""
        turns = self.rotations()
        return {name: self.turned(x, *turns[name], back) if name in turns else x for name, x in flat.items()}

    def code(
        self, flat: Mapping[str, Tensor], hessians: Mapping[str, Tensor], run: Run
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        turns = self.rotations()
        keys = {name: hessian_key(name) for name, (_, columns) in turns.items() if columns}
        named = [columns for _, columns in self.table.values() if columns in self.sites]
        skipped = sum(s not in self.known for s in named) * self.cfg.num_layers
        active, missing = [s for s in self.known if s in named], sum(key not in hessians for key in keys.values())
        if self.unknown:
            run.log(f"spinquant:unknown_sites_ignored:{self.unknown}")
        run.log(
            f"spinquant:rotated_weights:{len(turns)} hessians:{len(keys) - missing} missing_hessians:{missing} "
            f"skipped_by_sites:{skipped} active_sites:{active}"
        )
        columns = {key: turns[name][1] for name, key in keys.items()}
        return self.spin(flat), {
            key: self.turned(h, columns[key], columns[key]) if key in columns else h for key, h in hessians.items()
        }

    def decode(self, state: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        cfg = self.cfg
        run.log(
            f"spinquant:undone_rotations:{len(self.rotations())}_matrices mode:{cfg.spinquant_mode} "
            f"seed:{cfg.spinquant_seed} sites:{self.known} model_dim:{cfg.model_dim} hidden_dim:{cfg.hidden_dim}"
        )
        return rebank(self.spin(unbank({k: x.to(run.device) for k, x in state.items()}), back=True))


class Hotstart(Switch):
    """The files that the public driver of the rotations writes; its work is that of every float checkpoint.

    Its artifact_bytes counted the driver instead of the training program, and it left the loop off.
    """

    knob = "hotstart_fp_ckpt"

    def begin(self, run: Run) -> None:
        """Writes which rotations (size, seed) stand along the diagonal of what turns each matrix."""
        cfg, sizes, turns = self.cfg, {}, {}
        for s in switches(cfg):
            if s.knob == "spinquant_enabled":
                turns = {name: dict(rows=rows, columns=columns) for name, (rows, columns) in s.rotations().items()}
                used = {what for pair in s.table.values() for what in pair}
                sizes = {what: sum(n for n, _ in b) for what in sorted(used) if (b := s.blocks(what, 0))}
        manifest = dict(mode=cfg.spinquant_mode, base_seed=cfg.spinquant_seed, sites=cfg.spinquant_sites.split(","),
                        sizes=sizes, rotations=turns)  # fmt: skip
        self.write(run, "rotation_manifest.json", manifest)

    def finish(self, run: Run, result: Mapping[str, Any]) -> None:
        """Turning changes no float weight, so the float score is the one after rotation, too."""
        stages = dict(
            diagnostic_pre_quant_post_rotation=("float", "float_seconds"),
            diagnostic_quantized=("quantized", "eval_seconds"),
            quantized_ttt_phased=("ttt", "ttt_seconds"),
        )
        final = {"spec": "hotstart", "mode": self.cfg.spinquant_mode, "spinquant_seed": self.cfg.spinquant_seed,
                 "hotstart_ckpt": self.cfg.hotstart_fp_ckpt,
                 "status": "ok" if result["total_bytes"] <= ARTIFACT_LIMIT else "too large"}  # fmt: skip
        for name, (stage, clock) in stages.items():
            if clock in result:
                bpb = result.get(f"bpb_{stage}", result.get(f"bpb_{stage}_partial"))
                milliseconds = round(1000 * result[clock])
                final[name] = dict(val_loss=result[f"loss_{stage}"], val_bpb=bpb, eval_time_ms=milliseconds)
        final |= {"artifact_bytes": result["total_bytes"], "quant_file_bytes": result["artifact_bytes"]}
        self.write(run, "final.json", final)

    @staticmethod
    def write(run, name, value):
        run.save(name, lambda f: f.write(json.dumps(value, indent=1).encode()))


# ---- Tap-In: what followed, earlier in the document, the tokens just read (#1518, #1555) ----------------------------
# Worth 0.0015 to 0.002 bpb there by its authors' account, never measured apart; the run they report had w = 0.01. Their
# matcher switched itself off on a rank where a package was missing, reached across documents, and left out the match
# that ends one token back; none of it here.
def repeats(x: np.ndarray, longest: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(length, places, names) for each length up to `longest` of which something occurs more than once in x.

    places: where these strings of tokens end, ascending; names: equal numbers for equal strings. A string that occurs
    twice is made of two one shorter that do, so that places get fewer with every length.
    """
    at, known = np.arange(len(x)), np.zeros(len(x), np.int64)
    for length in range(1, longest + 1):
        at = at[at >= length - 1]
        at = at[known[at - 1] >= 0] if length > 1 else at
        before = known[at - 1] if length > 1 else known[at]
        _, names, counts = np.unique(before << 16 | x[at], return_inverse=True, return_counts=True)
        again = counts[names] > 1
        at, names = at[again], names[again]
        if not len(at):
            return
        known = np.full(len(x), -1)
        known[at] = names
        yield length, at, names


def longest_matches(x: np.ndarray, low: np.ndarray, high: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """For each place t, over p in low[t]..high[t] - 1 <= t - 1: how many tokens up to p and up to t agree, at most
    `longest`, and the first p with that many. Length 0 where no x[p] is x[t]."""
    n = len(x)
    length, place = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for long, at, names in repeats(x, longest):
        ordered = np.sort(names * n + at)
        found = ordered[np.searchsorted(ordered, names * n + low[at])]  # t itself is in the list: there is always one
        found -= names * n
        match = (found >= 0) & (found < high[at])
        length[at[match]], place[at[match]] = long, found[match]
    return length, place


class Hints(NamedTuple):
    """For each target of a document a token and its share of the mixture, 0 where there is no hint."""

    tokens: np.ndarray
    shares: np.ndarray


def document_hints(x: np.ndarray, window_start: np.ndarray, cfg: Config) -> Hints:
    """Hints for the token after each of x, from x up to there: x (n,) int64, window_start (n,) first visible input.

    The longest match decides, inside the window if as long as any outside; its share grows with its length and with
    the votes, the places in the same range where x[t] was followed by the same token.
    """
    n, t = len(x), np.arange(len(x))
    tokens, best, shares = x.copy(), np.zeros(n, np.int64), np.zeros(n)
    pairs = np.sort((x[:-1] << 16 | x[1:]) * n + t[:-1])
    ranges = [(window_start, t, cfg.tapin_mix_w)]
    if cfg.tapin_cross_enabled and window_start.any():
        ranges.append((np.zeros_like(t), window_start, cfg.tapin_v6_cross_w))
    for low, high, share in ranges:
        length, place = longest_matches(x, low, high, cfg.tapin_max_match)
        at = np.flatnonzero((length >= cfg.tapin_min_match) & (length > best))
        token = x[place[at] + 1]
        pair = (x[at] << 16 | token) * n
        votes = np.searchsorted(pairs, pair + high[at]) - np.searchsorted(pairs, pair + low[at])
        grown = share * (1 + 0.15 * (length[at] - cfg.tapin_min_match)) * (1 + 0.2 * np.log(votes))
        tokens[at], best[at], shares[at] = token, length[at], np.minimum(grown, 0.5)
    return Hints(tokens, shares.astype(np.float32))


@torch.no_grad()
def mix_hints(
    logits: Tensor, targets: Tensor, losses: Tensor, tokens: Tensor, shares: Tensor, cfg: Config
) -> tuple[Tensor, Tensor]:
    """Nats under (1 - w) p + w [token], and where the hint counts. logits (N, C, V), everything else (N, C).

    A hint counts by what the model expects, before the target is looked at, so this is a distribution over V.
    """
    likelier = (logits > logits.gather(-1, tokens.unsqueeze(-1))).sum(-1)
    counts = (shares > 0) & (likelier < cfg.tapin_v4_top_k)
    if cfg.tapin_ent_min > 0:
        log_p = logits.log_softmax(-1)
        counts &= -(log_p.exp() * log_p).sum(-1) >= cfg.tapin_ent_min
    rest = torch.log1p(-shares) - losses  # log((1 - w) p) of the target
    mixed = torch.where(tokens == targets, torch.logaddexp(rest, shares.log()), rest)
    return torch.where(counts, -mixed, losses), counts


class TapIn:
    """The hints of a batch of documents; only scores change, adapters learn from the model's own losses."""

    def __init__(self, scorer: TestTimeScorer):
        self.scorer, self.cfg = scorer, scorer.cfg
        self.of: dict[Document, Hints] = {}
        self.used = torch.zeros((), dtype=torch.float64, device=scorer.run.device)

    def read(self, docs: Sequence[Document]) -> None:
        """Hints of every target of `docs`, in place of those of the last batch."""
        cfg, self.of = self.cfg, {}
        for d in docs:
            x = self.scorer.val.tokens[d.start : d.start + d.n_targets].astype(np.int64)
            plan = windows(d.n_targets, cfg.ttt_chunk_size, cfg.ttt_eval_seq_len)
            self.of[d] = document_hints(x, np.repeat([w.start for w in plan], [w.count for w in plan]), cfg)

    def chunk(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """Tokens and shares (N, C) of one chunk, on the device."""
        tokens = np.zeros((len(parts), self.cfg.ttt_chunk_size), np.int64)
        shares = np.zeros(tokens.shape, np.float32)
        for i, (d, w, _) in enumerate(parts):
            if w is not None:
                first = w.start + w.offset
                tokens[i, : w.count] = self.of[d].tokens[first : first + w.count]
                shares[i, : w.count] = self.of[d].shares[first : first + w.count]
        return upload(tokens, self.scorer.run.device), upload(shares, self.scorer.run.device)

    def score_chunk(
        self, chunk: Chunk, hints: tuple[Tensor, Tensor], adapters: Adapters, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """Nats (N, C) of the chunk's targets without hints, to learn from, and with them."""
        logits = self.scorer.model(chunk.inputs, adapters=adapters, at=chunk.at, cache=cache)
        losses = F.cross_entropy(logits.flatten(0, 1), chunk.targets.flatten(), reduction="none")
        losses = losses.view_as(chunk.targets)
        mixed, counts = mix_hints(logits.detach(), chunk.targets, losses.detach(), *hints, self.cfg)
        self.used += (counts & chunk.scored).sum()
        return losses, mixed

    def log(self, n_targets: int) -> None:
        """A collective."""
        used = self.scorer.run.sum(self.used.clone()).item()
        self.scorer.run.log(f"tapin: hints counted at {used:.0f} of {n_targets} targets ({used / n_targets:.2%})")


# ---- Audit: the rules of a legal score -------------------------------------------------------------------------------
class Audit:
    """AUDIT=1: the rules of a legal score, checked on samples of the evaluation that makes the score.

    Exactly once: every target is marked as it is scored. Normalization: at sampled places scoring is asked for the loss
    of every token of the vocabulary; exp(-loss) must sum to 1 and hold the loss that was scored. Causality: a sampled
    batch is scored again with other text from some position of half of its documents on; what was scored before and
    beside them must not change. Every 16th batch of a rank is sampled, its first one included. On a GPU kernels may add
    in any order: exact is only DETERMINISTIC=1.
    """

    def __init__(self, scorer: TestTimeScorer):
        self.scorer, self.run, self.rng = scorer, scorer.run, random.Random(scorer.cfg.seed)
        self.times = np.zeros(len(scorer.val.tokens), np.uint8)  # that each position was scored
        self.losses: dict[int, float] | None = None  # of the batch at hand, if it is a sample
        self.asks = True
        self.n_batches, self.seconds = 0, 0.0
        self.sums: list[dict[str, float]] = []
        self.causality: list[dict[str, float]] = []

    def run_batch(self, docs: Sequence[Document]) -> Meter:
        sampled = self.n_batches % 16 == 0
        self.n_batches, self.losses = self.n_batches + 1, {} if sampled else None
        meter = self.scorer.run_batch(docs)
        if sampled:
            began = time.monotonic()
            self.score_again(docs, self.losses)
            self.seconds += time.monotonic() - began
        return meter

    def see(self, parts: Sequence[Any], chunk: Chunk, losses: Tensor, adapters: Adapters, cache: Cache | None) -> None:
        """A chunk that was scored, before anything learns from it."""
        firsts = [(d.start + w.start + w.offset + 1, w.count) if w else (0, 0) for d, w, _ in parts]
        for first, n in firsts:
            self.times[first : first + n] += 1
        if self.losses is None:
            return
        if self.asks and self.rng.random() < 4 / (4 + len(self.sums)):
            row = self.rng.choice([i for i, (_, n) in enumerate(firsts) if n])
            place = self.rng.randrange(firsts[row][1])
            hints = self.scorer.tapin and [t[row : row + 1, place : place + 1] for t in self.scorer.tapin.chunk(parts)]
            self.ask_all(row, place, chunk, losses, adapters, cache, hints)
        for (first, n), values in zip(firsts, losses.tolist(), strict=True):
            self.losses.update(zip(range(first, first + n), values, strict=False))

    @torch.no_grad()
    def ask_all(
        self, row: int, place: int, chunk: Chunk, losses: Tensor, adapters: Adapters, cache: Cache | None,
        hints: Sequence[Tensor] | None,
    ) -> None:  # fmt: skip
        """The loss of every token at one place, asked of the code that scores, in pieces of the vocabulary."""
        began, alone, past = time.monotonic(), adapters.row(row), cache and cache.row(row)
        nats = []
        for tokens in torch.arange(self.scorer.cfg.vocab_size, device=self.run.device).split(512):
            at = chunk.at[row : row + 1, place : place + 1].expand(1, len(tokens))
            part = chunk._replace(inputs=chunk.inputs[row : row + 1], targets=tokens[None], at=at, scored=at < 0)
            if hints:
                given = tuple(t.expand_as(at) for t in hints)
                nats.append(self.scorer.tapin.score_chunk(part, given, alone, past)[1][0].double())
            else:
                nats.append(self.scorer.score_chunk(part, alone, past)[0].double())
        nats = torch.cat(nats)
        asked, scored = nats[chunk.targets[row, place]].item(), losses[row, place].item()
        self.sums.append({"sum": nats.neg().exp().sum().item(), "scored": scored, "asked": asked})
        self.seconds += time.monotonic() - began

    def score_again(self, docs: Sequence[Document], before: dict[int, float]) -> None:
        """The batch with other tokens from a position of every second document on, to its end."""
        tokens, ordinary = self.scorer.val.tokens.astype(np.int64), self.scorer.cfg.vocab_size - BOS - 1
        changed: set[int] = set()
        for d in self.rng.sample(docs, math.ceil(len(docs) / 2)):
            # not the first of a chunk: the chunk's own targets before it are what learning too early would change
            at, end = d.start + 1 + self.rng.randrange(d.n_targets), d.start + d.n_targets
            at = min(at + ((at - d.start - 1) % self.scorer.cfg.ttt_chunk_size == 0), end)
            shift = self.rng.randrange(1, ordinary)
            tokens[at:end] = (tokens[at:end] - BOS - 1 + shift) % ordinary + BOS + 1
            changed |= set(range(at, end + 1))
        other = self.scorer.over(replace(self.scorer.val, tokens=tokens.astype(np.uint16)))
        other.audit = copy.copy(self)
        other.audit.losses, other.audit.asks, other.audit.times = {}, False, self.times.copy()
        other.run_batch(docs)
        moved = {p: abs(other.audit.losses[p] - nats) for p, nats in before.items()}
        kept = [x for p, x in moved.items() if p not in changed]
        self.causality.append({"kept": len(kept), "change": max(kept, default=0.0),
                               "changed": sum(moved[p] > 0 for p in changed)})  # fmt: skip

    def finish(self, scored: Sequence[Document], total: Meter) -> None:
        """Writes audit.json. Raises Stop if anything was not as it must be."""
        run, times = self.run, self.run.sum(torch.from_numpy(self.times))
        want = torch.zeros_like(times)
        for d in scored:
            want[d.start + 1 : d.start + d.n_targets + 1] = 1
        n_bytes = int(torch.from_numpy(self.scorer.val.token_bytes)[want > 0].sum())
        sums, causality = (list(itertools.chain.from_iterable(run.gather(x))) for x in (self.sums, self.causality))
        exact = self.scorer.cfg.deterministic or run.device.type == "cpu"
        near = 1e-3 if run.dtype == torch.float32 else 0.25  # a row alone and in its batch are other matrix products
        passed = {
            "every target exactly once": bool((times == want).all()),
            "bytes are those of the targets": total.bytes == n_bytes,
            "samples were taken": bool(sums and causality),
            "probabilities sum to 1": all(abs(x["sum"] - 1) < 1e-3 for x in sums),
            "scores are of that distribution": all(abs(x["scored"] - x["asked"]) < near for x in sums),
            "later text changes no score": all(x["change"] <= (0.0 if exact else 0.1) for x in causality),
        }
        report = {"passed": passed, "targets": total.tokens, "bytes": total.bytes, "exact": exact,
                  "distributions": sums, "causality": causality}  # fmt: skip
        run.save("audit.json", lambda f: f.write(json.dumps(report, indent=1).encode()))
        failed = ", ".join(name for name, good in passed.items() if not good)
        run.log(f"audit: {total.tokens} targets, {len(sums)} distributions, {len(causality)} batches scored again, "
                f"{run.agree(self.seconds)[0]:.1f}s: {'FAILED' if failed else 'passed'}")  # fmt: skip
        if failed:
            raise Stop(f"no score, because the audit failed: {failed}; details in {run.folder / 'audit.json'}")


if __name__ == "__main__":
    if not IS_SUBMISSION and sys.argv[1:] and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for `--help | head`
    sys.exit(main())
