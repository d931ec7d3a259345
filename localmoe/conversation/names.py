"""What conversations are called; knows no files."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from datetime import datetime
from difflib import get_close_matches

from localmoe.conversation.lines import SUFFIX
from localmoe.errors import ConversationError

MAX_LETTERS, MAX_NBYTES = 64, 200
WORDS, WORDS_LETTERS = 4, 32  # of an automatic name
RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)  # files of Windows
EXPORTED = (".md", ".markdown", ".json", ".jsonl", SUFFIX)  # where a command takes names and files alike


def checked_name(name: str) -> str:
    """The name, its letters in their composed form; ConversationError if no file could be called so everywhere."""
    name = unicodedata.normalize("NFC", name.strip())
    wrong = next((letter for letter in name if not (letter in "._- " or unicodedata.category(letter)[0] in "LMN")), "")
    if not name:
        why = "it is empty"
    elif wrong:
        why = f"{wrong!r} cannot be in it"
    elif name[0] in ".-" or name[-1] == ".":
        why = "it cannot begin with . or -, or end with ."
    elif len(name) > MAX_LETTERS or len(name.encode()) > MAX_NBYTES:
        why = f"it is longer than {MAX_LETTERS} letters"
    elif RESERVED.fullmatch(name):
        why = "Windows keeps it for a device"
    elif name.lower().endswith(EXPORTED):
        why = "it ends like a file that /export writes"
    else:
        return name
    raise ConversationError(f"{name[:80]!r} is no name: {why} (letters, digits, spaces and . _ - are possible)")


def automatic_name(began: datetime, title: str) -> str:
    """Date, time and the first words: 2026-11-21-1705-what-is-the-capital."""
    text = unicodedata.normalize("NFC", title.lower())
    plain = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in text.replace("'", ""))
    words = ""
    for word in plain.split()[:WORDS]:
        if words and len(words) + len(word) >= WORDS_LETTERS:
            break
        words += "-" + word[:WORDS_LETTERS]
    while len(words.encode()) > MAX_NBYTES // 2:
        words = words[:-1]
    return f"{began:%Y-%m-%d-%H%M}{words}"


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for a name that is not there, as the end of a line."""
    known = list(names)
    if not known:
        return "none is saved yet"
    wanted = name.casefold()
    near = [known_name for known_name in known if wanted and wanted in known_name.casefold()][:3]
    near = near or get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else "/list shows what is saved"
