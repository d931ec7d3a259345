"""A benchmark's bars, drawn by rich for the terminal, or for a file as SVG; prints nothing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from rich.bar import Bar as Block
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from localmoe.benchmark.report import Bar
from localmoe.errors import SettingError

WIDTH, SVG_COLUMNS = 40, 110
SVG_FORMAT = """\
<svg class="{unique_id}" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
<rect width="{width}" height="{height}" fill="#292929"/>
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def drawn(bars: Sequence[Bar]) -> Group:
    """One block of bars a group, each with a scale of its own."""
    blocks: list[Text | Table] = []
    for group, members in groupby(bars, key=lambda bar: bar.group):
        lines = list(members)
        longest = max(bar.value for bar in lines) or 1.0
        table = Table(box=None, show_header=False, pad_edge=False)
        for bar in lines:
            table.add_row(Text(bar.label), Block(longest, 0, bar.value, width=WIDTH, color="cyan"), Text(bar.text))
        blocks += [Text(group, style="bold"), table]
    return Group(*blocks)


def save_svg(bars: Sequence[Bar], file: Path) -> None:
    """Raises SettingError where the file cannot be written."""
    console = Console(record=True, width=SVG_COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(drawn(bars))
    try:
        file.write_text(console.export_svg(code_format=SVG_FORMAT, unique_id="bench"), encoding="utf-8")
    except OSError as error:
        raise SettingError(f"--svg {file}: {error.strerror or error}") from error
