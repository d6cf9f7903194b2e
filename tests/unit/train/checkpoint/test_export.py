"""The final model's folder through transformers: the tokens of the store, cased or not, and no .bin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertForPreTraining, pipeline

from bert_fast.config import Config
from bert_fast.data.tokenizer_files import tokenizer_files
from bert_fast.data.wordpiece import SPECIAL_TOKENS, WordPiece, load_vocabulary
from bert_fast.model.bert import BertForPretraining
from bert_fast.train.checkpoint.export import export_model

WORDS = (
    "the",
    "The",
    "cat",
    "Cat",
    "##s",
    "sat",
    "café",
    "cafe",
    "a",
    "##a",
    "中",
    "国",
    ".",
    "!",
    "[",
    "]",
    "mask",
    "MASK",
)
TEXTS = ("The cats SAT.", "Café cafe!", "中国 cat", "xyz the", "cat\tsat\u00a0cats", "[ MASK ]", "a" * 90, "a" * 300)


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    path = tmp_path / "data/vocab.txt"
    path.parent.mkdir()
    path.write_text("".join(f"{token}\n" for token in (*SPECIAL_TOKENS, *WORDS)), encoding="utf-8")
    return path


@pytest.fixture
def exported(make_config: Callable[..., Config], vocab: Path, tmp_path: Path) -> Callable[..., Path]:
    """`exported(**normalization)`: the folder of a model whose store was made with the vocabulary."""

    def export(**normalization: Any) -> Path:
        config = make_config(f"data.train={vocab.parent}/train", "model.vocab_size=32")
        said: list[str] = []
        manifest = {"vocab_sha256": load_vocabulary(vocab).sha256, **normalization}
        export_model(BertForPretraining(config.model), config, manifest, tmp_path / "model", said.append)
        assert said == []
        return tmp_path / "model"

    return export


def test_tokens_are_those_of_the_store(exported: Callable[..., Path], vocab: Path) -> None:
    folder = exported()
    assert not list(folder.glob("*.bin"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wordpiece = WordPiece(vocab)
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == wordpiece.encode([text])[0], text
    assert len(tokenizer) == len(load_vocabulary(vocab))
    assert tokenizer.model_max_length == 32
    assert [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id] == [0, 1, 2]
    pair = tokenizer("the cat", "sat")
    the, cat, sat = (load_vocabulary(vocab).tokens.index(word) for word in ("the", "cat", "sat"))
    assert pair["input_ids"] == [2, the, cat, 3, sat, 3]
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert tokenizer.decode([2, the, cat, cat + 2, 3], skip_special_tokens=True) == "the cats"


@pytest.mark.parametrize(
    ("lowercase", "strip_accents", "words"),
    [(True, True, ["the", "cafe"]), (False, False, ["The", "café"]), (True, False, ["the", "café"])],
)
def test_case_is_that_of_the_stores_manifest(
    exported: Callable[..., Path], lowercase: bool, strip_accents: bool, words: list[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported(lowercase=lowercase, strip_accents=strip_accents))
    text = "The Café" if lowercase else "The café"
    assert tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"]) == words


def test_fill_mask(exported: Callable[..., Path]) -> None:
    folder = exported()
    found = pipeline("fill-mask", model=str(folder), tokenizer=str(folder), device="cpu")("The [MASK] sat.", top_k=3)
    assert len(found) == 3
    tokens = (*SPECIAL_TOKENS, *WORDS)
    for one in found:
        assert one["token"] >= len(tokens) or one["token_str"] in (tokens[one["token"]], "")
        assert one["sequence"].lower().startswith("the")
    assert BertForPreTraining.from_pretrained(folder).config.vocab_size == 32


def test_without_the_vocabulary_it_is_said_where_it_was_looked_for(
    make_config: Callable[..., Config], vocab: Path, tmp_path: Path
) -> None:
    """Another vocabulary beside the store is not taken."""
    config = make_config(f"data.train={vocab.parent}/train")
    said: list[str] = []
    model = BertForPretraining(config.model)
    export_model(model, config, {"vocab_sha256": "0" * 64}, tmp_path / "model", said.append)
    assert len(said) == 1
    assert f"none of {vocab.parent}/train/vocab.txt, {vocab}" in said[0]
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}


def test_words_as_long_as_the_store_takes(vocab: Path) -> None:
    files = tokenizer_files(vocab, 512, {})
    assert set(files) == {"vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert files["vocab.txt"] == vocab.read_text(encoding="utf-8")


def test_the_tokenizers_file_knows_the_special_tokens_by_itself(vocab: Path) -> None:
    """For programs that read tokenizer.json alone."""
    tokenizer = Tokenizer.from_str(tokenizer_files(vocab, 512, {})["tokenizer.json"])
    assert tokenizer.encode("[MASK]").ids == [2, 4, 3]
    assert tokenizer.decode([2, 4, 3]) == ""
