#!/usr/bin/env python3
"""TFRecord into the store: samples/s of one core and resident memory, against TensorFlow's own reader and parser.

    python -m scripts.benchmarks.tfrecord_import --tensorflow /path/to/env/bin/python --json results/import/import.json

`--tensorflow` names a Python with TensorFlow (an environment of its own); it writes the file (MLPerf's features, 512 tokens,
76 masks, Wikipedia-like lengths) and reads it in turn with ours. Without it we write the file and only we read it. TensorFlow
reads and parses with one thread, record by record and in batches, and writes nothing; ours checks and writes the store's part.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import scripts.guard  # noqa: F401

from bert_fast.command import guarded, whole

WIDTH, MAX_PREDICTIONS, VOCAB_SIZE = 512, 76, 30_522
READ_OURS = (sys.executable, "-m", "scripts.benchmarks.tfrecord_import", "--read-ours")

WRITE = """
import sys
import numpy as np, tensorflow as tf
source, target = sys.argv[1:]
rows = dict(np.load(source))
with tf.io.TFRecordWriter(target) as writer:
    for index in range(len(rows["input_ids"])):
        features = {}
        for name in rows:
            values = rows[name][index]
            if values.dtype.kind == "f":
                features[name] = tf.train.Feature(float_list=tf.train.FloatList(value=values.tolist()))
            else:
                features[name] = tf.train.Feature(int64_list=tf.train.Int64List(value=values.tolist()))
        writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())
"""

READ = """
import sys, time
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
path, width, most = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
form = {name: tf.io.FixedLenFeature([width], tf.int64) for name in ("input_ids", "input_mask", "segment_ids")}
form |= {name: tf.io.FixedLenFeature([most], tf.int64) for name in ("masked_lm_positions", "masked_lm_ids")}
form["masked_lm_weights"] = tf.io.FixedLenFeature([most], tf.float32)
form["next_sentence_labels"] = tf.io.FixedLenFeature([1], tf.int64)
options = tf.data.Options()
options.threading.private_threadpool_size = 1
data = tf.data.TFRecordDataset(path)
if sys.argv[4] == "one":
    data = data.map(lambda record: tf.io.parse_single_example(record, form)).batch(1024)
else:
    data = data.batch(1024).map(lambda batch: tf.io.parse_example(batch, form))
data = data.with_options(options)
for _ in data.take(2):
    pass
start, count = time.perf_counter(), 0
for batch in data:
    count += batch["input_ids"].numpy().shape[0]
