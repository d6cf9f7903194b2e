#!/usr/bin/env python3
"""What the engines cost the host in a step, and what they keep in memory, without any communication.

    python -m scripts.benchmarks.hooks --json results/overlap/hooks.json

Host time: a model with as many tensors as BERT-large in its original form (392), each 1/1024 of its size, backward plus
reduction with torch's fake process group (collectives are no-ops), less the same backward without an engine. Engines and the
plain backward run in turn. `ours` and `ddp` clip each bucket's groups before the reduction, over the same buckets; `ddp_plain`
is DistributedDataParallel with a hook that does nothing, without clipping.

Memory: BERT-base's own sizes, resident memory after two steps; every engine in a process of its own. `plain` has no engine;
`copy` keeps a second, flat copy of the gradients, as a reducer without views would.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import scripts.guard  # noqa: F401

from bert_fast.command import guarded, whole
from bert_fast.report.bench import add_arguments, environment, markdown_table, write_result

WORLD, BUCKET_MIB = 1024, 25.0
ENGINES = ("plain", "ours", "ddp", "ours_none", "ddp_none", "ddp_plain")


def large_shapes() -> list[tuple[str, int]]:
    """Names and sizes of BERT-large's 392 tensors (query, key and value apart, as in the reference), in forward order."""
    width, inner, vocabulary = 1024, 4096, 30522
    tensors = [
        ("embeddings.word", vocabulary * width),
        ("embeddings.position", 512 * width),
        ("embeddings.type", 2 * width),
    ]
    tensors += [("embeddings.norm", width), ("embeddings.norm_bias", width)]
    for layer in range(24):
        sizes = [width * width, width] * 4 + [width] * 2 + [inner * width, inner, inner * width, width] + [width] * 2
        tensors += [(f"layers.{layer}.{number}", size) for number, size in enumerate(sizes)]
    tensors += [("heads.bias", vocabulary), ("heads.seq", 2 * width), ("heads.seq_bias", 2)]
    return tensors


