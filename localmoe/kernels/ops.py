"""The op contract: what every device must compute. Calling an op records it into a Program; the numpy twin is in
`reference`.

Rules for all: arrays are float32 unless said; a dot product accumulates in float32 or better; weights of any block
format count as their dequantised values; a device may quantise the *input* of `linear`, `head_linear` and `experts` to
8 bits when the weight is quantised, never when it is F32, F16 or BF16, and never for a router. Results do not depend
on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from localmoe.formats import Weight
from localmoe.kernels.program import (
    CacheLayer,
    Op,
    Program,
    RopeTable,
    Router,
    StateLayer,
    Temperature,
    Tensor,
    contiguous,
)

GLU_KINDS = ("silu", "sigmoid", "gelu", "clamped_swish", "product")
SCORES = ("softmax", "sigmoid", "sparsemixer")


class Cache:
    """The KV cache and the recurrent states while tracing: what is appended to a layer fixes its layout."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self.layers: list[CacheLayer] = []
        self.states: list[StateLayer] = []

    def append(self, key: Tensor, value: Tensor | None = None, *, value_prefix: int = 0) -> CacheLayer:
        """Write this step's keys (T, K, dk) and values (T, K, dv) behind those of earlier steps, as the next layer.

        Without `value`, the first `value_prefix` elements of a key are its value (absorbed MLA: one latent serves as
        both).
        """
        self._ops.check(
            value is None or value.shape[:2] == key.shape[:2], "cache_append", "keys and values differ", key, value
        )
        width = None if value is None else value.shape[2]
        layer = CacheLayer(len(self.layers), key.shape[1], key.shape[2], width, value_prefix)
        self.layers.append(layer)
        self._ops.record("cache_append", (key,) if value is None else (key, value), (), cache=layer)
        return layer

    def state(self, matrices: int, rows: int, columns: int) -> StateLayer:
        """The next recurrent state, for one op that reads and renews it with each token."""
        layer = StateLayer(len(self.states), (matrices, rows, columns))
        self.states.append(layer)
        return layer


