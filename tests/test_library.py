"""Conversations are found again: their names, the list of them, renaming, deleting, and private ones."""

from __future__ import annotations

import os
import threading
from datetime import datetime
from pathlib import Path

import pytest
from conversations import journal_of, library_in, state, talk, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localmoe.conversation.library import Library
from localmoe.conversation.lines import header_of, line_of
from localmoe.conversation.listing import TAIL
from localmoe.conversation.names import MAX_LETTERS, automatic_name, checked_name
from localmoe.conversation.tree import Conversation
from localmoe.errors import ConversationError

BEGAN = datetime(2026, 11, 21, 17, 5)
POSSIBLE = ["x", "my talk", "2.v1_b-c", "naïve", "हिन्दी", "a" * MAX_LETTERS, "conversation", "com"]
IMPOSSIBLE = ["", "  ", ".x", "..", "-x", "a/b", "a\\b", "a:b", "a\0b", "a\nb", "x.", "🙂", "\x1b", "\ud800", "*"]
IMPOSSIBLE += ["CON", "nul.txt", "com1", "lpt¹", "a" * (MAX_LETTERS + 1), "中" * 67]
IMPOSSIBLE += ["a.json", "x.MD", "x.jsonl", "x.journal"]


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return library_in(tmp_path)


def named(library: Library, name: str, age: int = 0) -> None:
    """A saved conversation, last changed `age` seconds ago."""
    saved = library.open_new()
    saved.rename(name)
    talk(saved.conversation)
    saved.close()
    path = journal_of(library, name)
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("What is the capital of France?", "2026-11-21-1705-what-is-the-capital"),
        ("don't ../../etc", "2026-11-21-1705-dont-etc"),
        ("", "2026-11-21-1705"),
        ("!?\n\x1b[31m🙂", "2026-11-21-1705-31m"),
        ("ÉCOLE हिन्दी 中文", "2026-11-21-1705-école-हिन्दी-中文"),
        ("a" * 500, "2026-11-21-1705-" + "a" * 32),
        ("supercalifragilistic expialidocious words", "2026-11-21-1705-supercalifragilistic"),
    ],
)
def test_a_conversation_is_called_by_its_date_and_first_words(title: str, name: str) -> None:
    assert automatic_name(BEGAN, title) == name


@given(title=st.text())
def test_automatic_names_are_names(title: str) -> None:
    name = automatic_name(BEGAN, title)
    assert checked_name(name) == name
    assert len((name + "-1000.journal").encode()) < 200


@pytest.mark.parametrize("name", POSSIBLE)
def test_names_that_are_possible(name: str) -> None:
    assert checked_name(f"  {name} ") == name


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_names_that_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(ConversationError, match=r"\A.* is no name: .* are possible\)\Z"):
        checked_name(name)


def test_two_that_begin_alike_in_one_minute_have_two_names(library: Library) -> None:
    one, two = library.open_new(), library.open_new()
    one.conversation.add("hello")
    two.conversation.add("hello")
    assert two.name == one.name + "-2"
    one.close()
    two.close()
    assert len(library.names()) == 2


def test_a_name_is_given_before_or_after_the_first_message(library: Library) -> None:
    early, late = library.open_new(), library.open_new()
    early.rename("early")
    assert early.name == "early"
    assert not library.folder().exists()
    for saved in (early, late):
        talk(saved.conversation)
    late.rename("late")
    late.conversation.add("on")
    assert set(library.names()) == {"early", "late"}
    for saved in (early, late):
        saved.close()
        again = library.open_named(saved.name)
        assert (again.problem, state(again.conversation)) == ("", state(saved.conversation))
        assert again.created == saved.created
        again.close()


