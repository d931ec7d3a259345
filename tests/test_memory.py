"""How much memory a process may have, on made-up trees of /proc and /sys and, where it can be had, in a real group."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import localmoe.memory
from localmoe.errors import SettingError
from localmoe.memory import available_nbytes, parse_rate, parse_size, pressure, readable_size, resident, total_nbytes

MB = 1_000_000
V1_MOUNT = "35 32 0:32 {top} {at} rw,relatime shared:9 - cgroup cgroup rw,memory"
V2_MOUNT = "41 31 0:38 {top} {at} rw,relatime - cgroup2 cgroup2 rw,nsdelegate"


def write(folder: Path, **files: object) -> None:
    """`memory_max=5` becomes the file memory.max with "5"."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")


def stat(cached: int, total: str = "") -> str:
    """A memory.stat with so many cached bytes, a third of them long unused."""
    return f"anon 5\nfile 7\n{total}inactive_file {cached // 3}\n{total}active_file {cached - cached // 3}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 900 MB available and no groups."""
    write(tmp_path / "proc", meminfo=f"MemTotal: 1000000 kB\nMemAvailable: {900 * MB // 1024} kB\nHugePages_Total: 0")
    write(tmp_path / "proc/self", cgroup="", mountinfo="21 20 0:1 / /proc rw - proc proc rw")
    return tmp_path


def in_version_2(root: Path, own: str, at: str = "/sys/fs/cgroup", top: str = "/") -> Path:
    write(root / "proc/self", cgroup=f"0::{own}", mountinfo=V2_MOUNT.format(at=at, top=top))
    return root / at.lstrip("/")


def in_version_1(root: Path, own: str, top: str = "/") -> Path:
    groups = f"9:name=systemd:/other\n4:hugetlb,memory:{own}\n3:cpuset:/\n0::/"
    other = "33 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    write(root / "proc/self", cgroup=groups, mountinfo=other + V1_MOUNT.format(at="/sys/fs/cgroup/memory", top=top))
    return root / "sys/fs/cgroup/memory"


def test_without_groups_the_machine_says_what_is_available(root: Path) -> None:
    assert available_nbytes(root) == 900 * MB // 1024 * 1024


def test_a_limit_of_the_own_group_counts_not_that_of_a_sibling(root: Path) -> None:
    tree = in_version_2(root, "/user/own")
    write(tree / "user/own", memory_max=500 * MB, memory_current=100 * MB)
    write(tree / "user/other", memory_max=50 * MB, memory_current=10 * MB)
    assert available_nbytes(root) == 400 * MB


def test_the_tightest_group_on_the_way_up_counts(root: Path) -> None:
    tree = in_version_2(root, "/user/own")
    write(tree / "user/own", memory_max="max", memory_current=10 * MB)
    write(tree / "user", memory_max=300 * MB, memory_current=250 * MB)
    assert (available_nbytes(root), total_nbytes(root)) == (50 * MB, 300 * MB)


def test_a_group_that_is_throttled_earlier_than_limited_counts_from_there(root: Path) -> None:
    tree = in_version_2(root, "/own")
    write(tree / "own", memory_max=300 * MB, memory_high=200 * MB, memory_current=50 * MB)
    assert (available_nbytes(root), total_nbytes(root)) == (150 * MB, 200 * MB)


def test_cached_pages_of_files_are_available(root: Path) -> None:
    tree = in_version_2(root, "/own")
    write(tree / "own", memory_max=500 * MB, memory_current=450 * MB, memory_stat=stat(cached=400 * MB))
    assert available_nbytes(root) == 450 * MB


def test_a_group_whose_cache_is_counted_late_has_no_more_than_its_limit(root: Path) -> None:
    tree = in_version_2(root, "/own")
    write(tree / "own", memory_max=500 * MB, memory_current=350 * MB, memory_stat=stat(cached=400 * MB))
    assert available_nbytes(root) == 500 * MB


def test_version_1_is_read_with_the_pages_of_groups_below(root: Path) -> None:
    tree = in_version_1(root, "/outer/inner")
    write(tree / "outer/inner", memory_limit_in_bytes=(1 << 63) - 4096, memory_usage_in_bytes=0)
    write(tree / "outer", memory_limit_in_bytes=600 * MB, memory_usage_in_bytes=500 * MB)
    (tree / "outer/memory.stat").write_text(stat(cached=3) + "\n" + stat(cached=300 * MB, total="total_"))
    assert (available_nbytes(root), total_nbytes(root)) == (400 * MB, 600 * MB)


