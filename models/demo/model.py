"""The demo model in torch: GGUF's `deepseek2` (MLA, shared and routed experts), weights by GGUF name; knows no text.

Sources: DeepSeek-V2 (arXiv 2405.04434, multi-head latent attention), DeepSeek-V3 (arXiv 2412.19437, sigmoid router with
a selection bias).
B sequences, T tokens, D hidden, H heads, R latent width, E experts, F expert width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of the demo model; every row a K-quant could store is a multiple of 256 wide, except `attn_k_b` (64)."""

    vocabulary: int = 4096
    layers: int = 5
    dense_layers: int = 1
    hidden: int = 256
    heads: int = 4
    latent: int = 256
    nope: int = 64
    rope: int = 32
    value: int = 64
    dense_width: int = 768
    experts: int = 16
    used: int = 2
    expert_width: int = 256
    shared: int = 1
    epsilon: float = 1e-6
    theta: float = 10_000.0
    context: int = 512


def weight_shapes(s: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every stored tensor, in numpy's order (rows, columns)."""
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (s.vocabulary, s.hidden),
        "output_norm.weight": (s.hidden,),
    }
    for layer in range(s.layers):
        sparse = layer >= s.dense_layers
        part: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (s.hidden,),
            "attn_q.weight": (s.heads * (s.nope + s.rope), s.hidden),
            "attn_kv_a_mqa.weight": (s.latent + s.rope, s.hidden),
            "attn_kv_a_norm.weight": (s.latent,),
            "attn_k_b.weight": (s.heads, s.latent, s.nope),
            "attn_v_b.weight": (s.heads, s.value, s.latent),
            "attn_output.weight": (s.hidden, s.heads * s.value),
            "ffn_norm.weight": (s.hidden,),
        }
        if sparse:
            part |= {"ffn_gate_inp.weight": (s.experts, s.hidden), "exp_probs_b.bias": (s.experts,)}
            part |= {f"ffn_{name}_exps.weight": (s.experts, s.expert_width, s.hidden) for name in ("gate", "up")}
            part |= {"ffn_down_exps.weight": (s.experts, s.hidden, s.expert_width)}
        width, suffix = (s.shared * s.expert_width, "_shexp") if sparse else (s.dense_width, "")
        part |= {f"ffn_{name}{suffix}.weight": (width, s.hidden) for name in ("gate", "up")}
        part |= {f"ffn_down{suffix}.weight": (s.hidden, width)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in part.items()}
    return shapes


def initial_weights(s: Shape, seed: int) -> Weights:
    """Random weights: norms one, biases and residual outputs zero, the rest normal with the usual fan-in spread."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, shape in weight_shapes(s).items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(shape)
        elif name.endswith(".bias") or "attn_output" in name or "ffn_down" in name:
            weights[name] = torch.zeros(shape)
        else:
            fan_in = s.latent if "attn_k_b" in name else shape[-1]
            spread = 0.02 if name == "token_embd.weight" else 0.6 * fan_in**-0.5
            weights[name] = torch.randn(shape, generator=generator) * spread
        weights[name].requires_grad_(not name.endswith(".bias"))
    return weights


class GroupedLinear(torch.autograd.Function):
    """y[a:b] = x[a:b] @ weight[e].T for the rows of expert e; rows come sorted by expert, `counts` of each."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        out = x.new_empty(x.shape[0], weight.shape[1])
        start = 0
        for expert, count in enumerate(counts):
            torch.mm(x[start : start + count], weight[expert].T, out=out[start : start + count])
            start += count
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        start = 0
        for expert, count in enumerate(ctx.counts):
            rows = slice(start, start + count)
            torch.mm(grad[rows], weight[expert], out=grad_x[rows])
            torch.mm(grad[rows].T, x[rows], out=grad_weight[expert])
            start += count
        return grad_x, grad_weight, None


