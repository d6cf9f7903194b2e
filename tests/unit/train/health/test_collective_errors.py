"""What the exceptions of collectives mean, by their words."""

from __future__ import annotations

import pytest

from bert_fast.errors import LostRankError, TrainingError, UserError
from bert_fast.train.health.collective_errors import CollectiveError, classify

LOST, SHARED = CollectiveError.LOST_RANK, CollectiveError.SHARED_GPU


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        # gloo: which of its words comes first when a rank is silent is a race between buckets
        (RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation"), LOST),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:42143"), LOST),
        (RuntimeError("Application timeout caused pair closure"), LOST),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] writev: Broken pipe"), LOST),
        (RuntimeError("Socket Timeout: timed out after 300000ms"), LOST),
        (RuntimeError("Connection reset by peer"), LOST),
        (RuntimeError("NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp: unhandled system error"), LOST),
        (
            RuntimeError("NCCL error: invalid usage. Duplicate GPU detected : rank 1 and rank 0 both on CUDA device"),
            SHARED,
        ),
        (RuntimeError("shapes do not match"), None),
        (ConnectionResetError("Connection reset by peer"), None),  # of a file or a socket of ours
        (UserError("train.backend=gloo"), None),
        (TrainingError("step 3: out of memory in NCCL"), None),
        (LostRankError("ranks could not meet: timed out"), None),
    ],
)
def test_classify(error: BaseException, kind: CollectiveError | None) -> None:
    assert classify(error) is kind
