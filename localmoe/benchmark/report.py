"""What a benchmark found, as tables, Markdown, JSON records and bars; measures and prints nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from localmoe.benchmark.measure import OURS, Results, Series
from localmoe.benchmark.request import Setting
from localmoe.benchmark.roofline import OpRow, Profile, Profiles
from localmoe.errors import SettingError
from localmoe.experts.telemetry import Counts
from localmoe.kernels.cpu.pinning import mask

Rows = list[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Bar:
    """A line of a plot: bars of one group share a scale."""

    group: str
    label: str
    value: float
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    header: tuple[str, ...]
    rows: Rows


@dataclass(frozen=True, slots=True)
class Report:
    """Ready to be shown: remarks stand below the tables."""

    model: Path
    tables: tuple[Table, ...]
    remarks: tuple[str, ...]
    machine: Mapping[str, str]
    records: list[dict[str, Any]]
    bars: tuple[Bar, ...]

    def json(self) -> str:
        return json.dumps(self.records, indent=2, ensure_ascii=False)

    def markdown(self) -> str:
        """The tables, with the remarks as a list behind them."""
        pieces = []
        for table in self.tables:
            lines = [table.header, ("---",) * len(table.header), *table.rows]
            title = f"{table.title}\n\n" if table.title else ""
            pieces.append(title + "\n".join("| " + " | ".join(_cell(c) for c in cells) + " |" for cells in lines))
        if self.remarks:
            pieces.append("\n".join(f"- {remark}" for remark in self.remarks))
        return "\n\n".join(pieces) + "\n"

    def save(self, place: Path) -> Path:
        """Append to a Markdown file, or to one named by the date and the model where `place` is a folder; -> the file.
        Raises SettingError where it cannot be written."""
        today = date.today().isoformat()
        folder = place.is_dir() or not place.suffix
        file = place / f"{today}-{self.model.stem or self.model.name}.md" if folder else place
        told = "\n".join(f"- {key}: {value}" for key, value in self.machine.items())
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as out:
                gap = "\n" if out.tell() else ""
                out.write(f"{gap}# {self.model.name}, {today}\n\n{told}\n\n{self.markdown()}")
        except OSError as error:
            raise SettingError(f"--save {place}: {error.strerror or error}") from error
        return file


def report_of_results(results: Results) -> Report:
    varied = _varied(results)
    versus = any(series.engine != OURS for series in results.series)
    better = {id(ratio.series) for ours in results.series if (ratio := results.ratio(ours))}
    header = ("test", *varied, *(("engine",) if versus else ()), "tokens/s", "range", "± MAD")
    counted = any(series.experts.chosen for series in results.series)
    measured = not counted or any(series.bounds for series in results.series)
    header += ("of the limit", "limits seen") if measured else ()
    header += ("hits", "GB/token", "reading") if counted else ()
    header += ("ratio",) if versus else ()
    rows: Rows = []
    for series in results.series:
        row = [series.test.name, *(str(getattr(series.setting, key)) for key in varied)]
        row += [series.engine] if versus else []
        row += [_number(series.median), _range(series.samples), _number(series.deviation)]
        row += _limits(series) if measured else []
        row += _experts(series.experts) if counted else []
        if versus:
            ratio = results.ratio(series)
            last = f"{ratio.median:.2f} ({_range((ratio.low, ratio.high))})" if ratio else ""
            row.append("better" if id(series) in better else last)
        rows.append(tuple(row))
    bars = [
        Bar(s.test.name, _label(s, varied, versus), s.median, f"{_number(s.median)} tokens/s") for s in results.series
    ]
    records = [_record(results, series) for series in results.series]
    table = Table("", header, rows)
    return Report(results.request.path, (table,), _remarks(results), results.machine, records, tuple(bars))


def report_of_profiles(profiles: Profiles) -> Report:
    tables, bars, records = [], [], []
    header = ("op", "time", "share", "GB/s", "GOPS", "of the limit", "entries")
    for profile in profiles.steps:
        total = sum(row.seconds for row in profile.rows)
        title = f"{profile.step.name}, {_words(profile.setting)}"
        rows = [_op_cells(row, total) for row in profile.rows]
        entries = sum(row.entries for row in profile.rows)
        rows.append(("all", f"{1e3 * total:.3f} ms", "100.0 %", "", "", "", str(entries)))
        tables.append(Table(f"{title}: {1e3 * profile.whole:.3f} ms in one piece", header, rows))
        bars += [Bar(title, row.op, row.seconds, f"{1e3 * row.seconds:.3f} ms") for row in profile.rows]
        records += [_op_record(profiles, profile, row) for row in profile.rows]
    remarks = (
        _machine_line(profiles.machine),
        f"medians of {profiles.request.repeat}; each entry run by itself, less the cost of calling it",
    )
    return Report(profiles.request.path, tuple(tables), remarks, profiles.machine, records, tuple(bars))


def _limits(series: Series) -> list[str]:
    """Per cent of the limit, and the rates that were seen for it."""
    name, unit, rates = _binding(series)
    if not name:
        return ["not measured", ""]
    return [f"{median(series.percents):.0f} % of {name}", f"{min(rates) / 1e9:.1f}…{max(rates) / 1e9:.1f} {unit}"]


def _experts(counts: Counts) -> list[str]:
    """Hit rate, bytes read for a token, and the share of time that was spent waiting for them."""
    if not counts.chosen:
        return ["", "", ""]
    rate, share = 100 * counts.hit_rate, 100 * counts.reading_share
    return [f"{rate:.1f} %", f"{counts.nbytes_per_token / 1e9:.3f}", f"{share:.0f} %"]


def _binding(series: Series) -> tuple[str, str, list[float]]:
    """The limit that bound most often: its name, its unit and its rates; empty where none was measured."""
    if not series.bounds:
        return "", "", []
    (name, unit), _ = Counter((bound.name, bound.unit) for bound in series.bounds).most_common(1)[0]
    return name, unit, [bound.rate for bound in series.bounds if bound.name == name]


def _varied(results: Results) -> list[str]:
    """The parts of the settings that take several values."""
    settings = [series.setting for series in results.series]
    return [field.name for field in fields(Setting) if len({getattr(s, field.name) for s in settings}) > 1]


def _number(value: float) -> str:
    """Three or four digits that count."""
    return f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2}f}"


def _range(values: Sequence[float]) -> str:
    return f"{_number(min(values))}…{_number(max(values))}"


def _label(series: Series, varied: Sequence[str], versus: bool) -> str:
    words = [f"{key} {getattr(series.setting, key)}" for key in varied]
    return ", ".join([*words, series.engine] if versus or not words else words)


def _words(setting: Setting) -> str:
    kept = f" on CPU {setting.pin}" if setting.pin else ""
    return f"{setting.threads} thread{'s' if setting.threads != 1 else ''}{kept}, KV {setting.kv}"


def _loading(results: Results, setting: Setting) -> str:
    """The mode that was asked for, and the one that ran where that is another."""
    loaded = results.loaded[setting]
    return setting.lazy if setting.lazy == loaded else f"{setting.lazy} ({loaded})"


def _machine_line(machine: Mapping[str, str]) -> str:
    keys = ("processor", "instruction set", "cores", "load average")
    return ", ".join(f"{key} {machine[key]}" if key == "load average" else machine[key] for key in keys)


def _remarks(results: Results) -> tuple[str, ...]:
    opened = ", ".join(
        f"{seconds:.2f} s with {_words(setting)}, loading {_loading(results, setting)}, device {setting.device}"
        for setting, seconds in results.opening.items()
    )
    remarks = [
        _machine_line(results.machine),
        f"medians of {results.request.repeat}, everything in turns; ready after {opened}",
    ]
    if results.peer:
        remarks += [results.peer, f"ratio: {OURS} over the better of its settings, round by round"]
    return tuple(remarks)


def _record(results: Results, series: Series) -> dict[str, Any]:
    """llama-bench's columns first (its nanoseconds are whole tests), then ours."""
    test, chosen = series.test, series.setting
    nanoseconds = [round(1e9 * test.tokens / sample) for sample in series.samples]
    name, _, rates = _binding(series)
    ratio = results.ratio(series)
    several = len(series.samples) > 1
    theirs = {
        **{key: series.detail.get(key) for key in ("build_commit", "build_number", "backends", "flash_attn", "repack")},
        "peer": results.peer,
    }
    ours = {
        "backends": chosen.device,
        "load_mode": chosen.lazy,
        "loaded_as": results.loaded[chosen],
        "memory_budget": chosen.limits.memory,
        "open_seconds": results.opening[chosen],
    }
    counts = series.experts
    counted = {
        "expert_hit_rate": counts.hit_rate,
        "expert_nbytes_per_token": counts.nbytes_per_token,
        "reading_share": counts.reading_share,
        "expert_counts": asdict(counts),
    }
    return {
        "engine": series.engine,
        "cpu_info": results.machine["processor"],
        **results.model,
        "n_threads": chosen.threads,
        "cpu_mask": mask(chosen.pin),
        "cpu_strict": bool(chosen.pin),
        "type_k": chosen.kv,
        "type_v": chosen.kv,
        "n_prompt": test.tokens if test.kind == "pp" else 0,
        "n_gen": test.tokens if test.kind == "tg" else 0,
        "n_depth": test.depth,
        "test_time": series.started,
        "avg_ns": round(fmean(nanoseconds)),
        "stddev_ns": round(stdev(nanoseconds)) if several else 0,
        "avg_ts": fmean(series.samples),
        "stddev_ts": stdev(series.samples) if several else 0.0,
        "samples_ns": nanoseconds,
        "samples_ts": series.samples,
        **(theirs if series.detail else ours),
        "median_ts": series.median,
        "mad_ts": series.deviation,
        "limit": name or None,
        "limit_percent": median(series.percents) if series.percents else None,
        "limit_lowest": min(rates, default=None),
        "limit_highest": max(rates, default=None),
        **(counted if counts.chosen else {}),
        "ratio": ratio.median if ratio else None,
        "ratio_lowest": ratio.low if ratio else None,
        "ratio_highest": ratio.high if ratio else None,
        "ratio_against": ratio.series.engine if ratio else None,
        "machine": dict(results.machine),
    }


