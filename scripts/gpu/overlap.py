"""Stage `overlap`: what share of the communication each engine, bucket plan and clipping mode hides behind the real backward.

Collectives are waits on a modelled link (link.py). Hidden share = (step without communication + communication alone - step) /
min(backward, communication alone), of pairs measured in turn; the prediction is the bucket planner's timeline over the measured
ready times of gradients.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch

from bert_fast.communication.buckets import GradientLayout, bucket_ends, lay_out, measure_ready_order
from bert_fast.communication.plan import Link, timeline
from bert_fast.communication.reducer import BucketReducer
from bert_fast.communication.wire_format import WireFormat
from bert_fast.config import Config
from bert_fast.model.bert import BertForPretraining
from bert_fast.model.objective import MlmNsp
from bert_fast.optim.build import build_optimizer
from bert_fast.train.environment import Environment
from bert_fast.train.setup.bucket_sizes import measure_ready_times, plan_buckets
from bert_fast.train.setup.build import build_model, make_ordering
from bert_fast.train.setup.warmup import synthetic_input
from bert_fast.train.step import TrainStep

from .link import LinkDdp, LinkWire, ModelledLink
from .parts import config_of, environment_of, process_group
from .stage import Context
from .timing import reset_peak, wait

# All-reduce of all gradients alone, over the time of backward; the latency of a collective is this part of backward
LINKS = {"0.5x": 0.5, "1x": 1.0, "2x": 2.0}
_LATENCY = 0.01
_SEED = 0  # of the batch: the same for backward alone and for the steps


@dataclass(frozen=True)
class Variant:
    engine: str = "bucketed"
    bucket_mb: Literal["auto"] | float | tuple[float, ...] = "auto"
    clip: str = "bucket_before_reduce"


VARIANTS = {
    "auto": Variant(),
    "25mib": Variant(bucket_mb=25.0),
    "one_bucket": Variant(bucket_mb=1e6),
    "ddp": Variant("ddp", (1.0, 25.0), "none"),  # torch's default: a first bucket of 1 MiB, then 25
    "auto_clip_none": Variant(clip="none"),
    "auto_clip_global_after": Variant(clip="global_after_reduce"),
    "auto_clip_global_before": Variant(clip="global_before_reduce"),
}


def run(context: Context) -> None:
    result = context.result
    config = config_of(context, "large", 16, communication={"engine": "bucketed"})
    environment = environment_of(config)
    with process_group(context):
        order, ready_s, num_bytes = _profile_backward(config, environment)
        _free(context)
        backward_s = float(ready_s.max())
        result.metrics |= {"overlap/backward_ms": 1e3 * backward_s, "overlap/mib": num_bytes / 2**20}
        latency = _LATENCY * backward_s
        links = {
            name: Link(latency, num_bytes / max(1e-9, ratio * backward_s - latency)) for name, ratio in LINKS.items()
        }
        wire = ModelledLink(context.device)
        bed = Bed(context, config, environment, order, ready_s, backward_s, num_bytes, wire)
        for name, variant in VARIANTS.items():
            if variant.bucket_mb == "auto":
                for link_name, link in links.items():
                    if context.has_time(4, f"{name}, {link_name}"):
                        context.case(f"{name}, {link_name}", partial(bed.measure, name, variant, {link_name: link}))
            elif context.has_time(6, name):
                context.case(name, partial(bed.measure, name, variant, links))
    shares = {
        link: (result.metrics.get(f"hidden_share/{link}/auto"), result.metrics.get(f"predicted_share/{link}/auto"))
        for link in LINKS
    }
    errors = [a - b for a, b in shares.values() if a is not None and b is not None]
    if errors and not context.tiny:  # a backward of milliseconds on a CPU says nothing
        result.metrics["hidden_share_error"] = max(errors, key=abs)
    shown = [
        f"{link} {100 * a:.0f} % (predicted {100 * b:.0f})"
        for link, (a, b) in shares.items()
        if a is not None and b is not None
    ]
    result.summary = "auto hides: " + ", ".join(shown)


def _profile_backward(config: Config, environment: Environment) -> tuple[list[int], np.ndarray, int]:
    """Ready order and ready times of the gradients of a backward without an engine, and their bytes in all."""
    model = build_model(config, environment)
    parameters = list(model.parameters())

    def loss() -> torch.Tensor:
        inputs = synthetic_input(config, environment, _SEED)
        with torch.autocast(environment.device.type, environment.dtype, enabled=environment.autocast):
            sums = model(inputs.micro_batches[0])
        return sums.total

    order = measure_ready_order(parameters, lambda: loss().backward())
    return order, measure_ready_times(parameters, loss, environment), 4 * sum(p.numel() for p in parameters)


def _free(context: Context) -> None:
    gc.collect()
    reset_peak(context.device)


@dataclass
class Bed:
    """What all variants share: the config, measured ready times of gradients, the link."""

    context: Context
    config: Config
    environment: Environment
    order: list[int]
    ready_s: np.ndarray
    backward_s: float
    num_bytes: int
    wire: ModelledLink

    def measure(self, name: str, variant: Variant, links: dict[str, Link]) -> None:
        """One variant at some links; its buckets are planned for the first of them where it plans any."""
        try:
            step, layout = self._build(variant, next(iter(links.values())))
            for link_name, link in links.items():
                self._measure(name, variant, link_name, link, step, layout)
        finally:
            self.wire.link = None
            _free(self.context)

    def _build(self, variant: Variant, link: Link) -> tuple[Callable[[], None], GradientLayout]:
        update = {"clip": variant.clip, "engine": variant.engine}
        communication = self.config.communication.model_copy(update=update)
        config = self.config.model_copy(update={"communication": communication})
        model = build_model(config, self.environment)
        ordering = make_ordering(config, model, self.order)
        if variant.bucket_mb == "auto":
            record = plan_buckets(ordering, self.ready_s, communication, torch.float32, self.environment, link=link)
            ends = list(record.plan.ends)
        else:
            ends = bucket_ends(ordering, variant.bucket_mb)
        layout = lay_out(ordering, ends)
        return self._step(config, variant, model, layout), layout

    def _step(
        self, config: Config, variant: Variant, model: BertForPretraining, layout: GradientLayout
    ) -> Callable[[], None]:
        environment = self.environment
        kind = LinkDdp if variant.engine == "ddp" else BucketReducer
        wire = WireFormat(torch.float32) if kind is LinkDdp else LinkWire(torch.float32, self.wire)
        engine = kind(model, layout, clip=variant.clip, max_norm=1.0, wire=wire)
        if isinstance(engine, LinkDdp):
            engine.link = self.wire
        optimizer = build_optimizer(model.named_parameters(), config.optimizer)
        step = TrainStep(
            engine,
            optimizer,
            MlmNsp(),
            device=environment.device,
            dtype=environment.dtype,
            world_size=1,
            loss_scale=None,
        )
        inputs = synthetic_input(config, environment, _SEED)
        self.wire.link = None
        for _ in range(3):  # kernels, moments, DDP's buckets
            step(inputs, 1e-6)

        def one_step() -> None:
            step(inputs, 1e-6)

        return one_step

    def _measure(
        self, name: str, variant: Variant, link_name: str, link: Link, step: Callable[[], None], layout: GradientLayout
    ) -> None:
        times: dict[str, list[float]] = {"silent": [], "sending": [], "alone": []}
        for _ in range(2 if self.context.tiny else 5):
            for what in times:
                self.wire.link = None if what == "silent" else link
                action = step if what != "alone" else lambda: self.wire.start(self.num_bytes).wait()
                wait(self.context.device)
                start = time.perf_counter()
                action()
                wait(self.context.device)
                times[what].append(time.perf_counter() - start)
        silent, sending, alone = (statistics.median(values) for values in times.values())
        shadow = min(self.backward_s, alone)
        metrics = self.context.result.metrics
        metrics[f"hidden_share/{link_name}/{name}"] = (silent + alone - sending) / shadow
        expected = float(link(self.num_bytes))
        exposed_s = self._exposed(variant, link, layout)
        metrics[f"predicted_share/{link_name}/{name}"] = (expected - exposed_s) / min(self.backward_s, expected)
        metrics[f"overlap_step_ms/{link_name}/{name}"] = 1e3 * sending

    def _exposed(self, variant: Variant, link: Link, layout: GradientLayout) -> float:
        """Seconds of communication after backward, by the planner's timeline over a layout's buckets."""
        ready = np.array([max(self.ready_s[i] for i in bucket.parameters) for bucket in layout.buckets])
        if variant.clip == "global_before_reduce":  # nothing leaves before the whole norm is known
            ready[:] = self.backward_s
        sizes = np.array([4.0 * sum(layout.numel[i] for i in bucket.parameters) for bucket in layout.buckets])
        return timeline(ready, sizes, list(range(1, len(sizes) + 1)), link).exposed_s
