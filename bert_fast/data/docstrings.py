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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError):  # templates and deliberately broken files inside packages
        return
    own_text = ast.get_docstring(tree, clean=False)
    if own_text:
        yield [own_text]
    stack: list[ast.stmt] = list(reversed(tree.body))
    while stack:
        node = stack.pop()
        if isinstance(node, _Definition):
            yield list(_docstrings(node))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            function = node.value.func
            called = str(getattr(function, "id", None) or getattr(function, "attr", ""))
            if "doc" in called:  # add_docstr(torch.abs, "..."), add_newdoc("numpy", "abs", "...")
                yield [text for argument in node.value.args for text in _long_strings(argument)]
        elif isinstance(node, ast.If | ast.Try | ast.With):
            stack.extend(reversed(node.body))


def _docstrings(definition: _Definition) -> Iterator[str]:
    """The documentation string of a class or function and of the definitions inside it, in file order."""
    text = ast.get_docstring(definition, clean=False)
    if text:
        yield text
    for node in definition.body:
        if isinstance(node, _Definition):
            yield from _docstrings(node)


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
