"""The short form of `make soak`, and that it sees what it watches for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import soak
from pipeline_tools import UNMINIFIED, environment, make_shards, tiny

# A stand-in for a run: leaves what a run leaves, and from the second seed on a fault.
RUN = """
import json, os, pathlib, subprocess, sys
home, late = pathlib.Path(os.environ["RUN_DIR"]), os.environ["SEED"] == "1"
home.mkdir()
result = dict(bpb_ttt=1.5, peak_memory_mib=100)
if late:
    {fault}
(home / "run.json").write_text(json.dumps(dict(result=result)))
"""
FAULTS = {
    "sys.exit(3)": "exit code 3",
    "result['bpb_ttt'] = float('nan')": "the score is nan",
    "result['peak_memory_mib'] = 130": "peak memory 130 MiB, at first 100",
    "(home / '.checkpoint.pt.12').touch()": "other files than at first: ['.checkpoint.pt.12']",
    "pathlib.Path(os.environ['TMPDIR'], 'x').touch()": "1 temporary files, at first 0",
    "subprocess.Popen(['sleep', '5'])": "1 processes still run",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_later_run_is_seen(tmp_path: Path, fault: str) -> None:
    with pytest.raises(AssertionError) as e:
        soak.soak(tmp_path, 2, 1.0, (sys.executable, "-c", RUN.format(fault=fault)), {}, say=lambda text: None)
    assert f"seed 1: {FAULTS[fault]}" in str(e.value)
    assert "seed 0" not in str(e.value)


def test_time_ends_a_soak(tmp_path: Path) -> None:
    command = (sys.executable, "-c", RUN.format(fault="pass"))
    assert len(soak.soak(tmp_path, 3, 0.0, command, {}, say=lambda text: None)) == 1


@pytest.mark.slow
def test_two_seeds_of_the_tiny_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak.os, "environ", environment({}))
    data = make_shards(tmp_path / "data", 0, 4_000, (5, 2, 6))
    knobs = tiny(tmp_path, data, ITERATIONS=2, VAL_LOSS_EVERY=0, WARMUP_STEPS=0, GPTQ_CALIBRATION_BATCHES=1,
                 TTT_ENABLED=0, PYTHONPATH=soak.ROOT)  # fmt: skip
    done = soak.soak(tmp_path, 2, 1.0, (sys.executable, "-c", UNMINIFIED["code"]), knobs)
    assert [r.seed for r in done] == [0, 1]
    assert done[0].bpb != done[1].bpb and {"log.txt", "01_weights.pt", "submission/train_gpt.py"} <= done[0].files
