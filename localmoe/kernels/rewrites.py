"""Programs in another order, for the same numbers: one that leaves time for reading experts, and one in which threads
wait less often."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import pairwise

from localmoe.kernels.program import Op, Program, Tensor

BESIDE = ("linear", "glu", "gelu")  # what a shared expert is made of


def shared_early(program: Program) -> Program:
    """What a layer computes beside its experts (a shared one) spread over their regions, so that no thread waits for it
    alone: what reads the layer's input in front of the `route` op, and the product of that in full behind it."""
    ops: list[Op] = []
    known, done = {program.input.buffer}, set[int]()
    for i, op in enumerate(program.ops):
        if id(op) in done:
            continue
        before, behind = _beside(program.ops[i + 1 :], known) if op.name == "route" else ([], [])
        done.update(map(id, (*before, *behind)))
        ops += [*before, op, *behind]
        known.update(t.buffer for each in (*before, op, *behind) for t in each.outputs)
    return replace(program, ops=tuple(ops))


def _beside(following: Sequence[Op], known: AbstractSet[int]) -> tuple[list[Op], list[Op]]:
    before: list[Op] = []
    behind: list[Op] = []
    made: set[int] = set()  # by those before
    for op in following:
        if op.name == "route":
            break
        read = {t.buffer for t in op.inputs}
        if op.name not in BESIDE or not read <= known | made:
            continue
        if op.name == "linear" and read & made:
            behind.append(op)
        else:
            before.append(op)
            made.update(t.buffer for t in op.outputs)
    return before, behind


def experts_late(program: Program) -> Program:
    """Each `experts` op where its result is first needed, so that what else a layer computes runs while it reads."""
    ops: list[Op] = []
    waiting: list[Op] = []
    for op in program.ops:
        if op.name == "experts":
            waiting.append(op)
            continue
        wanted = {t.buffer for t in op.inputs}
        for late in [late for late in waiting if late.outputs[0].buffer in wanted]:
            waiting.remove(late)
            ops.append(late)
        ops.append(op)
    return replace(program, ops=(*ops, *waiting))


def with_guesses(program: Program) -> Program:
    """Behind each router the next layer's one, asked too soon, of this layer's input: the ids become one more input of
    this layer's `experts`. A router that is no plain `linear` is not asked."""
    makers = {t.buffer: op for op in program.ops for t in op.outputs}
    routes = [op for op in program.ops if op.name == "route"]
    after: dict[int, list[Op]] = {}
    guesses: dict[int, Tensor] = {}
    buffers = list(program.buffers)

    def again(op: Op, inputs: tuple[Tensor, ...]) -> Op:
        outputs = tuple(replace(t, buffer=len(buffers) + i) for i, t in enumerate(op.outputs))
        buffers.extend(outputs)
        return replace(op, inputs=inputs, outputs=outputs)

    for route, following in pairwise(routes):
        logits, next_logits = makers[route.inputs[0].buffer], makers[following.inputs[0].buffer]
        if logits.name == next_logits.name == "linear" and logits.inputs[0].shape == next_logits.inputs[0].shape:
            linear = again(next_logits, logits.inputs)
            guess = again(following, linear.outputs)
            after[id(route)], guesses[route.outputs[0].buffer] = [linear, guess], guess.outputs[0]
    ops: list[Op] = []
    for op in program.ops:
        if op.name == "experts" and op.inputs[1].buffer in guesses:
            op = replace(op, inputs=(*op.inputs, guesses[op.inputs[1].buffer]))
        ops += [op, *after.get(id(op), [])]
    return replace(program, ops=tuple(ops), buffers=tuple(buffers))


def guess(experts: Op) -> Tensor | None:
    """What the next layer's router would choose now, where a Program asks it."""
    return experts.inputs[3] if len(experts.inputs) > 3 else None
