"""Text to token ids and back, for a GGUF file or a folder; knows vocabularies and their flags, not models or templates.

Ids are those of llama.cpp (GGUF) and of Hugging Face `tokenizers` (tokenizer.json).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from localmoe.errors import FileFormatError, TokenizerError, UnsupportedError
from localmoe.pretokenizers import Pretokenizer, byte_alphabet
from localmoe.tekken import read_tekken
from localmoe.vocabulary import (
    SPACE,
    Kind,
    Vocabulary,
    byte_level_bpe,
    pretokenizer,
    read_sentencepiece,
    ready_made,
    sentencepiece_bpe,
)

# Control tokens that end a turn whatever else the file says: llama.cpp's list (llama-vocab.cpp, special_eog_ids).
END_OF_TURN = frozenset(
    "<|eot_id|> <|eom_id|> <|im_end|> <|end|> <|return|> <|call|> <|calls|> <|flush|> <|endoftext|> <|end_of_text|> "
    "<end_of_turn> <turn|> <end_of_utterance> <|end_of_turn|> <|END_OF_TURN_TOKEN|> <EOT> _<EOT> [EOT] [EOS] [e~[ "
    "<\uff5cend\u2581of\u2581sentence\uff5c>".split()
)
# `tokenizer_class` of folders that hold vocab.json and merges.txt only, and the pre-tokenizer that it stands for.
CLASSES = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")
MODELS = ("gpt2", "llama", "gemma4")
REFUSED = {
    "bert": "WordPiece, for encoders",
    "t5": "unigram, for encoders",
    "rwkv": "RWKV's own",
    "plamo2": "PLaMo's own",
}


class Tokenizer:
    """A vocabulary with its flags. `stop` holds every token that ends a turn; `bos` and `eos` are ids or None."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        bos: int | None,
        eos: int | None,
        stop: Iterable[int] = (),
        add_bos: bool = False,
        add_eos: bool = False,
    ) -> None:
        self._vocabulary = vocabulary
        self.vocabulary_size = len(vocabulary.pieces)
        self.bos, self.eos = (id if id is not None and 0 <= id < self.vocabulary_size else None for id in (bos, eos))
        self.add_bos, self.add_eos = add_bos and self.bos is not None, add_eos and self.eos is not None
        self.stop = frozenset(_stop_tokens(vocabulary, [*stop, *([] if self.eos is None else [self.eos])]))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer of GGUF metadata, keys in full (`tokenizer.ggml.tokens` ...).

        Raises UnsupportedError for an unknown vocabulary type or pre-tokenizer, TokenizerError for a broken vocabulary.
        """
        key = "tokenizer.ggml."
        model = metadata.get(key + "model")
        if model is None:
            raise TokenizerError("the file has no vocabulary: tokenizer.ggml.model is missing")
        if str(model) not in MODELS:
            kind = f" ({REFUSED[model]})" if str(model) in REFUSED else ""
            possible = ", ".join(f'"{name}"' for name in MODELS)
            raise UnsupportedError(f'tokenizer.ggml.model "{model}"{kind} is not supported; possible: {possible}')
        pieces = [piece or f"[EMPTY_{id}]" for id, piece in enumerate(_strings(metadata, key + "tokens"))]
        kinds = _numbers(metadata, key + "token_type", len(pieces), Kind.NORMAL)
        ids = {name: _token_id(metadata, f"{key}{name}_token_id") for name in ("bos", "eos", "eot", "eom")}
        if model == "llama":
            scores = _numbers(metadata, key + "scores", len(pieces), 0.0)
            prefix = bool(metadata.get(key + "add_space_prefix", True))
            squeeze = bool(metadata.get(key + "remove_extra_whitespaces", False))
            vocabulary = sentencepiece_bpe(pieces, scores, kinds, space_prefix=prefix, squeeze_spaces=squeeze)
            add_bos = True
            ids = {
                **ids,
                "bos": 1 if ids["bos"] is None else ids["bos"],
                "eos": 2 if ids["eos"] is None else ids["eos"],
            }
        elif model == "gemma4":
            merges = [tuple(pair.split(" ", 1)) for pair in _strings(metadata, key + "merges")]
            vocabulary = sentencepiece_bpe(pieces, [], kinds, space_prefix=False, merges=merges)
            metadata, add_bos = {**metadata, key + "add_bos_token": True}, True  # the first files say false by mistake
        else:
            # A file without the key is older than the key; llama.cpp too takes the one called "default".
            pre = pretokenizer(str(metadata.get(key + "pre", "default")))
            merges = [tuple(pair.split(" ", 1)) for pair in _strings(metadata, key + "merges")]
            vocabulary = byte_level_bpe(pieces, kinds, merges, pre)
            add_bos = pre.add_bos
        return cls(
            vocabulary,
            bos=ids["bos"],
            eos=ids["eos"],
            stop=[id for name in ("eot", "eom") if (id := ids[name]) is not None],
            add_bos=bool(metadata.get(key + "add_bos_token", add_bos)),
            add_eos=bool(metadata.get(key + "add_eos_token", False)),
        )

    @classmethod
    def from_folder(cls, path: Path) -> Tokenizer:
        """The tokenizer of a folder: tokenizer.json, else tokenizer.model, vocab.json with merges.txt, or tekken.json.

        Raises TokenizerError (nothing there), FileFormatError (broken files) or UnsupportedError.
        """
        try:
            return cls._from_files(path)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path}: the tokenizer files are not as expected: {error}") from error

    @classmethod
    def _from_files(cls, path: Path) -> Tokenizer:
        config = _json(path / "tokenizer_config.json")
        names = {**_json(path / "special_tokens_map.json"), **config}
        defaults: dict[str, int | None] = {"bos_token": None, "eos_token": None}
        add_bos = add_eos = False
        if (path / "tokenizer.json").exists():
            vocabulary = _from_json(path / "tokenizer.json")
            add_bos, add_eos = _frames(vocabulary)
        elif (path / "tokenizer.model").exists():
            vocabulary, defaults = _from_sentencepiece(path, config)
            add_bos = True
        elif (path / "vocab.json").exists() and (path / "merges.txt").exists():
            vocabulary = _from_merges(path, config)
        elif (path / "tekken.json").exists():
            vocabulary = _from_tekken(path / "tekken.json")
            defaults, add_bos = {"bos_token": 1, "eos_token": 2}, True
        else:
            expected = "tokenizer.json, tokenizer.model, or vocab.json with merges.txt, or tekken.json"
            raise TokenizerError(f"{path} holds no tokenizer: expected {expected}")
        generation = {**_json(path / "config.json"), **_json(path / "generation_config.json")}
        find = {piece: id for id, piece in enumerate(vocabulary.pieces)}.get
        bos, eos = (
            find(_text(names[name]) or "") if name in names else defaults[name] for name in ("bos_token", "eos_token")
        )
        listed = generation.get("eos_token_id")
        stop = [id for id in (listed if isinstance(listed, list) else [listed]) if isinstance(id, int)]
        if eos is None and stop:
            eos = stop[0]
        if bos is None and "bos_token" not in names:
            bos = generation.get("bos_token_id")
        said = {name: config[name] for name in ("add_bos_token", "add_eos_token") if isinstance(config.get(name), bool)}
        return cls(
            vocabulary,
            bos=bos,
            eos=eos,
            stop=stop,
            add_bos=said.get("add_bos_token", add_bos),
            add_eos=said.get("add_eos_token", add_eos),
        )

    @property
    def vocabulary(self) -> Vocabulary:
        """Its parts, for what writes them elsewhere."""
        return self._vocabulary

    def encode(self, text: str, *, special: bool = True, bos: bool | None = None) -> list[int]:
        """Token ids of `text`. `special`: control tokens written in it are recognised; else they are plain text.

        `bos` None adds BOS and EOS as the file says, False never, True BOS whenever there is one; a text that begins
        with BOS itself gets no second one.
        """
        engine = self._vocabulary.engine
        if engine.encode_special_tokens == special:
            engine.encode_special_tokens = not special
        try:
            ids: list[int] = engine.encode(text, add_special_tokens=False).ids
        except Exception as error:  # `tokenizers` raises nothing more particular
            raise TokenizerError(f"text that cannot be tokenised: {error}") from error
        if self.bos is not None and (self.add_bos if bos is None else bos) and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        if bos is None and self.add_eos and self.eos is not None:
            ids.append(self.eos)
        return ids

    def encode_prompt(self, rendered: str) -> list[int]:
        """Token ids of a rendered chat template: BOS in front where the file asks for it, once however it got there."""
        ids = self.encode(rendered, bos=False)
        if self.bos is None:
            return ids
        own = next((n for n, id in enumerate(ids) if id != self.bos), len(ids))
        return [self.bos] * (self.add_bos or own > 0) + ids[own:]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `ids`; what is not UTF-8 becomes U+FFFD. Without `special`, control tokens are dropped."""
        stream = self.stream(special=special)
        return "".join(map(stream.push, ids)) + stream.finish()

    def stream(self, *, special: bool = False, continues: bool = False) -> TokenStream:
        """A decoder that takes one token at a time. `continues`: the text goes on after other text, so that a space at
        its beginning is kept; else a vocabulary that puts a space before all text has that space removed."""
        strip = self._vocabulary.space_prefix and not continues
        return TokenStream(self._spell, None if special else self.is_special, strip)

    def token(self, id: int) -> str:
        """The text of one token, in print: bytes that are no UTF-8 by themselves are shown as <0xE2>."""
        return self._spell(id).decode("utf-8", "token-bytes")

    def is_special(self, id: int) -> bool:
        """Whether `id` is a control (or the unknown) token, which is no part of the text."""
        return 0 <= id < self.vocabulary_size and self._vocabulary.kinds[id] in (Kind.CONTROL, Kind.UNKNOWN)

    def _spell(self, id: int) -> bytes:
        """The bytes of a token; U+FFFD for a row that pads the model's output beyond the vocabulary."""
        if not 0 <= id < self.vocabulary_size:
            return "\ufffd".encode()
        piece, kind = self._vocabulary.pieces[id], self._vocabulary.kinds[id]
        if kind == Kind.BYTE and BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(piece[3:5])
        if kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED):
            return piece.encode()
        if not self._vocabulary.byte_level:
            return piece.replace(SPACE, " ").encode()
        alphabet = byte_alphabet()
        return b"".join(alphabet.get(character) or character.encode() for character in piece)


