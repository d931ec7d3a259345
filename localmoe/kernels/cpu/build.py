"""Kernels as machine code: shipped, or found in the cache, or compiled; then loaded by llvmlite. Numba is imported only
to compile one.

A kernel is a factory `f(v) -> Python function of integers`; `v` holds the vector operations of one instruction set
(`frontend.py`). Its C form is `void name(int64, ...)`. What a kernel computes is not known here.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache as memoised
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from localmoe.interrupt import Uninterrupted
from localmoe.kernels.cpu.isa import Isa, host, target_of
from localmoe.kernels.cpu.shipped import FOLDER, SUFFIX, Archive

Factory = Callable[[Any], Callable[..., None]]
Progress = Callable[[int, int, str], None]
_TRAILER = hashlib.sha256().digest_size
SEVERAL = 4  # kernels to compile for which processes are started: one takes a second until it begins
_KEPT_CACHES = 3  # folders of the cache; the others belong to versions that were used longer ago


@dataclass(frozen=True, slots=True)
class Kernel:
    """A registered kernel: how many int64 arguments it takes, its factories by instruction set ("" serves every
    other)."""

    name: str
    arguments: int
    factories: dict[str, Factory] = field(default_factory=dict)

    def factory(self, isa: Isa) -> Factory:
        return self.factories.get(isa.name) or self.factories[""]

    def is_own(self, isa: Isa) -> bool:
        """Whether the factory is one of this package, which every process can import."""
        factory = self.factory(isa)
        made = factory.func if isinstance(factory, partial) else factory
        return made.__module__.startswith(f"{__package__}.")


_REGISTRY: dict[str, Kernel] = {}


def kernel(name: str, arguments: int, isa: str = "") -> Callable[[Factory], Factory]:
    """Register the decorated factory as kernel `name`; with `isa`, only for that instruction set."""

    def register(factory: Factory) -> Factory:
        entry = _REGISTRY.setdefault(name, Kernel(name, arguments))
        assert entry.arguments == arguments and isa not in entry.factories, f"kernel {name} is registered twice"
        entry.factories[isa] = factory
        return factory

    return register


def registered() -> tuple[str, ...]:
    """Names of all kernels whose modules have been imported."""
    return tuple(sorted(_REGISTRY))


def cache_folder() -> Path:
    """Where compiled kernels are kept: LOCALMOE_CACHE, or the platform's cache folder."""
    if chosen := os.environ.get("LOCALMOE_CACHE"):
        return Path(chosen) / "kernels"
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "localmoe" / "kernels"


@memoised
def _sources() -> str:
    """A digest of every file of this package: what kernels are made from, and what calls them."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


def emitted_fingerprint(isa: Isa) -> str:
    """Changes with any kernel source, the series of llvmlite that loads an object, and the instruction set."""
    series = llvmlite.__version__.rpartition(".")[0]
    return hashlib.sha256(f"{_sources()} {series} {isa}".encode()).hexdigest()[:16]


@memoised
def fingerprint(isa: Isa) -> str:
    """Changes with any kernel source, the compiler's versions, the processor and the instruction set."""
    from importlib.metadata import version

    versions = f"{version('numba')} {llvmlite.__version__} {sys.version_info[:2]}"
    return hashlib.sha256(f"{_sources()} {versions} {host().processor} {isa}".encode()).hexdigest()[:16]


def target_machine(isa: Isa) -> llvm.TargetMachine:
    """What emits code for `isa`, which may be another machine's."""
    if isa.triple == host().triple:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
    else:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(isa.triple)
    emitted = {"cpu": isa.processor, "features": isa.features, "reloc": "pic", "codemodel": "jitdefault"}
    return target.create_target_machine(opt=3, jit=True, **emitted)


