"""One HTML file of runs: their table and their curves, that opens without a server or a network."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .compare import Record, comparison, comparison_rows
from .files import write_text
from .plots import COLORS, figure_of

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1c2330; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .9rem; text-align: right; border-bottom: 1px solid #dde3ec; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; }
.mark { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .4em; }
svg { width: 100%; height: auto; }
"""


def write_page(records: Sequence[Record], path: str | Path) -> None:
    """Write the table and the curves of runs into one HTML file, aside then renamed.

    Args:
        records: the runs, as :func:`adazeta.compare.read_records` returns them.
        path: the HTML file.

    Raises:
        UserError: the runs hold nothing to draw, or the file cannot be written.
    """
    head, *rows = comparison_rows(comparison(records))
    marks = "".join(
        f'<th><span class="mark" style="background:{COLORS[index % len(COLORS)]}"></span>{escape(name)}</th>'
        for index, name in enumerate(head[1:])
    )
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    title = escape(", ".join(record.name for record in records))
    write_text(
        path,
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f'<div class="scroll"><table>\n<tr><th></th>{marks}</tr>\n{body}\n</table></div>\n{_svg(records)}\n'
        "</body>\n</html>\n",
    )


def _svg(records: Sequence[Record]) -> str:
    """Return the curves as an ``<svg>`` element, with text as text."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "adazeta"}):
        figure_of(records).savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
