"""Recomputation in training: the same losses, gradients and weights, bit for bit; what was planned is what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.steps import PlannedSteps, weights_of

from bert_fast.config import Config
from bert_fast.config.choices import RECOMPUTE, find
from bert_fast.errors import UserError
from bert_fast.memory.chain import measure_chain
from bert_fast.memory.estimate import kept_from_step_to_step
from bert_fast.memory.meter import LiveBytes
from bert_fast.memory.modes import encoder_names, equal_chain
from bert_fast.memory.remat import Segment, keep_all, least_peak
from bert_fast.memory.segments import SegmentRunner
from bert_fast.train.environment import Environment
from bert_fast.train.setup.build import build, build_model
from bert_fast.train.setup.recomputation import longest_batch, measured_chain
from bert_fast.train.setup.warmup import synthetic_input

DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1")


def trained(config: Config, environment: Environment, steps: int = 3) -> tuple[list[float], torch.Tensor]:
    components = build(config, environment)
    planned, losses = PlannedSteps(config), []
    for number in range(steps):
        result = components.step(planned.input(number), lr=0.01)
        losses += [result.mlm_sum.item(), result.grad_norm.item()]
    components.engine.wait_pending()
    return losses, weights_of(components)


def settings(how: str, config: Config, environment: Environment) -> list[str]:
    """With a budget in the middle between the least peak and keeping everything."""
    if how != "budget":
        return [f"memory.recompute={how}"]
    chain = measured_chain(config, environment, build_model(config, environment))
    activations = (least_peak(chain).peak_bytes + keep_all(chain).peak_bytes) / 2
    budget = (kept_from_step_to_step(config).total + activations) / 2**30
    return ["memory.recompute=budget", f"memory.budget_gib={budget:.9f}"]


@pytest.mark.parametrize("how", list(RECOMPUTE))
@pytest.mark.parametrize(
    "others",
    [
        (),
        ("train.precision=bf16",),
        ("batch.micro_batch_size=2", "batch.gradient_accumulation_steps=4"),
        ("model.last_layer=predicted",),
        ("model.next_sentence=false", "model.last_layer=predicted"),
        ("model.attention_backend=padded",),
    ],
    ids=" ".join,
)
def test_nothing_changes_bit_for_bit(
    how: str, others: tuple[str, ...], make_config: Callable[..., Config], environment: Environment
) -> None:
    """With dropout, whose random numbers must be drawn again."""
    if "train.precision=bf16" in others:
        environment = replace(environment, dtype=torch.bfloat16)
    kept = make_config(*DROPOUT, *others)
    plain = trained(kept, environment)
    config = make_config(*DROPOUT, *others, *settings(how, kept, environment))
    recomputation = build(config, environment).recomputation
    assert recomputation is not None
    assert recomputation.num_recomputed > 0 or how == "attention"
    again = trained(config, environment)
    assert plain[0] == again[0]
    assert torch.equal(plain[1], again[1])


@pytest.mark.parametrize("how", ["layer", "half_layer", "optimal", "attention"])
def test_stages_do_run_twice(how: str, make_config: Callable[..., Config], environment: Environment) -> None:
    """In training, and once in evaluation."""
    model_config = make_config("model.num_layers=4", f"memory.recompute={how}")
    components = build(model_config, environment)
    model, calls = components.model, dict.fromkeys(("qkv", "up"), 0)
    attended = 0
    attend = model.attend._attend if how == "attention" else model.attend  # type: ignore[attr-defined]

    def counted(*args: object) -> torch.Tensor:
        nonlocal attended
        attended += 1
        return attend(*args)  # type: ignore[no-any-return]

    if how == "attention":
        model.attend._attend = counted  # type: ignore[attr-defined]
    for layer in model.encoder_layers:
        for name in calls:

            def count(*_: object, name: str = name) -> None:
                calls[name] += 1

            getattr(layer, name).register_forward_hook(count)
    batch = PlannedSteps(model_config).input(0).micro_batches[0]
    model(batch).total.backward()
    if how == "attention":
        assert attended == 8
        assert set(calls.values()) == {4}
    elif how == "optimal":
        assert calls["qkv"] > 4
    else:
        assert set(calls.values()) == {8}
    calls.update(dict.fromkeys(calls, 0))
    with torch.no_grad():
        model(batch)
    assert set(calls.values()) == {4}


def test_a_budget_is_kept_to(make_config: Callable[..., Config], environment: Environment) -> None:
    """From what keeps nothing to what keeps all; a larger budget never computes more again."""
    base = ("model.num_layers=6", "batch.micro_batch_size=16", "batch.global_batch_size=16")
    shape = make_config(*base)
    held = kept_from_step_to_step(shape).total
    optimal = build(make_config(*base, "memory.recompute=optimal"), environment).recomputation
    assert optimal is not None
    assert optimal.peak_bytes is not None
    assert optimal.kept_bytes is not None
    assert optimal.peak_bytes < optimal.kept_bytes
    shares = []
    for fraction in (0.0, 0.3, 0.6, 1.0):
        activations = optimal.peak_bytes + fraction * (optimal.kept_bytes - optimal.peak_bytes)
        budget = (held + activations + 1024) / 2**30
        found = build(
            make_config(*base, "memory.recompute=budget", f"memory.budget_gib={budget:.9f}"), environment
        ).recomputation
        assert found is not None
        assert found.peak_bytes is not None
        assert found.peak_bytes <= activations + 1024
        shares.append(found.num_recomputed)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == 0


def test_a_budget_that_is_too_small_names_the_least(
    make_config: Callable[..., Config], environment: Environment
) -> None:
    with pytest.raises(UserError) as caught:
        build(make_config("memory.recompute=budget", "memory.budget_gib=0.0001"), environment)
    text = str(caught.value)
    assert "\n" not in text
    least = float(text.partition("set it to ")[2].partition(" ")[0])
    build(make_config("memory.recompute=budget", f"memory.budget_gib={least + 0.001}"), environment)


def test_measuring_leaves_no_trace(make_config: Callable[..., Config], environment: Environment) -> None:
    config = make_config(*DROPOUT)
    model = build_model(config, environment)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = synthetic_input(config, environment, seed=0).micro_batches[0]
    chain = measure_chain(model.stages(batch), batch.input_ids, lambda hidden: model.losses(hidden, batch).total)
    assert [stage.name for stage in chain.stages] == encoder_names(config.model.num_layers)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert all(stage.saved_bytes > 0 and stage.forward_s > 0 for stage in chain.stages)
    growing = measure_chain(
        model.stages(batch), batch.input_ids, lambda hidden: model.losses(hidden, batch).total, grads_resident=False
    )
    grown = sum(stage.gradient_bytes for stage in growing.stages)
    assert grown == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("how", ["none", "layer"])
def test_what_is_saved_on_the_host_changes_nothing(
    how: str, make_config: Callable[..., Config], environment: Environment
) -> None:
    """The runner by itself, as a run refuses it on a CPU."""
    config, gradients = make_config(*DROPOUT, f"memory.recompute={how}"), []
    for on_host in (False, True):
        model = build_model(config, environment)
        if on_host:
            chain = equal_chain(config.model.num_layers)
            plan = keep_all(chain) if how == "none" else find(RECOMPUTE, how)(chain, None)
            model.run_stages = SegmentRunner(plan.segments, on_host=True)
        torch.manual_seed(0)
        model(PlannedSteps(config).input(0).micro_batches[0]).total.backward()
        gradients.append(torch.cat([p.grad.ravel() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    "setting", ["memory.offload_activations=true", "optimizer.state_on_host=true", "memory.offload_weights=true"]
)
def test_on_a_cpu_nothing_is_offloaded(
    setting: str, make_config: Callable[..., Config], environment: Environment
) -> None:
    """Where the device is named, and where it is found."""
    others = ["communication.engine=fsdp", "communication.clip=none"] if "weights" in setting else []
    said = f"{setting} on a CPU, where everything is in the host's memory already; set"
    with pytest.raises(UserError, match=said):
        make_config(setting, "system.device=cpu", *others)
    with pytest.raises(UserError, match=said):
        build_model(make_config(setting, "system.device=auto", *others), environment)


def test_a_runner_needs_a_segment_that_ends_where_the_stages_do() -> None:
    runner = SegmentRunner([Segment(0, 2, recompute=True)])
    with pytest.raises(ValueError, match="no segment ends"):
        runner(equal_stages(3), torch.zeros(1))


class _Stage:
    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 1


def equal_stages(count: int) -> list[_Stage]:
    return [_Stage(f"stage {number}") for number in range(count)]


def test_modes_have_the_segments_of_their_names() -> None:
    from bert_fast.memory import modes

    chain = equal_chain(3)
    layers, halves = modes.layer(chain, None).segments, modes.half_layer(chain, None).segments
    assert [(s.begin, s.end) for s in layers if s.recompute] == [(1, 3), (3, 5), (5, 7)]
    assert [(s.begin, s.end) for s in halves if s.recompute] == [(k, k + 1) for k in range(1, 7)]
    assert modes.none(chain, None) == keep_all(chain)


@pytest.mark.parametrize("how", ["none", "layer", "optimal"])
@pytest.mark.parametrize("released", [False, True])
def test_a_whole_pass_takes_what_the_plan_says(
    how: str, released: bool, make_config: Callable[..., Config], environment: Environment
) -> None:
    """All that forward and backward make, buckets of gradients included where they come and go: within 2 %."""
    config = make_config(
        "model.num_layers=4", "model.hidden_size=64", "model.num_heads=2", "model.intermediate_size=256",
        "train.precision=bf16", "batch.micro_batch_size=8", "data.max_seq_len=32", "communication.bucket_mb=0.01",
        f"memory.recompute={how}", f"memory.release_gradients={str(released).lower()}",
    )  # fmt: skip
    environment = replace(environment, dtype=torch.bfloat16)
    components = build(config, environment)
    model, engine = components.model, components.engine
    chain = measured_chain(config, environment, model)
    plan = find(RECOMPUTE, how)(chain, None) if how != "none" else keep_all(chain)
    batch = longest_batch(config)
    own = [tensor.untyped_storage() for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
    engine.zero_grad()
    with LiveBytes([] if released else own) as count, engine.micro_batch(last=False):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            losses = model(batch)
        losses.total.backward()
    weights = sum(p.numel() * 4 for p in model.parameters()) if released else 0  # of which the count knows nothing
    inputs = sum(t.numel() * t.element_size() for t in batch[:-1])
    assert count.peak - weights - inputs == pytest.approx(plan.peak_bytes, rel=0.02)
