"""The tables of variants: every entry is there, and a new variant is one file and one entry, nothing else."""

from __future__ import annotations

import concurrent.futures
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from bert_fast.balance.cost import CostModel
from bert_fast.balance.planner import Planner
from bert_fast.communication.wire_format import wire_format
from bert_fast.config import Config, choices
from bert_fast.config.choices import Choice, find
from bert_fast.config.load import describe_fields
from bert_fast.data import pool
from bert_fast.data.prepare import Recipe, prepare
from bert_fast.data.recipe import RecipeFile
from bert_fast.data.samples import SampleParams
from bert_fast.data.store import Store
from bert_fast.errors import UserError
from bert_fast.model.attention import choose_backend
from bert_fast.model.bert import BertForPretraining
from bert_fast.optim.build import build_optimizer
from bert_fast.train.batches import synthetic_batch, to_device

CPU = torch.device("cpu")
TABLES = {
    name: table
    for name, table in vars(choices).items()
    if isinstance(table, dict) and table and all(isinstance(entry, Choice) for entry in table.values())
}


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`add(table, code, attribute, entry type, **facts)`: a new module, and an entry `dummy` that points into it."""

    def add_entry(table: dict[str, Any], code: str, attribute: str, kind: type[Choice] = Choice, **facts: Any) -> None:
        module = f"dummy_of_{tmp_path.name}"
        (tmp_path / f"{module}.py").write_text(dedent(code), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(table, "dummy", kind(f"{module}:{attribute}", "a dummy", **facts))

    return add_entry


# ---- the tables -----------------------------------------------------------------------------------------------------


def test_the_tables_are_found() -> None:
    assert {"OPTIMIZERS", "WIRE_FORMATS", "STRATEGIES", "ATTENTION_BACKENDS", "CORPORA"} <= set(TABLES)


@pytest.mark.parametrize(("table", "name"), [(table, name) for table in TABLES for name in TABLES[table]])
def test_every_entry_imports_and_says_what_it_is(table: str, name: str) -> None:
    assert find(TABLES[table], name) is not None
    assert TABLES[table][name].what


def test_help_lists_every_variant_with_what_it_is() -> None:
    text = describe_fields()
    assert f"  optimizer.name ({'|'.join(choices.OPTIMIZERS)}, default adamw)" in text
    assert "  model.attention_backend (auto|loop|" in text
    in_configs = [table for name, table in TABLES.items() if name not in ("CORPORA", "PAIR_SOURCES", "SHARDED_ENGINES")]
    for table in (*in_configs, choices.CLIP_MODES):
        for name, entry in table.items():
            assert any(line.split()[0].strip(":") == name and entry.what in line for line in text.splitlines() if line)


def test_a_name_that_is_nearly_right_is_guessed(make_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"optimizer\.name: must be one of 'adamw', .* \(did you mean lamb\?\)"):
        make_config("optimizer.name=lam")
    with pytest.raises(UserError, match=r"optimizer\.name: 3 is read as a number, and a text is wanted"):
        make_config("optimizer.name=3")


def test_what_follows_from_how_a_mode_clips() -> None:
    """Of the four modes, those for which each property holds."""
    held = {
        name: {mode for mode, entry in choices.CLIP_MODES.items() if getattr(entry, name)}
        for name in ("by_group", "delays_communication", "after_reduce", "bounds_sums", "updates_by_bucket")
    }
    assert held == {
        "by_group": {"bucket_before_reduce"},
        "delays_communication": {"global_before_reduce"},
        "after_reduce": {"global_after_reduce"},
        "bounds_sums": {"bucket_before_reduce", "global_before_reduce"},
        "updates_by_bucket": {"none", "bucket_before_reduce"},
    }


# ---- a new variant --------------------------------------------------------------------------------------------------


def test_a_new_optimizer(add: Callable[..., None], make_config: Callable[..., Config]) -> None:
    code = """
        import torch
        from bert_fast.optim.build import RunOptimizer, decay_groups

        class Sign(RunOptimizer):
            @torch.no_grad()
            def step(self):
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.sub_(parameter.grad.sign(), alpha=group["lr"])

        def build(named_parameters, config):
            return Sign(decay_groups(named_parameters, config.weight_decay), {"lr": config.lr})
        """
    add(choices.OPTIMIZERS, code, "build", choices.OptimizerChoice)
    config = make_config("optimizer.name=dummy", "optimizer.lr=0.25")
    weight = nn.Parameter(torch.zeros(3))
    optimizer = build_optimizer([("weight", weight)], config.optimizer)
    weight.grad = torch.tensor([3.0, 0.0, -7.0])
    optimizer.step()
    assert weight.tolist() == [-0.25, 0.0, 0.25]


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "group"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_new_wire_format(add: Callable[..., None], make_config: Callable[..., Config]) -> None:
    code = """
        import torch
        from bert_fast.communication.wire_format import WireFormat

        class Int8(WireFormat):
            def encode(self, number, values):
                return values.round().to(self.dtype)

        def build(gradient_dtype, scale):
            return Int8(torch.int8)
        """
    add(choices.WIRE_FORMATS, code, "build", choices.WireFormatChoice)
    config = make_config("communication.reduce_dtype=dummy")
    wire = wire_format(config.communication.reduce_dtype, torch.float32)
    values = torch.tensor([1.2, -3.6, 100.0])
    for work in wire.all_reduce(0, wire.encode(0, values), values, None):
        work.wait()
    assert values.tolist() == [1.0, -4.0, 100.0]
    assert wire.bytes_sent == 3


def test_a_new_attention_backend(add: Callable[..., None], make_config: Callable[..., Config]) -> None:
    code = """
        import torch
        from bert_fast.model.attention import Backend, find_backend

        calls = []

        def attend(qkv_T3HK, layout, dropout):
            calls.append(dropout)
            return find_backend("loop")(qkv_T3HK, layout, dropout)

        def why_not(device, dtype):
            return "" if dtype == torch.float32 else f"knows no {dtype}"

        DUMMY = Backend(attend, why_not)
        """
    add(choices.ATTENTION_BACKENDS, code, "DUMMY", choices.AttentionChoice, has_dropout=False)
    config = make_config("model.attention_backend=dummy")
    with pytest.raises(UserError, match=r"attention_backend=dummy has no dropout; set model\.attention_dropout=0"):
        make_config("model.attention_backend=dummy", "model.attention_dropout=0.1")
    with pytest.raises(UserError, match=r"model\.attention_backend=dummy knows no torch\.bfloat16"):
        choose_backend("dummy", CPU, torch.bfloat16, 0.0)
    with pytest.raises(UserError, match="dummy has no dropout"):
        choose_backend("dummy", CPU, torch.float32, 0.1)
    losses = []
    for name in (config.model.attention_backend, "loop"):
        torch.manual_seed(0)
        model = BertForPretraining(config.model, choose_backend(name, CPU, torch.float32, 0.0))
        losses.append(model(to_device(synthetic_batch(4, 32, config.model.vocab_size, 0), CPU)).mlm_sum.item())
    assert losses[0] == losses[1]
    module = importlib.import_module(choices.ATTENTION_BACKENDS["dummy"].where.partition(":")[0])
    assert len(module.calls) == config.model.num_layers


def test_a_new_strategy(add: Callable[..., None], make_config: Callable[..., Config]) -> None:
    code = """
        from bert_fast.balance.strategies.base import EqualCounts

        class Backwards(EqualCounts):
            layout = "longest"

            def to_ranks(self, samples):
                return samples.descending()[::-1].reshape(self.shape.num_ranks, -1)
        """
    add(choices.STRATEGIES, code, "Backwards", choices.StrategyChoice, settings=("max_tokens",))
    balance = make_config("balance.strategy=dummy").balance
    lengths = np.arange(1, 13, dtype=np.uint16)
    planner = Planner(
        lengths, balance, CostModel(1.0, 0.0), world_size=2, gradient_accumulation_steps=1, micro_batch_size=6,
        node_size=2, max_seq_len=12, seed=0,
    )  # fmt: skip
    plan = planner.plan(0)
    assert planner.lengths_of(plan).tolist() == list(range(1, 13))
    assert (plan.layout, plan.costs.round(6).tolist()) == ("longest", [21.0, 57.0])


def test_a_new_corpus(
    add: Callable[..., None], tmp_path: Path, vocab_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
        from bert_fast.data.corpora.base import TextCorpus
        from bert_fast.data.streams import Text, read_lines

        class Slashes(TextCorpus):
            suffixes = (".slashes",)

            def texts(self, source, column):
                for number, line in read_lines(source):
                    yield Text(f"{source.name}#{number}", line)

            def sentences(self, text, language):
                return [sentence.strip() for sentence in text.split("/")]

        CORPUS = Slashes()
        """
    add(choices.CORPORA, code, "CORPUS")

    class Threads(concurrent.futures.ThreadPoolExecutor):
        """For processes, which would read the real table."""

        def __init__(self, workers: int, mp_context: Any, initializer: Any) -> None:
            super().__init__(workers)

    monkeypatch.setattr(pool, "ProcessPoolExecutor", Threads)
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [f"the tensor is {'xyz ' * n}/ the input returns bcd / the shape of it" for n in range(1, 20)]
    (folder / "a.slashes").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"there are 1 file that --corpus dummy reads \(a\.slashes\)"):
        prepare(Recipe("prose", str(folder)), tmp_path / "none", 1)
    params = SampleParams(max_seq_len=32, max_predictions=5, dupe_factor=1)
    recipe = Recipe(
        RecipeFile(corpus="dummy").corpus, str(folder), vocab=str(vocab_file), eval_fraction=0.3, params=params
    )
    manifests = prepare(recipe, tmp_path / "out", 1)
    assert manifests["train"]["corpus"] == "dummy"
    assert len(Store(tmp_path / "out/train")) > 0
    written = "".join(path.read_text(encoding="utf-8") for path in sorted((tmp_path / "out/text").glob("*.txt")))
    assert "the input returns bcd\nthe shape of it\n" in written
