"""Data preparation: exact byte counts, identical output however it is run, every refusal, the tokenizer, the sample."""

from __future__ import annotations

import contextlib
import errno
import functools
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import example, given, settings
from hypothesis import strategies as st

import prepare_caseops_data as prep
from lossless_caps import CONTROLS, ESC, TITLE, encode_lossless_caps_v2

ROOT = Path(__file__).resolve().parent.parent
OURS = ROOT / "tokenizer" / "caseops_8192.model"
SHARED = ROOT / ".." / "shared" / "data"
PUBLIC = SHARED / "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
TOKENIZERS = [
    pytest.param(OURS, id="ours"),
    pytest.param(PUBLIC, id="public", marks=pytest.mark.skipif(not PUBLIC.exists(), reason="no public tokenizer here")),
]

# Characters that normalization drops, turns into blanks, composes, expands or folds; byte fallback; operators.
STRANGE = (
    "\x00\x07\x7f\x85\xa0\xad\u200b\u200e\ufeff\u2028\u3000\u00e9\u00c9\u0301\u0308\u0338\u0344\u00a8\u00bd\u2122\ufb01"
    "\uff21\u2019\u201c\u2014\u2026\u2581\u65e5\U0001f600\ufdfa\ufdfb\u0635\u1fee\ue000\ue005" + "".join(CONTROLS)
)
words = st.sampled_from(
    ["the", "The", "USA", "iPhone", "don't", "U.S.", "e.g.", "1/2", "cafe\u0301", "a.b", "...", "x=y"]
)
blanks = st.sampled_from([" ", "", "\n", "  ", "\t\r\n"])
pieces = st.one_of(
    words, blanks, st.sampled_from(STRANGE), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
)
texts = st.lists(pieces, max_size=16).map("".join)


@pytest.fixture(params=TOKENIZERS, scope="module")
def sp(request: pytest.FixtureRequest) -> spm.SentencePieceProcessor:
    return prep.load_tokenizer(request.param)


@functools.cache
def encoder_of(sp: spm.SentencePieceProcessor) -> prep.DocumentEncoder:
    return prep.DocumentEncoder(sp)


# ----------------------------------------------------------------------------------------------------------------------
# Encoding one document


@settings(max_examples=500, deadline=None)
@given(text=texts)
@example(text="")
@example(text=" \n\u00a0")
@example(text=f"{ESC}x {TITLE}The {TITLE}")
def test_encode_document(sp: spm.SentencePieceProcessor, text: str) -> None:
    ids, counts = prep.encode_document(sp, text)
    assert ids[0] == prep.BOS_ID == 1
    assert ids[1:] == sp.encode(encode_lossless_caps_v2(text))
    assert len(counts) == len(ids) and min(counts) >= 0
    assert sum(counts) == len(text.encode())
    assert counts[0] == 0 or len(ids) == 1


@settings(max_examples=800, deadline=None)
@given(data=st.data())
def test_fast_encoder_agrees_with_encode_document(sp: spm.SentencePieceProcessor, data: st.DataObject) -> None:
    encoder = encoder_of(sp)
    encoder.ids.clear()
    encoder.counts.clear()
    assert encoder.chunkable
    for text in data.draw(st.lists(texts, min_size=1, max_size=4)):  # later texts meet chunks of earlier ones
        ids, counts = prep.encode_document(sp, text)
        fast = encoder._encode_chunks(text, want_counts=True)
        assert fast in (None, (np.array(ids, "<u2").tobytes(), np.array(counts, "<u2").tobytes()))
        assert encoder.encode(text, want_counts=False) == (np.array(ids, "<u2").tobytes(), b"")


def test_counts_by_hand(sp: spm.SentencePieceProcessor) -> None:
    text = "  The \u00e9\u00bd\n\n" + TITLE
    ids, counts = prep.encode_document(sp, text)
    parts = [sp.id_to_piece(i) for i in ids]
    operators = [count for part, count in zip(parts, counts, strict=True) if part in CONTROLS]
    assert operators == [2, 0, 3]  # TITLE, the first token, takes the leading blanks; ESC; the literal operator
    assert counts[parts.index("the")] == 3
    assert sum(counts) == 2 + 3 + 1 + 2 + 2 + 2 + 3


