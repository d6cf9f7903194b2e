"""The step benchmark: every variant computes the same loss, figures have their names, shares add up."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.paths import ROOT

from scripts.benchmarks.step.breakdown import PARTS, profile
from scripts.benchmarks.step.measure import data_seconds
from scripts.benchmarks.step.setting import MIXES, make_batch, make_config
from scripts.benchmarks.step.variants import VARIANTS, huggingface, ours


def arguments(**changes: object) -> argparse.Namespace:
    values = {
        "size": "mini",
        "mix": "wikipedia",
        "batch": 4,
        "layers": 1,
        "dropout": 0.0,
        "threads": 1,
        "device": "cpu",
    }
    return argparse.Namespace(**{**values, **changes})


@pytest.mark.parametrize("mix", MIXES)
def test_batches_are_the_same_for_the_same_seed_and_fit(mix: str) -> None:
    config = make_config(arguments(mix=mix), "fp32")
    one, two = make_batch(config, mix), make_batch(config, mix)
    assert one.lengths == two.lengths == sorted(one.lengths, reverse=True)
    assert (one.input_ids == two.input_ids).all()
    assert max(one.lengths) <= config.data.max_seq_len
    assert (mix == "wikipedia") == (len(set(one.lengths)) > 1)


def test_the_peers_see_the_same_masked_tokens() -> None:
    """Both forms of transformers have the loss of random weights over the same labels: near the log of the vocabulary."""
    for masked_longest in (False, True):
        step = huggingface(arguments(), "fp32", masked_longest=masked_longest)
        loss = step().item()
        assert loss == pytest.approx(torch.tensor(2048.0).log().item() + torch.tensor(2.0).log().item(), abs=0.5)
    batch = make_batch(make_config(arguments(), "fp32"), "wikipedia")
    assert ours(arguments(), "fp32", allocator=False)().item() / len(batch.masked_labels) == pytest.approx(7.6, abs=0.5)


def test_the_variants_of_ours_differ_in_time_only() -> None:
    losses = {
        name: VARIANTS[name](arguments(), "fp32")().item()
        for name in ("ours", "plain_pieces", "sdpa_groups", "sdpa_loop", "every_shape_anew")
    }
    assert max(losses.values()) == pytest.approx(min(losses.values()), rel=1e-5)


def test_the_breakdown_adds_up_and_the_data_path_is_measured() -> None:
    shares, _ = profile(arguments(dropout=0.1), "fp32")
    assert set(shares) == set(PARTS)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert min(shares["attention"], shares["GEMMs"], shares["head"], shares["optimizer"], shares["embedding"]) > 0
    assert 0 < data_seconds(arguments(), "fp32", steps=3) < 1


@pytest.mark.slow
def test_the_command_writes_figures_by_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks.step", "--size", "mini", "--quick", "--json", str(tmp_path / "a.json"),
         "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=280, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "a.json").read_text())["metrics"]
    for name in (
        "mini/bf16/ours/tokens_per_s", "mini/fp32/hf_default/mfu", "mini/fp32/hf_masked_longest/peak_mib",
        "ceiling_tflops/bf16", "ratio/mini/fp32/ours_over_hf_default", "ratio/mini/bf16/ours_over_hf_masked_longest",
        "data_share",
    ):  # fmt: skip
        assert metrics[name] > 0, name
    assert (tmp_path / "mini-wikipedia.svg").is_file()


@pytest.mark.slow
def test_profile_step_writes_a_trace_and_a_table(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/profile_step.py"), "--size", "mini", "--layers", "1", "--batch", "4", "--out",
         str(tmp_path)],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert "aten::" in (tmp_path / "top.md").read_text()


def test_an_unknown_variant_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks.step", "--variants", "faster"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no variant faster; known: ours, hf_default")
