"""The final model as a folder that transformers opens: weights, description, tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bert_fast.config import Config
from bert_fast.data.tokenizer_files import tokenizer_files
from bert_fast.data.wordpiece import load_vocabulary
from bert_fast.errors import UserError
from bert_fast.files import write_atomically, write_json
from bert_fast.model.checkpoints import save_encoder, save_pretrained
from bert_fast.model.tensorflow_bundle import is_bundle


def export_model(
    model: torch.nn.Module, config: Config, manifest: dict[str, Any], folder: Path, log: Callable[[str], None]
) -> None:
    """Write `folder`. The tokenizer is that of the training store, whose `manifest` names the vocabulary by its hash.

    Without that vocabulary on disk the model is written alone, and the places where it was looked for are logged.
    """
    save_pretrained(model, config.model, folder)
    _write_tokenizer(config, manifest, folder, log)


def export_embedding_model(
    model: torch.nn.Module, config: Config, manifest: dict[str, Any], folder: Path, log: Callable[[str], None]
) -> None:
    """Write `folder` as sentence-transformers has it: an encoder, how its states are pooled, and that they are normalized.

    `SentenceTransformer(folder)` gives the embeddings of the run's evaluation, with the prompts of the training store.
    """
    width, pooling = config.model.hidden_size, config.contrastive.pooling
    prefixes = manifest.get("prefixes", {})
    save_encoder(model, config.model, folder)
    _write_tokenizer(config, manifest, folder, log)
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
    write_json(
        folder / "modules.json",
        [
            {"idx": int(name), "name": name, "path": path, "type": f"sentence_transformers.models.{kind}"}
            for name, path, kind in modules
        ],
    )
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            "include_prompt": True,
        },
    )
    write_json(folder / "2_Normalize" / "config.json", {})
    longest = int(manifest.get("max_text_length", config.data.max_seq_len))
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": {"query": prefixes.get("query", ""), "document": prefixes.get("key", "")},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )


def _write_tokenizer(config: Config, manifest: dict[str, Any], folder: Path, log: Callable[[str], None]) -> None:
    """The files of the training store's tokenizer, if its vocabulary is found."""
    places = _places(config)
    vocabulary = next((path for path in places if _has_hash(path, manifest["vocab_sha256"])), None)
    if vocabulary is None:
        log(
            f"warning: {folder} has no tokenizer: the store's vocabulary ({manifest['vocab_sha256'][:16]}...) is in none "
            f"of {', '.join(map(str, places))}; copy its vocab.txt into {folder}"
        )
        return
    for name, content in tokenizer_files(vocabulary, config.model.max_positions, manifest).items():
        write_atomically(folder / name, content)


def _places(config: Config) -> list[Path]:
    """Where the vocabulary lies: in the store, beside it, beside the starting checkpoint."""
    folders = [Path(config.data.train), Path(config.data.train).parent]
    if config.checkpoint.init_from:
        start = Path(config.checkpoint.init_from)
        folders.append(start.parent if is_bundle(start) else start)
    return [folder / "vocab.txt" for folder in folders]


def _has_hash(path: Path, sha256: str) -> bool:
    try:
        return path.is_file() and load_vocabulary(path).sha256 == sha256
    except UserError:  # of something else
        return False
