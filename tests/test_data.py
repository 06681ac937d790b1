"""Shards, packing, the training stream for any number of ranks, and the validation text with its bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CPU, TINY, TOKENIZER, LoneRun, documents, tiny_config, write_dataset, write_shard

import train_gpt
from train_gpt import (
    BOS,
    MICRO_STEPS,
    Config,
    Document,
    Stop,
    TrainLoader,
    ValidationSet,
    calibration_batches,
    load_tokenizer,
    load_validation,
    pack_boundaries,
    read_shard,
    table_byte_counts,
)

Batch = tuple[torch.Tensor, torch.Tensor, train_gpt.Docs]


# ---- shards ----------------------------------------------------------------------------------------------------------
def test_a_shard_reads_back(tmp_path: Path) -> None:
    tokens = np.array([1, 0, 65535, 258], np.uint16)
    assert np.array_equal(read_shard(write_shard(tmp_path / "a.bin", tokens)), tokens)
    assert len(read_shard(write_shard(tmp_path / "empty.bin", []))) == 0


def damaged(path: Path, how: str) -> Path:
    data = bytearray(write_shard(path, range(1, 50)).read_bytes())
    if how == "magic":
        data[0] ^= 1
    elif how == "version":
        data[4] = 2
    elif how == "cut short":
        data = data[:-1]
    elif how == "too long":
        data += b"\0\0"
    elif how == "only a header piece":
        data = data[:100]
    elif how == "negative count":
        data[8:12] = (-1).to_bytes(4, "little", signed=True)
    elif how == "empty file":
        data = bytearray()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "how", ["magic", "version", "cut short", "too long", "only a header piece", "negative count", "empty file"]
)
def test_a_damaged_shard_is_named(tmp_path: Path, how: str) -> None:
    path = damaged(tmp_path / "broken.bin", how)
    with pytest.raises(ValueError, match=r"broken\.bin") as e:
        read_shard(path)
    assert "again" in str(e.value), "say what to do"


def test_a_document_start_is_found_without_reading_the_whole_shard() -> None:
    read: list[slice] = []

    class Watched(np.ndarray):
        def __getitem__(self, key: Any) -> Any:
            read.append(key)
            return super().__getitem__(key)

    piece, tokens = 1 << 16, np.full(1_000_000, 9, np.uint16)
    for at in (0, 5, piece - 1, piece, 3 * piece + 7):
        tokens[:] = 9
        tokens[[at, at + 1, -1]] = BOS
        read.clear()
        assert train_gpt.first_document(tokens.view(Watched)) == at
        assert len(read) == at // piece + 1
    tokens[:] = 9
    assert train_gpt.first_document(tokens) == 0


# ---- packing ---------------------------------------------------------------------------------------------------------
def slow_boundaries(tokens: list[int], piece: int) -> list[int]:
    """Token by token: a boundary at every document start and whenever a piece is full."""
    edges, size = [0], 0
    for i, token in enumerate(tokens):
        if i and (token == BOS or size == piece):
            edges.append(i)
            size = 0
        size += 1
    return [*edges, len(tokens)]


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.sampled_from([BOS, 5, 6, 7, 8]), min_size=1, max_size=80),
    piece=st.integers(1, 20),
    capacity=st.sampled_from([1, 4, 64, 96]),
)
def test_packing_is_that_of_the_slow_way(tokens: list[int], piece: int, capacity: int) -> None:
    cu = pack_boundaries(np.array(tokens, np.uint16), piece, capacity)
    want = slow_boundaries(tokens, piece)
    assert cu.dtype == np.int32
    assert cu[: len(want)].tolist() == want
    assert (cu[len(want) :] == len(tokens)).all()
    # The length is the capacity, doubled only when the boundaries need it.
    doublings = len(cu) // capacity
    assert len(cu) == capacity * doublings
    assert doublings & (doublings - 1) == 0
    assert doublings == 1 or len(cu) // 2 < len(want)


def test_the_record_has_one_shape_of_boundaries() -> None:
    capacity = train_gpt.boundary_capacity(Config().micro_batch_tokens)
    assert capacity >= 384
    assert capacity & (capacity - 1) == 0
    assert len(pack_boundaries(documents([256] * 384), 2048, capacity)) == capacity


def test_targets_are_the_inputs_shifted_by_one() -> None:
    inputs, targets, docs = train_gpt.packed_row(documents([5, 9, 3]), 4, CPU)
    assert inputs.shape == targets.shape == (1, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[0, 1:], targets[0, :-1])
    assert docs.cu_seqlens.unique().tolist() == [0, 4, 5, 9, 13, 14, 16]
    assert docs.max_len == 4


def test_a_row_may_be_cut_elsewhere_than_at_documents() -> None:
    tokens = documents([5, 9, 3])
    rows = [train_gpt.packed_row(tokens, 8, CPU, edges) for edges in (None, np.array([0, 8]))]
    (inputs, targets, docs), (same_inputs, same_targets, cut) = rows
    assert torch.equal(inputs, same_inputs) and torch.equal(targets, same_targets)
    assert cut.cu_seqlens.unique().tolist() == [0, 8, 16] != docs.cu_seqlens.unique().tolist()
    assert cut.cu_seqlens.shape == docs.cu_seqlens.shape and cut.cu_seqlens.dtype == docs.cu_seqlens.dtype


# ---- training stream -------------------------------------------------------------------------------------------------
def steps(cfg: Config, n: int, rank: int = 0, world: int = 1, start: int = 0) -> list[list[Batch]]:
    loader = TrainLoader(cfg, LoneRun(rank=rank, world=world), start)
    batches = [list(loader.next_step()) for _ in range(n)]
    loader.close()
    return batches


def same(a: Batch, b: Batch) -> bool:
    tensors = zip((*a[:2], a[2].cu_seqlens), (*b[:2], b[2].cu_seqlens), strict=True)
    return all(torch.equal(x, y) for x, y in tensors) and a[2].max_len == b[2].max_len


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_micro_batches_do_not_depend_on_the_ranks(dataset: Path, world: int) -> None:
    cfg = tiny_config(data_path=dataset)
    alone = steps(cfg, 5)
    ranks = [steps(cfg, 5, rank, world) for rank in range(world)]
    for k in range(5):
        assert len(alone[k]) == MICRO_STEPS
        # Rank r takes micro-batches r, r + world, ...: in the order of the stream they are those of one rank.
        together = [ranks[m % world][k][m // world] for m in range(MICRO_STEPS)]
        assert all(map(same, together, alone[k]))


def test_a_step_is_consecutive_text(dataset: Path) -> None:
    cfg = tiny_config(data_path=dataset)
    shard, n = read_shard(train_gpt.train_files(cfg)[0]), cfg.micro_batch_tokens
    first, second, third = steps(cfg, 3)
    for m, (inputs, targets, _) in enumerate(first + second + third):
        span = shard[m * (n + 1) : (m + 1) * (n + 1)].tolist()
        assert inputs[0].tolist() == span[:-1]
        assert targets[0].tolist() == span[1:]


@pytest.mark.parametrize("k", [1, 2, 3, 10, 13])
def test_starting_at_step_k_is_skipping_k_steps(dataset: Path, k: int) -> None:
    cfg = tiny_config(data_path=dataset)
    straight, resumed = steps(cfg, k + 4)[k:], steps(cfg, 4, start=k)
    assert all(same(a, b) for x, y in zip(straight, resumed, strict=True) for a, b in zip(x, y, strict=True))


def test_shards_repeat_and_start_at_a_document(dataset: Path) -> None:
    cfg = tiny_config(data_path=dataset)
    stream = steps(cfg, 2 * 9 + 1)  # three shards of three steps
    firsts = [step[0][0][0] for step in stream]
    for shard in range(3):
        assert firsts[3 * shard][0] == BOS, "each shard is read from its first document start"
    for k in range(9):
        assert same(stream[k][3], stream[k + 9][3])
        assert not same(stream[k][3], stream[k + 8][3])


def test_small_shards_are_skipped(tmp_path: Path) -> None:
    whole = write_dataset(tmp_path / "whole", n_train=2)
    mixed = write_dataset(tmp_path / "mixed", n_train=2)
    for name in ("000000a", "999999"):  # before, between and after the others, and one without a document start
        write_shard(mixed / f"fineweb_train_{name}.bin", documents([5, 20]))
    write_shard(mixed / "fineweb_train_0000000.bin", [9] * 30)
    write_shard(mixed / "fineweb_train_00000000.bin", [])
    a, b = (steps(tiny_config(data_path=folder), 8) for folder in (whole, mixed))
    assert all(same(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def test_a_step_that_just_fits_is_used(tmp_path: Path) -> None:
    need = TINY["train_batch_tokens"] + MICRO_STEPS
    write_shard(tmp_path / "fineweb_train_0.bin", documents([need]))
    write_shard(tmp_path / "fineweb_train_1.bin", documents([need - 1], seed=1))
    a, b = steps(tiny_config(data_path=tmp_path), 2)
    assert all(map(same, a, b))


def test_calibration_windows_do_not_depend_on_the_ranks(dataset: Path) -> None:
    cfg = tiny_config(data_path=dataset, gptq_calibration_batches=5)
    alone = list(calibration_batches(cfg, LoneRun()))
    assert [tuple(b.shape) for b in alone] == 5 * [(2, 16)]
    for world in (2, 4, 8):
        shares = [list(calibration_batches(cfg, LoneRun(rank=r, world=world))) for r in range(world)]
        assert sum(map(len, shares)) == 5
        assert all(torch.equal(shares[b % world][b // world], alone[b]) for b in range(5))


def test_calibration_windows_are_text_without_repetition(dataset: Path) -> None:
    cfg = tiny_config(data_path=dataset, gptq_calibration_batches=20)
    shards = [read_shard(p) for p in train_gpt.train_files(cfg)]
    text = {tuple(w) for s in shards for w in np.lib.stride_tricks.sliding_window_view(s, 16).tolist()}
    rows = [tuple(r) for b in calibration_batches(cfg, LoneRun()) for r in b.tolist()]
    assert len(rows) == len(set(rows)) == 40
    assert set(rows) <= text


def test_calibration_works_with_little_text(tmp_path: Path) -> None:
    write_shard(tmp_path / "fineweb_train_0.bin", documents([20]))
    batches = list(calibration_batches(tiny_config(data_path=tmp_path), LoneRun()))
    assert [tuple(b.shape) for b in batches] == 3 * [(2, 16)]


# ---- validation ------------------------------------------------------------------------------------------------------
streams = st.lists(st.sampled_from([BOS, 5, 6, 7]), min_size=2, max_size=60)


@settings(max_examples=150, deadline=None)
@given(tokens=streams)
def test_documents_cover_every_target_once(tokens: list[int]) -> None:
    val = ValidationSet(np.array(tokens, np.uint16), np.ones(len(tokens), np.int64))
    docs = val.documents()
    targets = [d.start + 1 + i for d in docs for i in range(d.n_targets)]
    assert targets == list(range(1, len(tokens)))
    assert all(d.n_targets > 0 for d in docs)
    assert all(tokens[d.start] == BOS for d in docs[1:])
    # Inside a document no token but the first is a document start.
    assert all(tokens[d.start + i] != BOS for d in docs for i in range(1, d.n_targets))


def test_the_next_document_start_is_the_last_target() -> None:
    val = ValidationSet(documents([4, 1, 3]), np.arange(8))
    assert val.documents() == [Document(0, 4), Document(4, 1), Document(5, 2)]
    assert (val.n_targets, val.n_bytes) == (7, sum(range(1, 8)))


def caseops_config(folder: Path, **changes: Any) -> Config:
    return tiny_config(data_path=folder, tokenizer_path=TOKENIZER, vocab_size=8192, **changes)


def test_validation_joins_its_shards(tmp_path: Path) -> None:
    pieces = [documents([7, 5], vocab=8192), documents([3], seed=1, vocab=8192), documents([9], seed=2, vocab=8192)]
    for i, piece in enumerate(pieces):
        write_shard(tmp_path / f"fineweb_val_{i:06d}.bin", piece)
        write_shard(tmp_path / f"fineweb_val_bytes_{i:06d}.bin", np.where(piece == BOS, 0, i + 1))
    val = load_validation(caseops_config(tmp_path))
    assert np.array_equal(val.tokens, np.concatenate(pieces))
    assert val.token_bytes.dtype == np.int64
    assert val.n_bytes == 1 * 10 + 2 * 2 + 3 * 8
    assert val.fingerprint()["val_documents"] == 4
    assert val.fingerprint()["bytes_per_token"] == pytest.approx(38 / 23, abs=1e-6)


def validation_folder(folder: Path, tokens: np.ndarray, counts: np.ndarray) -> Path:
    write_shard(folder / "fineweb_val_000000.bin", tokens)
    write_shard(folder / "fineweb_val_bytes_000000.bin", counts)
    return folder


@pytest.mark.parametrize(
    ("tokens", "word"),
    [([9, 10, 11, 12], "document start"), ([BOS, 9, 8192], "VOCAB_SIZE"), ([BOS], "no target"), ([], "document start")],
)
def test_validation_that_cannot_be_scored_stops_the_run(tmp_path: Path, tokens: list[int], word: str) -> None:
    validation_folder(tmp_path, np.array(tokens), np.ones(len(tokens)))
    with pytest.raises(Stop) as stop:
        load_validation(caseops_config(tmp_path))
    assert word in stop.value.sentence
    assert stop.value.code == 2


def test_a_sidecar_that_counts_the_marks_is_refused(tmp_path: Path) -> None:
    """Three bytes for a mark that stands for none: the score would look 8 % better."""
    tokens = np.array(([BOS, 4, 300, 5, 301, 302] * 20)[:-1])
    honest = np.where(tokens < 8, 0, 4)
    assert load_validation(caseops_config(validation_folder(tmp_path / "a", tokens, honest))).n_bytes == 4 * 59
    inflated = np.where((tokens == 4) | (tokens == 5), 3, honest)
    with pytest.raises(Stop) as stop:
        load_validation(caseops_config(validation_folder(tmp_path / "b", tokens, inflated)))
    assert "marks" in stop.value.sentence


def test_every_data_problem_is_listed(tmp_path: Path) -> None:
    cfg = caseops_config(write_dataset(tmp_path))
    assert list(train_gpt.data_problems(cfg, True)) == []
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", [1, 2])
    damaged(tmp_path / "fineweb_train_000001.bin", "cut short")
    problems = list(train_gpt.data_problems(cfg, True))
    assert len(problems) == 2
    assert "fineweb_train_000001.bin" in problems[0]
    assert "fineweb_val_bytes_000000.bin has 2 entries" in problems[1]
    # Scoring alone does not look at the training shards.
    assert len(list(train_gpt.data_problems(cfg, False))) == 1


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    (folder := tmp_path / "d[1]*?").mkdir()
    write_dataset(folder)
    assert list(train_gpt.data_problems(caseops_config(folder), True)) == []


def test_an_attention_that_cannot_run_here_is_a_problem(tmp_path: Path) -> None:
    asked = (tiny_config(attention=kind) for kind in ("varlen", "sdpa", "auto"))
    problems = [
        [p for p in train_gpt.environment_problems(cfg, LoneRun(tmp_path)) if "ATTENTION" in p] for cfg in asked
    ]
    assert problems == [["ATTENTION=varlen runs on a GPU in bfloat16 alone: take auto or sdpa"], [], []]


def test_data_path_one_level_too_high_is_told_the_folder_below(tmp_path: Path) -> None:
    """prepare_caseops_data.py --out DIR writes into DIR/datasets/NAME."""
    (folder := tmp_path / "datasets" / "mine").mkdir(parents=True)
    write_dataset(folder)
    problem = next(train_gpt.data_problems(caseops_config(tmp_path), True))
    assert problem == f"no fineweb_val_*.bin in {tmp_path}: set DATA_PATH={folder}"
    assert list(train_gpt.data_problems(caseops_config(folder), True)) == []


@pytest.mark.parametrize(
    ("gone", "word"),
    [
        ("fineweb_val_0*", "no fineweb_val_"),
        ("fineweb_val_bytes_*", "0 byte sidecars"),
        ("fineweb_train_*", "no fineweb_train_"),
    ],
)
def test_missing_files_are_problems(dataset: Path, gone: str, word: str) -> None:
    for path in dataset.glob(gone):
        path.unlink()
    assert any(word in p for p in train_gpt.data_problems(caseops_config(dataset), True))


def test_shards_too_small_for_a_step_are_a_problem(tmp_path: Path) -> None:
    write_dataset(tmp_path, n_train=0)
    write_shard(tmp_path / "fineweb_train_0.bin", documents([200]))
    (problem,) = train_gpt.data_problems(caseops_config(tmp_path), True)
    assert "TRAIN_BATCH_TOKENS" in problem


def test_a_shard_that_fits_no_step_after_its_first_document_start_is_too_small(tmp_path: Path) -> None:
    """Reading starts at the first document start; counted from the shard's, the loader would search for ever."""
    write_dataset(tmp_path, n_train=0)
    need = TINY["train_batch_tokens"] + MICRO_STEPS
    write_shard(tmp_path / "fineweb_train_0.bin", np.concatenate([[9, 9], documents([need - 1])]))
    (problem,) = train_gpt.data_problems(caseops_config(tmp_path), True)
    assert "TRAIN_BATCH_TOKENS" in problem
    write_shard(tmp_path / "fineweb_train_0.bin", np.concatenate([[9, 9], documents([need])]))
    assert list(train_gpt.data_problems(caseops_config(tmp_path), True)) == []
    assert len(steps(caseops_config(tmp_path), 2)) == 2


