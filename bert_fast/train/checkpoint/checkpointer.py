"""When a checkpoint is written, what of the run is stopped for it, and when none may be written."""

from __future__ import annotations

import time
from typing import Any

from bert_fast.train.checkpoint.async_writer import AsyncCheckpointWriter
from bert_fast.train.checkpoint.train_state import TrainState
from bert_fast.train.context import RunContext
from bert_fast.train.health.nonfinite import NonfiniteWatch
from bert_fast.train.health.phases import CHECKPOINT


class Checkpointer:
    """Writes the state of a run through its writer."""

    def __init__(
        self,
        context: RunContext,
        state: TrainState,
        writer: AsyncCheckpointWriter,
        key: dict[str, Any],
        nonfinite: NonfiniteWatch,
    ) -> None:
        """
        Args:
            key: of the run (`resume.resume_key`).
            nonfinite: knows whether the last step was skipped.
        """
        self._context, self._state, self._writer = context, state, writer
        self._key, self._nonfinite = key, nonfinite
        self._every = context.config.checkpoint.every_steps

    def is_due(self, is_last: bool) -> bool:
        """Whether the step just finished ends with a checkpoint; the last one of a run does not."""
        return self._every > 0 and self._state.progress.step % self._every == 0 and not is_last

    def save(self, wait: bool = False) -> bool:
        """Begin to write a checkpoint of the last step; whether there was one to write. A collective.

        Args:
            wait: until it is on disk.
        """
        context, state = self._context, self._state
        if self._nonfinite.skips_now:  # some rank's weights may not be finite
            self._writer.wait()
            context.log("warning: the last step was skipped: nothing is saved now, the checkpoint before counts")
            return False
        began = time.perf_counter()
        context.heartbeat.at(state.progress.step, CHECKPOINT)
        with context.clock.pause("checkpoint"):
            context.energy.add_to(state.progress)
            description = state.describe(self._key)
            own = state.rank_state()
            self._writer.start(state.slices(), own, description, began)
            if wait or not context.config.checkpoint.async_save:
                self._writer.wait()
        return True
