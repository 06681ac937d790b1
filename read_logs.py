"""Run logs in, Markdown tables and plots out.

    python read_logs.py RUN_DIR_OR_LOG... [--out PNG]    one table row per run; a plot for each run folder
    python read_logs.py --result RUN_DIR                 the result of one run as a block for a README

A run folder is what train_gpt.py writes: log.txt, metrics.jsonl and run.json. A log is a text file with the result
lines that every script of this family prints, so public logs read the same way. What a killed run did not reach is
missing here too: "-" in a table, an empty panel in a plot. Nothing of this project is imported.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

# ---- Runs ------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The figures of one run, each None until a line gives it. Times in seconds, sizes in bytes, losses in nats."""

    name: str
    seed: int | None = None
    steps: int | None = None
    loop_step: int | None = None  # steps done when the loop came on
    train_batch_tokens: int | None = None  # tokens of one optimizer step over all ranks
    bpb_float: float | None = None  # averaged weights, before quantization
    bpb_quantized: float | None = None
    bpb_ttt: float | None = None
    artifact_bytes: int | None = None
    code_bytes: int | None = None
    total_bytes: int | None = None
    train_seconds: float | None = None
    ttt_seconds: float | None = None
    loss: dict[int, float] = field(default_factory=dict)  # step -> training loss
    clock: dict[int, tuple[float, float]] = field(default_factory=dict)  # step -> (training seconds, tokens so far)
    ttt: dict[int, tuple[float, float, float]] = field(default_factory=dict)  # batch, as scored -> tokens, nats, bytes
    stages: dict[str, float] = field(default_factory=dict)  # stage -> seconds

    def rate(self, looped: bool) -> float | None:
        """Median training tokens per second over the intervals wholly before, or wholly after, the loop came on.

        Steps 1 to 4 are logged one by one and only show how a run starts: they count when there is nothing else.
        """
        onset = math.inf if self.loop_step is None else self.loop_step
        steps = [step for step in sorted(self.clock) if (step >= onset if looped else step <= onset)]
        settled = [step for step in steps if step >= 5]
        points = [self.clock[step] for step in (settled if len(settled) > 1 else steps)]
        rates = [(n1 - n0) / (t1 - t0) for (t0, n0), (t1, n1) in zip(points, points[1:], strict=False) if t1 > t0]
        return statistics.median(rates) if rates else None


FIGURES = {item.name for item in fields(Run) if item.default is None}

# ---- Reading ---------------------------------------------------------------------------------------------------------

INT, NUM = r"(\d+)", r"(\S+)"

# Public result lines -> the fields that their groups fill, in order. A field in ms becomes one in seconds.
RESULT_LINES: dict[str, tuple[str, ...]] = {
    rf"  seed: {INT}": ("seed",),
    rf"  train_batch_tokens: {INT}": ("train_batch_tokens",),
    rf"{INT}/\d+ (?:train|val)_loss: ": ("steps",),
    rf"layer_loop:enabled step:{INT} ": ("loop_step",),
    rf"stopping_early: \w+ train_time: {INT}ms step: {INT}/": ("train_ms", "steps"),
    rf"diagnostic pre-quantization post-ema val_loss:\S+ val_bpb:{NUM}": ("bpb_float",),
    rf"diagnostic quantized val_loss:\S+ val_bpb:{NUM}": ("bpb_quantized",),
    rf"quantized_ttt_phased val_loss:\S+ val_bpb:{NUM} eval_time:{INT}ms": ("bpb_ttt", "ttt_ms"),
    rf"Code size \(compressed\): {INT} bytes": ("code_bytes",),
    rf"Serialized model quantized\+\w+: {INT} bytes": ("artifact_bytes",),
    rf"Total submission size quantized\+\w+: {INT} bytes": ("total_bytes",),
}
TRAIN_LINE = re.compile(rf"^{INT}/\d+ train_loss: {NUM} train_time: {NUM}m tok/s: {NUM}$", re.M)


