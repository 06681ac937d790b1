"""The 28 ways in which public runs got a wrong or illegal number, and the tests that plant each and see it caught.

TABLE says what happened and names the tests, here or in other files. "Caught" means that the program refuses, stops, or
prints another number; where the fault was one of code, the test holds the property that the fault breaks.
"""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import TOKENIZER, LoneRun, documents, tiny_config, tiny_model, write_dataset, write_shard
from test_ttt import looped_model, validation

import prepare_caseops_data
import train_gpt
from train_gpt import Stop
from train_gpt import TestTimeScorer as Scorer

HERE = Path(__file__).resolve().parent
TABLE = """
 1  split of 10,000: 40,000 validation documents are trained on
      test_verify.py::test_validation_documents_that_went_into_training
      test_verify.py::test_a_wrong_data_set_is_named
      test_defect_classes.py::test_the_split_is_the_canonical_one_unless_told_otherwise
 2  a part of the validation documents reported as all
      test_defect_classes.py::test_a_part_of_the_documents_has_another_name_and_fingerprint
      test_read_logs.py::test_different_validation_sets_are_never_compared
      test_faults.py::test_shards_that_are_not_those_of_the_manifest_are_refused
 3  validation shard cut short
      test_data.py::test_a_damaged_shard_is_named
      test_verify.py::test_a_wrong_data_set_is_named
 4  parallel preparation gives each slice a validation set
      test_prepare.py::test_same_output_for_any_number_of_workers
 5  sidecar counts case markers as bytes
      test_data.py::test_a_sidecar_that_counts_the_marks_is_refused
      test_verify.py::test_a_wrong_data_set_is_named
 6  CaseOps shards scored with the plain byte table
      test_defect_classes.py::test_caseops_shards_are_not_scored_with_a_byte_table
 7  byte table: space twice, names of byte pieces, unused ids
      test_data.py::test_byte_table_is_that_of_the_slow_way
      test_data.py::test_byte_table_adds_up_to_the_text
 8  shards without document starts
      test_data.py::test_validation_that_cannot_be_scored_stops_the_run
      test_verify.py::test_a_wrong_data_set_is_named
 9  smear gate reads the previous document
      test_model.py::test_smear_stops_at_a_document_start
10  a gate is missing in the forward of test-time training
      test_ttt.py::test_scores_are_those_of_the_plain_model_when_nothing_learns
      test_model.py::test_new_adapters_change_nothing
11  slope changed in one of two implementations
      test_kernels.py::test_the_activation_and_its_slope
      test_kernels.py::test_interpreted_mlp_products
12  a channel that looks at the class of the target
      test_legality.py::test_c2_is_seen_to_be_broken
      test_audit.py::test_a_scorer_that_cheats_gets_no_score
13  work on validation text before the timer
      test_defect_classes.py::test_warm_up_reads_no_validation_text
14  training on validation text before scoring
      test_defect_classes.py::test_weights_do_not_depend_on_the_validation_text
15  byte mixture that is no distribution over tokens
      test_legality.py::test_c2_is_seen_to_be_broken
      test_audit.py::test_a_scorer_that_cheats_gets_no_score
16  optimizing on tokens before they are scored
      test_legality.py::test_c1_is_seen_to_be_broken
      test_legality.py::test_c3_is_seen_to_be_broken
17  lossy case folding
      test_caseops.py::test_round_trip_and_reference_encoder
18  warm-up steps on validation tokens
      test_defect_classes.py::test_warm_up_reads_no_validation_text
19  training or calibration beyond its 600 s
      test_defect_classes.py::test_what_is_over_a_budget_fails
20  evaluation beyond its 600 s
      test_defect_classes.py::test_what_is_over_a_budget_fails
21  several configurations in one mean
      test_read_logs.py::test_what_does_not_belong_together_has_no_mean
      test_read_logs.py::test_mixed_configurations_and_repeated_runs_are_not_compared
22  state from documents that come later
      test_legality.py::test_c1_test_time_training
      test_legality.py::test_c1_is_seen_to_be_broken
      test_audit.py::test_a_scorer_that_cheats_gets_no_score
23  order of scoring: what the base learns from is scored first
      test_legality.py::test_c3_only_what_is_scored_is_learned
      test_ttt.py::test_phases_hold_every_document_once_longest_first
24  adapters that carry state from document to document
      test_ttt.py::test_documents_together_score_as_alone
25  diverged test-time training passes for a score
      test_faults.py::test_nan_after_test_time_training_is_no_score
      test_defect_classes.py::test_a_score_that_became_worse_is_said_to_be
26  edited or copied logs
      test_read_logs.py::test_edited_copies_are_noticed_by_their_losses
      test_read_logs.py::test_known_faults_are_read_off_a_log
      test_pipeline.py::test_the_score_is_the_sum_of_its_batches
27  tail of the validation text dropped
      test_ttt.py::test_evaluation_scores_the_whole_stream
      test_legality.py::test_c4_every_token_once
28  file system that returns truncated or wrong shards
      test_data.py::test_a_damaged_shard_is_named
      test_faults.py::test_shards_that_are_not_those_of_the_manifest_are_refused
"""


def test_every_class_has_tests_that_exist() -> None:
    classes = re.findall(r"^ ?(\d+)  \S.*\n((?: {6}\S+\n)+)", TABLE, re.M)
    assert [int(number) for number, _ in classes] == list(range(1, 29))
    known = {
        path.name: {n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)}
        for path in HERE.glob("test_*.py")
    }
    named = [test.split("::") for _, tests in classes for test in tests.split()]
    assert [f"{file}::{name}" for file, name in named if name not in known.get(file, ())] == []


