"""Artifacts that are damaged or lie: loading one gives a model or one named error, never anything else.

    PYTHONPATH=. python tests/fuzz_artifact.py [CASES] [SEED]      100,000 cases unless told otherwise

Cases are changes of a real artifact: bytes flipped, cut out, doubled; under a right checksum, so that they get past it;
values of the header replaced; payload of another compressor. Case n of a seed is always the same. From the first case
on the process may map no more than HEADROOM beyond what it has, and code that it runs, files that it writes,
connections and processes that it starts are errors.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import resource
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support import LoneRun, tiny_config, tiny_model

import train_gpt
from train_gpt import MAGIC, ArtifactError, Coded, Config, Stop, pack, read_header

HEADROOM = 512 << 20  # bytes; the tiny model takes 0.2 MiB, the compressors' windows up to 128
FORBIDDEN = ("exec", "compile", "import", "pickle", "marshal", "os.", "subprocess", "socket", "ctypes", "shutil")
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 32, 255, 1 << 16, 1 << 31, 1 << 62, 10**40, 0.0, 0.5, -1.5, 1e308, -1e308,
    math.inf, -math.inf, math.nan, "", "a", "gptq", "rows", "float16", "lzma", "zstd", "brotli", "tok_emb.weight",
    "blocks.0.mlp.fc.weight", "__class__", "\ud800", "x" * 3000, [], [[]], {}, {"a": 1}, [1, 2], [-1, 5],
)  # fmt: skip


def small_artifact(compressor: str = "brotli") -> bytes:
    """A tiny model with every kind of tensor; what its numbers are does not matter."""
    changes = dict(smear_gate_enabled=True, attn_out_gate_enabled=True, compressor=compressor)
    coded = {}
    for name, x in train_gpt.unbank(tiny_model(**changes).state_dict()).items():
        matrix = x.dim() == 2 and (name.startswith("blocks.") or name == "tok_emb.weight")
        codes, scale = train_gpt.int8_rows(x.detach()) if matrix else (None, None)
        kind = ("rows" if "gate" in name else "gptq") if matrix else "float16"
        coded[name] = Coded(kind, 8, codes, scale, None if matrix else x.detach().half())
    return pack(coded, True, tiny_config(**changes))


def sealed(header: Any, payload: bytes) -> bytes:
    text = zlib.compress(json.dumps(header).encode(), 1)
    return with_checksum(len(text).to_bytes(4, "little") + text + payload)


def with_checksum(body: bytes) -> bytes:
    return MAGIC + hashlib.sha256(body).digest() + body


# ---- changes ---------------------------------------------------------------------------------------------------------
def damage(rng: random.Random, data: bytes) -> bytes:
    """A few bytes flipped, cut out, doubled, swapped or replaced."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 40))):
        a = rng.randrange(len(out) + 1)
        b = min(len(out), a + rng.choice((1, 1, 2, 8, 300)))
        kind = rng.randrange(5)
        if kind == 0 and a < len(out):
            out[a] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[a:b]
        elif kind == 2:
            out[a:a] = out[a:b]
        elif kind == 3:
            out[a:b] = rng.randbytes(b - a)
        else:
            del out[rng.randrange(len(out) + 1) :]
    return bytes(out)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value holds other values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for k, v in items for p in ((*path, k), *places(v, (*path, k)))]


def lie(rng: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    """The header with some values replaced, removed, moved or made up."""
    header = copy.deepcopy(header)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if rng.random() < 0.2 and isinstance(header.get("config"), dict):
            header["config"][rng.choice(train_gpt.MODEL_FIELDS)] = copy.deepcopy(rng.choice(VALUES))
            continue
        key = rng.choice(list(header) or ["config"])
        inside = [p for p in places(header) if p[0] == key]
        *way, last = rng.choice(inside or [(key,)])
        holder: Any = header
        for step in way:
            holder = holder[step]
        change = rng.randrange(4)
        if change == 0 and inside:
            del holder[last]
        elif change == 1 and isinstance(holder, list):
            rng.shuffle(holder)
        else:
            holder[last] = value_near(rng, holder[last] if inside else None)
    return header


def value_near(rng: random.Random, old: Any) -> Any:
    if isinstance(old, int | float) and rng.random() < 0.6:
        return rng.choice((old + 1, old - 1, -old, old * 2, old * 1000, old * 0.5 if abs(old) < 1e300 else 0, str(old)))
    return copy.deepcopy(rng.choice(VALUES))


def mutated(rng: random.Random, artifacts: list[bytes]) -> bytes:
    """One case."""
    blob = rng.choice(artifacts)
    kind = rng.randrange(6)
    if kind == 0:
        return damage(rng, blob)
    if kind == 1:
        return with_checksum(damage(rng, blob[len(MAGIC) + 32 :]))
    header, payload = read_header(blob)
    if kind == 2:
        return sealed(header, damage(rng, payload))
    if kind == 3:
        damaged = damage(rng, json.dumps(header).encode())
        text = zlib.compress(damaged, 1)
        return with_checksum(len(text).to_bytes(4, "little") + text + payload)
    if kind == 4:
        return sealed(lie(rng, header), read_header(rng.choice(artifacts))[1])
    return sealed(lie(rng, header), payload)


# ---- loading ---------------------------------------------------------------------------------------------------------
def load(blob: bytes) -> str:
    """What became of it: `model`, or the error in the words of the program. Raises whatever else happens."""
    try:
        state, *_ = train_gpt.unpack(blob)
        assert all(isinstance(x, torch.Tensor) for x in state.values())
    except ArtifactError as e:
        assert "\n" not in str(e)
        return "refused by unpack"
    try:
        train_gpt.model_from_artifact(Config(vocab_size=128), LoneRun(), blob)
    except Stop as stop:
        assert stop.code == 2
        return "refused as a model"
    return "model"


def small_artifacts() -> list[bytes]:
    return [small_artifact(c) for c in train_gpt.COMPRESSORS]


def fuzz(artifacts: list[bytes], cases: int, seed: int, say: Callable[[str], None] = print) -> Counter[str]:
    """Loads `cases` mutants; raises AssertionError naming the first that does anything but fail by name."""
    ends: Counter[str] = Counter()
    began = time.monotonic()
    for n in range(cases):
        blob = mutated(random.Random(f"{seed}/{n}"), artifacts)
        try:
            ends[load(blob)] += 1
        except BaseException as e:
            raise AssertionError(f"case {n} of seed {seed}: {type(e).__name__}: {str(e)[:200]}") from e
        if n % 10_000 == 9_999:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            say(f"{n + 1} cases in {time.monotonic() - began:.0f}s, peak memory {peak} MiB: {dict(ends)}")
    return ends


def forbid(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: what loading data has no reason to do."""
    writes = event == "open" and (args[1] or "r")[0] in "wax+"
    if writes or event.startswith(FORBIDDEN):
        raise PermissionError(f"{event} {str(args)[:80]}")


def guard(artifacts: list[bytes]) -> None:
    """From here on, for the rest of this process."""
    for artifact in artifacts:  # what is imported and made once, is so now
        assert load(artifact) == "model"
    most = HEADROOM + resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    sys.addaudithook(forbid)


def main() -> None:
    cases, seed = (int(a) for a in (sys.argv[1:] + ["100000", "0"][len(sys.argv) - 1 :])[:2])
    torch.set_num_threads(1)
    artifacts = small_artifacts()
    guard(artifacts)
    ends = fuzz(artifacts, cases, seed)
    print(f"{sum(ends.values())} cases: {dict(ends)}; nothing else happened")


if __name__ == "__main__":
    main()
