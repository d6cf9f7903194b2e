"""Every config in configs/ loads, plans and lays out its buckets; every data recipe is one that its script knows."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from support.paths import ROOT

from bert_fast.config.load import load_config
from bert_fast.memory.state import num_parameters
from bert_fast.mlperf.rules import check_division
from bert_fast.train.setup.dry_run import dry_run

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RECIPES = sorted((ROOT / "configs" / "data").glob("*.yaml"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_are_configs() -> None:
    published = {f"bert_large_{point}.yaml" for point in (
        "8xa100_lamb", "64xa100_lamb", "1024xa100_lamb", "4096xa100_lamb", "8xh100_lamb", "1024xa100_adam", "1368xa100_adam"
    )}  # fmt: skip
    assert {"mini_cpu.yaml", "mini_start.yaml", *published} <= {path.name for path in CONFIGS}
    assert RECIPES


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_a_closed_config_keeps_the_closed_rules(path: Path) -> None:
    config = load_config(path)
    assert (config.mlperf.division == "closed") == path.stem.endswith("_lamb")
    check_division(config)


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_config_loads_and_dry_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(path)
    monkeypatch.chdir(tmp_path)  # no data here: the dry run must make up lengths
    monkeypatch.setenv("COLUMNS", "400")
    dry_run(config)
    printed = capsys.readouterr().out
    world = config.system.world_size
    assert f"a step of rank {world - 1:,} of {world:,} with" in printed, "rehearsed with a fake group of the whole size"
    for part in (
        "memory of a rank",
        "MiB",
        "plan",
        "imbalance mean",
        "no plan of these samples is below",
        "buckets",
        "whole gradients or groups" if config.communication.bucket_mb == "auto" else "MiB in ready order",
        "clip groups",
    ):
        assert part in printed, part
    batch = config.batch
    factors = f"{batch.micro_batch_size} x {config.system.world_size:,} ranks x {batch.gradient_accumulation_steps}"
    assert f"{batch.global_batch_size:,} = {factors}" in printed
    assert f"{num_parameters(config.model):,} parameters" in printed
    assert "lengths as in MLPerf's Wikipedia" in printed
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_config_says_its_command_on_top(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    head = lines[: next(n for n, line in enumerate(lines) if not line.startswith("#"))]
    assert any(relative(path) in line for line in head)


def test_dry_run_reads_the_lengths_of_a_store(
    make_config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    config = make_config()
    dry_run(config)
    assert f"samples of {config.data.train}" in capsys.readouterr().out


@functools.cache
def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", RECIPES, ids=relative)
def test_recipe_is_understood(path: Path) -> None:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    program = script("prepare_pairs" if "source" in values else "prepare_data")
    parsed = vars(program.parse(["--recipe", str(path), "--seed", "7"]))
    for name, value in values.items():
        assert parsed[name] == (7 if name == "seed" else value), name
