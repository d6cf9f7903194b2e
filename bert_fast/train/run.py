"""A run on one rank, in four phases whose results are typed: prepare, open_data, train, finish.

`prepare` is before MLPerf's clock and touches no data set; the types say so: it gets no store. What a phase makes is frozen;
what changes from step to step is in `TrainState` and `TrainingLoop`.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlperf_logging.mllog import constants

from bert_fast.balance.cost import CostModel, cost_record
from bert_fast.balance.planner import Planner
from bert_fast.config import Config
from bert_fast.config.choices import OBJECTIVES, attribute
from bert_fast.config.yaml_files import to_yaml
from bert_fast.data.batch import Batch
from bert_fast.data.masking import check_fraction, mask_id_of, redraw
from bert_fast.data.overlap import Shared
from bert_fast.data.scrub import Scrubber
from bert_fast.data.store import Store
from bert_fast.errors import TrainingError, UserError
from bert_fast.files import read_json, write_atomically, write_json
from bert_fast.memory.state import rank_notes
from bert_fast.mlperf.rules import check_evaluation_set, check_init_time
from bert_fast.model.checkpoints import google_variables
from bert_fast.run_folder import BUCKETS_CONFIG, BUCKETS_RECORD, CHECKPOINTS, COST, MODEL, NODES, PREFLIGHT
from bert_fast.train.batches import PlannedStep, StepLoader, plan_step
from bert_fast.train.checkpoint.async_writer import AsyncCheckpointWriter, saving_group
from bert_fast.train.checkpoint.resume import latest_valid_checkpoint, load_checkpoint, resume_key
from bert_fast.train.checkpoint.train_state import TrainState
from bert_fast.train.collectives import barrier, gather_floats
from bert_fast.train.components import TrainComponents
from bert_fast.train.context import RunContext
from bert_fast.train.environment import seed_ranks
from bert_fast.train.health.phases import CHECKPOINT, FINISHING
from bert_fast.train.health.step_errors import explain
from bert_fast.train.loop import Outcome, TrainingLoop
from bert_fast.train.setup.build import bucket_note, build
from bert_fast.train.setup.consistency import check_config, check_state, open_stores
from bert_fast.train.setup.cost_model import fit_cost_model, make_cost, make_planner
from bert_fast.train.setup.held_out import find_shared_text, shared_text_note
from bert_fast.train.setup.inputs import checkpoint_vocabulary
from bert_fast.train.setup.page_cache import clear_caches
from bert_fast.train.setup.pairs import check_pairs, draw_of
from bert_fast.train.setup.preflight import preflight, print_preflight
from bert_fast.train.telemetry.hardware import matmul_peak, resident_mib


@dataclass(frozen=True)
class Prepared:
    """What is there before the clock starts.

    cost, cost_source: the cost model, and where it is from in words
    vocab_sha256:      of the vocabulary that stores must have been made with, if the config or the checkpoint says one
    peak_flops:        measured matmul rate of all ranks together in FLOP/s; 0: not measured
    before_mib:        resident memory before the model was built
    init_s:            seconds from the start of the process to here
    """

    components: TrainComponents
    writer: AsyncCheckpointWriter
    cost: CostModel
    cost_source: str
    vocab_sha256: str | None
    peak_flops: float
    init_s: float
    before_mib: float


@dataclass(frozen=True)
class OpenData:
    """The data sets, checked, and what watches over them.

    shared:     how much of the evaluation store is of training text
    scrubber:   reads the training store in the background, to notice that it has changed
    redraw:     changes the masks of a batch at a step (`data.dynamic_masking`)
    resume_key: what a checkpoint of this run must have in common with the run that resumes it
    """

    store: Store
    eval_store: Store
    shared: Shared
    scrubber: Scrubber
    redraw: Callable[..., Batch] | None
    resume_key: dict[str, Any]


@dataclass(frozen=True)
class RunSummary:
    """A run that has ended: what its record is made of (run_record.py).

    first_step:      of this session
    time_to_train_s: on MLPerf's clock
    """

    outcome: Outcome
    prepared: Prepared
    data: OpenData
    state: TrainState
    loop: TrainingLoop
    first_step: int
    time_to_train_s: float


def run(context: RunContext, process_start: float) -> RunSummary:
    """The phases of a run up to its last step. A collective.

    Args:
        process_start: when this process started, in seconds of `time.time`.
    """
    prepared = prepare(context, process_start)
    context.clock.start()
    context.energy.start()
    if not context.resume:
        context.mllog.start(constants.RUN_START)
    data = open_data(context, prepared)
    return train(context, prepared, data)


# ---- before the clock -----------------------------------------------------------------------------------------------


def prepare(context: RunContext, process_start: float) -> Prepared:
    """From init_start to init_stop: check the ranks, build and warm up the components, measure. Touches no data set."""
    config, environment, mllog = context.config, context.environment, context.mllog
    context.heartbeat.start()
    check_config(config, context.resume, environment)
    if environment.is_main:
        hosts = [{"rank": rank, "host": host} for rank, host in enumerate(context.heartbeat.hosts)]
        write_json(context.folder / NODES, hosts)
    if config.system.preflight:
        report = preflight(config, environment)
        if environment.is_main:
            print_preflight(report)
            write_json(context.folder / PREFLIGHT, report)
    if not context.resume:
        cleared = config.mlperf.clear_caches and clear_caches(environment, context.log)
        mllog.submission(config)
        mllog.event(constants.CACHE_CLEAR, cleared)
        mllog.start(constants.INIT_START)
        mllog.hyperparameters(config)
    vocab_sha256 = config.data.vocab_sha256 or checkpoint_vocabulary(config.checkpoint.init_from)
    before_mib = resident_mib()
    components = build(config, environment, _planned_buckets(context))
    if not context.resume:
        variables = google_variables(config.model.num_layers, config.model.next_sentence)
        mllog.tensors((name for _, name in variables), config.mlperf.ruleset)
    group = saving_group(environment, config.checkpoint.timeout_s)
    writer = AsyncCheckpointWriter(context.folder / CHECKPOINTS, environment, config.checkpoint.keep_last, group)
    context.heartbeat.watch_writes(writer.own_work.seconds, config.checkpoint.timeout_s)
    _record_buckets(context, components)
    cost, cost_source = make_cost(config)
    if config.balance.cost == "measure" and not context.resume:
        fit = fit_cost_model(config, environment, components)
        cost, cost_source = fit.model, f"warm-up fit, residual {100 * fit.residual:.1f} %"
        seed_ranks(config.train.seed, environment)
    peak_flops = 0.0
    if config.run.measure_peak_flops:
        peak_flops = float(gather_floats([matmul_peak(environment)], environment.device).sum())
    barrier()
    init_s = time.time() - process_start
    if config.mlperf.enabled and not context.resume:
        check_init_time(init_s, config.mlperf.division)
        mllog.end(constants.INIT_STOP)
    return Prepared(components, writer, cost, cost_source, vocab_sha256, peak_flops, init_s, before_mib)


def _planned_buckets(context: RunContext) -> dict[str, Any] | None:
    """The record of the buckets that were planned for this run before it was resumed."""
    path = context.folder / BUCKETS_RECORD
    return read_json(path, "record of planned buckets") if context.resume and path.is_file() else None


def _record_buckets(context: RunContext, components: TrainComponents) -> None:
    """What `bucket_mb: auto` chose, for people as a piece of a config, and what it was measured from."""
    bucket = bucket_note(context.config, components.engine.layout)
    recomputation = components.recomputation
    notes = [bucket, *rank_notes(context.config), recomputation.summary() if recomputation else None]
    for note in notes:
        if note:
            context.log(note)
    record = components.bucket_record
    if record is None or not context.environment.is_main:
        return
    context.log(record.summary())
    bucket_mb = record.bucket_mb(wire_bytes=components.engine.wire.dtype.itemsize)
    write_atomically(context.folder / BUCKETS_CONFIG, to_yaml({"communication": {"bucket_mb": bucket_mb}}))
    write_json(context.folder / BUCKETS_RECORD, record.as_json())


# ---- on the clock ---------------------------------------------------------------------------------------------------


def open_data(context: RunContext, prepared: Prepared) -> OpenData:
    """Open and check both stores, start to scrub the training store. On the clock."""
    config, environment = context.config, context.environment
    choice = OBJECTIVES[config.train.objective]
    store_of = attribute(choice.store) if context.store_of is Store else context.store_of
    store, eval_store = open_stores(config, prepared.vocab_sha256, environment, store_of)
    vocab = prepared.vocab_sha256 or store.manifest["vocab_sha256"]
    for each, sha256 in ((store, None), (eval_store, config.evaluation.sha256)):
        each.check(
            vocab_size=config.model.vocab_size,
            max_seq_len=config.data.max_seq_len,
            vocab_sha256=vocab,
            sha256=sha256,
        )
    check_fraction(store.manifest, config.data.train, config.data)
    if config.evaluation.sha256 and environment.is_main:
        eval_store.check_bytes(config.evaluation.sha256)
    shared = find_shared_text(store, eval_store, config, environment)
    if shared.found and not shared.is_held_out:
        context.log(f"warning: {shared_text_note(config, shared)} (data.allow_shared_text=true)")
    scrubber = Scrubber(store, environment.local_rank, config.system.node_size, config.data.scrub_mb_per_s)
    scrubber.start()
    check_evaluation_set(len(eval_store), config)
    change = _redraw_of(config, store) if config.data.dynamic_masking else None
    if choice.on_pairs:
        for each in (store, eval_store):
            check_pairs(each, config)
    key = resume_key(config, store.manifest["sha256"], eval_store.manifest["sha256"])
    data = OpenData(store, eval_store, shared, scrubber, change, key)
    if not context.resume:
        _log_data(context, data)
    return data


def _redraw_of(config: Config, store: Store) -> Callable[..., Batch]:
    """What draws the masks of the training store's samples anew."""
    return functools.partial(
        redraw,
        seed=config.train.seed,
        mask_id=mask_id_of(store.manifest, config.data.train),
        vocab_size=store.manifest["vocab_size"],
        fraction=config.data.drawn_fraction,
    )