def read_log(run: Run, text: str) -> None:
    """Fill `run` from a log with the public result lines. The last line of a kind wins, as a resumed run needs it."""
    for pattern, names in RESULT_LINES.items():
        for match in re.finditer("^" + pattern, text, re.M):
            for name, digits in zip(names, match.groups(), strict=True):
                value = int(digits) if digits.isdigit() else float(digits)
                setattr(run, name.replace("_ms", "_seconds"), value / 1000 if name.endswith("_ms") else value)


def read_train_lines(run: Run, text: str) -> None:
    """The curves of a log without metrics.jsonl. The rate is cumulative and exact; the minutes are rounded to 6 s."""
    for step, loss, minutes, rate in TRAIN_LINE.findall(text):
        run.loss[int(step)] = float(loss)
        tokens = int(step) * run.train_batch_tokens if run.train_batch_tokens else float(minutes) * 60 * float(rate)
        if float(rate) > 0:
            run.clock[int(step)] = (tokens / float(rate), tokens)


def add_row(run: Run, row: Any) -> None:
    """Fill `run` from one line of metrics.jsonl; of a step or batch that was done twice, the later line counts."""
    match row:
        case {"kind": "train", "step": step, "loss": loss, "train_s": seconds, "tokens": tokens}:
            run.steps, run.train_seconds = max(step, run.steps or 0), max(seconds, run.train_seconds or 0.0)
            run.loss[step], run.clock[step] = loss, (seconds, tokens)
            if row.get("looped") and run.loop_step is None:
                run.loop_step = step - 1
        case {"kind": "eval", "label": "pre-quantization post-ema" | "quantized" as label, "bpb": bpb}:
            setattr(run, "bpb_quantized" if label == "quantized" else "bpb_float", bpb)
        case {"kind": "ttt", "batch": batch, "tokens": tokens, "nats": nats, "bytes": size}:
            run.ttt.pop(batch, None)
            run.ttt[batch] = (tokens, nats, size)
        case {"kind": "stage", "name": name, "seconds": seconds} if not row.get("resumed"):
            run.stages[name] = seconds
        case {"kind": "result"}:
            for name in (name for name in FIGURES & row.keys() if row[name] is not None):
                setattr(run, name, row[name])


