"""The files of a run that anyone may have written: each value of the kind that a run writes, or left out.

The names are report.schema's and the config's. A run of an older form has other names, so that it is refused as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bert_fast.errors import UserError
from bert_fast.foreign import number, parse_json, parse_yaml, read_bounded, shown, whole_number
from bert_fast.report.schema import EVALUATION, MAX_RECORD_BYTES, STEP, check_format

_MOST_CONFIG_BYTES = 1 << 18
_MOST_RANKS = 1_000_000
_OLD_BATCH_SIZE = (
    "global_batch"  # is batch.global_batch_size now; config.yaml holds every setting, so every old one has it
)


def read_line(text: bytes) -> dict[str, Any] | None:
    """What is shown of a line of metrics.jsonl, each value of its kind; None if it is not a run's."""
    try:
        line = parse_json(text)
    except ValueError:
        return None
    kind, step = object_or_empty(line).get("kind"), whole_number(object_or_empty(line).get("step"))
    if not isinstance(kind, str) or step is None:
        return None
    try:
        values: dict[str, Any] = {"kind": kind, "step": step}
        values |= {name: _value(line, name) for name in REQUIRED_VALUES.get(kind, ())}
        if kind == STEP and (step < 1 or values["samples"] < 1):
            return None
        given = (name for name in VALUE_READERS if line.get(name) is not None and name not in values)
        return values | {name: _value(line, name) for name in given}
    except ValueError:
        return None


def _value(line: dict[str, Any], name: str) -> Any:
    """A value of a line. Raises ValueError if it is of another kind than its name wants."""
    value = VALUE_READERS[name](line.get(name))
    if value is None:
        raise ValueError(name)
    return value


def read_record(path: Path) -> dict[str, Any] | None:
    """A run's metrics.json; None if it is not there, or no JSON object yet. Raises UserError for one of an older form."""
    record = read_object(path)
    if record is not None:
        check_format(record, shown(path))
    return record


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file is not there or holds something else."""
    value = _read_json(path)
    return value if isinstance(value, dict) else None


def read_hosts(path: Path) -> list[str] | None:
    """Host names by rank, from a list of {"rank", "host"}; None if the file holds no such list."""
    entries = _read_json(path)
    if not isinstance(entries, list) or not entries:
        return None
    entries = [object_or_empty(entry) for entry in entries]
    by_rank = {whole_number(entry.get("rank"), _MOST_RANKS): entry.get("host") for entry in entries}
    if None in by_rank or not all(isinstance(host, str) for host in by_rank.values()):
        return None
    return [shown(by_rank.get(rank, ""), 64) for rank in range(max(by_rank) + 1)]  # type: ignore[type-var, operator]


def read_config(path: Path) -> dict[str, dict[str, Any]]:
    """What is shown of a config.yaml, by section; None for a value of another kind, and empty for what is no config.

    Raises:
        UserError: the config has the settings' names of an older form.
    """
    try:
        tree = object_or_empty(parse_yaml(read_bounded(path, _MOST_CONFIG_BYTES, "a config").decode("utf-8")))
    except (FileNotFoundError, ValueError):
        return {}
    run, train, batch, evaluation = (
        object_or_empty(tree.get(name)) for name in ("run", "train", "batch", "evaluation")
    )
    if not (run or train or batch):
        return {}
    if _OLD_BATCH_SIZE in batch:
        raise UserError(
            f"{shown(path)} was written before the settings were renamed (it has batch.{_OLD_BATCH_SIZE}); look at this run "
            "with the code that runs it, or run again"
        )
    name = run.get("name")
    return {
        "run": {"name": None if name is None else shown(name, 100)},
        "train": {
            "seed": whole_number(train.get("seed"), 1 << 64),
            "max_steps": whole_number(train.get("max_steps")),
        },
        "evaluation": {
            "target_accuracy": number(evaluation.get("target_accuracy"), 1),
            "every_samples": whole_number(evaluation.get("every_samples")),
        },
        "batch": {"global_batch_size": whole_number(batch.get("global_batch_size"))},
    }


def object_or_empty(value: Any) -> dict[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def _read_json(path: Path) -> Any:
    try:
        return parse_json(read_bounded(path, MAX_RECORD_BYTES, "a run's record"))
    except (FileNotFoundError, ValueError):  # not there, or of a foreign writer that is not done
        return None


# ---- kinds of values ------------------------------------------------------------------------------------------------


def _share(value: Any) -> float | None:
    """From 0 to 1, or NaN."""
    if isinstance(value, float) and math.isnan(value):
        return value
    share = number(value, 1)
    return None if share is None or share < 0 else share


def _any_number(value: Any) -> float | None:
    """Also of a run that diverged: NaN, or infinite if it is larger than can be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if -1e30 < value < 1e30 or (isinstance(value, float) and math.isnan(value)):
        return float(value)
    return math.inf if value > 0 else -math.inf


def _amount(value: Any) -> float | None:
    """From 0 to 1e12."""
    amount = number(value, 1e12)
    return None if amount is None or amount < 0 else amount


def _rate(value: Any) -> float | None:
    """Above 0."""
    return number(value) if isinstance(value, int | float) and value > 0 else None


def _amounts(value: Any) -> list[float] | None:
    amounts = [_amount(each) for each in value] if isinstance(value, list) else [None]
    return None if None in amounts else amounts  # type: ignore[return-value]


def _ranks(value: Any) -> list[int] | None:
    """The first ranks of a list."""
    ranks = [whole_number(each) for each in value[:8]] if isinstance(value, list) else [None]
    return None if None in ranks else ranks  # type: ignore[return-value]


VALUE_READERS: dict[str, Callable[[Any], Any]] = {
    "samples": whole_number, "time_s": _amount, "loss": _any_number, "lr": _any_number, "grad_norm": _any_number,
    "samples_per_s": _rate, "imbalance": _amounts, "compute_imbalance": _amounts, "compute_ms": _amounts,
    "data_ms_rank": _amounts, "exposed_ms_rank": _amounts, "exposed_ms": _amount, "data_ms": _amount,
    "optimizer_ms": _amount, "accuracy": _share, "bad_step": whole_number, "ranks": _ranks,
}  # fmt: skip
"""How each value of a line is read; a reader returns None for a value of another kind."""
REQUIRED_VALUES = {STEP: ("samples", "loss", "samples_per_s"), EVALUATION: ("samples", "time_s", "accuracy")}
"""What a line of a kind cannot be without."""