def test_operators_count_nothing(sp: spm.SentencePieceProcessor) -> None:
    ids, counts = prep.encode_document(sp, "The USA and McDonald like iPhones. " * 50)
    operator_ids = {sp.piece_to_id(control) for control in CONTROLS}
    assert {count for i, count in zip(ids, counts, strict=True) if i in operator_ids} == {0}


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("a" + "\n" * 70_000 + "b c", "carried forward"),
        ("a b" + "\n" * 70_000, "carried back from the end"),
        ("\n" * 70_000 + "a b", "carried forward from the start"),
    ],
)
def test_long_white_space_fits_in_uint16(sp: spm.SentencePieceProcessor, text: str, shape: str) -> None:
    ids, counts = prep.encode_document(sp, text)
    assert max(counts) == 65_535 and sum(counts) == len(text), shape
    encoder = encoder_of(sp)
    assert encoder._encode_chunks(text, True) == (np.array(ids, "<u2").tobytes(), np.array(counts, "<u2").tobytes())


def test_bytes_that_fit_nowhere_are_refused(sp: spm.SentencePieceProcessor) -> None:
    with pytest.raises(ValueError, match="4465 bytes of white space do not fit"):
        prep.encode_document(sp, " " * 70_000)


def test_lone_surrogate_is_refused(sp: spm.SentencePieceProcessor) -> None:
    for encode in (
        lambda text: prep.encode_document(sp, text),
        lambda text: encoder_of(sp).encode(text, True),
    ):
        with pytest.raises(ValueError, match="surrogates"):
            encode("a\ud800b")


def test_encoder_is_linear_in_document_length(sp: spm.SentencePieceProcessor) -> None:
    text = " ".join(make_texts(200, seed=5))

    def seconds(length: int) -> float:
        start = time.process_time()
        prep.encode_document(sp, text[:length])
        return time.process_time() - start

    seconds(1000)
    short = min(seconds(20_000) for _ in range(5))
    long = min(seconds(160_000) for _ in range(3))
    assert long < 8 * short * 3  # quadratic time would be 8 times more


def test_tokenizer_that_joins_words_is_encoded_whole() -> None:
    """Without the guarantee that chunks need, the encoder must fall back to the specification."""
    encoder = prep.DocumentEncoder(prep.load_tokenizer(OURS))
    encoder.chunkable = False
    text = "The quick Brown fox"
    ids, counts = prep.encode_document(encoder.sp, text)
    assert encoder.encode(text, True) == (np.array(ids, "<u2").tobytes(), np.array(counts, "<u2").tobytes())
    assert prep._JOINING_PIECE.search("of\u2581the") and prep._JOINING_PIECE.search("\u2581a.")
    assert not prep._JOINING_PIECE.search("\u2581the") and not prep._JOINING_PIECE.search(".a")


# ----------------------------------------------------------------------------------------------------------------------
# Data sets


def make_texts(n: int, seed: int = 0) -> list[str]:
    """Return deterministic English-like texts with capitals, numbers, accents and line breaks."""
    rng = random.Random(seed)
    vocabulary = [
        "the",
        "of",
        "and",
        "to",
        "in",
        "is",
        "that",
        "it",
        "was",
        "for",
        "on",
        "are",
        "as",
        "with",
        "his",
        "they",
    ]
    vocabulary += [
        "McDonald",
        "USA",
        "London",
        "caf\u00e9",
        "\u65e5\u672c",
        "don't",
        "3.14",
        "I",
        "\u201cYes,\u201d",
        "1999",
    ]

    def sentence() -> str:
        return " ".join(rng.choices(vocabulary, k=rng.randint(4, 20))).capitalize() + rng.choice([". ", "? ", ".\n\n"])

    return ["".join(sentence() for _ in range(rng.randint(1, 12))) + str(i) for i in range(n)]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents)))
    return path


def run(*args: object) -> int:
    return prep.main([str(arg) for arg in args])


def folder_of(out: Path) -> Path:
    return out / "datasets" / "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder_of(out).iterdir())}


def read_shards(out: Path, kind: str) -> np.ndarray:
    parts = []
    for path in sorted(folder_of(out).glob(f"fineweb_{kind}_[0-9]*.bin")):
        data = path.read_bytes()
        header = np.frombuffer(data[:1024], dtype="<i4")
        tokens = np.frombuffer(data[1024:], dtype="<u2")
        assert header[:3].tolist() == [20240520, 1, len(tokens)] and not header[3:].any()
        parts.append(tokens)
    return np.concatenate(parts) if parts else np.zeros(0, dtype="<u2")


@pytest.fixture(scope="module")
def documents() -> list[str]:
    documents = make_texts(700)
    documents[3], documents[300], documents[301] = "", "\n \u00a0", documents[5]
    return documents


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> tuple[Path, Path]:
    """(documents, data set) of a run with one worker, shards of 1,000 tokens."""
    folder = tmp_path_factory.mktemp("reference")
    docs = write_jsonl(folder / "docs.jsonl", documents)
    assert run("--docs", docs, "--out", folder / "out", "--sp", OURS, "--val-docs", 40, *SMALL, "--workers", 1) == 0
    return docs, folder / "out"


