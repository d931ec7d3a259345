"""Claims about the engine over a fake model: what is reused, how it ends, and that an interrupt leaves the truth."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes import ASSISTANT, END, FakeModel

from localmoe.engine import Engine, Step, common_prefix
from localmoe.errors import DeviceError, SettingError
from localmoe.experts.loading import Loading
from localmoe.experts.telemetry import Counts
from localmoe.sampling import SamplingSettings

GREEDY = SamplingSettings(temperature=0)


def prompt(text: str) -> list[int]:
    return [*text.encode(), ASSISTANT]


def text_of(steps: list[Step]) -> str:
    return "".join(step.text for step in steps)


def test_steps_spell_the_answer_and_the_last_one_says_stop() -> None:
    steps = list(Engine(FakeModel({"q": "Hi"})).generate(prompt("q"), GREEDY))
    assert steps == [Step(ord("H"), "H"), Step(ord("i"), "i"), Step(END, "", "stop")]


def test_a_character_split_over_tokens_comes_out_whole_and_once() -> None:
    steps = list(Engine(FakeModel({"q": "é🙂"})).generate(prompt("q"), GREEDY))
    assert [step.text for step in steps] == ["", "é", "", "", "", "🙂", ""]


def test_a_character_left_incomplete_is_replaced_at_the_end() -> None:
    steps = list(Engine(FakeModel({"q": [0xF0, 0x9F]})).generate(prompt("q"), GREEDY))
    assert text_of(steps) == "�"
    cut = list(Engine(FakeModel({"q": "é"})).generate(prompt("q"), GREEDY.changed(max_tokens=1)))
    assert cut == [Step(0xC3, "�", "length")]


@pytest.mark.parametrize(("tokens", "continues"), [([ASSISTANT], False), ([ord("q"), ASSISTANT], True)])
def test_a_first_space_is_text_where_text_stands_before_it(tokens: list[int], continues: bool) -> None:
    model, asked = FakeModel(), []
    stream = model.tokenizer.stream
    model.tokenizer.stream = lambda *, continues=False: asked.append(continues) or stream()
    list(Engine(model).generate(tokens, GREEDY))
    assert asked == [continues]


def test_max_tokens_ends_with_length() -> None:
    steps = list(Engine(FakeModel({"q": "long answer"})).generate(prompt("q"), GREEDY.changed(max_tokens=4)))
    assert (text_of(steps), steps[-1].finish) == ("long", "length")


def test_a_full_cache_ends_with_context() -> None:
    model = FakeModel({"q": "long answer"}, context=5)
    steps = list(Engine(model).generate(prompt("q"), GREEDY))
    assert (text_of(steps), steps[-1].finish) == ("long", "context")
    assert len(model.cached) == 5


def test_a_prompt_that_fills_the_context_still_gets_one_token() -> None:
    steps = list(Engine(FakeModel({"q": "ok"}, context=2)).generate(prompt("q"), GREEDY))
    assert steps == [Step(ord("o"), "o", "context")]


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(DeviceError, match=r"has 9 tokens and the context holds 8.*--context"):
        list(Engine(FakeModel(context=8)).generate(prompt("12345678"), GREEDY))


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(SettingError, match="no tokens"):
        list(Engine(FakeModel()).generate([], GREEDY))


def test_given_stop_tokens_replace_the_tokenizers() -> None:
    steps = list(Engine(FakeModel({"q": "a.b"})).generate(prompt("q"), GREEDY, stop={ord(".")}))
    assert steps[-1] == Step(ord("."), "", "stop")
    assert text_of(steps) == "a"


def test_prefill_runs_in_chunks_and_reports_its_progress() -> None:
    model, seen = FakeModel({"": "x"}, chunk=4), []
    list(Engine(model).generate(prompt("123456789"), GREEDY, progress=lambda *numbers: seen.append(numbers)))
    assert [len(tokens) for _, tokens in model.calls] == [4, 4, 2, 1]
    assert seen == [(0, 10), (4, 10), (8, 10), (10, 10)]


def test_a_longer_prompt_runs_only_what_is_new() -> None:
    model = FakeModel({"one": "1", "two": "2"})
    engine = Engine(model)
    first = prompt("one")
    list(engine.generate(first, GREEDY))
    longer = [*first, ord("1"), *prompt("two")]
    list(engine.generate(longer, GREEDY))
    assert (engine.stats.prompt_tokens, engine.stats.reused_tokens) == (9, 5)
    assert model.calls[2] == (5, prompt("two"))


def test_the_same_prompt_runs_its_last_token_again_and_answers_the_same() -> None:
    model = FakeModel({"q": "yes"})
    engine = Engine(model)
    first = list(engine.generate(prompt("q"), GREEDY))
    calls = len(model.calls)
    assert list(engine.generate(prompt("q"), GREEDY)) == first
    assert model.calls[calls] == (1, [ASSISTANT])
    assert engine.stats.reused_tokens == 1


def test_a_prompt_that_parts_ways_rewinds_the_cache() -> None:
    model = FakeModel({"abc": "1", "abX": "2"})
    engine = Engine(model)
    list(engine.generate(prompt("abc"), GREEDY))
    steps = list(engine.generate(prompt("abX"), GREEDY))
    assert (text_of(steps), engine.stats.reused_tokens) == ("2", 2)
    assert model.cached == [*prompt("abX"), ord("2")]


def test_leaving_in_mid_answer_keeps_exactly_what_ran() -> None:
    model = FakeModel({"q": "long answer"})
    engine = Engine(model)
    steps = engine.generate(prompt("q"), GREEDY)
    assert [next(steps).text for _ in range(3)] == ["l", "o", "n"]
    steps.close()
    assert model.cached == [*prompt("q"), *b"lo"]
    assert text_of(list(engine.generate(prompt("q"), GREEDY))) == "long answer"


@pytest.mark.parametrize("call", [1, 2, 3, 5])
def test_an_interrupt_in_any_forward_leaves_a_prefix_that_is_true(call: int) -> None:
    model = FakeModel({"123456": "long answer"}, chunk=4)
    engine = Engine(model)

    def interrupt() -> None:
        if len(model.calls) == call:
            raise KeyboardInterrupt

    model.before_call = interrupt
    with pytest.raises(KeyboardInterrupt):
        list(engine.generate(prompt("123456"), GREEDY))
    assert model.cached == [*prompt("123456"), *b"long answer"][: len(model.cached)]
    assert text_of(list(engine.generate(prompt("123456"), GREEDY))) == "long answer"


def test_stats_count_the_last_answer() -> None:
    engine = Engine(FakeModel({"q": "four"}))
    list(engine.generate(prompt("q"), GREEDY))
    stats = engine.stats
    assert (stats.prompt_tokens, stats.reused_tokens, stats.generated_tokens) == (2, 0, 5)
    assert stats.prefill_seconds > 0
    assert stats.decode_seconds > 0


def test_engines_and_other_callers_may_take_turns_on_one_model() -> None:
    model = FakeModel({"one": "first", "two": "second"})
    a, b = (Engine(model).generate(prompt(text), GREEDY) for text in ("one", "two"))
    told: tuple[list[Step], list[Step]] = ([], [])
    for _ in range(6):
        told[0].append(next(a))
        told[1].append(next(b))
        model.forward([1, 2, 3], 0)
    assert [text_of(steps) for steps in told] == ["first", "second"]


def test_common_prefix_counts_equal_leading_tokens() -> None:
    assert [common_prefix(a, b) for a, b in ([[], [1]], [[1, 2], [1, 2, 3]], [[1, 2], [1, 3]])] == [0, 2, 1]


def test_what_became_of_the_chosen_experts_is_counted_for_the_prompt_and_for_the_answer() -> None:
    model = FakeModel({"qqq": "four"}, chunk=2)
    model.change_loading(Loading("slots"))
    model.counted = Counts(steps=100, tokens=700)
    engine = Engine(model)
    list(engine.generate(prompt("qqq"), GREEDY))
    step = model.step_counts
    assert len(prompt("qqq")) == 4
    assert engine.stats.prefill_counts == replace(step + step, tokens=4)
    assert engine.stats.decode_counts == step + step + step + step
    list(Engine(FakeModel({"q": "four"})).generate(prompt("q"), GREEDY))
    assert Engine(FakeModel()).stats.decode_counts == Counts()
