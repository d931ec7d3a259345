"""The chat as a person sees it: whole transcripts over a fake model, through a pipe and through the line editor."""

from __future__ import annotations

import inspect
import io
import os
import re
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import PAD, SYSTEM, FakeModel, HarmonyTokenizer
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from localmoe.engine import Stats
from localmoe.errors import FileFormatError, TokenizerError
from localmoe.experts.loading import Loading
from localmoe.experts.telemetry import Counts, Room
from localmoe.folders import state_folder
from localmoe.memory import Resident
from localmoe.repl import residency
from localmoe.repl.commands import COMMANDS
from localmoe.repl.input import (
    LineReader,
    TerminalReader,
    command_completer,
    history_at,
    is_complete,
    message_of,
    open_reader,
)
from localmoe.repl.loop import converse
from localmoe.repl.models import OpenModels
from localmoe.repl.render import DelayedBar, Screen, visible
from localmoe.repl.talk import Talk
from localmoe.session import Session

REPLIES = {"hello": "Hi there.", "long": "one two three", "esc": "\x1b[31mred\x07", "utf": "naïve 🙂", "none": ""}


def screen(width: int = 80, terminal: bool = False) -> Screen:
    """One console for words and troubles, so that a transcript keeps their order."""
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=terminal,
        highlight=False,
        color_system="standard" if terminal else None,
    )
    return Screen(console, console)


def chat(*lines: str, model: FakeModel | None = None, on: Screen | None = None) -> str:
    """What stands on the screen after these lines came through a pipe."""
    on = on or screen()
    talk = Talk(Session(model or FakeModel(REPLIES)), on)
    converse(talk, LineReader(io.StringIO("".join(line + "\n" for line in lines))))
    return on.console.file.getvalue()


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


def test_a_short_conversation() -> None:
    assert chat("hello", "utf", "/exit", "hello") == "Hi there.\n\nnaïve 🙂\n\n"


def test_reopen_goes_on_with_a_fresh_model_and_closes_the_old_one() -> None:
    old, fresh, on = FakeModel(REPLIES), FakeModel(REPLIES), screen()
    talk = Talk(Session(old), on, OpenModels(old, lambda path, loading: fresh))
    converse(talk, LineReader(io.StringIO("hello\n/reopen\nutf\n")))
    assert on.console.file.getvalue() == "Hi there.\n\n(fake-moe opened anew)\nnaïve 🙂\n\n"
    assert (talk.session.model, old.closed, fresh.closed) == (fresh, True, False)
    assert [message["content"] for message in talk.session.messages] == ["hello", "Hi there.", "utf", "naïve 🙂"]


def test_a_reopen_that_fails_leaves_the_old_model_at_work() -> None:
    def load(path: Path, loading: Loading) -> FakeModel:
        raise FileFormatError("m.gguf: no such file")

    old, on = FakeModel(REPLIES), screen()
    converse(Talk(Session(old), on, OpenModels(old, load)), LineReader(io.StringIO("hello\n/reopen\nutf\n")))
    assert "m.gguf: no such file" in on.console.file.getvalue()
    assert on.console.file.getvalue().endswith("naïve 🙂\n\n")
    assert not old.closed


def test_the_end_of_the_input_ends_the_chat() -> None:
    assert chat() == ""


def test_empty_lines_are_no_messages() -> None:
    assert chat("", "   ", "hello") == "Hi there.\n\n"


@pytest.mark.parametrize("word", ["exit", "quit", "bye", "q"])
def test_every_word_for_leaving_leaves(word: str) -> None:
    assert chat(f"/{word}", "hello") == ""


def test_an_unknown_command_names_the_nearest() -> None:
    hint = "(a message may begin with a slash after a space)"
    told = " ".join(chat("/hlep", "/reg", "/xyzzy").split())
    assert told == (
        f"there is no command /hlep: did you mean /help? {hint} there is no command /reg: did you mean /regen? {hint} "
        f"there is no command /xyzzy: /help lists the commands {hint}"
    )