def test_the_tokenizer_must_be_there_and_fit(dataset: Path) -> None:
    (missing,) = train_gpt.tokenizer_problems(tiny_config(data_path=dataset, tokenizer_path=dataset / "none.model"))
    assert "TOKENIZER_PATH" in missing
    (other,) = train_gpt.tokenizer_problems(tiny_config(data_path=dataset, tokenizer_path=TOKENIZER))
    assert "8192 pieces but VOCAB_SIZE is 128" in other


# ---- bytes of plain SentencePiece text -------------------------------------------------------------------------------
def slow_byte_counts(sp: Any, tokens: list[int]) -> Iterator[int]:
    """One token at a time: a piece's UTF-8 bytes, its leading space only after text."""
    for previous, token in itertools.pairwise([None, *tokens]):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            yield 0
        elif sp.is_byte(token):
            yield 1
        else:
            piece = sp.id_to_piece(token)
            silent = previous is None or sp.is_control(previous) or sp.is_unknown(previous) or sp.is_unused(previous)
            if piece[0] == "\u2581":
                piece = piece[1:] if silent else " " + piece[1:]
            yield len(piece.encode())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(Config(tokenizer_path=str(TOKENIZER)))


token_ids = st.one_of(st.integers(0, 8191), st.sampled_from([0, 1, 2, 3, 8, 100, 264]))


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(token_ids, min_size=1, max_size=50))
def test_byte_table_is_that_of_the_slow_way(tokenizer: Any, tokens: list[int]) -> None:
    ours = table_byte_counts(tokenizer, np.array(tokens, np.uint16))
    assert ours.dtype == np.int64
    assert ours.tolist() == list(slow_byte_counts(tokenizer, tokens))


def test_byte_table_adds_up_to_the_text(tokenizer: Any) -> None:
    texts = ["Once upon a time, a fox met a bear.", "caf\u00e9 \u65e5\u672c \U0001f98a!", "x"]
    for text in texts:
        counts = table_byte_counts(tokenizer, np.array([BOS, *tokenizer.encode(text)], np.uint16))
        assert counts.sum() == len(text.encode())


def test_plain_text_has_no_sidecar(tmp_path: Path, tokenizer: Any) -> None:
    text = "the quick brown fox"
    write_shard(tmp_path / "fineweb_val_000000.bin", [BOS, *tokenizer.encode(text), BOS, *tokenizer.encode(text)])
    cfg = caseops_config(tmp_path, caseops_enabled=False)
    assert load_validation(cfg).n_bytes == 2 * len(text)
