"""What a piece of a model takes: bytes that are live, bytes that it saves for backward, and the most at a time.

On CUDA the allocator is asked. Elsewhere a dispatch mode sees every tensor that an operation returns, also of fake tensors,
which have sizes and no memory; scratch memory inside a kernel is not seen. What `torch.compile` has compiled runs as it is
written then: a dispatch mode cannot look into it, and torch would not compile it any more, ever.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(Protocol):
    """Bytes of tensors made since it was entered, now and at most."""

    @property
    def live(self) -> int: ...

    @property
    def peak(self) -> int: ...

    def reset_peak(self) -> None: ...


class LiveBytes(TorchDispatchMode):
    """A `Meter` of all memory that operations return or are given inside of it, but for what was there before.

    Args:
        before: storages that do not count, as `storages_before` finds them.
    """

    def __init__(self, before: Iterable[torch.UntypedStorage] = ()) -> None:
        super().__init__()
        self._live = self._peak = 0
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for storage in before:
            self._note(storage, 0)

    @property
    def live(self) -> int:
        return self._live

    @property
    def peak(self) -> int:
        return self._peak

    def reset_peak(self) -> None:
        self._peak = self._live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Arguments too: memory that NumPy made is not what any operation returned
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self._note(storage, storage.nbytes())
        return result

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = id(storage)
        if key in self._watched:
            return
        self._sizes[key] = size
        self._live += size
        self._peak = max(self._peak, self._live)
        self._watched[key] = weakref.ref(storage, lambda _: self._gone(key))

    def _gone(self, key: int) -> None:
        self._live -= self._sizes.pop(key)
        del self._watched[key]


def storages_before(function: Callable[[], object]) -> list[torch.UntypedStorage]:
    """The memory that a call of `function` works on and that outlives it: weights, inputs, what is cached."""
    found: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    class _Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor):
                    storage = leaf.untyped_storage()
                    found[id(storage)] = weakref.ref(storage)
            return func(*args, **(kwargs or {}))

    with _Watch():
        function()
    return [storage for reference in found.values() if (storage := reference()) is not None]


class _Allocator:
    """A `Meter` of a CUDA device's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)

    @property
    def live(self) -> int:
        return torch.cuda.memory_allocated(self._device) - self._start

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._start

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)


@contextmanager
def meter(device: torch.device, function: Callable[[], object]) -> Iterator[Meter]:
    """Inside, bytes are counted, but for those that a call of `function`, made first, works on and that outlive it."""
    if device.type == "cuda":
        function()
        yield _Allocator(device)
    else:
        with torch.compiler.set_stance("force_eager"), LiveBytes(storages_before(function)) as live:
            yield live