def test_a_message_may_begin_with_a_slash_after_a_space() -> None:
    assert chat(" /hello", model=FakeModel({"/hello": "A path?"})) == "A path?\n\n"


def test_quoted_text_is_never_a_command() -> None:
    assert chat('"""/exit"""', "hello", model=FakeModel({"/exit": "Kept.", **REPLIES})) == "Kept.\n\nHi there.\n\n"


def test_help_lists_every_command_once() -> None:
    told = chat("/help")
    assert [line.split()[0] for line in told.splitlines() if line.startswith("/")] == [f"/{name}" for name in COMMANDS]


def test_help_on_one_command_names_its_other_names() -> None:
    assert chat("/help exit") == "/exit  leave\nalso /quit, /bye, /q\n"


def test_a_setting_out_of_range_is_refused_and_stays() -> None:
    told = chat("/set top_p 1.5", "/set top_p").splitlines()
    assert told[0] == "top_p is a number from 0 to 1, not '1.5'"
    assert told[1].startswith("top_p = 0.95")


def test_a_setting_is_changed_by_a_space_or_an_equals_sign() -> None:
    told = chat("/set top_k 7", "/set seed=12345678", "/set top_k")
    assert told.startswith("(top_k = 7, was 40)\n(seed = 12345678, was -1)\ntop_k = 7  keep the k likeliest")


def test_an_unknown_setting_names_the_nearest() -> None:
    assert chat("/set temprature 1") == "there is no setting 'temprature': did you mean temperature?\n"


def test_set_alone_shows_every_setting_with_its_range() -> None:
    told = chat("/set")
    assert "temperature = 0.0" in told
    assert " ".join(told.split()).count(" number from ") == 10


def test_the_answer_stops_at_max_tokens_and_says_so() -> None:
    told = chat("/set max_tokens 3", "long").splitlines()
    assert told[1:] == ["one", "(max_tokens = 3 reached; /set max_tokens 0 lifts it)", ""]


def test_a_full_context_is_told_with_the_way_out() -> None:
    told = chat("long", "hello", "/clear", "hello", model=FakeModel(REPLIES, context=20))
    assert told.splitlines() == [
        "one two three",
        "",
        "the conversation has 29 tokens and the context holds 20: shorten it, start it ",
        "afresh, or open the model with a larger --context",
        "(/trim N leaves out the oldest turns, /summary sums them up, /ctx drop does ",
        "without them, /clear starts anew)",
        "(a new conversation)",
        "Hi there.",
        "",
    ]


def test_while_room_is_made_in_the_midst_of_an_answer_that_is_told_below_it() -> None:
    model, on = FakeModel({"one": "x" * 60, "two": "y" * 150}, context=200), screen(terminal=True)
    chat("/ctx drop", "one", "two", model=model, on=on)
    told = on.console.file.getvalue()
    assert told.count("y") >= 120
    first, *later = re.findall(r"making room in the context(?:, (\d+) of (\d+) tokens)?", told)
    assert first == ("", "")
    assert [int(done) for done, _ in later] == list(range(0, int(later[0][1]), model.chunk))


def test_system_shows_sets_and_removes() -> None:
    assert chat("/system", "/system be brief", "/system", '/system ""', "/system").splitlines() == [
        "(no system prompt)",
        "(system prompt set)",
        "be brief",
        "(system prompt removed)",
        "(no system prompt)",
    ]


def test_the_template_is_shown() -> None:
    assert "plain\n{% for m in messages %}" in chat("/template show")


def test_regen_answers_again_and_needs_an_answer() -> None:
    assert chat("/regen", "hello", "/regen") == "there is no answer yet to generate again\nHi there.\n\nHi there.\n\n"


def test_an_empty_answer_is_told() -> None:
    assert chat("none") == "(the model gave an empty answer)\n\n"