class TokenStream:
    """Decodes one token at a time and never splits a UTF-8 character; the pieces together are `Tokenizer.decode`."""

    def __init__(self, spell: Callable[[int], bytes], dropped: Callable[[int], bool] | None, strip: bool) -> None:
        self._spell, self._dropped, self._strip = spell, dropped, strip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that is complete with token `id`; may be empty."""
        if self._dropped is not None and self._dropped(id):
            return ""
        text = self._decoder.decode(self._spell(id))
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        """U+FFFD for a character that stayed incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)


def _in_print(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"<0x{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("token-bytes", _in_print)


def _stop_tokens(vocabulary: Vocabulary, named: Iterable[int]) -> set[int]:
    pieces = vocabulary.pieces
    ends = ((piece, id) for id, piece in enumerate(pieces) if piece in END_OF_TURN)
    control = {piece: id for piece, id in ends if vocabulary.kinds[id] == Kind.CONTROL}
    if control.keys() & {"<|return|>", "<|flush|>"} and control.keys() & {"<|call|>", "<|calls|>"}:
        control.pop("<|end|>", None)  # in gpt-oss and Solar it ends a message, not the turn
    return {*control.values(), *(id for id in named if 0 <= id < len(pieces))}


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values: Any = metadata.get(key)
    types = set(map(type, values)) if isinstance(values, list) else {None}
    if not types <= {str, bytes}:
        raise TokenizerError(f"{key} is missing or is no list of strings")
    if bytes not in types:
        return list(values)
    try:
        return [value.decode() if isinstance(value, bytes) else value for value in values]
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{key} holds a string that is not UTF-8: {error}") from error


def _numbers(metadata: Mapping[str, Any], key: str, count: int, default: float) -> list[Any]:
    values = metadata.get(key)
    if values is None:
        return [default] * count
    numbers: list[Any] = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(numbers) < count:
        raise TokenizerError(f"{key} has {len(numbers)} entries for {count} tokens")
    if not set(map(type, numbers)) <= {int, float}:
        raise TokenizerError(f"{key} is no list of numbers")
    return numbers[:count]


def _token_id(metadata: Mapping[str, Any], key: str) -> int | None:
    found = metadata.get(key)
    if found is not None and not isinstance(found, int):
        raise TokenizerError(f"{key} is no whole number: {found!r:.40}")
    return found


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise FileFormatError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _text(token: Any) -> str | None:
    """A special token is written as a string or as a record with `content`."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _from_json(path: Path) -> Vocabulary:
    from tokenizers import Tokenizer as Engine

    try:
        engine = Engine.from_file(str(path))
    except Exception as error:
        raise FileFormatError(f"{path}: {error}") from error
    return ready_made(engine, str(path))


def _frames(vocabulary: Vocabulary) -> tuple[bool, bool]:
    """Whether the post-processor of a tokenizer.json puts a token before and after the text."""
    bare, framed = (vocabulary.engine.encode("a", add_special_tokens=flag).ids for flag in (False, True))
    return framed[:1] != bare[:1], framed[-1:] != bare[-1:]


def _from_sentencepiece(path: Path, config: Mapping[str, Any]) -> tuple[Vocabulary, dict[str, int | None]]:
    file = path / "tokenizer.model"
    model = read_sentencepiece(file.read_bytes(), str(file))
    kinds = model.kinds.copy()
    pieces = _with_added(model.pieces, kinds, path, config)
    scores = model.scores + [0.0] * (len(pieces) - len(model.scores))
    vocabulary = sentencepiece_bpe(
        pieces, scores, kinds,
        space_prefix=model.space_prefix, charsmap=model.charsmap, squeeze_spaces=model.squeeze_spaces,
    )  # fmt: skip
    return vocabulary, {"bos_token": model.bos, "eos_token": model.eos}


def _from_tekken(file: Path) -> Vocabulary:
    found = read_tekken(_json(file), str(file))
    kinds: list[int] = [Kind.CONTROL if id < found.special else Kind.NORMAL for id in range(len(found.pieces))]
    try:
        return byte_level_bpe(found.pieces, kinds, found.merges, Pretokenizer((found.pattern,), whole_words=True))
    except TokenizerError:
        raise
    except Exception as error:  # `tokenizers` raises nothing more particular for a pattern that it cannot read
        raise FileFormatError(f"{file}: {error}") from error


def _from_merges(path: Path, config: Mapping[str, Any]) -> Vocabulary:
    named = str(config.get("tokenizer_class", "missing")).removesuffix("Fast")
    if named not in CLASSES:
        known = ", ".join(CLASSES)
        raise UnsupportedError(
            f"{path}: vocab.json needs a tokenizer_class in tokenizer_config.json: {named}; known: {known}"
        )
    ids = _json(path / "vocab.json")
    if sorted(ids.values()) != list(range(len(ids))):
        raise FileFormatError(f"{path / 'vocab.json'}: the ids are not 0 to {len(ids) - 1}, each once")
    kinds: list[int] = [Kind.NORMAL] * len(ids)
    pieces = _with_added(sorted(ids, key=ids.__getitem__), kinds, path, config)
    lines = (path / "merges.txt").read_text("utf-8").splitlines()
    merges = [tuple(line.split(" ", 1)) for line in lines if line and not line.startswith("#version")]
    return byte_level_bpe(pieces, kinds, merges, pretokenizer(CLASSES[named]))


def _with_added(pieces: list[str], kinds: list[int], path: Path, config: Mapping[str, Any]) -> list[str]:
    """Pieces with the folder's added tokens, `kinds` extended to match; a hole in the ids becomes an unused token."""
    added = {id: (text, True) for text, id in _json(path / "added_tokens.json").items()}
    for id, token in config.get("added_tokens_decoder", {}).items():
        added[int(id)] = (token["content"], bool(token.get("special")))
    if any(not isinstance(id, int) or not 0 <= id < len(pieces) + 65536 for id in added):
        raise FileFormatError(f"{path}: an added token has an id that is far outside the vocabulary of {len(pieces)}")
    size = max([len(pieces) - 1, *added]) + 1
    result = pieces + [f"[EMPTY_{id}]" for id in range(len(pieces), size)]
    kinds += [int(Kind.UNUSED)] * (size - len(pieces))
    for id, (text, special) in added.items():
        result[id], kinds[id] = text, Kind.CONTROL if special else Kind.USER_DEFINED
    return result
