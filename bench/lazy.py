"""A Mixture-of-Experts model that is larger than its memory: we and llama.cpp in turns, each run in a control group.

    python bench/lazy.py MODEL [--sizes 6GB,4GB,2GB,1GB] [--modes auto,slots,mmap] [--peer llama-bench] [--rounds 2]
    python bench/lazy.py MODEL --fits      what pausing behind routers costs when everything is in memory

Needs root, Linux with cgroups, and a disk: the page cache is dropped before every run. Sizes are limits of the group,
and our budget is 97 % of them. Prints a line for each run, then a table, then JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
PROMPT = 256  # tokens that fill the memory, ours and llama.cpp's, before tokens are counted
OF_LIMIT = 0.97  # of the group's memory is our budget: the rest is the kernel's own (page tables, sockets)
MAIN = Path(__file__).resolve()


class Group:
    """A control group with a limit of memory, version 1 or 2; processes enter it when they start."""

    def __init__(self, limit: int) -> None:
        self.old = (V1 / "memory.limit_in_bytes").exists()
        self.path = (V1 if self.old else V2) / f"localmoe-bench-{os.getpid()}"
        self.path.mkdir()
        self._write("memory.limit_in_bytes" if self.old else "memory.max", limit)
        self._write("memory.memsw.limit_in_bytes" if self.old else "memory.swap.max", limit if self.old else 0)

    def _write(self, name: str, value: object) -> None:
        if (self.path / name).exists():
            (self.path / name).write_text(str(value))

    def run(self, command: list[str]) -> tuple[str, int]:
        """Standard output and exit code."""
        entering = ["sh", "-c", f'echo $$ > "{self.path}/cgroup.procs"; exec "$@"', "sh", *command]
        found = subprocess.run(entering, capture_output=True, text=True, check=False)
        if found.returncode:
            print(found.stderr[-2000:], file=sys.stderr)
        return found.stdout, found.returncode

    def peak(self) -> int:
        """Most bytes that were ever in use, page cache among them."""
        return int((self.path / ("memory.max_usage_in_bytes" if self.old else "memory.peak")).read_text())

    def killed(self) -> int:
        """Processes that the system ended for want of memory."""
        text = (self.path / ("memory.oom_control" if self.old else "memory.events")).read_text()
        return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))

    def close(self) -> None:
        for _ in range(50):
            try:
                self.path.rmdir()
                return
            except OSError:
                time.sleep(0.1)


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def child(path: str, mode: str, memory: int, tokens: int) -> dict[str, Any]:
    """One run of ours: a prompt, then `tokens` of them, random ones as llama-bench takes."""
    import numpy as np

    from localmoe.experts.loading import Loading
    from localmoe.model import Model

    begun = time.perf_counter()
    budget = memory if mode != "mmap" else None
    model = Model(path, threads=2, context=PROMPT + tokens, loading=Loading(mode, memory=budget, learned=False))
    opened = time.perf_counter() - begun
    ids = np.random.default_rng(1).integers(0, model.network.config.vocabulary, PROMPT + tokens).tolist()
    model.forward(ids[:PROMPT], 0, prompt=True)
    first = time.perf_counter() - begun
    before, begun = model.counts(), time.perf_counter()
    for i in range(PROMPT, PROMPT + tokens):
        model.forward([ids[i]], i)
    seconds = time.perf_counter() - begun
    counts = model.counts() - before
    found = {
        "tokens_per_second": tokens / seconds,
        "open_seconds": opened,
        "prompt_seconds": first - opened,
        "mode": model.residency_mode,
        "why": model.loading_reason,
        "hit_rate": counts.hit_rate if counts.chosen else None,
        "nbytes_per_token": counts.nbytes_read / tokens,
        "waited": counts.waited_seconds / seconds,
    }
    model.close()
    return found


def ours(path: str, mode: str, limit: int, tokens: int) -> dict[str, Any]:
    group = Group(limit)
    drop_caches()
    try:
        command = [sys.executable, str(MAIN), path, "--child", mode, str(int(OF_LIMIT * limit)), str(tokens)]
        text, code = group.run(command)
        found = json.loads(text.splitlines()[-1]) if code == 0 else {"failed": code}
        return {**found, "peak": group.peak(), "killed": group.killed()}
    finally:
        group.close()


def peer(binary: str, path: str, limit: int, tokens: int) -> dict[str, Any]:
    """llama.cpp with its weights mapped, not repacked (which would copy them)."""
    group = Group(limit)
    drop_caches()
    how = ["-t", "2", "-p", "0", "-n", str(tokens), "-d", str(PROMPT), "-r", "1", "--repack", "0", "-o", "json"]
    try:
        text, code = group.run([binary, "-m", path, *how])
        found = {"tokens_per_second": json.loads(text)[0]["avg_ts"]} if code == 0 else {"failed": code}
        return {**found, "peak": group.peak(), "killed": group.killed()}
    finally:
        group.close()


def disk_speed(path: str) -> float:
    """Bytes a second of the disk at an expert's size, the best of the probe's ways."""
    from localmoe.experts.pieces import pieces
    from localmoe.experts.probe import probe
    from localmoe.loader.locate import open_source
    from localmoe.network import Network

    source = open_source(path)
    program = Network(source).program(1)
    weights = [w for op in program.ops if op.name == "experts" for w in op.matrices]
    found = probe(pieces(weights, source.files), 1.0)
    return found.best.nbytes_per_second if found else 0.0


def fits(path: str, rounds: int, tokens: int) -> None:
    """Decoding with everything in memory: mapped without pauses, and in slots that hold all."""
    import numpy as np

    from localmoe.experts.loading import Loading
    from localmoe.model import Model

    models = {
        mode: Model(path, threads=2, context=512, loading=Loading(mode, learned=False)) for mode in ("off", "slots")
    }
    ids = np.random.default_rng(1).integers(0, 32000, 400).tolist()
    for model in models.values():
        for start in range(0, 400, 50):
            model.forward(ids[start : start + 50], 0, prompt=True)
        for i in range(tokens):
            model.forward([ids[i]], i)
    rates: dict[str, list[float]] = defaultdict(list)
    for turn in range(rounds):
        for mode in list(models) if turn % 2 else reversed(list(models)):
            begun = time.perf_counter()
            for i in range(tokens):
                models[mode].forward([ids[i]], i)
            rates[mode].append(tokens / (time.perf_counter() - begun))
    ratios = [b / a for a, b in zip(rates["off"], rates["slots"], strict=True)]
    print(
        f"off {median(rates['off']):.2f} tok/s, slots {median(rates['slots']):.2f}; ratio {median(ratios):.3f}", ratios
    )
    print("hits in slots", models["slots"].counts().hit_rate)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("model")
    ask.add_argument("--child", nargs=3, metavar=("MODE", "MEMORY", "TOKENS"), help=argparse.SUPPRESS)
    ask.add_argument("--sizes", default="6GB,4GB,2GB,1GB")
    ask.add_argument("--modes", default="auto,slots,mmap")
    ask.add_argument("--peer")
    ask.add_argument("--rounds", type=int, default=2)
    ask.add_argument("--tokens", type=int, default=48)
    ask.add_argument("--peer-tokens", type=int)
    ask.add_argument("--fits", action="store_true")
    asked = ask.parse_args()
    if asked.child:
        mode, memory, tokens = asked.child
        print(json.dumps(child(asked.model, mode, int(memory), int(tokens))))
        return
    if asked.fits:
        fits(asked.model, max(asked.rounds, 5), asked.tokens)
        return
    from localmoe.memory import parse_size

    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for turn in range(asked.rounds):
        for size in asked.sizes.split(","):
            limit, disk = parse_size(size), disk_speed(asked.model)
            names = [*asked.modes.split(","), *(["llama.cpp"] if asked.peer else [])]
            for name in names if turn % 2 == 0 else reversed(names):
                if name == "llama.cpp":
                    result = peer(asked.peer, asked.model, limit, asked.peer_tokens or asked.tokens)
                else:
                    result = ours(asked.model, name, limit, asked.tokens)
                result |= {"disk": disk, "limit": limit}
                found[size, name].append(result)
                print(size, name, json.dumps(result), flush=True)
    print(
        f"\n{'size':>6} {'mode':>10} {'tok/s':>8} {'x peer':>8} {'hit':>6} {'GB/token':>9} {'of disk':>8} {'peak':>6}"
    )
    for (size, name), runs in found.items():
        rates = [run.get("tokens_per_second", 0.0) for run in runs]
        others = [run.get("tokens_per_second", 0.0) for run in found.get((size, "llama.cpp"), [])]
        ratios = [a / b for a, b in zip(rates, others, strict=False) if b]
        read = median(run.get("nbytes_per_token") or 0.0 for run in runs)
        hits = [run["hit_rate"] for run in runs if run.get("hit_rate") is not None]
        least = median(run.get("tokens_per_second", 0.0) * read / run["disk"] for run in runs)
        peak = max(run["peak"] / run["limit"] for run in runs)
        print(
            f"{size:>6} {name:>10} {median(rates):8.2f} {median(ratios) if ratios else 0:8.1f} "
            f"{median(hits) if hits else 0:6.3f} {read / 1e9:9.3f} {least:8.2f} {peak:6.3f}"
        )


if __name__ == "__main__":
    main()
