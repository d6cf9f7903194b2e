"""Stages `step_large`, `step_base`: our step against transformers as it comes and as its best user would run it.

Every variant gets the same samples of Wikipedia-like lengths. Rates count real tokens; MFU counts the FLOPs that the
mathematics needs for them, over the best bf16 matmul measured in the same process.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.step.measure import ceiling
from benchmarks.step.setting import make_config
from benchmarks.step.variants import Step, huggingface, ours
from bert_fast.balance.lengths import wikipedia_like
from bert_fast.config import Config
from bert_fast.data.batch import Batch, padded
from bert_fast.errors import UserError
from bert_fast.memory.estimate import chain_of, estimate
from bert_fast.memory.recomputation import make_recomputation_plan
from bert_fast.memory.stages import Hardware, MicroBatch
from bert_fast.model.flops import train_flops
from bert_fast.model.loss import chunk_rows
from bert_fast.train.batches import batch_of_lengths, lay_out
from bert_fast.train.setup.cost_model import make_planner

from .parts import arguments, precision_of
from .stage import Context, NotAvailable
from .timing import peak_mib, repeat, reset_peak

_BATCHES = 6  # of a variant, in turn
_GRAPH_MULTIPLE = 1024  # few shapes: each is captured once
_CASES = ((56, 0.1), (56, 0.0), (16, 0.1), (16, 0.0))
_SMALLER = 8  # local batch where memory is short


@dataclass(frozen=True)
class Peer:
    """One way to run the step. `make` gets arguments, precision and batches; `grouped`: samples of like length together."""

    make: Callable[[argparse.Namespace, str, Sequence[Batch]], Step]
    grouped: bool = False
    packed: bool = False
    compiled: bool = False


def _graphs(args: argparse.Namespace, precision: str, batches: Sequence[Batch]) -> Step:
    if args.device == "cpu":
        raise NotAvailable("CUDA graphs need a CUDA device")
    backend = "varlen" if args.dropout == 0 else "torch_flash"  # varlen has no dropout
    return ours(
        args,
        precision,
        batches=batches,
        train={"cuda_graphs": True},
        model={"attention_backend": backend},
        batch={"shape_multiple": _GRAPH_MULTIPLE},
    )


def _compiled(args: argparse.Namespace, precision: str, batches: Sequence[Batch]) -> Step:
    return ours(args, precision, batches=batches, train={"compile": True})


def _torch_flash(args: argparse.Namespace, precision: str, batches: Sequence[Batch]) -> Step:
    if args.device == "cpu":
        raise NotAvailable("torch_flash needs a CUDA device")
    return ours(args, precision, batches=batches, model={"attention_backend": "torch_flash"})


PEERS: dict[str, Peer] = {
    "ours": Peer(lambda args, precision, batches: ours(args, precision, batches=batches)),
    "hf_best": Peer(
        lambda args, precision, batches: huggingface(args, precision, masked_longest=True, batches=batches),
        grouped=True,
    ),
    "hf_default": Peer(lambda args, precision, batches: huggingface(args, precision, batches=batches)),
    "ours_torch_flash": Peer(_torch_flash),
    "ours_graphs": Peer(_graphs, packed=True),
    "ours_compiled": Peer(_compiled, compiled=True),
    "hf_compiled": Peer(
        lambda args, precision, batches: huggingface(args, precision, compiled=True, batches=batches), compiled=True
    ),
}


def run(context: Context, size: str) -> None:
    result, precision = context.result, precision_of(context)
    device = torch.device(context.device)
    dtype = torch.float32 if context.tiny else torch.bfloat16
    best = ceiling(device, dtype, 0.05 if context.tiny else 0.5)
    result.metrics[f"ceiling_tflops/{size}"] = best / 1e12
    rows: list[dict[str, Any]] = []
    for batch, dropout in _CASES[:1] if context.tiny else _CASES:
        for name, peer in PEERS.items():
            if context.tiny and peer.compiled:
                if size == "large":
                    result.left_out.append(f"{name}: compiling is measured on CUDA")
                continue
            label = f"{name}, local batch {batch}, dropout {dropout:g}"
            if context.has_time(30 if peer.compiled else 8, label):
                context.case(label, partial(_measure, context, rows, size, name, batch, dropout, precision, best))


def _measure(
    context: Context,
    rows: list[dict[str, Any]],
    size: str,
    name: str,
    batch: int,
    dropout: float,
    precision: str,
    best: float,
) -> None:
    """Measure one variant into `rows`; with a smaller local batch where memory does not suffice."""
    try:
        row = None
        with contextlib.suppress(torch.OutOfMemoryError):  # whose traceback would keep alive what did not fit
            row = _measure_once(context, size, name, batch, dropout, precision, best)
        if row is None:
            _free(context)
            row = _measure_once(context, size, name, _SMALLER, dropout, precision, best)
            row["wanted_batch"] = batch
        rows.append(row)
        context.result.details["rows"] = rows
        _metrics(context, size, rows)
    except UserError as missing:
        raise NotAvailable(str(missing)) from None
    finally:
        _free(context)


def _free(context: Context) -> None:
    torch.compiler.reset()
    gc.collect()
    reset_peak(context.device)


def _measure_once(
    context: Context, size: str, name: str, batch: int, dropout: float, precision: str, best: float
) -> dict[str, Any]:
    args = arguments(context, size, batch, dropout)
    config = make_config(args, precision)
    peer = PEERS[name]
    batches = batches_of(config, peer)
    reset_peak(context.device)
    step = peer.make(args, precision, batches)
    count = len(batches)
    warm_up = 2 * count if peer.packed or peer.compiled else 2
    reset_peak(context.device)
    times = repeat(step, context.device, count, warm_up=1 if context.tiny else warm_up)
    seconds = sum(times)
    lengths = np.concatenate([sample_lengths(each) for each in batches]).astype(np.float64)
    masked = sum(int((each.masked_labels >= 0).sum()) for each in batches)
    flops = train_flops(config.model, float(lengths.sum()), float((lengths**2).sum()), masked)
    row: dict[str, Any] = {
        "variant": name,
        "batch": args.batch,
        "dropout": dropout,
        "samples_per_s": len(lengths) / seconds,
        "tokens_per_s": float(lengths.sum()) / seconds,
        "mfu": flops / seconds / best,
        "step_ms": 1e3 * seconds / count,
        "peak_mib": peak_mib(context.device),
    }
    if name == "ours" and row["peak_mib"] is not None:
        expected = expected_mib(config, batches, context.device)
        row |= {"estimate_mib": expected, "memory_estimate_error": expected / row["peak_mib"] - 1.0}
    return row


def sample_lengths(batch: Batch) -> np.ndarray:
    """Lengths of a batch's samples, int64 [B], without sequences that only fill a row, which have no label."""
    labels = np.full(len(batch.lengths), -1)
    labels[: len(batch.next_sentence_labels)] = batch.next_sentence_labels
    return np.array(batch.lengths)[labels >= 0]


