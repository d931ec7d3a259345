"""Why is it slow? What of the disk, the memory, the kernels and the processors holds a model back; reads headers alone
and prints nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from localmoe.benchmark import machine
from localmoe.errors import UnsupportedError
from localmoe.experts.pieces import cached_share, pieces
from localmoe.experts.probe import DiskSpeed, Rate
from localmoe.formats import Weight
from localmoe.inspection import Section
from localmoe.kernels.cpu.build import cache_folder, emitted_fingerprint
from localmoe.kernels.cpu.cores import default_threads, usable_cores
from localmoe.kernels.cpu.isa import NAMES, host_isa, runnable, target_of
from localmoe.kernels.cpu.shipped import FOLDER, SUFFIX, Archive
from localmoe.loader.source import PlannedTensors
from localmoe.memory import pressure, readable_size, total_nbytes
from localmoe.network import Network
from localmoe.outlook import Outlook, learned_shares, outlook, probed, readable_rate
from localmoe.processors import Busy, Watch, clock, governor, hottest

SLOW_DISK = 300e6  # bytes a second: what a SATA SSD gives even at small reads
STALLS = 0.3  # of a disk's bytes lost to stalls
WAITING = 5.0  # per cent of ten seconds in which something waited for memory
NOISE, STOLEN = 0.15, 0.03  # of the processors' time
SLOW_CLOCK = 0.7  # of the highest, right after work
UNCACHED = 0.5  # of the weights in the page cache
WIDE = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Findings:
    """What was measured and what the system told; shares from 0 to 1, None where it does not tell."""

    outlook: Outlook
    disk: DiskSpeed | None
    cached_dense: float | None
    cached_experts: float | None
    pressure: float | None  # per cent
    busy: Busy | None
    throttled: int | None
    clock: tuple[float, float] | None
    instruction_set: str
    better_set: str | None  # that the processor could run
    kernels: str
    threads: int
    cores: int


def examine(network: Network, memory: int | None = None) -> Findings:
    """Takes about a second. `memory` as `--memory` has it. Raises UnsupportedError for a model that has no files."""
    if isinstance(network.source.tensors, PlannedTensors):
        raise UnsupportedError(f"{network.source.path}: has settings and no weights; `localmoe plan` looks at those")
    watch = Watch()
    experts = [w for op in network.program(1).ops if op.name == "experts" for w in op.matrices]
    dense = _others(network, experts)
    files = network.source.files
    shares = cached_share(pieces(dense, files)), cached_share(pieces(experts, files))
    disk = probed(network)
    rate = disk.best.nbytes_per_second if disk else None
    found = outlook(network, memory=memory, disk=rate, shares=learned_shares(network))
    isa = host_isa()
    return Findings(
        found,
        disk,
        *shares,
        pressure=pressure(),
        busy=watch.seen(),
        throttled=watch.throttled(),
        clock=clock(),
        instruction_set=isa.name,
        better_set=next((n for n in runnable() if NAMES.index(n) < NAMES.index(isa.name)), None),
        kernels=kernels_from(),
        threads=default_threads(),
        cores=usable_cores().physical,
    )


def kernels_from() -> str:
    """Where the machine code of this host's instruction set comes from."""
    target = target_of(host_isa())
    if target and Archive(FOLDER / (target.name + SUFFIX), emitted_fingerprint(target.isa)).names():
        return f"come compiled for {target.name}"
    return f"compiled on this machine, kept in {cache_folder()}"


def sections(found: Findings) -> list[Section]:
    """As rows for people, the next thing to try last."""
    plan = found.outlook
    model = [
        ("file", str(plan.network.source.path)),
        ("weights", f"{readable_size(plan.sizes.weights)}, of which one token reads {_token_size(plan)}"),
        ("in the page cache", cached_in_words(found)),
        ("loading", plan.choice.why),
    ]
    waited = "the system does not tell" if found.pressure is None else f"{found.pressure:.1f} % of the last 10 s"
    memory = [
        ("allowed" if plan.promised else "free", f"{readable_size(plan.memory)} of {readable_size(total_nbytes())}"),
        ("beside the weights", f"{readable_size(plan.beside.nbytes)} at {plan.context:,} tokens"),
        ("waiting for memory", waited),
    ]
    return [
        ("model", model),
        (f"disk, random reads of {readable_size(found.disk.read_nbytes)}" if found.disk else "disk", disk_rows(found)),
        ("memory", memory),
        ("processors", processor_rows(found)),
        ("outcome", [("generating", outcome(plan)), ("to try next", next(advice(found)))]),
    ]


def disk_rows(found: Findings) -> list[tuple[str, str]]:
    if found.disk is None:
        return [("speed", "could not be measured: nothing to read, or all of it cached")]
    ways = {"direct": "past the page cache", "buffered": "through the page cache"}
    return [(f"{rate.depth} at once, {ways[rate.way]}", _rate_in_words(rate)) for rate in found.disk.rates]


def processor_rows(found: Findings) -> list[tuple[str, str]]:
    """Rows about kernels, threads and who else wants the processors."""
    load = " ".join(f"{load:.2f}" for load in machine.load_average()) or "unknown"
    rows = [
        ("processor", machine.processor()),
        ("kernels", f"{found.instruction_set}, {found.kernels}"),
        ("threads", f"{found.threads}; usable cores: {machine.cores()}"),
        (f"{found.outlook.bound.name} here", f"{found.outlook.bound.rate / 1e9:.1f} {found.outlook.bound.unit}"),
        ("load average", load),
    ]
    if found.busy:
        stolen = f", {100 * found.busy.stolen:.0f} % for other machines on the host"
        rows.append(("taken meanwhile", f"{100 * found.busy.others:.0f} % by other programs{stolen}"))
    if found.clock:
        chosen = f", governor {name}" if (name := governor()) else ""
        rows.append(("clock", f"{found.clock[0] / 1e9:.2f} of {found.clock[1] / 1e9:.2f} GHz{chosen}"))
    heat = [] if (degrees := hottest()) is None else [f"{degrees:.0f} °C"]
    heat += [] if found.throttled is None else [f"slowed down {found.throttled} times meanwhile"]
    return [*rows, ("heat", ", ".join(heat) or "the system does not tell")]


