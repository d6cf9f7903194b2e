#!/usr/bin/env python3
"""Profile one training step: a Chrome trace, a table of the top costs, shares by part of the model.

python scripts/profile_step.py --size base --precision bf16 --out profiles/base
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import guard  # noqa: F401

from benchmarks.step.breakdown import profile, tables
from benchmarks.step.setting import add_setting
from bert_fast.command import guarded, whole
from bert_fast.files import write_atomically


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16", help="default %(default)s")
    parser.add_argument(
        "--out", metavar="FOLDER", default="profile", help="gets trace.json and top.md (default %(default)s)"
    )
    parser.add_argument(
        "--rows", type=whole(1, 10**6), default=25, help="operations of the table (default %(default)s)"
    )
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    shares, profiler = profile(args, args.precision, out / "trace.json")
    markdown = tables(shares, profiler, args.device, args.rows)
    write_atomically(out / "top.md", f"{markdown}\n")
    print(f"{markdown}\ntrace: {out / 'trace.json'} (open in ui.perfetto.dev)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