def expected_mib(config: Config, batches: Sequence[Batch], device: str) -> float:
    """What `--dry-run` estimates for the largest of these micro-batches."""
    shapes = [padded(batch, config.batch.shape_multiple) for batch in batches]
    largest = max(shapes, key=lambda batch: batch.num_tokens)
    lengths = np.array(largest.lengths, np.int64)
    sums = MicroBatch(
        int(lengths.sum()), int((lengths**2).sum()), len(largest.masked_labels), len(largest.next_sentence_labels)
    )
    hardware = Hardware(2, on_cpu=device == "cpu", logits_rows=chunk_rows(config.model.vocab_size, device))
    chain = chain_of(config, sums, hardware)
    return estimate(config, chain, make_recomputation_plan(config, chain), on_cpu=hardware.on_cpu).total / 2**20


def batches_of(config: Config, peer: Peer) -> list[Batch]:
    """The same samples for every peer: as drawn, sorted so that a batch holds like lengths, or packed into full rows."""
    count, longest = config.batch.micro_batch_size, config.data.max_seq_len
    lengths = np.maximum(8, wikipedia_like(count * _BATCHES, 0).astype(np.int64) * longest // 512)
    if peer.packed:
        return _packed(config, lengths)
    if peer.grouped:
        lengths = np.sort(lengths)[::-1]
    parts = [np.sort(part)[::-1].copy() for part in lengths.reshape(_BATCHES, count)]
    rng = np.random.default_rng(7)
    batches = [batch_of_lengths(part, config.model.vocab_size, rng) for part in parts]
    if peer.grouped:
        rng.shuffle(batches)
    return batches


def _packed(config: Config, lengths: np.ndarray) -> list[Batch]:
    """Rows of the longest length, as `balance.strategy: packed` lays them out: every batch has the same number of rows."""
    tree = copy.deepcopy(config.model_dump(mode="json"))
    tree["balance"]["strategy"] = "packed"
    packed = Config.model_validate(tree)
    planner = make_planner(packed, lengths.astype(np.uint16))
    rng = np.random.default_rng(7)
    batches = []
    for number in range(_BATCHES):
        plan = planner.plan(number)
        (part,) = plan.micro_batches(0)
        batch = batch_of_lengths(lengths[plan.ids[part]], config.model.vocab_size, rng)
        batches.append(lay_out(batch, plan, part, config.data.max_seq_len))
    return batches


def _metrics(context: Context, size: str, rows: list[dict[str, Any]]) -> None:
    """Metrics by name from the rows of the first case that has them (the largest batch, dropout on)."""
    metrics = context.result.metrics
    for row in rows:
        prefix = f"step/{size}/{row['variant']}/{row['batch']}/{row['dropout']:g}"
        metrics |= {f"{prefix}/{k}": row[k] for k in ("samples_per_s", "tokens_per_s", "mfu", "step_ms", "peak_mib")}
    wanted = [row for row in rows if "wanted_batch" not in row]
    batch = max((row["batch"] for row in wanted), default=0)
    first = [row for row in wanted if row["batch"] == batch and row["dropout"] == 0.1]
    mine = [row for row in first if row["variant"].startswith("ours")]
    if mine:
        winner = max(mine, key=lambda row: row["samples_per_s"])
        every = [row for row in rows if row["variant"].startswith("ours")]
        metrics[f"mfu/{size}/ours_best"] = max(row["mfu"] for row in every)
        context.result.details["best"] = winner["variant"]
        for name in ("hf_default", "hf_best", "hf_compiled"):
            theirs = [row for row in first if row["variant"] == name]
            if theirs:
                ratio = winner["samples_per_s"] / theirs[0]["samples_per_s"]
                metrics[f"ratio/{size}/ours_over_{name}"] = ratio
        parts = [f"{winner['variant']} {winner['samples_per_s']:,.1f} sequences/s, MFU {100 * winner['mfu']:.1f} %"]
        for name in ("hf_default", "hf_best"):
            if f"ratio/{size}/ours_over_{name}" in metrics:
                parts.append(f"{metrics[f'ratio/{size}/ours_over_{name}']:.2f} x {name}")
        context.result.summary = ", ".join(parts)
    errors = [row["memory_estimate_error"] for row in rows if "memory_estimate_error" in row]
    if errors and size == "large":
        metrics["memory_estimate_error"] = max(errors, key=abs)
