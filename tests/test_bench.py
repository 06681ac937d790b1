"""bench/throughput.py: the packed mix is what it claims to be, and every part measures something real on a CPU."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import tiny_config

import train_gpt
from bench import throughput
from bench.throughput import SMALL, Bench, Row, Tables
from train_gpt import BOS, FUSED


@pytest.fixture
def bench() -> Bench:
    return throughput.set_up(tiny_config(device="cpu"), SMALL)


def numbers(rows: list[Row]) -> list[float]:
    """Every figure of a table, except differences, which may have either sign."""
    return [v for row in rows for k, v in row.items() if isinstance(v, int | float) and "difference" not in k]


def require_real(tables: Tables) -> None:
    for name, rows in tables.items():
        assert rows, name
        assert all(row.keys() == rows[0].keys() for row in rows), name
        figures = numbers(rows)
        assert len(figures) >= len(rows), name
        assert all(math.isfinite(v) and v > 0 for v in figures), (name, figures)
        assert throughput.markdown(throughput.TITLES[name], rows).count("\n|") == len(rows) + 2


# ---- data ------------------------------------------------------------------------------------------------------------
def test_packed_mix_is_a_function_of_the_seed() -> None:
    assert np.array_equal(throughput.packed_mix(3), throughput.packed_mix(3))
    assert not np.array_equal(throughput.packed_mix(3), throughput.packed_mix(4))
    assert throughput.mix_lengths(0)[:5].tolist() == [693, 320, 130, 95, 1067]


def test_packed_mix_has_117_documents_that_fill_a_micro_batch() -> None:
    tokens = throughput.packed_mix(0)
    assert (tokens.dtype, len(tokens), tokens[0], tokens[-1]) == (np.uint16, 98304 + 1, BOS, BOS)
    assert (tokens[:-1] == BOS).sum() == 117
    words = tokens[tokens != BOS]
    assert words.min() == throughput.FIRST_WORD and words.max() < 8192
    counts = np.bincount(words, minlength=8192)
    assert counts.argmax() == throughput.FIRST_WORD  # Zipf: rank r recurs in proportion to 1 / (r + 3)
    assert counts[throughput.FIRST_WORD] / counts[throughput.FIRST_WORD + 3] == pytest.approx(2, rel=0.1)


def test_packed_mix_is_log_normal() -> None:
    logs = [np.log(throughput.mix_lengths(seed)) for seed in range(30)]
    assert all(np.exp(x).sum() == pytest.approx(98304) for x in logs)
    pooled = np.concatenate(logs)
    assert pooled.std() == pytest.approx(throughput.MIX_SIGMA, rel=0.05)
    assert abs(((pooled - pooled.mean()) ** 3).mean()) < 0.15 * pooled.std() ** 3  # the logarithms are symmetric
    assert np.exp(pooled.mean()) == pytest.approx(840 * math.exp(-(throughput.MIX_SIGMA**2) / 2), rel=0.05)


def test_packed_mix_makes_a_row_with_the_attention_work_of_the_targets() -> None:
    inputs, targets, docs = train_gpt.packed_row(throughput.packed_mix(0), 2048, torch.device("cpu"))
    assert inputs.shape == targets.shape == (1, 98304)
    pieces = docs.cu_seqlens.diff().double()
    pieces = pieces[pieces > 0]
    assert pieces.sum() == 98304 and pieces.max() == 2048
    assert (inputs[0] == BOS).sum() < len(pieces) < 140
    assert 2 * 512 * pieces.square().sum().item() / 1e9 == pytest.approx(122, rel=0.02)  # GFLOP


def test_ttt_batches_stand_for_the_validation_set() -> None:
    cfg = train_gpt.Config(device="cpu")
    batches = throughput.fineweb_batches(throughput.set_up(cfg, throughput.FULL))
    lengths = np.concatenate(batches)
    assert [len(batch) for batch in batches] == [64] * 4
    assert lengths.mean() == pytest.approx(957, rel=0.05)
    assert max(max(batch) - min(batch) for batch in batches) < 100  # the program batches by length


def test_long_documents_are_as_long_as_the_longest_of_real_text() -> None:
    batches = throughput.long_batches(throughput.set_up(train_gpt.Config(device="cpu"), throughput.FULL))
    lengths = sum(batches, [])
    assert len(lengths) == 104 and lengths == sorted(lengths, reverse=True)
    assert lengths[-1] >= 4230 and lengths[0] <= 20_000
    assert np.mean(lengths) == pytest.approx(6500, rel=0.05)
    assert np.median(lengths) == pytest.approx(5500, rel=0.05)


# ---- parts -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("part", ["ceilings", "kernels", "micro", "step", "ttt", "gptq"])
def test_part_measures_something(bench: Bench, part: str) -> None:
    tables = dict(throughput.PARTS[part](bench))
    require_real(tables)
    assert set(tables) <= set(throughput.TITLES)


def test_kernel_table_has_every_kernel_and_a_fused_version_where_one_runs(bench: Bench) -> None:
    fused = train_gpt.triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
    if fused:
        bench.kernels = FUSED._replace(attention=train_gpt.ATTENTION_KINDS["triton"])  # what a GPU runs
    rows = dict(throughput.kernels(bench))["kernels"]
    assert {row["kernel"] for row in rows} == set(throughput.CASES) >= set(throughput.kernel_fields())
    passes = {name: [row["pass"] for row in rows if row["kernel"] == name] for name in throughput.CASES}
    assert passes.pop("adamw") == ["forward"]
    assert all(names == ["forward", "forward + backward"] for names in passes.values())
    for row in rows:
        assert (row["fused ms"] is not None) == fused
        if fused:
            assert row["times"] == pytest.approx(row["spec ms"] / row["fused ms"])
            assert 0 <= row["difference"] < 1e-5


def test_kernel_fields_are_the_functions_of_the_chooser() -> None:
    assert {"attention", "serial", "loss"} <= set(throughput.kernel_fields())
    assert all(callable(getattr(FUSED, name)) for name in throughput.kernel_fields())


def test_kernel_without_a_case_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(throughput.CASES, "loss")
    with pytest.raises(LookupError, match="without a case: loss;"):
        next(throughput.kernels(bench))


def test_case_without_a_kernel_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(throughput.CASES, "no_such_op", throughput.loss_case)
    with pytest.raises(LookupError, match="no_such_op"):
        next(throughput.kernels(bench))


def test_a_kernel_that_fails_does_not_take_the_others_with_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(_: Bench) -> throughput.Case:
        raise MemoryError("too large")

    monkeypatch.setitem(throughput.CASES, "loss", no_memory)
    tables = throughput.kernels(bench)
    assert next(tables)[0] == "ceilings"
    assert {row["kernel"] for row in next(tables)[1]} == set(throughput.CASES) - {"loss"}
    with pytest.raises(ExceptionGroup):
        next(tables)


def test_a_kernel_without_a_backward_pass_has_one_row(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    case = throughput.loss_case(bench)
    monkeypatch.setitem(throughput.CASES, "loss", lambda _: case._replace(backward=None))
    list(throughput.ceilings(bench))
    assert [row["pass"] for row in throughput.kernel_rows(bench, "loss")] == ["forward"]


def test_costs_of_a_micro_batch_at_the_records_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand-counted: the head of 98,304 rows, attention of 122 GFLOP, streams of 100 MB in bfloat16."""
    bench = throughput.set_up(train_gpt.Config(device="cpu", compute_dtype="bfloat16"), throughput.FULL)
    monkeypatch.setattr(Bench, "random", lambda self, *shape, **_: torch.empty(shape, device="meta"))
    loss, attention = throughput.loss_case(bench), throughput.attention_case(bench)
    assert loss.forward.flops == 2 * 98304 * 512 * 8192 and loss.backward.flops == 2 * loss.forward.flops
    assert attention.forward.flops / 1e9 == pytest.approx(122, rel=0.02)
    assert throughput.merge_case(bench).forward.bytes == 3 * 98304 * 512 * 2
    bench.ceilings = {"TF/s": 700.0, "TB/s": 4.0}
    rate = throughput.achieved(bench, loss.forward, 1.0)
    assert rate["unit"] == "TF/s"
    assert (rate["rate"], rate["share"]) == pytest.approx((824.6, 1.178), rel=1e-3)


