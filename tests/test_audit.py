"""AUDIT=1 checks the evaluation that makes the score, and DETERMINISTIC=1 makes it the same for any number of ranks."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import LoneRun, documents, tiny_config
from test_legality import LENGTHS, SWITCHES, learn_first, read_the_target, score, share_adapters, spread_over_bytes
from test_ttt import looped_model, validation
from thread_ranks import ThreadRun, on_ranks

import train_gpt
from train_gpt import Document, Meter, Stop, adapt_and_score
from train_gpt import TestTimeScorer as Scorer


def audited(folder: Path, tokens: np.ndarray, **changes: Any) -> dict[str, Any]:
    score(tokens, LoneRun(folder), audit=True, **changes)
    return json.loads((folder / "audit.json").read_text())


FOLLOW_UPS = SWITCHES | {
    "hints": dict(tapin_enabled=True, tapin_min_match=1, tapin_max_match=2, tapin_mix_w=0.4),
    "eval embeddings": dict(eval_hash_emb_enabled=True, eval_loop_emb_enabled=True),
}


@pytest.mark.parametrize("switch", FOLLOW_UPS)
def test_a_legal_evaluation_passes(tmp_path: Path, switch: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = documents(LENGTHS)
    report = audited(tmp_path, tokens, **FOLLOW_UPS[switch])
    val = validation(tokens)
    assert all(report["passed"].values()) and len(report["passed"]) == 6
    assert (report["targets"], report["bytes"]) == (val.n_targets, val.n_bytes)
    assert report["distributions"] and all(0 < x["scored"] < 50 for x in report["distributions"])
    assert all(x["kept"] > 5 and x["change"] == 0.0 for x in report["causality"])
    assert any(x["changed"] for x in report["causality"]), "the other text has to have an effect"
    assert ": passed\n" in capsys.readouterr().out


def test_the_audit_changes_no_score(tmp_path: Path) -> None:
    tokens = documents(LENGTHS)
    plain, checked = (score(tokens, LoneRun(tmp_path), audit=on) for on in (False, True))
    assert plain.nats.item() == checked.nats.item()
    assert (tmp_path / "audit.json").exists()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_are_audited_together(tmp_path: Path, world: int) -> None:
    model = looped_model(audit=True)

    def work(run: ThreadRun) -> None:
        run.folder, mine = tmp_path, copy.deepcopy(model)
        adapt_and_score(mine, validation(documents(LENGTHS)), mine.cfg, run)

    on_ranks(world, work)
    report = json.loads((tmp_path / "audit.json").read_text())
    assert all(report["passed"].values()) and report["targets"] == sum(LENGTHS) - 1


# ---- planted faults --------------------------------------------------------------------------------------------------
def refused(folder: Path, tokens: np.ndarray) -> list[str]:
    """The checks that failed."""
    with pytest.raises(Stop) as stop:
        audited(folder, tokens)
    report = json.loads((folder / "audit.json").read_text())
    failed = [name for name, good in report["passed"].items() if not good]
    assert stop.value.sentence.startswith(f"no score, because the audit failed: {', '.join(failed)}; details in ")
    return failed


@pytest.mark.parametrize(
    ("cheat", "check"),
    [
        (learn_first, "later text changes no score"),
        (share_adapters, "later text changes no score"),
        (read_the_target, "probabilities sum to 1"),
        (spread_over_bytes, "probabilities sum to 1"),
    ],
)
def test_a_scorer_that_cheats_gets_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cheat: Any, check: str
) -> None:
    monkeypatch.setattr(Scorer, "score_chunk", cheat)
    assert check in refused(tmp_path, documents(LENGTHS))


def test_a_document_scored_in_place_of_another_gets_no_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have as many tokens and bytes, so that no total tells."""
    tokens = np.tile(documents([9, 9]), 3)
    inner = Scorer.run_batch

    def swap(scorer: Scorer, docs: Sequence[Document]) -> Meter:
        return inner(scorer, [docs[0], docs[0], *docs[2:]] if docs[0].n_targets == docs[1].n_targets else docs)

    def equal_bytes(tokens: np.ndarray) -> train_gpt.ValidationSet:
        return train_gpt.ValidationSet(tokens, np.full(len(tokens), 10, np.int64))

    monkeypatch.setattr(Scorer, "run_batch", swap)
    monkeypatch.setattr("test_legality.validation", equal_bytes)
    with pytest.raises(Stop) as stop:
        audited(tmp_path, tokens)
    assert "every target exactly once" in stop.value.sentence


def test_a_score_that_is_not_of_its_distribution_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller losses for the meter than for whoever asks."""
    inner = Scorer.score_chunk
    kind = lambda scorer, chunk, adapters, cache: (
        inner(scorer, chunk, adapters, cache) * (1.0 if chunk.targets.size(1) > 16 else 0.5)
    )
    monkeypatch.setattr(Scorer, "score_chunk", kind)
    assert refused(tmp_path, documents(LENGTHS)) == ["scores are of that distribution"]


# ---- determinism -----------------------------------------------------------------------------------------------------
def total_of(world: int, greedy: int | None, **changes: Any) -> float:
    model = looped_model(**changes)

    def work(run: ThreadRun) -> float:
        mine = copy.deepcopy(model)
        return adapt_and_score(mine, validation(documents(LENGTHS)), mine.cfg, run)[0].nats.item()

    (nats,) = set(on_ranks(world, work, greedy))
    return nats


def test_deterministic_scores_are_the_same_for_any_number_of_ranks() -> None:
    """Two phases of base learning, 48 tokens a step, in more shares than they have pieces; queues even and not."""
    totals = {total_of(world, greedy, deterministic=True) for world, greedy in ((1, None), (2, 1), (4, None))}
    assert len(totals) == 1


def test_deterministic_scores_are_those_of_the_plain_run() -> None:
    """But for rounding."""
    assert total_of(1, None, deterministic=True) == pytest.approx(total_of(1, None), rel=1e-4)


def test_what_cannot_be_deterministic_is_refused() -> None:
    for env, word in (
        ({"DETERMINISTIC": "1"}, "MAX_WALLCLOCK_SECONDS=0"),
        ({"DETERMINISTIC": "1", "MAX_WALLCLOCK_SECONDS": "0", "ATTENTION": "fa3"}, "ATTENTION=fa3"),
    ):
        with pytest.raises(train_gpt.ConfigError, match=word):
            train_gpt.load_config(env)
    assert train_gpt.load_config({"DETERMINISTIC": "1", "EVAL_ONLY_ARTIFACT": "x"}).deterministic
    assert train_gpt.load_config({"DETERMINISTIC": "1", "MAX_WALLCLOCK_SECONDS": "0"}).deterministic


def test_starting_a_deterministic_run_asks_pytorch_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(train_gpt.signal, "signal", lambda *_: None)
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    cfg = tiny_config(deterministic=True, device="cpu", run_dir=str(tmp_path))
    try:
        train_gpt.start_run(cfg)
    finally:
        torch.distributed.destroy_process_group()
    assert asked == [True]
