"""Reads BERT result logs of any submitter and round: time, samples, steps, rates, start-up."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bert_fast.errors import UserError
from bert_fast.foreign import number, parse_json, read_bounded, shown, whole_number

_MARK = b":::MLLOG"
_LINE_END = re.compile(rb"[\r\n]")
MOST_LOG_BYTES = 256 << 20
_MOST_LINE_BYTES = 1 << 20
_MOST_EVENT_BYTES = 16 << 20  # of all events together, which take many times their size once parsed
_WHOLE_SET = 156_725_653  # samples of MLPerf's training set, of which a run sees a few percent


class Evaluation(NamedTuple):
    """An evaluation: seconds after run_start, samples until then (None if the log does not say), masked-LM accuracy."""

    time_s: float
    samples: int | None
    accuracy: float


@dataclass(frozen=True)
class RunScore:
    """One run. Times are in seconds after run_start. Values that the log does not give are None.

    `samples_key` is where the samples were read: epoch_num or samples_count of the evaluations, or train_samples. A log that
    is cut off has no run_stop, and its `time_s` ends with its last event.
    """

    path: str
    division: str
    global_batch_size: int | None
    seed: int | str | None
    converged: bool
    time_s: float
    samples: int | None
    steps: int | None
    startup_s: float | None
    step_s: float | None
    target: float | None
    evaluations: tuple[Evaluation, ...]
    samples_key: str | None = None
    cut_off: bool = False


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """The events of a log. Text before the mark (rank prefixes), other lines and an unfinished last line are ignored.

    Every event has a `key` (text), a `value`, and `time_ms` as a number.

    Raises:
        UserError: there are no events, one is damaged (the line is named), or the file is larger than a log can be.
    """
    try:
        data = read_bounded(path, MOST_LOG_BYTES, "a result log")
    except FileNotFoundError as error:
        raise UserError(f"{shown(path)}: {error.strerror}") from None
    events, size, line, counted = [], 0, 1, 0
    at = data.find(_MARK)
    while at >= 0:
        line, counted = line + data.count(b"\n", counted, at), at
        found = _LINE_END.search(data, at)
        end = found.start() if found else len(data)
        size += end - at
        where = f"{shown(path)}: line {line}"
        if end - at > _MOST_LINE_BYTES:
            raise UserError(
                f"{where} has {end - at:,} bytes, and of an MLLOG event at most {_MOST_LINE_BYTES:,} are read"
            )
        if size > _MOST_EVENT_BYTES:
            raise UserError(
                f"{where}: more than {_MOST_EVENT_BYTES >> 20} MiB of MLLOG events; a log of BERT has less than one"
            )
        event = _event(data[at + len(_MARK) : end].decode("utf-8", "replace"))
        if event is None and found:
            raise UserError(f"{where} is no MLLOG event")
        if event is not None:
            events.append(event)
        at = data.find(_MARK, end)
    if not events:
        raise UserError(f"{shown(path)}: no MLLOG line in it")
    return events


def _event(text: str) -> dict[str, Any] | None:
    """The event in a text, or None if the text is not one."""
    try:
        event = parse_json(text)
    except ValueError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("key"), str) or "value" not in event:
        return None
    time_ms = _number(event.get("time_ms"))
    return None if time_ms is None else {**event, "time_ms": time_ms}


def _number(value: Any) -> float | None:
    """`value` as a finite number, also if it was written as text; else None."""
    if isinstance(value, str) and len(value) < 40:
        try:
            value = float(value)
        except ValueError:
            return None
    return number(value)


def _metadata(event: dict[str, Any]) -> dict[str, Any]:
    found = event.get("metadata")
    return found if isinstance(found, dict) else {}


def score_run(path: str | Path) -> RunScore:
    """Score one log.

    The time of a step is the median time between evaluations divided by the steps between them, so it includes evaluation. If
    only the samples of the whole run are known, it is the time to the last evaluation divided by all steps. The start-up time
    is the time to the first evaluation minus its steps at that pace. It is known if the first evaluation came after as many
    samples as the later ones; otherwise evaluations are left out of the pace, if the log says how long they took.

    Raises:
        UserError: not a log, or a value has another type than its key requires.
    """
    events = read_events(path)
    last = {event["key"]: event for event in events}
    cut_off = "run_stop" not in last
    if not cut_off and "run_start" not in last:
        raise UserError(f"{shown(path)}: the log has a run_stop and no run_start")
    batch = _global_batch(path, last, required=not cut_off)
    begin = next((event["time_ms"] for event in events if event["key"] == "run_start"), None)
    end = events[-1]["time_ms"] if cut_off else last["run_stop"]["time_ms"]
    time_s = 0.0 if begin is None else (end - begin) / 1e3
    if time_s < 0 and not cut_off:
        raise UserError(f"{shown(path)}: run_stop comes before run_start")
    evaluations, key, samples = _evaluations(path, events, end if begin is None else begin, batch)
    step_s = _step_s(evaluations, batch, samples)
    return RunScore(
        path=str(path),
        division=shown(last.get("submission_division", {}).get("value", "unknown"), 20),
        global_batch_size=batch,
        seed=_seed(last["seed"]["value"]) if "seed" in last else None,
        converged=not cut_off and _metadata(last["run_stop"]).get("status") == "success",
        time_s=max(0.0, time_s),
        samples=samples,
        steps=round(samples / batch) if samples is not None and batch else None,
        startup_s=_startup_s(evaluations, _pauses(events, begin), batch, step_s),
        step_s=step_s,
        target=_number(last["target_accuracy"]["value"]) if "target_accuracy" in last else None,
        evaluations=evaluations,
        samples_key=key,
        cut_off=cut_off,
    )


def _seed(value: Any) -> int | str | None:
    return value if value is None or whole_number(value, 1 << 64) is not None else shown(value, 40)


def _global_batch(path: str | Path, last: dict[str, dict[str, Any]], required: bool) -> int | None:
    if "global_batch_size" not in last:
        if required:
            raise UserError(f"{shown(path)}: the log has no global_batch_size")
        return None
    value = last["global_batch_size"]["value"]
    batch = whole_number(_number(value), 1_000_000_000)
    if not batch:
        raise UserError(f"{shown(path)}: global_batch_size is {shown(value, 40)}; it must be a whole number above 0")
    return batch


# ---- samples --------------------------------------------------------------------------------------------------------


def _evaluations(
    path: str | Path, events: list[dict[str, Any]], begin: float, batch: int | None
) -> tuple[tuple[Evaluation, ...], str | None, int | None]:
    """The evaluations, the key that tells their samples, and the samples of the run.

    By the rules `epoch_num` counts samples. Some logs of the first rounds count epochs there, or write 1, and have the samples
    under `train_samples`, which in others is the size of the data set, or an accuracy. The first key whose values can be
    samples is used.
    """
    times, accuracies = [], []
    readings: dict[str, list[Any]] = {"epoch_num": [], "samples_count": [], "train_samples": []}
    totals = [event["value"] for event in events if event["key"] == "train_samples"]
    for event in events:
        if event["key"] != "eval_accuracy":
            continue
        accuracy = event["value"]
        if _as_float(accuracy) is None:
            raise UserError(f"{shown(path)}: eval_accuracy is {shown(accuracy, 40)}; it must be a number")
        times.append((event["time_ms"] - begin) / 1e3)
        accuracies.append(float(accuracy))
        metadata = _metadata(event)
        for key, values in readings.items():
            values.append(metadata.get(key))
    steps = [whole_number(_number(event["value"])) for event in events if event["key"] == _TRAINING_STEPS]
    limit = 2 * batch * steps[-1] if batch and steps and steps[-1] else None
    for key, values in readings.items():
        counts = [whole_number(_floored(value)) for value in values]
        if _are_samples(counts, batch, limit if key == "train_samples" else None):
            found = tuple(map(Evaluation, times, counts, accuracies))
            return found, key, max(count for count in counts if count is not None)
    unknown = tuple(Evaluation(time, None, accuracy) for time, accuracy in zip(times, accuracies, strict=True))
    counts = [whole_number(_number(value)) for value in totals]
    rising = None not in counts and counts == sorted(counts, key=lambda count: count or 0) and len(set(counts)) > 1
    if rising and len(counts) == len(times) and _are_samples(counts, batch, limit):  # one with each evaluation
        return tuple(map(Evaluation, times, counts, accuracies)), "train_samples", counts[-1]
    total = next((count for count in reversed(counts) if _are_samples([count], batch, limit)), None)
    return unknown, None if total is None else "train_samples", total


_TRAINING_STEPS = "opt_learning_rate_training_steps"


def _as_float(value: Any) -> float | None:
    """`value` as a number, which may be NaN or infinite; None if it is not one."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _floored(value: Any) -> float | None:
    found = _number(value)
    return None if found is None else float(math.floor(found))


