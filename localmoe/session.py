"""One conversation with a model: messages, template and settings become prompts, answers become messages; must not know
terminals, files or arrays."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from threading import Lock
from typing import Literal, Protocol, get_args

from localmoe.answering import SPARE, Answering, Finish
from localmoe.conversation.tree import Conversation, Message
from localmoe.endings import Endings, endings
from localmoe.engine import CausalModel, Engine, KeptState, Progress, common_prefix
from localmoe.errors import ContextError, SettingError
from localmoe.prompting import ChatTemplate, ChatTokenizer, Prompt, Turn, prompt_of, spelled
from localmoe.reasoning import Piece, ReasoningSplitter
from localmoe.sampling import SamplingSettings
from localmoe.template import reasoning_markers, without_template
from localmoe.thinking import Thinking

Overflow = Literal["stop", "drop", "shift"]
OVERFLOWS: tuple[Overflow, ...] = get_args(Overflow)
ROOM = 0.75  # of the context is filled again at most, when old turns had to go: each time costs reading, or accuracy


SUMMARY_REQUEST = (
    "Summarise our conversation so far, so that it can go on from your summary alone: facts, names, numbers, decisions "
    "and open questions. Write the summary and nothing else."
)


class ChatModel(CausalModel, Protocol):
    """What a session asks of a model. `reasoning`: the markers around a reasoning block, if the template has them;
    `shift` takes tokens out of the cache and moves the later ones down; `shift_obstacle` is why it cannot, mostly "".
    """

    @property
    def name(self) -> str: ...
    @property
    def tokenizer(self) -> ChatTokenizer: ...
    @property
    def has_template(self) -> bool: ...
    @property
    def template(self) -> ChatTemplate | None: ...
    @property
    def reasoning(self) -> tuple[str, str] | None: ...
    @property
    def recommended(self) -> Mapping[str, float | int]: ...
    @property
    def shift_obstacle(self) -> str: ...
    def shift(self, start: int, stop: int) -> None: ...


class Session:
    """A conversation with one model; several may take turns on one."""

    def __init__(
        self,
        model: ChatModel,
        template: ChatTemplate | None = None,
        settings: Mapping[str, float | int] | None = None,
        system: str | None = None,
        *,
        conversation: Conversation | None = None,
        kept: KeptState | None = None,
    ) -> None:
        """`template` defaults to the model's own, what `settings` do not name to what it recommends; `conversation`
        goes on where it stands; `kept` is the model's state of earlier prompts. TemplateError without any template."""
        if template is None and not model.has_template:
            raise without_template(model.name)
        self.model = model
        self._given = template
        self._preparing = Lock()
        self.reasoning = reasoning_markers(template.source) if template else model.reasoning
        self.chosen = dict(settings or {})
        self.settings = SamplingSettings().changed(**model.recommended).changed(**self.chosen)
        self.thinking = Thinking()
        self.overflow: Overflow = "stop"
        self.conversation = conversation or Conversation()
        if system is not None:
            self.conversation.set_system(system)
        self.engine = Engine(model, kept)
        self.finish: Finish | None = None
        self._spelling: dict[int, tuple[int, bool]] = {}  # message -> its tokens, and whether they spell it

    def with_model(
        self, model: ChatModel, template: ChatTemplate | None = None, kept: KeptState | None = None
    ) -> Session:
        """The same conversation with another model, which reads it before its first answer. Raises TemplateError."""
        other = Session(model, template, self.chosen, conversation=self.conversation, kept=kept)
        other.thinking, other.overflow = self.thinking, self.overflow
        return other

    @cached_property
    def template(self) -> ChatTemplate:
        """As given, else the model's own, compiled when first asked for. Raises TemplateError."""
        own = self._given or self.model.template
        assert own is not None, "a session without a template"
        return own

    @cached_property
    def endings(self) -> Endings:
        """What ends an answer under this template."""
        return endings(self.model.tokenizer, self.template)

    @property
    def given_template(self) -> str | None:
        """The name of the template that was asked for; None for the model's own."""
        return self._given.name if self._given else None

    def prepare(self) -> None:
        """Have the tokenizer and the template ready, which the first answer would wait for; from any thread. Raises
        TokenizerError, TemplateError."""
        with self._preparing:
            _ = self.model.tokenizer, self.template, self.endings

    @property
    def system(self) -> str | None:
        return self.conversation.system or None

    @property
    def messages(self) -> list[dict[str, str]]:
        """What was said, as far as the model sees it."""
        return [{"role": m.role, "content": m.content} for m in self.conversation.seen()]

    def send(self, text: str, progress: Progress | None = None) -> Iterator[Piece]:
        """The answer to `text` in pieces. Ended early, the answer so far is kept; without any, `text` is taken back."""
        before = self.conversation.head
        self.conversation.add(text)
        yield from self._answer_or_return(before, progress)

    def regenerate(self, progress: Progress | None = None) -> Iterator[Piece]:
        """Another answer to the last message; the old one stays if the new never begins. SettingError without any."""
        before = self.conversation.head
        if not before:
            raise SettingError("there is no answer yet to generate again")
        last = self.conversation.messages[before]
        self.conversation.move(last.parent if last.role == "assistant" else before)
        yield from self._answer_or_return(before, progress)

    def edit(self, message: Message, text: str, progress: Progress | None = None) -> Iterator[Piece]:
        """The answer to another text in the place of a user's message, on a branch of its own."""
        assert message.role == "user"
        before = self.conversation.head
        self.conversation.move(message.parent)
        self.conversation.add(text)
        yield from self._answer_or_return(before, progress)

    def _answer_or_return(self, before: int, progress: Progress | None) -> Iterator[Piece]:
        try:
            yield from self._answer(progress)
        finally:
            head = self.conversation.head
            if self.conversation.messages[head].role == "user":
                self.conversation.move(before)

    def start(self, conversation: Conversation) -> list[str]:
        """Go on with another conversation, as it was led; an empty one takes over the system prompt. What of its
        settings is not possible is told, a line each."""
        if not conversation.messages:
            conversation.set_system(self.conversation.system)
        self.conversation = conversation
        self._spelling.clear()
        return self.recall()

    def remember(self) -> None:
        """Keep with the conversation what it needs to go on alike elsewhere."""
        thinking = {"mode": self.thinking.mode, "budget": self.thinking.budget}
        self.conversation.note(
            settings=self.chosen or None,
            template=self.given_template,
            thinking=thinking if self.thinking != Thinking() else None,
            overflow=self.overflow if self.overflow != "stop" else None,
        )

    def recall(self, *, but: Collection[str] = ()) -> list[str]:
        """Take up what the conversation was led with, `but` not these settings; what is not possible (any more) is
        told, a line each."""
        facts = self.conversation.facts
        changes: list[Callable[[], None]] = []
        settings, thinking, overflow = facts.get("settings"), facts.get("thinking"), facts.get("overflow")
        for key, value in settings.items() if isinstance(settings, dict) else ():
            if key not in but:
                changes.append(partial(self._set, key, value))
        if isinstance(thinking, dict):
            words = [thinking.get("mode"), f"budget {thinking['budget']}" if thinking.get("budget") else ""]
            changes += [partial(self._think, word) for word in map(str, filter(None, words))]
        if overflow is not None:
            changes.append(partial(self._set_overflow, str(overflow)))
        trouble: list[str] = []
        for change in changes:
            try:
                change()
            except SettingError as error:
                trouble.append(str(error))
        return trouble

    def set_system(self, text: str | None) -> None:
        """Replace the system prompt from the next answer on; None or empty text removes it."""
        self.conversation.set_system(text or "")

    def set(self, key: str, value: object) -> None:
        """Change one sampling setting; SettingError names the key, the value and the range."""
        self._set(key, value)
        self.remember()

    def _set(self, key: str, value: object) -> None:
        self.settings = self.settings.changed(**{key: value})
        self.chosen = {**self.chosen, key: getattr(self.settings, key)}

    def think(self, words: str) -> None:
        """As `/think words`; SettingError where the template has no such switch."""
        self._think(words)
        self.remember()

    def _think(self, words: str) -> None:
        self.thinking = self.thinking.changed(words, self.template.source, self.reasoning)

    def set_overflow(self, name: str) -> None:
        """What happens when the context is full; SettingError names the choices."""
        self._set_overflow(name)
        self.remember()

    def _set_overflow(self, name: str) -> None:
        wanted = next((policy for policy in OVERFLOWS if policy == name), None)
        if wanted is None:
            raise SettingError(f"a full context can {', '.join(OVERFLOWS)}, not {name[:40]!r}")
        if wanted == "shift" and self.model.shift_obstacle:
            raise SettingError(f"{self.model.name} cannot shift: {self.model.shift_obstacle}; drop is possible")
        self.overflow = wanted

    def read(self, progress: Progress | None = None) -> None:
        """Have the model read the conversation, as it would before the next answer."""
        if tokens := self.tokens():
            self.engine.read(tokens, progress)

    @property
    def used_tokens(self) -> int:
        """Tokens of the conversation that stand in the KV cache."""
        return len(self.model.cached)

    def tokens(self) -> list[int]:
        """The conversation as token ids, ready for an answer; none before anything was said, which some templates
        cannot render. Raises TemplateError, TokenizerError."""
        return self.prompt().tokens if self.conversation.seen() else []

    def prompt(self) -> Prompt:
        """The conversation as the template renders it and as token ids, ready for an answer."""
        return self._prompt_behind(self.conversation.seen())

    def branches(self) -> Iterator[list[int]]:
        """Each branch of the conversation as token ids. Raises TemplateError, TokenizerError."""
        for leaf in self.conversation.leaves():
            yield self._prompt_behind(self.conversation.path(leaf.id)).tokens

    def _prompt_behind(self, seen: list[Message]) -> Prompt:
        self.prepare()
        told = self.conversation.system, _summarised(self.conversation.summary_seen)
        system = "\n\n".join(filter(None, told))
        turns = [Turn("system", system)] if system else []
        turns += [Turn(m.role, m.content, m.tokens if self._spells(m) else ()) for m in seen]
        variables = self.thinking.variables(self.template.source)
        return prompt_of(turns, self.template, self.model.tokenizer, **variables)

    def _spells(self, message: Message) -> bool:
        """Whether the ids of an answer are its text in this model's vocabulary."""
        if not message.tokens:
            return False
        known = self._spelling.get(message.id)
        if known is None or known[0] != len(message.tokens):
            found = spelled(self.model.tokenizer, message.tokens, self.reasoning) == message.content
            known = self._spelling[message.id] = len(message.tokens), found
        return known[1]

    def _answering(self, progress: Progress | None = None) -> Answering:
        return Answering(
            self.engine,
            self.model.tokenizer,
            self.settings,
            self.reasoning,
            self.endings.tokens,
            self.endings.texts,
            budget=self.thinking.budget,
            more_room=partial(self._room_behind, progress),
        )

    def _answer(self, progress: Progress | None) -> Iterator[Piece]:
        self.finish = "interrupted"
        prompt = self._with_room(self.conversation.seen())
        conversation, begun = self.conversation, False
        try:
            for said in self._answering(progress).run(prompt, progress):
                if not begun and (said.text or said.finish == "stop"):
                    conversation.begin(self.model.name)
                    begun = True
                if said.text:
                    conversation.grow(said.text, said.tokens)
                self.finish = said.finish or self.finish
                yield from said.pieces
        finally:
            if begun:
                conversation.end(self.finish)

    def summarise(self, progress: Progress | None = None) -> Iterator[Piece]:
        """A summary of all that is seen before the last question; complete, it stands in the place of that. Raises
        SettingError where there is nothing before it."""
        self.finish = "interrupted"
        seen = self.conversation.seen()
        starts = [i for i, message in enumerate(seen) if message.role == "user"]
        if len(starts) < 2:
            raise SettingError("there is nothing before the last question to sum up")
        request = Message(0, 0, "user", [SUMMARY_REQUEST])
        answering = replace(self._answering(), more_room=lambda answer: None)
        texts: list[str] = []
        for said in answering.run(self._prompt_behind([*seen[: starts[-1]], request]), progress):
            texts += [piece.text for piece in said.pieces if piece.kind == "answer"]
            self.finish = said.finish or self.finish
            yield from said.pieces
        if self.finish == "stop" and (text := "".join(texts).strip()):
            self.conversation.trim(seen[starts[-1]].id, text)

    def splitter_for(self, message: Message) -> ReasoningSplitter:
        """What tells an answer's reasoning from the rest; reasoning that a template opened has only an end."""
        opening, closing = self.reasoning or ("", "")
        opened = closing in message.content and opening not in message.content
        return ReasoningSplitter(self.reasoning, opened)

    def _with_room(self, seen: list[Message], more: int = 0) -> Prompt:
        """The prompt, with `more` tokens behind it; the oldest turns are left out where it would not fit and the policy
        is not to stop."""
        prompt, context = self._prompt_behind(seen), self.model.context
        if len(prompt.tokens) + more < context or self.overflow == "stop":
            return prompt
        starts = [i for i, message in enumerate(seen) if message.role == "user" and i]

        def fits(start: int) -> bool:
            return len(self._prompt_behind(seen[start:]).tokens) + more <= ROOM * context

        start = starts[min(bisect_left(starts, True, key=fits), len(starts) - 1)] if starts else 0
        fewer = self._prompt_behind(seen[start:])
        if len(fewer.tokens) + more >= context:
            raise ContextError(
                f"without anything older the last message still makes {len(fewer.tokens)} tokens, and the context "
                f"holds {context}: shorten it, or open the model with a larger --context"
            )
        self.conversation.trim(seen[start].id, self.conversation.summary_seen)
        if self.overflow == "shift":
            self._shift(prompt.tokens, fewer.tokens)
        return fewer

    def _room_behind(self, progress: Progress | None, answer: Sequence[int]) -> list[int] | None:
        """Prompt tokens for the rest of an answer that has filled the context; None where it has to end."""
        if self.overflow == "stop":
            return None
        if progress:
            progress(0, 0)  # a shift may take seconds, and how much is to be read is known after it
        seen = self.conversation.seen()
        if seen and seen[-1].role == "assistant":
            seen = seen[:-1]
        try:
            return self._with_room(seen, len(answer) + SPARE).tokens
        except ContextError:
            return None

    def _shift(self, old: list[int], new: list[int]) -> None:
        """Moves what stands in the cache behind the turns that went, so that it need not be read again."""
        kept, gone, cached = common_prefix(old, new), len(old) - len(new), self.model.cached
        same = old[kept + gone :] == new[kept:] and common_prefix(old, cached) == min(len(old), len(cached))
        if gone > 0 and same and len(cached) > kept + gone and not self.model.shift_obstacle:
            self.model.shift(kept, kept + gone)


def _summarised(summary: str) -> str:
    return f"Summary of the conversation so far:\n{summary}" if summary else ""
