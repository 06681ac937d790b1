"""Runs of train_gpt.py in processes of their own: a tiny configuration, made-up documents, what a run leaves behind."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import sentencepiece
from forked_run import Fork
from support import ROOT, TOKENIZER, write_shard

import prepare_caseops_data
import train_gpt

SCRIPT = ROOT / "train_gpt.py"
KNOBS = {f.name.upper() for f in fields(train_gpt.Config)}
TIMEOUT_S = 240  # far above what any run takes: only a hang reaches it

# Every part of the pipeline is on: loop, skips, lanes, gates, two phases of test-time training with base learning.
TINY: dict[str, Any] = dict(
    NUM_LAYERS=4, MODEL_DIM=32, NUM_HEADS=2, NUM_KV_HEADS=1, MLP_MULT=2, ROPE_DIMS=8, LOOP_START=1, LOOP_END=1,
    NUM_LOOPS=1, PARALLEL_START_LAYER=3, XSA_LAST_N=4, SMEAR_GATE_ENABLED=1, GATE_WINDOW=12, VOCAB_SIZE=8192,
    TRAIN_BATCH_TOKENS=512, TRAIN_SEQ_LEN=32, EVAL_SEQ_LEN=64, VAL_BATCH_TOKENS=2048, ITERATIONS=12, VAL_LOSS_EVERY=6,
    TRAIN_LOG_EVERY=1, WARMUP_STEPS=1, MAX_WALLCLOCK_SECONDS=0, CHECKPOINT_EVERY=0, MUON_MOMENTUM_WARMUP_STEPS=4,
    GPTQ_CALIBRATION_BATCHES=3, TTT_LORA_RANK=4, TTT_LORA_LR=2e-3, TTT_CHUNK_SIZE=16, TTT_EVAL_SEQ_LEN=64,
    TTT_BATCH_SIZE=2, PHASED_TTT_PREFIX_DOCS=5, PHASED_TTT_NUM_PHASES=2, GLOBAL_TTT_CHUNK_TOKENS=256, DEVICE="cpu",
    OMP_NUM_THREADS=1,
)  # fmt: skip

# ---- documents -------------------------------------------------------------------------------------------------------
COMMON_WORDS = (  # the most frequent first
    "the of and to in that it was for with as his on be at by had not are but from they which one you were her all she "
    "there would their we him been has when who will more no if out so said what up its about into than them can only "
    "other new some could time these two may then do first any my now such like our over man me even most made after "
    "also did many before must through back years where much your way well down should because each just those people "
    "river window letter winter garden morning answer city history island mother music number paper question story"
)
WORDS = COMMON_WORDS.split()
NAMES = ("London", "Anna", "Mr. Hill", "NASA", "the USA", "Zürich", "café Noir", "iPhone", "1984", "Peter")


def made_up_text(rng: random.Random, n_sentences: int) -> str:
    """English-like prose: common words most often, names, capitals, numbers and some letters outside ASCII."""
    sentences = []
    for _ in range(n_sentences):
        words = [WORDS[min(int(rng.expovariate(0.05)), len(WORDS) - 1)] for _ in range(rng.randint(4, 14))]
        words[rng.randrange(len(words))] = rng.choice(NAMES)
        sentence = " ".join(words)
        sentences.append(sentence[0].upper() + sentence[1:] + rng.choice((".", ".", "?", "!")))
    return " ".join(sentences)


def make_shards(folder: Path, seed: int, n_train: int, val_sentences: Sequence[int]) -> Path:
    """Training shards (none for n_train = 0) and one validation shard with a document per entry of `val_sentences`."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    val = [prepare_caseops_data.encode_document(sp, made_up_text(rng, n)) for n in val_sentences]
    write_shard(folder / "fineweb_val_000000.bin", [i for ids, _ in val for i in ids])
    write_shard(folder / "fineweb_val_bytes_000000.bin", [n for _, counts in val for n in counts])
    train: list[int] = []
    while len(train) < n_train:
        train += prepare_caseops_data.encode_document(sp, made_up_text(rng, rng.randint(2, 20)))[0]
    if train:  # two shards, so that a run crosses from one to the next
        write_shard(folder / "fineweb_train_000000.bin", train[: len(train) // 2])
        write_shard(folder / "fineweb_train_000001.bin", train[len(train) // 2 :])
    return folder


# ---- runs ------------------------------------------------------------------------------------------------------------
@dataclass
class Finished:
    """A run that has ended: exit code of each process, everything printed, and the run folder."""

    codes: list[int]
    output: str
    folder: Path

    @property
    def code(self) -> int:
        """The exit code, which has to be the same for every process."""
        assert len(set(self.codes)) == 1, f"exit codes {self.codes}\n{self.output}"
        return self.codes[0]

    @cached_property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return [row for row in self.metrics if row["kind"] == kind]

    @property
    def losses(self) -> dict[int, float]:
        """Training loss by step, in full precision."""
        return {row["step"]: row["loss"] for row in self.rows("train")}

    @property
    def result(self) -> dict[str, Any]:
        """The last result row. Fails with the run's output when there is none."""
        rows = self.rows("result") if (self.folder / "metrics.jsonl").exists() else []
        assert rows, f"no result; exit codes {self.codes}\n{self.output}"
        return rows[-1]

    @property
    def artifact(self) -> bytes:
        return (self.folder / train_gpt.ARTIFACT_NAME).read_bytes()

    def ok(self) -> Finished:
        assert self.code == 0, self.output
        return self


# The same program, whose submission holds its plain text: minifying takes 3 s, and a few runs have tested it.
UNMINIFIED = dict(code="import sys, train_gpt; train_gpt.minify = lambda source: source; sys.exit(train_gpt.main())")


def environment(knobs: dict[str, Any]) -> dict[str, str]:
    """This process's environment without the knobs and ranks somebody may have set, with `knobs`."""
    ours = {*KNOBS, "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("TORCHELASTIC")}
    return kept | {"CUDA_VISIBLE_DEVICES": ""} | {k: str(v) for k, v in knobs.items()}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Launch:
    """The processes of one run, each with its output in a file: a full pipe would block it."""

    def __init__(
        self, knobs: dict[str, Any], *, world: int = 1, torchrun: bool = False, fresh: bool = False, code: str = "",
        restarts: int = 0, script: Path = SCRIPT, cwd: Path = ROOT,
    ) -> None:  # fmt: skip
        """world: processes, started one by one, or by torchrun, which starts them again `restarts` times if one dies.

        code: Python text to run instead of the script.

        fresh: as a user starts it, with a new interpreter. Otherwise a fork, which does the same in less time.
        """
        self.folder = Path(knobs["RUN_DIR"])
        self.outputs: list[Path] = []
        self.processes: list[subprocess.Popen[bytes] | Fork] = []
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}",
                    f"--max-restarts={restarts}"] if torchrun else []  # fmt: skip
        command = [sys.executable, *launcher, str(script)] if fresh or torchrun else []
        port = free_port()
        for rank in range(1 if torchrun else world):
            place = {} if world == 1 or torchrun else dict(
                RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)  # fmt: skip
            env = environment(knobs | place)
            handle, name = tempfile.mkstemp(suffix=".txt")
            self.outputs.append(Path(name))
            with open(handle, "wb") as file:
                if command:
                    process = subprocess.Popen(command, env=env, cwd=cwd, stdout=file, stderr=subprocess.STDOUT)
                else:
                    process = Fork(code, script, env, cwd, Path(name))
            self.processes.append(process)

    def printed(self) -> str:
        return "\n".join(o.read_text(errors="replace") for o in self.outputs)

    def wait_for(self, pattern: str) -> None:
        """Returns once the run has printed a match of `pattern`; fails if it ends first."""
        until = time.monotonic() + TIMEOUT_S
        while not re.search(pattern, self.printed()):
            alive = all(p.poll() is None for p in self.processes)
            assert alive and time.monotonic() < until, f"never printed {pattern}\n{self.printed()}"
            time.sleep(0.02)

    def finish(self) -> Finished:
        """Waits for the processes. One that hangs is killed, and fails the test with what it had printed."""
        until = time.monotonic() + TIMEOUT_S
        try:
            codes = [p.wait(max(until - time.monotonic(), 0.1)) for p in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {TIMEOUT_S} s\n{self.printed()}") from None
        return Finished(codes, self.printed(), self.folder)

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing survives the block: torchrun is asked first, because killing it would orphan its processes."""
        for p in self.processes:
            p.terminate()
        for p in self.processes:
            try:
                p.wait(40)
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()
        for output in self.outputs:
            output.unlink()


def run(folder: Path, data: Path, how: dict[str, Any] | None = None, **knobs: Any) -> Finished:
    """One run of the tiny configuration from start to end; `knobs` come on top of it. how: arguments of Launch."""
    with Launch(tiny(folder, data, **knobs), **(how or {})) as launch:
        return launch.finish()


def tiny(folder: Path, data: Path, **knobs: Any) -> dict[str, Any]:
    return TINY | {"RUN_DIR": folder, "DATA_PATH": data, "TOKENIZER_PATH": TOKENIZER} | knobs


T = TypeVar("T")


def together(jobs: dict[str, Callable[[], T]]) -> dict[str, T]:
    """Runs jobs two at a time: the tests are meant for two cores, and a run uses one."""
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        return {name: future.result() for name, future in futures.items()}
