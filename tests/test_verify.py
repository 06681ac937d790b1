"""`prepare_caseops_data.py --verify`: what is right is proven, every wrong data set is named, with exit code 1."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import TOKENIZER, write_shard
from test_prepare import folder_of, make_texts, write_jsonl

import prepare_caseops_data as prep
from prepare_caseops_data import BOS_ID, CONTROLS, main, read_shard

N_VAL = 30


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """docs.jsonl and the shards of it below out."""
    root = tmp_path_factory.mktemp("verify")
    texts = make_texts(150, seed=3)
    texts[4], texts[60], texts[61] = "", "\n \u00a0", ""  # documents without tokens are no overlap
    docs = write_jsonl(root / "docs.jsonl", texts)
    assert main([*map(str, ("--docs", docs, "--out", root / "out", "--sp", TOKENIZER, "--val-docs", N_VAL)),
                 "--shard-tokens", "1000", "--workers", "1"]) == 0  # fmt: skip
    return root


def verify(root: Path, *more: object) -> int:
    return main([str(a) for a in ("--verify", "--out", root / "out", "--workers", 1, *more)])


def with_documents(root: Path, *more: object) -> int:
    return verify(root, "--docs", root / "docs.jsonl", "--sp", TOKENIZER, *more)


def test_a_right_data_set_is_proven(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert with_documents(made) == 0
    said = capsys.readouterr().out
    texts = [json.loads(line)["text"] for line in (made / "docs.jsonl").read_text().splitlines()]
    n_bytes = sum(len(text.encode()) for text in texts[:N_VAL])
    for sentence in (
        f"tokens, {N_VAL} documents, {n_bytes:,} bytes",
        f"val holds exactly the tokens of {N_VAL} documents ({n_bytes:,} bytes), in their order",
        f"train holds exactly the tokens of {len(texts) - N_VAL} documents",
        f"none of the {len(texts) - N_VAL} training documents is a validation document",
        "case markers stand for no bytes",
        "the tokenizer is the one of manifest.json",
        "the documents are the files of manifest.json",
        "verify: everything holds",
    ):
        assert sentence in said
    assert "WRONG" not in said


def test_shards_alone_are_checked_too(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As they come from elsewhere: no manifest, no documents, no tokenizer."""
    shutil.copytree(made / "out", tmp_path / "out")
    (folder_of(tmp_path / "out") / "manifest.json").unlink()
    assert verify(tmp_path) == 0
    assert "there is no manifest.json" in capsys.readouterr().out


