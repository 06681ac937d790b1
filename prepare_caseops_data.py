"""Documents to CaseOps token shards with exact byte counts. Also trains the tokenizer and builds sample documents.

    python prepare_caseops_data.py --docs docs.jsonl --out data --sp tokenizer/caseops_8192.model [--val-docs 50000]
    python prepare_caseops_data.py --verify --out data [--sp MODEL] [--docs docs.jsonl]
    python prepare_caseops_data.py --train-tokenizer out.model --docs docs_train.jsonl.xz
    python prepare_caseops_data.py --sample sample.jsonl

The first form writes, under OUT/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved/:

    fineweb_train_%06d.bin       training tokens
    fineweb_val_%06d.bin         validation tokens
    fineweb_val_bytes_%06d.bin   original UTF-8 bytes of each validation token: the denominator of bits per byte
    manifest.json                sha256 of every input and output, document ranges, totals, tokenizer, settings

A shard is 256 little-endian int32 ([0] = 20240520, [1] = 1, [2] = n, rest 0) and n little-endian uint16. A document is
BOS (byte count 0) and the tokens of its CaseOps form. A document without any token (empty, or white space only) is kept
as its BOS alone and its bytes, if any, go to the BOS entry, so that totals always match the input.

Documents stay in order, the output does not depend on the number of workers, and files appear under their final name
only when complete. After an interruption (also kill -9) the same command continues and ends with identical files.
Memory does not grow with the corpus: measured peaks are 170 MB in the main process (64 of them for xz input) and 100 MB
in each worker, at 10,000,000 tokens a shard; 4 bytes more in the main process for each token more. Only a single
document is always held whole.

Contents:
    1. Errors, constants
    2. Encoding a document: the specification, then the fast encoder
    3. Reading documents
    4. Batches and workers
    5. Shards
    6. Progress, resume, manifest
    7. Preparing a data set
    8. Verifying a data set
    9. Training the tokenizer
    10. Sample documents
    11. Command line
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import errno
import fcntl
import gzip
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import sentencepiece as spm

from lossless_caps import CAPNEXT, CASEOPS, CONTROLS, encode_lossless_caps_v2, original_byte_offsets

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

# ----------------------------------------------------------------------------------------------------------------------
# 1. ERRORS, CONSTANTS


class PrepareError(Exception):
    """Something the user can put right; the message is one sentence that says what and where."""


DATASET = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
SHARD_TOKENS = 10_000_000
VAL_DOCS = 50_000  # the canonical validation set of FineWeb: its first 50,000 documents
BOS_ID = 1  # the loaders find documents by this id
MAX_COUNT = 65_535  # byte counts are stored as uint16
BATCH_BYTES, BATCH_DOCS = 1 << 18, 256  # one unit of work: small enough to keep the ordered window cheap
SPOT_CHECK = 64  # every 64th document is encoded by the specification as well and compared

# ----------------------------------------------------------------------------------------------------------------------
# 2. ENCODING A DOCUMENT
# `encode_document` is the specification. `DocumentEncoder` gives the same result several times faster.


def encode_document(sp: spm.SentencePieceProcessor, text: str) -> tuple[list[int], list[int]]:
    """Return (ids, byte_counts) of one document: BOS, then the tokens of its CaseOps form.

    byte_counts[i] is the number of UTF-8 bytes of `text` that token i stands for; they sum to len(text.encode()).
    The bytes of dropped or collapsed white space go to the token that follows, at the end of the text to the last one.
    A count over 65,535 is cut there and the rest carried on to the next tokens. Operators count 0. Time is linear.

    Raises ValueError for text with lone surrogates (UnicodeEncodeError) or one whose bytes do not fit in its counts.
    """
    transformed = encode_lossless_caps_v2(text)
    before = original_byte_offsets(transformed)
    if before[-1] != len(text.encode()):
        raise ValueError("CaseOps changed the UTF-8 length of the text")
    ids, ends = _encode_with_ends(sp, transformed)
    ends[-1:] = len(transformed)  # trailing white space belongs to the last token
    counts = np.diff(before[ends], prepend=0) if len(ends) else before[:0]
    counts = _fit_counts(np.concatenate([[before[-1] - counts.sum()], counts]))
    return [BOS_ID, *ids], counts.tolist()


def _encode_with_ends(sp: spm.SentencePieceProcessor, transformed: str) -> tuple[list[int], np.ndarray]:
    """Return ids and, for each token, the index in `transformed` where it ends (int64, ascending)."""
    encoding = sp.encode(transformed, return_type="offset_mapping")
    return encoding["ids"], np.array([end for _, end in encoding["offsets"]], dtype=np.int64)


def _fit_counts(counts: np.ndarray) -> np.ndarray:
    """Carry what a count has over 65,535 on to the next tokens and, past the last one, back to earlier ones."""
    if counts.max(initial=0) <= MAX_COUNT:
        return counts
    carry = 0
    for i in itertools.chain(range(len(counts)), reversed(range(len(counts)))):
        total = int(counts[i]) + carry
        counts[i] = min(total, MAX_COUNT)
        carry = total - int(counts[i])
    if carry:
        raise ValueError(f"{carry} bytes of white space do not fit in the 65,535 bytes a token can stand for")
    return counts


# The fast encoder cuts a text into chunks that a tokenizer encodes independently of each other:
#   - white space, at most one operator, a run of letters; what follows must be visible or white space
#   - white space and everything up to the next white space, which must follow a visible character (after any other one,
#     which normalization may turn into a blank or drop, the next run is taken along)
# Visible are characters that every normalization keeps as visible text and that combine with no neighbour.
_WS = " \\t\\n\\r"
_VISIBLE = "!-~\u2013\u2014\u2018\u2019\u201c\u201d\u2026"
_CHUNK = re.compile(
    f"[{_WS}]*+[\ue001-\ue003]?+[a-z]++(?=[{_VISIBLE}{_WS}\ue001-\ue004]|\\Z)"
    f"|[{_WS}]*+[^{_WS}]++(?:(?<![{_VISIBLE}])[{_WS}]++[^{_WS}]++)*"
)
_STARTS_VISIBLY = re.compile(f"[{_WS}]*+[{_VISIBLE}\ue001-\ue004]")
_JOINING_PIECE = re.compile(f".\u2581|[a-z](?![a-z])[{_VISIBLE}]", re.DOTALL)
_SEPARATOR = CAPNEXT  # the tokenizer keeps operators apart from everything else
_MAX_CACHED_CHUNKS, _MAX_CACHED_LENGTH = 1 << 17, 64


class DocumentEncoder:
    """`encode_document` with a memory: nearly all chunks (words, mostly) of a text were seen before.

    No piece reaches across a border between chunks, so no BPE merge does, and the tokens of a text are those of its
    chunks, joined. The new chunks of a document are encoded in one call; known ones cost a dictionary look-up.
    """

    def __init__(self, sp: spm.SentencePieceProcessor) -> None:
        self.sp = sp
        self.separator_id = sp.piece_to_id(_SEPARATOR)
        self.chunkable = _is_chunkable(sp)
        self.ids: dict[str, bytes] = {}  # chunk -> its tokens, uint16
        self.counts: dict[str, bytes] = {}  # chunk -> their byte counts, uint32
        self.seen = 0

    def encode(self, text: str, want_counts: bool) -> tuple[bytes, bytes]:
        """Return (ids, byte counts) of one document as little-endian uint16; the counts are b"" unless wanted.

        Raises what `encode_document` raises, and RuntimeError should the two ever disagree.
        """
        self.seen += 1
        result = self._encode_chunks(text, want_counts) if self.chunkable else None
        if result is None or self.seen % SPOT_CHECK == 1:
            ids, counts = encode_document(self.sp, text)
            expected = _uint16(ids), _uint16(counts) if want_counts else b""
            if result not in (None, expected):
                raise RuntimeError("the fast encoder disagrees with encode_document; please report this document")
            result = expected
        return result

    def _encode_chunks(self, text: str, want_counts: bool) -> tuple[bytes, bytes] | None:
        n_bytes = len(text.encode())  # also refuses lone surrogates
        transformed = encode_lossless_caps_v2(text)
        if not _STARTS_VISIBLY.match(transformed):
            return None  # what begins a document may vanish in normalization, which its chunk cannot know
        body = transformed.lstrip(" \t\n\r")
        n_leading = len(transformed) - len(body)
        # without rstrip the search would try every start in a trailing run of blanks: quadratic
        chunks = _CHUNK.findall(body.rstrip(" \t\n\r"))
        fresh = self._learn(chunks)
        ids = b"".join([_BOS_BYTES, *map(self.ids.__getitem__, chunks)])
        counts = b""
        if want_counts:
            counts = b"".join([b"\0\0\0\0", *map(self.counts.__getitem__, chunks)])
            counts = _complete_counts(counts, n_bytes, n_leading)
        for chunk in fresh:
            if len(chunk) > _MAX_CACHED_LENGTH:
                del self.ids[chunk], self.counts[chunk]
        return ids, counts

    def _learn(self, chunks: list[str]) -> list[str]:
        """Encode the chunks that are not known yet, and return them."""
        if len(self.ids) > _MAX_CACHED_CHUNKS:
            self.ids.clear()
            self.counts.clear()
        last = chunks[-1]
        fresh = sorted(set(chunks).difference(self.ids, (last,)))
        if last not in self.ids:
            fresh.append(last)  # only the last one may end in white space of a kind that normalization strips there
        if not fresh:
            return fresh
        transformed = _SEPARATOR + _SEPARATOR.join(fresh)
        ids, ends = _encode_with_ends(self.sp, transformed)
        counts = np.diff(original_byte_offsets(transformed)[ends], prepend=0).astype("<u4").tobytes()
        separator_ends = np.cumsum([1, *(len(chunk) + 1 for chunk in fresh[:-1])])
        cuts = np.searchsorted(ends, separator_ends)  # the first token that reaches that far is the separator
        if any(ids[cut] != self.separator_id for cut in cuts.tolist()):
            raise RuntimeError(f"the tokenizer joins characters with an operator near {transformed[:80]!r}")
        packed = _uint16(ids)
        for chunk, cut, end in zip(fresh, cuts.tolist(), [*cuts[1:].tolist(), len(ids)], strict=True):
            self.ids[chunk], self.counts[chunk] = packed[2 * cut + 2 : 2 * end], counts[4 * cut + 4 : 4 * end]
        return fresh


def _complete_counts(packed: bytes, n_bytes: int, n_leading: int) -> bytes:
    """Add leading white space to the first token and what is left to the last one. uint32 in, uint16 out."""
    counts = np.frombuffer(packed, dtype="<u4").astype(np.int64)
    counts[min(1, len(counts) - 1)] += n_leading
    counts[-1] += n_bytes - counts.sum()
    return _uint16(_fit_counts(counts))


def _uint16(values: Iterable[int] | np.ndarray) -> bytes:
    return np.asarray(values, dtype=np.int64).astype("<u2").tobytes()


_BOS_BYTES = _uint16([BOS_ID])


def _is_chunkable(sp: spm.SentencePieceProcessor) -> bool:
    """Whether chunks can be encoded apart: no piece reaches across a border between chunks, and a few probes agree."""
    for i in range(sp.vocab_size()):
        ordinary = not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))
        if ordinary and _JOINING_PIECE.search(sp.id_to_piece(i)):
            return False
    for visible in "0.,'\"!?)(-\u2013\u2014\u2018\u2019\u201c\u201d\u2026":
        chunks = ["x", f"{visible}y{visible}", f" \t\n{_SEPARATOR}z", f"{visible}", " \u00e9"]
        apart = [sp.encode(_SEPARATOR + chunk)[1:] for chunk in chunks]
        if sp.encode("".join(chunks)) != list(itertools.chain.from_iterable(apart)):
            return False
    return True


def load_tokenizer(path: Path) -> spm.SentencePieceProcessor:
    """Load a SentencePiece model and check that it can serve CaseOps shards; raises PrepareError."""
    if [int(n) for n in re.findall(r"\d+", spm.__version__)[:3]] < [0, 2, 3]:
        raise PrepareError(f"sentencepiece {spm.__version__} returns no token offsets; install sentencepiece >= 0.2.3")
    if not path.is_file():
        raise PrepareError(f"{path}: there is no tokenizer model")
    sp = spm.SentencePieceProcessor()
    try:
        sp.LoadFromFile(str(path))
    except (OSError, RuntimeError, ValueError) as error:
        raise PrepareError(f"{path}: not a SentencePiece model ({error})") from None
    if sp.bos_id() != BOS_ID or sp.vocab_size() > 1 << 16:
        raise PrepareError(
            f"{path}: BOS is {sp.bos_id()} of {sp.vocab_size()} pieces; shards need BOS 1 and at most 65,536 pieces"
        )
    missing = [f"U+{ord(c):04X}" for c in CONTROLS if sp.piece_to_id(c) == sp.unk_id()]
    if missing:
        raise PrepareError(f"{path}: no piece for {', '.join(missing)}, so this is not a CaseOps tokenizer")
    return sp


# ----------------------------------------------------------------------------------------------------------------------
# 3. READING DOCUMENTS


@dataclass(frozen=True)
class Record:
    """A document as it lies in its file: a JSON line, or (is_json False) the text itself, as bytes."""

    payload: bytes
    is_json: bool
    line: int  # 1-based line or row; 0 when the file is one document
    place: str  # the file, for messages


class _Hashing(io.RawIOBase):
    """A raw file that hashes and counts what is read from it."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.sha256, self.n_bytes = raw, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.raw.read(len(buffer))
        buffer[: len(data)] = data
        self.sha256.update(data)
        self.n_bytes += len(data)
        return len(data)


