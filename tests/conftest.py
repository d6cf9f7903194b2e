"""Shared fixtures: a tiny vocabulary, tiny stores of made-up samples, a tiny config. No network, no installed corpus.

`make_config("batch.gradient_accumulation_steps=2", ...)`  a small valid Config with dotted overrides
`stores`                                    folder with train/ and eval/ stores, written once a session
`vocab_file`, `vocabulary`                  64 tokens: special tokens, letters, a few words
`environment`                               rank 0 of 1 on the CPU in fp32
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bert_fast.config import Config
from bert_fast.config.load import config_from_tree
from bert_fast.data.samples import SampleParams, make_samples
from bert_fast.data.store import merge_parts, write_part
from bert_fast.data.wordpiece import SPECIAL_TOKENS, Vocabulary, load_vocabulary
from bert_fast.train.environment import Environment

with contextlib.suppress(ImportError):  # the GPU tests also run in images without it
    import hypothesis

    # The same examples in every run: a failure in CI is a failure on the desk.
    hypothesis.settings.register_profile("bert_fast", deadline=None, derandomize=True, database=None, max_examples=60)
    hypothesis.settings.load_profile("bert_fast")

WORDS = ("the", "of", "returns", "tensor", "input", "a", "is", "shape")
TOKENS = (*SPECIAL_TOKENS, *WORDS, *"bcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"))


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed() -> Iterator[None]:
    """Tiny tensors are faster on one thread, and no test depends on which one ran before it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def vocab_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("".join(f"{token}\n" for token in TOKENS), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def vocabulary(vocab_file: Path) -> Vocabulary:
    return load_vocabulary(vocab_file)


@pytest.fixture(scope="session")
def make_documents() -> Callable[..., list[list[list[int]]]]:
    """`make_documents(count, seed)`: documents of 4 to 12 sentences of 3 to 14 ordinary tokens, following a pattern."""

    def make(count: int, seed: int = 0) -> list[list[list[int]]]:
        rng = random.Random(seed)
        documents = []
        for _ in range(count):
            document = []
            for _ in range(rng.randint(4, 12)):
                token = rng.randrange(5, len(TOKENS))
                sentence = []
                for _ in range(rng.randint(3, 14)):
                    sentence.append(
                        token
                    )  # the next token nearly follows from this one, so that there is something to learn
                    token = 5 + (3 * token + (rng.random() < 0.2)) % (len(TOKENS) - 5)
                document.append(sentence)
            documents.append(document)
        return documents

    return make


@pytest.fixture(scope="session")
def write_store(vocabulary: Vocabulary, make_documents: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """`write_store(folder, num_documents, seed)` makes a store of made-up samples; returns its manifest."""

    def write(folder: Path, num_documents: int = 60, seed: int = 0, max_seq_len: int = 32) -> dict[str, Any]:
        params = SampleParams(max_seq_len=max_seq_len, max_predictions=8, dupe_factor=2, seed=seed)
        samples = make_samples(make_documents(num_documents, seed), vocabulary, params, chunk=0)
        folder.mkdir(parents=True, exist_ok=True)
        part = write_part(folder / "part.bin", samples)
        extra = {
            "vocab_sha256": vocabulary.sha256,
            "vocab_size": len(vocabulary),
            "mask_id": 4,
            "text_sha256": "0" * 64,
        }
        manifest = merge_parts(folder, [part], extra)
        (folder / "part.bin").unlink()
        (folder / "part.bin.npz").unlink()
        return manifest

    return write


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory, write_store: Callable[..., dict[str, Any]]) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    write_store(folder / "train", num_documents=60, seed=0)
    write_store(folder / "eval", num_documents=12, seed=1)
    return folder


@pytest.fixture
def make_config(stores: Path, tmp_path: Path) -> Callable[..., Config]:
    """`make_config("section.field=value", ...)`: 2 layers x 16, batch 8, one rank on the CPU in fp32, tiny stores."""

    def make(*overrides: str) -> Config:
        tree: dict[str, dict[str, Any]] = {
            "run": {"folder": str(tmp_path / "run"), "tensorboard": False, "measure_peak_flops": False},
            "model": {
                "vocab_size": len(TOKENS), "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32,
                "max_positions": 32, "hidden_dropout": 0.0, "attention_dropout": 0.0, "initializer_range": 0.1,
            },
            "data": {"train": str(stores / "train"), "max_seq_len": 32},
            "batch": {"global_batch_size": 8, "micro_batch_size": 8},
            "optimizer": {"name": "adamw", "lr": 0.001},
            "schedule": {"warmup_steps": 2, "total_steps": 100},
            "train": {"max_steps": 6, "precision": "fp32", "warmup_batches": 1},
            "evaluation": {"data": str(stores / "eval"), "every_samples": 32, "batch_size": 16},
            "system": {"device": "cpu", "bind_cores": False},
            "mlperf": {"enabled": False},
        }  # fmt: skip
        for override in overrides:
            path, _, text = override.partition("=")
            section, field = path.split(".")
            tree.setdefault(section, {})[field] = yaml.safe_load(text)
        return config_from_tree(tree)

    return make


@pytest.fixture
def environment() -> Environment:
    return Environment(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float32)
