"""Attention on the cpu over deep caches: against the formula in float64, across every border its kernels cut at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from programs import HADAMARD, VOCABULARY, cache_rows, cache_values, distance, exactly, given, ids

from localmoe.formats import KV_FORMATS
from localmoe.kernels.cache_blocks import decoded, encoded
from localmoe.kernels.cpu.attention_decode import CHUNK, HEADS
from localmoe.kernels.cpu.attention_prefill import BLOCK
from localmoe.kernels.cpu.device import CpuDevice
from localmoe.kernels.cpu.isa import runnable
from localmoe.kernels.ops import Ops, trace
from localmoe.kernels.program import CacheLayer, Program, Temperature, Tensor
from localmoe.kernels.reference_weights import dequantise

Array = npt.NDArray[np.generic]
CONTEXT = 3 * CHUNK + 37
EXACT = 5e-6  # float32 sums of up to 1600 values in another order than float64's


@dataclass(frozen=True)
class Layer:
    """An attention layer; without a value width the first `prefix` elements of a key are its value."""

    heads: int = 8
    kv_heads: int = 2
    width: int = 40
    value_width: int | None = 24
    prefix: int = 0
    window: int = 0
    temperature: Temperature | None = None
    scale: float = 0.2
    chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False

    @property
    def values(self) -> int:
        return self.value_width or self.prefix

    def queries(self) -> npt.NDArray[np.float32]:
        random = np.random.default_rng(self.heads)
        return random.standard_normal((VOCABULARY, self.heads * self.width)).astype(np.float32)

    def sink_logits(self) -> npt.NDArray[np.float32]:
        return np.linspace(-9, 9, self.heads, dtype=np.float32)  # some far below every score, some far above

    def program(self, tokens: int) -> Program:
        def forward(ops: Ops) -> Tensor:
            def rows(width: int) -> Tensor:
                table = np.random.default_rng(width).standard_normal((VOCABULARY, self.kv_heads * width))
                return given(ops, table).heads(self.kv_heads)

            value = None if self.value_width is None else rows(self.value_width)
            layer = ops.cache.append(rows(self.width), value, value_prefix=self.prefix)
            q = given(ops, self.queries()).heads(self.heads)
            how = {"scale": self.scale, "window": self.window, "temperature": self.temperature, "chunk": self.chunk}
            sinks = exactly(self.sink_logits()) if self.sinks else None
            return ops.attention(q, layer, softcap=self.softcap, sinks=sinks, **how).flat()  # type: ignore[arg-type]

        return trace(forward, tokens, all_rows=True)

    def expected(self, device: CpuDevice, layer: CacheLayer, tokens: int, position: int) -> Array:
        """softmax(scale · q Kᵀ) V in float64, from what the cache holds after the step."""
        stored, widths = device.cache(layer), (self.width, self.values)
        keys, values = (x if x is None else cache_values(x, device.kv, d) for x, d in zip(stored, widths, strict=True))
        group, rows = self.heads // self.kv_heads, []
        for at, token in zip(range(position, position + tokens), ids(tokens, position), strict=True):
            first = max(0, at + 1 - self.window) if self.window else at // self.chunk * self.chunk if self.chunk else 0
            warmth, t = self.scale, self.temperature
            if t:
                warmth *= 1 + t.scale * np.log1p(at // t.length)
            q = self.queries()[token].reshape(self.kv_heads, group, self.width).astype(np.float64)
            k = keys[:, first : at + 1]
            v = (keys if values is None else values)[:, first : at + 1, : self.values]
            scores = warmth * np.einsum("kgd,ksd->kgs", q, k)
            if self.softcap:
                scores = self.softcap * np.tanh(scores / self.softcap)
            peak = scores.max(-1, keepdims=True)
            weights, others = np.exp(scores - peak), 0.0
            if self.sinks:
                others = np.exp(self.sink_logits().astype(np.float64).reshape(self.kv_heads, group, 1) - peak)
            rows.append(np.einsum("kgs,ksd->kgd", weights / (weights.sum(-1, keepdims=True) + others), v).reshape(-1))
        return np.array(rows)


class Bench:
    """One layer on one device, its cache full of random rows up to a position and NaN from there on."""

    def __init__(self, layer: Layer, isa: str, threads: int = 2, kv_format: str = "f16") -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOCALMOE_ISA", isa)
            self.device = CpuDevice(CONTEXT, kv_format, threads)
        self.layer = layer

    def fill(self, position: int) -> CacheLayer:
        (cached,) = self.layer.program(1).cache
        random = np.random.default_rng(3)
        for array, width in zip(self.device.cache(cached), (cached.key_width, cached.value_width), strict=True):
            if array is not None:
                values = random.standard_normal((*array.shape[:2], width or 0))
                values[:, position:] = np.nan
                array[...] = cache_rows(values, self.device.kv)
        return cached

    def run(self, capacity: int, tokens: int, position: int) -> Array:
        """One step; all that it may write held NaN before."""
        plan = self.device.compile(self.layer.program(capacity))
        plan._arena.view(np.float32).fill(np.nan)
        return plan.run(ids(tokens, position), position)

    def error(self, capacity: int, tokens: int, position: int) -> float:
        cached = self.fill(position)
        found = self.run(capacity, tokens, position)
        return distance(found, self.layer.expected(self.device, cached, tokens, position))


@pytest.fixture
def bench() -> Iterator[type[Bench]]:
    """`Bench`, whose devices are closed after the test."""
    opened: list[Bench] = []

    class Closing(Bench):
        def __init__(self, *how: object) -> None:
            super().__init__(*how)  # type: ignore[arg-type]
            opened.append(self)

    yield Closing
    for one in opened:
        one.device.close()


each_isa = pytest.mark.parametrize("isa", runnable())
BORDERS = (0, 1, BLOCK - 1, BLOCK, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, CONTEXT - 1)
LATENT = Layer(16, 1, 72, None, prefix=64)


@each_isa
@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("layer", [Layer(), LATENT], ids=["grouped", "latent"])
def test_one_token_sees_all_chunks_and_nothing_behind(
    bench: type[Bench], isa: str, kv_format: str, layer: Layer
) -> None:
    one = bench(layer, isa, 2, kv_format)
    for position in BORDERS:
        assert one.error(1, 1, position) <= EXACT, position


@each_isa
@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("layer", [Layer(), LATENT], ids=["grouped", "latent"])
def test_a_chunk_of_tokens_at_any_depth_sees_what_each_token_sees(
    bench: type[Bench], isa: str, kv_format: str, layer: Layer
) -> None:
    one = bench(layer, isa, 2, kv_format)
    for tokens, position in ((70, 0), (1, 0), (1, BLOCK), (33, BLOCK - 1), (70, 2 * CHUNK - 3), (70, CONTEXT - 70)):
        assert one.error(70, tokens, position) <= EXACT, (tokens, position)


@each_isa
@pytest.mark.parametrize("kv_format", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, HEADS, HEADS + 1, 2 * HEADS + 3])
def test_any_number_of_heads_may_share_a_key_head(bench: type[Bench], isa: str, kv_format: str, group: int) -> None:
    for kv_heads in (1, 3):
        one = bench(Layer(group * kv_heads, kv_heads), isa, 2, kv_format)
        assert one.error(1, 1, CHUNK + 9) <= EXACT
        assert one.error(20, 19, CHUNK + 9) <= EXACT


@each_isa
@pytest.mark.parametrize("kv_format", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize(
    ("width", "value_width"), [(1, 1), (8, 80), (64, 64), (128, 128), (80, 16), (48, 96), (257, 144)]
)
def test_heads_may_be_of_any_width(bench: type[Bench], isa: str, kv_format: str, width: int, value_width: int) -> None:
    allowed = EXACT if kv_format == "f16" else 2 * EXACT  # turning is one more sum
    for heads in (2, 8):
        one = bench(Layer(heads, 2, width, value_width), isa, 2, kv_format)
        assert one.error(1, 1, CHUNK + 40) <= allowed
        assert one.error(9, 9, CHUNK + 40) <= allowed


@each_isa
@pytest.mark.parametrize("window", [1, 2, 17, BLOCK, BLOCK + 1, CHUNK, CHUNK + 1, CONTEXT])
def test_a_window_may_begin_and_end_anywhere(bench: type[Bench], isa: str, window: int) -> None:
    one = bench(Layer(6, 2, window=window, temperature=Temperature(0.3, 50)), isa)
    for position in BORDERS:
        assert one.error(1, 1, position) <= EXACT, position
    for position in (0, BLOCK - 5, CHUNK - 30, CONTEXT - 50):
        assert one.error(50, 50, position) <= EXACT, position


@each_isa
@pytest.mark.parametrize("chunk", [1, 7, BLOCK, 100, CHUNK + 3, CONTEXT])
def test_a_chunk_hides_what_is_before_its_multiple(bench: type[Bench], isa: str, chunk: int) -> None:
    one = bench(Layer(6, 2, chunk=chunk, temperature=Temperature(0.3, 50)), isa)
    for position in (*BORDERS, chunk - 1, min(chunk, CONTEXT - 1)):
        assert one.error(1, 1, position) <= EXACT, position
    for position in (0, BLOCK - 5, CHUNK - 30, CONTEXT - 50):
        assert one.error(50, 50, position) <= EXACT, position


@each_isa
@pytest.mark.parametrize("layer", [Layer(), Layer(9, 3, window=70), LATENT], ids=["grouped", "window", "latent"])
def test_softcaps_and_sinks_are_part_of_the_softmax(bench: type[Bench], isa: str, layer: Layer) -> None:
    for more in ({"softcap": 1.5}, {"sinks": True}, {"softcap": 3.0, "sinks": True}):
        one = bench(replace(layer, **more), isa)
        for position in (0, 1, BLOCK, CHUNK, 2 * CHUNK + 5):
            assert one.error(1, 1, position) <= EXACT, (more, position)
            assert one.error(40, 37, position) <= EXACT, (more, position)


@each_isa
@pytest.mark.parametrize("scale", [1e-6, 40.0, 3000.0])
def test_scores_of_any_size_stay_finite(bench: type[Bench], isa: str, scale: float) -> None:
    # At 3000 a score is of the order 1e5, where float32 knows it to 0.01: weights are only right to so much.
    one = bench(Layer(scale=scale), isa, 2, "f32")
    for tokens in (1, 30):
        assert one.error(tokens, tokens, CHUNK + 50) <= max(EXACT, 5e-6 * scale)


@each_isa
@pytest.mark.parametrize("kv_format", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize(
    "layer", [Layer(), Layer(5, 1, 64, 64), LATENT, Layer(8, 8, window=90)], ids=["grouped", "five", "latent", "window"]
)
def test_bits_depend_neither_on_threads_nor_on_how_a_prompt_is_cut(
    bench: type[Bench], isa: str, kv_format: str, layer: Layer
) -> None:
    start, count = CHUNK - 20, 100
    answers = []
    for threads, step in ((1, count), (2, count), (3, 33), (5, 7), (2, 1)):
        one = bench(layer, isa, threads, kv_format)
        one.fill(start)
        capacity = max(step, 2)  # a step of one token decodes, and sums in another order
        cuts = range(start, start + count, step)
        pieces = [one.run(capacity, min(step, start + count - at), at) for at in cuts]
        answers.append((np.concatenate(pieces), one.run(1, 1, start + count)))
    for prompt, token in answers[1:]:
        assert np.array_equal(prompt, answers[0][0])
        assert np.array_equal(token, answers[0][1])


class Broken(Layer):
    """One token's query is no number; one of its three heads is the last lane of a vector."""

    TOKEN, POSITION = 5, CHUNK - 20

    def queries(self) -> npt.NDArray[np.float32]:
        found = super().queries()
        found[ids(self.TOKEN + 1, self.POSITION)[-1]] = np.nan
        return found


