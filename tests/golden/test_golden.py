"""The golden loss curves. A change that is not meant to move numerics leaves them as they are; one that is runs
`python tests/golden/regenerate.py` and says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import regenerate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden")
    regenerate.write_store(path)
    return path


@pytest.fixture(scope="module")
def golden() -> dict[str, list[float]]:
    curves: dict[str, list[float]] = json.loads(regenerate.FILE.read_text(encoding="utf-8"))
    return curves


def test_the_file_holds_every_curve(golden: dict[str, list[float]]) -> None:
    assert list(golden) == list(regenerate.CURVES)
    for curve in golden.values():
        assert len(curve) == regenerate.STEPS
        assert sum(curve[-10:]) < sum(curve[:10]), "the tiny runs learn"


@pytest.mark.parametrize("name", regenerate.CURVES)
def test_losses_are_the_golden_ones(name: str, folder: Path, golden: dict[str, list[float]]) -> None:
    found = regenerate.losses(regenerate.CURVES[name], folder)
    first = next(
        (
            step
            for step, (a, b) in enumerate(zip(found, golden[name], strict=True))
            if abs(a - b) > regenerate.TOLERANCE * b
        ),
        None,
    )
    assert first is None, (
        f"first differs at step {first}: {found[first]:.9g}, golden {golden[name][first]:.9g}; if that is meant, run "
        "python tests/golden/regenerate.py and say why in the commit"
    )


def test_an_equal_run_is_bit_identical(folder: Path) -> None:
    name = next(iter(regenerate.CURVES))
    assert regenerate.losses(regenerate.CURVES[name], folder) == regenerate.losses(regenerate.CURVES[name], folder)