def test_stats_count_tokens_and_speed() -> None:
    talk = Talk(Session(FakeModel(REPLIES)), screen())
    talk.session.engine.stats = Stats(30, 10, prefill_seconds=0.5, generated_tokens=8, decode_seconds=2.0)
    converse(talk, LineReader(io.StringIO("/stats\n")))
    assert [line.rstrip() for line in talk.screen.console.file.getvalue().splitlines()] == [
        "prompt   30 tokens, 10 of them kept from before",
        "reading  20 tokens in 0.50 s, 40.0 tokens/s",
        "answer   8 tokens in 2.00 s, 4.0 tokens/s",
        "context  0 of 512 tokens used",
    ]


def slotted(**how: Any) -> FakeModel:
    """A model whose experts are in slots."""
    model = FakeModel(REPLIES, **how)
    model.change_loading(Loading("slots", memory=6_000_000_000))
    model.had_room = Room(14_200_000_000, 3_900_000_000, 2_310_000_000, 6_000_000_000, 1_100_000_000, 400_000_000)
    return model


def test_stats_tell_what_became_of_the_experts() -> None:
    model = slotted()
    model.step_counts = replace(model.step_counts, ahead_read=4, ahead_used=3)
    told = chat("hello", "/stats", model=model).splitlines()
    assert [line.split("  ")[0] for line in told[2:]] == ["prompt", "reading", "", "answer", "", "context"]
    each = "hit 75 % · {} · read 50 % compute 50 % · guesses 75 % right"
    assert told[4].split() == each.format("625 kB/token").split()
    assert told[6].split() == each.format("5 MB/token").split()


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine and a process of known sizes."""
    monkeypatch.setattr(residency, "resident", lambda: Resident(4_700_000_000, 1_100_000_000, 5_900_000_000))
    monkeypatch.setattr(residency, "available_nbytes", lambda: 12_300_000_000)
    monkeypatch.setattr(residency, "total_nbytes", lambda: 16_000_000_000)
    monkeypatch.setattr(residency, "pressure", lambda: 1.7)


def rows_of(told: str) -> list[str]:
    return [line.rstrip() for line in told.splitlines()]


@pytest.mark.usefixtures("memory")
def test_memory_tells_what_is_where() -> None:
    assert rows_of(chat("hello", "/memory", model=slotted()))[2:] == [
        "process        4.70 GB of its own, 1.10 GB of files; 5.90 GB at most until now",
        "budget         6.00 GB",
        "dense weights  1.10 GB, always in memory",
        "experts        2.31 GB in 3.90 GB of slots; all of them are 14.20 GB",
        "beside         400 MB for KV cache, working memory, vocabulary and Python",
        "KV cache       17 kB of 512 kB used, 17 of 512 tokens",
        "machine        12.30 GB of 16.00 GB free; memory pressure 2 %",
    ]


@pytest.mark.usefixtures("memory")
def test_memory_of_mapped_weights_and_without_pressure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "pressure", lambda: None)
    assert rows_of(chat("/memory")) == [
        "process   4.70 GB of its own, 1.10 GB of files; 5.90 GB at most until now",
        "weights   1.23 MB in files, loaded as mmap",
        "KV cache  0 B of 512 kB used, 0 of 512 tokens",
        "machine   12.30 GB of 16.00 GB free",
    ]


def test_lazy_shows_what_runs_and_why() -> None:
    assert rows_of(chat("/lazy")) == [
        "loading  mmap",
        "why      all of it fits",
        "asked    --lazy auto",
    ]
    model = slotted()
    model.loading = Loading("auto", 8 << 30, 2_500_000_001, "lru", lookahead=True, trace=Path("choices"))
    assert rows_of(chat("/lazy", model=model)) == [
        "loading  slots",
        "why      as asked",
        "asked    --lazy auto --memory 8GiB --expert-cache 2.50GB --expert-policy lru",
        "         --lookahead --trace choices",
        "experts  2.31 GB in 3.90 GB of slots; all of them are 14.20 GB",
    ]


def test_lazy_changes_the_mode_and_the_conversation_goes_on() -> None:
    model = FakeModel(REPLIES)
    assert chat("hello", "/lazy slots 4GiB", "hello", "/lazy mmap", "/lazy slots", model=model) == (
        "Hi there.\n\n(loading slots: as asked; was mmap)\nHi there.\n\n"
        "(loading mmap: as asked; was slots)\n(loading slots: as asked; was mmap)\n"
    )
    assert model.calls[len("Hi there.") + 1][0] == len("<hello<>Hi there."), "what stands in the cache is not run again"
    assert model.loading == Loading("slots", expert_cache=4 << 30), "the size is kept from last time"


def test_lazy_keeps_all_that_was_asked_for_but_auto_chooses_the_size_anew() -> None:
    model = FakeModel(REPLIES)
    model.loading = asked = Loading("auto", 8 << 30, 1 << 30, "lru")
    chat("/lazy off", model=model)
    assert model.loading == replace(asked, mode="off")
    chat("/lazy slots 2 GiB", model=model)
    assert model.loading == replace(asked, mode="slots", expert_cache=2 << 30)
    told = chat("/lazy auto", "/lazy", model=model)
    assert told.startswith("(loading slots: 7.80 GB of weights, 4.20 GB free; was slots)\n")
    assert "why      7.80 GB of weights, 4.20 GB free" in told
    assert model.loading == replace(asked, expert_cache=None)


def test_a_mode_that_cannot_be_is_told_and_the_old_one_goes_on() -> None:
    model = slotted()
    model.trouble = "42 GB of weights do not fit the 12 GB that are free"
    assert chat("/lazy off", "hello", model=model) == (
        "42 GB of weights do not fit the 12 GB that are free\n(slots goes on)\nHi there.\n\n"
    )
    assert chat("/lazy of", "/lazy mmap 4GiB", "/lazy slots much").splitlines() == [
        "there is no loading mode 'of'; possible: auto, mmap, slots, off",
        "only slots takes a size, as in /lazy slots 4GiB, not mmap",
        "a size is a number with kB, MB, GB or TB (powers of 1000) or KiB, MiB, GiB or ",
        "TiB (of 1024), such as 8GiB, not 'much'",
    ]


def test_experts_draws_who_was_chosen_by_the_numbers_of_their_blocks() -> None:
    model = slotted()
    model.chosen, model.expert_blocks = np.array([[3, 0, 1, 2], [0, 0, 4, 4]]), [3, 11]
    assert rows_of(chat("/experts", model=model)) == [
        "   0  3",
        " 3 ▒ ░▒",
        "11   ▒▒",
        "· <0.5 ░ <1 ▒ <2 ▓ <4 █ more (times the mean)",
        "busiest       3/0 2.0×, 11/2 2.0×, 11/3 2.0×, 3/3 1.3×, 3/2 0.7×",
        "idle          3 of 8 never chosen; most in layer 11: 2 of 4",
        "load balance  busiest over mean 2.00; variation 0.87 (0.75 to 1.00)",
        "entropy       1.23 (1.00 to 1.46) of 2.00 bits",
    ]


def test_experts_of_a_large_model_stand_on_one_screen_of_any_width() -> None:
    model = slotted()
    model.chosen, model.expert_blocks = np.random.default_rng(0).integers(0, 99, (58, 256)), list(range(3, 61))
    for width in (40, 80):
        console = Console(file=io.StringIO(), width=width, height=24, force_terminal=True, color_system=None)
        lines = chat("/experts", model=model, on=Screen(console, console)).splitlines()
        assert len(lines) <= 24
        assert max(map(len, lines)) <= width
        assert " 3-7 " in lines[1]


def test_experts_that_nobody_counts_or_asked_for_are_told() -> None:
    assert chat("/experts") == "nobody counts here which experts are chosen: /lazy slots does, from then on\n"
    model = slotted()
    model.chosen = np.zeros((2, 4), np.int64)
    assert chat("/experts", model=model) == "experts  none was chosen yet\n"


def test_where_only_ascii_can_be_shown_the_map_is_ascii() -> None:
    model = slotted()
    model.chosen, model.expert_blocks = np.array([[3, 0, 1, 2]]), [0]
    console = Console(file=io.TextIOWrapper(io.BytesIO(), "ascii", "backslashreplace"), width=80, highlight=False)
    chosen = Screen(console, console)
    converse(Talk(Session(model), chosen), LineReader(io.StringIO("/experts\n")))
    console.file.seek(0)
    assert console.file.read().splitlines()[1].rstrip() == "0 + :+"


def test_ctrl_c_while_the_mode_is_changed_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = slotted()
    monkeypatch.setattr(model, "change_loading", lambda loading, progress: signal.raise_signal(signal.SIGINT))
    assert chat("/lazy off", "hello", model=model) == "(stopped: slots goes on)\nHi there.\n\n"


@pytest.mark.usefixtures("memory")
def test_the_line_below_an_answer_is_there_in_slots_mode_only() -> None:
    told = chat("hello", model=slotted(), on=screen(terminal=True))
    assert "hit 75 % · 5 MB/token · read 50 % compute 50 % · RSS 5.8/6.0 GB" in told
    assert told.endswith("\x1b8\x1b[J\n\n"), "it is gone when the answer is whole"
    assert "hit" not in chat("hello", on=screen(terminal=True))
    assert "\x1b" not in chat("hello", model=slotted())


def test_stats_before_any_answer_say_so() -> None:
    assert chat("/stats") == "there is no answer yet to count\n"


def test_control_characters_of_the_model_never_reach_the_terminal() -> None:
    assert chat("esc") == "\\x1b[31mred\\x07\n\n"
    assert visible("a\tb\nc\r\x9b\u202e\x7f") == "a\tb\nc\\r\\x9b\\u202e\\x7f"
    assert visible("\udc80") == "\\udc80"


def test_control_characters_of_a_file_name_or_setting_are_shown_too() -> None:
    assert "\x1b" not in chat("/set \x1b[2J", "/\x1b[2J", "/system \x1b[2J", "/system")


def thinker(reply: str = "<think>\nhm, so\n</think>\n\nYes.", **how: Any) -> FakeModel:
    model = FakeModel({"q": reply, **REPLIES}, **how)
    model.reasoning = ("<think>", "</think>")
    return model


def test_reasoning_is_labelled_off_a_terminal() -> None:
    assert chat("q", model=thinker()) == "(reasoning)\nhm, so\n\n(answer)\nYes.\n\n"


def test_reasoning_that_nothing_follows_is_told() -> None:
    assert chat("q", model=thinker("<think>hm")) == "(reasoning)\nhm\n(no answer followed the reasoning)\n\n"


def test_ctrl_c_while_it_thinks_says_so() -> None:
    model = thinker()

    def press() -> None:
        if model.cached[-2:] == [*b"hm"]:
            signal.raise_signal(signal.SIGINT)

    model.before_call = press
    told = chat("q", "hello", model=model)
    assert told == "(reasoning)\nhm, \n(stopped while it was thinking)\n\nHi there.\n\n"


def test_ctrl_c_while_gpt_oss_thinks_takes_the_message_back_and_says_so() -> None:
    model = thinker()
    model.tokenizer = HarmonyTokenizer()
    model.reasoning = ("<|channel|>analysis<|message|>", "<|end|>")
    model.replies = {"q": [PAD, *b"analysis", SYSTEM, *b"hm hm"], "more": [PAD, *b"final", SYSTEM, *b"ok"]}

    def press() -> None:
        if model.cached[-2:] == [*b"hm"]:
            signal.raise_signal(signal.SIGINT)

    model.before_call = press
    talk = Talk(Session(model), screen())
    converse(talk, LineReader(io.StringIO("q\nmore\n")))
    assert talk.screen.console.file.getvalue() == (
        "(reasoning)\nhm h\n(stopped while it was thinking; Up brings the message back)\n\nok\n\n"
    )
    assert [message["content"] for message in talk.session.messages] == ["more", "ok"]


def test_nothing_of_ours_is_wider_than_a_narrow_window() -> None:
    told = chat("/help", "/set", "/hlep", "/set top_p 9", "hello", "/stats", on=screen(width=40))
    assert max(map(len, told.splitlines())) <= 40


def test_in_a_narrow_window_long_titles_stand_above_their_texts() -> None:
    on = screen(width=40)
    on.rows([("/lazy [off|mmap|slots [SIZE]|auto]", "show or change how weights are loaded"), ("/exit", "leave")])
    on.rows([("process", "4.70 GB of its own, 1.10 GB of files")])
    assert rows_of(on.console.file.getvalue()) == [
        "/lazy [off|mmap|slots [SIZE]|auto]",
        "  show or change how weights are loaded",
        "/exit",
        "  leave",
        "process  4.70 GB of its own, 1.10 GB of",
        "         files",
    ]


def test_ctrl_c_in_mid_answer_keeps_the_part_and_the_next_prompt_works() -> None:
    model = FakeModel(REPLIES)

    def press() -> None:
        if model.cached[-2:] == [*b"tw"]:
            signal.raise_signal(signal.SIGINT)

    model.before_call = press
    before = signal.getsignal(signal.SIGINT)
    on = screen()
    talk = Talk(Session(model), on)
    converse(talk, LineReader(io.StringIO("long\nhello\n")))
    assert on.console.file.getvalue() == "one two \n(stopped)\n\nHi there.\n\n"
    assert talk.session.messages[1] == {"role": "assistant", "content": "one two "}
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_while_the_prompt_is_read_takes_the_message_back() -> None:
    model = FakeModel({"x" * 40: "late", **REPLIES})

    def press() -> None:
        if len(model.calls) == 1:
            signal.raise_signal(signal.SIGINT)

    model.before_call = press
    assert chat("x" * 40, "hello", model=model) == (
        "(stopped before the first word; Up brings the message back)\n\nHi there.\n\n"
    )


def test_ctrl_c_does_not_wait_for_a_word_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("localmoe.repl.talk.monotonic", lambda: now[0])
    model = FakeModel(REPLIES)

    def press() -> None:
        if model.cached[-2:] == [*b"tw"] and not now[0]:
            now[0] += 1.5
            signal.raise_signal(signal.SIGINT)

    model.before_call = press
    assert chat("long", "hello", model=model) == "one two\n(stopped)\n\nHi there.\n\n"


def test_a_second_ctrl_c_does_not_wait_for_the_token() -> None:
    model = FakeModel(REPLIES)

    def press_twice() -> None:
        if len(model.calls) == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    model.before_call = press_twice
    assert chat("long", "hello", model=model) == "on\n(stopped)\n\nHi there.\n\n"


def test_ctrl_c_at_an_empty_prompt_hints_and_twice_leaves(keys: PipeInput) -> None:
    on = screen()
    keys.send_text("\x03hello\r\x03\x03never\r")
    converse(Talk(Session(FakeModel(REPLIES)), on), TerminalReader())
    hint = "(Ctrl+C again, Ctrl+D or /exit to leave)\n"
    assert on.console.file.getvalue() == hint + "Hi there.\n\n" + hint


def test_ctrl_c_drops_the_typed_line_but_up_brings_it_back(keys: PipeInput) -> None:
    keys.send_text("a long question\x03short\r")
    reader = TerminalReader()
    assert reader.read() == "short"
    assert reader._session.history.get_strings() == ["a long question", "short"]


def test_ctrl_d_leaves(keys: PipeInput) -> None:
    keys.send_text("\x04")
    with pytest.raises(EOFError):
        TerminalReader().read()


def test_what_the_first_message_needs_is_prepared_once_and_beside_the_first_prompt(keys: PipeInput) -> None:
    threads: list[threading.Thread] = []
    called = threading.Event()

    def prepare() -> None:
        threads.append(threading.current_thread())
        called.set()

    reader = TerminalReader(prepare=prepare)
    assert not threads
    keys.send_text("one\rtwo\r")
    assert (reader.read(), reader.read()) == ("one", "two")
    assert called.wait(30)
    assert threads != [threading.current_thread()]
    assert len(threads) == 1


def test_from_a_pipe_the_preparation_comes_first_and_its_error_is_heard() -> None:
    def prepare() -> None:
        raise TokenizerError("a broken vocabulary")

    with pytest.raises(TokenizerError, match="a broken vocabulary"):
        open_reader(False, prepare)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("one\r", "one"),
        ("one\\\rtwo\r", "one\ntwo"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ('"""one\rtwo"""\r', "one\ntwo"),
        ('"""\rone\\\r"""\r', "one\\"),
        ("\x1b[200~one\ntwo\x1b[201~\r", "one\ntwo"),
    ],
    ids=["plain", "backslash", "alt-enter", "quotes", "quotes-keep-backslash", "paste"],
)
def test_a_message_may_have_several_lines(keys: PipeInput, typed: str, message: str) -> None:
    keys.send_text(typed)
    assert TerminalReader().read() == message


def test_several_lines_come_through_a_pipe_too() -> None:
    reader = LineReader(io.StringIO('a\\\nb\n"""c\nd"""\n\\'))
    assert [reader.read(), reader.read()] == ["a\nb", "c\nd"]
    assert reader.read() == "\\"
    with pytest.raises(EOFError):
        reader.read()


def test_open_quotes_and_a_backslash_wait_for_more() -> None:
    assert [is_complete(text) for text in ("a", "a\\", '"""a', '"""a"""', 'say """')] == [
        True,
        False,
        False,
        True,
        True,
    ]
    assert message_of('"""a""" b') == "a b"


def completions(typed: str) -> list[str]:
    talk = Talk(Session(FakeModel()), screen())
    return [c.text for c in command_completer(talk).get_completions(Document(typed), CompleteEvent())]


def test_completion_reads_the_command_table_and_the_settings() -> None:
    assert completions("/s") == ["summary", "system", "set", "stats", "save"]
    assert completions("/set top") == ["top_k", "top_p"]
    assert completions("/help reg") == ["regen"]
    assert completions("/lazy s") == ["slots"]
    assert completions("hello /s") == completions("/nothing ") == completions("/set top_k 1") == []
    assert completions("/set top_k ") == ["40"]


def test_the_history_is_for_its_owner_only_and_outlives_the_chat(keys: PipeInput, tmp_path: Path) -> None:
    path = tmp_path / "state" / "history"
    keys.send_text("remember me\r")
    TerminalReader(path).read()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "remember me" in list(history_at(path).load_history_strings())


def test_an_old_history_open_to_others_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "history"
    path.touch(mode=0o644)
    history_at(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_without_a_place_for_the_history_the_chat_still_runs(keys: PipeInput, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    keys.send_text("hello\r")
    assert TerminalReader(tmp_path / "file" / "history").read() == "hello"


def test_the_state_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_folder() == tmp_path / "localmoe"


def test_quick_work_shows_no_bar_and_slow_work_shows_one() -> None:
    on = screen(terminal=True)
    with on.progress("opening") as bar:
        bar("opening", 1, 2)
    assert on.errors.file.getvalue() == ""
    bar = DelayedBar(on.errors, "opening")
    bar("reading weights", 1, 4)
    bar._show()
    bar("compiling kernels", 3, 4)
    bar.close()
    told = on.errors.file.getvalue()
    assert "reading weights" in told
    assert "25%" in told
    assert "\x1b[2K" in told, "the bar takes itself away"


def test_a_bar_makes_room_for_lines_and_comes_back() -> None:
    on = screen(terminal=True)
    bar = DelayedBar(on.errors, "chunks")
    seen = []
    bar.beside(lambda: seen.append(bar._bar))
    assert seen == [None]
    bar._show()
    shown = bar._bar
    assert shown is not None
    bar.beside(lambda: seen.append((shown.live.is_started, on.errors.file.getvalue()[-4:])))
    assert seen[1:] == [(False, "\x1b[2K")], "the line is free"
    assert shown.live.is_started
    bar.close()


def test_a_label_that_changes_keeps_the_time_left_and_other_work_begins_anew() -> None:
    bar = DelayedBar(screen(terminal=True).errors, "chunks")
    bar._show()
    tasks = []
    for label, done, total in (("PPL 7", 1, 9), ("PPL 6", 2, 9), ("reading", 1, 9), ("writing", 2, 8)):
        bar(label, done, total)
        assert bar._bar is not None
        (task,) = bar._bar.tasks
        assert (task.description, task.completed, task.total) == (label, done, total)
        tasks.append(task.id)
    bar.close()
    assert tasks[0] == tasks[1]
    assert len(set(tasks)) == 3


def test_the_bar_tells_tokens_and_what_was_read_for_them() -> None:
    model = slotted()
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    on = Screen(console, console)
    bar = on.progress("reading", residency.reads(model.counts))
    bar._show()
    bar.tokens("reading")(512, 2048)
    model.counted += Counts(nbytes_read=3_210_000_000)
    assert bar._bar is not None
    bar._bar.refresh()
    bar.close()
    told = on.errors.file.getvalue()
    assert "reading, 512 of 2048 tokens ━" in told
    assert "reading, 512 of 2048 tokens · 3.21 GB read ━" in told


def test_off_a_terminal_there_is_never_a_bar() -> None:
    on = screen()
    with on.progress("opening") as bar:
        assert not bar._timer.is_alive()


def on_a_terminal() -> None:
    """Run in a process of its own: `localmoe chat` with a model that takes its time."""
    import time

    from fakes import FakeModel

    import localmoe
    from localmoe.cli import main

    model = FakeModel({"hello": "Hi there.", "long": "word " * 400}, context=4000)
    model.before_call = lambda: time.sleep(0.005)
    localmoe.load = lambda path, **how: model
    main(["chat", "x.gguf"])


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX pseudo-terminal")
def test_a_whole_chat_on_a_real_terminal(tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    tests = Path(__file__).parent
    surroundings = {
        **os.environ,
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "XDG_STATE_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join((str(tests), str(tests.parent))),
    }
    program = inspect.getsource(on_a_terminal) + "on_a_terminal()"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=surroundings,
        start_new_session=True,
    )
    os.close(theirs)
    seen = ""

    def expect(text: str) -> None:
        """Read on until `text` appears, and go on behind it."""
        nonlocal seen
        deadline = time.monotonic() + 30
        while text not in seen:
            assert time.monotonic() < deadline, f"waited for {text!r}, saw {seen!r}"
            if select.select([ours], [], [], 0.1)[0]:
                seen += os.read(ours, 65536).decode(errors="replace")
        seen = seen.partition(text)[2]

    try:
        expect("/help for commands")
        expect(">>>")
        os.write(ours, b"long\r")
        expect("word word")
        # The chat is not the terminal's foreground job here, so the signal is sent and not typed.
        process.send_signal(signal.SIGINT)
        expect("(stopped)")
        expect(">>>")
        os.write(ours, b"hello\r")
        expect("Hi there.")
        expect(">>>")
        os.write(ours, b"/exit\r")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert (tmp_path / "localmoe" / "history").read_text().count("+") == 3


def test_the_terminal_echo_is_off_while_an_answer_is_drawn_and_back_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    termios, pty = pytest.importorskip("termios"), pytest.importorskip("pty")
    from localmoe.repl.keyboard import silent_keyboard

    controller, terminal = pty.openpty()
    with os.fdopen(terminal, "r") as stream, os.fdopen(controller, "r"):
        monkeypatch.setattr("sys.stdin", stream)
        with silent_keyboard():
            assert not termios.tcgetattr(stream.fileno())[3] & termios.ECHO
        assert termios.tcgetattr(stream.fileno())[3] & termios.ECHO