@each_isa
def test_a_query_that_is_no_number_leaves_the_others_their_bits(bench: type[Bench], isa: str) -> None:
    answers = []
    for kind in (Layer, Broken):
        one = bench(kind(3, 1, scale=5.0), isa)
        one.fill(Broken.POSITION)
        answers.append(one.run(60, 60, Broken.POSITION))
    whole, broken = answers
    assert np.isnan(broken[Broken.TOKEN]).all()
    others = np.arange(60) != Broken.TOKEN
    assert np.array_equal(broken[others], whole[others])


@each_isa
def test_a_plan_runs_again_and_again(bench: type[Bench], isa: str) -> None:
    one = bench(Layer(), isa, 3)
    one.fill(500)
    for capacity in (1, 40):
        plan = one.device.compile(one.layer.program(capacity))
        first = plan.run(ids(capacity, 500), 500)
        assert all(np.array_equal(plan.run(ids(capacity, 500), 500), first) for _ in range(50))


@each_isa
@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("width", [1, 16, 31, 32, 48, 80, 128, 257, 576])
def test_a_cache_holds_the_rows_of_the_twin(isa: str, kv_format: str, width: int, bench: type[Bench]) -> None:
    layer = Layer(2, 2, width, width, scale=width**-0.5)
    one = bench(layer, isa, 2, kv_format)
    cached, kind = layer.program(1).cache[0], KV_FORMATS[kv_format]
    one.run(30, 30, 5)
    table = np.random.default_rng(width).standard_normal((VOCABULARY, 2 * width)).astype(np.float32)
    rows = table[ids(30, 5)].reshape(30, 2, width).transpose(1, 0, 2)
    # Half a step (Q4_0: a whole one at the end that 4 bits have not) of each turned value, as a share of the largest.
    allowed = {"f32": 0, "f16": 2**-11, "q8_0": 0.5 / 127 + 2**-11, "q4_0": 1 / 8 + 2**-11}[kv_format]
    for array in one.device.cache(cached):
        assert array is not None
        assert np.array_equal(array[:, 5:35], encoded(rows, kind))
        assert not array[:, :5].any() and not array[:, 35:].any()
        values = cache_values(array[:, 5:35], kind, width)
        assert np.allclose(decoded(array[:, 5:35], kind, width), values, rtol=1e-5, atol=1e-6)
        blocks = np.pad(rows, ((0, 0), (0, 0), (0, -width % 32))).reshape(2, 30, -1, 32)
        lost = np.pad(values - rows, ((0, 0), (0, 0), (0, -width % 32))).reshape(2, 30, -1, 32)
        assert (np.linalg.norm(lost, axis=-1) <= allowed * np.abs(blocks @ HADAMARD).max(axis=-1)).all()


