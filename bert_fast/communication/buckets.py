"""Layout of gradients: ready order, clip groups, buckets, and one flat buffer that `p.grad` are views of.

Clip groups are part of the numerics and come from the config; buckets are a matter of speed only. With clipping before
the reduction a bucket is a run of whole clip groups, so that it can leave the moment its last gradient is there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bert_fast.errors import UserError

_ALIGN = 16  # elements: every tensor starts on a 64-byte boundary in fp32


@dataclass(frozen=True)
class Span:
    """A run of parameters in ready order and their places [start, end) in the flat buffer."""

    name: str
    parameters: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """Where each gradient lies. `offsets[i]` is the place of parameter i (in `named_parameters` order)."""

    names: tuple[str, ...]
    order: tuple[int, ...]
    offsets: tuple[int, ...]
    numel: tuple[int, ...]
    size: int
    groups: tuple[Span, ...]
    buckets: tuple[Span, ...]
    bucket_of: tuple[int, ...]
    in_ready_order: bool  # whether clip groups follow each other in ready order, none inside another

    def groups_in(self, bucket: Span) -> list[int]:
        """Indices of the clip groups inside a bucket."""
        return [i for i, g in enumerate(self.groups) if bucket.start <= g.start and g.end <= bucket.end]


def clip_group_of(name: str, scheme: str | dict[str, str]) -> str:
    """The clip group of a parameter. Raises UserError if a pattern scheme leaves it out."""
    if scheme == "model":
        return "model"
    if scheme == "tensor":
        return name
    if scheme == "layer":
        match = re.match(r"layers\.\d+", name)
        return match.group() if match else name.split(".")[0]
    assert isinstance(scheme, dict)
    for group, pattern in scheme.items():
        if re.search(pattern, name):
            return group
    raise UserError(f"communication.clip_groups: no pattern matches parameter {name}; add one, or a last '.*'")


def plan_layout(
    names: Sequence[str], numel: Sequence[int], ready_order: Sequence[int], *,
    clip_groups: str | dict[str, str], bucket_mb: float | list[float], whole_groups: bool, element_bytes: int = 4,
    shards: int = 1,
) -> Layout:  # fmt: skip
    """Lay out gradients.

    Args:
        names, numel: of all parameters, in `named_parameters` order.
        ready_order: parameter indices in the order in which their gradients become ready.
        bucket_mb: MiB after which a bucket closes, one for all or one each (the last repeats).
        whole_groups: whether a bucket must hold whole clip groups.
        shards: equal parts that a bucket can be cut into; the last clip group of a bucket is padded for it.

    Raises:
        UserError: a clip-group pattern matches nothing, or a parameter is matched by none.
    """
    group_names = [clip_group_of(name, clip_groups) for name in names]
    if isinstance(clip_groups, dict):
        unused = [group for group in clip_groups if group not in group_names]
        if unused:
            raise UserError(f"communication.clip_groups: pattern of group {unused[0]} matches no parameter")
    rank_of = {parameter: rank for rank, parameter in enumerate(ready_order)}
    last_ready: dict[str, int] = {}
    for index, group in enumerate(group_names):
        last_ready[group] = max(last_ready.get(group, -1), rank_of[index])
    order = sorted(range(len(names)), key=lambda i: (last_ready[group_names[i]], rank_of[i]))

    by_group: dict[str, list[int]] = {}
    for index in order:
        by_group.setdefault(group_names[index], []).append(index)
    units = list(by_group.values()) if whole_groups else [[index] for index in order]
    caps = bucket_mb if isinstance(bucket_mb, list) else [bucket_mb]
    in_buckets: list[list[int]] = [[]]
    for unit in units:
        cap = caps[min(len(in_buckets), len(caps)) - 1] * 2**20
        if in_buckets[-1] and sum(numel[i] for i in in_buckets[-1]) * element_bytes >= cap:
            in_buckets.append([])
        in_buckets[-1] += unit

    offsets, ends = [0] * len(names), [0] * len(names)
    place = 0
    for members in in_buckets:
        for index in members:
            offsets[index] = place
            place = ends[index] = _up(place + numel[index], _ALIGN)
        place = ends[members[-1]] = _up(place, shards * _ALIGN)

    def span(name: str, members: list[int]) -> Span:
        return Span(name, tuple(members), offsets[members[0]], ends[members[-1]])

    groups = [span(name, members) for name, members in by_group.items()]
    buckets = [span(f"bucket {number}", members) for number, members in enumerate(in_buckets)]
    bucket_of = [0] * len(names)
    for number, bucket in enumerate(buckets):
        for index in bucket.parameters:
            bucket_of[index] = number
    return Layout(
        tuple(names), tuple(order), tuple(offsets), tuple(numel), place, tuple(groups), tuple(buckets), tuple(bucket_of),
        order == list(ready_order),
    )  # fmt: skip


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def measure_ready_order(parameters: Sequence[nn.Parameter], run_backward: Callable[[], None]) -> list[int]:
    """Indices of `parameters` in the order in which one backward pass finished their gradients; unused ones last."""
    order: list[int] = []

    def hook_for(index: int) -> Callable[[torch.Tensor], None]:
        return lambda _parameter: order.append(index)

    handles = [p.register_post_accumulate_grad_hook(hook_for(i)) for i, p in enumerate(parameters)]
    try:
        run_backward()
    finally:
        for handle in handles:
            handle.remove()
    seen = set(order)
    return list(dict.fromkeys(order)) + [i for i in range(len(parameters)) if i not in seen]


class FlatGradients:
    """One contiguous buffer for all gradients; every `p.grad` is a view of it."""

    def __init__(self, parameters: Sequence[nn.Parameter], layout: Layout) -> None:
        first = parameters[0]
        self.buffer = torch.zeros(layout.size, dtype=first.dtype, device=first.device)
        self._views = [
            self.buffer[offset : offset + n].view_as(p)
            for p, offset, n in zip(parameters, layout.offsets, layout.numel, strict=True)
        ]
        self._parameters = list(parameters)
        self.attach()

    def attach(self) -> None:
        """Make `p.grad` the views (again)."""
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def of(self, span: Span) -> torch.Tensor:
        """The gradients of a group or bucket, one flat tensor."""
        return self.buffer[span.start : span.end]

    def zero(self) -> None:
        """Clear all gradients in one operation."""
        self.buffer.zero_()
