"""Layout of gradients: their order and clip groups, buckets, and one flat buffer that `p.grad` are views of.

An `Ordering` is part of the numerics: clip groups come from the config. Where buckets end is a matter of speed only. With
clipping per group before the reduction a bucket is a run of whole clip groups, so that it can be sent the moment its last
gradient is ready.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from bert_fast.errors import UserError
from bert_fast.integers import round_up

_ALIGN = 16  # elements: every tensor starts on a 64-byte boundary in fp32


@dataclass(frozen=True)
class Ordering:
    """All parameters in the order of the flat buffer, and their clip groups.

    names, numel:   of all parameters, in `named_parameters` order
    order:          indices of parameters in the order of the buffer: ready order, each clip group in one run
    groups:         (name, indices of parameters) of every clip group, in the order of the buffer
    whole_groups:   whether a bucket must hold whole clip groups
    in_ready_order: whether clip groups follow each other in ready order, none inside another
    """

    names: tuple[str, ...]
    numel: tuple[int, ...]
    order: tuple[int, ...]
    groups: tuple[tuple[str, tuple[int, ...]], ...]
    whole_groups: bool
    in_ready_order: bool

    @property
    def units(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the parameters that must be in one bucket: a clip group, or one parameter, in the buffer's order."""
        return tuple(members for _, members in self.groups) if self.whole_groups else tuple((i,) for i in self.order)

    @property
    def unit_names(self) -> tuple[str, ...]:
        """The name of every unit."""
        return tuple(name for name, _ in self.groups) if self.whole_groups else tuple(self.names[i] for i in self.order)


@dataclass(frozen=True)
class BufferRange:
    """A run of parameters and their places [start, end) in the flat buffer."""

    name: str
    parameters: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class GradientLayout:
    """Where each gradient lies in the flat buffer: an ordering cut into buckets.

    offsets:   place of each parameter, in `named_parameters` order
    size:      elements of the buffer
    groups:    the clip groups
    buckets:   the buckets
    bucket_of: number of each parameter's bucket, in `named_parameters` order
    """

    ordering: Ordering
    offsets: tuple[int, ...]
    size: int
    groups: tuple[BufferRange, ...]
    buckets: tuple[BufferRange, ...]
    bucket_of: tuple[int, ...]

    @property
    def numel(self) -> tuple[int, ...]:
        """Elements of each parameter, in `named_parameters` order."""
        return self.ordering.numel

    def groups_in(self, bucket: BufferRange) -> list[int]:
        """Indices of the clip groups inside a bucket."""
        return [i for i, g in enumerate(self.groups) if bucket.start <= g.start and g.end <= bucket.end]

    def whole(self) -> BufferRange:
        """The whole buffer, as the one clip group of a rank's or the averaged gradient."""
        return BufferRange("model", self.ordering.order, 0, self.size)


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


