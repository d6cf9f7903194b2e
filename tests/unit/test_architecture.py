"""docs/architecture.md names files, names in them and settings that exist; its layers are those that import-linter checks.

The other pages are held to less: their links and the repository's paths in them.
"""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

from bert_fast import claims, run_folder
from bert_fast.config import sections
from bert_fast.data import store

PACKAGE = ROOT / "bert_fast"
PAGE = ROOT / "docs/architecture.md"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
TOP_FOLDERS = ("bert_fast", "configs", "docs", "results", "scripts", "slurm", "tests")
WIDTH = 100  # of a diagram

_FILE = re.compile(
    r"(?<![\w./-])((?:[\w-]+/)*[\w-]+\.(?:py|md|toml|yaml|sbatch|jsonl?|npy|bin|txt|html))\b(?::([A-Za-z_][\w.]*\w))?"
)
_FOLDER = re.compile(r"(?<![\w./-])((?:[\w-]+/)+)(?![\w.-])")
_SETTING = re.compile(rf"(?<![\w./])({'|'.join(sections())})\.(?!py\b)([a-z_]+)\b")
_CALL = re.compile(r"\b(\w+)\(\)")
_WORD = re.compile(r"`([A-Za-z_]\w*)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")


def place(path: str) -> Path | None:
    """A path of architecture.md: in the repository, or below the package. None if there is no such file or folder."""
    return next((each for each in (ROOT / path, PACKAGE / path) if each.exists()), None)


def names_of_runs_and_stores() -> set[str]:
    """Files that a run or a store has on disk, and that are not in the repository."""
    names = {value for value in vars(run_folder).values() if isinstance(value, str)}
    return {*names, *store.FILES, claims.MARK, claims.LOCK}


def defined_in(tree: ast.Module | ast.ClassDef) -> dict[str, ast.stmt]:
    """Names that the body of a module or class defines."""
    names: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(each, ast.Name):
                    names[each.id] = node
    return names


def defines(source: str, name: str) -> bool:
    """Whether a module's source defines a name, such as `function`, `Class` or `Class.method`."""
    scope: ast.stmt | ast.Module = ast.parse(source)
    for part in name.split("."):
        found = defined_in(scope) if isinstance(scope, ast.Module | ast.ClassDef) else {}
        if part not in found:
            return False
        scope = found[part]
    return True


@functools.cache
def package_source() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))


def problems(page: str) -> Iterator[str]:
    """What architecture.md says that is not so."""
    on_disk = names_of_runs_and_stores()
    for path, name in _FILE.findall(page):
        found = place(path)
        if found is None and path not in on_disk:
            yield f"there is no file {path}"
        elif found is not None and name and not defines(found.read_text(encoding="utf-8"), name):
            yield f"{path} does not define {name}"
    yield from (f"there is no folder {path}" for path in _FOLDER.findall(page) if place(path) is None)
    for section, field in _SETTING.findall(page):
        if field not in sections()[section].model_fields:
            yield f"there is no setting {section}.{field}"
    for name in (*_CALL.findall(page), *_WORD.findall(page)):
        if not re.search(rf"\b{name}\b", package_source()):
            yield f"{name} is nowhere in the package"
    yield from (f"a diagram is wider than {WIDTH}: {line}" for line in diagrams(page) if len(line) > WIDTH)


def diagrams(page: str) -> list[str]:
    """The lines of all indented blocks; such a block begins after an empty line, unlike the second line of a list's entry."""
    lines: list[str] = []
    before, in_block = "", False
    for line in page.splitlines():
        in_block = line.startswith("    ") and (in_block or not before)
        lines += [line] * in_block
        before = line
    return lines


def layers_on_page(page: str, title: str) -> list[list[str]]:
    """The first block under a heading, line by line: the rooms of a layer, without what is said of them."""
    block: list[str] = []
    for line in page.split(f"\n## {title}\n", 1)[1].splitlines():
        if line.startswith("    "):
            block.append(line)
        elif block:
            break
    return [re.split(r"\s{2,}", line.strip())[0].split(" | ") for line in block]


def layers_of_contract(container: str) -> list[list[str]]:
    """The layers that import-linter checks inside a package."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    return next([layer.split(" | ") for layer in c["layers"]] for c in contracts if c.get("containers") == [container])


def test_what_the_page_names_is_there() -> None:
    assert list(problems(PAGE.read_text(encoding="utf-8"))) == []


def test_the_page_names_many_things() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len({name for _, name in _FILE.findall(page) if name}) > 60
    assert len(_FOLDER.findall(page)) > 15
    assert len(diagrams(page)) > 100


@pytest.mark.parametrize(
    ("title", "container"),
    [("The rooms, and who may import whom", "bert_fast"), ("Inside train/", "bert_fast.train")],
)
def test_the_layers_are_those_of_the_contracts(title: str, container: str) -> None:
    assert layers_on_page(PAGE.read_text(encoding="utf-8"), title) == layers_of_contract(container)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("see `train/loops.py`", "there is no file train/loops.py"),
        ("    train/loops.py     the loop", "there is no file train/loops.py"),
        ("`train/loop.py:Loop`", "train/loop.py does not define Loop"),
        ("`train/loop.py:TrainingLoop.walk`", "train/loop.py does not define TrainingLoop.walk"),
        ("`train/setups/`", "there is no folder train/setups/"),
        ("`checkpoint.keep`", "there is no setting checkpoint.keep"),
        ("`gather_everything`", "gather_everything is nowhere in the package"),
        ("describe_all()", "describe_all is nowhere in the package"),
        ("it writes `metrics.txt`", "there is no file metrics.txt"),
        ("    " + 100 * "x", f"a diagram is wider than {WIDTH}: " + "    " + 100 * "x"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_found(text: str, problem: str) -> None:
    assert list(problems(text)) == [problem]


@pytest.mark.parametrize(
    "text",
    [
        "`train/loop.py:TrainingLoop.run`", "`config/choices.py:OPTIMIZERS`", "`metrics.json`", "`samples.bin`",
        "`train/health/`", "`checkpoint.keep_last`", "`pyproject.toml`", "`train/context.py:RunContext.clock`",
    ],
)  # fmt: skip
def test_what_is_there_is_no_problem(text: str) -> None:
    assert list(problems(text)) == []


def dead_links(page: Path) -> Iterator[str]:
    """Links of a page to files that are not there, and paths of the repository in backticks likewise."""
    text = page.read_text(encoding="utf-8")
    for link in _LINK.findall(text):
        target = link.partition("#")[0]
        if target and "://" not in target and not (page.parent / target).exists():
            yield link
    for code in _CODE.findall(text):
        path = code.split()[0].partition(":")[0].rstrip(",;.") if code.split() else ""
        is_ours = path.startswith(tuple(f"{folder}/" for folder in TOP_FOLDERS))
        has_placeholder = re.search(r"[A-Z]{2,}|[<{$]", Path(path).stem)
        if is_ours and not has_placeholder and not list(ROOT.glob(path)):
            yield path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths_of_every_page(page: Path) -> None:
    assert list(dead_links(page)) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "[a](b.md) [c](https://d/e) [f](page.md#g) `bert_fast/h.py` `scripts/submit.py --i` `tests/*/j*.py`"
    )
    assert list(dead_links(page)) == ["b.md", "bert_fast/h.py", "tests/*/j*.py"]
