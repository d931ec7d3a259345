"""Kernels as machine code: found in the cache or compiled, then loaded by llvmlite; numba is imported only to compile
one.

A kernel is a factory `f(v) -> Python function of integers`; `v` holds the vector operations of one instruction set
(`frontend.py`). Its C form is `void name(int64, ...)`. What a kernel computes is not known here.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache as memoised
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from localmoe.kernels.cpu.isa import Isa

Factory = Callable[[Any], Callable[..., None]]
Progress = Callable[[int, int, str], None]
_TRAILER = hashlib.sha256().digest_size


@dataclass(frozen=True, slots=True)
class Kernel:
    """A registered kernel: how many int64 arguments it takes, its factories by instruction set ("" serves every
    other)."""

    name: str
    arguments: int
    factories: dict[str, Factory] = field(default_factory=dict)

    def factory(self, isa: Isa) -> Factory:
        return self.factories.get(isa.name) or self.factories[""]


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
def fingerprint(isa: Isa) -> str:
    """Changes with any kernel source, the compiler's versions, the processor and the instruction set."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    versions = f"{version('numba')} {version('llvmlite')} {sys.version_info[:2]}"
    digest.update(f"{versions} {llvm.get_host_cpu_name()} {llvm.get_process_triple()} {isa}".encode())
    return digest.hexdigest()[:16]


def target_machine(isa: Isa) -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()  # system calls are written as assembly
    target = llvm.Target.from_triple(llvm.get_process_triple())
    emitted = {"cpu": isa.processor, "features": isa.features, "reloc": "pic", "codemodel": "jitdefault"}
    return target.create_target_machine(opt=3, jit=True, **emitted)


def optimised(name: str, isa: Isa) -> llvm.ModuleRef:
    """Kernel `name` as an optimised LLVM module with one external symbol, its name. Imports numba."""
    from localmoe.kernels.cpu import frontend

    entry = _REGISTRY[name]
    module = frontend.lower(entry.factory(isa)(frontend.vectors(isa)), name, entry.arguments)
    machine = target_machine(isa)
    module.data_layout = str(machine.target_data)
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    missing = [f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")]
    assert not missing, f"kernel {name} would call {missing}"
    return module


def assembly(name: str, isa: Isa) -> str:
    """The assembly text of a kernel, for people and tests."""
    return str(target_machine(isa).emit_assembly(optimised(name, isa)))


class Kernels:
    """Addresses of kernels for one instruction set. It owns the machine code: keep it while an address is in use."""

    def __init__(self, isa: Isa, cache: Path | None = None) -> None:
        self.isa = isa
        self._folder = (cache or cache_folder()) / fingerprint(isa) / isa.name
        self._engines: list[llvm.ExecutionEngine] = []
        self._addresses: dict[str, int] = {}

    def address(self, name: str) -> int:
        """Address of `void name(int64, ...)`; compiled and loaded if it is not there yet."""
        if name not in self._addresses:
            self.prepare((name,))
        return self._addresses[name]

    def prepare(self, names: Iterable[str], progress: Progress | None = None) -> None:
        """Have all `names` ready. `progress(done, total, name)` hears of each one that must be compiled, and of the
        end."""
        wanted = [n for n in dict.fromkeys(names) if n not in self._addresses]
        unknown = [n for n in wanted if n not in _REGISTRY]
        assert not unknown, f"no kernel of the name {', '.join(unknown)}; are their modules imported?"
        objects = {n: code for n in wanted if (code := self._cached(n)) is not None}
        missing = [n for n in wanted if n not in objects]
        for done, name in enumerate(missing):
            if progress:
                progress(done, len(missing), name)
            objects[name] = target_machine(self.isa).emit_object(optimised(name, self.isa))
            self._keep(name, objects[name])
        if progress and missing:
            progress(len(missing), len(missing), "")
        if objects:
            self._load(objects)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.o"

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

    def _load(self, objects: dict[str, bytes]) -> None:
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine(self.isa))
        for code in objects.values():
            engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        self._engines.append(engine)
        self._addresses.update({name: engine.get_function_address(name) for name in objects})
