"""Claims about settings and samplers, over a handful of tokens whose probabilities can be done on paper."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.errors import LocalMoeError, SettingError
from localmoe.sampling import Sampler, SamplingSettings, chain, min_p, not_followed, penalties, recommended, temperature
from localmoe.sampling import top_k as keep_top_k
from localmoe.sampling import top_p as keep_top_p
from localmoe.settings import SETTINGS, allowed

HALF_QUARTER = np.log(np.array([0.125, 0.5, 0.25, 0.125]))  # probabilities of tokens 0 to 3


def kept(logits: np.ndarray) -> list[int]:
    return np.flatnonzero(logits > -np.inf).tolist()


def test_top_k_keeps_exactly_k_and_of_equals_the_lower_ids() -> None:
    assert kept(keep_top_k(np.array([1.0, 3, 1, 2, 1]), 3)) == [0, 1, 3]
    assert kept(keep_top_k(np.zeros(5), 2)) == [0, 1]
    assert kept(keep_top_k(np.zeros(5), 9)) == [0, 1, 2, 3, 4]


def test_top_p_keeps_the_fewest_tokens_that_reach_p() -> None:
    assert kept(keep_top_p(HALF_QUARTER, 0.45)) == [1]
    assert kept(keep_top_p(HALF_QUARTER, 0.6)) == [1, 2]
    assert kept(keep_top_p(HALF_QUARTER, 0.8)) == [0, 1, 2]
    assert kept(keep_top_p(HALF_QUARTER, 0.99)) == [0, 1, 2, 3]
    assert kept(keep_top_p(HALF_QUARTER, 0.0)) == [1]


@given(st.integers(0, 10_000), st.floats(0.01, 0.999), st.sampled_from([1, 5, 257, 3000]))
def test_top_p_by_heads_equals_top_p_by_a_full_sort(seed: int, p: float, size: int) -> None:
    logits = np.random.default_rng(seed).normal(0, 1, size)
    order = np.argsort(-logits, kind="stable")
    weights = np.exp(logits - logits.max())
    count = int(np.searchsorted(np.cumsum(weights[order]), p * weights.sum())) + 1
    found = kept(keep_top_p(logits, p))
    # Two ways of summing may differ in the last bit, which moves the border by one token at most.
    assert abs(len(found) - count) <= 1
    assert set(found) == set(order[: len(found)].tolist())


def test_min_p_compares_with_the_likeliest() -> None:
    assert kept(min_p(HALF_QUARTER, 0.5)) == [1, 2]
    assert kept(min_p(HALF_QUARTER, 0.2)) == [0, 1, 2, 3]


def test_temperature_scales_differences_and_survives_tiny_values() -> None:
    assert np.diff(temperature(np.array([0.0, 1, 3]), 0.5)).tolist() == [2, 4]
    assert temperature(np.array([1.0, 2]), 1e-320).tolist() == [-np.inf, 0]


def test_penalties_lower_recent_tokens_by_use() -> None:
    logits = np.array([2.0, -2.0, 1.0])
    assert penalties(logits, [0, 1, 1], 2.0, 0.0, 0.0).tolist() == [1.0, -4.0, 1.0]
    assert penalties(logits, [0, 1, 1], 1.0, 0.5, 0.25).tolist() == [1.25, -3.0, 1.0]
    assert logits.tolist() == [2.0, -2.0, 1.0], "the input is not written"


def test_greedy_is_the_empty_chain_and_takes_the_lowest_of_equals() -> None:
    greedy = SamplingSettings(temperature=0)
    assert chain(greedy) == []
    assert Sampler(greedy).choose(np.array([0.0, 5, 5], np.float32)) == 1


def test_greedy_still_honours_the_penalties() -> None:
    sampler = Sampler(SamplingSettings(temperature=0, presence_penalty=3.0))
    assert [sampler.choose(np.array([2.0, 1, 0])) for _ in range(3)] == [0, 1, 2]


def test_only_the_last_n_tokens_are_recent() -> None:
    settings = SamplingSettings(temperature=0, presence_penalty=5.0, penalty_last_n=1)
    sampler = Sampler(settings, prompt=[0, 2])
    assert [sampler.choose(np.array([3.0, 2, 1])) for _ in range(3)] == [0, 1, 0]
    everything = Sampler(settings.changed(penalty_last_n=-1), prompt=[0, 2])
    assert everything.choose(np.array([3.0, 2, 1])) == 1


def test_the_same_seed_draws_the_same_tokens() -> None:
    logits = np.zeros(100, np.float32)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingSettings(seed=seed, top_k=0))
        return [sampler.choose(logits) for _ in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(-1) != draw(-1)


def test_draws_follow_the_probabilities() -> None:
    sampler = Sampler(SamplingSettings(temperature=1, top_k=0, top_p=1, min_p=0, seed=1))
    counts = np.bincount([sampler.choose(HALF_QUARTER) for _ in range(8000)], minlength=4) / 8000
    assert np.abs(counts - [0.125, 0.5, 0.25, 0.125]).max() < 0.02


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused_not_drawn_from(broken: float) -> None:
    with pytest.raises(LocalMoeError, match="1 of 3 logits are not finite"):
        Sampler(SamplingSettings()).choose(np.array([0, broken, 1], np.float32))


@pytest.mark.parametrize(
    ("name", "value", "range_in_words"),
    [
        ("temperature", "hot", "a number from 0 to 100"),
        ("temperature", -0.1, "a number from 0 to 100"),
        ("temperature", float("nan"), "a number from 0 to 100"),
        ("top_p", "1.5", "a number from 0 to 1"),
        ("top_k", "2.5", "a whole number from 0 up"),
        ("seed", -2, "a whole number from -1 up"),
        ("max_tokens", True, "a whole number from 0 up"),
        ("min_p", None, "a number from 0 to 1"),
        ("top_k", 10**400, "a whole number from 0 up"),
    ],
)
def test_a_wrong_value_is_refused_by_name_value_and_range(name: str, value: object, range_in_words: str) -> None:
    with pytest.raises(SettingError) as caught:
        SamplingSettings().changed(**{name: value})
    assert str(caught.value) == f"{name} is {range_in_words}, not {str(value)[:40]!r}"


def test_an_unknown_setting_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingError, match="no setting 'temprature'; possible: temperature, top_k"):
        SamplingSettings().changed(temprature=1)


def test_values_come_as_numbers_or_text_and_leave_as_the_settings_own_type() -> None:
    settings = SamplingSettings().changed(temperature="1", top_k=np.float32(20), top_p=np.float64(0.5), seed="3")
    assert (settings.temperature, settings.top_k, settings.top_p, settings.seed) == (1.0, 20, 0.5, 3)
    assert [type(v) for v in (settings.temperature, settings.top_k, settings.seed)] == [float, int, int]


def test_every_setting_has_help_a_range_and_a_default_inside_it() -> None:
    for name, setting in SETTINGS.items():
        assert setting.metadata["help"]
        assert allowed(name)
        SamplingSettings().changed(**{name: setting.default})


def test_the_models_own_recommendation_becomes_settings_and_the_rest_is_told() -> None:
    metadata = {
        "general.name": "x",
        "general.sampling.temp": np.float32(0.5),
        "general.sampling.top_k": 20,
        "general.sampling.penalty_repeat": 1.5,
        "general.sampling.mirostat": 2,
    }
    assert recommended(metadata) == {"temperature": 0.5, "top_k": 20, "repeat_penalty": 1.5}
    assert not_followed(metadata) == ["general.sampling.mirostat = 2"]


def test_a_recommendation_out_of_range_is_refused_by_its_key() -> None:
    with pytest.raises(SettingError, match=r"general\.sampling\.top_p: top_p is a number from 0 to 1, not '7'"):
        recommended({"general.sampling.top_p": 7})
