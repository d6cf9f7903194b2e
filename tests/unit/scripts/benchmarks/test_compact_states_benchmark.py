"""The benchmark of moments in few bits, on a tiny shape."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bert_fast.hardware import cpu_name
from scripts.benchmarks import compact_states
from scripts.benchmarks.optimizers import state_bytes

TINY = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 12, "vocab_size": 20}


def test_it_measures_ours_where_torchao_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(compact_states.SETS, "small", TINY)
    record, threads = tmp_path / "compact.json", torch.get_num_threads()
    arguments = ["--sets", "small", "--threads", "1", "--repeats", "2", "--steps", "12", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["compact_states", *arguments, "--json", str(record)])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "to be put back")
    try:
        assert compact_states.main() == 0
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert shown.count("pip install -c constraints.txt torchao") == 1
    written = json.loads(record.read_text(encoding="utf-8"))
    assert written["environment"]["cpu"] == cpu_name()
    metrics = written["metrics"]
    assert not any("torchao" in name for name in metrics)
    for name in ("adamw_foreach", "ours_bf16", "ours_int8", "ours_int4"):
        assert metrics[f"ratio_to_adamw/small/1/{name}"] > 0
        assert metrics[f"loss_over_adamw_least/{name}"] <= metrics[f"loss_over_adamw_most/{name}"]
        assert len(written["samples"]["small/1"][name]["adamw"]) == 2
        assert len(written["samples"]["losses"][name]) == 2
    assert metrics["way_error/adamw_foreach"] < 1e-4
    assert 1e-4 < metrics["way_error/ours_bf16"] < metrics["way_error/ours_int8"] < metrics["way_error/ours_int4"] < 1
    held = [metrics[f"state_bytes_per_parameter/small/{name}"] for name in ("adamw", "ours_bf16")]
    assert held[0] > 1.5 * held[1] > 6


def test_training_learns_what_follows() -> None:
    """The accuracy compares losses that are far from a guess."""
    assert compact_states.trained_loss("adamw", 100, 0) < 0.6 * torch.log(torch.tensor(1024.0)).item()


def test_all_tensors_of_a_tensor_count() -> None:
    optim = pytest.importorskip("torchao.optim.subclass_8bit")
    state = {"exp_avg": optim.OptimState8bit.zeros((64, 64), True, 256), "step": torch.zeros(())}
    assert state_bytes({"weight": state}) == 64 * 64 + 4 * 16 + 4 * 256 + 4  # codes, scales, the table, a count
