"""read_logs on generated logs of the public format, run folders, what a kill leaves, and the record's own log."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import read_logs

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "records"
PUBLIC_LOG = ROOT.parent / "shared" / "logs" / "public_1736_seed42.log"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CASEOPS_RATIO = 151_074_499 / 47_853_343  # bytes per token of the competition's validation set

# ---- Generated logs --------------------------------------------------------------------------------------------------

SETTINGS = {
    "enable_looping_at": 0.35, "gptq_reserve_seconds": 4.0, "iterations": 20000, "logfile": "logs/a.txt",
    "matrix_lr": 0.026, "max_wallclock_seconds": 600.0, "min_lr": 0.0, "mlp_clip_sigmas": 12.0, "muon_momentum": 0.97,
    "muon_momentum_warmup_start": 0.92, "muon_momentum_warmup_steps": 1500, "train_batch_tokens": 786432,
    "ttt_enabled": True, "ttt_eval_batches": "", "val_doc_fraction": 1.0, "warmdown_frac": 0.75,
}  # fmt: skip
LOSSES = (2.586, 2.815, 2.643, 2.674, 2.560, 2.568, 2.569, 2.410, 2.281)  # steps 500, 1000, ... on the canonical shards
STEP_S, LOOPED_STEP_S, ONSET = 0.1, 0.15, 2086  # 35 % of 596 s at 0.1 s a step


def seconds_of(step: int) -> float:
    return step * STEP_S if step <= ONSET else ONSET * STEP_S + (step - ONSET) * LOOPED_STEP_S


def score_line(label: str, bpb: float, ratio: float, ms: int) -> str:
    return f"{label} val_loss:{bpb * math.log(2) * ratio:.8f} val_bpb:{bpb:.8f} eval_time:{ms}ms"


def public_log(
    seed: int = 42, shift: float = 0.0, targets: int = 47_853_343, ratio: float = CASEOPS_RATIO, **settings: Any
) -> list[str]:
    """A ten-minute run in the public format: 0.1 s a step, 0.15 s with the loop on, scores moved by `shift`."""
    noise = np.random.RandomState(seed).uniform(-0.004, 0.004, 20)
    lines = ["Hyperparameters:", *(f"  {k}: {v}" for k, v in sorted({**SETTINGS, "seed": seed, **settings}.items()))]
    lines += ["train_shards: 80", f"val_tokens: {targets}", "model_params:35989658"]
    lines += ["0/20000 val_loss: 9.0177 val_bpb: 4.1205"]
    for i, step in enumerate((1, 2, 3, 4, 5, *range(500, 4501, 500))):
        loss = (9.018, 12.74, 10.138, 8.609, 7.864, *LOSSES)[i] + noise[i]
        rate = 786432 * step / seconds_of(step)
        if step == 2500:
            lines.append(f"layer_loop:enabled step:{ONSET} frac:0.350 encoder:[0, 1] decoder:[1, 2]")
        minutes = seconds_of(step) / 60
        lines.append(f"{step}/20000 train_loss: {loss:.4f} train_time: {minutes:.1f}m tok/s: {rate:.0f}")
    lines += ["4669/20000 val_loss: 2.3408 val_bpb: 1.0696",
              f"stopping_early: wallclock_cap train_time: {1000 * seconds_of(4669):.0f}ms step: 4669/20000",
              "peak memory allocated: 40032 MiB reserved: 40040 MiB", "ema:applying EMA weights",
              score_line("diagnostic pre-quantization post-ema", 1.06907 + shift, ratio, 6721),
              "Serialized model: 135592891 bytes", "Code size (uncompressed): 131887 bytes",
              "Code size (compressed): 28025 bytes", "GPTQ:collecting Hessians from calibration data...",
              "GPTQ:collected 67 Hessians in 3.5s", "Serialized model quantized+brotli: 15950809 bytes",
              "Total submission size quantized+brotli: 15978834 bytes",
              score_line("diagnostic quantized", 1.07847 + shift, ratio, 10116), "", "beginning TTT eval timer",
              "ttt_phased: total_docs:50000 prefix_docs:2000 suffix_docs:48000 num_phases:1 boundaries:[]"]  # fmt: skip
    for i, batch in enumerate((777, 600, 400, 200, 1)):
        bpb, longest = 1.05 + 0.05 * i + shift + noise[i] / 10, (9229, 1140, 586, 300, 83)[i]
        lines.append(f"ttp: b{batch}/782 bl:{bpb * 2.1883:.4f} bb:{bpb:.4f} rl:2.33 rb:{bpb:.4f} "
                     f"dl:{longest - 20}-{longest} gd:1")  # fmt: skip
    return [*lines, score_line("quantized_ttt_phased", 1.06610 + shift, ratio, 396853), "total_eval_time:396.9s"]


def write(path: Path, lines: Iterable[str], end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


def read(path: Path) -> read_logs.Run:
    (run,) = read_logs.read_runs(path)
    return run


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    """Three logs of one configuration, whose scores differ by seed."""
    shifts = {42: 0.0, 0: -0.0013, 1234: -0.0004}
    return [write(tmp_path / f"base_s{seed}.log", public_log(seed, shift)) for seed, shift in shifts.items()]


# ---- A run folder ----------------------------------------------------------------------------------------------------


def train_row(step: int) -> dict[str, object]:
    """A run that takes 1 s a step for 10 steps and 2 s a step afterwards, with the loop on."""
    return {"kind": "train", "t": 3.0 + step, "step": step, "loss": 9.0 - 0.1 * step, "lr_mul": 1.0,
            "train_s": step + max(0, step - 10), "tokens": step * 1000, "looped": step > 10}  # fmt: skip


ROWS = [
    *map(train_row, [1, 2, 3, 4, 5, 8, 10, 12, 16, 20]),
    {"kind": "eval", "label": "step 20", "loss": 3.0, "bpb": 1.9, "tokens": 150, "bytes": 450, "seconds": 1.0},
    {"kind": "eval", "label": "pre-quantization post-ema", "loss": 3.0, "bpb": 1.4, "tokens": 9, "bytes": 9},
    {"kind": "stage", "name": "train", "seconds": 30.0, "resumed": False},
    {"kind": "stage", "name": "train", "seconds": 0.1, "resumed": True},
    {"kind": "eval", "label": "quantized", "loss": 3.0, "bpb": 1.41, "tokens": 9, "bytes": 9, "seconds": 1.0},
    {"kind": "ttt", "phase": 1, "batch": 2, "docs": 4, "tokens": 100, "bytes": 300.0, "nats": 280.0},
    {"kind": "base_sgd", "phase": 1, "chunk": 1, "lr": 0.001, "loss": 2.9},
    {"kind": "ttt", "phase": 2, "batch": 1, "docs": 4, "tokens": 50, "bytes": 150.0, "nats": 140.0},
    {"kind": "result", "bpb_float": 1.4, "bpb_quantized": 1.41, "bpb_ttt": 1.35, "artifact_bytes": 900_000,
     "code_bytes": 30_000, "total_bytes": 930_000, "train_seconds": 30.0, "calibrate_seconds": 2.0,
     "quantize_seconds": 1.5, "ttt_seconds": 7.5, "steps": 20, "seed": 42, "peak_memory_mib": 700,
     "pack_seconds": None},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "demo"
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (path / "run.json").write_text(json.dumps({"config": {"seed": 7, "iterations": 20}, "changed": {"seed": 7}}))
    return path


def row_of(table: read_logs.Table, name: str) -> dict[str, str]:
    """The cells of a run or statistic under their headings; the second of two equal headings is left out."""
    (row,) = (row for row in table.rows[1:] if row[0] == name)
    return dict(reversed([*zip(table.rows[0], row, strict=True)]))


def report(*runs: read_logs.Run) -> dict[str, read_logs.Table]:
    return {table.title: table for table in read_logs.run_tables(runs)}


def test_a_run_folder_gives_a_row_in_each_table(folder: Path) -> None:
    tables = report(read(folder))
    assert list(tables) == ["Scores", "Speed", "Size and budgets"]
    assert tables["Scores"].rows[1] == ["demo", "42", "20", "1.40000", "1.41000", "1.35000", "10.0", "60.0", "complete"]
    assert tables["Speed"].rows[1] == [
        "demo",
        "11",
        "1000.0",
        "2000.0",
        "1,000",
        "500",
        "30.0",
        "2.0",
        "1.5",
        "7.5",
        "700",
    ]
    assert tables["Size and budgets"].rows[1] == ["demo", "900,000", "30,000", "930,000", "15,070,000", "pass"]


def test_a_killed_run_keeps_what_it_reached(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join(lines[:12]) + "\n" + lines[12][:20])
    run = read(folder)
    assert (run.seed, run.steps, run.train_seconds, run.bpb_float) == (7, 20, 30.0, 1.4)
    assert run.bpb_quantized is run.bpb_ttt is run.artifact_bytes is None
    assert run.state == "reached float score"
    assert "metrics.jsonl:13 is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("last", "state"),
    [
        ("train_shards: 80", "reached set-up"),
        ("2000/20000 train_loss", "reached training, step 2000 of 20000"),
        ("ema:applying", "reached end of training"),
        ("diagnostic pre-quantization", "reached float score"),
        ("GPTQ:collected", "reached calibration"),
        ("Total submission", "reached packing"),
        ("diagnostic quantized", "reached quantized score"),
        ("ttp: b600", "reached TTT, 2 of 782 batches"),
        ("quantized_ttt_phased", "complete"),
    ],
)
def test_every_stage_that_a_kill_may_leave_is_named(tmp_path: Path, last: str, state: str) -> None:
    lines = public_log()
    end = next(i for i, line in enumerate(lines) if line.startswith(last))
    assert read(write(tmp_path / "a.log", lines[: end + 1])).state == state


def test_a_batch_that_was_scored_twice_counts_once_and_last(folder: Path) -> None:
    again = {"kind": "ttt", "phase": 1, "batch": 2, "docs": 4, "tokens": 100, "bytes": 300.0, "nats": 270.0}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    batches = read(folder).ttt
    assert {number: (b.tokens, b.nats, b.size) for number, b in batches.items()} == {
        1: (50, 140, 150),
        2: (100, 270, 300),
    }
    assert list(batches) == [1, 2]


def test_seconds_of_a_stage_are_those_of_the_work(folder: Path) -> None:
    assert read(folder).stages == {"train": 30.0}


def test_a_run_that_starts_over_in_its_folder_forgets_the_first(tmp_path: Path) -> None:
    first, second = public_log()[:-1], public_log(seed=7)
    steps = [i for i, line in enumerate(second) if " train_loss: " in line]
    run = read(write(tmp_path / "a.log", first + second[: steps[6]]))
    assert (run.seed, run.steps, sorted(run.loss)) == (7, 500, [1, 2, 3, 4, 5, 500])
    assert run.loop_step is None


def test_runs_without_test_time_training_are_complete_at_the_quantized_score(tmp_path: Path) -> None:
    lines = public_log(ttt_enabled=False)
    end = next(i for i, line in enumerate(lines) if line.startswith("diagnostic quantized"))
    assert read(write(tmp_path / "a.log", lines[: end + 1])).state == "complete, without TTT"


def test_a_refused_start_is_shown_as_such(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = tmp_path / "refused"
    write(refused / "log.txt", ["cannot start:", "  - no tokenizer: set TOKENIZER_PATH", "  - no shards"])
    assert read_logs.main([str(folder), str(refused)]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"### Did not start\n\n.*\n.*\n\| refused +\| no tokenizer: set TOKENIZER_PATH \(and 1 more\) \|", out
    )
    assert out.count("| refused") == 1
    assert read_logs.main(["--result", str(refused)]) == 2
    assert "refused has no result, it did not start: no tokenizer" in capsys.readouterr().err


def test_a_refused_restart_of_a_finished_run_is_a_remark(tmp_path: Path) -> None:
    run = read(write(tmp_path / "a.log", [*public_log(), "cannot start:", "  - no shards"]))
    assert run.state == "complete"
    assert read_logs.remarks(run) == ["a later start was refused: no shards"]


def test_the_result_block_is_a_figure_per_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_logs.main(["--result", str(folder)]) == 0
    rows = dict(re.findall(r"^\| (\S.*?) +\| +(\S.*?) +\|$", capsys.readouterr().out, re.M))
    assert rows["after TTT"] == "1.35000"
    assert (rows["tok/s before loop"], rows["tok/s after loop"]) == ("1,000", "500")
    assert (rows["ms/step before loop"], rows["ms/step after loop"]) == ("1000.0", "2000.0")
    assert rows["stage train s"] == "30.0"


# ---- Logs as they come -----------------------------------------------------------------------------------------------


def figures(run: read_logs.Run) -> list[list[str]]:
    return [read_logs.cells(run, columns)[1:] for columns in (read_logs.SCORES, read_logs.SPEED, read_logs.SIZES)]


def test_a_log_alone_gives_interval_rates_not_the_cumulative_one(tmp_path: Path) -> None:
    run = read(write(tmp_path / "a.log", public_log()))
    assert run.rate(looped=False) == pytest.approx(786432 / STEP_S, rel=1e-5)
    assert run.rate(looped=True) == pytest.approx(786432 / LOOPED_STEP_S, rel=1e-5)
    assert (run.step_ms(looped=False), run.step_ms(looped=True)) == (pytest.approx(100), pytest.approx(150))
    assert run.dips() == []


def test_slow_intervals_are_dips(tmp_path: Path) -> None:
    rows = [train_row(step) for step in range(1, 101)]
    for row in rows:
        row["looped"], row["train_s"] = False, 1.0 * row["step"] + 4.0 * (row["step"] > 50)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ((dip),) = read(tmp_path).dips()
    assert dip.start <= 50 < dip.end


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: "\r\n".join(lines) + "\r\n",
        lambda lines: "".join(f"[rank0]: {line}\n" for line in lines if not line.startswith("  ")),
        lambda lines: "W1126 torch/distributed/run.py:792] *****\n" + "\n".join(lines) + "\n",
        lambda lines: "".join(f"[W419 12 alloc.cpp:28] Warning: deprecated{line}\n" if ": " in line and line[0] != " "
                              and not line.startswith("seed") else line + "\n" for line in lines),
        lambda lines: "".join(f"{line}[rank3]: UserWarning\n" if "_loss" in line else line + "\n" for line in lines),
        lambda lines: "".join(f"{line}\ntttg: c{i}/250 lr:0.001000 t:0.2s\n" for i, line in enumerate(lines)
                              if not line.startswith("  ")),
        lambda lines: "\ufeff" + "\n".join(lines) + "\n\ud800"[:1],
        lambda lines: "  loading: 10%\r  loading: 90%\r" + "\n".join(lines) + "\n",
    ],
    ids=["crlf", "rank prefixes", "torchrun", "glued warnings", "glued ends", "interleaved", "bom", "progress bar"],
)  # fmt: skip
def test_what_surrounds_the_lines_does_not_change_the_figures(tmp_path: Path, change: Any) -> None:
    lines = public_log()
    (tmp_path / "changed_s42.log").write_bytes(change(lines).encode())
    plain = read(write(tmp_path / "plain.log", lines))
    changed = read(tmp_path / "changed_s42.log")
    changed.hyper = plain.hyper  # settings are printed by one process, at once
    expected = figures(plain)
    assert figures(changed)[0] == expected[0]
    assert figures(changed)[2] == expected[2]
    assert changed.rate(looped=True) == pytest.approx(plain.rate(looped=True), rel=0.05)


def test_a_number_cut_short_at_the_end_is_not_read(tmp_path: Path) -> None:
    lines = public_log()
    at = next(i for i, line in enumerate(lines) if line.startswith("Total submission"))
    path = write(tmp_path / "a.log", lines[:at])
    with path.open("a") as file:
        file.write("Total submission size quantized+brotli: 1597")
    assert read(path).total_bytes is None
    with path.open("a") as file:
        file.write("8834 bytes")
    assert read(path).total_bytes == 15_978_834


def test_files_that_are_no_logs_are_named(
    tmp_path: Path, seeds: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    readme = write(tmp_path / "README.md", ["# Runs", "1.06610 bits per byte"])
    utf16 = tmp_path / "powershell.log"
    utf16.write_bytes("\n".join(public_log()).encode("utf-16"))
    for path, what in ((readme, "no line of a training log"), (utf16, "iconv"), (tmp_path / "none", "does not exist")):
        assert read_logs.main([str(path)]) == 2
        err = capsys.readouterr().err
        assert what in err and str(path) in err and err.count("\n") == 1
    assert read_logs.main([str(readme), str(seeds[0])]) == 0
    assert f"skipped: {readme}" in capsys.readouterr().err
    assert read_logs.main([str(seeds[0]), str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a.log", "--check", "b"],
        ["a.log", "--record", "b"],
        ["a.log", "--name", "b"],
        ["a.log", "--html", "no/where"],
    ],
)
def test_a_command_that_makes_no_sense_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read_logs.main(arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_the_records_of_this_repository_read_as_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert read_logs.main([str(path) for path in sorted(RECORDS.iterdir())]) == 0
    rows = re.findall(r"^\| (2026\S+/\S+) +\| +(\S+) \| +(\S+) \|", capsys.readouterr().out.split("### Speed")[0], re.M)
    assert ("2026-11-25_h100_300_steps/own_seed42", "42", "300") in rows
    assert ("2026-11-23_h200_24_steps_all_stages/seed42", "42", "24") in rows
    assert len({name for name, *_ in rows}) == len(rows) >= 4


# ---- Statistics of several runs --------------------------------------------------------------------------------------


def test_mean_and_deviation_are_of_the_complete_runs(seeds: list[Path], tmp_path: Path) -> None:
    killed = write(tmp_path / "killed_s7.log", public_log(7, 1.0)[:-8])
    table = report(*read_logs.read_all([*seeds, killed]))["Scores"]
    assert row_of(table, "mean of 3 complete runs")["after TTT"] == f"{1.06610 - 0.0017 / 3:.5f}"
    assert row_of(table, "standard deviation")["after TTT"] == f"{np.std([0, -0.0013, -0.0004], ddof=1):.5f}"
    assert row_of(table, "mean of 3 complete runs")["steps"] == "4,669"


def test_what_does_not_belong_together_has_no_mean(seeds: list[Path], tmp_path: Path) -> None:
    other = write(tmp_path / "other_s5.log", public_log(5, mlp_clip_sigmas=10.0))
    short = write(tmp_path / "short_s5.log", public_log(5, targets=9_662_464, ratio=3.0997))
    copy = write(tmp_path / "copy_s5.log", [line.replace("seed: 42", "seed: 5") for line in public_log(42)])
    for extra, why in (
        (other, "mixed configurations (MLP_CLIP_SIGMAS: 12.0 / 10.0)"),
        (short, "different validation sets (validation tokens: 47,853,343 in base_s1234, 9,662,464 in short_s5)"),
        (copy, "base_s42 and copy_s5 are one log twice (seeds 42 and 5)"),
    ):
        table = report(*read_logs.read_all([*seeds, extra]))["Scores"]
        assert table.note == f"No mean: {why}."
        assert len(table.rows) == 5


def console_log(knobs: str, **of_public: Any) -> list[str]:
    """What our console shows of such a run: the knobs that are not the defaults instead of all settings."""
    lines = public_log(**of_public)
    return [f"changed knobs: {knobs}", *lines[lines.index("train_shards: 80") :]]


@pytest.mark.parametrize(("knobs", "batch"), [("SEED=42", 786_432), ("SEED=42 TRAIN_BATCH_TOKENS=98304", 98_304)])
def test_rates_of_a_console_log_are_exact(knobs: str, batch: int, tmp_path: Path) -> None:
    run = read(write(tmp_path / "a.log", console_log(knobs)))
    plain = read(write(tmp_path / "b.log", public_log()))
    for looped in (False, True):
        assert run.rate(looped) == pytest.approx(plain.rate(looped), rel=1e-9)
        assert run.step_ms(looped) == pytest.approx(plain.step_ms(looped) * batch / 786_432, rel=1e-9)


def test_console_logs_of_other_knobs_have_no_mean(tmp_path: Path) -> None:
    logs = [write(tmp_path / f"a_s{seed}.log", console_log(f"SEED={seed}{knobs}", seed=seed, shift=seed / 1e5))
            for seed, knobs in ((42, ""), (0, ""), (7, " EMBED_BITS=8"))]  # fmt: skip
    assert not report(*read_logs.read_all(logs[:2]))["Scores"].note
    note = report(*read_logs.read_all(logs))["Scores"].note
    assert note == "No mean: mixed configurations (EMBED_BITS: (default) / 8)."


def test_a_console_log_hides_no_difference_of_full_ones(tmp_path: Path) -> None:
    bits = [write(tmp_path / f"a_s{n}.log", public_log(n, n / 1e4, embed_bits=n)) for n in (7, 8)]
    brief = write(tmp_path / "b_s5.log", console_log("SEED=5", seed=5, shift=5e-4))
    note = report(*read_logs.read_all([*bits, brief]))["Scores"].note
    assert note == "No mean: mixed configurations (EMBED_BITS: 7 / 8)."


def test_knobs_of_what_no_run_does_and_where_weights_lie_make_no_other_configuration(tmp_path: Path) -> None:
    knobs = {
        1: "HOTSTART_FP_CKPT=a TTT_ENABLED=False PHASED_TTT_PREFIX_DOCS=200",
        2: "HOTSTART_FP_CKPT=b TTT_ENABLED=False",
    }
    runs = [read(write(tmp_path / f"a_s{n}.log", console_log(text, seed=n))) for n, text in knobs.items()]
    assert read_logs.settings_that_differ(runs) == []
    runs[1].changed = {"HOTSTART_FP_CKPT": "b"}
    assert read_logs.settings_that_differ(runs)[0] == "PHASED_TTT_PREFIX_DOCS: 200 / (default)"


def test_scores_of_one_artifact_with_one_seed_have_no_mean(tmp_path: Path) -> None:
    def table(*seeds: int) -> read_logs.Table:
        scored = [[line for line in console_log(f"SEED={s}") if "train_loss" not in line] for s in seeds]
        logs = [write(tmp_path / f"{name}.log", lines) for name, lines in zip(("one", "two"), scored, strict=True)]
        runs = read_logs.read_all(logs)
        runs[0].bpb_quantized += 1e-10  # a file of metrics has more digits than a log
        return report(*runs)["Scores"]

    assert table(42, 42).note == "No mean: one and two score one artifact with one seed."
    assert not table(42, 0).note  # the spread of the adapters' seeds


def test_edited_copies_are_noticed_by_their_losses(tmp_path: Path) -> None:
    lines = public_log(42)
    edited = [re.sub(r"(val_bpb:1\.066)\d+", r"\g<1>55555", line).replace("seed: 42", "seed: 3") for line in lines]
    runs = [read(write(tmp_path / "a.log", lines)), read(write(tmp_path / "b.log", edited))]
    assert read_logs.copied_logs(runs) == ["a and b share 14 of 14 losses under seeds 42 and 3"]


def test_tests_agree_with_scipy(seeds: list[Path], tmp_path: Path) -> None:
    shifts = {42: -0.0030, 0: -0.0048, 1234: -0.0031}
    better = [write(tmp_path / f"new_s{seed}.log", public_log(seed, shift)) for seed, shift in shifts.items()]
    new, base = read_logs.read_all(better), read_logs.read_all(seeds)
    tables = {table.title: table for table in read_logs.comparison_tables(new, base)}
    row = row_of(tables["Difference"], "after TTT")
    a, b = ([run.bpb_ttt for run in side] for side in (new, base))
    assert row["runs"] == "3 against 3"
    assert row["difference, mb"] == f"{1000 * (np.mean(a) - np.mean(b)):+.2f}" == "-3.07"
    assert float(row["Welch p"]) == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue, abs=5e-5)
    assert float(row["paired p"]) == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=5e-5)
    assert row["common seeds"] == "3"
    record, frontier = tables["Leaderboard rules"].rows[1:]
    nats = math.log(2) * CASEOPS_RATIO
    margin = stats.ttest_ind(np.multiply(a, nats), np.multiply(b, nats) - 0.005, equal_var=False, alternative="less")
    assert float(record[1]) == pytest.approx(margin.pvalue, abs=5e-5)
    assert record[3] == "not kept"  # 0.0067 nats, but with this spread p is above 0.01
    assert frontier[3] == "kept"
    assert "Settings" not in tables


def test_the_record_rule_is_kept_by_a_gain_well_over_the_margin(seeds: list[Path], tmp_path: Path) -> None:
    better = [write(tmp_path / f"new_s{seed}.log", public_log(seed, -0.009 - seed * 1e-5)) for seed in (1, 2, 3)]
    tables = read_logs.comparison_tables(read_logs.read_all(better), read_logs.read_all(seeds))
    rules = next(table for table in tables if table.title == "Leaderboard rules")
    assert [row[3] for row in rules.rows[1:]] == ["kept", "kept"]


def test_single_runs_have_a_difference_but_no_test(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{shift}.log", public_log(42 + i, shift, mlp_clip_sigmas=12 - i))
             for i, shift in enumerate((0.0, -0.002))]  # fmt: skip
    tables = {t.title: t for t in read_logs.comparison_tables([read(paths[1])], [read(paths[0])])}
    row = row_of(tables["Difference"], "after TTT")
    assert (row["difference, mb"], row["Welch p"], row["paired p"]) == ("-2.00", "-", "-")
    assert "seeds alone spread by 0.74 mb" in tables["Difference"].note
    assert tables["Settings"].rows[1] == ["MLP_CLIP_SIGMAS", "11 / 12"]
    (batches,) = tables["Test-time training, the same batches"].rows[1:]
    assert batches[1] == "5"
    assert float(batches[2]) == pytest.approx(-2.0, abs=0.5)


def test_batches_of_other_documents_are_not_paired(tmp_path: Path) -> None:
    lines = public_log(1)
    moved = [line.replace("dl:1120-1140", "dl:1120-1141") for line in public_log(2)]
    a, b = read(write(tmp_path / "a.log", lines)), read(write(tmp_path / "b.log", moved))
    assert sorted(read_logs.batch_differences(a, b)) == [1, 200, 400, 777]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"targets": 9_662_464, "ratio": 3.0997}, "validation tokens: 47,853,343 in base_s42, 9,662,464 in other"),
        ({"ratio": CASEOPS_RATIO * 1.0895}, "bytes per token: 3.157031"),
    ],
)
def test_different_validation_sets_are_never_compared(
    seeds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], what: str
) -> None:
    other = write(tmp_path / "other.log", public_log(9, **settings))
    assert read_logs.main([str(seeds[0]), "--against", str(other)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"different validation sets do not compare; {what}" in err


def test_fingerprints_tell_validation_sets_of_one_size_apart(tmp_path: Path) -> None:
    runs = []
    for name, sha in (("a", "0f" * 8), ("b", "1e" * 8)):
        line = f"val data: sha256 {sha} documents 50000 bytes 151074499 bytes/token 3.157"
        runs.append(read(write(tmp_path / f"{name}.log", [*public_log(), line])))
    assert read_logs.validation_mismatch(*runs) == f"fingerprints: {'0f' * 8} in a, {'1e' * 8} in b"
    assert read_logs.validation_mismatch(runs[0], runs[0]) is None


def test_the_same_text_under_two_tokenizers_compares_in_bits_per_byte() -> None:
    own, public = read_logs.read_runs(RECORDS / "2026-11-25_h100_300_steps")
    table = read_logs.comparison_tables([own], [public])[0]
    assert row_of(table, "after TTT")["difference, mb"] == "-3.89"
    assert "The same text under two tokenizers" in table.note


def test_mixed_configurations_and_repeated_runs_are_not_compared(
    seeds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "other.log", public_log(9, mlp_clip_sigmas=10.0))
    third = write(tmp_path / "third.log", public_log(10))
    for arguments, what in (
        ([seeds[0], other, "--against", third], "one side mixes configurations (MLP_CLIP_SIGMAS: 12.0 / 10.0)"),
        ([seeds[0], "--against", seeds[0]], "both sides hold the same run"),
    ):
        assert read_logs.main([str(a) for a in arguments]) == 2
        assert what in capsys.readouterr().err


def test_a_comparison_ends_with_the_tables_of_both_sides(
    seeds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    better = [write(tmp_path / f"new_s{seed}.log", public_log(seed, -0.01 - seed * 1e-5)) for seed in (42, 0)]
    assert read_logs.main([*map(str, better), "--against", *map(str, seeds)]) == 0
    titles = re.findall("^### (.+)$", capsys.readouterr().out, re.M)
    assert titles[:2] == ["Difference", "Leaderboard rules"]
    assert titles[-6:] == ["Scores", "Speed", "Size and budgets", *(f"{t}, second set" for t in titles[-6:-3])]


def test_stages_are_paired_by_document(ours: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error is that of the sum; TTT pairs whatever the batches were, and half-scored runs have no row for it."""
    runs = [ours[0], our_run(tmp_path / "new", 42, -0.002), our_run(tmp_path / "half", 42, -0.001)]
    gains = np.array([3.0, -1.0, 2.0, 2.0])  # nats
    for run, better in zip(runs, (0.0 * gains, gains, gains), strict=True):
        nats = (np.array([500.0, 400.0, 300.0, 200.0]) - better).tolist()
        cut = 2 if run.name == "half" else 4
        rows = [{"kind": "documents", "label": "quantized", "nats": nats}]
        for n, share in enumerate((slice(0, 1), slice(1, cut)), 1):
            pairs = [[10 * i, nats[i]] for i in range(4)][share]
            total = sum(x for _, x in pairs)
            rows.append({"kind": "ttt", "batch": n, "tokens": 9, "nats": total, "bytes": 500, "documents": pairs})
        write(run / "metrics.jsonl", map(json.dumps, rows))
    assert read_logs.main([str(runs[1]), "--against", str(runs[0])]) == 0
    table = capsys.readouterr().out.split("### The same documents")[1].split("###")[0]
    rows = [re.split(r" +\| +", line.strip("| ")) for line in table.splitlines() if line.startswith("| new")]
    scale = 1000 / math.log(2)
    for row, stage, size in zip(rows, ("quantized", "after TTT"), (151_074_499, 1000), strict=True):
        error = scale / size * 2 * np.std(gains, ddof=1)
        assert row[1:] == [stage, "4", f"{-6 * scale / size:+.2f}", f"{error:.2f}", "75 %"]
    assert read_logs.main([str(runs[2]), "--against", str(runs[0])]) == 0
    table = capsys.readouterr().out.split("### The same documents")[1].split("###")[0]
    assert "quantized" in table and "after TTT" not in table


