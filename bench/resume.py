"""A long conversation opened again: time to its first token with its state from disk, against reading it again.

    .venv/bin/python bench/resume.py [--tokens 20000] [--repeat 7] [--pairs 6] MODEL.gguf

One process reads the conversation and keeps it; its time is that of reading it again, less what keeping took, which is
measured apart: prompts of 2,048 new tokens with an answer of 48, with and without keeping, in turns. Then others open
it, each a fresh process: kept files in the page cache, and dropped from it. From the call of `generate` to the first
token; opening the model and building its tokenizer are not in it, and its weights are in memory. Medians and the
range, on an idle machine, of which a loop of arithmetic after each measurement tells.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time

import numpy as np

import localmoe
from localmoe.engine import Engine
from localmoe.memory import readable_size
from localmoe.notebook import LoadedModel
from localmoe.prompt_cache.cache import PromptCache, open_prompt_cache
from localmoe.sampling import SamplingSettings

ANSWER = 48


def text(model: LoadedModel, length: int, seed: int) -> list[int]:
    size = model.network.config.vocabulary
    return np.random.default_rng(seed).integers(min(1000, size // 2), size, length).tolist()


def first_token(model: LoadedModel, kept: PromptCache | None, tokens: list[int], answer: int = 1) -> dict[str, float]:
    """Seconds to the first token of an answer, and to its end."""
    settings = SamplingSettings(temperature=0, max_tokens=answer)
    engine = Engine(model, kept)
    start = perf_counter()
    steps = engine.generate(tokens, settings, stop=frozenset())
    next(steps)
    first = perf_counter() - start
    for _ in steps:
        pass
    whole, stats = perf_counter() - start, engine.stats
    return {
        "first": first,
        "whole": whole,
        "restored": stats.restored_tokens,
        "restore": stats.restore_seconds,
        "prefill": stats.prefill_seconds,
        "decode": stats.decode_seconds,
        "noise": noise(),
    }


def noise() -> float:
    """Seconds of a fixed loop of arithmetic: longer where other programs compute."""
    start, total = perf_counter(), 0
    for i in range(300_000):
        total += i * i
    return perf_counter() - start


def opened(path: str, tokens: int) -> LoadedModel:
    model = localmoe.load(path, context=tokens + ANSWER + 16)
    model.wait_for_weights()
    _ = model.tokenizer  # built by now: a chat has made the prompt with it
    return model


def read(path: str, folder: Path, tokens: int) -> Iterator[dict[str, float]]:
    """The process that reads the conversation and keeps it."""
    model = opened(path, tokens)
    kept = open_prompt_cache(model, folder, 1 << 40)
    yield first_token(model, kept, text(model, tokens, 0))
    kept.close()
    model.close()


def reopen(path: str, folder: Path, tokens: int, prepared: bool) -> Iterator[dict[str, float]]:
    """A process that opens it again; `prepared`: a person has typed meanwhile."""
    model = opened(path, tokens)
    kept = open_prompt_cache(model, folder, 1 << 40)
    if prepared:
        kept.prepare()
    found = first_token(model, kept, text(model, tokens, 0))
    yield found | {"messages": len(kept.take_messages())}
    kept.close()
    model.close()


def paired(path: str, folder: Path, pairs: int) -> Iterator[dict[str, float]]:
    """Prompts with and without keeping, in turns."""
    model = opened(path, 2048)
    kept = open_prompt_cache(model, folder, 1 << 40)
    kept.prepare()
    first_token(model, None, text(model, 600, 1))
    own, beside = clocked(kept)
    for number in range(2 * pairs):
        tokens = text(model, 2048, 100 + number)
        keeps = (number + number // 2) % 2 == 0  # on off off on: a drift falls on both
        own.clear()
        beside.clear()
        found = first_token(model, kept if keeps else None, tokens, ANSWER)
        kept._writer.drain()
        yield {"keeps": keeps, **found, "own": sum(own), "beside": sum(beside)}
    kept.close()
    model.close()


def clocked(kept: PromptCache) -> tuple[list[float], list[float]]:
    """Two lists that get what keeping takes: seconds in which the answer waits, and of the processor in the writer."""
    keep, put = kept.keep, kept._writer.put
    own, beside = [], []

    def timed_keep(*, done: bool) -> None:
        start = perf_counter()
        keep(done=done)
        own.append(perf_counter() - start)

    def timed_put(job: Callable[[], None], **how: bool) -> bool:
        def timed_job() -> None:
            start = thread_time()
            job()
            beside.append(thread_time() - start)

        return put(timed_job, **how)

    kept.keep, kept._writer.put = timed_keep, timed_put
    return own, beside


def child(*arguments: object) -> list[dict[str, float]]:
    """What a process of this script prints, an object a line."""
    command = [sys.executable, __file__, *map(str, arguments)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def drop(folder: Path) -> None:
    """Kept files are written out and leave the page cache."""
    for path in folder.glob("*/*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def spread(values: list[float], unit: str = "s") -> str:
    return f"{median(values):.3f} {unit} ({min(values):.3f} to {max(values):.3f}, n = {len(values)})"


def report(path: str, tokens: int, repeat: int, pairs: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        if repeat:
            report_resumed(path, tokens, repeat, Path(place) / "kept")
        if pairs:
            report_paired(path, pairs, Path(place) / "pairs")


def report_resumed(path: str, tokens: int, repeat: int, folder: Path) -> None:
    """Of one process that reads the conversation, and others that open it."""
    (whole,) = child(path, "--tokens", tokens, "--do", "read", "--folder", folder)
    size = sum(file.stat().st_size for file in folder.glob("*/*"))
    print(f"{Path(path).name}: {tokens} tokens, {readable_size(size)} kept in {len(list(folder.glob('*/*')))} files")
    print(f"noise is a loop that takes {min(noise() for _ in range(5)):.3f} s when nothing else runs")
    print(f"read again: first token after {whole['first']:.1f} s; noise {whole['noise']:.3f} s")
    for way in ("in the page cache, not prepared", "in the page cache", "kept files dropped from it"):
        found = []
        for _ in range(repeat):
            if "dropped" in way:
                drop(folder)
            do = "reopen" if "not prepared" in way else "reopen-prepared"
            found += child(path, "--tokens", tokens, "--do", do, "--folder", folder)
        assert all(one["restored"] == tokens - 1 and one["messages"] == 0 for one in found)
        firsts, restores = ([one[key] for one in found] for key in ("first", "restore"))
        print(f"{way}: first token after {spread(firsts)}, {whole['first'] / median(firsts):.0f} times as soon;")
        print(f"    of it state from disk {spread(restores)}, noise {spread([one['noise'] for one in found])}")


def report_paired(path: str, pairs: int, folder: Path) -> None:
    """What keeping costs a prompt of 2,048 tokens and an answer of 48."""
    found = child(path, "--pairs", pairs, "--do", "paired", "--folder", folder)
    for what in ("prefill", "decode", "whole"):
        on, off = ([one[what] for one in found if one["keeps"] is keeps] for keeps in (True, False))
        ratios = [100 * (a / b - 1) for a, b in zip(on, off, strict=True)]
        print(f"keeping, {what}: {spread(on)} against {spread(off)}; pair by pair {spread(ratios, '%')}")
    for what, who in (("own", "the answer waits"), ("beside", "processor of the writer")):
        shares = [100 * one[what] / one["whole"] for one in found if one["keeps"]]
        seconds = [one[what] for one in found if one["keeps"]]
        print(f"keeping, {who}: {spread(seconds)}, {spread(shares, '%')} of prompt and answer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--do", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    match asked.do:
        case None:
            report(asked.model, asked.tokens, asked.repeat, asked.pairs)
            return
        case "read":
            found = read(asked.model, asked.folder, asked.tokens)
        case "paired":
            found = paired(asked.model, asked.folder, asked.pairs)
        case do:
            found = reopen(asked.model, asked.folder, asked.tokens, do == "reopen-prepared")
    for one in found:
        print(json.dumps(one), flush=True)


if __name__ == "__main__":
    main()
