"""The model once more, as loops over tokens and heads in double precision: slow, and written from its description.

x is normed after the embedding; layer i sees its normed input times 1/sqrt(i+1); queries and keys are normed per head
and their first dimensions rotated; a head drops its component along its own value; gates multiply heads; the second
half of the layer order takes the outputs of the first half back in reverse order; the last layers run on two lanes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

import train_gpt
from train_gpt import BOS, Config

Array = np.ndarray


def norm(x: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1.2e-7)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def rotated(x: Array, position: int, c: Config, base: float) -> Array:
    """One head's vector, turned by its position in the row."""
    out, half = x.copy(), c.rope_dims // 2
    for j in range(half):
        angle = position * base ** (-2 * j / c.rope_dims)
        out[j] = x[j] * np.cos(angle) + x[j + half] * np.sin(angle)
        out[j + half] = x[j + half] * np.cos(angle) - x[j] * np.sin(angle)
    return out


def layer_order(c: Config, looped: bool) -> tuple[list[int], list[int]]:
    passes = 1 + (c.num_loops if looped else 0)
    loop = list(range(c.loop_start, c.loop_end + 1))
    order = list(range(c.loop_start)) + loop * passes + list(range(c.loop_end + 1, c.num_layers))
    return order[: len(order) // 2], order[len(order) // 2 :]


class SlowModel:
    def __init__(self, cfg: Config, state: Mapping[str, Array], looped: bool):
        self.c, self.looped = cfg, looped
        self.w = {name: np.asarray(x, np.float64) for name, x in state.items()}
        self.heads: dict[tuple[int, int, int], Array] = {}  # (layer, token, head) -> its output in the pass before

    def attention(self, n: Array, layer: int, pieces: list[int], base: float, again: int | None) -> Array:
        """again: earlier passes through this layer, None for a layer outside the loop."""
        c, w, size = self.c, self.w, self.c.model_dim // self.c.num_heads
        raw = n @ w["qo_bank"][layer].T
        queries = raw.reshape(len(n), c.num_heads, size)
        keys = (n @ w["kv_bank"][layer].T).reshape(len(n), c.num_kv_heads, size)
        values = (n @ w["kv_bank"][c.num_layers + layer].T).reshape(len(n), c.num_kv_heads, size)
        out = np.zeros((len(n), c.num_heads, size))
        for t in range(len(n)):
            for h in range(c.num_heads):
                g = h // (c.num_heads // c.num_kv_heads)
                q = rotated(norm(queries[t, h]), t, c, base) * w[f"blocks.{layer}.attn.q_gain"][h]
                seen = [s for s in range(t + 1) if pieces[s] == pieces[t]]
                scores = np.array([q @ rotated(norm(keys[s, g]), s, c, base) for s in seen]) / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                y = sum(a * values[s, g] for a, s in zip(weights / weights.sum(), seen, strict=True))
                if layer >= c.num_layers - c.xsa_last_n:
                    own = values[t, g] / np.linalg.norm(values[t, g])
                    y = y - (y @ own) * own
                if c.cross_pass_xsa_enabled and again is not None:
                    if again:
                        last = self.heads[layer, t, h]
                        beta = w["recur_xsa_beta"][again - 1, layer - c.loop_start, h]
                        y = y - beta * (y @ last) / max(last @ last, 1e-24) * last  # a lone own value leaves zero
                    self.heads[layer, t, h] = y
                if c.attn_out_gate_enabled:
                    source = raw[t] if c.attn_out_gate_src == "q" else n[t]
                    gate = w[f"blocks.{layer}.attn.attn_gate_proj.weight"][h] @ source[: c.gate_window]
                    y = y * 2 * sigmoid(gate)
                if c.gated_attn_enabled:
                    y = y * sigmoid(w[f"blocks.{layer}.attn.attn_gate_w"][h] @ n[t])
                out[t, h] = y
        return out.reshape(len(n), -1) @ w["qo_bank"][c.num_layers + layer].T

    def mlp(self, n: Array, layer: int) -> Array:
        h = n @ self.w["mlp_up_bank"][layer].T
        f = np.where(h > 0, h**2, h**2 / 4)
        if self.c.xielu_enabled:
            a_p, b_p, a_n, b_n = train_gpt.xielu_of(layer, self.c.num_layers)
            f = np.where(h > 0, a_p * h**2 + b_p * h, a_n * h**2 + b_n * h)
        return f @ self.w["mlp_down_bank"][layer].T

    def embedding(self, tokens: list[int]) -> Array:
        x = self.w["tok_emb.weight"][tokens]
        if self.c.bigram_hash_enabled:
            c = self.c
            for t, token in enumerate(tokens):
                last = token if t == 0 or token == BOS else tokens[t - 1]
                row = (c.bigram_hash_prime_a * token ^ c.bigram_hash_prime_b * last) % c.bigram_hash_buckets
                x[t] += self.w["bigram.proj.weight"][0] @ self.w["bigram.embed.weight"][row]
        if self.c.smear_gate_enabled:
            raw = x.copy()
            for t in range(1, len(tokens)):
                if tokens[t] != BOS:
                    gate = sigmoid(self.w["smear_gate.weight"][0] @ raw[t, : self.c.gate_window])
                    x[t] = raw[t] + self.w["smear_lambda"][0] * gate * raw[t - 1]
        return norm(x)

    def logits(self, tokens: list[int], pieces: list[int] | None = None) -> Array:
        """(T, V). pieces: the number of the piece that each token belongs to and attends to; None: one dense row."""
        c, w = self.c, self.w
        base = c.rope_base
        if c.rope_yarn and pieces is None and len(tokens) > c.train_seq_len:
            base *= (len(tokens) / c.train_seq_len) ** (c.rope_dims / (c.rope_dims - 2))
        pieces = pieces or [0] * len(tokens)
        encoder, decoder = layer_order(c, self.looped)
        x = x0 = self.embedding(tokens)
        mlp_lane, kept = None, []
        for position, layer in enumerate(encoder + decoder):
            slot = position - len(encoder)
            depth = (layer + 1) ** -0.5 if c.ln_scale else 1.0
            mix, attn_scale, mlp_scale = (w[f"blocks.{layer}.{k}"] for k in ("resid_mix", "attn_scale", "mlp_scale"))
            lanes = slot >= 0 and 0 < c.parallel_start_layer <= layer
            if lanes and mlp_lane is None:
                mlp_lane = x
            if slot >= 0 and kept:
                skip = w["skip_weights"][slot] * kept.pop()
                if c.skip_gates_enabled:
                    gate = sigmoid(w["skip_gates"][slot])
                    x = gate * x + (1 - gate) * skip
                else:
                    x = x + skip
            again = (encoder + decoder)[:position].count(layer) if c.loop_start <= layer <= c.loop_end else None
            before = x
            mixed = mix[0] * x + mix[1] * x0
            a = attn_scale * self.attention(depth * norm(mixed), layer, pieces, base, again)
            if lanes:
                b = mlp_scale * self.mlp(depth * norm(mlp_lane), layer)
                keep, post = w["parallel_resid_lambdas"][layer], w["parallel_post_lambdas"][layer]
                x = keep[0] * x + post[0, 0] * a + post[1, 0] * b
                mlp_lane = keep[1] * mlp_lane + post[0, 1] * a + post[1, 1] * b
            else:
                x = mixed + a
                x = x + mlp_scale * self.mlp(depth * norm(x), layer)
                if c.recur_alpha_enabled and again:
                    x = before + w["recur_alpha"][again - 1, layer - c.loop_start] * (x - before)
            if slot < 0:
                kept.append(x)
        if mlp_lane is not None:
            x = {"mean": (x + mlp_lane) / 2, "attn": x, "mlp": mlp_lane}[c.parallel_final_lane]
        return c.logit_softcap * np.tanh(norm(x) @ w["tok_emb.weight"].T / c.logit_softcap)
