"""A run as it goes, seen through its folder alone: what its files say now, as plain values.

Only reads, so any machine that sees the folder can look. On network file systems lines come late, by the writer's cache.
The files may be anyone's: what is not of the kind that a run writes is left out, and lines of it are counted.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast.errors import UserError
from bert_fast.foreign import number, open_regular, parse_json, parse_yaml, read_bounded, shown, whole_number
from bert_fast.report import stragglers
from bert_fast.report.console import seconds_text
from bert_fast.report.metrics import MOST_LINE_BYTES
from bert_fast.run_folder import CHECKPOINT_MANIFEST, checkpoints_in

SILENT_S = 30.0  # no run is called silent before, nor before three times its longest gap between lines
WORST = 3  # ranks shown
_UNEQUAL = 1.01  # planned imbalance above which a rank's mean time says nothing of its hardware
_HEAD = 256  # first bytes of a file, by which one that was replaced is known
_BLOCK = 1 << 22
_MOST_JSON_BYTES = 64 << 20
_MOST_CONFIG_BYTES = 1 << 18
_MOST_RANKS = 1_000_000
_CHECKPOINT = re.compile(r"step-[0-9]{1,15}")
_BARS = "▁▂▃▄▅▆▇█"


class Tail:
    """Whole lines of a file that grows, each once; from its beginning again if it was replaced."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset, self._head = path, 0, b""

    def read(self) -> tuple[bool, Iterator[bytes]]:
        """Whether the file is another than at the last call, and its new lines. A last line without its end waits.

        Raises:
            UserError: no regular file, one that cannot be read, or (from the lines) a line longer than any of a run.
        """
        try:
            descriptor = open_regular(self.path)  # anew each time: so a network file system asks its server
        except FileNotFoundError:
            replaced = self._offset > 0
            self._offset, self._head = 0, b""
            return replaced, iter(())
        file = os.fdopen(descriptor, "rb")
        head = file.read(_HEAD)
        replaced = not head.startswith(self._head)  # a shorter file does not start so either, or is caught below
        replaced = replaced or file.seek(0, 2) < self._offset
        if replaced:
            self._offset = 0
        self._head = head
        return replaced, self._lines(file)

    def _lines(self, file: Any) -> Iterator[bytes]:
        with file:
            file.seek(self._offset)
            rest = b""
            while block := file.read(_BLOCK):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    self._offset += len(line) + 1
                    yield line
                if len(rest) > MOST_LINE_BYTES:
                    raise UserError(
                        f"{shown(self.path)}: the line at byte {self._offset:,} is longer than {MOST_LINE_BYTES >> 20} MiB; "
                        "no run writes such lines"
                    )


