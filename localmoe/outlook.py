"""What running a model in so much memory would be like, before it is loaded: what fits, what is read for a token, how
fast; reads headers alone and prints nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from localmoe.benchmark.work import Bound, step_work
from localmoe.experts.budget import LIBRARIES_NBYTES, Needed
from localmoe.experts.choice import Choice, choose
from localmoe.experts.hits import Expected, Shares, assumed_shares, even_shares, expected
from localmoe.experts.pieces import pieces
from localmoe.experts.probe import DiskSpeed, probe
from localmoe.experts.residence import SHARE
from localmoe.experts.sizes import Sizes
from localmoe.experts.usage import Usage
from localmoe.inspection import Section, needed, parameters, readable_count
from localmoe.kernels.cpu.device import CpuDevice
from localmoe.kernels.cpu.limits import Limits, Rates
from localmoe.kernels.open import cache_format
from localmoe.memory import available_nbytes, readable_size
from localmoe.network import CHUNK, DEFAULT_CONTEXT, Network

REACHED = 0.8  # of a limit by generating, see docs/performance.md: 72 to 89 % over formats and sizes
READ_NBYTES = 1 << 27  # for the rate of memory: beyond the caches of a few cores, and read in a tenth of a second


@dataclass(frozen=True, slots=True)
class Speed:
    """Generating, with the limit that takes most of the time."""

    tokens_per_second: float
    limit: str


@dataclass(frozen=True, slots=True)
class Outlook:
    """Sizes in bytes, rates in bytes a second. `expected` counts on `shares_from`, `worst` on even routing; both None
    where there are no experts, as is `disk` where nobody knows its speed."""

    network: Network
    sizes: Sizes
    context: int
    beside: Needed
    memory: int
    promised: bool
    choice: Choice
    disk: float | None
    disk_from: str
    shares_from: str
    expected: Expected | None
    worst: Expected | None
    missed_nbytes: float  # for one token
    worst_missed_nbytes: float
    bound: Bound

    @property
    def speed(self) -> Speed | None:
        """None where it cannot be run, and where something is missing and nobody knows how fast it comes."""
        return None if self.refusal else speed(self.missed_nbytes, self.disk, self.bound)

    @property
    def worst_speed(self) -> Speed | None:
        return None if self.refusal else speed(self.worst_missed_nbytes, self.disk, self.bound)

    @property
    def smallest(self) -> int:
        """The smallest budget that would work: what every token reads, the experts of one layer, and all beside."""
        return self.sizes.least + self.beside.resident

    @property
    def room(self) -> int:
        """For experts."""
        return max(0, self.memory - self.sizes.stays - self.beside.resident)

    @property
    def refusal(self) -> str | None:
        """Why it cannot be run, with the numbers; None if it can."""
        within = f"{readable_size(self.memory)} {'allowed' if self.promised else 'free'}"
        if self.beside.resident > self.memory:
            what = f"{self.beside.parts} at {self.context:,} tokens"
            return f"needs {readable_size(self.beside.resident)} beside its weights ({what}), and there are {within}"
        if self.choice.mode == "slots" and self.smallest > self.memory:
            return (
                f"needs at least {readable_size(self.smallest)}, and there are {within}: "
                f"{readable_size(self.sizes.stays)} of dense weights, "
                f"{readable_size(self.sizes.least_experts)} of experts for one layer, "
                f"{readable_size(self.beside.resident)} beside them"
            )
        return None


def outlook(
    network: Network,
    *,
    memory: int | None = None,
    disk: float | None = None,
    context: int | None = None,
    kv_format: str = "f16",
    shares: Sequence[Shares] | None = None,
) -> Outlook:
    """`memory` bytes for everything, None: what is free now. `disk` bytes a second, None: the model's file is probed
    for half a second, if there is one. `shares`: how often each expert of each layer was used before, (E,) each; None:
    assumed. Measures this machine for half a second more. Raises SettingError for a KV format that is not known.
    """
    cache_format(kv_format)
    asked = context or min(network.trained_context, DEFAULT_CONTEXT)
    program = network.program(1)
    sizes, beside = Sizes.of(network.tensors, program), needed(network, asked, kv_format)
    disk_from = "as given"
    if disk is None and (found := probed(network)):
        best = found.best
        disk = best.nbytes_per_second
        disk_from = f"probed: reads of {readable_size(found.read_nbytes)}, {best.depth} at once, {best.way}"
    budget = int(SHARE * available_nbytes()) if memory is None else memory
    choice = choose(sizes, beside.resident, budget, promised=memory is not None, nbytes_per_second=disk)
    bound = step_work(program, 1, asked / 2, kv_format).bound(machine_rates())
    fits = sizes.weights + beside.resident <= budget
    room = sizes.experts if fits else max(0, budget - sizes.stays - beside.resident)
    likely = worst = None
    if sizes.layers:
        likely = expected(sizes.layers, shares or [assumed_shares(layer) for layer in sizes.layers], room)
        worst = expected(sizes.layers, [even_shares(layer) for layer in sizes.layers], room)
    again = program.weight_nbytes(1)  # of one token, where nothing stays in memory until it is wanted again
    slots = choice.mode == "slots"
    misses = [0.0 if fits else each.missed_nbytes if each and slots else float(again) for each in (likely, worst)]
    return Outlook(
        network,
        sizes,
        asked,
        beside,
        budget,
        promised=memory is not None,
        choice=choice,
        disk=disk,
        disk_from=disk_from if disk else "",
        shares_from="its use so far" if shares else "assumed, as measured of Kimi-Linear",
        expected=likely,
        worst=worst,
        missed_nbytes=misses[0],
        worst_missed_nbytes=misses[1],
        bound=bound,
    )


def probed(network: Network) -> DiskSpeed | None:
    """How fast the disk gives this model's experts, or all its matrices where it has none; None where nobody knows: a
    model that is planned, or whose files lie in no disk."""
    experts = [w for op in network.program(1).ops if op.name == "experts" for w in op.matrices]
    return probe(pieces(experts or network.weights_by_use(), network.source.files))


def learned_shares(network: Network) -> list[Shares] | None:
    """How earlier sessions used the experts of each layer, (E,) each; assumed for a layer that none used, None where
    nothing is known."""
    layers = Sizes.of(network.tensors, network.program(1)).layers
    counts = {layer.count for layer in layers}
    if len(counts) != 1 or not network.source.files:
        return None
    known = Usage(network.source, len(layers), counts.pop()).prior
    if not known.any():
        return None
    return [row if row.any() else assumed_shares(layer) for row, layer in zip(known, layers, strict=True)]


def machine_rates() -> Rates:
    """What this machine's memory and cores give, with as many threads as a model would have."""
    device = CpuDevice(1, "f32", None)
    try:
        return Limits(device, np.ones(READ_NBYTES, np.uint8)).rates()
    finally:
        device.close()


