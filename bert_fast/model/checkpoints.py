"""Reads and writes Hugging Face folders (`config.json`, `model.safetensors`) of BertForPreTraining; reads TensorFlow's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bert_fast.config import ModelConfig
from bert_fast.errors import UserError
from bert_fast.files import write_atomically, write_json
from bert_fast.foreign import parse_json, read_bounded, shown
from bert_fast.model.tensorflow_bundle import TensorBundle, is_bundle

_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}


def _pairs(config: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    """Our parameter names, and the Hugging Face names that each concatenates (three for query, key, value)."""
    yield from _encoder_pairs(config)
    yield from _head_pairs(config)


def _encoder_pairs(config: ModelConfig) -> Iterator[tuple[str, list[str]]]:
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


def _head_pairs(config: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    for kind in ("weight", "bias"):
        yield f"heads.transform.{kind}", [f"cls.predictions.transform.dense.{kind}"]
        yield f"heads.transform_norm.{kind}", [f"cls.predictions.transform.LayerNorm.{kind}"]
        if config.next_sentence:
            yield f"heads.pooler.{kind}", [f"bert.pooler.dense.{kind}"]
            yield f"heads.next_sentence.{kind}", [f"cls.seq_relationship.{kind}"]
    yield "heads.decoder_bias", ["cls.predictions.bias"]


def to_huggingface(state: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Our state dict under the names of transformers' BertForPreTraining, without the tied decoder.

    Without next-sentence prediction these are the names of its BertForMaskedLM.
    """
    return _renamed(state, _pairs(config))