def order_gradients(
    names: Sequence[str],
    numel: Sequence[int],
    ready_order: Sequence[int],
    *,
    clip_groups: str | dict[str, str],
    whole_groups: bool,
) -> Ordering:
    """Put gradients into the order in which buckets are filled.

    Args:
        names, numel: of all parameters, in `named_parameters` order.
        ready_order: parameter indices in the order in which their gradients become ready.
        clip_groups: the config's `communication.clip_groups`.
        whole_groups: whether a bucket must hold whole clip groups.

    Raises:
        UserError: a clip-group pattern matches nothing, or a parameter is matched by no pattern.
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
    members: dict[str, list[int]] = {}
    for index in order:
        members.setdefault(group_names[index], []).append(index)
    groups = tuple((name, tuple(indices)) for name, indices in members.items())
    return Ordering(tuple(names), tuple(numel), tuple(order), groups, whole_groups, order == list(ready_order))


def bucket_ends(ordering: Ordering, bucket_mb: float | Sequence[float], element_bytes: int = 4) -> list[int]:
    """Where buckets of given sizes end: for each bucket, the number of units in it and the buckets before it.

    Args:
        bucket_mb: MiB of gradients after which a bucket closes, one size for all or one per bucket (the last repeats).
        element_bytes: of a gradient.
    """
    sizes_mb = [bucket_mb] if isinstance(bucket_mb, (int, float)) else list(bucket_mb)
    ends: list[int] = []
    filled = 0
    for number, unit in enumerate(ordering.units):
        if filled and filled * element_bytes >= sizes_mb[min(len(ends), len(sizes_mb) - 1)] * 2**20:
            ends.append(number)
            filled = 0
        filled += sum(ordering.numel[i] for i in unit)
    return [*ends, len(ordering.units)]


def lay_out(ordering: Ordering, ends: Sequence[int], shards: int = 1) -> GradientLayout:
    """Give every gradient its place.

    Args:
        ends: for each bucket, the number of units in it and the buckets before it (`bucket_ends`).
        shards: equal parts that a bucket can be cut into; a bucket's end is padded for it.
    """
    units = ordering.units
    assert ends[-1] == len(units), "every gradient is in a bucket"
    members = [[index for unit in units[begin:end] for index in unit] for begin, end in pairwise([0, *ends])]
    offsets, range_ends = [0] * len(ordering.names), [0] * len(ordering.names)
    place = 0
    for indices in members:
        for index in indices:
            offsets[index] = place
            place = range_ends[index] = round_up(place + ordering.numel[index], _ALIGN)
        place = range_ends[indices[-1]] = round_up(place, shards * _ALIGN)

    def buffer_range(name: str, indices: Sequence[int]) -> BufferRange:
        return BufferRange(name, tuple(indices), offsets[indices[0]], range_ends[indices[-1]])

    groups = tuple(buffer_range(name, indices) for name, indices in ordering.groups)
    buckets = tuple(buffer_range(f"bucket {number}", indices) for number, indices in enumerate(members))
    bucket_of = [0] * len(ordering.names)
    for number, indices in enumerate(members):
        for index in indices:
            bucket_of[index] = number
    return GradientLayout(ordering, tuple(offsets), place, groups, buckets, tuple(bucket_of))


def plan_layout(
    names: Sequence[str],
    numel: Sequence[int],
    ready_order: Sequence[int],
    *,
    clip_groups: str | dict[str, str],
    bucket_mb: float | Sequence[float],
    whole_groups: bool,
    element_bytes: int = 4,
    shards: int = 1,
) -> GradientLayout:
    """`order_gradients`, `bucket_ends` and `lay_out` in one call; the arguments are theirs."""
    ordering = order_gradients(names, numel, ready_order, clip_groups=clip_groups, whole_groups=whole_groups)
    return lay_out(ordering, bucket_ends(ordering, bucket_mb, element_bytes), shards)


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

    def __init__(self, parameters: Sequence[nn.Parameter], layout: GradientLayout) -> None:
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

    def of(self, span: BufferRange) -> torch.Tensor:
        """The gradients of a group or bucket, one flat tensor."""
        return self.buffer[span.start : span.end]

    def zero(self) -> None:
        """Clear all gradients in one operation."""
        self.buffer.zero_()

    @property
    def device(self) -> torch.device:
        return self.buffer.device

    def norm(self) -> torch.Tensor:
        """Of all gradients, 0-dim."""
        return torch.linalg.vector_norm(self.buffer)

    def scale(self, value: torch.Tensor) -> None:
        """Multiply all gradients by a 0-dim factor."""
        self.buffer.mul_(value)

    def hold(self, number: int) -> None:
        """Before a bucket is read: all of them are there, always."""

    def release(self, number: int) -> None:
        """After a bucket was used for the last time in a step: it stays."""


class GrowingGradients(FlatGradients):
    """A buffer for each bucket, there from the first gradient of a step that falls into it until it is released.

    Every `p.grad` is a view of its bucket's buffer, whose memory comes and goes: between steps it is empty.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], layout: GradientLayout) -> None:
        first = parameters[0]
        self._device = first.device
        self._buffers = [torch.zeros(b.end - b.start, dtype=first.dtype, device=first.device) for b in layout.buckets]
        self._starts = [bucket.start for bucket in layout.buckets]
        self._parameters, self._views = list(parameters), []
        for index, parameter in enumerate(parameters):
            number = layout.bucket_of[index]
            begin = layout.offsets[index] - self._starts[number]
            self._views.append(self._buffers[number][begin : begin + layout.numel[index]].view_as(parameter))
            parameter.register_hook(self._holds(number))  # which is called before a gradient is added to `grad`
        self.attach()
        self.zero()

    @property
    def device(self) -> torch.device:
        return self._device

    def of(self, span: BufferRange) -> torch.Tensor:
        number = bisect.bisect_right(self._starts, span.start) - 1
        begin = span.start - self._starts[number]
        return self._buffers[number][begin : begin + span.end - span.start]

    def zero(self) -> None:
        for number in range(len(self._buffers)):
            self.release(number)

    def norm(self) -> torch.Tensor:
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(buffer) for buffer in self._buffers]))

    def scale(self, value: torch.Tensor) -> None:
        torch._foreach_mul_(self._buffers, value)

    def hold(self, number: int) -> None:
        buffer = self._buffers[number]
        storage = buffer.untyped_storage()
        if storage.nbytes() == 0:
            storage.resize_(buffer.numel() * buffer.element_size())
            buffer.zero_()

    def release(self, number: int) -> None:
        self._buffers[number].untyped_storage().resize_(0)

    def _holds(self, number: int) -> Callable[[torch.Tensor], None]:
        return lambda _: self.hold(number)