def test_a_name_in_use_is_refused(library: Library) -> None:
    named(library, "taken")
    saved = library.open_new()
    for name in ("taken", "Taken"):
        with pytest.raises(ConversationError, match=f"{name} is in use: choose another name, or /delete {name} first"):
            saved.rename(name)
    talk(saved.conversation)
    before = saved.name
    with pytest.raises(ConversationError, match="taken is in use"):
        saved.rename("taken")
    assert saved.name == before
    saved.rename(before.upper().lower())
    saved.rename("other")
    saved.rename("Other")
    saved.close()
    assert set(library.names()) == {"taken", "Other"}


def test_a_name_taken_meanwhile_gets_a_number_and_that_is_told(library: Library) -> None:
    one, two = library.open_new(), library.open_new()
    one.rename("mine")
    two.rename("mine")
    one.conversation.add("hello")
    two.conversation.add("hello")
    assert (one.news(), two.news()) == ("", "mine is in use: this conversation is mine-2")
    one.close()
    two.close()


def test_a_race_for_one_name_has_one_winner(library: Library) -> None:
    several = [library.open_new() for _ in range(6)]
    for saved in several:
        saved.conversation.add("hello")
    refused: list[str] = []
    start = threading.Barrier(len(several))

    def rename(index: int) -> None:
        start.wait()
        try:
            several[index].rename("wanted")
        except ConversationError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=rename, args=(i,)) for i in range(len(several))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for saved in several:
        saved.conversation.add("and on")
        assert saved.news() == ""
        saved.close()
    assert len(refused) == len(several) - 1
    assert len(library.names()) == len(several)


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps open files")
def test_renaming_what_was_deleted_keeps_it_under_the_new_name(library: Library) -> None:
    saved = library.open_new()
    talk(saved.conversation)
    journal_of(library, saved.name).unlink()
    saved.rename("rescued")
    saved.close()
    again = library.open_named("rescued")
    assert state(again.conversation) == state(saved.conversation)
    again.close()


def test_a_private_conversation_leaves_nothing_until_it_is_given_a_name(library: Library, tmp_path: Path) -> None:
    saved = library.open_new(keep=False)
    talk(saved.conversation)
    assert (saved.name, saved.keep, saved.in_memory) == ("", False, True)
    assert list(tmp_path.iterdir()) == []
    saved.rename("kept after all")
    assert (saved.keep, saved.in_memory) == (True, False)
    saved.conversation.add("on")
    saved.close()
    again = library.open_named("kept after all")
    assert state(again.conversation) == state(saved.conversation)
    again.close()


def test_a_conversation_from_elsewhere_is_kept_at_once(library: Library) -> None:
    conversation = Conversation()
    talk(conversation)
    saved = library.open_new(conversation=conversation)
    assert saved.name.endswith("-question-0-naïve-of")
    saved.close()
    again = library.open_named(saved.name)
    assert state(again.conversation) == state(conversation)
    again.close()


def test_a_conversation_is_opened_by_its_name_or_a_beginning_that_is_its_own(library: Library) -> None:
    for name in ("2026-11-21-1705-cats", "2026-11-21-1706-dogs", "2026", "Birds"):
        named(library, name)
    for asked, name in (("2026", "2026"), ("birds", "Birds"), ("2026-11-21-1706", "2026-11-21-1706-dogs")):
        saved = library.open_named(asked)
        assert saved.name == name
        saved.close()
    with pytest.raises(ConversationError, match="'2026-11' begins 2 names: 2026-11-21-170"):
        library.open_named("2026-11")
    for asked, hint in (("cats", "did you mean 2026-11-21-1705-cats?"), ("Brids", "did you mean Birds?")):
        with pytest.raises(ConversationError, match=f"there is no conversation '{asked}': {hint[:-1]}"):
            library.open_named(asked)
    for asked in ("", "../x", "/etc/passwd", "x\0y", "zzz"):
        with pytest.raises(ConversationError, match="/list shows what is saved"):
            library.open_named(asked)


