"""Engine `fsdp`: weights, gradients and optimizer state in parts, through torch's fully_shard (ZeRO-2 and ZeRO-3).

Each half of a layer is a unit, and the embeddings with the heads are one: a unit's weights are gathered before it runs and its
gradients reduced to parts after its backward pass, by torch's hooks. They reduce a gradient before anything else can see it, so
nothing can be clipped before; the averaged gradient can. Between nodes parts may be replicated (hybrid sharding).

Sources: Zhao et al., arXiv 2304.11277; Rajbhandari et al., arXiv 1910.02054.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from bert_fast.communication.buckets import GradientLayout
from bert_fast.communication.clip import ClipStatistics, coefficient
from bert_fast.communication.engine import Engine, UpdatedSlice
from bert_fast.communication.wire_format import WireFormat
from bert_fast.config.choices import CLIP_MODES
from bert_fast.parts import declare_parts, parts_of


class FsdpEngine(Engine):
    """Engine `fsdp`. Needs an initialised process group, the default one.

    Args:
        model: with `sharding_units()`: lists of modules whose weights are gathered together, before the first of them runs.
        clip: `none` or `global_after_reduce`.
        wire: `fp32` or `bf16`, in which gradients are reduced.
        ranks_per_node: with `within_node`, the ranks that share the parts; nodes then hold copies and average their gradients.
        on_host: keep the parts in pinned memory of the host; needs a process group for its tensors too (cpu:gloo,cuda:nccl).
        reshard_after_forward: let go of a unit's weights after its forward pass, and gather them again for backward (ZeRO-3).
    """

    def __init__(
        self,
        model: nn.Module,
        layout: GradientLayout,
        *,
        clip: str,
        max_norm: float,
        wire: WireFormat,
        ranks_per_node: int,
        within_node: bool,
        reshard_after_forward: bool,
        on_host: bool = False,
    ) -> None:
        self.layout, self.wire, self._mode, self._max_norm = layout, wire, CLIP_MODES[clip], max_norm
        before = list(model.named_parameters())
        device = before[0][1].device
        world = dist.get_world_size()
        mesh = _mesh(device, world, ranks_per_node if within_node else world)
        self._shards = mesh.get_group(mesh.ndim - 1)
        self._is_first_copy = mesh.ndim == 1 or mesh.get_local_rank(0) == 0
        self._reshards = reshard_after_forward
        shard_units(model, mesh, wire.dtype, reshard_after_forward, on_host)
        self.module = model
        self._parameters: list[DTensor] = []
        self._updated: list[UpdatedSlice] = []
        in_parts = dict(model.named_parameters())
        for index, (name, old) in enumerate(before):
            new = in_parts[name]
            assert isinstance(new, DTensor)
            declare_parts(new, parts_of(old))
            self._parameters.append(new)
            local = new.to_local()
            if local.numel():
                begin = _first_element(new, dist.get_rank(self._shards), dist.get_world_size(self._shards))
                self._updated.append(
                    UpdatedSlice(index, layout.bucket_of[index], begin, nn.Parameter(local.detach().view(-1)))
                )
        self.clip_statistics = ClipStatistics(["model"], device)
        self._scale: torch.Tensor | None = None
        self._weight_bytes = 0

    @property
    def is_sharded(self) -> bool:
        return True

    @property
    def holds_all_weights(self) -> bool:
        return False

    @property
    def is_first_copy(self) -> bool:
        return self._is_first_copy

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        for each in self._updated:
            each.parameter.grad = None

    @contextmanager
    def micro_batch(self, last: bool, scale: torch.Tensor | None = None) -> Iterator[None]:
        self._scale = scale
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        yield
        whole = sum(parameter.numel() * parameter.element_size() for parameter in self._parameters)
        self._weight_bytes += whole // dist.get_world_size(self._shards) * (2 if self._reshards else 1)
        if last:
            self.wire.bytes_sent += sum(p.numel() for p in self._parameters) * self.wire.dtype.itemsize

    def finish(self, update: Callable[[int, torch.Tensor], None] | None = None) -> torch.Tensor:
        assert update is None, "enable_nonfinite_flag() has refused this"
        start = time.perf_counter()
        unscale = None if self._scale is None else 1.0 / self._scale
        gradients: list[torch.Tensor] = []
        squares = torch.zeros((), dtype=torch.float32, device=self._parameters[0].device)
        for each in self._updated:
            gradient = self._parameters[each.index].grad
            local = torch.zeros_like(each.parameter)
            if gradient is not None:
                assert isinstance(gradient, DTensor)
                local = gradient.to_local().view(-1)
            if unscale is not None:
                local.mul_(unscale.to(local.device))
            each.parameter.grad = local
            gradients.append(local)
            squares += torch.linalg.vector_norm(local, dtype=torch.float32) ** 2
        dist.all_reduce(squares, group=self._shards)
        norm = squares.sqrt()
        if self._mode.after_reduce:
            value = coefficient(norm, self._max_norm)
            self.clip_statistics.add(0, value)
            torch._foreach_mul_(gradients, value)
        self.clip_statistics.end_step()
        self.exposed_s = time.perf_counter() - start  # torch's hooks wait inside forward and backward
        return norm

    def reduced(self, number: int) -> torch.Tensor:
        gradients = [each.parameter.grad for each in self._updated if each.bucket == number]
        own = [gradient for gradient in gradients if isinstance(gradient, torch.Tensor)]
        return torch.cat(own) if own else torch.zeros(0, device=self._parameters[0].device)

    def updated_slices(self) -> list[UpdatedSlice]:
        return self._updated

    def share_sums(self, sums: torch.Tensor) -> None:
        dist.all_reduce(sums, group=self._shards)

    def forget_gathered_weights(self) -> None:
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def whole_weights(self) -> dict[str, torch.Tensor]:
        names = [name for name, _ in self.module.named_parameters()]
        self.forget_gathered_weights()
        # One after the other, and on the host: the device may have no room for all
        return {name: weight.full_tensor().cpu() for name, weight in zip(names, self._parameters, strict=True)}

    def counters(self) -> dict[str, int]:
        return {**super().counters(), "weight_bytes": self._weight_bytes}

    def reset_counters(self) -> None:
        super().reset_counters()
        self._weight_bytes = 0


def _mesh(device: torch.device, world: int, shards: int) -> DeviceMesh:
    """Ranks in one dimension, or nodes by ranks of a node."""
    if shards == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world // shards, shards), mesh_dim_names=("replicate", "shard"))


def shard_units(
    model: nn.Module, mesh: DeviceMesh, reduce_dtype: torch.dtype, reshard_after_forward: bool, on_host: bool
) -> None:
    """Shard each of the model's units, and what is left as one."""
    offload = CPUOffloadPolicy() if on_host else OffloadPolicy()
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    units: Sequence[list[nn.Module]] = model.sharding_units()  # type: ignore[operator]
    for unit in units:
        fully_shard(
            unit, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard_after_forward
        )
    # Embeddings and heads share a table, which is there from the first stage to the last
    fully_shard(model, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)


def _first_element(parameter: DTensor, rank: int, world: int) -> int:
    """Where a rank's part begins in the flattened parameter: rows in chunks of equal size, the last ones smaller."""
    rows = parameter.shape[0]
    chunk = -(-rows // world)
    return min(rank * chunk, rows) * (parameter.numel() // rows)
