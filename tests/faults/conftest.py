"""One undisturbed run, which all drills are compared with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from support.tiny_task import config_over, prepare_store

from scripts.faults import drills
from scripts.faults.watched import Drill


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the tiny language that drills may break."""
    return Path(
        shutil.copytree(prepare_store(tmp_path_factory.mktemp("tiny")), tmp_path_factory.mktemp("broken") / "store")
    )


@pytest.fixture(scope="session")
def against(store: Path, tmp_path_factory: pytest.TempPathFactory) -> drills.Against:
    folder = tmp_path_factory.mktemp("drills")
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(config_over(store), sort_keys=False), encoding="utf-8")
    # A busy machine is no failure here; the script has the real bound
    return drills.Against(Drill(config, folder / "runs", (), steps=40, every=8, timeout_s=12, slack_s=20))
