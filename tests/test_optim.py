"""Schedules, Muon, AdamW groups, clipping, the weight average, and the rollback after priming."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pipeline_tools import Launch
from support import LoneRun, documents, packed, relative_error, tiny_config, tiny_model
from torch import Tensor

import train_gpt
from train_gpt import (
    GPT,
    Config,
    Optimizer,
    WeightAverage,
    joint_norm,
    lr_multiplier,
    muon_momentum,
    muon_update,
    orthogonalize,
    role_of,
    training_fraction,
)


# ---- schedules -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fraction", "want"), [(0, 1), (0.2499, 1), (0.25, 1), (0.625, 0.5), (0.85, 0.2), (1.0, 0), (1.3, 0)]
)
def test_learning_rate_of_the_record(fraction: float, want: float) -> None:
    assert lr_multiplier(Config(), fraction) == pytest.approx(want, abs=1e-12)


def test_learning_rate_floor_and_full_warm_down() -> None:
    assert lr_multiplier(Config(min_lr=0.1), 0.99) == 0.1
    assert lr_multiplier(Config(min_lr=0.1), 0.25) == 1
    assert lr_multiplier(Config(warmdown_frac=1.0), 0.5) == 0.5


@pytest.mark.parametrize(("step", "want"), [(0, 0.92), (750, 0.945), (1500, 0.97), (9000, 0.97)])
def test_momentum_of_the_record(step: int, want: float) -> None:
    assert muon_momentum(Config(), step) == pytest.approx(want)
    assert muon_momentum(Config(muon_momentum_warmup_steps=0), step) == 0.97


def test_training_fraction_follows_the_clock_or_the_steps() -> None:
    assert training_fraction(Config(), 0, 298.0) == pytest.approx(0.5)  # of 600 - 4 seconds
    assert training_fraction(Config(), 19_999, 0.0) == 0
    assert training_fraction(Config(max_wallclock_seconds=0), 5000, 1e9) == 0.25


# ---- Muon ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 16), (2, 16, 64), (1, 1, 8)])
def test_orthogonalized_updates_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    y = orthogonalize(x, 5)
    assert y.shape == x.shape
    values = torch.linalg.svdvals(y.float())
    # The quintic trades exactness for speed: it maps into a band around 1.
    assert values.min() > 0.3
    assert values.max() < 1.3
    # Directions stay: the polar factor of x is the nearest orthogonal matrix.
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(y.flatten().float(), (u @ vh).flatten(), dim=0) > 0.95


def test_orthogonalizing_is_per_matrix_and_scale_free() -> None:
    x = torch.randn(3, 8, 24)
    y = orthogonalize(x, 5)
    assert torch.allclose(orthogonalize(x[1:2], 5), y[1:2], atol=1e-5)
    assert torch.allclose(orthogonalize(100 * x, 5), y, atol=1e-4)
    assert not orthogonalize(torch.zeros(1, 4, 4), 5).any()


def test_muon_update_is_nesterov_momentum_with_unit_rows() -> None:
    g1, g2 = torch.randn(2, 16, 8), torch.randn(2, 16, 8)
    buffer, mu = torch.zeros(2, 16, 8, dtype=torch.bfloat16), 0.9
    first = muon_update(g1, buffer, mu, 5, row_normalize=True)
    rows = g1 + mu * g1.bfloat16().float()
    rows = rows / rows.norm(dim=-1, keepdim=True)
    assert torch.allclose(first, orthogonalize(rows, 5) * math.sqrt(2), atol=1e-3)  # tall: twice as many rows
    want = (mu * g1.bfloat16()).float() + g2
    second = muon_update(g2, buffer, mu, 5, row_normalize=False)
    assert torch.allclose(buffer.float(), want, atol=0.05)
    assert torch.allclose(second, orthogonalize(g2 + mu * buffer.float(), 5) * math.sqrt(2), atol=1e-3)
    wide = muon_update(torch.randn(1, 8, 32), torch.zeros(1, 8, 32).bfloat16(), mu, 5, row_normalize=True)
    assert torch.linalg.svdvals(wide).max() < 1.3


# ---- one step of everything ------------------------------------------------------------------------------------------
def with_gradients(model: GPT, scale: float = 1.0, seed: int = 5) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = scale * torch.randn(p.shape, generator=g)
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def optimized(model: GPT, **changes: Any) -> Optimizer:
    return Optimizer(model, tiny_config(**changes), LoneRun())


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = tiny_model(smear_gate_enabled=True, attn_out_gate_enabled=True)
    optimizer = optimized(model)
    grouped = [id(p) for p in optimizer.banks] + [id(p) for g in optimizer.adam.param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    embedding, scalars = optimizer.adam.param_groups
    assert [id(p) for p in embedding["params"]] == [id(model.tok_emb.weight)]
    assert (embedding["lr"], embedding["weight_decay"]) == (0.03, 0.085)
    assert (scalars["lr"], scalars["weight_decay"]) == (0.02, 0.02)
    assert embedding["betas"] == (0.9, 0.95)
    assert embedding["eps"] == 1e-8


def test_steps_are_those_of_the_plain_formulas() -> None:
    """Two steps: AdamW with a learning rate per group, Muon with decoupled decay; gradients are gone afterwards."""
    model = tiny_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = optimized(model, grad_clip_norm=0.0)
    state = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in before.items()}
    buffers = {n: torch.zeros_like(p).bfloat16() for n, p in before.items()}
    for t, (lr_mul, momentum) in enumerate(((1.0, 0.92), (0.5, 0.95)), 1):
        grads = with_gradients(model, seed=t)
        optimizer.clip(optimizer.reduce())
        optimizer.update(lr_mul, momentum)
        for n, g in grads.items():
            if role_of(n).optimizer == "muon":
                lr, step = 0.026 * lr_mul, muon_update(g, buffers[n], momentum, 5, row_normalize=True)
                before[n] = before[n] * (1 - lr * 0.095) - lr * step
                continue
            lr, decay = (0.03, 0.085) if n == "tok_emb.weight" else (0.02, 0.02)
            lr *= lr_mul
            m, v = state[n]
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.95).add_(0.05 * g**2)
            step = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            before[n] = before[n] * (1 - lr * decay) - lr * step
    for n, p in model.named_parameters():
        assert torch.allclose(p, before[n], atol=1e-5), n
        assert p.grad is None


def test_reduce_returns_the_norm_of_the_whole_gradient() -> None:
    model = tiny_model()
    optimizer, grads = optimized(model), with_gradients(model)
    want = torch.cat([g.flatten() for g in grads.values()]).norm()
    assert optimizer.reduce().item() == pytest.approx(want.item(), rel=1e-5)


def test_the_norm_is_float32_over_mixed_dtypes() -> None:
    """A norm of bfloat16 gradients that came back in bfloat16 would be off by up to 0.4 %."""
    tensors = [torch.randn(300, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float32)] + [torch.ones(())]
    norm = joint_norm(tensors)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(torch.cat([t.double().view(-1) for t in tensors]).norm().item(), rel=1e-6)


def test_gradients_of_a_bfloat16_embedding_are_clipped_with_the_rest() -> None:
    model = GPT(tiny_config(), dtype=torch.bfloat16).place(torch.device("cpu"))
    optimizer, grads = optimized(model, grad_clip_norm=0.3), {}
    for n, p in model.named_parameters():
        p.grad = grads[n] = torch.randn_like(p)
    grads = {n: g.clone() for n, g in grads.items()}
    norm = optimizer.reduce()
    optimizer.clip(norm)
    for n, p in model.named_parameters():
        assert p.grad.dtype == p.dtype
        assert torch.allclose(p.grad.float(), 0.3 / norm * grads[n].float(), rtol=1e-2, atol=1e-6), n


def rank_steps(folder: str, **changes: Any) -> None:
    """Two steps of one rank, whose gradients are its share; the weights and the norms go to a file."""
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if world > 1:
        dist.init_process_group("gloo")
    model, run = tiny_model(num_layers=5), LoneRun(rank=rank, world=world)  # two ranks cannot share 5 matrices evenly
    optimizer, norms = Optimizer(model, tiny_config(num_layers=5, grad_clip_norm=0.3, **changes), run), []
    for t in (1, 2):
        shares = [with_gradients(model, seed=10 * t + r) for r in range(2)]
        for n, p in model.named_parameters():
            p.grad = shares[rank][n] if world == 2 else shares[0][n] + shares[1][n]
        norms.append(optimizer.reduce())
        optimizer.clip(norms[-1])
        optimizer.update(1.0, 0.9)
    state = {"weights": model.state_dict(), "norms": norms, "optimizer": optimizer.state_dict()}
    torch.save(state, f"{folder}/{world}_{rank}.pt")


@pytest.mark.parametrize("changes", [{}, dict(muon_grad_power=0.9)], ids=str)
def test_two_ranks_step_like_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    call = f"rank_steps({str(tmp_path)!r}, **{changes!r})"
    code = f"import sys; sys.path.insert(0, 'tests'); import test_optim; test_optim.{call}"
    with Launch({"RUN_DIR": tmp_path, "OMP_NUM_THREADS": 1}, world=2, code=code) as launch:
        assert launch.finish().code == 0
    rank_steps(str(tmp_path), **changes)
    alone, *both = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert equal(*both), "replicas stay equal to the bit"
    assert torch.allclose(torch.stack(both[0]["norms"]), torch.stack(alone["norms"]))
    assert all(torch.allclose(both[0]["weights"][n], w, atol=2e-3) for n, w in alone["weights"].items())
    for ours, theirs in zip(both[0]["optimizer"]["momentum"], alone["optimizer"]["momentum"], strict=True):
        assert relative_error(ours, theirs) < 5e-3


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_clipping_scales_large_gradients_alone(scale: float) -> None:
    model = tiny_model()
    optimizer, grads = optimized(model, grad_clip_norm=0.3), with_gradients(model, scale)
    norm = optimizer.reduce()
    optimizer.clip(norm)
    factor = min(1.0, 0.3 / norm.item())
    assert (factor < 1) == (scale == 1.0)
    for n, p in model.named_parameters():
        assert torch.allclose(p.grad, factor * grads[n], rtol=1e-4), n


def test_clipping_can_be_off() -> None:
    model = tiny_model()
    optimizer, grads = optimized(model, grad_clip_norm=0.0), with_gradients(model, 1e3)
    optimizer.clip(optimizer.reduce())
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())


def test_state_goes_through_a_checkpoint() -> None:
    """The step after a reload is the step without one."""
    model, other = tiny_model(), tiny_model()
    optimizer = optimized(model)
    with_gradients(model)
    optimizer.clip(optimizer.reduce())
    optimizer.update(1.0, 0.9)
    other.load_state_dict(model.state_dict())
    restored = optimized(other)
    restored.load_state_dict(optimizer.state_dict())
    for m, o in ((model, optimizer), (other, restored)):
        with_gradients(m, seed=9)
        o.clip(o.reduce())
        o.update(0.7, 0.95)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# ---- weight average --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("start", [0, 250, 340, 5000])
def test_average_is_the_formula(start: int) -> None:
    model = tiny_model()
    average, want = WeightAverage(model, 0.6), [p.detach().clone() for p in model.parameters()]
    average.steps = start
    g = torch.Generator().manual_seed(0)
    for t in range(start + 1, start + 31):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=g))
        average.update()
        weight = max(0.4, 1 / (1 + (t / 288) ** 2))  # the cap is reached at step 353
        want = [(1 - weight) * a + weight * p.detach() for a, p in zip(want, model.parameters(), strict=True)]
    assert average.steps == start + 30
    average.apply()
    assert all(torch.allclose(p, a, atol=1e-5) for p, a in zip(model.parameters(), want, strict=True))


def weight_of_step(t: int) -> float:
    """How much of the average the weights of step t are."""
    model = torch.nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, Config().ema_decay)
    average.values[0].zero_()
    average.steps = t - 1
    torch.nn.init.ones_(model.weight)
    average.update()
    return average.values[0].item()


def test_the_average_of_the_record() -> None:
    assert weight_of_step(4850) == pytest.approx(0.0035, rel=0.01)
    assert weight_of_step(20_000) == pytest.approx(0.0035, rel=1e-4)
    assert 0.3 < weight_of_step(300) < 0.7, "a short run does not average in its beginning"
    assert weight_of_step(1) > 0.99


def test_a_constant_model_stays() -> None:
    model = tiny_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    average = WeightAverage(model, 0.9965)
    for _ in range(50):
        average.update()
    average.apply()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_average_is_float32_and_reloads() -> None:
    model = GPT(tiny_config(), dtype=torch.bfloat16).place(torch.device("cpu"))
    average = WeightAverage(model, 0.9965)
    assert {v.dtype for v in average.values} == {torch.float32}
    assert set(average.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        model.tok_emb.weight.add_(1)
    average.update()
    other = WeightAverage(model, 0.9965)
    other.load({k: v.clone() for k, v in average.state_dict().items()}, average.steps)
    for a in (average, other):
        a.update()
    assert other.steps == 2
    assert all(torch.equal(x, y) for x, y in zip(average.values, other.values, strict=True))
    average.apply()
    assert model.tok_emb.weight.dtype == torch.bfloat16


# ---- priming ---------------------------------------------------------------------------------------------------------
def snapshot(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: snapshot(v) for k, v in value.items()}
    return [snapshot(v) for v in value] if isinstance(value, list | tuple) else value


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "after a step"])
def test_priming_rolls_everything_back(dataset: Path, trained: bool) -> None:
    """Weights, Adam's moments and Muon's momentum, exactly: the public script kept the momentum of its warm-up."""
    cfg, run = tiny_config(data_path=dataset, warmup_steps=2), LoneRun()
    model = tiny_model(data_path=dataset)
    optimizer = Optimizer(model, cfg, run)
    if trained:
        with_gradients(model)
        optimizer.clip(optimizer.reduce())
        optimizer.update(1.0, 0.9)
    weights, state = snapshot(model.state_dict()), snapshot(optimizer.state_dict())
    seen = []
    model.register_forward_pre_hook(lambda m, _: seen.append(m.looped))
    train_gpt.prime(cfg, run, model, optimizer, train_gpt.MicroBatch(model))
    assert seen == 16 * [False] + 16 * [True], "both graphs, two steps of eight micro-batches each"
    assert equal(snapshot(model.state_dict()), weights)
    assert any(m.any() for m in optimizer.momentum) == trained
    assert equal(optimizer.state_dict()["momentum"], state["momentum"])
    after, before = optimizer.state_dict()["adam"], state["adam"]
    assert equal(after["state"], before["state"])
    assert model.looped == 0
    assert all(p.grad is None for p in model.parameters())


def test_priming_does_not_change_the_first_step(dataset: Path) -> None:
    results = []
    for warmup in (0, 1):
        cfg, run = tiny_config(data_path=dataset, warmup_steps=warmup), LoneRun()
        model = tiny_model()
        optimizer = Optimizer(model, cfg, run)
        work = train_gpt.MicroBatch(model)
        train_gpt.prime(cfg, run, model, optimizer, work)
        loader = train_gpt.TrainLoader(cfg, run)
        losses = [train_gpt.train_step(work, optimizer, loader, 1.0, 0.9).item() for _ in range(2)]
        loader.close()
        results.append((losses, snapshot(model.state_dict())))
    assert equal(*results)


def test_a_train_step_is_the_gradient_of_the_mean_loss(dataset: Path) -> None:
    cfg, run, model = tiny_config(data_path=dataset, grad_clip_norm=0.0), LoneRun(), tiny_model()
    twin = tiny_model()
    loader = train_gpt.TrainLoader(cfg, run)
    loss = train_gpt.train_step(train_gpt.MicroBatch(model), Optimizer(model, cfg, run), loader, 1.0, 0.9)
    loader.close()
    again = train_gpt.TrainLoader(cfg, run)
    want = torch.stack([twin(x, y, docs=d) for x, y, d in again.next_step()]).mean()
    again.close()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    # A first Muon step depends on the gradient's direction alone; compare the weights it leads to.
    optimizer = Optimizer(twin, cfg, run)
    optimizer.clip(optimizer.reduce())
    optimizer.update(1.0, 0.9)
    moved = max((a - b).abs().max().item() for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert moved < 2e-3


class Replayed(train_gpt.GraphedMicroBatch):
    """A graph played on the CPU: a replay writes the loss and the gradients to the same memory each time."""

    def record(self, batch: tuple[Tensor, Tensor, train_gpt.Docs], tensors: Sequence[Tensor]) -> None:
        self.inputs, self.graph, self.loss = [t.clone() for t in tensors], self, torch.zeros(())
        self.docs, self.grads = batch[2], {p: torch.zeros_like(p) for p in self.model.parameters()}

    def replay(self) -> None:
        tokens, targets, ends = self.inputs
        loss = self.model(tokens, targets, docs=self.docs._replace(cu_seqlens=ends)) / train_gpt.MICRO_STEPS
        self.loss.copy_(loss.detach())
        for mine, grad in zip(self.grads.values(), torch.autograd.grad(loss, list(self.grads)), strict=True):
            mine.copy_(grad)


def test_gradients_of_a_graph_add_up_as_without_one(dataset: Path) -> None:
    results = []
    for kind in (train_gpt.MicroBatch, Replayed):
        cfg, run, model = tiny_config(data_path=dataset), LoneRun(), tiny_model()
        optimizer, loader, work = Optimizer(model, cfg, run), train_gpt.TrainLoader(cfg, run), kind(model)
        losses = []
        for model.looped in (0, 0, 1):  # a graph of each loop mode; the second step has all its gradients from a graph
            losses.append(train_gpt.train_step(work, optimizer, loader, 1.0, 0.9).item())
        loader.close()
        results.append((losses, snapshot(model.state_dict())))
    assert equal(*results)


def test_training_lowers_the_loss() -> None:
    model, tokens = tiny_model(), torch.from_numpy(documents((20, 12)).astype("int64"))[None]
    targets, docs = tokens.roll(-1, 1), packed((20, 12))
    optimizer, losses = optimized(model), []
    for _ in range(12):
        loss = model(tokens, targets, docs=docs)
        loss.backward()
        optimizer.clip(optimizer.reduce())
        optimizer.update(1.0, 0.9)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
