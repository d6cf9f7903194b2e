"""A run's `Config` from a YAML file and overrides, and the `--help` of its fields."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from bert_fast.command import one_line
from bert_fast.config import Config, sections
from bert_fast.config.choices import OneOf
from bert_fast.config.renamed import renamed_settings
from bert_fast.config.yaml_files import did_you_mean, parse_yaml, read_yaml, validate
from bert_fast.errors import UserError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read one YAML file, apply `section.field=value` overrides, validate.

    Raises:
        UserError: one line naming the file, the field and how to fix it.
    """
    tree = read_yaml(path, "config file", f"sections ({', '.join(sections())})", "configs/mini_cpu.yaml")
    for override in overrides:
        _apply_override(tree, override)
    written = {path: text for path, _, text in (override.partition("=") for override in overrides)}
    return config_from_tree(tree, str(path), written)


def config_from_tree(tree: dict[str, Any], source: str = "config", written: dict[str, str] | None = None) -> Config:
    """Validate plain nested values; `written` is the text of overrides by their path.

    Raises:
        UserError: one line. Where settings have names of earlier versions it says only that: a file that holds them lacks
            fields that are required today.
    """
    renamed = renamed_settings(tree)
    if renamed is not None:
        raise UserError(f"{source}: {renamed}")
    return validate(Config, tree, source, written or {})


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path or path.count(".") > 2:
        raise UserError(f"override '{one_line(override, 200)}' is not of the form section.field=value")
    keys = path.split(".")
    node = tree
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise UserError(
                f"override '{override}': {key} is a value, not a section{did_you_mean(path, Config, has_help=True)}"
            )
        node = child
    try:
        node[keys[-1]] = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"override '{one_line(override, 200)}': the value is not valid YAML: {error.args[0]}") from None


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(str(a) for a in args)
    if origin is typing.Annotated:
        return _type_name(args[0])
    if args and (origin is typing.Union or origin is types.UnionType):
        return "|".join(_type_name(a) for a in args)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{{{', '.join(annotation.model_fields)}}}"
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
            default = "required" if field.default is PydanticUndefined else f"default {_shown(field.default)}"
            lines.append(f"  {section}.{name} ({_type_of(field)}, {default})\n      {field.description}")
            lines += [f"      {line}" for line in _choices_of(field)]
    return "\n".join(lines)


def _type_of(field: FieldInfo) -> str:
    choices = _described(field)
    return "|".join(choices) if choices else _type_name(field.annotation)


def _choices_of(field: FieldInfo) -> Iterator[str]:
    """One line for every name of the table that a field's value is from."""
    choices = _described(field)
    width = max(map(len, choices), default=0)
    yield from (f"{name:{width}}  {what}" for name, what in choices.items())


def _described(field: FieldInfo) -> dict[str, str]:
    """The names that a field's value is one of, and what they are; empty for a field without a table."""
    return next((each.described() for each in field.metadata if isinstance(each, OneOf)), {})


def _shown(default: Any) -> str:
    """A default as YAML has it."""
    return "unset" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