def optimised(name: str, isa: Isa) -> llvm.ModuleRef:
    """Kernel `name` as an optimised LLVM module with one external symbol, its name. Imports numba."""
    from localmoe.kernels.cpu import frontend

    entry = _REGISTRY[name]
    module = frontend.lower(entry.factory(isa)(frontend.vectors(isa)), name, entry.arguments, isa)
    machine = target_machine(isa)
    module.data_layout = str(machine.target_data)
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    missing = [f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")]
    assert not missing, f"kernel {name} would call {missing}"
    return module


def emitted(name: str, isa: Isa) -> bytes:
    """Kernel `name` as a relocatable object. Imports numba."""
    code = bytes(target_machine(isa).emit_object(optimised(name, isa)))
    called = outside(code)
    assert not called, f"kernel {name} would call {called}"  # such as memset, in place of a loop that stores zeros
    return code


def outside(code: bytes) -> list[str]:
    """The names that an ELF object expects from outside. With such an object, those that MCJIT loads beside it read
    their constants from a wrong place: they all count from one table of addresses, and each name is an entry in it."""
    sections = {section.name(): section.data() for section in llvm.ObjectFileRef.from_data(code).sections()}
    symbols, names = sections.get(b".symtab", b""), sections.get(b".strtab", b"")
    undefined = [name for name, _, _, section, _, _ in struct.iter_unpack("<IBBHQQ", symbols) if name and not section]
    found = [names[place : names.index(b"\0", place)].decode() for place in undefined]
    return [name for name in found if name != "_GLOBAL_OFFSET_TABLE_"]


def assembly(name: str, isa: Isa) -> str:
    """The assembly text of a kernel, for people and tests."""
    return str(target_machine(isa).emit_assembly(optimised(name, isa)))


class Kernels:
    """Addresses of kernels for one instruction set. It owns the machine code: keep it while an address is in use."""

    def __init__(self, isa: Isa, cache: Path | None = None, shipped: Path | None = None) -> None:
        """`cache`: the folder of compiled kernels; `shipped`: that of archives, if not the package's own."""
        self.isa = isa
        self._cache = cache or cache_folder()
        target = target_of(isa)
        self._shipped = (
            Archive((shipped or FOLDER) / (target.name + SUFFIX), emitted_fingerprint(target.isa)) if target else None
        )
        self._engines: list[llvm.ExecutionEngine] = []
        self._addresses: dict[str, int] = {}

    def address(self, name: str) -> int:
        """Address of `void name(int64, ...)`; compiled and loaded if it is not there yet."""
        if name not in self._addresses:
            self.prepare((name,))
        return self._addresses[name]

    def prepare(self, names: Iterable[str], progress: Progress | None = None) -> None:
        """Have all `names` ready. `progress(done, total, name)` hears of the beginning, and of each one that had to be
        compiled."""
        wanted = [n for n in dict.fromkeys(names) if n not in self._addresses]
        unknown = [n for n in wanted if n not in _REGISTRY]
        assert not unknown, f"no kernel of the name {', '.join(unknown)}; are their modules imported?"
        objects = {n: code for n in wanted if (code := self._ready_made(n)) is not None}
        if missing := [n for n in wanted if n not in objects]:
            objects |= self._compiled(missing, progress or (lambda done, total, name: None))
            self._forget_old()
        if objects:
            with Uninterrupted():  # modules would be freed twice, by the engine and by themselves
                self._load(objects)

    def _compiled(self, names: Sequence[str], progress: Progress) -> dict[str, bytes]:
        """By other processes where there are several to do, else here; each is kept as soon as it is done."""
        from localmoe.kernels.cpu.compilers import Wanted, compiled, processes_for  # a usual start needs none of it

        found: dict[str, bytes] = {}
        elsewhere = [Wanted(name, self.isa) for name in names if _REGISTRY[name].is_own(self.isa)]
        progress(0, len(names), names[0])
        if len(elsewhere) >= SEVERAL and (processes := processes_for(len(elsewhere))):
            with closing(compiled(elsewhere, processes)) as answers:
                for name, code in answers:
                    self._keep(name, code)
                    found[name] = code
                    progress(len(found), len(names), name)
        for name in [n for n in names if n not in found]:
            with Uninterrupted():  # neither Numba nor llvmlite is made to be left in the middle
                found[name] = emitted(name, self.isa)
            self._keep(name, found[name])
            progress(len(found), len(names), name)
        return found

    @cached_property
    def _folder(self) -> Path:
        return self._cache / fingerprint(self.isa) / self.isa.name

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.o"

    def _ready_made(self, name: str) -> bytes | None:
        return (self._shipped.object(name) if self._shipped else None) or self._cached(name)

    def _cached(self, name: str) -> bytes | None:
        try:
            stored = self._path(name).read_bytes()
        except OSError:
            return None
        code, trailer = stored[:-_TRAILER], stored[-_TRAILER:]
        return code if hashlib.sha256(name.encode() + code).digest() == trailer else None

    def _keep(self, name: str, code: bytes) -> None:
        """Store an object so that a reader sees all of it or nothing; a folder that cannot be written is no error."""
        trailer = hashlib.sha256(name.encode() + code).digest()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._folder, suffix=".new")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(code + trailer)
                os.replace(temporary, self._path(name))
            except OSError:
                os.unlink(temporary)
        except OSError:
            return

    def _forget_old(self) -> None:
        """Leave this fingerprint's folder and those written last; a process that uses another has its objects in
        memory."""
        own = self._folder.parent
        try:
            others = [f for f in self._cache.iterdir() if re.fullmatch("[0-9a-f]{16}", f.name) and f != own]
            others.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        except OSError:  # no cache, or another process forgets at the same time
            return
        for folder in others[_KEPT_CACHES - 1 :]:
            shutil.rmtree(folder, ignore_errors=True)

    def _load(self, objects: dict[str, bytes]) -> None:
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine(self.isa))
        for code in objects.values():
            engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        self._engines.append(engine)
        self._addresses.update({name: engine.get_function_address(name) for name in objects})
