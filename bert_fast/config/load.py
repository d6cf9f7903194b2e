"""Typed objects from YAML and the command line (`Config` above all), with errors and help written for a person."""

from __future__ import annotations

import datetime
import difflib
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from bert_fast.command import one_line
from bert_fast.config import Config, sections
from bert_fast.config.choices import Names
from bert_fast.errors import UserError
from bert_fast.files import read_limited

Model = TypeVar("Model", bound=BaseModel)
_MOST_LINES = 20  # fields that one message names

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


def _load_yaml(text: str) -> Any:
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
        tree = _load_yaml(read_limited(path, _FILE_BYTES, what).decode())
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


def validate(
    model: type[Model], tree: dict[str, Any], source: str, written: dict[str, str] | None = None
) -> Model:  # fmt: skip
    """Plain nested values as a typed object.

    Args:
        written: the text of overrides on a command line, by their path.

    Raises:
        UserError: one line with `source` and every field that is wrong.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, source, model, written or {})) from None
    except RecursionError:
        raise UserError(f"{source}: the values nest too deeply") from None


def _known_fields(model: type[BaseModel]) -> list[str]:
    known = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        is_section = isinstance(inner, type) and issubclass(inner, BaseModel)
        known += [name, *(f"{name}.{each}" for each in inner.model_fields)] if is_section else [name]
    return known


def _did_you_mean(path: str, model: type[BaseModel] = Config) -> str:
    known = _known_fields(model)
    near = difflib.get_close_matches(path[:100], known, n=1, cutoff=0.5)
    if not near:  # the right field in the wrong section
        tail = path.rsplit(".", 1)[-1]
        near = [each for each in known if each.rsplit(".", 1)[-1] == tail][:1]
    guess = f"; did you mean {near[0]}?" if near else ""
    if model is Config:  # too many to list
        return guess or "; --help lists every field"
    return f"; the fields are {', '.join(known)}{guess}"


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path or path.count(".") > 2:
        raise UserError(f"override '{one_line(override, 200)}' is not of the form section.field=value")
    keys = path.split(".")
    node = tree
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise UserError(f"override '{override}': {key} is a value, not a section{_did_you_mean(path)}")
        node = child
    try:
        node[keys[-1]] = _load_yaml(text)
    except ValueError as error:
        raise UserError(f"override '{one_line(override, 200)}': the value is not valid YAML: {error.args[0]}") from None


def _quotes(path: str, value: int | float | datetime.date, written: dict[str, str], model: type[BaseModel]) -> str:
    """What to say of a text that YAML reads as something else: what was `written`, and how to write it."""
    kind = "a date" if isinstance(value, datetime.date) else "true or false" if isinstance(value, bool) else "a number"
    text = one_line(written[path], 100) if path in written else _short_yaml(value)
    name = one_line(path, 200)
    on_a_line = f" and {name}='\"{text}\"' on a command line" if model is Config else ""
    return f'{name}: {text} is read as {kind}, and a text is wanted; write {name}: "{text}" in a file{on_a_line}'


def _short_yaml(value: Any) -> str:
    try:
        return one_line(yaml.safe_dump(value).removesuffix("\n...\n").strip(), 100)
    except ValueError:  # an integer of thousands of digits
        return _short(value)


def _explain(error: ValidationError, source: str, model: type[BaseModel], written: dict[str, str]) -> str:
    """One line on all that is wrong. `written` is the text of overrides by their path."""
    lines = []
    for item in error.errors():
        path = ".".join(
            str(part) for part in item["loc"] if not str(part).startswith(("function-", "constrained-", "[key]"))
        )
        shown, kind = one_line(path, 200), item["type"]
        if kind == "extra_forbidden":
            lines.append(f"unknown field {shown}{_did_you_mean(shown, model)}")
        elif kind == "missing":
            lines.append(f"field {shown} is missing; add it" + (f" or pass {shown}=VALUE" if model is Config else ""))
        elif kind == "value_error":
            reason = str(item["ctx"]["error"])
            lines.append(reason if shown.rpartition(".")[2] in reason else f"{shown}: {reason}")
        elif kind == "string_type" and isinstance(item["input"], (int, float, datetime.date)):
            lines.append(_quotes(path, item["input"], written, model))
        else:
            lines.append(f"{path}: {item['msg']}, got {_short(item['input'])}")
    return f"{source}: " + "; ".join(dict.fromkeys(lines[:_MOST_LINES]))


def _short(value: Any) -> str:
    """A value for an error message, cut where it is long."""
    try:
        return one_line(repr(value), 100)
    except ValueError:  # an integer of thousands of digits
        return f"a number of about 2^{value.bit_length()}" if isinstance(value, int) else f"a {type(value).__name__}"


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read one YAML file, apply `section.field=value` overrides, validate.

    Raises:
        UserError: one line naming the file, the field and the mend.
    """
    tree = read_yaml(path, "config file", f"sections ({', '.join(sections())})", "configs/mini_cpu.yaml")
    for override in overrides:
        _apply_override(tree, override)
    written = {path: text for path, _, text in (override.partition("=") for override in overrides)}
    return config_from_tree(tree, str(path), written)


def config_from_tree(tree: dict[str, Any], source: str = "config", written: dict[str, str] | None = None) -> Config:
    """Validate plain nested values; `written` is the text of overrides by their path. Raises UserError with one line."""
    return validate(Config, tree, source, written)


def to_yaml(tree: dict[str, Any]) -> str:
    """Plain values as YAML that `load_config` reads back unchanged."""
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, allow_unicode=True)


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(str(a) for a in args)
    if origin is typing.Annotated:
        return _type_name(args[0])
    if args and (origin is typing.Union or str(origin) == "<class 'types.UnionType'>"):
        return "|".join(_type_name(a) for a in args)
    if origin in (list, dict):
        return f"{origin.__name__}[{', '.join(_type_name(a) for a in args)}]"
    return "none" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def describe_fields() -> str:
    """Every field with type, default and meaning, for --help."""
    lines = []
    for section, model in sections().items():
        assert issubclass(model, BaseModel)
        lines.append(f"\n{section}: {Config.model_fields[section].description}")
        for name, field in model.model_fields.items():
            default = "required" if field.default is PydanticUndefined else f"default {field.default}"
            choices = next((each.table for each in field.metadata if isinstance(each, Names)), {})
            kind = "|".join(choices) or _type_name(field.annotation)
            lines.append(f"  {section}.{name} ({kind}, {default})\n      {field.description}")
            lines += [f"        {value}: {choice.what}" for value, choice in choices.items()]
    return "\n".join(lines)
