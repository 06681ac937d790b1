"""The whole pipeline as a user runs it: every run is one or more processes of its own, with a tiny model and shards.

Runs are shared: a fixture makes those that belong together, two at a time, and the tests look at what they left behind.
"""

from __future__ import annotations

import math
import re
import shutil
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pipeline_tools import KNOBS, TINY, UNMINIFIED, Finished, Launch, make_shards, run, tiny, together
from support import CPU, ROOT, LoneRun, relative_error, write_shard
from torch import Tensor

import read_logs
import train_gpt
from train_gpt import ARTIFACT_NAME

VAL_SENTENCES = (9, 3, 14, 6, 22, 4, 11)  # seven documents: an odd number, and more than there are ranks in any test
NOT_FOR_SCORING = {name.upper() for name in train_gpt.MODEL_FIELDS} | {"TRAIN_BATCH_TOKENS"}
SENTENCE = re.compile(r"Traceback|Error:|\[rank\d+\]:")  # what must not stand beside a sentence for the user

# A run that dies while it writes its third checkpoint, after half of the file.
KILLED = """
import os, signal, sys, train_gpt
whole, seen = train_gpt.write_atomically, []
def half(path, write):
    def killed(file):
        file.write(b"half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    seen.extend([path.name] * (path.name == "checkpoint.pt"))
    whole(path, killed if len(seen) == 3 else write)
train_gpt.write_atomically = half
sys.exit(train_gpt.main())
"""

TINY_LIMIT = "import train_gpt; train_gpt.ARTIFACT_LIMIT = 1000; " + UNMINIFIED["code"]