def _are_samples(counts: Sequence[int | None], batch: int | None, limit: int | None) -> bool:
    """Whether counts at evaluations can be samples that a run has seen: at least a batch, and less than the data set.

    Args:
        limit: more than this is not possible either.
    """
    known = [count for count in counts if count is not None]
    if not known or 2 * len(known) < len(counts) or not batch:
        return False
    gaps = [b - a for a, b in itertools.pairwise(known) if b != a]
    least = statistics.median(gaps) if gaps else known[-1]
    most = min(_WHOLE_SET - 1, limit or _WHOLE_SET)
    return max(known) >= batch and least >= batch and max(known) <= most


# ---- times ----------------------------------------------------------------------------------------------------------


def _known_gaps(evaluations: Sequence[Evaluation]) -> Iterator[tuple[Evaluation, Evaluation, int]]:
    """Pairs of successive evaluations, with the samples between them where both are known."""
    for a, b in itertools.pairwise(evaluations):
        if a.samples is not None and b.samples is not None and b.samples > a.samples and b.time_s > a.time_s:
            yield a, b, b.samples - a.samples


def _step_s(evaluations: Sequence[Evaluation], batch: int | None, samples: int | None) -> float | None:
    if not batch or not samples:
        return None
    paces = [(b.time_s - a.time_s) * batch / between for a, b, between in _known_gaps(evaluations)]
    if paces:
        return statistics.median(paces)
    if evaluations and evaluations[-1].samples is None and evaluations[-1].time_s > 0:
        return evaluations[-1].time_s * batch / samples
    return None


