"""report.html and its charts, on made-up runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from support.run_files import evaluation_line, run_record, step_line, write_run

from bert_fast.errors import UserError
from bert_fast.files import cut_last_line
from bert_fast.report.charts import MAX_POINTS, Series, Share, line_chart, nice_ticks, shares_bar, stacked_bars, thin
from bert_fast.report.console import print_table
from bert_fast.report.html import write_report
from bert_fast.report.metrics import MetricsWriter, cost_rows, read_metrics
from bert_fast.report.preflight import node_table
from bert_fast.report.schema import ClipRecord, ComplianceRecord, Line, RunRecord, SkippedLine, TimeSplit, read_record

VOID = {"meta", "link", "br", "img", "hr", "input"}
LOADING = {"src", "href", "xlink:href", "data", "srcset", "action"}


class Page(HTMLParser):
    """Reads a page strictly: every tag is closed in its turn. Keeps what a reader sees and what it would load."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text, self.tags, self.loads = "", [], []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == [], "tags left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in LOADING]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in LOADING]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def report(folder: Path, record: RunRecord, lines: list[Line]) -> str:
    write_run(folder, record, lines)
    path = write_report(folder, read_record(folder / "metrics.json"))
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def usual_run() -> tuple[RunRecord, list[Line]]:
    evaluations = [evaluation_line(100, 0.2125), evaluation_line(200, 0.3375)]
    return run_record(evaluations), [*map(step_line, range(10, 201, 10)), *evaluations]


def test_report_holds_the_figures_and_loads_nothing(tmp_path: Path) -> None:
    source = report(tmp_path, *usual_run())
    page = Page(source)
    assert "http://" not in source
    assert "https://" not in source
    assert page.loads == []
    assert "url(" not in source
    assert "@import" not in source
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("svg") == 7
    for text in (
        "target 0.3325", "0.3375", "0.2125", "12,800", "✓ target reached", "✓ compliance passed", "seed 7", "ab" * 32,
        "forward and backward 72.0 % (9.0 s)", "global_batch_size: 64", "line 1 <ok> & SUCCESS", "50.0 %", "0.5000", "0.25",
    ):  # fmt: skip
        assert text in page.text


def test_evaluation_on_training_text_is_named(tmp_path: Path) -> None:
    record, lines = usual_run()
    assert "TRAINING TEXT" not in report(tmp_path, record, lines)
    shared = replace(record, shared_text=(412, 500))
    assert "TRAINING TEXT: 412 of 500 evaluation samples" in report(tmp_path, shared, lines)


def test_run_name_and_texts_are_escaped(tmp_path: Path) -> None:
    record, lines = usual_run()
    record.config["run"]["name"] = "<b>&"
    record.environment["device"] = "<script>alert(1)</script>"
    lines[0] = step_line(10, clip={"<i>group": ClipRecord(clipped_share=0.5, mean_coefficient=0.5)})
    source = report(tmp_path, record, lines)
    page = Page(source)
    assert "<b>&" in page.text
    assert "&lt;b&gt;&amp;" in source
    assert not {"b", "script"} & set(page.tags)
    assert "<i>group" not in source


def test_missing_values_do_not_break_it(tmp_path: Path) -> None:
    record, lines = usual_run()
    metrics = replace(record.metrics, mfu=None, final_accuracy=None, target_reached=0, first_step_s=None)
    nothing = TimeSplit(
        forward_and_backward=0.0,
        exposed_communication=0.0,
        waiting_for_the_slowest_rank=0.0,
        optimizer=0.0,
        data_wait=0.0,
        other=0.0,
    )
    record = run_record(
        metrics=metrics,
        target_accuracy=None,
        compliance=ComplianceRecord(summary="not checked"),
        time_split_s=nothing,
    )
    diverged = step_line(210, loss=math.nan, grad_norm=math.inf, clip={}, imbalance=[], compute_imbalance=[])
    skipped = SkippedLine(step=210, bad_step=209, ranks=[0])
    page = Page(report(tmp_path, record, [*(line for line in lines if line.kind == "step"), diverged, skipped]))
    for text in (
        "no target set",
        "compliance not checked",
        "The run made no evaluation.",
        "not finite: 1 logged, at step 209",
    ):
        assert text in page.text
    assert "nan" not in page.text.lower()


def test_what_next_sentences_would_have_is_a_dash(tmp_path: Path) -> None:
    evaluations = [replace(evaluation_line(100, 0.2125), nsp_accuracy=None, nsp_loss=None)]
    whole = run_record(evaluations)
    record = replace(whole, config={**whole.config, "model": {"next_sentence": False}})
    page = Page(report(tmp_path, record, [step_line(100, nsp_loss=None), *evaluations]))
    cells = page.text
    assert "0.21254.5000––" in cells
    assert "loss (nats, masked LM)" in cells
    assert "None" not in cells


def test_a_run_without_lines(tmp_path: Path) -> None:
    page = Page(report(tmp_path, run_record(), []))
    assert "No values were logged." in page.text
    assert "No clip statistics were logged." in page.text


def test_steps_done_again_after_a_resume_count_once(tmp_path: Path) -> None:
    record, lines = usual_run()
    lost = [step_line(step, loss=123.0) for step in range(10, 61, 10)]
    assert report(tmp_path, record, [*lost, *lines]) == report(tmp_path, record, lines)