# An interpreter in which some installed packages cannot be found.
HIDING = """
import importlib.machinery, os, sys
hidden = os.environ["HIDDEN_PACKAGES"].split(",")
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in hidden else super().find_spec(name, path, target)
sys.meta_path = [Finder if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""


class Place(NamedTuple):
    """Where the runs of this file live, and their shards."""

    root: Path
    data: Path
    val_only: Path  # the same validation text, no training shards
    one_document: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("pipeline")
    data = make_shards(root / "data", 0, 12_000, VAL_SENTENCES)
    one = make_shards(root / "one_document", 1, 0, (8,))
    (root / "val_only").mkdir()
    for path in data.glob("fineweb_val_*"):
        shutil.copy(path, root / "val_only")
    return Place(root, data, root / "val_only", one)


@pytest.fixture(scope="module")
def trained(place: Place) -> dict[str, Finished]:
    """All stages with one process, and with two under torchrun."""
    return together({
        "one": lambda: run(place.root / "one", place.data, dict(fresh=True), SAVE_PRE_GPTQ=1),
        "two": lambda: run(place.root / "two", place.data, dict(world=2, torchrun=True)),
    })  # fmt: skip


@pytest.fixture(scope="module")
def full(trained: dict[str, Finished]) -> Finished:
    return trained["one"].ok()


def loaded(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def folder_with(full: Finished, folder: Path, *names: str) -> Path:
    """A run folder that holds only these files of the full run: a stage cannot use what is not there."""
    folder.mkdir()
    for name in names:
        shutil.copy(full.folder / name, folder)
    return folder


# ---- one run through all stages --------------------------------------------------------------------------------------
NUMBER = r"-?\d+\.\d+"
PUBLIC_LINES = {  # what parsers of the public logs look for, and how often a run prints it
    r"={100}": 2,
    r"Hyperparameters:": 1,
    r"  num_layers: 4": 1,
    r"train_shards: 2": 1,
    r"val_tokens: \d+": 1,
    r"model_params:\d+": 1,
    r"warmup_step: 1/1": 1,
    r"loop_warmup:enabled encoder:\[0, 1\] decoder:\[1, 2, 3\]": 1,
    r"loop_warmup_step: 1/1": 1,
    r"\d+/12 val_loss: \d+\.\d{4} val_bpb: \d+\.\d{4}": 3,
    r"\d+/12 train_loss: \d+\.\d{4} train_time: \d+\.\dm tok/s: \d+": 12,
    r"layer_loop:enabled step:5 frac:0\.417 encoder:\[0, 1\] decoder:\[1, 2, 3\]": 1,
    r"peak memory allocated: \d+ MiB reserved: \d+ MiB": 1,
    r"ema:applying EMA weights": 1,
    r"diagnostic pre-quantization post-ema val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8} eval_time:\d+ms": 1,
    r"diagnostic quantized val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8} eval_time:\d+ms": 1,
    r"Serialized model: \d+ bytes": 1,
    r"Code size \(uncompressed\): \d+ bytes": 1,
    r"Code size \(compressed\): \d+ bytes": 1,
    r"GPTQ:collecting Hessians from calibration data\.\.\.": 1,
    r"GPTQ:collected 25 Hessians in \d+\.\ds": 1,
    r"Quantized weights:": 1,
    r"  gptq \(int6\): blocks\.attn\.c_k\.weight, .*blocks\.mlp\.proj\.weight": 1,
    r"  gptq \(int7\): tok_emb\.weight": 1,
    r"  gate_int8_row: blocks\.attn\.attn_gate_w": 1,
    r"  passthrough \(float16\): .*skip_gates.*": 1,
    r"Serialized model quantized\+rans: \d+ bytes": 1,
    r"Total submission size quantized\+rans: \d+ bytes": 1,
    r"ttt_lora:warming up compile \(random tokens, no val data\)": 1,
    r"ttt_lora:compile warmup done \(\d+\.\ds\)": 1,
    r"beginning TTT eval timer": 1,
    r"ttt_phased: total_docs:7 prefix_docs:5 suffix_docs:2 num_phases:2 boundaries:\[2, 5\]": 1,
    rf"ttp: b\d+/4 bl:{NUMBER} bb:{NUMBER} rl:{NUMBER} rb:{NUMBER} dl:\d+-\d+ gd:[01]": 4,
    r"ttpp: phase:\d/2 pd:\d gd:\d t:\d+\.\ds": 2,
    r"ttpr: phase:\d/2 t:\d+\.\ds": 2,
    r"quantized_ttt_phased val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8} eval_time:\d+ms": 1,
    r"total_eval_time:\d+\.\ds": 1,
}


def test_the_log_has_the_public_lines(full: Finished) -> None:
    # The log begins with the program itself, whose text must not be counted.
    head, rule, rest = full.log.split("=" * 100 + "\n", 2)
    assert head == ""
    assert rule.startswith("#!/usr/bin/env python3") and "def main() -> int:" in rule
    lines = ["=" * 100] * 2 + rest.splitlines()
    counts = {p: sum(re.fullmatch(p, line) is not None for line in lines) for p in PUBLIC_LINES}
    assert counts == PUBLIC_LINES


def test_the_result_block_ends_log_and_output(full: Finished) -> None:
    block = full.output[full.output.index("\nresult\n") :]
    assert full.log.endswith(block)
    r = full.result
    for label, key in (("float (EMA)", "bpb_float"), ("quantized", "bpb_quantized"), ("after TTT", "bpb_ttt")):
        assert f"| {label} | {r[key]:.5f} |" in block
    assert f"| artifact bytes | {r['total_bytes']} | 16000000 | pass |" in block
    assert re.search(r"^\| train \+ calibration seconds \| \d+\.\d \| none set \| \|$", block, re.M)
    assert re.search(r"^\| evaluation seconds \| \d+\.\d \| 600 \| pass \|$", block, re.M)
    assert "seed 42, 12 steps" in block


def test_the_run_folder_is_complete(full: Finished) -> None:
    files = {str(p.relative_to(full.folder)) for p in full.folder.rglob("*") if p.is_file()}
    assert files == {
        "log.txt", "metrics.jsonl", "run.json", "01_weights.pt", "02_hessians.pt", "03_coded.pt", "final_model.pt",
        "pre_gptq.pt", ARTIFACT_NAME, "submission/train_gpt.py", f"submission/{ARTIFACT_NAME}",
    }  # fmt: skip
    assert full.artifact == (full.folder / "submission" / ARTIFACT_NAME).read_bytes()
    assert full.result["artifact_bytes"] == len(full.artifact)
    assert full.result["code_bytes"] == (full.folder / "submission/train_gpt.py").stat().st_size
    assert full.result["total_bytes"] == full.result["artifact_bytes"] + full.result["code_bytes"]


def test_pre_gptq_is_the_averaged_model(full: Finished) -> None:
    averaged = loaded(full.folder / "01_weights.pt")["model"]
    assert_same_tensors(loaded(full.folder / "pre_gptq.pt"), train_gpt.unbank(averaged))
    assert_same_tensors(loaded(full.folder / "final_model.pt"), averaged)


def test_training_learns_and_every_stage_keeps_it(full: Finished) -> None:
    assert sorted(full.losses) == list(range(1, 13))
    assert full.losses[1] == pytest.approx(math.log(8192), abs=0.05)
    assert full.losses[12] < 5.5
    r = full.result
    assert abs(r["bpb_quantized"] - r["bpb_float"]) < 0.02
    assert r["bpb_ttt"] < r["bpb_quantized"]


def test_metrics_hold_all_that_was_measured(full: Finished) -> None:
    assert Counter(row["kind"] for row in full.metrics) >= Counter(train=12, eval=5, ttt=4, result=1)
    assert [row["label"] for row in full.rows("eval")] == [
        "step 0", "step 6", "step 12", "pre-quantization post-ema", "quantized"]  # fmt: skip
    stages = [row["name"] for row in full.rows("stage")]
    assert stages == ["train", "evaluate float", "calibrate", "quantize", "pack", "evaluate", "ttt"]
    assert {row["phase"] for row in full.rows("base_sgd")} == {1, 2}
    assert [row["looped"] for row in full.rows("train")] == [False] * 5 + [True] * 7
    run_json = full.folder.joinpath("run.json").read_text()
    for text in ('"val_sha256"', '"num_layers": 4', '"bpb_ttt"', '"commit"', '"torch"'):
        assert text in run_json


@pytest.mark.parametrize("world", ["one", "two"])
def test_metrics_hold_what_quantization_cost(trained: dict[str, Finished], world: str) -> None:
    """Errors of everything that has codes, and bytes of every section, as a direct look at the files gives them."""
    done = trained[world].ok()
    (quantization,), (sections,) = done.rows("quantization"), done.rows("sections")
    errors = {name: error for name, _, error in quantization["rows"]}
    assert Counter(bits for _, bits, _ in quantization["rows"]) == {6: 24, 7: 1, 8: 4}
    weights = train_gpt.unbank(loaded(done.folder / "final_model.pt"))
    decoded = train_gpt.unbank(train_gpt.unpack(done.artifact)[0])
    assert errors == pytest.approx({name: relative_error(decoded[name], weights[name]) for name in errors}, rel=1e-4)
    assert sum(sections["bytes"].values()) == len(done.artifact)
    assert {"header", "float16", "rows", "tok_emb.weight", "mlp.fc.weight"} < sections["bytes"].keys()
    assert sections["code"] == done.result["code_bytes"]
    (read,) = read_logs.read_runs(done.folder)
    assert (read.tensors, read.parts) == (errors, sections["bytes"])


def test_the_score_is_the_sum_of_its_batches(full: Finished, place: Place) -> None:
    """Every target and byte of the validation shards is in exactly one batch, and nothing else makes the score."""
    tokens, counts = (train_gpt.read_shard(place.data / f"fineweb_val_{n}000000.bin") for n in ("", "bytes_"))
    rows = full.rows("ttt")
    assert sum(row["tokens"] for row in rows) == len(tokens) - 1
    assert sum(row["bytes"] for row in rows) == int(counts.astype(int).sum())
    bpb = sum(row["nats"] for row in rows) / math.log(2) / sum(row["bytes"] for row in rows)
    assert full.result["bpb_ttt"] == pytest.approx(bpb, rel=1e-12)


@pytest.mark.parametrize("world", ["one", "two"])
def test_every_stage_is_known_by_document(trained: dict[str, Finished], place: Place, world: str) -> None:
    """Nats of each document, whichever process scored it; they sum to those of the stage."""
    done, tokens = trained[world].ok(), train_gpt.read_shard(place.data / "fineweb_val_000000.bin")
    documents = train_gpt.ValidationSet(tokens, tokens).documents()
    evaluated = {row["label"]: row["nats"] for row in done.rows("documents")}
    for label, stage in (("pre-quantization post-ema", "float"), ("quantized", "quantized")):
        assert len(evaluated[label]) == len(documents)
        assert sum(evaluated[label]) == pytest.approx(done.result[f"loss_{stage}"] * (len(tokens) - 1), rel=1e-6)
    learned = dict(pair for row in done.rows("ttt") for pair in row["documents"])
    assert learned.keys() == {d.start for d in documents}
    assert sum(learned.values()) == pytest.approx(sum(row["nats"] for row in done.rows("ttt")), rel=1e-6)
    (read,) = read_logs.read_runs(done.folder)
    assert read.documents.keys() == {"float", "quantized", "ttt"} and read.documents["ttt"] == learned
    apart = [learned[d.start] - evaluated["quantized"][i] for i, d in enumerate(documents)]
    assert sum(apart) < 0 and max(map(abs, apart)) < 0.6 * max(evaluated["quantized"])  # the same documents


# ---- one process and several -----------------------------------------------------------------------------------------
def test_two_processes_train_like_one(trained: dict[str, Finished], full: Finished) -> None:
    two = trained["two"].ok()
    assert two.losses.keys() == full.losses.keys()
    assert max(abs(two.losses[s] - full.losses[s]) for s in full.losses) < 1e-4
    # GPTQ carries a code that falls to the other side of a half on to all later columns: rounding becomes new noise.
    for key, tolerance in (("bpb_float", 1e-4), ("bpb_quantized", 1e-3), ("bpb_ttt", 1e-3)):
        assert two.result[key] == pytest.approx(full.result[key], rel=tolerance), key
    assert (two.result["world"], full.result["world"]) == (2, 1)


def test_two_processes_report_like_one(trained: dict[str, Finished], full: Finished) -> None:
    """The same metrics, and the same log but for lines of batches and of progress, which depend on the clock."""
    two = trained["two"]
    assert [(r["kind"], r.get("batch"), r.get("tokens")) for r in two.metrics] == [
        (r["kind"], r.get("batch"), r.get("tokens")) for r in full.metrics]  # fmt: skip
    by_clock = re.compile(r"ttp:|  .*: +\d+% eta ")
    one, two = ([line for line in f.log.splitlines() if not by_clock.match(line)] for f in (full, two))
    assert len(one) == len(two)


@pytest.fixture(scope="module")
def rescored(place: Place, full: Finished) -> dict[str, Finished]:
    """The full run's artifact scored by 2 and 4 processes, and with fewer documents than processes."""
    artifact = full.folder / ARTIFACT_NAME
    score = partial(run, EVAL_ONLY_ARTIFACT=artifact)
    return together({
        "four": lambda: score(place.root / "score4", place.val_only, dict(world=4)),
        "two": lambda: score(place.root / "score2", place.val_only, dict(world=2)),
        "one document": lambda: score(place.root / "document1", place.one_document),
        "one document, two": lambda: score(place.root / "document2", place.one_document, dict(world=2)),
    })  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("world", ["two", "four"])
