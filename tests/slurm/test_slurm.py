"""The shipped batch script under a real Slurm of two nodes: both styles, requeue, a killed rank, scancel, submissions."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SETTINGS, STEPS, VARIABLES, SlurmJob
from mini_slurm import MiniSlurm
from support.training_run import ROOT, last_step, lines

from bert_fast.files import write_json
from bert_fast.mlperf.compliance import check_log

pytestmark = [pytest.mark.slurm]
Submit = Callable[..., SlurmJob]
STYLES = ("srun", "torchrun")


def events(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "result_0.txt").read_text(encoding="utf-8")
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in text.splitlines()]


def assert_same_run(job: SlurmJob, straight: SlurmJob) -> None:
    """Every step's loss and the last weights, to the bit."""
    expected = {line["step"]: (line["loss"], line["grad_norm"]) for line in lines(straight.folder)}
    found = {line["step"]: (line["loss"], line["grad_norm"]) for line in lines(job.folder)}
    assert list(expected) == list(range(1, STEPS + 1))
    assert found == expected
    assert job.weights() == straight.weights()


def assert_resumed(job: SlurmJob, times: int) -> None:
    keys = [event["key"] for event in events(job.folder)]
    assert keys.count("resumed") == times
    assert events(job.folder)[-1]["metadata"]["resumed"] is True
    assert job.record()["sessions"] == times + 1
    assert job.output.count("resumed from ") == times
    assert "not a valid timing" in job.record()["compliance"]["summary"]


def ranks_of(slurm: MiniSlurm) -> dict[str, int]:
    """Node -> pid of the rank that runs there."""
    found = {}
    for pid in slurm.processes():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        names = [Path(os.fsdecode(part)).name for part in command]
        if "srun" not in names and "-m" not in names and "run_pretraining.py" in names:
            found[next(v.removeprefix("SLURMD_NODENAME=") for v in variables if v.startswith("SLURMD_NODENAME="))] = pid
    return found


def test_a_run_of_srun_is_complete(straight: SlurmJob) -> None:
    verdict = check_log(straight.folder / "result_0.txt", "5.0.0")
    assert verdict.passed, verdict.text
    record = straight.record()
    assert record["status"] == "success"
    assert record["environment"]["world_size"] == 2
    assert record["metrics"]["compliance_passed"] == 1
    (start,) = straight.supervision()["starts"]
    (attempt,) = start["attempts"]
    assert (attempt["nodes"], attempt["outcome"], attempt["resumed"]) == (["node1", "node2"], "finished", False)
    assert "all 1 run(s) are finished" in straight.output


def test_seconds_from_sbatch_to_the_first_step(straight: SlurmJob) -> None:
    """Where the time goes, written to $BERT_FAST_SLURM_JSON if that is set."""
    (start,) = straight.supervision()["starts"]
    (attempt,) = start["attempts"]
    record = straight.record()
    run_start = next(event["time_ms"] for event in events(straight.folder) if event["key"] == "run_start") / 1e3
    first_step = run_start + record["metrics"]["first_step_s"]
    moments = {
        "job_start": start["batch_start"], "supervisor": start["supervisor_start"], "nodes_asked": attempt["nodes_asked"],
        "srun": attempt["srun_started"], "process_start": run_start - record["init_s"], "run_start": run_start,
        "first_step": first_step,
    }  # fmt: skip
    names, times = list(moments), list(moments.values())
    assert times == sorted(times)
    parts = dict(zip(names, (b - a for a, b in zip([straight.submitted, *times], times, strict=False)), strict=True))
    total = first_step - straight.submitted
    assert sum(parts.values()) == pytest.approx(total)
    path = os.environ.get("BERT_FAST_SLURM_JSON")
    if path:
        passed = check_log(straight.folder / "result_0.txt", "5.0.0").passed
        write_json(path, {"slurm_two_nodes_passed": int(passed), "sbatch_to_first_step_s": total, "parts": parts})


def test_ranks_of_both_nodes_take_part(submit: Submit, slurm: MiniSlurm, straight: SlurmJob) -> None:
    """And torchrun's ranks compute what srun's do."""
    job = submit("torchrun", STYLE="torchrun")
    job.wait_until_step(1)
    assert ranks_of(slurm).keys() == {"node1", "node2"}
    job.finish()
    assert check_log(job.folder / "result_0.txt", "5.0.0").passed
    assert_same_run(job, straight)


@pytest.mark.parametrize("style", STYLES)
def test_scontrol_requeue(submit: Submit, slurm: MiniSlurm, straight: SlurmJob, style: str) -> None:
    """Slurm takes the job back in the middle of training (SIGTERM to batch script and ranks) and starts it again."""
    job = submit("requeued", STYLE=style)
    job.wait_until_step(5)
    if style == "srun":
        assert ranks_of(slurm).keys() == {"node1", "node2"}
    slurm.command("scontrol", "requeue", job.id)
    job.finish()
    starts = job.supervision()["starts"]
    assert [s["attempts"][-1]["outcome"] for s in starts] == ["stopped", "finished"]
    assert slurm.job(job.id)["Restarts"] == "1"
    assert "not requeued by us" in job.output
    assert_resumed(job, 1)
    assert_same_run(job, straight)


@pytest.mark.parametrize("style", STYLES)
def test_usr1_makes_the_job_requeue_itself(submit: Submit, slurm: MiniSlurm, straight: SlurmJob, style: str) -> None:
    """What --signal=B:USR1@120 does to the batch script, and to it alone."""
    job = submit("signalled", STYLE=style)
    job.wait_until_step(5)
    slurm.command("scancel", "--batch", "--signal=USR1", job.id)
    job.finish()
    assert re.search(r"stopped by SIGUSR1 at step \d+, all ranks saved", job.output)
    assert f"job {job.id} requeued: SIGUSR1" in job.output
    assert slurm.job(job.id)["Restarts"] == "1"
    assert_resumed(job, 1)
    assert_same_run(job, straight)


