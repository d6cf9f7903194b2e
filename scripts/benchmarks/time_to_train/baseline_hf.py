#!/usr/bin/env python3
"""The baseline: the same training as a user of transformers and torch would write it.

    python -m scripts.benchmarks.time_to_train.baseline_hf --config configs/mini_cpu.yaml       # starts the config's ranks
    python -m scripts.benchmarks.time_to_train.baseline_hf --config configs/mini_cpu.yaml train.seed=3 --json baseline.json

Same config file, data, starting weights, batch, schedule, precision, ranks, cores, evaluation interval and target as
run_pretraining.py. What differs is how it is done: transformers' BertForPreTraining over batches padded to their
longest sample, every position through the vocabulary projection, DistributedDataParallel with its default buckets and
hooks, clipping of the averaged gradient, torch's AdamW, a DistributedSampler and a DataLoader, the system's memory
allocator as it comes (--our-allocator: set as ours). The sections `balance` and `communication` of the config,
train.compile and checkpoints have no counterpart here (but for max_norm and clip=none).

Exit codes: 0 the run ended; 1 the target was not reached; 2 something to fix in config, data or machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import scripts.guard  # noqa: F401

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import BertConfig, BertForPreTraining

from bert_fast.command import guarded, whole
from bert_fast.config import Config, ModelConfig, as_plain
from bert_fast.config.load import load_config
from bert_fast.data.samples import Sample
from bert_fast.data.store import Store
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.launch.local import run_local
from bert_fast.launch.provenance import commit
from bert_fast.launch.slurm import is_launched
from bert_fast.optim.build import has_decay
from bert_fast.optim.schedule import learning_rate
from bert_fast.report.bench import write_result
from bert_fast.report.console import ProgressLine
from bert_fast.train import main as entry
from bert_fast.train.clock import Clock
from bert_fast.train.environment import Environment, describe, join, pick_device, pick_dtype
from bert_fast.train.setup.inputs import check_inputs

_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
_IGNORED = -100  # the label that torch's cross-entropy leaves out
_REBUILD_STEPS = 2  # DDP learns its bucket order in the first backward
_FULL_MASKS = 0.15  # share of tokens that warm-up predicts

Inputs = dict[str, torch.Tensor]


# ---- model, optimizer, batches --------------------------------------------------------------------------------------


def make_model(config: Config) -> BertForPreTraining:
    """BertForPreTraining of the config's shape and dropout, from its checkpoint or initialised from its seed."""
    description = _description(config.model)
    folder = config.checkpoint.init_from
    torch.manual_seed(config.train.seed)
    if folder is None:
        return BertForPreTraining(description)
    model_and_info: Any = BertForPreTraining.from_pretrained(
        folder, config=description, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, loaded = model_and_info
    unusable = sorted(loaded["missing_keys"]) + sorted(key[0] for key in loaded["mismatched_keys"])
    if unusable:
        raise UserError(
            f"checkpoint {folder} does not fit the config's model section: {unusable[0]} is missing or of another shape"
        )
    model.train()
    return model


def _description(shape: ModelConfig) -> BertConfig:
    return BertConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_positions,
        type_vocab_size=shape.type_vocab_size,
        hidden_act=_ACTIVATIONS[shape.activation],
        hidden_dropout_prob=shape.hidden_dropout,
        attention_probs_dropout_prob=shape.attention_dropout,
        layer_norm_eps=shape.layer_norm_eps,
        initializer_range=shape.initializer_range,
    )


def make_optimizer(model: torch.nn.Module, config: Config) -> torch.optim.AdamW:
    """torch's AdamW, decay on matrices only, fused as transformers' Trainer has it by default."""
    named = list(model.named_parameters())
    settings = config.optimizer
    groups = [
        {"params": [p for name, p in named if has_decay(name.lower())], "weight_decay": settings.weight_decay},
        {"params": [p for name, p in named if not has_decay(name.lower())], "weight_decay": 0.0},
    ]
    betas = settings.beta1, settings.beta2
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)


