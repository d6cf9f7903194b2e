"""Weights in and out: Hugging Face folders (`config.json` + `model.safetensors`) of BertForPreTraining; TensorFlow's in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from bert_fast.config import ModelConfig
from bert_fast.errors import UserError
from bert_fast.files import write_atomically, write_json
from bert_fast.model.tensorflow_bundle import TensorBundle, is_bundle

_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}


def _pairs(config: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    """Our parameter name and the Hugging Face names that are concatenated in it (three for query, key, value)."""
    yield "embeddings.word.weight", ["bert.embeddings.word_embeddings.weight"]
    yield "embeddings.position.weight", ["bert.embeddings.position_embeddings.weight"]
    yield "embeddings.token_type.weight", ["bert.embeddings.token_type_embeddings.weight"]
    for kind in ("weight", "bias"):
        yield f"embeddings.norm.{kind}", [f"bert.embeddings.LayerNorm.{kind}"]
        for index in range(config.num_layers):
            ours, theirs = f"layers.{index}", f"bert.encoder.layer.{index}"
            yield f"{ours}.qkv.{kind}", [f"{theirs}.attention.self.{part}.{kind}" for part in ("query", "key", "value")]
            yield f"{ours}.attention_out.{kind}", [f"{theirs}.attention.output.dense.{kind}"]
            yield f"{ours}.attention_norm.{kind}", [f"{theirs}.attention.output.LayerNorm.{kind}"]
            yield f"{ours}.up.{kind}", [f"{theirs}.intermediate.dense.{kind}"]
            yield f"{ours}.down.{kind}", [f"{theirs}.output.dense.{kind}"]
            yield f"{ours}.output_norm.{kind}", [f"{theirs}.output.LayerNorm.{kind}"]
        yield f"heads.transform.{kind}", [f"cls.predictions.transform.dense.{kind}"]
        yield f"heads.transform_norm.{kind}", [f"cls.predictions.transform.LayerNorm.{kind}"]
        yield f"heads.pooler.{kind}", [f"bert.pooler.dense.{kind}"]
        yield f"heads.next_sentence.{kind}", [f"cls.seq_relationship.{kind}"]
    yield "heads.decoder_bias", ["cls.predictions.bias"]


def to_huggingface(state: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Our state dict under the names of transformers' BertForPreTraining (the tied decoder is not repeated)."""
    renamed: dict[str, torch.Tensor] = {}
    for ours, theirs in _pairs(config):
        for name, tensor in zip(theirs, state[ours].chunk(len(theirs)), strict=True):
            renamed[name] = tensor.detach().cpu().contiguous()
    return renamed


def from_huggingface(weights: dict[str, torch.Tensor], config: ModelConfig, where: str = "") -> dict[str, torch.Tensor]:
    """The inverse of `to_huggingface`. Rows beyond a shorter vocabulary are zero. Raises UserError naming the tensor."""
    state: dict[str, torch.Tensor] = {}
    for ours, theirs in _pairs(config):
        missing = [name for name in theirs if name not in weights]
        if missing:
            raise UserError(f"checkpoint {where} has no tensor {missing[0]}; it is no BertForPreTraining")
        state[ours] = torch.cat([weights[name].float() for name in theirs])
    for name in ("embeddings.word.weight", "heads.decoder_bias"):
        short = config.vocab_size - len(state[name])
        if short > 0:
            state[name] = torch.cat([state[name], state[name].new_zeros(short, *state[name].shape[1:])])
    return state


def from_tensorflow(bundle: TensorBundle, num_layers: int) -> dict[str, torch.Tensor]:
    """A checkpoint of Google's BERT under Hugging Face's names; optimizer slots (adam_m, lamb_v, ...) are left.

    Kernels are [in, out] there and [out, in] here. Raises UserError naming a tensor that is missing.
    """
    renamed: dict[str, torch.Tensor] = {}
    for theirs, google in google_variables(num_layers):
        values = torch.from_numpy(bundle[google])
        renamed[theirs] = values.t().contiguous() if google.endswith("/kernel") else values
    return renamed


