"""Attention over sequences of different lengths that lie end to end, one call for every backend.

The backends are in `config.choices.ATTENTION_BACKENDS`, one file per family. `loop` is the oracle: one scaled-dot-product
attention per sequence. All must agree with it (tests/unit/model/test_attention.py).
"""

from bert_fast.model.attention.backend import Attention, Backend
from bert_fast.model.attention.choose import choose_backend, find_backend
from bert_fast.model.attention.layout import SequenceLayout

__all__ = ["Attention", "Backend", "SequenceLayout", "choose_backend", "find_backend"]
