"""Every op on the cpu device against its numpy twin: instruction sets, formats, odd shapes, numbers of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from programs import (
    CONTEXT,
    VOCABULARY,
    Array,
    Forward,
    Random,
    cpu_runs,
    distance,
    exactly,
    given,
    reference_runs,
    rows,
    side_by_side,
    weight,
)

from localmoe.formats import KV_FORMATS
from localmoe.kernels.cpu.device import CpuDevice
from localmoe.kernels.cpu.isa import runnable
from localmoe.kernels.ops import GLU_KINDS, Ops
from localmoe.kernels.program import RopeTable, Router, Temperature, Tensor

EXACT = 1e-5  # float32 sums in another order
ROUNDED = 2e-2  # an inner result was rounded to 8 bits
STEPS = ((1, 1), (2, 2), (33, 33), (48, 1), (48, 5), (48, 33))  # (capacity, tokens)
CASES: dict[str, tuple[Forward, float]] = {}
OpenCpu = Callable[..., CpuDevice]


def case(name: str, tolerance: float = EXACT) -> Callable[[Forward], Forward]:
    def register(forward: Forward) -> Forward:
        assert name not in CASES, name
        CASES[name] = (forward, tolerance)
        return forward

    return register


@pytest.fixture(scope="module")
def cpu() -> Iterator[OpenCpu]:
    """`cpu(isa, threads, kv_format)`: a device, kept open for the next test; an instruction set has one `Kernels`."""
    kept: dict[tuple[str, int, str], CpuDevice] = {}

    def opened(isa: str, threads: int = 2, kv_format: str = "f32") -> CpuDevice:
        if (isa, threads, kv_format) not in kept:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LOCALMOE_ISA", isa)
                device = CpuDevice(CONTEXT, kv_format, threads)
            device.kernels = next((d.kernels for (name, _, _), d in kept.items() if name == isa), device.kernels)
            kept[isa, threads, kv_format] = device
        return kept[isa, threads, kv_format]

    yield opened
    for device in kept.values():
        device.close()


for _format, _width in (
    ("F32", 257), ("F16", 40), ("BF16", 24), ("Q8_0", 96), ("Q4_0", 64), ("Q4_K", 256), ("Q6_K", 512),
):  # fmt: skip

    @case(f"embed {_format} {_width}")
    def _(ops: Ops, random: Random, format: str = _format, width: int = _width) -> Tensor:
        return ops.embed(weight(random, (VOCABULARY, width), format), ops.input)


for _width in (1, 8, 24, 40, 96, 257):

    @case(f"rms_norm of rows {_width} wide")
    def _(ops: Ops, random: Random, width: int = _width) -> Tensor:
        return ops.rms_norm(rows(ops, random, width), weight(random, (width,)), 1e-5)


@case("rms_norm of heads, weight in F16")
def _(ops: Ops, random: Random) -> Tensor:
    return ops.rms_norm(rows(ops, random, 120).heads(3), weight(random, (40,), "F16"), 1e-6).flat()


@case("rms_norm of columns, without a weight")
def _(ops: Ops, random: Random) -> Tensor:
    return ops.rms_norm(rows(ops, random, 64).columns(5, 38), None, 1e-6)


@case("rms_norm of a part of each head")
def _(ops: Ops, random: Random) -> Tensor:
    return ops.rms_norm(rows(ops, random, 96).heads(4).columns(7, 20), weight(random, (13,)), 1e-6).flat()


for _width in (1, 24, 40, 257):

    @case(f"layer_norm of rows {_width} wide")
    def _(ops: Ops, random: Random, width: int = _width) -> Tensor:
        x = given(ops, random.standard_normal((VOCABULARY, width)) + 3)
        return ops.layer_norm(x, weight(random, (width,)), weight(random, (width,), "F16"), 1e-5)


@case("layer_norm of parts of heads, each head with its own weight and no bias")
def _(ops: Ops, random: Random) -> Tensor:
    part = rows(ops, random, 96).heads(4).columns(7, 20)
    return ops.layer_norm(part, weight(random, (4, 13)), None, 1e-5).flat()


for _format, _height, _width in (
    ("F32", 1, 8), ("F32", 7, 24), ("F32", 49, 40), ("F32", 130, 257), ("F16", 25, 40), ("F16", 50, 257),
    ("BF16", 33, 96), ("Q8_0", 1, 32), ("Q8_0", 50, 96), ("Q4_0", 25, 64), ("Q4_0", 130, 544), ("Q4_K", 49, 256),
    ("Q4_K", 3, 768), ("Q6_K", 25, 512),
):  # fmt: skip

    @case(f"linear {_format} {_height} × {_width}")
    def _(ops: Ops, random: Random, format: str = _format, shape: tuple[int, int] = (_height, _width)) -> Tensor:
        return ops.linear(rows(ops, random, shape[1]), weight(random, shape, format))


@case("linear with a bias")
def _(ops: Ops, random: Random) -> Tensor:
    return ops.linear(rows(ops, random, 96), weight(random, (49, 96), "Q8_0"), weight(random, (49,), "F16"))


@case("several linears of one input, formats and biases mixed")
def _(ops: Ops, random: Random) -> Tensor:
    x, formats, heights = rows(ops, random, 256), ("Q4_K", "F16", "Q8_0", "Q4_0"), (50, 3, 24, 33)
    weights = [weight(random, (n, 256), f) for n, f in zip(heights, formats, strict=True)]
    return side_by_side(ops, ops.linears(x, weights, (None, exactly(np.arange(3)), None, exactly(np.arange(33)))))


@case("linear of columns")
def _(ops: Ops, random: Random) -> Tensor:
    x = rows(ops, random, 160)
    return side_by_side(
        ops, [ops.linear(x.columns(32, 128), weight(random, (25, 96), f)) for f in ("Q8_0", "F32", "F16")]
    )


@case("exact linear with a quantised router")
def _(ops: Ops, random: Random) -> Tensor:
    x = given(ops, random.standard_normal((VOCABULARY, 64)))  # no multiple of anything: rounding it would show
    return ops.linear(x, weight(random, (10, 64), "Q8_0"), exact=True)


@case("linear of F16 weights leaves its input exact")
def _(ops: Ops, random: Random) -> Tensor:
    return ops.linear(given(ops, random.standard_normal((VOCABULARY, 64))), weight(random, (10, 64), "F16"))


for _format, _shape in (("F32", (3, 17, 24)), ("F16", (4, 8, 40)), ("Q8_0", (2, 9, 64)), ("Q4_0", (5, 32, 32))):

    @case(f"head_linear {_format} {_shape}")
    def _(ops: Ops, random: Random, format: str = _format, shape: tuple[int, int, int] = _shape) -> Tensor:
        x = rows(ops, random, shape[0] * shape[2]).heads(shape[0])
        return ops.head_linear(x, weight(random, shape, format)).flat()

    @case(f"head_linear {_format} {_shape} transposed")
    def _(ops: Ops, random: Random, format: str = _format, shape: tuple[int, int, int] = _shape) -> Tensor:
        x = rows(ops, random, shape[0] * shape[1]).heads(shape[0])
        return ops.head_linear(x, weight(random, shape, format), transposed=True).flat()


@case("head_linear of a part of each head")
def _(ops: Ops, random: Random) -> Tensor:
    part = rows(ops, random, 192).heads(2).columns(32, 96)
    straight = ops.head_linear(part, weight(random, (2, 5, 64), "Q8_0"))
    turned = ops.head_linear(part, weight(random, (2, 64, 32), "Q8_0"), transposed=True)
    return ops.concat(straight, turned).flat()


for _layout in ("pairs", "halves"):

    @case(f"rope in {_layout}")
    def _(ops: Ops, random: Random, layout: str = _layout) -> Tensor:
        table = RopeTable((1 / 100 ** (np.arange(12) / 12)).astype(np.float32), layout)
        return ops.rope(rows(ops, random, 72).heads(3), table).flat()

    @case(f"rope in {_layout} of the first part of a part of each head, with an amplitude")
    def _(ops: Ops, random: Random, layout: str = _layout) -> Tensor:
        table = RopeTable(np.float32([1, 0.1, 0.01]), layout, 1.25)
        return ops.rope(rows(ops, random, 96).heads(3).columns(5, 18), table).flat()


@case("concat of parts of heads")
def _(ops: Ops, random: Random) -> Tensor:
    a, b = rows(ops, random, 96).heads(3), rows(ops, random, 24).heads(3)
    return ops.concat(a.columns(3, 20), b).flat()


@case("add of rows, of columns and of heads")
def _(ops: Ops, random: Random) -> Tensor:
    a, b = rows(ops, random, 72), rows(ops, random, 100)
    total = ops.add(a.columns(1, 70), b.columns(20, 89))
    heads = ops.add(a.heads(3).columns(0, 23), total.heads(3))
    return ops.add(heads.flat(), total)


@case("gelu, scale and softcap of rows, of columns and of heads")
def _(ops: Ops, random: Random) -> Tensor:
    x = given(ops, random.standard_normal((VOCABULARY, 72)) * 20)
    a, b = ops.gelu(x.columns(1, 70)), ops.softcap(x.heads(3).columns(0, 23), 8.0)
    return ops.add(ops.scale(a, -0.3), b.flat())


@case("add_positions")
def _(ops: Ops, random: Random) -> Tensor:
    return ops.add_positions(rows(ops, random, 41), weight(random, (CONTEXT, 41), "F16"))


for _kind in GLU_KINDS:

    @case(f"glu {_kind}")
    def _(ops: Ops, random: Random, kind: str = _kind) -> Tensor:
        gate = given(ops, random.standard_normal((VOCABULARY, 41)) * 60)  # from where exp vanishes to where it is vast
        return ops.glu(gate, rows(ops, random, 41), kind)

    @case(f"glu {_kind} of columns")
    def _(ops: Ops, random: Random, kind: str = _kind) -> Tensor:
        both = rows(ops, random, 80)
        return ops.glu(both.columns(0, 40), both.columns(40, 80), kind)

    @case(f"glu {_kind} with one gate a row")
    def _(ops: Ops, random: Random, kind: str = _kind) -> Tensor:
        return ops.glu(
            ops.linear(rows(ops, random, 40), weight(random, (1, 40)), exact=True), rows(ops, random, 25), kind
        )


def routed(router: Router, experts: int, bias: bool, ties: bool) -> tuple[Forward, Forward]:
    """Forward passes whose outputs are the ids and the shares."""

    def choose(ops: Ops, random: Random) -> tuple[Tensor, Tensor]:
        plain = random.standard_normal((VOCABULARY, experts)) * 2
        logits = np.round(plain) if ties else plain + (30 if router.choice == "logits" else 0)
        added = exactly(random.uniform(-1.5, 0.5, experts)) if bias else None
        return ops.route(given(ops, logits), router, added)

    return lambda ops, random: choose(ops, random)[0], lambda ops, random: choose(ops, random)[1]


for _name, _router, _experts, _bias, _ties in (
    ("softmax", Router("softmax", 2, normalise=False), 8, False, False),
    ("softmax, normalised and scaled", Router("softmax", 4, normalise=True, scale=2.5), 10, False, False),
    ("softmax of ties", Router("softmax", 4, normalise=True), 24, False, True),
    ("softmax of one expert", Router("softmax", 1, normalise=False), 5, False, False),
    ("softmax of all experts", Router("softmax", 7, normalise=False), 7, False, True),
    ("softmax with groups by their best", Router("softmax", 3, False, 16.0, 4, 2, "max"), 24, False, False),
    ("sigmoid", Router("sigmoid", 3, normalise=True), 17, False, True),
    ("sigmoid with a bias", Router("sigmoid", 4, normalise=True, scale=2.5), 40, True, False),
    (
        "sigmoid with a bias and groups by their best two",
        Router("sigmoid", 6, True, 2.5, 8, 4, "top2"),
        64,
        True,
        False,
    ),
    (
        "sigmoid by the logits, which it cannot tell apart",
        Router("sigmoid", 3, False, choice="logits"),
        9,
        False,
        False,
    ),
    ("sparsemixer", Router("sparsemixer", 2, False, choice="logits", jitter=0.2), 16, False, False),
    ("sparsemixer, all of them near", Router("sparsemixer", 3, False, choice="logits", jitter=9.0), 19, False, True),
    ("sigmoid with groups, ties", Router("sigmoid", 4, True, 1.0, 4, 2, "top2"), 32, False, True),
):
    _ids, _shares = routed(_router, _experts, _bias, _ties)
    case(f"route ids, {_name}", 0.0)(_ids)
    case(f"route shares, {_name}")(_shares)


@case("route shares, with factors of the experts")
def _(ops: Ops, random: Random) -> Tensor:
    logits, factors = given(ops, random.standard_normal((VOCABULARY, 9))), exactly(random.uniform(0.2, 3, 9))
    return ops.route(logits, Router("softmax", 3, normalise=True), factors=factors)[1]


@case("route shares, with a bias and factors")
def _(ops: Ops, random: Random) -> Tensor:
    logits, bias = given(ops, random.standard_normal((VOCABULARY, 9))), exactly(random.uniform(-1, 1, 9))
    return ops.route(logits, Router("sigmoid", 3, normalise=False), bias, exactly(random.uniform(0.2, 3, 9)))[1]


@case("scale by a number of the file")
def _(ops: Ops, random: Random) -> Tensor:
    return ops.scale(rows(ops, random, 40), 0.5, exactly([1.7]))


def mixture(
    used: int,
    shape: tuple[int, int, int],
    formats: str,
    kind: str = "silu",
    favourite: int | None = None,
    biased: bool = False,
    weighted: bool = True,
) -> Forward:
    experts, width, hidden = shape

    def forward(ops: Ops, random: Random) -> Tensor:
        x, logits = rows(ops, random, hidden), random.standard_normal((VOCABULARY, experts))
        if favourite is not None:
            logits[:, favourite] = 20
        ids, shares = ops.route(given(ops, logits), Router("softmax", used, normalise=used > 1))
        gate, up, down = formats.split()
        gates, ups = weight(random, (experts, width, hidden), gate), weight(random, (experts, width, hidden), up)
        downs, widths = weight(random, (experts, hidden, width), down), (width, width, hidden)
        biases = [weight(random, (experts, n), "F16") for n in widths] if biased else None
        how = {"biases": biases and tuple(biases), "weighted": weighted}
        return ops.experts(x, ids, shares, gates, ups, downs, kind, **how)  # type: ignore[arg-type]

    return forward


case("experts F32")(mixture(2, (4, 40, 24), "F32 F32 F32"))
case("experts F16, sigmoid")(mixture(3, (6, 24, 40), "F16 F16 F16", "sigmoid"))
case("experts most of which get no token")(mixture(1, (40, 8, 8), "F32 F32 F32"))
case("experts with biases")(mixture(3, (5, 410, 24), "F32 F16 F32", "clamped_swish", biased=True))
case("experts without shares")(mixture(2, (5, 24, 40), "F32 F32 F32", weighted=False))
case("experts Q8_0 with biases", ROUNDED)(mixture(2, (8, 96, 64), "Q8_0 Q8_0 Q8_0", "gelu", biased=True))
case("experts all chosen by every token")(mixture(5, (5, 25, 24), "F32 F16 F32"))
case("one expert gets all tokens")(mixture(1, (6, 33, 257), "F32 F32 F32", favourite=3))
case("one expert gets all tokens, and a second differs")(mixture(2, (6, 410, 24), "F32 F32 F32", favourite=5))
case("experts Q8_0", ROUNDED)(mixture(2, (8, 96, 64), "Q8_0 Q8_0 Q8_0"))
case("experts Q4_K", ROUNDED)(mixture(2, (3, 256, 256), "Q4_K Q4_K Q6_K"))
case("experts in mixed formats", ROUNDED)(mixture(3, (5, 32, 64), "Q4_0 F16 Q8_0"))


@case("experts of columns")
def _(ops: Ops, random: Random) -> Tensor:
    x, logits = rows(ops, random, 64), given(ops, random.standard_normal((VOCABULARY, 9)))
    ids, shares = ops.route(logits.columns(2, 7), Router("sigmoid", 2, normalise=True))
    gate, up, down = (weight(random, shape) for shape in ((5, 8, 40), (5, 8, 40), (5, 40, 8)))
    return ops.experts(x.columns(11, 51), ids, shares, gate, up, down)


def attended(heads: int, kv_heads: int, width: int, **how: object) -> Forward:
    def forward(ops: Ops, random: Random) -> Tensor:
        q = rows(ops, random, heads * (width + 3)).heads(heads).columns(3, width + 3)
        k, v = (
            rows(ops, random, kv_heads * width).heads(kv_heads),
            rows(ops, random, kv_heads * 2 * width).heads(kv_heads),
        )
        layer = ops.cache.append(k, v.columns(width - 1, 2 * width))
        return ops.attention(q, layer, scale=width**-0.5, **how).flat()  # type: ignore[arg-type]

    return forward


def latent(prefix: int, **how: object) -> Forward:
    """MLA in absorbed form: one key head, whose first `prefix` elements are the value."""

    def forward(ops: Ops, random: Random) -> Tensor:
        layer = ops.cache.append(rows(ops, random, 24).heads(1), value_prefix=prefix)
        return ops.attention(rows(ops, random, 5 * 24).heads(5), layer, scale=0.2, **how).flat()  # type: ignore[arg-type]

    return forward


ATTENTIONS: dict[str, Forward] = {
    "as many key heads as heads": attended(3, 3, 24),
    "grouped heads": attended(8, 2, 40),
    "one key head": attended(4, 1, 96),
    "one wide head": attended(1, 1, 257),
    "a window": attended(4, 2, 8, window=3),
    "a window of one": attended(2, 2, 8, window=1),
    "a temperature": attended(4, 2, 24, temperature=Temperature(0.5, 7)),
    "a temperature with an offset": attended(4, 2, 24, temperature=Temperature(0.5, 7, 1)),
    "a value that is a prefix of the key": latent(16),
    "a prefix of odd width": latent(9),
    "a prefix, a window and a temperature": latent(20, window=50, temperature=Temperature(0.1, 64)),
}


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("name", CASES)
def test_cpu_computes_what_the_numpy_twin_computes(cpu: OpenCpu, isa: str, name: str) -> None:
    forward, tolerance = CASES[name]
    steps = [(capacity, tokens, 9) for capacity, tokens in STEPS]
    expected = dict(zip((1, 2, 5, 33), reference_runs(forward, [(t, 9) for t in (1, 2, 5, 33)]), strict=True))
    found = cpu_runs(cpu(isa), forward, steps)
    for (capacity, tokens), answer in zip(STEPS, found, strict=True):
        floats = tolerance == ROUNDED and capacity > 1 and isa == "portable"  # elsewhere chunks meet integer GEMMs
        allowed = EXACT if floats else tolerance
        assert distance(answer, expected[tokens]) <= allowed, f"{tokens} tokens in a step of up to {capacity}"
    for threads in (1, 3):
        same = cpu_runs(cpu(isa, threads), forward, steps)
        assert all(map(np.array_equal, same, found)), f"{threads} threads change the bits"


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_sees_what_the_numpy_twin_sees(cpu: OpenCpu, isa: str, name: str, kv_format: str) -> None:
    forward = ATTENTIONS[name]
    steps = ((48, 33, 0), (1, 1, 33), (48, 5, 34), (48, 48, 39), (1, 1, 87), (48, 2, 88))
    expected = reference_runs(forward, [step[1:] for step in steps], kv_format)
    found = cpu_runs(cpu(isa, 2, kv_format), forward, steps)
    for step, answer, wanted in zip(steps, found, expected, strict=True):
        assert distance(answer, wanted) <= EXACT, step
    for threads in (1, 3):
        same = cpu_runs(cpu(isa, threads, kv_format), forward, steps)
        assert all(map(np.array_equal, same, found)), f"{threads} threads change the bits"


@pytest.mark.parametrize("name", ["grouped heads", "a prefix, a window and a temperature"])
def test_attention_over_hundreds_of_tokens_is_the_same_in_chunks_of_any_size(cpu: OpenCpu, name: str) -> None:
    forward, device = ATTENTIONS[name], cpu(runnable()[0])
    large = [(256, 256, 0), (256, 255, 256), (1, 1, 511)]
    small = [(33, min(33, 511 - at), at) for at in range(0, 511, 33)] + [(1, 1, 511)]
    whole = np.concatenate(cpu_runs(device, forward, large))
    assert np.array_equal(np.concatenate(cpu_runs(device, forward, small)), whole)
    assert distance(whole, np.concatenate(reference_runs(forward, [step[1:] for step in large]))) <= EXACT


def test_a_step_at_an_earlier_position_overwrites_the_cache_and_hides_what_stood_behind(cpu: OpenCpu) -> None:
    forward, device = ATTENTIONS["grouped heads"], cpu(runnable()[0])
    once = cpu_runs(device, forward, [(48, 20, 0), (1, 1, 20)])[-1]
    again = cpu_runs(device, forward, [(48, 20, 0), (48, 40, 20), (48, 5, 15), (1, 1, 20)])[-1]
    assert np.array_equal(once, again)


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("name", ["experts Q8_0", "one expert gets all tokens", "linear Q4_K 49 × 256", "glu silu"])
def test_a_token_of_a_chunk_does_not_depend_on_the_others(cpu: OpenCpu, isa: str, name: str) -> None:
    whole, alone, few = cpu_runs(cpu(isa), CASES[name][0], [(48, 48, 0), (48, 1, 0), (48, 7, 0)])
    assert np.array_equal(whole[:1], alone)
    assert np.array_equal(whole[:7], few)


@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_only_the_last_row_goes_on_when_one_row_of_logits_is_wanted(cpu: OpenCpu, capacity: int) -> None:
    def forward(ops: Ops, random: Random) -> Tensor:
        x = ops.logit_rows(rows(ops, random, 100).columns(4, 36))
        ids, shares = ops.route(
            ops.linear(x, weight(random, (6, 32)), exact=True), Router("softmax", 2, normalise=True)
        )
        mixed = ops.experts(x, ids, shares, *(weight(random, (6, 32, 32), "F16") for _ in range(3)))
        return ops.linear(ops.add(mixed, x), weight(random, (9, 32)))

    for tokens in range(1, capacity + 1):
        (found,) = cpu_runs(cpu(runnable()[0]), forward, [(capacity, tokens, 0)], all_rows=False)
        (expected,) = reference_runs(forward, [(tokens, 0)], all_rows=False)
        assert found.shape == (1, 9)
        assert distance(found, expected) <= EXACT


def solved_on_paper(ops: Ops, random: Random) -> Tensor:
    """Two experts of width 1, one for each token: expert 0 doubles the square of the first element, expert 1 triples
    that of the second."""
    x = given(ops, [[2, 0], [0, 1], [1, -3], [4, 4]] * (VOCABULARY // 4))
    ids, shares = ops.route(ops.linear(x, exactly([[1, 0], [0, 1]]), exact=True), Router("softmax", 1, normalise=True))
    gate = exactly([[[50, 0]], [[0, 50]]])  # sigmoid(50 x) is 1 for x ≥ 1: silu(50 x) · up x = 50 x · up x
    up = exactly([[[1, 0]], [[0, 1]]])
    down = exactly([[[0.04], [0]], [[0], [0.06]]])  # 2/50, 3/50
    return ops.experts(x, ids, shares, gate, up, down)


@pytest.mark.parametrize("isa", runnable())
@pytest.mark.parametrize("capacity", [1, 4])
def test_a_mixture_of_experts_solved_on_paper(cpu: OpenCpu, isa: str, capacity: int) -> None:
    # x = (2, 0): expert 0, 50·2 · 2 · 0.04 = 8;  (0, 1): expert 1, 50·1 · 1 · 0.06 = 3;
    # (1, -3): expert 0, 50·1 · 1 · 0.04 = 2;     (4, 4): a tie, so expert 0, 50·4 · 4 · 0.04 = 32.
    answers = {0: [8, 0], 1: [0, 3], 2: [2, 0], 3: [32, 0]}
    tokens = [5 * position % VOCABULARY % 4 for position in range(4)]
    steps = [(capacity, capacity, at) for at in range(0, 4, capacity)]
    expected = np.float32([answers[t] for t in tokens])
    for runs in (cpu_runs(cpu(isa), solved_on_paper, steps), reference_runs(solved_on_paper, [s[1:] for s in steps])):
        assert np.allclose(np.concatenate(runs), expected, rtol=1e-6)


def nearly_equal_logits(values: list[float]) -> Forward:
    return lambda ops, random: ops.route(given(ops, [values] * VOCABULARY), Router("softmax", 2, normalise=True))[0]


@pytest.mark.parametrize(
    ("logits", "chosen"),
    [([1, 1, 1, 1], [0, 1]), ([0, 2, 1, 2], [1, 3]), ([0, -0.0, 5, 0], [2, 0]), ([-100, -101, -100, -100], [0, 2])],
)
def test_ties_go_to_the_lower_id(cpu: OpenCpu, logits: list[float], chosen: list[int]) -> None:
    (found,) = cpu_runs(cpu(runnable()[0]), nearly_equal_logits(logits), [(1, 1, 0)])
    assert found.tolist() == [chosen]


def test_a_bias_steers_the_choice_and_stays_out_of_the_shares(cpu: OpenCpu) -> None:
    def shares(ops: Ops, random: Random) -> Tensor:
        logits, bias = given(ops, [[2, 1, 0, -1]] * VOCABULARY), exactly([-5, 0, 0, 5])
        return ops.route(logits, Router("sigmoid", 2, normalise=False, scale=10), bias)[1]

    sigmoids: Array = 10 / (1 + np.exp(-np.float32([[-1, 1]])))
    (found,) = cpu_runs(cpu(runnable()[0]), shares, [(1, 1, 0)])
    assert distance(found, sigmoids) <= EXACT
