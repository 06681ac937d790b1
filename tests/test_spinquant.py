"""Rotations before GPTQ: exact before rounding in every mode, undone by the decoder, absent when off; and hotstart."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pipeline_tools import UNMINIFIED, Finished, Launch, make_shards, run, tiny, together
from support import LoneRun, documents, relative_error, tiny_config, tiny_model
from test_packing import relabelled
from torch import Tensor

import train_gpt
from train_gpt import (
    GPT,
    Config,
    SpinQuant,
    Stop,
    banked,
    calibrate,
    hessian_key,
    load_config,
    model_from_artifact,
    pack,
    quantize,
    read_header,
    rebank,
    unbank,
    unpack,
)

MODES = list(SpinQuant.modes)
orthogonal = SpinQuant.orthogonal
TURN = SpinQuant(load_config({"SPINQUANT_MODE": "full"})).turned
VARIANTS = {
    **{mode: dict(spinquant_mode=mode) for mode in MODES},
    "enabled": dict(spinquant_enabled=True),
    "attention": dict(spinquant_mode="port_1695", spinquant_sites="attn_in,attn_proj_in"),
    "mlp": dict(spinquant_mode="port_1695", spinquant_sites=" mlp_in, mlp_proj_in"),
    # nothing is a power of two: heads of 12, a width of 48, a hidden width of 120
    "odd": dict(spinquant_mode="full", model_dim=48, mlp_mult=2.5),
}
TOKENS = torch.from_numpy(documents((16,) * 8).astype("int64")).view(8, 16)


def model_of(kind: str, **changes: Any) -> GPT:
    """Looped; `trained`: after some steps of Adam, which leave weights and inputs correlated."""
    model = tiny_model(smear_gate_enabled=True, attn_out_gate_enabled=True, **changes)
    model.looped = True
    if kind == "trained":
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(30):
            optimizer.zero_grad()
            model(TOKENS, TOKENS.roll(-1, 1)).backward()
            optimizer.step()
    return model.requires_grad_(False)


def logits(model: GPT, state: dict[str, Tensor]) -> Tensor:
    other = GPT(model.cfg)
    other.load_state_dict(state)
    other.looped = model.looped
    return other(TOKENS).detach()


def artifact_of(model: GPT) -> bytes:
    coded = quantize(model.state_dict(), calibrate(model, [TOKENS], LoneRun()), model.cfg, LoneRun())
    return pack(coded, model.looped, model.cfg)


# ---- rotations -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 2, 12, 24, 64, 96, 120, 512])
def test_rotations_are_orthogonal(size: int) -> None:
    q = orthogonal(size, 7)
    assert (q.mT @ q - torch.eye(size)).abs().max() < 1e-12
    if size & (size - 1) == 0:  # a Hadamard matrix, whose entries all have one size
        assert torch.allclose(q.abs(), torch.full_like(q, size**-0.5))
    assert size < 12 or not torch.equal(q, orthogonal(size, 8))


def test_rotations_are_those_of_the_table() -> None:
    """Seeds, sizes and sharing as published: one per site, or one per layer and group of heads."""
    cfg, seed = tiny_config(spinquant_mode="port_1695", spinquant_seed=5), lambda tag: int.from_bytes(
        hashlib.sha256(f"5:{tag}".encode()).digest()[:4], "big")  # fmt: skip
    turns = SpinQuant(cfg).rotations()
    assert len(turns) == 36
    assert turns["blocks.3.attn.c_k.weight"] == ((), ((32, seed("attn_in")),))
    assert turns["blocks.0.mlp.proj.weight"] == ((), ((64, seed("mlp_proj_in")),))
    heads = SpinQuant(tiny_config(spinquant_mode="internal_only", spinquant_seed=5)).rotations()
    assert len(heads) == 12
    assert heads["blocks.3.attn.c_v.weight"] == (((8, 3005), (8, 3006)), ())
    assert heads["blocks.3.attn.proj.weight"] == ((), ((8, 3005), (8, 3005), (8, 3006), (8, 3006)))


@pytest.mark.parametrize("mode", MODES)
def test_matrices_of_one_input_turn_together(mode: str) -> None:
    turns: dict[str, set[Any]] = {}
    cfg = tiny_config(spinquant_mode=mode)
    for name in unbank(tiny_model().state_dict()):
        if name == "tok_emb.weight" or any(f".{m}.weight" in name for m in train_gpt.MATRICES):
            turns.setdefault(hessian_key(name), set()).add(SpinQuant(cfg).rotations().get(name, ((), ()))[1])
    assert all(len(columns) == 1 for columns in turns.values())


# ---- exact before rounding -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["synthetic", "trained"])
def test_what_the_heads_mix_may_be_turned_in_the_model(kind: str) -> None:
    """Softmax, the own value's projection and gates per head commute with it: nothing has to be undone."""
    model = model_of(kind, spinquant_mode="internal_only")
    flat = unbank(model.state_dict())
    state = rebank(SpinQuant(model.cfg).spin(flat))
    assert relative_error(state["kv_bank"], model.kv_bank) > 0.5
    assert relative_error(logits(model, state), model(TOKENS)) < 1e-5


