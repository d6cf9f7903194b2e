"""Every program ends in one line: missing packages, files, Ctrl-C, closed pipes, options and recipes out of bounds."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.paths import ROOT

from bert_fast.command import explain, guarded, one_line, whole
from bert_fast.data.formats.tfrecord import read_records
from bert_fast.data.recipe import RecipeFile, read_recipe
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.protobuf import varint

PROGRAMS = sorted(
    path for path in (ROOT / "scripts").rglob("*.py") if "\ndef main() -> int" in path.read_text(encoding="utf-8")
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "scripts"))


BLOCK = """
import runpy, sys
package, script = sys.argv[1:3]
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
sys.path.insert(0, script.rpartition("/")[0])
del sys.argv[:2]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("path", PROGRAMS, ids=name_of)
def test_every_program_guards_its_imports_and_its_main(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    guard = "import guard" if path.parent == ROOT / "scripts" else "import scripts.guard"
    assert f"\n{guard}  # noqa: F401\n" in text
    assert "@guarded\ndef main()" in text
    ours = re.search(
        r"^(import|from) ([.]|bert_fast|numpy|torch|yaml|rich|transformers|matplotlib)", text, re.MULTILINE
    )
    assert ours is not None
    assert text.index(guard) < ours.start()


def test_a_program_without_the_package_is_one_line(tmp_path: Path) -> None:
    """As with a Python that has not got it, and from another folder."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-S", str(tmp_path / "scripts/prepare_data.py"), "--help"]  # -S: no installed packages
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=bare)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: the package bert_fast is not installed; run `make env`")
    assert line.endswith(f"PYTHONPATH={tmp_path}")


@pytest.mark.parametrize(
    ("package", "script", "shown"),
    [
        ("pydantic", "run_pretraining.py", "pydantic"),
        ("yaml", "scripts/prepare_data.py", "pyyaml"),
        ("numpy", "scripts/fit_cost.py", "numpy"),
    ],
)
def test_a_missing_package_is_one_line(package: str, script: str, shown: str) -> None:
    command = [sys.executable, "-c", BLOCK, package, str(ROOT / script), "--config", "configs/mini_cpu.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == ExitCode.USER_ERROR
    assert ended.stderr.splitlines() == [
        f"error: the package {shown} is missing; install it with: python -m pip install -c constraints.txt {shown}"
    ]


def test_a_closed_pipe_is_silent() -> None:
    command = f"{sys.executable} {ROOT / 'run_pretraining.py'} --help | head -1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert ended.stderr == ""
    assert ended.returncode in (ExitCode.OK, ExitCode.PIPE)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("bad\x1b[2J\nnext"), ExitCode.USER_ERROR, r"error: bad\x1b[2J next"),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED, "error: interrupted; the same command goes on, or starts again"),
        (
            FileNotFoundError(2, "No such file", "x.json"),
            ExitCode.USER_ERROR,
            "error: x.json: No such file; check the path",
        ),
        (MemoryError(), ExitCode.USER_ERROR, "error: there is not enough memory"),
        (ModuleNotFoundError("no", name="_bz2"), ExitCode.USER_ERROR, "error: this Python has no module _bz2"),
    ],
)
def test_main_returns_the_code(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    @guarded
    def main() -> int:
        raise error

    assert main() == code
    written = capsys.readouterr().err
    assert written.startswith(line)
    assert written.count("\n") == 1


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(ZeroDivisionError()) is None
    assert explain(ModuleNotFoundError(name="bert_fast.nothing")) is None
    assert guarded(lambda: 1 // 0)() == ExitCode.BUG
    assert "Traceback" in capsys.readouterr().err


def test_long_text_is_cut() -> None:
    assert len(one_line("x" * 10**7)) < 2100


@pytest.mark.parametrize("text", ["0", "-3", "x", "9" * 30])
def test_whole_numbers_of_options(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="between|not a whole number"):
        whole(1)(text)


PARSER_OF = """
import argparse, runpy, sys
def taken(parser, *_):
    for action in parser._actions:
        kind = action.type
        if not callable(kind) or kind is str or getattr(kind, "__name__", "") in ("Path", "FileType"):
            continue
        for text in ("-5", "nan", "1e400", "9" * 40):
            try:
                kind(text)
            except (argparse.ArgumentTypeError, ValueError, TypeError):  # argparse ends in one line for these
                continue
            print("/".join(action.option_strings), text)
    raise SystemExit(0)
argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_intermixed_args = taken
program = sys.argv[1]
sys.argv = [program]
if program.startswith("scripts."):
    runpy.run_module(program, run_name="__main__", alter_sys=True)
sys.path.insert(0, program.rpartition("/")[0])
runpy.run_path(program, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PROGRAMS if path.name != "prepare_data.py"], ids=name_of)
def test_numbers_of_programs_are_bounded(path: Path) -> None:
    """Not of prepare_data.py: its options and its recipes are checked by the same typed model, in other tests."""
    is_tool = path.parent == ROOT / "scripts"
    program = str(path) if is_tool else ".".join(path.relative_to(ROOT).with_suffix("").parts)
    ended = subprocess.run([sys.executable, "-c", PARSER_OF, program], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr


def test_a_varint_without_end() -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match="longer than 10 bytes"):
        varint(b"\x80" * 2_000_000 + b"\x01", 0)
    assert time.monotonic() - start < 1
    assert varint(b"\xff" * 9 + b"\x01", 0) == (2**64 - 1, 10)


def test_a_record_of_a_claimed_gigabyte(tmp_path: Path) -> None:
    from bert_fast.crc32c import masked_crc32c

    head = struct.pack("<Q", 1 << 29)
    (tmp_path / "x").write_bytes(head + struct.pack("<I", masked_crc32c(head)) + bytes(100))
    with pytest.raises(UserError, match=r"record 0 claims 536,870,912 bytes, and no sample takes more than 16,777,216"):
        list(read_records(tmp_path / "x"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- corpus: prose", "must hold fields .*, not a list"),
        ("corpus: [", "is not valid YAML"),
        ("corpus: txt", r"corpus: must be one of 'pydocs'.*got 'txt'"),
        ("packages: numpy", "packages: Input should be a valid list"),
        ("packages: ['../x']", r"packages\.0: "),
        ("recipe: recipe.yaml", "unknown field recipe; the fields are corpus"),
        ("packages: &a [*a]", "contains itself"),
        ("mask_prob: 1.5", "mask_prob: .*less than 1"),
        ("eval_fraction: 0", "eval_fraction: .*greater than 0"),
        ("dupe_factor: -1", "dupe_factor: "),
        ("seed: -1", "seed: "),
        ("vocab_size: 1000000000000", "vocab_size: "),
        ("max_seq_len: 64\nmax_predictions: 65", "max_predictions=65 is more than"),
    ],
)
def test_recipes_are_validated(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"recipe {path}.*{message}"):
        read_recipe(path)


def test_every_flag_is_a_field_of_the_recipe() -> None:
    text = (ROOT / "scripts/prepare_data.py").read_text(encoding="utf-8")
    flags = {flag.replace("-", "_") for flag in re.findall(r'\badd\(\s*"--([a-z-]+)"', text)}
    assert flags - {"recipe"} == set(RecipeFile.model_fields)
