"""The model: against a slow copy, the order of visits, causality, packing, adapters, parameters and their roles."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from slow_model import SlowModel
from support import adapters_for, documents, named, packed, relative_error, tiny_config, tiny_model
from torch import Tensor

import train_gpt
from train_gpt import BOS, GPT, Adapters, Config, Docs, plan_depth, role_of

EVERYTHING = dict(
    smear_gate_enabled=True, attn_out_gate_enabled=True, bigram_hash_enabled=True, bigram_hash_buckets=64,
    bigram_hash_dim=8, recur_alpha_enabled=True, cross_pass_xsa_enabled=True,
)  # fmt: skip


def row(*lengths: int, seed: int = 3) -> Tensor:
    """Packed documents of these lengths as token ids (1, T)."""
    return torch.from_numpy(documents(lengths, seed).astype("int64"))[None]


# ---- agreement -------------------------------------------------------------------------------------------------------
VARIANTS: dict[str, dict[str, Any]] = {
    "record": {},
    "all gates": EVERYTHING,
    "narrow gate on queries": dict(attn_out_gate_enabled=True, attn_out_gate_src="q", gated_attn_enabled=False),
    "plain skips": dict(skip_gates_enabled=False, ln_scale=False),
    "no lanes": dict(parallel_start_layer=0),
    "lanes from beyond the model": dict(parallel_start_layer=8),
    "lanes from nowhere": dict(parallel_start_layer=-2),
    "attention lane": dict(parallel_final_lane="attn", xsa_last_n=2),
    "mlp lane": dict(parallel_final_lane="mlp", xsa_last_n=0),
    "stretched rotation": dict(rope_yarn=True, train_seq_len=8, rope_dims=8),
    "xielu": dict(xielu_enabled=True),
    "three passes, all switches": dict(num_loops=2, loop_start=1, loop_end=3, **EVERYTHING),
    "three passes": dict(num_loops=2, loop_start=1, loop_end=3, logit_softcap=5.0, num_kv_heads=4),
}


@pytest.mark.parametrize("looped", [False, True], ids=["plain", "looped"])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_slow_model(name: str, looped: bool) -> None:
    model = tiny_model(**VARIANTS[name])
    model.looped = looped
    slow = SlowModel(model.cfg, {k: v.numpy() for k, v in model.state_dict().items()}, looped)
    tokens, lengths = row(7, 5), (7, 3, 2)  # the second document is cut in two, as one longer than a row is
    pieces = [i for i, n in enumerate(lengths) for _ in range(n)]
    with torch.no_grad():
        dense, separate = model(tokens), model(tokens, docs=packed(lengths))
    assert relative_error(dense[0], slow.logits(tokens[0].tolist())) < 1e-5
    assert relative_error(separate[0], slow.logits(tokens[0].tolist(), pieces)) < 1e-5


def test_vectors_of_layers_are_not_rounded() -> None:
    """A bfloat16 model has them in float32, and a product with a stream is rounded once."""
    model = GPT(tiny_config(), dtype=torch.bfloat16).place(torch.device("cpu"))
    for w in model.layers():
        vectors = [t for t in (w.mix, w.q_gain, w.post, w.keep) if t is not None]
        assert {t.dtype for t in vectors} == {torch.float32}
        assert {t.dtype for t in (w.qkv, w.wo, w.up, w.down)} == {torch.bfloat16}
    assert {t.dtype for t in model.skip_mixes()} == {torch.float32}
    x, lane, a, b = torch.randn(4, 1, 9, 32).bfloat16()
    keep, post = torch.randn(2), torch.randn(2, 2)
    exact = train_gpt.update_lanes(*(t.float() for t in (x, lane, a, b)), keep, post)
    for ours, want in zip(train_gpt.update_lanes(x, lane, a, b, keep, post), exact, strict=True):
        assert torch.equal(ours, want.bfloat16())
    assert torch.equal(
        train_gpt.mix(x, a, keep[:, None]), train_gpt.mix(x.float(), a.float(), keep[:, None]).bfloat16()
    )


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model, tokens, targets = tiny_model(), row(9, 5), row(14, seed=4)
    want = -model(tokens).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert torch.allclose(model(tokens, targets, reduction="none"), want, atol=1e-5)
    assert torch.allclose(model(tokens, targets), want.mean(), atol=1e-5)


# ---- order of visits -------------------------------------------------------------------------------------------------
def test_plan_of_the_record_without_loop() -> None:
    plan = plan_depth(11, 0, 3, 5, 8)
    assert [v.layer for v in plan] == list(range(11))
    assert [v.save_skip for v in plan] == 5 * [True] + 6 * [False]
    assert [v.skip for v in plan] == 5 * [None] + [0, 1, 2, 3, 4, None]
    assert [v.two_lane for v in plan] == 8 * [False] + 3 * [True]


def test_plan_of_the_record_with_loop() -> None:
    plan = plan_depth(11, 2, 3, 5, 8)
    assert [v.layer for v in plan if v.save_skip] == [0, 1, 2, 3, 4, 5, 3, 4]
    assert [v.layer for v in plan if not v.save_skip] == [5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [v.skip for v in plan] == 8 * [None] + [0, 1, 2, 3, 4, 5, 6, 7, None]
    assert [v.two_lane for v in plan] == 14 * [False] + 3 * [True]


def test_the_model_uses_the_plan_of_its_settings() -> None:
    with torch.device("meta"):
        model = GPT(Config())
    assert model.plan == plan_depth(11, 0, 3, 5, 8)
    model.looped = True
    assert model.plan == plan_depth(11, 2, 3, 5, 8)


@pytest.mark.parametrize(("layers", "loops", "start", "end"), [(1, 0, 0, 0), (2, 1, 0, 1), (5, 3, 4, 4), (6, 2, 0, 5)])
def test_every_kept_output_is_merged_once(layers: int, loops: int, start: int, end: int) -> None:
    plan = plan_depth(layers, loops, start, end, 0)
    assert len(plan) == layers + loops * (end - start + 1)
    saved, slots = sum(v.save_skip for v in plan), [v.skip for v in plan if v.skip is not None]
    assert slots == list(range(min(saved, len(plan) - saved)))
    assert not any(v.two_lane for v in plan)


# ---- causality and packing -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["dense", "packed"])
@pytest.mark.parametrize("looped", [False, True], ids=["plain", "looped"])
def test_a_token_changes_nothing_before_it(mode: str, looped: bool) -> None:
    model, tokens = tiny_model(**EVERYTHING), row(6, 8, 5)
    model.looped = looped
    docs = packed((6, 8, 5)) if mode == "packed" else None
    with torch.no_grad():
        before = model(tokens, docs=docs)
        for t in (1, 5, 9, 18):
            other = tokens.clone()
            other[0, t] = 3 if tokens[0, t] != 3 else 4
            after = model(other, docs=docs)
            assert torch.allclose(after[0, :t], before[0, :t], atol=1e-6, rtol=0)
            assert not torch.allclose(after[0, t], before[0, t], atol=1e-3)


def test_packed_documents_do_not_see_each_other() -> None:
    model, tokens, lengths = tiny_model(**EVERYTHING), row(6, 8, 5), (6, 8, 5)
    model.looped = True
    with torch.no_grad():
        together = model(tokens, docs=packed(lengths))
        alone = [model(piece) for piece in tokens.split(lengths, dim=1)]
    # Rotation depends on distances only, so a document may stand anywhere in its row.
    assert torch.allclose(together, torch.cat(alone, dim=1), atol=1e-4)
    assert not torch.allclose(together, model(tokens), atol=1e-2)


def test_padding_of_the_boundaries_is_free() -> None:
    model, tokens = tiny_model(), row(6, 8)
    assert torch.equal(model(tokens, docs=packed((6, 8), 0)), model(tokens, docs=packed((6, 8), 60)))


def test_rows_of_a_batch_are_separate() -> None:
    model, batch = tiny_model(**EVERYTHING), torch.cat([row(9, seed=s) for s in (1, 2, 3)])
    assert torch.allclose(model(batch), torch.cat([model(r[None]) for r in batch]), atol=1e-5)


def test_smear_stops_at_a_document_start() -> None:
    model, tokens = tiny_model(smear_gate_enabled=True), row(4, 5)
    plain = train_gpt.rms(model.tok_emb(tokens))
    with torch.no_grad():
        smeared = model.embed(tokens)
    starts = tokens[0] == BOS
    assert torch.equal(smeared[0, starts], plain[0, starts])
    assert (smeared - plain)[0, ~starts].abs().amax(-1).min() > 1e-3


# ---- adapters, taps, positions ---------------------------------------------------------------------------------------
def filled_adapters(model: GPT, n_docs: int, seed: int = 0) -> Adapters:
    adapters = adapters_for(model, n_docs)
    g = torch.Generator().manual_seed(seed)
    for name, t in named(adapters, adapters.values).items():
        t.copy_(torch.randn(t.shape, generator=g) * (0.3 if name.endswith("B") else 0.2))
    return adapters


@pytest.mark.parametrize("looped", [False, True], ids=["plain", "looped"])
def test_new_adapters_change_nothing(looped: bool) -> None:
    model, batch = tiny_model(**EVERYTHING), torch.cat([row(9, seed=s) for s in (1, 2)])
    model.looped = looped
    adapters = adapters_for(model, 2)
    assert torch.allclose(model(batch, adapters=adapters), model(batch), atol=1e-6)
    assert all((t != 0).any() == name.endswith("A") for name, t in named(adapters, adapters.values).items())


@pytest.mark.parametrize("site", ["q", "k", "v", "attn_bypass", "mlp_bypass", "head"])
def test_every_adapter_acts_on_its_own_document_alone(site: str) -> None:
    model, batch = tiny_model(), torch.cat([row(9, seed=s) for s in (1, 2)])
    adapters, full = adapters_for(model, 2), filled_adapters(model, 2)
    named(adapters, adapters.values)[f"{site}.B"][1] = named(full, full.values)[f"{site}.B"][1]
    plain, adapted = model(batch), model(batch, adapters=adapters)
    assert torch.allclose(adapted[0], plain[0], atol=1e-6)
    assert not torch.allclose(adapted[1], plain[1], atol=1e-3)


def test_adapters_equal_changed_matrices() -> None:
    """q, k, v and head add to matrices, so merged weights give the same logits; no layer is visited twice here."""
    model, tokens = tiny_model(), row(11)
    adapters = filled_adapters(model, 1)
    values = named(adapters, adapters.values)
    for bypass in ("attn_bypass.B", "mlp_bypass.B"):
        values[bypass].zero_()
    merged, n = tiny_model(), model.cfg.num_layers
    product = {k: values[f"{k}.B"][0] @ values[f"{k}.A"][0] for k in ("q", "k", "v", "head")}
    with torch.no_grad():
        merged.qo_bank[:n] += product["q"]
        merged.kv_bank[:n] += product["k"]
        merged.kv_bank[n:] += product["v"]
        hidden = merged.trunk(tokens, None, None, None)
        head = merged.tok_emb.weight + product["head"][0]
        want = train_gpt.softcapped_logits(hidden, head, model.cfg.logit_softcap)
    assert torch.allclose(model(tokens, adapters=adapters), want, atol=1e-4)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_a_tap_changes_nothing_and_sees_every_quantized_input(adapted: bool) -> None:
    model, tokens, seen = tiny_model(**EVERYTHING), row(10), {}
    model.looped = True
    adapters = filled_adapters(model, 1) if adapted else None
    tapped = model(tokens, adapters=adapters, tap=lambda name, x: seen.setdefault(name, []).append(x))
    assert torch.allclose(tapped, model(tokens, adapters=adapters), atol=1e-6)
    d, f, n = model.cfg.model_dim, model.cfg.hidden_dim, model.cfg.num_layers
    sites = {"attn_in": d, "attn_out": d, "mlp_in": d, "mlp_out": f, "bigram": model.cfg.bigram_hash_dim}
    assert set(seen) == {f"blocks.{i}.{site}" for i in range(n) for site in list(sites)[:4]} | {"head", "bigram"}
    for name, xs in seen.items():
        passes = sum(f"blocks.{v.layer}." in name for v in model.plan) or 1
        assert [tuple(x.shape) for x in xs] == passes * [(1, 10, sites.get(name.split(".")[-1], d))]


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_reading_out_positions_is_slicing(adapted: bool) -> None:
    model, batch = tiny_model(), torch.cat([row(9, seed=s) for s in (1, 2)])
    adapters = filled_adapters(model, 2) if adapted else None
    at = torch.tensor([[3, 4, 5], [8, 0, 8]])
    rows = torch.arange(2)[:, None]
    assert torch.allclose(model(batch, adapters=adapters, at=at), model(batch, adapters=adapters)[rows, at], atol=1e-6)
    targets = torch.tensor([[1, 2, 3], [4, 5, 6]])
    full = torch.full((2, 9), 7)
    full[rows, at] = targets
    full[1, 8] = 6  # position 8 is read twice; compare with its last target
    want = model(batch, full, adapters=adapters, reduction="none")[rows, at]
    ours = model(batch, targets, adapters=adapters, at=at, reduction="none")
    assert torch.allclose(ours[0], want[0], atol=1e-5)
    assert torch.allclose(ours[1, 1:], want[1, 1:], atol=1e-5)


# ---- parameters ------------------------------------------------------------------------------------------------------
def record_shapes() -> dict[str, tuple[int, ...]]:
    """The public checkpoint's names and shapes."""
    shapes: dict[str, tuple[int, ...]] = {
        "tok_emb.weight": (8192, 512), "qo_bank": (22, 512, 512), "kv_bank": (22, 256, 512),
        "mlp_up_bank": (11, 2048, 512), "mlp_down_bank": (11, 512, 2048), "skip_weights": (8, 512),
        "skip_gates": (8, 512), "parallel_post_lambdas": (11, 2, 2), "parallel_resid_lambdas": (11, 2),
    }  # fmt: skip
    for i in range(11):
        block = {"attn.q_gain": (8,), "attn.attn_gate_w": (8, 512), "attn_scale": (512,), "mlp_scale": (512,)}
        shapes |= {f"blocks.{i}.{k}": v for k, v in block.items()} | {f"blocks.{i}.resid_mix": (2, 512)}
    return shapes


