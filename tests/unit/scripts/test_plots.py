"""Pictures: the same bytes for the same data, and nothing is left of a picture that could not be drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from plots import svg_figure


def draw(path: Path, values: list[float]) -> bytes:
    with svg_figure(path, (3, 2), columns=2, sharey=True) as axes:
        assert axes.shape == (1, 2)
        axes[0, 0].plot(values, label="a line")
        axes[0, 1].bar([0, 1], values, hatch="//")
        axes[0, 0].legend()
    return path.read_bytes()


def test_the_same_data_is_the_same_file(tmp_path: Path) -> None:
    first = draw(tmp_path / "new folder" / "a.svg", [1.0, 2.0])
    assert first == draw(tmp_path / "b.svg", [1.0, 2.0])
    assert first != draw(tmp_path / "c.svg", [1.0, 3.0])
    assert b">a line<" in first, "text is text"


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), svg_figure(tmp_path / "a.svg", (3, 2)):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
