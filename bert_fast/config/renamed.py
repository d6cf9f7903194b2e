"""The settings that had another name in earlier versions. They are refused with the new name, and not read.

Configs, scripts and run folders from before hold them. A message with the new name is enough to bring a file up to date.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import yaml

from bert_fast.command import one_line


class Renamed(NamedTuple):
    """The new name of a field and, where its value is written in another way, the new value.

    `value` gives that from the old section, as YAML's plain values.
    """

    field: str
    value: Callable[[Mapping[str, Any]], Any] | None = None


def _step_per_bucket(optimizer: Mapping[str, Any]) -> bool:
    return optimizer["when"] == "bucket"


def _cost(balance: Mapping[str, Any]) -> Any:
    """The one `balance.cost` that says what four fields said."""
    if balance.get("fit_cost"):
        return "measure"
    if balance.get("cost_file") is not None:
        return balance["cost_file"]
    if balance.get("cost_linear") is None and balance.get("cost_quadratic") is None:
        return "flops"
    return {"linear": balance.get("cost_linear") or 0.0, "quadratic": balance.get("cost_quadratic") or 0.0}


RENAMED = {
    "run.matmul_ceiling": Renamed("run.measure_peak_flops"),
    "data.eval": Renamed("evaluation.data"),
    "data.eval_samples": Renamed("evaluation.num_samples"),
    "data.eval_sha256": Renamed("evaluation.sha256"),
    "data.verify_mb_s": Renamed("data.scrub_mb_per_s"),
    "batch.global_batch": Renamed("batch.global_batch_size"),
    "batch.local_batch": Renamed("batch.micro_batch_size"),
    "batch.accumulation": Renamed("batch.gradient_accumulation_steps"),
    "batch.eval_batch": Renamed("evaluation.batch_size"),
    "balance.cost_linear": Renamed("balance.cost", _cost),
    "balance.cost_quadratic": Renamed("balance.cost", _cost),
    "balance.cost_file": Renamed("balance.cost", _cost),
    "balance.fit_cost": Renamed("balance.cost", _cost),
    "balance.pack_rows": Renamed("balance.num_packs"),
    "balance.pack_depth": Renamed("balance.max_samples_per_pack"),
    "balance.pack_first": Renamed("balance.pack_order"),
    "optimizer.when": Renamed("optimizer.step_per_bucket", _step_per_bucket),
    "train.init_checkpoint": Renamed("checkpoint.init_from"),
    "train.checkpoint_every_steps": Renamed("checkpoint.every_steps"),
    "train.async_checkpoints": Renamed("checkpoint.async_save"),
    "train.keep_checkpoints": Renamed("checkpoint.keep_last"),
    "train.checkpoint_timeout_s": Renamed("checkpoint.timeout_s"),
    "train.save_final_model": Renamed("checkpoint.save_final_model"),
    "train.target_accuracy": Renamed("evaluation.target_accuracy"),
    "train.eval_every_samples": Renamed("evaluation.every_samples"),
    "train.eval_start_samples": Renamed("evaluation.start_samples"),
    "train.eval_at_start": Renamed("evaluation.at_start"),
    "system.settings": Renamed("system.machine_file"),
}


def renamed_settings(tree: Mapping[str, Any]) -> str | None:
    """What to say of the renamed settings in a config's plain values; None if there are none.

    One text: `batch.local_batch is now batch.micro_batch_size; optimizer.when: bucket is now optimizer.step_per_bucket: true`.
    """
    values: dict[Renamed, list[str]] = {}  # by what they are now: several fields may have become one
    for old, new in RENAMED.items():
        name_of_section, _, name = old.partition(".")
        section = tree.get(name_of_section)
        if isinstance(section, dict) and name in section:
            values.setdefault(new, []).append(f"{old}: {_plain(section[name])}" if new.value else old)
    parts = []
    for new, olds in values.items():
        before = f"{', '.join(olds[:-1])} and {olds[-1]} are now" if len(olds) > 1 else f"{olds[0]} is now"
        old_section = tree[olds[0].partition(".")[0]]
        parts.append(f"{before} {new.field}" + (f": {_plain(new.value(old_section))}" if new.value else ""))
    return "; ".join(parts) or None


def _plain(value: Any) -> str:
    """A value as YAML on one line."""
    try:
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1 << 16)
    except ValueError:  # an integer of thousands of digits
        return "..."
    return one_line(text.removesuffix("\n").removesuffix("\n..."), 100)