# ---- planted faults --------------------------------------------------------------------------------------------------
def change(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Rewrites a shard."""

    def plant(folder: Path) -> None:
        write_shard(folder / name, edit(np.array(read_shard(folder / name))))

    return plant


def put(at: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def edit(values: np.ndarray) -> np.ndarray:
        values[at] = value
        return values

    return edit


def swap_documents(values: np.ndarray) -> np.ndarray:
    """The second and the third of a shard; totals stay what they were."""
    a, b, c = np.flatnonzero(values == BOS_ID)[1:4]
    return np.concatenate([values[:a], values[b:c], values[a:b], values[c:]])


def move_bytes(values: np.ndarray) -> np.ndarray:
    """From one token to the next: the sum is right, what it belongs to is not."""
    at = int(np.flatnonzero(values > 1)[5])
    values[at] -= 1
    values[at + 1] += 1
    return values


def count_markers(folder: Path) -> None:
    """Three bytes for each case marker, as its UTF-8 form has: the sidecar of the first public preparation."""
    sp = prep.load_tokenizer(TOKENIZER)
    marks = [sp.piece_to_id(c) for c in CONTROLS]
    for path in folder.glob("fineweb_val_bytes_*.bin"):
        ids = read_shard(path.with_name(path.name.replace("bytes_", "")))
        write_shard(path, np.array(read_shard(path)) + 3 * np.isin(ids, marks))


def validation_into_training(folder: Path) -> None:
    document = next(prep.shard_documents([read_shard(folder / "fineweb_val_000000.bin")]))
    train = sorted(folder.glob("fineweb_train_*.bin"))[-1]
    write_shard(train, np.concatenate([read_shard(train), np.frombuffer(document, "<u2")]))


def other_tokenizer(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace(json.loads(path.read_text())["tokenizer"]["sha256"], "0" * 64))


def cut(folder: Path) -> None:
    path = folder / "fineweb_val_000000.bin"
    path.write_bytes(path.read_bytes()[:-100])


def without_starts(values: np.ndarray) -> np.ndarray:
    return values[values != BOS_ID]


WHOLE = dict(manifest=True, documents=True)
FAULTS: dict[str, tuple[Callable[[Path], object], dict[str, bool], str]] = {  # fault, what there is, what it says
    "another token": (change("fineweb_train_000001.bin", put(7, 9)), WHOLE, "tokens of train document 7"),
    "another token, manifest": (change("fineweb_train_000001.bin", put(7, 9)), dict(documents=False, manifest=True),
                                "fineweb_train_000001.bin does not have its recorded sha256"),
    "another byte count": (change("fineweb_val_bytes_000000.bin", put(7, 9)), dict(documents=True, manifest=False),
                           "byte counts of val document"),
    "bytes moved": (change("fineweb_val_bytes_000000.bin", move_bytes), dict(documents=True, manifest=False),
                    "byte counts of val document"),
    "documents swapped": (change("fineweb_train_000000.bin", swap_documents), dict(documents=True, manifest=False),
                          "tokens of train document 1"),
    "markers counted": (count_markers, dict(documents=False, manifest=False),
                        "% of the case markers are counted as text"),
    "overlap": (validation_into_training, dict(documents=False, manifest=False),
                "1 training documents are validation documents as well (the first: training document 120 is validation "
                "document 0)"),
    "overlap, documents": (validation_into_training, dict(documents=True, manifest=False),
                           "tokens more than the documents"),
    "other tokenizer": (other_tokenizer, WHOLE, "is not the tokenizer that manifest.json names"),
    "cut short": (cut, dict(documents=False, manifest=False), "its header promises"),
    "no shard": (lambda f: (f / "fineweb_val_000001.bin").unlink(), dict(documents=False, manifest=False),
                 "fineweb_val_000001.bin is missing: fineweb_val_000002.bin comes instead"),
    "last shard gone": (lambda f: max(f.glob("fineweb_train_*.bin")).unlink(), dict(documents=False, manifest=True),
                        "is missing"),
    "no sidecar": (lambda f: [p.unlink() for p in f.glob("fineweb_val_bytes_*")], dict(documents=False, manifest=False),
                   "their byte counts are []"),
    "no document starts": (change("fineweb_val_000000.bin", without_starts), dict(documents=False, manifest=False),
                           "not with BOS"),
    "one shard more": (lambda f: write_shard(f / "fineweb_train_000099.bin", [BOS_ID]),
                       dict(documents=False, manifest=False), "is missing: fineweb_train_000099.bin comes instead"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_data_set_is_named(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str) -> None:
    plant, there, sentence = FAULTS[fault]
    shutil.copytree(made / "out", tmp_path / "out")
    shutil.copy(made / "docs.jsonl", tmp_path)
    folder = folder_of(tmp_path / "out")
    plant(folder)
    if not there["manifest"]:
        (folder / "manifest.json").unlink()
    more = ("--val-docs", N_VAL) if not there["manifest"] else ()
    code = with_documents(tmp_path, *more) if there["documents"] else verify(tmp_path, "--sp", TOKENIZER)
    said = capsys.readouterr().out
    assert code == 1
    assert any(sentence in line for line in said.splitlines() if line.startswith("  WRONG: ")), said


def test_validation_documents_that_went_into_training(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards made with another --val-docs than the one that the score is said to have."""
    assert with_documents(made, "--val-docs", N_VAL + 10) == 1
    assert f"tokens of val document {N_VAL} are not those of its text" in capsys.readouterr().out


def test_other_documents_are_noticed(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (made / "docs.jsonl").read_text().splitlines(keepends=True)
    lines[100] = lines[100].replace("the", "teh", 1)
    edited = tmp_path / "docs.jsonl"
    edited.write_text("".join(lines))
    assert verify(made, "--docs", edited, "--sp", TOKENIZER) == 1
    assert f"tokens of train document {100 - N_VAL} are not those of its text" in capsys.readouterr().out


def test_arguments_that_verify_needs(made: Path) -> None:
    for args in (["--verify"], ["--verify", "--out", str(made / "out"), "--docs", str(made / "docs.jsonl")]):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 2
    assert verify(made / "elsewhere") == 1
