"""optimizer.step_per_bucket=true: the weights of one update at the end, bit for bit, or no update at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.rank_pool import RankPool
from support.tiny_training import TinyTraining, make_config, train

from bert_fast.config import Config
from bert_fast.trace import Trace

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("clip", ["none", "bucket_before_reduce"])
@pytest.mark.parametrize("world", [1, 2])
def test_same_weights_as_at_the_end(pool: Pools, tiny_store: Path, world: int, clip: str, optimizer: str) -> None:
    results = []
    for step_per_bucket in (False, True):
        changes = {
            "optimizer": {"name": optimizer, "step_per_bucket": step_per_bucket},
            "communication": {"clip": clip},
        }
        config = make_config(tiny_store, world, **changes)
        results += [train(0, 1, config)] if world == 1 else pool(world).call(train, config)
    for result in results[1:]:
        np.testing.assert_array_equal(result["weights"], results[0]["weights"])
        assert result["norms"] == results[0]["norms"]
    assert (np.diff(results[0]["weights"], axis=0) != 0).any(axis=1).all()


@pytest.mark.parametrize("reduce_dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("clip", ["none", "bucket_before_reduce"])
def test_a_step_that_is_not_finite_changes_no_weight(
    pool: Pools, tiny_store: Path, clip: str, reduce_dtype: str
) -> None:
    """Though the bucket with the NaN is the last: by then the others would have been updated."""
    results = []
    for step_per_bucket in (False, True):
        changes = {
            "optimizer": {"step_per_bucket": step_per_bucket},
            "communication": {"clip": clip, "reduce_dtype": reduce_dtype},
        }
        results += pool(2).call(train, make_config(tiny_store, 2, **changes), 2)
    for result in results:
        assert result["finite"] == [True, True, False, True]
        np.testing.assert_array_equal(result["weights"][2], result["weights"][1])
        np.testing.assert_array_equal(result["weights"], results[0]["weights"])


def order_of_events(rank: int, world: int, config: Config) -> list[str]:
    """What happens in the end of a step: waits for buckets and updates."""
    task, trace = TinyTraining(rank, world, config), Trace()
    task.components.step.set_trace(trace)
    task.step(0)
    return [f"{span.track} {span.name}" for span in trace.spans() if span.track in ("wait", "optimizer")]


def test_a_bucket_is_updated_before_the_next_is_waited_for(pool: Pools, tiny_store: Path) -> None:
    config = make_config(tiny_store, 2, optimizer={"step_per_bucket": True})
    for events in pool(2).call(order_of_events, config):
        count = len(events) // 2
        assert count >= 3
        assert events == [f"{what} bucket {number}" for number in range(count) for what in ("wait", "optimizer")]
