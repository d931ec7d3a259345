"""A file of 400 GB is inspected and planned from its header: nothing else of it is read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huge import ACTIVE, BLOCKS, DENSE_BLOCKS, EXPERTS, HIDDEN, TOTAL, USED, WIDTH, deepseek_r1

import localmoe.outlook
from localmoe.cli import main
from localmoe.doctor import examine
from localmoe.experts.pieces import Piece, cached_share
from localmoe.experts.sizes import ROWS_NBYTES
from localmoe.inspection import open_network, parameters, report
from localmoe.kernels.cpu.limits import Rates
from localmoe.memory import resident
from localmoe.outlook import numbers, outlook, sections

GIB = 1 << 30
HEAD = 64 << 10  # of each tensor: whoever reads one begins there
NEAR = 32 << 20  # of the file: the header, and what the system reads ahead of it


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("huge") / "r1.gguf"
    try:
        deepseek_r1(path)
    except OSError as error:
        pytest.skip(f"no sparse file of 400 GB can be made here: {error}")
    yield path
    path.unlink()


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localmoe.outlook, "machine_rates", lambda: Rates(32e9, 200e9, 900e9))


def test_it_is_400_gb_of_which_the_disk_holds_a_header(huge: Path) -> None:
    found = huge.stat()
    assert 400e9 < found.st_size < 410e9
    assert found.st_blocks * 512 < 16e6
    assert parameters(open_network(huge)) == (TOTAL, ACTIVE)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into the page cache")
def test_inspect_plan_and_doctor_read_the_header_alone(huge: Path) -> None:
    before = resident().files
    network = open_network(huge)
    report(huge)
    sections(outlook(network, memory=32 * GIB))  # probes, and finds a hole
    examine(network)
    slabs = [slab for weight in network.tensors.values() for slab in weight.slabs]
    first = min(slab.ctypes.data for slab in slabs)
    heads = [Piece(huge, 0, min(HEAD, slab.size), slab.ctypes.data) for slab in slabs]
    assert len(heads) > (BLOCKS - DENSE_BLOCKS) * 3 * EXPERTS
    assert cached_share([head for head in heads[::7] if head.address > first + NEAR]) == 0
    assert resident().files - before < NEAR


def test_the_smallest_budget_and_what_one_token_uses_are_known(huge: Path) -> None:
    network = open_network(huge)
    found = outlook(network, memory=32 * GIB, disk=1.5e9)
    told = numbers(found)
    token = network.program(1).weight_nbytes(1)
    assert told["useful_nbytes"] == pytest.approx(token + found.beside.resident + ROWS_NBYTES, rel=1e-6)
    down = HIDDEN * WIDTH * 144 // 256, HIDDEN * WIDTH * 210 // 256  # Q4_K and Q6_K
    slots = USED * (5 * down[0] + down[1])  # two sizes of expert, of which a layer has one
    assert found.smallest == found.sizes.stays + slots + found.beside.resident
    assert (told["experts"], told["loading"], told["limit"]) == (58 * 256, "slots", "disk")
    assert outlook(network, memory=found.smallest, disk=1.5e9).refusal is None


def test_a_budget_of_8_gib_is_refused_with_the_numbers(huge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(huge), "--memory", "8GiB", "--disk-speed", "1.5GB/s", "--json"])
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert json.loads(told.out)["tokens_per_second"] is None
    assert "needs at least 11." in told.err
    assert "8.59 GB allowed" in told.err
