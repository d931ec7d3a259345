"""Replays: policies and Belady's bound on traces small enough to solve on paper, or to try everything."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.errors import SettingError
from localmoe.experts.policies import POLICIES
from localmoe.experts.replay import BOUND, Follower, Oracle, Result, cache_of, event_of, halves, replay, run
from localmoe.experts.trace import Header, Trace
from tests.traces import decoded, header_of, trace_of


def hits(trace: Trace, slots: int, policy: str) -> int:
    """Of decoded tokens, with so many slots."""
    size = slots / (trace.header.layers * trace.header.experts)
    return next(r.decoded.hits for r in replay(trace, [size]) if r.policy == policy)


def second_half(ids: list[int], experts: int = 4) -> Trace:
    """A decoded token and one expert a step, behind a first half of as many."""
    return trace_of(header_of(experts=experts), decoded([experts - 1] * len(ids) + ids))


def test_lru_by_hand() -> None:
    # two slots: 0 and 1 are read, 0 hit, 2 takes 1's place, 0 hit, 1 takes 2's, 2 takes 0's
    assert hits(second_half([0, 1, 0, 2, 0, 1, 2]), 2, "lru") == 2


def test_lfru_by_hand() -> None:
    # 0 was chosen three times and stays, while 1 and 2 pass through the other slot
    ids = [0, 0, 0, 1, 2, 0]
    assert hits(second_half(ids), 2, "lfru") == 3
    assert hits(second_half(ids), 2, "lru") == 2


def test_history_by_hand() -> None:
    # the first half was expert 3 alone: it stays once it is there, and LRU would have let it go
    ids = [3, 0, 1, 2, 3, 0, 1, 2, 3]
    assert hits(second_half(ids), 2, "history") == 2
    assert hits(second_half(ids), 2, "lru") == 0


def test_belady_by_hand() -> None:
    # a cycle of three through two slots: all but the first of every other round can stay
    assert hits(second_half([0, 1, 2, 0, 1, 2]), 2, BOUND) == 2
    assert hits(second_half([0, 1, 2, 0, 1, 2]), 2, "lru") == 0


def test_everything_fits_but_must_be_read_once() -> None:
    for result in replay(second_half([0, 1, 2, 3] * 3), [1.0]):
        assert (result.decoded.chosen, result.decoded.hits) == (12, 8)
        assert result.decoded.nbytes_read == 4 * 100


def test_what_a_token_chose_stays_together() -> None:
    header = header_of(experts=6, used=2)
    trace = trace_of(header, decoded([[0, 1]] * 4 + [[0, 1], [2, 3], [0, 1], [2, 3]]))
    assert all(result.decoded.hits == 0 for result in replay(trace, [0.0]))
    assert [r.nbytes for r in replay(trace, [0.0])] == [200] * 4


def test_layers_share_a_pool_and_sizes_do_not() -> None:
    header = header_of(layers=3, experts=8, nbytes=(100, 200, 100))
    cache_ = cache_of(header, 0.25)
    assert cache_.pools[0] is cache_.pools[2]
    assert cache_.pools[0] is not cache_.pools[1]
    assert (cache_.pools[0].slots, cache_.pools[1].slots) == (4, 2)
    assert cache_.nbytes == 800


def test_a_layer_uses_the_slots_that_another_does_not_need() -> None:
    header = header_of(layers=2, experts=4)
    steps = [[[[0]], [[i % 3]]] for i in range(12)]
    assert hits(trace_of(header, steps), 4, "lru") == 12 - 4


def chunked(*chunk: int) -> Trace:
    """Two layers of 8 experts: both decode expert 7, then the first reads a chunk, then both decode 7 again."""
    header = header_of(layers=2, experts=8)
    talk = [[[[7]], [[7]]]] * 3
    return trace_of(header, [*talk * 2, *talk, [[[i] for i in chunk], [[7]] * len(chunk)], *talk])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_long_prompt_costs_a_layer_its_own_slots_alone(policy: str) -> None:
    for slots in (2, 3, 4):
        results = replay(chunked(0, 1, 2, 3, 4, 5, 6), [slots / 16])
        found = next(r for r in results if r.policy == policy)
        after = found.decoded.hits - 4  # the second and third token before the chunk
        assert after >= 5  # layer 1 lost nothing, layer 0 one expert at most
        assert found.prompts.hits == 1


def test_a_chunk_keeps_the_best_of_its_layer() -> None:
    trace = chunked(0, 1, 2, 7, 7, 3, 4)
    found = next(r for r in replay(trace, [4 / 16]) if r.policy == "lfru")
    assert found.prompts.hits == 2  # 7 in both layers
    assert found.decoded.hits == 4 + 6


def test_an_expert_of_several_tokens_counts_once() -> None:
    (found,) = (r for r in replay(chunked(1, 1, 1, 2), [1.0]) if r.policy == "lru")
    assert (found.prompts.steps, found.prompts.tokens, found.prompts.chosen) == (1, 4, 3)
    assert found.decoded.tokens == 6
    assert found.counts == found.decoded


@st.composite
def small_traces(draw: st.DrawFn) -> Trace:
    layers, experts, used = draw(st.integers(1, 2)), draw(st.integers(2, 4)), draw(st.integers(1, 2))
    row = st.permutations(range(experts)).map(lambda ids: list(ids[:used]))
    step = st.integers(1, 3).flatmap(
        lambda tokens: st.lists(st.lists(row, min_size=tokens, max_size=tokens), min_size=layers, max_size=layers)
    )
    return trace_of(header_of(layers, experts, used), draw(st.lists(step, min_size=2, max_size=7)))


def most_hits(header: Header, trace: Trace, slots: int) -> int:
    """By trying everything that could be kept."""
    events = [event_of(choice, header.experts) for choice in trace.choices]

    @cache
    def best(time: int, held: frozenset[int]) -> int:
        if time == len(events):
            return 0
        wanted = frozenset(events[time].places.tolist())
        pinned = wanted if events[time].tokens == 1 else frozenset()
        others = sorted((held | wanted) - pinned)
        kept = min(slots - len(pinned), len(others))
        futures = (best(time + 1, pinned | frozenset(chosen)) for chosen in combinations(others, kept))
        return len(wanted & held) + max(futures)

    return best(0, frozenset())


@settings(max_examples=60, deadline=None)
@given(small_traces(), st.integers(2, 5))
def test_belady_is_the_best_of_all_possible_choices(trace: Trace, slots: int) -> None:
    header = trace.header
    events = [event_of(choice, header.experts) for choice in trace.choices]
    found = cache_of(header, slots / (header.layers * header.experts))
    run(events, header, [found], Oracle(events, header))
    assert found.counts(True).hits + found.counts(False).hits == most_hits(header, trace, found.pools[0].slots)


@settings(max_examples=60, deadline=None)
@given(small_traces(), st.floats(0, 1))
def test_no_policy_is_better_than_the_bound_and_no_cache_is_overfull(trace: Trace, size: float) -> None:
    results = {result.policy: result for result in replay(trace, [size])}

    def total(result: Result) -> int:
        return result.decoded.hits + result.prompts.hits

    assert all(total(result) <= total(results[BOUND]) for result in results.values())
    assert len({result.decoded.chosen + result.prompts.chosen for result in results.values()}) == 1


@settings(max_examples=60, deadline=None)
@given(small_traces(), st.floats(0, 1), st.sampled_from(sorted(POLICIES)))
def test_a_pool_holds_what_it_says(trace: Trace, size: float, policy: str) -> None:
    header = trace.header
    events = [event_of(choice, header.experts) for choice in trace.choices]
    found = cache_of(header, size)
    judge = Follower(POLICIES[policy], header, np.zeros((header.layers, header.experts)))
    for event in events:
        run([event], header, [found], judge)
        pool = found.pools[event.layer]
        assert pool.filled == pool.held.sum() <= pool.slots
        assert event.tokens > 1 or pool.held[event.places].all()


def test_the_halves_part_between_steps() -> None:
    trace = trace_of(header_of(layers=2), [[[[0]], [[1]]]] * 5)
    first, second = halves(trace)
    assert [e.step for e in first] == [1, 1, 2, 2]
    assert [e.step for e in second] == [3, 3, 4, 4, 5, 5]


def test_a_trace_of_one_step_cannot_be_replayed() -> None:
    with pytest.raises(SettingError, match="at least 2"):
        replay(trace_of(header_of(), decoded([0])))
