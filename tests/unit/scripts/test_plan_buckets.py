"""scripts/plan_buckets.py: figures by name, the fragment for a config, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT

TRACE = {
    "units": [
        {"name": "heads", "ready_s": 0.001, "bytes": 2_000_000},
        {"name": "layers.1", "ready_s": 0.004, "bytes": 8_000_000},
        {"name": "layers.0", "ready_s": 0.007, "bytes": 8_000_000},
        {"name": "embeddings", "ready_s": 0.0071, "bytes": 4_000_000},
    ],
    "link": {"latency_s": 0.0005, "bytes_per_s": 4e9},
}


def plan(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/plan_buckets.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_figures_picture_and_fragment(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text(json.dumps(TRACE), encoding="utf-8")
    done = plan("--trace", tmp_path / "trace.json", "--out", tmp_path / "out", "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["metrics"]
    finish = {name: metrics[f"finish_ms/{name}"] for name in ("auto", "25mib", "one_bucket", "best_uniform", "mg_wfbp")}
    assert min(finish.values()) == finish["auto"]
    assert metrics["plan_ms"] > 0
    assert metrics["exact_over_best_other"] <= 1.0
    assert finish["one_bucket"] == pytest.approx(7.1 + 0.5 + 5.5)
    sizes = yaml.safe_load((tmp_path / "out/buckets.yaml").read_text(encoding="utf-8"))["communication"]["bucket_mb"]
    assert sum(sizes) * 2**20 == pytest.approx(22e6)
    assert (tmp_path / "out/timeline.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_bert_large_by_tensor_is_planned_in_time(tmp_path: Path) -> None:
    """The time itself is the benchmark's; here, that the figure is there and the table names its rows."""
    done = plan(
        "--model", "large", "--tensors", "--backward-ms", "9", "--link", "0.5,40000", "--json", tmp_path / "a.json"
    )
    assert done.returncode == 0, done.stderr
    assert "mg_wfbp" in done.stdout
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["metrics"]["exact_over_best_other"] < 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"units": []}, "must be numbers"),
        ({"units": [{"name": "a", "ready_s": 0.1, "bytes": -1}]}, "bytes positive"),
        ({"link": {"latency_s": -1, "bytes_per_s": 1e9}}, "latency"),
        ({"link": {"latency_s": 0, "bytes_per_s": 1e9, "sizes": [1, 2], "seconds": [0.1]}}, "as many seconds as sizes"),
        ({"link": None}, "no link"),
    ],
)
def test_bad_traces_get_one_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    (tmp_path / "trace.json").write_text(json.dumps({**TRACE, **change}), encoding="utf-8")
    done = plan("--trace", tmp_path / "trace.json")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
