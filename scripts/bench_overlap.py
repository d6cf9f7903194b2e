#!/usr/bin/env python3
"""How much communication each engine and bucket plan hides: hosts made of network namespaces, joined by slow links.

    sudo python scripts/bench_overlap.py --json results/overlap/overlap.json --out results/overlap

Two (or four) namespaces joined by veth pairs and a bridge, both ends limited by a token bucket; gloo between them. Backward
is modelled as waiting time per layer, as on a GPU: compute needs no CPU, and what is measured is scheduling. Eight layers of
4.2 MB; the time of backward follows from the ratio of communication to compute. Variants run in turn, several repeats; figures
are medians. Predictions are the bucket planner's timeline for a link and an optimizer that are measured in place. Needs
root and iproute2.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bert_fast.files import write_atomically  # noqa: E402
from bert_fast.report.bench import add_arguments, environment, markdown_table, write_result  # noqa: E402

LAYERS, NUMEL = 8, 1_050_000  # 4.2 MB a layer, 33.6 MB in all
BRIDGE, SUBNET, PORT = "bfbr0", "10.77.0", 29511
LINKS = {"200mbit": 25e6, "1gbit": 125e6}  # bytes/s


@dataclass(frozen=True)
class Variant:
    """An engine and its settings; `buckets` as communication.bucket_mb, or `default` for DDP's own."""

    engine: str = "bucketed"
    buckets: Any = 25.0
    clip: str = "bucket_before_reduce"
    wire: str = "fp32"
    when: str = "end"


VARIANTS = {
    "one_bucket": Variant(buckets=1000.0),
    "ddp_default": Variant("ddp", "default", "none"),
    "ddp_plan": Variant("ddp", "auto"),
    "25mib": Variant(),
    "auto": Variant(buckets="auto"),
    "auto_shadow": Variant(buckets="auto", when="bucket"),
    "auto_bf16": Variant(buckets="auto", wire="bf16"),
    "auto_clip_none": Variant(buckets="auto", clip="none"),
    "auto_clip_global_before": Variant(buckets="auto", clip="global_before_reduce"),
    "auto_clip_global_after": Variant(buckets="auto", clip="global_after_reduce"),
}


# ---- the test bed ---------------------------------------------------------------------------------------------------


def sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextmanager
def hosts(number: int, rate_mbit: int) -> Iterator[list[str]]:
    """Names of `number` namespaces on one bridge; each link carries `rate_mbit` in each direction. Removed at the end."""
    names = [f"bf{os.getpid() % 10_000}h{i}" for i in range(number)]
    try:
        sh("ip", "link", "add", BRIDGE, "type", "bridge")
        sh("ip", "link", "set", BRIDGE, "up")
        for index, name in enumerate(names):
            sh("ip", "netns", "add", name)
            sh("ip", "link", "add", f"bfv{index}", "type", "veth", "peer", "name", f"bfb{index}")
            sh("ip", "link", "set", f"bfv{index}", "netns", name)
            sh("ip", "link", "set", f"bfb{index}", "master", BRIDGE, "up")
            sh("ip", "-n", name, "addr", "add", f"{SUBNET}.{index + 1}/24", "dev", f"bfv{index}")
            sh("ip", "-n", name, "link", "set", "lo", "up")
            sh("ip", "-n", name, "link", "set", f"bfv{index}", "up")
            shape = ("root", "tbf", "rate", f"{rate_mbit}mbit", "burst", "128kb", "latency", "50ms")
            sh("tc", "-n", name, "qdisc", "replace", "dev", f"bfv{index}", *shape)
            sh("tc", "qdisc", "replace", "dev", f"bfb{index}", *shape)
        yield names
    finally:
        for index, name in enumerate(names):
            subprocess.run(["ip", "link", "del", f"bfb{index}"], capture_output=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)