print(count / (time.perf_counter() - start))
"""


def read_ours(path: str, part: str) -> None:
    """Print samples/s and peak resident MiB of one import of a file, in this process."""
    from bert_fast.data.formats.convert import import_part

    start = time.perf_counter()
    part_of_store = import_part(path, part, VOCAB_SIZE)
    seconds = time.perf_counter() - start
    print(part_of_store.num_samples / seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def make_rows(count: int, path: Path) -> None:
    """MLPerf's features of made-up samples, as an .npz."""
    import numpy as np

    from bert_fast.balance.lengths import wikipedia_like
    from bert_fast.data.formats.table import SampleTable, to_padded

    rng = np.random.default_rng(0)
    lengths = np.maximum(8, wikipedia_like(count)).astype(np.int64)
    masked = np.minimum(MAX_PREDICTIONS, np.maximum(1, (0.15 * lengths).astype(np.int64)))
    positions = np.concatenate(
        [np.sort(rng.choice(n - 1, m, replace=False)) + 1 for n, m in zip(lengths, masked, strict=True)]
    )
    tokens, labels = (rng.integers(1000, VOCAB_SIZE, n.sum()) for n in (lengths, masked))
    table = SampleTable(tokens, lengths, lengths // 2, positions, labels, masked, rng.integers(0, 2, count))
    np.savez(path, **to_padded(table, WIDTH, MAX_PREDICTIONS))  # type: ignore[arg-type]


def run(command: list[str], core: int) -> list[float]:
    """Numbers that a process prints last, on one core."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"},
    )
    return [float(word) for word in done.stdout.split()[-2:]]


@guarded
def main() -> int:
    from bert_fast.data.formats.mlperf import write_tfrecord
    from bert_fast.report.bench import add_arguments, environment, markdown_table, write_result

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=whole(1, 10**9), default=40_000, help="of the file (default %(default)s)")
    parser.add_argument("--repeats", type=whole(1, 10**6), default=5, help="default %(default)s")
    parser.add_argument("--tensorflow", metavar="PYTHON", help="an interpreter that has TensorFlow")
    parser.add_argument("--read-ours", nargs=2, help=argparse.SUPPRESS)
    add_arguments(parser)
    args = parser.parse_args()
    if args.read_ours:
        read_ours(*args.read_ours)
        return 0
    if args.quick:
        args.samples, args.repeats = 4000, 2
    machine = environment()
    core = sorted(os.sched_getaffinity(0))[-1]
    ours, memory = [], []
    # Parsed record by record, as the reference does, or 1,024 records together
    theirs: dict[str, list[float]] = {"one": [], "batch": []}
    with tempfile.TemporaryDirectory() as scratch:
        rows, path = Path(scratch, "rows.npz"), Path(scratch, "part-00000.tfrecord")
        make_rows(args.samples, rows)
        if args.tensorflow:
            subprocess.run([args.tensorflow, "-c", WRITE, rows, path], check=True, capture_output=True)
        else:
            import numpy as np

            from bert_fast.data.formats.table import from_padded

            with np.load(rows) as features:
                counts = (features["masked_lm_weights"] > 0).sum(axis=1)
                table = from_padded(
                    features["input_ids"],
                    features["input_mask"],
                    features["segment_ids"],
                    features["masked_lm_positions"],
                    features["masked_lm_ids"],
                    counts,
                    features["next_sentence_labels"],
                )
            write_tfrecord(path, [table], WIDTH, MAX_PREDICTIONS)
        size = path.stat().st_size
        for number in range(args.repeats):
            command = [*READ_OURS, str(path), str(Path(scratch, f"part-{number}.bin"))]
            rate, mib = run(command, core)
            ours.append(rate)
            memory.append(mib)
            if args.tensorflow:
                for kind, rates in theirs.items():
                    rates.append(
                        run([args.tensorflow, "-c", READ, str(path), str(WIDTH), str(MAX_PREDICTIONS), kind], core)[-1]
                    )
    metrics = {
        "import_samples_per_s": statistics.median(ours),
        "import_rss_mib": max(memory),
        "bytes_per_sample": size / args.samples,
    }
    table_rows = [
        ("ours, into the store", f"{metrics['import_samples_per_s']:,.0f}", f"{min(ours):,.0f}-{max(ours):,.0f}")
    ]
    if args.tensorflow:
        metrics["import_samples_per_s_tensorflow"] = statistics.median(theirs["one"])
        metrics["import_samples_per_s_tensorflow_batches"] = statistics.median(theirs["batch"])
        for kind, name in (("one", "record by record (the reference's way)"), ("batch", "1,024 records together")):
            rates = theirs[kind]
            cells = (f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f}-{max(rates):,.0f}")
            table_rows.append((f"TensorFlow, read and parse only, {name}", *cells))
    print(markdown_table(("reader, one core", "samples/s", "range"), table_rows))
    print(
        f"{args.samples:,} samples of {metrics['bytes_per_sample']:,.0f} bytes; resident at most {max(memory):,.0f} MiB"
    )
    if args.json:
        config = {"samples": args.samples, "repeats": args.repeats, "width": WIDTH, "max_predictions": MAX_PREDICTIONS}
        write_result(args.json, metrics, config, machine, {"ours": ours, "tensorflow": theirs, "rss_mib": memory})
        print(json.dumps({"written": args.json}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