def _op_cells(row: OpRow, total: float) -> tuple[str, ...]:
    return (
        row.op,
        f"{1e3 * row.seconds:.3f} ms",
        f"{100 * row.seconds / total:.1f} %",
        f"{row.work.nbytes / row.seconds / 1e9:.1f}" if row.work.nbytes and row.seconds else "",
        f"{row.work.ops / row.seconds / 1e9:.1f}" if row.work.ops and row.seconds else "",
        "" if row.percent is None else f"{row.percent:.0f} % of {row.bound.name}",
        str(row.entries),
    )


def _op_record(profiles: Profiles, profile: Profile, row: OpRow) -> dict[str, Any]:
    chosen, step = profile.setting, profile.step
    return {
        "model_filename": str(profiles.request.path),
        "n_threads": chosen.threads,
        "cpu_mask": mask(chosen.pin),
        "cpu_strict": bool(chosen.pin),
        "type_k": chosen.kv,
        "type_v": chosen.kv,
        "step": step.name,
        "n_tokens": step.tokens,
        "n_depth": step.depth,
        "op": row.op,
        "seconds": row.seconds,
        "whole_step_seconds": profile.whole,
        "entries": row.entries,
        "kernels": list(row.kernels),
        "nbytes": row.work.nbytes,
        "integer_ops": row.work.integer_ops,
        "float_ops": row.work.float_ops,
        "limit": row.bound.name if row.percent is not None else None,
        "limit_percent": row.percent,
        "machine": dict(profiles.machine),
    }


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
