"""Files that TensorFlow writes, and what it computes from them. Run in an environment with TensorFlow; the tests need none.

    python tests/golden/make_tensorflow.py

model.ckpt-7 is a BERT of 2 layers in Google's variable names, with optimizer slots, written by TensorFlow 1's
Saver; expected.npz are a padded batch and its logits by plain TensorFlow operations; samples.tfrecord are 12 samples in
MLPerf's features.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorflow as tf

FOLDER = Path(__file__).resolve().parent / "tensorflow"
V, D, F, H, P, N = 40, 16, 32, 2, 24, 2


def variables(rng: np.random.Generator) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int, around: float = 0.0) -> None:
        made[name] = (around + rng.normal(0, 0.3, shape)).astype(np.float32)

    def dense(name: str, inner: int, outer: int) -> None:
        add(f"{name}/kernel", inner, outer)
        add(f"{name}/bias", outer)

    def norm(name: str) -> None:
        add(f"{name}/LayerNorm/gamma", D, around=1.0)
        add(f"{name}/LayerNorm/beta", D)

    for kind, rows in (("word", V), ("position", P), ("token_type", 2)):
        add(f"bert/embeddings/{kind}_embeddings", rows, D)
    norm("bert/embeddings")
    for layer in range(N):
        prefix = f"bert/encoder/layer_{layer}"
        for part in ("query", "key", "value"):
            dense(f"{prefix}/attention/self/{part}", D, D)
        dense(f"{prefix}/attention/output/dense", D, D)
        norm(f"{prefix}/attention/output")
        dense(f"{prefix}/intermediate/dense", D, F)
        dense(f"{prefix}/output/dense", F, D)
        norm(f"{prefix}/output")
    dense("bert/pooler/dense", D, D)
    dense("cls/predictions/transform/dense", D, D)
    norm("cls/predictions/transform")
    add("cls/predictions/output_bias", V)
    add("cls/seq_relationship/output_weights", 2, D)
    add("cls/seq_relationship/output_bias", 2)
    return made


def forward(
    w: dict[str, tf.Tensor], ids: np.ndarray, mask: np.ndarray, types: np.ndarray, places: np.ndarray
) -> list[np.ndarray]:
    """Masked-LM logits of `places` [B, M] and next-sentence logits, on padded rows, with Google's form of GELU."""

    def dense(x: tf.Tensor, name: str) -> tf.Tensor:
        return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

    def norm(x: tf.Tensor, name: str) -> tf.Tensor:
        mean, variance = tf.nn.moments(x, -1, keepdims=True)
        return tf.nn.batch_normalization(
            x, mean, variance, w[f"{name}/LayerNorm/beta"], w[f"{name}/LayerNorm/gamma"], 1e-12
        )

    def heads(x: tf.Tensor) -> tf.Tensor:
        return tf.transpose(tf.reshape(x, (*ids.shape, H, D // H)), (0, 2, 1, 3))

    def gelu(x: tf.Tensor) -> tf.Tensor:
        return tf.nn.gelu(x, approximate=True)

    x = (
        tf.gather(w["bert/embeddings/word_embeddings"], ids)
        + w["bert/embeddings/position_embeddings"][None, : ids.shape[1]]
    )
    x = norm(x + tf.gather(w["bert/embeddings/token_type_embeddings"], types), "bert/embeddings")
    for layer in range(N):
        prefix = f"bert/encoder/layer_{layer}"
        q, k, v = (heads(dense(x, f"{prefix}/attention/self/{part}")) for part in ("query", "key", "value"))
        scores = q @ tf.transpose(k, (0, 1, 3, 2)) / np.sqrt(D / H) + (1.0 - mask[:, None, None, :]) * -10000.0
        context = tf.reshape(tf.transpose(tf.nn.softmax(scores) @ v, (0, 2, 1, 3)), (*ids.shape, D))
        x = norm(x + dense(context, f"{prefix}/attention/output/dense"), f"{prefix}/attention/output")
        inner = gelu(dense(x, f"{prefix}/intermediate/dense"))
        x = norm(x + dense(inner, f"{prefix}/output/dense"), f"{prefix}/output")
    picked = tf.gather(x, places, batch_dims=1)
    picked = norm(gelu(dense(picked, "cls/predictions/transform/dense")), "cls/predictions/transform")
    logits = picked @ tf.transpose(w["bert/embeddings/word_embeddings"]) + w["cls/predictions/output_bias"]
    pooled = tf.tanh(dense(x[:, 0], "bert/pooler/dense"))
    pairs = pooled @ tf.transpose(w["cls/seq_relationship/output_weights"]) + w["cls/seq_relationship/output_bias"]
    return [logits.numpy(), pairs.numpy()]


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    values = variables(rng)
    lengths = np.array([20, 9, 14])
    mask = (np.arange(20) < lengths[:, None]).astype(np.float32)
    ids = (rng.integers(5, V, mask.shape) * mask).astype(np.int32)
    types = ((np.arange(20) >= 6) * mask).astype(np.int32)
    places = np.array([[1, 7, 19], [2, 3, 8], [1, 6, 13]], np.int32)
    logits, pairs = forward({k: tf.constant(v) for k, v in values.items()}, ids, mask, types, places)
    np.savez(FOLDER / "expected.npz", ids=ids, mask=mask, types=types, places=places, logits=logits, pairs=pairs)

    graph = tf.Graph()
    with graph.as_default(), tf.compat.v1.Session(graph=graph) as session:
        kept = [tf.compat.v1.get_variable(name, initializer=value) for name, value in values.items()]
        for name in ("bert/pooler/dense/kernel", "cls/predictions/output_bias"):
            for slot in ("adam_m", "adam_v", "lamb_m"):
                kept.append(
                    tf.compat.v1.get_variable(f"{name}/{slot}", initializer=np.ones(values[name].shape, np.float32))
                )
        kept.append(tf.compat.v1.get_variable("global_step", initializer=np.int64(7)))
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver(kept)
        saver.save(session, str(FOLDER / "model.ckpt-7"), write_meta_graph=False, write_state=False)

    def integers(row: np.ndarray) -> tf.train.Feature:
        return tf.train.Feature(int64_list=tf.train.Int64List(value=row.tolist()))

    with tf.io.TFRecordWriter(str(FOLDER / "samples.tfrecord")) as writer:
        for index in range(12):
            length = 8 + index
            row = np.zeros((3, 24), int)
            row[0, :length], row[1, :length], row[2, 5:length] = rng.integers(5, 30_000, length), 1, 1
            features = {
                "input_ids": integers(row[0]), "input_mask": integers(row[1]), "segment_ids": integers(row[2]),
                "masked_lm_positions": integers(np.array([1, 4 + index, 0, 0])),
                "masked_lm_ids": integers(np.array([300 + index, 20_000, 0, 0])),
                "masked_lm_weights": tf.train.Feature(float_list=tf.train.FloatList(value=[1.0, 1.0, 0.0, 0.0])),
                "next_sentence_labels": integers(np.array([index % 2])),
            }  # fmt: skip
            writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())


if __name__ == "__main__":
    main()
