#!/usr/bin/env python3
"""Make the stores of samples that run_pretraining.py reads.

python scripts/prepare_data.py --out data/pydocs                      # embedded corpus, new vocabulary
python scripts/prepare_data.py --recipe configs/data/pydocs_mini.yaml --out data/pydocs-mini
python scripts/prepare_data.py --corpus prose --input books/ --out data/books --vocab vocab.txt
python scripts/prepare_data.py --corpus mlcommons --input results/ --out data/wiki --vocab vocab.txt --eval-max-samples 10000 \\
    --eval-pick evenly                                                # MLCommons' text, its eval.txt for evaluation
python scripts/prepare_data.py --corpus mediawiki --input enwiki-pages-articles.xml.bz2 --out data/wiki --vocab vocab.txt
python scripts/prepare_data.py import --input tfrecords/ --out data/mlperf/train --vocab vocab.txt   # or HDF5 files
python scripts/prepare_data.py export --input data/mlperf/eval --out eval_tfrecords/ --form tfrecord
python scripts/prepare_data.py verify data/mlperf
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import guard  # noqa: F401

from bert_fast.command import guarded, whole
from bert_fast.config.choices import CORPORA
from bert_fast.config.yaml_files import validate
from bert_fast.data.corpora.base import AUTO
from bert_fast.data.corpus import PYDOCS_PACKAGES
from bert_fast.data.folders import SPLITS
from bert_fast.data.formats.convert import FORMS, export_store, find_sources, import_store
from bert_fast.data.prepare import PICKS, Recipe, prepare
from bert_fast.data.recipe import RecipeFile, read_recipe
from bert_fast.data.samples import SampleParams
from bert_fast.data.store import Store
from bert_fast.data.verify import check_hashes, verify_store
from bert_fast.data.wordpiece import load_vocabulary
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.report.bench import markdown_table


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command; a recipe file sets the same names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = SampleParams()
    add = parser.add_argument
    add("--recipe", metavar="FILE", help="YAML file that sets any of these options; flags go before it")
    add("--corpus", choices=CORPORA, default="pydocs", help="kind of text (docs/data.md)")
    add("--input", metavar="FOLDER", help="folder of text files, or one file")
    add(
        "--eval-input",
        metavar="FOLDER",
        help="text of the evaluation split, in place of --eval-fraction of the documents",
    )
    add("--column", default="text", help="column of text in parquet, field in jsonl (default %(default)s)")
    add(
        "--language",
        default=AUTO,
        help="code (en, de, zh) of the rules that end sentences (default: told by each text)",
    )
    add("--packages", nargs="+", default=list(PYDOCS_PACKAGES), help="packages whose documentation pydocs reads")
    add("--out", metavar="FOLDER", default="data/pydocs", help="gets vocab.txt, train/ and eval/ (default %(default)s)")
    add("--vocab", metavar="FILE", help="a BERT vocab.txt; one is trained if not given")
    add("--vocab-size", type=int, default=2048, help="size of a trained vocabulary (default %(default)s)")
    add("--max-seq-len", type=int, default=defaults.max_seq_len, help="tokens of the longest sample")
    add("--max-predictions", type=int, default=defaults.max_predictions, help="most masked tokens of a sample")
    add("--mask-prob", type=float, default=defaults.mask_prob, help="share of tokens that are predicted")
    add(
        "--short-seq-prob", type=float, default=defaults.short_seq_prob, help="share of documents made short on purpose"
    )
    add("--dupe-factor", type=int, default=defaults.dupe_factor, help="passes over the text with new masks")
    add("--seed", type=int, default=defaults.seed, help="of everything random")
    add("--eval-fraction", type=float, default=0.02, help="share of documents held out")
    add("--eval-max-samples", type=int, help="keep only the first n evaluation samples")
    add("--cased", action=argparse.BooleanOptionalAction, help="keep case (default: as the vocabulary has it)")
    add("--max-unknown", type=float, default=0.05, help="most unknown words, a share (default %(default)s)")
    add(
        "--eval-pick",
        choices=PICKS,
        default="first",
        help="which: the first, or evenly spread ones as MLPerf's reference",
    )
    add("--workers", type=int, help="processes (default: all cores)")
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """Flags over the recipe file over defaults. Raises UserError naming the recipe and the field, or the option."""
    parser = build_parser()
    recipe = parser.parse_args(arguments).recipe
    if recipe:
        parser.set_defaults(**read_recipe(recipe).model_dump(exclude_unset=True))
    args = parser.parse_args(arguments)
    validate(RecipeFile, {name: value for name, value in vars(args).items() if name != "recipe"}, "options")
    return args


def log(line: str) -> None:
    """A line of progress."""
    print(line, flush=True)


def import_samples(arguments: list[str]) -> None:
    """`import`: files of samples into one store."""
    parser = argparse.ArgumentParser("prepare_data.py import", description=import_samples.__doc__)
    parser.add_argument(
        "--input", required=True, help="folder of TFRecord or HDF5 files (their order is that of samples), or one"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the store")
    parser.add_argument("--vocab", required=True, metavar="FILE", help="the vocab.txt that the samples were made with")
    parser.add_argument(
        "--max-samples", type=whole(1, 10**12), help="only the first n (MLPerf's evaluation set: 10000)"
    )
    parser.add_argument("--pick", choices=PICKS, default="first", help="which: the first, or evenly spread ones")
    parser.add_argument("--workers", type=whole(1, 1024), help="processes (default: all cores)")
    args = parser.parse_args(arguments)
    if args.pick != "first" and not args.max_samples:
        raise UserError(f"--pick {args.pick} needs --max-samples, the number of samples to pick")
    sources = find_sources(args.input)
    import_store(
        sources, args.out, args.vocab, max_samples=args.max_samples, pick=args.pick, num_workers=args.workers, log=log
    )


def export_samples(arguments: list[str]) -> None:
    """`export`: a store into files of samples in a form that others read."""
    parser = argparse.ArgumentParser("prepare_data.py export", description=export_samples.__doc__)
    parser.add_argument("--input", required=True, metavar="STORE", help="folder with manifest.json")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="gets part-00000-of-00010.tfrecord and so on")
    parser.add_argument("--form", choices=FORMS, default="tfrecord", help="default %(default)s")
    parser.add_argument(
        "--max-seq-len", type=whole(5, 65_535), default=512, help="tokens of a row (default %(default)s)"
    )
    parser.add_argument(
        "--max-predictions", type=whole(1, 65_535), default=76, help="masks of a row (default %(default)s)"
    )
    parser.add_argument(
        "--per-file", type=whole(1, 10**9), default=100_000, help="samples of a file (default %(default)s)"
    )
    args = parser.parse_args(arguments)
    export_store(
        args.input,
        args.out,
        args.form,
        width=args.max_seq_len,
        most_masked=args.max_predictions,
        per_file=args.per_file,
        log=log,
    )


def verify_samples(arguments: list[str]) -> int:
    """`verify`: do stores look like BERT's samples, and are their bytes as they were written? Exit code 1 if not."""
    parser = argparse.ArgumentParser("prepare_data.py verify", description=verify_samples.__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a store, or a folder with train/ and eval/")
    parser.add_argument("--vocab", metavar="FILE", help="the vocab.txt it should be of (default: the one beside it)")
    parser.add_argument(
        "--samples", type=whole(1, 10**9), default=200_000, help="records to read (default %(default)s)"
    )
    parser.add_argument(
        "--hashes",
        action=argparse.BooleanOptionalAction,
        help="compare the hash of all bytes (about 1 GB/s; default: for stores of up to 50 GB)",
    )
    args = parser.parse_args(arguments)
    failed = 0
    for folder in _stores_in(args.folders):
        store = Store(folder)
        beside = [place / "vocab.txt" for place in (folder, folder.parent) if (place / "vocab.txt").is_file()]
        vocab = args.vocab or (beside[0] if beside else None)
        findings = verify_store(store, load_vocabulary(vocab) if vocab else None, args.samples)
        small = (folder / "samples.bin").stat().st_size <= 50e9
        if args.hashes if args.hashes is not None else small:
            findings.append(check_hashes(store))
        rows = [(each.name, each.found, each.expected, "ok" if each.passed else "WRONG") for each in findings]
        print(f"{folder}: {len(store):,} samples\n{markdown_table(('check', 'found', 'expected', ''), rows)}")
        wrong = [each.name for each in findings if not each.passed]
        print(f"{folder}: {'looks wrong: ' + ', '.join(wrong) if wrong else 'looks right'}")
        failed += bool(wrong)
    return ExitCode.TARGET_MISSED if failed else ExitCode.OK


def _stores_in(folders: list[str]) -> list[Path]:
    stores = []
    for folder in map(Path, folders):
        inner = [folder / split for split in SPLITS if (folder / split / "manifest.json").is_file()]
        stores += inner or [folder]
    return stores


COMMANDS = {"import": import_samples, "export": export_samples, "verify": verify_samples}


@guarded
def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        return COMMANDS[sys.argv[1]](sys.argv[2:]) or 0
    args = parse(sys.argv[1:])
    params = SampleParams(
        args.max_seq_len, args.max_predictions, args.mask_prob, args.short_seq_prob, args.dupe_factor, args.seed
    )
    recipe = Recipe(
        args.corpus,
        args.input,
        args.column,
        tuple(args.packages),
        args.vocab,
        args.vocab_size,
        args.eval_fraction,
        args.eval_max_samples,
        params,
        cased=args.cased,
        max_unknown=args.max_unknown,
        language=args.language,
        eval_input=args.eval_input,
        eval_pick=args.eval_pick,
    )
    prepare(recipe, args.out, args.workers, log=log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
