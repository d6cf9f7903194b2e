"""Training of embeddings: one gradient however a batch is cut, whole runs, resume, and the folder that others load."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.rank_pool import RankPool
from support.steps import CPU, cpu_rank, weights_of
from support.tiny_task import WORDS, config_over
from support.tiny_training import make_config
from support.training_run import Workspace, errors_of, lines

from bert_fast.config import Config
from bert_fast.config.load import load_config
from bert_fast.data.pairs.batch import texts_of
from bert_fast.data.pairs.store import PairSource, PairStore, pair_sample, write_pair_store
from bert_fast.data.store import write_part
from bert_fast.data.wordpiece import WordPiece, load_vocabulary
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.train.batches import plan_step, step_input, to_device
from bert_fast.train.retrieval import RetrievalEvaluator
from bert_fast.train.setup.build import build
from bert_fast.train.setup.cost_model import make_planner
from bert_fast.train.setup.pairs import check_pairs, draw_of

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
STEPS = 3


@pytest.fixture(scope="module")
def pairs(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and eval/ stores of pairs: two sentences about the same animal in the same place."""
    folder = tmp_path_factory.mktemp("pairs")
    vocabulary = load_vocabulary(tiny_store / "vocab.txt")
    tokenizer, rng = WordPiece(tiny_store / "vocab.txt"), random.Random(0)

    def sentence(animal: str, place: str) -> list[int]:
        colour, verb = rng.choice(WORDS["colour"]), rng.choice(WORDS["verb"])
        return tokenizer.encode([f"the {colour} {animal} {verb} in the {place} ."])[0]

    for split, count in (("train", 240), ("eval", 40)):
        topics = [(rng.choice(WORDS["animal"]), rng.choice(WORDS["place"])) for _ in range(count)]
        samples = [
            pair_sample([sentence(*topic), sentence(*topic)], vocabulary.cls_id, vocabulary.sep_id) for topic in topics
        ]
        part = write_part(folder / f"{split}.bin", samples)
        write_pair_store(
            folder / split, [part], np.arange(count), [PairSource("made", 0, count, 1.0)], texts_per_pair=2,
            max_text_length=max(s.len_a for s in samples) + 8, prefixes={"query": "", "key": ""},
            manifest={"vocab_sha256": vocabulary.sha256, "vocab_size": len(vocabulary), "mask_id": vocabulary.mask_id},
        )  # fmt: skip
    (folder / "vocab.txt").write_bytes((tiny_store / "vocab.txt").read_bytes())
    return folder


def contrastive_config(pairs: Path, world: int, micro: int, **changes: dict[str, Any]) -> Config:
    accumulation = 16 // world // micro
    return make_config(
        pairs, world, train={"objective": "contrastive"}, contrastive={"learn_scale": True},
        mlperf={"enabled": False}, communication={"clip": "global_after_reduce", "max_norm": 1.0},
        batch={"global_batch_size": 16, "micro_batch_size": micro, "gradient_accumulation_steps": accumulation},
        **changes,
    )  # fmt: skip


def steps(rank: int, world: int, config: Config, dropout_seed: int | None = None) -> tuple[list[float], np.ndarray]:
    """Losses summed over this rank's texts, and the weights after some steps."""
    environment = cpu_rank(rank, world)
    components = build(config, environment)
    store = PairStore(config.data.train)
    planner = make_planner(config, store.lengths, draw=draw_of(store, config))
    losses = []
    for number in range(STEPS):
        planned = plan_step(store, planner.plan(number), rank, config, texts_of)
        if dropout_seed is not None:
            torch.manual_seed(dropout_seed)
        losses.append(components.step(step_input(planned, config, CPU), lr=0.01).mlm_sum.item())
    components.engine.wait_pending()
    return losses, weights_of(components).numpy()


