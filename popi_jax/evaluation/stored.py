"""Reads the files of a finished run. A damaged one is one line that names the file, the field and the remedy."""

import json
import pathlib
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import Field

from popi_jax.data import files
from popi_jax.errors import UserError

REMEDY = "remove the file and run again"
Number = float | None  # A number that is not finite is stored as null.
Pair = Annotated[list[Number], Field(min_length=2, max_length=2)]
T = TypeVar("T")


class _Stored(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow", strict=True)


class _Row(_Stored):
    """The fields of a row that tables and reports read."""

    method: str
    accuracy: float
    seed: int = 0
    n: int | None = None
    accuracy_ci95: Pair | None = None
    popi_minus_this: Number = None
    popi_minus_this_ci95: Pair | None = None
    context_tokens_mean: Number = None
    summary_tokens_mean: Number = None
    raw_signal_tokens_mean: Number = None
    loss: Number = None
    informativeness_nats: Number = None
    accuracy_by_persona: dict[str, float] | None = None
    summaries: dict[str, dict[str, Number | Pair] | None] | None = None  # Runs of older versions do not have it.
    published_accuracy: Number = None
    published_source: str | None = None


class _SignalsRow(_Row):
    signals: int


class _Results(_Stored):
    config: str
    dataset: str
    variant: str = ""
    split: str
    rows: Annotated[list[_Row], Field(min_length=1)]
    by_signals: list[_SignalsRow] = []


class _Sample(_Stored):
    user: str
    signal_tokens: int = 0
    logp_chosen: Number = None
    logp_rejected: Number = None
    h: Number = None  # Runs of older versions do not have it.


class _Environment(_Stored):
    """The fields that the report shows."""

    class Packages(_Stored):
        jax: str
        flax: str

    class Devices(_Stored):
        count: int
        kind: str

    popi_jax: str
    git: str | None
    packages: Packages
    devices: Devices
    started: str


def results(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the content of results.json, with at least one row; None if the file does not exist."""
    return _object(folder / "results.json", _Results)


def environment(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the content of environment.json; None if the file does not exist."""
    return _object(folder / "environment.json", _Environment)


def samples(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of samples.jsonl; [] if the file does not exist."""
    path = folder / "samples.jsonl"
    if not path.exists():
        return []
    lines = list(files.numbered_objects(path, REMEDY, REMEDY))
    for number, sample in lines:
        checked(sample, _Sample, f"{path}:{number}")
    return [sample for _, sample in lines]


def checked(value: Any, kind: type[T], where: str) -> T:
    """Returns `value` as a `kind`; UserError if a field is missing or of another type."""
    try:
        return pydantic.TypeAdapter(kind).validate_json(json.dumps(value), strict=True)  # In JSON, a tuple is a list.
    except pydantic.ValidationError as error:
        fields = ", ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors()[:12])
        raise UserError(f"{where}: damaged, or written by another version ({fields[:400]}); {REMEDY}") from None


def _object(path: pathlib.Path, kind: type[_Stored]) -> dict[str, Any] | None:
    value = files.read_json(path, REMEDY)
    if value is not None:
        checked(value, kind, str(path))
    return value
