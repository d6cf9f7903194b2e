"""Which backend a run uses."""

from __future__ import annotations

import torch

from bert_fast.config.choices import ATTENTION_BACKENDS, find
from bert_fast.errors import UserError
from bert_fast.model.attention.backend import Backend, is_half


def find_backend(name: str) -> Backend:
    """The backend of a name of `config.choices.ATTENTION_BACKENDS`."""
    backend: Backend = find(ATTENTION_BACKENDS, name)
    return backend


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, dropout: float) -> str:
    """Resolve `auto`, and refuse what this machine or dtype does not have. Never replaces a named backend.

    Raises:
        UserError: the named backend cannot run here; the text says which can.
    """
    if name == "auto":
        return next(each for each in _fastest_first(device, dtype) if not _why_not(each, device, dtype, dropout))
    why = _why_not(name, device, dtype, dropout)
    if why:
        raise UserError(f"model.attention_backend={name} {why}")
    return name


def _fastest_first(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """What `auto` tries; the last of them runs anywhere."""
    if device.type == "cpu":
        return ("matmul",)
    return ("flash", "varlen", "nested") if is_half(dtype) else ("grouped",)


def _why_not(name: str, device: torch.device, dtype: torch.dtype, dropout: float) -> str:
    why = find_backend(name).why_not(device, dtype)
    if not why and dropout > 0 and not ATTENTION_BACKENDS[name].has_dropout:
        why = "has no dropout; set model.attention_dropout=0"
    return why
