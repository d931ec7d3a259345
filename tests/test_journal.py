"""A conversation's journal: what is written is what there is, and what is damaged is told and costs nothing else."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import random
import stat
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import pytest
from conversations import CHANGES, changed, journal_of, library_in, state, talk, write
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.conversation import lines, recovery
from localmoe.conversation.library import Library
from localmoe.conversation.lines import DEPTH_LIMIT, header_of, line_of, piece_line, read_line
from localmoe.conversation.saved import Saved
from localmoe.conversation.storage import JournalFile
from localmoe.conversation.tree import Conversation
from localmoe.errors import ConversationError

FOLDERS = itertools.count()


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return library_in(tmp_path)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shelf")


def kept(library: Library, turns: int = 2, pieces: int = 4) -> tuple[str, Conversation]:
    """A conversation that was saved and closed."""
    saved = library.open_new()
    talk(saved.conversation, turns, pieces)
    assert saved.news() == ""
    saved.close()
    return saved.name, saved.conversation


def reopened(library: Library, name: str) -> Saved:
    """Opened and closed again."""
    saved = library.open_named(name)
    saved.close()
    return saved


def lines_in(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def content_of(line: bytes) -> dict[str, object]:
    parsed = read_line(line[:-1])
    assert parsed is not None
    return parsed[1]


def at(path: Path, do: str, skip: int = 0) -> int:
    """The index of a line with a change of that kind."""
    found = [i for i, line in enumerate(lines_in(path)) if content_of(line).get("do") == do]
    return found[skip]


@settings(max_examples=150, deadline=None)
@given(changes=st.lists(CHANGES, max_size=40), cut=st.integers(0, 40))
def test_what_is_read_again_is_what_was_there(shelf: Path, changes: list[tuple[str, object]], cut: int) -> None:
    library = library_in(shelf / str(next(FOLDERS)))
    saved = library.open_new()
    changed(saved.conversation, changes[:cut])
    saved.close()
    if saved.conversation.messages:
        again = library.open_named(saved.name)
        assert again.problem == ""
        assert state(again.conversation) == state(saved.conversation)
        changed(again.conversation, changes[cut:])
        again.close()
        assert state(reopened(library, saved.name).conversation) == state(again.conversation)
    else:
        assert not library.folder().exists()


@settings(max_examples=100, deadline=None)
@given(changes=st.lists(CHANGES, max_size=40))
def test_the_shortest_changes_make_the_same_conversation(changes: list[tuple[str, object]]) -> None:
    live, again = Conversation(), Conversation()
    changed(live, changes)
    for event in live.events():
        again.apply(event)
    assert state(again) == state(live)


@given(text=st.text() | st.sampled_from(["\ud800", "a\x7f\u2028"]), tokens=st.lists(st.integers(0, 1 << 31)))
def test_a_piece_of_an_answer_is_a_line_as_any_other(text: str, tokens: list[int]) -> None:
    event = {"do": "grow", "id": 2, "text": text, "tokens": tokens}
    assert read_line(piece_line(7, event)[:-1]) == read_line(line_of(7, event)[:-1]) == (7, event)


def test_nothing_is_created_before_the_first_message(library: Library, tmp_path: Path) -> None:
    saved = library.open_new()
    saved.conversation.note(model="demo")
    saved.conversation.set_system("Be brief.")
    assert saved.name == ""
    assert list(tmp_path.iterdir()) == []
    saved.conversation.add("hello")
    assert journal_of(library, saved.name).exists()
    saved.close()
    assert reopened(library, saved.name).conversation.system == "Be brief."


def test_each_change_is_in_the_file_when_it_was_made(library: Library) -> None:
    saved = library.open_new()
    saved.conversation.add("hello")
    saved.conversation.begin("m")
    path = journal_of(library, saved.name)
    for number in range(3):
        saved.conversation.grow(f"word{number}", [number])
        assert content_of(lines_in(path)[-1]) == {
            "do": "grow",
            "id": 2,
            "text": f"word{number}",
            "tokens": [number],
        }
    saved.close()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_only_the_user_may_read_it(library: Library, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        name, _ = kept(library)
    finally:
        os.umask(before)
    path = journal_of(library, name)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    reopened(library, name)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_every_beginning_of_a_journal_opens(library: Library) -> None:
    name, _ = kept(library, turns=1, pieces=2)
    path = journal_of(library, name)
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    states = {0: state(Conversation())}
    for end in ends:
        write(path, data[:end])
        found = reopened(library, name)
        assert found.problem == ""
        states[end] = state(found.conversation)
    for length in range(1, len(data)):
        write(path, data[:length])
        found = library.open_named(name)
        whole = max((end for end in ends if end <= length), default=0)
        assert state(found.conversation) == states[whole]
        assert (found.problem == "") == (whole in (0, length))
        found.conversation.add("and on")
        found.close()
        again = reopened(library, name)
        assert again.problem == ""
        assert state(again.conversation) == state(found.conversation)


def spellings(conversation: Conversation) -> dict[int, list[tuple[str, tuple[int, ...]]]]:
    return {
        id: [(f"piece {turn}.{piece} é ", (1000 * turn + piece, piece)) for piece in range(4)]
        for turn, id in enumerate(id for id, m in conversation.messages.items() if m.role == "assistant")
    }


def assert_nothing_altered_in_silence(found: Saved, whole: Conversation) -> None:
    """Each message is what it was, or lacks pieces, and then has no ids that do not spell it."""
    if not found.problem:
        assert state(found.conversation) == state(whole)
    for id, message in found.conversation.messages.items():
        original = whole.messages[id]
        assert message.role == original.role
        if message.role == "user":
            assert message.content == original.content
            continue
        pieces = ["other"] if original.content == "other" else [p for p, _ in spellings(whole)[id]]
        rest = message.content
        for piece in pieces:
            rest = rest.removeprefix(piece)
        assert rest == ""
        if message.tokens:
            assert original.content.startswith(message.content)
            assert original.tokens[: len(message.tokens)] == message.tokens
            assert len(message.tokens) == sum(
                2 for piece in pieces if piece != "other" and piece in message.content
            ) + (message.content == "other")
    assert found.conversation.head in {0, *found.conversation.messages}
    assert [m.id for m in found.conversation.path()][-1:] == [found.conversation.head][: bool(found.conversation.head)]


def flips(data: bytes, rounds: int) -> Iterator[bytes]:
    choose = random.Random(6)
    for _ in range(rounds):
        spoiled = bytearray(data)
        for _ in range(choose.choice((1, 1, 1, 2, 5))):
            spoiled[choose.randrange(len(data))] ^= choose.randrange(1, 256)
        yield bytes(spoiled)


def test_flipped_bytes_are_told_and_cost_their_lines_alone(library: Library) -> None:
    name, whole = kept(library)
    path = journal_of(library, name)
    data = path.read_bytes()
    count = len(lines_in(path))
    for spoiled in flips(data, 1000):
        write(path, spoiled)
        found = library.open_named(name)
        assert_nothing_altered_in_silence(found, whole)
        assert (found.problem == "") == (spoiled == data)
        assert "\n" not in found.problem
        kept_lines = sum(read_line(line) is not None for line in spoiled.split(b"\n")[:-1])
        assert kept_lines >= count - 10
        found.conversation.add("and on")
        found.conversation.begin("demo")
        found.conversation.grow("more", [1, 2])
        found.close()
        assert state(reopened(library, name).conversation) == state(found.conversation)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_lost_doubled_and_swapped_lines_are_told(shelf: Path, data: st.DataObject) -> None:
    library = library_in(shelf / str(next(FOLDERS)))
    name, whole = kept(library)
    path = journal_of(library, name)
    each = lines_in(path)
    order = data.draw(st.lists(st.integers(0, len(each) - 1), min_size=1, max_size=30))
    spoiled = b"".join(each[i] for i in order)
    write(path, spoiled)
    found = reopened(library, name)
    assert (found.problem == "") == (order == list(range(len(order))))
    if found.problem:
        assert_nothing_altered_in_silence(found, whole)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200), head=st.booleans())
def test_any_bytes_open_or_are_refused(shelf: Path, data: bytes, head: bool) -> None:
    library = library_in(shelf / str(next(FOLDERS)))
    path = journal_of(library, "any")
    write(path, (header_of("", "") if head else b"") + data)
    try:
        reopened(library, "any")
    except ConversationError as error:
        assert not head, error  # noqa: PT017


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ("id", "parent", "head", "role", "content", "text", "tokens", "finish", "first", "summary", "facts", "model")
HOSTILE = st.builds(
    lambda kind, given: {**given, "do": kind},
    st.sampled_from(["message", "grow", "end", "move", "trim", "system", "facts"]) | JSON,
    st.dictionaries(st.sampled_from(FIELDS), st.integers(0, 4) | st.sampled_from(["user", "assistant"]) | JSON),
)


@settings(max_examples=300, deadline=None)
@given(events=st.lists(HOSTILE, max_size=12), numbers=st.lists(st.integers(1, 9), max_size=12))
def test_sound_lines_of_any_content_open_and_go_on(
    shelf: Path, events: list[dict[str, object]], numbers: list[int]
) -> None:
    library = library_in(shelf / str(next(FOLDERS)))
    path, number = journal_of(library, "hostile"), 1
    data = header_of("", "")
    for event, step in itertools.zip_longest(events, numbers[: len(events)], fillvalue=1):
        number += 1 if step < 8 else step
        data += line_of(number, event)  # type: ignore[arg-type]
    write(path, data)
    found = library.open_named("hostile")
    found.conversation.move(0)
    if max(found.conversation.messages, default=0) < 1 << 50:
        found.conversation.add("and on")
    found.close()
    assert json.dumps(state(reopened(library, "hostile").conversation)) == json.dumps(state(found.conversation))


def spoil(path: Path, *indices: int) -> None:
    each = lines_in(path)
    for index in indices:
        each[index] = each[index][:20] + b"#" + each[index][21:]
    write(path, b"".join(each))


def test_a_lost_piece_takes_the_ids_of_its_answer_along_and_no_others(library: Library) -> None:
    name, whole = kept(library)
    path = journal_of(library, name)
    spoil(path, at(path, "grow", skip=1))
    found = library.open_named(name)
    assert found.problem == f"{name}: line {at_number(path)} is damaged: left out, the rest is kept"
    assert found.conversation.messages[2].content == "piece 0.0 é piece 0.2 é piece 0.3 é "
    assert found.conversation.messages[2].tokens == []
    assert found.conversation.messages[2].finish == "stop"
    assert found.conversation.messages[4].tokens == whole.messages[4].tokens
    found.conversation.move(2)
    found.conversation.grow("and on", [5])
    assert found.conversation.messages[2].tokens == []
    found.close()
    assert reopened(library, name).conversation.messages[2].tokens == []


def at_number(path: Path) -> int:
    return next(i for i, line in enumerate(lines_in(path), 1) if read_line(line[:-1]) is None)


def test_the_last_piece_may_be_lost_before_an_end(library: Library) -> None:
    name, _ = kept(library)
    path = journal_of(library, name)
    spoil(path, at(path, "grow", skip=3))
    found = reopened(library, name).conversation.messages[2]
    assert (found.content, found.tokens) == ("piece 0.0 é piece 0.1 é piece 0.2 é ", [])


def test_a_lost_message_leaves_its_answer_with_the_one_before(library: Library) -> None:
    name, whole = kept(library)
    path = journal_of(library, name)
    spoil(path, at(path, "message", skip=2))  # the second question, 3
    found = reopened(library, name).conversation
    assert list(found.messages) == [1, 2, 4, 5, 6]
    assert found.messages[4].parent == 2
    assert found.messages[4].tokens == whole.messages[4].tokens
    assert found.messages[5].parent == 2


def test_an_answer_whose_beginning_is_lost_begins_with_its_first_piece(library: Library) -> None:
    name, whole = kept(library)
    path = journal_of(library, name)
    spoil(path, at(path, "message", skip=3))  # the second answer, 4
    found = reopened(library, name).conversation
    assert found.messages[4].content == whole.messages[4].content
    assert (found.messages[4].parent, found.messages[4].tokens, found.messages[4].finish) == (3, [], "stop")


def test_a_lost_first_line_is_told(library: Library) -> None:
    name, whole = kept(library)
    path = journal_of(library, name)
    spoil(path, 0)
    found = reopened(library, name)
    assert "line 1 is damaged" in found.problem
    assert found.conversation.messages.keys() == whole.messages.keys()


def test_many_losses_are_told_in_one_line(library: Library) -> None:
    name, _ = kept(library, turns=8)
    path = journal_of(library, name)
    spoil(path, *range(3, 50, 3))
    problem = reopened(library, name).problem
    assert "line 4 is damaged, line 7 is damaged" in problem
    assert "12 more places are damaged" in problem
    assert len(problem) < 300


def test_changes_of_a_newer_version_are_left_out_and_told(library: Library) -> None:
    name, whole = kept(library)
    path = journal_of(library, name)
    each = lines_in(path)
    write(path, b"".join([*each, line_of(len(each) + 1, {"do": "tool", "id": 7})]))
    found = library.open_named(name)
    assert found.problem == (
        f"{name}: not understood: 1 change of a newer localmoe ('tool'): left out, the rest is kept"
    )
    assert state(found.conversation) == state(whole)
    found.close()


def sealed(number: int, content: object) -> bytes:
    body = b"%d %b" % (number, json.dumps(content).encode())
    return b"%08x %b\n" % (crc32(body), body)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", None),
        (b"hello", "is not a conversation"),
        (b"hello\n", "is not a conversation"),
        (bytes(5000), "is not a conversation"),
        (b'{"messages": []}\n', "is not a conversation"),
        (sealed(1, {"format": "another", "version": 1}), "is not a conversation"),
        (sealed(1, {"format": lines.FORMAT, "version": "1"}), "is not a conversation"),
        (sealed(1, {"format": lines.FORMAT, "version": 2}), "newer localmoe (file version 2; this one reads 1)"),
        (header_of("", "")[:-1], None),
        (header_of("", "")[:12], None),
    ],
)
def test_what_is_no_journal_is_refused_and_left_as_it_is(library: Library, data: bytes, said: str | None) -> None:
    path = journal_of(library, "some")
    write(path, data or b"0")
    if said is None:
        assert reopened(library, "some").conversation.messages == {}
        return
    with pytest.raises(ConversationError, match="some .*" + said.replace("(", r"\(").replace(")", r"\)")):
        library.open_named("some")
    assert path.read_bytes() == data


def test_deep_long_and_strange_lines_are_damaged_lines(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LINE_LIMIT", 6000)
    monkeypatch.setattr(recovery, "LINE_LIMIT", 6000)
    deep: object = 0
    for _ in range(DEPTH_LIMIT):
        deep = [deep]
    body = b'2 {"do":"facts","facts":' + b"[" * 300 + b"]" * 300 + b"}"
    bodies = [b"3 [1]", b"4 {\xff}", b"-5 {}", b"6 {}{}", b'7 {"n":' + b"9" * 5000 + b"}"]
    path = journal_of(library, "strange")
    write(
        path,
        header_of("", "")
        + b"%08x %b\n" % (crc32(body), body)
        + b"".join(b"%08x %b\n" % (crc32(b), b) for b in bodies)
        + sealed(8, {"do": "facts", "facts": deep})
        + sealed(9, {"do": "system", "text": "a" * 9000})
        + sealed(10, {"do": "system", "text": "\ud800 half"}),
    )
    found = reopened(library, "strange")
    assert found.problem == "strange: lines 2 to 9 are damaged: left out, the rest is kept"
    assert found.conversation.system == "\ufffd half"


def test_a_journal_beyond_the_limit_is_refused_unread(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _ = kept(library)
    monkeypatch.setattr(recovery, "FILE_LIMIT", 100)
    with pytest.raises(ConversationError, match="a conversation has no more than 100"):
        library.open_named(name)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other pipes and links")
def test_pipes_links_and_folders_are_refused_at_once(library: Library, tmp_path: Path) -> None:
    name, _ = kept(library)
    os.mkfifo(journal_of(library, "pipe"))
    journal_of(library, "folder").mkdir()
    journal_of(library, "link").symlink_to(journal_of(library, name))
    for strange in ("pipe", "folder", "link"):
        with pytest.raises(ConversationError, match=f"{strange} is a"):
            library.open_named(strange)
        (listed,) = (entry for entry in library.listing() if entry.name == strange)
        assert listed.problem.startswith(f"{strange} is a")
    assert library.latest() == name


# Disks that are full, broken or gone.


class Disk:
    """Takes `room` more bytes through os.write, a few at a time, and then says `code`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, code: int, piece: int = 1 << 30) -> None:
        self.room, self.code, self.piece = room, code, piece
        self.write = os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, handle: int, data: bytes) -> int:
        nbytes = min(len(data), self.room, self.piece)
        if not nbytes:
            raise OSError(self.code, os.strerror(self.code))
        self.room -= nbytes
        return self.write(handle, bytes(data[:nbytes]))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("room", [0, 1, 150, 300, 333, 480, 555, 700, 900])
