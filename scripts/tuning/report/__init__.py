"""The report of a search: tune.json, report.md, and report.html with the charts."""

from __future__ import annotations

from pathlib import Path

from bert_fast.files import write_atomically
from bert_fast.report.bench import write_result

from ..study_file import Study
from .loading import read_records
from .render import html, markdown
from .sections import sections_of
from .summary import record

RECORD, MARKDOWN, PAGE = "tune.json", "report.md", "report.html"


def write_report(study: Study, folder: Path) -> None:
    """Write the report of what was searched so far into the search's own folder.

    Raises:
        UserError: optuna is not installed, there is no journal in the folder, or a file is damaged.
    """
    records = read_records(study, folder)
    write_result(folder / RECORD, **record(records))
    title, sections = f"Search {study.file.name}", sections_of(records)
    write_atomically(folder / MARKDOWN, markdown(title, sections))
    write_atomically(folder / PAGE, html(title, sections))
