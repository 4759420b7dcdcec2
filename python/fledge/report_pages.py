"""One document, two pages: a list of blocks becomes Markdown or a self-contained HTML page.

`fledge.report` says what stands in the report; this module only knows how headings, paragraphs,
tables, transcripts and plots look. It reads no files.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

SHORT_CELL = 36  # characters
VALUE_AND_MORE = re.compile(r"(?P<value>\S.{1,10}) (?P<more>\([^()]{1,24}\).{0,9})")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1f24; background: #fff }
h1, h2, h3 { line-height: 1.2; margin-top: 2rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #d5d9de; padding: .3rem .7rem; text-align: left;
         vertical-align: top }
pre { background: #f4f5f7; padding: .8rem; overflow-x: auto; white-space: pre-wrap }
figure { margin: 1rem 0; padding: .5rem; border-radius: .4rem; max-width: 46rem }
svg { max-width: 100%; height: auto; display: block }
.s { white-space: nowrap }
.l { overflow-wrap: anywhere; min-width: 10rem }
@media (max-width: 36rem) { th, td { padding: .3rem .4rem } .q td.s { white-space: normal } }
code { background: #f4f5f7; padding: .1rem .3rem; border-radius: .2rem }
td:nth-child(n+2) { font-variant-numeric: tabular-nums }
@media (prefers-color-scheme: dark) {
  body { color: #e6e8eb; background: #15181c } pre, code { background: #22262c }
  th, td { border-color: #3a4048 } figure { background: #fff }
}
"""


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the page's."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Table:
    """A header and rows of cells."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Listing:
    """Text that keeps its line breaks: transcripts, TOML."""

    text: str


@dataclass(frozen=True)
class Plot:
    """A picture beside the report; `svg` is put into the HTML page itself."""

    path: str
    title: str
    svg: str = field(repr=False)
    place: str = "curves"
    """The section that it stands in: curves, scores or core."""


Block = Heading | Paragraph | Table | Listing | Plot


def to_markdown(blocks: Sequence[Block]) -> str:
    """The blocks as GitHub-flavoured Markdown."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Table(header, rows):
            lines = [_row(header), "|" + " --- |" * len(header)]
            return "\n".join(lines + [_row(row) for row in rows])
        case Listing(text):
            fence = "```"
            while fence in text:
                fence += "`"
            return f"{fence}\n{text.rstrip()}\n{fence}"
        case Plot(path, title):
            return f"![{title}]({path})"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def to_html(blocks: Sequence[Block], title: str) -> str:
    """The blocks as one HTML file that needs nothing else."""
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _td(cell: str) -> str:
    """A cell; a short one stays on its line, a value and its interval may be on two."""
    if parts := VALUE_AND_MORE.fullmatch(cell):
        spans = (f'<span class="s">{html.escape(part)}</span>' for part in parts.groups())
        return f"<td>{' '.join(spans)}</td>"
    kind = "s" if len(cell) <= SHORT_CELL else "l"
    return f'<td class="{kind}">{_marked(cell)}</td>'


def _marked(text: str) -> str:
    """Escaped, with what stands in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _html(block: Block) -> str:
    safe: Callable[[str], str] = html.escape
    match block:
        case Heading(text, level):
            return f"<h{level}>{safe(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_marked(text)}</p>"
        case Table(header, rows):
            head = "".join(f"<th>{safe(cell)}</th>" for cell in header)
            lines = ["<tr>" + "".join(_td(cell) for cell in row) + "</tr>" for row in rows]
            # of two columns the second may need the width of a phone
            names = ' class="q"' if len(header) == 2 else ""
            return f"<table{names}>\n<tr>{head}</tr>\n" + "\n".join(lines) + "\n</table>"
        case Listing(text):
            return f"<pre>{safe(text.rstrip())}</pre>"
        case Plot(_, title, svg, _):
            # what comes before <svg is an XML header that HTML does not allow inside
            return f'<figure aria-label="{safe(title)}">{svg[svg.index("<svg") :]}</figure>'
