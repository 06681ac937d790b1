"""Paired runs of train_gpt.py: a baseline and settings on the same seeds, steps and batches, and what they change.

    python ablate.py "MUON_GRAD_POWER=0.9 WD_TAPER_START_FRAC=0.7,WD_TAPER_FINAL_MULT=0.5"

Spaces separate settings, commas the knobs of one. All other knobs come from the environment and hold for every run;
without any the model is that of PRESET=demo, which a CPU trains in minutes. Steps must not depend on the clock, so
MAX_WALLCLOCK_SECONDS is 0 here. Besides the knobs this program reads

    SEEDS="42 0"       seeds that every setting runs with
    NPROC=1            processes of a run, started by torchrun if there are several
    GPUS="0 0 1 1"     runs go on side by side, here two on each of two GPUs; with NPROC=2 it reads "0,1 2,3". Without
                       it one run follows another. Times of runs that share a GPU say nothing
    OUT=runs/ablate    folder of the runs, their output and table.md

A run that has a result stays while its settings and the program are the same; with others it is kept beside the new
one, and what has no result starts anew. A setting that only scoring reads scores the baseline's artifact instead of
training again, and one that only quantization, or both, read starts from the baseline's float weights. Exit code 0:
every run has a result; 1: some have none; 2: the settings cannot work.
"""

import hashlib
import json
import os
import queue
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).resolve().parent / "train_gpt.py"
ARTIFACT, WEIGHTS = "final_model.int6.ptz", "01_weights.pt"
BASELINE = "baseline"

# What only scoring reads: with the same artifact these knobs give the score that a whole run would.
SCORING = ("TTT_", "PHASED_TTT_", "GLOBAL_TTT_", "LORA_PLUS_", "TAPIN_", "EVAL_HASH_EMB_", "EVAL_LOOP_EMB_")
# What calibration, GPTQ and packing read, but not training: the float weights are the same for all values of these.
QUANTIZING = (
    "GPTQ_CALIBRATION_", "MATRIX_BITS", "MATRIX_STEP_", "EMBED_BITS", "EMBED_CLIP_", "EMBED_STEP_", "EMBED_DAMPING",
    "MLP_CLIP_", "ATTN_CLIP_", "SCALE_BITS", "GATED_ATTN_QUANT_", "SPINQUANT_",
)  # fmt: skip
OURS = ("SEED", "RUN_DIR", "RUN_ID", "ARTIFACT_DIR", "FROM_STAGE", "RESUME", "EVAL_ONLY_ARTIFACT", "PRESET")
MADE_BEFORE = {  # first stage -> results of the baseline that a run shares
    "train": (), "calibrate": ("bpb_float", "train_seconds"),
    "evaluate": ("bpb_float", "train_seconds", "bpb_quantized", "total_bytes"),
}  # fmt: skip
PLACES = {name.lower() for name in OURS} - {"seed"}  # of a run; they change no number

STAGES = {  # result -> its column, and how a difference is written
    "bpb_float": ("float bpb", ".5f"), "bpb_quantized": ("quantized bpb", ".5f"), "bpb_ttt": ("bpb after TTT", ".5f"),
    "bpb_ttt_partial": ("bpb after TTT, partial", ".5f"), "total_bytes": ("bytes", ".0f"),
    "train_seconds": ("training s", ".1f"), "ttt_seconds": ("TTT s", ".1f"),
}  # fmt: skip


class Refused(Exception):
    """Why nothing runs, a sentence per problem."""


@dataclass(frozen=True)
class Setting:
    """Knobs that differ from the baseline's, by name in upper case."""

    name: str
    knobs: Mapping[str, str]

    @property
    def first_stage(self) -> str:
        """Where it parts from the baseline."""
        if not self.knobs or not all(k.startswith(SCORING + QUANTIZING) for k in self.knobs):
            return "train"
        return "evaluate" if all(k.startswith(SCORING) for k in self.knobs) else "calibrate"

    def folder(self, out: Path, seed: int) -> Path:
        return out / re.sub(r"[^\w.=,+-]", "_", self.name) / f"seed{seed}"