def test_names_and_shapes_are_the_public_checkpoint() -> None:
    with torch.device("meta"):
        model = GPT(Config())
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == record_shapes()
    assert set(model.state_dict()) == set(record_shapes())
    assert sum(p.numel() for p in model.parameters()) == 35_989_658


def test_options_add_the_public_names() -> None:
    with torch.device("meta"):
        model = GPT(train_gpt.load_config({"SMEAR_GATE_ENABLED": "1", "ATTN_OUT_GATE_ENABLED": "1"}))
    added = {n: tuple(p.shape) for n, p in model.named_parameters() if n not in record_shapes()}
    gates = {f"blocks.{i}.attn.attn_gate_proj.weight": (8, 12) for i in range(11)}
    assert added == {"smear_gate.weight": (1, 12), "smear_lambda": (1,)} | gates


def test_initial_values() -> None:
    model = GPT(tiny_config(vocab_size=2048, model_dim=64, **EVERYTHING))
    n, state = model.cfg.num_layers, model.state_dict()
    constants = {r"q_gain": 5.0, r"attn_scale|mlp_scale|skip_weights|post_lambdas": 1.0, r"skip_gates": 0.0,
                 r"resid_lambdas": 1.1, r"attn_gate_proj|smear|bigram.proj|recur_xsa_beta": 0.0,
                 r"recur_alpha": 1.0}  # fmt: skip
    seen = set()
    for pattern, value in constants.items():
        for name in filter(re.compile(pattern).search, state):
            seen.add(name)
            assert torch.equal(state[name], torch.full_like(state[name], value)), name
    for i in range(n):
        seen |= {f"blocks.{i}.resid_mix", f"blocks.{i}.attn.attn_gate_w"}
        assert torch.equal(state[f"blocks.{i}.resid_mix"], torch.tensor([[1.0], [0.0]]).expand(2, 64))
        assert 0.004 < state[f"blocks.{i}.attn.attn_gate_w"].std() < 0.006
    assert 0.0049 < state["tok_emb.weight"].std() < 0.0051
    assert not state["qo_bank"][n:].any()
    assert not state["mlp_down_bank"].any()
    for bank in (state["qo_bank"][:n], state["kv_bank"], state["mlp_up_bank"]):
        assert torch.allclose(torch.linalg.svdvals(bank), torch.ones(()), atol=1e-4)
    assert 0.9 < state["bigram.embed.weight"].std() < 1.1
    drawn = {"tok_emb.weight", "bigram.embed.weight", "qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"}
    assert seen | drawn == set(state)


