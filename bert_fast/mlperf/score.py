"""What a published BERT result log says: time, samples, steps, rates, start-up. Reads logs of any submitter and round."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_fast.errors import UserError

_MARK = ":::MLLOG"


@dataclass(frozen=True)
class RunScore:
    """One run. Times in seconds after run_start; `evaluations` are (seconds, samples, accuracy)."""

    path: str
    division: str
    global_batch: int
    seed: int | None
    converged: bool
    time_s: float
    samples: int
    steps: int
    startup_s: float | None
    step_s: float | None
    target: float | None
    evaluations: tuple[tuple[float, int, float], ...]


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """Events of a log; text before the mark (rank prefixes) and other lines are left. Raises UserError if there are none."""
    events = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                mark = line.find(_MARK)
                if mark < 0:
                    continue
                try:
                    event = json.loads(line[mark + len(_MARK) :])
                    float(event["time_ms"]), str(event["key"]), event["value"]
                except (ValueError, TypeError, KeyError):
                    raise UserError(f"{path}: line {number} is no MLLOG event") from None
                events.append(event)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not events:
        raise UserError(f"{path}: no MLLOG line in it")
    return events


def score_run(path: str | Path) -> RunScore:
    """Score one log.

    The time of a step is the median gap between evaluations over their steps, so it contains evaluation; start-up is the time
    to the first evaluation beyond its steps at that pace.

    Raises:
        UserError: no log, or one without run_start or run_stop.
    """
    events = read_events(path)
    try:
        return _scored(path, events)
    except (ValueError, TypeError, KeyError, ZeroDivisionError, AttributeError) as error:
        raise UserError(f"{path}: an event has a value of another kind than its key wants ({error})") from None


def _scored(path: str | Path, events: list[dict[str, Any]]) -> RunScore:
    last: dict[str, dict[str, Any]] = {event["key"]: event for event in events}
    for key in ("run_start", "run_stop", "global_batch_size"):
        if key not in last:
            raise UserError(f"{path}: the log has no {key}")
    begin = next(event["time_ms"] for event in events if event["key"] == "run_start")
    batch = int(last["global_batch_size"]["value"])
    evaluations = []
    for event in events:
        if event["key"] == "eval_accuracy":
            samples = (event.get("metadata") or {}).get("epoch_num", 0)
            evaluations.append(((event["time_ms"] - begin) / 1e3, int(samples), float(event["value"])))
    pairs = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(evaluations) if b[1] > a[1]]
    step_s = statistics.median(seconds * batch / samples for seconds, samples in pairs) if pairs else None
    startup_s = evaluations[0][0] - step_s * evaluations[0][1] / batch if step_s and evaluations else None
    samples = max((samples for _, samples, _ in evaluations), default=0)
    status = (last["run_stop"].get("metadata") or {}).get("status")
    return RunScore(
        str(path), str(last.get("submission_division", {}).get("value", "unknown")), batch,
        last["seed"]["value"] if "seed" in last else None, status == "success",
        (last["run_stop"]["time_ms"] - begin) / 1e3, samples, round(samples / batch), startup_s, step_s,
        last["target_accuracy"]["value"] if "target_accuracy" in last else None, tuple(evaluations),
    )  # fmt: skip


@dataclass(frozen=True)
class SystemScore:
    """The runs of one system, and MLPerf's score of them."""

    name: str
    accelerators: int | None
    runs: tuple[RunScore, ...]
    scale: float = 1.0  # of a closed result that was faster than the reference, from scaling.json beside the logs

    @property
    def scaled_minutes(self) -> float | None:
        """MLPerf's score: minutes, times the factor that the reference convergence asks for."""
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
        """Mean of a figure over the converged runs."""
        values = [getattr(run, field) for run in self.runs if run.converged and getattr(run, field) is not None]
        return statistics.fmean(values) if values else None

    @property
    def rate(self) -> float | None:
        """Samples/s per accelerator over whole runs."""
        samples, seconds = self.mean("samples"), self.mean("time_s")
        return samples / seconds / self.accelerators if samples and seconds and self.accelerators else None


def score_folder(folder: str | Path) -> SystemScore:
    """All result_*.txt of a folder; the accelerators from systems/NAME.json of the submission, if that is there.

    Raises:
        UserError: there are no result files, or one cannot be read.
    """
    folder = Path(folder)
    files = [folder] if folder.is_file() else sorted(folder.glob("result_*.txt"))
    if not files:
        raise UserError(f"{folder}: no result_*.txt in it")
    system = folder.parent.name if folder.name == "bert" else folder.stem
    runs = tuple(score_run(path) for path in files)
    return SystemScore(system, _accelerators(folder, system), runs, _scale(folder))


def _scale(folder: Path) -> float:
    """The factor that MLPerf's package checker left beside published closed results."""
    path = folder / "scaling.json"
    if not path.is_file():
        return 1.0
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["scaling_factor"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: no scaling_factor in it") from None


def _accelerators(folder: Path, system: str) -> int | None:
    for parent in folder.resolve().parents:
        description = parent / "systems" / f"{system}.json"
        if description.is_file():
            try:
                values = json.loads(description.read_text(encoding="utf-8"))
                return int(values["number_of_nodes"]) * int(values["accelerators_per_node"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{description}: number_of_nodes and accelerators_per_node must be numbers") from None
    return None
