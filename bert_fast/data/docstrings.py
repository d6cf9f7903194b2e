"""Documentation strings from Python modules, which are parsed and never run."""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documentation(path: str) -> Iterator[list[str]]:
    """Documentation strings of a module in file order: one list per top-level definition or documenting call."""
    for entries in named_documentation(path):
        yield [text for _, text in entries]


def named_documentation(path: str) -> Iterator[list[tuple[str, str]]]:
    """As `documentation`, each string with the name of what it documents.

    Inside of a module this is a dotted name, `Class.method`, and for the module itself it is empty. What a call documents has
    its whole name, `torch.abs`, with a dot in front of it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError):  # templates and deliberately broken files inside packages
        return
    own_text = ast.get_docstring(tree, clean=False)
    if own_text:
        yield [("", own_text)]
    stack: list[ast.stmt] = list(reversed(tree.body))
    while stack:
        node = stack.pop()
        if isinstance(node, _Definition):
            yield list(_docstrings(node, node.name))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            function = node.value.func
            called = str(getattr(function, "id", None) or getattr(function, "attr", ""))
            if "doc" in called:  # add_docstr(torch.abs, "..."), add_newdoc("numpy", "abs", "...")
                name = _documented_by(node.value)
                yield [(name, text) for argument in node.value.args for text in _long_strings(argument)]
        elif isinstance(node, ast.If | ast.Try | ast.With):
            stack.extend(reversed(node.body))


def _docstrings(definition: _Definition, name: str) -> Iterator[tuple[str, str]]:
    """Name and documentation string of a class or function and of the definitions inside it, in file order."""
    text = ast.get_docstring(definition, clean=False)
    if text:
        yield name, text
    for node in definition.body:
        if isinstance(node, _Definition):
            yield from _docstrings(node, f"{name}.{node.name}")


def _documented_by(call: ast.Call) -> str:
    """The whole name of what a call documents, after a dot: of `torch.abs`, or of "numpy", "abs"; a dot alone if unknown."""
    words: list[str] = []
    for argument in call.args:
        if isinstance(argument, ast.Attribute) and not words:
            return f".{ast.unparse(argument)}"
        if not isinstance(argument, ast.Constant) or not re.fullmatch(r"[\w.]+", str(argument.value)):
            break
        words.append(str(argument.value))
    return f".{'.'.join(words)}"


def _long_strings(argument: ast.AST) -> Iterator[str]:
    for node in ast.walk(argument):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 80:
            yield node.value


def clean_docstring(text: str) -> str:
    """The prose of a documentation string, without doctests, underlines, directives and literal blocks."""
    kept: list[str] = []
    in_example = False
    for line in inspect.cleandoc(text).splitlines():
        stripped = line.strip()
        if stripped.startswith((">>>", "```")):
            in_example = True
            continue
        if not stripped:
            in_example = False
            kept.append("")
        elif in_example or stripped.startswith(("..", "+-", "|")) or not re.search(r"[A-Za-z]{2}", stripped):
            continue
        else:
            kept.append(stripped)
    return "\n".join(kept)
