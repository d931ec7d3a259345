"""llama.cpp measured beside us: its llama-bench run as a process, its JSON read and checked; knows no model of ours."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from localmoe.benchmark.request import Setting, Test
from localmoe.errors import SettingError
from localmoe.kernels.cpu.pinning import mask

X86 = ("x86_64", "amd64")
TIMEOUT = 1800.0  # seconds of one llama-bench process
MENTIONS = 16  # of an instruction in machine code; in a few megabytes of other bytes its pattern is found once at most


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run llama.cpp. Which is the fastest depends on the model, the test and the depth."""

    repack: bool
    flash_attention: bool = True

    @property
    def name(self) -> str:
        return f"llama.cpp{' repacked' if self.repack else ''}{'' if self.flash_attention else ' no-fa'}"

    @property
    def flags(self) -> list[str]:
        return ["--repack", "01"[self.repack], *([] if self.flash_attention else ["-fa", "0"])]


class Peer:
    """A llama-bench binary."""

    def __init__(self, path: Path) -> None:
        """Raises SettingError where there is no program."""
        if not path.is_file() or not os.access(path, os.X_OK):
            raise SettingError(f"--against {path}: no program; a llama-bench binary is wanted")
        self.path = path

    def variants(self, depth: int, kv: str) -> list[Variant]:
        """With and without repacking; behind cached tokens also without flash attention, which llama.cpp needs for
        quantised values only."""
        flash = (True, False) if depth and kv in ("f16", "f32") else (True,)
        return [Variant(repack, on) for on in flash for repack in (False, True)]

    def run(self, model: Path, tests: Sequence[Test], setting: Setting, variant: Variant) -> dict[Test, dict[str, Any]]:
        """One process, every test once: llama-bench's record of each. All tests are of one depth, and share its filled
        cache. Raises SettingError for a process that fails, and for an output that lacks a test."""
        sizes = {kind: [str(test.tokens) for test in tests if test.kind == kind] for kind in ("pp", "tg")}
        (depth,) = {test.depth for test in tests}
        words = [str(self.path), "-m", str(model), "-t", str(setting.threads), "-r", "1", "-o", "json"]
        words += ["-p", ",".join(sizes["pp"]) or "0", "-n", ",".join(sizes["tg"]) or "0", "-d", str(depth)]
        words += ["-C", mask(setting.pin), "--cpu-strict", "1"] if setting.pin else []
        words += ["-ctk", setting.kv, "-ctv", setting.kv, *variant.flags]
        records = self._records(self._output(words))
        found = {(r["n_prompt"], r["n_gen"], r["n_depth"]): r for r in records}
        keys = {t: (t.tokens, 0, depth) if t.kind == "pp" else (0, t.tokens, depth) for t in tests}
        missing = [test.name for test, key in keys.items() if key not in found]
        if missing:
            raise SettingError(f"--against {self.path}: its output has no result for {', '.join(missing)}")
        return {test: found[key] for test, key in keys.items()}

    def description(self, record: dict[str, Any]) -> str:
        """Which build it is: as a record of its says, and for which instruction set its machine code is made."""
        build = f"build {record.get('build_number', '?')} (commit {record.get('build_commit', '?')})"
        return f"llama.cpp {build}, {record.get('backends', '?')}, {record.get('cpu_info', '?')}, {self.instructions}"

    @cached_property
    def instructions(self) -> str:
        """The best instruction set that the binary and the ggml libraries beside it contain code for."""
        folders = (self.path.parent, self.path.parent.parent / "lib")
        files = {self.path.resolve()} | {f.resolve() for d in folders for f in d.glob("libggml*.so*")}
        code = [file.read_bytes() for file in sorted(files)] if platform.machine().lower() in X86 else []
        names = [name for name, pattern in _INSTRUCTIONS if any(_common(pattern, piece) for piece in code)]
        return next(iter(names), "instruction set unknown")

    def _output(self, words: list[str]) -> str:
        try:
            ended = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired as error:
            raise SettingError(f"--against {self.path}: no result after {TIMEOUT:g} s") from error
        except OSError as error:
            raise SettingError(f"--against {self.path}: it does not start: {error.strerror or error}") from error
        if ended.returncode:
            said = ended.stderr.decode(errors="replace").strip().splitlines()
            how = f"signal {-ended.returncode}" if ended.returncode < 0 else f"status {ended.returncode}"
            raise SettingError(f"--against {self.path}: it ended with {how}: {said[-1] if said else 'without a word'}")
        return ended.stdout.decode(errors="replace")

    def _records(self, output: str) -> list[dict[str, Any]]:
        try:
            records = json.loads(output)
            for record in records:
                numbers = record["n_prompt"], record["n_gen"], record["n_depth"], record["avg_ts"]
                if not all(math.isfinite(number) for number in numbers) or record["avg_ts"] <= 0:
                    raise ValueError(numbers)
        except (ValueError, KeyError, TypeError) as error:
            raise SettingError(f"--against {self.path}: its output is not that of llama-bench -o json") from error
        return list(records)


def _common(pattern: re.Pattern[bytes], code: bytes) -> bool:
    return sum(1 for _ in zip(range(MENTIONS), pattern.finditer(code), strict=False)) == MENTIONS


def _one_of(fits: Sequence[int]) -> bytes:
    return b"[" + b"".join(re.escape(bytes([byte])) for byte in fits) + b"]"


def _evex(opcode: int) -> re.Pattern[bytes]:
    """A 512-bit instruction of map 0F38, prefix 66, W0 (Intel SDM vol. 2, 2.7: the EVEX prefix)."""
    map_byte = _one_of([b for b in range(256) if b & 15 == 2])
    prefix_byte = _one_of([b for b in range(256) if b & 0x87 == 5])
    length_byte = _one_of([b for b in range(256) if b & 0x60 == 0x40])
    return re.compile(b"\x62" + map_byte + prefix_byte + length_byte + re.escape(bytes([opcode])), re.DOTALL)


def _vex_fma() -> re.Pattern[bytes]:
    """vfmadd231ps of 256 bits (map 0F38, prefix 66, W0)."""
    map_byte = _one_of([b for b in range(256) if b & 31 == 2])
    return re.compile(b"\xc4" + map_byte + _one_of([b for b in range(256) if b & 0x87 == 5]) + b"\xb8", re.DOTALL)


_INSTRUCTIONS = (("AVX-512 VNNI", _evex(0x50)), ("AVX-512 without VNNI", _evex(0xB8)), ("AVX2 only", _vex_fma()))