class Ops:
    """Records the ops that a family's `forward` calls, with their shapes checked."""

    def __init__(self, tokens: int, *, all_rows: bool = False) -> None:
        """Trace for steps of up to `tokens` tokens; `all_rows` keeps the logits of every row, not of the last alone."""
        self.tokens = tokens
        self.all_rows = all_rows
        self._ops: list[Op] = []
        self._buffers: list[Tensor] = []
        self.cache = Cache(self)
        self.input = self.new((tokens,), "i32")

    def embed(self, weight: Weight, tokens: Tensor) -> Tensor:
        """Rows of the embedding (V, D) for token ids (T,) -> (T, D)."""
        return self.record("embed", (tokens,), (self.new((self.tokens, weight.columns)),), (weight,))[0]

    def rms_norm(self, x: Tensor, weight: Weight | None, epsilon: float) -> Tensor:
        """x / sqrt(mean(x²) + ε) · weight over the last axis (a row, or each head) -> shape of x. Zhang & Sennrich
        2019."""
        self.check(weight is None or weight.shape == x.shape[-1:], "rms_norm", "width", x, weight)
        return self.record("rms_norm", (x,), (self.new(x.shape),), (weight,) if weight else (), epsilon=epsilon)[0]

    def layer_norm(self, x: Tensor, weight: Weight, bias: Weight | None, epsilon: float) -> Tensor:
        """(x - mean(x)) / sqrt(var(x) + ε) · weight + bias over the last axis -> shape of x. Ba et al. 2016. Heads
        (T, H, d) may have a weight each, (H, d)."""
        fits = weight.shape in (x.shape[-1:], x.shape[1:]) and (bias is None or bias.shape == weight.shape)
        self.check(fits, "layer_norm", "width", x, weight, bias)
        weights = (weight,) if bias is None else (weight, bias)
        return self.record("layer_norm", (x,), (self.new(x.shape),), weights, epsilon=epsilon)[0]

    def linear(self, x: Tensor, weight: Weight, bias: Weight | None = None, *, exact: bool = False) -> Tensor:
        """x (T, K) times weight (N, K) transposed, plus bias (N,) -> (T, N)."""
        return self.linears(x, (weight,), (bias,), exact=exact)[0]

    def linears(
        self, x: Tensor, weights: Sequence[Weight], biases: Sequence[Weight | None] = (), *, exact: bool = False
    ) -> tuple[Tensor, ...]:
        """Several `linear` of one input, which a device quantises once. `exact`: the input stays float32 (routers)."""
        for w in weights:
            self.check(w.shape[1:] == x.shape[1:], "linear", "contraction width", x, w)
        kept = tuple(biases) or (None,) * len(weights)
        outputs = tuple(self.new((x.shape[0], w.rows)) for w in weights)
        present = tuple(b for b in kept if b is not None)
        flags = tuple(b is not None for b in kept)
        return self.record("linear", (x,), outputs, (*weights, *present), biased=flags, exact=exact)

    def head_linear(self, x: Tensor, weight: Weight, *, transposed: bool = False) -> Tensor:
        """x (T, H, a) times each head's matrix (H, b, a), or its transpose (H, a, b) -> (T, H, b): MLA's absorption."""
        width, out = (weight.shape[1], weight.shape[2]) if transposed else (weight.shape[2], weight.shape[1])
        self.check((weight.shape[0], width) == x.shape[1:], "head_linear", "heads and width", x, weight)
        result = self.new((x.shape[0], x.shape[1], out))
        return self.record("head_linear", (x,), (result,), (weight,), transposed=transposed)[0]

    def rope(self, x: Tensor, table: RopeTable) -> Tensor:
        """Turn the leading elements of each head of (T, H, d) by the token's position; the rest is copied."""
        self.check(2 * table.inverse_frequencies.size <= x.shape[-1], "rope", "head width", x)
        return self.record("rope", (x,), (self.new(x.shape),), table=table)[0]

    def concat(self, a: Tensor, b: Tensor) -> Tensor:
        """(T, H, a) beside (T, H, b) -> (T, H, a + b)."""
        self.check(a.shape[:-1] == b.shape[:-1], "concat", "leading axes", a, b)
        return self.record("concat", (a, b), (self.new((*a.shape[:-1], a.shape[-1] + b.shape[-1])),))[0]

    def attention(
        self,
        q: Tensor,
        cache: CacheLayer,
        *,
        scale: float,
        window: int = 0,
        chunk: int = 0,
        temperature: Temperature | None = None,
        softcap: float = 0.0,
        sinks: Weight | None = None,
        selected: Tensor | None = None,
    ) -> Tensor:
        """Causal softmax attention of q (T, H, dk) over everything in the cache layer, this step included -> (T, H,
        dv).

        Head h reads kv-head h // (H / K). `window` > 0: a query sees its last `window` positions only, itself included;
        `chunk` > 0: those from the last multiple of `chunk` on (Llama 4). `softcap` > 0: scores become softcap ·
        tanh(score / softcap). `sinks` (H,): one more logit for each head, in the softmax's sum but without a value
        (gpt-oss). `selected`: a query sees only the positions that `select` chose for it.
        """
        self.check(q.shape[1] % cache.heads == 0 and q.shape[2] == cache.key_width, "attention", "heads or width", q)
        self.check(sinks is None or sinks.shape == q.shape[1:2], "attention", "sinks", q, sinks)
        assert not (window and chunk), "a layer has a window or chunks"
        assert selected is None or not (window or chunk or sinks), "chosen positions are all that limits a layer"
        out = self.new((q.shape[0], q.shape[1], cache.value_width or cache.value_prefix))
        seen = {"window": window, "chunk": chunk, "temperature": temperature, "softcap": softcap}
        inputs = (q,) if selected is None else (q, selected)
        self.record("attention", inputs, (out,), (sinks,) if sinks else (), cache=cache, scale=scale, **seen)
        return out

    def select(self, q: Tensor, weights: Tensor, cache: CacheLayer, count: int) -> Tensor:
        """The `count` positions of each token with the highest scores, itself and earlier ones: q (T, I, d), weights
        (T, I), keys (T, 1, d) of the cache layer -> int32 (T, count), ascending, the rest -1.

        score = Σ over the I heads of weight · max(q · key, 0); of equal ones the earlier is chosen. DeepSeek-V3.2
        (2025), section 2.1.
        """
        fits = cache.heads == 1 and q.shape[2] == cache.key_width and weights.shape == q.shape[:2] and count > 0
        self.check(fits, "select", "heads or width", q, weights)
        ids = self.new((q.shape[0], count), "i32")
        return self.record("select", (q, weights), (ids,), cache=cache)[0]

    def causal_conv(self, parts: Sequence[Tensor], weight: Weight, state: StateLayer) -> Tensor:
        """Heads (T, H, d) of several parts beside one another, C channels in all, through a causal convolution of each
        channel and silu -> (T, C).

        y[t, c] = silu(Σ weight[c, j] · x[t - n + 1 + j, c]) with weight (C, n); `state` (1, n - 1, C) holds the inputs
        of the last n - 1 tokens.
        """
        channels, taps = sum(x.shape[1] * x.shape[2] for x in parts), weight.columns
        fits = taps > 1 and weight.shape == (channels, taps) and state.shape == (1, taps - 1, channels)
        self.check(fits, "causal_conv", f"channels of state {state.shape}", *parts, weight)
        out = self.new((parts[0].shape[0], channels))
        return self.record("causal_conv", tuple(parts), (out,), (weight,), state=state)[0]

    def delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        beta: Tensor,
        decay: Tensor,
        rate: Weight,
        bias: Weight,
        state: StateLayer,
        *,
        tiled: bool = False,
    ) -> Tensor:
        """Gated delta rule: q and k (T, K, dk), v (T, H, dv) -> (T, H, dv). Yang, Kautz and Hatamizadeh
        2024, Gated Delta Networks.

        For each head, with k and q divided by sqrt(Σ x² + 1e-6), q also by √dk, β = sigmoid(beta) and α = exp(rate ·
        softplus(decay + bias)): S becomes α S, then S + k (β (v - Sᵀ k))ᵀ; the result is Sᵀ q. Beta and decay are (T,
        H) in any two axes behind T, (T, G, H / G); rate (negative) and bias are (H,), `state` (H, dk, dv) is S. Head h
        reads key h // (H / K), or h % K if `tiled`.
        """
        heads, keys = value.shape[1], key.shape[1]
        fits = query.shape == key.shape and heads % keys == 0 and state.shape == (heads, key.shape[2], value.shape[2])
        self.check(fits, "delta_rule", f"heads or widths of state {state.shape}", query, key, value)
        for gate in (beta, decay):
            self.check(len(gate.shape) == 3 and gate.shape[1] * gate.shape[2] == heads, "delta_rule", "gates", gate)
        self.check(rate.shape == bias.shape == (heads,), "delta_rule", "rate and bias", rate, bias)
        inputs = (query, key, value, beta, decay)
        out = self.new(value.shape)
        return self.record("delta_rule", inputs, (out,), (rate, bias), state=state, tiled=tiled)[0]

    def gelu(self, x: Tensor) -> Tensor:
        """x · (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2 -> shape of x. Hendrycks & Gimpel 2016, their approximation."""
        return self.record("gelu", (x,), (self.new(x.shape),))[0]

    def scale(self, x: Tensor, factor: float, weight: Weight | None = None) -> Tensor:
        """x · factor, and times the one number of `weight` if there is one -> shape of x."""
        self.check(weight is None or weight.elements == 1, "scale", "one number", x, weight)
        return self.record("scale", (x,), (self.new(x.shape),), (weight,) if weight else (), factor=factor)[0]

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """cap · tanh(x / cap) -> shape of x. Gemma Team 2024, section 2."""
        return self.record("softcap", (x,), (self.new(x.shape),), cap=cap)[0]

    def glu(self, gate: Tensor, up: Tensor, kind: str = "silu") -> Tensor:
        """act(gate) · up -> shape of up; a gate of width 1 is spread over the row. Shazeer 2020.

        "silu": gate · sigmoid(gate); "sigmoid"; "gelu": as `gelu`; "clamped_swish": with gate at most 7 and up within
        ±7, gate · sigmoid(1.702 gate) · (up + 1) (gpt-oss); "product": gate · up.
        """
        self.check(kind in GLU_KINDS and gate.shape in (up.shape, (up.shape[0], 1)), "glu", kind, gate, up)
        return self.record("glu", (gate, up), (self.new(up.shape),), kind=kind)[0]

    def route(
        self, logits: Tensor, router: Router, bias: Weight | None = None, factors: Weight | None = None
    ) -> tuple[Tensor, Tensor]:
        """Router logits (T, E) -> ids (T, k) of int32 and shares (T, k), best first; ties go to the lower id.

        scores = softmax or sigmoid of the logits. The choice is made on scores + bias, or with `choice` "logits" on the
        logits, which a sigmoid may round to the same 1: with groups > 1 only experts of
        the best `groups_used` groups stand (a group's score is its largest, "max", or the sum of its two largest,
        "top2"; the others are -inf). Shares are the *unbiased* scores of the chosen, divided by their sum if
        `normalise`, times `scale`, and times the expert's own of `factors` (E,) if there are any.

        "sparsemixer" (with `choice` "logits", Liu et al. 2024): one after the other; a share is the softmax, over those
        not chosen before whose logit x lies within 2 · `jitter` · max(|x|, best) of the best one.
        """
        fits = 0 < router.used <= logits.shape[1] and logits.shape[1] % router.groups == 0
        self.check(fits and 0 < router.groups_used <= router.groups, "route", f"{router}", logits)
        assert router.score in SCORES and (router.score != "sparsemixer" or router.choice == "logits")
        ids, shares = self.new((logits.shape[0], router.used), "i32"), self.new((logits.shape[0], router.used))
        weights = tuple(w for w in (bias, factors) if w is not None)
        self.record("route", (logits,), (ids, shares), weights, router=router, biased=bias is not None)
        return ids, shares

    def experts(
        self,
        x: Tensor,
        ids: Tensor,
        shares: Tensor,
        gate: Weight,
        up: Weight,
        down: Weight,
        kind: str = "silu",
        *,
        biases: tuple[Weight, Weight, Weight] | None = None,
        weighted: bool = True,
    ) -> Tensor:
        """Σ over the chosen experts of share · down(act(gate x) · up x): x (T, D), gate and up (E, F, D), down (E, D,
        F) -> (T, D).

        `biases` are added to gate x, up x and the result of down: (E, F), (E, F), (E, D). Without `weighted` every
        share counts as 1. The sum runs in the order of the ids' columns. One op: residency, grouping and fusion stay
        below this line.
        """
        expected = (down.shape[0], down.shape[2], down.shape[1])
        self.check(gate.shape == up.shape == expected and gate.columns == x.shape[1], "experts", "shapes", x, gate)
        for weight, bias in zip((gate, up, down), biases or (), strict=False):
            self.check(bias.shape == weight.shape[:2], "experts", "biases", weight, bias)
        weights, how = (gate, up, down, *(biases or ())), {"kind": kind, "weighted": weighted}
        return self.record("experts", (x, ids, shares), (self.new(x.shape),), weights, **how)[0]

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b, same shapes."""
        self.check(a.shape == b.shape, "add", "shapes differ", a, b)
        return self.record("add", (a, b), (self.new(a.shape),))[0]

    def add_positions(self, x: Tensor, weight: Weight) -> Tensor:
        """x (T, D) plus the rows of weight (S, D) of the tokens' positions; S bounds the context -> (T, D)."""
        self.check(weight.columns == x.shape[1], "add_positions", "width", x, weight)
        return self.record("add_positions", (x,), (self.new(x.shape),), (weight,))[0]

    def logit_rows(self, x: Tensor) -> Tensor:
        """(T, D) -> the rows whose logits are wanted: the step's last token (1, D), or all of them when scoring."""
        if self.all_rows or self.tokens == 1:
            return x
        return self.record("last_row", (x,), (self.new((1, x.shape[1])),))[0]

    def finish(self, output: Tensor) -> Program:
        """The recorded Program, whose result is `output` (rows, V)."""
        cache, states = tuple(self.cache.layers), tuple(self.cache.states)
        return Program(self.tokens, tuple(self._ops), self.input, output, tuple(self._buffers), cache, states)

    def new(self, shape: tuple[int, ...], dtype: str = "f32") -> Tensor:
        tensor = Tensor(len(self._buffers), shape, contiguous(shape), 0, dtype)
        self._buffers.append(tensor)
        return tensor

    def record(
        self,
        name: str,
        inputs: tuple[Tensor, ...],
        outputs: tuple[Tensor, ...],
        weights: tuple[Weight, ...] = (),
        **attributes: Any,
    ) -> tuple[Tensor, ...]:
        self._ops.append(Op(name, inputs, outputs, weights, attributes))
        return outputs

    def check(self, sound: bool, op: str, what: str, *operands: Tensor | Weight | None) -> None:
        """A mismatch here is a mistake in an architecture file, not in a user's model: weights were checked when
        loaded."""
        if not sound:
            raise ValueError(f"{op}: {what}: {[o.shape for o in operands if o is not None]}")


def trace(forward: Callable[[Ops], Tensor], tokens: int, *, all_rows: bool = False) -> Program:
    """Run a forward pass once with recording ops: `forward(ops)` returns the logits tensor."""
    ops = Ops(tokens, all_rows=all_rows)
    return ops.finish(forward(ops))