class _ZstdFile(io.RawIOBase):
    """Decompressed view of a zstd file; a truncated frame raises EOFError instead of passing for the end."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard  # only .zst inputs need it

        self.raw, self.make, self.rest = raw, zstandard.ZstdDecompressor().decompressobj, b""
        self.frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            data = self.raw.read(1 << 16)
            if not data:
                if self.frame is not None:
                    raise EOFError("the last zstd frame is incomplete")
                return 0
            while data:
                self.frame = self.frame or self.make()
                self.rest += self.frame.decompress(data)
                data = self.frame.unused_data if self.frame.eof else b""
                self.frame = None if self.frame.eof else self.frame
        n = min(len(buffer), len(self.rest))
        buffer[:n], self.rest = self.rest[:n], self.rest[n:]
        return n


_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".jsonl": lambda raw: raw,
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".xz": lzma.LZMAFile,
    ".zst": lambda raw: io.BufferedReader(_ZstdFile(raw), 1 << 20),
}


@dataclass
class Source:
    """One --docs argument. `records` may be read once; afterwards sha256, n_bytes and documents are filled."""

    path: str
    sha256: str = ""
    n_bytes: int = 0
    documents: dict[str, int] = field(default_factory=lambda: {"val": 0, "train": 0})
    on_bytes: Callable[[int], None] = lambda n: None

    @property
    def name(self) -> str:
        return "stdin" if self.path == "-" else Path(self.path).name

    def size(self) -> int:
        """Bytes on disk, for the progress bar; 0 when unknown."""
        path = Path(self.path)
        files = path.rglob("*.txt") if path.is_dir() else [path] if path.is_file() else []
        return sum(file.stat().st_size for file in files)

    def contents_sha256(self) -> str:
        """Return what `sha256` is after reading, without decompressing or parsing; "" for standard input."""
        path = Path(self.path)
        if self.path == "-":
            return ""
        if path.is_dir() or path.suffix == ".txt":
            for _ in self.records():
                pass
            return self.sha256
        return _file_sha256(path)

    def records(self) -> Iterator[Record]:
        """Yield the documents in file order; raises PrepareError for an unreadable or damaged file."""
        path = Path(self.path)
        try:
            if self.path == "-":
                yield from self._lines(sys.stdin.buffer, ".jsonl")
            elif path.is_dir():
                yield from self._folder(path)
            elif path.suffix == ".parquet":
                yield from self._parquet(path)
            elif path.suffix == ".txt":
                yield from self._files([path])
            else:
                with path.open("rb", buffering=0) as raw:
                    yield from self._lines(raw, path.suffix)
        except FileNotFoundError:
            raise PrepareError(f"{self.path}: there is no such file or folder") from None

    def _lines(self, raw: BinaryIO, suffix: str) -> Iterator[Record]:
        if suffix not in _OPENERS:
            raise PrepareError(
                f"{self.path}: unknown kind of file; known are .jsonl (also .gz, .xz, .zst), .parquet, .txt and folders"
            )
        hashing, number = _Hashing(raw), 0
        buffered = io.BufferedReader(hashing, 1 << 20)
        try:
            for number, line in enumerate(_OPENERS[suffix](buffered), start=1):
                self._report(hashing.n_bytes)
                if line.strip():
                    yield Record(line, True, number, self.path)
        except (EOFError, OSError, lzma.LZMAError, ValueError) as error:
            self._damaged(number, error)
        except ImportError:
            raise PrepareError(f"{self.path}: reading .zst needs the zstandard package") from None
        except Exception as error:
            if type(error).__name__ != "ZstdError":  # zstandard is optional, so its error type cannot be named
                raise
            self._damaged(number, error)
        self._report(hashing.n_bytes)
        self.sha256 = hashing.sha256.hexdigest()

    def _damaged(self, line: int, error: Exception) -> None:
        raise PrepareError(f"{self.path}:{line + 1}: the file is truncated or damaged here ({error})") from None

    def _folder(self, folder: Path) -> Iterator[Record]:
        files = sorted(folder.rglob("*.txt"), key=lambda file: file.relative_to(folder).as_posix())
        if not files:
            raise PrepareError(f"{folder}: the folder holds no .txt file")
        return self._files(files)

    def _files(self, files: list[Path]) -> Iterator[Record]:
        """One document per file. The hash covers the contents in order, each with its length before it."""
        digest = hashlib.sha256()
        for file in files:
            text = file.read_bytes()
            digest.update(len(text).to_bytes(8, "little") + text)
            self._report(self.n_bytes + len(text))
            yield Record(text, False, 0, str(file))
        self.sha256 = digest.hexdigest()

    def _parquet(self, path: Path) -> Iterator[Record]:
        try:
            from pyarrow import parquet
        except ImportError:
            raise PrepareError(f"{path}: reading .parquet needs the pyarrow package") from None
        try:
            rows = 0
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=256, columns=["text"]):
                for text in batch.column("text").to_pylist():
                    rows += 1
                    yield Record((text or "").encode("utf-8", "surrogatepass"), False, rows, str(path))
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise PrepareError(f"{path}: cannot read the column 'text' ({error})") from None
        self.sha256 = _file_sha256(path)
        self._report(path.stat().st_size)

    def _report(self, n_bytes: int) -> None:
        self.on_bytes(n_bytes - self.n_bytes)
        self.n_bytes = n_bytes


def document_text(record: Record) -> str:
    """Return the text of a record; raises PrepareError that names file and line."""
    where = f"{record.place}:{record.line}" if record.line else record.place
    try:
        value = record.payload.decode()
        if record.is_json:
            value = json.loads(value.removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise PrepareError(f"{where}: not UTF-8 (byte {error.start} of the document)") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise PrepareError(f"{where}: broken JSON ({error})") from None
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise PrepareError(f"{where}: neither an object with a string under 'text' nor a bare string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PrepareError(
            f"{where}: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
            "such text has no UTF-8 bytes to count"
        ) from None
    return text


# ----------------------------------------------------------------------------------------------------------------------
# 4. BATCHES AND WORKERS
# The main process reads and writes; workers parse and encode. Batches come back in order, a fixed number under way.


@dataclass(frozen=True)
class Batch:
    """Records of one split, and where they stand in the stream of all documents."""

    split: str
    records: tuple[Record, ...]
    first: int  # index of the first record in the stream
    prefix: str  # hash of all payloads before it: proves on resume that the documents are the same
    model: str
    error: str = ""


@dataclass(frozen=True)
class Encoded:
    """A batch after encoding."""

    batch: Batch
    ids: bytes = b""  # uint16
    counts: bytes = b""  # uint16, validation only
    lengths: tuple[int, ...] = ()  # tokens of each document, BOS included
    n_bytes: int = 0  # UTF-8 bytes of the texts
    text_hashes: tuple[int, ...] = ()
    error: str = ""


@lru_cache(maxsize=1)
def _encoder(model: str) -> DocumentEncoder:
    return DocumentEncoder(load_tokenizer(Path(model)))


def _text_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def encode_batch(batch: Batch) -> Encoded:
    """Encode a batch; a document that cannot be encoded makes the whole batch an error with file and line."""
    if batch.error:
        return Encoded(batch, error=batch.error)
    encoder = _encoder(batch.model)
    results, hashes, n_bytes = [], [], 0
    for record in batch.records:
        try:
            text = document_text(record)
            results.append(encoder.encode(text, want_counts=batch.split == "val"))
        except PrepareError as error:
            return Encoded(batch, error=str(error))
        except ValueError as error:
            return Encoded(batch, error=f"{record.place}:{record.line}: {error}")
        hashes.append(_text_hash(text))
        n_bytes += len(text.encode())
    ids, counts = b"".join(ids for ids, _ in results), b"".join(counts for _, counts in results)
    lengths = tuple(len(ids) // 2 for ids, _ in results)
    # the payloads do not travel back
    batch = Batch(batch.split, (), batch.first, batch.prefix, batch.model)
    return Encoded(batch, ids, counts, lengths, n_bytes, tuple(hashes))


def _start_worker() -> None:
    """Leave Ctrl-C to the main process, and end with it even when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def encode_in_order(batches: Iterable[Batch], workers: int) -> Iterator[Encoded]:
    """Yield `encode_batch` of each batch, in order, with at most 3 batches per worker under way."""
    if workers == 1:
        yield from map(encode_batch, batches)
        return
    # spawn: forking a process that runs threads (the progress bar, SentencePiece) can deadlock
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    under_way: deque[Any] = deque()
    try:
        for batch in batches:
            under_way.append(pool.submit(encode_batch, batch))
            if len(under_way) >= 3 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise PrepareError(
            "a worker process died (out of memory?); run the same command again, or with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def default_workers() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ----------------------------------------------------------------------------------------------------------------------
# 5. SHARDS


def write_atomically(path: Path, *parts: bytes) -> None:
    """Write a file so that under its name there is either the whole of it or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    _rename(partial, path)


def _rename(partial: Path, path: Path) -> None:
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_header(n_tokens: int) -> bytes:
    """Return the 1,024-byte header of a shard of n_tokens uint16 values."""
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, n_tokens
    return header.tobytes()


class ShardWriter:
    """Cuts one split into shards of exactly `shard_tokens` values (the last one may be shorter)."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, held_back: bool = False) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.kinds = ("val", "val_bytes") if split == "val" else ("train",)
        self.buffers = {kind: bytearray() for kind in self.kinds}
        self.held_back = held_back  # keep shards under a hidden name until publish_held()
        self.finished: list[dict[str, Any]] = []  # manifest rows
        self.starts: deque[int] = deque()  # where documents begin that are in no shard yet, from the shard's start
        self.next_document = 0
        self.inside = False  # the current shard begins inside document next_document - 1

    @property
    def n_buffered(self) -> int:
        """Tokens that wait for their shard."""
        return len(self.buffers[self.kinds[0]]) // 2

    def add(self, encoded: Encoded, skip: int = 0) -> None:
        """Take in a batch, less its first `skip` tokens, which are in finished shards."""
        position = self.n_buffered - skip
        for length in encoded.lengths:
            if position >= 0:
                self.starts.append(position)
            position += length
        for kind in self.kinds:
            self.buffers[kind] += memoryview(encoded.counts if kind == "val_bytes" else encoded.ids)[2 * skip :]

    def write_full(self) -> bool:
        """Write the next shard if there are tokens for a whole one; return whether there were."""
        full = self.n_buffered >= self.shard_tokens
        if full:
            self._write(self.shard_tokens)
        return full

    def write_rest(self) -> None:
        """Write what is left as a short shard."""
        if self.n_buffered:
            self._write(self.n_buffered)

    def _write(self, n_tokens: int) -> None:
        header, documents = shard_header(n_tokens), self._documents(n_tokens)
        number = len(self.finished) // len(self.kinds)
        for kind in self.kinds:
            path = self.folder / f"fineweb_{kind}_{number:06d}.bin"
            data = bytes(memoryview(self.buffers[kind])[: 2 * n_tokens])
            del self.buffers[kind][: 2 * n_tokens]
            digest = hashlib.sha256(header)
            digest.update(data)
            write_atomically(_held(path) if self.held_back else path, header, data)
            size = len(header) + len(data)
            row = {"name": path.name, "sha256": digest.hexdigest(), "bytes": size, "tokens": n_tokens}
            self.finished.append(row | documents)

    def _documents(self, n_tokens: int) -> dict[str, Any]:
        """Return the range [first, end) of documents with a token in the shard, and step on to the next shard."""
        first = self.next_document - self.inside
        while self.starts and self.starts[0] < n_tokens:
            self.starts.popleft()
            self.next_document += 1
        row = {"documents": [first, self.next_document], "begins_inside_document": self.inside}
        self.starts = deque(start - n_tokens for start in self.starts)
        self.inside = self.n_buffered > n_tokens and not (self.starts and self.starts[0] == 0)
        return row


def _held(path: Path) -> Path:
    return path.with_name(f".{path.name}.held")


def publish_held(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Give shards that were held back their final names."""
    for row in rows:
        path = folder / row["name"]
        if _held(path).exists():
            _rename(_held(path), path)


# ----------------------------------------------------------------------------------------------------------------------
# 6. PROGRESS, RESUME, MANIFEST
# After each finished training shard, progress.json records what is done and where to go on. The cursor is the start of
# the batch in which the shard ended and the number of that batch's tokens that are in finished shards.


@dataclass(frozen=True)
class Options:
    """What the user asked for. val_docs None: the canonical number, or the whole of val_docs_file."""

    docs: tuple[str, ...]
    out: Path
    sp: Path
    val_docs: int | None = None
    val_docs_file: str | None = None
    workers: int = 1
    shard_tokens: int = SHARD_TOKENS
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        return self.out / "datasets" / DATASET

    @property
    def n_val(self) -> int | None:
        """Validation documents; None for all of val_docs_file."""
        return VAL_DOCS if self.val_docs is None and self.val_docs_file is None else self.val_docs

    def settings(self) -> dict[str, Any]:
        """Everything besides the documents themselves that the output depends on."""
        return {
            "documents": [Source(path).name for path in self.docs],
            "val_docs_file": Source(self.val_docs_file).name if self.val_docs_file else None,
            "val_docs": self.n_val,
            "shard_tokens": self.shard_tokens,
            "tokenizer_sha256": _file_sha256(self.sp),
        }


@dataclass
class Totals:
    """Running totals of one split."""

    documents: int = 0
    tokens: int = 0  # BOS included
    bytes: int = 0  # UTF-8 bytes of the texts
    documents_without_tokens: int = 0
    documents_equal_to_validation: int = 0

    def add(self, encoded: Encoded, val_hashes: set[int]) -> None:
        """Count a batch."""
        self.documents += len(encoded.lengths)
        self.tokens += sum(encoded.lengths)
        self.bytes += encoded.n_bytes
        self.documents_without_tokens += encoded.lengths.count(1)
        self.documents_equal_to_validation += sum(h in val_hashes for h in encoded.text_hashes)


@dataclass
class Progress:
    """The state of a run between two shards; as JSON in progress.json."""

    settings: dict[str, Any]
    finished: list[dict[str, Any]]
    totals: dict[str, dict[str, int]]  # at the cursor
    record: int  # cursor: the record of the stream that starts the batch
    skip: int  # cursor: tokens of the batch that are in finished shards
    prefix: str  # hash of all records before the cursor
    next_document: int
    inside: bool


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise PrepareError(f"{path} is damaged; run again with --overwrite to start over") from None


def load_progress(folder: Path, settings: dict[str, Any]) -> Progress | None:
    """Return the state to continue from, None to start; raises PrepareError if the folder holds something else."""
    state = _read_json(folder / "progress.json")
    if state is None:
        found = sorted(folder.glob("fineweb_*.bin"))
        if found:
            raise PrepareError(
                f"{found[0]} belongs to no known run (there is neither manifest.json nor progress.json); choose "
                "another --out, or pass --overwrite to replace the shards there"
            )
        return None
    progress = Progress(**state)
    _refuse_other_settings(folder, progress.settings, settings, "an unfinished run")
    publish_held(folder, progress.finished)
    check_files(folder, progress.finished)
    return progress


def _refuse_other_settings(folder: Path, theirs: dict[str, Any], ours: dict[str, Any], what: str) -> None:
    changed = [f"{key} {theirs.get(key)!r}, now {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]
    if changed:
        raise PrepareError(
            f"{folder} holds {what} with other settings ({'; '.join(changed)}); choose another --out, or pass "
            "--overwrite to replace it"
        )


def check_files(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Compare files with their rows of the manifest; raises PrepareError for one that is missing or changed."""
    for row in rows:
        path = folder / row["name"]
        problem = "is missing" if not path.is_file() else "does not have its recorded sha256"
        if not path.is_file() or path.stat().st_size != row["bytes"] or _file_sha256(path) != row["sha256"]:
            raise PrepareError(f"{path} {problem}; run again with --overwrite to start over")


def already_complete(options: Options, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest if this very data set is there and intact; raises PrepareError if it is another one."""
    manifest = _read_json(options.folder / "manifest.json")
    if manifest is None:
        return None
    _refuse_other_settings(options.folder, manifest["settings"], settings, "a data set")
    check_files(options.folder, manifest["files"])
    paths = [options.val_docs_file, *options.docs] if options.val_docs_file else options.docs
    for path, row in zip(paths, manifest["sources"], strict=True):
        if Source(path).contents_sha256() != row["sha256"]:
            raise PrepareError(
                f"{options.folder} is complete, but not known to come from the present contents of {row['name']}; "
                "choose another --out, or pass --overwrite to replace it"
            )
    return manifest


# ----------------------------------------------------------------------------------------------------------------------
# 7. PREPARING A DATA SET


class Stream:
    """All documents of a run in their order, cut into batches; validation first."""

    def __init__(self, options: Options, on_bytes: Callable[[int], None]) -> None:
        self.options, self.val_hashes = options, set[int]()
        self.train_sources = [Source(path, on_bytes=on_bytes) for path in options.docs]
        self.val_source = Source(options.val_docs_file, on_bytes=on_bytes) if options.val_docs_file else None
        self.prefix = hashlib.blake2b(digest_size=16)

    @property
    def sources(self) -> list[Source]:
        """In reading order."""
        return [self.val_source, *self.train_sources] if self.val_source else self.train_sources

    def records(self) -> Iterator[tuple[str, Record]]:
        """Yield (split, record)."""
        n_val, n_read = self.options.n_val, 0
        if self.val_source:
            for record in self.val_source.records():  # to the end, for the hash of the file
                if n_val is None or n_read < n_val:
                    n_read += 1
                    self.val_source.documents["val"] += 1
                    yield "val", record
            wanted = n_val or 1
            if n_read < wanted:
                raise PrepareError(f"{self.val_source.path} holds {n_read:,} documents, but {wanted:,} are wanted")
            n_val = n_read
        for source in self.train_sources:
            for record in source.records():
                split = "val" if n_read < n_val else "train"
                n_read += 1
                source.documents[split] += 1
                yield split, record
        if n_read <= n_val:
            raise no_training_documents(n_read, n_val, bool(self.val_source))

    def batches(self, start: int, prefix: str) -> Iterator[Batch]:
        """Yield batches from record `start` on; what goes wrong while reading comes as a last batch with `error`."""
        position, held, size = 0, [], 0
        make = self._make_batch
        try:
            for split, record in self.records():
                if position < start:
                    self._pass_over(split, record)
                    position += 1
                    continue
                if position == start and prefix not in ("", self.prefix.hexdigest()):
                    raise PrepareError(
                        "the documents are not those of the unfinished run; restore them, or pass --overwrite"
                    )
                if held and (held[0][0] != split or size >= BATCH_BYTES or len(held) >= BATCH_DOCS):
                    yield make(held, position)
                    held, size = [], 0
                held.append((split, record))
                size += len(record.payload)
                position += 1
            if held:
                yield make(held, position)
        except (PrepareError, OSError) as error:
            yield Batch("", (), position, "", "", error=_sentence(error))

    def _make_batch(self, held: list[tuple[str, Record]], end: int) -> Batch:
        records = tuple(record for _, record in held)
        batch = Batch(held[0][0], records, end - len(held), self.prefix.hexdigest(), str(self.options.sp))
        for record in records:
            self._hash(record)
        return batch

    def _hash(self, record: Record) -> None:
        self.prefix.update(len(record.payload).to_bytes(8, "little") + record.payload)

    def _pass_over(self, split: str, record: Record) -> None:
        self._hash(record)
        if split == "val":
            self.val_hashes.add(_text_hash(document_text(record)))


def no_training_documents(n_docs: int, n_val: int, separate: bool) -> PrepareError:
    """The refusal of a split whose training part is empty."""
    if separate:
        return PrepareError("the files of --docs hold no document to train on")
    example = max(1, n_docs // 50)
    advice = f"pass --val-docs N with N below {n_docs:,} (for example {example:,})" if n_docs > 1 else "add documents"
    return PrepareError(
        f"there are {n_docs:,} documents and the first {n_val:,} are for validation, which leaves none to train on; "
        f"{advice}, or name a file of validation documents with --val-docs-file"
    )


def _refuse_empty_split(options: Options) -> None:
    """Count no more documents than needed to know that some are left for training. Standard input is checked later."""
    if options.val_docs_file or "-" in options.docs:
        return
    records = itertools.chain.from_iterable(Source(path).records() for path in options.docs)
    n_docs = sum(1 for _ in itertools.islice(records, options.n_val + 1))
    if n_docs <= options.n_val:
        raise no_training_documents(n_docs, options.n_val, separate=False)


class Preparation:
    """One run from documents to shards; `run` returns the manifest."""

    def __init__(self, options: Options, settings: dict[str, Any], bar: Any) -> None:
        self.options, self.settings, self.bar = options, settings, bar
        self.folder = options.folder
        self.stream = Stream(options, bar.update)
        self.totals = {"val": Totals(), "train": Totals()}
        self.val = ShardWriter(self.folder, "val", options.shard_tokens, held_back=True)
        self.train = ShardWriter(self.folder, "train", options.shard_tokens)
        self.start, self.skip, self.prefix = 0, 0, ""
        self.val_done = False

    def resume(self, progress: Progress) -> None:
        """Go on from a saved state."""
        self.totals = {split: Totals(**row) for split, row in progress.totals.items()}
        self.val.finished = [row for row in progress.finished if not row["name"].startswith("fineweb_train")]
        self.train.finished = [row for row in progress.finished if row["name"].startswith("fineweb_train")]
        self.train.next_document, self.train.inside = progress.next_document, progress.inside
        self.start, self.skip, self.prefix = progress.record, progress.skip, progress.prefix
        self.val_done = True

    def run(self) -> dict[str, Any]:
        """Encode and write everything, then the manifest."""
        batches = self.stream.batches(self.start, self.prefix)
        for encoded in encode_in_order(batches, self.options.workers):
            if encoded.error:
                raise PrepareError(f"{encoded.error}; finished shards are kept, the same command continues after them")
            self._take_val(encoded) if encoded.batch.split == "val" else self._take_train(encoded)
            self.bar.set_postfix_str(self._summary(), refresh=False)
        self.train.write_rest()
        manifest = self.manifest()
        _write_json(self.folder / "manifest.json", manifest)
        (self.folder / "progress.json").unlink(missing_ok=True)
        return manifest

    def _summary(self) -> str:
        return ", ".join(f"{split} {t.documents:,} docs {t.tokens:,} tokens" for split, t in self.totals.items())

    def _take_val(self, encoded: Encoded) -> None:
        self.stream.val_hashes.update(encoded.text_hashes)
        self.totals["val"].add(encoded, set())
        self.val.add(encoded)
        while self.val.write_full():
            pass

    def _take_train(self, encoded: Encoded) -> None:
        if not self.val_done:  # now that there is a training document, the validation shards may appear
            self.val.write_rest()
            self._save(encoded.batch, self._totals_now(), 0)
            publish_held(self.folder, self.val.finished)
            self.val_done = True
        totals, buffered = self._totals_now(), self.train.n_buffered
        self.totals["train"].add(encoded, self.stream.val_hashes)
        self.train.add(encoded, self.skip)
        done, self.skip = self.skip, 0
        while self.train.write_full():
            done += self.options.shard_tokens - buffered
            buffered = 0
            self._save(encoded.batch, totals, done)

    def _totals_now(self) -> dict[str, dict[str, int]]:
        return {split: asdict(totals) for split, totals in self.totals.items()}

    def _save(self, batch: Batch, totals: dict[str, dict[str, int]], skip: int) -> None:
        progress = Progress(
            settings=self.settings,
            finished=self.val.finished + self.train.finished,
            totals=totals,
            record=batch.first,
            skip=skip,
            prefix=batch.prefix,
            next_document=self.train.next_document,
            inside=self.train.inside,
        )
        _write_json(self.folder / "progress.json", asdict(progress))

    def manifest(self) -> dict[str, Any]:
        """Return what manifest.json says. It does not depend on time, place or number of workers."""
        return {
            "format": 1,
            "dataset": DATASET,
            "text_transform": CASEOPS,
            "settings": self.settings,
            "tokenizer": {
                "name": self.options.sp.name,
                "sha256": self.settings["tokenizer_sha256"],
                "vocab_size": load_tokenizer(self.options.sp).vocab_size(),
                "bos_id": BOS_ID,
                "sentencepiece": spm.__version__,
            },
            "sources": [
                {"name": source.name, "sha256": source.sha256, "bytes": source.n_bytes, "documents": source.documents}
                for source in self.stream.sources
            ],
            "splits": {
                split: asdict(totals) | {"bytes_per_token": round(totals.bytes / max(1, totals.tokens), 6)}
                for split, totals in self.totals.items()
            },
            "files": self.val.finished + self.train.finished,
        }


class _NoBar:
    """Stands in for tqdm where it is not installed."""

    def update(self, n: int) -> None:
        """Ignore progress."""

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        """Ignore a message."""

    def close(self) -> None:
        """Nothing to close."""


def _progress_bar(options: Options) -> Any:
    paths = [options.val_docs_file, *options.docs] if options.val_docs_file else options.docs
    total = None if "-" in paths else sum(Source(path).size() for path in paths)
    if tqdm is None:
        return _NoBar()
    return tqdm(total=total, unit="B", unit_scale=True, desc="prepare", mininterval=2.0, disable=None)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder; raises PrepareError if another run does."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise PrepareError(f"another run is writing to {folder}") from None
    finally:
        os.close(handle)


def _clear(folder: Path, everything: bool) -> None:
    """Remove what an interrupted run left behind; with `everything` also finished files of an earlier run."""
    patterns = [".*.partial"] + ["fineweb_*.bin", ".*.held", "manifest.json", "progress.json"] * everything
    for path in itertools.chain.from_iterable(folder.glob(pattern) for pattern in patterns):
        path.unlink()


def prepare(options: Options) -> dict[str, Any]:
    """Write the data set that `options` describe, or continue it, and return its manifest. Raises PrepareError."""
    load_tokenizer(options.sp)
    if options.val_docs_file and options.val_docs_file in options.docs:
        raise PrepareError(f"{options.val_docs_file} is given both for training and for validation")
    _refuse_empty_split(options)
    settings, folder = options.settings(), options.folder
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _clear(folder, everything=options.overwrite)
        manifest = already_complete(options, settings)
        if manifest is not None:
            return manifest
        progress = load_progress(folder, settings)
        if progress is None:
            _clear(folder, everything=True)
        bar = _progress_bar(options)
        try:
            preparation = Preparation(options, settings, bar)
            if progress is not None:
                preparation.resume(progress)
            return preparation.run()
        finally:
            bar.close()


# ----------------------------------------------------------------------------------------------------------------------
# 8. VERIFYING A DATA SET
# Shards are read as a loader reads them, not as they were written. Each check adds a sentence to what holds or to what
# does not; with the documents at hand every token and every byte count is made again and compared.


@dataclass
class Findings:
    """What --verify has to say."""

    proven: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def expect(self, holds: bool, proven: str, problem: str) -> bool:
        (self.proven if holds else self.problems).append(proven if holds else problem)
        return holds


def read_shard(path: Path) -> np.ndarray:
    """The uint16 values of a shard, mapped; raises PrepareError for one that is cut short or none at all."""
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if len(header) < SHARD_HEADER_INTS or header[:2].tolist() != [SHARD_MAGIC, SHARD_VERSION]:
        raise PrepareError(f"{path} is not a token shard")
    offset, promised = 4 * SHARD_HEADER_INTS, int(header[2])
    if path.stat().st_size != offset + 2 * promised:
        raise PrepareError(f"{path} has {path.stat().st_size} bytes, its header promises {offset + 2 * promised}")
    return np.memmap(path, "<u2", "r", offset) if promised else np.empty(0, "<u2")


def split_shards(folder: Path, kind: str) -> list[np.ndarray]:
    """All shards of `train`, `val` or `val_bytes`, in order; raises PrepareError where a number is missing."""
    paths = sorted(folder.glob(f"fineweb_{kind}_[0-9]*.bin"))
    for number, path in enumerate(paths):
        if path.name != f"fineweb_{kind}_{number:06d}.bin":
            raise PrepareError(f"{folder / f'fineweb_{kind}_{number:06d}.bin'} is missing: {path.name} comes instead")
    return [read_shard(path) for path in paths]


def shard_documents(shards: Iterable[np.ndarray]) -> Iterator[bytes]:
    """The tokens of each document, wherever shards end; text before the first BOS is passed over."""
    open_document: bytes | None = None
    for shard in shards:
        starts = np.flatnonzero(shard == BOS_ID).tolist()
        head = shard[: starts[0] if starts else len(shard)].tobytes()
        open_document = None if open_document is None else open_document + head
        for start, end in itertools.pairwise([*starts, len(shard)]):
            if open_document is not None:
                yield open_document
            open_document = shard[start:end].tobytes()
    if open_document is not None:
        yield open_document


class ShardReader:
    """One split as a stream, to be compared with what it should be."""

    def __init__(self, shards: list[np.ndarray]) -> None:
        self.shards, self.shard, self.at = shards, 0, 0

    def take(self, n: int) -> np.ndarray:
        """The next n values, fewer at the end."""
        parts: list[np.ndarray] = []
        while n and self.shard < len(self.shards):
            parts.append(self.shards[self.shard][self.at : self.at + n])
            n, self.at = n - len(parts[-1]), self.at + len(parts[-1])
            if self.at == len(self.shards[self.shard]):
                self.shard, self.at = self.shard + 1, 0
        return np.concatenate(parts) if parts else np.empty(0, "<u2")

    def rest(self) -> int:
        """How many are left."""
        return sum(map(len, self.shards[self.shard :])) - self.at


def verify(options: Options, with_tokenizer: bool) -> Findings:
    """Read a data set again and compare it with itself, its manifest and, if there are any, its documents."""
    found = Findings()
    try:
        splits = {kind: split_shards(options.folder, kind) for kind in ("train", "val", "val_bytes")}
        if not splits["val"] or not splits["train"]:
            raise PrepareError(f"{options.folder} holds no {'val' if splits['train'] else 'train'} shards")
        manifest = _read_json(options.folder / "manifest.json")
        _verify_counts(splits, options.sp if with_tokenizer else None, found)
        _verify_overlap(splits, found)
        if manifest is None:
            found.proven.append("there is no manifest.json to compare with")
        else:
            _verify_manifest(options, splits, manifest, with_tokenizer, found)
        if options.docs:
            _verify_documents(options, splits, manifest, found)
    except PrepareError as error:
        found.problems.append(str(error))
    return found


def _n_documents(shards: list[np.ndarray]) -> int:
    return sum(int(np.count_nonzero(shard == BOS_ID)) for shard in shards)


def _verify_counts(splits: dict[str, list[np.ndarray]], sp: Path | None, found: Findings) -> None:
    """Tokens and sidecar in lock-step, documents from the first token on, operators that stand for no text."""
    val, counts = splits["val"], splits["val_bytes"]
    lengths = [list(map(len, shards)) for shards in (val, counts)]
    total = sum(int(shard.astype(np.int64).sum()) for shard in counts)
    found.expect(
        lengths[0] == lengths[1],
        f"every validation token has its byte count: {sum(lengths[0]):,} tokens, {_n_documents(val):,} documents, "
        f"{total:,} bytes",
        f"validation shards have {lengths[0]} tokens, their byte counts are {lengths[1]}",
    )
    for split in ("val", "train"):
        first = next((int(shard[0]) for shard in splits[split] if len(shard)), None)
        found.expect(
            first == BOS_ID, f"{split} starts with a document", f"{split} starts with token {first}, not with BOS"
        )
    if sp is None or lengths[0] != lengths[1]:
        return
    marks = [load_tokenizer(sp).piece_to_id(control) for control in CONTROLS]
    marked = np.concatenate([count[np.isin(ids, marks)] for ids, count in zip(val, counts, strict=True)])
    share = float((marked > 0).mean()) if len(marked) else 0.0  # escaped ones, and those behind dropped blanks, count
    found.expect(
        share < 0.01,
        "case markers stand for no bytes",
        f"{share:.0%} of the case markers are counted as text, which makes bits per byte too low",
    )


def _verify_overlap(splits: dict[str, list[np.ndarray]], found: Findings) -> None:
    """No training document has the tokens of a validation document; documents without any do not matter."""
    digest = lambda document: hashlib.blake2b(document, digest_size=12).digest()
    held_out = {digest(document): i for i, document in enumerate(shard_documents(splits["val"])) if len(document) > 2}
    n_same, first = 0, ""
    for i, document in enumerate(shard_documents(splits["train"])):
        same = held_out.get(digest(document))
        if same is not None:
            first = first or f"training document {i:,} is validation document {same:,}"
            n_same += 1
    found.expect(
        n_same == 0,
        f"none of the {_n_documents(splits['train']):,} training documents is a validation document",
        f"{n_same:,} training documents are validation documents as well (the first: {first})",
    )


def _verify_manifest(
    options: Options,
    splits: dict[str, list[np.ndarray]],
    manifest: dict[str, Any],
    with_tokenizer: bool,
    found: Findings,
) -> None:
    """Files, totals and tokenizer are those that manifest.json names."""
    for row in manifest["files"]:
        try:
            check_files(options.folder, [row])
        except PrepareError as error:
            found.problems.append(str(error).split(";")[0])
    names = {row["name"] for row in manifest["files"]}
    extra = sorted(path.name for path in options.folder.glob("fineweb_*.bin") if path.name not in names)
    found.expect(
        not extra, f"manifest.json names all {len(names)} files", f"manifest.json does not name {', '.join(extra)}"
    )
    for split in ("val", "train"):
        theirs = [manifest["splits"][split][key] for key in ("documents", "tokens")]
        ours = [_n_documents(splits[split]), sum(map(len, splits[split]))]
        found.expect(
            ours == theirs,
            f"{split} has the {ours[0]:,} documents and {ours[1]:,} tokens of manifest.json",
            f"{split} has {ours} documents and tokens, manifest.json says {theirs}",
        )
    n_bytes = sum(int(shard.astype(np.int64).sum()) for shard in splits["val_bytes"])
    wanted = manifest["splits"]["val"]["bytes"]
    found.expect(
        n_bytes == wanted, f"the byte counts sum to {wanted:,}", f"the byte counts sum to {n_bytes:,}, not {wanted:,}"
    )
    if with_tokenizer:
        found.expect(
            _file_sha256(options.sp) == manifest["tokenizer"]["sha256"],
            "the tokenizer is the one of manifest.json",
            f"{options.sp} is not the tokenizer that manifest.json names",
        )


def _verify_documents(
    options: Options, splits: dict[str, list[np.ndarray]], manifest: dict[str, Any] | None, found: Findings
) -> None:
    """Encode every document again: the shards hold exactly their tokens and bytes, in their order."""
    if options.val_docs is None and manifest is not None:
        options = replace(options, val_docs=manifest["settings"]["val_docs"])
    readers = {kind: ShardReader(shards) for kind, shards in splits.items()}
    totals, bar = {"val": Totals(), "train": Totals()}, _progress_bar(options)
    stream = Stream(options, bar.update)
    try:
        for encoded in encode_in_order(stream.batches(0, ""), options.workers):
            if encoded.error:
                raise PrepareError(encoded.error)
            _verify_batch(encoded, readers, totals[encoded.batch.split].documents)
            totals[encoded.batch.split].add(encoded, set())
    finally:
        bar.close()
    for kind, reader in readers.items():
        if reader.rest():
            raise PrepareError(f"the {kind} shards hold {reader.rest():,} tokens more than the documents")
    if manifest is not None:
        ours, theirs = [source.sha256 for source in stream.sources], [row["sha256"] for row in manifest["sources"]]
        found.expect(
            ours == theirs, "the documents are the files of manifest.json", "manifest.json names other document files"
        )
    for split, total in totals.items():
        found.proven.append(
            f"{split} holds exactly the tokens of {total.documents:,} documents ({total.bytes:,} bytes), in their order"
        )


def _verify_batch(encoded: Encoded, readers: dict[str, ShardReader], first: int) -> None:
    """Raises PrepareError for the first document of the batch that the shards do not hold as it should be."""
    split = encoded.batch.split
    pairs = [(split, encoded.ids, "tokens")] + [("val_bytes", encoded.counts, "byte counts")] * (split == "val")
    for kind, data, what in pairs:
        want = np.frombuffer(data, "<u2")
        have = readers[kind].take(len(want))
        if len(have) != len(want) or (have != want).any():
            n = min(len(have), len(want))
            at = int(np.argmax(np.append(have[:n] != want[:n], True)))
            document = int(np.searchsorted(np.cumsum(encoded.lengths), at, side="right"))
            raise PrepareError(f"{what} of {split} document {first + document:,} are not those of its text")
    if split == "val" and int(np.frombuffer(encoded.counts, "<u2").astype(np.int64).sum()) != encoded.n_bytes:
        raise PrepareError(f"byte counts from validation document {first:,} on do not sum to the bytes of the texts")


# ----------------------------------------------------------------------------------------------------------------------
# 9. TRAINING THE TOKENIZER

# The settings of the public model. Training is deterministic: num_threads only divides the work and is recorded in the
# model, input_sentence_size 0 takes every sentence and so leaves nothing to chance.
_MAX_SENTENCE_BYTES = 4192
TOKENIZER_SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "vocab_size": 8192,
    "character_coverage": 0.999,
    "byte_fallback": True,
    "split_digits": True,
    "split_by_unicode_script": True,
    "split_by_number": True,
    "split_by_whitespace": True,
    "treat_whitespace_as_suffix": False,
    "allow_whitespace_only_pieces": False,
    "max_sentencepiece_length": 16,
    "max_sentence_length": _MAX_SENTENCE_BYTES,
    "shuffle_input_sentence": True,
    "input_sentence_size": 0,
    "user_defined_symbols": list(CONTROLS),
    "hard_vocab_limit": False,
    "use_all_vocab": False,
    "pad_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "unk_id": 3,
    "normalization_rule_name": "nmt_nfkc",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": True,
    "num_threads": 16,
}


def training_sentences(paths: Iterable[str]) -> Iterator[str]:
    """Yield the lines of all documents in CaseOps form, long ones cut at blanks.

    SentencePiece drops sentences over max_sentence_length, which would lose most long documents. Pieces never cross a
    blank, so cutting changes no statistics.
    """
    for path in paths:
        for record in Source(path).records():
            text = encode_lossless_caps_v2(document_text(record)).replace("\0", " ")
            for line in filter(None, map(str.strip, text.split("\n"))):
                if len(line.encode()) <= _MAX_SENTENCE_BYTES:
                    yield line
                else:
                    yield from _cut_at_blanks(line)


def _cut_at_blanks(line: str) -> Iterator[str]:
    words: list[str] = []
    size = 0
    for word in line.split(" "):
        n_bytes = len(word.encode()) + 1
        if words and size + n_bytes > _MAX_SENTENCE_BYTES:
            yield " ".join(words)
            words, size = [], 0
        words.append(word)
        size += n_bytes
    yield " ".join(words)


def train_tokenizer(paths: Iterable[str], out: Path) -> str:
    """Train the 8,192-piece CaseOps model on documents (training ones only), write it to `out`, return its sha256.

    Raises PrepareError for documents that cannot be read or are too few for 8,192 pieces.
    """
    model, problems = io.BytesIO(), []

    def sentences() -> Iterator[str]:
        # SentencePiece turns an exception of its iterator into one of its own, so it is kept aside
        try:
            yield from training_sentences(paths)
        except PrepareError as error:
            problems.append(error)

    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=sentences(), model_writer=model, minloglevel=1, **TOKENIZER_SETTINGS
        )
    except (RuntimeError, ValueError) as error:
        problems.append(PrepareError(f"SentencePiece could not train on these documents ({error})"))
    if problems:
        raise problems[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, model.getvalue())
    return hashlib.sha256(model.getvalue()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# 10. SAMPLE DOCUMENTS
# Real English text that every machine with Python has. Sources are parsed, never imported. One document per file, cut
# at paragraphs; the same versions of the same packages give the same documents.

SAMPLE_BYTES = 8_000_000  # the most prose-like documents are kept up to this size
SAMPLE_MIN_BYTES = 3_000_000
_DOC_BYTES, _MIN_DOC_BYTES = 12_000, 300
_MAX_SITE_SOURCE = 25_000_000  # bytes of third-party source to parse, which bounds the time
_SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "test", "tests", "idle_test", "testing", "site-packages", "dist-packages", "_bundled", "licenses")
)
_COMMON_WORDS = frozenset(
    re.findall(
        r"\w+",
        "the of and to a in is that for it as be with by are this or on an from not if can will at which have has was "
        "were when you your but all any its also may must should use used each one no other than then there they their "
        "we so such only into more does do been what how who where would because these those some between while about",
    )
)
_ROLE = re.compile(r":[a-zA-Z:]+:`~?([^`<]*)(?:<[^`]*>)?`")
_MARKUP = re.compile(r"[`*|]+")
_CODE_MARKS = re.compile(r"[{}\[\]<>=|\\_#@$%^~;/+]")


def build_sample(out: Path) -> tuple[int, int]:
    """Write sample documents as .jsonl, return (documents, UTF-8 bytes). Raises PrepareError below 3 MB."""
    paragraphs_seen: set[int] = set()
    documents = [text for source in _sample_texts() for text in _prose_documents(source, paragraphs_seen)]
    documents.sort(key=lambda text: (-_prose_score(text), text))
    total, kept = 0, []
    for text in documents:
        total += len(text.encode())
        if total > SAMPLE_BYTES:
            break
        kept.append(text)
    n_bytes = sum(len(text.encode()) for text in kept)
    if n_bytes < SAMPLE_MIN_BYTES:
        raise PrepareError(
            f"only {n_bytes:,} bytes of English text found under {', '.join(map(str, _sample_roots()))}; install the "
            "packages of requirements.txt, or bring documents of your own (--docs)"
        )
    kept.sort(key=_text_hash)  # a shuffle that is the same everywhere
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in kept).encode())
    return len(kept), n_bytes


def _sample_roots() -> list[Path]:
    """The standard library, then the folders of installed packages."""
    paths = sysconfig.get_paths()
    return [Path(path) for path in dict.fromkeys((paths["stdlib"], paths["purelib"], paths["platlib"]))]


def _sample_texts() -> Iterator[list[str]]:
    """Yield the text blocks of each source file."""
    left = 0
    for i, root in enumerate(_sample_roots()):
        guides, sources = _sample_files(root)
        for path in guides:
            yield [path.read_text(encoding="utf-8", errors="ignore")]
        left = _MAX_SITE_SOURCE if i else 1 << 40
        for path in sources:
            source = path.read_bytes()
            left -= len(source)
            if left < 0:
                break
            if b'"""' in source or b"'''" in source or path.name == "topics.py":
                yield _long_strings(source)


def _sample_files(root: Path) -> tuple[list[Path], list[Path]]:
    """Return (guides, Python sources) under a root, sorted."""
    guides, sources = [], []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(".py"):
                sources.append(path)
            elif name.endswith((".rst", ".md", ".txt")) or name == "METADATA":
                guides.append(path)
    return guides, sources


def _long_strings(source: bytes) -> list[str]:
    """Return the docstrings of a module, in order, and the long strings of its top-level calls and assignments.

    The latter are reference topics and docstrings of compiled functions. Expressions inside functions are not searched:
    that would double the time and find templates of code.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    candidates: list[ast.AST] = []
    for statement in tree.body:
        nodes = ast.walk(statement) if isinstance(statement, ast.Expr | ast.Assign) else _docstrings(statement)
        candidates.extend(nodes)
    texts = (node.value for node in candidates if isinstance(node, ast.Constant))
    return [text for text in texts if isinstance(text, str) and len(text) >= 80]


def _docstrings(statement: ast.stmt) -> Iterator[ast.AST]:
    """Yield the values of all statements inside a statement that are expressions."""
    if isinstance(statement, ast.Expr):
        yield statement.value
    for name in ("body", "orelse", "finalbody"):
        for inner in getattr(statement, name, ()):
            yield from _docstrings(inner)


def _prose_documents(blocks: Iterable[str], seen: set[int]) -> Iterator[str]:
    """Yield documents of the prose paragraphs in `blocks` that were not seen before."""
    held: list[str] = []
    size = 0
    for paragraph in itertools.chain.from_iterable(map(_prose_paragraphs, blocks)):
        key = _text_hash(" ".join(paragraph.lower().split()))
        if key in seen:
            continue
        seen.add(key)
        held.append(paragraph)
        size += len(paragraph.encode())
        if size >= _DOC_BYTES:
            yield "\n\n".join(held)
            held, size = [], 0
    if size >= _MIN_DOC_BYTES:
        yield "\n\n".join(held)


def _prose_paragraphs(block: str) -> Iterator[str]:
    """Yield the paragraphs of English prose in a docstring or guide, their lines joined and light markup removed."""
    try:
        block.encode()
    except UnicodeEncodeError:
        return
    for raw in re.split(r"\n[ \t]*\n", block):
        text = _MARKUP.sub("", _ROLE.sub(r"\1", " ".join(raw.split())))
        if len(text) >= 60 and ">>>" not in text and not text.startswith("..") and _is_prose(text):
            yield text


def _is_prose(text: str) -> bool:
    """Whether a paragraph is English rather than code, a table or a list of names."""
    words = text.split()
    letters = sum(map(str.isalpha, text)) + text.count(" ")
    code = len(_CODE_MARKS.findall(text))
    return _common_share(words) >= 0.25 and letters >= 0.88 * len(text) and code <= 0.02 * len(text)


def _common_share(words: list[str]) -> float:
    return sum(word.strip(".,:()").lower() in _COMMON_WORDS for word in words) / max(1, len(words))


def _prose_score(text: str) -> float:
    """Rank documents: the share of common words, less the share of characters that occur in code."""
    return round(_common_share(text.split()) - 5 * len(_CODE_MARKS.findall(text)) / len(text), 6)


# ----------------------------------------------------------------------------------------------------------------------
# 11. COMMAND LINE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Documents to CaseOps token shards with exact byte counts.",
        epilog="An interrupted run continues with the same command. Exit status: 0 done, 1 --verify found something, "
        "2 something to put right.",
    )
    add = parser.add_argument
    add(
        "--docs",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help='documents in order: .jsonl ({"text": ...} or a bare string per line), also .gz, .xz, .zst; '
        "- for standard input; folders of .txt; .parquet",
    )
    add("--out", type=Path, metavar="DIR", help=f"shards go to DIR/datasets/{DATASET}")
    add("--sp", type=Path, metavar="MODEL", help="SentencePiece model, e.g. tokenizer/caseops_8192.model")
    add(
        "--val-docs",
        type=int,
        metavar="N",
        help=f"the first N documents are for validation (default {VAL_DOCS:,}, the canonical split of FineWeb)",
    )
    add(
        "--val-docs-file",
        metavar="PATH",
        help="take validation documents from this file instead (its first --val-docs, default all)",
    )
    add("--workers", type=int, default=default_workers(), metavar="N", help="processes (default: all cores)")
    add("--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N", help=f"default {SHARD_TOKENS:,}")
    add("--overwrite", action="store_true", help="replace a data set that is there instead of continuing or refusing")
    add(
        "--verify",
        action="store_true",
        help="read the shards below --out again and prove their counts, with --docs every token of them",
    )
    add("--train-tokenizer", type=Path, metavar="MODEL", help="train a tokenizer on --docs (training documents only)")
    add("--sample", type=Path, metavar="JSONL", help="write sample documents taken from the installed Python packages")
    return parser


def _check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.verify:
        if not args.out or (args.docs and not args.sp):
            parser.error("--verify needs --out, and with --docs also --sp")
        return
    if not args.sample and not args.docs:
        parser.error("name the documents with --docs, or use --sample")
    if not args.sample and not args.train_tokenizer and not (args.out and args.sp):
        parser.error("--out and --sp are needed to write shards")
    if args.docs.count("-") > 1:
        parser.error("--docs: standard input (-) can be read only once")
    for name in ("val_docs", "workers", "shard_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")


def _run(args: argparse.Namespace) -> str:
    """Do what the arguments ask for; return the closing sentence."""
    if args.sample:
        n_docs, n_bytes = build_sample(args.sample)
        return f"{args.sample}: {n_docs:,} sample documents, {n_bytes:,} bytes of text"
    if args.train_tokenizer:
        return f"{args.train_tokenizer}: trained, sha256 {train_tokenizer(args.docs, args.train_tokenizer)}"
    options = _options(args)
    return f"{options.folder}: {_describe(prepare(options))}"


def _options(args: argparse.Namespace) -> Options:
    return Options(
        docs=tuple(args.docs),
        out=args.out,
        sp=args.sp or Path(),
        val_docs=args.val_docs,
        val_docs_file=args.val_docs_file,
        workers=args.workers,
        shard_tokens=args.shard_tokens,
        overwrite=args.overwrite,
    )


def _report(found: Findings) -> int:
    """Print what holds and what does not; return the exit status."""
    for sentence in found.proven:
        print(f"  {sentence}")
    for sentence in found.problems:
        print(f"  WRONG: {sentence}")
    print(f"verify: {len(found.problems)} problems" if found.problems else "verify: everything holds")
    return 1 if found.problems else 0


def _describe(manifest: dict[str, Any]) -> str:
    parts = [
        f"{split} {row['documents']:,} documents, {row['tokens']:,} tokens, {row['bytes']:,} bytes "
        f"({row['bytes_per_token']:.4f} bytes per token)"
        for split, row in manifest["splits"].items()
    ]
    same = manifest["splits"]["train"]["documents_equal_to_validation"]
    if same:
        parts.append(f"WARNING: {same:,} training documents are also validation documents")
    return "; ".join(parts)


def _sentence(error: Exception) -> str:
    """Say what went wrong without a traceback."""
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        hint = "; free some space and run the same command to continue" if error.errno == errno.ENOSPC else ""
        return f"{name}{error.strerror or error}{hint}"
    return str(error)


def main(argv: list[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    _check_arguments(parser, args)
    try:
        if args.verify:
            return _report(verify(_options(args), with_tokenizer=args.sp is not None))
        print(_run(args))
    except (PrepareError, OSError) as error:
        print(f"prepare_caseops_data: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prepare_caseops_data: stopped; finished shards are kept, the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