def speed(missed_nbytes: float, disk: float | None, bound: Bound) -> Speed | None:
    """Of generating: what is missing is read, all is computed, and the one does not hide behind the other: a layer's
    experts are not known before the layer. None where something is missing and nobody knows how fast it comes.
    """
    computing = bound.seconds / REACHED
    if missed_nbytes and not disk:
        return None
    reading = missed_nbytes / disk if disk else 0.0
    names = {"memory": "memory bandwidth"}
    limit = "disk" if reading > computing else names.get(bound.name, f"compute ({bound.name})")
    return Speed(1 / (reading + computing), limit)


def sections(found: Outlook) -> list[Section]:
    """As rows for people."""
    total, active = parameters(found.network)
    sizes, per_cent = found.sizes, 100 * found.room / found.sizes.experts if found.sizes.experts else 0.0
    model = [
        ("parameters", f"{readable_count(total)}, {readable_count(active)} active for one token"),
        ("weights", f"{readable_size(sizes.weights)}: {weights_in_words(sizes)}"),
        ("read for one token", readable_size(found.network.program(1).weight_nbytes(1))),
        (
            f"beside them at {found.context:,} tokens",
            f"{readable_size(found.beside.resident)}: {found.beside.parts}, pages of their files "
            f"{readable_size(LIBRARIES_NBYTES)}, what is kept on disk of conversations, on its way "
            f"{readable_size(found.beside.passing)}",
        ),
    ]
    memory = [
        ("allowed" if found.promised else "free", readable_size(found.memory)),
        ("loading", found.choice.why),
    ]
    if found.expected and sizes.experts:
        experts = sum(layer.count for layer in sizes.layers)
        fitting = f"{found.expected.held:,} of {experts:,} experts, {min(per_cent, 100.0):.0f} %"
        memory.append(("room for experts", f"{readable_size(found.room)}: {fitting}"))
    memory.append(("smallest budget", smallest_in_words(found)))
    return [("model", model), ("memory", memory), *([] if found.refusal else [("speed", speed_rows(found))])]


