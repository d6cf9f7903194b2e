"""One process of the contrastive benchmark: one loss on one batch, its time and the memory beyond inputs and gradients.

Started by `python -m scripts.benchmarks.contrastive.worker` with a JSON object on its standard input: `rival`, `pairs`, `width`,
`threads`, `repeats`, `device`. Prints one JSON object.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from typing import Any

import scripts.guard  # noqa: F401

import torch
import torch.nn.functional as F

from bert_fast.allocator import return_freed_memory
from scripts.benchmarks.memory.worker import resident

from .rivals import RIVALS

SCALE = 20.0


def embeddings(pairs: int, width: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalized queries and keys near them, fp32 [pairs, width]."""
    generator = torch.Generator(device).manual_seed(0)
    queries = F.normalize(torch.randn(pairs, width, generator=generator, device=device), dim=1)
    keys = torch.randn(pairs, width, generator=generator, device=device).mul_(3 / width**0.5).add_(queries)
    return queries, F.normalize(keys, dim=1)


def once(rival: str, queries: torch.Tensor, keys: torch.Tensor) -> tuple[float, float, float]:
    """Wall and CPU seconds of loss and gradients, and the loss."""
    leaves = [x.detach().requires_grad_() for x in (queries, keys)]
    scale = torch.tensor(SCALE, device=queries.device)
    wait(queries.device)
    start, cpu = time.perf_counter(), time.process_time()
    loss = RIVALS[rival](leaves[0], leaves[1], scale)
    if loss.requires_grad:
        loss.backward()
    wait(queries.device)
    return time.perf_counter() - start, time.process_time() - cpu, loss.item()


def wait(device: torch.device) -> None:
    """For what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    task: dict[str, Any] = json.load(sys.stdin)
    return_freed_memory()
    torch.set_num_threads(task["threads"])
    small = embeddings(256, task["width"], task["device"])
    once(task["rival"], *small)  # what libraries take when they first run is no part of a loss
    queries, keys = embeddings(task["pairs"], task["width"], task["device"])
    gradients = 2 * queries.numel() * 4
    gc.collect()
    on_cuda = queries.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_cuda else resident("VmRSS")
    found = [once(task["rival"], queries, keys)]
    peak = torch.cuda.max_memory_allocated() if on_cuda else resident("VmHWM")
    found += [once(task["rival"], queries, keys) for _ in range(task["repeats"] - 1)]
    result = {"wall_s": [x[0] for x in found], "cpu_s": [x[1] for x in found], "loss": found[0][2]}
    print(json.dumps({"extra_bytes": peak - before - gradients, **result}))


if __name__ == "__main__":
    main()
