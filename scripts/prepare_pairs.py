#!/usr/bin/env python3
"""Make the stores of pairs of texts that contrastive training reads (train.objective=contrastive).

python scripts/prepare_pairs.py --recipe configs/data/pydocs_pairs.yaml --out data/pydocs-pairs
python scripts/prepare_pairs.py --source nq=jsonl:nq.jsonl.gz --source qa=parquet:qa/ --weight nq=1 --weight qa=3 \\
    --negatives 1 --vocab vocab.txt --query-prefix "query: " --key-prefix "passage: " --out data/retrieval
python scripts/prepare_pairs.py --source wiki=inverse_cloze:wikiextractor:extracted/ --vocab vocab.txt --out data/cloze
python scripts/prepare_pairs.py --source books=dropout:prose:books/ --vocab vocab.txt --out data/simcse
python scripts/prepare_pairs.py --source docs=docstrings --packages numpy --vocab vocab.txt --out data/docs
"""

from __future__ import annotations

import argparse
import sys

import guard  # noqa: F401

from bert_fast.command import guarded
from bert_fast.config.choices import CORPORA, PAIR_SOURCES
from bert_fast.config.yaml_files import validate
from bert_fast.data.corpora.base import AUTO
from bert_fast.data.pairs.prepare import prepare_pairs
from bert_fast.data.pairs.recipe import PairRecipe, read_pair_recipe


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command; a recipe file sets the same names."""
    kinds = "\n".join(f"  {name:<14} {entry.what}" for name, entry in PAIR_SOURCES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nkinds of sources:\n{kinds}\ncorpora: {', '.join(CORPORA)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, default = parser.add_argument, PairRecipe()
    add("--recipe", metavar="FILE", help="YAML file that sets any of these options; flags go before it")
    add(
        "--source",
        action="append",
        metavar="NAME=KIND:PATH",
        help="may be given again; NAME=KIND:CORPUS:PATH for one that reads a corpus, NAME=KIND for one that reads packages",
    )
    add(
        "--weight",
        action="append",
        metavar="NAME=NUMBER",
        help="of a source in the draw, for every source (default: its number of pairs)",
    )
    add("--query-column", default=default.query_column, help="column or field of queries (default %(default)s)")
    add("--positive-column", default=default.positive_column, help="of positives (default %(default)s)")
    add(
        "--negatives",
        type=int,
        metavar="N",
        help="hard negatives of each pair: the first N of columns negative, negative_1, ... or of the list in column "
        "negatives (default: all, and every pair must have as many)",
    )
    add("--column", default=default.column, help="column or field of a corpus's text (default %(default)s)")
    add("--language", default=AUTO, help="code of the rules that end sentences (default: told by each text)")
    add("--packages", nargs="+", default=default.packages, help="packages that docstrings and pydocs read")
    add("--unit", choices=("sentence", "document"), default=default.unit, help="of dropout (default %(default)s)")
    add("--passage-words", type=int, default=default.passage_words, help="of inverse_cloze (default %(default)s)")
    add("--out", metavar="FOLDER", default=default.out, help="gets train/, eval/, vocab.txt (default %(default)s)")
    add("--vocab", metavar="FILE", help="a BERT vocab.txt, such as that of a prepared folder")
    add("--cased", action=argparse.BooleanOptionalAction, help="keep case (default: as the vocabulary has it)")
    add("--max-unknown", type=float, default=default.max_unknown, help="most unknown words, a share (%(default)s)")
    add(
        "--max-seq-len",
        type=int,
        default=default.max_seq_len,
        help="tokens of a text; a longer one is cut (%(default)s)",
    )
    add("--query-prefix", default="", help="stands before each query, with its blank at the end")
    add("--key-prefix", default="", help="stands before each positive and negative")
    add("--eval-fraction", type=float, default=default.eval_fraction, help="share held out (default %(default)s)")
    add("--seed", type=int, default=default.seed, help="of the held-out share and of inverse_cloze")
    add("--workers", type=int, help="processes (default: all cores)")
    return parser


def parse(arguments: list[str]) -> PairRecipe:
    """Flags over the recipe file over defaults. Raises UserError naming the recipe and the field, or the option."""
    parser = build_parser()
    recipe = parser.parse_args(arguments).recipe
    values = vars(parser.parse_args(arguments))
    if recipe:
        given = read_pair_recipe(recipe).model_dump(exclude_unset=True)
        lists = {name: given.pop(name) for name in ("source", "weight") if name in given}  # flags replace, not append
        parser.set_defaults(**given)
        values = {**vars(parser.parse_args(arguments))}
        values |= {name: value for name, value in lists.items() if values[name] is None}
    return validate(
        PairRecipe, {name: value for name, value in values.items() if name != "recipe" and value is not None}, "options"
    )


def log(line: str) -> None:
    """A line of progress."""
    print(line, flush=True)


@guarded
def main() -> int:
    prepare_pairs(parse(sys.argv[1:]), log=log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