def run_hosts(number: int, rate_mbit: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Start one worker a host; rank 0's result."""
    with hosts(number, rate_mbit) as names:
        processes = []
        for rank, name in enumerate(names):
            variables = {
                **os.environ, "GLOO_SOCKET_IFNAME": f"bfv{rank}", "MASTER_ADDR": f"{SUBNET}.1", "MASTER_PORT": str(PORT),
                "RANK": str(rank), "WORLD_SIZE": str(number), "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            command = ["ip", "netns", "exec", name, sys.executable, __file__, "--worker", json.dumps(settings)]
            processes.append(
                subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        try:
            outputs = [process.communicate(timeout=3600) for process in processes]
        finally:
            for process in processes:
                process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(errors.strip().splitlines()[-1] if errors.strip() else f"exit {process.returncode}")
    return json.loads(outputs[0][0].splitlines()[-1])


# ---- what a host does -----------------------------------------------------------------------------------------------


def worker(settings: dict[str, Any]) -> None:
    """Measure every variant of one link and ratio; rank 0 prints JSON."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from bert_fast.communication.plan import Link, timeline
    from bert_fast.train.environment import Environment
    from bert_fast.train.plan_buckets import measure_link

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    cpu = Environment(rank, rank, world, torch.device("cpu"), torch.float32)
    link = measure_link(LAYERS * NUMEL * 4, torch.float32, cpu)
    shared = torch.tensor([link.latency_s, link.bytes_per_s], dtype=torch.float64)
    dist.broadcast(shared, 0)
    link = Link(*shared.tolist())
    wait = (float(link(LAYERS * NUMEL * 4)) - link.latency_s) / settings["ratio"] / LAYERS
    steps: dict[str, Callable[[], float]] = {"compute": _compute_alone(wait), "communication": _communication_alone()}
    update_s = _optimizer_alone()
    predicted: dict[str, float] = {}
    buckets: dict[str, int] = {}
    for name in settings["variants"]:
        steps[name], ends = _make_step(VARIANTS[name], wait, link, cpu)
        buckets[name] = len(ends)
        late = VARIANTS[name].clip == "global_before_reduce"  # nothing leaves before backward ends
        width = 2 if VARIANTS[name].wire == "bf16" else 4
        ready = [LAYERS * wait] * LAYERS if late else [wait * (i + 1) for i in range(LAYERS)]
        plan = timeline(np.array(ready), np.full(LAYERS, NUMEL * width), ends, link)
        predicted[name] = _with_updates(plan, update_s, VARIANTS[name].when, LAYERS * wait)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(settings["warm_up"] + settings["repeats"]):
        for name, step in steps.items():
            if number < settings["warm_up"] - 2 and not name.startswith("ddp"):
                continue  # DDP learns its buckets in the first steps; the others need one
            dist.barrier()
            seconds = torch.tensor(step(), dtype=torch.float64)
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            if number >= settings["warm_up"]:
                samples[name].append(1e3 * float(seconds))
    if rank == 0:
        print(json.dumps({
            "samples": samples, "predicted_ms": {k: 1e3 * v for k, v in predicted.items()}, "buckets": buckets,
            "link": {"latency_s": link.latency_s, "bytes_per_s": link.bytes_per_s}, "wait_ms": 1e3 * wait,
        }))  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


def _model(wait: float) -> Any:
    """Layers whose backward takes `wait` seconds without a processor."""
    import torch
    from torch import nn

    class Waiting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(weight)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            time.sleep(wait)
            return grad, torch.full_like(ctx.saved_tensors[0], 1e-3)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(NUMEL))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Waiting.apply(x, self.weight)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x.sum()

    return Model()


def _compute_alone(wait: float) -> Callable[[], float]:
    import torch

    model = _model(wait)

    def step() -> float:
        x = torch.zeros(1, requires_grad=True)
        loss = model(x)
        start = time.perf_counter()
        loss.backward()
        return time.perf_counter() - start

    return step


def _communication_alone() -> Callable[[], float]:
    import torch
    import torch.distributed as dist

    buffer = torch.zeros(LAYERS * NUMEL)

    def step() -> float:
        start = time.perf_counter()
        dist.all_reduce(buffer)
        return time.perf_counter() - start

    return step


def _optimizer_alone() -> float:
    """Seconds of an update of all parameters."""
    import torch

    parameters = [torch.zeros(NUMEL, requires_grad=True) for _ in range(LAYERS)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _with_updates(plan: Any, update_s: float, when: str, backward_s: float) -> float:
    """When the last weight is new: all updates after the last bucket, or each after its own and after backward."""
    if when == "end":
        return plan.finish_s[-1] + update_s
    now, begin = backward_s, 0
    for end, finish in zip(plan.ends, plan.finish_s, strict=True):
        now = max(now, finish) + update_s * (end - begin) / LAYERS
        begin = end
    return now


def _make_step(variant: Variant, wait: float, link: Any, cpu: Any) -> tuple[Callable[[], float], list[int]]:
    """A training step of a variant (seconds from the start of backward to new weights), and where its buckets end."""
    import numpy as np
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from bert_fast.communication.buckets import plan_layout
    from bert_fast.communication.compress import wire_format
    from bert_fast.communication.ddp import DdpEngine
    from bert_fast.communication.plan import exact_plan, uniform_ends
    from bert_fast.communication.reducer import BucketReducer
    from bert_fast.optim.partial import PartialSteps

    model = _model(wait)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    order = list(range(LAYERS))[::-1]
    width = 2 if variant.wire == "bf16" else 4
    sizes = np.full(LAYERS, NUMEL * 4.0)
    if variant.buckets == "auto":
        ends = list(exact_plan(wait * np.arange(1, LAYERS + 1), sizes * width / 4, link).ends)
    else:
        ends = uniform_ends(sizes, (25.0 if variant.buckets == "default" else variant.buckets) * 2**20)
    x = torch.zeros(1, requires_grad=True)
    if variant.buckets == "default":  # as a user has it: no clipping, DDP's own buckets
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)

        def plain() -> float:
            optimizer.zero_grad(set_to_none=False)
            loss = ddp(x)
            start = time.perf_counter()
            loss.backward()
            optimizer.step()
            return time.perf_counter() - start

        return plain, ends
    caps = [float(b - a) * NUMEL * 4 / 2**20 for a, b in zip([0, *ends], ends, strict=False)]
    names = [name for name, _ in model.named_parameters()]
    layout = plan_layout(
        names, [NUMEL] * LAYERS, order, clip_groups="layer", bucket_mb=caps,
        whole_groups=variant.clip == "bucket_before_reduce",
    )  # fmt: skip
    assert len(layout.buckets) == len(ends)
    kind = DdpEngine if variant.engine == "ddp" else BucketReducer
    engine = kind(model, layout, clip=variant.clip, max_norm=1.0, wire=wire_format(variant.wire, torch.float32))
    update = None
    if variant.when == "bucket":
        parts = PartialSteps(optimizer, [[parameters[i] for i in bucket.parameters] for bucket in layout.buckets])
        engine.watch_finite()  # type: ignore[union-attr]

        def update(number: int, _flag: torch.Tensor) -> None:
            parts.step(number)

    def step() -> float:
        engine.zero_grad()
        with engine.micro_batch(True):
            loss = engine.module(x)
            start = time.perf_counter()
            loss.backward()
        if update:
            engine.finish(update)  # type: ignore[call-arg]
        else:
            engine.finish()
            optimizer.step()
        return time.perf_counter() - start

    return step, ends


# ---- figures --------------------------------------------------------------------------------------------------------


def figures(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Per variant: medians, and what share of the communication was hidden."""
    middle = {name: statistics.median(values) for name, values in found["samples"].items()}
    compute, communication = middle["compute"], middle["communication"]
    result = {}
    for name, predicted in found["predicted_ms"].items():
        result[name] = {
            "step_ms": middle[name],
            "exposed_ms": middle[name] - compute,
            "hidden_share": (compute + communication - middle[name]) / min(compute, communication),
            "predicted_ms": predicted,
        }
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2], choices=(2, 4), help="default 2")
    parser.add_argument("--links", nargs="+", default=list(LINKS), choices=LINKS, help="default all")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 1, 2], help="communication over compute")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="default all")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each variant (default %(default)s)")
    parser.add_argument("--out", metavar="FOLDER", help="write overlap.md there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    add_arguments(parser)
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker))
        return 0
    if os.geteuid() != 0:
        print("error: network namespaces need root; run with sudo", file=sys.stderr)
        return 2
    if not (shutil.which("ip") and shutil.which("tc")):
        print("error: ip and tc are missing; install iproute2", file=sys.stderr)
        return 2
    if args.quick:
        args.links, args.ratios, args.variants, args.repeats = ["1gbit"], [1], ["one_bucket", "ddp_default", "auto"], 3
    facts = environment()
    metrics: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    parts = []
    for number in args.hosts:
        for link in args.links:
            for ratio in args.ratios:
                settings = {"ratio": ratio, "variants": args.variants, "repeats": args.repeats, "warm_up": 4}
                try:
                    found = run_hosts(number, {"200mbit": 200, "1gbit": 1000}[link], settings)
                except (subprocess.CalledProcessError, RuntimeError, subprocess.TimeoutExpired) as error:
                    why = getattr(error, "stderr", None) or error
                    print(f"error: {number} hosts, {link}: {str(why).strip()}", file=sys.stderr)
                    return 3
                prefix = f"{link}/{ratio:g}" if number == 2 else f"{link}/{ratio:g}/{number}hosts"
                by_variant = figures(found)
                rows = []
                for name, values in by_variant.items():
                    metrics |= {f"{prefix}/{name}/{key}": value for key, value in values.items()}
                    raw, hidden = found["samples"][name], f"{100 * values['hidden_share']:.0f} %"
                    rows.append((
                        name, found["buckets"][name], f"{values['step_ms']:,.0f}", f"{min(raw):,.0f}-{max(raw):,.0f}",
                        f"{values['predicted_ms']:,.0f}", f"{values['exposed_ms']:,.0f}", hidden,
                    ))  # fmt: skip
                samples |= {f"{prefix}/{name}/step_ms": raw for name, raw in found["samples"].items()}
                middle = {name: statistics.median(found["samples"][name]) for name in ("compute", "communication")}
                title = (
                    f"{number} hosts, {link}, ratio {ratio:g}: backward alone {middle['compute']:,.0f} ms, all-reduce alone "
                    f"{middle['communication']:,.0f} ms, link {1e3 * found['link']['latency_s']:.1f} ms + "
                    f"{found['link']['bytes_per_s'] / 1e6:.1f} MB/s"
                )
                headers = ("variant", "buckets", "step ms", "range", "predicted", "exposed ms", "hidden")
                parts.append(f"### {title}\n\n{markdown_table(headers, rows)}\n")
                print("\n" + parts[-1], flush=True)
    if args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "overlap.md", "\n".join(parts))
    if args.json:
        config = {
            **{k: v for k, v in vars(args).items() if k not in ("json", "worker")},
            "layers": LAYERS,
            "numel": NUMEL,
        }
        write_result(args.json, metrics, config, facts, samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
