"""Is the run evaluated on text that it is trained on? Refused, unless the config wants it.

A preparation has compared its two stores and says so in the manifest. For other pairs rank 0 compares them here, on the clock:
nothing may touch the data before.
"""

from __future__ import annotations

import contextlib

from bert_fast.config import Config
from bert_fast.data.overlap import Shared, known_shared_text, shared_text
from bert_fast.data.pairs.overlap import shared_queries
from bert_fast.data.pairs.store import PairStore
from bert_fast.data.store import Store
from bert_fast.errors import UserError
from bert_fast.train.collectives import broadcast_numbers
from bert_fast.train.environment import Environment


def find_shared_text(train: Store, evaluation: Store, config: Config, environment: Environment) -> Shared:
    """What rank 0 finds the two stores to share, on all ranks. A collective.

    Raises:
        UserError: on every rank, the evaluation store is of training text and `data.allow_shared_text` is false.
    """
    numbers = [0.0, 0.0, 0.0]
    if environment.is_main:
        with contextlib.suppress(
            UserError, ValueError, IndexError
        ):  # of damaged samples more is said where a step reads them
            own = _compare(train, evaluation, config.evaluation.num_samples)
            numbers = [own.found, own.compared, own.looked_at]
    found, compared, looked_at = broadcast_numbers(numbers, environment.device)
    shared = Shared(int(found), int(compared), looked_at)
    if not shared.is_held_out and not config.data.allow_shared_text:
        raise UserError(
            f"{shared_text_note(config, shared)}, so its accuracy says nothing of unseen text; give evaluation.data "
            "a store of other documents, or set data.allow_shared_text=true"
        )
    return shared


def _compare(train: Store, evaluation: Store, num_samples: int | None) -> Shared:
    if isinstance(train, PairStore) and isinstance(evaluation, PairStore):
        return shared_queries(train, evaluation, num_samples)
    return known_shared_text(train, evaluation) or shared_text(train, evaluation, num_samples)


def shared_text_note(config: Config, shared: Shared) -> str:
    """What the stores share, in words."""
    return (
        f"{shared.found:,} of {shared.compared:,} samples of the evaluation store {config.evaluation.data} are of text "
        f"that the training store {config.data.train} has"
    )