def google_variables(num_layers: int) -> Iterator[tuple[str, str]]:
    """(Hugging Face's name, TensorFlow's variable) of every tensor."""

    def norm(theirs: str, google: str) -> Iterator[tuple[str, str]]:
        yield f"{theirs}.LayerNorm.weight", f"{google}/LayerNorm/gamma"
        yield f"{theirs}.LayerNorm.bias", f"{google}/LayerNorm/beta"

    def dense(theirs: str, google: str) -> Iterator[tuple[str, str]]:
        yield f"{theirs}.weight", f"{google}/kernel"
        yield f"{theirs}.bias", f"{google}/bias"

    for kind in ("word", "position", "token_type"):
        yield f"bert.embeddings.{kind}_embeddings.weight", f"bert/embeddings/{kind}_embeddings"
    yield from norm("bert.embeddings", "bert/embeddings")
    for index in range(num_layers):
        theirs, google = f"bert.encoder.layer.{index}", f"bert/encoder/layer_{index}"
        for part in ("query", "key", "value"):
            yield from dense(f"{theirs}.attention.self.{part}", f"{google}/attention/self/{part}")
        yield from dense(f"{theirs}.attention.output.dense", f"{google}/attention/output/dense")
        yield from norm(f"{theirs}.attention.output", f"{google}/attention/output")
        yield from dense(f"{theirs}.intermediate.dense", f"{google}/intermediate/dense")
        yield from dense(f"{theirs}.output.dense", f"{google}/output/dense")
        yield from norm(f"{theirs}.output", f"{google}/output")
    yield from dense("bert.pooler.dense", "bert/pooler/dense")
    yield from dense("cls.predictions.transform.dense", "cls/predictions/transform/dense")
    yield from norm("cls.predictions.transform", "cls/predictions/transform")
    yield "cls.predictions.bias", "cls/predictions/output_bias"
    yield "cls.seq_relationship.weight", "cls/seq_relationship/output_weights"
    yield "cls.seq_relationship.bias", "cls/seq_relationship/output_bias"


def save_pretrained(model: torch.nn.Module, config: ModelConfig, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` that `BertForPreTraining.from_pretrained` reads."""
    folder = Path(folder)
    description: dict[str, Any] = {
        "architectures": ["BertForPreTraining"],
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.type_vocab_size,
        "hidden_act": _ACTIVATIONS[config.activation],
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "layer_norm_eps": config.layer_norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": True,
    }
    write_atomically(folder / "model.safetensors", save(to_huggingface(model.state_dict(), config), {"format": "pt"}))
    write_json(folder / "config.json", description)


def load_pretrained(model: torch.nn.Module, config: ModelConfig, folder: str | Path) -> None:
    """Load a Hugging Face folder, or a TensorFlow checkpoint by its prefix (`model.ckpt-28252`), into `model`.

    Raises:
        UserError: files missing or damaged, or a shape that does not fit the model (the tensor is named).
    """
    if is_bundle(folder):
        bundle = TensorBundle(folder)
        layers = sum(name.endswith("attention/self/query/kernel") for name in bundle.entries)
        weights = from_tensorflow(bundle, min(layers, config.num_layers))
    else:
        weights = _read_safetensors(Path(folder))
        _check_description(config, Path(folder))
        layers = sum(key.endswith("attention.self.query.weight") for key in weights)
    if layers != config.num_layers:
        raise UserError(f"checkpoint {folder} has {layers} layers, model.num_layers={config.num_layers}")
    state = from_huggingface(weights, config, str(folder))
    own = model.state_dict()
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"checkpoint {folder} is of another model: {name} is {list(tensor.shape)} there and "
                f"{list(own[name].shape)} in the config's model section"
            )
    model.load_state_dict(state)


def _read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"checkpoint {folder} has no model.safetensors; point train.init_checkpoint at such a folder")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {path} is damaged: {error}") from None


def _check_description(config: ModelConfig, folder: Path) -> None:
    """Refuse what shapes do not show: another number of heads, another activation."""
    if not (folder / "config.json").is_file():
        return
    description = read_config(folder)
    for name, field, own in (
        ("num_attention_heads", "num_heads", config.num_heads),
        ("hidden_act", "activation", _ACTIVATIONS[config.activation]),
    ):
        if description.get(name, own) != own:
            raise UserError(
                f"checkpoint {folder} is of another model: its config.json has {name}={description[name]} and "
                f"model.{field} means {own}"
            )


def read_config(folder: str | Path) -> dict[str, Any]:
    """The raw `config.json` of a Hugging Face folder. Raises UserError if it is no JSON object."""
    path = Path(folder) / "config.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        description = None
    if not isinstance(description, dict):
        raise UserError(f"checkpoint file {path} is damaged: it is no JSON object")
    return description
