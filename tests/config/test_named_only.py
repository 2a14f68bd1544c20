"""Of all that can be reached by a dotted path, a config may name the rows of the table alone."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch.optim

import qlora_builders
from qlora_builders.config import instantiate
from qlora_builders.config.instantiate import GIVEN, TABLE
from qlora_builders.errors import ConfigError

NEED_EXTRAS = ("nf4_triton", "nf4_triton_kernels", "harness_model")  # not imported here
LEVELS = 3


def modules_of(package: ModuleType) -> Iterator[ModuleType]:
    yield package
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if found.name.rpartition(".")[2] not in NEED_EXTRAS:
            yield importlib.import_module(found.name)


def callables_of(package: ModuleType) -> dict[str, Any]:
    """Path -> what it leads to, through modules and classes; each object by its first path."""
    level = {module.__name__: module for module in modules_of(package)}
    seen = {id(value): value for value in level.values()}  # kept, so that no id comes twice
    found: dict[str, Any] = {}
    for _ in range(LEVELS):
        deeper: dict[str, Any] = {}
        for path, parent in level.items():
            for name, value in list(vars(parent).items()):
                if id(value) not in seen:
                    seen[id(value)] = value
                    deeper[f"{path}.{name}"] = value
        found |= {path: value for path, value in deeper.items() if callable(value)}
        parents = (type, ModuleType)  # by type(): isinstance asks objects that warn of it
        level = {p: v for p, v in deeper.items() if issubclass(type(v), parents)}
    return found


@pytest.mark.parametrize("package", [qlora_builders, torch.optim])
def test_nothing_that_can_be_reached_is_taken_but_the_rows(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instantiate, "nearest_row", lambda path, kind: "")  # takes most of the time
    found = callables_of(package)
    assert len(found) > 5000
    taken = set()
    for path in {*found, *TABLE}:
        for kind in GIVEN:
            try:
                component, _ = instantiate.resolve_component({"component": path}, kind, key="x")
            except (ConfigError, ImportError):
                continue
            taken.add(path)
            assert TABLE[path].kind == kind
            assert component.__name__ == TABLE[path].name
    assert taken <= TABLE.keys()
    assert {path for path, row in TABLE.items() if row.extra is None} <= taken


def test_the_way_in_that_the_walk_is_about_is_on_it() -> None:
    own, optim = callables_of(qlora_builders), callables_of(torch.optim)
    assert instantiate.instantiate in own.values()
    assert torch.hub.load in [*own.values(), *optim.values()]
