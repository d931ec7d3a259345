"""`localmoe doctor`: what it looks at, and what it advises for each thing that can be wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import qwen3moe

import localmoe.kernels.reference_weights
import localmoe.outlook
from localmoe.cli import main
from localmoe.doctor import Findings, advice, examine, outcome, sections
from localmoe.errors import UnsupportedError
from localmoe.experts.probe import DiskSpeed, Rate
from localmoe.inspection import open_network
from localmoe.kernels.cpu.limits import Rates
from localmoe.network import Network
from localmoe.outlook import outlook
from localmoe.processors import Busy

GIB = 1 << 30
DISK = DiskSpeed(594_000, (Rate("direct", 1, 1.1e9), Rate("direct", 2, 1.5e9), Rate("buffered", 2, 1.4e9)))


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localmoe.outlook, "machine_rates", lambda: Rates(32e9, 200e9, 900e9))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen3moe(tmp_path_factory.mktemp("models") / "tiny.gguf", format="Q8_0")


@pytest.fixture
def network(tiny: Path) -> Network:
    return open_network(tiny)


def healthy(network: Network, memory: int = GIB, nbytes_per_second: float = 1.5e9, **changes: Any) -> Findings:
    """A machine on which nothing is wrong, but for `changes`."""
    found = Findings(
        outlook(network, memory=memory, disk=nbytes_per_second),
        DISK,
        cached_dense=1.0,
        cached_experts=0.9,
        pressure=0.0,
        busy=Busy(0.01, 0.0),
        throttled=0,
        clock=(3e9, 3e9),
        instruction_set="avx2",
        better_set=None,
        kernels="come compiled",
        threads=2,
        cores=2,
    )
    return replace(found, **changes)


def test_where_nothing_is_wrong_the_limit_that_is_left_is_named(network: Network) -> None:
    assert next(advice(healthy(network))).startswith("nothing: what is left is memory bandwidth")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pressure": 20.0}, "the system waits for memory"),
        ({"better_set": "avx512"}, "no LOCALMOE_ISA: it asks for avx2, and this processor has avx512"),
        ({"busy": Busy(0.4, 0.0)}, "end other programs: they take 40 % of the processors"),
        ({"busy": Busy(0.0, 0.1)}, "other machines on this one take 10 % of the processors"),
        ({"throttled": 3}, "cooling"),
        ({"clock": (1e9, 3e9)}, "cores run at 1.0 GHz"),
        ({"cached_dense": 0.2}, "ask twice"),
    ],
)
def test_each_thing_that_is_wrong_is_what_to_try_next(network: Network, changes: Any, words: str) -> None:
    assert words in next(advice(healthy(network, **changes)))
    assert words not in next(advice(healthy(network)))


def test_what_the_system_does_not_tell_is_no_reproach(network: Network) -> None:
    silent = healthy(network, pressure=None, busy=None, throttled=None, clock=None, cached_dense=None, disk=None)
    assert next(advice(silent)).startswith("nothing")
    shown = {what: value for _, entries in sections(silent) for what, value in entries}
    assert shown["waiting for memory"] == shown["in the page cache"] == "the system does not tell"


def test_a_budget_in_which_experts_are_missing_is_to_be_larger(network: Network) -> None:
    smallest = outlook(network, memory=GIB).smallest
    found = healthy(network, memory=smallest, nbytes_per_second=1e5)
    assert "limited by disk" in outcome(found.outlook)
    assert next(advice(found)).startswith("a larger --memory: ")


def test_a_disk_that_is_slow_or_busy_comes_after_that(network: Network) -> None:
    smallest = outlook(network, memory=GIB).smallest
    slow = replace(DISK, rates=(Rate("buffered", 1, 1e5, stalled=0.5),))
    told = list(advice(replace(healthy(network, memory=smallest, nbytes_per_second=1e5), disk=slow)))
    assert told[1] == "the disk when nobody else uses it: 50 % of its time went to stalls"
    assert told[2] == "the file on a quicker disk: this one gives 100 kB/s"


def test_a_budget_that_is_too_small_is_the_first_thing(network: Network) -> None:
    found = healthy(network, memory=10**6, pressure=50.0)
    assert outcome(found.outlook).startswith("not possible: needs ")
    assert "of memory" in next(advice(found))


def test_weights_of_16_bits_are_to_be_quantised(tmp_path: Path) -> None:
    network = open_network(qwen3moe(tmp_path / "wide.gguf", format="F16"))
    assert next(advice(healthy(network))).startswith("a quantised file")


def test_it_needs_no_weight_for_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localmoe.kernels.reference_weights, "dequantise", None)
    network = open_network(qwen3moe(tmp_path / "tiny.gguf", format="Q8_0"))
    found = examine(network)
    assert found.instruction_set in ("avx512", "avx2", "portable")
    shown = {what: value for _, entries in sections(found) for what, value in entries}
    assert list(shown)[-2:] == ["generating", "to try next"]
    assert shown["weights"] == "144 kB, of which one token reads 74.6 kB"


def test_settings_without_weights_are_for_plan(conformance: Path) -> None:
    with pytest.raises(UnsupportedError, match="`localmoe plan` looks at those"):
        examine(open_network(conformance / "configs/hf/qwen3-8B_config.json"))


def test_the_command_shows_a_page_or_numbers(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", str(tiny), "--memory", "1GiB"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "to try next" in shown.partition("outcome")[2]
    with pytest.raises(SystemExit):
        main(["doctor", str(tiny), "--json"])
    assert "to try next" in json.loads(capsys.readouterr().out)["outcome"]
