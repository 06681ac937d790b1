"""The files around the code: requirements are pinned, and what CI runs is what the README tells a stranger to run."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = sorted(path.name for path in ROOT.glob("requirements*.txt"))


def requirement_lines(name: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("-r ")]


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_every_requirement_is_pinned(name: str) -> None:
    loose = [line for line in requirement_lines(name) if not re.match(r"[\w-]+(\[\w+\])?==[\w.]+(;.*)?$", line)]
    assert requirement_lines(name)
    assert loose == []


def test_ci_runs_the_readme_test_command() -> None:
    script = ROOT / ".ci" / "run"
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["exec make test"]
    assert os.access(script, os.X_OK)
    assert "make test" in (ROOT / "README.md").read_text()


def test_make_help_lists_every_documented_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.M).group(1).split()
    command = ["make", "--no-print-directory", "help"]  # `make test` may itself be the caller
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.split()[1] for line in listed.splitlines()] == phony


def test_make_size_takes_a_run_folder() -> None:
    """It is named only; nothing runs."""
    command = ["make", "--no-print-directory", "--dry-run", "size", "RUN=runs/some_run"]
    planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert planned.splitlines()[-1].endswith("train_gpt.py --size runs/some_run")


FOUND = "Found 1 known vulnerability in 1 package\nName Version ID\njinja2 2.10 PYSEC-1\n"
SKIPPED = "No known vulnerabilities found\nName Skip Reason\njinja2 Dependency not found on PyPI\n"
AUDITS = {  # what pip-audit says, its exit code, that of make, and what make says
    "nothing known": ("No known vulnerabilities found\n", 0, 0, "pip-audit: nothing known\n"),
    "vulnerable": (FOUND, 1, 2, FOUND),
    "vulnerable, others skipped": (FOUND + "Name Skip Reason\ntorch unknown\n", 1, 2, FOUND),
    "skipped": (SKIPPED, 0, 0, "lint: pip-audit got no answer: jinja2 Dependency not found on PyPI\n"),
    "unreachable": ("Traceback\nConnectTimeout\n", 1, 0, "lint: pip-audit got no answer: ConnectTimeout\n"),
}


@pytest.mark.parametrize("what", AUDITS)
def test_lint_says_what_was_not_looked_up(tmp_path: Path, what: str) -> None:
    """With a pip-audit of ours in an environment that is all made."""
    said, code, want, line = AUDITS[what]
    audit = tmp_path / "bin" / "pip-audit"
    audit.parent.mkdir()
    audit.write_text(f"#!/bin/sh\nprintf '%s' '{said}'\nexit {code}\n")
    audit.chmod(0o755)
    for stamp in (".created", ".requirements-installed", ".requirements-dev-installed"):
        (tmp_path / stamp).touch()
    command = ["make", "--no-print-directory", "lint", f"VENV={tmp_path}", "PY=true"]
    lint = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert lint.returncode == want, lint.stderr
    assert lint.stdout.startswith(line)
