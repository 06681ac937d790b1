"""The artifact: exact, deterministic, and one sentence for anything else. The submission: what counts, and it runs."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import lzma
import math
import re
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from support import LoneRun, documents, tiny_config, tiny_model

import train_gpt
from train_gpt import MAGIC, ArtifactError, Coded, Config, Stop, pack, quantize, read_header, rebank, unpack

START = len(MAGIC) + 32 + 4  # of the header: behind the checksum and the header's length


def coded_model(seed: int = 0, **changes: Any) -> dict[str, Coded]:
    """White inputs suffice: what the codes are does not matter here."""
    model = tiny_model(seed, **changes)
    narrow, wide = torch.eye(model.cfg.model_dim), torch.eye(model.cfg.hidden_dim)
    hessians = {"head": narrow, "tokens": torch.arange(model.cfg.vocab_size).float()}
    for i in range(model.cfg.num_layers):
        hessians |= {f"blocks.{i}.{site}": narrow for site in ("attn_in", "attn_out", "mlp_in")}
        hessians[f"blocks.{i}.mlp_out"] = wide
    return quantize(model.state_dict(), hessians, model.cfg, LoneRun())


@pytest.fixture(scope="module")
def coded() -> dict[str, Coded]:
    return coded_model()


@pytest.fixture(scope="module")
def artifact(coded: dict[str, Coded]) -> bytes:
    return pack(coded, True, tiny_config())


def relabelled(blob: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The artifact with another header and a right checksum: damage that somebody made on purpose."""
    header, payload = read_header(blob)
    replaced = change(header)
    text = zlib.compress(json.dumps(header if replaced is None else replaced).encode(), 9)
    return sealed(len(text).to_bytes(4, "little") + text + payload)


def sealed(body: bytes) -> bytes:
    return MAGIC + hashlib.sha256(body).digest() + body


# ---- round trip ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compressor", train_gpt.COMPRESSORS)
@pytest.mark.parametrize("looped", [False, True])
def test_unpacking_gives_back_the_decoded_tensors(coded: dict[str, Coded], compressor: str, looped: bool) -> None:
    state, loop, config = unpack(pack(coded, looped, tiny_config(compressor=compressor)))
    want = rebank({name: c.decode() for name, c in coded.items()})
    assert state.keys() == want.keys() == tiny_model().state_dict().keys()
    assert all(torch.equal(state[k], want[k]) and state[k].dtype == torch.float32 for k in want)
    assert loop is looped
    cfg, defaults = tiny_config(), Config()
    assert config == {k: v for k in train_gpt.MODEL_FIELDS if (v := getattr(cfg, k)) != getattr(defaults, k)}


def test_the_artifact_rebuilds_the_model(coded: dict[str, Coded], artifact: bytes) -> None:
    model = tiny_model()
    model.looped = True
    model.load_state_dict(rebank({name: c.decode() for name, c in coded.items()}))
    other_settings = Config(vocab_size=128)  # nothing but the artifact says what the model is
    restored = train_gpt.model_from_artifact(other_settings, LoneRun(), artifact)
    tokens = torch.from_numpy(documents((12,)).astype("int64"))[None]
    assert restored.looped
    assert torch.equal(restored(tokens), model(tokens))


@pytest.mark.parametrize("compressor", train_gpt.COMPRESSORS)
def test_the_same_tensors_give_the_same_bytes(coded: dict[str, Coded], compressor: str) -> None:
    cfg = tiny_config(compressor=compressor)
    assert pack(coded, True, cfg) == pack(coded_model(), True, cfg)


def test_other_tensors_give_other_bytes(coded: dict[str, Coded], artifact: bytes) -> None:
    assert artifact != pack(coded_model(1), True, tiny_config())
    assert artifact != pack(coded, False, tiny_config())


