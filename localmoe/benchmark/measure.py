"""Runs the tests of a benchmark in turns, ours and a peer's, with the machine's limits measured beside each; prints
nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from localmoe.benchmark import machine
from localmoe.benchmark.peer import Peer, Variant
from localmoe.benchmark.request import Request, Setting, Test
from localmoe.benchmark.work import Bound, Work, measured_work
from localmoe.experts.telemetry import Counts
from localmoe.formats import Bytes
from localmoe.kernels.cpu.device import CpuDevice
from localmoe.kernels.cpu.limits import Limits
from localmoe.kernels.program import Progress
from localmoe.model import Model

OURS = "localmoe"
WARMING_TOKENS = 8  # generated before the first round; of prompts one chunk is read


@dataclass(slots=True)
class Series:
    """One engine in one test under one setting: `samples` in tokens per second, one a round, and beside each the limit
    as it was just then, with the per cent of it that was reached (empty for devices whose limits are not measured).
    `experts`: what became of those that were chosen, in all rounds together."""

    engine: str
    test: Test
    setting: Setting
    samples: list[float] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    percents: list[float] = field(default_factory=list)
    started: str = ""
    detail: dict[str, Any] = field(default_factory=dict)  # what the peer itself says about this test
    experts: Counts = field(default_factory=Counts)

    def add(self, rate: float, bound: Bound | None, detail: dict[str, Any] | None = None) -> None:
        self.started = self.started or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.samples.append(rate)
        self.detail = detail or self.detail
        if bound:
            self.bounds.append(bound)
            self.percents.append(100 * bound.seconds * rate / self.test.tokens)

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def deviation(self) -> float:
        """The median absolute deviation from the median."""
        return median(abs(sample - self.median) for sample in self.samples)


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours over the better of the peer's variants, round by round: median, lowest and highest."""

    median: float
    low: float
    high: float
    series: Series  # of that variant


@dataclass(frozen=True, slots=True)
class Results:
    """Everything one run found; `opening` are the seconds until each setting's model was ready, `loaded` the loading
    mode that ran."""

    request: Request
    machine: dict[str, str]
    model: dict[str, Any]
    series: tuple[Series, ...]
    opening: dict[Setting, float]
    loaded: dict[Setting, str]
    peer: str = ""

    def ratio(self, ours: Series) -> Ratio | None:
        """None where there is no peer."""
        theirs = [s for s in self.series if s.engine != OURS and (s.test, s.setting) == (ours.test, ours.setting)]
        if ours.engine != OURS or not theirs:
            return None
        best = max(theirs, key=lambda series: series.median)
        ratios = [a / b for a, b in zip(ours.samples, best.samples, strict=True)]
        return Ratio(median(ratios), min(ratios), max(ratios), best)


class Subject:
    """A model opened under one setting, its limits, and the token ids that every test of it reads."""

    def __init__(self, request: Request, setting: Setting, data: Bytes | None, progress: Progress | None) -> None:
        start = perf_counter()
        self.model = Model(request.path, context=request.context, progress=progress, **setting.how)
        self.opening = perf_counter() - start
        self.model.wait_for_weights()
        self.setting = setting.of(self.model)
        device = self.model.device
        # What the limits are measured with would not fit the budget of memory that slots keep to.
        self.slotted = self.model.residency_mode == "slots"
        self.limits = Limits(device, data) if isinstance(device, CpuDevice) and not self.slotted else None
        self.program = self.model.network.program(2)
        self.experts = Counts()  # of the last test that was measured
        self._random = np.random.default_rng(0)
        self.ids = self._tokens(request.context)

    def tokens_per_second(self, test: Test) -> float:
        """The cache is filled up to the test's depth before the clock starts, and one token is generated: measuring the
        limits has put other bytes into the processor's caches (llama-bench warms up before each run as well)."""
        model, first, last = self.model, test.depth, test.depth + test.tokens
        # The same tokens once more would choose experts that are in memory from the last time.
        ids = [*self.ids[:first], *self._tokens(test.tokens)] if self.slotted else self.ids
        if len(model.cached) < first:
            model.forward(self.ids[len(model.cached) : first], len(model.cached), prompt=True)
        behind = model.cached[last:]
        model.forward(ids[first : first + 1], first)
        if (resumed := model.resumes(first)) < first:
            model.forward(ids[resumed:first], resumed, prompt=True)
        counted, start = model.counts(), perf_counter()
        if test.kind == "pp":
            model.forward(ids[first:last], first, prompt=True)
        else:
            for position in range(first, last):
                model.forward(ids[position : position + 1], position)
        seconds = perf_counter() - start
        self.experts = model.counts() - counted
        model.cached.extend(behind)  # the same tokens stand before them as when they were cached: no need to refill
        return test.tokens / seconds

    def _tokens(self, number: int) -> list[int]:
        found: list[int] = self._random.integers(0, self.model.network.config.vocabulary, number).tolist()
        return found

    def bound(self, test: Test) -> Bound | None:
        """The limit as it is now."""
        return self.work(test).bound(self.limits.rates()) if self.limits else None

    def work(self, test: Test) -> Work:
        return measured_work(self.program, test, self.setting.kv)

    def warm_up(self, tests: Sequence[Test]) -> None:
        for test in tests:
            most = self.model.chunk if test.kind == "pp" else WARMING_TOKENS
            self.tokens_per_second(replace(test, tokens=min(test.tokens, most)))


