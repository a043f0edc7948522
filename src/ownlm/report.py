"""Progress for people, one JSON line per event for programs.

line    a sentence that stays                       people
status  the state of a long step, rewritten         people
event   a name and its numbers                      programs (--json)
table   rows under a heading                        people
"""

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TextIO

Audience = Literal["people", "programs", "nobody"]
STATUS_EVERY_S = 5.0  # between status lines where there is no terminal to rewrite


class Reporter:
    """Where a stage says what it does. It is passed to every stage; nothing prints by itself."""

    def __init__(self, audience: Audience = "people", out: TextIO | None = None) -> None:
        self.audience: Audience = audience
        self.out = out or sys.stdout
        self.live = audience == "people" and self.out.isatty()
        self.status_shown = False
        self.last_status_s = float("-inf")

    @classmethod
    def silent(cls) -> "Reporter":
        """A reporter that says nothing, for library use and tests."""
        return cls("nobody")

    def line(self, text: str) -> None:
        """Say a sentence to people."""
        if self.audience == "people":
            self.clear()
            print(text, file=self.out, flush=True)

    def status(self, text: str) -> None:
        """Show where a long step stands: in place on a terminal, now and then elsewhere."""
        if self.audience != "people":
            return
        now = time.monotonic()
        if self.live:
            import shutil

            width = shutil.get_terminal_size().columns - 1
            self.out.write("\r\x1b[2K" + text[:width])
            self.out.flush()
            self.status_shown = True
        elif now - self.last_status_s >= STATUS_EVERY_S:
            print(text, file=self.out, flush=True)
            self.last_status_s = now

    def event(self, name: str, /, **fields: Any) -> None:
        """Write one JSON line for programs: {"event": name, ...}."""
        if self.audience == "programs":
            print(json.dumps({"event": name, **fields}, ensure_ascii=False, default=str), file=self.out, flush=True)

    def table(self, heading: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Show rows in aligned columns; numbers to the right."""
        if self.audience != "people":
            return
        self.clear()
        from rich.console import Console
        from rich.table import Table

        body = [[("" if cell is None else str(cell)) for cell in row] for row in rows]
        table = Table(*heading, box=None, pad_edge=False, header_style="bold")
        for index, column in enumerate(table.columns):
            cells = [row[index] for row in body if row[index]]
            column.justify = (
                "right" if cells and all(cell[0].isdigit() or cell[0] in "-.≥≤" for cell in cells) else "left"
            )
            column.overflow = "fold"
        for row in body:
            table.add_row(*row)
        Console(file=self.out, markup=False, highlight=False, width=None if self.live else 140).print(table)

    def clear(self) -> None:
        """Take the status line away, so that the next sentence starts on a clean line."""
        if self.status_shown:
            self.out.write("\r\x1b[2K")
            self.status_shown = False


def duration(seconds: float) -> str:
    """duration(75) == "1 min 15 s", duration(4000) == "1 h 7 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """size(1_500_000) == "1.5 MB": decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def quantity(count: float) -> str:
    """quantity(650_000) == "650 k", quantity(1_100_000_000) == "1.1 B": parameters and tokens."""
    for unit in ("", " k", " M"):
        if abs(count) < 1000:
            return f"{count:.0f}{unit}" if unit == "" or count >= 100 else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f} B"