def text_of(path: Path) -> str:
    """The text of a file, empty where there is none: a killed run lacks some of its files."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def read_run(path: Path) -> Run:
    """Read a run folder or one log file. FileNotFoundError when there is nothing to read."""
    log, metrics = (path / "log.txt", path / "metrics.jsonl") if path.is_dir() else (path, path / "none")
    if not log.exists() and not metrics.exists():
        raise FileNotFoundError(f"{path} is neither a log nor a folder with log.txt or metrics.jsonl")
    run = Run(path.resolve().name if path.is_dir() else path.stem)
    if seed := re.search(r'"seed": *(\d+)', text_of(path / "run.json"), re.IGNORECASE):
        run.seed = int(seed[1])
    read_log(run, text_of(log))
    for number, line in enumerate(text_of(metrics).splitlines(), start=1):
        try:
            add_row(run, json.loads(line))
        except json.JSONDecodeError:  # the line that a kill cut short
            print(f"read_logs: {metrics}:{number} is not JSON, skipped", file=sys.stderr)
    if not run.clock:
        read_train_lines(run, text_of(log))
    return run


# ---- Tables ----------------------------------------------------------------------------------------------------------

# Heading, the figure of a run, its format.
COLUMNS: tuple[tuple[str, Callable[[Run], Any], str], ...] = (
    ("run", lambda run: run.name, ""),
    ("seed", lambda run: run.seed, "d"),
    ("steps", lambda run: run.steps, "d"),
    ("tok/s before loop", lambda run: run.rate(looped=False), ",.0f"),
    ("after loop", lambda run: run.rate(looped=True), ",.0f"),
    ("bpb float", lambda run: run.bpb_float, ".5f"),
    ("quantized", lambda run: run.bpb_quantized, ".5f"),
    ("after TTT", lambda run: run.bpb_ttt, ".5f"),
    ("artifact bytes", lambda run: run.artifact_bytes, ",d"),
    ("code bytes", lambda run: run.code_bytes, ",d"),
    ("total bytes", lambda run: run.total_bytes, ",d"),
    ("train s", lambda run: run.train_seconds, ".1f"),
    ("TTT s", lambda run: run.ttt_seconds, ".1f"),
)


def cells(run: Run) -> list[str]:
    """The figures of one run as text, in the order of COLUMNS."""
    return ["-" if (value := figure(run)) is None else format(value, spec) for _, figure, spec in COLUMNS]


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of text, the first of them the heading, as a Markdown table: first column left, the others right."""
    rule = ["---"] + ["--:"] * (len(rows[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def result_block(run: Run) -> str:
    """One run for a README: a known figure per line, then the seconds of its stages."""
    figures = [[heading, cell] for (heading, _, _), cell in zip(COLUMNS, cells(run), strict=True) if cell != "-"]
    return markdown_table(figures + [[f"stage {name} s", f"{seconds:.1f}"] for name, seconds in run.stages.items()])


# ---- Plot ------------------------------------------------------------------------------------------------------------


def draw_loss(axes: Any, run: Run) -> None:
    """Training loss over steps, with the step at which the loop came on."""
    axes.plot(sorted(run.loss), [run.loss[step] for step in sorted(run.loss)], linewidth=1.2)
    if run.loop_step is not None:
        axes.axvline(run.loop_step, color="gray", linestyle="--", linewidth=1, label=f"loop on, step {run.loop_step}")
        axes.legend(frameon=False)
    axes.set(title="training loss", xlabel="step", ylabel="nats per token")


def draw_stages(axes: Any, run: Run) -> None:
    """Bits per byte after each stage. The differences are small, so the axis is cut just under the smallest bar."""
    axes.set(title="bits per byte by stage", ylabel="bpb (axis cut)")
    stages = {"float": run.bpb_float, "quantized": run.bpb_quantized, "after TTT": run.bpb_ttt}
    known = {name: bpb for name, bpb in stages.items() if bpb is not None}
    if known:
        axes.bar_label(axes.bar(list(known), list(known.values()), width=0.6), fmt="%.5f", padding=2)
        margin = max(max(known.values()) - min(known.values()), 0.002 * max(known.values()))
        axes.set_ylim(min(known.values()) - margin, max(known.values()) + margin / 2)


def draw_ttt(axes: Any, run: Run) -> None:
    """Running bits per byte of test-time training over the tokens scored so far, in the order of scoring."""
    totals = list(accumulate(run.ttt.values(), lambda total, batch: tuple(map(sum, zip(total, batch, strict=True)))))
    axes.plot([tokens for tokens, _, _ in totals], [nats / (math.log(2) * size) for _, nats, size in totals], ".-")
    axes.set(title="test-time training", xlabel="tokens scored", ylabel="running bpb")


def plot(run: Run, path: Path) -> None:
    """Write the loss curve, the stages and the test-time training curve side by side to `path`."""
    from matplotlib.figure import Figure  # here, so that tables work where it is not installed

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    for axes, draw in zip(figure.subplots(1, 3), (draw_loss, draw_stages, draw_ttt), strict=True):
        draw(axes, run)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(run.name)
    figure.savefig(path, dpi=110)


# ---- Command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Print the table, or one result block, and write the plots; exits 2 where there is nothing to read."""
    parser = argparse.ArgumentParser(description="Tables and plots from run folders and logs.")
    parser.add_argument("paths", nargs="*", type=Path, metavar="RUN_DIR_OR_LOG")
    parser.add_argument("--out", type=Path, metavar="PNG", help="the plot of one run; default plot.png in its folder")
    parser.add_argument("--result", type=Path, metavar="RUN_DIR", help="print only the result block of this run")
    options = parser.parse_args(argv)
    paths = options.paths or [options.result]
    if bool(options.paths) == bool(options.result) or (options.out and len(paths) > 1):
        parser.error("give run folders or logs, or --result with one run; --out takes the plot of a single run")
    try:
        runs = [read_run(path) for path in paths]
    except OSError as error:
        parser.exit(2, f"read_logs: {error}\n")
    table = [[heading for heading, _, _ in COLUMNS], *map(cells, runs)]
    print(result_block(runs[0]) if options.result else markdown_table(table))
    for path, run in zip(options.paths, runs, strict=False):
        if target := options.out or (path / "plot.png" if path.is_dir() else None):
            plot(run, target)
            print(f"plot: {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