@pytest.mark.parametrize("name, expected", [
    ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopA_NNT", "GEMM"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>", "GEMM"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "GEMM"),
    ("kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at", "attention"),
    ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnBwdSm90<>>>", "attention"),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
    ("triton_red_fused__to_copy_add_mul_rms_norm_3", "reductions"),
    ("triton_per_fused_copy_sum_1", "reductions"),
    ("triton_poi_fused_cat_copy_7", "pointwise"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "pointwise"),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp>", "reductions"),
    ("Memcpy DtoD (Device -> Device)", "copies"),
    ("Memset (Device)", "copies"),
    ("aten::mm", "GEMM"),
    ("something_new", "other"),
])  # fmt: skip
def test_kernel_classes(name: str, expected: str) -> None:
    assert throughput.kernel_class(name) == expected


@pytest.mark.skipif(train_gpt.triton is None, reason="no triton")
def test_own_kernels_have_classes_of_their_own() -> None:
    assert "leaky_tma_kernel" in throughput.own_kernels()
    assert throughput.kernel_class("leaky_tma_kernel") == "leaky_tma_kernel"


KINDS = torch.autograd.DeviceType


def gpu_event(name: str, start: float, end: float, kind: KINDS = KINDS.CUDA, note: bool = False) -> SimpleNamespace:
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, device_type=kind, is_user_annotation=note, time_range=span)


