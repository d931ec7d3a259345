"""Tracing, views, counts of bytes and FLOPs made by hand, and the places of buffers in the arena."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import exactly, weight

from localmoe.formats import FORMATS
from localmoe.kernels.cpu.device import CpuDevice
from localmoe.kernels.cpu.lower import LOWERINGS, Arena, Lowering
from localmoe.kernels.ops import Ops, trace
from localmoe.kernels.program import Program, RopeTable, Router, Tensor
from localmoe.kernels.reference import ReferenceDevice
from localmoe.kernels.rewrites import shared_early

RANDOM = np.random.default_rng(1)
ROPE = RopeTable(np.float32([1, 0.5]), "pairs")


def zeros(*shape: int, format: str = "F32") -> Any:
    return weight(RANDOM, shape, format)


def small_model(ops: Ops) -> Tensor:
    """One block: hidden width 32, 4 heads of 8 over 2 kv-heads, 2 of 6 experts of width 64, 10 token ids."""
    x = ops.embed(zeros(10, 32, format="F16"), ops.input)
    h = ops.rms_norm(x, zeros(32), 1e-5)
    q, k, v = ops.linears(h, (zeros(32, 32, format="Q8_0"), zeros(16, 32, format="Q8_0"), zeros(16, 32, format="F16")))
    layer = ops.cache.append(ops.rope(k.heads(2), ROPE), v.heads(2))
    y = ops.attention(ops.rope(q.heads(4), ROPE), layer, scale=0.35)
    x = ops.add(x, ops.linear(y.flat(), zeros(32, 32, format="Q4_0"), zeros(32)))
    ids, shares = ops.route(ops.linear(x, zeros(6, 32), exact=True), Router("softmax", 2, normalise=True))
    gate, up, down = zeros(6, 64, 32, format="Q8_0"), zeros(6, 64, 32, format="Q8_0"), zeros(6, 32, 64, format="F16")
    x = ops.add(x, ops.experts(x, ids, shares, gate, up, down))
    return ops.linear(ops.logit_rows(x), zeros(10, 32, format="F16"))


def test_a_forward_pass_is_recorded_once_op_by_op() -> None:
    calls = []

    def forward(ops: Ops) -> Tensor:
        calls.append(ops.tokens)
        return small_model(ops)

    program = trace(forward, 8)
    assert calls == [8]
    names = "embed rms_norm linear rope cache_append rope attention linear add linear route experts add last_row linear"
    assert " ".join(op.name for op in program.ops) == names
    assert (program.input.shape, program.input.dtype, program.output.shape) == ((8,), "i32", (1, 10))


def test_logits_are_those_of_the_last_row_or_of_all() -> None:
    assert trace(small_model, 8).output.shape == (1, 10)
    assert trace(small_model, 8, all_rows=True).output.shape == (8, 10)
    assert "last_row" not in {op.name for op in trace(small_model, 1).ops}


def test_every_op_of_the_contract_has_a_lowering_and_a_twin() -> None:
    from localmoe.kernels.reference import _TWINS

    assert set(LOWERINGS) == set(_TWINS)
    assert {op.name for op in trace(small_model, 8).ops} < set(LOWERINGS)


def test_bytes_of_weights_are_those_a_step_reads() -> None:
    program = trace(small_model, 4)
    q8, q4, f16, f32 = 34 / 32, 18 / 32, 2, 4
    dense = 32 * f32 + (32 + 16) * 32 * q8 + 16 * 32 * f16 + 32 * 32 * q4 + 32 * f32 + 6 * 32 * f32 + 10 * 32 * f16
    expert = 2 * 64 * 32 * q8 + 64 * 32 * f16
    assert program.weight_nbytes(1) == 32 * f16 + dense + 2 * expert
    assert program.weight_nbytes(2) == 2 * 32 * f16 + dense + 4 * expert
    assert program.weight_nbytes(4) == 4 * 32 * f16 + dense + 6 * expert  # no more than there are


def test_flops_are_two_for_each_weight_of_a_dot_product_and_each_cached_element() -> None:
    program = trace(small_model, 4, all_rows=True)
    linears = (32 + 16 + 16 + 32 + 6 + 10) * 32
    assert program.flops(1) == 2 * (linears + 2 * 3 * 64 * 32)
    assert program.flops(4, 100) == 2 * 4 * (linears + 2 * 3 * 64 * 32 + 100 * 4 * (8 + 8))


def test_the_cache_keeps_keys_and_values_of_each_kv_head() -> None:
    assert trace(small_model, 1).cache_elements() == 2 * (8 + 8)

    def latent(ops: Ops) -> Tensor:
        x = ops.embed(zeros(10, 24), ops.input)
        layer = ops.cache.append(x.heads(1), value_prefix=16)
        return ops.attention(x.heads(1), layer, scale=1).flat()

    program = trace(latent, 1)
    assert program.cache_elements() == 24  # one row for key and value both
    assert program.flops(1, 10) == 2 * 10 * (24 + 16)


def test_views_share_a_buffer_and_say_where_they_begin() -> None:
    x = Ops(5).new((5, 24))
    heads = x.heads(4)
    assert (heads.shape, heads.strides, heads.offset, heads.buffer) == ((5, 4, 6), (24, 6, 1), 0, x.buffer)
    part = heads.columns(2, 6)
    assert (part.shape, part.strides, part.offset) == ((5, 4, 4), (24, 6, 1), 2)
    columns = x.columns(8, 20).heads(3)
    assert (columns.shape, columns.strides, columns.offset) == ((5, 3, 4), (24, 4, 1), 8)
    assert (heads.flat().shape, heads.flat().strides) == (x.shape, x.strides)


@settings(max_examples=60, deadline=None)
@given(heads=st.integers(1, 4), width=st.integers(1, 6), data=st.data())
def test_a_view_of_views_reads_the_elements_that_numpy_reads(heads: int, width: int, data: st.DataObject) -> None:
    table = np.arange(3 * heads * width, dtype=np.float32).reshape(3, heads * width)
    start = data.draw(st.integers(0, width - 1))
    stop = data.draw(st.integers(start + 1, width))

    def forward(ops: Ops) -> Tensor:
        part = ops.embed(exactly(table), ops.input).heads(heads).columns(start, stop)
        return ops.add(part, part).flat()

    found = ReferenceDevice(8).compile(trace(forward, 3, all_rows=True)).run(np.arange(3, dtype=np.int32), 0)
    assert np.array_equal(found, 2 * table.reshape(3, heads, width)[:, :, start:stop].reshape(3, -1))


WRONG = {
    "unequal heads": lambda ops, x: x.heads(5),
    "columns beyond the width": lambda ops, x: x.columns(8, 33),
    "flat of a part of each head": lambda ops, x: x.heads(4).columns(0, 3).flat(),
    "a norm of another width": lambda ops, x: ops.rms_norm(x, zeros(31), 1e-5),
    "a linear of another width": lambda ops, x: ops.linear(x, zeros(8, 31)),
    "head matrices of another width": lambda ops, x: ops.head_linear(x.heads(4), zeros(4, 5, 9)),
    "head matrices, too few": lambda ops, x: ops.head_linear(x.heads(4), zeros(3, 5, 8)),
    "a rope wider than a head": lambda ops, x: ops.rope(x.heads(16), ROPE),
    "concat of other tokens": lambda ops, x: ops.concat(x.heads(4), x.heads(2)),
    "keys and values of unequal heads": lambda ops, x: ops.cache.append(x.heads(4), x.heads(2)),
    "a query of another width": lambda ops, x: ops.attention(
        x.heads(8), ops.cache.append(x.heads(4), x.heads(4)), scale=1
    ),
    "heads that do not share evenly": lambda ops, x: ops.attention(
        x.columns(0, 24).heads(3), ops.cache.append(x.columns(0, 16).heads(2), x.heads(2)), scale=1
    ),
    "an unknown activation": lambda ops, x: ops.glu(x, x, "tanh"),
    "a gate of another width": lambda ops, x: ops.glu(x.columns(0, 2), x),
    "more experts chosen than there are": lambda ops, x: ops.route(x, Router("softmax", 33, normalise=True)),
    "groups that do not divide": lambda ops, x: ops.route(x, Router("softmax", 2, True, groups=5)),
    "experts of unequal shapes": lambda ops, x: ops.experts(x, x, x, zeros(2, 8, 32), zeros(2, 8, 32), zeros(2, 32, 9)),
    "a sum of unequal shapes": lambda ops, x: ops.add(x, x.columns(0, 8)),
}


@pytest.mark.parametrize("name", WRONG)
def test_shapes_that_do_not_fit_are_refused_while_tracing(name: str) -> None:
    with pytest.raises(ValueError, match=r"heads|columns|width|axes|experts|route|differ|glu"):
        trace(lambda ops: cast(Any, WRONG[name])(ops, ops.embed(zeros(10, 32), ops.input)), 3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 700)), max_size=60), st.randoms(use_true_random=False))
def test_places_that_live_together_never_overlap(moves: list[tuple[bool, int]], chance: Any) -> None:
    arena, alive = Arena(), dict[int, int]()
    for take, nbytes in moves:
        if take or not alive:
            offset = arena.take(nbytes)
            assert offset % 64 == 0
            assert all(offset + nbytes <= other or other + n <= offset for other, n in alive.items())
            assert offset + nbytes <= arena.size
            alive[offset] = nbytes
        else:
            offset = chance.choice(sorted(alive))
            del alive[offset]
            arena.give(offset)
    for offset in list(alive):
        arena.give(offset)
    assert arena.free == ([(0, arena.size)] if arena.size else [])  # the pieces grew together again


def lowered(program: Program) -> Lowering:
    isa = SimpleNamespace(name="avx2", lanes=8)
    device = SimpleNamespace(
        kernels=SimpleNamespace(isa=isa), threads=2, context=16, kv=FORMATS["F16"],
        cache=lambda layer: (np.zeros((2, 16, 16)), np.zeros((2, 16, 16))), rope_table=lambda table: np.zeros(4),
    )  # fmt: skip
    lowering = Lowering(cast(CpuDevice, device), program)
    lowering.run()
    return lowering


def with_shared_expert(ops: Ops, gated: bool = False) -> Tensor:
    """One layer: 2 of 6 experts and a shared one, whose share a sigmoid may give."""
    x = ops.embed(zeros(10, 32, format="F16"), ops.input)
    h = ops.rms_norm(x, zeros(32), 1e-5)
    ids, shares = ops.route(ops.linear(h, zeros(6, 32), exact=True), Router("softmax", 2, normalise=True))
    up, down = zeros(6, 64, 32, format="Q8_0"), zeros(6, 32, 64, format="F16")
    chosen = ops.experts(h, ids, shares, up, up, down)
    shared = ops.linear(ops.glu(*ops.linears(h, (zeros(64, 32), zeros(64, 32)))), zeros(32, 64))
    if gated:
        shared = ops.glu(ops.linear(h, zeros(1, 32), exact=True), shared, "sigmoid")
    x = ops.add(x, ops.add(chosen, shared))
    return ops.linear(ops.logit_rows(x), zeros(10, 32, format="F16"))


def test_a_shared_expert_waits_for_nobody() -> None:
    program = trace(with_shared_expert, 1)
    found = shared_early(program)
    names = "embed rms_norm linear linear glu route linear experts add add linear"
    assert " ".join(op.name for op in found.ops) == names
    assert set(map(id, found.ops)) == set(map(id, program.ops))
    waits = [sum(lowered(p)._barriers) for p in (program, found)]
    assert waits[1] == waits[0] - 1
    lowering = lowered(found)
    down = next(i for i, op in enumerate(found.ops) if op.name == "experts") - 1
    behind = [waiting for waiting, owner in zip(lowering._barriers, lowering.owners, strict=True) if owner == down]
    assert not any(behind), "its last product and the experts' first are one region"


def test_a_gated_shared_expert_and_a_model_without_one() -> None:
    gated = shared_early(trace(partial(with_shared_expert, gated=True), 1))
    names = "embed rms_norm linear linear glu linear route linear experts glu add add linear"
    assert " ".join(op.name for op in gated.ops) == names
    plain = trace(small_model, 1)
    assert [*map(id, shared_early(plain).ops)] == [*map(id, plain.ops)]


@pytest.mark.parametrize("gated", [False, True])
def test_the_order_of_a_shared_expert_changes_no_bit(gated: bool) -> None:
    program = trace(partial(with_shared_expert, gated=gated), 1)
    results = []
    for each in (program, shared_early(program)):
        device = ReferenceDevice(16)
        results.append(device.compile(each).run(np.array([3], np.int32), 0))
        written: set[int] = {each.input.buffer}
        for op in each.ops:
            assert {t.buffer for t in op.inputs} <= written
            written.update(t.buffer for t in op.outputs)
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("tokens", [1, 8])
def test_a_buffer_keeps_its_place_until_its_last_use(tokens: int) -> None:
    program = trace(small_model, tokens)
    lowering, last = lowered(program), program.last_uses()
    born = {program.input.buffer: -1, **{t.buffer: i for i, op in enumerate(program.ops) for t in op.outputs}}
    size = {b.buffer: 4 * int(np.prod(b.shape)) for b in program.buffers}
    for a in born:
        for b in born:
            together = program.input.buffer in (a, b) or (born[a] <= last[b] and born[b] <= last[a])
            if a != b and together:
                start, other = lowering._places[a], lowering._places[b]
                assert start + size[a] <= other or other + size[b] <= start, (a, b)


def test_the_arena_is_smaller_than_all_buffers_together() -> None:
    def deep(ops: Ops) -> Tensor:
        x = ops.embed(zeros(10, 32), ops.input)
        for _ in range(20):
            x = ops.add(x, ops.rms_norm(x, None, 1e-5))
        return ops.logit_rows(x)

    program = trace(deep, 16)
    assert lowered(program).arena.size < 5 * 16 * 32 * 4


def test_only_input_and_output_stay_in_the_arena_at_the_end() -> None:
    program = trace(small_model, 8)
    lowering = lowered(program)
    kept = {lowering.offset(program.input), lowering.offset(program.output)}
    assert set(lowering.arena.taken) == kept
