"""Which named template a vocabulary was made for, by the tokens that it has, and templates by name or from a file;
knows no model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from localmoe.errors import FileFormatError, TemplateError
from localmoe.loader.source import read_small_file
from localmoe.named_templates import ALIASES
from localmoe.template import Template, choices, named_source

FILE_LIMIT = 1 << 20  # bytes; the longest of those in use has some 20,000

# Tokens that only such models have, and the templates that use them; the first that fits, the most particular first.
SIGNS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"), ("deepseek", "deepseek-r1")),
    (("<|start_header_id|>", "<|eot_id|>"), ("llama3",)),
    (("<|header_start|>", "<|eot|>"), ("llama4",)),
    (("<|start_of_role|>", "<|end_of_role|>"), ("granite",)),
    (("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"), ("command-r",)),
    (("<|channel|>", "<|message|>", "<|return|>"), ("gpt-oss",)),
    (("<|im_start|>", "<|im_sep|>"), ("phi4",)),
    (("<|im_start|>", "<|im_end|>"), ("chatml",)),
    (("<start_of_turn>", "<end_of_turn>"), ("gemma",)),
    (("[SYSTEM_PROMPT]", "[INST]"), ("mistral-v7", "mistral-v7-tekken")),
    (("[INST]", "[/INST]"), ("mistral-v3", "mistral-v3-tekken")),
    (("[gMASK]", "<sop>"), ("glm4",)),
    (("<|user|>", "<|end|>"), ("phi3", "phi4-mini")),
)


class Encoder(Protocol):
    """What is asked of a tokenizer here and by `endings`."""

    def encode(self, text: str, *, special: bool = True, bos: bool | None = None) -> list[int]: ...
    def token(self, id: int) -> str: ...
    def is_special(self, id: int) -> bool: ...


class Bounded(Encoder, Protocol):
    """A tokenizer that knows what text begins and ends with."""

    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...


def open_template(tokenizer: Bounded, name: str) -> Template:
    """A template by its name, or from a file, with the model's BOS and EOS. Raises TemplateError when it is neither, or
    the file no template."""
    path = Path(name)
    if name in choices():
        source = named_source(fitted(name, tokenizer)) or ""
    elif path.is_file():
        try:
            source = read_small_file(path, FILE_LIMIT).decode()
        except FileFormatError as error:
            raise TemplateError(f"cannot be read as a template: {error}") from None
        except UnicodeDecodeError as error:
            raise TemplateError(f"{name}: cannot be read as a template: {error}") from None
    else:
        raise TemplateError(f"{name!r} is neither a template ({', '.join(choices())}) nor a file")
    bos, eos = ("" if id is None else tokenizer.token(id) for id in (tokenizer.bos, tokenizer.eos))
    return Template(source, name=name, bos=bos, eos=eos)


def single_token(tokenizer: Encoder, text: str) -> int | None:
    """The id of the one token that is this text, whatever kind it is of; None where the text takes several."""
    ids = tokenizer.encode(text, special=True, bos=False)
    return ids[0] if len(ids) == 1 and tokenizer.token(ids[0]).strip() == text.strip() else None


def fitting(tokenizer: Encoder) -> tuple[str, ...]:
    """Names of the templates that this vocabulary has the tokens of; empty where they do not tell."""
    for signs, names in SIGNS:
        if all(single_token(tokenizer, sign) is not None for sign in signs):
            return _spaced(tokenizer, names) if names[0].startswith("mistral") else names
    return ()


def fitted(name: str, tokenizer: Encoder) -> str:
    """The name in NAMED that is meant: of an alias, or of a family with several forms, the one for this vocabulary."""
    first = ALIASES.get(name, name)
    if name == "mistral":
        own = fitting(tokenizer)
        return own[0] if own and own[0].startswith("mistral") else "mistral-v1"
    if name == "phi":
        own = fitting(tokenizer)
        return "phi4" if "phi4" in own else first
    if name == "deepseek" and single_token(tokenizer, "<\uff5cUser\uff5c>") is None:
        return "deepseek-v2"
    return first


def _spaced(tokenizer: Encoder, names: Iterable[str]) -> tuple[str, ...]:
    """Mistral's forms, the right one first: a space is written behind a marker where the models were trained with one
    (SentencePiece) and the vocabulary does not put it there by itself, or it would stand there twice."""
    begun = tokenizer.token(tokenizer.encode("a", bos=False)[0]).startswith(" ")
    behind = tokenizer.token(tokenizer.encode("[INST]a", bos=False)[-1]).startswith(" ")
    return tuple(sorted(names, key=lambda name: name.endswith("-tekken") != (not begun or behind)))