def cached_in_words(found: Findings) -> str:
    if found.cached_dense is None:
        return "the system does not tell"
    dense = f"{100 * found.cached_dense:.0f} % of what every token reads"
    return dense if found.cached_experts is None else f"{dense}, {100 * found.cached_experts:.0f} % of the experts"


def outcome(plan: Outlook) -> str:
    """What is to be expected once it runs."""
    if plan.refusal:
        return f"not possible: {plan.refusal}"
    if plan.speed is None:
        return "unknown, as the disk's speed is"
    rate = f"about {readable_rate(plan.speed.tokens_per_second)} tokens/s, limited by {plan.speed.limit}"
    if not plan.missed_nbytes:
        return f"{rate}, once the weights have been read"
    if plan.choice.mode == "slots" and plan.expected:
        return (
            f"{rate}: {readable_size(plan.missed_nbytes)} read for a token, {100 * plan.expected.hit_rate:.0f} % hits"
        )
    return f"{rate}: {readable_size(plan.missed_nbytes)} read for a token"


def advice(found: Findings) -> Iterator[str]:
    """Things to try, what promises most first; never empty."""
    plan = found.outlook
    whole = plan.sizes.weights + plan.beside.nbytes
    if plan.refusal:
        yield f"a smaller context or a smaller quantisation, or {readable_size(plan.smallest)} of memory"
    if found.pressure is not None and found.pressure > WAITING:
        yield "end other programs or give a smaller --memory: the system waits for memory"
    reading = bool(plan.missed_nbytes) and (plan.speed is None or plan.speed.limit == "disk")
    if reading:
        yield from _more_memory(plan, whole)
    if reading and found.disk:
        yield from _quicker_disk(found.disk)
    yield from _quicker_cores(found)
    if not plan.missed_nbytes and found.cached_dense is not None and found.cached_dense < UNCACHED:
        yield "ask twice: the weights are not in memory yet, and the first answer waits for the disk (or --lazy off)"
    if _share(plan.network, WIDE) > 0.5:
        yield "a quantised file: most weights have 16 or 32 bits; q8_0 or q4_K_M is read two to four times as fast"
    if reading:
        yield "a smaller quantisation: fewer bytes of each expert are read"
    limit = plan.speed.limit if plan.speed else "memory bandwidth"
    yield f"nothing: what is left is {limit}; a smaller quantisation or a model with fewer active parameters is quicker"


def _more_memory(plan: Outlook, whole: int) -> Iterator[str]:
    if plan.promised and whole <= total_nbytes():
        yield f"a larger --memory: {readable_size(whole)} hold all of it"
    elif whole <= total_nbytes():
        yield f"end other programs: {readable_size(whole)} hold all of it, {readable_size(plan.memory)} are free"
    elif plan.choice.mode == "mmap" and plan.sizes.layers:
        yield f"a shorter --context or other programs ended: {readable_size(plan.smallest)} are enough for --lazy slots"
    elif not plan.sizes.layers:
        yield f"a smaller quantisation: {readable_size(plan.memory)} do not hold the weights, and each token reads all"


def _quicker_disk(disk: DiskSpeed) -> Iterator[str]:
    if disk.best.stalled > STALLS:
        yield f"the disk when nobody else uses it: {100 * disk.best.stalled:.0f} % of its time went to stalls"
    if disk.best.nbytes_per_second < SLOW_DISK:
        yield f"the file on a quicker disk: this one gives {readable_size(disk.best.nbytes_per_second)}/s"


def _quicker_cores(found: Findings) -> Iterator[str]:
    if found.better_set:
        yield f"no LOCALMOE_ISA: it asks for {found.instruction_set}, and this processor has {found.better_set}"
    if found.busy and found.busy.others > NOISE:
        yield f"end other programs: they take {100 * found.busy.others:.0f} % of the processors"
    if found.busy and found.busy.stolen > STOLEN:
        yield f"another host: other machines on this one take {100 * found.busy.stolen:.0f} % of the processors"
    if found.throttled:
        yield "cooling: cores are slowed down for their heat"
    if found.clock and found.clock[0] < SLOW_CLOCK * found.clock[1]:
        yield f"mains power, or the governor performance: cores run at {found.clock[0] / 1e9:.1f} GHz"


def _others(network: Network, experts: Sequence[Weight]) -> list[Weight]:
    names = {weight.name for weight in experts}
    return [weight for weight in network.weights_by_use() if weight.name not in names]


def _share(network: Network, formats: Sequence[str]) -> float:
    weights = network.tensors.values()
    return sum(w.nbytes for w in weights if w.format.name in formats) / (sum(w.nbytes for w in weights) or 1)


def _token_size(plan: Outlook) -> str:
    return readable_size(plan.network.program(1).weight_nbytes(1))


def _rate_in_words(rate: Rate) -> str:
    stalls = f", {100 * rate.stalled:.0f} % lost to stalls" if rate.stalled > STALLS else ""
    return f"{readable_size(rate.nbytes_per_second)}/s{stalls}"