@pytest.mark.slow  # Slurm signals when it likes
def test_the_time_limit_requeues(submit: Submit, slurm: MiniSlurm) -> None:
    """Slurm's own clock sends the signal of --signal: a job of one minute, signalled 10 to 40 s before its end.

    Slurm looks every 30 s, and signals 30 s early rather than too late: with more notice the signal could come before training.
    """
    options = ("--nodes=2", "--time=1", "--signal=B:USR1@10")
    job = submit("limited", "train.max_steps=100000", "schedule.total_steps=100000", options=options)
    job.wait_until(lambda: f"job {job.id} requeued: SIGUSR1" in job.output, timeout=80)
    assert re.search(r"stopped by SIGUSR1 at step \d+, all ranks saved", job.output)
    assert (job.folder / "stopped.json").is_file()


@pytest.mark.parametrize("style", STYLES)
def test_a_killed_rank_is_restarted(submit: Submit, slurm: MiniSlurm, straight: SlurmJob, style: str) -> None:
    job = submit("killed", "recovery.max_restarts=1", "checkpoint.every_steps=5", STYLE=style)
    job.wait_until_step(12)
    os.kill(ranks_of(slurm)["node2"], signal.SIGKILL)
    job.finish()
    (start,) = job.supervision()["starts"]
    assert [a["outcome"] for a in start["attempts"]] == ["failed", "finished"]
    assert [a["resumed"] for a in start["attempts"]] == [False, True]
    if style == "srun":
        assert "lost contact with another rank" in start["attempts"][0]["reason"]
    assert "restart 1 of recovery.max_restarts=1" in job.output
    assert_resumed(job, 1)
    assert_same_run(job, straight)


def test_a_killed_rank_without_restarts_fails_the_job(submit: Submit, slurm: MiniSlurm) -> None:
    job = submit("failed")
    job.wait_until_step(5)
    os.kill(ranks_of(slurm)["node2"], signal.SIGKILL)
    assert job.wait()["JobState"] == "FAILED"
    assert not (job.folder / "metrics.json").exists()
    assert "failed: " in job.output


def test_scancel_saves_and_does_not_requeue(submit: Submit, slurm: MiniSlurm) -> None:
    job = submit("cancelled")
    job.wait_until_step(5)
    slurm.command("scancel", job.id)
    assert job.wait()["JobState"] == "CANCELLED"
    job_ended = json.loads((job.folder / "stopped.json").read_text(encoding="utf-8"))
    assert 5 <= job_ended["step"] == last_step(job.folder) < STEPS
    assert list(job.folder.glob("checkpoints/step-*/complete.json"))
    assert slurm.job(job.id)["Restarts"] == "0"


def test_a_head_that_does_not_resolve(submit: Submit) -> None:
    """node1 is no host name: nothing falls back to localhost."""
    job = submit("unresolved", MASTER_ADDR="")
    assert job.wait(30)["ExitCode"].startswith("2:")
    (error,) = [line for line in job.output.splitlines() if line.startswith("error:")]
    assert "node1 does not resolve" in error
    assert "MASTER_ADDR" in error


def test_submit_slurm_runs_ten_in_small(
    slurm: MiniSlurm, tiny_config: Path, tmp_path: Path, straight: SlurmJob
) -> None:
    """Two runs of one submission from a copy of the code, followed to the end."""
    command = [
        sys.executable, str(ROOT / "scripts/submit_slurm.py"), "--config", str(tiny_config), "--nodes", "2", "--runs", "2",
        "--out", str(tmp_path / "submissions"), *SETTINGS,
    ]  # fmt: skip
    environment = {**slurm.environment, **VARIABLES}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 2 run(s) are finished" in done.stdout
    (folder,) = (tmp_path / "submissions").iterdir()
    assert not (folder / ".git").exists()
    assert not (folder / "tests").exists()
    runs = [folder / "run" / f"run_{index}" for index in range(2)]
    for seed, run in enumerate(runs):
        assert check_log(run / "result_0.txt", "5.0.0").passed
        assert json.loads((run / "metrics.json").read_text(encoding="utf-8"))["config"]["train"]["seed"] == seed
    weights = [(run / "model/model.safetensors").read_bytes() for run in runs]
    assert weights[0] == straight.weights()
    assert weights[0] != weights[1]


@pytest.mark.slow
def test_mini_benchmark_over_two_nodes(submit: Submit, slurm: MiniSlurm, tmp_path: Path) -> None:
    if not (ROOT / "data/pydocs-mini/train/manifest.json").is_file():
        pytest.skip("no data/pydocs-mini: `make data` prepares it")
    output, folder = tmp_path / "mini.txt", tmp_path / "mini"
    job_id = slurm.command(
        "sbatch", "--parsable", "--nodes=2", f"--output={output}", "slurm/pretrain.sbatch", "configs/mini_cpu.yaml",
        f"run.folder={folder}", "system.ranks_per_node=1", "train.max_steps=60", "evaluation.target_accuracy=null",
        "system.threads_per_rank=1", "system.bind_cores=false",
        variables=VARIABLES, cwd=ROOT,
    ).strip()  # fmt: skip
    job = SlurmJob(slurm, job_id, output, folder, 0.0)
    job.finish()
    assert last_step(folder) == 60
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["system"]["world_size"] == 2