@pytest.mark.parametrize("kind", ["synthetic", "trained"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_without_rounding_gives_the_model_back(variant: str, kind: str) -> None:
    model = model_of(kind, **VARIANTS[variant])
    flat = unbank(model.state_dict())
    there = SpinQuant(model.cfg).spin(flat)
    back = SpinQuant(model.cfg).spin(there, back=True)
    turns = SpinQuant(model.cfg).rotations()
    assert turns and {k for k in flat if relative_error(there[k], flat[k]) > 0.3} == set(turns)
    assert max(relative_error(back[k], flat[k]) for k in turns) < 1e-6
    assert all(back[k] is flat[k] for k in flat if k not in turns)
    assert relative_error(logits(model, rebank(back)), model(TOKENS)) < 1e-5


@pytest.mark.parametrize("kind", ["synthetic", "trained"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_errors_weigh_the_same_in_both_coordinates(variant: str, kind: str) -> None:
    """tr(E H E^T), what GPTQ minimizes, for a random error E of every turned matrix."""
    model = model_of(kind, **VARIANTS[variant])
    sums = calibrate(model, [TOKENS], LoneRun())
    there = SpinQuant(model.cfg).code({}, sums, LoneRun())[1]
    flat = unbank(model.state_dict())
    for name, turn in SpinQuant(model.cfg).rotations().items():
        error, key = torch.randn_like(flat[name]), hessian_key(name)
        other = TURN(error, *turn).double()
        cost = (error.double() @ sums[key].double() * error).sum()
        assert relative_error((other @ there[key].double() * other).sum(), cost) < 1e-5, name


def test_turning_at_run_time_is_the_same_function() -> None:
    """What PR #1695 computes, with the codes that GPTQ makes of the turned matrix."""
    w, x, columns = torch.randn(24, 40), torch.randn(100, 40), ((40, 3),)
    codes, scale = train_gpt.gptq(TURN(w, (), columns), TURN(x.mT @ x, columns, columns), 4, 4.0)
    decoded, q = codes * scale[:, None].float(), orthogonal(40, 3).float()
    assert relative_error(F.linear(x, TURN(decoded, (), columns, back=True)), F.linear(x @ q, decoded)) < 1e-6


def test_base_learning_takes_the_same_steps_in_both_coordinates() -> None:
    """SGD with momentum and a clipped norm; Adam would not."""
    w, x, y, rows, columns = torch.randn(6, 10), torch.randn(50, 10), torch.randn(50, 6), ((6, 1),), ((10, 2),)
    p, q = orthogonal(6, 1).float(), orthogonal(10, 2).float()
    ends = []
    for weight, decode in ((w, lambda v: v), (TURN(w, rows, columns), lambda v: p @ v @ q.mT)):
        v = weight.clone().requires_grad_()
        optimizer = torch.optim.SGD([v], 0.1, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            F.mse_loss(F.linear(x, decode(v)), y).backward()
            torch.nn.utils.clip_grad_norm_([v], 0.1)
            optimizer.step()
        ends.append(decode(v).detach())
    assert relative_error(ends[0], w) > 0.05
    assert relative_error(ends[1], ends[0]) < 1e-5


# ---- the artifact ----------------------------------------------------------------------------------------------------
def test_off_is_as_if_it_were_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    blob = artifact_of(model_of("synthetic"))
    assert not any(k.startswith("spin") for k in read_header(blob)[0]["config"])
    monkeypatch.setattr(SpinQuant, "__init__", None)
    other_seed = model_of("synthetic", spinquant_seed=7, spinquant_sites="none")
    assert artifact_of(other_seed) == blob
    model_from_artifact(tiny_config(), LoneRun(), blob)


def test_no_sites_are_no_rotations(capsys: pytest.CaptureFixture[str]) -> None:
    blob = artifact_of(model_of("synthetic"))
    for sites in ("none", "", "attn,mlp_out"):
        other = artifact_of(model_of("synthetic", spinquant_mode="port_1695", spinquant_sites=sites))
        assert read_header(other)[1] == read_header(blob)[1]
    out = capsys.readouterr().out
    assert "spinquant:unknown_sites_ignored:['attn', 'mlp_out']" in out
    skipped = "rotated_weights:0 hessians:0 missing_hessians:0 skipped_by_sites:36 active_sites:[]"
    assert out.count(f"spinquant:{skipped}") == 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_artifact_rebuilds_the_model(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    bits = dict(matrix_bits=8, embed_bits=8, mlp_clip_sigmas=5, attn_clip_sigmas=5, embed_clip_sigmas=5)
    model = model_of("trained", **bits, **VARIANTS[variant])
    blob = artifact_of(model)
    state, looped, settings = unpack(blob)
    want = {"spinquant_enabled": True, "spinquant_mode": "port_1695", **VARIANTS[variant]}
    assert {k: v for k, v in settings.items() if k.startswith("spin")} == {
        k: v for k, v in want.items() if k.startswith("spin")}  # fmt: skip
    restored = model_from_artifact(
        Config(vocab_size=128, spinquant_enabled=True, spinquant_mode="internal_only"), LoneRun(), blob
    )
    want = rebank(SpinQuant(model.cfg).spin(unbank(state), back=True))
    assert all(torch.equal(restored.state_dict()[k], want[k]) for k in want)
    assert relative_error(restored(TOKENS), model(TOKENS)) < 0.1
    assert relative_error(logits(model, state), model(TOKENS)) > 0.3 or variant == "internal_only"
    n, sites = len(SpinQuant(model.cfg).rotations()), SpinQuant(model.cfg).known
    assert f"spinquant:undone_rotations:{n}_matrices mode:{model.cfg.spinquant_mode} seed:42 sites:{sites}" in (
        capsys.readouterr().out)  # fmt: skip


def test_the_log_counts_what_is_TURN(capsys: pytest.CaptureFixture[str]) -> None:
    sums = {f"blocks.{i}.{site}": torch.eye(512) for i in range(11) for site in ("attn_in", "attn_out", "mlp_in")}
    sums |= {f"blocks.{i}.mlp_out": torch.eye(64) for i in range(11)}
    cfg = load_config({"SPINQUANT_ENABLED": "1", "MLP_MULT": "0.125"})
    SpinQuant(cfg).code({}, sums, LoneRun())
    sums.pop("blocks.4.attn_in")
    SpinQuant(train_gpt.replace(cfg, spinquant_sites="attn_in,attn_proj_in")).code({}, sums, LoneRun())
    line = "spinquant:rotated_weights:{} hessians:{} missing_hessians:{} skipped_by_sites:{} active_sites:{}"
    assert capsys.readouterr().out.splitlines() == [
        line.format(66, 66, 0, 0, ["attn_in", "attn_proj_in", "mlp_in", "mlp_proj_in"]),
        line.format(44, 41, 3, 22, ["attn_in", "attn_proj_in"]),
    ]


@pytest.mark.parametrize(
    "config",
    [
        {"spinquant_mode": "left"}, {"spinquant_mode": ["full"]}, {"spinquant_mode": 1}, {"spinquant_mode": None},
        {"spinquant_seed": -1}, {"spinquant_seed": 1 << 40}, {"spinquant_seed": 1.5}, {"spinquant_seed": "42"},
        {"spinquant_seed": True}, {"spinquant_sites": 3}, {"spinquant_sites": ["mlp_in"]}, {"spinquant_sites": None},
        {"spinquant_enabled": 1}, {"spinquant_enabled": False}, {"spinquant_mode": "baseline"}, {"spinquant": "full"},
        {"mlp_mult": 300.0}, {"mlp_mult": 3.0}, {"num_layers": 7}, {"spin": "full"}, {"hidden_dim": 64},
    ],
    ids=str,
)  # fmt: skip
def test_headers_that_lie_stop_the_run(config: dict[str, Any]) -> None:
    blob = relabelled(FULL.blob, lambda h: h["config"].update(config))
    with pytest.raises(Stop) as stop:
        model_from_artifact(tiny_config(), LoneRun(), blob)
    assert stop.value.code == 2
    assert stop.value.sentence.startswith("cannot use this artifact: ")


class FULL:
    """One artifact for all lies about it."""

    blob = artifact_of(model_of("synthetic", spinquant_mode="full"))


def test_codes_are_not_packed_under_another_rotation(tmp_path: Path) -> None:
    theirs, run_ = tiny_config(spinquant_mode="full"), LoneRun(tmp_path)
    fields = train_gpt.CODED_FIELDS
    torch.save({"fingerprint": train_gpt.shape_fingerprint(theirs, fields)}, tmp_path / "03_coded.pt")
    train_gpt.load_stage_file(theirs, run_, "03_coded.pt", "FROM_STAGE=pack", fields)
    with pytest.raises(Stop, match="2") as stop:
        train_gpt.load_stage_file(tiny_config(), run_, "03_coded.pt", "FROM_STAGE=pack", fields)
    assert "SPINQUANT_MODE=full there, baseline here" in stop.value.sentence
    # weights and Hessians know nothing of rotations: all modes may start from them
    file = {"fingerprint": train_gpt.shape_fingerprint(theirs), "hessians": {"tokens": torch.ones(4)}}
    torch.save(file, tmp_path / "02_hessians.pt")
    train_gpt.load_stage_file(tiny_config(), run_, "02_hessians.pt", "FROM_STAGE=quantize")


# ---- settings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("env", "word"),
    [
        ({"SPINQUANT_MODE": "port_1965"}, "choose one of baseline, internal_only, full, port_1695"),
        ({"SPINQUANT_ENABLED": "0", "SPINQUANT_MODE": "full"}, "contradicts SPINQUANT_MODE=full"),
        ({"SPINQUANT_ENABLED": "1", "SPINQUANT_MODE": "baseline"}, "contradicts SPINQUANT_MODE=baseline"),
        ({"SPINQUANT_SEED": "-1"}, "SPINQUANT_SEED must lie in"),
        ({"SPINQUANT_MODE": "full", "MLP_MULT": "17"}, "at most 8192 channels"),
        ({"HOTSTART_FP_CKPT": "a", "EVAL_ONLY_CHECKPOINT": "a"}, "choose one of EVAL_ONLY_CHECKPOINT, HOTSTART"),
        ({"HOTSTART_FP_CKPT": "a", "RESUME": "1", "RUN_DIR": "b"}, "choose one of EVAL_ONLY_CHECKPOINT, HOTSTART"),
    ],
)
def test_settings_that_contradict_are_refused(env: dict[str, str], word: str) -> None:
    with pytest.raises(train_gpt.ConfigError) as e:
        train_gpt.load_config(env)
    (line,) = str(e.value).splitlines()
    assert word in line


# ---- checkpoints -----------------------------------------------------------------------------------------------------
FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "banked": lambda state: state,
    "flat": unbank,
    "state_dict": lambda state: {"state_dict": unbank(state), "step": 3},
    "model": lambda state: {"model": state, "looped": False, "fingerprint": {}},
    "half": lambda state: {k: x.half() for k, x in state.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_of_every_form_load(form: str) -> None:
    state = tiny_model().state_dict()
    ours = banked(FORMS[form](dict(state)), state)
    assert ours.keys() == state.keys()
    model = GPT(tiny_config())
    model.load_state_dict(ours)
    for k, x in model.state_dict().items():
        assert torch.equal(x, state[k].half().float() if form == "half" else state[k])


def without(*names: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: {k: x for k, x in state.items() if k not in names}


MISFITS: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
    (lambda state: [1, 2], "it holds no state dict"),
    (lambda state: {"weights": state}, "it holds no state dict"),
    (lambda state: dict(enumerate(state.values())), "it holds no state dict"),
    (lambda state: {}, "it lacks blocks.0.attn.attn_gate_w, .* and [0-9]+ more$"),
    (without("qo_bank"), "it lacks qo_bank$"),
    (lambda state: without("blocks.2.mlp.fc.weight")(unbank(state)), "it lacks blocks.2.mlp.fc.weight$"),
    (lambda state: {**state, "extra": torch.ones(1)}, "it has the unknown extra$"),
    (lambda state: {**unbank(state), "blocks.6.mlp.fc.weight": torch.ones(1)}, "unknown blocks.6.mlp.fc.weight$"),
    (lambda state: {**state, "kv_bank": state["kv_bank"][1:]}, r"shapes: kv_bank \(11, 16, 32\) instead of \(12,"),
    (lambda state: {"model": {**without("qo_bank")(state), "q": torch.ones(1)}}, "lacks qo_bank; .* unknown q$"),
]


@pytest.mark.parametrize(("damage", "sentence"), MISFITS)
def test_checkpoints_that_do_not_fit_are_refused(damage: Callable[[dict[str, Tensor]], Any], sentence: str) -> None:
    state = dict(tiny_model().state_dict())
    with pytest.raises(ValueError, match=sentence) as e:
        banked(damage(state), state)
    assert "\n" not in str(e.value)


# ---- hotstart --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """A trained checkpoint, then quantized and scored from its flat form: as it is, turned, and by two processes.

    One calibration batch, so that any number of ranks sums the same Hessians.
    """
    root = tmp_path_factory.mktemp("hotstart")
    data = make_shards(root / "data", 0, 12_000, (9, 3, 14))
    knobs = dict(GPTQ_CALIBRATION_BATCHES=1, PHASED_TTT_PREFIX_DOCS=1, VAL_LOSS_EVERY=0)
    trained = run(root / "trained", data, UNMINIFIED, **knobs, SPINQUANT_ENABLED=1).ok()
    state = torch.load(trained.folder / "final_model.pt", weights_only=True)
    torch.save({"state_dict": unbank(state)}, root / "flat.pt")
    state.pop("qo_bank")
    torch.save(state, root / "broken.pt")

    def hot(name: str, world: int = 1, path: Path = root / "flat.pt", **more: Any) -> Finished:
        return run(root / name, data, UNMINIFIED | dict(world=world), **knobs, **more, HOTSTART_FP_CKPT=path)

    ended = {"trained": trained} | together({
        "port_1695": lambda: hot("port", SPINQUANT_MODE="port_1695"),
        "full": lambda: hot("full", SPINQUANT_MODE="full"),
        "two": lambda: hot("two", 2, SPINQUANT_MODE="full"),
        "broken": lambda: hot("broken", path=root / "broken.pt"),
    })  # fmt: skip
    home = ended["full"].folder / "submission"
    left = {name.upper() for name in (*train_gpt.MODEL_FIELDS, "train_batch_tokens")}
    alone = {k: v for k, v in tiny(root / "alone", data, **knobs).items() if k not in left}
    alone |= {"EVAL_ONLY_ARTIFACT": home / train_gpt.ARTIFACT_NAME, "PYTHONPATH": ""}
    with Launch(alone, fresh=True, script=home / "train_gpt.py", cwd=root) as launch:
        return ended | {"alone": launch.finish()}


def test_a_hotstart_repeats_the_run_it_comes_from(runs: dict[str, Finished]) -> None:
    hot, trained = runs["port_1695"].ok(), runs["trained"]
    assert "looping_active=True" in hot.output
    assert hot.artifact == trained.artifact
    assert [hot.result[k] for k in ("bpb_float", "bpb_quantized", "bpb_ttt")] == [
        trained.result[k] for k in ("bpb_float", "bpb_quantized", "bpb_ttt")]  # fmt: skip
    assert not (trained.folder / "final.json").exists()


def test_final_json_is_the_result(runs: dict[str, Finished]) -> None:
    full = runs["full"].ok()
    final, result = json.loads((full.folder / "final.json").read_text()), full.result
    stages = {"diagnostic_pre_quant_post_rotation": "bpb_float", "diagnostic_quantized": "bpb_quantized",
              "quantized_ttt_phased": "bpb_ttt"}  # fmt: skip
    for stage, key in stages.items():
        assert final[stage]["val_bpb"] == result[key]
        assert f" val_loss:{final[stage]['val_loss']:.8f} val_bpb:{result[key]:.8f} eval_time:" in full.output
        assert final[stage]["eval_time_ms"] > 0
    files = {p.name: p.stat().st_size for p in (full.folder / "submission").iterdir()}
    assert final["artifact_bytes"] == sum(files.values()) == result["total_bytes"]
    assert final["quant_file_bytes"] == len(full.artifact) == files[train_gpt.ARTIFACT_NAME]
    assert (final["mode"], final["spinquant_seed"], final["status"]) == ("full", 42, "ok")
    assert final["hotstart_ckpt"].endswith("flat.pt")


def test_the_submission_turns_back_on_its_own(runs: dict[str, Finished]) -> None:
    alone, full = runs["alone"].ok(), runs["full"]
    assert "spinquant:undone_rotations:25_matrices mode:full seed:42" in alone.output
    assert alone.result["bpb_ttt"] == full.result["bpb_ttt"]
    program = (full.folder / "submission" / "train_gpt.py").read_bytes()
    assert len(program) > len((runs["trained"].folder / "submission" / "train_gpt.py").read_bytes())  # and Hotstart


def test_the_manifest_holds_every_rotation(runs: dict[str, Finished]) -> None:
    manifest = json.loads((runs["full"].folder / "rotation_manifest.json").read_text())
    assert (manifest["mode"], manifest["base_seed"]) == ("full", 42)
    assert manifest["sites"] == ["attn_in", "attn_proj_in", "mlp_in", "mlp_proj_in"]
    assert manifest["sizes"] == {"mlp_proj_in": 64, "queries": 32, "stream": 32, "values": 16}
    assert len(manifest["rotations"]) == 4 * 6 + 1
    assert manifest["rotations"]["blocks.2.attn.c_v.weight"]["rows"] == [[16, 2042]]
    assert "spinquant:rotated_weights:25 hessians:25 missing_hessians:0 skipped_by_sites:0" in runs["full"].output


def test_two_processes_make_the_same_artifact(runs: dict[str, Finished]) -> None:
    two = runs["two"].ok()
    assert two.artifact == runs["full"].artifact
    assert two.result["bpb_ttt"] == pytest.approx(runs["full"].result["bpb_ttt"], rel=1e-6)


def test_a_checkpoint_that_lacks_a_bank_stops_the_run(runs: dict[str, Finished]) -> None:
    broken = runs["broken"]
    assert broken.code == 2
    assert re.search(
        r"^HOTSTART_FP_CKPT=.*broken\.pt does not fit the settings: it lacks qo_bank$", broken.output, re.M
    )
