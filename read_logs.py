"""Run logs in; tables, comparisons, pictures, a page to share and record folders out.

    python read_logs.py LOG...                            tables with one row per run, their mean and standard deviation
    python read_logs.py LOG... --against LOG...           paired and Welch tests, the leaderboard rules
    python read_logs.py LOG... --plots DIR                pictures; several runs share each of them
    python read_logs.py LOG... --html FILE --json FILE    all of it as one page, or as data
    python read_logs.py --result LOG                      the result of one run as a block for a README
    python read_logs.py LOG... --record DIR --name NAME   a record folder whose every figure comes from the logs
    python read_logs.py --check DIR                       every figure of a record folder that its logs do not give
    python read_logs.py DIR... --ledger FILE              the list of experiments, one row per run

LOG is a run folder (log.txt, metrics.jsonl, run.json), a record folder (log_*.txt and the like) or one text file with
the result lines that every script of this family prints: public logs read alike. Nothing of this project is imported.
Exit code 0: done; 1: --check found a figure that disagrees; 2: nothing to read, or not possible as asked for.

Contents: runs, reading, checks, tables, statistics, pictures, page, records, ledger, command line.
"""

import argparse
import base64
import contextlib
import html
import io
import itertools
import json
import math
import os
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SIZE_LIMIT = 16_000_000  # bytes of code and artifact
SECONDS_LIMIT = 600  # of training with calibration, and again of evaluation
RECORD_BATCH = 786_432  # tokens of a step


class LogError(ValueError):
    """What is wrong with the input and what to do about it, in one sentence."""


# ---- Runs ------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """One batch of test-time training. Batches are numbered by document length, 1 has the shortest documents."""

    loss: float  # nats per token
    bpb: float
    min_len: int  # tokens of its shortest and longest document
    max_len: int
    running: float | None = None  # bpb so far; in a public log that of one rank, over the batches which it took
    tokens: float | None = None  # the sums behind loss and bpb, where metrics.jsonl has them
    nats: float | None = None
    size: float | None = None


class Interval(NamedTuple):
    """What happened between two logged steps."""

    start: int
    end: int
    rate: float  # tokens/s
    looped: bool


@dataclass
class Run:
    """The figures of one run, each None until a line gives it. Times in seconds, sizes in bytes, losses in nats."""

    name: str
    log: Path
    metrics: Path
    info: Path
    seed: int | None = None
    steps: int | None = None
    iterations: int | None = None  # steps asked for; the clock may stop the run before
    loop_step: int | None = None  # steps done when the loop came on
    trained: bool = False
    loss_float: float | None = None  # averaged weights, before quantization
    bpb_float: float | None = None
    loss_quantized: float | None = None
    bpb_quantized: float | None = None
    loss_ttt: float | None = None
    bpb_ttt: float | None = None
    weights_bytes: int | None = None  # the float checkpoint
    source_bytes: int | None = None
    code_bytes: int | None = None
    artifact_bytes: int | None = None
    total_bytes: int | None = None
    train_seconds: float | None = None
    calibrate_seconds: float | None = None  # collecting the Hessians
    quantize_seconds: float | None = None
    ttt_seconds: float | None = None
    peak_memory_mib: int | None = None
    world: int | None = None  # processes, one per GPU
    device: str | None = None
    commit: str | None = None
    started: str | None = None
    model_params: int | None = None
    val_targets: int | None = None  # scored tokens
    val_bytes: int | None = None
    val_documents: int | None = None
    val_sha256: str | None = None
    prefix_documents: int | None = None
    ttt_batches: int | None = None
    hyper: dict[str, str] = field(default_factory=dict)  # every setting, as printed
    changed: dict[str, str] | None = None  # knobs that differ from the defaults, upper case
    loss: dict[int, float] = field(default_factory=dict)  # step -> training loss
    clock: dict[int, tuple[float, float]] = field(default_factory=dict)  # step -> (training seconds, tokens so far)
    validations: dict[int, tuple[float, float]] = field(default_factory=dict)  # step -> (loss, bpb)
    ttt: dict[int, Batch] = field(default_factory=dict)  # in the order of scoring
    documents: dict[str, dict[int, float]] = field(default_factory=dict)  # stage -> document -> its nats
    learned: list[tuple[int, int]] = field(default_factory=list)  # per phase: documents scored, and learned from
    stages: dict[str, float] = field(default_factory=dict)  # stage -> seconds
    tensors: dict[str, float] = field(default_factory=dict)  # matrix -> its quantization error relative to its norm
    parts: dict[str, int] = field(default_factory=dict)  # section of the artifact, or its header -> compressed bytes
    refusals: list[str] = field(default_factory=list)  # why it could not start
    error: str | None = None  # the last exception or stop sentence

    @property
    def settings(self) -> dict[str, str]:
        """Every setting, or those that are not the defaults where that is all a log prints (what our console shows)."""
        return self.hyper or self.not_default

    @property
    def not_default(self) -> dict[str, str]:
        """`changed` under the names of `hyper`."""
        return {name.lower(): value for name, value in (self.changed or {}).items()}

    def knob(self, name: str) -> float | None:
        """A numeric setting, None where the log does not print it."""
        try:
            return float(self.settings[name])
        except (KeyError, ValueError):
            return None

    @property
    def batch_tokens(self) -> float | None:
        """Tokens of a step. None: a public log without its settings."""
        default = RECORD_BATCH if self.changed is not None and not self.hyper else None
        return self.knob("train_batch_tokens") or default

    def intervals(self) -> list[Interval]:
        """Rates between logged steps, those across the loop's onset left out.

        The logged rate is cumulative, so differences are taken, over 20 steps or a fifteenth of the run: the time of a
        single step on a GPU is when it was queued. Steps 1 to 4 only show how a run starts: they count when there is
        nothing else.
        """
        onset = math.inf if self.loop_step is None else self.loop_step
        steps = sorted(self.clock)
        settled = [step for step in steps if step >= 5]
        rows: list[Interval] = []
        width, start = min(20, len(steps) // 15), None
        for step in settled if len(settled) > 1 else steps:
            if start is None or start < onset < step:
                start = step
            elif step - start >= width or step == onset:
                (t0, n0), (t1, n1) = self.clock[start], self.clock[step]
                if t1 > t0:
                    rows.append(Interval(start, step, (n1 - n0) / (t1 - t0), start >= onset))
                start = step
        return rows

    def rate(self, looped: bool) -> float | None:
        """Median training tokens per second before, or after, the loop came on."""
        rates = [i.rate for i in self.intervals() if i.looped == looped]
        return statistics.median(rates) if rates else None

    def step_ms(self, looped: bool) -> float | None:
        """Median milliseconds per step before, or after, the loop came on."""
        rate, batch = self.rate(looped), self.batch_tokens
        if batch is None and self.clock:
            step, (_, tokens) = max(self.clock.items())
            batch = tokens / step
        return 1000 * batch / rate if rate and batch else None

    def dips(self) -> list[Interval]:
        """Intervals a tenth slower than the median of their part."""
        usual = {looped: self.rate(looped) for looped in (False, True)}
        return [i for i in self.intervals() if i.rate < 0.9 * usual[i.looped]]

    @property
    def bytes_per_token(self) -> float | None:
        """Of the last scored stage, by loss = bpb * ln 2 * bytes per token: the fingerprint of an accounting."""
        for loss, bpb in ((self.loss_ttt, self.bpb_ttt), (self.loss_quantized, self.bpb_quantized),
                          (self.loss_float, self.bpb_float), *reversed(self.validations.values())):  # fmt: skip
            if loss and bpb:
                return loss / (bpb * math.log(2))
        return None

    @property
    def partial(self) -> bool:
        """Whether test-time training was told to score only some documents."""
        return (self.knob("val_doc_fraction") or 1) < 1 or bool(self.settings.get("ttt_eval_batches"))

    @property
    def ends_quantized(self) -> bool:
        return self.settings.get("ttt_enabled") == "False"

    @property
    def began(self) -> bool:
        return any((self.hyper, self.val_targets, self.steps, self.bpb_float, self.bpb_quantized, self.bpb_ttt))

    @property
    def complete(self) -> bool:
        return (self.bpb_quantized if self.ends_quantized else self.bpb_ttt) is not None

    @property
    def state(self) -> str:
        """`complete`, or the stage that a run without a score has reached."""
        if self.complete:
            return "complete, without TTT" if self.ends_quantized else "complete"
        if not self.began:
            return "did not start"
        of = f" of {self.iterations}" if self.iterations else ""
        ttt = f"TTT, {len(self.ttt)} of {self.ttt_batches or '?'} batches"
        reached = {
            ttt: self.ttt or self.prefix_documents is not None,
            "quantized score": self.bpb_quantized,
            "packing": self.total_bytes,
            "calibration": self.calibrate_seconds,
            "float score": self.bpb_float,
            "end of training": self.trained,
            f"training, step {self.steps}{of}": self.steps,
        }
        return "reached " + next((stage for stage, there in reached.items() if there), "set-up")


# ---- Reading ---------------------------------------------------------------------------------------------------------

INT, NUM = r"(\d+)", r"(\d+(?:\.\d+)?(?:e-?\d+)?)"

# A word that a line must hold -> what to search in it, and the fields that the groups fill; `_ms` becomes seconds.
# Lines are searched, not matched from their start: ranks, launchers and warnings write in front of one another.
RESULT_LINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "layer_loop:enabled": (rf"step:{INT} frac", ("loop_step",)),
    "stopping_early:": (rf"train_time: {INT}ms step: {INT}/{INT}", ("train_ms", "steps", "iterations")),
    "post-ema val_loss": (rf"val_loss:{NUM} val_bpb:{NUM}", ("loss_float", "bpb_float")),
    "diagnostic quantized": (rf"val_loss:{NUM} val_bpb:{NUM}", ("loss_quantized", "bpb_quantized")),
    "quantized_ttt_phased": (rf"val_loss:{NUM} val_bpb:{NUM} eval_time:{INT}ms", ("loss_ttt", "bpb_ttt", "ttt_ms")),
    "Serialized model:": (rf": {INT} bytes", ("weights_bytes",)),
    "Code size (uncompressed)": (rf": {INT} bytes", ("source_bytes",)),
    "Code size (compressed)": (rf": {INT} bytes", ("code_bytes",)),
    "Serialized model quantized": (rf"\+\w+: {INT} bytes", ("artifact_bytes",)),
    "Total submission size": (rf"\+\w+: {INT} bytes", ("total_bytes",)),
    "GPTQ:collected": (rf"Hessians in {NUM}s", ("calibrate_seconds",)),
    "stage quantize:": (rf": {NUM}s", ("quantize_seconds",)),
    "peak memory": (rf"peak memory (?:allocated: )?{INT} MiB", ("peak_memory_mib",)),
    "model_params:": (rf"params:{INT}", ("model_params",)),
    "val_tokens:": (rf": {INT}", ("val_targets",)),
    "val data: sha256": (rf"sha256 (\w+) documents {INT} bytes {INT}", ("val_sha256", "val_documents", "val_bytes")),
    "ttt_phased: total_docs": (rf"docs:{INT} prefix_docs:{INT}", ("val_documents", "prefix_documents")),
    "seed ": (rf"^seed {INT}, ", ("seed",)),
    " commit ": (rf"^run \S+ on {INT} x (.+), torch\.\w+, commit (\w+), ", ("world", "device", "commit")),
}
SEARCHES = {word: (re.compile(pattern), names) for word, (pattern, names) in RESULT_LINES.items()}
TRAIN_LINE = re.compile(rf"(?<!\d){INT}/{INT} train_loss: {NUM} train_time: {NUM}m tok/s: {INT}")
VAL_LINE = re.compile(rf"(?<!\d){INT}/{INT} val_loss: {NUM} val_bpb: {NUM}")
TTT_LINE = re.compile(rf"ttp: b{INT}/{INT} bl:{NUM} bb:{NUM} rl:{NUM} rb:{NUM} dl:{INT}-{INT} gd:[01]")
STAGE_LINE = re.compile(rf"^stage ([\w ]+): {NUM}s$")
LEARNED_LINE = re.compile(rf"ttpp: phase:\d+/\d+ pd:{INT} gd:{INT} ")
HYPER_LINE = re.compile(r"^  (\w+): (.*)$")
KNOB = re.compile(r"([A-Z][A-Z0-9_]+)=(.*?)(?= [A-Z][A-Z0-9_]+=|$)")
FAILURE = re.compile(r"^(?:\[rank\d+\]: ?)?((?:[\w.]+(?:Error|Exception|Interrupt)\b|stopped by ).*)")