def test_a_full_disk_is_told_once_and_the_chat_goes_on(
    library: Library, monkeypatch: pytest.MonkeyPatch, room: int, code: int
) -> None:
    disk = Disk(monkeypatch, room, code)
    saved = library.open_new()
    talk(saved.conversation)
    said = os.strerror(code)
    assert saved.news().endswith(f"{said[0].lower()}{said[1:]}: this conversation goes on in memory only")
    talk(saved.conversation)
    assert saved.news() == ""
    if saved.name:  # what a kill would leave now
        data = journal_of(library, saved.name).read_bytes()
        write(journal_of(library, "killed"), data)
        left = reopened(library, "killed")
        assert "damaged" not in left.problem
        for id, message in left.conversation.messages.items():
            assert saved.conversation.messages[id].content.startswith(message.content)
            assert saved.conversation.messages[id].tokens[: len(message.tokens)] == message.tokens
    disk.room = 1 << 30
    saved.conversation.add("space is back")
    assert saved.news() == f"{saved.name} is written again: all of this conversation is on disk"
    saved.close()
    again = reopened(library, saved.name)
    assert again.problem == ""
    assert state(again.conversation) == state(saved.conversation)


@pytest.mark.parametrize("piece", [1, 7, 100])
def test_short_writes_are_continued(library: Library, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    Disk(monkeypatch, 1 << 30, 0, piece)
    name, whole = kept(library)
    assert state(reopened(library, name).conversation) == state(whole)


def test_bytes_that_went_into_the_file_of_a_failed_write_are_not_put_there_twice(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = library.open_new()
    saved.conversation.add("hello")
    real = os.write

    def failing(handle: int, data: bytes) -> int:
        real(handle, bytes(data[:17]))
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", failing)
    saved.conversation.begin("m")
    monkeypatch.setattr(os, "write", real)
    saved.conversation.end("stop")
    assert saved.news().endswith("is written again: all of this conversation is on disk")
    saved.close()
    again = reopened(library, saved.name)
    assert (again.problem, state(again.conversation)) == ("", state(saved.conversation))


def test_what_is_held_is_written_at_the_end_if_it_can_be(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = library.open_new()
    saved.conversation.add("hello")
    saved.conversation.begin("m")
    disk = Disk(monkeypatch, 10, errno.ENOSPC)
    saved.conversation.grow("one", [1])
    saved.conversation.grow("two", [2])
    disk.room = 1 << 30
    saved.close()
    assert state(reopened(library, saved.name).conversation) == state(saved.conversation)


def test_a_disk_that_fails_to_sync_is_not_believed(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = library.open_new()
    saved.conversation.add("hello")
    before = saved.name

    def failing(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", failing)
        saved.conversation.add("lost?")
        assert "input/output error" in saved.news()
    saved.conversation.add("again")
    assert saved.news() == (
        f"{before} cannot be written (input/output error): all of this conversation is now in {before}-2"
    )
    saved.close()
    assert state(reopened(library, before + "-2").conversation) == state(saved.conversation)


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps open files")
@pytest.mark.parametrize("how", ["deleted", "folder", "replaced", "cut", "longer", "a file"])
def test_a_file_that_is_taken_away_or_changed_is_noticed_and_written_anew(
    library: Library, tmp_path: Path, how: str
) -> None:
    saved = library.open_new()
    talk(saved.conversation)
    before = saved.name
    path = journal_of(library, before)
    if how == "deleted":
        path.unlink()
    elif how == "folder":
        path.parent.rename(tmp_path / "elsewhere")
    elif how == "a file":
        path.parent.rename(tmp_path / "elsewhere")
        path.parent.write_text("")
    elif how == "replaced":
        data = path.read_bytes()
        path.unlink()
        write(path, data[:200])
    elif how == "cut":
        os.truncate(path, 200)
    else:
        with path.open("ab") as file:
            file.write(b"# mine\n")
    strange = path.read_bytes() if path.exists() else None
    saved.conversation.add("still here?")
    if how == "a file":
        assert saved.news() == f"{path.parent}: not a directory: this conversation goes on in memory only"
        path.parent.unlink()
        saved.conversation.add("and now?")
        saved.close()
        assert state(reopened(library, saved.name).conversation) == state(saved.conversation)
        return
    name = before if strange is None else before + "-2"
    assert (
        saved.news() == f"{before} was changed or deleted by another program: all of this conversation is now in {name}"
    )
    assert saved.name == name
    saved.close()
    again = reopened(library, name)
    assert (again.problem, state(again.conversation)) == ("", state(saved.conversation))
    if strange is not None and how in ("replaced",):
        assert path.read_bytes() == strange


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    saved = Library(tmp_path / "file" / "state" / "conversations").open_new()
    saved.conversation.add("hello")
    assert saved.news().endswith("not a directory: this conversation goes on in memory only")
    saved.conversation.begin("m")
    saved.close()
    assert saved.news() == ""


def test_without_a_home_it_goes_on_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("localmoe.conversation.library.state_folder", homeless)
    saved = Library().open_new()
    saved.conversation.add("hello")
    assert "there is no home folder to keep it in: this conversation goes on in memory only" in saved.news()


def test_a_message_too_long_for_a_line_is_told_and_nothing_behind_it_is_believed(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = library.open_new()
    saved.conversation.add("hello")
    monkeypatch.setattr("localmoe.conversation.journal.LINE_LIMIT", 1000)
    saved.conversation.add("a" * 1000)
    saved.conversation.begin("m")
    saved.conversation.end("stop")
    assert "file too large: this conversation goes on in memory only" in saved.news()
    saved.close()
    assert list(reopened(library, saved.name).conversation.messages)[:1] == [1]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a full disk is made by mounting one, as root")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.decode().strip()}")
    try:
        library = library_in(place)
        saved = library.open_new()
        saved.conversation.add("hello")
        saved.conversation.begin("m")
        (place / "ballast").write_bytes(bytes(40_000))
        for number in range(2000):
            saved.conversation.grow(f"word {number} ", [number])
        saved.conversation.end("stop")
        assert "no space left on device: this conversation goes on in memory only" in saved.news()
        (place / "ballast").unlink()
        saved.conversation.move(1)
        second = saved.news()
        saved.close()
        if "written again" not in second:  # 2000 pieces need more than 64k: a smaller copy does not
            assert "no space left" in saved.problem
        found = reopened(library, saved.name).conversation.messages[2]
        assert saved.conversation.messages[2].content.startswith(found.content)
        assert saved.conversation.messages[2].tokens[: len(found.tokens)] == found.tokens
        assert len(found.tokens) > 100
    finally:
        subprocess.run(["umount", place], check=True)


# Other processes.

KILLED = """
import os, sys
from pathlib import Path
from localmoe.conversation.library import Library
saved = Library(Path(sys.argv[1])).open_new()
saved.rename("killed")
talk = saved.conversation
turn = 0
while True:
    turn += 1
    talk.add(f"question {turn}")
    os.write(1, b"q")
    talk.begin("m")
    os.write(1, b"b")
    for piece in range(40):
        talk.grow(f"{turn}.{piece} ", [turn, piece])
        os.write(1, b"g")
    talk.end("stop")
    os.write(1, b"e")
    if turn % 5 == 0:
        talk.move(turn)
        os.write(1, b"m")
"""


def killed_at_random(folder: Path, seed: int) -> str:
    """A child that writes is killed; "" if its conversation is whole up to what it had told, else what is wrong."""
    choose = random.Random(seed)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
    ) as child:
        assert child.stdout is not None
        told = child.stdout.read(1)
        try:
            child.wait(choose.uniform(0, 0.05))
        except subprocess.TimeoutExpired:
            child.kill()
        told += child.stdout.read()
    found = reopened(Library(folder), "killed")
    expected, more = Conversation(), Conversation()
    replay(expected, told)
    replay(more, told + following(told))
    shown = state(found.conversation)
    return "" if shown in (state(expected), state(more)) else f"{found.problem} {len(told)} {shown}"


def following(told: bytes) -> bytes:
    """What the child would have told next."""
    whole = b"qb" + b"g" * 40 + b"e"
    turns = told.replace(b"m", b"")
    last = len(turns) // len(whole)
    if told.endswith(b"e") and last % 5 == 0:
        return b"m"
    return whole[len(turns) % len(whole) :][:1]


def replay(talk: Conversation, told: bytes) -> None:
    turn = piece = 0
    for what in told.decode():
        if what == "q":
            turn, piece = turn + 1, 0
            talk.add(f"question {turn}")
        elif what == "b":
            talk.begin("m")
        elif what == "g":
            talk.grow(f"{turn}.{piece} ", [turn, piece])
            piece += 1
        elif what == "e":
            talk.end("stop")
        else:
            talk.move(turn)


def kill_many(tmp_path: Path, rounds: int) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        wrong = pool.starmap(killed_at_random, [(tmp_path / str(i) / "a" / "b", i) for i in range(rounds)])
    assert [what for what in wrong if what] == []


def test_kill_loses_nothing_that_was_told(tmp_path: Path) -> None:
    kill_many(tmp_path, 24)


@pytest.mark.conformance
def test_two_hundred_kills_lose_nothing_that_was_told(tmp_path: Path) -> None:
    kill_many(tmp_path, 200)


def test_a_conversation_that_is_open_is_not_opened_again(library: Library) -> None:
    name, whole = kept(library)
    code = (
        "import sys\nfrom pathlib import Path\nfrom localmoe.conversation.library import Library\n"
        "saved = Library(Path(sys.argv[1])).open_named(sys.argv[2])\nprint('open', flush=True)\nsys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(library.folder()), name]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(ConversationError, match=f"{name} is open in another localmoe"):
            library.open_named(name)
        with pytest.raises(ConversationError, match=f"{name} is open in another localmoe"):
            library.delete(name)
        assert library.latest() == name
        other.kill()
    assert state(reopened(library, name).conversation) == state(whole)


def test_ctrl_c_in_the_middle_of_a_change_is_heard_behind_it(library: Library) -> None:
    code = """
import _thread, signal, sys, threading, time
from pathlib import Path
from localmoe.conversation.library import Library
saved = Library(Path(sys.argv[1])).open_new()
saved.rename("interrupted")
talk = saved.conversation
stop = threading.Event()
def press():
    while not stop.is_set():
        time.sleep(0.0007)
        signal.raise_signal(signal.SIGINT)
threading.Thread(target=press, daemon=True).start()
presses, turns = 0, 0
while presses < 300:
    try:
        while True:
            talk.add("question")
            talk.begin("m")
            for piece in range(20):
                talk.grow("word ", [piece])
            talk.end("stop")
    except KeyboardInterrupt:
        presses += 1
signal.signal(signal.SIGINT, signal.SIG_IGN)
stop.set()
saved.close()
from conversations import state
again = Library(Path(sys.argv[1])).open_named("interrupted")
assert (again.problem, state(again.conversation)) == ("", state(talk)), again.problem
assert all(len(m.tokens) * 5 == len(m.content) for m in talk.messages.values() if m.role == "assistant")
"""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(library.folder())], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


# What other systems do.


def test_a_journal_that_may_only_be_read_goes_on_in_another_file(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, whole = kept(library)
    path, real = journal_of(library, name), os.open
    before = path.read_bytes()

    def refusing(asked: Path, flags: int, *mode: int) -> int:
        if Path(asked) == path and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(asked, flags, *mode)

    with monkeypatch.context() as refused:
        refused.setattr(os, "open", refusing)
        saved = library.open_named(name)
    assert (saved.news(), state(saved.conversation)) == ("", state(whole))
    saved.conversation.add("on")
    assert saved.news() == (
        f"{name} cannot be written (permission denied): all of this conversation is now in {name}-2"
    )
    saved.close()
    assert path.read_bytes() == before
    assert state(reopened(library, f"{name}-2").conversation) == state(saved.conversation)


@pytest.mark.skipif(os.name == "nt", reason="flock is not for Windows")
def test_where_there_are_no_locks_nobody_is_kept_out(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    name, whole = kept(library)
    monkeypatch.setattr("fcntl.flock", none)
    one, two = library.open_named(name), library.open_named(name)
    assert state(one.conversation) == state(two.conversation) == state(whole)
    one.close()
    two.close()


@pytest.mark.skipif(os.name == "nt", reason="flock is not for Windows")
def test_a_closed_journal_opens_again_while_a_forked_process_still_has_its_handle(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    file = JournalFile.create(path)
    forked = os.dup(file._handle)  # shares its lock, as a child's copy does between fork and exec
    with pytest.raises(ConversationError, match="a is open in another localmoe"):
        JournalFile.open(path)
    file.close()
    JournalFile.open(path).close()
    os.close(forked)


@pytest.mark.skipif(os.name == "nt", reason="flock is not for Windows")
def test_a_new_file_that_someone_opened_first_is_left_to_them(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    real, calls = fcntl.flock, itertools.count()

    def busy(handle: int, how: int) -> None:
        if next(calls) == 0:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        real(handle, how)

    monkeypatch.setattr("fcntl.flock", busy)
    saved = library.open_new()
    saved.rename("mine")
    saved.conversation.add("hello")
    assert (saved.name, saved.news()) == ("mine-2", "mine is in use: this conversation is mine-2")
    saved.close()


@pytest.mark.skipif(os.name == "nt", reason="it has its own")
def test_windows_locks_a_far_byte_and_renames_closed_files(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, int, int]] = []

    def locking(handle: int, how: int, nbytes: int) -> None:
        taken.append((os.lseek(handle, 0, os.SEEK_CUR), how, nbytes))
        if len(taken) > 2:
            raise PermissionError(errno.EACCES, "Permission denied")

    msvcrt = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    monkeypatch.setattr("localmoe.conversation.storage.sys", types.SimpleNamespace(platform="win32"))
    saved = library.open_new()
    saved.conversation.add("hello")
    saved.rename("renamed")
    saved.conversation.add("and on")
    saved.close()
    assert taken == [(1 << 40, 2, 1)] * 2
    with pytest.raises(ConversationError, match="renamed is open in another localmoe"):
        library.open_named("renamed")
    taken.clear()
    assert state(reopened(library, "renamed").conversation) == state(saved.conversation)


@pytest.mark.parametrize("step", ["replace", "open"])
def test_a_renaming_that_fails_leaves_the_name(library: Library, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    saved = library.open_new()
    talk(saved.conversation)
    before = saved.name
    real = getattr(os, step)

    def failing(path: Path, *more: object) -> object:
        if step == "open" and Path(path) == journal_of(library, before):
            return real(path, *more)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, step, failing)
        with pytest.raises(ConversationError, match=f"{before} cannot be renamed: no space left on device"):
            saved.rename("other")
        assert saved.name == before
        assert library.names() == [before]
    saved.conversation.add("on")
    assert saved.news() == ""
    saved.close()
    assert state(reopened(library, saved.name).conversation) == state(saved.conversation)
