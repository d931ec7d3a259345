"""What ends an answer under a template: tokens where the vocabulary has them, else text; knows no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from localmoe.errors import LocalMoeError
from localmoe.template_fit import Encoder, single_token
from localmoe.turns import Renders, Turns, turns_of


class StoppingEncoder(Encoder, Protocol):
    """A tokenizer that knows some ends by itself."""

    @property
    def stop(self) -> frozenset[int]: ...


@dataclass(frozen=True, slots=True)
class Endings:
    """`tokens`: each ends an answer, those that the file names among them. `texts`: each ends it too, as soon as the
    answer holds it; empty where a token does."""

    tokens: frozenset[int]
    texts: tuple[str, ...] = ()


def endings(tokenizer: StoppingEncoder, template: Renders) -> Endings:
    """What the template writes behind an answer is what a model trained with it says when it has done.

    A vocabulary without that token is a model that was trained otherwise: the text is then watched for, and the head of
    the next question, which a model that missed the end goes on with. A template that cannot render a plain
    conversation adds nothing.
    """
    try:
        return _endings(tokenizer, turns_of(template))
    except LocalMoeError:
        return Endings(tokenizer.stop)


def _endings(tokenizer: StoppingEncoder, found: Turns) -> Endings:
    if found.marker:
        id = single_token(tokenizer, found.marker)
        if id is not None:
            return Endings(tokenizer.stop if _means_more(tokenizer, id, found.marker) else tokenizer.stop | {id})
        return Endings(tokenizer.stop, tuple(filter(None, (found.marker, found.head))))
    text = found.behind.rstrip()
    return Endings(tokenizer.stop, (text,) if text.strip() else ())


def stop_tokens(tokenizer: StoppingEncoder, template: Renders) -> frozenset[int]:
    """The tokens of `endings`."""
    return endings(tokenizer, template).tokens


def stop_texts(tokenizer: StoppingEncoder, template: Renders) -> tuple[str, ...]:
    """The texts of `endings`."""
    return endings(tokenizer, template).texts


def _means_more(tokenizer: StoppingEncoder, id: int, marker: str) -> bool:
    """Whether the tokenizer knows that token as an end and yet does not stop at it: <|end|> of gpt-oss ends a message,
    after which the model itself goes on with the next."""
    from localmoe.tokenizer import END_OF_TURN  # late: a start need not wait for it

    return tokenizer.is_special(id) and marker in END_OF_TURN and id not in tokenizer.stop
