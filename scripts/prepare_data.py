#!/usr/bin/env python3
"""Make the stores of samples that run_pretraining.py reads.

python scripts/prepare_data.py --out data/pydocs                      # embedded corpus, new vocabulary
python scripts/prepare_data.py --recipe configs/data/pydocs_mini.yaml --out data/pydocs-mini
python scripts/prepare_data.py --corpus prose --input books/ --out data/books --vocab vocab.txt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bert_fast.data.corpus import PYDOCS_PACKAGES
from bert_fast.data.prepare import Recipe, prepare
from bert_fast.data.samples import SampleParams
from bert_fast.data.store import Store
from bert_fast.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command; a recipe file sets the same names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = SampleParams()
    add = parser.add_argument
    add("--recipe", metavar="FILE", help="YAML file that sets any of these options; flags go before it")
    add("--corpus", choices=("pydocs", "prose", "mlcommons"), default="pydocs", help="kind of text (docs/data.md)")
    add("--input", metavar="FOLDER", help="folder of text files (prose, mlcommons)")
    add("--packages", nargs="+", default=list(PYDOCS_PACKAGES), help="packages whose documentation pydocs reads")
    add("--out", metavar="FOLDER", default="data/pydocs", help="gets vocab.txt, train/ and eval/ (default %(default)s)")
    add("--vocab", metavar="FILE", help="a BERT vocab.txt; one is trained if not given")
    add("--vocab-size", type=int, default=2048, help="size of a trained vocabulary (default %(default)s)")
    add("--max-seq-len", type=int, default=defaults.max_seq_len, help="tokens of the longest sample")
    add("--max-predictions", type=int, default=defaults.max_predictions, help="most masked tokens of a sample")
    add("--mask-prob", type=float, default=defaults.mask_prob, help="share of tokens that are predicted")
    add("--short-seq-prob", type=float, default=defaults.short_seq_prob, help="share of samples made short on purpose")
    add("--dupe-factor", type=int, default=defaults.dupe_factor, help="passes over the text with new masks")
    add("--seed", type=int, default=defaults.seed, help="of everything random")
    add("--eval-fraction", type=float, default=0.02, help="share of documents held out")
    add("--eval-max-samples", type=int, help="keep only the first n evaluation samples")
    add("--workers", type=int, help="processes (default: all cores)")
    add("--verify", action="store_true", help="only compare the stores in --out with their hashes")
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """Flags over the recipe file over defaults. Raises UserError for a bad recipe."""
    parser = build_parser()
    recipe = parser.parse_args(arguments).recipe
    if recipe:
        path = Path(recipe)
        if not path.is_file():
            raise UserError(f"recipe {recipe} does not exist; configs/data/ holds the shipped ones")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        known = vars(parser.parse_args([]))
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise UserError(f"recipe {recipe}: unknown field {unknown[0]}; known: {', '.join(sorted(known))}")
        parser.set_defaults(**values)
    return parser.parse_args(arguments)


def main() -> int:
    try:
        args = parse(sys.argv[1:])
        if args.verify:
            for split in ("train", "eval"):
                Store(Path(args.out) / split).verify()
            print(f"{args.out}: both stores are intact")
            return 0
        params = SampleParams(
            args.max_seq_len, args.max_predictions, args.mask_prob, args.short_seq_prob, args.dupe_factor, args.seed
        )
        recipe = Recipe(
            args.corpus, args.input, tuple(args.packages), args.vocab, args.vocab_size, args.eval_fraction,
            args.eval_max_samples, params,
        )  # fmt: skip
        prepare(recipe, args.out, args.workers, log=lambda line: print(line, flush=True))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