@pytest.mark.parametrize("version", [in_version_1, in_version_2])
def test_a_container_sees_its_own_end_of_the_tree(root: Path, version: object) -> None:
    tree = version(root, "/docker/abc/own", top="/docker/abc")  # type: ignore[operator]
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    names = names if version is in_version_1 else ("memory.max", "memory.current")
    for folder, limit in ((tree / "own", 500 * MB), (tree, 400 * MB)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(str(limit))
        (folder / names[1]).write_text("0")
    assert available_nbytes(root) == 400 * MB


@pytest.mark.parametrize("own", ["/../../elsewhere", "/not/below/what/is/mounted"])
def test_a_group_outside_of_what_is_mounted_leaves_what_can_be_seen(root: Path, own: str) -> None:
    write(in_version_2(root, own, top="/docker/abc"), memory_max=400 * MB, memory_current=0)
    assert available_nbytes(root) == 400 * MB


def test_a_mount_point_with_a_blank_is_found(root: Path) -> None:
    in_version_2(root, "/", at=r"/my\040groups")
    write(root / "my groups", memory_max=200 * MB, memory_current=0)
    assert available_nbytes(root) == 200 * MB


@pytest.mark.parametrize("text", ["", "garbage", "0::", "::::\n4:memory", "\0\udcff"])
def test_what_cannot_be_understood_bounds_nothing(root: Path, text: str) -> None:
    (root / "proc/self/cgroup").write_bytes(text.encode("utf-8", "surrogateescape"))
    (root / "proc/self/mountinfo").write_text("a - b\n- cgroup2 x\n1 2 3 4 5 - cgroup2\n")
    assert available_nbytes(root) == 900 * MB // 1024 * 1024
    assert pressure(root) is None


def test_a_group_that_is_over_its_limit_has_nothing_left(root: Path) -> None:
    write(in_version_2(root, "/own") / "own", memory_max=100 * MB, memory_current=120 * MB)
    assert available_nbytes(root) == 0


def test_pressure_is_that_of_the_own_group_before_that_of_the_machine(root: Path) -> None:
    assert pressure(root) is None
    write(root / "proc/pressure", memory="some avg10=1.25 avg60=0.00 avg300=0.00 total=3\nfull avg10=0.50 avg60=0")
    assert pressure(root) == 1.25
    tree = in_version_2(root, "/own")
    assert pressure(root) == 1.25
    write(tree / "own", memory_pressure="some avg10=42.07 avg60=0.00 avg300=0.00 total=3\nfull avg10=0.00")
    assert pressure(root) == 42.07


def test_a_process_knows_what_it_has_itself(root: Path) -> None:
    status = "VmHWM: 9000 kB\nVmRSS: 600 kB\nRssAnon: 300 kB\nRssFile: 200 kB\nRssShmem: 100 kB\nThreads: 3"
    (root / "proc/self/status").write_text(status)
    found = resident(root)
    assert (found.anonymous, found.files, found.nbytes, found.peak) == (400 << 10, 200 << 10, 600 << 10, 9000 << 10)


def test_where_there_is_no_proc_the_peak_stands_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localmoe.memory, "_peak_nbytes", lambda: 77)
    assert resident(tmp_path) == localmoe.memory.Resident(77, 0, 77)
    assert 0 < available_nbytes(tmp_path) <= total_nbytes(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_that_runs_this_has_memory() -> None:
    found = resident()
    assert 0 < found.anonymous < found.nbytes <= found.peak
    assert 0 < available_nbytes() <= total_nbytes()


@pytest.fixture
def real_groups() -> Iterator[Path]:
    """A group of 200 MB around a group without a limit, in the machine's own tree of version 1."""
    outer = Path(f"/sys/fs/cgroup/memory/localmoe-test-{os.getpid()}")
    inner = outer / "inner"
    try:
        inner.mkdir(parents=True)
        (outer / "memory.limit_in_bytes").write_text(str(200 << 20))
    except OSError as error:
        pytest.skip(f"no memory groups of version 1 can be made here: {error}")
    try:
        yield inner
    finally:
        for folder in (inner, outer):
            folder.rmdir()


PROGRAM = """
import mmap, sys
from localmoe.memory import available_nbytes, total_nbytes
with open(sys.argv[1], "w") as file:
    file.write("0")
found = [total_nbytes(), available_nbytes()]
with open(sys.argv[2], "wb") as file:
    file.write(bytes(64 << 20))
found.append(available_nbytes())
own = mmap.mmap(-1, 64 << 20)
own.write(bytes(64 << 20))
print(*found, available_nbytes())
"""


def test_a_limit_around_the_own_group_is_found_and_files_do_not_use_it_up(real_groups: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", PROGRAM, str(real_groups / "cgroup.procs"), str(tmp_path / "file")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    told = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout
    total, before, with_file, with_own = map(int, told.split())
    assert total == 200 << 20
    assert 150 << 20 < before <= 200 << 20
    assert before - with_file < 24 << 20
    assert 56 << 20 < with_file - with_own < 90 << 20


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        *[("8GiB", 8 << 30), ("8 gib", 8 << 30), ("1.2GB", 1_200_000_000), ("512M", 512_000_000), ("512Mi", 512 << 20)],
        *[("1TB", 10**12), (".5kB", 500), ("4096", 4096), ("  7b ", 7), ("2.KiB", 2048), ("3T", 3 * 10**12)],
    ],
)
def test_a_size_is_read_as_people_write_it(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GB", "8 GiBs", "8XB", "-1GB", "0", "0.1B", "1e9", "nan", "8GB 2", "٣GB", "9" * 400]
)
def test_what_is_no_size_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(SettingError, match=r"KiB, MiB, GiB or TiB \(of 1024\), such as 8GiB, not '"):
        parse_size(text)


@pytest.mark.parametrize("text", ["1.2GB/s", "1.2 GB / s", "1200MB", "1.2GB/sec"])
def test_a_rate_is_a_size_a_second(text: str) -> None:
    assert parse_rate(text) == 1_200_000_000


def test_a_size_that_was_shown_is_read_again() -> None:
    assert parse_size(readable_size(7_800_000_000)) == 7_800_000_000
