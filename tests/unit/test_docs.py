"""The pages say what is there: links, commands and their flags, settings, figures of records, renamed settings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

from bert_fast.config import Config
from bert_fast.config.renamed import RENAMED

PAGES = sorted([
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "slurm/README.md",
    *ROOT.glob("docs/*.md"), *ROOT.glob("results/**/README.md"),
])  # fmt: skip
GENERATED = ROOT / "results/faults/README.md"  # quotes messages of its day


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_named_files_exist(page: Path) -> None:
    """Paths from the root in backticks; those in capitals or with a star are patterns."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:bert_fast|scripts|tests|configs|docs|results|slurm|assets)/[a-z0-9_./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """(script or module, the whole command) of each command in a page, in a block or in backticks."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^    .*$", text, re.MULTILINE) + re.findall(
        r"`([^`]+)`", re.sub(r"^    .*$", "", text, flags=re.M)
    )
    for line in lines:
        found = re.search(r"python3? (?:-m )?((?:scripts[./]|run_pretraining)[\w./]+)", line)
        if found:
            yield found[1], line.split(" #")[0]


def sources(target: str) -> str:
    """The code of a script, or of a module with its package, and of what it imports from scripts: where its flags are."""
    path = ROOT / (target if target.endswith(".py") else target.replace(".", "/"))
    files = list(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    code = "".join(file.read_text(encoding="utf-8") for file in files)
    shared = [ROOT / "bert_fast/train/main.py", ROOT / "bert_fast/report/bench.py"]
    imported = re.findall(r"^from (?:scripts\.)?(\w+\.[\w.]+) import", code, re.MULTILINE)
    shared += [ROOT / f"scripts/{name.replace('.', '/')}.py" for name in imported]
    return code + "".join(file.read_text(encoding="utf-8") for file in shared if file.is_file())


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_and_their_flags_exist(page: Path) -> None:
    missing = []
    for target, command in commands(page):
        if target.endswith(".NAME"):
            continue
        text = sources(target)
        missing += [
            (target, flag) for flag in re.findall(r" (--[a-z][\w-]*)", command) if not has_flag(text, flag, command)
        ]
    assert missing == []


def has_flag(text: str, flag: str, command: str) -> bool:
    launcher = re.search(rf"(srun|torchrun|mpirun|sbatch)\b.* {flag}\b.*run_pretraining", command)
    return launcher is not None or f'"{flag}"' in text or f'"--{flag.removeprefix("--no-")}"' in text


@pytest.mark.parametrize("page", [page for page in PAGES if page != GENERATED], ids=relative)
def test_settings_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"## Configs and runs of before the renames.*?\n## ", "\n## ", text, flags=re.DOTALL)
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    unknown = {
        f"{section}.{name}"
        for section, name in re.findall(rf"`({'|'.join(sections)})\.(\w+)(?=[`=: ])", text)
        if name not in sections[section].model_fields and name not in ("json", "yaml", "txt", "safetensors")
    }
    assert unknown == set()


def test_old_names_are_in_the_table_of_renamed_settings() -> None:
    text = (ROOT / "docs/running.md").read_text(encoding="utf-8")
    section = text.split("## Configs and runs of before the renames")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `([\w.]+).*?\| `([\w.]+)", section, re.MULTILINE))
    assert rows == {old: new.field for old, new in RENAMED.items()}


# The start of each row of figures in README.md, its record, and where the record has the number.
FIGURES = [
    ("mini benchmark (2 ranks, bf16): time to train", "mini_cpu/seeds", "metrics:time_to_train_s"),
    ("mini benchmark: samples to the target", "mini_cpu/seeds", "metrics:samples_to_target"),
    ("mini benchmark: seeds that reached the target", "mini_cpu/seeds", "metrics:targets_reached"),
    ("mini benchmark: from the start of the clock", "mini_cpu/seeds", "metrics:first_step_s"),
    ("mini benchmark: share of the training time", "mini_cpu/seeds", "metrics:data_wait_share"),
    ("the same target with the open recipe", "mini_record/seeds", "metrics:time_to_train_s"),
    ("of these, seeds that reached", "mini_record/seeds", "metrics:targets_reached"),
    (
        "time to train of the mini benchmark",
        "mini_record/time_to_train",
        "metrics:time_to_train_ratio_mini_over_record",
    ),
    ("time to train of `transformers`", "mini_cpu/time_to_train", "metrics:time_to_train_ratio_hf_over_ours"),
    (
        "throughput of one bf16 step over `transformers`' default",
        "step/small",
        "metrics:ratio/small/bf16/ours_over_hf_default",
    ),
    ("memory of that step", "step/small", "metrics:ratio/small/bf16/memory_over_hf_default"),
    ("throughput of one bf16 step over", "step/small", "metrics:ratio/small/bf16/ours_over_hf_masked_longest"),
    ("memory of that step", "step/small", "metrics:ratio/small/bf16/memory_over_hf_masked_longest"),
    ("imbalance of 1,024 ranks with random", "balance/balance", "metrics:random/1024x16/imbalance_p99"),
    ("imbalance of 1,024 ranks, balanced", "balance/balance", "metrics:balanced/1024x16/imbalance_p99"),
    ("time to plan one global batch of 16,384", "balance/balance", "metrics:balanced/1024x16/plan_ms"),
    ("slowest of 1,024 ranks over the mean with random", "balance/step", "metrics:measured/random/max_over_mean"),
    ("slowest of 1,024 ranks over the mean, balanced", "balance/step", "metrics:measured/balanced/max_over_mean"),
    ("communication hidden behind", "overlap/layers-200mbit", "metrics:200mbit/1/ddp_default/hidden_share"),
    ("communication hidden by ours", "overlap/layers-200mbit", "metrics:200mbit/1/auto/hidden_share"),
    ("the same with weights", "overlap/layers-200mbit", "metrics:200mbit/1/auto_shadow/hidden_share"),
    ("ranks killed at a random moment", "faults/drill", "figures:kills"),
    ("of these, recovered", "faults/drill", "figures:recovered_exactly"),
    ("how long training waits for a checkpoint", "faults/drill", "figures:checkpoint_stall_share"),
    ("samples of MLPerf's files imported", "import/import", "metrics:import_samples_per_s"),
]


def test_figures_are_those_of_the_records() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("| what | figure | record |\n")[1].split("\n\n")[0].splitlines()[1:]
    assert len(table) == len(FIGURES)  # a new row needs a record here
    for line, (row, record, metric) in zip(table, FIGURES, strict=True):
        what, figure, link = (cell.strip() for cell in line.strip("|").split("|"))
        assert what.startswith(row)
        assert link.endswith(f"(results/{record}.json)"), what
        group, name = metric.split(":")
        value = json.loads((ROOT / f"results/{record}.json").read_text(encoding="utf-8"))[group][name]
        number = figure.split(" ")[0].replace(",", "")
        if figure.endswith("%"):
            value *= 100
        decimals = len(number.partition(".")[2]) or (-2 if number.endswith("00") else 0)
        assert round(value, decimals) == float(number), what
