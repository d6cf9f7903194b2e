"""Starting checkpoints as others write them: names, descriptions and tensors of transformers; damaged and foreign files."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.paths import ROOT
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining
from transformers.activations import ACT2FN

from bert_fast.config import ModelConfig
from bert_fast.errors import UserError
from bert_fast.model.bert import BertForPretraining
from bert_fast.model.checkpoints import google_variables, load_pretrained, save_pretrained
from bert_fast.model.tensorflow_bundle import TensorBundle

SHAPE = ModelConfig(
    vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_positions=24, activation="gelu"
)
PREFIX = ROOT / "tests/golden/tensorflow/model.ckpt-7"
MASKED_ALONE = SHAPE.model_copy(update={"next_sentence": False})
GOOGLE = SHAPE.model_copy(update={"activation": "gelu_tanh"})


def theirs(kind: type = BertForPreTraining, **changes: Any) -> Any:
    """A model of transformers with the shape, and biases and norms that are not what they are set up with."""
    torch.manual_seed(5)
    values: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 24,
    }  # fmt: skip
    model = kind(BertConfig(**{**values, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def loaded(folder: Path, shape: ModelConfig = SHAPE) -> BertForPretraining:
    model = BertForPretraining(shape)
    load_pretrained(model, shape, folder)
    return model


def refused(folder: Path, shape: ModelConfig = SHAPE) -> str:
    with pytest.raises(UserError) as caught:
        loaded(folder, shape)
    text = str(caught.value)
    assert len(text) < 1200
    assert "\n" not in text
    return text


def rename(path: Path, **names: str) -> None:
    """Replace parts of the names of a file's tensors."""
    weights = load_file(path)
    renamed = {}
    for name, tensor in weights.items():
        for old, new in names.items():
            name = name.replace(old.replace("__", "."), new)
        renamed[name] = tensor
    save_file(renamed, path)


def describe(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---- what is taken --------------------------------------------------------------------------------------------------


def test_layer_norms_named_gamma_and_beta(tmp_path: Path) -> None:
    """As in the published bert-base-uncased."""
    model = theirs()
    model.save_pretrained(tmp_path)
    rename(tmp_path / "model.safetensors", LayerNorm__weight="LayerNorm.gamma", LayerNorm__bias="LayerNorm.beta")
    assert "cls.predictions.transform.LayerNorm.gamma" in load_file(tmp_path / "model.safetensors")
    ours = loaded(tmp_path)
    assert torch.equal(ours.layers[1].output_norm.weight, model.bert.encoder.layer[1].output.LayerNorm.weight)
    assert torch.equal(ours.heads.transform_norm.bias, model.cls.predictions.transform.LayerNorm.bias)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_names_of_one_activation(tmp_path: Path, activation: str) -> None:
    """Every name that transformers has for the function is taken, and no other."""
    x = torch.linspace(-6, 6, 1001)
    want = torch.nn.functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    shape = SHAPE.model_copy(update={"activation": activation})
    theirs().save_pretrained(tmp_path)
    for name in [*ACT2FN, "unheard_of"]:
        describe(tmp_path, hidden_act=name)
        same = name in ACT2FN and "10" not in name and torch.allclose(ACT2FN[name](x), want, atol=2e-6)
        if same:
            loaded(tmp_path, shape)
        else:
            assert f"hidden_act={name} and model.activation={activation} means" in refused(tmp_path, shape)


@pytest.mark.parametrize("bias", [["cls.predictions.bias"], ["cls.predictions.decoder.bias"], None])
@pytest.mark.parametrize("decoder", [True, False])
def test_a_tied_decoder_under_any_of_its_names(tmp_path: Path, decoder: bool, bias: list[str] | None) -> None:
    model = theirs()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    words, value = model.bert.embeddings.word_embeddings.weight, model.cls.predictions.bias
    weights.pop("cls.predictions.bias", None)
    for name in bias or ["cls.predictions.bias", "cls.predictions.decoder.bias"]:
        weights[name] = value.detach().clone()
    if decoder:
        weights["cls.predictions.decoder.weight"] = words.detach().clone()
        describe(tmp_path, tie_word_embeddings=False)  # and yet the same
    save_file(weights, path)
    assert torch.equal(loaded(tmp_path).heads.decoder_bias, value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_float_formats(tmp_path: Path, dtype: torch.dtype) -> None:
    model = theirs().to(dtype)
    model.save_pretrained(tmp_path)
    ours = loaded(tmp_path)
    assert torch.equal(ours.embeddings.word.weight, model.bert.embeddings.word_embeddings.weight.float())


def test_position_ids_of_older_versions_are_left(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "bert.embeddings.position_ids": torch.arange(24)[None]}, path)
    loaded(tmp_path)


@pytest.mark.parametrize("kind", [BertForPreTraining, BertForMaskedLM])
def test_without_next_sentence_its_tensors_may_be_there_or_not(tmp_path: Path, kind: type) -> None:
    model = theirs(kind)
    model.save_pretrained(tmp_path)
    ours = loaded(tmp_path, MASKED_ALONE)
    assert torch.equal(ours.heads.transform.weight, model.cls.predictions.transform.dense.weight)
    assert torch.equal(ours.layers[1].down.bias, model.bert.encoder.layer[1].output.dense.bias)


def test_without_next_sentence_a_tensorflow_checkpoint_is_taken() -> None:
    shape = GOOGLE.model_copy(update={"next_sentence": False})
    ours, whole = loaded(PREFIX, shape), loaded(PREFIX, GOOGLE)
    theirs = dict(whole.named_parameters())
    assert len(theirs) == len(list(ours.parameters())) + 4
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.named_parameters())


