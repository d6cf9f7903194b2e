"""The form of a run's two files of numbers: the lines of metrics.jsonl and the record metrics.json. Without torch.

Who writes them makes these objects; who reads them gets these objects, or one line that says why not. A change of a name
or a meaning here is a new `FORMAT`.

Units: times are seconds where a name ends in `_s` and milliseconds where it ends in `_ms`; memory is MiB where it ends in
`_mib`; losses are nats; a share is from 0 to 1. A sample is one pair of segments with its [CLS] and [SEP] tokens, as
MLPerf counts them. `time_s` counts from run_start, evaluations and checkpoints included. A loss, a gradient norm or a mean
of a run that diverged may be NaN or infinite, which Python's json writes and reads as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from bert_fast.errors import UserError
from bert_fast.foreign import parse_json, read_bounded, shown
from bert_fast.run_folder import RECORD

FORMAT: Final = "bert_fast run 2"
STEP, EVALUATION, SKIPPED = "step", "eval", "skipped"  # the kinds of lines
TARGET_MISSED = "target not reached"  # a status of a run
MAX_RECORD_BYTES = 64 << 20

_EXACT = ConfigDict(extra="forbid")  # a name that is not known here is of another form


# ---- metrics.jsonl ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClipRecord:
    """Gradient clipping of one clip group in a log interval."""

    __pydantic_config__ = _EXACT

    clipped_share: float  # of the steps
    mean_coefficient: float  # that the gradient was multiplied by; 1 leaves it as it is


@dataclass(frozen=True, kw_only=True)
class StepLine:
    """A log interval: the steps since the line before it, up to and with `step`.

    Lists "of each step" go over the interval's steps, "of each rank" over all ranks, as means over the interval's steps.
    """

    __pydantic_config__ = _EXACT

    kind: Literal["step"] = "step"
    step: int  # finished optimizer steps of the run
    samples: int  # trained on since the run's first step
    time_s: float
    loss: float  # mlm_loss + nsp_loss
    mlm_loss: float  # mean over the interval's masked tokens
    nsp_loss: float | None  # mean over the interval's samples; None: next sentences are not predicted
    lr: float  # of the interval's last step
    grad_norm: float  # L2 norm before clipping, of the interval's last step
    samples_per_s: float  # without evaluations and checkpoints
    imbalance: list[float]  # of each step: max / mean over ranks of the planned cost
    compute_imbalance: list[float]  # of each step: max / mean over ranks of the measured time of forward and backward
    compute_ms: list[float]  # of each rank: forward and backward
    data_ms_rank: list[float]  # of each rank: wait for the next batch
    exposed_ms_rank: list[float]  # of each rank: wait for collectives
    exposed_ms: float  # per step: wait for collectives of the rank that waits least
    data_ms: float  # per step: wait for the next batch of the rank that waits most
    optimizer_ms: float  # per step, mean over ranks
    capped: int  # steps whose plan met the limit of samples per rank
    cost: list[
        tuple[int, int, float]
    ]  # tokens, sum of squared lengths, and ms of forward and backward, of a rank in a step
    clip: dict[str, ClipRecord]  # by clip group

    def as_json(self) -> dict[str, Any]:
        """The line as plain values."""
        return {**vars(self), "clip": {group: dict(vars(clip)) for group, clip in self.clip.items()}}


_OF_RETRIEVAL = ("at_10", "mrr", "alignment", "uniformity")


@dataclass(frozen=True, kw_only=True)
class EvaluationLine:
    """One evaluation on held-out samples. Losses and accuracies are means over all of them."""

    __pydantic_config__ = _EXACT

    kind: Literal["eval"] = "eval"
    step: int
    samples: int  # trained on so far
    time_s: float  # when the evaluation was done
    accuracy: float  # of masked tokens, a share
    mlm_loss: float
    nsp_accuracy: float | None  # a share; None: next sentences are not predicted
    nsp_loss: float | None
    # With the contrastive objective; `accuracy` is then of finding a query's positive first among all keys, a share
    at_10: float | None = None  # the same among the first ten
    mrr: float | None = None  # mean of one over the positive's rank
    alignment: float | None = None  # mean squared distance of a pair
    uniformity: float | None = None  # logarithm of the mean of exp(-2 d^2) over distances d of embeddings

    @property
    def loss(self) -> float:
        """The whole loss, as a step's line has it."""
        return self.mlm_loss + (self.nsp_loss or 0.0)

    def as_json(self) -> dict[str, Any]:
        """The line as plain values, without those of another objective."""
        return {name: value for name, value in vars(self).items() if value is not None or name not in _OF_RETRIEVAL}

    def values(self) -> dict[str, Any]:
        """The same without its kind, as metrics.json and checkpoints keep it."""
        return {name: value for name, value in self.as_json().items() if name != "kind"}


