"""Claims about one answer as it grows: stop texts, budgets of reasoning, and what happens when the context fills."""

from __future__ import annotations

import pytest
from fakes import END, PAD, SYSTEM, USER, FakeModel, HarmonyTokenizer, PlainTemplate
from hypothesis import given
from hypothesis import strategies as st

from localmoe.answering import SPARE, Answering, StopTexts
from localmoe.engine import Engine
from localmoe.errors import ContextError, SettingError
from localmoe.prompting import Prompt, Turn, prompt_of
from localmoe.sampling import SamplingSettings
from localmoe.session import Session
from localmoe.thinking import Thinking

THINK = ("<think>", "</think>")
GREEDY = SamplingSettings(temperature=0)


def say(session: Session, text: str) -> str:
    return "".join(piece.text for piece in session.send(text))


def kinds(session: Session, text: str) -> dict[str, str]:
    found = {"reasoning": "", "answer": ""}
    for piece in session.send(text):
        found[piece.kind] += piece.text
    return found


class Endless(FakeModel):
    """Counts upwards, whatever it is asked: its next letter depends on how many tokens stand before it and on nothing
    else, so that one who reads the same tokens again goes on alike."""

    def _next(self) -> int:
        return ord("a") + len(self.cached) % 26


class Closed(FakeModel):
    """Reasons until someone ends it, then answers."""

    def _next(self) -> int:
        text = bytes(id for id in self.cached if id < 256)
        _, closed, after = text.partition(b"</think>\n\n")
        if not closed:
            return (b"<think>" + b"hm " * 200)[self._spelt()]
        return b"Yes."[len(after)] if len(after) < 4 else END

    def _spelt(self) -> int:
        return len(self.cached) - 1 - self.cached.index(257)


def test_a_budget_of_reasoning_ends_it_and_the_answer_follows() -> None:
    model = Closed()
    model.reasoning = THINK
    session = Session(model)
    session.think("budget 20")
    found = kinds(session, "q")
    assert found["answer"].strip() == "Yes."
    assert found["reasoning"].startswith("hm hm")
    assert len(found["reasoning"].strip()) <= 21
    message = session.conversation.path()[-1]
    assert message.content.endswith("\n</think>\n\nYes.")
    assert session.finish == "stop"
    assert session.model.cached[: len(session.prompt().tokens) - 2] == session.prompt().tokens[:-2]
    assert session.engine.stats.generated_tokens == len("<think>") + 20 + len("Yes.") + 1


def test_of_what_gpt_oss_says_in_channels_the_final_one_is_the_answer() -> None:
    model = FakeModel()
    model.tokenizer = HarmonyTokenizer()
    model.reasoning = ("<|channel|>analysis<|message|>", "<|end|>")
    thought = [PAD, *b"analysis", SYSTEM, *b"hm hm", USER, *b"assistant", PAD, *b"final", SYSTEM]
    model.replies = {"q": [*thought, *"Jä.".encode()], "more": [PAD, *b"final", SYSTEM, *b"ok"]}
    session = Session(model)
    assert kinds(session, "q") == {"reasoning": "hm hm", "answer": "Jä."}
    message = session.conversation.path()[-1]
    assert (message.content, bytes(message.tokens)) == ("Jä.", "Jä.".encode())
    assert kinds(session, "more") == {"reasoning": "", "answer": "ok"}
    assert bytes(t for t in model.cached if t < 256).startswith("qJä.more".encode())


def test_a_budget_is_refused_where_nothing_ends_the_reasoning() -> None:
    with pytest.raises(SettingError, match="no marker that ends its reasoning"):
        Session(FakeModel()).think("budget 20")
    with pytest.raises(SettingError, match="whole number of tokens from 0 up"):
        Session(FakeModel()).think("budget some")


@pytest.mark.parametrize(
    ("source", "words", "variables"),
    [
        ("{{ enable_thinking }}", "off", {"enable_thinking": False}),
        ("{% if thinking %}", "on", {"thinking": True}),
        ("{{ reasoning_effort }}", "low", {"reasoning_effort": "low"}),
    ],
)
def test_a_template_is_told_by_the_name_it_asks_for(source: str, words: str, variables: dict[str, object]) -> None:
    assert Thinking().changed(words, source, None).variables(source) == variables


