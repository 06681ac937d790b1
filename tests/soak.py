"""Run after run with other seeds: none may fail, and none may take more memory or leave more behind than the first.

    PYTHONPATH=. python tests/soak.py [RUNS] [HOURS]      30 runs or 2 hours of the CPU demo, whichever ends first

Watched are the exit code, that there is a finite score, the peak of memory, the files in the run folder, temporary
files, shared memory, and processes of the run's session that outlive it. The demo's data must be there (`make demo`).
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATASET = ROOT / "data/demo/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
DEMO = dict(PRESET="demo", DATA_PATH=DATASET, TOKENIZER_PATH=ROOT / "tokenizer/caseops_8192.model", DEVICE="cpu")
COMMAND = (sys.executable, str(ROOT / "train_gpt.py"))
GROWTH = 1.15  # of the first run's peak memory: what the allocator does not repeat exactly


@dataclass(frozen=True)
class Left:
    """One run, as it is seen from outside."""

    seed: int
    code: int
    bpb: float
    peak_mib: int
    files: frozenset[str]
    temporary: int
    shared: int
    processes: int


def session_members(session: int) -> int:
    """Processes of a session that still run."""
    n = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, theirs = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        n += int(theirs) == session and state != "Z"
    return n


def shared_memory() -> int:
    """Pieces that processes of PyTorch left behind: they carry the number of a process that is no more."""
    owners = [re.match(r"torch_(\d+)_", p.name) for p in Path("/dev/shm").glob("torch_*")]
    return sum(m is not None and not Path("/proc", m[1]).exists() for m in owners)


def one(folder: Path, seed: int, command: Sequence[str], knobs: dict[str, Any]) -> Left:
    """A run in a session of its own; all share a folder for temporary files."""
    home, scratch = folder / f"seed{seed}", folder / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    mine = dict(SEED=seed, RUN_DIR=home, TMPDIR=scratch)
    env = os.environ | {k: str(v) for k, v in (knobs | mine).items()}
    before = shared_memory()
    with open(folder / f"seed{seed}.txt", "wb") as output:
        run = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        code = run.wait()
    result: dict[str, Any] = {}
    if (home / "run.json").exists():
        result = json.loads((home / "run.json").read_text()).get("result", {})
    files = frozenset(str(p.relative_to(home)) for p in home.rglob("*")) if home.is_dir() else frozenset()
    return Left(seed, code, result.get("bpb_ttt", result.get("bpb_quantized", math.nan)),
                result.get("peak_memory_mib", 0), files, len(list(scratch.iterdir())), shared_memory() - before,
                session_members(run.pid))  # fmt: skip


def faults(run: Left, first: Left) -> list[str]:
    """What is wrong with a run, beside the first one."""
    checks = [
        (run.code != 0, f"exit code {run.code}"),
        (not math.isfinite(run.bpb), f"the score is {run.bpb}"),
        (run.peak_mib > GROWTH * first.peak_mib, f"peak memory {run.peak_mib} MiB, at first {first.peak_mib}"),
        (run.files != first.files, f"other files than at first: {sorted(run.files ^ first.files)}"),
        (run.temporary > first.temporary, f"{run.temporary} temporary files, at first {first.temporary}"),
        (run.shared > 0, f"{run.shared} pieces of shared memory left"),
        (run.processes > 0, f"{run.processes} processes still run"),
    ]
    return [f"seed {run.seed}: {sentence}" for bad, sentence in checks if bad]


def soak(
    folder: Path, runs: int, hours: float, command: Sequence[str] = COMMAND, knobs: dict[str, Any] = DEMO,
    say: Callable[[str], None] = print,
) -> list[Left]:  # fmt: skip
    """Raises AssertionError with everything that went wrong; a run that has begun is finished."""
    began, done, wrong = time.monotonic(), [], []
    for seed in range(runs):
        if done and time.monotonic() - began > 3600 * hours:
            break
        done.append(one(folder, seed, command, knobs))
        wrong += faults(done[-1], done[0])
        say(f"seed {seed}: bpb {done[-1].bpb:.5f}, peak {done[-1].peak_mib} MiB, {time.monotonic() - began:.0f}s")
    assert not wrong, "\n".join(wrong)
    return done


def main() -> None:
    runs, hours = (sys.argv[1:] + ["30", "2"][len(sys.argv) - 1 :])[:2]
    with tempfile.TemporaryDirectory() as folder:
        done = soak(Path(folder), int(runs), float(hours))
    print(f"{len(done)} runs, peak memory {min(r.peak_mib for r in done)} to {max(r.peak_mib for r in done)} MiB, "
          "nothing failed, nothing was left behind")  # fmt: skip


if __name__ == "__main__":
    main()