CUTS = ((1, 16, "bucketed"), (1, 4, "bucketed"), (2, 8, "bucketed"), (2, 2, "bucketed"), (2, 4, "ddp"))
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_one_gradient_however_a_batch_is_cut(pool: Pools, pairs: Path, pooling: str) -> None:
    """On one rank at once, in micro-batches, on two ranks, and with DistributedDataParallel."""
    own = {"learn_scale": True, "pooling": pooling}
    results = []
    for world, micro, engine in (
        (1, 16, "bucketed"),
        (1, 4, "bucketed"),
        (2, 8, "bucketed"),
        (2, 2, "bucketed"),
        (2, 4, "ddp"),
    ):
        config = contrastive_config(pairs, world, micro, model=NO_DROPOUT)
        tree = config.model_dump(mode="json")
        tree["contrastive"] |= own
        tree["communication"]["engine"] = engine
        config = Config.model_validate(tree)
        every = pool(world).call(steps, config)
        losses = [sum(each[0][step] for each in every) / 32 for step in range(STEPS)]
        results.append((losses, every[0][1]))
        for _, weights in every[1:]:
            np.testing.assert_array_equal(weights, every[0][1])
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-4)
        # AdamW makes the least differences of small gradients large ones, in a few weights
        difference = np.linalg.norm(weights - results[0][1]) / np.linalg.norm(results[0][1])
        assert difference < 1e-3


def test_dropout_is_the_same_in_both_passes(pool: Pools, pairs: Path) -> None:
    """In micro-batches the second pass draws what the first drew: else the gradient would be of other embeddings.

    As a single micro-batch draws its dropout in one go, both are compared with dropout of attention's probabilities off and of
    hidden states on through the loss's fall: a gradient of other embeddings does not lower the same loss.
    """
    config = contrastive_config(pairs, 1, 4, model={"hidden_dropout": 0.3, "attention_dropout": 0.0})
    losses, _ = pool(1).call(steps, config, 7)[0]
    again, _ = pool(1).call(steps, config, 7)[0]
    assert losses == again


@pytest.fixture(scope="module")
def finished(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path]:
    """A run on two ranks that has finished."""
    tree = config_over(pairs)
    tree["train"] |= {"objective": "contrastive", "max_steps": 30}
    tree["contrastive"] = {"learn_scale": True}
    tree["batch"] = {"global_batch_size": 16, "micro_batch_size": 4, "gradient_accumulation_steps": 2}
    tree["mlperf"] = {"enabled": False}
    tree["evaluation"] |= {"at_start": True}
    tree["checkpoint"] = {"save_final_model": True}
    space = Workspace(tmp_path_factory.mktemp("contrastive"), tree)
    code, run = space.run("run.folder=whole")
    assert code == ExitCode.OK, run.stderr
    return space, space.folder / "whole"


def test_a_run_learns_to_find_pairs(finished: tuple[Workspace, Path]) -> None:
    record = json.loads((finished[1] / "metrics.json").read_text(encoding="utf-8"))
    evaluations = record["evaluations"]
    assert evaluations[-1]["mrr"] > evaluations[0]["mrr"] + 0.05
    assert record["metrics"]["retrieval_at_1"] == evaluations[-1]["accuracy"]
    assert record["metrics"]["retrieval_at_10"] == evaluations[-1]["at_10"]
    assert record["metrics"]["pairs_per_s"] > 0
    assert {"alignment", "uniformity"} <= evaluations[-1].keys()


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_been(finished: tuple[Workspace, Path]) -> None:
    space, whole = finished
    code, run = space.run("run.folder=half", "train.max_steps=30", "checkpoint.every_steps=10", "run.name=stopped")
    assert code == ExitCode.OK, run.stderr
    folder = space.folder / "half"
    for checkpoint in (folder / "checkpoints").iterdir():
        if not checkpoint.name.endswith("20"):
            for file in checkpoint.iterdir():
                file.unlink()
            checkpoint.rmdir()
    (folder / "metrics.json").unlink()
    code, run = space.run(
        "run.folder=half", "train.max_steps=30", "checkpoint.every_steps=10", "run.name=stopped", resume=True
    )
    assert code == ExitCode.OK, run.stderr
    losses = {line["step"]: line["loss"] for line in lines(folder)}
    expected = {line["step"]: line["loss"] for line in lines(whole)}
    assert losses == expected


