"""Error feedback: what a lossy message left out is kept, and added to what the next message is made of.

Of gradients g, messages s and the residual r: c = g + r is to be sent, s is what the receiver decodes, and c - s is the new r.
So the sum of all messages and the residual are the sum of all gradients (Seide et al. 2014; Karimireddy et al., arXiv
1901.09847). In fp32 `c - s` is exact for messages that are either zero or within a factor of two of c (block Top-K, and
numbers rounded to the nearest of a grid), by Sterbenz's lemma.

The residual that a step began with is kept until the step is known to count: `end_step(skipped)` of a step that was skipped
brings it back, without waiting for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

ROUNDINGS = ("nearest", "stochastic")
_BLOCK = 4096  # numbers that share a minimum and a maximum in 4 bits


class ErrorFeedback:
    """The residual of `numel` numbers, on one rank."""

    def __init__(
        self,
        numel: int,
        *,
        storage: str = "fp32",
        rounding: str = "nearest",
        device: torch.device | str = "cpu",
        seed: int = 0,
        may_skip: bool = True,
    ) -> None:
        """
        Args:
            storage: fp32; bf16, which keeps 8 bits of each number; int4: 16 levels between the least and the largest of each
                4,096 numbers (as MicroAdam, arXiv 2405.15593, has it).
            rounding: of bf16 and int4: `nearest`, or `stochastic`, which is right on the average.
            seed: of stochastic rounding.
            may_skip: whether a step can turn out not to count after its message was made. False saves the second copy.
        """
        assert storage in STORAGES, storage
        assert rounding in ROUNDINGS, rounding
        self.numel = numel
        self._format = _FORMATS[storage](numel, torch.device(device))
        self._generator = torch.Generator(device).manual_seed(seed) if rounding == "stochastic" else None
        self._now = self._format.zeros()
        self._next = self._format.zeros() if may_skip else self._now
        self._is_open = False  # whether _next holds the residual of a step that has not ended

    @property
    def num_bytes(self) -> int:
        """Bytes that this takes on its device: the residual, and with `may_skip` the one of the step before."""
        copies = 1 if self._next is self._now else 2
        return copies * sum(part.numel() * part.element_size() for part in self._now)

    def residual(self) -> torch.Tensor:
        """fp32 [numel]: what the next message makes up for."""
        self.end_step(False)
        return self._format.decode(self._now)

    def correct(self, values: torch.Tensor) -> torch.Tensor:
        """Add the residual to fp32 `values` [numel], in place."""
        self.end_step(False)
        return self._format.add_to(values, self._now)

    def keep(self, corrected: torch.Tensor, sent: torch.Tensor) -> None:
        """`corrected` was to be sent and `sent` was, both fp32 [numel]: keep the difference."""
        self._format.encode(corrected, sent, self._next, self._generator)
        self._is_open = True

    def clear(self) -> None:
        """Keep nothing."""
        for part in (*self._now, *self._next):
            part.zero_()
        self._is_open = False

    def plain_bf16(self) -> torch.Tensor | None:
        """The residual itself, bf16 [numel], to be added and replaced by whoever makes the message; None where it is kept
        otherwise, rounded by chance, or in two copies."""
        is_plain = self._next is self._now and self._generator is None and self._now[0].dtype == torch.bfloat16
        return self._now[0] if is_plain and len(self._now) == 1 else None

    def end_step(self, skipped: torch.Tensor | bool) -> None:
        """The last `keep` counts, or its step was skipped: then the residual is what it was before. `skipped`: 0-dim."""
        if not self._is_open:
            return
        self._is_open = False
        if self._next is self._now:
            return
        if isinstance(skipped, torch.Tensor) and skipped.device.type != "cpu":  # the host need not wait for it
            for before, after in zip(self._now, self._next, strict=True):
                torch.where(skipped > 0, before, after, out=before)
        elif not bool(skipped):
            self._now, self._next = self._next, self._now

    def state_dict(self) -> dict[str, Any]:
        """The residual in its own format and the state of stochastic rounding, as copies."""
        self.end_step(False)
        state: dict[str, Any] = {"numel": self.numel, "residual": [part.clone() for part in self._now]}
        if self._generator is not None:
            state["rounding"] = self._generator.get_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave. Raises ValueError where it is of another length or format."""
        parts = state["residual"]
        same = [(p.shape, p.dtype) for p in parts] == [(p.shape, p.dtype) for p in self._now]
        if not same or state["numel"] != self.numel:
            raise ValueError("the residual of an error feedback of another length or format")
        if (self._generator is not None) != ("rounding" in state):
            raise ValueError("the residual of an error feedback that rounds in another way")
        self._is_open = False
        for mine, saved in zip(self._now, parts, strict=True):
            mine.copy_(saved)
        if self._generator is not None:
            self._generator.set_state(state["rounding"])

    def set_residual(self, values: torch.Tensor) -> None:
        """Begin with fp32 `values` [numel], rounded to the format."""
        self.keep(values, torch.zeros_like(values))
        self.end_step(False)


