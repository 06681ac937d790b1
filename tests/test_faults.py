"""What goes wrong around a run: full disks, missing memory, ranks that die, files that have changed, clocks."""

from __future__ import annotations

import ast
import dataclasses
import errno
import itertools
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import stress_kill
import torch
from pipeline_tools import SCRIPT, UNMINIFIED, Finished, make_shards, run, together
from support import ROOT, TOKENIZER, LoneRun, documents, tiny_config, tiny_model, write_dataset, write_shard
from test_legality import score
from test_ttt import validation
from thread_ranks import ThreadRun, on_ranks

import train_gpt
from train_gpt import Run, Stop, write_atomically

SHORT = dict(ITERATIONS=6, CHECKPOINT_EVERY=2, VAL_LOSS_EVERY=0, WARMUP_STEPS=0, TTT_ENABLED=0,
             GPTQ_CALIBRATION_BATCHES=1, DETERMINISTIC=1)  # fmt: skip

# In a process of a run: the fault comes in the fifth step, on one rank of the first attempt.
FAULT = """
import os, signal, sys, torch, train_gpt
train_gpt.minify, step, steps = lambda source: source, train_gpt.train_step, iter(range(10**6))
def faulty(*args):
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if next(steps) == 4 and first and os.environ.get("RANK", "0") == "{rank}":
        {fault}
    return step(*args)
train_gpt.train_step = faulty
sys.exit(train_gpt.main())
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"

# The same, with one rank whose shards lie on a slow file system.
SLOW_READS = """
import os, sys, time, train_gpt
train_gpt.minify, prepare = lambda source: source, train_gpt.TrainLoader._prepare
def slow(loader, span):
    time.sleep(0.4 * (os.environ["RANK"] == "1"))
    return prepare(loader, span)
