"""Speed of text preparation: CaseOps, tokens with byte counts, and how far a straightforward byte counter is behind.

    python bench/bench_text.py [--docs docs.jsonl.xz] [--sp tokenizer/caseops_8192.model] [--megabytes 12]

Without --docs it uses shared training documents if they are there, else generated text. Everything runs on one
core and is timed in CPU time (best of several), so a busy machine disturbs it less. MB are 10^6 UTF-8 bytes of text.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import sentencepiece as spm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prepare_caseops_data as prep  # noqa: E402
from lossless_caps import (  # noqa: E402
    LosslessCapsError,
    decode_lossless_caps_v2,
    encode_lossless_caps_v2,
)

SHARED = ROOT / ".." / "shared" / "data" / "docs_train_00.jsonl.xz"


def prefix_counts(sp: spm.SentencePieceProcessor, text: str) -> list[int]:
    """Count bytes token by token as the public preparation script does: decode every prefix, and look how far it got.

    Quadratic in the document, and inexact: a prefix that ends in an operator cannot be decoded, so its token is charged
    the bytes of its own symbol, byte tokens are measured by their printed name, and normalization moves the cursor.
    """
    prefix, done, counts = "", 0, []
    for piece in sp.encode(encode_lossless_caps_v2(text), return_type=str):
        symbol = piece.replace("\u2581", " ")
        prefix += symbol
        try:
            reached = min(len(decode_lossless_caps_v2(prefix)), len(text))
        except LosslessCapsError:
            counts.append(len(symbol.encode()))
            continue
        counts.append(len(text[done:reached].encode()))
        done = reached
    return counts


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Return the least CPU time of several runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def generated_texts(n_bytes: int) -> list[str]:
    """Return made-up documents with the word lengths, capitals and repetition of English."""
    rng = random.Random(7)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(rng.choices(letters, range(26, 0, -1), k=rng.randint(1, 11))) for _ in range(20_000)]
    weights = [1 / (i + 1) for i in range(len(words))]
    documents, size = [], 0
    while size < n_bytes:
        picked = rng.choices(words, weights, k=rng.randint(100, 1800))
        documents.append(" ".join(w.capitalize() if rng.random() < 0.12 else w for w in picked) + ".")
        size += len(documents[-1])
    return documents


def load_texts(path: str | None, n_bytes: int) -> list[str]:
    """Return documents of about n_bytes together."""
    if path is None and not SHARED.exists():
        return generated_texts(n_bytes)
    texts, size = [], 0
    for record in prep.Source(path or str(SHARED)).records():
        texts.append(prep.document_text(record))
        size += len(texts[-1].encode())
        if size >= n_bytes:
            break
    return texts


def bench_caseops(texts: list[str], megabytes: float) -> None:
    """Print the speed of the transform and its inverse."""
    encoded = [encode_lossless_caps_v2(text) for text in texts]
    speed = megabytes / seconds(lambda: [encode_lossless_caps_v2(text) for text in texts])
    print(f"caseops encode              {speed:8.1f} MB/s   (at least 15 wanted)")
    speed = megabytes / seconds(lambda: [decode_lossless_caps_v2(text) for text in encoded])
    print(f"caseops decode              {speed:8.1f} MB/s   (at least 5 wanted)")


def bench_encoding(sp: spm.SentencePieceProcessor, model: Path, texts: list[str], megabytes: float) -> None:
    """Print the speed of preparation as the workers do it, beside that of SentencePiece and of the specification."""
    transformed = [encode_lossless_caps_v2(text) for text in texts]
    speed = megabytes / seconds(lambda: [sp.encode(text) for text in transformed], 1)
    print(f"sentencepiece alone         {speed:8.2f} MB/s")
    speed = megabytes / seconds(lambda: [prep.encode_document(sp, text) for text in texts], 1)
    print(f"encode_document             {speed:8.2f} MB/s")
    for split, wanted in (("train", 3.0), ("val", 1.5)):
        records = tuple(prep.Record(text.encode(), False, 0, "bench") for text in texts)
        batches = [prep.Batch(split, records[i : i + 40], i, "", str(model)) for i in range(0, len(records), 40)]
        prep._encoder.cache_clear()  # from a cold start, loading of the tokenizer included
        speed = megabytes / seconds(lambda batches=batches: [prep.encode_batch(batch) for batch in batches], 1)
        print(f"prepare, {split:5s} text         {speed:8.2f} MB/s   (at least {wanted} wanted)")


def bench_against_prefix_counter(sp: spm.SentencePieceProcessor, texts: list[str]) -> None:
    """Print how many times faster exact counting is than the prefix counter, by document length, and its bias."""
    source = "\n".join(texts[:200])
    print("\ncharacters   prefix counter   encode_document    ratio   counted bytes / real (prefix, exact)")
    for length in (1_000, 2_000, 4_000, 8_000):
        text = source[:length]
        slow = seconds(lambda text=text: prefix_counts(sp, text), 1)
        fast = seconds(lambda text=text: prep.encode_document(sp, text), 5)
        real = len(text.encode())
        biased, exact = sum(prefix_counts(sp, text)) / real, sum(prep.encode_document(sp, text)[1]) / real
        print(f"{length:10,d} {slow:13.3f} s  {fast * 1e3:13.2f} ms {slow / fast:8.0f}   {biased:.4f}, {exact:.4f}")


def bench_linearity(sp: spm.SentencePieceProcessor, texts: list[str]) -> None:
    """Print time per byte against document length: it should stay level."""
    source = "\n".join(texts)
    print("\ncharacters   encode_document   ns per byte   fast encoder (cold)   ns per byte")
    for length in (10_000, 100_000, 1_000_000):
        text = source[:length]
        if len(text) < length:
            break
        n_bytes = len(text.encode())
        spec = seconds(lambda text=text: prep.encode_document(sp, text))
        encoder = prep.DocumentEncoder(sp)

        def cold(encoder: prep.DocumentEncoder = encoder, text: str = text) -> None:
            encoder.ids.clear()
            encoder.counts.clear()
            encoder._encode_chunks(text, True)

        fast = seconds(cold)
        print(f"{length:10,d} {spec:15.3f} s {spec / n_bytes * 1e9:13.0f} {fast:19.3f} s {fast / n_bytes * 1e9:13.0f}")


def main() -> int:
    """Run all benchmarks."""
    parser = argparse.ArgumentParser(description="Speed of text preparation on one core.")
    parser.add_argument("--docs", metavar="PATH", help="documents, as prepare_caseops_data.py takes them")
    parser.add_argument("--sp", type=Path, default=ROOT / "tokenizer" / "caseops_8192.model", metavar="MODEL")
    parser.add_argument("--megabytes", type=float, default=12.0, help="how much text to use (default 12)")
    args = parser.parse_args()
    texts = load_texts(args.docs, int(args.megabytes * 1e6))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    sp = prep.load_tokenizer(args.sp)
    print(f"{len(texts):,} documents, {megabytes:.1f} MB, {args.sp.name}, one core\n")
    bench_caseops(texts, megabytes)
    bench_encoding(sp, args.sp, texts, megabytes)
    bench_against_prefix_counter(sp, texts)
    bench_linearity(sp, texts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
