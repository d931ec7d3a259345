"""One conversation: messages, template and settings become a token prefix; must not know terminals or arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Literal, Protocol

from localmoe.engine import CausalModel, Engine, Progress, Step, TextDecoder
from localmoe.errors import SettingError, TemplateError
from localmoe.sampling import SamplingSettings
from localmoe.template import NAMED, Template, choices, reasoning_markers

Message = dict[str, str]
Kind = Literal["answer", "reasoning"]
Finish = Literal["stop", "length", "context", "interrupted"]


class ChatTemplate(Protocol):
    """What a session asks of a chat template."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str: ...


class ChatTokenizer(TextDecoder, Protocol):
    """What a session asks of a tokenizer."""

    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    def token(self, id: int) -> str: ...
    def encode(self, text: str, *, special: bool = True, bos: bool | None = None) -> list[int]: ...
    def encode_prompt(self, rendered: str) -> list[int]: ...


class ChatModel(CausalModel, Protocol):
    """What a session asks of a model. `reasoning`: the markers around a reasoning block, if the template has them."""

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


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an answer, or of the reasoning before it, in the order in which it was generated."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class Spoken:
    """A rendered prompt with the answer that followed, and the token ids that the model really saw and chose."""

    text: str
    tokens: list[int]


class ReasoningSplitter:
    """Cuts a stream of text into pieces at the reasoning markers, which may arrive split over tokens.

    Reasoning opens only as the first thing of an answer and closes once: a later mention of a marker is text.
    """

    def __init__(self, markers: tuple[str, str] | None, opened: bool = False) -> None:
        self._open, self._close = markers or ("", "")
        self._state: Literal["start", "reasoning", "answer"] = (
            "answer" if markers is None else "reasoning" if opened else "start"
        )
        self._held = ""

    def push(self, text: str) -> Iterator[Piece]:
        """The pieces that are certain by now; a possible beginning of a marker is held back."""
        self._held += text
        if self._state == "start":
            begun = self._held.lstrip()
            if begun.startswith(self._open):
                self._state, self._held = "reasoning", begun[len(self._open) :]
            elif not self._open.startswith(begun):
                self._state = "answer"
        if self._state == "reasoning":
            before, marker, after = self._held.partition(self._close)
            if marker:
                self._state, self._held = "answer", after
            else:
                kept = _overlap(before, self._close)
                self._held = before[len(before) - kept :]
                before = before[: len(before) - kept]
            if before:
                yield Piece("reasoning", before)
        if self._state == "answer":
            yield from self.finish()

    def finish(self) -> Iterator[Piece]:
        """What was held back, when nothing more will come."""
        text, self._held = self._held, ""
        if text:
            yield Piece("reasoning" if self._state == "reasoning" else "answer", text)