def weights_in_words(sizes: Sizes) -> str:
    parts = [f"{readable_size(sizes.dense)} always in memory"]
    if sizes.layers:
        parts.append(f"experts {readable_size(sizes.experts)}, {readable_size(sizes.token_experts)} for one token")
    if sizes.looked_up:
        parts.append(f"embedding {readable_size(sizes.looked_up)}, a row for one token")
    return ", ".join(parts)


def smallest_in_words(found: Outlook) -> str:
    whole = found.sizes.weights + found.beside.resident
    if found.sizes.layers:
        useful = readable_size(found.sizes.useful + found.beside.resident)
        return f"{readable_size(found.smallest)}; {useful} for what one token uses, {readable_size(whole)} for all"
    return f"{readable_size(whole)}; below that, every token reads all weights again"


def speed_rows(found: Outlook) -> list[tuple[str, str]]:
    """Rows about hits, reads and tokens a second."""
    rows = []
    if found.disk:
        rows.append(("disk", f"{readable_size(found.disk)}/s, {found.disk_from}"))
    elif found.missed_nbytes:
        rows.append(("disk", "not known: --disk-speed 1.2GB/s says"))
    if found.expected and found.worst and found.missed_nbytes and found.choice.mode == "slots":
        hits = f"{100 * found.expected.hit_rate:.0f} % ({found.shares_from})"
        rows.append(("experts in memory", f"{hits}; {100 * found.worst.hit_rate:.0f} % if all are used alike"))
    if found.missed_nbytes:
        rows.append(("read from disk for one token", readable_size(found.missed_nbytes)))
        if found.disk and found.expected:
            left = found.sizes.experts - (found.expected.held_nbytes if found.choice.mode == "slots" else 0)
            size = f"{readable_size(left)}, {left / found.disk:.0f} s of reading"
            rows.append((f"for a prompt of {min(CHUNK, found.context)} tokens", f"up to {size}"))
    rows.append((f"{found.bound.name} here", f"{found.bound.rate / 1e9:.1f} {found.bound.unit}"))
    if found.speed and found.worst_speed:
        worst = found.worst_speed.tokens_per_second
        least = f"; {readable_rate(worst)} if all are used alike" if found.missed_nbytes and found.expected else ""
        rate = readable_rate(found.speed.tokens_per_second)
        rows.append(("generating", f"about {rate} tokens/s, limited by {found.speed.limit}{least}"))
    return rows


def readable_rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:.0f}" if tokens_per_second >= 20 else f"{tokens_per_second:.2g}"


def numbers(found: Outlook) -> dict[str, object]:
    """For programs: bytes, bytes a second, shares; null is what nobody knows."""
    total, active = parameters(found.network)
    return {
        "parameters": total,
        "active_parameters": active,
        "weights_nbytes": found.sizes.weights,
        "dense_nbytes": found.sizes.dense,
        "experts_nbytes": found.sizes.experts,
        "token_nbytes": found.network.program(1).weight_nbytes(1),
        "token_experts_nbytes": found.sizes.token_experts,
        "context": found.context,
        "cache_nbytes": found.beside.cache,
        "beside_nbytes": found.beside.resident,
        "memory_nbytes": found.memory,
        "smallest_nbytes": found.smallest if found.sizes.layers else found.sizes.weights + found.beside.resident,
        "useful_nbytes": found.sizes.useful + found.beside.resident,
        "loading": found.choice.mode,
        "room_nbytes": found.room,
        "experts": sum(layer.count for layer in found.sizes.layers),
        "experts_held": found.expected.held if found.expected else 0,
        "hit_rate": found.expected.hit_rate if found.expected else None,
        "hit_rate_from": found.shares_from if found.expected else None,
        "worst_hit_rate": found.worst.hit_rate if found.worst else None,
        "missed_nbytes": round(found.missed_nbytes),
        "disk_nbytes_per_second": found.disk,
        "tokens_per_second": found.speed.tokens_per_second if found.speed else None,
        "worst_tokens_per_second": found.worst_speed.tokens_per_second if found.worst_speed else None,
        "limit": found.speed.limit if found.speed else None,
        "refusal": found.refusal,
    }