@dataclass(frozen=True, kw_only=True)
class SkippedLine:
    """A step without an update, because a loss or a gradient was not finite."""

    __pydantic_config__ = _EXACT

    kind: Literal["skipped"] = "skipped"
    step: int  # finished steps when this was found out
    bad_step: int  # the step that was skipped, counted from 0
    ranks: list[int]  # whose own loss or gradient was not finite, as far as that is known

    def as_json(self) -> dict[str, Any]:
        """The line as plain values."""
        return dict(vars(self))


Line = StepLine | EvaluationLine | SkippedLine


# ---- metrics.json -----------------------------------------------------------------------------------------------------


_OF_PAIRS = ("retrieval_at_1", "retrieval_at_10", "pairs_per_s")


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """What a run comes to, by name."""

    __pydantic_config__ = _EXACT

    time_to_train_s: float  # run_start to run_stop
    samples_to_target: int  # trained on until the run ended
    target_reached: int  # 1 or 0
    final_accuracy: float | None  # of the last evaluation; None: there was none
    steps: int
    samples_per_s: float  # without evaluations and checkpoints
    tokens_per_s: float  # without padding, evaluations and checkpoints
    imbalance_mean: float  # mean over steps of max / mean over ranks of the planned cost
    compute_imbalance: float  # the same of the measured time of forward and backward
    data_wait_share: float  # of the training time
    exposed_communication_s: float  # per step
    first_step_s: float | None  # from run_start to the end of the first step; None: no step was needed
    mfu: float | None  # model FLOP/s as a share of the measured matmul peak of all ranks; None: not measured
    matmul_peak_tflops: float  # TFLOP/s, all ranks together; 0: not measured
    gradient_bytes_per_step: float  # bytes a rank sends
    weight_bytes_per_step: float  # bytes a rank sends of updated weights; 0 where the optimizer is not sharded
    compliance_passed: int | None  # 1 or 0; None: not checked
    # With the contrastive objective, of the last evaluation
    retrieval_at_1: float | None = None
    retrieval_at_10: float | None = None
    pairs_per_s: float | None = None  # without evaluations and checkpoints

    def as_json(self) -> dict[str, Any]:
        """The metrics as plain values, without those of another objective."""
        return {name: value for name, value in vars(self).items() if value is not None or name not in _OF_PAIRS}


@dataclass(frozen=True, kw_only=True)
class EvaluationCurve:
    """The evaluations once more, as lists of raw values."""

    __pydantic_config__ = _EXACT

    eval_accuracy: list[float]
    eval_samples: list[int]
    eval_time_s: list[float]

    @classmethod
    def of(cls, evaluations: Sequence[EvaluationLine]) -> EvaluationCurve:
        """The curve of these evaluations."""
        return cls(
            eval_accuracy=[each.accuracy for each in evaluations],
            eval_samples=[each.samples for each in evaluations],
            eval_time_s=[each.time_s for each in evaluations],
        )


@dataclass(frozen=True, kw_only=True)
class TimeSplit:
    """Where the seconds from run_start to run_stop went. In the file, the names have spaces for underscores."""

    __pydantic_config__ = ConfigDict(extra="forbid", alias_generator=lambda name: name.replace("_", " "))

    forward_and_backward: float  # mean over ranks
    exposed_communication: float  # wait for collectives of the rank that waits least
    waiting_for_the_slowest_rank: float  # what the mean rank waits longer than that
    optimizer: float  # mean over ranks
    data_wait: float  # of the rank that waits most
    evaluation: float | None = None  # None: there was none
    checkpoint: float | None = None  # of what training waited for; None: there was none
    other: float

    def as_json(self) -> dict[str, float]:
        """Seconds by the names in the file; what there was none of is left out."""
        return {name.replace("_", " "): seconds for name, seconds in vars(self).items() if seconds is not None}


