"""The optimizers' benchmark on a tiny shape."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bert_fast.config import ModelConfig
from bert_fast.errors import UserError
from bert_fast.hardware import cpu_name
from bert_fast.optim.build import RunOptimizer
from bert_fast.parts import parts_of
from scripts.benchmarks import optimizers

TINY = ModelConfig(vocab_size=20, hidden_size=8, num_layers=3, num_heads=2, intermediate_size=12, max_positions=8)


def test_weights_are_those_of_the_model() -> None:
    parameters = optimizers.random_parameters(TINY)
    assert parts_of(parameters["layers.2.qkv.weight"]) == (8, 8, 8)
    assert all(parameter.grad is not None for parameter in parameters.values())


def test_each_is_stepped_as_often_as_adamw_and_first_in_every_other_round(monkeypatch: pytest.MonkeyPatch) -> None:
    stepped: list[str] = []

    def note(optimizer: RunOptimizer) -> float:
        optimizer.step()
        stepped.append(type(optimizer).__name__)
        return float(len(stepped))

    monkeypatch.setattr(optimizers, "step_seconds", note)
    found = optimizers.compare({"name": "lamb"}, optimizers.random_parameters(TINY), repeats=3)
    assert stepped == ["AdamW", "Lamb", "Lamb", "AdamW", "AdamW", "Lamb", "Lamb", "AdamW", "AdamW", "Lamb"]
    assert found["seconds"] == {"adamw": [5.0, 8.0, 9.0], "other": [6.0, 7.0, 10.0]}, (
        "two rounds of warm-up do not count"
    )
    metrics = optimizers.metrics_of({"lamb_tensor": found}, 10)
    assert metrics["ratio_to_adamw/lamb_tensor"] == 10 / 9
    assert metrics["step_ms/adamw"] == 8000.0


def test_it_writes_a_figure_for_every_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = optimizers.make_optimizer

    def without_lion(settings: dict[str, object], parameters: dict[str, object]) -> object:
        if settings.get("class_name") == "Lion":
            raise UserError("the package is not installed")
        return real(settings, parameters)  # type: ignore[arg-type]

    monkeypatch.setattr(optimizers, "SHAPES", {"large": TINY})
    monkeypatch.setattr(optimizers, "make_optimizer", without_lion)
    record, only = tmp_path / "steps.json", ["--optimizers", "lamb_global", "muon", "lion"]
    monkeypatch.setattr(sys, "argv", ["optimizers", "--layers", "2", "--repeats", "3", "--json", str(record), *only])
    assert optimizers.main() == 0
    shown = capsys.readouterr().out
    assert "lion is left out: the package is not installed" in shown
    assert cpu_name() in shown
    written = json.loads(record.read_text(encoding="utf-8"))
    metrics = written["metrics"]
    for name in ("adamw", "lamb_global", "muon"):
        assert metrics[f"step_ms/{name}"] > 0
        assert metrics[f"mean_step_ms/{name}"] > 0
    assert metrics["state_bytes_per_parameter/adamw"] == pytest.approx(8.0, abs=0.2)  # and a count for each tensor
    assert 4 < metrics["state_bytes_per_parameter/muon"] < metrics["state_bytes_per_parameter/adamw"]
    assert "step_ms/lion" not in metrics
    assert written["config"]["layers"] == 2
    assert len(written["samples"]["muon"]["adamw"]) == 3
