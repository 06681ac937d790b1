"""read_logs on a synthetic run folder, on what a kill leaves of one, and on lines of the public log format."""

import json
import math
from pathlib import Path

import pytest

import read_logs

BATCH_TOKENS = 1000
PUBLIC_LOG = Path(__file__).resolve().parents[2] / "shared" / "logs" / "public_1736_seed42.log"


def train_row(step: int) -> dict[str, object]:
    """A run that takes 1 s a step for 10 steps and 2 s a step afterwards, with the loop on."""
    return {
        "kind": "train",
        "t": 3.0 + step,
        "step": step,
        "loss": 9.0 - 0.1 * step,
        "lr_mul": 1.0,
        "train_s": step + max(0, step - 10),
        "tokens": step * BATCH_TOKENS,
        "looped": step > 10,
    }


ROWS = [
    *map(train_row, [1, 2, 3, 4, 5, 8, 10, 12, 16, 20]),
    {"kind": "eval", "label": "step 20", "loss": 3.0, "bpb": 1.9, "tokens": 100, "bytes": 300, "seconds": 1.0},
    {"kind": "eval", "label": "pre-quantization post-ema", "loss": 3.0, "bpb": 1.4, "tokens": 9, "bytes": 9},
    {"kind": "stage", "name": "train", "seconds": 30.0, "resumed": False},
    {"kind": "stage", "name": "train", "seconds": 0.1, "resumed": True},
    {"kind": "eval", "label": "quantized", "loss": 3.0, "bpb": 1.41, "tokens": 9, "bytes": 9, "seconds": 1.0},
    {"kind": "ttt", "phase": 1, "batch": 2, "docs": 4, "tokens": 100, "bytes": 300.0, "nats": 280.0},
    {"kind": "base_sgd", "phase": 1, "chunk": 1, "lr": 0.001, "loss": 2.9},
    {"kind": "ttt", "phase": 2, "batch": 1, "docs": 4, "tokens": 50, "bytes": 150.0, "nats": 140.0},
    {
        "kind": "result",
        "bpb_float": 1.4,
        "bpb_quantized": 1.41,
        "bpb_ttt": 1.35,
        "artifact_bytes": 900_000,
        "code_bytes": 30_000,
        "total_bytes": 930_000,
        "train_seconds": 30.0,
        "ttt_seconds": 7.5,
        "steps": 20,
        "seed": 42,
        "gptq_seconds": None,
    },
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "demo"
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (path / "run.json").write_text(json.dumps({"config": {"SEED": 7}}))
    return path


def cells_of(path: Path) -> dict[str, str]:
    headings = [heading for heading, _, _ in read_logs.COLUMNS]
    return dict(zip(headings, read_logs.cells(read_logs.read_run(path)), strict=True))


def test_run_folder_gives_one_row(folder: Path) -> None:
    assert cells_of(folder) == {
        "run": "demo",
        "seed": "42",
        "steps": "20",
        "tok/s before loop": "1,000",
        "after loop": "500",
        "bpb float": "1.40000",
        "quantized": "1.41000",
        "after TTT": "1.35000",
        "artifact bytes": "900,000",
        "code bytes": "30,000",
        "total bytes": "930,000",
        "train s": "30.0",
        "TTT s": "7.5",
    }


def test_killed_run_keeps_what_it_reached(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join(lines[:12]) + "\n" + lines[12][:20])
    row = cells_of(folder)
    assert (row["seed"], row["steps"], row["train s"], row["bpb float"]) == ("7", "20", "30.0", "1.40000")
    assert row["quantized"] == row["after TTT"] == row["artifact bytes"] == "-"
    assert "metrics.jsonl:13 is not JSON" in capsys.readouterr().err


def test_repeated_batch_counts_once(folder: Path) -> None:
    again = {"kind": "ttt", "phase": 1, "batch": 2, "docs": 4, "tokens": 100, "bytes": 300.0, "nats": 270.0}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    assert read_logs.read_run(folder).ttt == {1: (50, 140.0, 150.0), 2: (100, 270.0, 300.0)}


def test_stage_seconds_are_those_of_the_work(folder: Path) -> None:
    assert read_logs.read_run(folder).stages == {"train": 30.0}


def test_command_prints_the_table_and_writes_the_plot(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read_logs.main([str(folder)])
    heading, rule, row = capsys.readouterr().out.splitlines()
    assert heading.count("|") == rule.count("|") == row.count("|")
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_an_empty_run(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("")
    target = folder / "other.png"
    read_logs.main([str(folder), "--out", str(target)])
    assert target.exists()
    assert not (folder / "plot.png").exists()


def test_result_block(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read_logs.main(["--result", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert "| after TTT | 1.35000 |" in lines
    assert "| stage train s | 30.0 |" in lines


def test_nothing_to_read_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read_logs.main([str(tmp_path / "none")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_log_alone_gives_interval_rates(tmp_path: Path) -> None:
    """The logged rate is cumulative: 1000 tok/s up to step 10, then 500 tok/s, reads 750 and 667 at steps 15 and 20."""
    log = tmp_path / "seed9.log"
    log.write_text(
        "  seed: 9\n  train_batch_tokens: 1000\n"
        "5/20 train_loss: 5.0000 train_time: 0.1m tok/s: 1000\n"
        "10/20 train_loss: 4.0000 train_time: 0.2m tok/s: 1000\n"
        "layer_loop:enabled step:10 frac:0.350 encoder:[0, 1] decoder:[1, 2]\n"
        "15/20 train_loss: 3.0000 train_time: 0.3m tok/s: 750\n"
        "20/20 train_loss: 2.5000 train_time: 0.5m tok/s: 667\n"
        "stopping_early: wallclock_cap train_time: 30250ms step: 20/20\n"
    )
    run = read_logs.read_run(log)
    assert (run.seed, run.steps, run.train_seconds, run.loss[20]) == (9, 20, 30.25, 2.5)
    assert math.isclose(run.rate(looped=False), 1000)
    assert math.isclose(run.rate(looped=True), 500, rel_tol=0.01)


@pytest.mark.skipif(not PUBLIC_LOG.exists(), reason="the public log is not beside this checkout")
def test_public_log_of_the_record() -> None:
    assert list(cells_of(PUBLIC_LOG).values()) == [
        "public_1736_seed42",
        "42",
        "4854",
        "8,067,379",
        "5,505,538",
        "1.06907",
        "1.07847",
        "1.06610",
        "15,950,809",
        "28,025",
        "15,978,834",
        "596.2",
        "396.9",
    ]
