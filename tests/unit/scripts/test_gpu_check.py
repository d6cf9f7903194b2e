"""scripts/gpu_check.py: every stage in its tiny form on this CPU, and a runner that no stage can bring down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_check
import numpy as np
import pytest
import torch
from support import gpu_check_stages  # noqa: F401 (found by the stages' processes too)
from support.paths import ROOT

from benchmarks.step.setting import make_config
from bert_fast.communication.plan import Link
from bert_fast.model.attention import Backend, rectangles
from gpu import attention, step
from gpu.link import ModelledLink
from gpu.stage import CheckFailed, Context, NotAvailable, Stage

NO_DEVICE = {"tests", "energy"}  # have nothing to do on a CPU without counters


@pytest.mark.slow  # a minute and a half: every stage is a process of its own, some of them compile
@pytest.mark.timeout(1200)  # starts twenty processes; a busy machine is slow at that
def test_every_stage_passes_on_this_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/gpu_check.py", "--device", "cpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    whole = json.loads((tmp_path / "out" / "gpu_check.json").read_text(encoding="utf-8"))
    assert list(whole["stages"]) == list(gpu_check.STAGES)
    for name, record in whole["stages"].items():
        expected = ("passed", "not available") if name in NO_DEVICE else ("passed",)
        assert record["status"] in expected, (name, record["why"])
        assert whole["metrics"][f"stages/{name}/passed"] == (record["status"] == "passed")
        assert whole["metrics"][f"stages/{name}/seconds"] > 0
    assert done.returncode == 0, done.stderr
    for figure in ("mfu/large/ours_best", "ratio/large/ours_over_hf_default", "ratio/large/ours_over_hf_best"):
        assert whole["metrics"][figure] > 0
    for link in ("0.5x", "1x", "2x"):
        for variant in ("auto", "25mib", "one_bucket", "ddp"):
            assert np.isfinite(whole["metrics"][f"hidden_share/{link}/{variant}"])
            assert -1e-9 <= whole["metrics"][f"predicted_share/{link}/{variant}"] <= 1
    assert whole["metrics"]["two_ranks/right"] == whole["metrics"]["two_ranks/total"]
    assert whole["metrics"]["synchronization/quiet"] == whole["metrics"]["synchronization/total"]
    assert (tmp_path / "out" / "trace.json").is_file()
    assert (tmp_path / "out" / "tests.xml").is_file()


# ---- the runner -----------------------------------------------------------------------------------------------------


def arguments(tmp_path: Path, *more: str) -> list[str]:
    return ["--device", "cpu", "--out", str(tmp_path / "out"), *more]


@pytest.fixture
def bad_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("crashes", "hangs", "raises", "lacks", "fails a case", "works")
    limits = dict.fromkeys(kinds, 60.0) | {"hangs": 3.0 / gpu_check.CPU_LIMIT_FACTOR}
    stages = {kind: Stage("support.gpu_check_stages", limits[kind], kind, {"how": kind}) for kind in kinds}
    monkeypatch.setattr(gpu_check, "STAGES", stages)


def check(arguments: list[str]) -> int:
    return gpu_check.check(gpu_check.build_parser().parse_args(arguments))


def read(tmp_path: Path) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads((tmp_path / "out" / "gpu_check.json").read_text(encoding="utf-8"))
    return whole


def test_a_stage_that_goes_wrong_costs_that_stage_only(bad_stages: None, tmp_path: Path, capsys: Any) -> None:
    assert check(arguments(tmp_path)) == 1
    stages = read(tmp_path)["stages"]
    assert {name: record["status"] for name, record in stages.items()} == {
        "crashes": "failed", "hangs": "failed", "raises": "failed", "lacks": "not available", "fails a case": "failed",
        "works": "passed",
    }  # fmt: skip
    assert "SIGSEGV" in stages["crashes"]["why"]
    assert "3 s, its limit" in stages["hangs"]["why"]
    assert stages["hangs"]["metrics"] == {"begun": 1}, "what a stage had found is kept"
    assert stages["raises"]["why"] == "the first line"
    assert stages["lacks"]["why"] == "no such card"
    assert stages["fails a case"]["why"] == "wrong: 7 for 8"
    assert stages["works"]["left_out"] == ["lacking: no such kernel"]
    assert stages["works"]["summary"] == "42"
    child = int((tmp_path / "out" / "child").read_text(encoding="ascii"))
    status = Path(f"/proc/{child}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z", "what a stage started is ended with it"
    printed = capsys.readouterr().out
    assert all(name in printed for name in stages)


def test_resume_runs_what_failed_again_and_only_that(bad_stages: None, tmp_path: Path) -> None:
    assert check(arguments(tmp_path, "--only", "works,raises,lacks")) == 1
    before = (tmp_path / "out" / "works.json").stat().st_mtime_ns
    failed = (tmp_path / "out" / "raises.json").stat().st_mtime_ns
    assert check(arguments(tmp_path, "--only", "works,raises,lacks", "--resume")) == 1
    assert (tmp_path / "out" / "works.json").stat().st_mtime_ns == before
    assert (tmp_path / "out" / "raises.json").stat().st_mtime_ns > failed
    assert list(read(tmp_path)["stages"]) == ["raises", "lacks", "works"]


def test_without_time_left_a_stage_is_not_begun(bad_stages: None, tmp_path: Path) -> None:
    assert check(arguments(tmp_path, "--only", "works", "--budget-s", "1")) == 0
    assert read(tmp_path)["stages"]["works"]["status"] == "no time left"


def test_names_and_devices_that_are_none_are_one_line(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    for wrong in (["--only", "nonsense"], ["--skip", "run,nonsense"]):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments(tmp_path, *wrong)])
        assert gpu_check.main() == 2
        assert capsys.readouterr().err.startswith("error: no stage 'nonsense'; known: environment, run")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "out")])
    assert gpu_check.main() == 2
    assert "--device cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "environment.json").write_text("mine", encoding="utf-8")
    with pytest.raises(gpu_check.UserError, match=r"not a GPU check's .*\(environment\.json\)"):
        check(arguments(tmp_path))
    assert (tmp_path / "out" / "environment.json").read_text(encoding="utf-8") == "mine"


def test_the_list_names_every_stage(capsys: Any) -> None:
    assert check(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(gpu_check.STAGES)


def test_records_become_a_section_of_a_page(bad_stages: None, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{gpu_check.BEGIN}\nold\n{gpu_check.END}\nafter\n", encoding="utf-8")
    check(arguments(tmp_path, "--only", "works"))
    assert check(arguments(tmp_path, "--markdown", str(page))) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| works" in text
    assert "- works: lacking: no such kernel" in text
    page.write_text("no marks\n", encoding="utf-8")
    with pytest.raises(gpu_check.UserError, match="no lines"):
        check(arguments(tmp_path, "--markdown", str(page)))


def test_goals_are_judged_on_a_gpu_alone() -> None:
    record = {"status": "passed", "metrics": {"mfu/large/ours_best": 0.5, "memory_estimate_error": -0.04}}
    parser = gpu_check.build_parser()
    on_gpu = gpu_check.summarize({"step_large": record}, parser.parse_args([]), {})["goals"]
    assert on_gpu["mfu/large/ours_best"]["met"] is False
    assert on_gpu["memory_estimate_error"]["met"] is True
    assert gpu_check.summarize({"step_large": record}, parser.parse_args(["--device", "cpu"]), {})["goals"] == {}


# ---- what stages check ----------------------------------------------------------------------------------------------


def test_an_attention_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = attention.make_case([5, 17, 33], 2, torch.float32, "cpu")
    device = torch.device("cpu")
    right = rectangles.GROUPED
    attention.check_agreement(case, "grouped", torch.float32, device)
    attention.check_dropout(case, "grouped", torch.float32, device, 12)
    monkeypatch.setattr(rectangles, "GROUPED", Backend(lambda qkv, layout, p: 1.001 * right(qkv, layout, p)))
    with pytest.raises(CheckFailed, match="off the loop"):
        attention.check_agreement(case, "grouped", torch.float32, device)
    monkeypatch.setattr(rectangles, "GROUPED", Backend(lambda qkv, layout, p: right(qkv, layout, 0.0)))
    with pytest.raises(CheckFailed, match="nothing is dropped"):
        attention.check_dropout(case, "grouped", torch.float32, device, 12)
    monkeypatch.setattr(rectangles, "GROUPED", Backend(lambda qkv, layout, p: 1.1 * right(qkv, layout, p)))
    with pytest.raises(CheckFailed, match="mean of"):
        attention.check_dropout(case, "grouped", torch.float32, device, 12)

    class Redrawn(torch.autograd.Function):
        """Backward with another draw than forward."""

        @staticmethod
        def forward(ctx: Any, qkv: torch.Tensor, layout: Any, p: float) -> torch.Tensor:
            ctx.save_for_backward(qkv)
            ctx.rest = (layout, p)
            return right(qkv, layout, p)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
            qkv = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                out = right(qkv, *ctx.rest)
            return torch.autograd.grad(out, qkv, grad)[0], None, None

    monkeypatch.setattr(rectangles, "GROUPED", Backend(Redrawn.apply))
    with pytest.raises(CheckFailed, match="other weights than forward"):
        attention.check_dropout(case, "grouped", torch.float32, device, 12)
    with pytest.raises(NotAvailable, match="CUDA"):
        attention.check_agreement(case, "varlen", torch.float32, device)


def test_collectives_of_a_modelled_link_queue_up() -> None:
    import time

    link = ModelledLink("cpu")
    link.link = Link(0.01, 1e6)
    start = time.perf_counter()
    first, second = link.start(10_000), link.start(10_000)
    first.wait()
    between = time.perf_counter() - start
    second.wait()
    end = time.perf_counter() - start
    assert between >= 0.02
    assert end >= 0.04
    buffer = torch.ones(2500)
    assert link.future(buffer).wait() is buffer
    assert time.perf_counter() - start >= 0.06


def test_every_peer_gets_the_same_samples(tmp_path: Path) -> None:
    context = Context("cpu", tmp_path, tmp_path, 0.0)
    config = make_config(step.arguments(context, "large", 56), "fp32")
    drawn, grouped, packed = (step.batches_of(config, step.PEERS[name]) for name in ("ours", "hf_best", "ours_graphs"))
    lengths = [
        sorted(n for batch in batches for n in step.sample_lengths(batch).tolist()) for batches in (drawn, grouped)
    ]
    assert lengths[0] == lengths[1]
    spread = [sum(max(b.lengths) - min(b.lengths) for b in batches) for batches in (drawn, grouped)]
    assert spread[1] < spread[0]
    assert len({batch.num_tokens for batch in packed}) == 1, "one shape"
    assert sum(len(step.sample_lengths(batch)) for batch in packed) == len(lengths[0])
