"""A report as blocks, and the two ways to write them: Markdown, and one HTML page that needs nothing from anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeAlias

STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#656d76;--line:#d8dee4;--paper:#fff;--shade:#f6f8fa}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#8d96a0;--line:#30363d;--paper:#0d1117;--shade:#161b22}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:52rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.25;margin:0 0 1rem}
h2{font-size:1.3rem;margin:2.8rem 0 .8rem;padding-bottom:.3rem;border-bottom:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.8rem 0 .6rem}p{margin:.7rem 0;max-width:44rem}
figure{margin:1.4rem 0}figcaption{color:var(--soft);font-size:.875rem;margin-top:.3rem;max-width:44rem}
.wide{overflow-x:auto;margin:1rem 0}table{border-collapse:collapse;font-size:.9rem;min-width:60%}
th{font-weight:600;text-align:left;color:var(--soft)}
th,td{padding:.38rem .9rem .38rem 0;border-bottom:1px solid var(--line);vertical-align:top}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}td{overflow-wrap:break-word}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True, slots=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings; a heading that begins with ">" is of a column of numbers."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture: the SVG text, the file it is kept in beside the Markdown, and the sentence under it."""

    file: str
    svg: str
    caption: str


Block: TypeAlias = Heading | Text | Table | Figure


def markdown(blocks: Sequence[Block]) -> str:
    """The report as Markdown; pictures are links to their files."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def html(title: str, blocks: Sequence[Block]) -> str:
    """The report as one page: pictures inline, no script, and a policy that forbids every request."""
    body = "\n".join(map(_html, blocks))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Text(text):
            return _plain(text)
        case Table(headings, rows):
            lines = [[heading.removeprefix(">") for heading in headings]]
            lines.append(["---:" if heading.startswith(">") else "---" for heading in headings])
            body = [[_plain(cell).replace("|", "\\|") for cell in row] for row in rows]
            return "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *body])
        case Figure(file, _, caption):
            return f"![{_plain(caption)}]({file})"


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Table(headings, rows):
            kinds = [' class="number"' if heading.startswith(">") else "" for heading in headings]
            head = "".join(
                f"<th{kind}>{escape(text.removeprefix('>'))}</th>" for text, kind in zip(headings, kinds, strict=True)
            )
            body = "".join(
                "<tr>"
                + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True))
                + "</tr>"
                for row in rows
            )
            return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        case Figure(_, svg, caption):
            return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: nothing in it becomes markup, a link or another line."""
    flat = " ".join(text.split())
    for character in "\\`*_[]<>#":
        flat = flat.replace(character, "\\" + character)
    return flat
