"""The settings: defaults are the record, every public name works, nothing wrong or ignored passes in silence."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from support import ROOT, LoneRun, tiny_config

import train_gpt
from train_gpt import RETIRED, Config, ConfigError, load_config

# The public script's variables with the values of the record run, group by group.
RECORD = {
    # data
    "DATA_DIR": "./data/", "DATA_PATH": "", "TOKENIZER_PATH": "", "ARTIFACT_DIR": "", "RUN_ID": "", "SEED": 42,
    "CASEOPS_ENABLED": True,
    # length and batch
    "ITERATIONS": 20000, "MAX_WALLCLOCK_SECONDS": 600, "TRAIN_BATCH_TOKENS": 786432, "TRAIN_SEQ_LEN": 2048,
    "EVAL_SEQ_LEN": 2048, "VAL_BATCH_TOKENS": 524288, "VAL_LOSS_EVERY": 4000, "TRAIN_LOG_EVERY": 500,
    "WARMUP_STEPS": 20, "VAL_DOC_FRACTION": 1.0,
    # model
    "VOCAB_SIZE": 8192, "NUM_LAYERS": 11, "MODEL_DIM": 512, "NUM_HEADS": 8, "NUM_KV_HEADS": 4, "MLP_MULT": 4.0,
    "TIE_EMBEDDINGS": True, "TIED_EMBED_INIT_STD": 0.005, "LOGIT_SOFTCAP": 30, "ROPE_BASE": 1e4, "ROPE_DIMS": 16,
    "ROPE_YARN": False, "LN_SCALE": True, "QK_GAIN_INIT": 5.0, "XSA_LAST_N": 11, "SKIP_GATES_ENABLED": True,
    "NUM_LOOPS": 2, "LOOP_START": 3, "LOOP_END": 5, "ENABLE_LOOPING_AT": 0.35, "PARALLEL_START_LAYER": 8,
    "PARALLEL_FINAL_LANE": "mean", "GATED_ATTN_ENABLED": True, "GATED_ATTN_INIT_STD": 0.005,
    "ATTN_OUT_GATE_ENABLED": False, "ATTN_OUT_GATE_SRC": "proj", "SMEAR_GATE_ENABLED": False, "GATE_WINDOW": 12,
    # optimizer
    "MATRIX_LR": 0.026, "SCALAR_LR": 0.02, "TIED_EMBED_LR": 0.03, "MIN_LR": 0, "WARMDOWN_FRAC": 0.75,
    "MUON_MOMENTUM": 0.97, "MUON_MOMENTUM_WARMUP_START": 0.92, "MUON_MOMENTUM_WARMUP_STEPS": 1500,
    "MUON_BACKEND_STEPS": 5, "MUON_ROW_NORMALIZE": True, "MUON_WD": 0.095, "ADAM_WD": 0.02, "EMBED_WD": 0.085,
    "BETA1": 0.9, "BETA2": 0.95, "ADAM_EPS": 1e-8, "GRAD_CLIP_NORM": 0.3, "EMA_DECAY": 0.9965,
    # quantization
    "GPTQ_CALIBRATION_BATCHES": 16, "GPTQ_RESERVE_SECONDS": 4, "MATRIX_BITS": 6,
    "EMBED_BITS": 7, "EMBED_CLIP_SIGMAS": 15, "MLP_CLIP_SIGMAS": 12, "ATTN_CLIP_SIGMAS": 13,
    "GATED_ATTN_QUANT_GATE": True,
    # test-time training
    "TTT_ENABLED": True, "TTT_LORA_RANK": 96, "TTT_LORA_LR": 1e-4, "TTT_CHUNK_SIZE": 48, "TTT_EVAL_SEQ_LEN": 2048,
    "TTT_BATCH_SIZE": 64, "TTT_GRAD_STEPS": 1, "TTT_WEIGHT_DECAY": 0.5, "TTT_BETA1": 0, "TTT_BETA2": 0.999,
    "TTT_K_LORA": True, "TTT_MLP_LORA": True, "TTT_O_LORA": True, "TTT_OPTIMIZER": "adam", "TTT_EVAL_BATCHES": "",
    "PHASED_TTT_PREFIX_DOCS": 2000, "PHASED_TTT_NUM_PHASES": 3, "GLOBAL_TTT_LR": 1e-3, "GLOBAL_TTT_MOMENTUM": 0.9,
    "GLOBAL_TTT_EPOCHS": 1, "GLOBAL_TTT_CHUNK_TOKENS": 32768, "GLOBAL_TTT_BATCH_SEQS": 32,
    "GLOBAL_TTT_WARMUP_START_LR": 0, "GLOBAL_TTT_WARMUP_CHUNKS": 0, "GLOBAL_TTT_GRAD_CLIP": 1.0,
    "GLOBAL_TTT_RESPECT_DOC_BOUNDARIES": True,
}  # fmt: skip
# No tensor of the default model reaches MATRIX_CLIP_SIGMAS, so it may be a knob or a name without effect.
DEAD = ("EVAL_STRIDE", "ROPE_TRAIN_SEQ_LEN", "EMBED_LR", "CONTROL_TENSOR_NAME_PATTERNS", "MATRIX_CLIP_SIGMAS")

# Defaults of the public script where the record sets another value.
OTHERWISE = {
    "GATED_ATTN_INIT_STD": "0.01", "EMBED_BITS": "8", "CASEOPS_ENABLED": "0", "EMBED_CLIP_SIGMAS": "20",
    "MLP_CLIP_SIGMAS": "10", "PHASED_TTT_NUM_PHASES": "1", "SEED": "1337", "GATED_ATTN_ENABLED": "0",
}  # fmt: skip


def problems(**env: object) -> list[str]:
    with pytest.raises(ConfigError) as e:
        load_config({k: str(v) for k, v in env.items()})
    return str(e.value).splitlines()


# ---- defaults and names ----------------------------------------------------------------------------------------------
def test_defaults_are_the_record() -> None:
    cfg = load_config({})
    differ = {k: getattr(cfg, k.lower()) for k, v in RECORD.items() if getattr(cfg, k.lower()) != v}
    assert differ == {}
    assert cfg == Config()


def test_derived_sizes_of_the_record() -> None:
    cfg = Config()
    assert (cfg.micro_batch_tokens, cfg.val_row_tokens, cfg.head_dim, cfg.hidden_dim) == (98_304, 65_536, 64, 2048)
    root = "data/datasets/fineweb10B_sp8192_caseops/datasets"
    assert str(cfg.shard_dir) == f"{root}/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
    name = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
    assert str(cfg.tokenizer_file) == f"{root}/tokenizers/{name}"


def test_plain_sentencepiece_paths() -> None:
    cfg = load_config({"CASEOPS_ENABLED": "0", "VOCAB_SIZE": "1024", "DATA_DIR": "x"})
    assert str(cfg.shard_dir) == "x/datasets/fineweb10B_sp1024"
    assert str(cfg.tokenizer_file) == "x/tokenizers/fineweb_1024_bpe.model"


@pytest.mark.parametrize("name", [*RECORD, *DEAD])
def test_every_public_name_is_accepted(name: str) -> None:
    default = RECORD.get(name, 64)
    cfg = load_config({name: OTHERWISE.get(name, str(int(default) if isinstance(default, bool) else default))})
    if name in OTHERWISE:
        assert getattr(cfg, name.lower()) == float(OTHERWISE[name]) != default
    elif not hasattr(cfg, name.lower()):
        assert cfg == Config()
        assert RETIRED[name], "say why it has no effect"


@pytest.mark.parametrize(("text", "value"), [("1", True), ("0", False), ("true", True), ("No", False), ("off", False)])
def test_switches(text: str, value: bool) -> None:
    assert load_config({"LN_SCALE": text}).ln_scale is value


def test_numbers_keep_their_type() -> None:
    cfg = load_config({"ITERATIONS": "1_000", "MATRIX_LR": "1e-2", "MLP_MULT": "3"})
    assert (cfg.iterations, cfg.matrix_lr, cfg.mlp_mult) == (1000, 0.01, 3.0)
    assert isinstance(cfg.mlp_mult, float)


def test_explicit_variables_win_over_the_preset() -> None:
    cfg = load_config({"PRESET": "demo", "MODEL_DIM": "64"})
    assert cfg.model_dim == 64
    assert cfg.num_layers == train_gpt.PRESETS["demo"]["num_layers"] != Config().num_layers


@pytest.mark.parametrize("name", train_gpt.PRESETS)
def test_presets_are_valid(name: str) -> None:
    cfg = load_config({"PRESET": name})
    assert all(getattr(cfg, k) == v for k, v in train_gpt.PRESETS[name].items())


# ---- problems --------------------------------------------------------------------------------------------------------
def test_all_problems_are_reported_at_once() -> None:
    lines = problems(ITERATIONS="many", LN_SCALE="2", MATRIX_LRR="1", NUM_LAYERS="0", COMPRESSOR="rar", PRESET="tiny")
    assert len(lines) == 6
    for name in ("ITERATIONS", "LN_SCALE", "MATRIX_LRR", "NUM_LAYERS", "COMPRESSOR", "PRESET"):
        assert sum(name in line for line in lines) >= 1, name


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("MODEL_DIMS", "MODEL_DIM"), ("TTT_LORA_RNK", "TTT_LORA_RANK"), ("MUON_MOMENTUN", "MUON_MOMENTUM")],
)
def test_a_misspelt_name_is_refused_with_the_right_one(wrong: str, meant: str) -> None:
    (line,) = problems(**{wrong: 1})
    assert f"{wrong} is not a knob; did you mean {meant}?" in line


def test_variables_of_other_programs_are_ignored() -> None:
    other = {"PATH": "/bin", "RANK": "0", "WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": "0", "NCCL_NET": "Socket"}
    assert load_config(other) == Config()


REFUSED = [
    ({"TIE_EMBEDDINGS": 0}, "TIE_EMBEDDINGS"),
    ({"LOOP_END": 8}, "two-lane"),
    ({"PARALLEL_START_LAYER": 4}, "two-lane"),
    ({"LOOP_START": 6}, "LOOP_START"),
    ({"LOOP_END": 11, "PARALLEL_START_LAYER": 0}, "LOOP_START..LOOP_END"),
    ({"LOOP_START": -1}, "LOOP_START"),
    ({"NUM_LOOPS": -1}, "NUM_LOOPS"),
    ({"TRAIN_BATCH_TOKENS": 786433}, "TRAIN_BATCH_TOKENS"),
    ({"TRAIN_BATCH_TOKENS": 8 * 1024}, "TRAIN_SEQ_LEN"),
    ({"MODEL_DIM": 516}, "NUM_HEADS"),
    ({"NUM_KV_HEADS": 3}, "NUM_KV_HEADS"),
    ({"ROPE_DIMS": 15}, "ROPE_DIMS"),
    ({"ROPE_DIMS": 66}, "ROPE_DIMS"),
    ({"GATE_WINDOW": 513}, "GATE_WINDOW"),
    ({"LOGIT_SOFTCAP": 0}, "LOGIT_SOFTCAP"),
    ({"TTT_EVAL_SEQ_LEN": 47}, "TTT_CHUNK_SIZE"),
    ({"GLOBAL_TTT_CHUNK_TOKENS": 2047}, "EVAL_SEQ_LEN"),
    ({"MATRIX_BITS": 9}, "MATRIX_BITS"),
    ({"EMBED_BITS": 1}, "EMBED_BITS"),
    ({"VAL_DOC_FRACTION": 0}, "VAL_DOC_FRACTION"),
    ({"VAL_DOC_FRACTION": 1.5}, "VAL_DOC_FRACTION"),
    ({"EMA_DECAY": 1}, "EMA_DECAY"),
    ({"WARMDOWN_FRAC": 0}, "WARMDOWN_FRAC"),
    ({"MAX_WALLCLOCK_SECONDS": 3}, "GPTQ_RESERVE_SECONDS"),
    ({"RUN_DIR": "a", "ARTIFACT_DIR": "b"}, "ARTIFACT_DIR"),
    ({"FROM_STAGE": "pack"}, "RUN_DIR"),
    ({"RESUME": 1}, "RUN_DIR"),
    ({"FROM_STAGE": "train", "RUN_DIR": "a"}, "FROM_STAGE"),
    ({"FROM_STAGE": "pack", "RESUME": 1, "RUN_DIR": "a"}, "choose one"),
    ({"EVAL_ONLY_CHECKPOINT": "a", "EVAL_ONLY_ARTIFACT": "b"}, "choose one"),
    ({"TTT_EVAL_BATCHES": "5,x"}, "TTT_EVAL_BATCHES"),
    ({"ROPE_YARN": "1", "ROPE_DIMS": "2"}, "ROPE_YARN=1 needs ROPE_DIMS above 2"),
    ({"TTT_OPTIMIZER": "lion"}, "TTT_OPTIMIZER"),
    ({"ATTENTION": "flex"}, "ATTENTION"),
    ({"ATTN_OUT_GATE_SRC": "k"}, "ATTN_OUT_GATE_SRC"),
    ({"PARALLEL_FINAL_LANE": "both"}, "PARALLEL_FINAL_LANE"),
    ({"WD_TAPER_START_FRAC": 1}, "WD_TAPER_START_FRAC"),
    ({"WD_TAPER_FINAL_MULT": -0.1}, "WD_TAPER_FINAL_MULT"),
    ({"MUON_GRAD_POWER": 0}, "MUON_GRAD_POWER"),
    ({"FP8_FORWARD": 1, "KERNELS": "spec"}, "fused kernels"),
    ({"FP8_FORWARD": 1, "DEVICE": "cpu"}, "needs a GPU"),
    ({"FP8_FORWARD": 1, "COMPUTE_DTYPE": "float32"}, "COMPUTE_DTYPE"),
    ({"FP8_FORWARD": 1, "MODEL_DIM": 520}, "divisible by 16"),
    ({"LORA_PLUS_RATIO": -1}, "LORA_PLUS_RATIO"),
    ({"TTT_LORA_LAYER_LR_ALPHA": -2}, "TTT_LORA_LAYER_LR_ALPHA"),
    ({"TTT_LORA_ALPHA": -1}, "TTT_LORA_ALPHA"),
    ({"TTT_WARM_START_A": 1}, "number of ranks"),
    ({"TAPIN_MIN_MATCH": 101}, "TAPIN_MIN_MATCH"),
    ({"EVAL_HASH_EMB_BUCKETS": 0}, "EVAL_HASH_EMB_BUCKETS"),
    ({"ROPE_YARN": 1, "TTT_CONTEXT": "cached"}, "TTT_CONTEXT"),
    ({"MATRIX_STEP_POWER": -1}, "MATRIX_STEP_POWER"),
    ({"EMBED_DAMPING": 0}, "EMBED_DAMPING"),
    ({"MATRIX_LR": -1}, "MATRIX_LR must not be below 0, but is -1"),
    ({"TTT_WEIGHT_DECAY": -0.1}, "TTT_WEIGHT_DECAY"),
    ({"MUON_WD": -5}, "MUON_WD"),
    ({"EVAL_LOOP_EMB_ENABLED": 1, "NUM_LOOPS": 0}, "NUM_LOOPS"),
    ({"TAPIN_MIX_W": 0.6}, "TAPIN_MIX_W"),
    ({"TAPIN_V4_TOP_K": 0}, "TAPIN_V4_TOP_K"),
]


@pytest.mark.parametrize(("env", "word"), REFUSED, ids=lambda x: " ".join(x) if isinstance(x, dict) else "")
def test_combinations_that_cannot_work_are_refused(env: dict[str, object], word: str) -> None:
    (line,) = problems(**env)
    assert word in line


def test_8_bits_are_refused_where_the_machine_lacks_them(tmp_path: Path) -> None:
    run = LoneRun(tmp_path)
    assert not [p for p in train_gpt.environment_problems(tiny_config(), run) if "FP8" in p]
    for knob in ("fp8_forward", "fp8_backward"):
        (line,) = (p for p in train_gpt.environment_problems(tiny_config(**{knob: True}), run) if "FP8" in p)
        assert "Hopper" in line and knob.upper() in line


def test_a_gpu_in_use_is_refused_where_time_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs without a clock may share one: there `GPUS` of ablate.py lets several go on side by side."""
    run = LoneRun(tmp_path, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 << 30, 80 << 30))
    (line,) = (p for p in train_gpt.environment_problems(tiny_config(max_wallclock_seconds=600), run) if "GPU" in p)
    assert line.startswith("another process holds 20480 MiB of this GPU: end it first, or set MAX_WALLCLOCK_SECONDS=0")
    assert not [p for p in train_gpt.environment_problems(tiny_config(max_wallclock_seconds=0), run) if "GPU" in p]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_numbers_that_are_none_are_refused(text: str) -> None:
    assert "MATRIX_LR" in problems(MATRIX_LR=text)[0]