def number_of(text: str) -> int | float | str:
    """Digits as a number; hexadecimal and words stay text."""
    if re.fullmatch(NUM, text):
        return int(text) if text.isdigit() else float(text)
    return text


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a log without their ends. LogError for what is not text.

    A last line without line end that stops at a digit is dropped: a kill may have cut its number short.
    """
    with path.open("rb") as file:
        if b"\0" in file.read(4096):
            raise LogError(f"{path} is not a UTF-8 text file: give a log, or convert it (iconv -f UTF-16 -t UTF-8)")
    with path.open(encoding="utf-8", errors="replace") as file:  # universal newlines: CRLF, and progress bars with CR
        for line in file:
            if line.endswith("\n") or not line[-1:].isdigit():
                yield line.rstrip("\n")


def read_log(run: Run, lines: Iterable[str]) -> None:
    """Fill `run` from result lines, the last of a kind wins. Curves go to `loss`, `clock` holds cumulative rates."""
    in_settings = in_refusal = False
    for line in lines:
        if in_settings and (match := HYPER_LINE.match(line)):
            run.hyper[match[1]] = match[2].strip()
        elif in_refusal and line.startswith("  - "):
            run.refusals.append(line[4:])
        else:
            in_refusal = line == "cannot start:"
            in_settings = line.endswith("Hyperparameters:") or (in_settings and "train_shards:" not in line)
            read_result_line(run, line)


def read_result_line(run: Run, line: str) -> None:
    """One line, if it is of a known kind."""
    if "_loss: " in line:
        read_step_line(run, line)
    elif "ttp: b" in line and (match := TTT_LINE.search(line)):
        batch, run.ttt_batches, *figures = map(number_of, match.groups())
        loss, bpb, _, running, shortest, longest = figures
        add_batch(run, batch, Batch(loss, bpb, shortest, longest, running))
    elif "tttg: c" in line:
        return  # two thirds of a public log
    elif "ttpp: " in line and (match := LEARNED_LINE.search(line)):
        run.learned.append((int(match[1]), int(match[2])))
    elif line.startswith("changed knobs: "):
        run.changed = dict(KNOB.findall(line))
    elif line == "ema:applying EMA weights":
        run.trained = True
    elif match := FAILURE.match(line):
        run.error = match[1]
    else:
        read_figures(run, line)


def read_figures(run: Run, line: str) -> None:
    """The lines of RESULT_LINES, and the seconds of a stage."""
    if match := STAGE_LINE.match(line):
        run.stages[match[1]] = float(match[2])
    for word, (pattern, names) in SEARCHES.items():
        if word in line and (match := pattern.search(line)):
            for name, value in zip(names, map(number_of, match.groups()), strict=True):
                setattr(run, name.replace("_ms", "_seconds"), value / 1000 if name.endswith("_ms") else value)


def read_step_line(run: Run, line: str) -> None:
    """A training or validation loss. The rate is cumulative and exact; the minutes are rounded to 6 s."""
    if match := TRAIN_LINE.search(line):
        step, run.iterations, rate = int(match[1]), int(match[2]), int(match[5])
        if step == 1:  # a run that started over in the same file
            forget_steps(run)
            run.loop_step = None
        batch = run.batch_tokens
        tokens = step * batch if batch else float(match[4]) * 60 * rate
        run.loss[step], run.steps = float(match[3]), step
        if rate > 0 and tokens > 0:
            run.clock[step] = (tokens / rate, tokens)
    elif match := VAL_LINE.search(line):
        step, run.iterations, loss, bpb = map(number_of, match.groups())
        run.validations[step] = (float(loss), float(bpb))
        run.steps = max(step, run.steps or 0)


def forget_steps(run: Run) -> None:
    """Drop the steps of an earlier attempt, or the log's where metrics.jsonl has them all."""
    run.loss.clear()
    run.clock.clear()


def add_batch(run: Run, number: int, batch: Batch) -> None:
    """A batch that was scored twice, by a repeated stage, counts where it was scored last."""
    run.ttt.pop(number, None)
    run.ttt[number] = batch


RESULT_KEYS = {"seed", "world", "steps", "bpb_float", "bpb_quantized", "bpb_ttt", "artifact_bytes", "code_bytes",
               "total_bytes", "train_seconds", "calibrate_seconds", "quantize_seconds", "ttt_seconds",
               "peak_memory_mib"}  # fmt: skip


def add_score(run: Run, label: str, loss: float, bpb: float) -> None:
    if label.startswith("step "):
        run.validations[int(label.removeprefix("step "))] = (loss, bpb)
    else:
        stage = "quantized" if label == "quantized" else "float"
        setattr(run, f"loss_{stage}", loss)
        setattr(run, f"bpb_{stage}", bpb)


def add_row(run: Run, row: Any) -> None:
    """Fill `run` from one line of metrics.jsonl, which has more digits, and every step, where the log has some."""
    match row:
        case {"kind": "train", "step": step, "loss": loss, "train_s": seconds, "tokens": tokens}:
            if step == 1:
                forget_steps(run)
            run.loss[step], run.clock[step], run.steps, run.train_seconds = loss, (seconds, tokens), step, seconds
            if row.get("looped") and run.loop_step is None:
                run.loop_step = step - 1
        case {"kind": "eval", "label": str(label), "loss": loss, "bpb": bpb}:
            add_score(run, label, loss, bpb)
        case {"kind": "ttt", "batch": number, "tokens": tokens, "nats": nats, "bytes": size}:
            lengths = row.get("min_len", 0), row.get("max_len", 0)
            add_batch(run, number, Batch(nats / tokens, nats / size / math.log(2), *lengths, None, tokens, nats, size))
            run.documents.setdefault("ttt", {}).update(row.get("documents", []))
        case {"kind": "documents", "label": label, "nats": nats}:
            run.documents["quantized" if label == "quantized" else "float"] = dict(enumerate(nats))
        case {"kind": "stage", "name": name, "seconds": seconds} if not row.get("resumed"):
            run.stages[name] = seconds
        case {"kind": "quantization", "rows": rows}:
            run.tensors = {name: error for name, _, error in rows}
        case {"kind": "sections", "bytes": parts, "code": code}:
            run.parts, run.code_bytes = parts, code
        case {"kind": "result"}:
            for name in (name for name in RESULT_KEYS & row.keys() if row[name] is not None):
                setattr(run, name, row[name])


def read_metrics(run: Run) -> None:
    """Every line of metrics.jsonl; one that a kill cut short is skipped with a note on standard error."""
    for number, line in enumerate(lines_of(run.metrics), start=1):
        try:
            add_row(run, json.loads(line))
        except json.JSONDecodeError:
            print(f"read_logs: {run.metrics}:{number} is not JSON, skipped", file=sys.stderr)


