"""Stage `memory`: what each switch takes on this device against what was predicted, and that it changes no loss.

On a CPU, where nobody counts tensors and nothing is offloaded, the same steps run and losses are compared.
"""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

from bert_fast.config import Config
from bert_fast.train.environment import Environment
from bert_fast.train.setup.build import build
from bert_fast.train.setup.memory_fit import memory_at_most
from bert_fast.train.setup.recomputation import longest_batch
from bert_fast.train.step import StepInput

from .parts import config_of, environment_of, precision_of, process_group
from .stage import CheckFailed, Context, NotAvailable
from .timing import peak_mib, repeat, reset_peak

_BATCH = 32
_STEPS = 3
_ROUNDED = 0.05  # relative difference of losses with rounded moments
_FSDP = {"engine": "fsdp", "clip": "global_after_reduce", "bucket_mb": 25.0}
# Settings by section, and whether the losses are those of the first to 1e-5: kernels of a GPU may add in another order
CASES: dict[str, tuple[dict[str, dict[str, Any]], bool]] = {
    "as it is": ({}, True),
    **{f"recompute {how}": ({"memory": {"recompute": how}}, True) for how in ("layer", "half_layer", "optimal")},
    "compiled, recompute layer": ({"memory": {"recompute": "layer"}, "train": {"compile": True}}, False),
    "release gradients": ({"memory": {"release_gradients": True}}, True),
    "activations on the host": ({"memory": {"offload_activations": True}}, True),
    "moments on the host": ({"optimizer": {"state_on_host": True}}, True),
    "moments in bf16": ({"optimizer": {"state_dtype": "bf16"}}, False),
    "moments in int8": ({"optimizer": {"state_dtype": "int8"}}, False),
    "fsdp": ({"communication": _FSDP}, True),
    "fsdp, recompute optimal": ({"communication": _FSDP, "memory": {"recompute": "optimal"}}, True),
    "fsdp, weights on the host": ({"communication": _FSDP, "memory": {"offload_weights": True}}, True),
}
_OF_A_DEVICE = ("activations on the host", "moments on the host", "fsdp, weights on the host")


def run(context: Context) -> None:
    result = context.result
    rows: list[dict[str, Any]] = []
    result.details["rows"] = rows
    with process_group(context):
        for name, (sections, is_exact) in CASES.items():
            if context.tiny and (name in _OF_A_DEVICE or "compiled" in name):
                result.left_out.append(f"{name}: needs a device")
            elif context.has_time(6, name):
                context.case(name, partial(_case, context, name, sections, is_exact, rows))
    errors = [row["error"] for row in rows if row["error"] is not None]
    if errors:
        result.metrics["memory_prediction_error_max"] = max(errors, key=abs)
    result.metrics["memory/cases"] = len(rows)
    result.summary = f"{len(rows)} of {len(CASES)} switches have equal losses"
    if errors:
        result.summary += f"; predicted within {100 * max(map(abs, errors)):.1f} %"
    if not rows and not result.failures:
        raise NotAvailable("no case was run")


def _case(
    context: Context, name: str, sections: dict[str, dict[str, Any]], is_exact: bool, rows: list[dict[str, Any]]
) -> None:
    changes = {section: dict(values) for section, values in sections.items()}
    changes["communication"] = {"clip": "global_after_reduce", **changes.get("communication", {})}
    config = config_of(context, "base", _BATCH, precision_of(context), dropout={"p": 0.0}, **changes)
    environment = environment_of(config)
    gc.collect()
    reset_peak(context.device)
    losses, seconds = _steps(config, environment)
    peak = peak_mib(context.device)
    planned = memory_at_most(config, environment.dtype).memory.total / 2**20
    first = rows[0]["losses"] if rows else losses
    difference = max(abs(own / other - 1) for own, other in zip(losses, first, strict=True))
    error = None if peak is None else planned / peak - 1
    rows.append(
        {"name": name, "peak_mib": peak, "planned_mib": planned, "error": error, "losses": losses, "step_ms": seconds}
    )
    if difference > (1e-5 if is_exact else _ROUNDED):
        raise CheckFailed(f"losses differ by {difference:.1e}")


def _steps(config: Config, environment: Environment) -> tuple[list[float], float]:
    """Losses, and milliseconds of a step."""
    components = build(config, environment)
    batch = longest_batch(config, environment.device)
    inputs = StepInput([batch], len(batch.masked_labels), len(batch.next_sentence_labels))
    losses: list[float] = []
    times = repeat(
        lambda: losses.append(components.step(inputs, 1e-4).mlm_sum.item()), config.system.device, _STEPS - 1, warm_up=1
    )
    components.engine.wait_pending()
    return losses, 1e3 * min(times)