def _log_data(context: RunContext, data: OpenData) -> None:
    """Which samples the run is about, into the MLPerf log."""
    mllog, total = context.mllog, len(data.eval_store)
    mllog.event(constants.TRAIN_SAMPLES, len(data.store))
    mllog.event(constants.EVAL_SAMPLES, min(total, context.config.evaluation.num_samples or total))
    mllog.event("train_dataset_sha256", data.store.manifest["sha256"])
    mllog.event("eval_dataset_sha256", data.eval_store.manifest["sha256"])
    mllog.event("eval_samples_of_training_text", [data.shared.found, data.shared.compared])


def train(context: RunContext, prepared: Prepared, data: OpenData) -> RunSummary:
    """From the first step, or the checkpoint's, to the target, the last step or a signal."""
    config, environment = context.config, context.environment
    state = TrainState(prepared.components, environment, context.clock, prepared.cost, prepared.cost_source)
    if context.resume:
        _resume(context, state, data)
    else:
        state.progress.next_evaluation = config.evaluation.start_samples or config.evaluation.every_samples
    check_state(
        {
            "the cost of a token and of a squared token": [state.cost.linear, state.cost.quadratic],
            "the step": state.progress.step,
            "the next evaluation": state.progress.next_evaluation,
        },
        environment,
    )
    planner = make_planner(
        config, data.store.lengths, state.cost, data.store.manifest["max_length"], draw_of(data.store, config)
    )
    if environment.is_main:
        write_json(context.folder / COST, cost_record(state.cost, state.cost_source, None))
    first_step = state.progress.step
    read_step = functools.partial(_read_step, context, data, planner)
    loader = StepLoader(read_step, first_step, config, environment.device)
    loop = TrainingLoop(
        context, state, prepared.writer, planner, loader, data.eval_store, data.scrubber, data.resume_key
    )
    try:
        outcome = loop.run()
    except TrainingError:
        context.mllog.end(constants.RUN_STOP, status=constants.ABORTED)
        raise
    except OSError:
        context.heartbeat.at(state.progress.step, CHECKPOINT)
        with contextlib.suppress(RuntimeError):
            # Raises if a checkpoint has filled the disk that our log found full: all ranks say that
            prepared.writer.wait()
        raise
    finally:
        loader.close()
        data.scrubber.close()
    context.heartbeat.at(state.progress.step, FINISHING)
    summary = RunSummary(outcome, prepared, data, state, loop, first_step, context.clock.elapsed)
    if outcome.status != "stopped":
        _end_log(context, summary)
    try:
        prepared.writer.wait()
    except (UserError, RuntimeError) as error:  # of no use to a run that is done
        context.log(f"warning: {error}")
    context.line.done()
    return summary