@pytest.mark.parametrize("piece", [64, 1000, 4096])
def test_sections_may_take_several_pieces(
    coded: dict[str, Coded], artifact: bytes, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_gpt, "PIECE", piece)
    blob = pack(coded, True, tiny_config())
    assert len(read_header(blob)[0]["pieces"]) > len(read_header(artifact)[0]["pieces"])
    state = unpack(blob)[0]
    monkeypatch.undo()
    assert all(torch.equal(state[k], v) for k, v in unpack(artifact)[0].items())
    refused(blob)  # made with another size of pieces


def test_options_survive(coded: dict[str, Coded]) -> None:
    changes = dict(smear_gate_enabled=True, attn_out_gate_enabled=True, gated_attn_quant_gate=False)
    mine = coded_model(**changes)
    state, looped, config = unpack(pack(mine, False, tiny_config(**changes)))
    want = rebank({n: c.decode() for n, c in mine.items()})
    assert {"smear_lambda", "smear_gate.weight", "blocks.0.attn.attn_gate_proj.weight"} <= set(state) - set(coded)
    assert config["smear_gate_enabled"] is True
    assert not looped
    assert all(torch.equal(v, want[k]) for k, v in state.items())


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=60))
def test_shuffling_bytes_is_reversible(data: bytes) -> None:
    data = data[: len(data) // 2 * 2]  # 16-bit values
    assert train_gpt.unshuffle_bytes(train_gpt.shuffle_bytes(data)) == data


def test_shuffling_puts_low_bytes_first() -> None:
    assert train_gpt.shuffle_bytes(b"aAbBcC") == b"abcABC"


# ---- damage ----------------------------------------------------------------------------------------------------------
def refused(blob: bytes) -> str:
    with pytest.raises(ArtifactError) as e:
        unpack(blob)
    assert "\n" not in str(e.value)
    return str(e.value)


@settings(max_examples=300, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_flipped_byte_is_an_error(artifact: bytes, where: float, mask: int) -> None:
    broken = bytearray(artifact)
    broken[int(where * len(artifact))] ^= mask
    refused(bytes(broken))


def test_a_flipped_bit_anywhere_in_the_header_is_an_error(artifact: bytes) -> None:
    end = START + int.from_bytes(artifact[START - 4 : START], "little")
    accepted = []
    for i in range(end + 8):
        for bit in range(8):
            broken = bytearray(artifact)
            broken[i] ^= 1 << bit
            try:
                unpack(bytes(broken))
            except ArtifactError:
                continue
            accepted.append((i, bit))
    assert accepted == []


def test_every_change_of_the_first_bytes_is_an_error(artifact: bytes) -> None:
    """A deflate stream has spare bits: without a checksum over itself some changes of its first bytes pass."""
    accepted = []
    for i in range(START + 2):
        for mask in range(1, 256):
            broken = bytearray(artifact)
            broken[i] ^= mask
            try:
                unpack(bytes(broken))
            except ArtifactError:
                continue
            accepted.append((i, mask))
    assert accepted == []


def test_a_truncated_artifact_is_an_error(artifact: bytes) -> None:
    for n in [*range(START + 40), *range(START + 40, len(artifact), 997), len(artifact) - 1]:
        refused(artifact[:n])


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_other_files_are_an_error(data: bytes) -> None:
    refused(data)
    refused(MAGIC + data)
    refused(sealed(data))
    refused(sealed(len(data).to_bytes(4, "little") + data))


def test_something_after_the_artifact_is_an_error(artifact: bytes) -> None:
    refused(artifact + b"\0")


# ---- headers that lie ------------------------------------------------------------------------------------------------
def matrix(header: dict[str, Any]) -> list[Any]:
    """The entry of one quantized matrix: name, kind, bits, shape."""
    return next(t for t in header["tensors"] if t[0] == "blocks.0.attn.c_q.weight")


def set_tensor(index: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: matrix(header).__setitem__(index, value)


def set_shape(shape: Any) -> Callable[[dict[str, Any]], None]:
    return set_tensor(3, shape)


def set_key(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.__setitem__(key, value)


def move_bytes(by: int) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header["pieces"][0] += by
        header["pieces"][1] -= by

    return change


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "negative shape": set_shape([-32, 32]),
    "two negative dimensions": set_shape([-32, -32]),
    "zero shape": set_shape([0, 32]),
    "huge shape": set_shape([1 << 23, 1 << 23]),
    "large but not huge shape": set_shape([1 << 14, 1 << 14]),
    "absurd shape": set_shape([10**30, 1]),
    "other shape": set_shape([31, 32]),
    "transposed": set_shape([64, 16]),
    "no shape": set_shape([]),
    "number as shape": set_shape(32),
    "text as shape": set_shape("32"),
    "shape of text": set_shape(["32", "32"]),
    "fractional shape": set_shape([32.0, 32.0]),
    "five dimensions": set_shape([1, 1, 1, 32, 32]),
    "null shape": set_shape(None),
    "other kind": set_tensor(1, "pickle"),
    "kind of another length": set_tensor(1, "rows"),
    "kind that is a list": set_tensor(1, ["gptq"]),
    "bits of text": set_tensor(2, "6"),
    "name that is a number": set_tensor(0, 7),
    "name of another tensor": set_tensor(0, "blocks.77.attn.c_q.weight"),
    "name of a section": set_tensor(0, "float16"),
    "tensor that is a number": lambda h: h["tensors"].__setitem__(3, 5),
    "tensor too short": lambda h: matrix(h).pop() and None,
    "empty tensors": set_key("tensors", []),
    "one tensor less": lambda h: h["tensors"].pop() and None,
    "first tensor twice": lambda h: h["tensors"].append(h["tensors"][0]),
    "tensors that are text": set_key("tensors", "abc"),
    "empty pieces": set_key("pieces", []),
    "bytes of the next piece": move_bytes(1),
    "negative piece": move_bytes(10**6),
    "pieces of text": lambda h: h.__setitem__("pieces", [str(n) for n in h["pieces"]]),
    "pieces that are a number": set_key("pieces", 5),
    "one piece more": lambda h: h["pieces"].append(0),
    "other compressor": set_key("compressor", "zstd"),
    "unknown compressor": set_key("compressor", "rar"),
    "compressor that is a list": set_key("compressor", []),
    "loop that is text": set_key("looped", "1"),
    "settings that are a list": set_key("config", []),
    **{f"no {key}": lambda h, key=key: h.pop(key) and None for key in ("tensors", "compressor", "config", "pieces")},
    "header that is a list": lambda h: [h],
    "header that is null": lambda h: 0,
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_is_an_error(artifact: bytes, name: str) -> None:
    blob = relabelled(artifact, LIES[name])
    tracemalloc.start()
    try:
        refused(blob)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20, "allocated what the header promised"


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(
    key=st.sampled_from(["compressor", "looped", "tensors", "pieces", "config", "tensor", "field"]),
    value=json_values,
    i=st.integers(0, 30),
    j=st.integers(0, 3),
)
def test_no_value_in_a_header_does_more_than_fail(artifact: bytes, key: str, value: Any, i: int, j: int) -> None:
    def change(header: dict[str, Any]) -> None:
        if key == "tensor":
            header["tensors"][i] = value
        elif key == "field":
            header["tensors"][i][j] = value
        else:
            header[key] = value

    with contextlib.suppress(ArtifactError):
        unpack(relabelled(artifact, change))


BOMBS: dict[str, Callable[[bytes], bytes]] = {  # rans writes as many bytes as it is asked for
    "brotli": lambda data: brotli.compress(data, quality=1),
    "lzma": lambda data: lzma.compress(data, preset=1),  # a small dictionary: what is allocated is the output
    "zstd": lambda data: zstandard.ZstdCompressor(level=1).compress(data),
}


DRAWS = {
    "nothing": np.zeros(0),
    "one": np.full(1, 7),
    "one value": np.full(5000, 200),
    "all values": np.arange(256).repeat(9),
    "rare values": np.concatenate([np.zeros(200_000), np.arange(256)]),
    "like codes": np.random.RandomState(0).normal(0, 2.6, 300_001).round().clip(-31, 31),
    "a step less one": np.random.RandomState(1).randint(0, 3, 2 * train_gpt.LANES - 1),
}


@pytest.mark.parametrize("name", DRAWS)
def test_asymmetric_numerals_give_back_what_they_got(name: str) -> None:
    data = DRAWS[name].astype(np.int64).astype(np.uint8).tobytes()
    code = train_gpt.rans_encode(data)
    assert train_gpt.rans_decode(code, len(data)) == data
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=1)
    share = counts[counts > 0] / max(len(data), 1)
    entropy = -(share * np.log2(share)).sum() * len(data) / 8
    tables = math.ceil(len(data) / train_gpt.SEGMENT) * (32 + 2 * len(share))
    assert 0.9999 * entropy <= len(code) < 1.002 * entropy + tables + 4 * train_gpt.LANES + 2 * train_gpt.LANES
    if len(data) > 10_000:
        damaged = bytearray(code)
        damaged[-len(code) // 4] ^= 1
        with pytest.raises(ValueError):
            train_gpt.rans_decode(bytes(damaged), len(data))
        for cut in (10, 40, len(code) // 2, len(code) - 2):
            with pytest.raises(ValueError):
                train_gpt.rans_decode(code[:cut], len(data))


def test_codes_are_shorter_than_by_a_dictionary() -> None:
    data = DRAWS["like codes"].astype(np.int64).astype(np.uint8).tobytes()
    assert len(train_gpt.rans_encode(data)) < len(brotli.compress(data, quality=11)) - 300
    text = b"the same again, " * 4000
    assert train_gpt._rans(text)[:1] == b"\0" and train_gpt._unrans(train_gpt._rans(text), len(text)) == text


@pytest.mark.parametrize("compressor", BOMBS)
def test_a_compressed_bomb_is_not_unpacked(compressor: str) -> None:
    """A piece that would unpack to far more than its tensors need stops early."""
    bomb = BOMBS[compressor](bytes(32 << 20))
    assert len(bomb) < 32 << 10
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError):
            train_gpt._piece(bomb, 1000, "x", compressor)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_a_header_bomb_is_not_unpacked() -> None:
    text = zlib.compress(b" " * (100 << 20), 1)
    tracemalloc.start()
    try:
        refused(sealed(len(text).to_bytes(4, "little") + text))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize(
    "config",
    [
        {"num_heads": 0}, {"num_heads": "4"}, {"num_layers": 3}, {"num_layers": 0}, {"model_dim": -32},
        {"model_dim": 1 << 40}, {"vocab_size": 256}, {"rope_dims": 0}, {"rope_dims": 3}, {"train_batch_tokens": 1},
        {"__class__": 1}, {"num_kv_heads": 0}, {"loop_end": 5}, {"logit_softcap": 0}, {"parallel_final_lane": "both"},
        {"mlp_mult": 1e18}, {"gate_window": 64, "smear_gate_enabled": True},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_lie_stop_the_run(artifact: bytes, config: dict[str, Any]) -> None:
    blob = relabelled(artifact, lambda h: h["config"].update(config))
    with pytest.raises(Stop) as stop:
        train_gpt.model_from_artifact(tiny_config(), LoneRun(), blob)
    assert stop.value.code == 2


def test_the_checksum_covers_everything_behind_it(artifact: bytes) -> None:
    assert artifact == sealed(artifact[len(MAGIC) + 32 :])
    header, payload = read_header(artifact)
    assert artifact.endswith(payload)
    assert sum(header["pieces"]) == len(payload)


# ---- the submission --------------------------------------------------------------------------------------------------
def run_python(*args: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_submitted_program_runs_alone(minified: str, tmp_path: Path) -> None:
    (tmp_path / "train_gpt.py").write_bytes(train_gpt.self_extracting(minified))
    done = subprocess.run([sys.executable, "train_gpt.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "no fineweb_val_*.bin" in done.stdout + done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["train_gpt.py"], "it leaves nothing behind"


def test_a_submission_that_trains_again_submits_the_file_it_was_started_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever arguments follow it: its bytes are the code that is counted."""
    (script := tmp_path / "train_gpt.py").write_bytes(b"the file that unpacked this program")
    (other := tmp_path / "argument").write_bytes(b"short")
    monkeypatch.setattr(train_gpt, "IS_SUBMISSION", True)
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-u", str(script), "--flag", str(other)])
    monkeypatch.setattr(sys, "argv", ["/tmp/unpacked.py", "--flag", str(other)])
    sizes = train_gpt.build_submission(tmp_path / "submission", b"artifact", Config())
    assert (tmp_path / "submission" / "train_gpt.py").read_bytes() == script.read_bytes()
    assert sizes["code_bytes"] == len(script.read_bytes())


def test_the_minified_module_is_the_same_model(tmp_path: Path) -> None:
    source = train_gpt.specialized(Path(train_gpt.__file__).read_text(), Config())
    minified = train_gpt.minify(source, keep=["GPT", "load_config", "Docs", "unpack", "LEFT_OUT"])
    (tmp_path / "tiny_train_gpt.py").write_text(minified)
    model = tiny_model()
    model.looped = True
    left_out = set(re.findall(r"'([A-Z0-9_]+)':", minified[minified.index("LEFT_OUT") :].split("}")[0]))
    assert len(left_out) > 10
    knobs = {n: getattr(model.cfg, n.lower()) for n in {f.name.upper() for f in fields(Config)} - left_out}
    env = {k: str(int(v) if isinstance(v, bool) else v) for k, v in knobs.items() if v != ""}
    torch.save({"env": env, "state": model.state_dict()}, tmp_path / "model.pt")
    (tmp_path / "check.py").write_text(
        "import numpy, torch, tiny_train_gpt as t\n"
        "torch.set_num_threads(1)\n"
        "saved = torch.load('model.pt')\n"
        "model = t.GPT(t.load_config(saved['env']))\n"
        "model.load_state_dict(saved['state'])\n"
        "model.looped = True\n"
        "tokens = torch.arange(1, 25)[None]\n"
        "docs = t.Docs(torch.tensor([0, 10, 24, 24], dtype=torch.int32), 14)\n"
        "loss = model(tokens, tokens.roll(-1, 1), docs=docs)\n"
        "loss.backward()\n"
        "artifact = t.unpack(open('artifact', 'rb').read())[0]\n"
        "total = sum(float(x.double().sum()) for x in artifact.values())\n"
        "numpy.savez('out.npz', logits=model(tokens, docs=docs).detach(), grad=model.qo_bank.grad, total=total)\n"
    )
    blob = pack(coded_model(), True, tiny_config())
    (tmp_path / "artifact").write_bytes(blob)
    run_python("check.py", cwd=tmp_path)
    out = np.load(tmp_path / "out.npz")
    tokens = torch.arange(1, 25)[None]
    docs = train_gpt.Docs(torch.tensor([0, 10, 24, 24], dtype=torch.int32), 14)
    model(tokens, tokens.roll(-1, 1), docs=docs).backward()
    assert np.array_equal(out["logits"], model(tokens, docs=docs).detach().numpy())
    assert np.array_equal(out["grad"], model.qo_bank.grad.numpy())
    assert out["total"] == sum(float(x.double().sum()) for x in unpack(blob)[0].values())


def test_the_stub_survives_every_byte(tmp_path: Path) -> None:
    """The compressed program stands in a string literal: the bytes that would end it are escaped."""
    program = "print(len('''" + "".join(chr(i) for i in range(0x20, 0x2000) if chr(i) not in "'\\") + "'''))"
    (tmp_path / "p.py").write_bytes(train_gpt.self_extracting(program))
    assert int(run_python("p.py", cwd=tmp_path)) > 8000


def test_the_stub_holds_any_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, dangerous = np.random.RandomState(0), np.frombuffer(b"'\\\r\n\0\x001234567'\"", np.uint8)
    for n in (1, 2, 3, 50, 20_000):
        for data in (rng.randint(0, 256, n).astype(np.uint8).tobytes(), rng.choice(dangerous, n).tobytes()):
            monkeypatch.setattr(train_gpt, "_brotli", lambda _, data=data: data)
            literals = [
                c.value for c in ast.walk(ast.parse(train_gpt.self_extracting(""))) if isinstance(c, ast.Constant)
            ]
            assert data.decode("latin-1") in literals


def test_the_submission_folder_is_what_counts(
    artifact: bytes, minified: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_gpt, "minify", lambda source: minified)  # takes seconds, and has been done
    sizes = train_gpt.build_submission(tmp_path / "submission", artifact, Config())
    files = {p.name: p.stat().st_size for p in (tmp_path / "submission").iterdir()}
    assert files == {"train_gpt.py": sizes["code_bytes"], train_gpt.ARTIFACT_NAME: len(artifact)}
    assert sizes["total_bytes"] == sum(files.values())
    assert (tmp_path / "submission" / train_gpt.ARTIFACT_NAME).read_bytes() == artifact


def test_sizes_by_part(
    artifact: bytes, minified: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts of the program are compressed alone and sum to more; those of the artifact and its header sum to it."""
    monkeypatch.setattr(train_gpt, "minify", lambda text: minified if len(text) > 100_000 else text[: len(text) // 2])
    assert train_gpt.obey_arguments(["--size"]) == 0
    alone = capsys.readouterr().out.splitlines()
    assert "sum to more" in alone[3] and alone[-1].endswith("make size RUN=runs/demo")

    (tmp_path / train_gpt.ARTIFACT_NAME).write_bytes(artifact)
    assert train_gpt.obey_arguments(["--size", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(alone) - 1] == alone[:-1]
    total, note, *parts, headroom = lines[len(alone) - 1 :]
    assert total.split() == [f"{tmp_path}/{train_gpt.ARTIFACT_NAME}", str(len(artifact))]
    body = artifact[len(MAGIC) + 32 :]
    header = len(MAGIC) + 32 + 4 + int.from_bytes(body[:4], "little")
    assert note == "of which:" and parts[0].split() == ["header", str(header)]
    assert sum(int(line.split()[1]) for line in parts) == len(artifact)
    program = len(train_gpt.self_extracting(minified))
    assert headroom.split() == ["headroom", str(train_gpt.ARTIFACT_LIMIT - program - len(artifact))]


@pytest.mark.parametrize("content", [None, b"something else"])
def test_sizes_of_a_folder_without_an_artifact(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content:
        (tmp_path / train_gpt.ARTIFACT_NAME).write_bytes(content)
    assert train_gpt.obey_arguments(["--size", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert f"cannot read an artifact in {tmp_path}: " in printed.err and printed.out == ""


def kernels_of(program: str) -> dict[str, str]:
    """The Triton kernels of a program without their docstrings, by name."""
    found = {}
    for node in filter(train_gpt.is_kernel, ast.walk(ast.parse(program))):
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        found[node.name] = ast.unparse(node)
    return found


def test_kernels_of_the_submission_are_those_of_the_source(minified: str) -> None:
    """Down to every name: a `constexpr` argument under another name inside a kernel is none, and does not compile."""
    ours = kernels_of(Path(train_gpt.__file__).read_text())
    assert len(ours) > 15
    assert kernels_of(minified) == ours
    assert len(minified) < 148_000 and "KERNEL_" not in minified
