"""Starts a program in a fork of a process that has already imported PyTorch, which takes a new interpreter 4 s.

Forks come from the standard library's fork server, which imports PRELOAD, runs nothing and starts no threads. This
module imports nothing of the project, so that a program finds it as untouched as in a new interpreter.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

PRELOAD = ["torch", "torch._dynamo", "numpy", "sentencepiece", "brotli", "zstandard"]
CONTEXT = multiprocessing.get_context("forkserver")


def begin(code: str, script: Path, env: dict[str, str], cwd: Path, output: Path) -> None:
    """In the fork: becomes `python script`, or `python -c code`, with this environment and all output in a file."""
    import torch

    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    handle = os.open(output, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(handle, number)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))  # PyTorch read the variable when it was imported
    sys.argv = ["-c" if code else str(script)]
    sys.path.insert(0, str(script.parent))
    if code:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(str(script), run_name="__main__")


class Fork:
    """The part of subprocess.Popen that the tests use."""

    def __init__(self, code: str, script: Path, env: dict[str, str], cwd: Path, output: Path) -> None:
        CONTEXT.set_forkserver_preload(PRELOAD)
        self.process = CONTEXT.Process(target=begin, args=(code, script, env, cwd, output))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("fork", timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()