def _resume(context: RunContext, state: TrainState, data: OpenData) -> None:
    path = latest_valid_checkpoint(context.folder / CHECKPOINTS, context.environment, context.log)
    load_checkpoint(path, data.resume_key, state, context.config.train.seed, context.log)
    progress = state.progress
    progress.sessions += 1
    context.mllog.event("resumed", progress.step, checkpoint=path.name)
    context.log(f"resumed from {path} at step {progress.step:,}, {progress.samples:,} samples")


def _read_step(context: RunContext, data: OpenData, planner: Planner, step: int) -> PlannedStep:
    """Plan a step and read this rank's samples (in the loader's thread)."""
    plan, rank = planner.plan(step), context.environment.rank
    change = functools.partial(data.redraw, step=step) if data.redraw else _change_of(context.config)
    try:
        return plan_step(data.store, plan, rank, context.config, change)
    except (ValueError, IndexError) as error:
        raise explain(error, plan, rank, [], data.scrubber) from error


def _change_of(config: Config) -> Callable[[Batch], Batch] | None:
    """What makes samples, as stores have them, the batch that the objective's model is given; None: nothing has to."""
    where = OBJECTIVES[config.train.objective].change
    return attribute(where) if where else None


def _end_log(context: RunContext, summary: RunSummary) -> None:
    """run_stop, the energy up to here, and the final model. A collective."""
    progress, mllog = summary.state.progress, context.mllog
    if not progress.evaluations or progress.evaluations[-1].step != progress.step:
        mllog.end(constants.BLOCK_STOP, first_epoch_num=progress.samples)
    status = constants.SUCCESS if summary.outcome.status == "success" else constants.ABORTED
    mllog.end(constants.RUN_STOP, status=status, resumed=progress.sessions > 1)
    mllog.close()
    context.energy.add_to(progress, last=True)
    if context.config.checkpoint.save_final_model:
        components, manifest = summary.prepared.components, summary.data.store.manifest
        with components.evaluated_weights():  # entering it takes all ranks
            model = components.whole_model()
            if context.environment.is_main:
                export = attribute(OBJECTIVES[context.config.train.objective].export)
                export(model, context.config, manifest, context.folder / MODEL, context.log)