@pytest.mark.parametrize("kv_format", ["q8_0", "q4_0"])
def test_the_twin_writes_turned_blocks_of_the_gguf_package(kv_format: str) -> None:
    random, kind = np.random.default_rng(5), KV_FORMATS[kv_format]
    rows = random.standard_normal((200, 64)) * np.exp(random.uniform(-9, 9, (200, 1)))
    rows[3], rows[4], rows[5] = 0, np.eye(64)[7] * 30, -1  # all turned values of one magnitude: the first has the sign
    rows = (rows.reshape(-1, 32) @ HADAMARD).reshape(rows.shape).astype(np.float32)
    near = quantize(np.float32(8) * (rows.reshape(-1, 32) @ HADAMARD / 32).astype("f4"), GGMLQuantizationType(kind.id))
    ours, theirs = encoded(rows, kind).reshape(-1, kind.nbytes), near.reshape(-1, kind.nbytes)
    assert (ours == theirs).mean() > 0.99  # sums in another order, and in Q8_0 other halves


@pytest.mark.parametrize("kv_format", ["q8_0", "q4_0"])
def test_turning_keeps_small_columns_beside_large_ones(kv_format: str) -> None:
    random, kind = np.random.default_rng(6), KV_FORMATS[kv_format]
    rows = random.standard_normal((500, 128)).astype(np.float32)
    rows[:, [3, 70]] *= 20
    small = np.delete(np.arange(128), [3, 70])
    plain = quantize(rows, GGMLQuantizationType(kind.id))
    kept = dequantise(np.ascontiguousarray(plain).view(np.uint8).reshape(-1), kind).reshape(rows.shape)
    lost = [np.abs(found - rows)[:, small].mean() for found in (decoded(encoded(rows, kind), kind, 128), kept)]
    assert lost[0] < 0.6 * lost[1]


