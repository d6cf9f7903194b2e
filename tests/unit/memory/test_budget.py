"""A budget in, switches out: within the budget, the fastest, monotone, and refused with the least where nothing fits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bert_fast.config import Config, as_plain
from bert_fast.config.load import config_from_tree
from bert_fast.errors import UserError
from bert_fast.memory.budget import MACHINES, Planner, fit, gib, largest_micro_batch, with_changes
from bert_fast.memory.estimate import chain_of, estimate, kept_from_step_to_step
from bert_fast.memory.recomputation import make_recomputation_plan
from bert_fast.memory.remat import keep_all
from bert_fast.memory.stages import Hardware, longest_micro_batch
from bert_fast.memory.state import num_parameters

CPU, GPU = Hardware(4, on_cpu=True, logits_rows=500), Hardware(2, on_cpu=False, logits_rows=500)
SETTINGS = [
    "model.hidden_size=64", "model.num_layers=8", "model.num_heads=2", "model.intermediate_size=256", "model.vocab_size=2000",
    "model.max_positions=128", "data.max_seq_len=128", "system.world_size=2", "batch.micro_batch_size=32",
    "batch.global_batch_size=64", "communication.clip=global_after_reduce", "system.device=auto",
]  # fmt: skip
MIB = 1 / 1024


def whole(config: Config, hardware: Hardware = CPU) -> float:
    """GiB of a config that keeps everything."""
    chain = chain_of(config, longest_micro_batch(config), hardware)
    return estimate(config, chain, keep_all(chain), on_cpu=hardware.on_cpu).total / 2**30


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_larger_budget_is_never_slower(make_config: Callable[..., Config], kind: str) -> None:
    config, hardware = make_config(*SETTINGS), CPU if kind == "cpu" else GPU
    most, times = whole(config, hardware), []
    for share in (1.1, 0.8, 0.6, 0.4, 0.2, 0.1):
        try:
            found = fit(config, share * most, hardware, MACHINES[kind])
        except UserError:
            break
        assert found.best.is_exact
        assert found.best.memory.total <= share * most * 2**30
        assert all(other.memory.total <= share * most * 2**30 for other in found.runners_up)
        assert all(other.step_s >= found.best.step_s for other in found.runners_up if other.is_exact)
        times.append(found.best.step_s)
    assert len(times) >= 4
    assert times == sorted(times)


def test_what_is_chosen_is_what_a_later_run_takes(make_config: Callable[..., Config]) -> None:
    """As a piece of a config; the global batch stays."""
    config = make_config(*SETTINGS)
    found = fit(config, 0.3 * whole(config), CPU, MACHINES["cpu"])
    tree = as_plain(config)
    for section, values in found.fragment().items():
        tree[section] |= values
    later = config_from_tree(tree)
    assert later.batch.global_batch_size == config.batch.global_batch_size
    chain = chain_of(later, longest_micro_batch(later), CPU)
    plan = make_recomputation_plan(later, chain)
    assert estimate(later, chain, plan, on_cpu=True).total <= 0.3 * whole(config) * 2**30


def test_lossy_switches_are_shown_and_not_chosen(make_config: Callable[..., Config]) -> None:
    config = make_config(*SETTINGS, "model.vocab_size=30000")
    found = fit(config, 0.5 * whole(config), CPU, MACHINES["cpu"])
    assert "optimizer.state_dtype" not in found.best.changes
    assert any("optimizer.state_dtype" in other.changes and not other.is_exact for other in found.runners_up)


def test_what_cannot_be_had_has_its_reason(make_config: Callable[..., Config]) -> None:
    config = make_config(*SETTINGS, "communication.clip=bucket_before_reduce")
    refused = fit(config, whole(config), CPU, MACHINES["cpu"]).refused
    assert any("communication.engine=fsdp" in name for name in refused)
    assert all("\n" not in reason for reason in refused.values())


@pytest.mark.parametrize("share", [0.0001, 0.01])
def test_a_budget_that_nothing_keeps_to_names_the_least(make_config: Callable[..., Config], share: float) -> None:
    """Below the weights too."""
    config = make_config(*SETTINGS)
    with pytest.raises(UserError) as caught:
        fit(config, share * whole(config), CPU, MACHINES["cpu"])
    text = str(caught.value)
    assert "\n" not in text
    least = float(text.partition("the least is ")[2].partition(" ")[0])
    assert fit(config, least + 0.0005, CPU, MACHINES["cpu"]).best.memory.total <= (least + 0.0005) * 2**30


@pytest.mark.parametrize("how", ["none", "layer", "optimal"])
def test_the_largest_micro_batch_fits_and_one_more_does_not(make_config: Callable[..., Config], how: str) -> None:
    config = make_config(*SETTINGS, f"memory.recompute={how}")
    for budget in (0.05, 0.3):
        size = largest_micro_batch(config, budget, CPU)
        totals = []
        for samples in (size, size + 1):
            batch = {"batch.micro_batch_size": samples, "batch.global_batch_size": 2 * samples}
            changed = with_changes(config, batch)
            chain = chain_of(changed, longest_micro_batch(changed), CPU)
            totals.append(estimate(changed, chain, make_recomputation_plan(changed, chain), on_cpu=True).total)
        assert totals[0] <= budget * 2**30 / 1.01 < totals[1]  # runs take up to a percent more than their estimate
    assert largest_micro_batch(config, 1e-6, CPU) == 0


def test_parts_are_divided_by_ranks(make_config: Callable[..., Config]) -> None:
    """Weights, gradients and moments of engine fsdp; a unit's whole weights come back for a while."""
    shape = [each for each in SETTINGS if not each.startswith(("system.world", "batch."))]
    ranks = ["system.world_size=8", "system.ranks_per_node=4", "batch.micro_batch_size=1"]
    whole_ones = kept_from_step_to_step(make_config(*shape, *ranks, "batch.global_batch_size=8"))
    for within, shards in (("false", 8), ("true", 4)):
        config = make_config(
            *shape, *ranks, "batch.global_batch_size=8", "communication.engine=fsdp",
            f"communication.shard_within_node={within}", "communication.bucket_mb=25",
        )  # fmt: skip
        held = kept_from_step_to_step(config)
        for name in ("weights", "gradients", "optimizer"):
            assert getattr(held, name) == pytest.approx(getattr(whole_ones, name) / shards, abs=8)
        assert 0 < held.communication < 8 * num_parameters(config.model)


def test_offloading_takes_no_memory_of_the_device(make_config: Callable[..., Config]) -> None:
    config = make_config(*SETTINGS)
    planner = Planner(GPU, MACHINES["cuda"])
    plain = planner.evaluate(config, {}, 2**40)
    for name, part in (("optimizer.state_on_host", "optimizer"), ("memory.offload_activations", "activations")):
        offloaded = planner.evaluate(with_changes(config, {name: True}), {}, 2**40)
        assert getattr(offloaded.memory, part) < 0.5 * getattr(plain.memory, part)
        assert offloaded.step_s > plain.step_s


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80), (" 24 GB ", 24e9 / 2**30), ("512MiB", 0.5), ("1.5", 1.5), ("2gib", 2)]
)
def test_sizes_as_people_write_them(text: str, size: float) -> None:
    assert gib(text) == pytest.approx(size)


@pytest.mark.parametrize("text", ["", "GiB", "0GiB", "-1GiB", "24 gallons", "1e3GiB", "24GiB24"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a size of memory; write it as 80GiB"):
        gib(text)
