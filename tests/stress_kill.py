"""Runs that are killed (SIGKILL) at random moments and go on must end in the number of the run that nobody disturbed.

    PYTHONPATH=. python tests/stress_kill.py [RUNS] [SEED]      50 runs unless told otherwise

A moment is a line of the undisturbed log, from the first to the last, and up to 0.2 s after it: every stage has some.
After a kill the folder is what a user finds, and `next_start` does what the messages of the program advise; a run may
be killed again. Compared are the score after test-time training, to the last bit, and the bytes of the artifact.
"""

from __future__ import annotations

import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline_tools import UNMINIFIED, Finished, Launch, make_shards, tiny

from train_gpt import ARTIFACT_NAME

KNOBS: dict[str, Any] = dict(ITERATIONS=6, CHECKPOINT_EVERY=2, VAL_LOSS_EVERY=0, GPTQ_CALIBRATION_BATCHES=1,
                             PHASED_TTT_PREFIX_DOCS=2, GLOBAL_TTT_CHUNK_TOKENS=128)  # fmt: skip
VAL_SENTENCES = (5, 2, 6, 3)


def next_start(folder: Path) -> dict[str, Any]:
    """How to go on from what a killed run left."""
    if (folder / "submission" / ARTIFACT_NAME).exists():
        return dict(FROM_STAGE="evaluate")
    for name, stage in (("03_coded", "pack"), ("02_hessians", "quantize"), ("01_weights", "calibrate")):
        if (folder / f"{name}.pt").exists():
            return dict(FROM_STAGE=stage)
    return dict(RESUME=1) if (folder / "checkpoint.pt").exists() else {}


def final(end: Finished) -> tuple[float, bytes]:
    end.ok()
    return end.result["bpb_ttt"], end.artifact


def killed(knobs: dict[str, Any], lines: int, delay: float) -> bool:
    """Whether the run was still there to be killed once it had printed so many lines."""
    with Launch(knobs, **UNMINIFIED) as launch:
        process = launch.processes[0]
        while process.poll() is None and launch.printed().count("\n") < lines:
            time.sleep(0.005)
        time.sleep(delay)
        was_alive = process.poll() is None
        if was_alive:
            process.send_signal(signal.SIGKILL)
        process.wait()
    return was_alive


def half_written(folder: Path) -> list[str]:
    """What a kill may leave, and the next start must not use: all under hidden names."""
    return [p.name for p in folder.rglob(".*") if p.is_file()]


def disturb(knobs: dict[str, Any], n_lines: int, rng: random.Random) -> tuple[list[str], Finished]:
    """One run, killed once or several times: where it went on each time, and its end."""
    ways: list[str] = []
    folder: Path = knobs["RUN_DIR"]
    start: dict[str, Any] = {}
    while not ways or rng.random() < 0.4:
        if not killed(knobs | start, rng.randrange(n_lines), rng.random() * 0.2):
            break
        start = next_start(folder)
        ways.append(" ".join(f"{k}={v}" for k, v in start.items()) or "anew")
    with Launch(knobs | start, **UNMINIFIED) as launch:
        return ways, launch.finish()


def stress(root: Path, runs: int, seed: int, say: Callable[[str], None] = print) -> Counter[str]:
    """Raises AssertionError for the first run that ends in another number; returns how often runs went on where."""
    data = make_shards(root / "data", seed, 4_000, VAL_SENTENCES)
    with Launch(tiny(root / "undisturbed", data, **KNOBS), **UNMINIFIED) as launch:
        end = launch.finish()
    want, n_lines = final(end), end.output.count("\n")
    ends: Counter[str] = Counter()
    for i in range(runs):
        folder, rng = root / f"run{i}", random.Random(f"{seed}/{i}")
        ways, end = disturb(tiny(folder, data, **KNOBS), n_lines, rng)
        bpb, artifact = final(end)
        assert (bpb, artifact) == want, f"run {i} of seed {seed}, gone on {ways}: {bpb} instead of {want[0]}"
        assert half_written(folder) == [], f"run {i} of seed {seed} left {half_written(folder)}"
        ends.update(ways)
        say(f"run {i}: {', then '.join(ways) or 'ended before its kill'}: {bpb}")
    return ends


def main() -> None:
    runs, seed = (int(a) for a in (sys.argv[1:] + ["50", "0"][len(sys.argv) - 1 :])[:2])
    with tempfile.TemporaryDirectory() as folder:
        ends = stress(Path(folder), runs, seed)
    print(f"{runs} runs, killed {sum(ends.values())} times, all ended in the same number: {dict(ends)}")


if __name__ == "__main__":
    main()
