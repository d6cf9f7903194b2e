#!/usr/bin/env python3
"""Watch a run, on this machine or another, through its folder: state, speed, accuracy, forecast, checkpoint, slow ranks.

    python scripts/watch.py runs/mini_cpu-seed0            # a table that renews itself; Ctrl-C ends it, the run goes on
    python scripts/watch.py runs/mini_cpu-seed0 --once     # one table
    python scripts/watch.py runs/mini_cpu-seed0 --json     # one JSON object

Without a terminal: a line whenever there is something new. Ends when the run has; a stopped one may be resumed, so it is
watched on. Exit code 0, or 2 if the folder holds no run, or one of an older form.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from typing import Any

import guard  # noqa: F401

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bert_fast.command import guarded, positive
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.foreign import shown
from bert_fast.report.console import seconds_text
from bert_fast.report.live import RunWatch
from bert_fast.run_folder import METRICS_LINES

NO_VALUE = "–"
COLOURS = {"running": "green", "finished": "bold green", "silent": "bold yellow", "stopped": "yellow", "ended": "red"}
OVER = ("finished", "ended")


def form(value: float | None, spec: str, unit: str = "", scale: float = 1.0) -> str:
    if value is None:
        return NO_VALUE
    return f"{value * scale:{spec if abs(value * scale) < 1e15 else '.3g'}}{unit}"


def rows(now: dict[str, Any]) -> list[tuple[str, str]]:
    """What and how much."""
    of = "" if now["max_steps"] is None else f" of {now['max_steps']:,} at most"
    return [
        ("state", now["state_text"]),
        ("step", f"{now['step']:,}{of}"),
        ("samples", f"{now['samples']:,}"),
        (
            "samples/s",
            f"{form(now['samples_per_s'], ',.0f')} in the last interval, {form(now['samples_per_s_overall'], ',.0f')} "
            "overall, evaluations included",
        ),
        ("loss", f"{form(now['loss'], '.4f')}  {now['losses']}"),
        ("accuracy", accuracy_text(now)),
        ("forecast", forecast_text(now)),
        ("time on the clock", seconds_text(now["time_s"])),
        (
            "remaining at most",
            NO_VALUE if now["remaining_at_most_s"] is None else seconds_text(now["remaining_at_most_s"]),
        ),
        ("last checkpoint", checkpoint_text(now["checkpoint"])),
        ("data wait", shares(now, "data_share")),
        ("exposed communication", shares(now, "exposed_share")),
        (
            "imbalance (measured)",
            f"{form(now['imbalance_measured'], '.3f')}, {form(now['imbalance_measured_overall'], '.3f')} overall",
        ),
        ("slowest ranks", slowest_text(now)),
        ("skipped steps", skipped_text(now)),
        ("resumed", f"{now['sessions'] - 1} times" if now["sessions"] > 1 else "no"),
        *left_out(now),
    ]


def left_out(now: dict[str, Any]) -> list[tuple[str, str]]:
    count = now["lines_left_out"]
    return [("lines left out", f"{count:,} of {METRICS_LINES}: cut off, or not as a run writes them")] if count else []


def accuracy_text(now: dict[str, Any]) -> str:
    goal = "no target" if now["target"] is None else f"target {now['target']:.4f}"
    if now["accuracy"] is None:
        return f"not evaluated yet, {goal}"
    return f"{now['accuracy']:.4f} at step {now['accuracy_step']:,}, {goal}"


def forecast_text(now: dict[str, Any]) -> str:
    expected = now["forecast"]
    if expected is None:
        return now["no_forecast"] or NO_VALUE
    where = f"at {expected['samples']:,} samples, {seconds_text(expected['time_s'])} on the clock"
    late = "" if expected["within"] else ": after the last step"
    return f"target {where}{late} (straight line through the last {expected['evaluations']} evaluations)"


def checkpoint_text(checkpoint: dict[str, Any] | None) -> str:
    return "none" if checkpoint is None else f"step {checkpoint['step']:,}, {seconds_text(checkpoint['age_s'])} old"


def shares(now: dict[str, Any], name: str) -> str:
    last, overall = now[name], now[f"{name}_overall"]
    return f"{form(last, '.1f', ' %', 100)} of a step, {form(overall, '.1f', ' %', 100)} overall"


def slowest_text(now: dict[str, Any]) -> str:
    if not now["slowest"]:
        return now["slow_text"] or NO_VALUE
    ranks = [
        f"{each['name']}: {100 * each['share']:.0f} % of the time lost to waiting; its time is {100 * each['excess']:+.1f} % "
        "off the mean"
        for each in now["slowest"]
    ]
    return "\n".join([*ranks, now["slow_text"]])


def skipped_text(now: dict[str, Any]) -> str:
    last = now["skipped_last"]
    if last is None:
        return "none"
    ranks = ", ".join(map(str, last.get("ranks", []))) or "no single one"
    return f"{now['skipped']} (last: step {last.get('bad_step', last['step']):,}, rank {ranks})"


def table(now: dict[str, Any]) -> Table:
    seed = "" if now["seed"] is None else f", seed {now['seed']}"
    title = Text(
        f"{now['name'] or shown(now['folder'])}{seed}", style="table.title"
    )  # a text: its brackets are no markup
    made = Table(title=title, show_header=False, title_justify="left")
    made.add_column(style="bold", no_wrap=True)
    made.add_column()
    for name, value in rows(now):
        made.add_row(name, Text(value, style=COLOURS.get(now["state"], "") if name == "state" else ""))
    return made


def line(now: dict[str, Any]) -> str:
    """The most important of it on one line."""
    accuracy = "" if now["accuracy"] is None else f" | accuracy {now['accuracy']:.4f}"
    goal = "" if now["target"] is None or not accuracy else f"/{now['target']:.4f}"
    slow = f" | {now['slow_text']}" if any(each["is_slow"] for each in now["slowest"]) else ""
    return (
        f"{now['state_text']} | step {now['step']:,} | {now['samples']:,} samples | "
        f"{form(now['samples_per_s'], ',.0f')} samples/s | loss {form(now['loss'], '.4f')}{accuracy}{goal}{slow}"
    )


def strict(value: Any) -> Any:
    """The same with None for what JSON cannot say (a diverged loss)."""
    if isinstance(value, dict):
        return {name: strict(one) for name, one in value.items()}
    if isinstance(value, list):
        return [strict(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def watch(run: RunWatch, interval: float) -> None:
    """Until the run is over or Ctrl-C."""
    console = Console()
    now = run.snapshot()
    if not console.is_terminal:
        printed: tuple[Any, ...] = ()
        while True:
            new = (now["state"], now["step"], now["accuracy_step"])
            if new != printed:
                print(line(now), flush=True)
            printed = new
            if now["state"] in OVER:
                return
            time.sleep(interval)
            run.poll()
            now = run.snapshot()
    with Live(table(now), console=console, auto_refresh=False) as live:
        while now["state"] not in OVER:
            time.sleep(interval)
            run.poll()
            now = run.snapshot()
            live.update(table(now), refresh=True)


def look(args: argparse.Namespace) -> None:
    run = RunWatch(args.run)
    run.poll()
    once = args.once or args.json
    if once and not run.folder.exists():
        raise UserError(f"{shown(run.folder)} does not exist; give a run's folder, such as runs/NAME-seed0")
    if args.json:
        print(json.dumps(strict(run.snapshot()), allow_nan=False))
    elif once:
        Console().print(table(run.snapshot()))
    else:
        watch(run, args.interval)


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="the run's folder; it need not be there yet")
    parser.add_argument("--interval", type=positive, default=2.0, metavar="S", help="seconds between looks (default 2)")
    parser.add_argument("--once", action="store_true", help="print one table and end")
    parser.add_argument("--json", action="store_true", help="print one JSON object and end")
    args = parser.parse_args()
    try:
        look(args)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {shown(str(error), 1000)}", file=sys.stderr)
        return ExitCode.USER_ERROR
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # `watch.py RUN | head`; Python would complain once more when it closes its output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