SMALL = ("--shard-tokens", 1000)


def test_shards_hold_the_documents(reference: tuple[Path, Path], documents: list[str]) -> None:
    sp = prep.load_tokenizer(OURS)
    encoded = [prep.encode_document(sp, text) for text in documents]
    _, out = reference
    val, train, counts = (read_shards(out, kind) for kind in ("val", "train", "val_bytes"))
    assert val.tolist() == [i for ids, _ in encoded[:40] for i in ids]
    assert counts.tolist() == [c for _, doc_counts in encoded[:40] for c in doc_counts]
    assert train.tolist() == [i for ids, _ in encoded[40:] for i in ids]
    assert counts.sum() == sum(len(text.encode()) for text in documents[:40])
    assert (val == 1).sum() == 40 and (train == 1).sum() == len(documents) - 40
    names = set(contents(out))
    assert {"fineweb_train_000000.bin", "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"} <= names
    assert not any(name.startswith(".") or name == "progress.json" for name in names)


def test_manifest(reference: tuple[Path, Path], documents: list[str]) -> None:
    docs, out = reference
    manifest = json.loads((folder_of(out) / "manifest.json").read_text())
    files = contents(out)
    assert {row["name"] for row in manifest["files"]} == set(files) - {"manifest.json"}
    for row in manifest["files"]:
        assert hashlib.sha256(files[row["name"]]).hexdigest() == row["sha256"]
        assert len(files[row["name"]]) == row["bytes"] == 1024 + 2 * row["tokens"]
    assert manifest["text_transform"] == "lossless_caps_caseops_v1"
    assert manifest["tokenizer"]["sha256"] == hashlib.sha256(OURS.read_bytes()).hexdigest()
    assert manifest["settings"]["val_docs"] == 40 and manifest["settings"]["shard_tokens"] == 1000
    source = manifest["sources"][0]
    assert source["name"] == docs.name and source["sha256"] == hashlib.sha256(docs.read_bytes()).hexdigest()
    assert source["documents"] == {"val": 40, "train": len(documents) - 40}
    for split, texts_of_split in (("val", documents[:40]), ("train", documents[40:])):
        totals = manifest["splits"][split]
        assert totals["documents"] == len(texts_of_split)
        assert totals["bytes"] == sum(len(text.encode()) for text in texts_of_split)
        assert totals["tokens"] == len(read_shards(out, split))
        assert totals["documents_without_tokens"] == 1
    assert manifest["splits"]["train"]["documents_equal_to_validation"] == 1


def test_document_ranges_of_shards(reference: tuple[Path, Path]) -> None:
    _, out = reference
    manifest = json.loads((folder_of(out) / "manifest.json").read_text())
    for split in ("val", "train"):
        tokens = read_shards(out, split)
        document_of_token = np.cumsum(tokens == 1) - 1
        position = 0
        for row in (row for row in manifest["files"] if row["name"].startswith(f"fineweb_{split}_0")):
            end = position + row["tokens"]
            assert row["documents"] == [document_of_token[position], document_of_token[end - 1] + 1]
            assert row["begins_inside_document"] == (tokens[position] != 1)
            position = end


def test_same_output_for_any_number_of_workers(reference: tuple[Path, Path], tmp_path: Path) -> None:
    docs, out = reference
    assert run("--docs", docs, "--out", tmp_path, "--sp", OURS, "--val-docs", 40, *SMALL, "--workers", 3) == 0
    assert contents(tmp_path) == contents(out)


@pytest.mark.parametrize("batch_docs", [1, 7])
def test_same_output_for_any_batch_size(
    reference: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_docs: int
) -> None:
    monkeypatch.setattr(prep, "BATCH_DOCS", batch_docs)
    docs, out = reference
    assert run("--docs", docs, "--out", tmp_path, "--sp", OURS, "--val-docs", 40, *SMALL, "--workers", 1) == 0
    assert contents(tmp_path) == contents(out)