def test_several_processes_score_like_one(rescored: dict[str, Finished], full: Finished, world: str) -> None:
    several = rescored[world].ok().result
    assert several["world"] == {"two": 2, "four": 4}[world]
    assert several["bpb_quantized"] == pytest.approx(full.result["bpb_quantized"], rel=1e-9)
    assert several["bpb_ttt"] == pytest.approx(full.result["bpb_ttt"], rel=1e-6)


def test_fewer_documents_than_processes(rescored: dict[str, Finished]) -> None:
    one, two = (rescored[name].ok() for name in ("one document", "one document, two"))
    assert [row["docs"] for row in one.rows("ttt")] == [row["docs"] for row in two.rows("ttt")] == [1]
    assert one.rows("base_sgd") and len(one.rows("base_sgd")) == len(two.rows("base_sgd"))
    assert two.result["bpb_ttt"] == pytest.approx(one.result["bpb_ttt"], rel=1e-6)


# ---- the submission --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def variants(place: Place, full: Finished) -> dict[str, Finished]:
    """Runs that start in the middle, each in a folder that holds just what it needs, and one that ends early."""

    def stage(name: str, *files: str, **knobs: Any) -> Finished:
        data = place.data if name == "calibrate" else place.val_only
        folder = folder_with(full, place.root / f"from_{name}_{knobs.get('COMPRESSOR', '')}", *files)
        return run(folder, data, {} if name == "pack" else UNMINIFIED, FROM_STAGE=name, **knobs)

    def checkpoint() -> Finished:
        path = folder_with(full, place.root / "public", "final_model.pt") / "final_model.pt"
        knobs = dict(EVAL_ONLY_CHECKPOINT=path, TTT_ENABLED=0)
        return run(place.root / "from_checkpoint", place.data, UNMINIFIED, **knobs)

    def submission() -> Finished:
        """Only two files, another working directory, and no knob that says what the model is."""
        home = shutil.copytree(full.folder / "submission", place.root / "elsewhere")
        knobs = {k: v for k, v in tiny(place.root / "submitted", place.val_only).items() if k not in NOT_FOR_SCORING}
        knobs |= {"EVAL_ONLY_ARTIFACT": home / ARTIFACT_NAME, "PYTHONPATH": ""}
        with Launch(knobs, fresh=True, script=home / "train_gpt.py", cwd=place.one_document) as launch:
            return launch.finish()

    def too_large() -> Finished:
        folder = folder_with(full, place.root / "too_large", "03_coded.pt")
        return run(folder, place.val_only, dict(code=TINY_LIMIT), FROM_STAGE="pack", TTT_ENABLED=0)

    def too_large_still(folder: Path) -> Finished:
        return run(folder, place.val_only, dict(code=TINY_LIMIT), FROM_STAGE="evaluate", TTT_ENABLED=0)

    def unlooped() -> Finished:
        """Stopped by the clock, before the loop would begin."""
        knobs = dict(ENABLE_LOOPING_AT=2, ITERATIONS=100_000, MAX_WALLCLOCK_SECONDS=5, GPTQ_RESERVE_SECONDS=3)
        knobs |= dict(VAL_LOSS_EVERY=0, PHASED_TTT_PREFIX_DOCS=1)
        return run(place.root / "unlooped", place.data, UNMINIFIED, **knobs)

    runs = together({
        "unlooped": unlooped,
        "submission": submission,
        "calibrate": lambda: stage("calibrate", "01_weights.pt", TTT_ENABLED=0),
        "quantize": lambda: stage("quantize", "01_weights.pt", "02_hessians.pt", TTT_ENABLED=0),
        "pack": lambda: stage("pack", "03_coded.pt", TTT_ENABLED=0),
        "lzma": lambda: stage("pack", "03_coded.pt", TTT_ENABLED=0, COMPRESSOR="lzma"),
        "zstd": lambda: stage("pack", "03_coded.pt", TTT_ENABLED=0, COMPRESSOR="zstd"),
        "evaluate": lambda: stage("evaluate", ARTIFACT_NAME),
        "ttt": lambda: stage("ttt", ARTIFACT_NAME),
        "checkpoint": checkpoint,
        "too large": too_large,
    })  # fmt: skip
    return runs | {"too large still": too_large_still(runs["too large"].folder)}