def test_combinations_near_the_refused_ones_work() -> None:
    load_config({"PARALLEL_START_LAYER": "0", "LOOP_END": "10"})
    load_config({"NUM_LOOPS": "0", "PARALLEL_START_LAYER": "4", "LOOP_END": "99"})
    load_config({"TTT_EVAL_BATCHES": "5,250, 500"})
    load_config({"FROM_STAGE": "ttt", "RUN_DIR": "a"})
    load_config({"MAX_WALLCLOCK_SECONDS": "0"})
    load_config({"PRESET": "demo", "EVAL_ONLY_ARTIFACT": "a.ptz", "TRAIN_SEQ_LEN": "2048"})  # which the artifact says
    load_config({"HOTSTART_FP_CKPT": "a.pt", "DETERMINISTIC": "1"})
    assert load_config({"TTT_WARM_START_A": "0"}) == Config(), "what is refused may be off"
    tiny_config()


# ---- the manual ------------------------------------------------------------------------------------------------------
def test_every_knob_is_read_somewhere() -> None:
    """A knob that only its own check reads does nothing."""
    tree = ast.parse((ROOT / "train_gpt.py").read_text())
    read = {kind.knob for kind in train_gpt.Switch.__subclasses__()}
    read |= {f"{m.clip}_clip_sigmas" for m in train_gpt.MATRICES.values()}  # a name built at run time
    read.add("tie_embeddings")  # has one legal value, which the check explains
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in ("config_rules", "follow_up_rules"):
            continue
        read |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
        if isinstance(node, ast.FunctionDef) and node.name == "load_config":
            read |= {n.value.lower() for n in ast.walk(node) if isinstance(n, ast.Constant) and n.value == "PRESET"}
    assert {f.name for f in fields(Config)} - read == set()


