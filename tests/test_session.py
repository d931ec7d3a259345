"""Claims about a conversation over a fake model: what it is asked, what is kept, which tokens need not run again."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import PAD, PAIR, SYSTEM, ByteStream, FakeModel, PlainTemplate
from hypothesis import given
from hypothesis import strategies as st

from localmoe.conversation.tree import Conversation
from localmoe.errors import DeviceError, SettingError, TemplateError
from localmoe.reasoning import Piece, ReasoningSplitter
from localmoe.session import Session
from localmoe.template_fit import open_template

THINK = ("<think>", "</think>")


def say(session: Session, text: str) -> str:
    return "".join(piece.text for piece in session.send(text))


def thinking(reply: str, prefill: str = "") -> Session:
    model = FakeModel({"q": reply})
    model.reasoning = THINK
    model.template = PlainTemplate(prefill)
    return Session(model)


def merged(pieces: list[Piece]) -> list[tuple[str, str]]:
    whole: list[tuple[str, str]] = []
    for piece in pieces:
        if whole and whole[-1][0] == piece.kind:
            whole[-1] = (piece.kind, whole[-1][1] + piece.text)
        else:
            whole.append((piece.kind, piece.text))
    return whole


def test_an_answer_joins_the_messages() -> None:
    session = Session(FakeModel({"hello": "Hi."}))
    assert say(session, "hello") == "Hi."
    assert session.finish == "stop"
    assert session.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hi."}]


def test_the_template_sees_system_prompt_and_history_in_order() -> None:
    session = Session(FakeModel({"hello": "Hi.", "bye": "Bye."}), system="be brief")
    say(session, "hello")
    say(session, "bye")
    assert session.prompt().text == (
        "<|system|>be brief<|end|><|user|>hello<|end|><|assistant|>Hi.<|end|><|user|>bye<|end|><|assistant|>Bye.<|end|>"
        "<|assistant|>"
    )


def test_the_next_turn_runs_only_its_own_tokens() -> None:
    model = FakeModel({"hello": "Hi.", "bye": "Bye."})
    session = Session(model)
    say(session, "hello")
    ran = len(session.model.cached)
    say(session, "bye")
    assert session.engine.stats.reused_tokens == ran
    assert session.engine.stats.prompt_tokens - ran == 7, "<|end|> <|user|> b y e <|end|> <|assistant|>"


def test_the_models_own_cut_of_an_answer_is_kept_for_the_next_turn() -> None:
    model = FakeModel({"q": "cab", "more": "ok"})
    session = Session(model)
    say(session, "q")
    assert model.cached[-3:] == [*b"cab"], "the model spelt a, b where the encoder writes one token"
    ran = len(session.model.cached)
    say(session, "more")
    assert session.engine.stats.reused_tokens == ran
    assert PAIR not in model.cached


def test_another_model_goes_on_with_the_same_ids_where_its_tokens_are_the_same() -> None:
    replies = {"q": "cab", "more": "ok"}
    session = Session(FakeModel(replies))
    say(session, "q")
    session = session.with_model(FakeModel(replies))
    assert say(session, "more") == "ok"
    assert PAIR not in session.model.cached, "the model had spelt a, b"


class OtherStream(ByteStream):
    """A vocabulary in which the id of c is C."""

    def push(self, id: int) -> str:
        return "C" if id == ord("c") else super().push(id)


def test_another_model_with_other_tokens_tokenises_anew() -> None:
    replies = {"q": "cab", "more": "ok"}
    session, other = Session(FakeModel(replies)), FakeModel(replies)
    other.tokenizer.stream = lambda continues=False: OtherStream()  # type: ignore[method-assign]
    say(session, "q")
    session = session.with_model(other)
    assert say(session, "more") == "ok"
    assert PAIR in session.model.cached
    assert [message["content"] for message in session.messages] == ["q", "cab", "more", "ok"]


def test_a_template_that_rewrites_history_falls_back_to_tokenising_anew() -> None:
    class Shouting(PlainTemplate):
        def render(self, messages, **variables):
            told = [
                {**m, "content": m["content"].upper() if m["role"] == "assistant" else m["content"]} for m in messages
            ]
            return super().render(told, **variables)

    model = FakeModel({"q": "cab", "more": "ok"})
    model.template = Shouting()
    session = Session(model)
    say(session, "q")
    say(session, "more")
    assert session.messages[-1]["content"] == "ok"
    assert bytes(t for t in model.cached if t < 256) == b"qCABmoreok"


def test_text_after_an_answer_that_starts_without_a_special_token_is_tokenised_with_what_stands_before() -> None:
    class Bare(PlainTemplate):
        def render(self, messages, **variables):
            return "".join(
                m["content"] if m["role"] == "assistant" else m["content"] + "<|assistant|>" for m in messages
            )

    model = FakeModel({"q": "ca", "b": "ok"})
    model.template = Bare()
    session = Session(model)
    say(session, "q")
    say(session, "b")
    assert PAIR in model.cached, "a of the answer and b of the next message are one token"


def test_leaving_an_answer_early_keeps_what_was_said() -> None:
    session = Session(FakeModel({"q": "long answer", "go on": "ok"}))
    pieces = session.send("q")
    assert "".join(next(pieces).text for _ in range(4)) == "long"
    pieces.close()
    assert session.finish == "interrupted"
    assert session.messages[-1] == {"role": "assistant", "content": "long"}
    assert say(session, "go on") == "ok"
    assert session.engine.stats.reused_tokens == len("uqea") + len("lon")


def test_an_answer_cut_inside_a_character_keeps_whole_characters_only() -> None:
    model = FakeModel({"q": "aé", "more": "ok"})
    session = Session(model)

    def interrupt() -> None:
        if model.calls[-1][1] == [0xC3]:
            raise KeyboardInterrupt

    model.before_call = interrupt
    with pytest.raises(KeyboardInterrupt):
        say(session, "q")
    assert session.messages[-1]["content"] == "a"
    assert say(session, "more") == "ok"
    assert 0xC3 not in session.model.cached


def test_a_question_whose_answer_never_began_is_taken_back() -> None:
    model = FakeModel({"q": "ok"}, context=24)
    session = Session(model)
    with pytest.raises(DeviceError):
        say(session, "far too long a question for this context")
    assert session.messages == []
    assert say(session, "q") == "ok"


def test_an_interrupt_while_the_prompt_is_read_takes_the_question_back() -> None:
    session = Session(FakeModel({"q": "ok"}))

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(session.send("q", interrupt))
    assert session.messages == []
    assert session.finish == "interrupted"


def test_regenerating_replaces_the_last_answer() -> None:
    model = FakeModel({"q": "first"})
    session = Session(model)
    say(session, "q")
    model.replies = {"q": "second"}
    assert "".join(piece.text for piece in session.regenerate()) == "second"
    assert [m["content"] for m in session.messages] == ["q", "second"]
    assert session.engine.stats.prompt_tokens - session.engine.stats.reused_tokens == 1


def test_the_old_answer_stays_when_the_new_one_does_not_begin() -> None:
    session = Session(FakeModel({"q": "first"}))
    say(session, "q")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(session.regenerate(interrupt))
    assert [m["content"] for m in session.messages] == ["q", "first"]


def test_regenerating_nothing_is_refused() -> None:
    with pytest.raises(SettingError, match="no answer yet"):
        list(Session(FakeModel()).regenerate())


def test_a_new_conversation_has_no_messages_and_keeps_system_prompt_and_settings() -> None:
    session = Session(FakeModel({"q": "ok"}), system="be brief")
    session.set("top_k", "7")
    say(session, "q")
    session.start(Conversation())
    assert (session.messages, session.system, session.settings.top_k) == ([], "be brief", 7)
    assert say(session, "q") == "ok"


def test_an_empty_system_prompt_is_none() -> None:
    session = Session(FakeModel(), system="be brief")
    session.set_system("")
    assert session.prompt().text == "<|assistant|>"


def test_set_refuses_what_is_out_of_range_and_changes_nothing() -> None:
    session = Session(FakeModel())
    with pytest.raises(SettingError, match="top_p is a number from 0 to 1, not '2'"):
        session.set("top_p", "2")
    assert session.settings.top_p == 0.95


def test_the_models_recommendation_is_the_default() -> None:
    model = FakeModel()
    model.recommended = {"temperature": 0.3, "top_k": 11}
    assert (Session(model).settings.temperature, Session(model).settings.top_k) == (0.3, 11)


def test_without_a_template_the_choices_are_named() -> None:
    model = FakeModel()
    model.template = None
    with pytest.raises(TemplateError, match=r"fake-moe has no chat template: .*--template \(.*chatml"):
        Session(model)


def test_a_session_begins_before_tokenizer_and_template_are_there() -> None:
    class Unfinished(FakeModel):
        has_template = True

    model = Unfinished({"hello": "Hi."})
    tokenizer, template = model.tokenizer, model.template
    del model.tokenizer, model.template
    session = Session(model)
    with pytest.raises(AttributeError, match="tokenizer"):
        session.prepare()
    model.tokenizer, model.template = tokenizer, template
    assert say(session, "hello") == "Hi."


def test_a_template_is_chosen_by_name_or_by_file(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0].content }}<think>")
    assert open_template(FakeModel().tokenizer, "chatml").name == "chatml"
    session = Session(FakeModel(), open_template(FakeModel().tokenizer, str(file)))
    assert session.template.source == "{{ messages[0].content }}<think>"
    with pytest.raises(TemplateError, match=r"'chatlm' is neither a template \(.*chatml.*\) nor a file"):
        open_template(FakeModel().tokenizer, "chatlm")


def test_a_binary_file_is_no_template(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TemplateError, match=r"own\.jinja: cannot be read as a template"):
        open_template(FakeModel().tokenizer, str(file))


def test_a_template_as_large_as_a_model_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with file.open("wb") as empty:
        empty.truncate(1 << 40)
    with pytest.raises(TemplateError, match=r"^cannot be read as a template: .*model\.gguf: 1099511627776 bytes"):
        open_template(FakeModel().tokenizer, str(file))


def test_reasoning_is_set_apart_from_the_answer() -> None:
    pieces = list(thinking("<think>hm</think>Yes.").send("q"))
    assert merged(pieces) == [("reasoning", "hm"), ("answer", "Yes.")]


def test_reasoning_that_the_template_opened_is_set_apart() -> None:
    pieces = list(thinking("<think>hm</think>Yes.", prefill="<think>").send("q"))
    assert merged(pieces) == [("reasoning", "hm"), ("answer", "Yes.")]


def test_the_whole_answer_with_its_markers_is_left_to_the_template() -> None:
    session = thinking("<think>hm</think>Yes.")
    say(session, "q")
    assert session.messages[-1]["content"] == "<think>hm</think>Yes."


def test_a_marker_mentioned_inside_an_answer_is_text() -> None:
    pieces = list(thinking("Write <think> and </think>.").send("q"))
    assert merged(pieces) == [("answer", "Write <think> and </think>.")]


def test_reasoning_cut_short_is_still_reasoning() -> None:
    pieces = merged(list(thinking("<think>hm</thi").send("q")))
    assert pieces == [("reasoning", "hm</thi")]


@given(st.lists(st.sampled_from(["<", "think", ">", "</", "a", " ", "\n", "<think>", "</think>"])), st.booleans())
def test_splitting_loses_no_text_whatever_the_tokens(parts: list[str], opened: bool) -> None:
    text = "".join(parts)
    splitters = [ReasoningSplitter(THINK, opened) for _ in range(2)]
    by_token = merged([*(p for part in parts for p in splitters[0].push(part)), *splitters[0].finish()])
    at_once = merged([*splitters[1].push(text), *splitters[1].finish()])
    assert by_token == at_once
    joined = "".join(part for _, part in by_token)
    assert joined in (
        text,
        text.lstrip().removeprefix("<think>").replace("</think>", "", 1),
        text.replace("</think>", "", 1),
    )


def test_a_marker_that_is_a_control_token_is_seen() -> None:
    session = thinking("")
    session.reasoning = ("<|pad|>", "<|system|>")
    session.model.replies = {"q": [PAD, *b"hm", SYSTEM, *b"Yes"]}
    assert merged(list(session.send("q"))) == [("reasoning", "hm"), ("answer", "Yes")]