def _compress_zst(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2  # two frames, as concatenated files have
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


COMPRESS = {".jsonl": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": _compress_zst}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_and_split_inputs(reference: tuple[Path, Path], tmp_path: Path, suffix: str) -> None:
    docs, out = reference
    lines = docs.read_bytes().splitlines(keepends=True)
    parts = []
    for i, part in enumerate((lines[:100], [b"\n", *lines[100:]])):  # blank lines are skipped
        path = tmp_path / (f"part{i}.jsonl" + suffix.replace(".jsonl", ""))
        path.write_bytes(COMPRESS[suffix](b"".join(part)))
        parts.append(path)
    assert run("--docs", *parts, "--out", tmp_path, "--sp", OURS, "--val-docs", 40, *SMALL, "--workers", 1) == 0
    ours, theirs = contents(tmp_path), contents(out)
    assert {name: ours[name] for name in ours if name != "manifest.json"} == {
        name: theirs[name] for name in theirs if name != "manifest.json"
    }


@contextlib.contextmanager
def standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        yield


def test_stdin_bare_strings_and_byte_order_mark(
    reference: tuple[Path, Path], documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = "\ufeff".encode() + "".join(json.dumps(text) + "\n" for text in documents).encode()
    with standard_input(monkeypatch, data):
        assert run("--docs", "-", "--out", tmp_path, "--sp", OURS, "--val-docs", 40, *SMALL, "--workers", 1) == 0
    assert read_shards(tmp_path, "train").tolist() == read_shards(reference[1], "train").tolist()


def test_folder_of_text_files(documents: list[str], reference: tuple[Path, Path], tmp_path: Path) -> None:
    for i, text in enumerate(documents):
        path = tmp_path / "texts" / f"{i // 100}" / f"{i:04d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    args = ("--docs", tmp_path / "texts", "--out", tmp_path, "--sp", OURS, "--val-docs", 40, *SMALL, "--workers", 1)
    assert run(*args) == 0
    assert read_shards(tmp_path, "train").tolist() == read_shards(reference[1], "train").tolist()
    assert run(*args) == 0  # complete and unchanged
    (tmp_path / "texts" / "6" / "0699.txt").write_text("changed")
    assert run(*args) == 2


def test_parquet(documents: list[str], reference: tuple[Path, Path], tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": documents}), tmp_path / "docs.parquet")
    args = ("--docs", tmp_path / "docs.parquet", "--out", tmp_path, "--sp", OURS, "--val-docs", 40, *SMALL)
    assert run(*args, "--workers", 1) == 0
    assert read_shards(tmp_path, "train").tolist() == read_shards(reference[1], "train").tolist()


def test_separate_validation_file(reference: tuple[Path, Path], documents: list[str], tmp_path: Path) -> None:
    val = write_jsonl(tmp_path / "val.jsonl", documents[:60])
    train = write_jsonl(tmp_path / "train.jsonl", documents[40:])
    args = ("--docs", train, "--val-docs-file", val, "--sp", OURS, *SMALL, "--workers", 1)
    assert run(*args, "--out", tmp_path / "first", "--val-docs", 40) == 0
    assert read_shards(tmp_path / "first", "val").tolist() == read_shards(reference[1], "val").tolist()
    assert read_shards(tmp_path / "first", "train").tolist() == read_shards(reference[1], "train").tolist()
    assert run(*args, "--out", tmp_path / "all") == 0
    assert (read_shards(tmp_path / "all", "val") == 1).sum() == 60
    manifest = json.loads((folder_of(tmp_path / "all") / "manifest.json").read_text())
    assert [row["documents"] for row in manifest["sources"]] == [{"val": 60, "train": 0}, {"val": 0, "train": 660}]
    assert manifest["splits"]["train"]["documents_equal_to_validation"] >= 20  # documents 40..59 are in both


def test_train_and_validation_are_disjoint(tmp_path: Path) -> None:
    numbered = [f"document number {i:05d}" for i in range(50)]
    docs = write_jsonl(tmp_path / "docs.jsonl", numbered)
    assert run("--docs", docs, "--out", tmp_path, "--sp", OURS, "--val-docs", 7, "--workers", 1) == 0
    sp = prep.load_tokenizer(OURS)
    split_texts = []
    for split in ("val", "train"):
        tokens = read_shards(tmp_path, split).tolist()
        split_texts.append(sp.decode(tokens[1:]).split("document")[1:] if tokens else [])
    assert [len(part) for part in split_texts] == [7, 43]
    manifest = json.loads((folder_of(tmp_path) / "manifest.json").read_text())
    assert manifest["splits"]["train"]["documents_equal_to_validation"] == 0


# ----------------------------------------------------------------------------------------------------------------------
# Interruptions


def prepare_in_background(docs: Path, out: Path, workers: int, until: Path) -> subprocess.Popen[bytes]:
    """Start a run that goes no further once the file `until` exists, so that it can be killed in the middle."""
    program = (
        "import os, signal, sys, time; import prepare_caseops_data as prep\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job is started to ignore it
        "take = prep.Preparation._take_train\n"
        "def slowly(self, encoded):\n"
        f"    while os.path.exists({str(until)!r}): time.sleep(0.01)\n"
        "    take(self, encoded)\n"
        "prep.Preparation._take_train = slowly\n"
        "prep.BATCH_DOCS = 10\n"
        "if __name__ == '__main__': sys.exit(prep.main(sys.argv[1:]))\n"
    )
    args = ("--docs", docs, "--out", out, "--sp", OURS, "--val-docs", 40, *SMALL, "--workers", workers)
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """Return the child processes of a process, as far as this system tells."""
    found = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(child) for child in found.split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(("how", "workers"), [(signal.SIGKILL, 1), (signal.SIGKILL, 2), (signal.SIGINT, 1)])
def test_killed_run_continues_to_the_same_files(
    reference: tuple[Path, Path], tmp_path: Path, how: signal.Signals, workers: int
) -> None:
    docs, out = reference
    for shard in ("fineweb_train_000001.bin", "fineweb_train_000004.bin"):  # two interruptions in one run
        process = prepare_in_background(docs, tmp_path, workers, until=folder_of(tmp_path) / shard)
        wait_for(folder_of(tmp_path) / shard, process)
        workers_left = children(process.pid)
        process.send_signal(how)
        assert process.wait(30) == (-how if how == signal.SIGKILL else 130)
        assert not (folder_of(tmp_path) / "manifest.json").exists()
        deadline = time.monotonic() + 20
        while any(map(alive, workers_left)):  # workers end with the process they work for
            assert time.monotonic() < deadline
            time.sleep(0.05)
    before = (folder_of(tmp_path) / "fineweb_train_000000.bin").stat().st_mtime_ns
    assert run("--docs", docs, "--out", tmp_path, "--sp", OURS, "--val-docs", 40, *SMALL, "--workers", 2) == 0
    assert contents(tmp_path) == contents(out)
    assert (folder_of(tmp_path) / "fineweb_train_000000.bin").stat().st_mtime_ns == before  # kept, not made again


class Killed(BaseException):
    """Stands for a kill: nothing may clean up after it."""


@pytest.mark.parametrize("batch_docs", [3, 256])
def test_interruption_at_every_write(
    reference: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_docs: int
) -> None:
    """Die at the n-th fsync or rename for many n, then continue: always the same files."""
    docs, out = reference
    monkeypatch.setattr(prep, "BATCH_DOCS", batch_docs)
    args = ("--docs", docs, "--out", tmp_path, "--sp", OURS, "--val-docs", 40, *SMALL, "--workers", 1)
    real, countdown = os.fsync, [0]

    def dying(handle: int) -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            raise Killed
        real(handle)

    monkeypatch.setattr(os, "fsync", dying)
    for n in (1, 2, 3, 5, 7, 8, 10, 11, 13, 16, 21, 30, 2):
        countdown[0] = n
        with pytest.raises(Killed):
            run(*args)
    countdown[0] = -1
    assert run(*args) == 0
    assert contents(tmp_path) == contents(out)


def test_complete_data_set_is_left_alone(reference: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    docs, out = reference
    before = contents(out)
    assert run("--docs", docs, "--out", out, "--sp", OURS, "--val-docs", 40, *SMALL) == 0
    assert "val 40 documents" in capsys.readouterr().out
    assert contents(out) == before


# ----------------------------------------------------------------------------------------------------------------------
# Refusals: one sentence, exit status 2, nothing lost


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Run, expect status 2, return the sentence."""
    capsys.readouterr()
    assert run(*args) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("prepare_caseops_data: ") and "\n" not in message and "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"text": "half', r"bad.jsonl:4: broken JSON"),
        (b"\xff\xfe", r"bad.jsonl:4: not UTF-8"),
        (b'{"body": "x"}', r"bad.jsonl:4: neither an object with a string under 'text' nor a bare string"),
        (b'{"text": 5}', r"bad.jsonl:4: neither an object"),
        (b'{"text": "a\\ud83d b"}', r"bad.jsonl:4: lone surrogate U+D83D at character 1"),
        (b'"' + b" " * 70_000 + b'"', r"bad.jsonl:4: 4465 bytes of white space do not fit"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_line_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes, sentence: str, workers: int
) -> None:
    if workers == 2 and b"half" not in line:
        pytest.skip("one case shows that workers report the same")
    docs = tmp_path / "bad.jsonl"
    docs.write_bytes(b'"one"\n"two"\n\n' + line + b'\n"five"\n')
    args = ("--docs", docs, "--out", tmp_path, "--sp", OURS, "--val-docs", 3, "--workers", workers)
    assert sentence in refusal(capsys, *args)
    assert "finished shards are kept" in refusal(capsys, *args)
    docs.write_bytes(b'"one"\n"two"\n\n"four"\n"five"\n')
    assert run(*args) == 0


def test_good_shards_before_a_bad_line_are_kept(
    reference: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    docs, out = reference
    monkeypatch.setattr(prep, "BATCH_DOCS", 10)
    lines = docs.read_bytes().splitlines(keepends=True)
    broken = tmp_path / docs.name
    broken.write_bytes(b"".join([*lines[:400], b"{broken\n", *lines[401:]]))
    args = ("--docs", broken, "--out", tmp_path, "--sp", OURS, "--val-docs", 40, *SMALL, "--workers", 1)
    assert "docs.jsonl:401: broken JSON" in refusal(capsys, *args)
    assert (folder_of(tmp_path) / "fineweb_train_000000.bin").exists()
    broken.write_bytes(b"".join(lines))
    assert run(*args) == 0
    assert contents(tmp_path) == contents(out)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_truncated_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    data = COMPRESS[suffix]("".join(json.dumps(text) + "\n" for text in make_texts(300)).encode())
    docs = tmp_path / f"docs.jsonl{suffix}"
    docs.write_bytes(data[: len(data) * 9 // 10])
    message = refusal(capsys, "--docs", docs, "--out", tmp_path, "--sp", OURS, "--val-docs", 2, "--workers", 1)
    assert "truncated or damaged here" in message and f"docs.jsonl{suffix}:" in message
    docs.write_bytes(b"not an archive at all")
    message = refusal(capsys, "--docs", docs, "--out", tmp_path, "--sp", OURS, "--val-docs", 2, "--workers", 1)
    assert f"docs.jsonl{suffix}:1: the file is truncated or damaged here" in message


def test_split_without_training_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = write_jsonl(tmp_path / "docs.jsonl", make_texts(120))
    message = refusal(capsys, "--docs", docs, "--out", tmp_path / "out", "--sp", OURS, "--workers", 1)
    assert "there are 120 documents and the first 50,000 are for validation" in message
    assert "pass --val-docs N with N below 120" in message and "--val-docs-file" in message
    assert not (tmp_path / "out").exists()
    refusal(capsys, "--docs", docs, "--out", tmp_path / "out", "--sp", OURS, "--val-docs", 120, "--workers", 1)
    with standard_input(monkeypatch, docs.read_bytes()):
        message = refusal(capsys, "--docs", "-", "--out", tmp_path / "out", "--sp", OURS, *SMALL, "--workers", 1)
    assert "leaves none to train on" in message
    assert not list((tmp_path / "out").rglob("*.bin"))
    assert run("--docs", docs, "--out", tmp_path / "out", "--sp", OURS, "--val-docs", 119, "--workers", 1) == 0


def test_validation_file_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs, few = write_jsonl(tmp_path / "docs.jsonl", make_texts(20)), write_jsonl(tmp_path / "few.jsonl", make_texts(2))
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    rest = ("--out", tmp_path / "out", "--sp", OURS, "--workers", 1)
    assert "given both" in refusal(capsys, "--docs", docs, "--val-docs-file", docs, *rest)
    message = refusal(capsys, "--docs", docs, "--val-docs-file", few, "--val-docs", 5, *rest)
    assert "few.jsonl holds 2 documents, but 5 are wanted" in message
    assert "hold no document to train on" in refusal(capsys, "--docs", empty, "--val-docs-file", few, *rest)
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_output_of_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs = write_jsonl(tmp_path / "docs.jsonl", make_texts(30))
    args = ("--docs", docs, "--out", tmp_path, "--sp", OURS, "--workers", 1)
    assert run(*args, "--val-docs", 4) == 0
    message = refusal(capsys, *args, "--val-docs", 5)
    assert "holds a data set with other settings (val_docs 4, now 5)" in message
    write_jsonl(docs, make_texts(31))
    assert "not known to come from the present contents of docs.jsonl" in refusal(capsys, *args, "--val-docs", 4)
    assert run(*args, "--val-docs", 5, "--overwrite") == 0
    shard = folder_of(tmp_path) / "fineweb_train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert "fineweb_train_000000.bin does not have its recorded sha256" in refusal(capsys, *args, "--val-docs", 5)
    (folder_of(tmp_path) / "manifest.json").unlink()
    assert "belongs to no known run" in refusal(capsys, *args, "--val-docs", 5)
    (folder_of(tmp_path) / "manifest.json").write_text("{")
    assert "manifest.json is damaged" in refusal(capsys, *args, "--val-docs", 5)
    assert run(*args, "--val-docs", 5, "--overwrite") == 0


def interrupt(monkeypatch: pytest.MonkeyPatch, args: tuple[object, ...]) -> None:
    """Run until the second training shard is written."""

    def stop(self: prep.Preparation, *rest: object) -> None:
        save(self, *rest)
        if len(self.train.finished) == 2:
            raise Killed

    save = prep.Preparation._save
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(prep.Preparation, "_save", stop)
        run(*args)


def test_half_written_output_and_changed_documents(
    reference: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = tmp_path / "docs.jsonl"
    docs.write_bytes(reference[0].read_bytes())
    monkeypatch.setattr(prep, "BATCH_DOCS", 10)
    args = ("--docs", docs, "--out", tmp_path, "--sp", OURS, "--val-docs", 40, "--workers", 1)
    interrupt(monkeypatch, (*args, *SMALL))
    assert "an unfinished run with other settings (shard_tokens 1000, now 999)" in refusal(
        capsys, *args, "--shard-tokens", 999
    )
    text = docs.read_text()
    docs.write_text(text.replace("the", "teh", 1))
    assert "not those of the unfinished run" in refusal(capsys, *args, *SMALL)
    docs.write_text(text)
    shard = folder_of(tmp_path) / "fineweb_train_000001.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:500])
    assert "fineweb_train_000001.bin does not have its recorded sha256" in refusal(capsys, *args, *SMALL)
    shard.unlink()
    assert "fineweb_train_000001.bin is missing" in refusal(capsys, *args, *SMALL)
    shard.write_bytes(whole)
    assert run(*args, *SMALL) == 0
    assert contents(tmp_path) == contents(reference[1])


def test_unwritable_output(
    reference: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    docs, out = reference
    (tmp_path / "file").write_text("in the way")
    rest = ("--sp", OURS, "--val-docs", 40, *SMALL, "--workers", 1)
    assert "Not a directory" in refusal(capsys, "--docs", docs, "--out", tmp_path / "file", *rest)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        message = refusal(capsys, "--docs", docs, "--out", tmp_path / "out", *rest)
    assert "No space left on device; free some space and run the same command to continue" in message
    assert run("--docs", docs, "--out", tmp_path / "out", *rest) == 0
    assert contents(tmp_path / "out") == contents(out)


def test_two_runs_in_one_folder(reference: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    docs, out = reference
    with prep._locked(folder_of(out)):
        message = refusal(capsys, "--docs", docs, "--out", out, "--sp", OURS, "--val-docs", 40, *SMALL)
    assert "another run is writing to" in message


def test_bad_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    docs = write_jsonl(tmp_path / "docs.jsonl", make_texts(9))
    rest = ("--out", tmp_path / "out", "--val-docs", 2, "--workers", 1)
    assert "there is no such file" in refusal(capsys, "--docs", tmp_path / "none.jsonl", "--sp", OURS, *rest)
    assert "unknown kind of file" in refusal(capsys, "--docs", OURS, "--sp", OURS, *rest)
    (tmp_path / "empty").mkdir()
    assert "holds no .txt file" in refusal(capsys, "--docs", tmp_path / "empty", "--sp", OURS, *rest)
    assert "there is no tokenizer model" in refusal(capsys, "--docs", docs, "--sp", tmp_path / "none.model", *rest)
    assert "not a SentencePiece model" in refusal(capsys, "--docs", docs, "--sp", docs, *rest)
    monkeypatch.setattr(spm, "__version__", "0.2.1")
    assert "install sentencepiece >= 0.2.3" in refusal(capsys, "--docs", docs, "--sp", OURS, *rest)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--docs", "x.jsonl"],
        ["--docs", "-", "-", "--out", "o", "--sp", "m"],
        ["--docs", "x", "--out", "o", "--sp", "m", "--val-docs", "0"],
        ["--docs", "x", "--out", "o", "--sp", "m", "--workers", "0"],
    ],
)
def test_bad_arguments(args: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        run(*args)
    assert error.value.code == 2


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer and sample


def test_shipped_tokenizer() -> None:
    sp = prep.load_tokenizer(OURS)
    assert OURS.stat().st_size < 400_000 and sp.vocab_size() == 8192
    assert [sp.id_to_piece(i) for i in range(8)] == ["<pad>", "<s>", "</s>", "<unk>", *CONTROLS]
    assert [sp.id_to_piece(8 + i) for i in range(256)] == [f"<0x{i:02X}>" for i in range(256)]
    assert not any("A" <= c <= "Z" for i in range(264, 8192) for c in sp.id_to_piece(i))
    readme = (OURS.parent / "README.md").read_text()
    assert hashlib.sha256(OURS.read_bytes()).hexdigest() in readme


def test_train_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    made = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(9000)]
    docs = write_jsonl(tmp_path / "docs.jsonl", [" ".join(rng.choices(made, k=400)).title() for _ in range(120)])
    monkeypatch.setitem(prep.TOKENIZER_SETTINGS, "vocab_size", 1000)
    models = [tmp_path / "a.model", tmp_path / "b.model"]
    for model in models:
        assert run("--train-tokenizer", model, "--docs", docs) == 0
        assert hashlib.sha256(model.read_bytes()).hexdigest() in capsys.readouterr().out
    assert models[0].read_bytes() == models[1].read_bytes()
    sp = prep.load_tokenizer(models[0])
    assert sp.vocab_size() == 1000 and prep._is_chunkable(sp)
    docs.write_text('"fine"\n{broken\n')
    assert "docs.jsonl:2: broken JSON" in refusal(capsys, "--train-tokenizer", tmp_path / "c.model", "--docs", docs)
    assert not (tmp_path / "c.model").exists()


def test_training_sentences_lose_no_text(tmp_path: Path) -> None:
    long = " ".join(["Long words"] * 2000)
    docs = write_jsonl(tmp_path / "docs.jsonl", [long + "\n\n Second\0line ", "x"])
    sentences = list(prep.training_sentences([str(docs)]))
    assert max(len(sentence.encode()) for sentence in sentences) <= 4192
    assert " ".join(sentences) == encode_lossless_caps_v2(long) + f" {TITLE}second line x"


PROSE = (
    "This is a paragraph that explains what the function does and when it should be used by the people who have to "
    "read it, which is all that one can ask of it."
)


def test_prose_filter() -> None:
    assert prep._is_prose(PROSE)
    assert not prep._is_prose(
        "x = foo(bar)[0]; y = {k: v for k, v in z.items()} ; return x + y == None; import os, sys"
    )
    assert not prep._is_prose("alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho")
    source = f'def f():\n    """{PROSE}\n\n    >>> f()\n    1\n    """\n\nadd(f, r"""{PROSE} More.""")\nx = 1\n'
    blocks = prep._long_strings(source.encode())
    assert list(prep._prose_documents(blocks, set())) == [f"{PROSE}\n\n{PROSE} More."]
    assert list(prep._prose_documents(blocks[:1], set())) == []  # too short for a document


def test_sample_refuses_less_than_it_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prep, "_sample_roots", lambda: [tmp_path])
    (tmp_path / "guide.rst").write_text("\n\n".join(f"{PROSE} {i}" for i in range(50)))
    assert "bytes of English text found" in refusal(capsys, "--sample", tmp_path / "sample.jsonl")


@pytest.mark.slow
def test_sample(tmp_path: Path) -> None:
    samples = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    command = [sys.executable, "prepare_caseops_data.py", "--sample"]
    runs = [  # set and dictionary order must not matter
        subprocess.Popen([*command, str(sample)], cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": str(seed)})
        for seed, sample in enumerate(samples)
    ]
    assert [process.wait() for process in runs] == [0, 0]
    assert samples[0].read_bytes() == samples[1].read_bytes()
    documents = [json.loads(line)["text"] for line in samples[0].read_text().splitlines()]
    assert sum(len(text.encode()) for text in documents) >= 3_000_000
    assert len(set(documents)) == len(documents)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "docs_val.jsonl.xz").exists(), reason="no shared documents here")
def test_real_documents(tmp_path: Path) -> None:
    """On real text the public tokenizer gives the totals known for it."""
    args = ("--docs", SHARED / "docs_train_00.jsonl.xz", "--val-docs-file", SHARED / "docs_val.jsonl.xz")
    options = prep.Options(docs=(str(args[1]),), out=tmp_path, sp=PUBLIC, val_docs=1000, val_docs_file=str(args[3]))
    stream = prep.Stream(options, lambda n: None)
    totals = prep.Totals()
    for batch in stream.batches(0, ""):
        if batch.split != "val":
            break
        totals.add(prep.encode_batch(batch), set())
    assert (totals.documents, totals.tokens, totals.bytes) == (1000, 1_850_219, 5_912_118)
