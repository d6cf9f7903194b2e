"""What a preparation of pairs makes: every option of scripts/prepare_pairs.py as a typed field with bounds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from bert_fast.config import Section
from bert_fast.config.choices import CORPORA, PAIR_SOURCES, find
from bert_fast.config.section import Seed, Tokens
from bert_fast.config.yaml_files import read_yaml, validate
from bert_fast.data import corpus as corpora
from bert_fast.data.corpora.base import AUTO
from bert_fast.data.pairs.sources.base import PairReader, SourceOptions
from bert_fast.data.recipe import Package, Share, Text
from bert_fast.errors import UserError


class PairRecipe(Section):
    """The fields of a recipe, named as the command's flags with underscores; `--help` explains them."""

    source: list[Text] = Field([], max_length=10_000)
    weight: list[Text] = Field([], max_length=10_000)
    query_column: Text = "query"
    positive_column: Text = "positive"
    negatives: Annotated[int, Field(ge=0, le=10_000)] | None = None
    column: Text = "text"
    language: Annotated[str, Field(pattern=r"^([a-z]{2,3}(-[A-Za-z0-9-]+)?|auto)$")] = AUTO
    packages: list[Package] = Field(list(corpora.PYDOCS_PACKAGES), min_length=1, max_length=1000)
    unit: Literal["sentence", "document"] = "sentence"
    passage_words: Annotated[int, Field(ge=2, le=65_535)] = 100
    out: Text = "data/pairs"
    vocab: Text | None = None
    cased: bool | None = None
    max_unknown: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.05
    max_seq_len: Annotated[Tokens, Field(ge=3)] = 128
    query_prefix: str = ""
    key_prefix: str = ""
    eval_fraction: Share = 0.02
    seed: Seed = 12345
    workers: Annotated[int, Field(ge=1, le=1024)] | None = None

    def sources(self) -> list[SourceOptions]:
        """The sources in the order in which they are given.

        Raises:
            UserError: none is given, one is not NAME=KIND:PATH, of a kind that there is none of, or called as another.
        """
        if not self.source:
            raise UserError(
                f"no source of pairs; give --source NAME=KIND:PATH, with a kind of {', '.join(PAIR_SOURCES)}"
            )
        found = [self._source(text) for text in self.source]
        names = [source.name for source in found]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise UserError(f"--source {twice}: two sources have this name; give each its own")
        return found

    def weights(self, names: list[str]) -> dict[str, float] | None:
        """The weight of each source by its name; None if none is given.

        Raises:
            UserError: one is not NAME=NUMBER with a number above 0, or is of no source; or some sources have none.
        """
        found: dict[str, float] = {}
        for text in self.weight:
            name, _, value = text.rpartition("=")
            if name not in names:
                raise UserError(
                    f"--weight {text}: no source is called {name!r}; give NAME=NUMBER with one of {', '.join(names)}"
                )
            try:
                found[name] = float(value)
            except ValueError:
                found[name] = math.nan
            if not (0 < found[name] < 1e12):
                raise UserError(f"--weight {text}: a weight is a number above 0")
        without = [name for name in names if name not in found]
        if found and without:
            raise UserError(f"--weight: {', '.join(without)} has none; give one for every source, or for none")
        return found or None

    def _source(self, text: str) -> SourceOptions:
        name, equals, rest = text.partition("=")
        kind, colon, path = rest.partition(":")
        if not (name and equals and kind):
            raise UserError(f"--source {text}: give NAME=KIND:PATH, with a kind of {', '.join(PAIR_SOURCES)}")
        if kind not in PAIR_SOURCES:
            raise UserError(f"--source {text}: there is no kind {kind}; the kinds are {', '.join(PAIR_SOURCES)}")
        takes = find_reader(kind).takes
        corpus = None
        if takes == "corpus":
            corpus, colon, path = path.partition(":")
            if corpus not in CORPORA:
                raise UserError(
                    f"--source {text}: there is no corpus {corpus!r}; give {name}={kind}:CORPUS:PATH with one of "
                    f"{', '.join(CORPORA)}"
                )
        reads_packages = takes == "packages" or (corpus is not None and corpora.find_corpus(corpus).reads_packages)
        known = f"{name}={kind}" + (f":{corpus}" if corpus else "")
        if reads_packages and colon:
            raise UserError(f"--source {text}: it reads packages (--packages) and no path; give {known}")
        if not reads_packages and not path:
            raise UserError(f"--source {text}: a path is missing; give {known}:PATH")
        if corpus and path and not Path(path).exists():
            raise UserError(f"--source {text}: {path} does not exist")
        return SourceOptions(
            name,
            kind,
            corpus,
            path or None,
            self.query_column,
            self.positive_column,
            self.column,
            tuple(self.packages),
            self.language,
            self.unit,
            self.passage_words,
            self.seed,
        )


def find_reader(kind: str) -> PairReader:
    """The reader of a kind of `PAIR_SOURCES`."""
    reader: PairReader = find(PAIR_SOURCES, kind)
    return reader


def read_pair_recipe(path: str | Path) -> PairRecipe:
    """Read a recipe file.

    Raises:
        UserError: the file is missing, empty or not YAML, or has an unknown field or a wrong value; the field is named.
    """
    tree = read_yaml(path, "recipe", f"fields ({', '.join(PairRecipe.model_fields)})", "configs/data/pydocs_pairs.yaml")
    if not tree:
        raise UserError(f"recipe {path} is empty; configs/data/pydocs_pairs.yaml is an example")
    return validate(PairRecipe, tree, f"recipe {path}")
