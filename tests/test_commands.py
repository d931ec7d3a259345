"""Slash commands about a conversation, as a person sees them: whole transcripts over a fake model."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from fakes import FakeModel, PlainTemplate
from rich.console import Console

from localmoe.conversation.library import Library
from localmoe.conversation.tree import Conversation
from localmoe.errors import DeviceError, FileFormatError, LocalMoeError, TemplateError
from localmoe.experts.loading import Loading
from localmoe.repl.attachments import LARGEST, read_files
from localmoe.repl.input import LineReader
from localmoe.repl.loop import converse
from localmoe.repl.models import KEPT, OpenModels
from localmoe.repl.render import Screen
from localmoe.repl.talk import Talk
from localmoe.session import Session

REPLIES = {"hello": "Hi there.", "bye": "Bye.", "hi": "Hey.", "long": "one two three"}


@dataclass
class Told:
    """What stands on the screen, and the chat behind it."""

    text: str
    talk: Talk

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.text.splitlines()]

    @property
    def conversation(self) -> Conversation:
        return self.talk.session.conversation


def talk_with(model: FakeModel | None = None, **others: FakeModel | LocalMoeError) -> Talk:
    """A chat; `others` are models by the names of their files, or why they cannot be opened."""
    console = Console(file=io.StringIO(), width=80, highlight=False, color_system=None)
    model = model or FakeModel(REPLIES)

    def load(path: Path, loading: Loading) -> FakeModel:
        found = others.get(path.stem, FileFormatError(f"{path}: no such file"))
        if isinstance(found, LocalMoeError):
            raise found
        found.path = path
        return found

    return Talk(Session(model), Screen(console, console), OpenModels(model, load))


def chat(*lines: str, talk: Talk | None = None) -> Told:
    talk = talk or talk_with()
    converse(talk, LineReader(io.StringIO("".join(line + "\n" for line in lines))))
    return Told(talk.screen.console.file.getvalue(), talk)


def said(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.path()]


def test_before_anything_was_said_nothing_can_be_changed() -> None:
    told = chat("/undo", "/edit", "/edit hi", "/history", "/branch", "/summary", "/trim 1", "/regen")
    assert told.lines == [
        "there is nothing to take back",
        "there is no message yet to edit",
        "there is no message yet to edit",
        "nothing has been said yet",
        "nothing has been said yet",
        "there is nothing before the last question to sum up",
        "there is only one question to see: nothing can be left out",
        "there is no answer yet to generate again",
    ]


def test_an_edited_message_is_answered_on_a_branch_of_its_own() -> None:
    told = chat("hello", "bye", "/edit 1 hi", "/history", "/branch", "/branch 1", "/history 2")
    assert told.lines[4:] == [
        "Hey.",
        "",
        "1  hi",
        "   Hey.",
        "1   4 messages  hello",
        "2*  2 messages  Hey.",
        ">>> bye",
        "Bye.",
        "",
        "2  bye",
        "   Bye.",
    ]
    assert said(told.conversation) == ["hello", "Hi there.", "bye", "Bye."]


def test_without_a_number_the_last_message_is_edited() -> None:
    assert said(chat("hello", "bye", "/edit hi").conversation) == ["hello", "Hi there.", "hi", "Hey."]


def test_without_a_text_the_message_is_asked_for_again() -> None:
    told = chat("hello", "/edit 2 x", "/edit 1", "hello", "/edit", "bye")
    assert told.lines[2:] == ["message of yours is a number from 1 to 1, not '2'", "(not changed)", "Bye.", ""]
    assert said(told.conversation) == ["bye", "Bye."]


def test_undo_takes_back_and_the_branch_stays() -> None:
    told = chat("hello", "bye", "/undo", "/undo", "/undo", "/branch", "/branch 1")
    assert told.lines[4:] == [
        "(taken back: bye)",
        "(taken back: hello)",
        "there is nothing to take back",
        "1  4 messages  hello",
        ">>> bye",
        "Bye.",
        "",
    ]


def test_another_answer_keeps_the_first_one() -> None:
    told = chat("hello", "/regen", "/branch", "/branch 3", "/branch x")
    assert told.lines[4:] == [
        "1   2 messages  Hi there.",
        "2*  2 messages  Hi there.",
        "branch is a number from 1 to 2, not '3'",
        "branch is a number from 1 to 2, not 'x'",
    ]


def test_a_question_that_was_never_answered_is_no_branch() -> None:
    model = FakeModel(REPLIES, context=30)
    told = chat("hello", "far too long a question for this", "/branch", talk=talk_with(model))
    assert told.lines[-1] == "1*  2 messages  Hi there."


def test_trimmed_questions_are_kept_but_not_seen() -> None:
    told = chat("hello", "bye", "hi", "/trim", "/trim 3", "/trim 2", "/trim", "/history 3", "/ctx")
    assert told.lines[6:-4] == [
        "0 of 3 questions are not seen by the model; /trim N leaves out N more",
        "of the questions that may go is a number from 1 to 2, not '3'",
        "(2 left out; 1 are seen)",
        "2 of 3 questions are not seen by the model; /trim N leaves out N more",
        "   [not seen] Bye.",
        "3  hi",
        "   Hey.",
    ]
    assert told.lines[-1] == "not seen   4 messages"
    assert told.talk.session.prompt().text == "<|user|>hi<|end|><|assistant|>Hey.<|end|><|assistant|>"


def test_a_summary_stands_in_the_place_of_what_it_sums_up() -> None:
    talk = talk_with()
    talk.session.model.replies = {**REPLIES, "nothing else.": "We said hello."}
    told = chat("hello", "bye", "/summary", "/ctx", talk=talk)
    assert told.lines[4:7] == ["We said hello.", "", "(the model sees this in the place of 2 messages)"]
    assert told.lines[-1] == "not seen   2 messages, summed up"
    assert talk.session.prompt().text == (
        "<|system|>Summary of the conversation so far:\nWe said hello.<|end|>"
        "<|user|>bye<|end|><|assistant|>Bye.<|end|><|assistant|>"
    )
    talk.session.conversation.move(2)
    assert talk.session.prompt().text == "<|user|>hello<|end|><|assistant|>Hi there.<|end|><|assistant|>"


def test_a_summary_of_one_branch_is_not_seen_on_another() -> None:
    talk = talk_with()
    talk.session.model.replies = {**REPLIES, "nothing else.": "We said hello."}
    chat("hello", "bye", "/summary", "/edit 1 hi", "bye", "/trim 1", talk=talk)
    assert talk.session.prompt().text == "<|user|>bye<|end|><|assistant|>Bye.<|end|><|assistant|>"


def test_an_interrupted_summary_changes_nothing() -> None:
    talk = talk_with()
    talk.session.model.replies = {**REPLIES, "nothing else.": "We said hello."}
    chat("hello", "bye", "/set max_tokens 3", "/summary", talk=talk)
    assert talk.session.conversation.trimmed == 0


def test_clear_starts_a_new_conversation_with_the_same_system_prompt() -> None:
    told = chat("/system be brief", "hello", "/clear", "/history", "/system", "bye")
    assert told.lines[3:] == ["(a new conversation)", "nothing has been said yet", "be brief", "Bye.", ""]
    assert said(told.conversation) == ["bye", "Bye."]


def test_tokens_both_ways() -> None:
    told = chat("/tokens ab c<|end|>", "/tokens [261, 259]", "/tokens [262]", "/tokens", "/tokens []")
    assert told.lines == [
        "    261  'ab'",
        "     32  ' '",
        "     99  'c'",
        "    259  '<|end|>'  special",
        "(4 tokens)",
        "    261  'ab'",
        "    259  '<|end|>'  special",
        "(2 tokens)",
        "there is no token 262: ids are from 0 to 261",
        "/tokens takes a text, or ids in brackets: /tokens [1, 2, 3]",
        "(0 tokens)",
    ]


def test_a_file_goes_before_the_next_message_and_only_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.py").write_text("print(1)\n```")
    Path("b.txt").write_text("two")
    talk = talk_with()
    told = chat("/read *.*", "/read", "/ctx", "hello", "bye", talk=talk)
    assert told.lines[:3] == [
        "(with your next message: a.py, b.txt; 55 tokens attached)",
        "a.py   32 tokens",
        "b.txt  23 tokens",
    ]
    assert told.lines[6] == "attached   55 tokens in 2 files, for the next message"
    assert said(talk.session.conversation)[0] == (
        "a.py:\n````py\nprint(1)\n```\n````\n\nb.txt:\n```txt\ntwo\n```\n\nhello"
    )
    assert said(talk.session.conversation)[2] == "bye"


def test_a_file_stays_attached_where_no_answer_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("b.txt").write_text("two")
    talk = talk_with()

    def interrupt() -> None:
        raise KeyboardInterrupt

    talk.session.model.before_call = interrupt
    chat("/read b.txt", "hello", talk=talk)
    assert len(talk.attachments) == 1
    talk.session.model.before_call = lambda: None
    chat("/read none", talk=talk)
    assert talk.attachments == []


def test_what_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zero").write_bytes(b"a\0b")
    Path("latin").write_bytes(b"caf\xe9")
    Path("folder").mkdir()
    Path("large").write_text("x" * 600)
    os.mkfifo("pipe")
    with Path("huge").open("wb") as file:
        file.truncate(LARGEST + 1)
    told = chat(
        "/read", "/read nothing", "/read zero", "/read latin", "/read folder", "/read pipe", "/read huge", "/read large"
    )
    assert told.lines == [
        "/read takes a file or a pattern; nothing is attached so far",
        "nothing: no such file, and nothing matches it as a pattern",
        "zero: is no text (it holds a zero byte)",
        "latin: is no UTF-8 text (byte 3)",
        "folder: is a folder; folder/* names the files in it",
        "pipe: is no regular file",
        "huge: has 16.8 MB; at most 16.8 MB are read",
        "617 tokens of files do not fit: 512 of the context are left",
    ]


def test_a_pattern_goes_down_into_folders_and_takes_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "in" / "side").mkdir(parents=True)
    for place in ("a.md", "in/b.md", "in/side/c.md"):
        (tmp_path / place).write_text(place)
    found = read_files(f"{tmp_path}/**/*.md")
    assert [each.text for each in found] == ["a.md", "in/b.md", "in/side/c.md"]


def test_pasted_lines_are_one_message_and_no_commands() -> None:
    told = chat("/paste", "/exit", "hello", "/end", "/paste", "/end", "bye")
    assert said(told.conversation)[0] == "/exit\nhello"
    assert told.lines[-3:] == ["(nothing pasted)", "Bye.", ""]


def test_the_context_is_shown_and_its_policy_chosen() -> None:
    told = chat("hello", "/ctx", "/ctx drop", "/ctx forget", "/ctx")
    assert told.lines[2:] == [
        "context    19 of 512 tokens, 4 %; 493 left",
        "cached     17 tokens have been read and need not be read again",
        "when full  stop",
        "(when the context is full: drop)",
        "a full context can stop, drop, shift, not 'forget'",
        "context    19 of 512 tokens, 4 %; 493 left",
        "cached     17 tokens have been read and need not be read again",
        "when full  drop",
    ]


def test_thinking_is_switched_as_far_as_the_template_goes() -> None:
    model = FakeModel(REPLIES)
    model.reasoning = ("<think>", "</think>")
    model.template.source = "{% if enable_thinking %}"
    told = chat(
        "/think off", "/think", "/think budget 100", "/think high", "/think", "/think maybe", talk=talk_with(model)
    )
    assert told.lines == [
        "(thinking: off)",
        "thinking  off",
        "markers   <think> … </think>",
        "(thinking: off, at most 100 tokens)",
        "the template has no switch for /think high: it takes on or off",
        "thinking  off, at most 100 tokens",
        "markers   <think> … </think>",
        "/think takes on, off, low, medium, high, budget N (0 lifts it), show, hide, not",
        "'maybe'",
    ]


def test_reasoning_is_shown_or_folded_and_markdown_drawn_or_not() -> None:
    model = FakeModel({"hello": "<think>hm</think>Hi *there*."})
    model.reasoning = ("<think>", "</think>")
    talk = talk_with(model)
    told = chat("/think show", "hello", "/think hide", "/markdown", "/markdown off", "/markdown maybe", talk=talk)
    assert told.lines[0] == "(reasoning is shown from now on)"
    assert told.lines[-4:] == [
        "(reasoning is folded from now on)",
        "(markdown: on)",
        "(markdown: off)",
        "/markdown takes on or off, not 'maybe'",
    ]
    assert not talk.screen.markdown


def test_another_model_goes_on_with_the_conversation_and_the_first_one_comes_back_at_once() -> None:
    first, second = FakeModel(REPLIES), FakeModel({**REPLIES, "bye": "Farewell."})
    second.name = "second"
    talk = talk_with(first, second=second)
    told = chat("hello", "/model second.gguf", "bye", "/model fake.gguf", "hi", "/model fake.gguf", talk=talk)
    assert told.lines[2:] == [
        "(second answers from now on: fake · 1.23 MB · context 512)",
        "Farewell.",
        "",
        "(fake-moe answers from now on: fake · 1.23 MB · context 512)",
        "Hey.",
        "",
        "fake-moe is the model that answers",
    ]
    assert [m.model for m in talk.session.conversation.path() if m.role == "assistant"] == [
        "fake-moe",
        "second",
        "fake-moe",
    ]
    assert first.calls[len(first.calls) - len("Hey.") - 2][0] >= 17, "what it had read before is not read again"
    assert (first.closed, second.closed) == (False, False)
    talk.models.close()
    assert (first.closed, second.closed) == (True, True)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (FileFormatError("second.gguf: truncated"), "second.gguf: truncated"),
        (DeviceError("a context of 8192 tokens needs 64 GB"), "a context of 8192 tokens needs 64 GB"),
    ],
)
def test_a_model_that_cannot_be_opened_leaves_the_old_one_at_work(other: LocalMoeError, told: str) -> None:
    found = chat("hello", "/model second.gguf", "bye", talk=talk_with(None, second=other))
    assert found.lines[2:] == [told, "Bye.", ""]


def test_a_model_without_a_template_takes_the_named_one_or_is_refused() -> None:
    bare = FakeModel(REPLIES)
    bare.template, bare.name = None, "bare"
    told = chat("/model bare.gguf", "/template chatml", "/model bare.gguf", talk=talk_with(None, bare=bare))
    assert told.lines[0].startswith("bare has no chat template: name one with")
    assert told.lines[-1] == "(bare answers from now on: fake · 1.23 MB · context 512)"
    assert told.talk.session.template.name == "chatml"


def test_a_conversation_too_long_for_another_model_is_told_with_numbers_and_ways() -> None:
    small = FakeModel(REPLIES, context=20)
    small.name = "small"
    told = chat(
        "hello", "bye", "/model small.gguf", "/trim 1", "/model small.gguf", "hi", talk=talk_with(None, small=small)
    )
    assert told.lines[4:] == [
        "the conversation has 30 tokens for small, whose context holds 20: 11 too many;",
        "/trim N leaves out the oldest turns, /summary sums them up, /ctx drop does",
        "without them, /clear starts anew",
        "(1 left out; 1 are seen)",
        "(small answers from now on: fake · 1.23 MB · context 20)",
        "Hey.",
        "",
    ]


def test_models_that_were_left_are_closed_when_there_are_too_many_or_memory_lacks() -> None:
    models = [FakeModel(REPLIES) for _ in range(KEPT + 2)]
    refusals = [DeviceError("no memory")]

    def load(path: Path, loading: Loading) -> FakeModel:
        number = int(path.stem)
        if number == len(models) - 1 and refusals:
            raise refusals.pop()
        models[number].path = path
        return models[number]

    open_models = OpenModels(models[0], load)
    for number in range(1, len(models) - 1):
        open_models.take(open_models.open(Path(f"{number}.gguf")))
    assert [model.closed for model in models] == [False] * len(models)
    open_models.take(open_models.open(Path(f"{len(models) - 1}.gguf")))
    assert [model.closed for model in models] == [True] * KEPT + [False, False]


def test_a_model_in_slots_is_not_kept_beside_another() -> None:
    first, second = FakeModel(REPLIES), FakeModel(REPLIES)
    first.change_loading(Loading("slots"))
    chat("hello", "/model second.gguf", "bye", talk=talk_with(first, second=second))
    assert (first.closed, second.closed) == (True, False)


def test_another_template_reads_the_conversation_again() -> None:
    told = chat("hello", "/template chatml", "/template", "/template nope", "/template own", "bye")
    assert told.lines[2:4] == ["(template: chatml)", "template  chatml"]
    assert told.lines[-3:] == ["(template: plain)", "Bye.", ""]
    model = FakeModel()
    model.template = None
    session = Session(model, PlainTemplate())
    console = Console(file=io.StringIO(), width=80, highlight=False, color_system=None)
    bare = chat("/template own", talk=Talk(session, Screen(console, console)))
    assert bare.lines == ["fake-moe has no chat template of its own"]


def test_the_doctor_shows_the_prompt_token_by_token_and_what_is_wrong() -> None:
    told = chat("hello", "/template doctor", "/template chatml", "/template doctor")
    assert told.lines[2] == "<|user|>│h│e│l│l│o│<|end|>│<|assistant|>│H│i│ │t│h│e│r│e│.│<|end|>│<|assistant|>"
    assert "(plain: nothing is wrong)" in told.lines
    assert told.lines[-1].startswith("(chatml: ")
    assert any("<|im_end|>" in line for line in told.lines[-20:])


def test_nothing_is_rendered_before_anything_was_said() -> None:
    """Templates that look at the first message are not asked for a prompt without one."""
    model = FakeModel(REPLIES)

    class Demanding(PlainTemplate):
        def render(self, messages, **variables):  # type: ignore[no-untyped-def]
            if not messages:
                raise TemplateError("messages[0] is undefined")
            return super().render(messages, **variables)

    model.template = Demanding()
    told = chat("/ctx", "/template own", "/template doctor", "/tokens a", "hello", talk=talk_with(model))
    assert told.lines[0] == "context    0 of 512 tokens, 0 %; 512 left"
    assert "messages[0] is undefined" not in told.text
    assert told.lines[-2:] == ["Hi there.", ""]


def test_a_conversation_that_is_loaded_brings_its_settings(tmp_path: Path) -> None:
    library = Library(tmp_path)
    talk = talk_with()
    talk.library, talk.saved = library, library.open_new()
    talk.session.start(talk.saved.conversation)
    chat("/set top_k 3", "hello", "/save one", "/clear", "/set top_k 9", "bye", "/save two", talk=talk)
    assert talk.session.settings.top_k == 9
    chat("/load one", talk=talk)
    assert talk.session.settings.top_k == 3
    chat("/load two", talk=talk)
    assert talk.session.settings.top_k == 9


def test_a_long_question_is_shown_by_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("word " * 200)
    told = chat("/read a.txt", "hello", "/regen", "/branch 1", talk=talk_with(FakeModel(REPLIES, context=2000)))
    shown = told.text.partition(">>> ")[2]
    assert shown.startswith("… word word")
    assert len(shown) < 500
    assert told.lines[-3:] == ["hello", "Hi there.", ""]


def test_models_that_cannot_take_over_are_not_kept_without_end() -> None:
    bare = [FakeModel(REPLIES) for _ in range(KEPT + 3)]
    for number, model in enumerate(bare):
        model.template, model.name = None, f"bare{number}"
    others = {f"bare{number}": model for number, model in enumerate(bare)}
    chat(*(f"/model {name}.gguf" for name in others), talk=talk_with(None, **others))
    assert [model.closed for model in bare].count(False) == KEPT + 1


def test_a_number_longer_than_any_is_refused() -> None:
    told = chat("hello", f"/branch {'0' * 5000}1", f"/edit {'1' * 5000} x", f"/history {'9' * 10}")
    assert told.lines[2:] == [
        f"branch is a number from 1 to 1, not '{'0' * 40}'",
        "message of yours is a number from 1 to 1, not",
        f"'{'1' * 40}'",
        "messages is a number from 1 to 2, not '9999999999'",
    ]