@pytest.mark.parametrize("shape", [GOOGLE, GOOGLE.model_copy(update={"next_sentence": False})], ids=["with", "without"])
def test_a_tensorflow_checkpoint_without_next_sentence(monkeypatch: pytest.MonkeyPatch, shape: ModelConfig) -> None:
    def read(self: TensorBundle, prefix: str | Path) -> None:
        whole(self, prefix)
        for name in [name for name in self.entries if "pooler" in name or "seq_relationship" in name]:
            del self.entries[name]

    whole = TensorBundle.__init__
    monkeypatch.setattr(TensorBundle, "__init__", read)
    if shape.next_sentence:
        assert "has no bert.pooler.dense.weight and cls.seq_relationship.weight" in refused(PREFIX, shape)
    else:
        loaded(PREFIX, shape)


def test_google_variables_without_next_sentence() -> None:
    with_, without = (list(google_variables(2, flag)) for flag in (True, False))
    gone = [google for _, google in with_ if (_, google) not in without]
    assert gone == [
        "bert/pooler/dense/kernel", "bert/pooler/dense/bias", "cls/seq_relationship/output_weights",
        "cls/seq_relationship/output_bias",
    ]  # fmt: skip


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_masked_lm_without_next_sentence_prediction_is_named(tmp_path: Path) -> None:
    theirs(BertForMaskedLM).save_pretrained(tmp_path)
    text = refused(tmp_path)
    assert "has no bert.pooler.dense.weight and cls.seq_relationship.weight" in text
    assert "set model.next_sentence=false" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_norm_eps", 1e-5), ("position_embedding_type", "relative_key"), ("position_embedding_type", "relative_key_2"),
        ("is_decoder", True), ("add_cross_attention", True), ("num_attention_heads", 4), ("hidden_act", "relu"),
        ("hidden_act", ["gelu"] * 1000), ("model_type", "roberta"), ("tie_word_embeddings", False),
        ("pruned_heads", {"1": [0]}), ("quantization_config", {"bits": 8}), ("layer_norm_eps", "\x1b[2J"),
        ("num_attention_heads", None), ("layer_norm_eps", 10**400),
    ],
)  # fmt: skip
def test_descriptions_of_other_mathematics(tmp_path: Path, name: str, value: Any) -> None:
    save_pretrained(BertForPretraining(SHAPE), SHAPE, tmp_path)
    loaded(tmp_path)
    describe(tmp_path, **{name: value})
    text = refused(tmp_path)
    assert f"its config.json has {name}=" in text
    assert "\x1b" not in text


def test_every_field_that_changes_the_outputs_of_transformers_is_compared(tmp_path: Path) -> None:
    """Each field of BertConfig in turn: the outputs change exactly for those that are refused, or that shapes show."""
    base = theirs().eval()
    ids = torch.arange(20)[None] + 3
    want = base(ids).prediction_logits
    changes = {
        "layer_norm_eps": 1e-2, "hidden_act": "relu", "num_attention_heads": 4, "is_decoder": True, "initializer_range": 0.3,
        "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "use_cache": False, "pad_token_id": 3,
        "bos_token_id": 1, "eos_token_id": 2, "classifier_dropout": 0.3,
    }  # fmt: skip
    assert set(BertConfig().to_dict()) >= set(changes), "fields of this version"
    for name, value in changes.items():
        model = theirs(**{name: value}).eval()
        model.load_state_dict(base.state_dict())
        folder = tmp_path / name
        model.save_pretrained(folder)
        if torch.allclose(model(ids).prediction_logits, want, atol=1e-5):
            loaded(folder)
        else:
            assert f"{name}=" in refused(folder)