def test_every_knob_has_a_manual(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--help"])
    assert train_gpt.main() == 0
    lines = capsys.readouterr().out.splitlines()
    for f in fields(Config):
        (line,) = (x for x in lines if x.startswith(f"  {f.name.upper()} "))
        default, _, text = line[38:].strip().partition(" ")
        shown = str(int(f.default) if isinstance(f.default, bool) else f.default) or "(empty)"
        assert default == shown, f.name
        assert len(text.split()) >= 1, f.name
    for heading in ("Data", "Model", "Optimizer", "Test-time training"):
        assert heading in lines


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="no pipes of this kind")
@pytest.mark.parametrize("argument", ["--help", "--size"])
def test_output_that_nobody_reads_ends_quietly(argument: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([sys.executable, ROOT / "train_gpt.py", argument], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (-signal.SIGPIPE, b"")


def test_bad_settings_end_with_code_2_and_every_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_gpt.py"])
    for f in fields(Config):
        monkeypatch.delenv(f.name.upper(), raising=False)
    monkeypatch.setenv("NUM_LAYERS", "0")
    monkeypatch.setenv("MODEL_DIMS", "3")
    assert train_gpt.main() == 2
    err = capsys.readouterr().err
    assert "NUM_LAYERS" in err
    assert "MODEL_DIM?" in err


@pytest.mark.parametrize("args", [["--hlp"], ["--help", "MODEL_DIM"], ["MODEL_DIM=64"], ["--size", "a", "b"]])
def test_an_unknown_command_line_ends_with_code_2_and_the_usage(
    args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *args])
    assert train_gpt.main() == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("usage: train_gpt.py [--help | --size [RUN_FOLDER]]") and printed.out == ""