def collate(samples: list[Sample]) -> Inputs:
    """Samples padded to the longest of them, under the argument names of BertForPreTraining.forward."""
    shape = len(samples), max(len(sample.input_ids) for sample in samples)
    input_ids, attention_mask, token_type_ids = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    labels = np.full(shape, _IGNORED, dtype=np.int64)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        input_ids[row, :length] = sample.input_ids
        attention_mask[row, :length] = 1
        token_type_ids[row, sample.len_a : length] = 1
        labels[row, sample.masked_positions] = sample.masked_labels
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "token_type_ids": torch.from_numpy(token_type_ids),
        "labels": torch.from_numpy(labels),
        "next_sentence_label": torch.tensor([sample.is_random_next for sample in samples]),
    }


def training_batches(store: Store, config: Config, environment: Environment) -> Iterator[Inputs]:
    """This rank's batches without end: every epoch a new permutation, of which each rank takes its residue class."""
    dataset: Any = store  # has a length and an index, which is all that torch asks of a Dataset
    sampler: DistributedSampler[Sample] = DistributedSampler(
        dataset, environment.world_size, environment.rank, shuffle=True, seed=config.train.seed, drop_last=True
    )
    loader: DataLoader[Sample] = DataLoader(
        dataset,
        config.batch.micro_batch_size,
        sampler=sampler,
        collate_fn=collate,
        drop_last=True,
        pin_memory=environment.device.type == "cuda",
    )
    if not len(loader):
        raise UserError(
            f"batch.global_batch_size={config.batch.global_batch_size} is more than the {len(store)} samples of the training "
            "store; prepare more data or lower the batch"
        )
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


def _to_device(batch: Inputs, device: torch.device) -> Inputs:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


# ---- step and evaluation --------------------------------------------------------------------------------------------