def encoder_to_huggingface(state: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """The encoder alone, under the names of transformers' BertModel, without its pooler."""
    named = _renamed(state, _encoder_pairs(config))
    return {name.removeprefix("bert."): tensor for name, tensor in named.items()}


def _renamed(state: dict[str, torch.Tensor], pairs: Iterable[tuple[str, list[str]]]) -> dict[str, torch.Tensor]:
    renamed: dict[str, torch.Tensor] = {}
    for ours, theirs in pairs:
        for name, tensor in zip(theirs, state[ours].chunk(len(theirs)), strict=True):
            renamed[name] = tensor.detach().cpu().contiguous()
    return renamed


class Stored(NamedTuple):
    """A tensor of a file that is not read yet. `kind` is its dtype by safetensors' names (F32, BF16, I8, ...)."""

    shape: tuple[int, ...]
    kind: str
    read: Callable[[], torch.Tensor]


_FLOATS = ("F64", "F32", "F16", "BF16")
_PADDED = ("embeddings.word.weight", "heads.decoder_bias")  # a row for each token


def from_huggingface(
    weights: Mapping[str, Stored],
    config: ModelConfig,
    shapes: Mapping[str, torch.Size],
    where: str = "",
    heads: bool = True,
) -> dict[str, torch.Tensor]:
    """The inverse of `to_huggingface`, in fp32. Rows beyond a shorter vocabulary are zero.

    Args:
        heads: also those of the heads for pretraining.
        shapes: of our tensors, by name.
        where: the checkpoint, for messages.

    Raises:
        UserError: a tensor, which is named, is missing, of another shape, or of a dtype that is not supported.
    """
    state: dict[str, torch.Tensor] = {}
    for ours, theirs in _pairs(config) if heads else _encoder_pairs(config):
        parts = []
        for name in theirs:
            if name not in weights:
                raise UserError(_missing(name, weights, where))
            wanted = (shapes[ours][0] // len(theirs), *shapes[ours][1:])
            found = weights[name]
            fits = found.shape == wanted
            if ours in _PADDED and len(found.shape) == len(wanted) and found.shape[1:] == wanted[1:]:
                fits = 0 < found.shape[0] <= wanted[0]
            if not fits:
                part = f" ({name})" if len(theirs) > 1 else ""
                raise UserError(
                    f"checkpoint {where} is of another model: {ours}{part} is {shown(list(found.shape))} there and "
                    f"{list(wanted)} in the config's model section"
                )
            if found.kind not in _FLOATS:
                raise UserError(
                    f"checkpoint {where}: {name} is of type {found.kind}, and {', '.join(_FLOATS)} are read; "
                    "save it in one of them"
                )
            parts.append(found.read().float())
        state[ours] = torch.cat(parts)
        short = shapes[ours][0] - len(state[ours])
        if short > 0:
            state[ours] = torch.cat([state[ours], state[ours].new_zeros(short, *state[ours].shape[1:])])
    return state


def _missing(name: str, weights: Mapping[str, Stored], where: str) -> str:
    """The message for a checkpoint without a tensor."""
    heads = "bert.pooler.dense.weight", "cls.seq_relationship.weight"
    if _is_of_next_sentence(name) and "cls.predictions.transform.dense.weight" in weights:
        lacks = " and ".join(head for head in heads if head not in weights) or name
        return (
            f"checkpoint {where} has no {lacks}: it was trained without next-sentence prediction (a BertForMaskedLM, as "
            "run_mlm writes it); set model.next_sentence=false or start from a BertForPreTraining"
        )
    return f"checkpoint {where} has no tensor {name}; it is no BertForPreTraining"


def _is_of_next_sentence(name: str) -> bool:
    """Whether a tensor, by Hugging Face's name, is the pooler's or the next-sentence head's."""
    return name.startswith(("bert.pooler.", "cls.seq_relationship."))


def _check_extra(weights: Mapping[str, Stored], config: ModelConfig, where: str) -> None:
    """Refuse tensors that this model has no place for, and a decoder that is not the word embedding.

    Those of next-sentence prediction are passed over where the model does not have it: masked tokens do not need them.
    """
    known = {name for _, theirs in _pairs(config) for name in theirs}
    unknown = set(weights) - known - _BUFFERS
    extra = sorted(name for name in unknown if config.next_sentence or not _is_of_next_sentence(name))
    for name, tied in _TIED.items():
        if name in weights and tied in weights:
            extra.remove(name)
            own, other = weights[name], weights[tied]
            readable = own.shape == other.shape and own.kind in _FLOATS
            if not (readable and torch.equal(own.read().float(), other.read().float())):
                raise UserError(
                    f"checkpoint {where} has a decoder of its own: {name} is not {tied}, and here they are one tensor; "
                    "train it with tie_word_embeddings"
                )
    if extra:
        more = f" and {len(extra) - 5:,} more" if len(extra) > 5 else ""
        raise UserError(
            f"checkpoint {where} has tensors that this model has no place for: {shown(', '.join(extra[:5]), 400)}{more}; its "
            "outputs would be others without them. Save it as a plain BertForPreTraining"
        )


def _check_encoder_extra(weights: Mapping[str, Stored], config: ModelConfig, where: str) -> None:
    """Refuse tensors inside the encoder that this one has no place for: its outputs would be others without them."""
    known = {name for _, theirs in _encoder_pairs(config) for name in theirs} | _BUFFERS
    inside = ("bert.embeddings.", "bert.encoder.")
    extra = sorted(name for name in weights if name.startswith(inside) and name not in known)
    if extra:
        raise UserError(
            f"checkpoint {where} has tensors that this encoder has no place for: {shown(', '.join(extra[:5]), 400)}; its "
            "outputs would be others without them"
        )


# 0, 1, 2 ... and zeros, which older versions of transformers saved
_BUFFERS = {"bert.embeddings.position_ids", "bert.embeddings.token_type_ids"}
_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


def from_tensorflow(bundle: TensorBundle, num_layers: int) -> dict[str, Stored]:
    """A checkpoint of Google's BERT under Hugging Face's names, without optimizer slots (adam_m, lamb_v, ...).

    Kernels are [in, out] there and [out, in] here. Variables of the model that BERT does not have keep their names. The
    tensors of next-sentence prediction may be absent.

    Raises:
        UserError: any other tensor, which is named, is missing.
    """
    renamed: dict[str, Stored] = {}
    known: set[str] = set()
    for theirs, google in google_variables(num_layers):
        if google not in bundle:
            if _is_of_next_sentence(theirs):
                continue
            raise UserError(f"checkpoint {bundle.prefix} has no tensor {google}")
        entry, turned = bundle.entries[google], google.endswith("/kernel")
        renamed[theirs] = Stored(
            entry.shape[::-1] if turned else entry.shape,
            bundle.kind(google) or f"{entry.kind} of TensorFlow",
            functools.partial(_read_google, bundle, google, turned),
        )
        known.add(google)
    for name in bundle.entries:
        if name.startswith(("bert/", "cls/")) and name not in known and name.rpartition("/")[0] not in known:
            renamed[name] = Stored(bundle.entries[name].shape, "", functools.partial(_read_google, bundle, name, False))
    return renamed


def _read_google(bundle: TensorBundle, name: str, turned: bool) -> torch.Tensor:
    values = torch.from_numpy(bundle[name])
    return values.t().contiguous() if turned else values


def google_variables(num_layers: int, next_sentence: bool = True) -> Iterator[tuple[str, str]]:
    """(Hugging Face's name, TensorFlow's variable) of every tensor of BERT, with or without next-sentence prediction."""

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
    if next_sentence:
        yield from dense("bert.pooler.dense", "bert/pooler/dense")
    yield from dense("cls.predictions.transform.dense", "cls/predictions/transform/dense")
    yield from norm("cls.predictions.transform", "cls/predictions/transform")
    yield "cls.predictions.bias", "cls/predictions/output_bias"
    if next_sentence:
        yield "cls.seq_relationship.weight", "cls/seq_relationship/output_weights"
        yield "cls.seq_relationship.bias", "cls/seq_relationship/output_bias"


def save_pretrained(model: torch.nn.Module, config: ModelConfig, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` for `BertForPreTraining.from_pretrained`. Raises UserError (disk).

    A model without next-sentence prediction is for `BertForMaskedLM.from_pretrained`.
    """
    folder = Path(folder)
    _write(
        folder,
        to_huggingface(model.state_dict(), config),
        config,
        "BertForPreTraining" if config.next_sentence else "BertForMaskedLM",
    )


def save_encoder(model: torch.nn.Module, config: ModelConfig, folder: str | Path) -> None:
    """As `save_pretrained`, the encoder alone, for `BertModel.from_pretrained`."""
    _write(Path(folder), encoder_to_huggingface(model.state_dict(), config), config, "BertModel")


def _write(folder: Path, weights: dict[str, torch.Tensor], config: ModelConfig, architecture: str) -> None:
    description: dict[str, Any] = {
        "architectures": [architecture],
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
    write_atomically(folder / "model.safetensors", save(weights, {"format": "pt"}))
    write_json(folder / "config.json", description)


def load_pretrained(model: torch.nn.Module, config: ModelConfig, folder: str | Path, heads: bool = True) -> None:
    """Load a Hugging Face folder, or a TensorFlow checkpoint by its prefix (`model.ckpt-28252`), into `model`.

    Without `heads` the encoder alone is loaded, of a checkpoint with any heads or none (a BertModel), and the rest of `model`
    stays as it is. Dropout comes from the config, as it changes how a model is trained and not what its weights mean.

    Raises:
        UserError: files are missing or damaged; a tensor is missing, unknown or of another shape; or the description does
            not agree with the config about the model's mathematics.
    """
    where = shown(folder)
    weights: Mapping[str, Stored]
    with contextlib.ExitStack() as files:
        if is_bundle(folder):
            bundle = TensorBundle(folder)
            layers = sum(name.endswith("attention/self/query/kernel") for name in bundle.entries)
            _check_description(config, Path(folder).parent / "bert_config.json", by_google=True)
            weights = from_tensorflow(bundle, layers) if layers == config.num_layers else {}
        else:
            weights = _read_safetensors(Path(folder), files)
            if not heads and not any(name.startswith("bert.") for name in weights):  # a BertModel
                weights = {f"bert.{name}": stored for name, stored in weights.items()}
            untied = heads and "cls.predictions.decoder.weight" not in weights
            _check_description(config, Path(folder) / "config.json", untied=untied)
            layers = sum(key.endswith("attention.self.query.weight") for key in weights)
        if layers != config.num_layers:
            raise UserError(f"checkpoint {where} has {layers} layers, model.num_layers={config.num_layers}")
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        state = from_huggingface(weights, config, shapes, where, heads)
        if heads:
            _check_extra(weights, config, where)
        else:
            _check_encoder_extra(weights, config, where)
    model.load_state_dict(state, strict=heads)


_MOST_HEADER_BYTES = 16 << 20  # BERT-large's has 0.05 MB


def _read_safetensors(folder: Path, files: contextlib.ExitStack) -> dict[str, Stored]:
    """The tensors of a folder by Hugging Face's current names; LayerNorm's gamma and beta of older files are renamed."""
    path = folder / "model.safetensors"
    if not path.is_file():
        others = [name for name in ("pytorch_model.bin", "model.safetensors.index.json") if (folder / name).is_file()]
        why = ""
        if others:
            why = f"; {others[0]} is not read (a .bin can run code): load it elsewhere and save_pretrained() it as one file"
        raise UserError(
            f"checkpoint {shown(folder)} has no model.safetensors; point checkpoint.init_from at such a folder{why}"
        )
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > _MOST_HEADER_BYTES:
            raise UserError(
                f"checkpoint {shown(path)} is damaged: its header says {header:,} bytes, and at most "
                f"{_MOST_HEADER_BYTES >> 20} MiB are read"
            )
        found = files.enter_context(safe_open(path, framework="pt"))
        stored = {}
        for name in found.keys():  # noqa: SIM118 (it is no dict)
            part = found.get_slice(name)
            read = functools.partial(found.get_tensor, name)
            stored[name] = Stored(tuple(part.get_shape()), str(part.get_dtype()), read)
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {shown(path)} is damaged: {shown(str(error))}") from None
    renamed = {}
    for name, tensor in stored.items():
        new = name
        for old, today in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            if name.endswith(old):
                new = name.removesuffix(old) + today
        renamed[name if new in stored else new] = tensor
    bias = "cls.predictions.bias"
    if bias not in renamed and "cls.predictions.decoder.bias" in renamed:  # one parameter, saved under either name
        renamed[bias] = renamed["cls.predictions.decoder.bias"]
    return renamed


# What BertConfig uses where its file says nothing
_DEFAULTS: dict[str, Any] = {
    "model_type": "bert",
    "num_attention_heads": 12,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "pruned_heads": None,
    "quantization_config": None,
}
# Several names of one function
_GELU = {
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
}


def _check_description(config: ModelConfig, path: Path, *, untied: bool = False, by_google: bool = False) -> None:
    """Refuse differences that shapes do not show: heads, activation, epsilon, kind of positions, decoder.

    Args:
        untied: the weights have no decoder of their own, so `tie_word_embeddings` decides. A decoder in the weights is
            compared with the word embedding instead.
        by_google: the file is Google's `bert_config.json`, whose "gelu" is computed by tanh in TensorFlow and by erf in
            conversions of it.
    """
    if not path.is_file():
        return
    description = {**_DEFAULTS, **read_config(path)}
    gelu = (*_GELU["gelu"], *_GELU["gelu_tanh"]) if by_google else _GELU[config.activation]
    meant: dict[str, tuple[tuple[Any, ...], str]] = {
        "model_type": (("bert",), "this model is BERT"),
        "num_attention_heads": ((config.num_heads,), f"model.num_heads={config.num_heads}"),
        "hidden_act": (gelu, f"model.activation={config.activation} means {' or '.join(gelu)}"),
        "layer_norm_eps": ((config.layer_norm_eps,), f"model.layer_norm_eps={config.layer_norm_eps:g}"),
        "position_embedding_type": (("absolute",), "positions here are absolute"),
        "is_decoder": ((False,), "attention here sees both sides"),
        "add_cross_attention": ((False,), "there is no cross-attention here"),
        "pruned_heads": ((None, {}), "no heads are pruned here"),
        "quantization_config": ((None,), "weights here are not quantized"),
    }
    if untied:
        meant["tie_word_embeddings"] = ((True,), "the decoder here is the word embedding")
    if by_google:
        meant = {name: meant[name] for name in ("num_attention_heads", "hidden_act")}
    wrong = [
        f"{name}={shown(description[name], 40)} and {ours}"
        for name, (values, ours) in meant.items()
        if not any(description[name] == value for value in values)
    ]
    if wrong:
        raise UserError(f"checkpoint {shown(path.parent)} is of another model: its {path.name} has {'; '.join(wrong)}")


_MOST_CONFIG_BYTES = 1 << 20


def read_config(path: str | Path) -> dict[str, Any]:
    """The raw `config.json` in a Hugging Face folder, or at this path. Raises UserError if it is not a JSON object."""
    path = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        description = parse_json(read_bounded(path, _MOST_CONFIG_BYTES, "a model's description"))
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"checkpoint file {shown(path)}: {error.strerror}") from None
    except ValueError:
        description = None
    if not isinstance(description, dict):
        raise UserError(f"checkpoint file {shown(path)} is damaged: it is no JSON object")
    return description