def test_all_differences_are_named_at_once(tmp_path: Path) -> None:
    save_pretrained(BertForPretraining(SHAPE), SHAPE, tmp_path)
    describe(tmp_path, layer_norm_eps=1e-5, is_decoder=True)
    text = refused(tmp_path)
    assert "layer_norm_eps=1e-05" in text
    assert "is_decoder=True" in text


@pytest.mark.parametrize("name", ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"])
def test_a_decoder_of_its_own(tmp_path: Path, name: str) -> None:
    theirs().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    like = weights["bert.embeddings.word_embeddings.weight" if name.endswith("weight") else "cls.predictions.bias"]
    save_file({**weights, name: like + 0.5}, path)
    assert f"has a decoder of its own: {name}" in refused(tmp_path)
    save_file({**weights, name: like[:7].clone()}, path)
    assert f"has a decoder of its own: {name}" in refused(tmp_path)


def test_tensors_without_a_place_are_named(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    name = "bert.encoder.layer.0.attention.self.distance_embedding.weight"
    extra = {f"x\x1b{n}": torch.zeros(1) for n in range(9)}
    save_file({**load_file(path), name: torch.zeros(47, 8), **extra}, path)
    text = refused(tmp_path)
    assert f"no place for: {name}, x\\x1b0" in text
    assert "and 5 more" in text


@pytest.mark.parametrize("shape", [(), (1,), (16,), (40, 16, 1), (1, 40, 16), (0, 16), (16, 40)])
@pytest.mark.parametrize(
    "name", ["embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.key.weight", "pooler.dense.bias"]
)
def test_other_ranks_and_shapes(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    theirs().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    if weights[f"bert.{name}"].shape == shape:
        return
    save_file({**weights, f"bert.{name}": torch.zeros(shape)}, path)
    assert f"is {list(shape)} there and" in refused(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn, torch.complex64])
def test_other_number_formats(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "bert.pooler.dense.weight": torch.zeros(16, 16).to(dtype)}, path)
    assert "bert.pooler.dense.weight is of type" in refused(tmp_path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "pytorch_model.bin is not read" in refused(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 5000, "5", "", "\x00", '{"layer_norm_eps": ' + "1" * 5000 + "}", "[]"]
)
def test_damaged_descriptions(tmp_path: Path, text: str) -> None:
    save_pretrained(BertForPretraining(SHAPE), SHAPE, tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert "config.json is damaged" in refused(tmp_path)


def test_a_description_without_end(tmp_path: Path) -> None:
    save_pretrained(BertForPretraining(SHAPE), SHAPE, tmp_path)
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 40)
    assert "config.json has 1,048,576 MiB" in refused(tmp_path)


def test_a_header_without_end(tmp_path: Path) -> None:
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(1 << 30)
    assert "its header says 90,000,000 bytes" in refused(tmp_path)


# ---- mutations ------------------------------------------------------------------------------------------------------


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, doubled or set to an extreme."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(found))
        kind = rng.randrange(5)
        if kind == 0:
            found[at] = rng.randrange(256)
        elif kind == 1:
            found[at : at + rng.randint(1, 12)] = b"\xff" * rng.randint(1, 12)
        elif kind == 2:
            del found[at : at + rng.randint(1, 40)]
        elif kind == 3:
            found[at:at] = found[at : at + rng.randint(1, 40)]
        else:
            found[at : at + 8] = struct.pack("<Q", rng.choice([0, 1 << 31, 1 << 62, (1 << 64) - 1]))
        if not found:
            return b""
    return bytes(found)


def test_mutated_safetensors(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    data, rng = path.read_bytes(), random.Random(11)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    said = []
    for _ in range(200):
        path.write_bytes(mutated(data[:header], rng) + data[header:])
        try:
            loaded(tmp_path)
        except UserError as error:
            said.append(len(str(error)))
    assert said
    assert max(said) < 1200


@pytest.mark.parametrize("seed", range(2))
def test_mutated_bundles(tmp_path: Path, seed: int) -> None:
    shutil.copy(f"{PREFIX}.data-00000-of-00001", tmp_path)
    data, rng = Path(f"{PREFIX}.index").read_bytes(), random.Random(seed)
    said = []
    for _ in range(200):
        (tmp_path / "model.ckpt-7.index").write_bytes(mutated(data, rng))
        try:
            loaded(tmp_path / "model.ckpt-7", GOOGLE)
            found = TensorBundle(tmp_path / "model.ckpt-7")
            for name in found.entries:
                found[name]
        except UserError as error:
            said.append(len(str(error)))
    assert said
    assert max(said) < 1200


# ---- TensorFlow -----------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def block(entries: list[tuple[bytes, bytes]]) -> bytes:
    """A table's block without shared prefixes, its kind and a checksum that nobody reads."""
    body = b"".join(b"\0" + varint(len(key)) + varint(len(value)) + key + value for key, value in entries)
    return body + struct.pack("<II", 0, 1) + bytes(5)


def bundle(folder: Path, shape: list[int], offset: int, size: int, kind: int = 1, data: bytes = bytes(256)) -> Path:
    """A checkpoint with one tensor `a`."""
    dims = b"".join(b"\x12" + varint(len(d)) + d for d in (b"\x08" + varint(n % 2**64) for n in shape))
    entry = b"\x08" + varint(kind) + b"\x12" + varint(len(dims)) + dims
    entry += b"\x20" + varint(offset % 2**64) + b"\x28" + varint(size % 2**64)
    first = block([(b"", b"\x08\x01"), (b"a", entry)])
    index = block([(b"b", varint(0) + varint(len(first) - 5))])
    footer = varint(0) * 2 + varint(len(first)) + varint(len(index) - 5)
    table = first + index + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    (folder / "x.index").write_bytes(table)
    (folder / "x.data-00000-of-00001").write_bytes(data)
    return folder / "x"


def test_a_made_bundle_is_read(tmp_path: Path) -> None:
    found = TensorBundle(bundle(tmp_path, [2, 3], 4, 24, data=struct.pack("<7f", 9, 0, 1, 2, 3, 4, 5)))
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("shape", "offset", "size", "kind"),
    [
        ([2, 3], 4, 25, 1), ([2, 3], 0, 4, 1), ([-1], 0, 4, 1), ([2**62], 0, 2**64 - 4, 1), ([2**40, 2**40], 0, 16, 1),
        ([4], 2**63 - 1, 16, 1), ([4], -1, 16, 1), ([4], 250, 16, 1), ([1] * 70, 0, 4, 1), ([4], 0, 16, 7), ([4], 0, 16, 0),
        ([2**50], 0, 2**52, 1), ([3], 0, 12, 2),
    ],
)  # fmt: skip
def test_shapes_and_offsets_of_bundles(tmp_path: Path, shape: list[int], offset: int, size: int, kind: int) -> None:
    with pytest.raises(UserError) as caught:
        TensorBundle(bundle(tmp_path, shape, offset, size, kind))["a"]
    assert len(str(caught.value)) < 600


def test_an_index_without_end(tmp_path: Path) -> None:
    with open(tmp_path / "x.index", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"x\.index has 1,048,576 MiB.* at most 16 MiB"):
        TensorBundle(tmp_path / "x")


def test_variables_that_bert_has_not_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TensorBundle.__init__

    def with_another(self: TensorBundle, prefix: str | Path) -> None:
        real(self, prefix)
        self.entries["bert/encoder/layer_0/attention/self/relative_bias"] = self.entries["bert/pooler/dense/bias"]

    loaded(PREFIX, GOOGLE)
    monkeypatch.setattr(TensorBundle, "__init__", with_another)
    assert "no place for: bert/encoder/layer_0/attention/self/relative_bias" in refused(PREFIX, GOOGLE)


@pytest.mark.parametrize("values", [{"num_attention_heads": 4}, {"hidden_act": "relu"}])
def test_googles_description_beside_the_files(tmp_path: Path, values: dict[str, Any]) -> None:
    for path in PREFIX.parent.glob("model.ckpt-7.*"):
        shutil.copy(path, tmp_path)
    good = {"num_attention_heads": 2, "hidden_act": "gelu"}
    (tmp_path / "bert_config.json").write_text(json.dumps(good))
    for shape in (GOOGLE, SHAPE):  # its gelu has been taken for both
        loaded(tmp_path / "model.ckpt-7", shape)
    (tmp_path / "bert_config.json").write_text(json.dumps({**good, **values}))
    assert f"bert_config.json has {next(iter(values))}=" in refused(tmp_path / "model.ckpt-7", GOOGLE)