def run(request: Request, peer: Peer | None = None, progress: Progress | None = None) -> Results:
    """Every test under every setting once a round, forwards in one round and backwards in the next, so that a machine
    that drifts touches all alike. Raises what opening the model raises, and SettingError for a peer that fails."""
    told = machine.description()
    subjects: list[Subject] = []
    try:
        for setting in request.settings:
            data = next((s.limits.data for s in subjects if s.limits), None)
            subjects.append(Subject(request, setting, data, progress))
        series = _measured(request, subjects, peer, progress)
        opening = {subject.setting: subject.opening for subject in subjects}
        loaded = {subject.setting: subject.model.residency_mode for subject in subjects}
        build = peer.description(next(s.detail for s in series if s.detail)) if peer else ""
        return Results(request, told, facts(subjects[0].model), tuple(series), opening, loaded, build)
    finally:
        for subject in subjects:
            subject.model.close()


def _measured(
    request: Request, subjects: Sequence[Subject], peer: Peer | None, progress: Progress | None
) -> list[Series]:
    kept: dict[tuple[str, Test, Setting], Series] = {}

    def series(engine: str, test: Test, setting: Setting) -> Series:
        return kept.setdefault((engine, test, setting), Series(engine, test, setting))

    def ours(subject: Subject, test: Test) -> None:
        found = series(OURS, test, subject.setting)
        found.add(subject.tokens_per_second(test), subject.bound(test))
        found.experts += subject.experts

    def theirs(subject: Subject, tests: Sequence[Test], variant: Variant) -> None:
        assert peer is not None
        for test, found in peer.run(subject.model.path, tests, subject.setting, variant).items():
            series(variant.name, test, subject.setting).add(found["avg_ts"], subject.bound(test), found)

    steps: list[tuple[str, Callable[..., None], tuple[Any, ...]]] = []
    for subject in subjects:
        for depth in request.depths:
            tests = [test for test in request.tests if test.depth == depth]
            steps += [(test.name, ours, (subject, test)) for test in tests]
            for variant in peer.variants(depth, subject.setting.kv) if peer else ():
                steps.append((variant.name, theirs, (subject, tests, variant)))
    for subject in subjects:
        subject.warm_up(request.tests)
    for turn in range(request.repeat):
        for done, (name, step, arguments) in enumerate(steps if turn % 2 == 0 else reversed(steps)):
            if progress:
                progress(name, turn * len(steps) + done, request.repeat * len(steps))
            step(*arguments)
    order = [OURS, *dict.fromkeys(engine for engine, _, _ in kept if engine != OURS)]
    places = {test: i for i, test in enumerate(request.tests)}
    settings = [subject.setting for subject in subjects]
    return sorted(kept.values(), key=lambda s: (places[s.test], settings.index(s.setting), order.index(s.engine)))


def facts(model: Model) -> dict[str, Any]:
    """The model under llama-bench's column names; `format` is that of most weight bytes."""
    weights = list(model.source.tensors.values())
    sizes: dict[str, int] = {}
    for weight in weights:
        sizes[weight.format.name] = sizes.get(weight.format.name, 0) + weight.nbytes
    most = max(sizes, key=lambda name: sizes[name])
    return {
        "model_filename": str(model.path),
        "model_type": f"{model.architecture} {most}",
        "model_size": sum(sizes.values()),
        "model_n_params": sum(weight.elements for weight in weights),
    }
