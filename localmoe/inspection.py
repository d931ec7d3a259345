"""What a model file is and needs, from its header alone: parameters, formats, bytes, KV cache, the Program; prints
nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from localmoe.experts.budget import Needed
from localmoe.formats import Weight
from localmoe.kernels.open import cache_format
from localmoe.kernels.program import Op, Program
from localmoe.loader.locate import open_source
from localmoe.loader.source import PlannedTensors
from localmoe.memory import available_nbytes, readable_size, total_nbytes
from localmoe.network import DEFAULT_CONTEXT, Network
from localmoe.quantisation.planning import plan_folder

Section = tuple[str, list[tuple[str, str]]]


def needed(network: Network, context: int, kv_format: str = "f16") -> Needed:
    """What a chat with a context of so many tokens needs; reads no weight and compiles nothing."""
    return network.needed(context, kv_format)


def report(
    path: str | Path, context: int | None = None, kv_format: str = "f16", quantize: str | None = None
) -> list[Section]:
    """Sections of (what, value). Raises the same errors as opening the model would; reads no weight."""
    network = open_network(path, quantize)
    program = network.program(1)
    routed = [op for op in program.ops if op.name == "experts"]
    asked = context or min(network.trained_context, DEFAULT_CONTEXT)
    return [
        ("model", _model(network)),
        ("parameters", _parameters(network, routed)),
        ("formats", _formats(network)),
        ("memory", _memory(network, program, routed, asked, kv_format)),
    ]


def program_table(path: str | Path, quantize: str | None = None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The decode Program as a table: one row an op, with shapes, formats, bytes of weights read and FLOPs."""
    program = open_network(path, quantize).program(1)
    header = ("#", "op", "inputs", "outputs", "weights", "bytes", "FLOPs")
    rows: list[tuple[str, ...]] = [
        (
            str(i),
            op.name,
            _shapes([t.shape for t in op.inputs]),
            _shapes([t.shape for t in op.outputs]),
            " ".join(f"{w.name}:{w.format.name}{list(w.shape)}" for w in op.weights),
            str(op.weight_nbytes(1)),
            str(op.flops(1, 0)),
        )
        for i, op in enumerate(program.ops)
    ]
    return header, rows


def open_network(path: str | Path, quantize: str | None = None) -> Network:
    """The network of a model, of a plan where there are settings and no weights; of a folder that is to be quantised on
    loading, as it will be. Reads headers alone; raises the same errors as opening the model would."""
    from localmoe.loader.planning import is_plan, open_plan  # late: models themselves need none of it

    path = Path(path).expanduser()
    source = open_plan(path) if is_plan(path) else open_source(path)
    if quantize is None:
        return Network(source)
    if isinstance(source.tensors, PlannedTensors):
        Network(source)  # tensors of a plan come into being by being asked for
    return Network(plan_folder(source, quantize).unread())


def _model(network: Network) -> list[tuple[str, str]]:
    source = network.source
    rows = [
        ("file", str(source.path)),
        ("name", str(source.metadata.get("general.name", "not given"))),
        ("architecture", network.metadata.architecture),
        ("blocks", str(network.config.block_count)),
        ("hidden width", str(network.config.embedding_length)),
        ("vocabulary", f"{network.config.vocabulary:,}"),
        ("trained context", f"{network.trained_context:,}"),
        ("size", readable_size(source.nbytes or sum(w.nbytes for w in network.tensors.values()))),
    ]
    planned = "none read: this is a plan, from settings alone" if isinstance(source.tensors, PlannedTensors) else ""
    more = {"weights": planned, "licence": source.metadata.get("general.license"), "left out": network.left_out}
    return rows + [(what, str(value)) for what, value in more.items() if value]


def parameters(network: Network) -> tuple[int, int]:
    """(all, those that are active for one token)."""
    routed = [op for op in network.program(1).ops if op.name == "experts"]
    total = sum(w.elements for w in network.tensors.values())
    asleep = sum(w.elements * (w.shape[0] - op.inputs[1].shape[1]) // w.shape[0] for op in routed for w in op.weights)
    return total, total - asleep


def _parameters(network: Network, routed: list[Op]) -> list[tuple[str, str]]:
    total, active = parameters(network)
    rows = [("total", readable_count(total)), ("active per token", readable_count(active))]
    if routed:
        chosen, experts = routed[0].inputs[1].shape[1], routed[0].weights[0].shape[0]
        layers = "1 layer" if len(routed) == 1 else f"{len(routed)} layers"
        rows.append(("experts", f"{chosen} of {experts} in {layers}"))
    return rows


def _formats(network: Network) -> list[tuple[str, str]]:
    by_format: dict[str, list[Weight]] = defaultdict(list)
    for weight in network.tensors.values():
        by_format[weight.format.name].append(weight)
    sizes = {name: sum(w.nbytes for w in weights) for name, weights in by_format.items()}
    whole = sum(sizes.values())
    return [
        (name, f"{len(by_format[name])} tensors, {readable_size(size)}, {100 * size / whole:.1f} %")
        for name, size in sorted(sizes.items(), key=lambda pair: -pair[1])
    ]


def _memory(
    network: Network, program: Program, routed: list[Op], context: int, kv_format: str
) -> list[tuple[str, str]]:
    experts = sum(w.nbytes for op in routed for w in op.weights)
    weights = sum(w.nbytes for w in network.tensors.values())
    per_token = program.cache_nbytes(cache_format(kv_format))
    beside = needed(network, context, kv_format)
    whole, free = weights + beside.nbytes, available_nbytes()
    if whole <= free:
        verdict = f"yes: {readable_size(whole)} of {readable_size(free)} free"
    elif whole <= total_nbytes():
        verdict = f"only when other programs end: {readable_size(whole)} needed, {readable_size(free)} free"
    else:
        sizes = f"{readable_size(whole)} needed, {readable_size(total_nbytes())} in all"
        verdict = f"no: {sizes}; weights are read from disk again and again"
    return [
        ("dense weights", readable_size(weights - experts)),
        ("expert weights", readable_size(experts)),
        ("read for one token", readable_size(program.weight_nbytes(1))),
        (f"KV cache per token ({kv_format})", readable_size(per_token)),
        (f"KV cache at {context:,} tokens", readable_size(context * per_token)),
        *_states(program),
        ("needed beside the weights", f"{readable_size(beside.nbytes)} at {context:,} tokens: {beside.parts}"),
        ("fits this machine", verdict),
    ]


def _states(program: Program) -> list[tuple[str, str]]:
    """A row about the recurrent states, if there are any."""
    once, slots = program.state_nbytes, program.state_slots
    size = f"{readable_size(slots * once)}: {readable_size(once)} at each of {slots} positions to go on from"
    return [("recurrent states", size)] if slots else []


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return " ".join("×".join(map(str, s)) for s in shapes)


def readable_count(parameters: int) -> str:
    """1234567 -> "1.23 M"."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if parameters >= size:
            return f"{parameters / size:.2f} {unit}"
    return f"{parameters:,}"