@pytest.mark.parametrize(
    ("source", "words", "told"),
    [
        ("", "off", "no switch for /think off: it has none"),
        ("{{ reasoning_effort }}", "off", "it takes low, medium, high"),
        ("{{ enable_thinking }}", "low", "it takes on or off"),
        ("{{ enable_thinking }}", "sometimes", "/think takes on, off"),
    ],
)
def test_a_switch_that_the_template_lacks_is_refused(source: str, words: str, told: str) -> None:
    with pytest.raises(SettingError, match=told):
        Thinking().changed(words, source, None)


def test_a_stop_text_ends_an_answer_that_no_stop_token_ends() -> None:
    model = FakeModel({"q": "Yes.</s>User: and more"})
    tokens = model.tokenizer.encode("<|user|>q<|end|><|assistant|>")
    answering = Answering(Engine(model), model.tokenizer, GREEDY, stop_texts=["</s>", "User:"])
    said = list(answering.run(Prompt("", tokens)))
    assert "".join(each.text for each in said) == "Yes."
    assert said[-1].finish == "stop"
    assert bytes(token for each in said for token in each.tokens) == b"Yes."


@given(st.lists(st.sampled_from(["<", "/s", ">", "</s>", "a", "</", "s>x"])))
def test_stop_texts_cut_alike_however_the_text_comes(parts: list[str]) -> None:
    by_part, whole = StopTexts(["</s>", ">x"]), StopTexts(["</s>", ">x"])
    text, found = "".join(parts), ""
    for part in parts:
        found += by_part.push(part, last=False)
        if by_part.met:
            break
    if not by_part.met:
        found += by_part.push("", last=True)
    assert found == whole.push(text, last=True)
    ends = [at for stop in ("</s>", ">x") if (at := text.find(stop)) >= 0]
    assert found == text[: min(ends, default=len(text))]


def filled(policy: str, context: int = 200) -> Session:
    session = Session(Endless(context=context), system="be brief")
    session.set_overflow(policy)
    session.set("max_tokens", 30)
    return session


def test_a_full_context_stops_the_answer_by_default() -> None:
    session = filled("stop", context=60)
    session.set("max_tokens", 0)
    say(session, "q")
    assert session.finish == "context"


@pytest.mark.parametrize("policy", ["drop", "shift"])
def test_the_oldest_turns_give_way_and_the_system_prompt_stays(policy: str) -> None:
    session = filled(policy)
    for n in range(12):
        assert say(session, f"question {n}")
        assert session.finish == "length"
        prompt = session.prompt()
        assert prompt.text.startswith("<|system|>be brief<|end|><|user|>question ")
        assert len(prompt.tokens) < 200
    assert session.conversation.trimmed > 10
    assert len(session.conversation.path()) == 24, "nothing is lost"
    assert bool(session.model.shifts) == (policy == "shift")


def test_shifting_keeps_what_was_read() -> None:
    session = filled("shift")
    for n in range(9):
        say(session, f"question {n}")
        if session.model.shifts:
            break
    assert session.engine.stats.prompt_tokens - session.engine.stats.reused_tokens < 30


@pytest.mark.parametrize("policy", ["drop", "shift"])
def test_an_answer_that_fills_the_context_goes_on_without_the_oldest_turns(policy: str) -> None:
    session = filled(policy)
    for n in range(2):
        say(session, f"question {n}")
    session.set("max_tokens", 120)
    answer = say(session, "and now?")
    assert len(answer) == 120
    assert session.finish == "length"
    assert session.conversation.trimmed
    assert session.engine.stats.generated_tokens == 120
    assert "".join(m.content for m in session.conversation.path()[-1:]) == answer


def told_to(session: Session, text: str) -> list[tuple[int, int]]:
    """What is told of reading in the midst of an answer."""
    told: list[tuple[int, int]] = []
    pieces = session.send(text, lambda done, total: told.append((done, total)))
    next(pieces)
    told.clear()
    for _ in pieces:
        pass
    return told


