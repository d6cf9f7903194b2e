"""Writes a submission package, and judges one in a table: the verdicts of MLPerf's checkers and our own.

`<org>/results/<system>/bert/result_N.txt` for N from 0 to 9, `<org>/systems/<system>.json`,
`<org>/benchmarks/bert/implementations/`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_fast.claims import Kind
from bert_fast.errors import UserError
from bert_fast.files import sha256_of, write_atomically, write_json
from bert_fast.foreign import shown
from bert_fast.mlperf.compliance import check_convergence, check_logs, check_package, check_system
from bert_fast.mlperf.convergence import NUM_RUNS, judge
from bert_fast.mlperf.rules import TARGET_ACCURACY
from bert_fast.mlperf.score import MOST_LOG_BYTES, RunScore, SystemScore, read_events, score_run

IMPLEMENTATION = "bert_fast"
SUBMISSION = Kind("a submission", (), "choose another --out")
_LEDGER = ".bert_fast_written.json"
_SAME_IN_ALL = (
    "global_batch_size",
    "submission_division",
    "submission_benchmark",
    "opt_name",
    "opt_base_learning_rate",
    "train_dataset_sha256",
    "eval_dataset_sha256",
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class CheckRow:
    """One line of the verdict table. `passed` is None where the check does not apply."""

    check: str
    passed: bool | None
    detail: str

    @property
    def word(self) -> str:
        return "-" if self.passed is None else "passed" if self.passed else "FAILED"


def result_name(number: int) -> str:
    """The name of a package's result log by its number."""
    return f"result_{number}.txt"


# ---- laying out -----------------------------------------------------------------------------------------------------


def check_names(organization: str, system: str) -> None:
    """Refuse names that cannot be those of folders. Raises UserError."""
    for what, name in (("organization", organization), ("system", system)):
        if not _NAME.fullmatch(name):
            raise UserError(f"{what} '{shown(name)}' must begin with a letter or digit and hold these and . _ + - only")


def lay_out(
    logs: list[Path],
    out: Path,
    *,
    organization: str,
    system: str,
    description: dict[str, str],
    sources: Iterable[Path],
    root: Path,
    notes: str,
) -> Path:
    """Write the package into `out/organization`, replacing what an earlier call wrote of this system. Returns that folder.

    Args:
        logs: result logs in the order of their numbers.
        sources: files of the implementation, below `root`.
        notes: README.md of the implementation.

    Raises:
        UserError: a name cannot be a folder's; there are not ten logs; or a file that somebody else wrote or changed is in
            the way of one of the package.
    """
    check_names(organization, system)
    if len(logs) != NUM_RUNS:
        raise UserError(f"a package has {NUM_RUNS} results and {len(logs)} were given; run the missing seeds")
    package = out / organization
    code = package / "benchmarks" / "bert" / "implementations" / IMPLEMENTATION
    files = {package / "results" / system / "bert" / result_name(n): log.read_bytes() for n, log in enumerate(logs)}
    files |= {code / source.relative_to(root): source.read_bytes() for source in sources}
    files[code / "README.md"] = notes.encode()
    files[package / "systems" / f"{system}.json"] = (
        json.dumps(description, indent=2, ensure_ascii=False) + "\n"
    ).encode()
    _write_files(out, files, (code, package / "results" / system))
    return package