@dataclass(frozen=True, kw_only=True)
class CostRecord:
    """The cost model that planned the batches: linear * tokens + quadratic * sum of squared lengths, in a unit of its own."""

    __pydantic_config__ = _EXACT

    linear: float
    quadratic: float
    source: str


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Of the rank that took most, MiB."""

    __pydantic_config__ = _EXACT

    host_mib: float  # resident
    device_mib: float  # allocated by torch; 0 without a GPU
    growth_mib: float | None = None  # resident, beyond what the process took before the model was built
    planned_mib: float | None = None  # what was expected of the longest micro-batch that the config allows


@dataclass(frozen=True, kw_only=True)
class CheckpointTimes:
    """Seconds of one checkpoint."""

    __pydantic_config__ = _EXACT

    step: float
    stall_s: float  # that training waited
    copy_s: float  # until weights and moments were copied
    total_s: float  # until it was on disk
    kind: str | None = None  # how it was written, where a benchmark of checkpoints notes it

    def as_json(self) -> dict[str, Any]:
        """The record without what is None."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class EnergyRecord:
    """What the nodes took from run_start to run_stop. None: not metered, or no price or emission factor was given."""

    __pydantic_config__ = _EXACT

    gpu_kwh: float | None
    cpu_kwh: float | None
    source: str  # what was metered and what was not
    sessions: str  # which sessions of a resumed run are in it
    kwh: float | None  # of all that was metered
    money: float | None  # in the currency of run.price_per_kwh
    kg_co2e: float | None


@dataclass(frozen=True, kw_only=True)
class StoreRecord:
    """A data store by its manifest; None is what the manifest does not say."""

    __pydantic_config__ = _EXACT

    num_samples: int | None
    num_tokens: int | None
    mean_length: float | None  # tokens
    max_length: int | None  # tokens
    sha256: str | None
    text_sha256: str | None
    vocab_sha256: str | None
    # Of the evaluation store: how many of its samples have text of the training store
    samples_of_training_text: Annotated[str | None, Field(alias="samples of training text")] = None

    def as_json(self) -> dict[str, Any]:
        """The record by the names in the file."""
        values = dict(vars(self))
        shared = values.pop("samples_of_training_text")
        return values if shared is None else {**values, "samples of training text": shared}


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """The stores of a run."""

    __pydantic_config__ = _EXACT

    train: StoreRecord
    eval: StoreRecord


@dataclass(frozen=True, kw_only=True)
class ComplianceRecord:
    """What MLPerf's compliance checker says of the run's log. `passed` and `text` (its output) are None if it did not run."""

    __pydantic_config__ = _EXACT

    summary: str
    passed: bool | None = None
    text: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The record without what is None."""
        return {name: value for name, value in vars(self).items() if value is not None}


class Straggler(NamedTuple):
    """A rank and what it cost; `is_slow` is the verdict by the rule of report.stragglers."""

    rank: int
    slowest: int  # steps in which it was the last
    lost_s: float  # seconds that a rank waited for it on the mean
    share: float  # of all time lost to waiting, of any rank
    slowest_share: float  # of the steps
    excess: float  # of its mean time over the mean of ranks, as a share of that mean
    data_excess: float  # the part of `excess` that is waiting for data; 0 where it is not known
    is_slow: bool


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """metrics.json: a run from run_start to run_stop with all that is needed to judge it."""

    __pydantic_config__ = _EXACT

    format: Literal["bert_fast run 2"] = FORMAT
    metrics: RunMetrics
    config: dict[str, dict[str, Any]]  # every setting by section, as config.yaml has it
    environment: dict[str, Any]  # versions, hardware and what was chosen by it
    samples: EvaluationCurve
    status: Literal["success", "target not reached"]  # success: the target was reached, or none was set
    target_accuracy: float | None  # a share of masked tokens
    evaluations: list[EvaluationLine]
    time_split_s: TimeSplit
    init_s: float  # from the start of the process to run_start
    cost: CostRecord
    sessions: int  # 1, and 1 for each time it was resumed
    peak_memory: PeakMemory
    stragglers: list[Straggler]  # the ranks that others waited for most, the worst first
    checkpoints: list[CheckpointTimes]  # of the last session
    hosts: list[str]
    energy: EnergyRecord
    data: DataRecord
    shared_text: tuple[int, int] | None  # evaluation samples with training text, and compared ones; None: held out
    compliance: ComplianceRecord

    @property
    def name(self) -> str:
        """The run's name, from its config."""
        return str(self.config["run"]["name"])

    @property
    def seed(self) -> int:
        """The run's seed, from its config."""
        return int(self.config["train"]["seed"])

    @property
    def global_batch_size(self) -> int:
        """Samples per step, from its config."""
        return int(self.config["batch"]["global_batch_size"])

    @property
    def virtual_ranks(self) -> int:
        """Ranks whose shares every real rank computed, from its config; 1 in a record from before there was the setting."""
        count = self.config["batch"].get("virtual_ranks", 1)
        return count if isinstance(count, int) else 1

    def as_json(self) -> dict[str, Any]:
        """The record as plain values."""
        return {
            **vars(self),
            "metrics": self.metrics.as_json(),
            "samples": dict(vars(self.samples)),
            "evaluations": [each.values() for each in self.evaluations],
            "time_split_s": self.time_split_s.as_json(),
            "cost": dict(vars(self.cost)),
            "peak_memory": dict(vars(self.peak_memory)),
            "stragglers": [each._asdict() for each in self.stragglers],
            "checkpoints": [each.as_json() for each in self.checkpoints],
            "energy": dict(vars(self.energy)),
            "data": {"train": self.data.train.as_json(), "eval": self.data.eval.as_json()},
            "shared_text": None if self.shared_text is None else list(self.shared_text),
            "compliance": self.compliance.as_json(),
        }