class Session:
    """A conversation with one model; several may take turns on one."""

    def __init__(
        self,
        model: ChatModel,
        template: ChatTemplate | None = None,
        settings: SamplingSettings | None = None,
        system: str | None = None,
    ) -> None:
        """`template` defaults to the model's own, `settings` to what it recommends; TemplateError without any."""
        if template is None and not model.has_template:
            raise TemplateError(
                f"{model.name} has no chat template: name one with --template ({', '.join(choices())}), or a file"
            )
        self.model = model
        self._given = template
        self._preparing = Lock()
        self.reasoning = reasoning_markers(template.source) if template else model.reasoning
        self.settings = settings or SamplingSettings().changed(**model.recommended)
        self.system = system
        self.messages: list[Message] = []
        self.engine = Engine(model)
        self.finish: Finish | None = None
        self._spoken: Spoken | None = None

    @cached_property
    def template(self) -> ChatTemplate:
        """As given, else the model's own, compiled when first asked for. Raises TemplateError."""
        own = self._given or self.model.template
        assert own is not None, "a session without a template"
        return own

    def prepare(self) -> None:
        """Have the tokenizer and the template ready, which the first answer would wait for; from any thread. Raises
        TokenizerError, TemplateError."""
        with self._preparing:
            _ = self.model.tokenizer, self.template

    def send(self, text: str, progress: Progress | None = None) -> Iterator[Piece]:
        """The answer to `text` in pieces. Ended early, the answer so far is kept; without any, `text` is taken back."""
        self.messages.append({"role": "user", "content": text})
        try:
            yield from self._answer(progress)
        finally:
            if self.messages[-1]["role"] == "user":
                self.messages.pop()

    def regenerate(self, progress: Progress | None = None) -> Iterator[Piece]:
        """Another answer to the last message; the old one stays if the new never begins. SettingError without any."""
        if not self.messages:
            raise SettingError("there is no answer yet to generate again")
        old = self.messages.pop()
        try:
            yield from self._answer(progress)
        finally:
            if self.messages[-1]["role"] == "user":
                self.messages.append(old)

    def clear(self) -> None:
        """Forget the messages; the system prompt and the settings stay."""
        self.messages.clear()

    def take(self, model: ChatModel) -> None:
        """Go on with another model: the messages stay, and are read by it before its first answer."""
        old, new = self.model.tokenizer, model.tokenizer
        if self._spoken and any(old.token(id) != new.token(id) for id in set(self._spoken.tokens)):
            self._spoken = None
        self.model, self.engine = model, Engine(model)
        if self._given is None:
            self.reasoning = model.reasoning
            self.__dict__.pop("template", None)

    def set_system(self, text: str | None) -> None:
        """Replace the system prompt from the next answer on; None or empty text removes it."""
        self.system = text or None

    def set(self, key: str, value: object) -> None:
        """Change one sampling setting; SettingError names the key, the value and the range."""
        self.settings = self.settings.changed(**{key: value})

    @property
    def used_tokens(self) -> int:
        """Tokens of the conversation that stand in the KV cache."""
        return len(self.model.cached)

    def prompt(self) -> Spoken:
        """The conversation as the template renders it and as token ids, ready for an answer.

        Ids that the model generated are kept where the text agrees: tokenising an answer anew may cut it elsewhere, and
        would lose the cached prefix.
        """
        self.prepare()
        system = [{"role": "system", "content": self.system}] if self.system else []
        rendered = self.template.render([*system, *self.messages], add_generation_prompt=True)
        spoken, tokenizer = self._spoken, self.model.tokenizer
        if spoken and rendered.startswith(spoken.text):
            rest = tokenizer.encode(rendered[len(spoken.text) :], special=True, bos=False)
            # Text after a special token is tokenised by itself; anywhere else the seam could change the ids.
            if rest and tokenizer.is_special(rest[0]):
                return Spoken(rendered, spoken.tokens + rest)
        return Spoken(rendered, tokenizer.encode_prompt(rendered))

    def _answer(self, progress: Progress | None) -> Iterator[Piece]:
        self.finish = "interrupted"
        prompt = self.prompt()
        markers = self.reasoning
        opened = markers is not None and prompt.text.rstrip().endswith(markers[0])
        splitter = ReasoningSplitter(markers, opened)
        texts: list[str] = []
        tokens: list[int] = []
        complete = 0  # tokens whose text came out whole
        try:
            for step in self.engine.generate(prompt.tokens, self.settings, progress=progress):
                text = self._with_marker(step, markers)
                texts.append(text)
                if step.finish != "stop":
                    tokens.append(step.token)
                complete = len(tokens) if text else complete
                yield from splitter.push(text)
                self.finish = step.finish or self.finish
            yield from splitter.finish()
        finally:
            answer = "".join(texts)
            if answer or self.finish == "stop":
                self.messages.append({"role": "assistant", "content": answer})
                self._spoken = Spoken(prompt.text + answer, prompt.tokens + tokens[:complete])

    def _with_marker(self, step: Step, markers: tuple[str, str] | None) -> str:
        """The text of a step; a marker that is a control token of its own has none, and is put back here."""
        if markers and not step.text and self.model.tokenizer.is_special(step.token):
            for marker in markers:
                if self.model.tokenizer.encode(marker, special=True, bos=False) == [step.token]:
                    return marker
        return step.text


def open_template(model: ChatModel, name: str) -> Template:
    """A template by its name, or from a file, with the model's BOS and EOS; TemplateError when it is neither."""
    path = Path(name)
    if name in NAMED:
        source = NAMED[name]
    elif path.is_file():
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"{name}: cannot be read as a template: {error}") from None
    else:
        raise TemplateError(f"{name!r} is neither a template ({', '.join(choices())}) nor a file")
    tokenizer = model.tokenizer
    bos, eos = ("" if id is None else tokenizer.token(id) for id in (tokenizer.bos, tokenizer.eos))
    return Template(source, name=name, bos=bos, eos=eos)


def _overlap(text: str, marker: str) -> int:
    """The longest end of `text` that begins `marker`."""
    return next((n for n in range(min(len(text), len(marker)), 0, -1) if text.endswith(marker[:n])), 0)
