"""The parts that our HTML pages share: the document around them, sections, tiles and tables. Pure.

A page needs nothing else, no script, no font, no picture from elsewhere, and forbids itself scripts and requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_trainer.data.page_style import STYLE
from finetune_trainer.data.plots import escape

if TYPE_CHECKING:
    from collections.abc import Sequence


def build_document(title: str, heading: str, subtitle: str, sections: Sequence[str], style: str = "") -> str:
    """Return a whole page. `subtitle` and the sections are HTML; empty sections are left out."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{STYLE}{style}</style>'
        f"</head>\n<body><main><header><h1>{escape(heading)}</h1><p>{subtitle}</p></header>\n"
        f"{''.join(section for section in sections if section)}</main></body></html>\n"
    )


def build_section(title: str, *parts: str) -> str:
    """Return a section; the parts are HTML."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>\n"


def build_tile(label: str, value: str, aside: str = "") -> str:
    """Return one figure for a row of tiles; all three are texts."""
    small = f"<small>{escape(aside)}</small>" if aside else ""
    return f"<div><b>{escape(value)}</b><span>{escape(label)}{small}</span></div>"


def build_table(names: Sequence[str], lines: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """Return a table of texts; the columns in `numeric` stand to the right."""

    def cell(tag: str, index: int, text: str) -> str:
        kind = ' class="number"' if index in numeric else ""
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    head = "".join(cell("th", index, name) for index, name in enumerate(names))
    body = "".join(
        "<tr>" + "".join(cell("td", index, text) for index, text in enumerate(line)) + "</tr>" for line in lines
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
