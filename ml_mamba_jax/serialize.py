"""Configs to JSON and back: frozen dataclasses of numbers, names, tuples and paths."""

import dataclasses
import json
import math
import os
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from ml_mamba_jax.errors import InputError
from ml_mamba_jax.names import unknown

T = TypeVar("T")


def to_json(config: Any) -> str:
    """Indented JSON of a dataclass. Infinity is written as "inf", a path as its text."""
    return json.dumps(plain(config), indent=2) + "\n"


def from_json(cls: type[T], text: str, name: str) -> T:
    """The inverse of `to_json`. `name` says in errors what is being read.

    Raises:
        InputError: not JSON, an unknown or a missing field, a value of another type; names the field.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(f"{name}: cannot be read as JSON: {error}") from error
    return _build(cls, data, name)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    aside.replace(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk and outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """One line for each field in which two configs of one class differ: `path: old -> new`."""
    if dataclasses.is_dataclass(old) and type(old) is type(new):
        pairs = [(f.name, getattr(old, f.name), getattr(new, f.name)) for f in dataclasses.fields(old)]
    elif isinstance(old, tuple) and isinstance(new, tuple) and len(old) == len(new):
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [f"{path}: {old} -> {new}"]
    return [line for name, a, b in pairs for line in differences(a, b, f"{path}.{name}".lstrip("."))]


def plain(value: Any) -> Any:
    """What `to_json` writes, before it is text."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return str(value) if isinstance(value, Path) else value


def _build(annotation: Any, data: Any, name: str) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation):
        return _build_dataclass(annotation, data, name)
    if origin is typing.Literal:
        if data not in args:
            raise InputError(f"{name}: got {data!r}, expected one of {', '.join(map(repr, args))}")
        return data
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in args:
            return None
        (annotation,) = (a for a in args if a is not type(None))
        return _build(annotation, data, name)
    if origin is tuple:
        if not isinstance(data, list):
            raise InputError(f"{name}: got {data!r}, expected a list")
        of = [args[0]] * len(data) if args[-1] is Ellipsis else args
        if len(of) != len(data):
            raise InputError(f"{name}: got {len(data)} values, expected {len(of)}")
        return tuple(_build(a, item, f"{name}[{i}]") for i, (a, item) in enumerate(zip(of, data, strict=True)))
    if (
        annotation is float
        and (isinstance(data, int | float) or data in ("inf", "-inf"))
        and not isinstance(data, bool)
    ):
        return float(data)
    if annotation is Path and isinstance(data, str):
        return Path(data)
    if not isinstance(data, annotation) or (annotation is int and isinstance(data, bool)):
        raise InputError(f"{name}: got {data!r}, expected {annotation.__name__}")
    return data


def _build_dataclass(cls: type, data: Any, name: str) -> Any:
    if not isinstance(data, dict):
        raise InputError(f"{name}: got {data!r}, expected the fields of {cls.__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise unknown(f"field of {name}", key, fields)
    required = [
        f.name for f in fields.values() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [key for key in required if key not in data]:
        raise InputError(f"{name}: got no {', '.join(missing)}, expected all of {', '.join(required)}")
    annotations = typing.get_type_hints(cls)
    try:
        return cls(**{key: _build(annotations[key], value, f"{name}.{key}") for key, value in data.items()})
    except InputError:
        raise
    except ValueError as error:  # a config that checks itself
        raise InputError(f"{name}: {error}") from error
