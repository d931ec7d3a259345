"""Programs rewritten for experts that have to be read: the same numbers, in an order that leaves time for reading."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from localmoe.kernels.program import Op, Program, Tensor


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
