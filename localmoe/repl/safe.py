"""What of a text may reach a terminal: no control sequence ever; knows nothing of drawing."""

from __future__ import annotations

import re

# C0 but for tab and newline, DEL, C1, lone surrogates, and the bidi overrides that make text read other than it is.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Text that cannot drive a terminal: control characters are shown as escapes such as \\x1b."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape", "backslashreplace").decode(), text)