def test_optional_gates_are_the_identity_at_first() -> None:
    plain, gated = tiny_model(), GPT(tiny_config(**EVERYTHING))
    missing = gated.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert len(missing) == 6 + 2 + 2 + 1 + 1
    gated.looped = plain.looped = True
    tokens = row(7, 6)
    assert torch.allclose(gated(tokens), plain(tokens), atol=1e-6)


SCALAR = ("scalar", "float32", "float16")
INTENDED = {
    r"(qo|kv|mlp_up|mlp_down)_bank": ("muon", "float32", "gptq"),
    r"tok_emb\.weight": ("embed", "compute", "gptq"),
    r"blocks\.\d+\.attn\.attn_gate_w": ("scalar", "float32", "rows"),
    r"blocks\.\d+\.(attn\.q_gain|attn_scale|mlp_scale|resid_mix|attn\.attn_gate_proj\.weight)": SCALAR,
    r"skip_(weights|gates)": SCALAR,
    r"parallel_(post|resid)_lambdas": SCALAR,
    r"smear_(gate\.weight|lambda)": SCALAR,
    r"bigram\.embed\.weight": ("embed", "float32", "gptq"),
    r"bigram\.proj\.weight": ("muon", "float32", "float16"),
    r"recur_(alpha|xsa_beta)": SCALAR,
}