def test_badges_of_a_failed_run(tmp_path: Path) -> None:
    record, lines = usual_run()
    failed = replace(
        record,
        metrics=replace(record.metrics, target_reached=0),
        compliance=replace(record.compliance, passed=False),
    )
    text = Page(report(tmp_path, failed, lines)).text
    assert "✗ target not reached" in text
    assert "✗ compliance failed" in text


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    evaluations = [evaluation_line(step, step / 3e5) for step in range(50, 100_001, 50)]
    lines = [step_line(step) for step in range(10, 100_001, 10)]
    source = report(tmp_path, run_record(evaluations), [*lines, *evaluations])
    assert len(source.encode()) < 1_000_000
    text = Page(source).text
    assert "of 2,000 evaluations" in text
    assert "100,000" in text


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (1.000001, 1.00006), (0, 3e-7), (-3.2, 17.9), (8.1, 8.1), (0, 0), (1, 1 + 1e-13), (0, 12345678), (-5, -2)],
)
def test_ticks_cover_the_range_and_are_few(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= high - 1e-6 * step
    assert 2 <= len(ticks) <= 8
    assert all(b > a for a, b in pairwise(ticks))
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-3)
    assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5, 10)) < 1e-3


@pytest.mark.parametrize("count", [0, 1, 599, 600, 601, 1199, 100_000])
def test_thinning_keeps_the_ends_the_order_and_the_mean(count: int) -> None:
    points = [(float(x), x % 10.0) for x in range(count)]
    kept = thin(points)
    assert len(kept) == min(count, MAX_POINTS)
    assert [*kept[:1], *kept[-1:]] == [*points[:1], *points[-1:]]
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    if count == 100_000:
        assert sum(y for _, y in kept) / len(kept) == pytest.approx(4.5, abs=0.1)


def test_hover_titles_only_on_short_series() -> None:
    few = line_chart([Series("a<", [(float(x), float(x)) for x in range(499)], 0)], "step", "y")
    many = line_chart([Series("a<", [(float(x), float(x)) for x in range(500)], 0)], "step", "y")
    assert few.count("<title>a&lt;: ") == 499
    assert "<title>" not in many
    rows = [(float(x), 1.0, 2.0) for x in range(1, 31)]
    assert stacked_bars(rows, [("low", 0), ("high", 1)], "step", "ms").count("low: 1\nhigh: 2</title>") == 30


def test_robust_axis_names_what_it_leaves_out() -> None:
    points = [(float(x), 1.0) for x in range(100)] + [(100.0, 5000.0)]
    assert "1 above the axis, up to 5000" in line_chart([Series("norm", points, 0)], "step", "y", robust=True)
    assert "above the axis" not in line_chart([Series("norm", points, 0)], "step", "y")


def test_one_point_and_one_share() -> None:
    assert "<circle" in line_chart([Series("a", [(0.0, 0.0)], 0)], "step", "y", reference=("target", 0.5))
    assert "100.0 % (2.0 s)" in shares_bar([Share("all", 2.0, 0), Share("none", 0.0, 1)], "s")
    assert "No values" in shares_bar([], "s")


# ---- on the terminal ------------------------------------------------------------------------------------------------


def test_brackets_in_names_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    """rich reads brackets as markup, and [/] as an end without a beginning."""
    print_table("[/] [red]run", [("[/]name", "[bold]value")])
    node = {
        "host": "[/]h", "device": "[b]c", "ranks": [0], "cpus": [0], "memory_gib": 1.0, "tflops": [1.0],
        "link_mb_s": [1.0], "clock_ms": [0.0], "data": {"data.train": "[/]h"},
    }  # fmt: skip
    report = {"world_size": 1, "nodes": [node], "slow": ["rank 0 ([/]h)"], "network": {}, "seconds": 1.0}
    node_table(report)
    shown = capsys.readouterr().out
    for text in ("[/] [red]run", "[/]name", "[bold]value", "[/]h", "[b]c", "slow: rank 0 ([/]h)"):
        assert text in shown


def test_lines_that_a_crash_cut_off_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = json.dumps(step_line(10).as_json()).encode()
    path.write_bytes(b"\n".join([good, good[:40], b"\xff", b"[" * 90_000, good[:-1]]))
    assert read_metrics(tmp_path) == [step_line(10)]
    assert cost_rows(tmp_path) == step_line(10).cost


def test_lines_that_no_run_writes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"metrics\.jsonl is no regular file"):
        read_metrics(tmp_path)
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"metrics\.jsonl: the line .* is longer than 16 MiB"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("left", ["", '{"kind": "st', "\n", "x" * 200_000])
def test_lines_after_one_that_was_cut_short_are_whole(tmp_path: Path, left: str) -> None:
    """As a kill or a full disk leaves it."""
    first = MetricsWriter(tmp_path)
    first.write(step_line(1))
    first.close()
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(left)
    second = MetricsWriter(tmp_path, append=True)
    second.write(step_line(2))
    second.close()
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["step"] for line in lines if line] == [1, 2]
    cut_last_line(tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").split("\n") == lines, "nothing was cut short"