def test_profile_of_a_gpu_counts_its_late_kernels_alone() -> None:
    """Not the first half of the runs, host-side operators or the ranges that torch.compile marks on the device."""
    run = throughput.LoneRun(0, 1, torch.device("cuda"), torch.bfloat16, None)
    events = [
        gpu_event("Memset (Device)", 2600.0, 3100.0),
        gpu_event("nvjet_x", 1010.0, 2510.0),
        gpu_event("nvjet_x", 0.0, 300.0),
        gpu_event("aten::mm", 0.0, 9e9, KINDS.CPU),
        gpu_event("## Call CompiledFxGraph ##", 0.0, 9e9, note=True),
        gpu_event("Memset (Device)", 400.0, 900.0),
    ]
    recorded = SimpleNamespace(events=lambda: events)
    assert [*throughput.device_times(run, recorded)] == [("nvjet_x", 1.5, 1), ("Memset (Device)", 0.5, 1)]


def test_idle_time_of_a_gpu_counts_what_no_late_kernel_covers() -> None:
    """In any order, one inside another, two side by side; nothing before the first or after the last."""
    spans = [(9000.0, 9500.0), (1000.0, 4000.0), (1500.0, 2000.0), (3500.0, 5000.0), (7000.0, 9000.0)]
    early = [(100.0 * i, 100.0 * i + 1) for i in range(5)]
    recorded = SimpleNamespace(events=lambda: [gpu_event("k", *span) for span in spans + early])
    assert throughput.idle_time(recorded) == 2.0
    assert throughput.idle_time(SimpleNamespace(events=list)) == 0.0


# ---- report ----------------------------------------------------------------------------------------------------------
def test_summary_compares_with_the_targets() -> None:
    results = {
        "micro": [{"loop": "off", "ms": 47.0, "peak GiB": 9.0}, {"loop": "on", "ms": 80.0, "peak GiB": 41.0}],
        "ttt": [{"documents": "as in FineWeb", "tok/s": 31_000.0}],
        "ttt long": [{"documents": "long, first 2048 tokens", "tok/s": 9e9},
                     {"documents": "long", "tok/s": 150_000.0}],
    }  # fmt: skip
    rows = throughput.summary(results, judge=True)
    assert [(row["measured"], row["reached"]) for row in rows] == [
        (47.0, "goal"), (80.0, "must"), (41.0, "missed"), (31_000.0, "must"), (150_000.0, "goal"),
    ]  # fmt: skip
    assert {row["reached"] for row in throughput.summary(results, judge=False)} == {None}


def test_markdown_is_a_table() -> None:
    rows = [{"what": "a", "n": 1234567, "x": 0.123456, "y": None}, {"what": "b", "n": 2, "x": 12345.6, "y": None}]
    assert throughput.markdown("T", rows) == (
        "\n**T**\n\n| what | n | x | y |\n| --- | --: | --: | --- |\n"
        "| a | 1,234,567 | 0.1235 | - |\n| b | 2 | 12,346 | - |"
    )


@pytest.fixture
def demo_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVICE", "cpu")


@pytest.mark.usefixtures("demo_on_cpu")
def test_command_prints_tables_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(["gptq", "ceilings", "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert out.index("**Ceilings**") < out.index("**GPTQ of all matrices**") < out.index("**Summary")
    assert "| GEMM 512x96x8192 |" in out
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["small"] and not written["failed"] and set(written["tables"]) == {"ceilings", "gptq", "summary"}
    assert written["tables"]["gptq"][0]["matrices"] == 5 * 6 + 1
    assert "PRESET=demo" in written["machine"]["changed knobs"]


@pytest.mark.usefixtures("demo_on_cpu")
def test_a_part_that_fails_does_not_take_the_others_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Bench) -> throughput.Part:
        yield "ceilings", [{"work": "none", "ms": 1.0}]
        raise RuntimeError("out of paper")

    monkeypatch.setitem(throughput.PARTS, "launch", broken)
    assert throughput.main(["launch", "gptq"]) == 1
    captured = capsys.readouterr()
    assert "**Ceilings**" in captured.out and "**GPTQ" in captured.out
    assert "out of paper" in captured.err and "failed: launch" in captured.err


def test_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        throughput.main(["mirco"])
    assert stop.value.code == 2 and "no part mirco" in capsys.readouterr().err


@pytest.mark.slow
def test_launch_follows_a_process_to_its_first_step() -> None:
    bench = throughput.set_up(train_gpt.load_config({"PRESET": "demo", "DEVICE": "cpu"}), SMALL)
    tables = dict(throughput.launch(bench))
    require_real(tables)
    at = [row["seconds"] for row in tables["launch"]]
    assert [row["up to"] for row in tables["launch"]] == [*throughput.MILESTONES, "first counted step"]
    assert all(a < b for a, b in itertools.pairwise(at[:-1]))
    assert at[-1] > at[-2] - 1  # reading the log takes a moment on a busy machine
    assert bench.run.folder is None


def test_launch_that_fails_shows_the_log(bench: Bench) -> None:
    """The tiny model's vocabulary is not the tokenizer's."""
    with pytest.raises(RuntimeError, match="VOCAB_SIZE is 128"):
        next(throughput.launch(bench))
