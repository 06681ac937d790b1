"""Paired runs with a stand-in for train_gpt.py, whose scores are known; that the real one is driven alike ends it."""

from __future__ import annotations

import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ROOT, TOKENIZER

import ablate
import train_gpt

# Its loss is a formula of its knobs; DIE makes it end as a failing run does, HANG as one that is killed, MEET waits for
# as many runs to be there at once, SLEEP for nothing.
STAND_IN = """
import json, os, sys, time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

class ConfigError(ValueError):
    pass

@dataclass
class Config:
    seed: int = 0
    run_dir: str = ""
    max_wallclock_seconds: float = 0.0
    muon_wd: float = 1.0
    ttt_lora_lr: float = 1.0
    die: int = 0
    hang: int = 0
    meet: int = 0
    sleep: int = 0
    scale_bits: int = 4
    ttt_enabled: int = 1
    from_stage: str = ""
    data_path: str = ""
    hotstart_fp_ckpt: str = ""
    eval_only_artifact: str = ""

def data_problems(config, needs_training_data):
    return ["no shards there"] if config.data_path == "nowhere" else []

def load_config(env):
    try:
        return Config(**{f.name: type(f.default)(env[f.name.upper()]) for f in fields(Config) if f.name.upper() in env})
    except ValueError as e:
        raise ConfigError(str(e)) from None

if __name__ == "__main__":
    c = load_config(os.environ)
    folder = Path(c.run_dir)
    with open(folder.parents[1] / "ran.txt", "a") as f:
        print(f"{folder.parent.name} {c.seed} {c.eval_only_artifact}{c.from_stage}", file=f)
    (folder / "gpus.txt").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
    (folder / "threads.txt").write_text(os.environ.get("OMP_NUM_THREADS", "none"))
    if c.eval_only_artifact and c.hotstart_fp_ckpt:
        sys.exit("an artifact and a checkpoint")
    began = time.monotonic()
    while len(list(folder.parents[1].glob("*/*/gpus.txt"))) < c.meet:
        time.sleep(0.01)
        if time.monotonic() - began > 30:
            sys.exit("the others did not come")
    time.sleep(c.sleep)
    if c.die:
        print("some line")
        sys.exit("it died, as asked")
    if c.hang:
        os.kill(os.getpid(), 9)
    scored = c.eval_only_artifact
    weights = folder / "01_weights.pt"
    if scored:
        artifact = float(Path(scored).read_text())
    else:
        trained = 2 + c.seed / 100 + c.muon_wd * (1 + c.seed / 1000)
        if not c.from_stage and not c.hotstart_fp_ckpt:
            weights.write_text(str(trained))
        artifact = (float(weights.read_text()) if c.from_stage else trained) + (4 - c.scale_bits) / 100
    result = dict(bpb_quantized=artifact)
    if c.ttt_enabled:
        result.update(bpb_ttt=artifact - c.ttt_lora_lr / 10, ttt_seconds=1.5)
    if not scored:
        (folder / "final_model.int6.ptz").write_text(str(artifact))
        result.update(total_bytes=1000 * int(c.muon_wd), train_seconds=2.0)
    if not scored and not c.from_stage:
        result.update(bpb_float=artifact - 0.01)
    (folder / "run.json").write_text(json.dumps(dict(result=result)))
    sys.exit(3)
"""

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ablate.py on the stand-in; knobs are the environment's. Returns the exit code."""
    program = tmp_path / "train_gpt.py"
    program.write_text(STAND_IN)
    monkeypatch.setattr(ablate, "PROGRAM", program)
    monkeypatch.setattr(ablate.signal, "signal", lambda *_: None)
    for name in [k for k in os.environ if k.lower() in {f.name for f in train_gpt.fields(train_gpt.Config)}]:
        monkeypatch.delenv(name)

    def call(*settings: str, **env: object) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["ablate.py", *settings])
            for name, value in {"OUT": tmp_path / "out", "SEEDS": "1 2", **env}.items():
                patch.setenv(name, str(value))
            return ablate.main()

    return call


def ran(tmp_path: Path) -> list[str]:
    """What has been started since the last call."""
    path = tmp_path / "out" / "ran.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [" ".join(line.split()[:2]) for line in lines]


def cells(tmp_path: Path) -> dict[str, dict[str, str]]:
    rows = [[c.strip() for c in line.strip("| \n").split("|")]
            for line in (tmp_path / "out" / "table.md").read_text().splitlines() if line.startswith("|")]  # fmt: skip
    return {r[0].strip("`"): dict(zip(rows[0][1:], r[1:], strict=True)) for r in rows[2:]}


