"""What keeping a conversation on disk costs: a token, the end of a message, opening a long one, a list of many.

python bench/journal.py [FOLDER]      files are written there, and removed (default: the folder for temporary files)
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

from localmoe.conversation.library import Library
from localmoe.conversation.lines import SUFFIX
from localmoe.conversation.tree import Conversation

TOKENS, ENDS, MANY, ROUNDS = 20_000, 200, 2_000, 5


def seconds(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def answer(talk: Conversation, tokens: int) -> float:
    """Microseconds a token."""
    talk.add("a question of some words")
    talk.begin("demo")
    taken = seconds(lambda: [talk.grow(" token", [12345]) for _ in range(tokens)])
    talk.end("stop")
    return taken / tokens * 1e6


def main() -> None:
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None))
    try:
        library = Library(folder / "localmoe" / "conversations")
        kept, private = library.open_new(), library.open_new(keep=False)
        rounds = [(answer(kept.conversation, TOKENS), answer(private.conversation, TOKENS)) for _ in range(ROUNDS)]
        with_file, without = (median(column) for column in zip(*rounds, strict=True))
        share = 100 * (with_file - without) / 500
        print(f"a token       {with_file:.1f} us, {without:.1f} us without a file: {share:.2f} % of 2,000 tokens/s")
        ends = sorted(1000 * seconds(lambda: kept.conversation.add("more")) for _ in range(ENDS))
        most = quantiles(ends, n=20)[-1]
        print(f"a message     {median(ends):.2f} ms until it is on the disk, 95 % within {most:.2f} ms")
        kept.close()
        long = library.open_new()
        answer(long.conversation, TOKENS)
        long.close()
        path = library.folder() / (long.name + SUFFIX)
        opened = [seconds(lambda: library.open_named(long.name).close()) for _ in range(ROUNDS)]
        print(f"opening       {median(opened):.3f} s for {TOKENS} tokens, {path.stat().st_size / 1e6:.2f} MB")
        some = library.open_new()
        answer(some.conversation, 500)
        some.close()
        data = (library.folder() / (some.name + SUFFIX)).read_bytes()
        for number in range(MANY):
            (library.folder() / f"talk {number}{SUFFIX}").write_bytes(data)
        listed = [seconds(library.listing) for _ in range(ROUNDS)]
        print(f"a list        {median(listed):.3f} s for {len(library.names())}, most of {len(data) / 1000:.0f} kB")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
