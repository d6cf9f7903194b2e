#!/usr/bin/env python3
"""Pretrain BERT: read the config, join or start the ranks, train, exit code. No logic of its own.

    python run_pretraining.py --config configs/mini_cpu.yaml                     # starts the config's ranks here
    python run_pretraining.py --config configs/mini_cpu.yaml train.seed=3 communication.bucket_mb=4
    torchrun --nproc-per-node 8 run_pretraining.py --config configs/X.yaml       # takes the ranks it is given

Exit codes: 0 the run ended (target reached, or last step done); 1 the target was not reached; 2 something to fix in
config, data or machine; 3 training cannot go on; 4 a rank was lost; 70 a bug; 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from bert_fast.command import guard_imports, guarded

PROCESS_START = time.time()


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command line to a namespace. Long help lists every config field."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", required=True, help="YAML file of the run (configs/)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that replace the file's")
    parser.add_argument("--resume", action="store_true", help="continue a stopped run from its last checkpoint")
    parser.add_argument("--print-config", action="store_true", help="print the whole config with defaults and exit")
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, run no step; print memory, batches, plan and buckets"
    )
    parser.add_argument(
        "--preflight",
        action="store_true",
        help="check devices, data, clocks and network of all ranks, print a table, exit",
    )
    if "-h" in arguments or "--help" in arguments:
        from bert_fast.config.load import describe_fields

        parser.epilog = "config fields:\n" + describe_fields()
    return parser.parse_intermixed_args(arguments)


@guarded
def train() -> int:
    args = parse(sys.argv[1:])
    from bert_fast.train import main as entry

    return entry.guarded(lambda: entry.run(args, PROCESS_START))


def main() -> None:
    guard_imports()
    code = train()
    sys.stderr.flush()
    # Everything is written and closed. Tearing down threads of torch and gloo in no fixed order has aborted a rank at times.
    os._exit(code)


if __name__ == "__main__":
    main()
