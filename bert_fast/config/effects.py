"""The settings that would have no effect in a run: they are refused, so that nobody trains with a setting that is ignored.

`RULES` says when a setting has an effect. A setting that no rule names always has one, or may have one: whether it does follows
from the machine, the data or the launcher, and not from the config alone. The number of ranks is no reason to refuse a setting:
the config of a large run is also tried on one rank, where compression and timeouts have nothing to do.

The same holds for the MLPerf log: `mlperf.enabled=false` switches it off, and what describes the submission stays in the file.

Only a value that is not the default is refused. A config that was printed with all its defaults can therefore be read again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from bert_fast.config.choices import (
    AVERAGES,
    CLIP_MODES,
    DECAYS,
    ENGINES,
    OBJECTIVES,
    OPTIMIZERS,
    STRATEGIES,
    WIRE_FORMATS,
)
from bert_fast.config.contrastive import ContrastiveConfig

if TYPE_CHECKING:
    from bert_fast.config.root import Config

_LONGEST_VALUE = 80  # characters of a value that a message shows


class Rule(NamedTuple):
    """When settings have an effect, and what to say where they have none.

    `reason` and `fix` are formatted with the config as `c`. They complete the sentence "X has no effect: REASON; FIX, or
    leave X at its default".
    """

    fields: tuple[str, ...]
    has_effect: Callable[[Config], bool]
    reason: str
    fix: str


def _first_update_is_in_warmup(config: Config) -> bool:
    """Whether the first update comes before the end of the warm-up (`bert_fast.optim.schedule`)."""
    schedule = config.schedule
    first = 1 if schedule.counting == "nvidia" and schedule.start_warmup_step != 0 else 0
    return first - schedule.start_warmup_step < schedule.warmup_steps


class _ReadsSettings(Protocol):
    @property
    def settings(self) -> tuple[str, ...]: ...


# Where a setting chooses from a table, and entries say which further settings of its section they read
_CHOOSERS: tuple[tuple[str, str, Mapping[str, _ReadsSettings]], ...] = (
    ("balance", "strategy", STRATEGIES),
    ("optimizer", "name", OPTIMIZERS),
    ("schedule", "decay", DECAYS),
    ("averaging", "method", AVERAGES),
    ("communication", "reduce_dtype", WIRE_FORMATS),
    ("communication", "engine", ENGINES),
)


def _is_read(section: str, chooser: str, readers: list[str]) -> Callable[[Config], bool]:
    return lambda config: getattr(getattr(config, section), chooser) in readers


def _rules_of_tables() -> Iterator[Rule]:
    """A setting that only some variants read, by the tables of variants."""
    for section, chooser, table in _CHOOSERS:
        for name in dict.fromkeys(name for choice in table.values() for name in choice.settings):
            readers = [variant for variant, choice in table.items() if name in choice.settings]
            yield Rule(
                (f"{section}.{name}",),
                _is_read(section, chooser, readers),
                f"{section}.{chooser}={{c.{section}.{chooser}}} does not read it",
                f"set {section}.{chooser}={' or '.join(readers)}",
            )


_WARMUP_IS_OVER = (
    "the warm-up is over before the first update (schedule.start_warmup_step={c.schedule.start_warmup_step}, "
    "schedule.warmup_steps={c.schedule.warmup_steps})"
)

_MASKED_LM_ALONE = (
    "data.mask_fraction",
    "data.dynamic_masking",
    "model.next_sentence",
    "model.last_layer",
)

RULES = (
    *_rules_of_tables(),
    Rule(
        tuple(f"contrastive.{name}" for name in ContrastiveConfig.model_fields),
        lambda c: OBJECTIVES[c.train.objective].on_pairs,
        "train.objective={c.train.objective} compares no pairs",
        "set train.objective=contrastive",
    ),
    Rule(
        _MASKED_LM_ALONE,
        lambda c: not OBJECTIVES[c.train.objective].on_pairs,
        "train.objective={c.train.objective} predicts no tokens",
        "set train.objective=mlm_nsp",
    ),
    Rule(
        ("contrastive.max_scale",),
        lambda c: c.contrastive.learn_scale,
        "contrastive.learn_scale=false: the scale stays as it is",
        "set contrastive.learn_scale=true",
    ),
    Rule(
        ("contrastive.width_weights",),
        lambda c: bool(c.contrastive.widths),
        "contrastive.widths names no widths",
        "set contrastive.widths",
    ),
    Rule(
        ("balance.num_strata",),
        lambda c: c.balance.strata is None,
        "balance.strata lists the strata one by one",
        "set balance.strata=null",
    ),
    Rule(
        ("communication.min_bucket_mb", "communication.max_bucket_mb"),
        lambda c: c.communication.bucket_mb == "auto",
        "communication.bucket_mb gives the sizes, and nothing is planned",
        "set communication.bucket_mb=auto",
    ),
    Rule(
        ("communication.local_step_scaler",),
        lambda c: c.communication.local_step_clipper > 1,
        "communication.local_step_clipper=1 allows no local steps",
        "set communication.local_step_clipper to at least 2",
    ),
    Rule(
        ("communication.max_norm",),
        lambda c: CLIP_MODES[c.communication.clip].clips != "nothing",
        "communication.clip={c.communication.clip} clips no gradient",
        "set communication.clip=bucket_before_reduce, global_before_reduce or global_after_reduce",
    ),
    Rule(
        ("communication.clip_groups",),
        lambda c: CLIP_MODES[c.communication.clip].by_group,
        "communication.clip={c.communication.clip} clips no groups",
        "set communication.clip=bucket_before_reduce",
    ),
    Rule(
        ("schedule.warmup_steps",),
        _first_update_is_in_warmup,
        _WARMUP_IS_OVER,
        "raise schedule.start_warmup_step",
    ),
    Rule(
        # With `counting: nvidia` it also moves the whole schedule by one update
        ("schedule.start_warmup_step",),
        lambda c: c.schedule.counting == "nvidia" or _first_update_is_in_warmup(c),
        _WARMUP_IS_OVER,
        "raise schedule.warmup_steps",
    ),
    Rule(
        ("schedule.counting",),
        lambda c: c.schedule.start_warmup_step != 0,
        "both ways of counting are the same where schedule.start_warmup_step=0",
        "set schedule.start_warmup_step",
    ),
    Rule(
        ("optimizer.residual_dtype",),
        lambda c: c.optimizer.error_feedback,
        "optimizer.error_feedback=false: nothing is kept of what is left out",
        "set optimizer.error_feedback=true",
    ),
    Rule(
        ("averaging.method",),
        lambda c: c.averaging.start_step + c.averaging.every_steps <= c.train.max_steps,
        "the run ends at train.max_steps={c.train.max_steps}, before the first update of the average",
        "lower averaging.start_step or averaging.every_steps",
    ),
    Rule(
        ("averaging.every_steps", "averaging.start_step"),
        lambda c: c.averaging.method != "none",
        "averaging.method=none averages nothing",
        "set averaging.method=exponential or last",
    ),
    Rule(
        ("schedule.decay_from",),
        lambda c: c.schedule.warmup_steps > 0,
        "without a warm-up the decay begins at the same step either way",
        "set schedule.warmup_steps",
    ),
    Rule(
        ("schedule.power",),
        lambda c: c.schedule.end_lr != c.optimizer.lr,
        "schedule.end_lr is optimizer.lr, and the learning rate does not decay",
        "lower schedule.end_lr",
    ),
    Rule(
        ("train.loss_scale",),
        lambda c: c.train.precision == "fp16",
        "train.precision={c.train.precision} has no loss scale",
        "set train.precision=fp16",
    ),
    Rule(
        ("memory.offload_weights",),
        lambda c: ENGINES[c.communication.engine].shards,
        "communication.engine={c.communication.engine} needs all weights on the device",
        "set communication.engine=fsdp",
    ),
    Rule(
        ("memory.budget_gib",),
        lambda c: c.memory.recompute in ("none", "budget"),
        "memory.recompute={c.memory.recompute} is not chosen by a budget",
        "set memory.recompute=none, for all to be chosen, or budget, for recomputation alone",
    ),
    Rule(
        ("checkpoint.async_save",),
        lambda c: c.checkpoint.every_steps > 0,
        "checkpoint.every_steps=0 writes a checkpoint only when the run is stopped, and always waits for it",
        "set checkpoint.every_steps to a number of steps",
    ),
    Rule(
        ("run.profile_after", "run.profile_steps"),
        lambda c: c.run.profile,
        "run.profile=false traces no step",
        "set run.profile=true",
    ),
    Rule(
        ("run.profile",),
        lambda c: c.run.profile_after < c.train.max_steps,
        "the run ends at train.max_steps={c.train.max_steps}, and the first traced step comes after run.profile_after="
        "{c.run.profile_after} others",
        "lower run.profile_after",
    ),
    Rule(
        ("system.master_port",),
        lambda c: c.system.node_size == c.system.world_size,
        "the ranks are on {c.system.num_nodes} nodes, and the launcher of those chooses the port (MASTER_PORT)",
        "export MASTER_PORT",
    ),
    Rule(
        # As many as the full number: a run that goes on with fewer nodes has a smaller world, and keeps this setting
        ("recovery.min_nodes",),
        lambda c: c.recovery.min_nodes is None or c.recovery.min_nodes <= c.system.num_nodes,
        "the ranks fill {c.system.num_nodes} node(s)",
        "set it to at most {c.system.num_nodes}",
    ),
)


def idle_settings(config: Config) -> Iterator[str]:
    """One text for every setting that would have no effect in this run: why, and how to fix it."""
    named = set()
    for rule in RULES:
        if rule.has_effect(config):
            continue
        for field in rule.fields:
            value, default = _value_and_default(config, field)
            if field not in named and value != default:
                named.add(field)
                reason, fix = (text.format(c=config) for text in (rule.reason, rule.fix))
                yield (
                    f"{field}={_shown(value)} has no effect: {reason}; {fix}, or leave {field} at its default "
                    f"({_shown(default)})"
                )


def _value_and_default(config: Config, field: str) -> tuple[Any, Any]:
    name_of_section, _, name = field.partition(".")
    section = getattr(config, name_of_section)
    return getattr(section, name), type(section).model_fields[name].default


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
