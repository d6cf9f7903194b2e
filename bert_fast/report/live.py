"""A run as it goes, seen through its folder alone: what its files say now, as plain values.

Only reads, so any machine that sees the folder can look. On network file systems lines come late, by the writer's cache.
The files may be anyone's: what is not of the kind that a run writes is left out, and lines of it are counted.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast.errors import UserError
from bert_fast.foreign import parse_json, shown, whole_number
from bert_fast.report import stragglers
from bert_fast.report.console import seconds_text, sparkline
from bert_fast.report.forecast import forecast
from bert_fast.report.foreign_run import object_or_empty, read_config, read_hosts, read_line, read_object, read_record
from bert_fast.report.schema import EVALUATION, SKIPPED, STEP, Straggler
from bert_fast.report.tail import Tail
from bert_fast.run_folder import (
    CHECKPOINT_MANIFEST,
    CHECKPOINTS,
    COMMIT,
    CONFIG,
    METRICS_LINES,
    NODES,
    RECORD,
    RESULT_LOG,
    STOPPED,
    checkpoints_in,
    step_of,
)

SILENT_S = 30.0  # no run is called silent before, nor before three times its longest gap between lines
WORST = 3  # ranks shown
_UNEQUAL = 1.01  # planned imbalance above which a rank's mean time says nothing of its hardware


class RunWatch:
    """What a run's folder says. `poll()` reads what is new, `snapshot()` gives the state of things."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config: dict[str, Any] = {}
        self._metrics = Tail(self.folder / METRICS_LINES)
        self._log = Tail(self.folder / RESULT_LOG)
        self._forget()
        self._forget_log()

    def _forget(self) -> None:
        self.last: dict[str, Any] | None = None  # the last step line
        self.losses: list[tuple[int, float]] = []  # (step, loss)
        self.evaluations: list[dict[str, Any]] = []
        self.hosts: list[str] | None = None
        self._skipped: list[dict[str, Any]] = []
        self._rewinds, self._left_out = 0, 0
        self._time_s, self._gap_s = 0.0, 0.0
        self._sums: dict[str, float] = {}
        self._tally = stragglers.StragglerTally()

    def _forget_log(self) -> None:
        self._resumed, self._run_stop = 0, ""

    # ---- reading ----------------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Read what the files gained.

        Raises:
            UserError: the folder is there and is not a run's, or the run is of an older form.
        """
        self._check()
        if not self.config or self.last is None:  # written once, before the first line
            self.config = read_config(self.folder / CONFIG)
        replaced, lines = self._metrics.read()
        if replaced:
            self._forget()
            self.config = read_config(self.folder / CONFIG)
        for line in lines:
            self._take(line)
        replaced, lines = self._log.read()
        if replaced:
            self._forget_log()
        for line in lines:
            self._take_log(line)
        self.hosts = read_hosts(self.folder / NODES) or self.hosts  # a resumed run may be elsewhere

    def _check(self) -> None:
        try:
            names = {path.name for path in self.folder.iterdir() if not path.name.startswith(".")}
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise UserError(
                f"{shown(self.folder)} is a file; give the run's folder, which holds {METRICS_LINES}"
            ) from None
        except OSError as error:
            raise UserError(f"{shown(self.folder)}: {error.strerror}") from None
        if names and not names & {CONFIG, COMMIT, METRICS_LINES}:
            raise UserError(
                f"{shown(self.folder)} holds no run (no {CONFIG}, no {METRICS_LINES}); give a run's folder, such as "
                "runs/NAME-seed0"
            )

    def _take(self, text: bytes) -> None:
        line = read_line(text)
        if line is None:  # cut off by a crash, or not of a run
            self._left_out += 1
            return
        kind, step, time_s = line["kind"], line["step"], line.get("time_s")
        if time_s is not None:
            self._gap_s, self._time_s = max(self._gap_s, time_s - self._time_s), time_s
        if kind == STEP:
            self._take_step(line, step)
        elif kind == EVALUATION:
            self.evaluations.append(line)
        elif kind == SKIPPED:
            self._skipped.append(line)

    def _take_step(self, line: dict[str, Any], step: int) -> None:
        if self.last is not None and step <= self.last["step"]:  # resumed from a checkpoint before the last line
            self._rewinds += 1
            self.losses = [point for point in self.losses if point[0] < step]
            self.evaluations = [each for each in self.evaluations if each["step"] < step]
        before = self.losses[-1][0] if self.losses else 0
        self.last = line
        self.losses.append((step, line["loss"]))
        imbalance = line.get("compute_imbalance") or []
        steps = len(line.get("imbalance") or imbalance) or max(1, step - before)
        step_s = line["samples"] / step / line["samples_per_s"]
        for name, value in (
            ("steps", 1.0),
            ("time_s", step_s),
            ("data_s", line.get("data_ms", 0.0) / 1e3),
            ("exposed_s", line.get("exposed_ms", 0.0) / 1e3),
            ("optimizer_s", line.get("optimizer_ms", 0.0) / 1e3),
        ):
            self._sums[name] = self._sums.get(name, 0.0) + steps * value
        self._sums["imbalance"] = self._sums.get("imbalance", 0.0) + sum(imbalance)
        self._sums["imbalance_steps"] = self._sums.get("imbalance_steps", 0.0) + len(imbalance)
        self._add_ranks(line, steps)

    def _add_ranks(self, line: dict[str, Any], steps: int) -> None:
        """Charge an interval's waiting by its mean times: what evens out between steps is not seen here."""
        planned = line.get("imbalance") or [1.0]
        compute = line.get("compute_ms")
        if not compute or len(compute) < 2 or sum(planned) / len(planned) > _UNEQUAL:
            return
        data, exposed = (
            np.array(line[name]) * steps / 1e3 if len(line.get(name) or ()) == len(compute) else None
            for name in ("data_ms_rank", "exposed_ms_rank")
        )
        if self._tally.total is not None and self._tally.total.ranks != len(compute):
            self._tally = stragglers.StragglerTally()  # resumed by another number of ranks
        self._tally.add(np.array(compute)[:, None] * steps / 1e3, None, data, exposed)

    def _take_log(self, text: bytes) -> None:
        if not any(key in text for key in (b'"resumed"', b'"run_start"', b'"run_stop"')):
            return
        try:
            event = parse_json(text[text.index(b"{") :])
        except ValueError:
            return
        if event.get("key") == "run_stop":
            self._run_stop = shown(object_or_empty(event.get("metadata")).get("status", "ended"), 40)
        elif event.get("key") in ("resumed", "run_start"):
            self._resumed += event["key"] == "resumed"
            self._run_stop = ""

    # ---- showing ----------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Everything shown, by name, as plain values: seconds, shares of 1, None where it is not known.

        Raises:
            UserError: metrics.json is of an older form.
        """
        record = read_record(self.folder / RECORD)
        state, state_text = self._state(record)
        train, last, settings = self.config.get("train", {}), self.last or {}, self.config.get("evaluation", {})
        step, time_s, max_steps = last.get("step", 0), self._time_s, train.get("max_steps")
        left = None if not step or max_steps is None else max(0, max_steps - step) * time_s / step
        target, evaluation = settings.get("target_accuracy"), self.evaluations[-1] if self.evaluations else {}
        expected = forecast(self.evaluations, target, settings.get("every_samples"), self._sample_limit())
        imbalance, sums = last.get("compute_imbalance"), self._sums
        worst = self._tally.worst(WORST)
        over = state in ("finished", "ended")
        return {
            "folder": str(self.folder),
            "name": self.config.get("run", {}).get("name"),
            "seed": train.get("seed"),
            "state": state,
            "state_text": state_text,
            "step": step,
            "max_steps": max_steps,
            "samples": last.get("samples", 0),
            "samples_per_s": last.get("samples_per_s"),
            "samples_per_s_overall": last["samples"] / time_s if last and time_s else None,
            "loss": last.get("loss"),
            "lr": last.get("lr"),
            "grad_norm": last.get("grad_norm"),
            "accuracy": evaluation.get("accuracy"),
            "accuracy_step": evaluation.get("step"),
            "target": target,
            "forecast": None if over or isinstance(expected, str) else expected,
            "no_forecast": expected if isinstance(expected, str) and self.config and not over else None,
            "time_s": time_s,
            "remaining_at_most_s": 0.0 if over else left,
            "checkpoint": self._checkpoint(),
            "data_share": _of_step(last, "data_ms"),
            "data_share_overall": self._overall("data_s"),
            "exposed_share": _of_step(last, "exposed_ms"),
            "exposed_share_overall": self._overall("exposed_s"),
            "imbalance_measured": float(np.mean(imbalance)) if imbalance else None,
            "imbalance_measured_overall": (
                sums["imbalance"] / sums["imbalance_steps"] if sums.get("imbalance_steps") else None
            ),
            "slowest": [{"name": stragglers.rank_name(each.rank, self.hosts), **each._asdict()} for each in worst],
            "slow_text": self._slow_text(worst),
            "skipped": len(self._skipped),
            "skipped_last": self._skipped[-1] if self._skipped else None,
            "sessions": max(1 + max(self._resumed, self._rewinds), whole_number((record or {}).get("sessions")) or 1),
            "lines_left_out": self._left_out,
            "losses": sparkline([loss for _, loss in self.losses]),
        }

    def _state(self, record: dict[str, Any] | None) -> tuple[str, str]:
        if not self.folder.is_dir():
            return "waiting", "waiting: the folder is not there yet"
        if record is not None:
            if record.get("target_accuracy") is None:
                return "finished", "finished: all steps done, no target was set"
            reached = object_or_empty(record.get("metrics")).get("target_reached")
            return "finished", f"finished: target {'reached' if reached else 'missed'}"
        stopped = read_object(self.folder / STOPPED)
        if stopped is not None:
            where = f"stopped by {shown(stopped.get('signal'), 40)} at step {whole_number(stopped.get('step')) or 0:,}"
            return "stopped", f"{where}; --resume goes on"
        if self._run_stop:
            return "ended", f"ended ({self._run_stop}), with no {RECORD}: it is being written, or the run failed"
        quiet = self._quiet_s()
        if self.last is None and not self.evaluations:
            return "waiting", f"waiting for the first line; last sign of life {seconds_text(quiet)} ago"
        if quiet > max(SILENT_S, 3 * self._gap_s):
            return "silent", f"silent since {seconds_text(quiet)} (longest gap between lines: {self._gap_s:.1f} s)"
        return "running", "running"

    def _quiet_s(self) -> float:
        """Seconds since the run wrote anything, by the file system's clock against this machine's."""
        ages = [_age_s(self.folder / name) for name in (".", METRICS_LINES, RESULT_LOG, CHECKPOINTS)]
        return min((age for age in ages if age is not None), default=0.0)

    def _checkpoint(self) -> dict[str, float] | None:
        checkpoints = checkpoints_in(self.folder / CHECKPOINTS)
        age_s = _age_s(checkpoints[-1] / CHECKPOINT_MANIFEST) if checkpoints else None
        return None if age_s is None else {"step": step_of(checkpoints[-1]), "age_s": age_s}

    def _sample_limit(self) -> float | None:
        steps, batch = (
            self.config.get(s, {}).get(n) for s, n in (("train", "max_steps"), ("batch", "global_batch_size"))
        )
        return None if steps is None or batch is None else steps * batch

    def _overall(self, name: str) -> float | None:
        return self._sums[name] / self._sums["time_s"] if self._sums.get("time_s") else None

    def _slow_text(self, worst: list[Straggler]) -> str | None:
        if self._tally.total is not None:
            return stragglers.text(worst, self.hosts, unit="log intervals")
        ranks = len((self.last or {}).get("compute_ms") or [])
        return "not told: ranks were given unequal work" if ranks > 1 else None


def _of_step(line: dict[str, Any], name: str) -> float | None:
    """A line's milliseconds a step as a share of the step."""
    if line.get(name) is None:
        return None
    return line[name] / 1e3 * line["samples_per_s"] / (line["samples"] / line["step"])


def _age_s(path: Path) -> float | None:
    """Seconds since a file or folder was changed; None if it is not there (any more)."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None
