"""Typed objects from YAML files: bounded reading, validation, and errors that a user can act on.

Configs are read with it (`bert_fast.config.load`), and recipes, machine files and cost files.
"""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from bert_fast.command import one_line
from bert_fast.errors import UserError
from bert_fast.files import read_limited

Model = TypeVar("Model", bound=BaseModel)
_MOST_PROBLEMS = 20  # that one message names

_FILE_BYTES = 1 << 18  # of a config, a recipe, a system file
_MOST_ALIASES, _MOST_ENTRIES = 1000, 10_000
_MOST_VALUES, _MOST_DEPTH = 100_000, 32


class _Loader(yaml.SafeLoader):
    """YAML of bounded size: aliases and merged mappings can stand for far more than is written."""

    num_aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            self.num_aliases += 1
            if self.num_aliases > _MOST_ALIASES:
                raise yaml.YAMLError(f"more than {_MOST_ALIASES:,} aliases")
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MOST_ENTRIES:
            raise yaml.YAMLError(f"a mapping of more than {_MOST_ENTRIES:,} entries")


def parse_yaml(text: str) -> Any:
    """Plain values of bounded number and depth. Raises ValueError: the reason, and in a second argument the line if known."""
    try:
        tree = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(reason, f" line {mark.line + 1}" if mark else "") from None
    except RecursionError:
        raise ValueError(f"it nests more than {_MOST_DEPTH} levels") from None
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        # What YAML's own constructors raise for values such as the date 2026-13-45
        raise ValueError(f"a value is not what it looks like: {error}") from None
    pending, count = [(tree, 0)], 0
    while pending:
        value, depth = pending.pop()
        count += 1
        if depth > _MOST_DEPTH:
            raise ValueError(f"it nests more than {_MOST_DEPTH} levels, or contains itself")
        if count > _MOST_VALUES:
            raise ValueError(f"it stands for more than {_MOST_VALUES:,} values")
        if isinstance(value, dict):
            pending += [(each, depth + 1) for pair in value.items() for each in pair]
        elif isinstance(value, (list, tuple, set)):
            pending += [(each, depth + 1) for each in value]
    return tree


def read_yaml(path: str | Path, what: str, holds: str, example: str) -> dict[str, Any]:
    """The mapping in a YAML file; empty for an empty file. `holds`: what should be in it, for the error message.

    Raises:
        UserError: one line naming the file and, where known, the line: missing, too large, no YAML, no mapping.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(
            f"{what} {path} {'is not a file' if path.exists() else 'does not exist'}"
            + (f"; there are: {', '.join(near[:20])}" if near else f"; {example} is an example")
        )
    try:
        tree = parse_yaml(read_limited(path, _FILE_BYTES, what).decode())
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} is not UTF-8 text") from None
    except ValueError as error:
        reason, where = (*error.args, "")[:2]
        raise UserError(f"{what} {path}{where} is not valid YAML: {reason}; {example} is an example") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        kind = "keys that are not words" if isinstance(tree, dict) else f"a {type(tree).__name__}"
        raise UserError(f"{what} {path} must hold {holds}, not {kind}; {example} is an example")
    return tree


def to_yaml(tree: dict[str, Any]) -> str:
    """Plain values as YAML that `read_yaml` reads back unchanged."""
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, allow_unicode=True)


def validate(
    model: type[Model], tree: dict[str, Any], source: str, overrides: Mapping[str, str] | None = None
) -> Model:
    """Plain nested values as a typed object.

    Args:
        source: where the values are from, which starts the error message.
        overrides: the text of the values that are from a command line, by their path (`section.field`); None where values
            cannot be given on one.

    Raises:
        UserError: one line with `source` and every field that is wrong.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {_Explanation(model, overrides).of(error)}") from None
    except RecursionError:
        raise UserError(f"{source}: the values nest too deeply") from None


def did_you_mean(path: str, model: type[BaseModel], has_help: bool) -> str:
    """What to add to the message that `path` is not a field of `model`. `has_help`: whether `--help` lists its fields."""
    known = _known_fields(model)
    near = difflib.get_close_matches(path[:100], known, n=1, cutoff=0.5)
    if not near:  # the right field in the wrong section
        name = path.rsplit(".", 1)[-1]
        near = [each for each in known if each.rsplit(".", 1)[-1] == name][:1]
    guess = f"; did you mean {near[0]}?" if near else ""
    if has_help:  # too many to list
        return guess or "; --help lists every field"
    return f"; the fields are {', '.join(known)}{guess}"


def _known_fields(model: type[BaseModel]) -> list[str]:
    known = []
    for name, field in model.model_fields.items():
        known.append(name)
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            known += [f"{name}.{each}" for each in inner.model_fields]
    return known


class _Explanation:
    """One line on all that is wrong with the values of a model."""

    def __init__(self, model: type[BaseModel], overrides: Mapping[str, str] | None) -> None:
        self._model, self._overrides = model, overrides or {}
        self._is_on_command_line = overrides is not None

    def of(self, error: ValidationError) -> str:
        return "; ".join(dict.fromkeys([self._problem(item) for item in error.errors()][:_MOST_PROBLEMS]))

    def _problem(self, item: Any) -> str:
        path = ".".join(str(part) for part in item["loc"] if not str(part).startswith(_PYDANTICS_OWN))
        shown, kind, value = one_line(path, 200), item["type"], item["input"]
        if kind == "extra_forbidden":
            return f"unknown field {shown}{did_you_mean(shown, self._model, self._is_on_command_line)}"
        if kind == "missing":
            or_pass = f" or pass {shown}=VALUE" if self._is_on_command_line else ""
            return f"field {shown} is missing; add it{or_pass}"
        if kind == "value_error":
            reason = str(item["ctx"]["error"])
            return (
                reason if _is_model(self._model, item["loc"]) else f"{shown}: {reason}"
            )  # a model's check names fields
        if kind == "string_type" and isinstance(value, (int, float, datetime.date)):
            return self._needs_quotes(path, value)
        return f"{path}: {item['msg']}, got {_short(value)}"

    def _needs_quotes(self, path: str, value: int | float | datetime.date) -> str:
        """What to say of a text that YAML reads as something else: what was written, and how to write it."""
        kind = (
            "a date" if isinstance(value, datetime.date) else "true or false" if isinstance(value, bool) else "a number"
        )
        text = one_line(self._overrides[path], 100) if path in self._overrides else _short_yaml(value)
        name = one_line(path, 200)
        on_a_line = f" and {name}='\"{text}\"' on a command line" if self._is_on_command_line else ""
        return f'{name}: {text} is read as {kind}, and a text is wanted; write {name}: "{text}" in a file{on_a_line}'


def _is_model(model: type[BaseModel], path: Sequence[str | int]) -> bool:
    """Whether a path of field names leads to a model, and not to a single value."""
    for name in path:
        inner = model.model_fields[str(name)].annotation if str(name) in model.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return False
        model = inner
    return True


_PYDANTICS_OWN = ("function-", "constrained-", "[key]")  # parts of a path that are not of the values


def _short_yaml(value: Any) -> str:
    try:
        return one_line(yaml.safe_dump(value).removesuffix("\n...\n").strip(), 100)
    except ValueError:  # an integer of thousands of digits
        return _short(value)


def _short(value: Any) -> str:
    """A value for an error message, cut where it is long."""
    try:
        return one_line(repr(value), 100)
    except ValueError:  # an integer of thousands of digits
        return f"a number of about 2^{value.bit_length()}" if isinstance(value, int) else f"a {type(value).__name__}"
