"""The overlap benchmarks: metrics by name, predictions of simple cases, and what they say where they cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.paths import ROOT

from bert_fast.communication.plan import Link
from scripts.benchmarks.overlap.prediction import lower_bound, predict
from scripts.benchmarks.overlap.report import NAMES, metrics_of, table_of
from scripts.benchmarks.overlap.variants import VARIANTS, Instance, Links
from scripts.benchmarks.overlap.waiting import BERT_NUMEL, units_of


def test_every_variant_has_its_name() -> None:
    assert tuple(VARIANTS) == NAMES


def test_hidden_share_and_exposed_time() -> None:
    samples = {"compute": [200.0], "communication": [100.0], "one_bucket": [300.0], "auto": [310.0, 210.0, 212.0]}
    record = {
        "samples": samples, "backward_ms": 120.0, "predicted_ms": {"auto": 200.0}, "bound_ms": {"auto": 211.0},
        "buckets": {"one_bucket": 1, "auto": 8},
    }  # fmt: skip
    by_variant = metrics_of(record)
    assert by_variant["one_bucket"] == {"step_ms": 300.0, "exposed_ms": 100.0, "hidden_share": 0.0}
    auto = by_variant["auto"]
    assert (auto["step_ms"], auto["exposed_ms"], auto["hidden_share"]) == (212.0, 12.0, pytest.approx(0.88))
    assert (auto["over_predicted"], auto["over_bound"]) == (pytest.approx(1.06), pytest.approx(212 / 211))
    assert "| auto" in table_of("title", record, by_variant)


def test_predictions_of_a_case_by_hand() -> None:
    """Two buckets of 1 s on the wire, full after 3 and 4 s; backward ends at 4, updates take 1 s more."""
    link = Link(0.0, 4.0)
    links = Links(link, Link(0.0, 8.0), Link(0.0, 8.0))
    host = {"left": [3.0, 4.0], "backward": 4.0, "end": 5.0}

    def cycle(name: str, **changes: object) -> float:
        instance = Instance(VARIANTS[name], lambda: None, None, [1, 1])
        return predict(instance, {**host, **changes}, links, [1.0, 1.0], 1.0)

    assert cycle("auto") == pytest.approx(4 + 1 + 1)
    assert cycle("auto_shadow") == pytest.approx(4 + 1 + 0.5), "the first bucket's update is over by then"
    # Forward needs the last bucket's weights at 0 and gets them at 0.5; the scatter of the last takes half a second.
    assert cycle("auto_sharded") == pytest.approx(0.5 + 4 + 0.5 + 1)
    assert cycle("auto_clip_global_before", left=[4.0, 4.0]) == pytest.approx(4 + 2 + 1)
    bound = lower_bound(Instance(VARIANTS["auto"], lambda: None, None, [1, 1]), host, links, [4.0, 4.0], [3.0, 4.0])
    assert bound == pytest.approx(6.0)


@pytest.mark.parametrize("model", ["layers", "base", "large"])
def test_units_of_a_model(model: str) -> None:
    units = units_of(model, 2.0)
    assert sum(unit.backward_s for unit in units) == pytest.approx(2.0)
    if model != "layers":
        assert [units[0].name, units[-1].name] == ["embeddings", "heads"]
        assert sum(unit.numel for unit in units) == pytest.approx(BERT_NUMEL, rel=1e-4)
        share = units[0].numel / sum(unit.numel for unit in units)
        assert share == pytest.approx({"base": 0.22, "large": 0.095}[model], abs=0.02), "the tied word embedding"


@pytest.mark.skipif(os.geteuid() != 0, reason="as root the next step is to make the hosts")
def test_without_iproute2_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.benchmarks.overlap", "--quick"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PATH": str(tmp_path)}, timeout=60, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr == "error: ip and tc are missing; install iproute2\n"


@pytest.mark.slow
def test_hook_benchmark_has_its_metrics(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.benchmarks.hooks", "--quick", "--json", str(tmp_path / "a.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["tensors"] == 392
    for engine in ("ours", "ddp"):
        assert np.isfinite(metrics[f"host_us_per_step/{engine}"])
    assert metrics["memory_mib/ours"] < metrics["memory_mib/plain"] + 0.5 * metrics["memory_mib/gradients"]
    assert metrics["memory_mib/copy"] > metrics["memory_mib/plain"] + 0.5 * metrics["memory_mib/gradients"]
