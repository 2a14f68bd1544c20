"""A knob: a config field with its meaning, unit and allowed values; and the list of all of them."""

from __future__ import annotations

from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

UNITS = {
    "file": {"KB": 10**3, "MB": 10**6, "GB": 10**9},  # as Hugging Face counts them
    "memory": {"MiB": 2**20, "GiB": 2**30},
}


def knob(
    default: Any,
    meaning: str,
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    shapes_curve: bool = True,
    names_code: bool = False,
    names: str | None = None,
    units: str | None = None,
    path: str | None = None,
    ending: str | None = None,
) -> Any:
    """A config field: default, meaning with unit, allowed values (of each element for a list).

    `shapes_curve=False` says that a run may resume with another value: no loss depends on it.
    `names_code=True` says that code will run from there: given on the command line, or not at all.
    `names` is the kind of component that its `component:` names, and `units` the row of `UNITS` for
    a size. `path` says what is there: a folder to read, rows, or other; `ending` is of its name.
    """
    metadata = {
        "meaning": meaning,
        "choices": choices,
        "shapes_curve": shapes_curve,
        "names_code": names_code,
        "names": names,
        "units": units,
        "path": path,
        "ending": ending,
        "bounds": {">=": at_least, ">": above, "<=": at_most, "<": below},
    }
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Knob:
    """One leaf of a root: `training.batch_size` with its type and what `knob` said about it."""

    key: str
    type: Any
    default: Any
    meaning: str
    choices: tuple[str, ...] | None
    bounds: dict[str, float | None]
    shapes_curve: bool
    names_code: bool
    names: str | None
    units: str | None
    path: str | None
    ending: str | None


def knobs(root: type, prefix: str = "") -> dict[str, Knob]:
    """Every leaf key of a root dataclass, in the order of the schema."""
    hints = get_type_hints(root)
    found: dict[str, Knob] = {}
    for item in fields(root):
        key = prefix + item.name
        if is_dataclass(hints[item.name]):
            found.update(knobs(hints[item.name], key + "."))
            continue
        factory = item.default_factory
        default = item.default if factory is NO_DEFAULT else factory()
        found[key] = Knob(key, hints[item.name], default, **item.metadata)
    return found
