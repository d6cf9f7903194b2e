"""AdamW whose moments are kept in few bits, or in the host's memory, or both: they are whole for a piece of a tensor at a time.

The first moment is rounded to the nearest bf16 or int8 number, or at random to one of the two nearest of 4 bits. The second one
is always rounded at random, in proportion: it changes by less than a step of such formats, and would otherwise stand still. In
8 and 4 bits its root is kept, which has half as many orders of magnitude, with a scale for each block, and no positive number
becomes 0, by which an update would be divided. There is no error feedback, which would need the memory that is saved.

Sources: Dettmers et al., arXiv 2110.02861 (blocks); Li et al., arXiv 2309.01507 (4 bits); Zamirai et al., arXiv 2010.06192
(random rounding of bf16).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim.adamw import adamw

from bert_fast.compression.compiled import on
from bert_fast.errors import UserError
from bert_fast.optim.build import RunOptimizer

_MOMENTS = ("exp_avg", "exp_avg_sq")
_BLOCK = 128  # numbers that share a scale
# Numbers whose moments are whole at a time, a multiple of the block: on CPUs what stays in a core's cache over all passes
_PIECE, _CPU_PIECE = 2**22, 2**18


class MomentFormat(ABC):
    """How a moment is kept. `num_bytes` of a tensor of that many numbers, in one flat tensor of `dtype`."""

    dtype: ClassVar[torch.dtype] = torch.uint8

    @abstractmethod
    def size(self, numel: int) -> int:
        """Elements that `numel` numbers take."""

    @abstractmethod
    def read(self, kept: torch.Tensor, numel: int) -> torch.Tensor:
        """fp32 [numel]."""

    @abstractmethod
    def write(self, values: torch.Tensor, kept: torch.Tensor, noise: Callable[[], torch.Tensor]) -> None:
        """Keep fp32 `values`, which may be overwritten. `noise`: numbers in [0, 1), as many as there are values."""


class Whole(MomentFormat):
    """fp32."""

    dtype = torch.float32

    def size(self, numel: int) -> int:
        return numel

    def read(self, kept: torch.Tensor, numel: int) -> torch.Tensor:
        return kept

    def write(self, values: torch.Tensor, kept: torch.Tensor, noise: Callable[[], torch.Tensor]) -> None:
        kept.copy_(values)


class Bf16(Whole):
    """bf16, rounded to the nearest or at random."""

    dtype = torch.bfloat16

    def __init__(self, at_random: bool) -> None:
        self._at_random = at_random

    def read(self, kept: torch.Tensor, numel: int) -> torch.Tensor:
        return kept.float()

    def write(self, values: torch.Tensor, kept: torch.Tensor, noise: Callable[[], torch.Tensor]) -> None:
        if self._at_random:
            bits = values.view(torch.int32)  # whose lower half bf16 does not have
            bits.add_((noise() * 65536).to(torch.int32)).bitwise_and_(-65536)
        kept.copy_(values)


class _Blocks(MomentFormat):
    """Whole numbers up to `_largest` times a scale per block: each block is its scale, as bytes of fp32, and its codes."""

    def __init__(self, bits: int, is_signed: bool, at_random: bool) -> None:
        self._is_half, self._is_signed, self._at_random = bits == 4, is_signed, at_random
        self._largest = 2.0 ** (bits - 1) - 1 if is_signed else 2.0**bits - 1
        self._stride = 4 + _BLOCK * bits // 8

    def size(self, numel: int) -> int:
        return -(-numel // _BLOCK) * self._stride

    def read(self, kept: torch.Tensor, numel: int) -> torch.Tensor:
        scales, codes = self._parts(kept)
        numbers = on(kept.device, _numbers)(scales, codes, self._largest, self._is_half, self._is_signed)
        return numbers.view(-1)[:numel]

    def write(self, values: torch.Tensor, kept: torch.Tensor, noise: Callable[[], torch.Tensor]) -> None:
        drawn = noise() if self._at_random else None
        missing = -values.numel() % _BLOCK
        if missing:
            values = nn.functional.pad(values, (0, missing))
            drawn = None if drawn is None else nn.functional.pad(drawn, (0, missing))
        rows = values.view(-1, _BLOCK)
        drawn = None if drawn is None else drawn.view(-1, _BLOCK)
        scales, codes = self._parts(kept)
        new = on(kept.device, _scales_and_codes)(rows, drawn, self._largest, self._is_half, self._is_signed)
        scales.copy_(new[0])
        codes.copy_(new[1])

    def _parts(self, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales [blocks, 1], in fp32, and codes [blocks, bytes]."""
        return kept.view(torch.float32).view(-1, self._stride // 4)[:, :1], kept.view(-1, self._stride)[:, 4:]


def _numbers(scales: torch.Tensor, codes: torch.Tensor, largest: float, is_half: bool, is_signed: bool) -> torch.Tensor:
    """fp32 [blocks, _BLOCK]. With 4 bits the first half of a block is in the lower bits of its bytes."""
    numbers = torch.cat([codes & 15, codes >> 4], dim=1).float() if is_half else codes.float()
    return (numbers.sub_(largest) if is_signed else numbers.mul_(numbers)).mul_(scales)


def _scales_and_codes(
    rows: torch.Tensor, drawn: torch.Tensor | None, largest: float, is_half: bool, is_signed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept of `rows` [blocks, _BLOCK]. `drawn`: what is added before rounding down; None: rounded to the nearest."""
    if is_signed:
        scales = rows.abs().amax(dim=1, keepdim=True) / largest
    else:
        rows = rows.sqrt()
        scales = rows.amax(dim=1, keepdim=True) / largest
    codes = rows / torch.where(scales > 0, scales, 1.0)
    rounded = codes.round() if drawn is None else (codes + drawn).floor_()
    if is_signed:
        rounded.clamp_(-largest, largest).add_(largest)
    else:
        rounded = torch.maximum(rounded.clamp_(max=largest), codes.sign())  # no positive number becomes 0
    if is_half:
        half = rounded.shape[1] // 2
        rounded = rounded[:, :half].add(rounded[:, half:], alpha=16)
    packed = rounded.to(torch.int16).to(torch.uint8)  # in two, as torch is slow from fp32 to 8 bits on CPUs
    return scales if is_signed else scales * scales, packed


# First and second moment
FORMATS: dict[str, tuple[MomentFormat, MomentFormat]] = {
    "fp32": (Whole(), Whole()),
    "bf16": (Bf16(at_random=False), Bf16(at_random=True)),
    "int8": (_Blocks(8, is_signed=True, at_random=False), _Blocks(8, is_signed=False, at_random=True)),
    "int4": (_Blocks(4, is_signed=True, at_random=True), _Blocks(4, is_signed=False, at_random=True)),
}


def _noise(numel: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """fp32 in [0, 1), multiples of 2^-16: four for each number that is drawn, as drawing takes longer on CPUs than rounding."""
    drawn = torch.empty(-(-numel // 4), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    return drawn.view(torch.int16)[:numel].float().add_(2**15).mul_(2**-16)


class CompactAdamW(RunOptimizer):
    """AdamW by torch's fused kernel, on moments that are kept in another format or place.

    Args:
        state_dtype: a key of `FORMATS`.
        on_host: keep moments in the host's memory, pinned where there is CUDA.
    """

    has_opaque_state = True  # blocks begin where a rank's piece of a tensor does

    def __init__(self, params: Any, *, state_dtype: str, on_host: bool = False, **settings: Any) -> None:
        super().__init__(params, settings)
        self._formats, self._on_host = FORMATS[state_dtype], on_host
        everything = [parameter for group in self.param_groups for parameter in group["params"]]
        self._numbers = {parameter: number for number, parameter in enumerate(everything)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        entry = self.state[parameter]
        if not entry:
            entry["updates"] = 0  # as `step`, which is on the device
            entry["step"] = torch.zeros((), device=parameter.device)
            for name, form in zip(_MOMENTS, self._formats, strict=True):
                entry[name] = self._kept(form, parameter)
        generator = torch.Generator(parameter.device)  # of its own: the run's random numbers are not touched
        generator.manual_seed((entry["updates"] * 2_000_003 + self._numbers[parameter]) % 2**63)
        entry["updates"] += 1
        weights, gradients = parameter.detach().view(-1), parameter.grad.view(-1)  # type: ignore[union-attr]
        count = entry["step"].clone()
        piece = _CPU_PIECE if parameter.device.type == "cpu" else _PIECE
        for start in range(0, weights.numel(), piece):
            numel = min(piece, weights.numel() - start)
            step = count.clone()
            moments, places = [], []
            for name, form in zip(_MOMENTS, self._formats, strict=True):
                first = form.size(start)
                places.append(entry[name][first : first + form.size(numel)])
                moments.append(form.read(places[-1].to(parameter.device, non_blocking=True), numel))
            beta1, beta2 = group["betas"]
            adamw(
                [weights[start : start + numel]],
                [gradients[start : start + numel]],
                [moments[0]],
                [moments[1]],
                [],
                [step],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

            def noise(numel: int = numel) -> torch.Tensor:
                return _noise(numel, parameter.device, generator)

            for kept, form, values in zip(places, self._formats, moments, strict=True):
                if kept.device == values.device:
                    form.write(values, kept, noise)
                else:
                    beside = torch.empty_like(kept, device=values.device)
                    form.write(values, beside, noise)
                    kept.copy_(beside, non_blocking=True)
            entry["step"].copy_(step)

    def state_device(self, parameter: torch.Tensor) -> torch.device:
        return torch.device("cpu") if self._on_host else parameter.device

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """What was loaded is in memory that is not pinned, and the count of updates with it."""
        if self._on_host:
            for parameter, entry in self.state.items():
                entry["step"] = entry["step"].to(parameter.device)
                for name, form in zip(_MOMENTS, self._formats, strict=True):
                    entry[name] = self._kept(form, parameter).copy_(entry[name])

    def _kept(self, form: MomentFormat, parameter: torch.Tensor) -> torch.Tensor:
        size = form.size(parameter.numel())
        if not self._on_host:
            return torch.zeros(size, dtype=form.dtype, device=parameter.device)
        try:
            return torch.zeros(size, dtype=form.dtype, pin_memory=parameter.is_cuda)
        except RuntimeError as error:
            raise UserError(
                f"optimizer.state_on_host=true: the host has no pinned memory for it ({str(error).splitlines()[0][:100]}); "
                "raise the limit of locked memory (ulimit -l), or set optimizer.state_on_host=false"
            ) from None
