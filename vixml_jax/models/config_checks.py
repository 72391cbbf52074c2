"""Configs of towers come from files of others: every field has its type, and a size that can be meant."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

from vixml_jax.errors import UserError

# No tower has more, by far; without bounds a file of a hundred bytes asks for the memory of a cluster.
MOST = 1 << 24
MOST_OF = {"num_layers": 4096, "image_size": 8192, "patch_size": 8192}
# Sizes that may be zero: there is no such table, the logits are not shifted.
MAY_BE_ZERO = ("token_types", "norm_offset", "mean")
MAY_BE_NEGATIVE = ("mean", "norm_offset")


def check(config: Any) -> Any:
    """Returns a tower's config, or one of its parts, if every field can be what it is meant to be.

    Raises:
      UserError: naming the first field that cannot.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        _check(field.name, getattr(config, field.name), hints[field.name])
    if hasattr(config, "num_heads") and not hasattr(config, "head_dim") and config.dim % config.num_heads:
        raise UserError(f"{config.num_heads} attention heads do not divide {config.dim}")
    return config


def check_layers(number: Any) -> None:
    """Checks a number of layers, before anything is counted up to it."""
    _check_number("num_layers", number, int, lowest=None)


def _check(name: str, value: Any, kind: Any) -> None:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return
        kind = next(option for option in options if option is not type(None))
        origin = typing.get_origin(kind)
    if origin is tuple:
        items = typing.get_args(kind)
        is_open = len(items) == 2 and items[1] is Ellipsis
        if not isinstance(value, tuple) or not (is_open or len(value) == len(items)):
            raise _wrong(name, value)
        for item in value:
            # Numbers of layers count from zero.
            _check_number(name, item, items[0], lowest=0 if is_open else None)
    elif dataclasses.is_dataclass(kind):
        if not isinstance(value, typing.cast(type, kind)):
            raise _wrong(name, value)
        check(value)
    elif kind is bool or kind is str:
        if not isinstance(value, kind):
            raise _wrong(name, value)
    else:
        _check_number(name, value, kind, lowest=0 if name in MAY_BE_ZERO else None)


def _check_number(name: str, value: Any, kind: type, lowest: int | None) -> None:
    fits = type(value) is int or (kind is float and type(value) is float and math.isfinite(value))
    if not fits:
        raise _wrong(name, value)
    if kind is int and not (1 if lowest is None else lowest) <= value <= MOST_OF.get(name, MOST):
        raise _wrong(name, value)
    if kind is float and name not in MAY_BE_NEGATIVE and not (value > 0 or lowest == 0 <= value):
        raise _wrong(name, value)


def _wrong(name: str, value: Any) -> UserError:
    shown = repr(value)
    return UserError(f"its {name} cannot be {shown if len(shown) <= 60 else shown[:57] + '...'}")