class RunWatch:
    """What a run's folder says. `poll()` reads what is new, `snapshot()` gives the state of things."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config: dict[str, Any] = {}
        self._metrics = Tail(self.folder / "metrics.jsonl")
        self._log = Tail(self.folder / "result_0.txt")
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
        """Read what the files gained. Raises UserError if the folder is there and is no run's."""
        self._check()
        if not self.config or self.last is None:  # written once, before the first line
            self.config = _read_config(self.folder / "config.yaml")
        replaced, lines = self._metrics.read()
        if replaced:
            self._forget()
            self.config = _read_config(self.folder / "config.yaml")
        for line in lines:
            self._take(line)
        replaced, lines = self._log.read()
        if replaced:
            self._forget_log()
        for line in lines:
            self._take_log(line)
        self.hosts = _host_names(_read_json(self.folder / "nodes.json")) or self.hosts  # a resumed run may be elsewhere

    def _check(self) -> None:
        try:
            names = {path.name for path in self.folder.iterdir() if not path.name.startswith(".")}
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise UserError(
                f"{shown(self.folder)} is a file; give the run's folder, that holds metrics.jsonl"
            ) from None
        except OSError as error:
            raise UserError(f"{shown(self.folder)}: {error.strerror}") from None
        if names and not names & {"config.yaml", "commit.txt", "metrics.jsonl"}:
            raise UserError(
                f"{shown(self.folder)} holds no run (no config.yaml, no metrics.jsonl); give a run's folder, such as "
                "runs/NAME-seed0"
            )

    def _take(self, text: bytes) -> None:
        line = _figures(text)
        if line is None:  # cut off by a crash, or not of a run
            self._left_out += 1
            return
        kind, step, time_s = line["kind"], line["step"], line.get("time_s")
        if time_s is not None:
            self._gap_s, self._time_s = max(self._gap_s, time_s - self._time_s), time_s
        if "hosts" in line:
            self.hosts = _host_names(line["hosts"]) or self.hosts
        if kind == "step":
            self._take_step(line, step)
        elif kind == "eval":
            self.evaluations.append(line)
        elif kind == "skipped":
            self._skipped.append(line)

    def _take_step(self, line: dict[str, Any], step: int) -> None:
        if self.last is not None and step <= self.last["step"]:  # resumed from a checkpoint before the last line
            self._rewinds += 1
            self.losses = [point for point in self.losses if point[0] < step]
            self.evaluations = [one for one in self.evaluations if one["step"] < step]
        before = self.losses[-1][0] if self.losses else 0
        self.last = line
        self.losses.append((step, line["loss"]))
        imbalance = line.get("compute_imbalance") or []
        steps = len(line.get("imbalance") or imbalance) or max(1, step - before)
        step_s = line["samples"] / step / line["samples_per_s"]
        for name, value in (
            ("steps", 1.0), ("time_s", step_s), ("data_s", line.get("data_ms", 0.0) / 1e3),
            ("exposed_s", line.get("exposed_ms", 0.0) / 1e3), ("optimizer_s", line.get("optimizer_ms", 0.0) / 1e3),
        ):  # fmt: skip
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
            self._run_stop = shown(_object(event.get("metadata")).get("status", "ended"), 40)
        elif event.get("key") in ("resumed", "run_start"):
            self._resumed += event["key"] == "resumed"
            self._run_stop = ""

    # ---- telling ----------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Everything shown, by name, as plain values: seconds, shares of 1, None where it is not known."""
        record = _read_object(self.folder / "metrics.json")
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
            "folder": str(self.folder), "name": self.config.get("run", {}).get("name"), "seed": train.get("seed"),
            "state": state, "state_text": state_text, "step": step, "max_steps": max_steps,
            "samples": last.get("samples", 0), "samples_per_s": last.get("samples_per_s"),
            "samples_per_s_overall": last["samples"] / time_s if last and time_s else None,
            "loss": last.get("loss"), "lr": last.get("lr"), "grad_norm": last.get("grad_norm"),
            "accuracy": evaluation.get("accuracy"), "accuracy_step": evaluation.get("step"), "target": target,
            "forecast": None if over or isinstance(expected, str) else expected,
            "no_forecast": expected if isinstance(expected, str) and self.config and not over else None,
            "time_s": time_s, "remaining_at_most_s": 0.0 if over else left, "checkpoint": self._checkpoint(),
            "data_share": _of_step(last, "data_ms"), "data_share_overall": self._overall("data_s"),
            "exposed_share": _of_step(last, "exposed_ms"), "exposed_share_overall": self._overall("exposed_s"),
            "imbalance_measured": float(np.mean(imbalance)) if imbalance else None,
            "imbalance_measured_overall": (
                sums["imbalance"] / sums["imbalance_steps"] if sums.get("imbalance_steps") else None
            ),
            "slowest": [{"name": stragglers.rank_name(one.rank, self.hosts), **one._asdict()} for one in worst],
            "slow_text": self._slow_text(worst), "skipped": len(self._skipped),
            "skipped_last": self._skipped[-1] if self._skipped else None,
            "sessions": max(1 + max(self._resumed, self._rewinds), whole_number((record or {}).get("sessions")) or 1),
            "lines_left_out": self._left_out,
            "losses": sparkline([loss for _, loss in self.losses]),
        }  # fmt: skip

    def _state(self, record: dict[str, Any] | None) -> tuple[str, str]:
        if not self.folder.is_dir():
            return "waiting", "waiting: the folder is not there yet"
        if record is not None:
            if record.get("target_accuracy") is None:
                return "finished", "finished: all steps done, no target was set"
            reached = _object(record.get("metrics")).get("target_reached")
            return "finished", f"finished: target {'reached' if reached else 'missed'}"
        stopped = _read_object(self.folder / "stopped.json")
        if stopped is not None:
            where = f"stopped by {shown(stopped.get('signal'), 40)} at step {whole_number(stopped.get('step')) or 0:,}"
            return "stopped", f"{where}; --resume goes on"
        if self._run_stop:
            return "ended", f"ended ({self._run_stop}), with no metrics.json: it is being written, or the run failed"
        quiet = self._quiet_s()
        if self.last is None and not self.evaluations:
            return "waiting", f"waiting for the first line; last sign of life {seconds_text(quiet)} ago"
        if quiet > max(SILENT_S, 3 * self._gap_s):
            return "silent", f"silent since {seconds_text(quiet)} (longest gap between lines: {self._gap_s:.1f} s)"
        return "running", "running"

    def _quiet_s(self) -> float:
        """Seconds since the run wrote anything, by the file system's clock against this machine's."""
        ages = [_age_s(self.folder / name) for name in (".", "metrics.jsonl", "result_0.txt", "checkpoints")]
        return min((age for age in ages if age is not None), default=0.0)

    def _checkpoint(self) -> dict[str, float] | None:
        found = [path for path in checkpoints_in(self.folder / "checkpoints") if _CHECKPOINT.fullmatch(path.name)]
        age = _age_s(found[-1] / CHECKPOINT_MANIFEST) if found else None
        return None if age is None else {"step": int(found[-1].name.removeprefix("step-")), "age_s": age}

    def _sample_limit(self) -> float | None:
        steps, batch = (
            self.config.get(s, {}).get(n) for s, n in (("train", "max_steps"), ("batch", "global_batch_size"))
        )
        return None if steps is None or batch is None else steps * batch

    def _overall(self, name: str) -> float | None:
        return self._sums[name] / self._sums["time_s"] if self._sums.get("time_s") else None

    def _slow_text(self, worst: list[stragglers.Straggler]) -> str | None:
        if self._tally.total is not None:
            return stragglers.text(worst, self.hosts, unit="log intervals")
        ranks = len((self.last or {}).get("compute_ms") or [])
        return "not told: ranks were given unequal work" if ranks > 1 else None


