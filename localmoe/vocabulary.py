"""From a vocabulary's parts (pieces, scores, merges) to an engine of `tokenizers`; reads no metadata and no folder.

Three sources: SentencePiece BPE (merging by score), byte-level BPE (merging by list), and a ready tokenizer.json.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from localmoe.errors import FileFormatError, TokenizerError, UnsupportedError
from localmoe.pretokenizers import PRETOKENIZERS, Pretokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Engine

SPACE = "\u2581"
LONGEST_PIECE = 1024


class Kind(IntEnum):
    """What a token is for: the values of `tokenizer.ggml.token_type` and of sentencepiece_model.proto."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """An engine with what it takes to spell its tokens: `pieces` and `kinds` by token id.

    `byte_level`: normal pieces are written in GPT-2's byte alphabet, else with U+2581 for a space.
    `space_prefix`: the engine puts a space before text, so the first space of decoded text is its own.
    """

    engine: Engine
    pieces: Sequence[str]
    kinds: Sequence[int]
    byte_level: bool
    space_prefix: bool


def pretokenizer(name: str) -> Pretokenizer:
    """The pre-tokenizer called `name`; raises UnsupportedError with the known names."""
    if name not in PRETOKENIZERS:
        raise UnsupportedError(f'pre-tokenizer "{name}" is not known; known are {", ".join(sorted(PRETOKENIZERS))}')
    return PRETOKENIZERS[name]


def byte_level_bpe(
    pieces: Sequence[str], kinds: Sequence[int], merges: Iterable[tuple[str, ...]], pre: Pretokenizer
) -> Vocabulary:
    """Byte-level BPE (GPT-2, Llama 3, Qwen, DeepSeek ...): `merges` are pairs of pieces, best first."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    ids = _ids(pieces)
    pairs = list(merges)
    try:
        model = models.BPE(vocab=ids, merges=pairs, ignore_merges=pre.whole_words)  # type: ignore[arg-type]
    except Exception:  # a merge that leads to no token: llama.cpp passes over it too
        pairs = [pair for pair in pairs if len(pair) == 2 and {*pair, "".join(pair)} <= ids.keys()]
        model = models.BPE(vocab=ids, merges=pairs, ignore_merges=pre.whole_words)  # type: ignore[arg-type]
    engine = Tokenizer(model)
    if pre.nfc:
        engine.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    _add_tokens(engine, pieces, kinds)
    return Vocabulary(engine, pieces, kinds, byte_level=True, space_prefix=False)