@pytest.mark.parametrize("width", [32, 64, 96, 128, 576])
def test_quantised_caches_take_34_and_18_of_64_bytes_of_an_f16_one(width: int) -> None:
    for layer in (Layer(4, 2, width, 2 * width), Layer(4, 1, width, None, prefix=width // 2)):
        nbytes = {}
        for name in ("f16", "q8_0", "q4_0"):
            program = layer.program(1)
            nbytes[name], _ = CpuDevice.needed_nbytes([program], CONTEXT, name, 1)
            assert nbytes[name] == CONTEXT * program.cache_nbytes(KV_FORMATS[name])
        assert 64 * nbytes["q8_0"] == 34 * nbytes["f16"]
        assert 64 * nbytes["q4_0"] == 18 * nbytes["f16"]


@each_isa
@pytest.mark.parametrize(("odd", "left"), [(0.0, 0.0), (1e-9, 0.0), (1e-38, 0.0), (np.nan, np.nan), (np.inf, np.nan)])
@pytest.mark.parametrize("kv_format", ["q8_0", "q4_0"])
def test_a_block_that_its_format_cannot_tell_is_zero_or_no_number(
    bench: type[Bench], isa: str, odd: float, left: float, kv_format: str
) -> None:
    one = bench(Layer(1, 1, 64, None, prefix=64), isa, 1, kv_format)
    rows = np.ones((2, 64), np.float32)
    rows[1, 32:], rows[1, 40] = 0, odd

    def forward(ops: Ops) -> Tensor:
        layer = ops.cache.append(given(ops, rows).heads(1), value_prefix=64)
        return ops.attention(given(ops, rows).heads(1), layer, scale=1.0).flat()

    program = trace(forward, 1, all_rows=True)
    one.device.compile(program).run(np.ones(1, np.int32), 0)
    keys, _ = one.device.cache(program.cache[0])
    held = decoded(encoded(rows[1], one.device.kv), one.device.kv, 64)
    for found in (cache_values(keys[0, :1], one.device.kv, 64)[0], held):
        assert np.allclose(found[:32], 1, rtol=2**-11)
        assert np.array_equal(found[32:], np.full(32, left), equal_nan=True)


@pytest.mark.parametrize("kv_format", ["q8_0", "q4_0"])
def test_a_rewound_quantised_cache_answers_as_one_that_never_went_on(bench: type[Bench], kv_format: str) -> None:
    one = bench(Layer(), runnable()[0], 2, kv_format)
    one.run(70, 70, 0)
    straight = one.run(1, 1, 70)
    one.run(70, 60, 71)
    one.run(70, 3, 67)
    assert np.array_equal(one.run(1, 1, 70), straight)
