"""Values of a config: what YAML or a shell gives, as the type of the field, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_mapping(kind: type[T], values: Any, where: str = "") -> T:
    """The dataclass `kind` of nested mappings; `where` is their place in the whole config."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where or 'config'} must be a mapping, got {type(values).__name__}")
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(map(str, set(values) - known)):
        raise ValueError(f"unknown key {where}{unknown[0]}; known here: {', '.join(sorted(known))}")
    types = get_type_hints(kind)
    return kind(
        **{
            name: from_mapping(types[name], value, f"{where}{name}.")
            if is_dataclass(types[name])
            else _typed(f"{where}{name}", value, types[name])
            for name, value in values.items()
        }
    )


def expect_types(config: object, part: str) -> None:
    """Give every field the type of its annotation, or refuse it by name."""
    for name, kind in get_type_hints(type(config)).items():
        object.__setattr__(config, name, _typed(f"{part}.{name}", getattr(config, name), kind))


def _typed(key: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`: a list as the tuple that YAML cannot write, "1e-4" as the number that YAML
    1.1 takes for a text."""
    of, inner = get_origin(kind), get_args(kind)
    if of is Literal:
        if value in inner:
            return value
        raise ValueError(f"{key} must be one of {', '.join(inner)}, got {value!r}")
    if of is tuple and inner[-1] is Ellipsis and isinstance(value, list | tuple):
        return tuple(_typed(key, item, inner[0]) for item in value)
    if of is tuple and isinstance(value, list | tuple) and len(value) == len(inner):
        return tuple(_typed(key, item, k) for item, k in zip(value, inner, strict=True))
    if of is dict and isinstance(value, Mapping):
        return {
            _typed(key, name, inner[0]): _typed(f"{key}.{name}", item, inner[1])
            for name, item in value.items()
        }
    if kind is float:
        if type(value) in (int, float):
            return value
        if isinstance(value, str):
            with suppress(ValueError):
                return float(value)
    elif type(value) is kind:
        return value
    wanted = str(kind) if inner else kind.__name__
    raise ValueError(f"{key} must be {wanted}, got {value!r}")


def positive(config: object, part: str, *names: str) -> None:
    """Refuse fields that are not above 0."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{part}.{name} must be positive, got {getattr(config, name)}")
