"""run.profile: a Chrome trace whose named tracks show the order of things in a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.training_run import Workspace

from bert_fast.trace import Trace, TraceSpan, write_trace

SETTINGS = (
    "train.max_steps=12", "evaluation.every_samples=100000", "run.profile=true", "run.profile_after=4",
    "run.profile_steps=2", "optimizer.step_per_bucket=true",
)  # fmt: skip


def spans_of(path: Path, pid: int) -> dict[str, list[dict[str, Any]]]:
    """Spans by track, of one rank."""
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["otherData"] == {"first_step": 4, "last_step": 5}
    tracks: dict[str, list[dict[str, Any]]] = {}
    for event in record["traceEvents"]:
        if event["ph"] == "X" and event["pid"] == pid:
            tracks.setdefault(event["cat"], []).append(event)
    return tracks


@pytest.mark.distributed
@pytest.mark.parametrize("shard", [pytest.param(False, marks=pytest.mark.slow), True])  # a whole run each
def test_a_run_writes_a_trace_of_its_steps(workspace: Workspace, shard: bool) -> None:
    folder = f"profile-{shard}"
    code, run = workspace.run(f"run.folder={folder}", *SETTINGS, f"communication.shard_optimizer={str(shard).lower()}")
    assert code == 0, run.stderr
    assert "trace of steps: " in run.stdout
    for rank in (0, 1):
        tracks = spans_of(workspace.folder / folder / "trace.json", rank)
        assert tracks.keys() >= {"data", "compute", "buckets", "clip", "collectives", "wait", "optimizer"}
        assert ("weights" in tracks) == shard
        buckets = len(tracks["buckets"]) // 2
        assert buckets == 3
        assert len(tracks["optimizer"]) == len(tracks["collectives"]) == len(tracks["buckets"])
        backward = [span for span in tracks["compute"] if span["name"].startswith("backward")]
        assert len(backward) == 2
        first = min(tracks["collectives"], key=lambda span: span["ts"])
        assert first["ts"] < backward[0]["ts"] + backward[0]["dur"], "the first bucket leaves during backward"


def test_spans_that_overlap_go_to_lanes_of_their_track(tmp_path: Path) -> None:
    spans = [
        TraceSpan("a", "one", 0.0, 2.0),
        TraceSpan("a", "two", 1.0, 3.0),
        TraceSpan("a", "three", 2.0, 4.0),
        TraceSpan("b", "x", 0.0, 1.0),
    ]
    write_trace(tmp_path / "trace.json", {"rank 0": spans}, ["b", "a"], {})
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    lanes = {event["name"]: event["tid"] for event in events if event["ph"] == "X"}
    assert lanes["one"] == lanes["three"] != lanes["two"]
    assert lanes["x"] < lanes["one"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert [names[lanes[key]] for key in ("x", "one", "two")] == ["b", "a", "a 2"]


def test_a_span_may_be_ended_elsewhere() -> None:
    trace = Trace()
    end = trace.begin("a", "late")
    with trace.span("a", "inner"):
        pass
    assert [span.name for span in trace.spans()] == ["inner"]
    end()
    late, inner = trace.spans()
    assert late.name == "late"
    assert late.start <= inner.start <= inner.end <= late.end


@pytest.mark.slow  # a whole run
@pytest.mark.distributed
def test_a_run_that_ends_within_the_trace_writes_what_there_is(workspace: Workspace) -> None:
    code, run = workspace.run("run.folder=short", *SETTINGS, "train.max_steps=5")
    assert code == 0, run.stderr
    assert "trace of steps: " in run.stdout
    assert spans_of(workspace.folder / "short/trace.json", 1)["compute"]