def sentencepiece_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    space_prefix: bool,
    charsmap: bytes = b"",
    squeeze_spaces: bool = False,
    merges: Iterable[tuple[str, ...]] | None = None,
) -> Vocabulary:
    """SentencePiece's BPE: of two neighbours, those whose union has the best score are merged first, or those that
    stand first among `merges`, pairs of pieces (Gemma 4).

    `charsmap` is a precompiled normaliser, `squeeze_spaces` SentencePiece's remove_extra_whitespaces.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers

    ids = _ids(pieces)
    unknown = next((piece for piece, kind in zip(pieces, kinds, strict=True) if kind == Kind.UNKNOWN), None)
    if merges is None:
        pairs = merges_from_scores(pieces, scores, kinds)
    else:  # one that leads to no token is passed over
        pairs = [(pair[0], pair[1]) for pair in merges if len(pair) == 2 and {*pair, "".join(pair)} <= ids.keys()]
    engine = Tokenizer(models.BPE(vocab=ids, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if squeeze_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if space_prefix:
        steps.append(normalizers.Prepend(SPACE))
    engine.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    _add_tokens(engine, pieces, kinds)
    return Vocabulary(engine, pieces, kinds, byte_level=False, space_prefix=space_prefix)


def merges_from_scores(pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """Merges, best first, that stand for SentencePiece's rule "best score first, then leftmost".

    Among equal scores (Llama 2's runs of spaces) the longer piece goes first, and within a piece the longer left part:
    so a run grows from the left, as it does there. Control, byte and user-defined pieces cannot be made by merging.
    """
    merged = (Kind.NORMAL, Kind.UNUSED)
    normal = {piece: -score for piece, score, kind in zip(pieces, scores, kinds, strict=True) if kind in merged}
    if (longest := max(map(len, normal), default=0)) > LONGEST_PIECE:
        raise TokenizerError(f"a token of the vocabulary is {longest} characters long, possible are {LONGEST_PIECE}")
    order = sorted((piece for piece in normal if len(piece) > 1), key=lambda piece: (normal[piece], -len(piece)))
    return [
        (piece[:cut], piece[cut:])
        for piece in order
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in normal and piece[cut:] in normal
    ]


def ready_made(engine: Engine, name: str) -> Vocabulary:
    """A tokenizer.json already loaded by `tokenizers`; its truncation and padding are switched off."""
    engine.no_truncation()
    engine.no_padding()
    decoder = json.loads(engine.decoder.__getstate__()) if engine.decoder else {}
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder]) if step}
    if unknown := steps.keys() - {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        raise UnsupportedError(
            f"{name}: decoder {', '.join(sorted(unknown))} is not supported (ByteLevel and U+2581 are)"
        )
    if (kind := type(engine.model).__name__) not in ("BPE", "Unigram"):
        raise UnsupportedError(f"{name}: model {kind} is not supported (BPE and Unigram are)")
    ids = engine.get_vocab(with_added_tokens=True)
    if (largest := max(ids.values(), default=0)) > 2 * len(ids) + 65536:
        raise FileFormatError(f"{name}: token id {largest} in a vocabulary of {len(ids)}")
    pieces = [""] * (max(ids.values(), default=-1) + 1)
    for piece, id in ids.items():
        pieces[id] = piece
    kinds: list[int] = [Kind.NORMAL] * len(pieces)
    if "ByteFallback" in steps:
        for byte in range(256):
            if (id := ids.get(f"<0x{byte:02X}>", -1)) >= 0:
                kinds[id] = Kind.BYTE
    for id, token in engine.get_added_tokens_decoder().items():
        kinds[id] = Kind.CONTROL if token.special else Kind.USER_DEFINED
    prefix = "Strip" in steps or steps.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
    return Vocabulary(engine, pieces, kinds, byte_level="ByteLevel" in steps, space_prefix=prefix)


def _ids(pieces: Sequence[str]) -> dict[str, int]:
    ids = {piece: id for id, piece in enumerate(pieces)}
    if len(ids) < len(pieces):
        again = next(id for id, piece in enumerate(pieces) if ids[piece] != id)
        raise TokenizerError(f"the vocabulary has {pieces[again]!r} twice, as token {again} and {ids[pieces[again]]}")
    return ids


def _add_tokens(engine: Engine, pieces: Sequence[str], kinds: Sequence[int]) -> None:
    """Control and user-defined tokens are found in the text before anything else, the longest first."""
    from tokenizers import AddedToken

    marked = [(piece, kind) for piece, kind in zip(pieces, kinds, strict=True) if kind in (2, 3, 4)]
    engine.add_special_tokens(
        [AddedToken(piece, normalized=False) for piece, kind in marked if kind != Kind.USER_DEFINED]
    )
    engine.add_tokens([AddedToken(piece, normalized=False) for piece, kind in marked if kind == Kind.USER_DEFINED])


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What a SentencePiece `tokenizer.model` says (sentencepiece_model.proto)."""

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    bos: int
    eos: int
    space_prefix: bool
    squeeze_spaces: bool
    charsmap: bytes


def read_sentencepiece(data: bytes, name: str) -> SentencePieceModel:
    """Parses a SentencePiece model; raises FileFormatError (broken) or UnsupportedError (not BPE)."""
    pieces: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    trainer: dict[int, Any] = {}
    normaliser: dict[int, Any] = {}
    try:
        for field, value in _fields(data):
            if field == 1:
                record = dict(_fields(value))
                pieces.append(str(record[1], "utf-8"))
                scores.append(struct.unpack("<f", record.get(2, bytes(4)))[0])
                kinds.append(record.get(3, Kind.NORMAL))
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                normaliser = dict(_fields(value))
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise FileFormatError(f"{name} is not a SentencePiece model: {error}") from error
    if trainer.get(3, 1) != 2:
        raise UnsupportedError(
            f"{name}: SentencePiece model type {trainer.get(3, 1)} is not supported, possible is 2 (BPE)"
        )
    user = [
        piece.replace(SPACE, " ") if kind == Kind.USER_DEFINED else piece
        for piece, kind in zip(pieces, kinds, strict=True)
    ]
    return SentencePieceModel(
        user, scores, kinds, trainer.get(41, 1), trainer.get(42, 2),
        bool(normaliser.get(3, 1)), bool(normaliser.get(4, 1)), bytes(normaliser.get(2, b"")),
    )  # fmt: skip


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of one protobuf message: whole numbers as int, all else as bytes (protobuf.dev, encoding)."""
    at, view = 0, memoryview(data)
    while at < len(view):
        key, at = _varint(view, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(view, at)
            yield key >> 3, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire} at byte {at}")
        length, at = _varint(view, at) if wire == 2 else (8 if wire == 1 else 4, at)
        if length > len(view) - at:
            raise ValueError(f"a field of {length} bytes at byte {at} of {len(view)}")
        yield key >> 3, view[at : at + length]
        at += length


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = view[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError(f"a number without end at byte {at}")
