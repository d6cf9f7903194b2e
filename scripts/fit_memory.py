#!/usr/bin/env python3
"""The largest micro-batch that fits a card by way of recomputing, and the fastest way to train a config in its memory.

    python scripts/fit_memory.py --config configs/bert_large_8xa100_lamb.yaml --gpus 24GiB --out fragment.yaml
    python run_pretraining.py --config ... $(python scripts/fit_memory.py --config ... --gpus 24GiB --as-overrides)

Nothing is built and nothing is run: sizes follow from shapes (docs/memory.md), times from the rates of a machine, which
--measure measures here. A share of each card (--reserve) is left for the driver, kernels and fragments.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

import guard  # noqa: F401

import torch

from bert_fast.command import guarded, share
from bert_fast.config import Config
from bert_fast.config.load import load_config
from bert_fast.config.yaml_files import to_yaml
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.files import write_atomically
from bert_fast.memory.budget import MACHINES, Machine, fit, gib, largest_micro_batch, with_changes
from bert_fast.memory.stages import Hardware
from bert_fast.report.console import print_table
from bert_fast.train.setup.memory_fit import fit_lines, likely_hardware

_MODES = ("none", "attention", "layer", "half_layer", "optimal")


def _largest(config: Config, how: str, budget: float, hardware: Hardware) -> str:
    """The largest micro-batch with a way to recompute, or why there is none."""
    try:
        return f"{largest_micro_batch(with_changes(config, {'memory.recompute': how}), budget, hardware):,}"
    except UserError as error:
        return str(error).removeprefix("config: ")


def as_yaml(value: object) -> str:
    """A value as it is written behind `section.field=`."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"


def measured(machine: Machine, dtype: torch.dtype, device: torch.device) -> Machine:
    """The machine with the rates of matrix products, as a step reaches them, and of memory as they are here."""
    size = 4096 if device.type == "cuda" else 768
    a = torch.randn(size, size, device=device).to(dtype)
    big = torch.zeros(2**26 if device.type == "cuda" else 2**23, device=device)
    other = torch.zeros_like(big)
    product = min(_seconds(lambda: a @ a, device) for _ in range(5))
    copy = min(_seconds(lambda: other.copy_(big), device) for _ in range(5))
    reached = 0.5  # of the rate of large products, by a whole step
    return replace(machine, flops_per_s=reached * 2 * size**3 / product, memory_bytes_per_s=2 * 4 * big.numel() / copy)


def _seconds(action: object, device: torch.device) -> float:
    assert callable(action)
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the run's config")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings in place of the config's")
    parser.add_argument("--gpus", required=True, metavar="SIZE", help="memory of a rank's device, such as 80GiB")
    parser.add_argument("--reserve", type=share, default=0.05, help="share of it that is left free (default 0.05)")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="what will compute (default: the config's, or cuda)")
    parser.add_argument(
        "--precision", choices=["bf16", "fp32"], default=None, help="of activations (default: the config's)"
    )
    parser.add_argument("--measure", action="store_true", help="measure the rates of this machine")
    parser.add_argument("--out", metavar="FILE", help="write the switches there, as a piece of a config")
    parser.add_argument("--as-overrides", action="store_true", help="print the switches alone, as overrides")
    args = parser.parse_intermixed_args()
    if args.reserve == 1:
        raise UserError("--reserve=1 leaves nothing; give a share below 1")
    budget = gib(args.gpus) * (1 - args.reserve)
    config = load_config(args.config, args.overrides)
    kind = args.device or (config.system.device if config.system.device != "auto" else "cuda")
    config = with_changes(config, {"system.device": kind, "memory.recompute": "none"})
    if args.precision is not None:
        config = with_changes(config, {"train.precision": args.precision})
    hardware = likely_hardware(config, kind)
    machine = MACHINES[kind]
    if args.measure:
        if kind == "cuda" and not torch.cuda.is_available():
            raise UserError("--measure: this machine has no CUDA device; leave it out, or give --device cpu")
        machine = measured(
            machine, torch.float32 if hardware.element_bytes == 4 else torch.bfloat16, torch.device(kind)
        )
    found = fit(config, budget, hardware, machine)
    if args.as_overrides:
        print(*(f"{name}={as_yaml(value)}" for name, value in found.changes().items()))
        return ExitCode.OK
    rows = [(how, _largest(config, how, budget, hardware)) for how in _MODES]
    print_table(
        f"largest micro-batch of {config.data.max_seq_len} tokens in {budget:.2f} GiB, by memory.recompute", rows
    )
    print_table("the fastest way to train this config in it", [("", line) for line in fit_lines(found)])
    if args.out:
        write_atomically(args.out, to_yaml(found.fragment()))
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