def test_differences_are_paired_by_seed(run: Run, tmp_path: Path) -> None:
    assert run("MUON_WD=3 MUON_WD=3,TTT_LORA_LR=2") == 0
    table = cells(tmp_path)
    pairs = [2 * 1.001, 2 * 1.002]  # the seeds' own offsets, ten times that spread, are gone
    assert table["MUON_WD=3"]["float bpb"] == f"+{statistics.mean(pairs):.5f} +- {statistics.stdev(pairs):.5f}"
    assert table["MUON_WD=3"]["bpb after TTT"] == table["MUON_WD=3"]["float bpb"]
    assert table["MUON_WD=3"]["bytes"] == "+2,000 +- 0"
    assert table["MUON_WD=3"]["training s"] == "same"
    assert table["MUON_WD=3,TTT_LORA_LR=2"]["bpb after TTT"] == f"+{statistics.mean(pairs) - 0.1:.5f} +- 0.00141"
    assert table["baseline"]["quantized bpb"].startswith("3.016")
    assert table["baseline"]["seeds"] == "2"


def test_what_only_scoring_reads_is_scored_on_the_baselines_artifact(run: Run, tmp_path: Path) -> None:
    assert run("TTT_LORA_LR=3", SEEDS=7) == 0
    lines = (tmp_path / "out" / "ran.txt").read_text().splitlines()
    assert lines[1] == f"TTT_LORA_LR=3 7 {tmp_path / 'out' / 'baseline' / 'seed7' / 'final_model.int6.ptz'}"
    row = cells(tmp_path)["TTT_LORA_LR=3"]
    assert (row["float bpb"], row["quantized bpb"], row["bpb after TTT"], row["bytes"]) == (
        "same", "same", "-0.20000", "same")  # fmt: skip
    assert run("MUON_WD=2,TTT_LORA_LR=3", SEEDS=7) == 0
    assert (tmp_path / "out" / "ran.txt").read_text().splitlines()[2] == "MUON_WD=2,TTT_LORA_LR=3 7 "


def test_what_quantization_reads_starts_from_the_baselines_weights(run: Run, tmp_path: Path) -> None:
    assert run("SCALE_BITS=6,TTT_LORA_LR=3 SCALE_BITS=6,MUON_WD=3 MUON_WD=2", SEEDS=7) == 0
    lines = (tmp_path / "out" / "ran.txt").read_text().splitlines()
    assert lines[:3] == ["baseline 7 ", "SCALE_BITS=6,MUON_WD=3 7 ", "MUON_WD=2 7 "]
    assert lines[3:] == ["SCALE_BITS=6,TTT_LORA_LR=3 7 calibrate"]
    row = cells(tmp_path)["SCALE_BITS=6,TTT_LORA_LR=3"]
    assert (row["float bpb"], row["quantized bpb"], row["bpb after TTT"]) == ("same", "-0.02000", "-0.22000")
    weights = [
        tmp_path / "out" / n / "seed7" / "01_weights.pt"
        for n in ("baseline", "SCALE_BITS=6,TTT_LORA_LR=3", "MUON_WD=2")
    ]
    assert weights[1].samefile(weights[0]) and not weights[2].samefile(weights[0])


@pytest.mark.parametrize("setting", ["TTT_ENABLED=0", "SCALE_BITS=6,TTT_ENABLED=0", "MUON_WD=1,TTT_ENABLED=0"])
def test_what_a_setting_does_not_measure_is_not_the_baselines(run: Run, tmp_path: Path, setting: str) -> None:
    assert run(setting, SEEDS=7) == 0
    row = cells(tmp_path)[setting]
    assert (row["float bpb"], row["bpb after TTT"], row["TTT s"]) == ("same", "-", "-")


def test_a_run_from_another_baseline_is_another_run(run: Run, tmp_path: Path) -> None:
    settings = "TTT_LORA_LR=2 SCALE_BITS=6 MUON_WD=2"
    assert run(settings, SEEDS=7) == 0
    ran(tmp_path)
    folder = tmp_path / "out" / "baseline" / "seed7"
    (folder / "run.json").unlink()
    assert run(settings, SEEDS=7) == 0
    assert ran(tmp_path) == ["baseline 7"], "the same weights and the same artifact, as the stand-in makes them"
    for name in ("01_weights.pt", "final_model.int6.ptz"):  # as a GPU may make them
        (folder / name).write_text("3.5")
    assert run(settings, SEEDS=7) == 0
    assert ran(tmp_path) == ["TTT_LORA_LR=2 7", "SCALE_BITS=6 7"]