def test_an_empty_library_says_so(library: Library) -> None:
    assert library.listing() == library.names() == []
    for ask in (library.latest, lambda: library.open_named("x"), lambda: library.delete("x")):
        with pytest.raises(ConversationError, match="there is no conversation"):
            ask()


def test_the_latest_is_the_one_changed_last_that_can_be_opened(library: Library) -> None:
    named(library, "older", age=100)
    named(library, "newer", age=50)
    write(journal_of(library, "broken"), b"not a journal\n")
    journal_of(library, "empty").touch()
    assert library.latest() == "newer"
    saved = library.open_named("older")
    saved.conversation.add("on")
    saved.close()
    assert library.latest() == "older"


def test_deleting_takes_the_whole_name_and_no_open_one(library: Library) -> None:
    named(library, "one")
    named(library, "two")
    with pytest.raises(ConversationError, match="there is no conversation 'on': did you mean one"):
        library.delete("on")
    library.delete("one")
    assert library.names() == ["two"]
    saved = library.open_named("two")
    with pytest.raises(ConversationError, match="two is open in another localmoe"):
        library.delete("two")
    saved.close()
    write(journal_of(library, "broken"), b"not a journal\n")
    library.delete("broken")
    library.delete("two")
    assert library.names() == []


def test_the_list_shows_what_each_is(library: Library) -> None:
    named(library, "talk", age=100)
    (found,) = library.listing()
    path = journal_of(library, "talk")
    assert (found.name, found.title) == ("talk", "question 0 naïve 🙂 of two lines")
    assert (found.messages, found.model) == (6, "demo")
    assert (found.nbytes, found.problem) == (path.stat().st_size, "")
    assert found.changed == datetime.fromtimestamp(path.stat().st_mtime)


def test_the_list_is_right_for_one_that_was_killed_in_a_long_answer(library: Library) -> None:
    named(library, "long")
    saved = library.open_named("long")
    saved.conversation.add("more")
    saved.conversation.begin("other")
    for piece in range(5 * TAIL // 60):
        saved.conversation.grow("word ", [piece])
    (found,) = library.listing()
    assert found.messages == 8
    saved.conversation.end("stop")
    saved.conversation.add("more")
    (found,) = library.listing()
    assert (found.messages, found.model) == (9, "other")
    saved.conversation.add("a" * 3 * TAIL)
    (found,) = library.listing()
    assert found.messages == 10
    saved.close()


def test_the_list_names_what_cannot_be_opened_and_opens_what_it_does_not(library: Library) -> None:
    named(library, "fine")
    data = journal_of(library, "fine").read_bytes()
    strange = {
        "foreign": b"hello\n" * 10,
        "newer": header_of("", "").replace(b"version", b"Version"),
        "headless": data[data.index(b"\n") + 1 :],
        "spoilt": b"#" + data[1:],
        "torn": data[: data.index(b"\n") - 5],
        "short": data[:4],
        "zeros": bytes(9000),
        "title": line_of(1, {"format": "localmoe conversation", "version": 1, "title": ["x"]})
        + data[data.index(b"\n") + 1 :],
    }
    for name, content in strange.items():
        write(journal_of(library, name), content)
    refused = set()
    for found in library.listing():
        try:
            library.open_named(found.name).close()
            assert found.problem == "", found.name
        except ConversationError as error:
            refused.add(found.name)
            assert found.problem == str(error), found.name  # noqa: PT017
    assert refused == {"foreign", "newer", "zeros"}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=100), place=st.floats(0, 1))
def test_a_list_of_anything_never_fails(library: Library, data: bytes, place: float) -> None:
    path = journal_of(library, "any")
    if not journal_of(library, "fine").exists():
        named(library, "fine")
    whole = journal_of(library, "fine").read_bytes()
    cut = int(place * len(whole))
    write(path, whole[:cut] + data + whole[cut + len(data) :])
    assert {"any", "fine"} >= {found.name for found in library.listing()} >= {"fine"}
