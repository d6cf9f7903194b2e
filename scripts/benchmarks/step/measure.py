"""Measuring one variant in a process of its own: rates, peak memory, the matmul ceiling beside them, share of the data path."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bert_fast.data.formats.table import SampleTable, to_records
from bert_fast.data.store import Store, merge_parts, write_part_of_records
from bert_fast.model.flops import train_flops
from bert_fast.train.batches import to_device

from ..common import peak_resident_mib
from .setting import make_batch, make_config
from .variants import VARIANTS


def set_up(args: argparse.Namespace) -> None:
    """Threads of this process."""
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))


def measure(args: argparse.Namespace, variant: str, precision: str) -> dict[str, float]:
    """tokens_per_s (real tokens), samples_per_s, mfu, peak_mib, ceiling_tflops of one variant."""
    set_up(args)
    cuda = args.device == "cuda"
    config = make_config(args, precision)
    batch = make_batch(config, args.mix)
    lengths = np.array(batch.lengths, np.int64)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    before = ceiling(torch.device(args.device), dtype)
    step = VARIANTS[variant](args, precision)
    for _ in range(args.warmup):
        step()
    _synchronise(cuda)
    _reset_peak(cuda)
    times = []
    for _ in range(args.steps):
        start = time.perf_counter()
        step()
        _synchronise(cuda)
        times.append(time.perf_counter() - start)
    best = max(before, ceiling(torch.device(args.device), dtype))
    seconds = statistics.median(times)
    flops = train_flops(config.model, float(lengths.sum()), float((lengths**2).sum()), len(batch.masked_labels))
    return {
        "tokens_per_s": float(lengths.sum()) / seconds,
        "samples_per_s": len(lengths) / seconds,
        "mfu": flops / seconds / best,
        "peak_mib": _peak_mib(cuda),
        "ceiling_tflops": best / 1e12,
        "step_s": seconds,
    }


def ceiling(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Best measured rate in FLOP/s of square matmuls of several sizes."""
    best = 0.0
    for size in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            a @ b
            _synchronise(device.type == "cuda")
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _synchronise(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def _reset_peak(cuda: bool) -> None:
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak of resident memory starts anew


def _peak_mib(cuda: bool) -> float:
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident_mib()


def data_seconds(args: argparse.Namespace, precision: str, steps: int = 30) -> float:
    """Median time from the memory-mapped store to a batch on the device, batches of other random samples each time."""
    set_up(args)
    config = make_config(args, precision)
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        store = _made_up_store(config, args.mix, Path(folder))
        rng = np.random.default_rng(1)
        times = []
        for _ in range(steps):
            ids = rng.integers(0, len(store), config.batch.micro_batch_size)
            start = time.perf_counter()
            to_device(store.batch(ids), device, config.batch.shape_multiple)
            _synchronise(device.type == "cuda")
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _made_up_store(config: Any, mix: str, folder: Path) -> Store:
    blocks = []
    for seed in range(200):
        batch = make_batch(config, mix, seed)
        lengths = np.array(batch.lengths, np.int64)
        owner = np.searchsorted(batch.cu_seqlens, batch.masked_positions, side="right") - 1
        counts = np.bincount(owner, minlength=len(lengths))
        table = SampleTable(
            batch.input_ids,
            lengths,
            lengths // 2,
            batch.masked_positions - batch.cu_seqlens[owner],
            batch.masked_labels,
            counts,
            batch.next_sentence_labels,
        )
        blocks.append((to_records(table), lengths, counts, int(batch.next_sentence_labels.sum())))
    part = write_part_of_records(folder / "part.bin", blocks)
    merge_parts(folder / "store", [part], {"vocab_sha256": "0", "vocab_size": config.model.vocab_size})
    return Store(folder / "store")