train_gpt.TrainLoader._prepare, train_gpt.SLOW_DATA_SECONDS = slow, 0.05
sys.exit(train_gpt.main())
"""


class Place(NamedTuple):
    root: Path
    data: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("faults")
    return Place(root, make_shards(root / "data", 0, 4_000, (5, 2, 6)))


@pytest.fixture(scope="module")
def ended(place: Place) -> dict[str, Finished]:
    script = place.root / "train_gpt.py"  # in a folder of its own, beside nothing
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + FAULT.format(rank=1, fault=KILL))
    code = lambda rank, fault: dict(code=FAULT.format(rank=rank, fault=fault))
    restarted = dict(world=2, torchrun=True, restarts=1, script=script)
    return together({
        "restarted": lambda: run(place.root / "restarted", place.data, restarted, **SHORT),
        "two": lambda: run(place.root / "two", place.data, UNMINIFIED | {"world": 2}, **SHORT),
        "killed": lambda: run(place.root / "killed", place.data, code(1, KILL) | {"world": 2}, **SHORT),
        "raised": lambda: run(place.root / "raised", place.data, code(1, "raise KeyError('a fault')") | {"world": 2},
                              **SHORT),
        "slow": lambda: run(place.root / "slow", place.data, dict(code=SLOW_READS, world=2), **SHORT),
    })  # fmt: skip


# ---- kills -----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_killed_runs_end_in_the_number_of_an_undisturbed_run(tmp_path: Path) -> None:
    """One of the fifty of `make stress`."""
    assert sum(stress_kill.stress(tmp_path, 1, seed=4).values()) >= 1


def test_the_stress_test_sees_a_number_that_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter([(1.0, b"a"), (1.0, b"b")])
    monkeypatch.setattr(stress_kill, "make_shards", lambda *_: tmp_path)
    monkeypatch.setattr(stress_kill, "Launch", lambda *_, **__: Nothing())
    monkeypatch.setattr(stress_kill, "final", lambda end: next(numbers))
    monkeypatch.setattr(stress_kill, "disturb", lambda *_: (["anew"], None))
    with pytest.raises(AssertionError, match="run 0 of seed 0, gone on"):
        stress_kill.stress(tmp_path, 1, 0)


class Nothing:
    """Stands in for a run."""

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def finish(self) -> Finished:
        return Finished([0], "", Path())


def test_what_a_killed_process_left_is_removed_and_never_read(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint.pt.4711").write_bytes(b"half a checkpoint")
    (tmp_path / ".log.txt.4711").write_bytes(b"another file's")
    write_atomically(tmp_path / "checkpoint.pt", lambda f: f.write(b"whole"))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        "checkpoint.pt": b"whole", ".log.txt.4711": b"another file's"}  # fmt: skip


# ---- ranks that die --------------------------------------------------------------------------------------------------
def test_a_rank_that_is_killed_takes_the_others_down(ended: dict[str, Finished]) -> None:
    codes, output = ended["killed"].codes, ended["killed"].output
    assert codes == [1, -signal.SIGKILL], output
    assert re.search(r"^rank 0: \w+ in train: .*[Cc]onnection", output, re.M), output
    assert not (ended["killed"].folder / "01_weights.pt").exists()


def test_a_rank_that_fails_is_named_by_the_others(ended: dict[str, Finished]) -> None:
    codes, output = ended["raised"].codes, ended["raised"].output
    assert codes == [1, 1], output
    assert re.search(r"^rank 1: KeyError in train: 'a fault'$", output, re.M), output
    assert re.search(r"^rank 0: .*; the first to fail was rank 1: KeyError in train: 'a fault'$", output, re.M), output


def test_torchrun_starts_a_killed_job_again_from_its_checkpoint(ended: dict[str, Finished]) -> None:
    """With the weights, the artifact and the score that nothing disturbed."""
    again, two = ended["restarted"].ok(), ended["two"].ok()
    assert "attempt 2 of this job: from its checkpoint" in again.output
    assert re.search(r"resuming from .*checkpoint\.pt at step 4 ", again.output)
    ours, theirs = (torch.load(r.folder / "01_weights.pt", weights_only=True)["model"] for r in (again, two))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert again.artifact == two.artifact
    assert again.result["bpb_quantized"] == two.result["bpb_quantized"]


@pytest.mark.parametrize(
    ("attempt", "job", "resumes"), [("0", "mine", False), ("1", "mine", True), ("1", "other", False), ("2", "", False)]
)
def test_a_restart_takes_no_checkpoint_of_another_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt: str, job: str, resumes: bool
) -> None:
    torch.save({"job": "mine"}, tmp_path / "checkpoint.pt")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    cfg = tiny_config(run_dir=str(tmp_path))
    assert train_gpt.after_restart(cfg, LoneRun(tmp_path)).resume is resumes


def test_a_new_run_puts_the_checkpoint_of_an_earlier_one_aside(tmp_path: Path, dataset: Path) -> None:
    """A restart, or a remedy that is told, would else take it for its own."""
    (tmp_path / "checkpoint.pt").write_bytes(b"of another run")
    cfg = tiny_config(data_path=dataset, iterations=1, warmup_steps=0, val_loss_every=0)
    train_gpt.train_stage(cfg, LoneRun(tmp_path), validation(documents((9, 20, 3))), {})
    assert not (tmp_path / "checkpoint.pt").exists()
    assert (tmp_path / "checkpoint_before.pt").read_bytes() == b"of another run"


def test_a_resumed_run_does_not_save_its_checkpoint_again(tmp_path: Path, dataset: Path) -> None:
    class Saving(LoneRun):
        def save(self, name: str, *args: Any) -> None:
            saved.append(name)
            super().save(name, *args)

    cfg = tiny_config(data_path=dataset, iterations=3, checkpoint_every=2, warmup_steps=0, val_loss_every=0)
    for resume, files in ((False, ["checkpoint.pt", "01_weights.pt"]), (True, ["01_weights.pt"])):
        saved: list[str] = []
        result: dict[str, Any] = {}
        again = dataclasses.replace(cfg, resume=resume, run_dir=str(tmp_path))
        train_gpt.train_stage(again, Saving(tmp_path), validation(documents((9, 20, 3))), result)
        assert saved == files and result["steps"] == 3


def test_a_signal_after_the_last_step_leaves_the_weights(tmp_path: Path, dataset: Path) -> None:
    """It comes while the raw weights are scored: training would be lost, or the request forgotten."""

    class Signalled(LoneRun):
        def log(self, text: str, console: bool = True) -> None:
            if text.startswith("1/1 val_loss"):
                train_gpt.on_signal(self, signal.SIGTERM)

    cfg, run = tiny_config(data_path=dataset, iterations=1, warmup_steps=0, val_loss_every=0), Signalled(tmp_path)
    with pytest.raises(train_gpt.Interrupted) as stop:
        train_gpt.train_stage(cfg, run, validation(documents((9, 20, 3))), {})
    assert stop.value.args == (signal.SIGTERM,)
    assert train_gpt.restored_model(cfg, run, result := {}) and result["steps"] == 1


def test_nan_on_one_rank_stops_all_with_its_name() -> None:
    """Found in the weights of one rank alone: the others must not go on into a collective that it never reaches."""

    def save(run: ThreadRun) -> str:
        model = tiny_model()
        if run.rank == 1:
            model.qo_bank.data[0, 0, 0] = torch.nan
        run.folder = Path("absent")
        with pytest.raises(Stop) as stop:
            train_gpt.require_finite_weights(model, 7, run)
        return stop.value.sentence

    said = on_ranks(2, save)
    assert said[0] == said[1]
    assert said[0].startswith("a weight is not finite (on rank 1) at step 7: ")


def test_nan_after_test_time_training_is_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one chunk of one document."""
    inner, calls = train_gpt.TestTimeScorer.score_chunk, itertools.count()

    def nan_once(*args: Any) -> torch.Tensor:
        losses = inner(*args)
        return losses * torch.nan if next(calls) == 4 else losses

    monkeypatch.setattr(train_gpt.TestTimeScorer, "score_chunk", nan_once)
    with pytest.raises(Stop) as stop:
        score(documents((9, 14, 5)))
    assert stop.value.sentence.startswith("the loss is nan after test-time training: lower TTT_LORA_LR")