def test_every_parameter_has_its_intended_role() -> None:
    used = set()
    for name, _ in tiny_model(**EVERYTHING).named_parameters():
        want = [role for pattern, role in INTENDED.items() if re.fullmatch(pattern, name)]
        assert len(want) == 1, name
        role = role_of(name)
        assert (role.optimizer, role.dtype, role.storage) == want[0], name
        used.add(role)
    assert used == set(train_gpt.ROLES), "a row of ROLES that no parameter has"


def test_a_parameter_without_role_is_an_error() -> None:
    with pytest.raises(KeyError, match="bigram_table"):
        role_of("bigram_table")


def test_placed_parameters_have_the_dtype_of_their_role() -> None:
    model = GPT(tiny_config(**EVERYTHING), dtype=torch.bfloat16).place(torch.device("cpu"))
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    assert dtypes.pop("tok_emb.weight") == torch.bfloat16
    assert set(dtypes.values()) == {torch.float32}
    logits = model(row(6, 4), docs=packed((6, 4)))
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


def test_bfloat16_is_near_float32() -> None:
    exact = tiny_model(**EVERYTHING)
    half = GPT(exact.cfg, dtype=torch.bfloat16)
    half.load_state_dict(exact.state_dict())
    assert relative_error(half(row(12)), exact(row(12)).detach()) < 0.05


def test_every_parameter_learns() -> None:
    """A parameter without gradient is one that the forward forgot."""
    model, tokens = tiny_model(**EVERYTHING), row(9, 8)
    model.looped = True
    model(tokens, row(17, seed=5), docs=Docs(packed((9, 8)).cu_seqlens, 9)).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