def read_info(run: Run) -> None:
    """run.json: settings, hardware, commit and fingerprint of the validation set."""
    try:
        info = json.loads(run.info.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise LogError(f"{run.info} is not JSON ({error}): copy it again, or read without it") from None
    run.hyper |= {name.lower(): str(value) for name, value in info.get("config", {}).items()}
    if "changed" in info:
        run.changed = {name.upper(): str(value) for name, value in info["changed"].items()}
    facts = info | info.get("data", {})
    for name in ("device", "world", "started", "commit", "val_sha256", "val_bytes", "val_targets", "val_documents"):
        setattr(run, name, facts.get(name) or getattr(run, name))


def read_run(name: str, log: Path, metrics: Path, info: Path) -> Run:
    """All that the files of one run say, those that exist."""
    run = Run(name, log, metrics, info)
    if log.is_file():
        read_log(run, lines_of(log))
    if info.is_file():
        read_info(run)
    if metrics.is_file():
        read_metrics(run)
    if run.seed is None and (run.knob("seed") is not None or (match := re.search(r"(?:seed|_s)(\d+)", name))):
        run.seed = int(run.settings["seed"] if "seed" in run.settings else match[1])
    if run.train_seconds is None and run.clock:
        run.train_seconds = max(run.clock.values())[0]
    return run


def log_files(folder: Path) -> list[Path]:
    """The logs of a record folder."""
    found = {*folder.glob("*.txt"), *folder.glob("*.log")}
    return sorted(path for path in found if not path.name.startswith("requirements"))


def file_run(log: Path) -> Run:
    """A log, with metrics and run file of the same suffix beside it. A name as plain as log_seed42 gets its folder."""
    suffix = re.sub(r"^log_?", "", log.stem)
    plain = log.stem.startswith("log") or re.fullmatch(r"(train_?)?seed_?\d+", log.stem)
    name = f"{log.resolve().parent.name}/{suffix or log.stem}" if plain else log.stem
    return read_run(name, log, log.with_name(f"metrics_{suffix}.jsonl"), log.with_name(f"run_{suffix}.json"))


def read_runs(path: Path) -> list[Run]:
    """The runs of a run folder, of a record folder, of a folder of such folders, or of one log. LogError if none."""
    if not path.exists():
        raise LogError(f"{path} does not exist: give a run folder, a record folder or a log")
    if path.is_file():
        run = file_run(path)
        if not (run.began or run.refusals or run.ttt):
            raise LogError(f"{path} holds no line of a training log: give a log, or the folder of a run")
        return [run]
    log, metrics = path / "log.txt", path / "metrics.jsonl"
    if log.exists() or metrics.exists():
        return [read_run(path.resolve().name, log, metrics, path / "run.json")]
    runs = [run for run in map(file_run, log_files(path)) if run.began or run.refusals]
    for child in [] if runs else filter(Path.is_dir, sorted(path.iterdir())):
        with contextlib.suppress(LogError):  # a folder of other things
            runs += read_runs(child)
    if not runs:
        raise LogError(f"{path} holds no run: give a folder with log.txt or log_*.txt, or the log itself")
    return runs


def read_all(paths: Sequence[Path]) -> list[Run]:
    """The runs of all paths. Files that are no logs, as in `records/*`, are skipped with a note beside others."""
    runs, troubles = [], []
    for path in paths:
        try:
            runs += read_runs(path)
        except LogError as error:
            if not path.exists():
                raise
            troubles.append(f"{error}")
    if not runs:
        raise LogError("; ".join(troubles))
    for trouble in troubles:
        print(f"read_logs: skipped: {trouble}", file=sys.stderr)
    return runs


# ---- Checks ----------------------------------------------------------------------------------------------------------

# The competition's validation set, 50,000 documents of 151,074,499 bytes: as CaseOps tokens with the tail that whole
# sequences leave out, without it, and as plain tokens of the same vocabulary.
CASEOPS_TARGETS, CASEOPS_TARGETS_CUT, PLAIN_TARGETS = 47_853_343, 47_851_520, 40_540_160
CASEOPS_RATIO, PLAIN_RATIO = 3.15715, 3.7266  # bytes per token of the two
SENTINELS_COUNTED = 1.0895  # bytes where case markers count three each, over the true bytes
# Training losses every 500 steps on the canonical shards: the batches are the same text in every run of this family.
CANONICAL_LOSSES = (2.586, 2.815, 2.643, 2.674, 2.560, 2.568, 2.569, 2.410, 2.281)
SEED_SD = 0.00074  # standard deviation of the score over ten public seeds of the record system, bpb


def near(value: float | None, target: float, relative: float) -> bool:
    return value is not None and abs(value / target - 1) < relative


class Gate(NamedTuple):
    """One budget of the competition."""

    label: str
    used: float | None
    limit: float

    @property
    def excess(self) -> str | None:
        """What is over the limit, in figures."""
        if self.used is None or self.used <= self.limit:
            return None
        return f"{self.label} {self.used:{',d' if isinstance(self.used, int) else ',.1f'}} > {self.limit:,}"


def gates(run: Run) -> list[Gate]:
    """The budgets. Calibration reads training text, so its seconds belong to training, if that has a limit at all."""
    timed = run.train_seconds is not None and run.knob("max_wallclock_seconds") != 0
    training = run.train_seconds + (run.calibrate_seconds or 0) if timed else None
    return [
        Gate("bytes", run.total_bytes, SIZE_LIMIT),
        Gate("train s", training, SECONDS_LIMIT),
        Gate("eval s", run.ttt_seconds, SECONDS_LIMIT),
    ]


def gate_text(run: Run) -> str:
    """`pass`, or every budget that is exceeded, with its figures; budgets that the run has not reached are left out."""
    known = [gate for gate in gates(run) if gate.used is not None]
    over = [gate.excess for gate in known if gate.excess]
    return "FAIL: " + ", ".join(over) if over else "pass" if known else "-"


def accounting_errors(run: Run) -> Iterator[str]:
    """The known ways in which tokens and bytes were miscounted, each by what it leaves in a log."""
    targets, ratio = run.val_targets, run.bytes_per_token
    full = near(targets, CASEOPS_TARGETS, 1e-4)
    if targets == 9_662_464:
        yield "9,662,464 validation tokens are those of 10,000 documents, not of 50,000: no score of the competition"
    if near(targets, 36_560_000, 1e-3):
        yield "36.56 M validation tokens: preparation in parallel slices cut the validation set"
    if full and near(ratio, CASEOPS_RATIO * SENTINELS_COUNTED, 1e-3):
        yield f"{ratio:.4f} bytes per token: case markers count as text; the true bpb is {SENTINELS_COUNTED} times this"
    if near(targets, PLAIN_TARGETS, 1e-3) and ratio and 1.16 < ratio / PLAIN_RATIO < 1.18:
        yield f"{ratio:.4f} bytes per token instead of {PLAIN_RATIO}: the byte table counts leading spaces twice"
    if run.val_bytes and targets and ratio and not run.partial and not near(ratio, run.val_bytes / targets, 3e-4):
        yield (f"the score divides by {ratio:.4f} bytes per token, the validation set has "
               f"{run.val_bytes / targets:.4f}: another byte count than the sidecar's")  # fmt: skip
    scored = sum(batch.tokens or 0 for batch in run.ttt.values())
    if run.complete and scored and targets and not run.partial and scored != targets:
        yield f"test-time training scored {scored:,.0f} of {targets:,} tokens"
    if run.partial and run.complete:
        yield "test-time training scored only a part of the documents: no score of the whole set"


def training_errors(run: Run) -> Iterator[str]:
    """Other training text than the competition's, in runs on its validation set."""
    if run.seed == 42 and run.loss.get(1) is not None and round(run.loss[1], 4) == 9.0073:
        yield "the first loss is 9.0073: shards of a preparation that puts 40,000 validation documents into training"
    known = {500 * i: loss for i, loss in enumerate(CANONICAL_LOSSES, 1) if 500 * i in run.loss}
    canonical = near(run.val_targets, CASEOPS_TARGETS, 1e-4) and run.batch_tokens == RECORD_BATCH
    if canonical and len(known) >= 3:
        off = statistics.fmean(abs(run.loss[step] - loss) for step, loss in known.items())
        if off > 0.03:
            yield (f"training losses every 500 steps are {off:.3f} off those of the canonical shards (noise 0.004): "
                   "other training text, maybe with validation documents in it")  # fmt: skip


def stage_errors(run: Run) -> Iterator[str]:
    """Stages that disagree with one another more than they can when all is well."""
    last = max(run.validations) if run.validations else None
    raw = run.validations[last][1] if last and last == run.steps else None
    if raw and run.bpb_float and run.bpb_float > raw + 0.05:
        yield f"float {run.bpb_float:.4f} bpb against {raw:.4f} at the last step: loop off there, or a bad average"
    if run.bpb_float and run.bpb_quantized and run.bpb_quantized > run.bpb_float + 0.1:
        cost = run.bpb_quantized - run.bpb_float
        yield f"quantization costs {cost:.3f} bpb: the loop is on here and never was in training"
    if run.bpb_ttt and run.bpb_quantized:
        gain = run.bpb_quantized - run.bpb_ttt
        if gain < -0.01:
            yield f"test-time training loses {-gain:.3f} bpb: it diverged, or its forward misses a gate"
        if gain > 0.025 and near(run.val_targets, CASEOPS_TARGETS, 1e-4):
            yield f"test-time training gains {gain:.3f} bpb, legal ones 0.010 to 0.014: is it scored after learning?"
    if run.bpb_ttt and run.bpb_ttt < 1 and near(run.val_targets, CASEOPS_TARGETS, 1e-4):
        yield f"{run.bpb_ttt:.4f} bpb: below 1 only byte mixtures that are no distribution, or learning before scoring"


def packing_errors(run: Run) -> Iterator[str]:
    """Bytes that were not counted, and budgets."""
    if run.total_bytes and run.artifact_bytes and run.total_bytes == run.artifact_bytes:
        yield "the code counts as 0 bytes: the minifier was missing"
    elif run.total_bytes and run.artifact_bytes and run.total_bytes != run.artifact_bytes + (run.code_bytes or 0):
        yield f"the total of {run.total_bytes:,} bytes is not artifact plus code"
    if run.weights_bytes and run.model_params and run.weights_bytes < 2.5 * run.model_params:
        yield f"the checkpoint has {run.weights_bytes:,} bytes: weights rounded to 16 bits before quantization"
    yield from (f"over budget: {gate.excess}" for gate in gates(run) if gate.excess)


def errors(run: Run) -> list[str]:
    """Why the score of this run does not count or cannot be what it seems, a sentence each."""
    return [*accounting_errors(run), *training_errors(run), *stage_errors(run), *packing_errors(run)]


def remarks(run: Run) -> list[str]:
    """What a reader should know, though the score counts."""
    said = []
    if run.val_targets == CASEOPS_TARGETS_CUT:
        said.append(f"the last {CASEOPS_TARGETS - CASEOPS_TARGETS_CUT:,} validation tokens are not scored (0.004 %)")
    if any(used < scored for scored, used in run.learned):
        pairs = ", ".join(f"{used} of {scored}" for scored, used in run.learned)
        said.append(f"the base model learned from {pairs} scored documents, the shortest")
    if run.refusals and run.began:
        said.append(f"a later start was refused: {run.refusals[0]}")
    if dips := run.dips():
        said.append(f"{len(dips)} of {len(run.intervals())} intervals are more than 10 % slower than their median")
    return said


# What may differ between runs that count as one configuration.
LOCAL_SETTINGS = {"seed", "preset", "run_id", "run_dir", "artifact_dir", "from_stage", "resume", "checkpoint_every",
                  "save_pre_gptq", "eval_only_checkpoint", "eval_only_artifact", "hotstart_fp_ckpt", "data_dir",
                  "datasets_dir", "data_path", "tokenizer_path", "train_files", "val_files", "val_bytes_files",
                  "train_log_every", "logfile", "model_path", "quantized_model_path", "rank", "local_rank",
                  "is_main_process", "distributed"}  # fmt: skip


def settings_that_differ(runs: Sequence[Run]) -> list[str]:
    """Settings, with their values, in which runs differ; runs whose log does not print them cannot be told apart.

    Logs that print all settings are compared with each other, and if one prints only what is not the default, all that
    print that are, too. Test-time training that no run does may have any settings.
    """
    brief = any(run.changed is not None and not run.hyper for run in runs)
    full = [run.hyper for run in runs if run.hyper]
    changed = [run.not_default for run in runs if run.changed is not None] if brief else []
    idle = ("ttt_", "phased_ttt_", "global_ttt_") if all(run.ends_quantized for run in runs) else ()
    said: dict[str, str] = {}
    for known, absent in ((full, "(none)"), (changed, "(default)")):
        for name in sorted({name for settings in known for name in settings} - LOCAL_SETTINGS):
            values = list(dict.fromkeys(number_of(settings.get(name, absent)) for settings in known))
            if len(values) > 1 and not name.startswith(idle):
                said.setdefault(name, f"{name.upper()}: {' / '.join(map(str, values))}")
    return [said[name] for name in sorted(said)]


def same_text(a: Run, b: Run) -> bool:
    """Whether two validation sets hold the same text, maybe under different tokenizers."""
    counts = [(run.val_bytes, run.val_documents) for run in (a, b)]
    return counts[0] == counts[1] and None not in counts[0]


def validation_mismatch(a: Run, b: Run) -> str | None:
    """Why the scores of two runs are not of the same validation set; None where they may be compared."""
    if not (a.val_targets and b.val_targets):
        return f"the log of {(b if a.val_targets else a).name} does not say how many tokens it scored"
    length = min(len(a.val_sha256 or ""), len(b.val_sha256 or ""))  # logs print its first 16 digits
    if a.val_targets == b.val_targets and length and a.val_sha256[:length] != b.val_sha256[:length]:
        return f"fingerprints: {a.val_sha256[:16]} in {a.name}, {b.val_sha256[:16]} in {b.name}"
    if same_text(a, b):
        return None
    facts = (
        ("validation tokens", a.val_targets, b.val_targets, 1e-4),  # the tail that some leave out is 4e-5
        ("validation bytes", a.val_bytes, b.val_bytes, 1e-4),
        ("bytes per token", a.bytes_per_token, b.bytes_per_token, 3e-4),
    )
    for label, x, y, tolerance in facts:
        if x and y and not near(x, y, tolerance):
            return f"{label}: {x:,.10g} in {a.name}, {y:,.10g} in {b.name}"
    return None


def copied_logs(runs: Sequence[Run]) -> list[str]:
    """Logs that repeat one another: two seeds never give the same losses."""
    said = []
    for a, b in itertools.combinations(runs, 2):
        steps = sorted(set(a.loss) & set(b.loss))
        same = [step for step in steps if round(a.loss[step], 4) == round(b.loss[step], 4)]
        if len(steps) >= 3 and same == steps and a.bpb_ttt == b.bpb_ttt:
            said.append(f"{a.name} and {b.name} are one log twice (seeds {a.seed} and {b.seed})")
        elif len(steps) >= 3 and len(same) > len(steps) / 2 and a.seed != b.seed:
            share = f"{len(same)} of {len(steps)} losses under seeds {a.seed} and {b.seed}"
            said.append(f"{a.name} and {b.name} share {share}")
    return said


def no_common_mean(runs: Sequence[Run]) -> str | None:
    """Why averaging these runs would mix what does not belong together."""
    if copies := copied_logs(runs):
        return copies[0]
    for a, b in itertools.pairwise(runs):
        if trouble := validation_mismatch(a, b):
            return f"different validation sets ({trouble})"
    if len({(run.val_targets, run.val_sha256 and run.val_sha256[:16]) for run in runs}) > 1:
        return "different tokenizers"
    if differ := settings_that_differ(runs):
        return f"mixed configurations ({', '.join(differ[:3])}{', ...' if len(differ) > 3 else ''})"
    for a, b in itertools.combinations(runs, 2):
        scores = [run.bpb_quantized and round(run.bpb_quantized, 8) for run in (a, b)]  # a log's digits
        if scores[0] is not None and scores[0] == scores[1] and a.seed == b.seed:
            return f"{a.name} and {b.name} score one artifact with one seed"
    return None


# ---- Tables ----------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A heading, the figure of a run below it, its format, and whether it has a mean."""

    heading: str
    figure: Callable[[Run], Any]
    spec: str
    averaged: bool = True


class Table(NamedTuple):
    """Rows of text, the first of them the heading, with a title and a remark below."""

    title: str
    rows: list[list[str]]
    note: str = ""


def difference_mb(a: float | None, b: float | None) -> float | None:
    """a - b in thousandths of a bit per byte."""
    return None if a is None or b is None else 1000 * (a - b)


SCORES = (
    Column("run", lambda run: run.name, "", False),
    Column("seed", lambda run: run.seed, "d", False),
    Column("steps", lambda run: run.steps, ",d"),
    Column("float bpb", lambda run: run.bpb_float, ".5f"),
    Column("quantized", lambda run: run.bpb_quantized, ".5f"),
    Column("after TTT", lambda run: run.bpb_ttt, ".5f"),
    Column("quantization cost, mb", lambda run: difference_mb(run.bpb_quantized, run.bpb_float), ".1f"),
    Column("TTT gain, mb", lambda run: difference_mb(run.bpb_quantized, run.bpb_ttt), ".1f"),
    Column("state", lambda run: run.state, "", False),
)
SPEED = (
    SCORES[0],
    Column("loop on at step", lambda run: run.loop_step, ",d"),
    Column("ms/step before loop", lambda run: run.step_ms(looped=False), ".1f"),
    Column("after loop", lambda run: run.step_ms(looped=True), ".1f"),
    Column("tok/s before loop", lambda run: run.rate(looped=False), ",.0f"),
    Column("after loop", lambda run: run.rate(looped=True), ",.0f"),
    Column("train s", lambda run: run.train_seconds, ".1f"),
    Column("Hessians s", lambda run: run.calibrate_seconds, ".1f"),
    Column("GPTQ s", lambda run: run.quantize_seconds, ".1f"),
    Column("TTT s", lambda run: run.ttt_seconds, ".1f"),
    Column("peak MiB", lambda run: run.peak_memory_mib, ",d"),
)
SIZES = (
    SCORES[0],
    Column("artifact bytes", lambda run: run.artifact_bytes, ",d"),
    Column("code bytes", lambda run: run.code_bytes, ",d"),
    Column("total bytes", lambda run: run.total_bytes, ",d"),
    Column("headroom", lambda run: run.total_bytes and SIZE_LIMIT - run.total_bytes, ",d"),
    Column("budgets", gate_text, "", False),
)


def cell(value: Any, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def cells(run: Run, columns: Sequence[Column]) -> list[str]:
    """The figures of one run as text."""
    return [cell(column.figure(run), column.spec) for column in columns]


def statistic_row(label: str, of: Callable[..., float], runs: Sequence[Run], columns: Sequence[Column]) -> list[str]:
    """A row of means or deviations over the figures that every run has."""
    row = [label]
    for column in columns[1:]:
        values = [column.figure(run) for run in runs] if column.averaged else [None]
        spec = column.spec.replace("d", ".0f")
        row.append("" if None in values else cell(of(values), spec))
    return row


def run_table(title: str, runs: Sequence[Run], columns: Sequence[Column]) -> Table:
    """One row per run; mean and sample standard deviation of the complete ones, where those belong together."""
    rows = [[column.heading for column in columns], *(cells(run, columns) for run in runs)]
    complete = [run for run in runs if run.complete]
    if len(complete) < 2:
        return Table(title, rows)
    if trouble := no_common_mean(complete):
        return Table(title, rows, f"No mean: {trouble}." if columns is SCORES else "")
    label = f"of {len(complete)} complete runs" if len(complete) < len(runs) else f"of {len(runs)} runs"
    rows.append(statistic_row(f"mean {label}", statistics.fmean, complete, columns))
    rows.append(statistic_row("standard deviation", statistics.stdev, complete, columns))
    return Table(title, rows)


def remark_table(runs: Sequence[Run]) -> list[Table]:
    """Errors, remarks and refusals, where there are any."""
    rows = [[run.name, "ERROR", said] for run in runs for said in errors(run)]
    rows += [[run.name, "stopped", run.error] for run in runs if run.error and not run.complete]
    rows += [[run.name, "remark", said] for run in runs for said in remarks(run)]
    return [Table("What to know", [["run", "kind", "what"], *rows])] if rows else []


def refusal(run: Run) -> str:
    """Why a run did not start, in a sentence."""
    more = f" (and {len(run.refusals) - 1} more)" if len(run.refusals) > 1 else ""
    return run.refusals[0] + more if run.refusals else run.error or "its log holds no result line"


def run_tables(runs: Sequence[Run]) -> list[Table]:
    """The report on runs: scores, speed, size and budgets, what to know; those that never started on their own."""
    started, refused = ([run for run in runs if run.began == began] for began in (True, False))
    tables = []
    if started:
        for title, columns in (("Scores", SCORES), ("Speed", SPEED), ("Size and budgets", SIZES)):
            tables.append(run_table(title, started, columns))
        tables += remark_table(started)
    if refused:
        tables.append(Table("Did not start", [["run", "why"], *([run.name, refusal(run)] for run in refused)]))
    return tables


def markdown(table: Table) -> str:
    """A table with its title and note: text columns to the left, numbers to the right, padded to read as text too."""
    escaped = [[text.replace("|", "\\|") for text in row] for row in table.rows]
    widths = [max(3, *map(len, column)) for column in zip(*escaped, strict=True)]
    numeric = [is_numeric(column[1:]) for column in zip(*table.rows, strict=True)]
    sides = [str.rjust if right else str.ljust for right in numeric]
    pad = lambda row: [side(text, n) for side, text, n in zip(sides, row, widths, strict=True)]
    rule = ["-" * (n - 1) + (":" if right else "-") for n, right in zip(widths, numeric, strict=True)]
    lines = ["| " + " | ".join(row) + " |" for row in (pad(escaped[0]), rule, *map(pad, escaped[1:]))]
    parts = [f"### {table.title}\n"] if table.title else []
    return "\n".join([*parts, *lines, *([f"\n{table.note}"] if table.note else [])])


def is_numeric(column: Sequence[str]) -> bool:
    """Whether a column is of figures, dashes and blanks."""
    return any(text[-1:].isdigit() for text in column) and all(re.fullmatch(r"[-+\d.,e %<]*", text) for text in column)


def result_block(run: Run) -> str:
    """One run for a README: a known figure per line, then the seconds of its stages."""
    rows = [["", run.name]]
    for columns in (SCORES, SPEED, SIZES):
        for before, column in itertools.pairwise(columns):
            heading = column.heading
            if heading == "after loop":
                heading = before.heading.replace("before", "after")
            if (text := cell(column.figure(run), column.spec)) != "-":
                rows.append([heading, text])
    return markdown(Table("", rows + [[f"stage {name} s", f"{seconds:.1f}"] for name, seconds in run.stages.items()]))


# ---- Statistics ------------------------------------------------------------------------------------------------------

STAGES = (("float", "float"), ("quantized", "quantized"), ("after TTT", "ttt"))  # label, suffix of the fields
LEADERBOARD_RULES = (("better by 0.005 nats", 0.005, 0.01), ("better at all (later rule)", 0.0, 0.25))  # margin, p


def p_text(result: Any) -> str:
    """The p value of a scipy result; a dash where there is no result, or no spread."""
    if result is None or math.isnan(result.pvalue):
        return "-"
    return "< 0.0001" if result.pvalue < 1e-4 else f"{result.pvalue:.4f}"


def by_seed(runs: Sequence[Run], name: str) -> dict[int, float]:
    """The mean figure of each seed."""
    values: dict[int, list[float]] = {}
    for run in runs:
        if run.seed is not None and getattr(run, name) is not None:
            values.setdefault(run.seed, []).append(getattr(run, name))
    return {seed: statistics.fmean(figures) for seed, figures in values.items()}


def stage_row(new: Sequence[Run], base: Sequence[Run], label: str, name: str) -> list[str] | None:
    """Difference of the means with Welch's test, and of common seeds with the paired one; None without figures."""
    from scipy import stats  # here, because tables need no more than numpy

    a, b = ([getattr(run, name) for run in side if getattr(run, name) is not None] for side in (new, base))
    if not (a and b):
        return None
    welch = stats.ttest_ind(a, b, equal_var=False) if min(len(a), len(b)) > 1 else None
    x, y = by_seed(new, name), by_seed(base, name)
    pairs = [(x[seed], y[seed]) for seed in x if seed in y]
    paired = stats.ttest_rel(*zip(*pairs, strict=True)) if len(pairs) > 1 else None
    mean = f"{1000 * statistics.fmean(p - q for p, q in pairs):+.2f}" if pairs else "-"
    difference = difference_mb(statistics.fmean(a), statistics.fmean(b))
    sizes = f"{len(a)} against {len(b)}"
    return [label, sizes, f"{difference:+.2f}", p_text(welch), f"{len(pairs)}", mean, p_text(paired)]


def leaderboard_table(new: Sequence[Run], base: Sequence[Run]) -> list[Table]:
    """The two rules, one-sided Welch tests in nats per token of the base, so that another tokenizer compares, too."""
    from scipy import stats

    a, b = ([run.bpb_ttt for run in side if run.bpb_ttt is not None] for side in (new, base))
    if not (a and b and base[0].bytes_per_token):
        return []
    a, b = (np.multiply(side, base[0].bytes_per_token * math.log(2)) for side in (a, b))
    rows = [["rule", "p", "limit", ""]]
    for rule, margin, limit in LEADERBOARD_RULES:
        if min(len(a), len(b)) == 1:
            rows.append([rule, "-", f"{limit}", "needs two runs on each side"])
        else:
            test = stats.ttest_ind(a, b - margin, equal_var=False, alternative="less")
            rows.append([rule, p_text(test), f"{limit}", "kept" if test.pvalue < limit else "not kept"])
    gain = float(b.mean() - a.mean())
    return [Table("Leaderboard rules", rows, f"One-sided, after TTT; the gain is {gain:+.5f} nats per token.")]


def batch_differences(new: Run, base: Run) -> dict[int, tuple[float, float]]:
    """Batches that both runs scored, of the same documents -> (their mean length, difference in bpb).

    Only the same documents compare: neighbouring batches differ by 0.025 bpb, runs of one system by 0.003.
    """
    rows = {}
    for number in sorted(new.ttt.keys() & base.ttt.keys()):
        a, b = new.ttt[number], base.ttt[number]
        if (a.min_len, a.max_len) == (b.min_len, b.max_len) and new.ttt_batches == base.ttt_batches:
            rows[number] = ((a.min_len + a.max_len) / 2, a.bpb - b.bpb)
    return rows


def require_comparable(new: Sequence[Run], base: Sequence[Run]) -> None:
    """LogError that names what keeps these runs from being compared."""
    for side in (new, base):
        trouble = [f"{run.name} did not start" for run in side if not run.began] + copied_logs(side)
        if trouble:
            raise LogError(f"these runs do not compare: {trouble[0]}; leave it out")
        if differ := settings_that_differ(side):
            raise LogError(f"one side mixes configurations ({'; '.join(differ[:5])}): compare one at a time")
    for a, b in itertools.product(new, base):
        if trouble := validation_mismatch(a, b):
            raise LogError(f"different validation sets do not compare; {trouble}")
        if copies := copied_logs([a, b]):
            raise LogError(f"both sides hold the same run: {copies[0]}")


def comparison_tables(new: Sequence[Run], base: Sequence[Run]) -> list[Table]:
    """Differences by stage, leaderboard rules, settings that differ, the same batches. LogError if not comparable."""
    require_comparable(new, base)
    heading = "stage", "runs", "difference, mb", "Welch p", "common seeds", "paired difference, mb", "paired p"
    rows = [row for label, stage in STAGES if (row := stage_row(new, base, label, f"bpb_{stage}"))]
    note = f"Below zero: {', '.join(run.name for run in new)} better than {', '.join(run.name for run in base)}."
    if min(len(new), len(base)) == 1:
        note += f" One run on a side: seeds alone spread by {1000 * SEED_SD:.2f} mb (record system, ten seeds)."
    if same_text(new[0], base[0]) and new[0].val_targets != base[0].val_targets:
        note += " The same text under two tokenizers: bits per byte compare, nats per token do not."
    tables = [Table("Difference", [[*heading], *rows], note), *leaderboard_table(new, base)]
    if differ := settings_that_differ([new[0], base[0]]):
        tables.append(Table("Settings", [["knob", "first / second"], *(said.split(": ", 1) for said in differ)]))
    return tables + document_tables(new, base) + batch_tables(new, base)


def pairs_of_runs(new: Sequence[Run], base: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Runs of one seed, or single runs."""
    single = len(new) == len(base) == 1
    return [(a, b) for a, b in itertools.product(new, base) if single or a.seed == b.seed]


def document_tables(new: Sequence[Run], base: Sequence[Run]) -> list[Table]:
    """Each stage paired by document. The error is that of a sum over documents as random as these."""
    rows = []
    for a, b in pairs_of_runs(new, base):
        for label, stage in STAGES:
            ours, theirs = (run.documents.get(stage, {}) for run in (a, b))
            size = sum(x.size or 0 for x in a.ttt.values()) if stage == "ttt" else a.val_bytes
            if len(ours) < 2 or ours.keys() != theirs.keys() or not size or not same_text(a, b):
                continue
            differences, scale = [ours[d] - theirs[d] for d in ours], 1000 / math.log(2) / size
            error = scale * math.sqrt(len(ours)) * statistics.stdev(differences)
            apart = [d for d in differences if d]
            better = sum(d < 0 for d in apart) / max(len(apart), 1)
            numbers = f"{scale * math.fsum(differences):+.2f}", f"{error:.2f}", f"{100 * better:.0f} %"
            rows.append([f"{a.name} - {b.name}", label, f"{len(ours)}", *numbers])
    heading = ["runs", "stage", "documents", "difference, mb", "standard error", "better on"]
    return [Table("The same documents", [heading, *rows])] if rows else []


def batch_tables(new: Sequence[Run], base: Sequence[Run]) -> list[Table]:
    """Test-time training paired by batch, for runs of one seed, or for single runs."""
    rows = []
    for a, b in pairs_of_runs(new, base):
        differences = [d for _, d in batch_differences(a, b).values()]
        if len(differences) > 1:
            mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
            rows.append([f"{a.name} - {b.name}", f"{len(differences)}", f"{1000 * mean:+.2f}", f"{1000 * error:.2f}"])
    heading = ["runs", "batches in common", "mean difference, mb", "standard error"]
    return [Table("Test-time training, the same batches", [heading, *rows])] if rows else []


# ---- Pictures --------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart by colour-blind readers; lines and markers tell runs apart in print. Seven colours
# and six lines make 42 pairs.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
HATCHES = ("", "//", "..", "xx", "\\\\", "++")
STYLES = tuple(zip(COLORS * 6, LINES * 7, "os^Dv*" * 7, strict=True))
LEGEND = {"frameon": False, "fontsize": 9, "title_fontsize": 9}


class Picture(NamedTuple):
    """A figure that runs share: its title, whether a run has something for it, and what draws it."""

    title: str
    there: Callable[[Run], Any]
    draw: Callable[[Any, Sequence[Run]], None]
    size: tuple[float, float] = (10, 4)  # inches


def styled(items: Iterable[Any]) -> Iterator[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Each item with the style of its lines and that of its points."""
    for item, (color, line, marker) in zip(items, itertools.cycle(STYLES), strict=False):
        yield item, {"color": color, "linestyle": line}, {"color": color, "marker": marker, "linestyle": "none"}


def smooth(values: Sequence[float], width: int) -> np.ndarray:
    """Mean over a centred window that shrinks at the ends."""
    total = np.concatenate([[0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(width // 2, np.minimum(at, len(values) - 1 - at))
    return (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)


def plain_log_axis(axis: Any, subs: Sequence[float]) -> None:
    """Plain numbers at these multiples of powers of ten on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


def seconds_at(run: Run, steps: Sequence[int]) -> np.ndarray:
    """Training seconds after each of these steps, by the log's own pairs, linear between them.

    A pair is added where the loop came on: steps before it go at the pace of the intervals before.
    """
    knots = {0: 0.0} | {step: seconds for step, (seconds, _) in run.clock.items()}
    pace = run.step_ms(looped=False)
    if run.loop_step is not None and pace:
        before = max(step for step in knots if step <= run.loop_step)
        knots.setdefault(run.loop_step, knots[before] + (run.loop_step - before) * pace / 1000)
    if run.steps and run.train_seconds and run.steps > max(knots):
        knots[run.steps] = run.train_seconds
    return np.interp(steps, sorted(knots), [knots[step] for step in sorted(knots)])


def draw_loss(figure: Any, runs: Sequence[Run]) -> None:
    """Training loss as a line, validation loss as points, over steps and over minutes."""
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for run, line, point in styled(runs):
        steps, checks = sorted(run.loss), sorted(step for step in run.validations if step)
        losses, checked = [run.loss[step] for step in steps], [run.validations[step][0] for step in checks]
        for ax, at in ((by_step, np.array), (by_time, lambda steps, run=run: seconds_at(run, steps) / 60)):
            ax.plot(at(steps), smooth(losses, len(steps) // 40), **line, label=run.name)
            ax.plot(at(checks), checked, **point, markersize=8, markeredgecolor="black")
    lowest = min(min(run.loss.values()) for run in runs)
    early = max(run.loss[min(step for step in run.loss if step >= 0.03 * max(run.loss))] for run in runs)
    by_step.set(xlabel="step", ylabel="nats per token", yscale="log")
    by_step.set_ylim(0.97 * lowest, max(1.5 * lowest, 1.1 * early))  # the first steps would flatten the rest
    by_time.set(xlabel="training time, minutes")
    plain_log_axis(by_step.yaxis, (1, 1.5, 2, 2.2, 2.5, 3, 3.5, 4, 5, 6, 7, 8))
    by_time.legend(title="line: training (smoothed); point: validation", **LEGEND)


def draw_speed(figure: Any, runs: Sequence[Run]) -> None:
    """Tokens per second of every interval, slow ones marked."""
    ax = figure.subplots()
    for run, line, point in styled(runs):
        for looped in (False, True):
            rows = [i for i in run.intervals() if i.looped == looped]
            edges, rates = [x for i in rows for x in (i.start, i.end)], [i.rate for i in rows for _ in range(2)]
            ax.plot(edges, rates, **line, label=None if looped else run.name)
        dips = [((i.start + i.end) / 2, i.rate) for i in run.dips()]
        ax.plot(*np.reshape(dips, (-1, 2)).T, **point | {"marker": "v"}, markeredgecolor="black")
        if run.loop_step:
            ax.axvline(run.loop_step, color=line["color"], linestyle=":", linewidth=1)
    ax.set(ylim=(0, None), xlabel="step", ylabel="tokens/s")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M" if value >= 1e6 else f"{value:,.0f}")
    ax.legend(title="triangle: more than 10 % slower; dotted: loop on", loc="lower left", **LEGEND)


def running_score(run: Run) -> tuple[list[float], list[float]]:
    """Per cent of the batches scored so far, and the running bpb."""
    batches = list(run.ttt.values())
    values = [batch.running for batch in batches]
    if all(batch.size for batch in batches):
        nats, size = np.cumsum([(batch.nats, batch.size) for batch in batches], axis=0).T
        values = list(nats / size / math.log(2))
    return [100 * (i + 1) / len(batches) for i in range(len(batches))], values


def draw_ttt(figure: Any, runs: Sequence[Run]) -> None:
    """Running score, score by document length, and, over the same batches, the differences to the first run."""
    differences = [list(batch_differences(run, runs[0]).values()) for run in runs[1:]]
    running, by_length, *paired = figure.subplots(1, 3 if any(differences) else 2)
    for run, line, point in styled(runs):
        running.plot(*running_score(run), **line, label=run.name)
        if run.bpb_quantized:
            running.axhline(run.bpb_quantized, color=line["color"], linestyle=(0, (1, 3)))
        lengths, scores = np.array(sorted(((b.min_len + b.max_len) / 2, b.bpb) for b in run.ttt.values())).T
        by_length.plot(lengths, scores, **point, markersize=3.5, alpha=0.6)
        by_length.plot(lengths, smooth(scores, len(scores) // 8), **line)
    running.set(xlabel="batches scored, %", ylabel="bits per byte")
    order = "running score: the longest documents come first,\nso it rises at the end, where short ones score worse"
    running.set_title(order, fontsize=9)
    by_length.set_title("score of each batch by the length of its\ndocuments; line: smoothed", fontsize=9)
    for ax in paired:
        figure.set_size_inches(14, 4.2)
        for pairs, (_, line, point) in zip(differences, itertools.islice(styled(runs), 1, None), strict=True):
            lengths, difference = np.reshape(pairs, (-1, 2)).T
            ax.plot(lengths, 1000 * difference, **point, markersize=3.5, alpha=0.6)
            ax.plot(lengths, smooth(1000 * difference, len(pairs) // 8), **line)
        ax.axhline(0, color="black", linewidth=1)
        ax.set_title(f"the same batches, minus\n{runs[0].name}", fontsize=9)
        ax.set(ylabel="difference, mb")
    for ax in (by_length, *paired):
        ax.set(xscale="log", xlabel="document length, tokens")
        plain_log_axis(ax.xaxis, (1, 3))
    one_rank = any(batch.size is None for run in runs for batch in run.ttt.values())
    note = "dotted level: quantized, without TTT" + "; running score of one rank's batches" * one_rank
    handles = running.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", title=note, ncols=3, **LEGEND)


def schedules(run: Run) -> dict[str, Any] | None:
    """Learning rate, momentum and loop over steps, and their events; None where settings or steps are missing.

    Schedules follow the clock (training seconds over MAX_WALLCLOCK_SECONDS less the reserve), or the steps where there
    is no budget, so steps become fractions by the log's own pairs of step and time. Momentum follows the step.
    """
    names = ("warmdown_frac", "min_lr", "matrix_lr", "muon_momentum", "muon_momentum_warmup_start",
             "muon_momentum_warmup_steps", "max_wallclock_seconds", "iterations")  # fmt: skip
    knobs = [run.knob(name) for name in names]
    if None in knobs or not run.steps or not run.clock:
        return None
    warmdown, floor, rate, momentum, start, warmup, cap, iterations = knobs
    steps = np.arange(run.steps + 1)
    seconds = seconds_at(run, steps)
    fraction = seconds / (cap - (run.knob("gptq_reserve_seconds") or 0)) if cap > 0 else steps / iterations
    multiplier = np.where(fraction < 1 - warmdown, 1.0, np.maximum((1 - fraction) / max(warmdown, 1e-9), floor))
    events = {"warmdown starts": int(np.searchsorted(fraction, 1 - warmdown)), "momentum at its plateau": int(warmup),
              "loop on": run.loop_step, "end": run.steps}  # fmt: skip
    events = {label: step for label, step in events.items() if step is not None and step <= run.steps}
    series = {
        "step": steps,
        "seconds": seconds.round(3),
        "lr_multiplier": multiplier.round(6),
        "matrix_lr": (rate * multiplier).round(8),
        "muon_momentum": (start + (momentum - start) * np.minimum(steps / max(warmup, 1), 1)).round(6),
        "loop": (steps >= (run.steps + 1 if run.loop_step is None else run.loop_step)).astype(int),
    }
    rows = [
        {"event": label} | {name: series[name][step].item() for name in ("step", "seconds", "lr_multiplier")}
        for label, step in sorted(events.items(), key=lambda pair: pair[1])
    ]
    return {"run": run.name} | {name: values.tolist() for name, values in series.items()} | {"events": rows}


def draw_schedules(figure: Any, runs: Sequence[Run]) -> None:
    """The four schedules of the first run above one another, with their events."""
    series = schedules(runs[0])
    labels = {"lr_multiplier": "learning-rate\nmultiplier", "matrix_lr": "rate of the\nmatrices",
              "muon_momentum": "Muon\nmomentum", "loop": "loop"}  # fmt: skip
    axes = figure.subplots(4, 1, sharex=True, height_ratios=(3, 3, 3, 1.3))
    for ax, (name, label), color in zip(axes, labels.items(), COLORS, strict=False):
        ax.plot(series["step"], series[name], color=color, drawstyle="steps-post" if name == "loop" else None)
        ax.set_ylabel(label)
        for event in series["events"]:
            ax.axvline(event["step"], color="#555555", linestyle="--", linewidth=1)
    axes[3].set(yticks=(0, 1), yticklabels=("off", "on"), ylim=(-0.2, 1.2), xlabel="step")
    texts = [runs[0].name]
    for letter, side, event in zip("abcd", ("right", "left") * 2, series["events"], strict=False):
        axes[0].text(event["step"], 1.03, f" {letter} ", ha=side, transform=axes[0].get_xaxis_transform())
        where = f"step {event['step']:,}, {event['seconds']:,.0f} s, learning rate x {event['lr_multiplier']:.3f}"
        texts.append(f"{letter}  {event['event']}: {where}")
    axes[0].set_title("\n".join(texts), fontsize=9, pad=16)


def draw_quantization(figure: Any, runs: Sequence[Run]) -> None:
    """Quantization error of every matrix of the first run over its layers, a line for each kind of matrix."""
    kinds: dict[str, dict[int, float]] = {}
    for name, error in runs[0].tensors.items():
        layer, kind = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(?:\.weight)?", name).groups()
        kinds.setdefault(kind, {})[-1 if layer is None else int(layer)] = 100 * error
    ax = figure.subplots()
    for (kind, by_layer), line, point in styled(sorted(kinds.items())):
        ax.plot(sorted(by_layer), [by_layer[i] for i in sorted(by_layer)], **point | line, label=kind)
    layers = sorted({layer for by_layer in kinds.values() for layer in by_layer})
    ax.set_xticks(layers, ["embedding" if layer < 0 else f"{layer}" for layer in layers])
    ax.set(xlabel="layer", ylabel="|stored - float|, % of |float|", title=runs[0].name)
    ax.legend(ncols=2, **LEGEND)


def size_parts(run: Run) -> dict[str, int]:
    """Bytes of the artifact, by kind of tensor where metrics.jsonl has its sections, and of the code."""
    kinds, rest = {"tok": "embedding", "mlp": "MLP", "att": "attention"}, "all else in the artifact"
    parts = dict.fromkeys([*kinds.values(), rest], 0) if run.parts else {"artifact": run.artifact_bytes}
    for section, size in run.parts.items():
        parts[kinds.get(section[:3], rest)] += size
    return parts | {"code": run.code_bytes or 0}


def draw_sizes(figure: Any, runs: Sequence[Run]) -> None:
    """Bytes of every submission by part, the limit as a line where it is in sight."""
    ax, left, places = figure.subplots(), np.zeros(len(runs)), range(len(runs))
    figure.set_size_inches(10, 2 + 0.6 * len(runs))
    names = dict.fromkeys(name for run in runs for name in [*size_parts(run)][:-1]) | {"code": None}
    for name, color, hatch in zip(names, COLORS, HATCHES, strict=False):
        sizes = np.array([size_parts(run).get(name, 0) / 1e6 for run in runs])
        look = {"color": color, "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}
        ax.barh(places, sizes, left=left, height=0.6, label=name, **look)
        left += sizes
    for place, run in zip(places, runs, strict=True):
        ax.text(run.total_bytes / 1e6, place, f"  {run.total_bytes:,}", va="center", fontsize=9)
    in_sight = bool(max(left) > SIZE_LIMIT / 4e6)
    if in_sight:
        ax.axvline(SIZE_LIMIT / 1e6, color="black", linestyle="--", linewidth=1.2)
    ax.set_yticks(places, [run.name for run in runs])
    ax.set(xlabel="MB" + ", dashed: the limit" * in_sight, xlim=(0, 1.16 * max(left)))
    ax.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=5, **LEGEND)


PICTURES = {
    "loss": Picture("Loss over steps and over time", lambda run: run.loss, draw_loss),
    "schedules": Picture("Schedules", schedules, draw_schedules, (10, 7)),
    "speed": Picture("Throughput between logged steps", Run.intervals, draw_speed),
    "ttt": Picture("Test-time training", lambda run: run.ttt, draw_ttt, (10, 4.5)),
    "quantization": Picture("Quantization error by matrix", lambda run: run.tensors, draw_quantization),
    "size": Picture("Bytes of the submission by part", lambda run: run.total_bytes and run.artifact_bytes, draw_sizes),
}


def pictures(runs: Sequence[Run]) -> dict[str, bytes]:
    """Name -> PNG, of those pictures for which a run has figures."""
    from matplotlib.figure import Figure  # here, so that tables work where it is not installed

    drawn = {}
    for name, picture in PICTURES.items():
        if chosen := [run for run in runs if picture.there(run)]:
            figure, file = Figure(figsize=picture.size, layout="constrained"), io.BytesIO()
            picture.draw(figure, chosen)
            figure.suptitle(picture.title)
            for ax in figure.axes:
                ax.spines[["top", "right"]].set_visible(False)
                ax.grid(color="#DDDDDD", linewidth=0.6, zorder=0)
                ax.set_axisbelow(True)
            figure.savefig(file, dpi=110)
            drawn[name] = file.getvalue()
    return drawn


def missing_pictures(runs: Sequence[Run]) -> list[str]:
    """Titles of the others: public logs, and older programs, have fewer figures."""
    return [picture.title for picture in PICTURES.values() if not any(map(picture.there, runs))]


def write_pictures(runs: Sequence[Run], folder: Path) -> list[Path]:
    """The pictures, and the schedules as JSON, in `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"{name}.png": png for name, png in pictures(runs).items()}
    if series := [found for run in runs if (found := schedules(run))]:
        files["schedules.json"] = json.dumps(series).encode()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


# ---- Page ------------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark;
  --line: #d0d0d0; --back: #ffffff; --text: #1a1a1a; --head: #f2f2f2; --bad: #b00020; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --line: #444; --back: #16181c; --text: #e4e4e4; --head: #23262c; --bad: #ff8a80; }} }}
body {{ margin: 0 auto; max-width: 88rem; padding: 1rem; font: 15px/1.5 system-ui, sans-serif; background: var(--back);
  color: var(--text); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }}
th {{ background: var(--head); }}
.number {{ text-align: right; white-space: nowrap; }}
.bad {{ color: var(--bad); font-weight: 600; }}
img {{ display: block; width: 100%; min-width: 36rem; margin: 1rem 0; background: #fff; border-radius: 4px; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def html_row(cells: Sequence[str], numeric: Sequence[bool], tag: str) -> str:
    """A table row: numbers to the right, failures in red."""
    row = []
    for text, right in zip(cells, numeric, strict=True):
        kind = "number" if right else "bad" if re.match("FAIL|ERROR", text) else "text"
        row.append(f'<{tag} class="{kind}">{html.escape(text)}</{tag}>')
    return f"<tr>{''.join(row)}</tr>"


def html_table(table: Table) -> str:
    """A table with its title and note, in a box that scrolls sideways on a narrow screen."""
    numeric = [is_numeric(column[1:]) for column in zip(*table.rows, strict=True)]
    rows = [html_row(cells, numeric, "td" if number else "th") for number, cells in enumerate(table.rows)]
    note = f"\n<p>{html.escape(table.note)}</p>" if table.note else ""
    return f'<h2>{html.escape(table.title)}</h2>\n<div class="wide"><table>\n{"".join(rows)}\n</table></div>{note}'


def page(runs: Sequence[Run], tables: Sequence[Table]) -> str:
    """Tables and pictures as one HTML file that needs nothing else: no scripts, no addresses, pictures inside."""
    data = {name: base64.b64encode(png).decode() for name, png in pictures(runs).items()}
    images = [f'<div class="wide"><img alt="{n}" src="data:image/png;base64,{code}"></div>' for n, code in data.items()]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return PAGE.format(title=html.escape(title), body="\n".join([*map(html_table, tables), *images]))


def as_data(runs: Sequence[Run], tables: Sequence[Table]) -> dict[str, Any]:
    """Figures, settings and findings of the runs, and the tables as printed, for programs."""
    plain = (int, float, str, bool, type(None))
    rows = []
    for run in runs:
        row = {name: value for name, value in vars(run).items() if isinstance(value, plain)}
        row |= {name: getattr(run, name) for name in ("state", "bytes_per_token", "stages", "settings")}
        for part, looped in (("before_loop", False), ("after_loop", True)):
            row |= {f"step_ms_{part}": run.step_ms(looped), f"tokens_per_second_{part}": run.rate(looped)}
        rows.append(row | {"errors": errors(run), "remarks": remarks(run), "refusals": run.refusals})
    return {"runs": rows, "tables": [table._asdict() for table in tables]}


# ---- Records ---------------------------------------------------------------------------------------------------------

TRACK = "10min_16mb"
HERE = Path(__file__).resolve().parent
CODE_FILES = ("lossless_caps.py", "prepare_caseops_data.py", "requirements.txt", "requirements-gpu.txt")
PATH_KNOBS = {"DATA_DIR", "DATA_PATH", "TOKENIZER_PATH", "EVAL_ONLY_ARTIFACT", "EVAL_ONLY_CHECKPOINT"}
RUN_NAMES = {"SEED", "RUN_DIR", "RUN_ID", "ARTIFACT_DIR"}  # settings that every run has to itself
# An absolute path, of which the last part stays; addresses and relative paths do not match.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~-])/(?:[\w.@+~-]+/)+(?=[\w.@+*~-])|[A-Z]:\\(?:[\w .@+~-]+\\)+")
SOURCE = re.compile(r"(?<=^={100}\n)(?!Hyperparameters:)(.+?)\n(?==={99}\nHyperparameters:$)", re.S | re.M)


def scrub(text: str) -> str:
    """Text whose absolute paths have lost their folders."""
    return ABSOLUTE_PATH.sub("", text)


def embedded_source(run: Run) -> str | None:
    """The program as the log of the run holds it; a resumed log says only `as above` the second time."""
    return next((text for text in SOURCE.findall("\n".join(lines_of(run.log))) if "\n" in text), None)


def knobs_of(run: Run, but: set[str]) -> str:
    """The settings that a command must give to repeat the run, as it would give them."""
    kept = {name: scrub(value) for name, value in (run.changed or {}).items() if name not in but}
    return " ".join(f"{name}={shlex.quote({'True': '1', 'False': '0'}.get(v, v))}" for name, v in kept.items())


def run_command(run: Run) -> str:
    """The line that repeats the run."""
    start = "python" if (run.world or 1) == 1 else f"torchrun --standalone --nproc_per_node={run.world}"
    return " ".join(filter(None, (f"SEED={run.seed}", knobs_of(run, RUN_NAMES), start, "train_gpt.py")))


def record_troubles(runs: Sequence[Run]) -> list[str]:
    """Everything that keeps these runs from being a record."""
    said = []
    for run in runs:
        facts = {"seed": run.seed, "knobs": run.changed, "size": run.total_bytes, "train time": run.train_seconds}
        missing = [what for what, value in facts.items() if value is None]
        if run.bpb_ttt is None:
            said.append(f"{run.name}: no score after TTT ({run.state})")
        elif missing:
            said.append(f"{run.name}: the log does not say its {', '.join(missing)}")
        said += [f"{run.name}: {error}" for error in errors(run)]
    if len({run.seed for run in runs}) < len(runs):
        said.append(f"seeds repeat: {', '.join(str(run.seed) for run in runs)}")
    if len(runs) > 1 and (trouble := no_common_mean(runs)):
        said.append(trouble)
    if len(programs := {run.source_bytes for run in runs}) > 1:
        said.append(f"different programs, of {' and '.join(f'{size or 0:,}' for size in programs)} bytes")
    return said


def mean_and_sd(runs: Sequence[Run], name: str) -> tuple[float | None, float | None]:
    """None for what some run lacks, and for the deviation of one run."""
    values = [getattr(run, name) for run in runs]
    if None in values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def submission(runs: Sequence[Run], name: str, author: str = "", github: str = "") -> dict[str, Any]:
    """submission.json, every figure from the logs. artifact_bytes is what the limit counts: artifact and code."""
    (bpb, bpb_sd), (loss, loss_sd) = mean_and_sd(runs, "bpb_ttt"), mean_and_sd(runs, "loss_ttt")
    first, seeds = runs[0], len(runs)
    knobs = knobs_of(first, RUN_NAMES | PATH_KNOBS) or "none"
    results = {
        str(run.seed): {"val_loss": run.loss_ttt, "val_bpb": run.bpb_ttt, "artifact_bytes": run.total_bytes,
                        "steps": run.steps} for run in runs
    }  # fmt: skip
    return {
        "author": author,
        "github_id": github,
        "name": name,
        "blurb": f"{seeds} seed{'s' * (seeds > 1)}; settings besides the defaults: {knobs}",
        "date": max((run.started[:10] for run in runs if run.started), default=None),
        "track": TRACK,
        "val_loss": loss,
        "val_bpb": bpb,
        "val_loss_std": loss_sd,
        "val_bpb_std": bpb_sd,
        "seeds": [run.seed for run in runs],
        "seed_results": results,
        "artifact_bytes_mean": mean_and_sd(runs, "total_bytes")[0],
        "train_time_s_mean": mean_and_sd(runs, "train_seconds")[0],
        "eval_time_s_mean": mean_and_sd(runs, "ttt_seconds")[0],
        "hardware": f"{first.world} x {first.device}" if first.device else None,
        "reproducibility_notes": f"commit {first.commit or 'unknown'}; {validation_set(first)}",
    }


def validation_set(run: Run) -> str:
    """What the log says about the validation set."""
    counts = ((run.val_targets, "tokens"), (run.val_bytes, "bytes"), (run.val_documents, "documents"))
    known = [f"{count:,} {what}" for count, what in counts if count]
    return f"validation set of {', '.join(known)}" + (f", sha256 {run.val_sha256}" if run.val_sha256 else "")


def record_readme(runs: Sequence[Run], name: str, result: dict[str, Any]) -> str:
    """The README of a record folder."""
    sd = "" if result["val_bpb_std"] is None else f", standard deviation {result['val_bpb_std']:.5f}"
    seeds = f"mean of {len(runs)} seeds{sd}" if len(runs) > 1 else f"seed {runs[0].seed}"
    tables = "\n\n".join(map(markdown, run_tables(runs)))
    commands = "\n".join(map(run_command, runs))
    return f"""# {name}

**{result["val_bpb"]:.5f} bits per byte** after test-time training, {seeds}, on {result["hardware"]},
{validation_set(runs[0])}.
Written by `read_logs.py --record` from the logs beside it; `read_logs.py --check` compares the two again.

{tables}

### Commands

```sh
{commands}
```
"""


def write_record(runs: Sequence[Run], folder: Path, name: str, author: str, github: str) -> None:
    """A record folder: README.md, submission.json, logs, metrics, run files, the program and what it needs.

    LogError, before anything is written, with everything that keeps the runs from being a record.
    """
    if folder.exists() and any(folder.iterdir()):
        raise LogError(f"{folder} is not empty: give a new folder")
    if troubles := record_troubles(runs):
        raise LogError("these runs are no record:" + "".join(f"\n  - {trouble}" for trouble in troubles))
    source = embedded_source(runs[0]) or (HERE / "train_gpt.py").read_text(encoding="utf-8")
    size, ran = len(source.encode()), runs[0].source_bytes
    if ran and size != ran:
        raise LogError(f"the program here has {size:,} bytes, the one that ran {ran:,}: check out its commit")
    files = {"train_gpt.py": source} | {name: (HERE / name).read_text(encoding="utf-8") for name in CODE_FILES}
    for run in runs:
        log = SOURCE.sub("(source: train_gpt.py)\n", "\n".join(lines_of(run.log)) + "\n")
        files[f"log_seed{run.seed}.txt"] = scrub(log)
        for path, file in ((run.metrics, f"metrics_seed{run.seed}.jsonl"), (run.info, f"run_seed{run.seed}.json")):
            if path.is_file():
                files[file] = scrub(path.read_text(encoding="utf-8"))
    write_files(folder, files)
    copies = read_runs(folder)  # figures come from what a reader will find
    result = submission(copies, name, author, github)
    readme = record_readme(copies, name, result)
    write_files(folder, {"submission.json": json.dumps(result, indent=2) + "\n", "README.md": readme})


def write_files(folder: Path, files: dict[str, str]) -> None:
    """Name -> text, into a folder that is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


FIGURE = re.compile(r"(?<![\w.,/-])(?:\d+\.\d{4,}|\d{1,3}(?:,\d{3})+|\d{6,})(?![\w.,]*\d|\w)")


def known_figures(runs: Sequence[Run]) -> dict[str, float]:
    """Every figure that a text about these runs may state, with its name."""
    known: dict[str, float] = {"size limit": SIZE_LIMIT}
    figures = {column.heading: column.figure for column in (*SCORES, *SPEED, *SIZES) if column.spec}
    figures |= {name: lambda run, name=name: getattr(run, name) for name in vars(runs[0])}
    figures["bytes per token"] = lambda run: run.bytes_per_token
    for name, figure in figures.items():
        values = {run.name: value for run in runs if isinstance(value := figure(run), int | float)}
        known |= {f"{name}, {run}": value for run, value in values.items()}
        if len(values) == len(runs) > 1:
            mean, deviation = statistics.fmean(values.values()), statistics.stdev(values.values())
            known |= {f"{name}, mean": mean, f"{name}, sd": deviation}
    for run in runs:
        known |= {f"loss at step {step}, {run.name}": loss for step, loss in run.loss.items()}
        for step, (loss, bpb) in run.validations.items():
            known |= {f"val_loss at step {step}, {run.name}": loss, f"val_bpb at step {step}, {run.name}": bpb}
        known |= {f"{name.upper()}, {run.name}": value for name in run.hyper if (value := run.knob(name)) is not None}
    return known


def decimals(text: str) -> int:
    return len(text.partition(".")[2])


def text_disagreements(name: str, text: str, known: dict[str, float]) -> Iterator[str]:
    """Scores (four decimals and more) and large numbers of a text that no log gives."""
    for number, line in enumerate(text.splitlines(), 1):
        for figure in FIGURE.findall(line):
            value = float(figure.replace(",", ""))
            nearest = min(known, key=lambda label, value=value: abs(known[label] - value))
            off = abs(known[nearest] - value)
            if off > 0.5001 * 10.0 ** -decimals(figure):
                hint = f"; {known[nearest]:.10g} is {nearest}" if off < 0.02 * value else ""
                yield f"{name}:{number}: {figure} is in no log here{hint}"


def json_disagreements(stated: dict[str, Any], computed: dict[str, Any], where: str) -> Iterator[str]:
    """Fields that differ from what the logs give, at the precision with which they are stated."""
    for key, value in computed.items():
        said = stated.get(key)
        if isinstance(value, dict) and isinstance(said, dict):
            yield from json_disagreements(said, value, f"{where}: {key}")
            continue
        agree = said == value
        if isinstance(value, list) and isinstance(said, list):
            agree = sorted(map(str, said)) == sorted(map(str, value))
        elif isinstance(value, int | float) and isinstance(said, int | float):
            agree = abs(said - value) <= 0.5001 * 10.0 ** -decimals(f"{said:.12f}".rstrip("0"))
        if key in stated and value is not None and not agree:
            yield f"{where}: {key} says {said}, the logs give {value}"


def submission_disagreements(path: Path, runs: Sequence[Run]) -> Iterator[str]:
    """What submission.json says beside what the logs give; its other fields are searched like a text."""
    complete = [run for run in runs if run.bpb_ttt is not None]
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise LogError(f"{path} is not JSON: {error}") from None
    computed = submission(complete, "") if complete else {"seed_results": {}}
    measured = ("val_", "seed", "artifact_bytes", "train_time", "eval_time")
    figures = {key: value for key, value in computed.items() if key.startswith(measured)}
    yield from json_disagreements(stated, figures, path.name)
    for seed in stated.get("seed_results", {}).keys() - computed["seed_results"].keys():
        yield f"{path.name}: seed {seed} has no complete log here"
    for key, value in stated.items():
        if key not in figures:
            yield from text_disagreements(f"{path.name}: {key}", json.dumps(value), known_figures(runs))


def check_record(folder: Path) -> list[str]:
    """Every figure of README.md and submission.json that the logs beside them do not give, and other faults."""
    runs = [run for run in map(file_run, log_files(folder)) if run.began]
    if not runs:
        raise LogError(f"{folder} is no folder with logs (log_*.txt): nothing to check against")
    said = [f"{run.log.name}: {error}" for run in runs for error in errors(run)] + copied_logs(runs)
    said += [f"{run.log.name}: {run.state}" for run in runs if not run.complete]
    if (path := folder / "submission.json").is_file():
        said += submission_disagreements(path, runs)
    if (path := folder / "README.md").is_file():
        said += text_disagreements(path.name, path.read_text(encoding="utf-8"), known_figures(runs))
    sizes = {run.source_bytes for run in runs if run.source_bytes}
    if sizes and (path := folder / "train_gpt.py").is_file() and path.stat().st_size not in sizes:
        said.append(f"train_gpt.py has {path.stat().st_size:,} bytes, {', '.join(f'{n:,}' for n in sizes)} ran")
    for run in runs:
        if found := next(filter(None, map(ABSOLUTE_PATH.search, lines_of(run.log))), None):
            said.append(f"{run.log.name}: holds an absolute path ({found[0]}...)")
    return said


# ---- Ledger ----------------------------------------------------------------------------------------------------------

LEDGER = """# Experiments

One row per run, derived from its logs by `make records`; never typed. What was learned is in LOG.md.

{table}
"""


def settings(run: Run) -> set[tuple[str, str]]:
    """What makes its numbers, as far as knobs tell."""
    silent = RUN_NAMES | PATH_KNOBS | {"FROM_STAGE", "TRAIN_LOG_EVERY", "VAL_LOSS_EVERY", "CHECKPOINT_EVERY"}
    return {(name, value) for name, value in (run.changed or {}).items() if name not in silent}


def adds_to(run: Run, other: Run) -> bool:
    """Whether a run is another one with more settings: in one folder, of one seed, from the same weights or none.

    Steps that no log tells, of a run that begins with weights, may be any.
    """
    made_from = ("EVAL_ONLY_ARTIFACT", "EVAL_ONLY_CHECKPOINT", "HOTSTART_FP_CKPT")
    place, theirs = ([r.log.parent, r.seed, *map((r.changed or {}).get, made_from)] for r in (run, other))
    steps = other.steps == run.steps or None in (other.steps, run.steps)
    return place == theirs and steps and settings(other) < settings(run)


def last_difference(run: Run, other: Run) -> tuple[str, float] | None:
    """The last stage that both have a score of, and the difference there in mb."""
    for label, stage in reversed(STAGES):
        difference = difference_mb(getattr(run, f"bpb_{stage}"), getattr(other, f"bpb_{stage}"))
        if difference is not None:
            return label, difference
    return None


def compared_with(run: Run, runs: Sequence[Run]) -> int | None:
    """The index of the run to compare with: the nearest that it adds settings to, or else one of an earlier folder.

    The latter has as many steps and the fewest other settings, seed and tokenizer counted among them. None where
    nothing fits, or where steps that no log tells may be those of several.
    """
    like = [(i, r) for i, r in enumerate(runs) if validation_mismatch(run, r) is None and last_difference(run, r)]
    if beside := [(i, other) for i, other in like if adds_to(run, other)]:
        doubtful = run.steps is None and len({other.steps for _, other in beside} - {None}) > 1
        return None if doubtful else max(beside, key=lambda row: len(settings(row[1])))[0]
    before = itertools.takewhile(lambda row: row[1].log.parent != run.log.parent, like)
    earlier = [(i, other) for i, other in before if other.steps == run.steps is not None]
    others = {
        i: len(settings(other) ^ settings(run)) + (other.seed != run.seed) + (other.val_targets != run.val_targets)
        for i, other in earlier
    }
    return min(others, key=others.__getitem__, default=None)


def against(run: Run, runs: Sequence[Run]) -> str:
    """The difference to the run that it is compared with, in the last stage of both, and that run's number."""
    if (i := compared_with(run, runs)) is None:
        return "-"
    label, difference = last_difference(run, runs[i])
    return f"{round(difference, 2) + 0.0:+.2f} mb to {i + 1} ({label})"


def run_date(run: Run) -> str:
    """When it started, or the date in its name."""
    dated = re.search(r"\d{4}-\d{2}-\d{2}", f"{run.started or ''} {run.name}")
    return dated[0] if dated else "-"


LEDGER_COLUMNS = (
    Column("date", run_date, ""),
    Column("run", lambda run: run.name, ""),
    Column("hardware", lambda run: f"{run.world or '?'} x {run.device}" if run.device else None, ""),
    Column("commit", lambda run: run.commit[:8] if run.commit not in (None, "unknown") else None, ""),
    Column("changed", lambda run: knobs_of(run, RUN_NAMES | PATH_KNOBS) or None, ""),
    *SCORES[1:6],
    SIZES[3],
    Column("state", lambda run: "; ".join([run.state, *(f"ERROR: {said}" for said in errors(run))]), ""),
)


def ledger(runs: Sequence[Run]) -> str:
    """The experiments as Markdown, oldest first: one row per run, derived from the logs alone."""
    runs = sorted((run for run in runs if run.began), key=lambda run: (run_date(run), run.name))
    rows = [["no.", *(column.heading for column in LEDGER_COLUMNS), "against"]]
    for number, run in enumerate(runs, 1):
        rows.append([f"{number}", *cells(run, LEDGER_COLUMNS), against(run, runs)])
    return LEDGER.format(table=markdown(Table("", rows)))


# ---- Command line ----------------------------------------------------------------------------------------------------


def options_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits 2 with a sentence where its parts do not go together."""
    parser = argparse.ArgumentParser(prog="read_logs.py", description="Tables, pictures and records from run logs.")
    add = parser.add_argument
    add("paths", nargs="*", type=Path, metavar="LOG", help="run folder, record folder, folder of such, or log")
    add("--against", nargs="+", type=Path, metavar="LOG", help="compare the first runs with these")
    add("--plots", type=Path, metavar="DIR", help="write the pictures there")
    add("--html", type=Path, metavar="FILE", help="write tables and pictures as one page")
    add("--json", type=Path, metavar="FILE", help="write figures and tables as data")
    add("--result", action="store_true", help="print only the result block of one run")
    add("--record", type=Path, metavar="DIR", help="write a record folder of these runs")
    add("--name", help="title of the record")
    add("--author", default="", help="for submission.json")
    add("--github", default="", help="for submission.json")
    add("--check", type=Path, metavar="DIR", help="compare a record folder with its logs")
    add("--ledger", type=Path, metavar="FILE", help="write the list of experiments")
    options = parser.parse_args(argv)
    if bool(options.paths) == bool(options.check):
        parser.error("give run folders or logs, or --check with a record folder")
    if bool(options.record) != bool(options.name):
        parser.error("--record needs --name, and --name is only for --record")
    for path in (options.html, options.json, options.ledger):
        if path and not path.parent.is_dir():
            parser.error(f"there is no folder {path.parent} to write {path.name} into: make it first")
    return options


def check(folder: Path) -> int:
    """Print what disagrees; 1 if anything does."""
    said = check_record(folder)
    print("\n".join(said) if said else f"{folder}: every figure agrees with the logs")
    return int(bool(said))


def show_result(runs: Sequence[Run]) -> None:
    """LogError for anything but one run that has results."""
    if len(runs) > 1:
        raise LogError(f"--result takes one run, here are {len(runs)}: {', '.join(run.name for run in runs)}")
    if not runs[0].began:
        raise LogError(f"{runs[0].name} has no result, it did not start: {refusal(runs[0])}")
    print(result_block(runs[0]))


def show_report(options: argparse.Namespace, runs: list[Run]) -> None:
    """Tables on standard output, and the files that were asked for."""
    base = read_all(options.against) if options.against else []
    tables = comparison_tables(runs, base) if base else []
    tables += run_tables(runs) + [table._replace(title=f"{table.title}, second set") for table in run_tables(base)]
    print("\n\n".join(map(markdown, tables)))
    if options.json:
        options.json.write_text(json.dumps(as_data(runs + base, tables), indent=1) + "\n", encoding="utf-8")
    if options.plots:
        for path in write_pictures(runs + base, options.plots):
            print(f"picture: {path}", file=sys.stderr)
        for title in missing_pictures(runs + base):
            print(f"no picture, as no run has its figures: {title}", file=sys.stderr)
    if options.html:
        options.html.write_text(page(runs + base, tables), encoding="utf-8")
        print(f"page: {options.html}", file=sys.stderr)


def run_options(options: argparse.Namespace) -> int:
    """Do what was asked for; the exit code."""
    if options.check:
        return check(options.check)
    runs = read_all(options.paths)
    if options.result:
        show_result(runs)
    elif options.record:
        write_record(runs, options.record, options.name, options.author, options.github)
        print(f"record: {options.record}")
    elif options.ledger:
        options.ledger.write_text(ledger(runs), encoding="utf-8")
    else:
        show_report(options, runs)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 where --check found something, 2 with one sentence where there is nothing to work on."""
    try:
        return run_options(options_of(argv))
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (LogError, OSError) as error:
        print(f"read_logs: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
