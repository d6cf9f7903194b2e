"""Against files that TensorFlow wrote (make_tensorflow.py): checkpoint, outputs, samples."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bert_fast.config import ModelConfig
from bert_fast.data.formats.mlperf import read_blocks
from bert_fast.data.formats.table import SampleTable
from bert_fast.errors import UserError
from bert_fast.model.attention import SequenceLayout
from bert_fast.model.bert import BertForPretraining, BertInput
from bert_fast.model.checkpoints import load_pretrained
from bert_fast.model.tensorflow_bundle import TensorBundle

FOLDER = Path(__file__).resolve().parent / "tensorflow"
PREFIX = FOLDER / "model.ckpt-7"
SHAPE = ModelConfig(
    vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_positions=24,
    activation="gelu_tanh", layer_norm_eps=1e-12,
)  # fmt: skip


def unpadded(found: dict[str, np.ndarray]) -> BertInput:
    real = found["mask"] > 0
    lengths = real.sum(axis=1)
    edges = np.concatenate([[0], np.cumsum(lengths)])
    starts = edges[:-1]
    return BertInput(
        torch.from_numpy(found["ids"][real]).long(), torch.from_numpy(found["types"][real]).long(),
        torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        torch.from_numpy((found["places"] + starts[:, None]).ravel()).long(), torch.zeros(9, dtype=torch.long),
        torch.zeros(3, dtype=torch.long), SequenceLayout(lengths.tolist(), torch.from_numpy(edges).int()),
    )  # fmt: skip


@pytest.mark.parametrize("vocab_size", [40, 48])
def test_outputs_are_those_of_tensorflow(vocab_size: int) -> None:
    shape = SHAPE.model_copy(update={"vocab_size": vocab_size})
    model = BertForPretraining(shape, "loop").eval()
    load_pretrained(model, shape, PREFIX)
    with np.load(FOLDER / "expected.npz") as found:
        with torch.no_grad():
            logits, pairs = model.logits(unpadded(dict(found)))
        np.testing.assert_allclose(logits[:, :40].numpy(), found["logits"].reshape(9, 40), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(pairs.numpy(), found["pairs"], rtol=1e-5, atol=1e-5)
    assert (logits[:, 40:] == 0).all(), "rows that pad the vocabulary"


def test_what_is_in_the_checkpoint() -> None:
    bundle = TensorBundle(PREFIX)
    assert bundle["global_step"] == 7
    assert bundle.entries["bert/pooler/dense/kernel/adam_m"].shape == (16, 16)
    assert (bundle["bert/pooler/dense/kernel/adam_m"] == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "has 2 layers, model.num_layers=3"),
        ({"hidden_size": 32}, r"embeddings.word.weight is \[40, 16\] there and \[40, 32\]"),
        ({"vocab_size": 39}, "embeddings.word.weight"),
    ],
)
def test_a_checkpoint_of_another_size(change: dict[str, int], message: str) -> None:
    shape = SHAPE.model_copy(update=change)
    with pytest.raises(UserError, match=message):
        load_pretrained(BertForPretraining(shape, "loop"), shape, PREFIX)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    for path in FOLDER.glob("model.ckpt-7.*"):
        shutil.copy(path, tmp_path)
    index, data = tmp_path / "model.ckpt-7.index", tmp_path / "model.ckpt-7.data-00000-of-00001"
    whole = data.read_bytes()
    data.write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"data-00000-of-00001 is cut short: \S+ ends beyond it"):
        load_pretrained(BertForPretraining(SHAPE, "loop"), SHAPE, tmp_path / "model.ckpt-7")
    data.unlink()
    with pytest.raises(UserError, match="No such file"):
        load_pretrained(BertForPretraining(SHAPE, "loop"), SHAPE, tmp_path / "model.ckpt-7")
    index.write_bytes(index.read_bytes()[:-3])
    with pytest.raises(UserError, match="no index of a TensorFlow checkpoint"):
        TensorBundle(tmp_path / "model.ckpt-7")


def test_samples_that_tensorflow_wrote() -> None:
    (table,) = read_blocks(FOLDER / "samples.tfrecord", 30_522)
    assert isinstance(table, SampleTable)
    np.testing.assert_array_equal(table.lengths, np.arange(8, 20))
    np.testing.assert_array_equal(table.len_a, np.full(12, 5))
    np.testing.assert_array_equal(table.positions.reshape(12, 2), [[1, 4 + i] for i in range(12)])
    np.testing.assert_array_equal(table.labels.reshape(12, 2), [[300 + i, 20_000] for i in range(12)])
    np.testing.assert_array_equal(table.is_random_next, np.arange(12) % 2)