class Trainer:
    """Model, optimizer and one step of both."""

    def __init__(self, config: Config, environment: Environment) -> None:
        self._config, self._environment = config, environment
        self.bare = make_model(config)
        self.bare.to(environment.device)  # type: ignore[arg-type]  # transformers' wrapper loses the types of `to`
        self.model = DistributedDataParallel(self.bare) if environment.world_size > 1 else self.bare
        self.optimizer = make_optimizer(self.bare, config)
        self._warm_up()

    def step(self, batches: list[Inputs], lr: float) -> torch.Tensor:
        """One optimizer step over a rank's micro-batches; returns the rank's mean loss, 0-dim."""
        environment, communication = self._environment, self._config.communication
        self.optimizer.zero_grad()
        losses = []
        for index, batch in enumerate(batches):
            model, is_last = self.model, index == len(batches) - 1
            with model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext():
                with torch.autocast(environment.device.type, environment.dtype, enabled=environment.autocast):
                    loss = model(**_to_device(batch, environment.device)).loss / len(batches)
                loss.backward()
            losses.append(loss.detach())
        if communication.clip != "none":
            torch.nn.utils.clip_grad_norm_(self.bare.parameters(), communication.max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return torch.stack(losses).sum()

    def _warm_up(self) -> None:
        """Synthetic steps before the clock, as run_pretraining.py has them; a rate of zero leaves the weights alone."""
        config = self._config
        for index in range(max(config.train.warmup_batches, _REBUILD_STEPS)):
            self.step([synthetic_batch(config, index) for _ in range(config.batch.gradient_accumulation_steps)], lr=0.0)
        self.optimizer.state.clear()
        torch.manual_seed(config.train.seed * 100_003 + self._environment.rank)  # each rank its own dropout


def synthetic_batch(config: Config, seed: int) -> Inputs:
    """A batch of random tokens, all of full length; touches no data set."""
    rng = np.random.default_rng([seed, 99])
    length = config.data.max_seq_len
    num_masked = max(1, int(_FULL_MASKS * length))
    samples = []
    for _ in range(config.batch.micro_batch_size):
        ids, labels = rng.integers(0, config.model.vocab_size, (2, length))
        positions = np.sort(rng.permutation(length)[:num_masked])
        samples.append(Sample(ids, length // 2, positions, labels[:num_masked], int(rng.integers(2))))
    return collate(samples)


class Evaluator:
    """Masked-LM accuracy over the held-out samples; reads this rank's share once, padded by like lengths."""

    def __init__(self, store: Store, config: Config, environment: Environment) -> None:
        self._environment = environment
        total = min(len(store), config.evaluation.num_samples or len(store))
        order = np.argsort(-np.asarray(store.lengths[:total]).astype(np.int64), kind="stable")
        mine, size = order[environment.rank :: environment.world_size].tolist(), config.evaluation.batch_size
        self._batches = [
            _to_device(collate([store[i] for i in mine[start : start + size]]), environment.device)
            for start in range(0, len(mine), size)
        ]

    @torch.no_grad()
    def __call__(self, model: BertForPreTraining) -> float:
        """A collective: all ranks call it together."""
        environment = self._environment
        counts = torch.zeros(2, dtype=torch.float64, device=environment.device)
        model.eval()
        with torch.autocast(environment.device.type, environment.dtype, enabled=environment.autocast):
            for batch in self._batches:
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
                is_masked = batch["labels"] != _IGNORED
                predicted = model(**inputs).prediction_logits[is_masked].argmax(-1)
                counts += torch.stack([(predicted == batch["labels"][is_masked]).sum(), is_masked.sum()])
        model.train()
        if dist.is_initialized():
            dist.all_reduce(counts)
        return float(counts[0] / counts[1])


# ---- the run --------------------------------------------------------------------------------------------------------


def join_plainly(config: Config) -> Environment:
    """`environment.join` on Linux and CPU without our allocator setting: same ranks, threads, cores; glibc as it comes.

    Keeping freed memory, which `join` asks of glibc, is part of what is measured against this baseline.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world != config.system.world_size:
        raise UserError(
            f"the launcher started {world} ranks and system.world_size={config.system.world_size}; start as many"
        )
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // local_world)
    threads = config.system.threads_per_rank or share
    if config.system.bind_cores and local_world > 1 and len(cores) >= local_world * threads:
        os.sched_setaffinity(0, cores[local_rank * share : (local_rank + 1) * share])
    torch.set_num_threads(threads)
    if world > 1:
        dist.init_process_group("gloo")
    device = torch.device("cpu")
    return Environment(rank, local_rank, world, device, pick_dtype(config.train.precision, device))


def train(config: Config, environment: Environment, max_steps: int) -> dict[str, Any]:
    """Warm up, start the clock, open the data, train to the target or the last step. Returns the record."""
    trainer = Trainer(config, environment)
    clock, line = Clock(), ProgressLine(enabled=environment.is_main)
    settings, target = config.train, config.evaluation.target_accuracy
    evaluations: list[tuple[int, float]] = []
    step = samples = tokens = 0
    if dist.is_initialized():
        dist.barrier()
    clock.start()
    train_store, eval_store = _open_stores(config)
    batches = training_batches(train_store, config, environment)
    evaluator: Evaluator | None = None

    def evaluate() -> bool:
        """Evaluate on the clock; whether the target is reached."""
        nonlocal evaluator
        with clock.pause("evaluation"):
            evaluator = evaluator or Evaluator(eval_store, config, environment)
            accuracy = evaluator(trainer.bare)
        evaluations.append((samples, accuracy))
        line.log(f"evaluation at {samples:,} samples, {clock.elapsed:.1f} s: masked-LM accuracy {accuracy:.4f}")
        return target is not None and accuracy >= target

    next_evaluation = config.evaluation.start_samples or config.evaluation.every_samples
    reached = config.evaluation.at_start and evaluate()
    while not reached and step < max_steps:
        micro_batches = [next(batches) for _ in range(config.batch.gradient_accumulation_steps)]
        loss = trainer.step(micro_batches, learning_rate(step, config.optimizer.lr, config.schedule))
        step += 1
        samples += config.batch.global_batch_size
        tokens += sum(int(batch["attention_mask"].sum()) for batch in micro_batches)
        if environment.is_main and step % settings.log_every_steps == 0:
            accuracy = evaluations[-1][1] if evaluations else None
            remaining = (max_steps - step) * clock.training / step
            line.update(step, samples, samples / clock.training, float(loss), accuracy, target, remaining)
        if samples >= next_evaluation or (step == max_steps and target is not None):
            reached = evaluate()
            while next_evaluation <= samples:
                next_evaluation += config.evaluation.every_samples
    if environment.device.type == "cuda":
        torch.cuda.synchronize()
    seconds, training_seconds = clock.elapsed, clock.training
    line.done()
    metrics = {
        "time_to_train_s": seconds,
        "samples_to_target": samples,
        "target_reached": int(reached),
        "samples_per_s": samples / training_seconds,
        "tokens_per_s": _sum_over_ranks(tokens, environment) / training_seconds,
        "final_accuracy": evaluations[-1][1] if evaluations else None,
        "steps": step,
    }
    return {
        "metrics": metrics,
        "config": {**as_plain(config), "max_steps": max_steps},
        "environment": {**describe(environment), "transformers": transformers.__version__, "commit": commit()},
        "samples": {"eval_samples": [s for s, _ in evaluations], "eval_accuracy": [a for _, a in evaluations]},
    }


def _open_stores(config: Config) -> tuple[Store, Store]:
    data = config.data
    stores = Store(data.train), Store(config.evaluation.data)
    for store, sha256 in zip(stores, (None, config.evaluation.sha256), strict=True):
        store.check(
            vocab_size=config.model.vocab_size,
            max_seq_len=data.max_seq_len,
            vocab_sha256=data.vocab_sha256,
            sha256=sha256,
        )
    return stores


def _sum_over_ranks(value: int, environment: Environment) -> int:
    total = torch.tensor(value, device=environment.device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return int(total)


def be_a_rank(config: Config, args: argparse.Namespace) -> int:
    """Join, train, write and print the metrics."""
    sets_allocator = sys.platform == "linux" and pick_device(config.system.device, 0).type == "cpu"
    environment = join_plainly(config) if sets_allocator and not args.our_allocator else join(config)
    if environment.dtype == torch.float16:
        raise UserError("the baseline has no loss scaling: set train.precision=bf16 or fp32")
    record = train(config, environment, min(config.train.max_steps, args.max_steps or config.train.max_steps))
    record["config"]["our_allocator"] = args.our_allocator
    if dist.is_initialized():
        dist.destroy_process_group()
    metrics, target = record["metrics"], config.evaluation.target_accuracy
    if environment.is_main:
        if args.json:
            write_result(args.json, **record)
        accuracy = "not evaluated" if metrics["final_accuracy"] is None else f"accuracy {metrics['final_accuracy']:.4f}"
        goal = "" if target is None else f" (target {target:.4f}{'' if metrics['target_reached'] else ' NOT reached'})"
        print(
            f"baseline: {metrics['time_to_train_s']:.1f} s, {metrics['samples_to_target']:,} samples in "
            f"{metrics['steps']:,} steps, {metrics['samples_per_s']:,.0f} samples/s, {metrics['tokens_per_s']:,.0f} "
            f"real tokens/s, {accuracy}{goal}",
            flush=True,
        )
    return ExitCode.OK if target is None or metrics["target_reached"] else ExitCode.TARGET_MISSED


def _refuse_recipe(config: Config) -> None:
    """Refuse what the baseline does not do, so that both sides have the same task. Raises UserError."""
    if config.batch.virtual_ranks > 1:
        raise UserError(
            f"the baseline has no virtual ranks and batch.virtual_ranks={config.batch.virtual_ranks}; set it to 1 and "
            "batch.gradient_accumulation_steps to as many times what it was"
        )
    for name, differs, its in (
        ("model.next_sentence", not config.model.next_sentence, "true"),
        ("data.dynamic_masking", config.data.dynamic_masking, "false"),
        ("averaging.method", config.averaging.method != "none", "none"),
    ):
        if differs:
            raise UserError(f"the baseline knows only {name}={its}, and the config has another; set it to that")


def run(args: argparse.Namespace) -> int:
    """Start the ranks here, or be one."""
    config = load_config(args.config, args.overrides)
    if config.optimizer.name != "adamw":
        raise UserError(
            f"the baseline trains with torch's AdamW and optimizer.name={config.optimizer.name}; set it to adamw"
        )
    _refuse_recipe(config)
    if not is_launched():
        check_inputs(config)
        if config.system.world_size > 1:
            return run_local(config, ["-m", "scripts.benchmarks.time_to_train.baseline_hf", *sys.argv[1:]])
    warnings.simplefilter("ignore")  # of the libraries, about themselves
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return be_a_rank(config, args)


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", required=True, help="YAML file of the run (configs/)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that replace the file's")
    parser.add_argument("--json", metavar="FILE", help="write metrics, config, environment and evaluations there")
    parser.add_argument(
        "--max-steps", type=whole(1, 10**9), metavar="N", help="stop after N steps, if that is before the config's"
    )
    parser.add_argument(
        "--our-allocator", action="store_true", help="let glibc keep freed memory, as run_pretraining.py does (CPU)"
    )
    args = parser.parse_intermixed_args()
    return entry.guarded(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
