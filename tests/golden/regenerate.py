#!/usr/bin/env python3
"""The golden loss curves: 30 steps of tiny runs and 100 of the mini config, from made-up text to weights. Rewrites losses.json.

    python tests/golden/regenerate.py           # after a change that is meant to move numerics: say why in the commit
    python tests/golden/regenerate.py --check   # only compare; exit code 1 if a curve moved

A change that is not meant to move numerics must leave this file as it is. Everything that decides a loss is in these
curves: samples and their order, the plan, initial weights, the model, clipping, the optimizer, the schedule. They are compared
bit for bit on the kind of CPU and the torch that they were recorded with, and within TOLERANCE elsewhere.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of tests/support
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # of bert_fast

from support.steps import PlannedSteps, cpu_rank

from bert_fast.config.load import config_from_tree
from bert_fast.data.samples import SampleParams, make_samples
from bert_fast.data.store import merge_parts, write_part
from bert_fast.data.wordpiece import Vocabulary
from bert_fast.hardware import cpu_name
from bert_fast.optim.schedule import learning_rate
from bert_fast.train.setup.build import build

FILE = Path(__file__).with_name("losses.json")
STEPS = {"mini config": 100}
DEFAULT_STEPS = 30
TOLERANCE = 1e-6  # relative: instruction sets from SSE4.2 to AVX-512 differ by up to 1.4e-7 on these curves
LONG_TOLERANCE = 1e-3  # of 100 steps at a high learning rate, which make more of such differences
VOCAB_SIZE = 96
MINI = Path(__file__).resolve().parents[2] / "configs" / "mini_cpu.yaml"


def _mini() -> dict[str, dict[str, Any]]:
    """What the mini config sets of model, optimizer and schedule, for one rank, from random weights."""
    plain = yaml.safe_load(MINI.read_text(encoding="utf-8"))
    batch = plain["batch"]["global_batch_size"]
    return {
        **{section: plain[section] for section in ("model", "communication", "optimizer", "schedule")},
        "batch": {"global_batch_size": batch, "micro_batch_size": batch},
        "train": {"max_steps": 100},
    }


CURVES: dict[str, dict[str, dict[str, Any]]] = {
    "mini config": _mini(),
    "adamw, clip groups before the reduction, balanced": {"optimizer": {"name": "adamw", "lr": 0.003}},
    "lamb, clip after the reduction, random, accumulation": {
        "optimizer": {"name": "lamb", "lr": 0.02, "beta1": 0.8, "beta2": 0.925},
        "communication": {"clip": "global_after_reduce"},
        "balance": {"strategy": "random"},
        "batch": {"micro_batch_size": 4, "gradient_accumulation_steps": 4},
        "schedule": {"start_warmup_step": -3, "power": 0.5, "end_lr": 0.001},
        "model": {"activation": "gelu_tanh", "attention_backend": "loop"},
    },
    "adamw, whole gradient clipped, stratified": {
        "optimizer": {"lr": 0.01, "weight_decay": 0.1},
        "communication": {"clip": "global_before_reduce", "max_norm": 0.5},
        "balance": {"strategy": "stratified_presort", "num_strata": 2},
        "train": {"seed": 3},
    },
}


def write_store(folder: Path) -> None:
    """240 documents of a small made-up language in which the next word mostly follows from the last two."""
    rng = random.Random(20)
    documents = []
    for _ in range(240):
        document, a, b = [], rng.randrange(5, VOCAB_SIZE), rng.randrange(5, VOCAB_SIZE)
        for _ in range(rng.randint(4, 9)):
            sentence = []
            for _ in range(rng.randint(4, 12)):
                a, b = b, 5 + (2 * a + 3 * b + rng.choice((0, 0, 0, 1))) % (VOCAB_SIZE - 5)
                sentence.append(b)
            document.append(sentence)
        documents.append(document)
    vocabulary = Vocabulary(tuple(map(str, range(VOCAB_SIZE))), "0" * 64, cls_id=2, sep_id=3, mask_id=4)
    params = SampleParams(max_seq_len=48, max_predictions=8, dupe_factor=1, seed=1)
    part = write_part(folder / "part.bin", make_samples(documents, vocabulary, params, chunk=0))
    merge_parts(folder / "train", [part], {"vocab_sha256": "0" * 64, "vocab_size": VOCAB_SIZE, "text_sha256": "0" * 64})


def steps_of(name: str) -> int:
    """Steps of a curve."""
    return STEPS.get(name, DEFAULT_STEPS)


def tolerance_of(name: str) -> float:
    """Relative difference that another kind of CPU may show."""
    return LONG_TOLERANCE if steps_of(name) > DEFAULT_STEPS else TOLERANCE


def here() -> dict[str, str]:
    """What bits depend on."""
    return {"cpu": cpu_name(), "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}


def losses(name: str, folder: Path) -> list[float]:
    """Loss (masked tokens plus next sentence) of each of the first steps of a curve, in fp32 on one thread."""
    tree: dict[str, dict[str, Any]] = {
        "model": {
            "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48,
            "max_positions": 48, "hidden_dropout": 0.0, "attention_dropout": 0.0, "initializer_range": 0.08,
        },
        "data": {"train": str(folder / "train"), "max_seq_len": 48},
        "batch": {"global_batch_size": 16, "micro_batch_size": 16},
        "schedule": {"warmup_steps": 5, "total_steps": 60},
        "train": {"max_steps": 100, "precision": "fp32"}, "evaluation": {"every_samples": 1000},
        "system": {"device": "cpu"},
    }  # fmt: skip
    for section, values in CURVES[name].items():
        tree.setdefault(section, {}).update(values)
    config = config_from_tree(tree)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        components = build(config, cpu_rank())
        steps = PlannedSteps(config)
        curve = []
        for number in range(steps_of(name)):
            inputs = steps.input(number)
            rate = learning_rate(number, config.optimizer.lr, config.schedule)
            result = components.step(inputs, rate)
            loss = result.mlm_sum.item() / inputs.global_masked + result.nsp_sum.item() / inputs.global_samples
            curve.append(loss)
    finally:
        torch.set_num_threads(threads)
    return curve


def all_losses() -> dict[str, list[float]]:
    """Every curve by name."""
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder))
        return {name: losses(name, Path(folder)) for name in CURVES}


def deviation(found: list[float], golden: list[float]) -> float:
    """Largest relative difference of two curves."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, golden, strict=True))


def main() -> int:
    curves = all_losses()
    golden = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    moved = False
    for name, curve in curves.items():
        by = deviation(curve, golden[name]) if name in golden else float("inf")
        moved |= by > tolerance_of(name)
        print(f"{name}: {curve[0]:.6f} -> {curve[-1]:.6f}, largest relative difference to losses.json {by:.1e}")
    if "--check" in sys.argv[1:]:
        return int(moved)
    lines = [
        f"  {json.dumps(name)}: [\n    " + ",\n    ".join(repr(x) for x in c) + "\n  ]" for name, c in curves.items()
    ]
    lines.insert(0, f'  "recorded on": {json.dumps(here())}')
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
