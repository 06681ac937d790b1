"""Follow-up systems inside the model: off is nothing, on is the record at first, and every path has them.

Their formulas are in the slow model (test_model.py), their kernels in test_kernels.py, causality and document starts in
test_model.py, where every switch is on at once.
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_tools import Finished, make_shards, run, together
from support import LoneRun, documents, packed, relative_error, tiny_config, tiny_model
from torch import Tensor

import train_gpt
from train_gpt import GPT, Config, ConfigError, Visit, load_config, looped_at

TABLE = dict(bigram_hash_enabled=True, bigram_hash_buckets=64, bigram_hash_dim=8)
SWITCHES: dict[str, dict[str, Any]] = {
    "bigram": TABLE,
    "smear": dict(smear_gate_enabled=True),
    "homotopy": dict(recur_homotopy=True),
    "alpha": dict(recur_alpha_enabled=True),
    "frozen alpha": dict(recur_alpha_enabled=True, recur_alpha_form="frozen"),
    "literal alpha": dict(recur_alpha_enabled=True, recur_alpha_form="literal"),
    "cross-pass": dict(cross_pass_xsa_enabled=True),
    "similarity": dict(recur_diag_p2p_cos=2),
    "narrow gates": dict(attn_out_gate_enabled=True),
    "narrow gates on queries": dict(attn_out_gate_enabled=True, attn_out_gate_src="q"),
}


def batch() -> tuple[Tensor, train_gpt.Docs]:
    return torch.from_numpy(documents((9, 7)).astype("int64"))[None], packed((9, 7))


def loss_of(model: GPT) -> float:
    tokens, docs = batch()
    return model(tokens, tokens.roll(-1, 1), docs=docs).item()


def problems(**knobs: object) -> list[str]:
    with pytest.raises(ConfigError) as e:
        load_config({k: str(v) for k, v in knobs.items()})
    return str(e.value).splitlines()


# ---- on and off ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_adds_its_own_parameters_and_changes_no_other(name: str) -> None:
    """The same random numbers go to everything else, before and after."""
    torch.manual_seed(3)
    plain, after_plain = GPT(tiny_config()), torch.rand(3)
    torch.manual_seed(3)
    other, after_other = GPT(tiny_config(**SWITCHES[name])), torch.rand(3)
    theirs = other.state_dict()
    assert torch.equal(after_plain, after_other)
    assert all(torch.equal(x, theirs[key]) for key, x in plain.state_dict().items())
    assert set(plain.state_dict()) <= set(theirs)


@pytest.mark.parametrize("looped", [False, True], ids=["plain", "looped"])
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_the_identity_at_first(name: str, looped: bool) -> None:
    plain = tiny_model()
    other = GPT(tiny_config(**SWITCHES[name]))
    other.load_state_dict(plain.state_dict(), strict=False)
    plain.looped = other.looped = looped
    assert loss_of(other) == pytest.approx(loss_of(plain), rel=1e-6)


@pytest.mark.parametrize("name", [n for n in SWITCHES if n not in ("similarity", "homotopy")])
def test_a_switch_changes_the_model_once_it_has_learned(name: str) -> None:
    changes = SWITCHES[name] | (dict(recur_alpha_values="1.3") if "alpha" in name else {})
    plain, other = tiny_model(), tiny_model(**changes)
    other.load_state_dict(plain.state_dict(), strict=False)
    plain.looped = other.looped = True
    assert abs(loss_of(other) - loss_of(plain)) > 1e-4


def test_a_knob_turns_on_its_own_switch_alone() -> None:
    assert train_gpt.switches(Config()) == []
    for kind in train_gpt.Switch.__subclasses__():
        (one,) = train_gpt.switches(dataclasses.replace(Config(), **{kind.knob: 1}))
        assert type(one) is kind


# ---- recurrence ------------------------------------------------------------------------------------------------------
def looped_pair(passes: int = 1, **changes: Any) -> tuple[GPT, GPT]:
    """The plain model and one with a switch, all passes on."""
    plain, other = tiny_model(num_loops=passes), GPT(tiny_config(num_loops=passes, **changes))
    other.load_state_dict(plain.state_dict(), strict=False)
    plain.looped = other.looped = True
    return plain, other


@pytest.mark.parametrize("form", ["learned", "frozen", "literal"])
def test_alpha_of_zero_skips_the_repeated_visits(form: str) -> None:
    """What is left is the skip merges of the longer plan: the layers of the loop run once each."""
    _, other = looped_pair(recur_alpha_enabled=True, recur_alpha_form=form, recur_alpha_values="0")
    tokens, docs = batch()
    want = other(tokens, docs=docs)
    serial = other.kernels.serial
    calls: list[int] = []

    def once(x: Tensor, x0: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(len(calls))
        visit = other.plan[calls[-1]]
        return (x, x, x0) if visit.again else serial(x, x0, *args)

    other.switches, other.kernels = [], other.kernels._replace(serial=once)
    assert torch.allclose(other(tokens, docs=docs), want, atol=1e-6)


def test_the_three_forms_of_alpha_are_one_function() -> None:
    values = "1.1,0.7;0.9,1.3"
    losses, names = [], []
    for form in ("learned", "frozen", "literal"):
        _, other = looped_pair(2, recur_alpha_enabled=True, recur_alpha_form=form, recur_alpha_values=values)
        losses.append(loss_of(other))
        names.append(("recur_alpha" in other.state_dict(), "recur_alpha" in dict(other.named_parameters())))
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-7)
    assert names == [(True, True), (True, False), (False, False)]


def test_alpha_stays_in_float32_and_learns() -> None:
    model = GPT(tiny_config(recur_alpha_enabled=True, recur_alpha_values="1.03"), dtype=torch.bfloat16)
    model.place(torch.device("cpu")).looped = True
    assert model.recur_alpha.dtype == torch.float32
    assert model.recur_alpha.tolist() == [[pytest.approx(1.03, abs=1e-6)] * 2]  # bfloat16 would say 1.03125
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    tokens, docs = batch()
    model(tokens, tokens.roll(-1, 1), docs=docs).backward()
    assert model.recur_alpha.grad.abs().min() > 0
    (switch,) = model.switches
    assert f"grad_norm={model.recur_alpha.grad.norm():.6f}" in switch.line(model)


def test_homotopy_comes_in_along_a_sigmoid_and_is_whole_at_the_end() -> None:
    cfg = tiny_config(recur_homotopy=True, recur_homotopy_tmid=0.5, recur_homotopy_tau=0.04)
    switch = train_gpt.RecurHomotopy(cfg)
    weights = []
    for fraction in (0.3, 0.46, 0.5, 0.54, 0.71, 1.0):
        switch.schedule(fraction)
        weights.append(switch.weight)
    want = torch.tensor([-5.0, -1.0, 0.0, 1.0]).sigmoid().tolist()
    assert weights == [*(pytest.approx(w, rel=1e-6) for w in want), 1.0, 1.0]
    assert [looped_at(cfg, f) for f in (0.0, 0.29, 0.3, 0.9)] == [0, 0, 1, 1]
    before, after = torch.zeros(1, 2, 4), torch.ones(1, 2, 4)
    visit = Visit(2, False, True, None, 1)
    switch.schedule(0.5)
    assert torch.allclose(switch.leave(None, visit, before, after), torch.full((1, 2, 4), 0.5))
    assert switch.leave(None, visit._replace(again=0), before, after) is after


def test_a_curriculum_adds_passes_at_its_fractions() -> None:
    cfg = tiny_config(num_loops=2, loop_curriculum="0.25:1,0.5:2")
    assert [looped_at(cfg, f) for f in (0.0, 0.24, 0.25, 0.49, 0.5, 1.0)] == [0, 0, 1, 1, 2, 2]
    model = GPT(cfg)
    lengths = []
    for model.looped in range(3):
        lengths.append(len(model.plan))
    assert lengths == [6, 8, 10]
    assert [looped_at(Config(), f) for f in (0.34, 0.35)] == [0, 2]


def test_any_band_can_be_the_loop() -> None:
    model = GPT(tiny_config(loop_start=1, loop_end=3, num_loops=2))
    model.looped = True
    assert [v.layer for v in model.plan] == [0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 5]
    assert [v.again for v in model.plan] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0]


# ---- similarity of passes --------------------------------------------------------------------------------------------
def test_similarity_compares_passes_and_leaves_training_alone(tmp_path: Path) -> None:
    plain, watched = looped_pair(2, recur_diag_p2p_cos=2)
    run_, tokens = LoneRun(tmp_path), documents((20, 30, 7))
    val = train_gpt.ValidationSet(tokens, torch.ones(len(tokens)).numpy())
    state = torch.get_rng_state()
    (switch,) = watched.switches
    switch.observe(watched, val, run_, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in watched.parameters())
    assert loss_of(plain) == loss_of(watched), "bit for bit, also after it has watched"
    (row,) = [train_gpt.json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    values = {(r["what"], r["again"], r["layer"]): r["value"] for r in row["rows"]}
    whats = ("cos_delta", "cos_output", "cos_heads", "norm_ratio")
    assert set(values) == {(what, again, layer) for what in whats for again in (1, 2) for layer in (2, 3)}
    assert all(len(v) == watched.cfg.num_heads for (what, *_), v in values.items() if what == "cos_heads")
    assert all(-1 <= values["cos_delta", a, i] <= 1 for a in (1, 2) for i in (2, 3))
    assert "p2p_cos: 1.L2:" in (tmp_path / "log.txt").read_text()


def test_similarity_of_a_pass_with_itself_is_one(tmp_path: Path) -> None:
    """A layer that adds the same to whatever it gets: its step is the same in every pass."""
    model = tiny_model(recur_diag_p2p_cos=1)
    model.looped = True
    step = torch.randn(32)
    model.kernels = model.kernels._replace(serial=lambda x, x0, *args: (x + step, x, x0))
    tokens = documents((20, 30, 7))
    val = train_gpt.ValidationSet(tokens, torch.ones(len(tokens)).numpy())
    model.switches[0].observe(model, val, LoneRun(tmp_path), 0)
    (row,) = [train_gpt.json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    values = {(r["what"], r["layer"]): r["value"] for r in row["rows"]}
    assert values["cos_delta", 2] == pytest.approx(1, abs=1e-5)
    assert values["norm_ratio", 3] == pytest.approx(1, abs=1e-4)


# ---- gains and activation --------------------------------------------------------------------------------------------
def test_gains_by_layer() -> None:
    model = GPT(tiny_config(qk_gain_per_layer="1,2,3,4,5,6.5"))
    assert [b.attn.q_gain.tolist() for b in model.blocks] == [[g] * 4 for g in (1, 2, 3, 4, 5, 6.5)]


def test_xielu_of_the_record_depth_is_the_public_table() -> None:
    table = [train_gpt.xielu_of(i, 11) for i in range(11)]
    assert table == list(train_gpt.XIELU) and table[2] == (1.415, 0.0, 0.363, 0.405)
    assert train_gpt.xielu_of(0, 1) == table[0] and train_gpt.xielu_of(4, 5) == table[-1]


def test_xielu_has_the_leaky_square_inside() -> None:
    h = torch.linspace(-3, 3, 101)
    assert torch.allclose(train_gpt.Xielu(1.0, 0.0, 0.25, 0.0)(h), train_gpt.leaky_square(h))


# ---- settings and submission -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("knobs", "word"), [
    (dict(QK_GAIN_PER_LAYER="1,2"), "11 numbers"),
    (dict(QK_GAIN_PER_LAYER="a"), "QK_GAIN_PER_LAYER"),
    (dict(LOOP_CURRICULUM="0.5:1,0.3:2"), "LOOP_CURRICULUM"),
    (dict(LOOP_CURRICULUM="0.5:1"), "NUM_LOOPS=2"),
    (dict(LOOP_CURRICULUM="0.5"), "LOOP_CURRICULUM"),
    (dict(LOOP_CURRICULUM="0.5:1,0.6:2", RECUR_HOMOTOPY=1), "choose one"),
    (dict(RECUR_HOMOTOPY=1, RECUR_HOMOTOPY_TMID=0.9), "TMID + 5 TAU"),
    (dict(RECUR_ALPHA_ENABLED=1, NUM_LOOPS=0), "NUM_LOOPS"),
    (dict(RECUR_ALPHA_ENABLED=1, RECUR_ALPHA_VALUES="1,1,1"), "2 rows of 3"),
    (dict(BIGRAM_HASH_ENABLED=1, BIGRAM_HASH_DIM=0), "BIGRAM_HASH_DIM"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(knobs: dict[str, object], word: str) -> None:
    (line,) = problems(**knobs)
    assert word in line


def test_a_submission_has_only_the_switches_that_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(train_gpt.__file__).read_text()
    cfg = tiny_config(smear_gate_enabled=True)

    def switches_in(program: str) -> set[str]:
        return {
            n.name
            for n in ast.parse(program).body
            if isinstance(n, ast.ClassDef) and "Switch" in map(ast.unparse, n.bases)
        }

    assert switches_in(source) == {kind.__name__ for kind in train_gpt.Switch.__subclasses__()}
    assert switches_in(train_gpt.specialized(source, Config())) == set()
    assert switches_in(train_gpt.specialized(source, cfg)) == {"SmearGate"}
    module = type(train_gpt)("without")
    monkeypatch.setitem(train_gpt.sys.modules, "without", module)
    exec(train_gpt.specialized(source, cfg), module.__dict__)
    assert module.load_config({"SMEAR_GATE_ENABLED": "1"}).smear_gate_enabled
    assert module.load_config({"BIGRAM_HASH_ENABLED": "0", "RECUR_ALPHA_FORM": "learned"}) == module.load_config({})
    with pytest.raises(
        module.ConfigError, match="BIGRAM_HASH_ENABLED was left out of this submission, built for False"
    ):
        module.load_config({"BIGRAM_HASH_ENABLED": "1"})


def test_a_submission_has_nothing_that_only_its_makers_need() -> None:
    names = {
        train_gpt.defined(n)
        for n in ast.parse(train_gpt.specialized(Path(train_gpt.__file__).read_text(), Config())).body
    }
    assert {"main", "train", "adapt_and_score", "FusedSerial", "up_leaky", "build_submission"} <= names
    assert not {"minify", "specialized", "print_help", "print_sizes", "xielu_of", "STUB", "IS_SUBMISSION"} & names


def test_conditions_fold() -> None:
    cases = {
        "if c.a and f(): x()": "pass", "if f() and c.a:\n x()\nelse:\n y()": "if f() and False:\n x()\nelse:\n y()",
        "x = 1 if c.b == 3 else 2": "x = 1", "x = c.a or g": "x = g", "x = not c.a": "x = True",
        "x = [(c.a, 's'), (g, 't')]": "x = [(g, 't')]", "f('a', ('a', 'z'), a=1, z=2)": "f('a', ('z',), z=2)",
        "if not c.a and g:\n x()": "if g:\n x()", "x = d.z": "x = d.z",
        "x = (g or 0) * c.b": "x = (g or 0) * 3", "x = c.a or 0": "x = 0", "x = g and c.b": "x = g and 3",
    }  # fmt: skip
    for before, after in cases.items():
        tree = train_gpt.Specialize(dict(a=False, b=3)).visit(ast.parse(before))
        got = ast.unparse(ast.fix_missing_locations(tree)) or "pass"
        assert got == ast.unparse(ast.parse(after)), before


# ---- the whole pipeline, every switch at once, one and two processes -------------------------------------------------
ALL_ON = dict(
    BIGRAM_HASH_ENABLED=1, BIGRAM_HASH_BUCKETS=128, BIGRAM_HASH_DIM=8, SMEAR_GATE_ENABLED=1, ATTN_OUT_GATE_ENABLED=1,
    ATTN_OUT_GATE_SRC="q", RECUR_ALPHA_ENABLED=1, RECUR_ALPHA_VALUES="1.1", CROSS_PASS_XSA_ENABLED=1,
    RECUR_DIAG_P2P_COS=1, NUM_LOOPS=2, LOOP_CURRICULUM="0.2:1,0.6:2", XIELU_ENABLED=1, QK_GAIN_PER_LAYER="2,3,2,3",
)  # fmt: skip


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    root = tmp_path_factory.mktemp("switches")
    data = make_shards(root / "data", 0, 12_000, (9, 3, 14, 6))
    code = dict(code="import sys, train_gpt; train_gpt.minify = lambda source: source; sys.exit(train_gpt.main())")
    return together({
        "one": lambda: run(root / "one", data, code, **ALL_ON),
        "two": lambda: run(root / "two", data, code | dict(world=2), **ALL_ON),
        "late": lambda: run(root / "late", data, code, **ALL_ON | dict(LOOP_CURRICULUM="0.2:1,1:2", TTT_ENABLED=0)),
        "homotopy": lambda: run(root / "homotopy", data, code, RECUR_HOMOTOPY=1, TTT_ENABLED=0),
    })  # fmt: skip


def test_two_processes_train_like_one(everything: dict[str, Finished]) -> None:
    one, two = everything["one"].ok(), everything["two"].ok()
    assert max(abs(two.losses[s] - one.losses[s]) for s in one.losses) < 1e-4
    for key, tolerance in (("bpb_float", 1e-4), ("bpb_quantized", 1e-3), ("bpb_ttt", 1e-3)):
        assert two.result[key] == pytest.approx(one.result[key], rel=tolerance), key


def test_every_path_has_the_switches(everything: dict[str, Finished]) -> None:
    """Float and quantized scores are close, which a switch missing on either side would prevent."""
    one = everything["one"].ok()
    assert one.result["bpb_quantized"] == pytest.approx(one.result["bpb_float"], rel=2e-3)
    assert one.result["bpb_ttt"] < one.result["bpb_quantized"]
    state, looped, config = train_gpt.unpack(one.artifact)
    assert looped == 2
    assert {"recur_alpha", "recur_xsa_beta", "bigram.embed.weight", "smear_lambda"} <= set(state)
    assert config["bigram_hash_buckets"] == 128
    assert [r["looped"] for r in one.rows("train")] == [0] * 3 + [1] * 5 + [2] * 4
    assert one.output.count("recur_alpha: values=[[") == 12
    assert "p2p_cos: 1.L1:" in one.output


def test_inference_makes_the_passes_that_training_reached(everything: dict[str, Finished]) -> None:
    late = everything["late"].ok()
    assert train_gpt.unpack(late.artifact)[1] == 1
    assert late.result["bpb_quantized"] == pytest.approx(late.result["bpb_float"], rel=2e-3)


def test_homotopy_scores_the_whole_loop(everything: dict[str, Finished]) -> None:
    run_ = everything["homotopy"].ok()
    assert [r["looped"] for r in run_.rows("train")] == [0] * 5 + [1] * 7
    assert run_.result["bpb_quantized"] == pytest.approx(run_.result["bpb_float"], rel=2e-3)


def test_the_pair_table_is_quantized_with_what_it_gives() -> None:
    model = tiny_model(**TABLE)
    sums = train_gpt.calibrate(model, [batch()[0]], LoneRun())
    tokens = batch()[0][0].tolist()
    rows = [(36313 * t ^ 27191 * (t if i == 0 or t == 1 else tokens[i - 1])) % 64 for i, t in enumerate(tokens)]
    pairs = model.bigram["embed"].weight[rows].detach()
    assert relative_error(sums["bigram"], pairs.T @ pairs) < 1e-5
    coded = train_gpt.quantize(model.state_dict(), sums, model.cfg, LoneRun())
    assert (coded["bigram.embed.weight"].kind, coded["bigram.embed.weight"].bits) == ("gptq", 6)
    assert coded["bigram.proj.weight"].kind == "float16"
