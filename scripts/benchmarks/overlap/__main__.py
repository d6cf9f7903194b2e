#!/usr/bin/env python3
"""How much communication each engine and bucket plan hides: hosts made of network namespaces, joined by slow links.

    sudo python -m scripts.benchmarks.overlap --json results/overlap/overlap.json --out results/overlap

Two or four namespaces joined by veth pairs and a bridge, both ends of a link limited by a token bucket; gloo between them.
Forward, backward and updates are modelled as waiting time, as on a host beside a GPU: they need no CPU, and what is measured
is scheduling. `--model layers`: eight equal layers of 4.2 MB; `base` and `large`: BERT's clip groups, scaled to half as many
bytes, the time of backward spread by FLOPs, the tied word embedding last; `real`: a small BERT computed on this CPU, one
thread per rank (so its times are noisy).

The time of backward follows from the ratio of communication to backward; forward takes half as long, all updates a tenth. A
cycle is a whole step. Variants run in turn; the results are medians. Exposed is what a cycle takes beyond a cycle without
communication; hidden = (compute + communication - cycle) / min(backward, communication). Predictions are the bucket planner's
timeline over links measured in place and host work measured without communication. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import scripts.guard  # noqa: F401

from bert_fast.command import guarded, positive, whole
from bert_fast.exit_codes import ExitCode, of_signal
from bert_fast.files import write_atomically
from bert_fast.report.bench import add_arguments, environment, write_result

from . import report
from .hosts import run_hosts
from .report import FORMATS, NAMES

LINKS = {"50mbit": 50, "200mbit": 200, "1gbit": 1000, "unshaped": None}
MODELS = ("layers", "base", "large", "real")


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["layers"], choices=MODELS, help="default layers")
    parser.add_argument("--hosts", type=whole(1, 4), nargs="+", default=[2], choices=(2, 4), help="default 2")
    parser.add_argument("--links", nargs="+", default=["200mbit", "1gbit"], choices=LINKS, help="default 200mbit 1gbit")
    parser.add_argument("--ratios", type=positive, nargs="+", default=[0.5, 1, 2], help="communication over backward")
    parser.add_argument(
        "--formats", nargs="*", choices=FORMATS, metavar="FORMAT",
        help=f"measure wire formats in place of variants, with the communication of bf16 over backward as the ratio; "
        f"of {', '.join(FORMATS)} (all if none is named)",
    )  # fmt: skip
    parser.add_argument("--variants", nargs="+", default=list(NAMES), choices=NAMES, help="default all")
    parser.add_argument(
        "--repeats", type=whole(1, 10**6), default=5, help="measured cycles of each variant (default %(default)s)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="write NAME.md and timeline-NAME.svg there")
    parser.add_argument("--name", default="overlap", help="NAME of these files (default %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    add_arguments(parser)
    args = parser.parse_args()
    if args.worker:
        settings = json.loads(args.worker)
        if settings.get("formats"):
            from .formats import work
        elif settings["model"] == "real":
            from .real import work
        else:
            from .worker import work
        work(settings)
        return 0
    if os.geteuid() != 0:
        print("error: network namespaces need root; run with sudo", file=sys.stderr)
        return ExitCode.USER_ERROR
    if not (shutil.which("ip") and shutil.which("tc")):
        print("error: ip and tc are missing; install iproute2", file=sys.stderr)
        return ExitCode.USER_ERROR
    if args.quick:
        args.links, args.ratios, args.repeats = ["1gbit"], [1], 3
        args.variants = ["one_bucket", "ddp_default", "auto", "auto_sharded"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(of_signal(signal.SIGTERM)))  # so that the hosts are removed
    machine = environment()
    metrics: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    parts, pictures = [], {}
    for model, hosts, link, ratio in (
        (m, h, li, r)
        for m in args.model
        for h in args.hosts
        for li in args.links
        for r in (args.ratios if m != "real" else args.ratios[:1])  # its passes take what they take
    ):
        settings = {"model": model, "ratio": ratio, "variants": args.variants, "repeats": args.repeats}
        if args.formats is not None:
            settings["formats"] = args.formats or list(FORMATS)
        try:
            record = run_hosts(hosts, LINKS[link], settings)
        except (subprocess.CalledProcessError, RuntimeError, subprocess.TimeoutExpired) as error:
            why = getattr(error, "stderr", None) or error
            print(f"error: {model}, {hosts} hosts, {link}: {str(why).strip()}", file=sys.stderr)
            return ExitCode.TRAINING_ERROR
        prefix = "/".join(
            [link, f"{ratio:g}", *([model] if model != "layers" else []), *([f"{hosts}hosts"] if hosts != 2 else [])]
        )
        if args.formats is not None:
            from . import formats

            by_variant = formats.metrics_of(record)
            samples |= {f"{prefix}/{name}/step_ms": each["samples"] for name, each in record["formats"].items()}
            parts.append(formats.table_of(formats.title_of(hosts, link, ratio, record), record, by_variant))
        else:
            by_variant = report.metrics_of(record)
            samples |= {f"{prefix}/{name}/step_ms": raw for name, raw in record["samples"].items()}
            title = report.title_of(model, hosts, link, ratio, record)
            pictures[title] = record["traces"]
            parts.append(report.table_of(title, record, by_variant))
        for name, values in by_variant.items():
            metrics |= {f"{prefix}/{name}/{key}": value for key, value in values.items()}
        print("\n" + parts[-1], flush=True)
        if args.json:  # after every part: a long run that is cut keeps what it has
            config = {key: value for key, value in vars(args).items() if key not in ("json", "worker")}
            write_result(args.json, metrics, config, machine, samples)
        if args.out:
            write_atomically(Path(args.out) / f"{args.name}.md", "\n".join(parts))
    if args.out:
        from .picture import draw

        drawn = {title: traces for title, traces in pictures.items() if traces}
        if drawn:
            title = next((title for title in drawn if ", ratio 1:" in title), next(iter(drawn)))
            traces = drawn[title]
            draw(Path(args.out) / f"timeline-{args.name}.svg", title, traces)
    return 0


if __name__ == "__main__":
    sys.exit(main())
