"""Where in a step or a run a rank can be, in the words of heartbeats and of errors."""

from __future__ import annotations

GRADIENT_SYNC, METRICS_SYNC = "gradient synchronisation", "metrics synchronisation"
DATA, COMPUTE, EVALUATION, CHECKPOINT = "waiting for data", "forward and backward", "evaluation", "checkpoint"
LOGGING, FINISHING, STOPPING, DONE, STARTING = "writing the log", "finishing", "stopping", "done", "starting"

WAITING = (GRADIENT_SYNC, METRICS_SYNC)  # for other ranks
BLAMELESS = {*WAITING, CHECKPOINT, FINISHING, STOPPING, DONE, STARTING}  # however long a rank is in one of these
ENDED = (STOPPING, DONE)  # a rank may be silent
STEP_ORDER = (METRICS_SYNC, LOGGING, EVALUATION, DATA, COMPUTE, GRADIENT_SYNC)  # from a step's end to that of the next