# ---- reading ----------------------------------------------------------------------------------------------------------

_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])
_RECORD = TypeAdapter(RunRecord)
_SETTINGS: dict[tuple[str, str], type] = {
    ("run", "name"): str,
    ("train", "seed"): int,
    ("batch", "global_batch_size"): int,
    ("mlperf", "enabled"): bool,
    ("mlperf", "division"): str,
    ("mlperf", "ruleset"): str,
}


def parse_line(text: bytes, where: str) -> Line | None:
    """A line of metrics.jsonl; None if it is no JSON, as a crash in the middle of a line leaves it.

    Args:
        where: file and line, for the message.

    Raises:
        UserError: the line is of another form.
    """
    try:
        return _LINE.validate_json(text, strict=True)
    except ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            return None
        raise UserError(_other_form(where, error)) from None


def read_record(path: Path) -> RunRecord:
    """The record of a run that is done, from metrics.json (or another file that holds one).

    Raises:
        UserError: the file is not there, cannot be read, or holds no record of this form.
    """
    try:
        text = read_bounded(path, MAX_RECORD_BYTES, "a run's record")
    except FileNotFoundError:
        raise UserError(f"{shown(path)} does not exist; give the folder of a run that is done") from None
    return parse_record(text, shown(path))


def parse_record(text: bytes, where: str) -> RunRecord:
    """The record in the text of a metrics.json; `where` is the file, for the message. Raises UserError for another form."""
    try:
        tree = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {shown(error)}") from None
    if not isinstance(tree, dict) or not {"metrics", "config"} <= tree.keys():
        raise UserError(f"{where} is not the record of a run (it has no metrics and config); give a run's {RECORD}")
    check_format(tree, where)
    try:
        record = _RECORD.validate_json(text, strict=True)
    except ValidationError as error:
        raise UserError(_other_form(where, error)) from None
    for (section, name), kind in _SETTINGS.items():
        if not isinstance(record.config.get(section, {}).get(name), kind):
            raise UserError(f"{where} is not as '{FORMAT}' has it: config.{section}.{name} should be a {kind.__name__}")
    return record


def check_format(tree: dict[str, Any], where: str) -> None:
    """Refuse a record of an older or newer form, as plain values. Raises UserError."""
    if "format" not in tree:
        raise UserError(
            f"{where} was written before the settings were renamed (it has no format); read it with the code that wrote "
            "it, or run again"
        )
    if tree["format"] != FORMAT:
        raise UserError(
            f"{where} has the format {shown(repr(tree['format']), 60)} and this code reads '{FORMAT}'; read it with the "
            "code that wrote it, or run again"
        )


def _other_form(where: str, error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(shown(part, 60) for part in first["loc"])
    return f"{where} is not as '{FORMAT}' has it: {f'{place}: ' if place else ''}{shown(first['msg'])}"
