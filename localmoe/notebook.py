"""The Python face: a model with what a notebook wants of it; everything it does is done by model, engine and
session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from localmoe.engine import Engine, Step
from localmoe.kernels.program import Floats
from localmoe.model import Model
from localmoe.sampling import SamplingSettings
from localmoe.session import Session


class Chat:
    """A conversation. `session` has everything else: settings, messages, regenerate."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def send(self, text: str) -> Iterator[str]:
        """Say something; the answer's text arrives piece by piece, reasoning left out."""
        return (piece.text for piece in self.session.send(text) if piece.kind == "answer")


class LoadedModel(Model):
    """What `localmoe.load` returns: a `Model` that can also generate and chat. It has one KV cache, so use one thing
    at a time."""

    def logits(self, ids: Sequence[int]) -> Floats:
        """Teacher-forced logits (T, V), float32, of a text that starts at position 0."""
        return self.forward(ids, 0, all_logits=True)

    def generate(self, ids: Sequence[int], settings: SamplingSettings | None = None) -> Iterator[Step]:
        """Continue token ids; steps have `.token`, `.text` and `.finish` (None but for the last)."""
        return Engine(self).generate(ids, settings or SamplingSettings().changed(**self.recommended))

    def chat(self, system: str | None = None) -> Chat:
        """A new conversation. Raises TemplateError where the model has no chat template, naming the choices."""
        return Chat(Session(self, system=system))
