"""Where a step's time goes on the cpu: each tape entry run and timed by itself, summed by kernel.

    .venv/bin/python bench/profile_ops.py MODEL.gguf [--tokens 1] [--position 64] [--threads 2] [--repeat 20]

The median over the repeats is taken for each entry; an entry costs some microseconds more alone than inside its tape.
Run it on an idle machine: the last line compares the sum with the whole tape in one piece.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from time import perf_counter

import numpy as np

from localmoe.model import Model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--position", type=int, default=64)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeat", type=int, default=20)
    flags = parser.parse_args()
    model = Model(flags.model, threads=flags.threads, context=flags.position + flags.tokens)
    plan = model._plan(1 if flags.tokens == 1 else model.chunk, all_rows=False)
    ids = np.random.default_rng(0).integers(0, model.network.config.vocabulary, flags.tokens).astype(np.int32)
    plan.run(ids, flags.position)
    names = [name for name, _ in plan._kept._entries]
    times = np.zeros((flags.repeat, len(names)))
    whole = np.zeros(flags.repeat)
    for turn in range(flags.repeat):
        for i in range(len(names)):
            start = perf_counter()
            model.device.threads_run(plan._tape[i : i + 1])
            times[turn, i] = perf_counter() - start
        start = perf_counter()
        plan.run(ids, flags.position)
        whole[turn] = perf_counter() - start
    total: dict[str, float] = defaultdict(float)
    for name, seconds in zip(names, np.median(times, axis=0), strict=True):
        total[name] += seconds
    for name, seconds in sorted(total.items(), key=lambda pair: -pair[1]):
        share = 100 * seconds / sum(total.values())
        print(f"{name:22s} {1e6 * seconds:10.0f} µs {share:5.1f} %  {names.count(name)} entries")
    print(f"{'sum / whole tape':22s} {1e6 * sum(total.values()):10.0f} / {1e6 * np.median(whole):.0f} µs")
    model.close()


if __name__ == "__main__":
    main()