_Parts = tuple[torch.Tensor, ...]


class _Storage(ABC):
    """How `numel` numbers are kept, as one or more tensors."""

    @abstractmethod
    def zeros(self) -> _Parts:
        """Tensors that stand for zeros."""

    @abstractmethod
    def decode(self, parts: _Parts) -> torch.Tensor:
        """fp32 [numel], a copy."""

    @abstractmethod
    def encode(
        self, corrected: torch.Tensor, sent: torch.Tensor, out: _Parts, generator: torch.Generator | None
    ) -> None:
        """Put `corrected - sent` into `out`, rounded by chance where there is a generator."""

    def add_to(self, values: torch.Tensor, parts: _Parts) -> torch.Tensor:
        """Add the numbers to `values`, in place."""
        return values.add_(self.decode(parts))


class _Float(_Storage):
    """The residual as floating-point numbers."""

    def __init__(self, numel: int, device: torch.device, dtype: torch.dtype) -> None:
        self._numel, self._device, self._dtype = numel, device, dtype

    def zeros(self) -> _Parts:
        return (torch.zeros(self._numel, dtype=self._dtype, device=self._device),)

    def decode(self, parts: _Parts) -> torch.Tensor:
        return parts[0].to(torch.float32, copy=True)

    def add_to(self, values: torch.Tensor, parts: _Parts) -> torch.Tensor:
        return values.add_(parts[0])

    def encode(
        self, corrected: torch.Tensor, sent: torch.Tensor, out: _Parts, generator: torch.Generator | None
    ) -> None:
        if self._dtype == torch.float32:
            torch.sub(corrected, sent, out=out[0])
        elif generator is None:
            out[0].copy_(corrected - sent)
        else:
            out[0].copy_(_stochastic_bf16(corrected - sent, generator))


class _Int4(_Storage):
    """The residual as 16 levels, of which the first and the last are the least and the largest of a block, in bf16."""

    def __init__(self, numel: int, device: torch.device) -> None:
        self._numel, self._device, self._blocks = numel, device, -(-numel // _BLOCK)

    def zeros(self) -> _Parts:
        codes = torch.zeros(self._blocks, _BLOCK // 2, dtype=torch.uint8, device=self._device)
        return codes, torch.zeros(self._blocks, 2, dtype=torch.bfloat16, device=self._device)

    def decode(self, parts: _Parts) -> torch.Tensor:
        codes, ends = parts
        low, step = _levels(ends)
        pairs = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        return torch.addcmul(low, pairs.to(torch.float32), step).view(-1)[: self._numel]

    def encode(
        self, corrected: torch.Tensor, sent: torch.Tensor, out: _Parts, generator: torch.Generator | None
    ) -> None:
        difference = corrected - sent
        padding = self._blocks * _BLOCK - self._numel
        if padding:  # by the last number, which leaves the least and the largest of its block as they are
            difference = torch.cat([difference, difference[-1:].expand(padding)])
        blocks = difference.view(self._blocks, _BLOCK)
        ends = torch.stack(torch.aminmax(blocks, dim=1), dim=1).to(torch.bfloat16)
        low, step = _levels(ends)
        places = torch.where(step > 0, (blocks - low) / step, 0.0)
        if generator is None:
            places.round_()
        else:
            places.add_(torch.rand(places.shape, generator=generator, device=places.device)).floor_()
        codes = places.clamp_(0, 15).to(torch.uint8).unflatten(-1, (-1, 2))
        torch.bitwise_or(codes[..., 0], codes[..., 1] << 4, out=out[0])
        out[1].copy_(ends)


def _levels(ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest level of each block and the step between levels, fp32 [blocks, 1]."""
    low, high = ends.to(torch.float32).unbind(1)
    return low[:, None], ((high - low) / 15.0)[:, None]


def _stochastic_bf16(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """bf16 of fp32: up with a probability that is the share of the way to the next number, else towards zero."""
    bits = values.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values).to(torch.bfloat16)


_FORMATS: dict[str, Callable[[int, torch.device], _Storage]] = {
    "fp32": lambda numel, device: _Float(numel, device, torch.float32),
    "bf16": lambda numel, device: _Float(numel, device, torch.bfloat16),
    "int4": _Int4,
}
STORAGES = tuple(_FORMATS)
