"""What a report is made of, before it is written as HTML or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Rows of texts under their headers; the first column names the row, the others are numbers unless `is_text`."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    is_text: bool = False


@dataclass(frozen=True)
class Chart:
    """A drawing, as HTML; Markdown goes without it."""

    title: str
    drawing: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the report: sentences, then charts, then tables."""

    title: str
    sentences: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = field(default_factory=list)


def amount(value: float | None) -> str:
    """Samples or seconds, for a cell."""
    if value is None:
        return NO_VALUE
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def setting(value: object) -> str:
    """A value of a point, for a cell."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


NO_VALUE = "–"
