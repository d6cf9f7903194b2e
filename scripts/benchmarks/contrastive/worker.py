"""One process of the contrastive benchmark: one loss on one batch, its time and the memory beyond inputs and gradients.

Started by `python -m scripts.benchmarks.contrastive.worker` with a JSON object on its input: `rivals`, `pairs`, `width`,
`threads`, `rounds`, `device`. Prints one JSON object. With several rivals they are called in turn, for their times alone.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
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
    rivals, device = task["rivals"], task["device"]
    alone = len(rivals) == 1
    if alone:
        return_freed_memory()
    torch.set_num_threads(task["threads"])
    small = embeddings(256, task["width"], device)
    for rival in rivals:
        once(rival, *small)  # what libraries take when they first run is no part of a loss
    queries, keys = embeddings(task["pairs"], task["width"], device)
    if alone:
        print(json.dumps({"extra_bytes": extra_bytes(rivals[0], queries, keys)}))
        return
    found: dict[str, list[dict[str, float]]] = {rival: [] for rival in rivals}
    for number in range(task["rounds"] + 1):
        for rival in rivals:
            wall, cpu, loss = once(rival, queries, keys)
            if number:  # the first has to find its memory, and measures tiles
                found[rival].append({"wall_s": wall, "cpu_s": cpu, "loss": loss})
    print(json.dumps(found))


def extra_bytes(rival: str, queries: torch.Tensor, keys: torch.Tensor) -> int:
    """The most memory at a time in a call, beyond its inputs and their gradients."""
    gradients = 2 * queries.numel() * 4
    gc.collect()
    if queries.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(rival, queries, keys)
        return torch.cuda.max_memory_allocated() - before - gradients
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here on
    before = resident("VmRSS")
    once(rival, queries, keys)
    return resident("VmHWM") - before - gradients


if __name__ == "__main__":
    main()
