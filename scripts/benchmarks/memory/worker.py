"""One process of the memory benchmark: build a config, run some steps, and say what resident memory they took and how long.

Started by `python -m scripts.benchmarks.memory.worker` with a JSON object on its standard input: the config as nested values,
`lengths` of a micro-batch's samples and `steps`. Prints one JSON object.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import scripts.guard  # noqa: F401

import numpy as np
import torch

from bert_fast.allocator import return_freed_memory
from bert_fast.config import Config
from bert_fast.config.load import config_from_tree
from bert_fast.train.batches import batch_of_lengths, to_device
from bert_fast.train.environment import Environment, pick_dtype
from bert_fast.train.setup.build import build
from bert_fast.train.step import StepInput

_CPU = torch.device("cpu")
_WARM = 64  # samples that are enough to see a shape


def resident(name: str) -> int:
    """Bytes of this process that are in memory: `VmRSS` now, `VmHWM` at most."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise OSError("this system does not tell what a process has in memory")


def main() -> None:
    task: dict[str, Any] = json.load(sys.stdin)
    config = config_from_tree(task["config"])
    return_freed_memory()
    torch.set_num_threads(task.get("threads", 1))
    # What libraries take when they first see a shape (code that they compile, tables) is no part of a model: 10 to 40 MiB
    run(with_model(task["config"], {"num_layers": 1}), task["lengths"][:_WARM], 1)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here on
    before = resident("VmRSS")
    result = run(config, task["lengths"], task["steps"])
    print(json.dumps({"peak_bytes": resident("VmHWM") - before, **result}))


def with_model(tree: dict[str, Any], shape: dict[str, Any]) -> Config:
    """The config with another model."""
    return config_from_tree({**tree, "model": {**tree["model"], **shape}})


def run(config: Config, own_lengths: list[int], steps: int) -> dict[str, Any]:
    """Build the config and run steps over one micro-batch of these lengths: seconds, losses, and what was planned."""
    environment = Environment(0, 0, 1, _CPU, pick_dtype(config.train.precision, _CPU))
    components = build(config, environment)
    lengths = np.array(own_lengths)
    batches = [
        batch_of_lengths(lengths, config.model.vocab_size, np.random.default_rng(number), config.data.mask_share)
        for number in range(config.batch.micro_batches_per_step)
    ]
    masked = sum(len(batch.masked_labels) for batch in batches)
    inputs = StepInput(
        [to_device(batch, _CPU, config.batch.shape_multiple) for batch in batches], masked, len(lengths) * len(batches)
    )
    seconds, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        result = components.step(inputs, lr=1e-4)
        seconds.append(time.perf_counter() - start)
        losses.append(result.mlm_sum.item())
    planned = components.recomputation
    return {
        "seconds": seconds,
        "losses": losses,
        "num_recomputed": 0 if planned is None else planned.num_recomputed,
        "planned_activations_bytes": None if planned is None else planned.peak_bytes,
    }


if __name__ == "__main__":
    main()