# ---- data ------------------------------------------------------------------------------------------------------------
def test_the_split_is_the_canonical_one_unless_told_otherwise(tmp_path: Path) -> None:
    options = prepare_caseops_data.Options(docs=("x",), out=tmp_path, sp=TOKENIZER)
    assert options.n_val == prepare_caseops_data.VAL_DOCS == 50_000


def test_a_part_of_the_documents_has_another_name_and_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    val = validation(documents((9, 30, 2, 17)))
    part = train_gpt.ValidationSet(val.tokens[:39], val.token_bytes[:39])
    ours, theirs = val.fingerprint(), part.fingerprint()
    assert all(ours[k] != theirs[k] for k in ("val_sha256", "val_targets", "val_documents", "val_bytes"))
    model, score = looped_model(val_doc_fraction=0.5), train_gpt.Meter()
    monkeypatch.setattr(train_gpt, "adapt_and_score", lambda *_: (score, 1.0))
    result: dict[str, Any] = {}
    train_gpt.score_stages(LoneRun(), model, val, result, "ttt")
    assert "bpb_ttt_partial" in result and "bpb_ttt" not in result


def test_caseops_shards_are_not_scored_with_a_byte_table(tmp_path: Path) -> None:
    sp = prepare_caseops_data.load_tokenizer(TOKENIZER)
    ids, counts = prepare_caseops_data.encode_document(sp, "The USA")
    write_shard(tmp_path / "fineweb_val_000000.bin", ids)
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", counts)
    cfg = tiny_config(data_path=str(tmp_path), tokenizer_path=str(TOKENIZER), vocab_size=8192)
    assert train_gpt.load_validation(cfg).n_bytes == len("The USA")
    assert train_gpt.table_byte_counts(sp, np.array(ids)).sum() > len("The USA"), "what the table would count"
    with pytest.raises(Stop) as stop:
        train_gpt.load_validation(tiny_config(data_path=str(tmp_path), tokenizer_path=str(TOKENIZER), vocab_size=8192,
                                              caseops_enabled=False))  # fmt: skip
    assert "set CASEOPS_ENABLED=1" in stop.value.sentence


# ---- what may read validation text -----------------------------------------------------------------------------------
class Poison:
    """Fails whoever reads it."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"read {name} of the validation text")

    __getitem__ = __len__ = __getattr__


@pytest.mark.parametrize("kind", [Scorer, train_gpt.GraphedScorer])
def test_warm_up_reads_no_validation_text(monkeypatch: pytest.MonkeyPatch, kind: type[Scorer]) -> None:
    """With the warm-up of a GPU, on the specification; it leaves the weights as they were."""
    model, val = looped_model(), validation(documents((9, 5)))
    scorer = kind(model, val, model.cfg, LoneRun())
    model.kernels = model.kernels._replace(fused=True)
    scorer.val = scorer.tokens = scorer.byte_sums = Poison()
    before = [p.clone() for p in model.parameters()]
    rows = []
    monkeypatch.setattr(
        model, "forward", lambda *args, inner=model.forward, **how: rows.append(1) or inner(*args, **how)
    )
    train_gpt.warm_up_ttt(scorer, [val.documents()])
    assert rows
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_weights_do_not_depend_on_the_validation_text(tmp_path: Path) -> None:
    """Training, the average and the Hessians, with validation during and after training.

    The text lies beside the one training shard, is as long as a step, and would come next when that has been read.
    """
    states = []
    for name, lengths in (("a", (9, 300, 2)), ("b", (270, 5, 36))):
        data, text = write_dataset(tmp_path / name, n_train=1, steps_per_shard=2), documents(lengths, seed=lengths[0])
        write_shard(data / "fineweb_val_000000.bin", text)
        cfg = tiny_config(data_path=str(data), iterations=4, val_loss_every=2, checkpoint_every=0)
        assert len(text) >= cfg.step_tokens
        run, model = LoneRun(tmp_path), tiny_model(iterations=4)
        model.cfg = cfg
        train_gpt.train(cfg, run, model, validation(text))
        hessians = train_gpt.calibrate(model, train_gpt.calibration_batches(cfg, run), run)
        states.append({**{k: p.detach() for k, p in model.named_parameters()}, **hessians})
    assert [k for k in states[0] if not torch.equal(states[0][k], states[1][k])] == []
    start = tiny_model(iterations=4)
    assert not torch.equal(states[0]["qo_bank"], start.qo_bank)


# ---- gates and warnings ----------------------------------------------------------------------------------------------
def reported(folder: Path, capsys: pytest.CaptureFixture[str], **result: Any) -> tuple[bool, str]:
    (folder / "run.json").write_text("{}")
    whole = (
        dict(peak_memory_mib=1, total_bytes=10, train_seconds=590.0, calibrate_seconds=5.0, ttt_seconds=300.0) | result
    )
    return train_gpt.report(tiny_config(max_wallclock_seconds=600), LoneRun(folder), whole), capsys.readouterr().out


def test_what_is_over_a_budget_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reported(tmp_path, capsys)[0]
    for over, line in (
        (dict(calibrate_seconds=10.6), "| train + calibration seconds | 600.6 | 600 | FAIL |"),
        (dict(ttt_seconds=600.4), "| evaluation seconds | 600.4 | 600 | FAIL |"),
        (dict(total_bytes=16_000_001), "| artifact bytes | 16000001 | 16000000 | FAIL |"),
    ):
        kept, said = reported(tmp_path, capsys, **over)
        assert not kept and line in said


def test_a_score_that_became_worse_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = [
        reported(tmp_path, capsys, bpb_quantized=1.08, bpb_ttt=bpb)[1] for bpb in (1.07, 1.12, math.nextafter(1.08, 2))
    ]
    assert ["WARNING: test-time training made the score worse" in text for text in said] == [False, True, True]
