"""Elementwise arithmetic of this package as one kernel on CUDA, where each of torch's own passes would read all memory again.

A function that goes through here has one tensor's worth of numbers in and out and no state. On CPUs it runs as it is written,
which is also what the compiled form is tested against.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

Function = Callable[..., Any]


def on(device: torch.device, function: Function) -> Function:
    """`function`, compiled by torch where the device is CUDA and Triton is there; for shapes of any size, once."""
    return _compiled(function) if device.type == "cuda" and has_triton() else function


@functools.cache
def has_triton() -> bool:
    """Whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _compiled(function: Function) -> Function:
    compiled: Function = torch.compile(function, dynamic=True)
    return compiled