# ---- pieces ---------------------------------------------------------------------------------------------------------


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


def _figures(text: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl with what is read of it here, each of its kind; None if it is not a run's."""
    try:
        line = parse_json(text)
    except ValueError:
        return None
    kind, step = _object(line).get("kind"), whole_number(_object(line).get("step"))
    if not isinstance(kind, str) or step is None:
        return None
    try:
        found: dict[str, Any] = {"kind": kind, "step": step}
        if kind in ("step", "eval"):
            found |= {name: _reading(line, name) for name in _WANTED[kind]}
            if kind == "step" and (step < 1 or found["samples"] < 1):
                return None
        found |= {name: _reading(line, name) for name in _READINGS if line.get(name) is not None and name not in found}
    except ValueError:
        return None
    return found


def _share(value: Any) -> float | None:
    """From 0 to 1, or NaN."""
    if isinstance(value, float) and math.isnan(value):
        return value
    found = number(value, 1)
    return None if found is None or found < 0 else found


def _any_number(value: Any) -> float | None:
    """Also of a run that diverged: NaN, or infinite if it is larger than can be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if -1e30 < value < 1e30 or (isinstance(value, float) and math.isnan(value)):
        return float(value)
    return math.inf if value > 0 else -math.inf


def _amount(value: Any) -> float | None:
    found = number(value, 1e12)
    return None if found is None or found < 0 else found


def _rate(value: Any) -> float | None:
    return number(value) if isinstance(value, int | float) and value > 0 else None


def _amounts(value: Any) -> list[float] | None:
    found = [_amount(one) for one in value] if isinstance(value, list) else [None]
    return None if None in found else found  # type: ignore[return-value]


def _ranks(value: Any) -> list[int] | None:
    found = [whole_number(one) for one in value[:8]] if isinstance(value, list) else [None]
    return None if None in found else found  # type: ignore[return-value]


# How each value of a line is read; None is one of another kind
_READINGS: dict[str, Any] = {
    "samples": whole_number, "time_s": _amount, "loss": _any_number, "lr": _any_number, "grad_norm": _any_number,
    "samples_per_s": _rate, "imbalance": _amounts, "compute_imbalance": _amounts, "compute_ms": _amounts,
    "data_ms_rank": _amounts, "exposed_ms_rank": _amounts, "exposed_ms": _amount, "data_ms": _amount,
    "optimizer_ms": _amount, "accuracy": _share, "bad_step": whole_number, "ranks": _ranks,
    "hosts": lambda value: value if isinstance(value, list) else None,
}  # fmt: skip
_WANTED = {"step": ("samples", "loss", "samples_per_s"), "eval": ("samples", "time_s", "accuracy")}


def _reading(line: dict[str, Any], name: str) -> Any:
    """A value of a line. Raises ValueError if it is of another kind than its name wants."""
    found = _READINGS[name](line.get(name))
    if found is None:
        raise ValueError(name)
    return found


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_json(path: Path) -> Any:
    try:
        return parse_json(read_bounded(path, _MOST_JSON_BYTES, "a run's record"))
    except (FileNotFoundError, ValueError):  # not there, or of a foreign writer that is not done
        return None


def _read_object(path: Path) -> dict[str, Any] | None:
    found = _read_json(path)
    return found if isinstance(found, dict) else None


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    """What is shown of a config, by section; None for a value of another kind."""
    try:
        tree = _object(parse_yaml(read_bounded(path, _MOST_CONFIG_BYTES, "a config").decode("utf-8")))
    except (FileNotFoundError, ValueError):
        return {}
    run, train, batch, evaluation = (_object(tree.get(name)) for name in ("run", "train", "batch", "evaluation"))
    if not (run or train or batch):
        return {}
    name = run.get("name")
    return {
        "run": {"name": None if name is None else shown(name, 100)},
        "train": {
            "seed": whole_number(train.get("seed"), 1 << 64), "max_steps": whole_number(train.get("max_steps")),
            },
        "evaluation": {
            "target_accuracy": number(evaluation.get("target_accuracy"), 1),
            "every_samples": whole_number(evaluation.get("every_samples")),
        },
        "batch": {"global_batch_size": whole_number(batch.get("global_batch_size"))},
    }  # fmt: skip


def _host_names(found: Any) -> list[str] | None:
    """Host names by rank, from a list of them or of {"rank", "host"}."""
    if not isinstance(found, list):
        return None
    if all(isinstance(one, str) for one in found):
        return [shown(one, 64) for one in found] or None
    by_rank = {whole_number(_object(one).get("rank"), _MOST_RANKS): _object(one).get("host") for one in found}
    if None in by_rank or not all(isinstance(host, str) for host in by_rank.values()):
        return None
    return [shown(by_rank.get(rank, ""), 64) for rank in range(max(by_rank) + 1)]  # type: ignore[type-var, operator]


def forecast(
    evaluations: Sequence[dict[str, Any]], target: float | None, every: int | None, limit: float | None = None
) -> dict[str, Any] | str:
    """When the target is reached if accuracy goes on along a straight line through the latest evaluations, or why not.

    The line goes through the later half of the evaluations, at least 4 and at most 8. It is no forecast unless its slope
    is above three times its standard error and the target no further ahead than the run has come. The result is the
    evaluation (one `every` so many samples) that sees the target: `samples`, `time_s` on the clock, `in_s` after the last
    evaluation, `within` whether that is before the run's `limit` of samples.
    """
    if target is None:
        return "no target is set"
    points = np.array(
        [[one["samples"], one["accuracy"], one["time_s"]] for one in evaluations if math.isfinite(one["accuracy"])]
    )
    if len(points) and points[-1, 1] >= target:
        return "reached"
    if len(points) < 4:
        return "no forecast: fewer than 4 evaluations"
    samples, accuracy, time_s = points[-min(8, max(4, len(points) // 2)) :].T
    spread = samples - samples.mean()
    slope = float(spread @ accuracy / (spread @ spread))
    rest = accuracy - accuracy.mean() - slope * spread
    error = math.sqrt(float(rest @ rest) / (len(rest) - 2) / float(spread @ spread))
    if slope <= 0 or slope <= 3 * error:
        return "no forecast: accuracy does not rise steadily"
    last = float(samples[-1])
    ahead = max(0.0, float(samples.mean() + (target - accuracy.mean()) / slope) - last)
    if ahead > last:
        return "no forecast: the target is further ahead than the run has come"
    if every:
        ahead = max(1, math.ceil(ahead / every)) * every
    in_s = ahead * float((time_s[-1] - time_s[0]) / (last - samples[0]))
    return {
        "samples": round(last + ahead), "time_s": float(time_s[-1]) + in_s, "in_s": in_s, "evaluations": len(samples),
        "within": limit is None or last + ahead <= limit,
    }  # fmt: skip


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Values as bars, means of equal parts where there are more than `width`; ? where nothing is finite."""
    parts = np.array_split(np.array(values, dtype=float), min(width, len(values))) if values else []
    means = [float(part[np.isfinite(part)].mean()) if np.isfinite(part).any() else math.nan for part in parts]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return "?" * len(means)
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join("?" if math.isnan(mean) else _BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)
