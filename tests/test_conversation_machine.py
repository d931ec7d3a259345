"""Random changes of several conversations, saved, renamed, closed, killed and opened again: never anything but what a
plain model of them says."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conversations import CHANGES, Change, change, journal_of, library_in, state
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from localmoe.conversation.saved import Saved
from localmoe.conversation.tree import Conversation
from localmoe.errors import ConversationError

NAMES = st.sampled_from(["a", "b", "c d", "e.f"])


class Shelf(RuleBasedStateMachine):
    """`known` is what each saved conversation is by its name, as the file must give it back."""

    open = Bundle("open")

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp())
        self.library = library_in(self.place)
        self.known: dict[str, dict[str, Any]] = {}
        self.held: list[Saved] = []

    def teardown(self) -> None:
        for saved in self.held:
            self.put_away(saved)
        for name in self.known:
            self.compare(name)
        shutil.rmtree(self.place)

    def compare(self, name: str) -> Saved:
        saved = self.library.open_named(name)
        assert saved.problem == ""
        assert state(saved.conversation) == self.known[name]
        return saved

    def put_away(self, saved: Saved) -> None:
        saved.close()
        if saved.keep and saved.conversation.messages:
            self.known[saved.name] = state(saved.conversation)

    @rule(target=open, keep=st.sampled_from([True, True, True, False]))
    def begin(self, keep: bool) -> Saved:
        self.held.append(self.library.open_new(keep=keep))
        return self.held[-1]

    @rule(saved=open, changes=st.lists(CHANGES, min_size=1, max_size=12))
    def talk(self, saved: Saved, changes: list[Change]) -> None:
        for what in changes:
            change(saved.conversation, what)
        assert saved.news() == "" or "is in use: this conversation is" in saved.problem

    @rule(saved=consumes(open))
    def close(self, saved: Saved) -> None:
        self.held.remove(saved)
        self.put_away(saved)

    @rule(saved=consumes(open))
    def kill(self, saved: Saved) -> None:
        """As a process that ends without a word, after the system had put a last piece of a line there."""
        self.held.remove(saved)
        if saved.keep and saved.conversation.messages:
            self.known[saved.name] = state(saved.conversation)
        journal = saved._journal.file
        if journal:
            journal.close()
        saved.conversation.record_to(None)

    @rule(saved=open, name=NAMES)
    def rename(self, saved: Saved, name: str) -> None:
        before = saved.name
        try:
            saved.rename(name)
        except ConversationError:
            others = {*self.known, *(other.name for other in self.held if other is not saved)}
            assert name in others
            assert saved.name == before
        else:
            assert saved.name == name or saved.name.startswith(name + "-")
            assert saved.keep
        assert self.library.folder().exists() or not any(s.keep and s.conversation.messages for s in self.held)

    @rule(target=open, data=st.data())
    def reopen(self, data: st.DataObject) -> Any:
        if not self.known:
            return multiple()
        name = data.draw(st.sampled_from(sorted(self.known)))
        self.held.append(self.compare(name))
        del self.known[name]
        return self.held[-1]

    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        if self.known:
            name = data.draw(st.sampled_from(sorted(self.known)))
            self.library.delete(name)
            del self.known[name]

    @rule(data=st.data(), cut=st.integers(1, 60))
    def spoil_the_end(self, data: st.DataObject, cut: int) -> None:
        """A line that was being written: it is told, and the rest is what was there before it."""
        if not self.known:
            return
        name = data.draw(st.sampled_from(sorted(self.known)))
        with journal_of(self.library, name).open("ab") as file:
            file.write(b"00000000 999 {" + b"x" * cut)
        saved = self.library.open_named(name)
        assert saved.problem.endswith("the last line was not written to its end: left out, the rest is kept")
        assert state(saved.conversation) == self.known[name]
        change(saved.conversation, ("add", "on"))
        saved.close()
        self.known[name] = state(saved.conversation)

    @invariant()
    def the_list_is_what_is_known(self) -> None:
        listed = {found.name: found for found in self.library.listing()}
        live = {saved.name: saved.conversation for saved in self.held if saved.keep and saved.conversation.messages}
        assert listed.keys() == self.known.keys() | live.keys()
        counts = {name: len(found["messages"]) for name, found in self.known.items()}
        counts.update({name: len(found.messages) for name, found in live.items()})
        assert {name: found.messages for name, found in listed.items()} == counts
        assert not any(found.problem for found in listed.values())


TestShelf = Shelf.TestCase
TestShelf.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


@pytest.mark.conformance
class TestLongShelf(Shelf.TestCase):  # type: ignore[misc, name-defined]
    """More than 10,000 changes."""

    settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


def test_a_conversation_of_many_changes_is_one_file(tmp_path: Path) -> None:
    library = library_in(tmp_path)
    saved = library.open_new()
    live = saved.conversation
    for turn in range(50):
        live.move(live.leaves()[turn % len(live.leaves())].id if turn % 7 == 0 and live.messages else live.head)
        live.add(f"question {turn}")
        live.begin("m")
        for piece in range(10):
            live.grow("x", [piece])
        live.end("stop")
    saved.close()
    assert len(os.listdir(library.folder())) == 1
    again: Conversation = library.open_named(saved.name).conversation
    assert state(again) == state(live)