def test_it_is_told_that_room_is_made_in_the_midst_of_an_answer_and_what_is_read_for_it() -> None:
    session = filled("drop")
    for n in range(2):
        say(session, f"question {n}")
    session.set("max_tokens", 120)
    told = told_to(session, "and now?")
    read = len(session.model.cached) - session.model.cached.index(ord("?"))
    assert told[0] == (0, 0)
    assert told[1][1] > read // 2
    assert told[1:] == [(done, told[1][1]) for done in (*range(0, told[1][1], session.model.chunk), told[1][1])]


def test_nothing_is_told_where_the_answer_ends_with_the_context_or_its_reasoning_is_ended() -> None:
    session = filled("stop", context=60)
    session.set("max_tokens", 0)
    assert told_to(session, "q") == []
    assert session.finish == "context"
    model = Closed()
    model.reasoning = THINK
    session = Session(model)
    session.think("budget 20")
    assert told_to(session, "q") == []
    assert session.finish == "stop"


def test_an_answer_longer_than_any_room_ends_with_the_context() -> None:
    session = filled("drop", context=100)
    session.set("max_tokens", 0)
    answer = say(session, "q")
    assert session.finish == "context"
    assert 100 - SPARE - 20 < len(answer) <= 100


def test_a_message_that_fits_no_context_is_refused_and_nothing_goes_for_it() -> None:
    session = filled("drop", context=100)
    say(session, "q")
    with pytest.raises(ContextError, match="without anything older the last message still makes 113 tokens"):
        say(session, "x" * 100)
    assert session.conversation.trimmed == 0
    assert len(session.messages) == 2


def test_ids_of_an_answer_stand_where_its_text_stands_and_nowhere_else() -> None:
    tokenizer, template = FakeModel().tokenizer, PlainTemplate()
    turns = [
        Turn("user", "ab"),  # the encoder makes one token of it
        Turn("assistant", "ab", [*b"ab"]),
        Turn("user", "cab"),
        Turn("assistant", "ab", [*b"ab"]),
        Turn("user", "x"),
    ]
    prompt = prompt_of(turns, template, tokenizer)
    said = [("user", "ab"), ("assistant", "ab"), ("user", "cab"), ("assistant", "ab"), ("user", "x")]
    assert prompt.text == "".join(f"<|{role}|>{text}<|end|>" for role, text in said) + "<|assistant|>"
    expected = [
        *tokenizer.encode("<|user|>ab<|end|><|assistant|>"),
        *b"ab",
        *tokenizer.encode("<|end|><|user|>cab<|end|><|assistant|>"),
        *b"ab",
    ]
    assert prompt.tokens == expected + tokenizer.encode("<|end|><|user|>x<|end|><|assistant|>")


@given(st.lists(st.text("ab<>|user end", max_size=6), min_size=1, max_size=6), st.data())
def test_kept_ids_never_change_the_text_of_a_prompt(contents: list[str], data: st.DataObject) -> None:
    tokenizer, template = FakeModel().tokenizer, PlainTemplate()
    turns = [
        Turn("assistant" if i % 2 else "user", text, [*text.encode()] if i % 2 and data.draw(st.booleans()) else [])
        for i, text in enumerate(contents)
    ]
    prompt = prompt_of(turns, template, tokenizer)
    spelled = "".join(tokenizer.token(id) for id in prompt.tokens)
    assert spelled == prompt.text


def test_a_model_that_cannot_shift_says_why_and_reads_again_instead() -> None:
    session, stubborn = filled("shift"), Endless(context=200)
    stubborn.shift_obstacle = "its recurrent states cannot be cut"
    with pytest.raises(
        SettingError, match="fake-moe cannot shift: its recurrent states cannot be cut; drop is possible"
    ):
        Session(stubborn).set_overflow("shift")
    session = session.with_model(stubborn)
    for n in range(9):
        assert say(session, f"question {n}")
    assert session.conversation.trimmed
    assert not stubborn.shifts
