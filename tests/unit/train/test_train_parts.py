"""The parts of a run in one process: clocks, counters, loss scale, signals, prefetching, folders, checkpoints, evaluation."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bert_fast.balance.cost import CostModel
from bert_fast.config import Config
from bert_fast.data.loader import Prefetcher
from bert_fast.data.store import Store
from bert_fast.errors import TrainingError, UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.model.attention import SequenceLayout
from bert_fast.model.bert import BertForPretraining, BertInput
from bert_fast.run_folder import check_folder, create_folder, run_folder
from bert_fast.train import clock as clock_module
from bert_fast.train import main as entry
from bert_fast.train.batches import planned_batches, to_device
from bert_fast.train.clock import Clock
from bert_fast.train.components import TrainComponents
from bert_fast.train.environment import Environment, join, pick_device, pick_dtype, seed_ranks
from bert_fast.train.evaluate import Evaluator, _shard
from bert_fast.train.health.signals import HANDLED, StopFlag
from bert_fast.train.loss_scale import LossScale
from bert_fast.train.progress import Progress
from bert_fast.train.setup.build import build
from bert_fast.train.setup.cost_model import make_planner
from bert_fast.train.setup.inputs import check_inputs
from bert_fast.train.step import StepInput

CPU = torch.device("cpu")


# ---- clock ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """`now[0]` is what time.perf_counter says."""
    seconds = [100.0]
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: seconds[0])
    return seconds


def test_clock_is_never_paused_and_training_is(now: list[float]) -> None:
    clock = Clock()
    now[0] = 150.0  # before run_start: counts for nothing
    clock.start()
    now[0] += 10
    with clock.pause("evaluation"):
        now[0] += 3
    now[0] += 2
    with clock.pause("checkpoint"):
        now[0] += 4
    with clock.pause("evaluation"):
        now[0] += 1
    assert clock.elapsed == 20
    assert clock.training == 12
    assert clock.paused == {"evaluation": 4, "checkpoint": 4}


def test_clock_counts_a_pause_that_ends_in_an_error(now: list[float]) -> None:
    clock = Clock()
    clock.start()

    def evaluate() -> None:
        with clock.pause("evaluation"):
            now[0] += 3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate()
    assert clock.paused == {"evaluation": 3}


def test_clock_of_a_resumed_run_goes_on(now: list[float]) -> None:
    first = Clock()
    first.start()
    now[0] += 10
    with first.pause("evaluation"):
        now[0] += 2
    state = first.state_dict()
    now[0] += 1000  # the time between the sessions is nobody's
    second = Clock()
    second.start()
    second.load_state_dict(state)
    now[0] += 5
    assert second.elapsed == 17
    assert second.training == 15
    with second.pause("evaluation"):
        now[0] += 1
    assert second.paused == {"evaluation": 3}
    assert state["paused"] == {"evaluation": 2}, "the loaded state is a copy"


# ---- progress and loss scale ----------------------------------------------------------------------------------------


def test_progress_sums_means_and_state(tmp_path: Path) -> None:
    progress = Progress()
    for value in (1.0, np.float64(2.0), 6):
        progress.add("imbalance", value)
        progress.step += 1
    assert progress.mean("imbalance") == 3.0
    assert progress.mean("never added") == 0.0
    assert Progress().mean("imbalance") == 0.0
    assert all(type(value) is float for value in progress.sums.values())
    progress.evaluations.append({"step": 3, "accuracy": 0.25})
    progress.first_step_s = 0.5
    torch.save(progress.state_dict(), tmp_path / "p.pt")
    other = Progress()
    other.load_state_dict(torch.load(tmp_path / "p.pt", weights_only=True))
    assert other == progress


def plain_loss_scale(overflows: list[int], value: float) -> list[float]:
    values, good = [], 0
    for overflow in overflows:
        good = 0 if overflow else good + 1
        if overflow:
            value /= 2
        elif good == 2000:
            value, good = value * 2, 0
        values.append(value)
    return values


def test_loss_scale_halves_and_doubles() -> None:
    overflows = [0] * 1999 + [1, 1] + [0] * 1999 + [1] + [0] * 4001
    scale, values = LossScale(1024.0, CPU), []
    flags = (torch.tensor(0.0), torch.tensor(1.0))
    for overflow in overflows:
        scale.update(flags[overflow])
        values.append(scale.value.item())
    assert values == plain_loss_scale(overflows, 1024.0)
    assert sorted(set(values)) == [128.0, 256.0, 512.0, 1024.0]


def test_loss_scale_state_keeps_the_count_of_good_steps() -> None:
    first = LossScale(8.0, CPU)
    for _ in range(1999):
        first.update(torch.tensor(0.0))
    second = LossScale(1.0, CPU)
    second.load_state_dict(first.state_dict())
    assert second.value.item() == 8.0
    second.update(torch.tensor(0.0))
    assert second.value.item() == 16.0


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stop() -> Iterator[StopFlag]:
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield StopFlag()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HANDLED, ids=lambda n: n.name)
def test_signals_set_the_flag_and_say_which(stop: StopFlag, number: signal.Signals) -> None:
    assert stop.number == 0
    os.kill(os.getpid(), number)
    assert stop.number == number


# ---- prefetching ----------------------------------------------------------------------------------------------------


def test_prefetcher_gives_results_in_order_whatever_they_take() -> None:
    def make(step: int) -> int:
        time.sleep(0.002 * (step % 3))
        return step * step

    prefetcher = Prefetcher(make, start=5, end=25, depth=3)
    assert [prefetcher.next() for _ in range(20)] == [n * n for n in range(5, 25)]
    prefetcher.close()


def test_prefetcher_works_ahead_but_not_far() -> None:
    made: list[int] = []
    prefetcher = Prefetcher(lambda step: made.append(step) or step, start=0, end=1000, depth=2)
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert made == [0, 1, 2], "two in the queue, one in hand"
    assert prefetcher.next() == 0
    prefetcher.close()


def test_prefetcher_passes_an_exception_on_in_its_turn() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise UserError("store is truncated")
        return step

    prefetcher = Prefetcher(make, start=0, end=10, depth=4)
    assert [prefetcher.next(), prefetcher.next()] == [0, 1]
    with pytest.raises(UserError, match="store is truncated"):
        prefetcher.next()
    prefetcher.close()


@pytest.mark.parametrize("depth", [1, 5])
def test_prefetcher_closes_while_it_waits_for_room(depth: int) -> None:
    before = threading.active_count()
    prefetcher = Prefetcher(lambda step: step, start=0, end=10**9, depth=depth)
    prefetcher.next()
    time.sleep(0.15)  # the queue is full again and the thread waits
    start = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - start < 2
    assert threading.active_count() == before


# ---- the run's folder -----------------------------------------------------------------------------------------------


def finish_checkpoint(folder: Path) -> None:
    (folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000004" / "complete.json").write_text("{}")


def test_folder_name_comes_from_name_and_seed(make_config: Callable[..., Config]) -> None:
    config = make_config("run.folder=null", "run.results_dir=out", "run.name=x", "train.seed=3")
    assert run_folder(config) == Path("out/x-seed3")
    assert run_folder(make_config("run.folder=elsewhere")) == Path("elsewhere")


@pytest.mark.parametrize("resume", [False, True])
def test_finished_run_is_refused(make_config: Callable[..., Config], resume: bool) -> None:
    config = make_config()
    folder = run_folder(config)
    finish_checkpoint(folder)
    (folder / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match=r"already holds a finished run; choose another run\.name or run\.folder"):
        check_folder(config, resume)


def test_stopped_run_needs_resume(make_config: Callable[..., Config]) -> None:
    config = make_config()
    check_folder(config, False)
    finish_checkpoint(run_folder(config))
    with pytest.raises(UserError, match=r"holds a stopped run; continue it with --resume"):
        check_folder(config, False)
    check_folder(config, True)


def test_resume_needs_a_checkpoint(make_config: Callable[..., Config]) -> None:
    config = make_config()
    with pytest.raises(UserError, match=r"--resume: .* has no checkpoint; start the run without"):
        check_folder(config, True)
    (run_folder(config) / "checkpoints" / "step-00000004").mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint"):
        check_folder(config, True)


def test_create_folder_records_the_config_and_clears_remains(make_config: Callable[..., Config]) -> None:
    config = make_config()
    folder = create_folder(config, resume=False, commit="a commit")
    assert "hidden_size: 16" in (folder / "config.yaml").read_text()
    assert (folder / "commit.txt").read_text().strip()
    (folder / "result_0.txt").write_text("a crashed run's")
    create_folder(config, resume=False, commit="a commit")
    assert not (folder / "result_0.txt").exists()
    (folder / "result_0.txt").write_text("a stopped run's")
    create_folder(config, resume=True, commit="a commit")
    assert (folder / "result_0.txt").exists()


def test_a_folder_that_is_not_a_runs_is_not_removed(make_config: Callable[..., Config]) -> None:
    config = make_config()
    folder = run_folder(config)
    (folder / "other-seed0").mkdir(parents=True)
    (folder / "other-seed0" / "metrics.json").write_text("{}")

    def start() -> None:
        check_folder(config, False)
        create_folder(config, resume=False, commit="a commit")

    with pytest.raises(UserError):
        start()
    assert (folder / "other-seed0" / "metrics.json").exists()


def test_a_file_where_the_folder_should_be_is_kept(make_config: Callable[..., Config]) -> None:
    config = make_config()
    run_folder(config).write_text("notes")
    with pytest.raises(UserError, match=r"/run is a file, not a folder; choose another run\.name"):
        create_folder(config, resume=False, commit="a commit")
    assert run_folder(config).read_text() == "notes"


def test_missing_data_and_checkpoint_are_named_before_ranks_start(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    check_inputs(make_config())
    with pytest.raises(UserError, match=r"no data at nowhere/eval \(data\.eval\); make it with"):
        check_inputs(make_config("evaluation.data=nowhere/eval"))
    with pytest.raises(UserError, match=r"checkpoint\.init_from=.* is neither a folder with model\.safetensors nor"):
        check_inputs(make_config(f"checkpoint.init_from={tmp_path}"))


def test_a_folder_above_the_one_that_is_meant_is_answered_with_it(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    parent = Path(make_config().data.train).parent
    with pytest.raises(UserError, match=rf"set data\.train={parent}/train$"):
        check_inputs(make_config(f"data.train={parent}"))
    with pytest.raises(UserError, match=rf"set evaluation\.data={parent}/eval$"):
        check_inputs(make_config(f"evaluation.data={parent}"))
    (tmp_path / "above/model").mkdir(parents=True)
    (tmp_path / "above/model/model.safetensors").touch()
    (tmp_path / "google").mkdir()
    (tmp_path / "google/model.ckpt-7.index").touch()
    for folder, found in (("above", "above/model"), ("google", r"google/model\.ckpt-7")):
        with pytest.raises(UserError, match=rf"set checkpoint\.init_from={tmp_path}/{found}$"):
            check_inputs(make_config(f"checkpoint.init_from={tmp_path / folder}"))


def test_a_pickle_is_not_taken_for_a_checkpoint(make_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"pytorch_model\.bin is not read"):
        check_inputs(make_config(f"checkpoint.init_from={tmp_path}/old"))


@pytest.mark.parametrize("seed", [0, 179_999_999_999_999, 1_795_651_200_123_456_789, 2**63 - 1])
def test_every_seed_of_the_config_seeds_ranks_apart(seed: int) -> None:
    ranks = [SimpleNamespace(rank=rank) for rank in (0, 1)]
    drawn = []
    for rank in ranks:
        seed_ranks(seed, rank)  # type: ignore[arg-type]
        drawn.append(torch.rand(4))
    assert not torch.equal(*drawn)


# ---- entry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("fix this"), ExitCode.USER_ERROR, "error: fix this\n"),
        (TrainingError("not finite"), ExitCode.TRAINING_ERROR, "error: not finite\n"),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED, "error: interrupted before the first step; nothing was written\n"),
        (OSError(errno.ENOSPC, "No space", "runs/x"), ExitCode.USER_ERROR, "error: disk full (runs/x); free space and --resume\n"),
        (
            RuntimeError("[gloo/transport] Connection closed by peer\nat line 3"),
            ExitCode.LOST_RANK,
            "error: lost contact with another rank: [gloo/transport] Connection closed by peer\n",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
def test_errors_for_people_are_one_line_and_a_code(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)

    def action() -> int:
        raise error

    assert entry.guarded(action) == code
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), OSError(errno.ENOENT, "x"), KeyError("bug")])
def test_bugs_keep_their_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> int:
        raise error

    assert entry.guarded(action) == ExitCode.BUG
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.splitlines()[-1].startswith(f"error: unexpected {type(error).__name__}")


def test_print_config_and_dry_run_start_nothing(
    tmp_path: Path, make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    from bert_fast.config import as_plain
    from bert_fast.config.load import load_config
    from bert_fast.config.yaml_files import to_yaml

    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(as_plain(make_config())))
    args = argparse.Namespace(
        config=str(path), overrides=["train.seed=5"], print_config=True, dry_run=False, resume=False
    )
    assert entry.run(args, 0.0) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed).train.seed == 5
    args.print_config, args.dry_run = False, True
    assert entry.run(args, 0.0) == 0
    assert not (tmp_path / "run").exists()


# ---- environment ----------------------------------------------------------------------------------------------------


def test_precision_and_device_of_a_cpu() -> None:
    assert pick_dtype("fp32", CPU) == torch.float32
    assert pick_dtype("bf16", CPU) == torch.bfloat16
    assert pick_dtype("auto", CPU) in (torch.float32, torch.bfloat16)
    with pytest.raises(UserError, match=r"precision=fp16 needs CUDA; on CPU set"):
        pick_dtype("fp16", CPU)
    assert pick_device("cpu", 0) == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there_says_the_mend() -> None:
    assert pick_device("auto", 0) == CPU
    with pytest.raises(UserError, match=r"no usable CUDA device; set system\.device=cpu"):
        pick_device("cuda", 0)


# ---- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "ranks"), [(1, 1), (1, 3), (7, 3), (9, 3), (64, 4)])
def test_every_evaluation_sample_is_on_one_rank(samples: int, ranks: int) -> None:
    shards = _shard(np.random.default_rng(0).random(samples), ranks)
    assert len(shards) == ranks
    assert sorted(i for shard in shards for i in shard) == list(range(samples))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def plain_evaluation(model: BertForPretraining, store: Store, count: int) -> tuple[float, float, float, float]:
    """Sample by sample: accuracy and mean loss of masked tokens, accuracy and mean loss of next sentences."""
    correct = masked = next_correct = 0
    loss = next_loss = 0.0
    for index in range(count):
        sample = store[index]
        length = len(sample.input_ids)
        labels = torch.tensor(sample.masked_labels.astype(np.int64))
        positions = torch.arange(length)
        inputs = BertInput(
            torch.tensor(sample.input_ids.astype(np.int64)),
            (positions >= sample.len_a).long(),
            positions,
            torch.tensor(sample.masked_positions.astype(np.int64)),
            labels,
            torch.tensor([sample.is_random_next]),
            SequenceLayout([length], torch.tensor([0, length], dtype=torch.int32)),
        )
        mlm, nsp = model.logits(inputs)
        log_mlm, log_nsp = mlm.log_softmax(-1), nsp.log_softmax(-1)
        loss -= log_mlm[torch.arange(len(labels)), labels].sum().item()
        next_loss -= log_nsp[0, sample.is_random_next].item()
        correct += int((mlm.argmax(-1) == labels).sum())
        next_correct += int(nsp.argmax() == sample.is_random_next)
        masked += len(labels)
    return correct / masked, loss / masked, next_correct / count, next_loss / count


@pytest.mark.parametrize("count", [None, 30])
@pytest.mark.parametrize("eval_batch", [7, 1000])
def test_evaluation_equals_one_sample_at_a_time(
    make_config: Callable[..., Config], environment: Environment, count: int | None, eval_batch: int
) -> None:
    config = make_config(f"evaluation.batch_size={eval_batch}", "model.hidden_dropout=0.5")
    model = BertForPretraining(config.model, "matmul").double()
    store = Store(config.evaluation.data)
    assert len(store) > 35
    model.train()
    result = Evaluator(store, count, config.batch, CostModel(1.0, 0.0), environment)(model)
    assert model.training, "the mode is put back"
    expected = plain_evaluation(model.eval(), store, count or len(store))
    found = (result.mlm_accuracy, result.mlm_loss, result.nsp_accuracy, result.nsp_loss)
    assert found == pytest.approx(expected, rel=1e-9)


# ---- build and step -------------------------------------------------------------------------------------------------


def step_input(config: Config, step: int = 0) -> StepInput:
    store = Store(config.data.train)
    plan = make_planner(config, store.lengths).plan(step)
    batches = planned_batches(store, plan, 0, config.data.max_seq_len)
    masked = sum(len(batch.masked_labels) for batch in batches)
    inputs = [to_device(batch, CPU, config.batch.shape_multiple) for batch in batches]
    return StepInput(inputs, masked, config.batch.global_batch_size)


def weights(components: TrainComponents) -> list[torch.Tensor]:
    return [p.detach().clone() for p in components.model.parameters()]


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_warm_up_leaves_no_trace(make_config: Callable[..., Config], environment: Environment, optimizer: str) -> None:
    """Weights, optimizer state and random stream are those of a build without warm-up."""
    results = []
    for steps in (0, 3):
        components = build(
            make_config(f"train.warmup_batches={steps}", f"optimizer.name={optimizer}", "model.hidden_dropout=0.1"),
            environment,
        )
        assert not components.optimizer.state
        components.step(step_input(make_config()), lr=0.01)
        results.append(weights(components))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_step_that_is_not_finite_changes_nothing(
    make_config: Callable[..., Config], environment: Environment
) -> None:
    config = make_config()
    components = build(config, environment)
    components.step(step_input(config), lr=0.01)
    before = weights(components)
    moments = [s["exp_avg"].clone() for s in components.optimizer.state.values()]
    bad = step_input(config, 1)
    hook = components.model.heads.transform.register_forward_hook(lambda *args: args[-1] * float("nan"))
    result = components.step(bad, lr=0.01)
    hook.remove()
    assert not result.is_finite
    assert not result.local_is_finite
    assert all(torch.equal(a, b) for a, b in zip(before, weights(components), strict=True))
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, components.optimizer.state.values(), strict=True))
    assert components.step(step_input(config, 2), lr=0.01).is_finite
    assert not torch.equal(before[0], weights(components)[0])


def test_accumulation_and_loss_scale_give_the_same_step(
    make_config: Callable[..., Config], environment: Environment
) -> None:
    """Losses are sums with one global normalisation: the split into micro-batches does not matter."""
    gradients, losses = [], []
    for local, accumulation, scale in ((8, 1, None), (2, 4, None), (4, 2, 1024.0)):
        config = make_config(f"batch.micro_batch_size={local}", f"batch.gradient_accumulation_steps={accumulation}")
        components = build(config, environment)
        if scale:
            components.step._loss_scale = LossScale(scale, CPU)
        result = components.step(step_input(config), lr=0.0)
        gradients.append(torch.cat([p.grad.flatten() for p in components.model.parameters()]))
        losses.append((result.mlm_sum.item(), result.nsp_sum.item()))
    for gradient, loss in zip(gradients[1:], losses[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6 * gradients[0].abs().max().item())


def test_the_determinism_switch_gives_bit_identical_steps(make_config: Callable[..., Config]) -> None:
    """`train.deterministic` reaches torch, and two machines of one seed go through the same bits, dropout included."""
    dropout = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1", "system.threads_per_rank=1")
    config = make_config("train.deterministic=true", *dropout)
    environment = join(config)
    try:
        assert torch.are_deterministic_algorithms_enabled()
        losses, ends = [], []
        for _ in range(2):
            components = build(config, environment)
            results = [components.step(step_input(config, step), lr=1e-3) for step in range(4)]
            losses.append([(result.mlm_sum.item(), result.grad_norm.item()) for result in results])
            ends.append(weights(components))
        assert losses[0] == losses[1]
        assert len(set(losses[0])) == 4
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
