"""One answer as it grows: generated, cut at its end, carried on where the context fills up or reasoning outlasts its
budget; knows no messages and no files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Literal

from localmoe.engine import Engine, Progress, Stats, Step
from localmoe.prompting import ChatTokenizer, Markers, Prompt, marker_of, spelled
from localmoe.reasoning import Channels, Piece, ReasoningSplitter, overlap
from localmoe.sampling import SamplingSettings
from localmoe.thinking import closing_of

Finish = Literal["stop", "length", "context", "interrupted"]
SPARE = 16  # tokens of the context that are left when room is made: a letter may take several


@dataclass(frozen=True, slots=True)
class Said:
    """Some more of an answer: `text` with the ids that spell it, and the same text in `pieces` as far as it is certain
    which are reasoning. `finish` is set on the last one only."""

    text: str
    tokens: list[int]
    pieces: list[Piece]
    finish: Finish | None = None


class StopTexts:
    """Cuts a stream of text where one of `texts` begins, which may arrive split over tokens."""

    def __init__(self, texts: Collection[str]) -> None:
        self._texts = [text for text in texts if text]
        self.held = ""
        self.met = False

    def push(self, text: str, last: bool) -> str:
        """What is certainly text of the answer."""
        self.held += text
        ends = [at for stop in self._texts if (at := self.held.find(stop)) >= 0]
        if ends:
            self.met, kept = True, self.held[: min(ends)]
            self.held = ""
            return kept
        unsure = 0 if last else max((overlap(self.held, stop) for stop in self._texts), default=0)
        certain = self.held[: len(self.held) - unsure]
        self.held = self.held[len(certain) :]
        return certain


@dataclass
class Answering:
    """What it takes to answer a prompt. `stop` and `stop_texts` end an answer; `budget` is the most tokens of reasoning
    (0: any number); `more_room(answer)` gives other prompt tokens to go on from when the context is full, or None."""

    engine: Engine
    tokenizer: ChatTokenizer
    settings: SamplingSettings
    markers: Markers | None = None
    stop: Collection[int] | None = None
    stop_texts: Collection[str] = ()
    budget: int = 0
    more_room: Callable[[Sequence[int]], list[int] | None] = lambda answer: None
    _answer: list[int] = field(default_factory=list)
    _held: list[int] = field(default_factory=list)  # ids at the end of it whose text is not certain yet

    def __post_init__(self) -> None:
        if closing_of(self.markers) is None:
            self.budget = 0
        self._channels = Channels() if self.markers and self.markers[0] == Channels.OPENING else None

    def run(self, prompt: Prompt, progress: Progress | None = None) -> Iterator[Said]:
        """The answer as it grows; its last part has a `finish`. `progress(done, total)` counts prompt tokens that are
        read before it, and anew in the midst of it where it goes on from others."""
        opened = self.markers is not None and prompt.text.rstrip().endswith(self.markers[0])
        splitter, texts = ReasoningSplitter(self.markers, opened), StopTexts(self.stop_texts)
        tokens, reasoned, roomless = prompt.tokens, 0, False
        before, reading = Stats(), progress
        while True:
            again: list[int] | None = None
            with closing(self._generate([*tokens, *self._answer], before, reading)) as steps:
                for step in steps:
                    inside = splitter.reasoning
                    said = self._said(step, splitter, texts)
                    yield said
                    if said.finish:
                        return
                    reasoned += inside
                    if self._held:  # nothing is cut inside a letter
                        continue
                    if splitter.reasoning and 0 < self.budget <= reasoned:
                        yield self._closed(splitter)
                        again, reading = tokens, None
                    elif not roomless and len(tokens) + len(self._answer) >= self.engine.model.context - SPARE:
                        again, reading = self.more_room(self._answer), progress
                        roomless = again is None
                    if again is not None:
                        break
            assert again is not None, "an answer without an end"
            tokens, before = again, self.engine.stats

    def _generate(self, tokens: list[int], before: Stats, progress: Progress | None) -> Generator[Step]:
        """Steps of one stretch; the engine's figures go on from those of the stretch before."""
        settings = self.settings
        if settings.max_tokens:
            settings = replace(settings, max_tokens=max(settings.max_tokens - before.generated_tokens, 1))
        steps = self.engine.generate(tokens, settings, self.stop, progress)
        try:
            yield from steps
        finally:
            if before.generated_tokens:
                self.engine.stats = before.followed_by(self.engine.stats)

    def _said(self, step: Step, splitter: ReasoningSplitter, texts: StopTexts) -> Said:
        if self._channels:
            return self._said_in(self._channels, step)
        if step.finish != "stop":
            self._answer.append(step.token)
            self._held.append(step.token)
        text = step.text or marker_of(self.tokenizer, step.token, self.markers)
        certain = texts.push(text, last=step.finish is not None)
        finish: Finish | None = "stop" if texts.met else step.finish
        tokens: list[int] = []
        if certain and not texts.held and not texts.met:
            tokens, self._held = self._held, []
        pieces = [*splitter.push(certain), *(splitter.finish() if finish else ())]
        return Said(certain, tokens, pieces, finish)

    def _said_in(self, channels: Channels, step: Step) -> Said:
        """Of what is said in channels only the answer is kept: templates put earlier ones back without the others."""
        control = self.tokenizer.token(step.token) if self.tokenizer.is_special(step.token) else ""
        pieces = list(channels.push(step.text, control))
        self._answer += [] if step.finish == "stop" else [step.token]
        self._held = [] if control or channels.reasoning or step.finish == "stop" else [*self._held, step.token]
        text = "".join(piece.text for piece in pieces if piece.kind == "answer")
        tokens: list[int] = []
        if text:
            tokens, self._held = self._held, []
        return Said(text, tokens, pieces, step.finish)

    def _closed(self, splitter: ReasoningSplitter) -> Said:
        """The end of the reasoning, in the model's mouth."""
        tokens = self.tokenizer.encode(closing_of(self.markers) or "", special=True, bos=False)
        self._answer += tokens
        text = spelled(self.tokenizer, tokens, self.markers)
        return Said(text, tokens, list(splitter.push(text)))