def _pauses(events: list[dict[str, Any]], begin: float | None) -> list[tuple[float, float]]:
    """When evaluations began and ended, in seconds after run_start, where the log has both."""
    found, start = [], None
    for event in events:
        if event["key"] == "eval_start":
            start = event["time_ms"]
        elif event["key"] == "eval_stop" and start is not None and begin is not None:
            found.append(((start - begin) / 1e3, (event["time_ms"] - begin) / 1e3))
            start = None
    return found


def _startup_s(
    evaluations: Sequence[Evaluation], pauses: list[tuple[float, float]], batch: int | None, step_s: float | None
) -> float | None:
    first = next((each for each in evaluations if each.samples), None)
    gaps = list(_known_gaps(evaluations))
    if first is None or first.samples is None or not gaps or not batch or step_s is None:
        return None
    steps = first.samples / batch
    if abs(first.samples - statistics.median(between for _, _, between in gaps)) <= batch:
        found = first.time_s - step_s * steps
    elif pauses:
        paces = [(b.time_s - a.time_s - _within(pauses, a.time_s, b.time_s)) * batch / n for a, b, n in gaps]
        found = first.time_s - _within(pauses, 0.0, first.time_s) - statistics.median(paces) * steps
    else:
        return None
    return found if found >= 0 else None


def _within(pauses: list[tuple[float, float]], begin: float, end: float) -> float:
    return sum(max(0.0, min(end, stop) - max(begin, start)) for start, stop in pauses)


