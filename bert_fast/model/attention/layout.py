"""Where the sequences of a batch lie, and how they are grouped into rectangles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from bert_fast.integers import round_up


@dataclass(frozen=True)
class Group:
    """Sequences that are attended together: `count` of them from token `start` on, none longer than `longest`.

    If they are all of the same length the flat tokens are a rectangle already, and `index` and `mask` are None. Else
    `index` (int64, [count * longest]) picks their tokens into one (padding repeats the first token), `mask` (bool,
    [count, 1, 1, longest]) says which keys are real, and `places` (int64, [tokens of the group]) picks them back.
    """

    start: int
    end: int
    count: int
    longest: int
    index: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    places: torch.Tensor | None = None


@dataclass
class SequenceLayout:
    """Where the sequences of a batch lie: host lengths, cumulative lengths on the device, cached groupings."""

    lengths: list[int]
    cu_seqlens: torch.Tensor
    block_mask: Any = None  # FlexAttention's, made at first use
    _groups: dict[tuple[float, int], list[Group]] = field(default_factory=dict)
    _rows: Group | None = None

    @property
    def max_len(self) -> int:
        return max(self.lengths)

    def groups(self, slack: float, multiple: int = 1) -> list[Group]:
        """Neighbouring sequences in groups.

        Args:
            slack: padding that a group may have, as a share of its tokens (lengths rounded up to `multiple`).
            multiple: rectangles are as wide as a multiple of this, so that kernels see few shapes.
        """
        key = (slack, multiple)
        if key not in self._groups:
            self._groups[key] = [
                self._group(start_token, members, multiple) for start_token, members in self._runs(slack, multiple)
            ]
        return self._groups[key]

    def packed_rows(self) -> Group:
        """All sequences in rows as wide as the longest, one after the other as they fit; `mask` is [rows, 1, L, L]."""
        if self._rows is None:
            width = self.max_len
            row, used, starts = 0, 0, []
            for length in self.lengths:
                if used + length > width:
                    row, used = row + 1, 0
                starts.append(row * width + used)
                used += length
            lengths = torch.tensor(self.lengths)
            owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            inside = torch.arange(len(owner)) - (torch.cumsum(lengths, 0) - lengths)[owner]
            places = torch.tensor(starts)[owner] + inside
            slots = torch.full(((row + 1) * width,), -1)
            slots[places] = owner
            index = torch.zeros_like(slots)
            index[places] = torch.arange(len(owner))
            table = slots.view(row + 1, 1, width)
            mask = (table.transpose(1, 2) == table)[:, None]
            device = self.cu_seqlens.device
            self._rows = Group(0, len(owner), row + 1, width, *(t.to(device) for t in (index, mask, places)))
        return self._rows

    def _runs(self, slack: float, multiple: int) -> list[tuple[int, list[int]]]:
        """(first token, lengths) of each group."""
        runs: list[tuple[int, list[int]]] = []
        token = start_token = widest = total = 0
        members: list[int] = []
        for length in self.lengths:
            rounded = round_up(length, multiple)
            grown_widest, grown_total = max(widest, rounded), total + rounded
            if members and grown_widest * (len(members) + 1) > grown_total * (1 + slack):
                runs.append((start_token, members))
                members, start_token, widest, total = [length], token, rounded, rounded
            else:
                members, widest, total = [*members, length], grown_widest, grown_total
            token += length
        runs.append((start_token, members))
        return runs

    def _group(self, start_token: int, members: list[int], multiple: int) -> Group:
        longest, end = round_up(max(members), multiple), start_token + sum(members)
        if min(members) == longest:
            return Group(start_token, end, len(members), longest)
        lengths = torch.tensor(members)  # on the host: asking the device for its nonzero() would wait for it
        starts = torch.cumsum(lengths, 0) - lengths
        column = torch.arange(longest)
        real = column[None, :] < lengths[:, None]
        index = torch.where(real, starts[:, None] + column[None, :], 0).flatten()
        places = real.flatten().nonzero()[:, 0]
        tensors = (index, real[:, None, None, :], places)
        device = self.cu_seqlens.device
        if device.type == "cuda":
            tensors = tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)  # type: ignore[assignment]
        return Group(start_token, end, len(members), longest, *tensors)