def test_the_submission_reproduces_the_score_on_its_own(
    variants: dict[str, Finished], full: Finished, place: Place
) -> None:
    submission = variants["submission"].ok()
    assert {p.name for p in (place.root / "elsewhere").iterdir()} == {"train_gpt.py", ARTIFACT_NAME}
    assert submission.result["bpb_quantized"] == full.result["bpb_quantized"]
    assert submission.result["bpb_ttt"] == full.result["bpb_ttt"]


# ---- stages ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", ["calibrate", "quantize", "pack"])
def test_a_stage_repeats_the_artifact(variants: dict[str, Finished], full: Finished, stage: str) -> None:
    again = variants[stage].ok()
    assert again.artifact == full.artifact
    assert again.result["bpb_quantized"] == full.result["bpb_quantized"]
    assert again.result["steps"] == 12 and again.result["looped"]
    assert (again.result["calibrate_seconds"] == full.result["calibrate_seconds"]) is (stage != "calibrate")
    assert "train_loss" not in again.output and ("collecting Hessians" in again.output) == (stage == "calibrate")


@pytest.mark.parametrize("stage", ["evaluate", "ttt"])
def test_a_stage_repeats_the_score(variants: dict[str, Finished], full: Finished, stage: str) -> None:
    again = variants[stage].ok()
    assert again.result["bpb_ttt"] == full.result["bpb_ttt"]
    assert again.result.get("bpb_quantized") == (full.result["bpb_quantized"] if stage == "evaluate" else None)


def test_a_plain_checkpoint_gives_the_same_artifact(variants: dict[str, Finished], full: Finished) -> None:
    """The public script scored bfloat16 roundings of such a file; with the loop on, ours is the in-line path."""
    again = variants["checkpoint"].ok()
    assert "EVAL_ONLY_BYPASS: model loaded, compiled, looping_active=True" in again.output
    assert_same_tensors(train_gpt.unpack(again.artifact)[0], train_gpt.unpack(full.artifact)[0])
    assert again.artifact == full.artifact
    assert again.result["bpb_float"] == full.result["bpb_float"]