def test_the_folder_is_an_encoder_for_others(finished: tuple[Workspace, Path], pairs: Path) -> None:
    """transformers' BertModel with the pooling that the folder describes gives the embeddings of our evaluation."""
    transformers = pytest.importorskip("transformers")
    folder = finished[1] / "model"
    assert json.loads((folder / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"]
    assert [each["path"] for each in json.loads((folder / "modules.json").read_text())] == [
        "", "1_Pooling", "2_Normalize",
    ]  # fmt: skip
    theirs = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    config = load_config(finished[0].config, [f"checkpoint.init_from={folder}", "contrastive.learn_scale=false"])
    components = build(
        config.model_copy(update={"system": config.system.model_copy(update={"world_size": 1})}), cpu_rank()
    )
    batch = texts_of(PairStore(pairs / "eval").batch(np.arange(8)))
    components.model.eval()
    with torch.no_grad():
        ours = components.model(to_device(batch, CPU))
        for number, (start, length) in enumerate(zip(batch.cu_seqlens, batch.lengths, strict=False)):
            ids = torch.from_numpy(batch.input_ids[start : start + length])[None]
            states = theirs(input_ids=ids).last_hidden_state[0]
            expected = torch.nn.functional.normalize(states.mean(0), dim=0)
            torch.testing.assert_close(ours[number], expected, atol=2e-6, rtol=1e-5)


def test_sentence_transformers_loads_the_folder(finished: tuple[Workspace, Path], pairs: Path) -> None:
    package = pytest.importorskip("sentence_transformers")
    model = package.SentenceTransformer(str(finished[1] / "model"), device="cpu")
    text = "the red cat sees in the house ."
    vector = model.encode([text], convert_to_tensor=True)[0]
    vocabulary = load_vocabulary(pairs / "vocab.txt")
    ids = torch.tensor([[vocabulary.cls_id, *WordPiece(pairs / "vocab.txt").encode([text])[0], vocabulary.sep_id]])
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertModel.from_pretrained(finished[1] / "model", add_pooling_layer=False).eval()
    with torch.no_grad():
        expected = torch.nn.functional.normalize(bert(input_ids=ids).last_hidden_state[0].mean(0), dim=0)
    torch.testing.assert_close(vector, expected, atol=2e-6, rtol=1e-5)


def test_retrieval_is_what_all_scores_say(pairs: Path) -> None:
    config = contrastive_config(pairs, 1, 16)
    components = build(config, cpu_rank())
    store = PairStore(pairs / "eval")
    found = RetrievalEvaluator(store, config, lambda lengths: lengths.astype(float), cpu_rank())(components.model)
    components.model.eval()
    with torch.no_grad():
        texts = components.model(to_device(texts_of(store.batch(np.arange(40), keep_order=True)), CPU))
    scores = (texts[::2] @ texts[1::2].T).double()
    rank = (scores >= scores.diagonal()[:, None]).sum(1).double()
    assert found.mlm_accuracy == pytest.approx((rank == 1).double().mean().item())
    assert found.at_10 == pytest.approx((rank <= 10).double().mean().item())
    assert found.mrr == pytest.approx((1 / rank).mean().item(), rel=1e-6)
    loss = torch.nn.functional.cross_entropy(20 * scores, torch.arange(40))
    assert found.mlm_loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["contrastive.negatives=2"], "hard negative"), (["data.train=nowhere"], "prepare_pairs.py"),
        (["train.cuda_graphs=true"], "cuda_graphs"), (["balance.strategy=packed"], "packed"),
        (["communication.engine=fsdp"], "fsdp"), (["contrastive.scale=0"], "contrastive.scale"),
        (["contrastive.widths=[64,32]"], "widths"), (["data.dynamic_masking=true"], "dynamic_masking"),
        (["train.objective=mlm_nsp"], "contrastive"), (["batch.global_batch_size=512", "batch.micro_batch_size=128"], "groups"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_one_line(finished: tuple[Workspace, Path], overrides: list[str], text: str) -> None:
    code, run = finished[0].run("run.folder=bad", *overrides)
    assert code != ExitCode.OK
    errors = errors_of(run)
    assert len(errors) == 1, run.stderr
    assert text in errors[0]


def test_a_store_of_samples_is_refused(tiny_store: Path, pairs: Path) -> None:
    with pytest.raises(UserError, match="prepare_pairs"):
        PairStore(tiny_store / "train")
    config = contrastive_config(pairs, 1, 16)
    check_pairs(PairStore(pairs / "train"), config)