def test_scoring_an_artifact_forgets_the_checkpoint_of_the_baseline(run: Run, tmp_path: Path) -> None:
    assert run("TTT_LORA_LR=2 SCALE_BITS=6", SEEDS=7, HOTSTART_FP_CKPT="weights.pt") == 0
    lines = (tmp_path / "out" / "ran.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["baseline", "TTT_LORA_LR=2", "SCALE_BITS=6"]
    assert lines[2].endswith("SCALE_BITS=6 7 "), (
        "quantized from the checkpoint again: such a baseline leaves no weights"
    )


def test_threads_are_shared_by_what_runs_at_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate.os, "cpu_count", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run("MUON_WD=2", SEEDS=7, GPUS="0 1 2") == 0
    assert (tmp_path / "out" / "MUON_WD=2" / "seed7" / "threads.txt").read_text() == "4"
    ran(tmp_path)
    assert run("MUON_WD=2", SEEDS=7, OMP_NUM_THREADS=2) == 0
    assert ran(tmp_path) == ["baseline 7", "MUON_WD=2 7"], "another number of threads is another run"


def test_runs_go_on_side_by_side_each_on_its_gpus(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every run waits until four are there; what starts from a baseline waits for that."""
    assert run("MUON_WD=2 TTT_LORA_LR=2", SEEDS="1 2", GPUS="0 0 3 5", MEET=4) == 0
    gpus = sorted(path.read_text() for path in (tmp_path / "out").glob("*/*/gpus.txt"))
    assert len(gpus) == 6 and set(gpus) == {"0", "3", "5"} and gpus.count("0") >= 2
    assert cells(tmp_path)["TTT_LORA_LR=2"]["bpb after TTT"] == "-0.10000 +- 0.00000"
    out = capsys.readouterr().out
    assert sorted(line[:5] for line in out.splitlines() if line.startswith("[")) == [f"[{i}/6]" for i in range(1, 7)]


def test_an_interruption_ends_what_is_running(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        while len(list(tmp_path.glob("out/*/*/gpus.txt"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    began = time.monotonic()
    assert run("MUON_WD=2 MUON_WD=3", GPUS="0 1", SLEEP=60) == 130
    assert time.monotonic() - began < 50, "they were told to end"
    assert "interrupted" in capsys.readouterr().out
    assert ran(tmp_path) in (["baseline 1", "MUON_WD=2 1"], ["MUON_WD=2 1", "baseline 1"])


def test_a_failing_setting_is_reported_and_the_others_go_on(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("DIE=1 MUON_WD=2") == 1
    assert "DIE=1 seed 1: FAILED with code 1: it died, as asked" in capsys.readouterr().out
    table = cells(tmp_path)
    assert table["DIE=1"]["seeds"] == "0"
    assert table["DIE=1"]["float bpb"] == "-"
    assert table["MUON_WD=2"]["seeds"] == "2"
    assert run("TTT_LORA_LR=2", DIE=1) == 1
    assert "skipped: the baseline has no result" in capsys.readouterr().out


def test_what_is_finished_stays(run: Run, tmp_path: Path) -> None:
    every = ["baseline 1", "MUON_WD=2 1", "baseline 2", "MUON_WD=2 2"]
    assert run("MUON_WD=2") == 0
    assert ran(tmp_path) == every
    assert run("MUON_WD=2 TTT_LORA_LR=2", SEEDS="1 2") == 0
    assert ran(tmp_path) == ["TTT_LORA_LR=2 1", "TTT_LORA_LR=2 2"]
    before = cells(tmp_path)
    assert run("MUON_WD=2", SEEDS="2 1 3", IGNORED_BY_ALL="x") == 0
    assert ran(tmp_path) == ["baseline 3", "MUON_WD=2 3"]
    assert run("MUON_WD=2 TTT_LORA_LR=2") == 0
    assert ran(tmp_path) == []
    assert cells(tmp_path) == before
    assert run("MUON_WD=2", TTT_LORA_LR=5) == 0
    assert ran(tmp_path) == every, "another baseline is another run"
    ablate.PROGRAM.write_text(STAND_IN + "# changed\n")
    assert run("MUON_WD=2", TTT_LORA_LR=5) == 0
    assert ran(tmp_path) == every, "so is another program"


def test_a_result_of_other_settings_is_kept(run: Run, tmp_path: Path) -> None:
    for decay in (1, 2):
        assert run("TTT_LORA_LR=2", SEEDS=1, MUON_WD=decay) == 0
    kept = [json.loads(path.read_text())["result"] for path in tmp_path.glob("out/baseline/seed1*/run.json")]
    assert sorted(result["total_bytes"] for result in kept) == [1000, 2000]
    before = sorted(tmp_path.glob("out/*/*"))
    assert run("MUON_WD=3", DATA_PATH="nowhere") == 2
    assert sorted(tmp_path.glob("out/*/*")) == before


def test_what_was_interrupted_starts_anew(run: Run, tmp_path: Path) -> None:
    assert run("MUON_WD=2", SEEDS=1, HANG=0) == 0
    ran(tmp_path)
    folder = tmp_path / "out" / "MUON_WD=2" / "seed1"
    (folder / "run.json").write_text('{"result": {"bpb')  # killed as it wrote
    (folder / "checkpoint.pt").touch()
    assert run("MUON_WD=2", SEEDS=1, HANG=0) == 0
    assert ran(tmp_path) == ["MUON_WD=2 1"]
    assert not (folder / "checkpoint.pt").exists()
    assert run("HANG=1", SEEDS=1) == 1
    assert run("HANG=1", SEEDS=1) == 1
    assert ran(tmp_path) == ["HANG=1 1", "HANG=1 1"]


@pytest.mark.parametrize(
    ("settings", "env", "words"),
    [
        ("", {}, "nothing to compare"),
        ("MUON_WD", {}, "KNOB=VALUE"),
        ("muon_wd=2", {}, "KNOB=VALUE"),
        ("SEED=2", {}, "SEEDS"),
        ("MUON_WDD=2", {}, "MUON_WDD is no knob"),
        ("MUON_WD=high MUON_WD=2", {}, "MUON_WD=high: could not convert"),
        ("MUON_WD=2", {"MAX_WALLCLOCK_SECONDS": 600}, "same steps"),
        ("MUON_WD=2", {"SEEDS": "one"}, "SEEDS"),
        ("MUON_WD=2", {"NPROC": "-1"}, "NPROC"),
        ("MUON_WD=2", {"NPROC": "0"}, "NPROC=0"),
        ("MUON_WD=2", {"GPUS": "0 one"}, 'such as "0 1"'),
        ("MUON_WD=2", {"GPUS": "0 1", "NPROC": "2"}, 'such as "0,1 2,3"'),
        ("MUON_WD=2", {"DATA_PATH": "nowhere"}, "- no shards there\n"),
        ("MUON_WD=2", {"OUT": "/proc/x"}, "OUT=/proc/x cannot be written"),
    ],
)
def test_bad_settings_are_refused_at_once(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: str, env: dict[str, object], words: str
) -> None:
    assert run(settings, **env) == 2
    said = capsys.readouterr().err
    assert words in said
    assert not (tmp_path / "out").exists()


def test_commas_may_be_part_of_a_value() -> None:
    _, a, b = ablate.parse_settings("TTT_EVAL_BATCHES=1,2,3 SPINQUANT_SITES=attn_in,mlp_in,MUON_WD=0.1")
    assert a.knobs == {"TTT_EVAL_BATCHES": "1,2,3"}
    assert b.knobs == {"SPINQUANT_SITES": "attn_in,mlp_in", "MUON_WD": "0.1"}
    assert (a.first_stage, b.first_stage) == ("evaluate", "train")


def test_a_problem_of_the_baseline_is_said_once(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("MUON_WD=2 MUON_WD=3", DATA_PATH="nowhere") == 2
    assert capsys.readouterr().err.count("no shards there") == 1


def test_the_program_is_the_one_it_takes_it_for(dataset: Path) -> None:
    """Names of the artifact, of the knobs that are set here, and of those that a trained artifact cannot depend on."""
    knobs = {f.name.upper() for f in train_gpt.fields(train_gpt.Config)}
    assert ablate.ARTIFACT == train_gpt.ARTIFACT_NAME
    assert f'"{ablate.WEIGHTS}"' in (ROOT / "train_gpt.py").read_text()
    assert set(ablate.OURS) | {"MAX_WALLCLOCK_SECONDS", "EVAL_ONLY_CHECKPOINT"} <= knobs
    later = ablate.SCORING + ablate.QUANTIZING
    assert all(any(k.startswith(prefix) for k in knobs) for prefix in later)
    assert not [k for k in train_gpt.MODEL_FIELDS if k.upper().startswith(later)]
    assert ROOT / "train_gpt.py" == ablate.PROGRAM
    settings = ablate.parse_settings("MUON_GRAD_POWER=0.9")
    env = {"PRESET": "demo", "MAX_WALLCLOCK_SECONDS": "0", "TOKENIZER_PATH": str(TOKENIZER)}
    env |= {"TRAIN_BATCH_TOKENS": "256", "TRAIN_SEQ_LEN": "16", "VAL_BATCH_TOKENS": "256", "EVAL_SEQ_LEN": "16"}
    with pytest.raises(ablate.Refused, match="no fineweb_val"):
        ablate.resolved(settings, {**env, "DATA_PATH": "nowhere"})
    configs = ablate.resolved(settings, {**env, "DATA_PATH": str(dataset)})
    assert [c["muon_grad_power"] for c in configs.values()] == [1.0, 0.9]
    assert json.dumps(configs)
