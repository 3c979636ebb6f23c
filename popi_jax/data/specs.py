"""The declared columns of a published data set, and the checks that a file has them.

See tables.py, which reads the files.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from popi_jax.errors import UserError, shown

# The declared type of a column: str, int, float, a dict of specs (a struct), a list of one spec (a list of any length)
# or Optional.
Spec = Any

_STRINGS = {pa.string(), pa.large_string(), pa.string_view()}
_INTEGERS = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
_NUMBERS = {*_INTEGERS, pa.float16(), pa.float32(), pa.float64()}
# Nulls often turn a column of integers into one of floats; `checked` looks at each.
_TYPES = {str: _STRINGS, int: _NUMBERS, float: _NUMBERS}
_LISTS = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)
_EXACT = 2**53  # Beyond it, a float does not hold every integer.
_CHECK = "check that these are the data that data.dataset names"


@dataclasses.dataclass(frozen=True)
class Optional:
    """The spec of a column or struct field that may be absent; it is then None."""

    spec: Spec


def check_struct(
    type_: pa.StructType, spec: Mapping[str, Spec], path: pathlib.Path, prefix: str, given: Mapping[str, Any]
) -> None:
    """Raises UserError if a parquet file lacks a declared column or field, or has it in another type."""
    names = [field.name for field in type_]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{path}: column {prefix + twice[0]!r} occurs twice; rename one of them")
    for name, inner in spec.items():
        if name in names:
            _check_type(type_.field(name).type, inner, path, prefix + name)
        elif name not in given and not isinstance(inner, Optional):
            raise missing(str(path), prefix + name, names)


def _check_type(type_: pa.DataType, spec: Spec, path: pathlib.Path, name: str) -> None:
    spec = bare(spec)
    if isinstance(type_, pa.DictionaryType):
        type_ = type_.value_type
    if isinstance(spec, dict) and isinstance(type_, pa.StructType):
        check_struct(type_, spec, path, f"{name}.", {})
    elif isinstance(spec, list) and isinstance(type_, _LISTS):
        _check_type(type_.value_type, spec[0], path, f"{name}[]")
    elif type_ != pa.null() and type_ not in (_TYPES[spec] if isinstance(spec, type) else ()):
        raise UserError(f"{path}: column {name!r}: expected {expected(spec)}, found {shown(str(type_))}; {_CHECK}")


def plain(type_: pa.DataType, spec: Spec) -> bool:
    """Whether every value of this type is as the spec declares it, so that `checked` would return it as it is."""
    spec = bare(spec)
    if isinstance(spec, dict):
        return (
            isinstance(type_, pa.StructType)
            and {field.name for field in type_} == set(spec)
            and all(plain(type_.field(name).type, inner) for name, inner in spec.items())
        )
    if isinstance(spec, list):
        return isinstance(type_, _LISTS) and plain(type_.value_type, spec[0])
    return spec is str and type_ in _STRINGS


def checked(spec: Spec, value: Any, where: str, path: tuple[str | int, ...]) -> Any:
    """Returns a value as the spec declares it; UserError if it is of another type."""
    spec = bare(spec)
    if value is None:
        return None
    if isinstance(spec, dict) and isinstance(value, dict):
        for name, inner in spec.items():
            if name not in value and not isinstance(inner, Optional):
                raise missing(where, _column((*path, name)), list(value))
        return {name: checked(inner, value.get(name), where, (*path, name)) for name, inner in spec.items()}
    if isinstance(spec, list) and isinstance(value, list):
        return [checked(spec[0], entry, where, (*path, i)) for i, entry in enumerate(value)]
    if spec is str and isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where}: column {_column(path)!r} has half a surrogate pair (\\ud800-\\udfff); remove it"
            ) from None
        return value
    if spec in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and math.isnan(value):
            return None
        if isinstance(value, spec) and abs(value) != math.inf:
            return value
        if abs(value) < _EXACT and value == int(value):
            return spec(value)
    raise UserError(f"{where}: column {_column(path)!r}: expected {expected(spec)}, found {shown(value)}; {_CHECK}")


def _column(path: Sequence[str | int]) -> str:
    """Returns the name of a nested value, such as pairs[2].prompt."""
    first, *rest = path
    return str(first) + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in rest)


def bare(spec: Spec) -> Spec:
    """Returns the spec without Optional."""
    return spec.spec if isinstance(spec, Optional) else spec


def expected(spec: Spec) -> str:
    """Returns the spec in words, for a message."""
    words = {str: "a string", int: "an integer", float: "a number", dict: "a struct", list: "a list"}
    return words[spec if isinstance(spec, type) else type(spec)]


def missing(where: str, name: str, found: Sequence[str]) -> UserError:
    """Returns the error about a column that is not there."""
    return UserError(f"{where}: column {name!r} is missing, found {shown(', '.join(found))}; {_CHECK}")
