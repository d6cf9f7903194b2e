"""fit_memory and memory_poc as a person starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.tiny_task import config_over
from support.training_run import ROOT


def start(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture
def config_file(tiny_store: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config_over(tiny_store)), encoding="utf-8")
    return path


def test_what_fits_is_printed_and_written_for_a_later_run(config_file: Path, tmp_path: Path) -> None:
    fragment = tmp_path / "fragment.yaml"
    done = start("fit_memory.py", "--config", config_file, "--gpus", "20MiB", "--out", fragment)
    assert done.returncode == 0, done.stderr
    assert "optimal" in done.stdout
    assert yaml.safe_load(fragment.read_text(encoding="utf-8"))["memory"]["recompute"] == "budget"
    printed = start("fit_memory.py", "--config", config_file, "--gpus", "20MiB", "--as-overrides")
    assert "memory.recompute=budget" in printed.stdout.split()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "24 gallons"], "'24 gallons' is not a size of memory"),
        pytest.param(["--gpus", "24GiB", "--reserve", "1"], "--reserve=1 leaves nothing", marks=pytest.mark.slow),
        pytest.param(["--gpus", "0.1MiB"], "memory.budget_gib=", marks=pytest.mark.slow),
        pytest.param(["--gpus", "1GiB", "model.num_heads=3"], "model.num_heads=3", marks=pytest.mark.slow),
    ],
)
def test_bad_input_is_one_line(config_file: Path, arguments: list[str], said: str) -> None:
    done = start("fit_memory.py", "--config", config_file, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout


@pytest.mark.slow
@pytest.mark.slow
def test_the_proof_of_concept_measures_every_switch_on_one_page(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "poc"
    done = start(
        "memory_poc.py", "--config", config_file, "--steps", "3", "--budget", "1GiB", "--price-per-hour", "2", "--out", out,
        "communication.clip=global_after_reduce",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    record = json.loads((out / "memory.json").read_text(encoding="utf-8"))
    assert record["metrics"]["combinations_failed"] == 0
    assert record["metrics"]["combinations_passed"] > 12
    assert record["metrics"]["combinations_refused"] >= 2  # nothing is offloaded on a CPU
    names = {row["name"] for row in record["samples"]["rows"]}
    assert {"recompute optimal", "fsdp", "release gradients", "moments in int8", "fastest in 1 GiB"} <= names
    for page in ("memory.md", "memory.html"):
        text = (out / page).read_text(encoding="utf-8")
        assert "Recommended" in text
        assert "activations on the host" in text