# ---- memory ----------------------------------------------------------------------------------------------------------
def lack(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total of 79.11 GiB.")


class Recording:
    """In the place of torch.cuda.graph: a recording in which something failed cannot be ended either."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nMore about it")


def record(cfg: Any, run: Run, model: train_gpt.GPT) -> None:
    """The second micro-batch of a graph, where memory is short once the first has come and gone."""
    loader, work = train_gpt.TrainLoader(cfg, run), train_gpt.GraphedMicroBatch(model)
    with run.stage("train"):
        work(next(loader.next_step()))
        model.forward = lack
        work(next(loader.next_step()))


def quantize(cfg: Any, run: Run, model: train_gpt.GPT) -> None:
    hessians = train_gpt.calibrate_stage(cfg, run, model, {})
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train_gpt, "inverse_factor", lack)
        train_gpt.quantize_stage(cfg, run, model, hessians, {})


def exhausted(model: train_gpt.GPT) -> train_gpt.GPT:
    model.forward = lack
    return model


def train(cfg: Any, run: Run, model: train_gpt.GPT) -> None:
    with run.stage("train"):
        train_gpt.train(cfg, run, exhausted(model), TEXT)


def evaluate_float(cfg: Any, run: Run, model: train_gpt.GPT) -> None:
    train_gpt.score_float(cfg, run, exhausted(model), TEXT, {})


def evaluate(cfg: Any, run: Run, model: train_gpt.GPT) -> None:
    train_gpt.score_stages(run, exhausted(model), TEXT, {}, "evaluate")


def adapt(cfg: Any, run: Run, model: train_gpt.GPT) -> None:
    train_gpt.score_stages(run, exhausted(model), TEXT, {}, "ttt")


def calibrate(cfg: Any, run: Run, model: train_gpt.GPT) -> None:
    train_gpt.calibrate_stage(cfg, run, exhausted(model), {})


TEXT = validation(documents((9, 14, 5)))
WITHOUT_MEMORY: dict[str, tuple[Callable[..., Any], str, str]] = {  # what runs, the stage it names and the knob
    "before all stages": (lack, "preparation", "what else runs on this GPU"),
    "training": (train, "train", "CUDA_GRAPHS to 0, or TRAIN_BATCH_TOKENS"),
    "recording a graph": (record, "train", "CUDA_GRAPHS to 0, or TRAIN_BATCH_TOKENS"),
    "float evaluation": (evaluate_float, "evaluate float", "VAL_BATCH_TOKENS"),
    "calibration": (calibrate, "calibrate", "TRAIN_BATCH_TOKENS"),
    "quantization": (quantize, "quantize", "what else runs on this GPU"),
    "evaluation": (evaluate, "evaluate", "VAL_BATCH_TOKENS"),
    "test-time training": (adapt, "ttt", "TTT_BATCH_SIZE, or GLOBAL_TTT_BATCH_SEQS"),
}


def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, pipeline: Callable[..., Any]) -> str:
    """What a rank says whose pipeline is this one; it has to fail."""
    monkeypatch.setattr(train_gpt, "start_run", lambda cfg: LoneRun(Path(cfg.run_dir)))
    monkeypatch.setattr(train_gpt, "pipeline", pipeline)
    cfg = tiny_config(run_dir=str(Path.cwd()), data_path=str(Path.cwd() / "shards"))
    assert train_gpt.play(cfg, first=True) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("what", WITHOUT_MEMORY)
def test_a_lack_of_memory_names_the_knob(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """In the code of every stage, on the CPU."""
    work, stage, knob = WITHOUT_MEMORY[what]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    said = told(capsys, monkeypatch, lambda cfg, run: work(cfg, run, tiny_model()))
    assert said.startswith(f"rank 0: out of memory in stage {stage}: lower {knob}")
    assert said.endswith("(CUDA out of memory)\n") and said.count("\n") == 1


@pytest.mark.parametrize("error", ["Triton Error [CUDA]: out of memory", "CUDA error: out of memory\nMore about it"])
def test_a_lack_of_memory_has_several_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: str
) -> None:
    def pipeline(cfg: Any, run: Run) -> None:
        with run.stage("ttt"):
            raise RuntimeError(error)

    monkeypatch.chdir(tmp_path)
    said = told(capsys, monkeypatch, pipeline)
    assert said.startswith("rank 0: out of memory in stage ttt: lower TTT_BATCH_SIZE")
    assert said.endswith(f"({error.splitlines()[0]})\n")


def test_a_file_is_not_blamed_for_a_lack_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fuzz_artifact import small_artifact

    cfg = tiny_config(tokenizer_path=str(TOKENIZER), eval_only_checkpoint=str(tmp_path / "weights.pt"))
    monkeypatch.setattr(torch, "load", lack)
    monkeypatch.setattr(train_gpt, "new_model", lack)
    for load in (
        lambda: train_gpt.load_stage_file(cfg, LoneRun(tmp_path), "01_weights.pt", "FROM_STAGE=calibrate"),
        lambda: train_gpt.checkpoint_model(cfg, LoneRun(tmp_path)),
        lambda: train_gpt.model_from_artifact(cfg, LoneRun(), small_artifact()),
    ):
        with pytest.raises(torch.OutOfMemoryError):
            load()


def test_other_errors_are_not_called_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def pipeline(cfg: Any, run: Run) -> None:
        with run.stage("ttt"), Recording():
            raise KeyError("a fault")

    monkeypatch.setattr(train_gpt, "start_run", lambda cfg: LoneRun())
    monkeypatch.setattr(train_gpt, "pipeline", pipeline)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        train_gpt.play(tiny_config(), first=True)


def test_every_stage_that_fills_memory_has_a_knob_that_exists() -> None:
    source = (ROOT / "train_gpt.py").read_text()
    stages = {name.split()[0] for name in re.findall(r'run\.stage\("([\w ]+)"\)', source)}
    assert set(train_gpt.MEMORY_KNOBS) == stages - {"quantize", "pack"}  # those have none
    knobs = re.findall(r"[A-Z_]{5,}", " ".join(train_gpt.MEMORY_KNOBS.values()))
    assert len(knobs) >= 5 and all(hasattr(train_gpt.Config(), k.lower()) for k in knobs)


# ---- disks -----------------------------------------------------------------------------------------------------------
def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_full_disk_stops_every_rank_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"the last one")
    if where != "write":
        monkeypatch.setattr(os, where, full)

    def save(run: ThreadRun) -> str:
        run.folder = tmp_path
        with pytest.raises(Stop) as stop:
            run.save("checkpoint.pt", full if where == "write" else lambda f: f.write(b"the next one"))
        return stop.value.sentence

    said = on_ranks(2, save)
    assert said[0] == said[1] and "No space left on device; what was finished before is kept there" in said[0]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"checkpoint.pt": b"the last one"}


def read_only(*_: Any, **__: Any) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize("there", [False, True])
def test_a_read_only_folder_stops_every_rank_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """The folder of runs, or one that is there but takes no file. Whoever runs tests as root may write anywhere."""
    monkeypatch.setattr(train_gpt, "open", read_only, raising=False)
    if not there:
        monkeypatch.setattr(Path, "mkdir", read_only)

    def start(run: ThreadRun) -> tuple[str, Any]:
        run.folder = tmp_path
        with pytest.raises(Stop) as stop:
            train_gpt.open_folder(run)
        return stop.value.sentence, stop.value.code

    sentence = f"cannot write to the run folder {tmp_path}: Read-only file system; set RUN_DIR to a writable one"
    assert on_ranks(2, start) == 2 * [(sentence, 2)]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_becomes_read_only_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"the last one")
    monkeypatch.setattr(train_gpt, "open", read_only, raising=False)
    with pytest.raises(Stop) as stop:
        LoneRun(tmp_path).save("checkpoint.pt", lambda f: f.write(b"the next one"))
    assert "Read-only file system; what was finished before is kept there" in stop.value.sentence
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"checkpoint.pt": b"the last one"}


def test_a_log_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lone = LoneRun(tmp_path / "gone")
    for i in range(3):
        lone.log(f"line {i}")
        lone.metric("train", step=i)
    said = capsys.readouterr().out.splitlines()
    assert said[0::2] == ["line 0", "line 1"] or said.count("line 2") == 1
    assert sum("cannot be written" in line for line in said) == 1


# ---- files that are not what they were -------------------------------------------------------------------------------
@pytest.fixture
def described(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Tiny shards with the manifest.json that preparation writes beside them."""
    folder = write_dataset(tmp_path / "shards", n_train=2)
    rows = [{"name": p.name, "bytes": p.stat().st_size, "sha256": train_gpt.file_sha256(p)}
            for p in sorted(folder.glob("*.bin"))]  # fmt: skip
    manifest = {"files": rows, "tokenizer": {"sha256": train_gpt.file_sha256(TOKENIZER)}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder, manifest


def manifest_problems(folder: Path, **changes: Any) -> list[str]:
    cfg = tiny_config(data_path=str(folder), tokenizer_path=str(TOKENIZER), **changes)
    return list(train_gpt.manifest_problems(cfg))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a validation token": (lambda f: flip(f / "fineweb_val_000000.bin"), "is not the file that manifest.json names"),
    "a byte count": (lambda f: flip(f / "fineweb_val_bytes_000000.bin"), "is not the file that manifest.json names"),
    "a shorter training shard": (lambda f: write_shard(f / "fineweb_train_000001.bin", [1, 5]), "(size or sha256)"),
    "one validation shard more": (lambda f: write_shard(f / "fineweb_val_000001.bin", [1, 5]), "does not name"),
    "no sidecar": (lambda f: (f / "fineweb_val_bytes_000000.bin").unlink(), "val_bytes_000000.bin, which is not there"),
    "half a manifest": (lambda f: (f / "manifest.json").write_text('{"files": 5'), "cannot be read (JSONDecodeError)"),
    "manifest of another shape": (lambda f: (f / "manifest.json").write_text('{"files": [1]}'), "cannot be read"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_shards_that_are_not_those_of_the_manifest_are_refused(described: tuple[Path, Any], what: str) -> None:
    folder, _ = described
    assert manifest_problems(folder) == []
    plant, sentence = CHANGES[what]
    plant(folder)
    problems = manifest_problems(folder)
    assert len(problems) == 1 and sentence in problems[0]


def test_another_tokenizer_is_refused(described: tuple[Path, dict[str, Any]]) -> None:
    folder, manifest = described
    manifest["tokenizer"]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert ["is not the tokenizer of the shards" in p for p in manifest_problems(folder)] == [True]


def test_shards_without_a_manifest_of_ours_are_accepted(dataset: Path) -> None:
    """The public ones come without, or with one that lists other things."""
    assert manifest_problems(dataset) == []
    (dataset / "manifest.json").write_text(json.dumps({"datasets": [], "tokenizers": []}))
    assert manifest_problems(dataset) == []


def test_stage_files_and_artifacts_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    from fuzz_artifact import sealed, small_artifact

    ours = tiny_config(tokenizer_path=str(TOKENIZER))
    other = tmp_path / "other.model"
    other.write_bytes(TOKENIZER.read_bytes() + b"\0")
    theirs = tiny_config(tokenizer_path=str(other))
    torch.save({"fingerprint": train_gpt.shape_fingerprint(ours)}, tmp_path / "01_weights.pt")
    load = lambda cfg: train_gpt.load_stage_file(cfg, LoneRun(tmp_path), "01_weights.pt", "FROM_STAGE=calibrate")
    assert load(ours)
    with pytest.raises(Stop) as stop:
        load(theirs)
    assert "belongs to another model: TOKENIZER=" in stop.value.sentence
    header, payload = train_gpt.read_header(small_artifact())
    blob = sealed(header | {"tokenizer": train_gpt.tokenizer_fingerprint(ours)}, payload)
    train_gpt.model_from_artifact(ours, LoneRun(), blob)
    with pytest.raises(Stop) as stop:
        train_gpt.model_from_artifact(theirs, LoneRun(), blob)
    assert "of another tokenizer" in stop.value.sentence


def test_a_run_does_not_go_on_with_other_shards(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "shards")
    cfg = tiny_config(data_path=str(data))
    state = {"fingerprint": train_gpt.shape_fingerprint(cfg), "shards": train_gpt.train_fingerprint(cfg)}
    torch.save(state, tmp_path / "checkpoint.pt")
    (data / "fineweb_train_000002.bin").unlink()
    with pytest.raises(Stop) as stop:
        train_gpt.load_checkpoint(cfg, LoneRun(tmp_path), *[None] * 3)
    assert "was trained on other shards" in stop.value.sentence


# ---- slow and damaged training text ----------------------------------------------------------------------------------
class SlowDisk(np.ndarray):
    """A shard of which every piece that is read takes a while."""

    def __getitem__(self, key: Any) -> Any:
        time.sleep(0.03)
        return super().__getitem__(key)


def stream(cfg: Any, n: int, rank: int = 0, world: int = 1) -> list[list[list[int]]]:
    """The inputs of n steps, read one after another without a pause."""
    loader = train_gpt.TrainLoader(cfg, LoneRun(rank=rank, world=world))
    try:
        return [[inputs.tolist() for inputs, *_ in loader.next_step()] for _ in range(n)]
    finally:
        loader.close()


def test_a_slow_shard_gives_the_same_batches_and_few_lines(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, read = tiny_config(data_path=dataset), train_gpt.read_shard
    fast = stream(cfg, 12)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(train_gpt, "SLOW_DATA_SECONDS", 0.05)
    monkeypatch.setattr(train_gpt, "read_shard", lambda path: read(path).view(SlowDisk))
    assert stream(cfg, 12) == fast
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 6, "after 0.05, 0.1, 0.2 s and so on, of 12 steps with 0.03 s each"
    assert lines[0].startswith(f"waited 0 s for training data so far, now for {dataset}/fineweb_train_0")


def test_a_read_that_hangs_is_said_while_it_does(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the rank that hangs, with its number: the log is that of another one, which waits for it without knowing."""
    go_on, said, inner = threading.Event(), [], train_gpt.TrainLoader._prepare
    monkeypatch.setattr(train_gpt.TrainLoader, "_prepare", lambda *args: go_on.wait(60) and inner(*args))
    monkeypatch.setattr(train_gpt, "SLOW_DATA_SECONDS", 0.02)
    with ThreadPoolExecutor(1) as pool:
        batches = pool.submit(stream, tiny_config(data_path=dataset), 1, 1, 2)
        while len(said) < 2:
            said += capsys.readouterr().err.splitlines()
            time.sleep(0.01)
        assert not batches.done()
        go_on.set()
        assert len(batches.result()[0]) == train_gpt.MICRO_STEPS // 2
    assert all(line.startswith("rank 1: waited 0 s for training data so far, now for ") for line in said)


def test_a_rank_with_slow_shards_ends_in_the_same_number(ended: dict[str, Finished]) -> None:
    slow, two = ended["slow"].ok(), ended["two"].ok()
    assert "rank 1: waited 0 s for training data" in slow.output and "waited 0 s" not in slow.log
    assert slow.losses == two.losses
    assert slow.artifact == two.artifact
    assert slow.result["bpb_quantized"] == two.result["bpb_quantized"]


@pytest.mark.parametrize("world", [1, 2])
def test_a_training_token_that_cannot_be_stops_every_rank_at_one_step(dataset: Path, world: int) -> None:
    """In the fifth micro-batch of the fourth step, which only one of two ranks trains on."""
    cfg, path = tiny_config(data_path=dataset), dataset / "fineweb_train_000001.bin"
    tokens = np.array(train_gpt.read_shard(path))
    tokens[4 * (cfg.micro_batch_tokens + 1) + 3] = 40_000
    write_shard(path, tokens)
    for rank in range(world):
        stream(cfg, 3, rank, world)
        with pytest.raises(Stop) as stop:
            stream(cfg, 4, rank, world)
        assert stop.value.sentence == f"{path} holds token 40000, outside VOCAB_SIZE=128: it is damaged, copy it again"


# ---- clocks ----------------------------------------------------------------------------------------------------------
def test_no_duration_comes_from_a_clock_that_can_be_set() -> None:
    tree = ast.parse(SCRIPT.read_text())
    used = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    used = {name for name in used if name.startswith("time.")}
    assert used == {"time.monotonic", "time.strftime"}  # the latter names folders


def test_training_time_goes_on_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", iter(range(10**6, 0, -3600)).__next__)
    watch = train_gpt.Stopwatch(5.0)
    seconds = [watch.seconds() for _ in range(3)]
    with watch.paused(LoneRun()):
        pass
    seconds.append(watch.seconds())
    assert seconds == sorted(seconds) and seconds[0] >= 5.0


def test_the_time_left_after_a_resume_counts_what_ran_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines, run = [1000.0], [], LoneRun()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(run, "log", lambda line, **_: lines.append(line))
    model = tiny_model(iterations=40, max_wallclock_seconds=0.0, train_log_every=0)
    log = train_gpt.TrainLog(model, run, train_gpt.Stopwatch(300.0))  # 30 steps of 10 s before
    clock[0] += 30
    log.add(train_gpt.Progress(step=33, seconds=330.0), torch.tensor(2.0), 1.0)
    assert lines == ["  training: 82% eta 70s"]
