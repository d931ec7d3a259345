"""Where a step's time goes on the cpu: every tape entry timed by itself, summed by op, beside what the machine could
do; prints nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np
import numpy.typing as npt

from localmoe.benchmark import machine
from localmoe.benchmark.request import Request, Setting, Test
from localmoe.benchmark.work import Bound, Work, op_work
from localmoe.errors import SettingError
from localmoe.kernels.cpu.device import CpuDevice
from localmoe.kernels.cpu.limits import Limits, Rates
from localmoe.kernels.program import Op, Program, Progress
from localmoe.model import Model

Times = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class OpRow:
    """All ops of one kind in a step: median seconds, least work, per cent of the limit that binds (None where nothing
    is multiplied), tape entries and their kernels."""

    op: str
    seconds: float
    work: Work
    bound: Bound
    percent: float | None
    entries: int
    kernels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """One step: its ops, longest first; `whole` are the median seconds of its tape in one piece."""

    step: Test
    setting: Setting
    rows: tuple[OpRow, ...]
    whole: float


@dataclass(frozen=True, slots=True)
class Profiles:
    """Everything one run found."""

    request: Request
    machine: dict[str, str]
    steps: tuple[Profile, ...]


def run(request: Request, progress: Progress | None = None) -> Profiles:
    """A decoded token where the request generates, a chunk of a prompt where it reads one, at every depth and setting.
    Raises what opening the model raises, and SettingError for a device without a tape."""
    told = machine.description()
    found = []
    for setting in request.settings:
        model = Model(request.path, context=request.context, progress=progress, **setting.how)
        try:
            model.wait_for_weights()
            device = model.device
            if not isinstance(device, CpuDevice):
                raise SettingError(f"--ops is for the cpu device; {device.name!r} has no tape")
            if model.residency_mode == "slots":
                raise SettingError("--ops is for steps that never wait for reads, as those of --lazy slots do")
            limits = Limits(device)
            for step in steps(request, model.chunk):
                rows, whole = profiled(model, device, limits, step, setting.kv, request.repeat, progress)
                found.append(Profile(step, setting.of(model), rows, whole))
        finally:
            model.close()
    return Profiles(request, told, tuple(found))


def steps(request: Request, chunk: int) -> list[Test]:
    """The steps that the tests are made of, each once."""
    pieces = [replace(test, tokens=min(test.tokens, chunk) if test.kind == "pp" else 1) for test in request.tests]
    return list(dict.fromkeys(pieces))


def profiled(
    model: Model, device: CpuDevice, limits: Limits, step: Test, kv: str, repeat: int, progress: Progress | None
) -> tuple[tuple[OpRow, ...], float]:
    """The rows of one step and the seconds of its whole tape, after as many cached tokens as its depth."""
    program = model.network.program(1 if step.kind == "tg" else model.chunk)
    vocabulary = model.network.config.vocabulary
    ids = np.random.default_rng(0).integers(0, vocabulary, step.depth + step.tokens).astype(np.int32)
    if step.depth:
        model.forward(ids[: step.depth].tolist(), 0, prompt=True)
    plan = device.compile(program)
    plan.run(ids[step.depth :], step.depth)  # what the entries find in the arena and in the cache
    times = np.zeros((repeat, len(plan.entries())))
    rates, whole = [], []
    for turn in range(repeat):
        if progress:
            progress(f"ops of {step.name}", turn, repeat)
        rates.append(limits.rates())
        times[turn] = [_seconds(partial(plan.run_entry, i)) for i in range(times.shape[1])]
        whole.append(_seconds(partial(plan.run, ids[step.depth :], step.depth)))
        times[turn] = without_calls(times[turn], whole[-1])
    works = [op_work(program, op, step.tokens, step.depth, kv) for op in plan.program.ops]
    return tuple(_rows(plan.program, plan.entries(), plan.owners(), works, times, rates)), median(whole)


def _seconds(action: Callable[[], object]) -> float:
    start = perf_counter()
    action()
    return perf_counter() - start


def without_calls(times: Times, whole: float) -> Times:
    """Seconds of entries that were called one by one, less what a call costs: as much for each as makes their sum that
    of the whole tape. Ten microseconds a call are a tenth of a token of a small model."""
    excess = max(0.0, (float(times.sum()) - whole) / times.size)
    rest: Times = np.maximum(times - excess, 0.0)
    return rest


def _rows(
    program: Program, kernels: list[str], owners: list[int], works: list[Work], times: Times, rates: list[Rates]
) -> list[OpRow]:
    rows = []
    kinds = [kind_of(op) for op in program.ops]
    for kind in dict.fromkeys(kinds):
        mine = [i for i, owner in enumerate(owners) if kinds[owner] == kind]
        work = sum((w for w, k in zip(works, kinds, strict=True) if k == kind), Work())
        seconds = times[:, mine].sum(axis=1)
        bounds = [work.bound(rate) for rate in rates]
        shares = [100 * bound.seconds / one for bound, one in zip(bounds, seconds, strict=True) if one]
        percent = median(shares) if shares and work.ops else None
        names = tuple(dict.fromkeys(kernels[i] for i in mine))
        middle = sorted(bounds, key=lambda bound: bound.seconds)[len(bounds) // 2]
        rows.append(OpRow(kind, float(np.median(seconds)), work, middle, percent, len(mine), names))
    return sorted(rows, key=lambda row: -row.seconds)


def kind_of(op: Op) -> str:
    """What is summed up: the op and the formats of its matrices."""
    return " ".join([op.name, *sorted({w.format.name for w in op.matrices})])