@dataclass(frozen=True)
class SystemScore:
    """The runs of one system, and MLPerf's score of them."""

    name: str
    accelerators: int | None
    runs: tuple[RunScore, ...]
    scale: float = (
        1.0  # above 1 for a closed result that was faster than the reference, from scaling.json beside the logs
    )

    @property
    def scaled_minutes(self) -> float | None:
        """MLPerf's score: minutes, times the factor that the reference convergence points require."""
        return None if self.minutes is None else self.minutes * self.scale

    @property
    def minutes(self) -> float | None:
        """Mean of the times without the fastest and the slowest; a run that did not converge counts as the slowest.

        None if more than one did not converge, or there are fewer than 3 runs.
        """
        times = sorted(run.time_s if run.converged else float("inf") for run in self.runs)
        kept = times[1:-1]
        return statistics.fmean(kept) / 60 if kept and kept[-1] != float("inf") else None

    def mean(self, field: str) -> float | None:
        """Mean of a field over the converged runs that know it; None if no run does."""
        values = [getattr(run, field) for run in self.runs if run.converged and getattr(run, field) is not None]
        return statistics.fmean(values) if values else None

    @property
    def rate(self) -> float | None:
        """Samples/s per accelerator over whole runs."""
        samples, seconds = self.mean("samples"), self.mean("time_s")
        return samples / seconds / self.accelerators if samples and seconds and self.accelerators else None

    @property
    def global_batch_size(self) -> int | None:
        """The global batch size of the first run whose log has it."""
        return next((run.global_batch_size for run in self.runs if run.global_batch_size is not None), None)

    @property
    def samples_to_converge(self) -> list[float | None] | None:
        """Samples of each run, None for one that did not converge; None if those of a converged run are not known."""
        if any(run.converged and run.samples is None for run in self.runs):
            return None
        return [run.samples if run.converged else None for run in self.runs]

    @property
    def samples_keys(self) -> str:
        """Where samples were read in the runs, separated by blanks."""
        return " ".join(dict.fromkeys(run.samples_key for run in self.runs if run.samples_key)) or "-"


def score_folder(folder: str | Path) -> SystemScore:
    """Score all result_*.txt of a folder. The accelerators come from the submission's systems/NAME.json, if it exists.

    Raises:
        UserError: there are no result files, or one cannot be read.
    """
    folder = Path(folder)
    files = [folder] if folder.is_file() else sorted(folder.glob("result_*.txt"))
    if not files:
        raise UserError(f"{shown(folder)}: no result_*.txt in it")
    system = folder.parent.name if folder.name == "bert" else folder.stem
    runs = tuple(score_run(path) for path in files)
    return SystemScore(shown(system, 80), _accelerators(folder, system), runs, _scale(folder))


_MOST_JSON_BYTES = 1 << 20


def _scale(folder: Path) -> float:
    """The factor that MLPerf's package checker left beside published closed results."""
    path = folder / "scaling.json"
    if not path.is_file():
        return 1.0
    factor = _number(_object(path, "a scaling.json").get("scaling_factor"))
    if factor is None or not 0 < factor < 1000:
        raise UserError(f"{shown(path)}: no scaling_factor in it that is a number above 0")
    return factor


def _object(path: Path, what: str) -> dict[str, Any]:
    try:
        found = parse_json(read_bounded(path, _MOST_JSON_BYTES, what))
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{shown(path)} is no JSON: {shown(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{shown(path)} is no JSON object")
    return found


def _accelerators(folder: Path, system: str) -> int | None:
    """The accelerators by the system description in a folder above; None without one, or if it lacks a number."""
    for parent in folder.resolve().parents:
        description = parent / "systems" / f"{system}.json"
        if description.is_file():
            values = _object(description, "a system description")
            nodes, each = (
                whole_number(_number(values.get(name)), 1_000_000)
                for name in ("number_of_nodes", "accelerators_per_node")
            )
            return None if nodes is None or each is None else nodes * each
    return None