def parse_settings(text: str) -> list[Setting]:
    """The baseline, then every setting. A comma that no knob follows belongs to the value before it."""
    settings = [Setting(BASELINE, {})]
    for word in dict.fromkeys(text.split()):
        pairs = [part.partition("=") for part in re.split(r",(?=[A-Z]\w*=)", word)]
        for knob, equals, _ in pairs:
            if not re.fullmatch(r"[A-Z]\w*", knob) or not equals:
                raise Refused(f"{word}: write KNOB=VALUE, or KNOB=VALUE,KNOB=VALUE")
            if knob in OURS:
                raise Refused(f"{word}: {knob} belongs to ablate.py; seeds are SEEDS, the folder is OUT")
        settings.append(Setting(word, {knob: value for knob, _, value in pairs}))
    if len(settings) == 1:
        raise Refused('nothing to compare: give settings such as "MUON_GRAD_POWER=0.9 MUON_WD=0.05,ADAM_WD=0"')
    return settings


def parse_numbers(name: str, default: str) -> list[int]:
    text = os.environ.get(name) or default
    if not re.fullmatch(r"\s*\d+(\s+\d+)*\s*", text):
        raise Refused(f"{name}={text!r}: give whole numbers with spaces between them")
    return [int(n) for n in dict.fromkeys(text.split())]