def _write_files(out: Path, files: dict[Path, bytes], whole: Sequence[Path]) -> None:
    """Write files below `out`, and remove files in the folders `whole` that an earlier call wrote and this one does not.

    A list in `out` says what was written, by hash: what it does not name, or what has been changed since, is the user's.

    Raises:
        UserError: such a file is in the way. Nothing has been changed.
    """
    ledger = out / _LEDGER
    try:
        known: dict[str, list[str]] = json.loads(ledger.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    new = {path.relative_to(out).as_posix(): content for path, content in files.items()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in new.items()}
    stale = [n for n in known if n not in new and any((out / n).is_relative_to(folder) for folder in whole)]
    for name in (*new, *stale):
        path = out / name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UserError(f"{path} is a folder or a link where a file of the package goes; move it away")
        if path.exists() and sha256_of(path) not in (*known.get(name, ()), hashes.get(name)):
            raise UserError(f"{path} is not as this command wrote it; move it away or choose another --out")
    # Before the files, so that they are known as ours even if this process is killed meanwhile
    write_json(ledger, known | {name: [*known.get(name, ()), hashes[name]] for name in new})
    for name, content in new.items():
        write_atomically(out / name, content)
    for name in stale:
        (out / name).unlink(missing_ok=True)
        for folder in (out / name).parents:
            if not any(folder.is_relative_to(each) for each in whole) or any(folder.iterdir()):
                break
            folder.rmdir()
    write_json(ledger, {n: each for n, each in known.items() if n not in stale} | {n: [hashes[n]] for n in new})


# ---- the verdict ----------------------------------------------------------------------------------------------------


def check_submission(package: str | Path, ruleset: str) -> tuple[list[CheckRow], dict[str, Any]]:
    """Every check on every system of a package, and metrics by name (`package_passed`, `minutes/SYSTEM`).

    Raises:
        UserError: the folder is not a package.
    """
    package = Path(package)
    folders = sorted(path for path in package.glob("results/*/bert") if path.is_dir())
    if not folders:
        raise UserError(f"{package}: no results/<system>/bert in it; give the folder of the organization")
    _check_files(package)
    rows: list[CheckRow] = []
    metrics: dict[str, Any] = {}
    for folder in folders:
        system = folder.parent.name
        own_checks, division = check_runs(folder, ruleset)
        rows += own_checks
        description = package / "systems" / f"{system}.json"
        if description.is_file():
            verdict = check_system(description, ruleset)
            detail = _first(verdict.reasons, verdict.passed)
            rows.append(CheckRow(f"{system}: system description", verdict.passed, detail))
        else:
            rows.append(CheckRow(f"{system}: system description", False, f"systems/{system}.json is missing"))
        if division == "closed":
            verdict = check_convergence(folder, ruleset)
            detail = "reference convergence" if verdict.passed else _first(verdict.reasons)
            rows.append(CheckRow(f"{system}: RCP checker", verdict.passed, detail))
        else:
            rows.append(CheckRow(f"{system}: RCP checker", None, "for the closed division only"))
    verdicts = check_package(package, ruleset)
    rows.append(
        CheckRow("package checker", verdicts.checker.passed, _first(verdicts.checker.reasons, verdicts.checker.passed))
    )
    times = ", ".join(f"{name} {minutes:.4f} min" for name, minutes in verdicts.minutes.items())
    rows.append(CheckRow("result summarizer", verdicts.summarizer.passed, times or _first(verdicts.summarizer.reasons)))
    for folder in folders:
        rows.append(_score_row(folder, verdicts.scaling.get(folder.parent.name, 1.0), metrics))
    metrics["package_passed"] = int(all(row.passed is not False for row in rows))
    return rows, metrics


def _check_files(package: Path) -> None:
    """Refuse devices, pipes and huge files, which MLPerf's checkers would read without end. Raises UserError."""
    for path in sorted(package.rglob("*")):
        if path.is_file():
            size, most = path.stat().st_size, MOST_LOG_BYTES
            if size > most:
                raise UserError(
                    f"{shown(path)} has {size >> 20:,} MiB, and of a file at most {most >> 20:,} MiB are checked"
                )
        elif not path.is_dir():
            raise UserError(f"{shown(path)} is no regular file; take it out of the package")


def _first(reasons: list[str], passed: bool = False) -> str:
    return "" if passed else (shown(reasons[0]) if reasons else "no reason given")


def _score_row(folder: Path, scale: float, metrics: dict[str, Any]) -> CheckRow:
    system = folder.parent.name
    runs = []
    for path in sorted(folder.glob("result_*.txt")):
        try:
            runs.append(score_run(path))
        except UserError as error:
            return CheckRow(f"{system}: score", False, str(error))
    score = SystemScore(system, None, tuple(runs))
    if score.minutes is None:
        return CheckRow(f"{system}: score", False, "more than one run did not converge, or there are fewer than 3")
    metrics[f"minutes/{system}"] = score.minutes * scale
    scaled = f", x {scale:.5f} by the reference = {score.minutes * scale:.4f}" if scale != 1.0 else ""
    return CheckRow(f"{system}: score", True, f"{score.minutes:.4f} min, mean without fastest and slowest{scaled}")


def check_runs(folder: Path, ruleset: str) -> tuple[list[CheckRow], str]:
    """Our own checks of a system's runs, stricter than the checkers', and the compliance checker on each.

    Args:
        folder: `results/<system>/bert` of a package.
        ruleset: MLPerf's, such as "5.0.0".

    Returns:
        The rows of the verdict table, and the division that the first readable log names ("unknown" without one).
    """
    system = folder.parent.name
    paths = sorted(folder.glob("result_*.txt"))
    names = {path.name for path in paths}
    wanted = [result_name(n) for n in range(NUM_RUNS)]
    missing, extra = [name for name in wanted if name not in names], sorted(names.difference(wanted))
    odd = [*(f"{name} is missing" for name in missing), *(f"{name} is one too many" for name in extra)]
    rows = [CheckRow(f"{system}: {NUM_RUNS} results", not odd, ", ".join(odd) or f"{wanted[0]} to {wanted[-1]}")]
    verdicts = check_logs(paths, ruleset)
    bad = [(path.name, v.reasons) for path, v in zip(paths, verdicts, strict=True) if not v.passed]
    detail = "; ".join(f"{name}: {_first(reasons)}" for name, reasons in bad) or f"all {len(paths)} logs, {ruleset}"
    rows.append(CheckRow(f"{system}: compliance checker", not bad, detail))
    runs: dict[str, RunScore] = {}
    events: dict[str, list[dict[str, Any]]] = {}
    unreadable = []
    for path in paths:
        try:
            events[path.name], runs[path.name] = read_events(path), score_run(path)
        except UserError as error:
            unreadable.append(str(error).replace(f"{path}: ", f"{path.name}: "))
    unreadable += [f"{name}: has no run_stop" for name, run in runs.items() if run.cut_off]
    unreadable += [
        f"{name}: an evaluation has no samples as epoch_num" for name, run in runs.items() if _lacks_samples(run)
    ]
    rows.append(
        CheckRow(f"{system}: readable", not unreadable, "; ".join(unreadable) or "every log has its start and stop")
    )
    aborted = [name for name, run in runs.items() if not run.converged]
    detail = (
        ", ".join(aborted) + " did not reach the target" + (" (one of ten may: it is the slowest)" if aborted else "")
    )
    rows.append(CheckRow(f"{system}: converged", len(aborted) <= 1, detail if aborted else ""))
    for name, faults in (
        ("accuracy", _accuracy_faults(runs)),
        ("never resumed", _resumed(events)),
        ("seeds", _seeds(runs)),
        ("one setting", _unlike(events)),
        ("order", _out_of_order(events)),
    ):
        rows.append(CheckRow(f"{system}: {name}", not faults, "; ".join(faults)))
    division = next(iter(runs.values())).division if runs else "unknown"
    if division == "closed" and runs:
        score = SystemScore(system, None, tuple(runs.values()))
        if score.samples_to_converge is None or score.global_batch_size is None:
            rows.append(
                CheckRow(f"{system}: samples to converge", False, "a log does not tell the samples of its evaluations")
            )
        else:
            verdict = judge(score.samples_to_converge, score.global_batch_size, ruleset)
            rows.append(CheckRow(f"{system}: samples to converge", verdict.passed, verdict.text))
    return rows, division


def _lacks_samples(run: RunScore) -> bool:
    """Whether an evaluation does not give its samples as the rules require."""
    told = run.samples_key == "epoch_num" and all(each.samples is not None for each in run.evaluations)
    return bool(run.evaluations) and not told


def _accuracy_faults(runs: dict[str, RunScore]) -> list[str]:
    """Claimed successes below the target: the division's, or in the open division that of the log itself."""
    faults = []
    for name, run in runs.items():
        accuracies = [each.accuracy for each in run.evaluations]
        last = accuracies[-1] if accuracies else math.nan
        if not all(math.isfinite(accuracy) for accuracy in accuracies):
            faults.append(f"{name}: an accuracy is not finite")
            continue
        target = TARGET_ACCURACY if run.division == "closed" else run.target
        if run.converged and target is not None and not last >= target:
            faults.append(f"{name}: says success at accuracy {last:.4f}, below {target}")
    return faults


def _resumed(events: dict[str, list[dict[str, Any]]]) -> list[str]:
    return [
        f"{name}: was stopped and resumed, so it has no valid time"
        for name, log in events.items()
        if any(event["key"] == "resumed" for event in log)
    ]


def _seeds(runs: dict[str, RunScore]) -> list[str]:
    counts = Counter(run.seed for run in runs.values())
    faults = [f"{name}: no seed" for name, run in runs.items() if run.seed is None]
    twice = [seed for seed, count in counts.items() if count > 1 and seed is not None]
    return faults + [
        f"seed {seed} in {', '.join(name for name, run in runs.items() if run.seed == seed)}" for seed in twice
    ]


def _unlike(events: dict[str, list[dict[str, Any]]]) -> list[str]:
    faults = []
    for key in _SAME_IN_ALL:
        values: dict[str, list[str]] = {}
        for name, log in events.items():
            for value in {json.dumps(event["value"]) for event in log if event["key"] == key}:
                values.setdefault(value, []).append(name)
        if len(values) > 1:
            odd = min(values.items(), key=lambda item: len(item[1]))
            faults.append(f"{key} is {shown(odd[0], 60)} in {', '.join(odd[1])} and not in the others")
    return faults


def _out_of_order(events: dict[str, list[dict[str, Any]]]) -> list[str]:
    faults = []
    for name, log in events.items():
        first = {event["key"]: event["time_ms"] for event in reversed(log)}
        order = [key for key in ("init_start", "init_stop", "run_start", "run_stop") if key in first]
        late = [b for a, b in itertools.pairwise(order) if first[a] > first[b]]
        faults += [f"{name}: {key} comes too early" for key in late]
    return faults
