"""The map of layers and experts: it fits, it shows what was counted, and its figures are those of the definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.experts.heatmap import PLAIN, balance, busiest, facts, idle, rows

WIDE = np.random.default_rng(0).zipf(1.4, (60, 256)).clip(0, 10**9)


def test_a_map_small_enough_to_read() -> None:
    uses = np.array([[8, 0, 0, 0], [1, 1, 1, 1], [0, 3, 5, 0]])
    assert rows(uses, 60) == [
        "  0  3",
        "0 ▓   ",
        "1 ░░░░",
        "2  ▒▓ ",
        "· <0.5 ░ <1 ▒ <2 ▓ <4 █ more (times the mean)",
    ]


def test_the_same_in_ascii_and_with_numbers_of_blocks() -> None:
    uses = np.array([[9, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    assert rows(uses, 60, plain=True, blocks=(3, 11))[:-1] == ["   0    5", " 3 @     ", "11 ::::::"]
    assert all(line.isascii() for line in rows(WIDE, 60, plain=True))


@pytest.mark.parametrize("width", [1, 8, 20, 40, 80, 300])
@pytest.mark.parametrize("height", [1, 3, 10, 24, 100])
def test_it_fits_where_there_is_little_room(width: int, height: int) -> None:
    for uses in (WIDE, WIDE[:1], WIDE[:, :1]):
        found = rows(uses, width, height)
        assert max(map(len, found)) <= width
        assert len(found) <= max(height, 3)


def test_60_layers_of_256_experts_in_40_columns() -> None:
    found = rows(WIDE, 40)
    assert len(found) == 32
    assert found[0].split() == ["0", "255"]
    assert found[1].startswith("  0-1 ")
    assert found[-2].split()[0] == "58-59" or found[-2].split()[0] == "59"
    assert found[-1] == "· <0.5 ░ <1 ▒ <2 ▓ <4 █ more"


def test_experts_that_share_a_cell_show_their_mean() -> None:
    uses = np.zeros((1, 8), np.int64)
    uses[0, :2] = 4  # four times the mean each, and both in one of four cells
    assert rows(uses, 6)[1] == "0 ▓   "


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 50), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_an_idle_cell_is_empty_and_a_used_one_is_not(L: int, E: int, width: int, height: int, seed: int) -> None:
    uses = np.random.default_rng(seed).integers(0, 2, (L, E))
    found = rows(uses, width, height, plain=True)
    assert bool(found) == bool(uses.any())
    if found and height >= L + 2 and width >= E + 2:
        cells = [[cell != PLAIN[0] for cell in line[2:]] for line in found[1:-1]]
        assert cells == (uses > 0).tolist()


def test_even_use_is_balanced() -> None:
    found = balance(np.full((2, 8), 5))
    assert found.peak.tolist() == [1, 1]
    assert found.variation.tolist() == [0, 0]
    assert found.entropy.tolist() == [3, 3]
    assert found.even_bits == 3


def test_balance_by_hand() -> None:
    found = balance(np.array([[2, 1, 1, 0], [0, 0, 0, 7], [0, 0, 0, 0]]))
    assert found.peak.tolist() == [2, 4]
    assert found.variation == pytest.approx([np.sqrt(0.5), np.sqrt(3)])
    assert found.entropy.tolist() == [1.5, 0]


def test_busiest_and_idle() -> None:
    uses = np.array([[2, 1, 1, 0], [0, 0, 0, 7]])
    assert busiest(uses, 2) == [(1, 3, 4.0), (0, 0, 2.0)]
    assert len(busiest(uses, 10)) == 4
    assert idle(uses).tolist() == [1, 3]


def test_facts_in_words() -> None:
    assert dict(facts(np.array([[2, 1, 1, 0], [0, 0, 0, 7]]), blocks=(1, 2))) == {
        "busiest": "2/3 4.0×, 1/0 2.0×, 1/1 1.0×, 1/2 1.0×",
        "idle": "4 of 8 never chosen; most in layer 2: 3 of 4",
        "load balance": "busiest over mean 3.00 (2.00 to 4.00); variation 1.22 (0.71 to 1.73)",
        "entropy": "0.75 (0.00 to 1.50) of 2.00 bits",
    }


def test_before_anything_was_chosen() -> None:
    nothing = np.zeros((2, 4), np.int64)
    assert rows(nothing, 40) == []
    assert facts(nothing) == [("experts", "none was chosen yet")]