def make_model(shapes: list[tuple[str, int]]):  # type: ignore[no-untyped-def]
    """A chain over all tensors, ready from the last to the first; `forward` costs next to nothing."""
    import torch
    from torch import nn

    class Touch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(weight)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            return gradient, torch.ones_like(ctx.saved_tensors[0])

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.names = [name for name, _ in shapes]
            self.weights = nn.ParameterList(nn.Parameter(torch.zeros(size)) for _, size in shapes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for weight in self.weights:
                x = Touch.apply(x, weight)
            return x.sum()

    return Chain()


def make_step(engine_name: str, shapes: list[tuple[str, int]], scale: int) -> Callable[[], float]:
    """Seconds of backward and reduction of one step."""
    import torch
    from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
    from torch.nn.parallel import DistributedDataParallel

    from bert_fast.communication.buckets import plan_layout
    from bert_fast.communication.ddp import DdpEngine
    from bert_fast.communication.reducer import BucketReducer
    from bert_fast.communication.wire_format import WireFormat

    model = make_model(shapes)
    x = torch.zeros(1, requires_grad=True)
    order = list(range(len(shapes)))[::-1]
    clip = "none" if "none" in engine_name or "plain" in engine_name else "bucket_before_reduce"
    layout = plan_layout(
        [name for name, _ in shapes],
        [size for _, size in shapes],
        order,
        clip_groups="layer",
        bucket_mb=BUCKET_MIB / scale,
        whole_groups=True,
    )
    if engine_name in ("plain", "copy", "ddp_plain"):
        caps = [sum(shapes[i][1] for i in bucket.parameters) * 4 / 2**20 for bucket in layout.buckets]
        module = model
        if engine_name == "ddp_plain":
            module = DistributedDataParallel(
                model,
                gradient_as_bucket_view=True,
                bucket_cap_mb_list=caps,  # type: ignore[arg-type]  # says int, but takes fractions of a MiB
            )
            module.register_comm_hook(None, noop_hook)  # torch's own cannot read the future of a fake collective

        def plain() -> float:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            loss = module(x)
            start = time.perf_counter()
            loss.backward()
            if engine_name == "copy":
                flat = torch.cat([p.grad for p in model.parameters() if p.grad is not None])
                del flat
            return time.perf_counter() - start

        return plain
    kind = BucketReducer if engine_name.startswith("ours") else DdpEngine
    engine = kind(model, layout, clip=clip, max_norm=1.0, wire=WireFormat(torch.float32))

    def step() -> float:
        engine.zero_grad()
        with engine.micro_batch(True):
            loss = engine.module(x)
            start = time.perf_counter()
            loss.backward()
        engine.finish()
        return time.perf_counter() - start

    return step


def join_fake_group() -> None:
    """This process as rank 0 of 1,024 whose collectives do nothing."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)


def host_times(repeats: int) -> dict[str, list[float]]:
    """Microseconds of backward and reduction, engines in turn."""
    join_fake_group()
    shapes = [(name, max(1, size // 1024)) for name, size in large_shapes()]
    steps = {name: make_step(name, shapes, 1024) for name in ENGINES}
    samples: dict[str, list[float]] = {name: [] for name in ENGINES}
    for number in range(repeats + 5):
        for name, step in steps.items():
            seconds = step()
            if number >= 5:
                samples[name].append(1e6 * seconds)
    return samples


def memory_of(engine: str) -> None:
    """Print this process's peak resident MiB above what it had before the model was made."""
    from bert_fast.cluster.backward_trace import model_trace

    join_fake_group()
    _, sizes, names = model_trace("base", 1.0, 4, whole_groups=False)
    shapes = [(name, int(size) // 4) for name, size in zip(names[::-1], sizes[::-1], strict=True)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = make_step(engine, shapes, 1)
    for _ in range(2):
        step()
    print(
        (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        sum(size for _, size in shapes) * 4 / 2**20,
    )


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repeats", type=whole(1, 10**6), default=200, help="steps of each engine (default %(default)s)"
    )
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    add_arguments(parser)
    args = parser.parse_args()
    if args.memory_of:
        memory_of(args.memory_of)
        return 0
    machine = environment()
    samples = host_times(20 if args.quick else args.repeats)
    base = statistics.median(samples["plain"])
    metrics: dict[str, float] = {"tensors": len(large_shapes()), "host_us_per_step/backward_alone": base}
    for name in ENGINES[1:]:
        paired = [a - b for a, b in zip(samples[name], samples["plain"], strict=True)]
        metrics[f"host_us_per_step/{name}"] = statistics.median(paired)
    rows = [(name, f"{metrics[f'host_us_per_step/{name}']:,.0f}") for name in ENGINES[1:]]
    print(markdown_table(("engine", "host us per step"), rows))
    print(f"392 tensors in 25 MiB buckets, backward alone {base:,.0f} us")
    memory = []
    for name in ("plain", "ours", "ddp", "copy"):
        command = [sys.executable, "-m", "scripts.benchmarks.hooks", "--memory-of", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        mib, gradients = map(float, done.stdout.split()[-2:])
        metrics[f"memory_mib/{name}"], metrics["memory_mib/gradients"] = mib, gradients
        memory.append((name, f"{mib:,.0f}", f"{mib / gradients:.2f}"))
    print("\n" + markdown_table(("engine", "peak MiB", "in gradients"), memory))
    print(f"weights and gradients of {metrics['memory_mib/gradients']:,.0f} MiB each")
    if args.json:
        config = {"repeats": args.repeats, "world_size": WORLD, "bucket_mib": BUCKET_MIB}
        write_result(
            args.json, metrics, config, machine, {key: [round(x, 1) for x in values] for key, values in samples.items()}
        )
        print(json.dumps({"written": args.json}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
