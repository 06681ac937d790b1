"""A stranger's artifact can only fail, and a submission holds nothing but this program. Long form: `make fuzz`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import brotli
import fuzz_artifact
import pytest
from support import ROOT

import train_gpt
from train_gpt import ArtifactError


@pytest.fixture(scope="module")
def artifacts() -> list[bytes]:
    return fuzz_artifact.small_artifacts()


def test_mutants_load_or_fail_by_name(artifacts: list[bytes]) -> None:
    """400 cases of the 100,000; both kinds of refusal and models that still load are among them."""
    ends = fuzz_artifact.fuzz(artifacts, 400, seed=7)
    assert set(ends) == {"model", "refused by unpack", "refused as a model"}


FAULTS = """
import fuzz_artifact, train_gpt
inner, artifacts = train_gpt.unpack, fuzz_artifact.small_artifacts()
code = compile("1", "", "exec")
fuzz_artifact.guard(artifacts)
for fault in (lambda: exec(code), lambda: open("x", "w"), lambda: bytearray(1 << 30), lambda: {}["x"]):
    train_gpt.unpack = lambda blob: (fault(), inner(blob))[1]
    try:
        fuzz_artifact.fuzz(artifacts, 3, 0)
    except AssertionError as e:
        print(e)
"""


def test_the_fuzzer_sees_what_loading_has_no_reason_to_do(tmp_path: Path) -> None:
    """In a process of its own, as the long form runs: hooks and limits cannot be taken back."""
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=tmp_path, env=env, capture_output=True, text=True)
    found = [line.removeprefix("case 0 of seed 0: ").split("(")[0].strip() for line in done.stdout.splitlines()]
    assert found == ["PermissionError: exec", "PermissionError: open", "MemoryError:", "KeyError: 'x'"], done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"num_loops": 1 << 40},
        {"loop_end": 1 << 62},
        {"num_layers": 1 << 40},
        {"mlp_mult": 1e308},
        {"mlp_mult": float("inf")},
        {"model_dim": 10**40},
    ],
    ids=str,
)
def test_settings_that_would_fill_memory_stop_the_run(artifacts: list[bytes], settings: dict[str, Any]) -> None:
    header, payload = train_gpt.read_header(artifacts[0])
    header["config"] |= settings
    assert fuzz_artifact.load(fuzz_artifact.sealed(header, payload)) == "refused as a model"


def test_a_window_larger_than_a_piece_is_not_allocated() -> None:
    import zstandard

    wide = zstandard.ZstdCompressionParameters(window_log=27)
    data = zstandard.ZstdCompressor(compression_params=wide).compress(bytes(4 << 20))
    with pytest.raises(ArtifactError):
        train_gpt._piece(data, 1000, "x", "zstd")


# ---- the submission --------------------------------------------------------------------------------------------------
def unwrapped(submission: bytes) -> tuple[str, str]:
    """The stub with a hole, and the program that it unpacks."""
    head, _, rest = submission.decode("latin-1").partition("brotli.decompress('''")
    literal, _, tail = rest.partition("'''.encode")
    program = brotli.decompress(ast.literal_eval(f"'''{literal}'''").encode("latin-1"))
    return f"{head}brotli.decompress('''{{}}'''.encode{tail}", program.decode()


def test_the_submission_holds_nothing_but_the_program(minified: str) -> None:
    stub, program = unwrapped(train_gpt.self_extracting(minified))
    assert stub == train_gpt.STUB
    assert program == minified
    assert str(Path.home()) not in program and str(ROOT) not in program


def test_building_twice_gives_the_same_bytes(minified: str, tmp_path: Path) -> None:
    """By another process with another order of its sets, from another folder."""
    code = "from train_gpt import *; build_submission(Path('s'), b'artifact', Config())"
    env = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "12345", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, capture_output=True)
    assert (tmp_path / "s" / "train_gpt.py").read_bytes() == train_gpt.self_extracting(minified)
    assert (tmp_path / "s" / train_gpt.ARTIFACT_NAME).read_bytes() == b"artifact"
