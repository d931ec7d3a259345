"""What Tab offers behind a slash: commands, the words they take, files; knows no command and no chat."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document


class SlashCompleter(Completer):
    """`names` are the commands with their help. `words(name, typed)` gives what may follow a name where `typed` stands
    already, each from the first word on: "temperature 0.7" completes "temperature " to it. `takes_paths(name)`: files
    may follow, too."""

    def __init__(
        self,
        names: Callable[[], Mapping[str, str]],
        words: Callable[[str, str], Iterable[str]],
        takes_paths: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self._names, self._words, self._takes_paths = names, words, takes_paths
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        typed = document.text_before_cursor
        if not typed.startswith("/") or "\n" in typed:
            return
        names, (name, space, argument) = self._names(), typed[1:].partition(" ")
        if not space:
            for known, help in names.items():
                if known.startswith(name):
                    yield Completion(known, start_position=-len(name), display_meta=help)
        elif name in names:
            yield from self._following(name, argument.lstrip())
            if self._takes_paths(name):
                yield from self._paths(argument.lstrip(), complete_event)

    def _following(self, name: str, typed: str) -> Iterator[Completion]:
        """One word at a time: of what begins like `typed`, the part from its last word on."""
        before = typed.rpartition(" ")[0]
        begin = len(before) + bool(before)
        offered = dict.fromkeys(word[begin:] for word in self._words(name, typed) if word.startswith(typed))
        for word in offered:
            if word != typed[begin:]:
                yield Completion(word, start_position=begin - len(typed))

    def _paths(self, typed: str, event: CompleteEvent) -> Iterator[Completion]:
        """Files whose path begins with all that is typed, spaces too, or else with its last word."""
        whole = list(self._files.get_completions(Document(typed), event))
        yield from whole or self._files.get_completions(Document(typed.rpartition(" ")[2]), event)
