"""The lines of a journal, each numbered and with a checksum; knows no file, and no meaning of what they say.

    8 hexadecimal digits, a space, number, a space, JSON object, newline

The digits are the crc32 of number, space and object. The first line is number 1 and says what the file is, since when
it is there, and how the conversation begins:

    {"format": "localmoe conversation", "version": 1, "created": "2026-11-21T17:05:12+01:00", "title": "What is …"}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from zlib import crc32

from localmoe.errors import ConversationError

FORMAT, VERSION = "localmoe conversation", 1
SUFFIX = ".journal"
LINE_LIMIT, FILE_LIMIT = 1 << 24, 1 << 28  # bytes
DEPTH_LIMIT = 32  # of objects and lists in one another
BEGINNING = b'1 {"format":"localmoe conversation"'  # of a first line, behind its checksum
HEX = b"0123456789abcdef"

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode
_quoted = json.encoder.encode_basestring
_encode_ascii = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def line_of(number: int, content: Mapping[str, Any]) -> bytes:
    """The line of an object of JSON."""
    try:
        return _sealed(f"{number} {_encode(content)}".encode())
    except UnicodeEncodeError:  # halves of letters, as in the name of a file that is no text
        return _sealed(f"{number} {_encode_ascii(content)}".encode())


def piece_line(number: int, event: Mapping[str, Any]) -> bytes:
    """The line of a piece of an answer, one for each token: spelt by hand in half the time."""
    id, text, tokens = event["id"], event["text"], event["tokens"]
    try:
        return _sealed(f'{number} {{"do":"grow","id":{id},"text":{_quoted(text)},"tokens":{tokens}}}'.encode())
    except UnicodeEncodeError:
        return line_of(number, event)


def _sealed(body: bytes) -> bytes:
    return b"%08x %b\n" % (crc32(body), body)


def header_of(created: str, title: str) -> bytes:
    """The first line."""
    return line_of(1, {"format": FORMAT, "version": VERSION, "created": created, "title": title})


def read_line(line: bytes) -> tuple[int, dict[str, Any]] | None:
    """Number and object of a line without its newline; None if it is damaged, or not a line of a journal."""
    sum, space, body = line[:8], line[8:9], line[9:]
    if len(line) > LINE_LIMIT or space != b" " or sum != b"%08x" % crc32(body):
        return None
    number, _, text = body.partition(b" ")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not number.isdigit() or len(number) > 15 or not isinstance(content, dict):
        return None
    brackets = text.count(b"[") + text.count(b"{")
    if brackets > DEPTH_LIMIT and _depth(content) > DEPTH_LIMIT:
        return None
    return int(number), content


def check_header(name: str, content: Mapping[str, Any]) -> None:
    """Raises ConversationError unless a sound first line is of this format, in a version that is understood."""
    version = content.get("version")
    if content.get("format") != FORMAT or type(version) is not int:
        raise foreign(name)
    if version > VERSION:
        raise ConversationError(
            f"{name} was written by a newer localmoe (file version {str(version)[:20]}; this one reads {VERSION})"
        )


def foreign(name: str) -> ConversationError:
    return ConversationError(f"{name} is not a conversation of localmoe")


def begins_header(line: bytes) -> bool:
    """Whether these bytes, which no newline ends, may be what was written of a first line."""
    body = line[9:]
    return (
        all(digit in HEX for digit in line[:8])
        and line[8:9] in (b"", b" ")
        and (body.startswith(BEGINNING) or BEGINNING.startswith(body))
    )


def _depth(content: object) -> int:
    """How deep objects and lists lie in one another, as far as it matters."""
    depth, level = 0, [content]
    while level and depth <= DEPTH_LIMIT:
        inside = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list))]
        level = [value for part in inside for value in part if isinstance(value, (dict, list))]
        depth += 1
    return depth