def rope_table(s: Shape, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position and pair, each (T, rope / 2), float32."""
    frequency = s.theta ** (-torch.arange(0, s.rope, 2, dtype=torch.float64) / s.rope)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate_pairs(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rope over adjacent pairs of the last axis; x is (B, T, H, rope)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosine[:, None], sine[:, None]
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(-2).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight).to(dtype)


def attention(s: Shape, w: Weights, x: Tensor, cosine: Tensor, sine: Tensor, dtype: torch.dtype) -> Tensor:
    """MLA in its expanded form; x (B, T, D) float32, returns the residual's addend (B, T, D)."""
    batch, length, _ = x.shape
    h = rms_norm(x, w["attn_norm.weight"], s.epsilon, dtype)
    q = (h @ w["attn_q.weight"].to(dtype).T).view(batch, length, s.heads, s.nope + s.rope)
    latent, k_rope = (h @ w["attn_kv_a_mqa.weight"].to(dtype).T).split((s.latent, s.rope), -1)
    latent = rms_norm(latent.float(), w["attn_kv_a_norm.weight"], s.epsilon, dtype)  # (B, T, R)
    k_b = w["attn_k_b.weight"].to(dtype).transpose(0, 1).reshape(s.latent, s.heads * s.nope)
    v_b = w["attn_v_b.weight"].to(dtype).reshape(s.heads * s.value, s.latent)
    k_nope = (latent @ k_b).view(batch, length, s.heads, s.nope)
    value = (latent @ v_b.T).view(batch, length, s.heads, s.value)
    q_nope, q_rope = q.split((s.nope, s.rope), -1)
    q = torch.cat((q_nope, rotate_pairs(q_rope, cosine, sine)), -1).transpose(1, 2)
    k_rope = rotate_pairs(k_rope.unsqueeze(2), cosine, sine).expand(-1, -1, s.heads, -1)
    k = torch.cat((k_nope, k_rope), -1).transpose(1, 2)
    # torch's fast CPU kernel wants values as wide as keys
    value = F.pad(value, (0, s.nope + s.rope - s.value)).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(q, k, value, is_causal=True)[..., : s.value]
    return (mixed.transpose(1, 2).reshape(batch, length, -1) @ w["attn_output.weight"].to(dtype).T).float()


def gated(h: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU of (N, D) with weights already in h's type."""
    return (F.silu(h @ gate.T) * (h @ up.T)) @ down.T


def route(s: Shape, w: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen expert ids and shares, both (N, used), in float32: the bias takes part in the choice only."""
    score = torch.sigmoid(x @ w["ffn_gate_inp.weight"].T)
    chosen = (score.detach() + w["exp_probs_b.bias"]).topk(s.used, dim=-1).indices
    share = score.gather(-1, chosen)
    return chosen, share / share.sum(-1, keepdim=True)


def experts(s: Shape, w: Weights, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Shared and routed experts of x (N, D): their sum (N, D) in float32, and how many tokens each expert got (E,)."""
    chosen, share = route(s, w, x)
    h = x.to(dtype)
    order = chosen.flatten().argsort()
    load = torch.bincount(chosen.flatten(), minlength=s.experts)
    counts = load.tolist()
    rows = h[order // s.used]  # (N * used, D), sorted by expert
    gate_up = torch.cat((w["ffn_gate_exps.weight"], w["ffn_up_exps.weight"]), 1).to(dtype)
    gate, up = GroupedLinear.apply(rows, gate_up, counts).chunk(2, -1)
    out = GroupedLinear.apply(F.silu(gate) * up, w["ffn_down_exps.weight"].to(dtype), counts)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel())
    routed = (out[place].view(-1, s.used, s.hidden).float() * share[..., None]).sum(1)
    shared = gated(h, *(w[f"ffn_{name}_shexp.weight"].to(dtype) for name in ("gate", "up", "down")))
    return routed + shared.float(), load


def forward(
    s: Shape, weights: Weights, tokens: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor]]:
    """Hidden states after the last norm, (B, T, D) in `dtype`, and the load of each sparse layer's experts."""
    batch, length = tokens.shape
    cosine, sine = rope_table(s, length)
    x = F.embedding(tokens, weights["token_embd.weight"])
    loads = []
    for layer in range(s.layers):
        prefix = f"blk.{layer}."
        w = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        x = x + attention(s, w, x, cosine, sine, dtype)
        h = rms_norm(x, w["ffn_norm.weight"], s.epsilon, torch.float32).view(-1, s.hidden)
        if layer < s.dense_layers:
            y = gated(h.to(dtype), *(w[f"ffn_{name}.weight"].to(dtype) for name in ("gate", "up", "down"))).float()
        else:
            y, load = experts(s, w, h, dtype)
            loads.append(load)
        x = x + y.view(batch, length, s.hidden)
    return rms_norm(x, weights["output_norm.weight"], s.epsilon, dtype), loads


def logits(s: Shape, weights: Weights, tokens: Tensor) -> Tensor:
    """Logits of every position in float32, (B, T, V); the head is `output.weight`, or else the embedding."""
    hidden, _ = forward(s, weights, tokens)
    return hidden @ weights.get("output.weight", weights["token_embd.weight"]).T
