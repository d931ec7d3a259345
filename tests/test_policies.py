"""What is worth keeping: the history's arithmetic, and each policy on sequences solved by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.errors import SettingError
from localmoe.experts.history import HALF_LIFE, History
from localmoe.experts.loading import Loading
from localmoe.experts.policies import PINNED, POLICIES, policy_of


def lived(steps: Sequence[Sequence[tuple[int, ...]]], experts: int = 4, prior: object = None) -> History:
    """A history of steps, each with the ids that every layer's token chose."""
    history = History(len(steps[0]), experts, None if prior is None else np.array(prior, float))
    for step in steps:
        history.tick()
        for layer, ids in enumerate(step):
            history.used(layer, np.array(ids, np.int32), np.ones(len(ids), np.int64))
    return history


def ascending(history: History, policy: str) -> list[tuple[int, int]]:
    """(layer, expert) in the order in which they would go."""
    scores = POLICIES[policy](history)
    assert scores.shape == history.uses.shape
    assert scores.dtype == np.float64
    order = np.argsort(scores, axis=None, kind="stable")
    return [divmod(int(i), scores.shape[1]) for i in order]


def test_uses_and_last_count_tokens_and_steps() -> None:
    history = History(2, 3)
    history.tick()
    history.used(1, np.array([2, 0], np.int32), np.array([5, 1]))
    history.tick()
    history.used(1, np.array([2], np.int32), np.array([1]))
    assert history.uses.tolist() == [[0, 0, 0], [1, 0, 6]]
    assert history.last.tolist() == [[-1, -1, -1], [1, -1, 2]]
    assert history.clock == 2


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 512)), min_size=1, max_size=20))
def test_frequency_is_the_logarithm_of_a_count_that_halves(uses: list[tuple[int, int]]) -> None:
    history, decayed = History(1, 2), 0.0
    for pause, count in uses:
        for _ in range(pause):
            history.tick()
        decayed = decayed * 2 ** (-pause / HALF_LIFE) + count
        history.used(0, np.array([1], np.int32), np.array([count]))
    assert history.frequency[0, 0] == -np.inf
    assert history.frequency[0, 1] - history.clock / HALF_LIFE == pytest.approx(np.log2(decayed), abs=1e-9)


def test_frequency_stays_exact_after_a_million_steps() -> None:
    history = History(1, 3)
    history.clock = 10**6
    history.used(0, np.array([0, 1], np.int32), np.array([1, 1]))
    history.clock += HALF_LIFE
    history.used(0, np.array([1, 2], np.int32), np.array([1, 1]))
    counts = 2 ** (history.frequency[0] - history.clock / HALF_LIFE)
    assert counts == pytest.approx([0.5, 1.5, 1.0], abs=1e-9)


def test_lru_lets_go_what_was_chosen_longest_ago_layer_by_layer() -> None:
    history = lived([[(0,), (3,)], [(1,), (2,)]])
    never = [(0, 2), (0, 3), (1, 0), (1, 1)]
    assert sorted(ascending(history, "lru")[:4]) == never
    assert ascending(history, "lru")[4:] == [(0, 0), (1, 3), (0, 1), (1, 2)]


def test_lfru_keeps_the_frequent_before_the_recent() -> None:
    history = lived([[(0,)], [(0,)], [(0,)], [(1,)]])
    assert ascending(history, "lru")[-2:] == [(0, 0), (0, 1)]
    assert ascending(history, "lfru")[-2:] == [(0, 1), (0, 0)]


def test_lfru_forgets_what_was_frequent_long_ago() -> None:
    early, late = [[(0,)]] * 3, [[(1,)]] * 2
    pause = [[(2,)]] * (3 * HALF_LIFE)
    assert ascending(lived(early + pause + late), "lfru")[-2:] == [(0, 1), (0, 2)]


def test_lfru_without_decay_counts() -> None:
    history = lived([[(0, 1)], [(0, 2)], [(0, 1)]])
    assert ascending(history, "lfru") == [(0, 3), (0, 2), (0, 1), (0, 0)]


def test_lfru_begins_with_earlier_sessions_and_forgets_them() -> None:
    prior = [[0.0, 0.6, 0.4, 0.0]]
    assert ascending(lived([[(0,)]], prior=prior), "lfru") == [(0, 3), (0, 0), (0, 2), (0, 1)]
    assert ascending(lived([[(0,)]] * 10 * HALF_LIFE, prior=prior), "lfru")[-1] == (0, 0)


def test_history_pins_the_most_used_of_earlier_sessions() -> None:
    share = PINNED / 4
    history = lived([[(0,)], [(1,)], [(2,)]], prior=[[0.0, 0.0, 0.0, share + 0.1]])
    assert ascending(history, "history") == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_history_lets_the_less_used_of_the_pinned_go_first() -> None:
    history = lived([[(0,)]] * 9, experts=8, prior=[[0.0, 0.4, 0.5, 0.1, 0, 0, 0, 0]])
    assert ascending(history, "history")[-3:] == [(0, 0), (0, 1), (0, 2)]


def test_history_without_earlier_sessions_is_lru() -> None:
    history = lived([[(0, 1), (2, 3)], [(3, 0), (1, 2)]])
    assert np.array_equal(POLICIES["history"](history), POLICIES["lru"](history))


@pytest.mark.parametrize("name", POLICIES)
def test_what_was_never_chosen_goes_first(name: str) -> None:
    history = lived([[(0, 1), (0, 1)], [(1, 2), (1, 2)]])
    assert sorted(ascending(history, name)[:2]) == [(0, 3), (1, 3)]


def test_the_default_policy_is_one_of_them() -> None:
    assert Loading().policy in POLICIES


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(SettingError, match=r"'mru'.*lru, lfru, history"):
        policy_of("mru")
