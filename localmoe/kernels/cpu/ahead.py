"""Emits every registered kernel for every target, from one host, into archives for the wheel; no start needs it.

python -m localmoe.kernels.cpu.ahead [FOLDER] [--target NAME]... [--jobs N]
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from pkgutil import iter_modules

from localmoe.kernels.cpu.build import emitted, emitted_fingerprint, registered
from localmoe.kernels.cpu.cores import default_threads
from localmoe.kernels.cpu.isa import TARGETS, Target
from localmoe.kernels.cpu.shipped import FOLDER, SUFFIX, write_archive


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="where the archives go")
    parser.add_argument("--target", action="append", choices=[t.name for t in TARGETS], help="only this one")
    parser.add_argument("--jobs", type=int, default=default_threads(), help="processes")
    flags = parser.parse_args(arguments)
    import_kernels()
    chosen = [t for t in TARGETS if not flags.target or t.name in flags.target]
    write_archives(flags.folder, chosen, registered(), flags.jobs)


def import_kernels() -> None:
    """Import every module of this package: a kernel is registered where it is defined."""
    package = import_module(__package__)
    for module in iter_modules(package.__path__):
        import_module(f"{__package__}.{module.name}")


def write_archives(folder: Path, targets: Sequence[Target], kernels: Sequence[str], jobs: int) -> None:
    """Write one archive a target, with the kernels named; `jobs` processes compile."""
    wanted = list(product(targets, kernels))
    fingerprints = {t: emitted_fingerprint(t.isa) for t in targets}  # before: an archive of edited sources is no good
    found: dict[Target, dict[str, bytes]] = defaultdict(dict)
    with ProcessPoolExecutor(jobs, get_context("spawn"), import_kernels) as pool:
        for (target, name), code in zip(wanted, pool.map(_emitted, wanted, chunksize=8), strict=True):
            found[target][name] = code
    for target, objects in found.items():
        write_archive(folder / (target.name + SUFFIX), fingerprints[target], objects)


def _emitted(wanted: tuple[Target, str]) -> bytes:
    target, name = wanted
    return emitted(name, target.isa)


if __name__ == "__main__":
    main()
