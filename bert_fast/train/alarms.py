"""What a rank's background threads have seen go wrong: all ranks stop for it at the next log line."""

from __future__ import annotations

import socket

from bert_fast.data.scrub import Scrubber
from bert_fast.train.checkpoint.async_writer import AsyncCheckpointWriter
from bert_fast.train.environment import Environment


class Alarms:
    """Looks at the checkpoint writer and at the scrubber of the training store."""

    def __init__(self, writer: AsyncCheckpointWriter, scrubber: Scrubber, environment: Environment) -> None:
        self._writer, self._scrubber, self._rank = writer, scrubber, environment.rank

    @property
    def text(self) -> str | None:
        """What is wrong on this rank, in one line; None: nothing is."""
        if self._writer.failed is not None:
            return self._writer.failed
        alarm = self._scrubber.alarm
        return f"rank {self._rank} on {socket.gethostname()}: {alarm}" if alarm else None

    @property
    def may_save(self) -> bool:
        """Whether the state is sound for all that: the store's name has gone, and no wrong byte was read."""
        return self._scrubber.vanished and self._writer.failed is None