def parse_gpus(nproc: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of every run that may go on at once; one that is empty leaves it as it is."""
    lanes = os.environ.get("GPUS", "").split() or [""]
    if lanes != [""] and not all(re.fullmatch(rf"\d+(,\d+){{{nproc - 1}}}", lane) for lane in lanes):
        example = " ".join(",".join(str(run * nproc + i) for i in range(nproc)) for run in range(2))
        raise Refused(f'GPUS={os.environ["GPUS"]!r}: give the GPUs of each run at a time, here such as "{example}"')
    return lanes


# ---- Runs ------------------------------------------------------------------------------------------------------------
CHECK = """
import json, sys
from dataclasses import asdict
sys.path.insert(0, sys.argv[1])
import train_gpt
for env in json.load(sys.stdin):
    try:
        config = train_gpt.load_config(env)
        problems = [*train_gpt.data_problems(config, not config.eval_only_artifact)]
        print(json.dumps("\\n".join(problems) or asdict(config)))
    except train_gpt.ConfigError as e:
        print(json.dumps(str(e)))
"""


def base_environment() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in (*OURS, "SEEDS", "NPROC", "GPUS", "OUT")}
    env["PRESET"] = os.environ.get("PRESET", "demo")
    env.setdefault("MAX_WALLCLOCK_SECONDS", "0")
    return env


def resolved(settings: Sequence[Setting], env: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The whole configuration of every setting. Raises Refused with all problems, those of the baseline alone."""
    command = [sys.executable, "-c", CHECK, str(PROGRAM.parent)]
    envs = json.dumps([{**env, **s.knobs} for s in settings])
    done = subprocess.run(command, input=envs, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"train_gpt.py cannot be imported: {last_line(done.stderr)}")
    configs, problems = {}, []
    for setting, line in zip(settings, done.stdout.splitlines(), strict=True):
        config = json.loads(line)
        if isinstance(config, str) and setting.name == BASELINE:
            raise Refused(config)
        if isinstance(config, str):
            problems += [f"{setting.name}: {sentence}" for sentence in config.splitlines()]
            continue
        problems += [f"{setting.name}: {k} is no knob" for k in setting.knobs if k.lower() not in config]
        if config["max_wallclock_seconds"] > 0:
            problems.append(f"{setting.name}: runs compare after the same steps: leave MAX_WALLCLOCK_SECONDS at 0")
        configs[setting.name] = config
    if problems:
        raise Refused("\n".join(dict.fromkeys(problems)))
    return configs


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


def read_json(path: Path) -> dict[str, Any]:
    """Empty if the file is missing or broken, as one is whose writer was killed."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def finished(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The result that a run of this identity has left, or nothing."""
    return read_json(folder / "run.json").get("result", {}) if read_json(folder / "ablate.json") == identity else {}


def set_aside(folder: Path) -> None:
    """Makes room for a run: a result of other settings stays beside it, under the time when it ended."""
    if read_json(folder / "run.json").get("result"):
        ended = time.strftime("%Y%m%d-%H%M%S", time.localtime((folder / "run.json").stat().st_mtime))
        shutil.rmtree(aside := folder.with_name(f"{folder.name}.{ended}"), ignore_errors=True)
        folder.rename(aside)
    shutil.rmtree(folder, ignore_errors=True)


class Runner:
    """Runs settings, each in a process, or several, of its own; as many at once as there are lanes."""

    def __init__(self, settings: Sequence[Setting], out: Path, nproc: int, lanes: Sequence[str]):
        self.out, self.nproc, self.env = out, nproc, base_environment()
        self.configs = resolved(settings, self.env)
        self.program = hashlib.sha256(PROGRAM.read_bytes()).hexdigest()
        self.results: dict[str, dict[int, dict[str, Any]]] = {s.name: {} for s in settings}
        self.lanes, self.running = queue.SimpleQueue[str](), set[subprocess.Popen]()
        self.stopped, self.lock = False, threading.Lock()
        for lane in lanes:
            self.lanes.put(lane)
        if len(lanes) > 1:
            self.env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(lanes))))

    def run(self, setting: Setting, seed: int, baseline: Future[str] | None = None) -> str:
        """One run, or what is left of an earlier one; returns what became of it, in a few words.

        baseline: the run of this seed that it waits for, if it starts from what that leaves.
        """
        folder, config, lane = setting.folder(self.out, seed), self.configs[setting.name], self.lanes.get()
        try:
            if baseline:
                baseline.result()
            base = self.results[BASELINE].get(seed, {})
            identity = {"config": {k: v for k, v in config.items() if k not in PLACES} | {"seed": seed},
                        "processes": self.nproc, "threads": self.env.get("OMP_NUM_THREADS"), "program": self.program,
                        "from": self.starts_from(setting, seed)}  # fmt: skip
            if setting.first_stage != "train" and not base:
                return "skipped: the baseline has no result"
            began, result = time.monotonic(), finished(folder, identity)
            if not result:
                set_aside(folder)
                folder.mkdir(parents=True)
                (folder / "ablate.json").write_text(json.dumps(identity, indent=1))
                code = self.launch(self.environment(setting, seed, lane), folder / "output.txt")
                result = finished(folder, identity)
            if not result:
                text = (folder / "output.txt").read_text(errors="replace")
                return f"FAILED with code {code}: {last_line(text)} (all of it: {folder / 'output.txt'})"
        finally:
            self.lanes.put(lane)
        self.results[setting.name][seed] = {k: base[k] for k in MADE_BEFORE[setting.first_stage] if k in base} | result
        scores = " ".join(
            f"{name.removeprefix('bpb_')} {result[name]:.5f}" for name in STAGES if name[:3] == "bpb" and name in result
        )
        return f"{scores} ({time.monotonic() - began:.0f}s)"

    def starts_from(self, setting: Setting, seed: int) -> str | None:
        """Hash of what a run takes from the baseline: one of another baseline is another run."""
        path = Setting(BASELINE, {}).folder(self.out, seed) / {"calibrate": WEIGHTS}.get(setting.first_stage, ARTIFACT)
        if setting.first_stage == "train" or not path.exists():
            return None
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def environment(self, setting: Setting, seed: int, lane: str) -> dict[str, str]:
        """Of the process. A run that starts from the baseline's float weights finds them in its folder."""
        folder, base = setting.folder(self.out, seed), Setting(BASELINE, {}).folder(self.out, seed)
        env = {**self.env, **setting.knobs, "SEED": str(seed), "RUN_DIR": str(folder)}
        if lane:
            env["CUDA_VISIBLE_DEVICES"] = lane
        if setting.first_stage == "evaluate":
            for name in ("EVAL_ONLY_CHECKPOINT", "HOTSTART_FP_CKPT"):
                env.pop(name, None)
            env["EVAL_ONLY_ARTIFACT"] = str(base / ARTIFACT)
        elif setting.first_stage == "calibrate" and (base / WEIGHTS).exists():  # a baseline from a checkpoint has none
            env["FROM_STAGE"] = "calibrate"
            (folder / WEIGHTS).hardlink_to(base / WEIGHTS)  # stays what it is when another baseline comes
        return env

    def launch(self, env: Mapping[str, str], output: Path) -> int:
        many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.nproc}"]
        command = [sys.executable, *(many if self.nproc > 1 else []), str(PROGRAM)]
        with open(output, "wb") as file:
            with self.lock:  # none begins once all were told to end
                if self.stopped:
                    return -signal.SIGTERM
                process = subprocess.Popen(command, env=env, stdout=file, stderr=file)
                self.running.add(process)
            code = process.wait()
        with self.lock:
            self.running.discard(process)
        return code

    def stop(self) -> None:
        """Ends what is running: nothing survives an interruption."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()


# ---- Table -----------------------------------------------------------------------------------------------------------
def written(values: Sequence[float], form: str, sign: str = "") -> str:
    """Mean and, of several values, their standard deviation."""
    if not values:
        return "-"
    if sign and not any(values):
        return "same"
    mean = format(statistics.mean(values), f"{sign},{form}")
    return mean if len(values) == 1 else f"{mean} +- {statistics.stdev(values):,{form}}"


def table(settings: Sequence[Setting], results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """The baseline's figures, then setting minus baseline by seed: Markdown."""
    base = results[BASELINE]
    columns = [k for k in STAGES if any(k in r for r in base.values())]
    rows = [["setting", "seeds", *(STAGES[k][0] for k in columns)], ["---"] * (len(columns) + 2)]
    for setting in settings:
        mine, cells = results[setting.name], []
        seeds = [s for s in mine if s in base]
        for key in columns:
            form, pairs = STAGES[key][1], [(mine[s][key], base[s][key]) for s in seeds if key in mine[s]]
            if setting.name == BASELINE:
                cells.append(written([a for a, _ in pairs], form))
            else:
                cells.append(written([a - b for a, b in pairs], form, "+"))
        rows.append([f"`{setting.name}`", str(len(seeds)), *cells])
    lines = ["| " + " | ".join(r) + " |" for r in rows]
    return "\n".join(
        [*lines, "", "Below the baseline: setting minus baseline by seed, mean +- standard deviation.", ""]
    )


