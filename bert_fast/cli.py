"""Reading a `Config` from YAML and the command line, with errors and help written for a person."""

from __future__ import annotations

import datetime
import difflib
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from bert_fast.config import Config, sections
from bert_fast.errors import UserError


def _known_fields() -> list[str]:
    return [f"{section}.{name}" for section, model in sections().items() for name in model.model_fields]


def _did_you_mean(path: str) -> str:
    near = difflib.get_close_matches(path, _known_fields() + list(sections()), n=1, cutoff=0.5)
    if not near:  # the right field in the wrong section
        tail = path.rsplit(".", 1)[-1]
        near = [known for known in _known_fields() if known.rsplit(".", 1)[-1] == tail][:1]
    return f"; did you mean {near[0]}?" if near else "; --help lists every field"


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"override '{override}' is not of the form section.field=value")
    keys = path.split(".")
    node = tree
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise UserError(f"override '{override}': {key} is a value, not a section{_did_you_mean(path)}")
        node = child
    try:
        node[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override '{override}': the value is not valid YAML") from None


def _quotes(path: str, value: int | float | datetime.date, written: dict[str, str]) -> str:
    """What to say of a text that YAML reads as something else: what was `written`, and how to write it."""
    kind = "a date" if isinstance(value, datetime.date) else "true or false" if isinstance(value, bool) else "a number"
    text = written.get(path, yaml.safe_dump(value).removesuffix("\n...\n").strip())[:100]
    return (
        f'{path}: {text} is read as {kind}, and a text is wanted; write {path}: "{text}" in a file and '
        f"{path}='\"{text}\"' on a command line"
    )


def _explain(error: ValidationError, source: str, written: dict[str, str]) -> str:
    """One line on all that is wrong. `written` is the text of overrides by their path."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("function-", "constrained-")))
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown field {path}{_did_you_mean(path)}")
        elif item["type"] == "missing":
            lines.append(f"field {path} is missing; add it or pass {path}=VALUE")
        elif item["type"] == "value_error":
            lines.append(str(item["ctx"]["error"]))
        elif item["type"] == "string_type" and isinstance(item["input"], int | float | datetime.date):
            lines.append(_quotes(path, item["input"], written))
        else:
            lines.append(f"{path}: {item['msg']}, got {item['input']!r}")
    return f"{source}: " + "; ".join(dict.fromkeys(lines))


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read one YAML file, apply `section.field=value` overrides, validate.

    Raises:
        UserError: one line naming the file, the field and the mend.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"config file {path} does not exist" + (f"; there are: {', '.join(near)}" if near else ""))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except UnicodeDecodeError:
        raise UserError(f"config file {path} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"config file {path}{where} is not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"config file {path} must hold sections ({', '.join(sections())}), not a {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    written = {path: text for path, _, text in (override.partition("=") for override in overrides)}
    return config_from_tree(tree, str(path), written)


def config_from_tree(tree: dict[str, Any], source: str = "config", written: dict[str, str] | None = None) -> Config:
    """Validate plain nested values; `written` is the text of overrides by their path. Raises UserError with one line."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, source, written or {})) from None


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
            lines.append(f"  {section}.{name} ({_type_name(field.annotation)}, {default})\n      {field.description}")
    return "\n".join(lines)
