"""Values of a config: each of the type of its annotation, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, get_args, get_origin, get_type_hints


def expect_types(config: object, part: str) -> None:
    """Give every field the type of its annotation, or refuse it by name."""
    for name, kind in get_type_hints(type(config)).items():
        object.__setattr__(config, name, typed(f"{part}.{name}", getattr(config, name), kind))


def typed(key: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`: a list as the tuple that YAML cannot write, "1e-4" as the number that YAML
    1.1 takes for a text."""
    of, inner = get_origin(kind), get_args(kind)
    if of is Literal:
        if value in inner:
            return value
        raise ValueError(f"{key} must be one of {', '.join(inner)}, got {value!r}")
    if of is tuple and inner[-1] is Ellipsis and isinstance(value, list | tuple):
        return tuple(typed(key, item, inner[0]) for item in value)
    if of is tuple and isinstance(value, list | tuple) and len(value) == len(inner):
        return tuple(typed(key, item, k) for item, k in zip(value, inner, strict=True))
    if of is dict and isinstance(value, Mapping):
        return {
            typed(key, name, inner[0]): typed(f"{key}.{name}", item, inner[1])
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
    """Refuse fields that are 0 or less, by name."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{part}.{name} must be positive, got {getattr(config, name)}")
