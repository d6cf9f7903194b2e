"""Stage `run`: a real training run by the command that a user types. To its target, its log checked, stopped and resumed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from bert_fast.exit_codes import ExitCode, of_signal

from .stage import ROOT, CheckFailed, Context

_CONFIG = "configs/mini_cpu.yaml"
_MORE_STEPS = 20  # after the stop, with the same losses
# Of the run's folder, in the record
KEPT = (
    "config.yaml",
    "result_0.txt",
    "metrics.json",
    "metrics.jsonl",
    "preflight.json",
    "report.html",
    "trace.json",
    "profiler-0.json",
)


def run(context: Context) -> None:
    result = context.result
    data = _tiny_store(context.scratch) if context.tiny else _store(context)
    settings = [
        f"system.device={context.device}",
        "system.world_size=1",
        "batch.micro_batch_size=64",
        "run.tensorboard=false",
        f"communication.backend={'gloo' if context.tiny else 'nccl'}",  # a group of one rank: every collective is called
        f"data.train={data / 'train'}",
        f"evaluation.data={data / 'eval'}",
    ]
    if context.tiny:
        settings += [
            "model.hidden_size=16",
            "model.num_layers=1",
            "model.intermediate_size=32",
            "model.max_positions=32",
            "data.max_seq_len=32",
            "checkpoint.init_from=null",
            "evaluation.target_accuracy=0.0001",
            "evaluation.num_samples=64",
            "evaluation.every_samples=320",
            "run.measure_peak_flops=false",
            "train.warmup_batches=1",
            "batch.global_batch_size=32",
            "batch.micro_batch_size=32",
        ]
    else:
        settings.append("checkpoint.every_steps=200")
    context.case("to the target", partial(_to_the_target, context, settings))
    context.case("stop and resume", partial(_stop_and_resume, context, settings))
    if not result.failures:
        result.summary = (
            f"accuracy {result.metrics['run/final_accuracy']:.3f} in {result.metrics['run/time_to_train_s']:.1f} s, log "
            "accepted, same losses after a stop"
        )


def _command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "run_pretraining.py"), "--config", str(ROOT / _CONFIG), *arguments]


def _checked(command: list[str], what: str) -> str:
    """Output of a command. Raises CheckFailed with its last line if it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}", flush=True)
    if done.returncode != ExitCode.OK:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise CheckFailed(f"{what} ended with exit code {done.returncode}: {last}")
    return done.stdout


def _store(context: Context) -> Path:
    """The mini benchmark's store, made here if the checkout has none."""
    made = ROOT / "data" / "pydocs-mini"
    if (made / "train" / "manifest.json").is_file():
        return made
    folder = context.scratch / "pydocs-mini"
    recipe = str(ROOT / "configs" / "data" / "pydocs_mini.yaml")
    start = time.monotonic()
    script = str(ROOT / "scripts" / "prepare_data.py")
    _checked([sys.executable, script, "--recipe", recipe, "--out", str(folder)], "prepare_data.py")
    context.result.metrics["run/prepare_s"] = time.monotonic() - start
    return folder


def _tiny_store(scratch: Path) -> Path:
    """A made-up store of short samples over the mini benchmark's vocabulary."""
    from bert_fast.data.samples import SampleParams, make_samples
    from bert_fast.data.store import merge_parts, write_part
    from bert_fast.data.wordpiece import load_vocabulary

    vocabulary = load_vocabulary(ROOT / "assets" / "mini_start" / "vocab.txt")
    rng = random.Random(0)
    folder = scratch / "tiny"
    for split, count in (("train", 200), ("eval", 40)):
        documents = [
            [[rng.randrange(200, 264) for _ in range(rng.randint(3, 12))] for _ in range(8)] for _ in range(count)
        ]
        params = SampleParams(max_seq_len=32, max_predictions=5, dupe_factor=2, seed=len(split))
        (folder / split).mkdir(parents=True)
        part = write_part(scratch / f"{split}.bin", make_samples(documents, vocabulary, params, chunk=0))
        extra = {
            "vocab_sha256": vocabulary.sha256,
            "vocab_size": len(vocabulary),
            "mask_id": 4,
            "text_sha256": "0" * 64,
        }
        merge_parts(folder / split, [part], extra)
    return folder


def _to_the_target(context: Context, settings: list[str]) -> None:
    folder = context.scratch / "run"
    extra = ["system.preflight=true", "run.profile=true", "checkpoint.save_final_model=true"]
    _checked(_command(*settings, *extra, f"run.folder={folder}"), "the run")
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    if not metrics["gradient_bytes_per_step"]:
        raise CheckFailed("no collective was called, though communication.backend was set")
    names = ("time_to_train_s", "final_accuracy", "samples_to_target", "samples_per_s", "mfu", "first_step_s")
    context.result.metrics |= {f"run/{name}": metrics[name] for name in names}
    checker = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "training", "--ruleset", "5.0.0"]
    _checked(
        [*checker, "--log_output", str(folder / "checker.log"), str(folder / "result_0.txt")], "the compliance checker"
    )
    (context.out / "run").mkdir(exist_ok=True)
    for name in KEPT:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, context.out / "run" / name)


def _losses(folder: Path) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}


def _stop_and_resume(context: Context, settings: list[str]) -> None:
    """A deterministic run, stopped by SIGTERM at its first log line and resumed, against one that was not stopped."""
    stopped, straight = context.scratch / "stopped", context.scratch / "straight"
    common = [
        *settings,
        "train.deterministic=true",
        "evaluation.target_accuracy=null",
        "train.log_every_steps=5",
        "evaluation.every_samples=100000000",
        "mlperf.enabled=false",
        "checkpoint.every_steps=0",
        "run.measure_peak_flops=false",
    ]
    begun = _command(*common, f"run.folder={stopped}", "train.max_steps=2000")
    with open(context.scratch / "stopped.log", "w+b") as log:
        process = subprocess.Popen(begun, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        lines = stopped / "metrics.jsonl"
        while process.poll() is None and not (lines.is_file() and lines.stat().st_size):
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        log.seek(0)
        last = (log.read().decode(errors="replace").strip() or "no output").splitlines()[-1]
    if code != of_signal(signal.SIGTERM):
        raise CheckFailed(f"a run that was sent SIGTERM ended with exit code {code}: {last}")
    at = json.loads((stopped / "stopped.json").read_text(encoding="utf-8"))["step"]
    end = f"train.max_steps={at + _MORE_STEPS}"
    whole = _command(*common, f"run.folder={straight}", end)
    with open(os.devnull, "wb") as nothing:
        beside = subprocess.Popen(whole, cwd=ROOT, stdout=nothing, stderr=nothing)
        _checked(_command(*common, f"run.folder={stopped}", end, "--resume"), "the resumed run")
        if beside.wait():
            raise CheckFailed(f"the run without a stop ended with exit code {beside.returncode}")
    one, other = _losses(stopped), _losses(straight)
    steps = sorted(step for step in other if step > at)
    if not steps or any(one.get(step) != other[step] for step in steps):
        gap = max((abs(one[s] - other[s]) / other[s] for s in steps if s in one), default=float("nan"))
        raise CheckFailed(f"losses after the stop at step {at} differ, by {gap:.2g} at the most")
    context.result.metrics["run/resumed_at_step"] = at