# ---- Accounting ------------------------------------------------------------------------------------------------------


def changed(lines: list[str], pattern: str, to: str) -> list[str]:
    text, n = re.subn(pattern, to, "\n".join(lines), flags=re.M)
    assert n > 0, pattern
    return text.split("\n")


SCORE = r" val_loss:\S+ val_bpb:\S+"


# What is wrong -> the log, and a part of the sentence about it.
FAULTS: dict[str, tuple[list[str], str]] = {
    "ten thousand documents": (public_log(targets=9_662_464, ratio=3.0997), "those of 10,000 documents"),
    "parallel slices": (public_log(targets=36_560_000), "parallel slices"),
    "sentinels counted": (public_log(ratio=CASEOPS_RATIO * 1.0895), "case markers count as text"),
    "spaces counted twice": (public_log(targets=40_540_160, ratio=3.7266 * 1.17), "counts leading spaces twice"),
    "another byte count": (
        [*public_log(), "val data: sha256 0123456789abcdef documents 50000 bytes 140000000 bytes/token 2.9256"],
        "divides by 3.1570 bytes per token, the validation set has 2.9256",
    ),
    "leak at step 1": (changed(public_log(), r"train_loss: 9\.0\d+", "train_loss: 9.0073"), "40,000 validation docu"),
    "other shards": (
        changed(public_log(), r"^(\d+00/20000 train_loss): 2\.(\d)", r"\1: 2.0\2"),
        "off those of the canonical shards",
    ),
    "loop off": (changed(public_log(), "post-ema" + SCORE, "post-ema val_loss:2.67 val_bpb:1.2216"), "loop off"),
    "loop never trained": (
        changed(public_log(), "^(diagnostic quantized)" + SCORE, r"\1 val_loss:6.56 val_bpb:3.0"),
        "never was in training",
    ),
    "missing gate": (
        changed(public_log(), "^(quantized_ttt_phased)" + SCORE, r"\1 val_loss:4.1754 val_bpb:1.908"),
        "diverged, or its forward misses a gate",
    ),
    "scored after learning": (
        changed(public_log(), "^(quantized_ttt_phased)" + SCORE, r"\1 val_loss:2.2541 val_bpb:1.03"),
        "is it scored after learning?",
    ),
    "byte mixture": (
        changed(public_log(), "^(quantized_ttt_phased)" + SCORE, r"\1 val_loss:1.969 val_bpb:0.9"),
        "below 1",
    ),
    "code not counted": (changed(public_log(), "brotli: 15978834", "brotli: 15950809"), "the code counts as 0 bytes"),
    "wrong sum": (changed(public_log(), "brotli: 15978834", "brotli: 15978833"), "not artifact plus code"),
    "16-bit checkpoint": (changed(public_log(), "135592891", "72002684"), "rounded to 16 bits"),
    "training too long": (
        changed(public_log(), "cap train_time: .*ms", "cap train_time: 598000ms"),
        "train s 601.5 > 600",
    ),
    "evaluation too long": (changed(public_log(), "eval_time:396853ms", "eval_time:605500ms"), "eval s 605.5 > 600"),
    "artifact too large": (
        changed(changed(public_log(), "15950809", "15980000"), "15978834", "16008025"),
        "bytes 16,008,025 > 16,000,000",
    ),
    "a part of the documents": (public_log(val_doc_fraction=0.1), "only a part of the documents"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_known_faults_are_read_off_a_log(tmp_path: Path, fault: str) -> None:
    lines, sentence = FAULTS[fault]
    run = read(write(tmp_path / "a.log", lines))
    assert [said for said in read_logs.errors(run) if sentence in said], read_logs.errors(run)
    assert "ERROR" in read_logs.markdown(report(run)["What to know"])


def test_a_sound_log_has_no_faults(seeds: list[Path]) -> None:
    for run in read_logs.read_all(seeds):
        assert read_logs.errors(run) == read_logs.remarks(run) == []


def test_batches_that_were_not_scored_are_missed(folder: Path) -> None:
    write(folder / "log.txt", ["val_tokens: 151"])
    assert "test-time training scored 150 of 151 tokens" in read_logs.errors(read(folder))
    write(folder / "log.txt", ["val_tokens: 150"])
    assert not [said for said in read_logs.errors(read(folder)) if "scored 150" in said]


def test_failed_budgets_stand_in_the_table(tmp_path: Path) -> None:
    run = read(write(tmp_path / "a.log", FAULTS["evaluation too long"][0]))
    assert report(run)["Size and budgets"].rows[1][-1] == "FAIL: eval s 605.5 > 600"


@pytest.mark.parametrize(("limit", "said"), [(600.0, ["over budget: train s 601.5 > 600"]), (0.0, [])])
def test_seconds_of_training_count_where_they_are_limited(tmp_path: Path, limit: float, said: list[str]) -> None:
    text = changed(public_log(max_wallclock_seconds=limit), "cap train_time: .*ms", "cap train_time: 598000ms")
    run = read(write(tmp_path / "a.log", text))
    assert run.train_seconds == 598 and read_logs.errors(run) == said
    assert report(run)["Size and budgets"].rows[1][-1] == ("FAIL: train s 601.5 > 600" if said else "pass")


# ---- Pictures --------------------------------------------------------------------------------------------------------


def test_schedules_follow_the_log_and_not_a_straight_line(tmp_path: Path) -> None:
    series = read_logs.schedules(read(write(tmp_path / "a.log", public_log())))
    events = {event["event"]: event for event in series["events"]}
    assert (events["warmdown starts"]["step"], events["momentum at its plateau"]["step"]) == (1490, 1500)
    assert (events["loop on"]["step"], events["end"]["step"]) == (ONSET, 4669)
    assert events["loop on"]["seconds"] == pytest.approx(0.35 * 596, abs=0.1)
    assert events["loop on"]["lr_multiplier"] == pytest.approx(0.65 / 0.75, abs=1e-3)
    assert series["lr_multiplier"][4000] == pytest.approx((1 - seconds_of(4000) / 596) / 0.75, abs=1e-4)
    assert series["matrix_lr"][0] == 0.026
    assert series["muon_momentum"][750] == pytest.approx(0.945)
    assert [series["loop"][step] for step in (0, ONSET - 1, ONSET, 4669)] == [0, 0, 1, 1]


def test_schedules_without_a_time_budget_follow_the_steps(tmp_path: Path) -> None:
    run = read(write(tmp_path / "a.log", public_log(max_wallclock_seconds=0.0, iterations=5000, min_lr=0.1)))
    series = read_logs.schedules(run)
    assert next(e["step"] for e in series["events"] if e["event"] == "warmdown starts") == 1250
    assert series["lr_multiplier"][3125] == pytest.approx(0.5)
    assert min(series["lr_multiplier"]) == pytest.approx(0.1)


def test_the_running_score_is_of_the_sums_where_they_are_known(folder: Path, tmp_path: Path) -> None:
    shares, values = read_logs.running_score(read(folder))
    assert shares == [50, 100]
    assert values == pytest.approx([280 / 300 / math.log(2), 420 / 450 / math.log(2)])
    public = read(write(tmp_path / "a.log", public_log()))
    assert read_logs.running_score(public)[1] == [batch.running for batch in public.ttt.values()]


def test_pictures_of_several_runs_are_written(
    seeds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_logs.main([*map(str, seeds), "--plots", str(tmp_path / "plots")]) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert set(files) == {"loss.png", "schedules.png", "schedules.json", "speed.png", "ttt.png", "size.png"}
    assert all(data.startswith(b"\x89PNG") for name, data in files.items() if name.endswith(".png"))
    assert [series["run"] for series in json.loads(files["schedules.json"])] == [path.stem for path in seeds]
    assert capsys.readouterr().err.count("picture: ") == 6


def drawn(name: str, runs: list[read_logs.Run]) -> Any:
    """The figure of a picture."""
    from matplotlib.figure import Figure

    figure = Figure()
    read_logs.PICTURES[name].draw(figure, runs)
    return figure


def test_the_ttt_picture_explains_its_slope_and_shows_the_score_without(seeds: list[Path]) -> None:
    runs = read_logs.read_all(seeds)
    running, by_length, paired = drawn("ttt", runs).axes
    assert "the longest documents come first" in running.get_title()
    levels = [line.get_ydata()[0] for line in running.lines if len(set(line.get_ydata())) == 1]
    assert levels == pytest.approx([run.bpb_quantized for run in runs])
    points = paired.lines[2].get_ydata()  # after points and line of the second run
    assert len(points) == 5 and np.mean(points) == pytest.approx(-0.4, abs=0.5)
    assert by_length.get_xscale() == "log"


def test_runs_are_told_apart_without_colour(seeds: list[Path]) -> None:
    by_step, _ = drawn("loss", read_logs.read_all(seeds)).axes
    assert len({line.get_linestyle() for line in by_step.lines[::2]}) == 3
    assert len({line.get_marker() for line in by_step.lines[1::2]}) == 3


def test_pictures_of_a_run_without_figures_are_none(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("")
    write(folder / "log.txt", ["val_tokens: 150"])
    assert read_logs.pictures([read(folder)]) == {}


ERRORS = {"tok_emb.weight": (7, 0.02), "bigram.embed.weight": (6, 0.09)} | {
    f"blocks.{layer}.{kind}": (bits, 0.03 + 0.01 * layer)
    for layer in range(3)
    for kind, bits in (("attn.c_q.weight", 6), ("mlp.proj.weight", 6), ("attn.attn_gate_w", 8))
}
SECTIONS = {"header": 1_000, "tok_emb.weight": 300_000, "float16": 40_000, "attn.c_q.weight": 200_000, "rows": 9_000,
            "mlp.proj.weight": 350_000}  # fmt: skip


def test_sizes_and_errors_come_from_the_metrics(folder: Path) -> None:
    rows = [{"kind": "quantization", "rows": [[name, bits, error] for name, (bits, error) in ERRORS.items()]},
            {"kind": "sections", "bytes": SECTIONS, "code": 30_000}]  # fmt: skip
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    run = read(folder)
    assert run.tensors == {name: error for name, (_, error) in ERRORS.items()}
    assert read_logs.size_parts(run) == {"embedding": 300_000, "MLP": 350_000, "attention": 200_000,
                                         "all else in the artifact": 50_000, "code": 30_000}  # fmt: skip
    assert sum(read_logs.size_parts(run).values()) == run.total_bytes
    ax = drawn("quantization", [run]).axes[0]
    kinds = {line.get_label(): list(line.get_ydata()) for line in ax.lines}
    assert kinds["mlp.proj"] == kinds["attn.attn_gate_w"] == pytest.approx([3, 4, 5])
    assert (kinds["tok_emb"], kinds["bigram.embed"]) == ([2], [9])
    assert all(line.get_marker() not in (None, "None") for line in ax.lines)


def test_pictures_without_figures_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run folder of an older program: no errors of matrices, and only artifact and code in the sizes."""
    rows = [row for row in ROWS if row["kind"] != "ttt"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_logs.main([str(folder), "--plots", str(tmp_path / "plots")]) == 0
    drawn_now, said = {path.stem for path in (tmp_path / "plots").iterdir()}, capsys.readouterr().err
    assert drawn_now == {"loss", "speed", "size"}
    titles = [read_logs.PICTURES[name].title for name in ("schedules", "ttt", "quantization")]
    assert re.findall(r"^no picture, as no run has its figures: (.+)$", said, re.M) == titles
    assert read_logs.size_parts(read(folder)) == {"artifact": 900_000, "code": 30_000}


# ---- Page and data ---------------------------------------------------------------------------------------------------


@pytest.fixture
def page(seeds: list[Path], tmp_path: Path) -> Path:
    over = write(tmp_path / "over <b>.log", FAULTS["evaluation too long"][0])
    assert read_logs.main([str(seeds[1]), str(over), "--html", str(tmp_path / "page.html")]) == 0
    return tmp_path / "page.html"


def test_the_page_needs_nothing_else(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"<script|<link|https?:|@import|url\(", text)
    assert text.count('src="data:image/png;base64,') == text.count("<img ") == 5
    assert "over &lt;b&gt;" in text and "over <b>" not in text
    assert '<td class="bad">FAIL: eval s 605.5 &gt; 600</td>' in text
    assert '<td class="number">1.06480</td>' in text
    assert "prefers-color-scheme: dark" in text


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_lays_the_page_out_without_overflow(page: Path, tmp_path: Path, width: int) -> None:
    """Wide tables scroll in their own box. The page measures itself inside a frame of the given width."""
    probe = tmp_path / "probe.html"
    measure = "const d = f.contentDocument; document.title = [d.documentElement.scrollWidth, d.images.length, " \
              "[...d.images].every(i => i.naturalWidth > 0)].join(' ')"  # fmt: skip
    probe.write_text(f'<iframe id="f" src="{page.name}" style="width:{width}px;height:900px;border:0" '
                     f'onload="{measure}"></iframe>')  # fmt: skip
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
               "--virtual-time-budget=10000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
               probe.as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    measured = re.search(r"<title>(\d+) (\d+) (\w+)</title>", dom)
    if measured is None:
        pytest.skip("this Chromium does not run here")
    assert int(measured[1]) <= width
    assert (measured[2], measured[3]) == ("5", "true")


def test_json_holds_the_figures_and_the_findings(seeds: list[Path], tmp_path: Path) -> None:
    assert read_logs.main([*map(str, seeds), "--json", str(tmp_path / "a.json")]) == 0
    data = json.loads((tmp_path / "a.json").read_text())
    first = data["runs"][0]
    assert (first["name"], first["seed"], first["bpb_ttt"], first["state"]) == ("base_s42", 42, 1.0661, "complete")
    assert first["step_ms_after_loop"] == pytest.approx(150)
    assert first["bytes_per_token"] == pytest.approx(CASEOPS_RATIO, rel=1e-6)
    assert (first["errors"], first["settings"]["mlp_clip_sigmas"]) == ([], "12.0")
    assert data["tables"][0]["rows"][-1][0] == "standard deviation"


# ---- Records ---------------------------------------------------------------------------------------------------------

PROGRAM = '#!/usr/bin/env python3\n"""A program."""\nprint("/not/a/secret/path.txt")\n'


def our_run(folder: Path, seed: int, shift: float = 0.0, **settings: Any) -> Path:
    """A run folder as train_gpt.py writes it, with the program in its log and paths of a machine."""
    lines = changed(
        public_log(seed, shift, **settings),
        "^Code size .uncompressed.*",
        f"Code size (uncompressed): {len(PROGRAM)} bytes",
    )
    lines = changed(lines, "logs/a.txt", "/home/somebody/golf/logs/a.txt")
    head = ["=" * 100, PROGRAM, "=" * 100]
    where = ["run runs/a on 8 x NVIDIA H100 80GB HBM3, torch.bfloat16, commit 0123456789ab, torch 2.13.0",
             f"changed knobs: SEED={seed} RUN_DIR=/home/somebody/runs/{seed} DATA_PATH=/mnt/disk/shards EMBED_BITS=7 "
             "TTT_K_LORA=False", "val data: sha256 0f0f documents 50000 bytes 151074499 bytes/token 3.157"]  # fmt: skip
    write(folder / "log.txt", [*head, *lines[:-1], *where, lines[-1]])
    return folder


@pytest.fixture
def ours(tmp_path: Path) -> list[Path]:
    return [our_run(tmp_path / f"run{seed}", seed, shift) for seed, shift in ((42, 0.0), (0, -0.0013), (1234, -0.0004))]


def record(folder: Path, runs: list[Path]) -> int:
    return read_logs.main([*map(str, runs), "--record", str(folder), "--name", "Three seeds", "--author", "A"])


def test_a_record_holds_figures_logs_code_and_command(ours: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "2026-12-01_record"
    assert record(out, ours) == 0
    result = json.loads((out / "submission.json").read_text())
    scores = [1.0661, 1.0648, 1.0657]
    assert result["val_bpb"] == pytest.approx(np.mean(scores), abs=1e-8)
    assert result["val_bpb_std"] == pytest.approx(np.std(scores, ddof=1), abs=1e-8)
    assert result["val_loss"] == pytest.approx(np.mean(scores) * math.log(2) * CASEOPS_RATIO, abs=1e-6)
    assert sorted(result["seeds"]) == [0, 42, 1234]
    assert result["seed_results"]["0"] == {"val_loss": pytest.approx(1.0648 * math.log(2) * CASEOPS_RATIO, abs=1e-6),
                                           "val_bpb": 1.0648, "artifact_bytes": 15_978_834, "steps": 4669}  # fmt: skip
    assert (result["hardware"], result["author"], result["name"]) == ("8 x NVIDIA H100 80GB HBM3", "A", "Three seeds")
    readme = (out / "README.md").read_text()
    assert "**1.06553 bits per byte**" in readme
    command = "SEED=42 DATA_PATH=shards EMBED_BITS=7 TTT_K_LORA=0 torchrun --standalone --nproc_per_node=8 train_gpt.py"
    assert command in readme.splitlines()
    assert (out / "train_gpt.py").read_text() == PROGRAM
    assert {"requirements.txt", "lossless_caps.py", "log_seed0.txt", "log_seed42.txt", "log_seed1234.txt"} <= {
        path.name for path in out.iterdir()
    }
    for log in out.glob("log_*.txt"):
        assert "somebody" not in log.read_text() and "/mnt" not in log.read_text()
        assert "(source: train_gpt.py)" in log.read_text() and "secret" not in log.read_text()


def test_a_fresh_record_agrees_with_its_logs(
    ours: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "record"
    assert record(out, ours) == 0
    capsys.readouterr()
    assert read_logs.main(["--check", str(out)]) == 0
    assert "every figure agrees" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("README.md", "1.06480", "1.06470", "1.06470 is in no log here; 1.0648 is after TTT"),
        ("README.md", "15,978,834", "15,978,843", "15,978,843 is in no log here; 15978834 is total bytes"),
        ("submission.json", '"val_bpb": 1.0648', '"val_bpb": 1.0638', "seed_results: 0: val_bpb says 1.0638"),
        ("submission.json", '"steps": 4669', '"steps": 4700', "steps says 4700, the logs give 4669"),
        ("submission.json", '"track":', '"pre_quant": 1.06911, "track":', "pre_quant:1: 1.06911 is in no log"),
        ("submission.json", '"1234": {', '"1337": {', "seed 1337 has no complete log here"),
        ("train_gpt.py", "A program", "Another program", "train_gpt.py has 78 bytes, 72 ran"),
        ("log_seed0.txt", "train_shards", "/srv/data/x.bin\ntrain_shards", "holds an absolute path (/srv/data/"),
        ("log_seed0.txt", "eval_time:396853ms", "eval_time:605500ms", "log_seed0.txt: over budget: eval s 605.5 > 600"),
    ],
)  # fmt: skip
def test_every_figure_that_disagrees_is_listed(
    ours: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, old: str, new: str, said: str
) -> None:
    out = tmp_path / "record"
    assert record(out, ours) == 0
    text = (out / file).read_text()
    assert old in text
    (out / file).write_text(text.replace(old, new))
    capsys.readouterr()
    assert read_logs.main(["--check", str(out)]) == 1
    assert said in capsys.readouterr().out


def test_runs_that_are_no_record_are_refused_with_all_reasons(
    ours: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = tmp_path / "killed"
    lines = (our_run(killed, 5) / "log.txt").read_text().splitlines()
    write(killed / "log.txt", [line for line in lines if not line.startswith(("quantized_ttt", "total_eval"))])
    late = our_run(tmp_path / "late", 6)
    text = (late / "log.txt").read_text().replace("eval_time:396853ms", "eval_time:605500ms")
    (late / "log.txt").write_text(text)
    mixed = our_run(tmp_path / "mixed", 7, mlp_clip_sigmas=10.0)
    copy = tmp_path / "copy"
    write(copy / "log.txt", (ours[0] / "log.txt").read_text().replace("seed: 42", "seed: 8").splitlines())
    for extra, said in (
        (killed, "killed: no score after TTT (reached TTT, 5 of 782 batches)"),
        (late, "late: over budget: eval s 605.5 > 600"),
        (mixed, "mixed configurations (MLP_CLIP_SIGMAS: 12.0 / 10.0)"),
        (copy, "run42 and copy are one log twice (seeds 42 and 8)"),
        (ours[0], "seeds repeat: 42, 0, 1234, 42"),
    ):
        assert record(tmp_path / "out", [*ours, extra]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert record(ours[0], ours) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_public_log_without_its_knobs_is_no_record(
    seeds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert record(tmp_path / "out", seeds) == 2
    assert "base_s42: the log does not say its knobs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("data_path: /home/me/golf/data/shards", "data_path: shards"),
        ("'/tmp/x y' and /usr/lib/python3/a.py:12", "'x y' and a.py:12"),
        (r"C:\Users\me\golf\a.model", "a.model"),
        ("./data/a and runs/b/c, 3/4, https://host.org/a/b", "./data/a and runs/b/c, 3/4, https://host.org/a/b"),
        ("500/20000 train_loss: 2.5", "500/20000 train_loss: 2.5"),
    ],
)
def test_absolute_paths_lose_their_folders(text: str, scrubbed: str) -> None:
    assert read_logs.scrub(text) == scrubbed


def test_nothing_to_check_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "none"):
        assert read_logs.main(["--check", str(path)]) == 2
        assert "no folder with logs" in capsys.readouterr().err


# ---- Ledger ----------------------------------------------------------------------------------------------------------


def test_the_ledger_of_this_repository_is_up_to_date() -> None:
    runs = read_logs.read_all([path for path in sorted(RECORDS.iterdir()) if path.is_dir()])
    assert (RECORDS / "EXPERIMENTS.md").read_text() == read_logs.ledger(runs), "run `make records`"


def test_a_ledger_row_says_what_changed_and_compares_like_with_like(ours: list[Path], tmp_path: Path) -> None:
    longer = our_run(tmp_path / "longer", 3, -0.01)
    text = (longer / "log.txt").read_text().replace("4669/20000", "4700/20000")
    (longer / "log.txt").write_text(text)
    assert read_logs.main([*map(str, ours[:2]), str(longer), "--ledger", str(tmp_path / "ledger.md")]) == 0
    rows = [
        re.split(r" *\| *", line)[1:-1] for line in (tmp_path / "ledger.md").read_text().splitlines() if line[:1] == "|"
    ]
    columns = dict(zip(rows[0], zip(*rows[2:], strict=True), strict=True))
    assert columns["run"] == ("longer", "run0", "run42")
    assert columns["changed"] == ("EMBED_BITS=7 TTT_K_LORA=0",) * 3
    assert columns["hardware"] == ("8 x NVIDIA H100 80GB HBM3",) * 3
    assert columns["against"] == ("-", "-", "+1.30 mb to 2 (after TTT)")
    assert columns["after TTT"] == ("1.05610", "1.06480", "1.06610")


def test_a_ledger_row_is_compared_with_the_run_that_it_adds_settings_to(tmp_path: Path) -> None:
    """In a record folder that is its nearest baseline there, wherever it stands, and never one of other weights."""
    earlier = [our_run(tmp_path / "seed7", 7, 0.004), our_run(tmp_path / "seed42", 42, 0.005)]
    scored, other = " EVAL_ONLY_ARTIFACT=runs/a.ptz", " EVAL_ONLY_ARTIFACT=runs/b.ptz"
    rows = {  # seed, score, settings; and what its row says
        "a_more": (42, -0.002, " GATE=1 TRAIN_LOG_EVERY=7", "-2.00 mb to 5 (after TTT)"),
        "a_most": (42, -0.003, " GATE=1 TAPER=0.5", "-1.00 mb to 3 (after TTT)"),
        "base": (42, 0.0, "", "-5.00 mb to 2 (after TTT)"),
        "other_seed": (7, 0.01, " GATE=1", "+6.00 mb to 1 (after TTT)"),
        "scored": (42, 0.02, scored, "+15.00 mb to 2 (after TTT)"),
        "scored_more": (42, 0.021, scored + " CHUNK=24", "+1.00 mb to 7 (after TTT)"),
        "scored_other": (42, 0.06, other + " CHUNK=24", "+55.00 mb to 2 (after TTT)"),
    }
    for name, (seed, shift, knobs, _) in rows.items():
        text = (our_run(tmp_path / name, seed, shift) / "log.txt").read_text()
        lines = text.replace("TTT_K_LORA=False", f"TTT_K_LORA=False{knobs}").splitlines()
        write(tmp_path / "record" / f"log_{name}.txt", lines)
    runs = read_logs.read_all([*earlier, tmp_path / "record"])
    assert [read_logs.against(run, runs) for run in runs[2:]] == [said for *_, said in rows.values()]


def test_a_ledger_row_of_unknown_steps_or_with_no_common_stage_is_compared_with_none(ours: list[Path]) -> None:
    base, short, later = read_logs.read_all(ours)
    for run in (base, short, later):
        run.seed, run.log = 42, Path("record") / f"log_{run.name}.txt"
    base.changed, short.changed, later.changed = {}, {}, {"EMBED_BITS": "8"}
    later.steps = None
    assert read_logs.compared_with(later, [base, short, later]) is not None
    short.steps = 300
    assert read_logs.compared_with(later, [base, short, later]) is None
    base.bpb_float = base.bpb_quantized = base.bpb_ttt = None
    assert read_logs.compared_with(later, [base, later]) is None


# ---- The public log --------------------------------------------------------------------------------------------------

needs_public_log = pytest.mark.skipif(not PUBLIC_LOG.exists(), reason="the public log is not beside this checkout")


@needs_public_log
def test_golden_tables_of_the_public_log() -> None:
    tables = report(read(PUBLIC_LOG))
    name = "public_1736_seed42"
    assert tables["Scores"].rows[1] == [name, "42", "4,854", "1.06907", "1.07847", "1.06610", "9.4", "12.4", "complete"]
    assert tables["Speed"].rows[1] == [
        name, "2,141", "97.5", "142.8", "8,067,379", "5,505,538", "596.2", "3.5", "-", "396.9", "40,032",
    ]  # fmt: skip
    assert tables["Size and budgets"].rows[1] == [name, "15,950,809", "28,025", "15,978,834", "21,166", "pass"]
    assert [row[1:] for row in tables["What to know"].rows[1:]] == [
        ["remark", "the last 1,823 validation tokens are not scored (0.004 %)"],
        [
            "remark",
            "the base model learned from 666 of 1104, 1333 of 1808, 2000 of 2448 scored documents, the shortest",
        ],
    ]


@needs_public_log
def test_golden_schedule_and_batches_of_the_public_log() -> None:
    run = read(PUBLIC_LOG)
    assert [(e["event"], e["step"]) for e in read_logs.schedules(run)["events"]] == [
        ("momentum at its plateau", 1500), ("warmdown starts", 1530), ("loop on", 2141), ("end", 4854),
    ]  # fmt: skip
    assert len(run.ttt) == 98
    assert run.ttt[1] == read_logs.Batch(2.8530, 1.1876, 27, 83, 1.0738)
    assert run.bytes_per_token == pytest.approx(3.15715, rel=1e-5)
    assert (run.val_documents, run.prefix_documents, run.train_seconds) == (50_000, 2000, 596.176)


@needs_public_log
def test_a_public_record_is_checked_against_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(PUBLIC_LOG, tmp_path / "train_seed42.log")
    result = {"val_loss": 2.33302, "val_bpb": 1.06610, "artifact_bytes": 15_978_834, "steps": 4854}
    stated = {"val_bpb": 1.0661, "val_loss": 2.33302, "seeds": [42], "seed_results": {"42": result}}
    (tmp_path / "submission.json").write_text(json.dumps(stated))
    write(tmp_path / "README.md", ["| 42 | 4854 | 1.06907 | 1.07847 | 1.06610 | 15,978,834 |"])
    assert read_logs.main(["--check", str(tmp_path)]) == 0
    stated["seed_results"]["42"]["val_bpb"] = 1.06549
    (tmp_path / "submission.json").write_text(json.dumps(stated))
    capsys.readouterr()
    assert read_logs.main(["--check", str(tmp_path)]) == 1
    assert (
        capsys.readouterr().out == "submission.json: seed_results: 42: val_bpb says 1.06549, the logs give 1.06610085\n"
    )