@pytest.mark.parametrize("compressor", ["lzma", "zstd"])
def test_compressors_keep_every_tensor(variants: dict[str, Finished], full: Finished, compressor: str) -> None:
    other = variants[compressor].ok()
    assert re.search(rf"Serialized model quantized\+{compressor}: {len(other.artifact)} bytes", other.output)
    assert other.artifact != full.artifact
    assert_same_tensors(train_gpt.unpack(other.artifact)[0], train_gpt.unpack(full.artifact)[0])
    assert other.result["bpb_quantized"] == full.result["bpb_quantized"]


@pytest.mark.parametrize(
    ("knob", "seconds", "row", "kept"),
    [(600, 600.0, "600.0 | 600 | pass", True), (600, 600.1, "600.1 | 600 | FAIL", False),
     (9000, 7000.0, "7000.0 | 600 | FAIL", False), (0, 7000.0, "7000.0 | none set |", True)],
)  # fmt: skip
def test_training_seconds_have_a_limit_unless_the_run_goes_by_steps(
    knob: int, seconds: float, row: str, kept: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{}")
    cfg = settings_of({"MAX_WALLCLOCK_SECONDS": knob})
    result = dict(train_seconds=seconds - 1, calibrate_seconds=1, peak_memory_mib=1)
    assert train_gpt.report(cfg, LoneRun(tmp_path), result) is kept
    assert f"| train + calibration seconds | {row} |" in capsys.readouterr().out


def test_too_many_bytes_are_an_error_after_the_score(variants: dict[str, Finished]) -> None:
    large = variants["too large"]
    assert large.code == 3
    assert f"ERROR: the submission is {large.result['total_bytes'] - 1000} bytes over 1000:" in large.output
    assert f"| artifact bytes | {large.result['total_bytes']} | 1000 | FAIL |" in large.output
    assert large.result["bpb_quantized"] > 0
    again = variants["too large still"]
    assert again.code == 3
    assert f"| artifact bytes | {large.result['total_bytes']} | 1000 | FAIL |" in again.output
    assert "| train + calibration seconds | " in again.output


def test_a_later_stage_counts_what_it_scores_and_the_seconds_before(tmp_path: Path) -> None:
    run = LoneRun(tmp_path)
    assert train_gpt.earlier_figures(run, b"artifact") == {}
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission" / "train_gpt.py").write_bytes(b"code")
    (tmp_path / "submission" / ARTIFACT_NAME).write_bytes(b"old")  # of a run that was killed before it wrote its own
    sizes = {"code_bytes": 4, "artifact_bytes": 8, "total_bytes": 12}
    (tmp_path / "03_coded.pt").write_bytes(b"damaged")
    assert train_gpt.earlier_figures(run, b"artifact") == sizes
    torch.save({"coded": {}, "steps": 7, "train_seconds": 599.0, "looped": 2, "calibrate_seconds": None},
               tmp_path / "03_coded.pt")  # fmt: skip
    assert train_gpt.earlier_figures(run, b"artifact") == sizes | {"steps": 7, "train_seconds": 599.0, "looped": 2}


# ---- a loop that training never reached ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def unlooped(variants: dict[str, Finished]) -> Finished:
    return variants["unlooped"].ok()


def settings_of(knobs: dict[str, Any]) -> train_gpt.Config:
    return train_gpt.load_config({k: str(v) for k, v in knobs.items() if k in KNOBS})


def bpb_of_artifact(blob: bytes, place: Place, looped: bool) -> float:
    state, _, settings = train_gpt.unpack(blob)
    cfg = settings_of(tiny(place.root, place.data))
    assert all(getattr(cfg, k) == v for k, v in settings.items())
    model = train_gpt.GPT(cfg)
    model.load_state_dict(state)
    model.looped = looped
    return train_gpt.evaluate(model, train_gpt.load_validation(cfg), cfg, LoneRun(), "quantized").bpb


def test_inference_runs_without_a_loop_that_was_never_trained(unlooped: Finished, place: Place) -> None:
    assert train_gpt.unpack(unlooped.artifact)[1] == 0
    assert unlooped.result["looped"] == 0
    assert "artifact: looped=0" in unlooped.output and "layer_loop:enabled" not in unlooped.output
    assert unlooped.result["bpb_quantized"] == pytest.approx(bpb_of_artifact(unlooped.artifact, place, False), rel=1e-5)
    assert unlooped.result["bpb_quantized"] != pytest.approx(bpb_of_artifact(unlooped.artifact, place, True), rel=1e-3)
    assert unlooped.result["bpb_ttt"] == pytest.approx(unlooped.result["bpb_quantized"], rel=0.05)


def test_a_trained_loop_is_used_at_inference(full: Finished, place: Place) -> None:
    assert train_gpt.unpack(full.artifact)[1] == 1
    assert full.result["bpb_quantized"] == pytest.approx(bpb_of_artifact(full.artifact, place, True), rel=1e-5)


def test_the_clock_ends_training(unlooped: Finished) -> None:
    assert re.search(r"^gptq:reserving 3s, effective=2000ms$", unlooped.output, re.M)
    stop = re.search(r"^stopping_early: wallclock_cap train_time: (\d+)ms step: (\d+)/100000$", unlooped.output, re.M)
    assert stop and int(stop[1]) >= 2000 and int(stop[2]) == unlooped.result["steps"] >= 1


# ---- kills, signals, and losses that are not numbers -----------------------------------------------------------------
ENDLESS = dict(ITERATIONS=100_000, VAL_LOSS_EVERY=0, TTT_ENABLED=0)
EXPLODING = dict(MATRIX_LR=1e30, VAL_LOSS_EVERY=0, CHECKPOINT_EVERY=100)


class Stopped(NamedTuple):
    """A run that a signal ended, and the one that went on from there for two more steps."""

    first: Finished
    second: Finished


def stop_and_resume(place: Place, number: signal.Signals, world: int, resuming: int) -> Stopped:
    """With several processes torchrun gets the signal, as from a job scheduler, and passes it on."""
    folder = place.root / f"stopped{world}{number.name}"
    with Launch(tiny(folder, place.data, **ENDLESS), fresh=True, world=world, torchrun=world > 1) as launch:
        launch.wait_for(r"(?m)^3/100000 train_loss")
        launch.processes[0].send_signal(number)
        first = launch.finish()
    step = int((re.findall(r"at step (\d+)", first.output) or ["0"])[-1])
    knobs = ENDLESS | {"ITERATIONS": step + 2, "RESUME": 1}
    return Stopped(first, run(folder, place.data, UNMINIFIED | {"world": resuming}, **knobs))


def stop_scoring(place: Place, full: Finished) -> Finished:
    knobs = dict(EVAL_ONLY_ARTIFACT=full.folder / ARTIFACT_NAME, GLOBAL_TTT_EPOCHS=100_000)
    with Launch(tiny(place.root / "stopped_scoring", place.val_only, **knobs)) as launch:
        launch.wait_for("ttpp: phase:1")
        launch.processes[0].send_signal(signal.SIGTERM)
        return launch.finish()


class Killed(NamedTuple):
    """SIGKILL in the middle of writing the third checkpoint, and two runs that went on from the second."""

    first: Finished
    second: Finished
    poisoned: Finished  # from a copy with weights that are not numbers


def kill_and_resume(place: Place) -> Killed:
    folder, copy = place.root / "killed", place.root / "poisoned"
    first = run(folder, place.data, dict(code=KILLED), CHECKPOINT_EVERY=3)
    assert not (folder / "01_weights.pt").exists()
    state = loaded(folder / "checkpoint.pt")
    state["model"]["tok_emb.weight"][5:] = math.nan
    copy.mkdir()
    torch.save(state, copy / "checkpoint.pt")
    second = run(folder, place.data, UNMINIFIED, RESUME=1, CHECKPOINT_EVERY=3, TTT_ENABLED=0)
    return Killed(first, second, run(copy, place.data, RESUME=1, VAL_LOSS_EVERY=0))


@pytest.fixture(scope="module")
def ended(place: Place, full: Finished) -> dict[str, Any]:
    """Runs that do not reach their end by themselves."""
    return together({
        "kill": lambda: kill_and_resume(place),
        "SIGTERM 2": lambda: stop_and_resume(place, signal.SIGTERM, 2, resuming=2),
        "SIGINT 2": lambda: stop_and_resume(place, signal.SIGINT, 2, resuming=1),
        "SIGTERM 1": lambda: stop_and_resume(place, signal.SIGTERM, 1, resuming=2),
        "SIGINT 1": lambda: stop_and_resume(place, signal.SIGINT, 1, resuming=1),
        "scoring": lambda: stop_scoring(place, full),
        "nan 1": lambda: run(place.root / "nan1", place.data, **EXPLODING),
        "nan 2": lambda: run(place.root / "nan2", place.data, dict(world=2), **EXPLODING),
        "nan at last": lambda: run(place.root / "nan_at_last", place.data, ITERATIONS=1, **EXPLODING),
    })  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_weights(ended: dict[str, Any], full: Finished) -> None:
    """It goes on from the second checkpoint, which has the loop on, not from the half-written third."""
    dead, resumed, _ = ended["kill"]
    assert dead.code == -signal.SIGKILL, dead.output
    assert re.search(r"^9/12 train_loss", dead.output, re.M)
    resumed.ok()
    assert re.search(r"resuming from .*checkpoint\.pt at step 6 ", resumed.output)
    assert "layer_loop:enabled" not in resumed.output
    ours, theirs = (loaded(r.folder / "01_weights.pt") for r in (resumed, full))
    assert_same_tensors(ours["model"], theirs["model"])
    assert (ours["steps"], ours["looped"]) == (theirs["steps"], theirs["looped"]) == (12, True)
    assert resumed.artifact == full.artifact


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_can_go_on(ended: dict[str, Any], number: signal.Signals, world: int) -> None:
    stopped, resumed = ended[f"{number.name} {world}"]
    says = rf"^stopped by {number.name} at step (\d+): RESUME=1 RUN_DIR={stopped.folder} goes on, with the same knobs$"
    sentence = re.search(says, stopped.output, re.M)
    assert sentence, stopped.output
    step = int(sentence[1])
    assert step >= 3
    if world == 1:  # torchrun has exit codes and tracebacks of its own
        assert stopped.code == 128 + number
        assert not SENTENCE.search(stopped.output), stopped.output
    else:
        assert stopped.code != 0
    assert loaded(stopped.folder / "checkpoint.pt")["progress"]["step"] == step
    resumed.ok()
    assert re.search(rf"resuming from .*checkpoint\.pt at step {step} ", resumed.output)
    losses = {int(i): float(x) for i, x in re.findall(r"(?m)^(\d+)/\d+ train_loss: (\S+)", resumed.output)}
    assert resumed.result["steps"] == step + 2 and losses.keys() >= {step + 2}
    assert losses[step + 2] < math.log(8192) - 1


def test_a_signal_while_scoring_ends_the_run(ended: dict[str, Any]) -> None:
    scoring = ended["scoring"]
    assert scoring.code == 128 + signal.SIGTERM
    says = rf"^stopped by SIGTERM: FROM_STAGE goes on from the .* in {scoring.folder}, with the same knobs$"
    assert re.search(says, scoring.output, re.M)
    assert not SENTENCE.search(scoring.output), scoring.output


@pytest.mark.parametrize("world", [1, 2])
def test_nan_stops_every_process_with_the_step(ended: dict[str, Any], world: int) -> None:
    """The matrices blow up in the first step, so that the loss of the second is not a number."""
    nan = ended[f"nan {world}"]
    assert nan.code == 1
    assert re.search(r"^the training loss is (nan|inf) at step 2: .*; there is no checkpoint yet$", nan.output, re.M)
    assert not SENTENCE.search(nan.output), nan.output
    assert not (nan.folder / "01_weights.pt").exists()


def test_nan_names_the_last_checkpoint(ended: dict[str, Any]) -> None:
    nan = ended["kill"].poisoned
    assert nan.code == 1
    says = rf"^.* at step (\d+): .*the last checkpoint is {nan.folder}/checkpoint\.pt"
    found = re.search(says, nan.output, re.M)
    assert found and int(found[1]) in (6, 7, 8), nan.output
    assert not (nan.folder / "01_weights.pt").exists()


def test_weights_that_blow_up_in_the_last_step_are_not_saved(ended: dict[str, Any]) -> None:
    """The loss of that step is still a number."""
    nan = ended["nan at last"]
    assert nan.code == 1
    assert re.search(r"^the validation loss is nan \(step 1\): lower the learning rates", nan.output, re.M)
    assert not SENTENCE.search(nan.output), nan.output
    assert not (nan.folder / "01_weights.pt").exists()


# ---- problems found before any work ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def refused(place: Place, full: Finished) -> dict[str, Finished]:
    """Runs that must not start, each for reasons of its own."""
    root = place.root / "refused"
    root.mkdir()
    broken = Path(shutil.copytree(place.data, root / "broken_data"))
    shard = broken / "fineweb_train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-7])
    counts = broken / "fineweb_val_bytes_000000.bin"
    write_shard(counts, train_gpt.read_shard(counts)[:-3])
    (root / "file").write_text("a regular file")
    hiding = root / "hiding"
    hiding.mkdir()
    (hiding / "sitecustomize.py").write_text(HIDING)

    unmarked = Path(shutil.copytree(place.val_only, root / "unmarked"))
    tokens = train_gpt.read_shard(unmarked / "fineweb_val_000000.bin")
    write_shard(unmarked / "fineweb_val_000000.bin", [t + (t == train_gpt.BOS) for t in tokens])
    artifact = root / "flipped.ptz"
    artifact.write_bytes(full.artifact[:-1] + bytes([full.artifact[-1] ^ 1]))

    def weights(name: str, file: str = "01_weights.pt", size: int | None = None) -> Path:
        """A run folder of before: its weights, under another name or cut short if asked for, and its run.json."""
        folder = folder_with(full, root / name, "01_weights.pt", "run.json")
        (folder / file).write_bytes((folder / "01_weights.pt").read_bytes()[:size])
        return folder

    packages = {"PYTHONPATH": hiding, "HIDDEN_PACKAGES": "brotli,python_minifier,zstandard,sentencepiece"}
    return together({
        "data": lambda: run(root / "data", broken, TOKENIZER_PATH=root / "absent.model", TRAIN_BATCH_TOKENS=16_384),
        "three": lambda: run(root / "three", place.data, dict(world=3)),
        "knobs": lambda: run(root / "knobs", place.data, MATRIX_LRR="0.1", NUM_HEADS=3, MATRIX_BITS=9),
        "folder": lambda: run(root / "file" / "below", place.data),
        "packages": lambda: run(root / "packages", place.data, dict(fresh=True), COMPRESSOR="zstd", **packages),
        "no data": lambda: run(root / "no_data", root / "hiding", VOCAB_SIZE=4096),
        "other model": lambda: run(
            weights("other_model", "02_hessians.pt"), place.data, FROM_STAGE="quantize", MLP_MULT=3, LOOP_END=2),
        "other checkpoint": lambda: run(
            weights("other_checkpoint", "checkpoint.pt"), place.data, RESUME=1, MLP_MULT=3),
        "broken weights": lambda: run(weights("broken_weights", size=5000), place.data, FROM_STAGE="calibrate"),
        "broken artifact": lambda: run(root / "fresh4", place.val_only, EVAL_ONLY_ARTIFACT=artifact),
        "other state dict": lambda: run(
            root / "fresh5", place.data, EVAL_ONLY_CHECKPOINT=full.folder / "final_model.pt", MLP_MULT=3),
        "no documents": lambda: run(root / "fresh6", unmarked, EVAL_ONLY_ARTIFACT=full.folder / ARTIFACT_NAME),
        "no Hessians": lambda: run(weights("no_hessians"), place.data, FROM_STAGE="quantize"),
        "no checkpoint": lambda: run(root / "fresh", place.data, RESUME=1),
        "no artifact": lambda: run(root / "fresh2", place.data, EVAL_ONLY_ARTIFACT=root / "absent.ptz"),
        "no state dict": lambda: run(root / "fresh3", place.data, EVAL_ONLY_CHECKPOINT=root / "absent.pt"),
    })  # fmt: skip


REFUSALS = {  # what each of them has to say, all of it at once
    "data": [
        r"no tokenizer at .*absent\.model: set TOKENIZER_PATH",
        r"fineweb_train_000000\.bin has \d+ bytes, its header promises \d+",
        r"fineweb_val_bytes_000000\.bin has \d+ entries.* .*fineweb_val_000000\.bin has \d+",
        r"no training shard holds .* 16392 tokens",
    ],
    "three": [r"3 processes: choose 1, 2, 4 or 8"],
    "knobs": [
        r"MATRIX_LRR is not a knob; did you mean MATRIX_LR\?",
        r"MODEL_DIM must be divisible by NUM_HEADS",
        r"MATRIX_BITS and EMBED_BITS must lie in 2\.\.8",
    ],
    "folder": [r"cannot write to the run folder .*: Not a directory; set RUN_DIR"],
    "packages": [
        rf"the package {name} is missing: pip install {name}"
        for name in ("brotli", "python-minifier", "zstandard", "sentencepiece")
    ],
    "no data": [
        r"no fineweb_val_\*\.bin in .*: set DATA_PATH, .*make demo",
        r"no fineweb_train_\*\.bin in .*: set DATA_PATH",
        r"caseops_8192\.model has 8192 pieces but VOCAB_SIZE is 4096",
    ],
    "other model": [
        r"01_weights\.pt belongs to another model: .*MLP_MULT=2\.0 there, 3\.0 here",
        r"LOOP_END=1 there, 2 here.*; set the knobs of that run \(its run\.json has them\)$",
    ],
    "other checkpoint": [r"checkpoint\.pt belongs to another model: MLP_MULT=2\.0 there, 3\.0 here; set the knobs"],
    "broken weights": [r"FROM_STAGE=calibrate cannot read .*01_weights\.pt \(\w+\): start from an earlier stage"],
    "broken artifact": [r"cannot use this artifact: "],
    "other state dict": [r"final_model\.pt does not fit the settings: "],
    "no documents": [r"the validation shards hold no document start"],
    "no Hessians": [r"02_hessians\.pt.* not there"],
    "no checkpoint": [r"RESUME=1 needs .*checkpoint\.pt, which is not there"],
    "no artifact": [r"EVAL_ONLY_ARTIFACT needs .*absent\.ptz, which is not there"],
    "no state dict": [r"EVAL_ONLY_CHECKPOINT needs .*absent\.pt, which is not there"],
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_run_that_cannot_work_does_not_start(refused: dict[str, Finished], case: str) -> None:
    end = refused[case]
    assert end.code == 2
    assert [s for s in REFUSALS[case] if not re.search(s, end.output, re.M)] == [], end.output
    assert not SENTENCE.search(end.output), end.output
    assert not re.search(r"warmup|train_loss|val_bpb|Hessians from", end.output), end.output


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_run_writes_nothing_but_a_line_in_an_old_log(
    refused: dict[str, Finished], full: Finished, case: str
) -> None:
    folder = refused[case].folder
    if case in ("other model", "other checkpoint", "broken weights", "no Hessians"):
        old = {"01_weights.pt", "02_hessians.pt", "checkpoint.pt", "run.json"}
        assert {p.name for p in folder.iterdir()} <= old | {"log.txt"}
        assert (folder / "run.json").read_bytes() == (full.folder / "run.json").read_bytes()
        assert (folder / "log.txt").read_text().startswith("cannot start:")
    else:
        assert not folder.exists()


def test_files_of_another_model_are_named_once(refused: dict[str, Finished]) -> None:
    assert refused["other model"].output.count("belongs to another model") == 1


def test_every_process_count_prints_a_refusal_once(refused: dict[str, Finished]) -> None:
    assert refused["three"].codes == [2, 2, 2]
    assert refused["three"].output.count("3 processes: choose") == 1


def test_these_tests_use_every_part_of_the_model() -> None:
    """A part that is switched off here would go untested through pipeline, artifact and ranks."""
    cfg = settings_of(TINY)
    assert cfg.num_loops and cfg.parallel_start_layer and cfg.gated_attn_enabled and cfg.smear_gate_enabled
    assert cfg.skip_gates_enabled and cfg.ttt_k_lora and cfg.ttt_mlp_lora and cfg.ttt_o_lora
    assert cfg.phased_ttt_num_phases > 1


# A group that outlives its destruction leaves threads behind that abort the interpreter now and then while it ends.
GROUP_IS_GONE = """
import sys, weakref, train_gpt, torch.distributed as dist
train_gpt.minify, destroy = (lambda source: source), dist.destroy_process_group
def watched():
    group = weakref.ref(dist.group.WORLD)
    destroy()
    sys.exit(0 if group() is None else 99)
dist.destroy_process_group = watched
train_gpt.main()
"""


def test_nothing_keeps_the_process_group(place: Place) -> None:
    """In new interpreters: the forks of other tests have imported everything beforehand."""
    script = place.root / "watched.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{GROUP_IS_GONE}")
    knobs = dict(ITERATIONS=1, VAL_LOSS_EVERY=0, TTT_ENABLED=0)
    how = dict(script=script, fresh=True, world=2)
    assert run(place.root / "group", place.data, how, **knobs).codes == [0, 0]


def test_a_single_process_needs_no_other_thread_to_talk_to_itself() -> None:
    """There is no process group here. Its threads would make OpenMP threads, with which the cores are overcommitted."""
    alone, value = train_gpt.Run(0, 1, CPU, torch.float32, None), torch.ones(3)
    alone.barrier()
    assert alone.agree(2.0) == [2.0]
    assert alone.sum(value) is alone.same(value) is alone.gather(value)[0] is value
