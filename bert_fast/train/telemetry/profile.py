"""`run.profile: true`: a trace of some steps of the first ranks, with named tracks; on CUDA also the profiler's own."""

from __future__ import annotations

from pathlib import Path

import torch

from bert_fast.config import RunConfig
from bert_fast.run_folder import PROFILER_TRACE, TRACE
from bert_fast.trace import Trace, TraceSpan, write_trace
from bert_fast.train.collectives import barrier, gather_values
from bert_fast.train.environment import Environment
from bert_fast.train.step import Step

TRACKS = ("data", "compute", "buckets", "clip", "collectives", "wait", "optimizer", "weights")
_RANKS = 8  # more make the picture hard to read


class StepProfile:
    """Call `before` and `after` around every step; between the first and the last that is wanted, spans are kept.

    trace.json       ranks 0 to 7 as processes, tracks as above, by the host's clock
    profiler-0.json  torch.profiler's trace of rank 0 with kernels and streams (CUDA)
    """

    def __init__(self, config: RunConfig, environment: Environment, folder: Path, step: Step, first: int) -> None:
        """
        Args:
            first: the step at which this session starts; the trace begins `profile_after` steps later.
        """
        self._environment, self._folder, self._step = environment, folder, step
        self._first = first + config.profile_after
        self._last = self._first + config.profile_steps - 1
        self._wanted = config.profile
        self._trace: Trace | None = None
        self._profiler: torch.profiler.profile | None = None

    def before(self, number: int) -> Trace | None:
        """Before step `number` (and its wait for data). Collective at the first step of the trace."""
        if not self._wanted or number != self._first:
            return self._trace
        cuda = self._environment.device.type == "cuda"
        barrier()  # ranks on several hosts have no common clock: their traces begin together
        self._trace = Trace(torch.profiler.record_function if cuda else None)
        self._step.set_trace(self._trace)
        if cuda and self._environment.is_main:
            self._profiler = torch.profiler.profile(acc_events=True)
            self._profiler.start()
        return self._trace

    def after(self, number: int) -> Path | None:
        """After step `number`. A collective at the last step of the trace; then the file that was written, on rank 0."""
        return self.close() if number == self._last else None

    def close(self) -> Path | None:
        """Write what there is, also where the run ends within the trace. A collective if a trace was begun."""
        if self._trace is None:
            return None
        rank, world = self._environment.rank, self._environment.world_size
        self._step.set_trace(None)
        spans = [tuple(span) for span in self._trace.spans()] if rank < _RANKS else []
        self._trace = None
        if self._profiler is not None:
            torch.cuda.synchronize()
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._folder / PROFILER_TRACE))
            self._profiler = None
        everyone = gather_values(spans)
        if rank:
            return None
        path = self._folder / TRACE
        processes = {f"rank {i}": [TraceSpan(*span) for span in everyone[i]] for i in range(min(world, _RANKS))}
        write_trace(path, processes, TRACKS, {"first_step": self._first, "last_step": self._last})
        return path
