"""A report as one HTML page, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bert_fast.report.bench import markdown_table
from bert_fast.report.charts import figure
from bert_fast.report.html import document, section
from bert_fast.report.html_tables import number_table, text_table

from .parts import Section, Table


def html(title: str, sections: Sequence[Section]) -> str:
    """The whole page; it loads nothing."""
    header = f"<header><h1>{escape(title)}</h1></header>"
    return document(title, [header, *(section(escape(each.title), _content(each)) for each in sections)])


def _content(part: Section) -> str:
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in part.sentences)
    charts = "".join(figure(chart.title, chart.drawing, chart.caption) for chart in part.charts)
    grid = f'<div class="grid">{charts}</div>' if charts else ""
    return sentences + grid + "".join(map(_html_table, part.tables))


def _html_table(table: Table) -> str:
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    return title + (text_table if table.is_text else number_table)(table.headers, table.rows)


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The sentences and tables; the charts are on the page only."""
    return "\n\n".join([f"# {_plain(title)}", *(block for each in sections for block in _blocks(each))]) + "\n"


def _blocks(part: Section) -> list[str]:
    blocks = [f"## {_plain(part.title)}", *map(_plain, part.sentences)]
    for table in part.tables:
        if table.title:
            blocks.append(f"### {_plain(table.title)}")
        rows = [[_plain(cell) for cell in row] for row in table.rows]
        blocks.append(markdown_table([_plain(header) for header in table.headers], rows))
    return blocks


def _plain(text: str) -> str:
    """Text on one line in which nothing is markup."""
    shown = " ".join(text.split()).replace("\\", "\\\\").replace("<", "&lt;")
    for mark in "|*`[":
        shown = shown.replace(mark, f"\\{mark}")
    return shown
