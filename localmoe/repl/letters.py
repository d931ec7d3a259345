"""How terminals draw letters: their width, what is drawn into the one before, where a line may end; draws nothing."""

from __future__ import annotations

import unicodedata

from rich.cells import get_character_cell_size

# Closing marks of scripts without spaces, which do not begin a line (JIS X 4051 has the whole list).
NOT_AT_START = frozenset("、。，．・：；？！）］｝」』】〉》〕ー々ぁぃぅぇぉっゃゅょァィゥェォッャュョ…‥")
JOINER = "\u200d"  # makes one emoji of two


def may_break(before: str, letter: str) -> bool:
    """Whether a line may end between two letters that no space parts."""
    if letter in NOT_AT_START or combines(letter) or before == JOINER:
        return False
    return is_wide(letter) or is_wide(before)


def is_wide(letter: str) -> bool:
    """Letters of two cells, between which a line may be broken."""
    return get_character_cell_size(letter) == 2


def combines(letter: str) -> bool:
    """Marks, joiners, halves of flags, colours of skin: what terminals may draw into the letter before."""
    return (
        unicodedata.category(letter) in ("Mn", "Mc", "Me", "Cf") or "\U0001f1e6" <= letter <= "\U0001f1ff"
    ) or "\U0001f3fb" <= letter <= "\U0001f3ff"