def run_all(settings: Sequence[Setting], seeds: Sequence[int], runner: Runner, n_lanes: int) -> None:
    """All runs, seed after seed, those last that start from what a baseline leaves; a line for each as it ends."""
    jobs, baselines = [(setting, seed) for seed in seeds for setting in settings], dict[int, Future[str]]()
    jobs.sort(key=lambda job: job[0].first_stage != "train")
    pool = ThreadPoolExecutor(n_lanes)

    def one(number: int, setting: Setting, seed: int) -> str:
        waits_for = baselines[seed] if setting.first_stage != "train" else None
        head = f"[{number}/{len(jobs)}] {setting.name} seed {seed}: "
        if alone := n_lanes == 1:
            print(head, end="", flush=True)
        became = runner.run(setting, seed, waits_for)
        if not runner.stopped:
            print(became if alone else head + became, flush=True)
        return became

    try:
        futures = []
        for number, (setting, seed) in enumerate(jobs, 1):
            futures.append(pool.submit(one, number, setting, seed))
            if setting.name == BASELINE:  # the first of its seed
                baselines[seed] = futures[-1]
        for future in futures:
            future.result()
            so_far = {name: dict(by_seed) for name, by_seed in runner.results.items()}
            (runner.out / "table.md").write_text(table(settings, so_far))
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        runner.stop()
        raise
    finally:
        pool.shutdown()


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        settings = parse_settings(" ".join(sys.argv[1:]))
        seeds, (nproc, *_) = parse_numbers("SEEDS", "42 0"), parse_numbers("NPROC", "1")
        if nproc < 1:
            raise Refused(f"NPROC={nproc}: a run has one process or more")
        lanes = parse_gpus(nproc)
        runner = Runner(settings, out := Path(os.environ.get("OUT") or "runs/ablate"), nproc, lanes)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise Refused(f"OUT={out} cannot be written: {e.strerror}") from None
    except Refused as e:
        print("these settings cannot work:", *str(e).splitlines(), sep="\n  - ", file=sys.stderr)
        return 2
    try:
        run_all(settings, seeds, runner, len(lanes))
    except KeyboardInterrupt:
        print("interrupted: the same command starts anew what was running and goes on from there")
        return 130
    print(f"\n{table(settings, runner.results)}\nwritten to {out / 'table.md'}")
    return 0 if all(len(r) == len(seeds) for r in runner.results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
