"""Allow-listed components: what is refused, and that nothing is imported before it is checked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from qlora_builders.config.instantiate import (
    OPTIONAL_COMPONENTS,
    allow_prefixes,
    instantiate,
    resolve_component,
)
from qlora_builders.errors import ConfigError


def optimizer(**node: object) -> object:
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    return instantiate({"component": "torch.optim.SGD", **node}, parameters, key="optimizer")


def test_instantiates_with_runtime_arguments() -> None:
    sgd = optimizer(lr=0.5, momentum=0.25)
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["lr"] == 0.5
    assert sgd.defaults["momentum"] == 0.25


def test_keyword_arguments_of_the_caller() -> None:
    node = {"component": "qlora_builders.errors.nearest", "name": "rnak"}
    assert instantiate(node, key="x", options=["rank", "alpha"]) == "rank"


def test_unknown_keyword() -> None:
    message = r"optimizer\.momentm is not an argument of torch\.optim\.SGD; did you mean 'momentum'"
    with pytest.raises(ConfigError, match=message):
        optimizer(momentm=0.9)


@pytest.mark.parametrize("arguments", [{"lr": -1.0}, {"lr": "fast"}])
def test_the_call_itself_refuses(arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"optimizer: torch\.optim\.SGD refuses its arguments: "):
        optimizer(**arguments)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, r"optimizer\.component=None must be a dotted path"),
        (3, r"optimizer\.component=3 must be a dotted path"),
        ("os.system", r"component='os\.system' is outside the allowed packages: qlora_builders\."),
        ("torch.hub.load", r"outside the allowed packages: .*--allow PREFIX"),
        ("torch.optimizers.SGD", "outside the allowed packages"),
        ("torch.optim.SGDD", r"'torch\.optim' has no 'SGDD'; did you mean 'SGD'\?"),
        ("torch.optim.zzzzzz", r"'torch\.optim' has no 'zzzzzz'$"),
        ("torch.optim.adamm.AdamW", r"'torch\.optim' has no 'adamm'; did you mean"),
        ("torch.optim.SGD.stepp", r"'torch\.optim\.SGD' has no 'stepp'; did you mean 'step'"),
        ("torch.optim.lr_scheduler", r"is a module, not a class or function"),
        ("torch.optim.", "is not a dotted path of public names"),
        ("torch.optim.SGD.__init__", "is not a dotted path of public names"),
        ("torch.optim._functional.sgd", "is not a dotted path of public names"),
        ("torch.optim.optimizer.torch", "leads out of the allowed packages"),
        ("torch.optim.optimizer.torch.hub.load", r"optimizer\.torch is defined in 'torch'"),
        ("torch.optim.optimizer.functools.partial", "is defined in 'functools'"),
        ("torch.optim.optimizer.Any", "is defined in 'typing'"),
        ("qlora_builders.config.instantiate.importlib.import_module", "defined in 'importlib'"),
    ],
)
def test_refused_paths(path: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_component({"component": path}, key="optimizer")


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    (folder / "planted_module.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "planted_module", raising=False)


def test_nothing_is_imported_before_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, monkeypatch, "raise RuntimeError('imported')")
    with pytest.raises(ConfigError, match="outside the allowed packages"):
        resolve_component({"component": "planted_module.Thing"}, key="loss")
    assert "planted_module" not in sys.modules


def test_prefix_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, monkeypatch, "def double(x):\n    return 2 * x\nTEXT = 'a'\n")
    node = {"component": "planted_module.double", "x": 4}
    with allow_prefixes(["planted_module"]):
        assert instantiate(node, key="loss") == 8
        with pytest.raises(ConfigError, match="outside the allowed packages"):
            resolve_component({"component": "planted_module_2.double"}, key="loss")
        with pytest.raises(ConfigError, match="leads out of the allowed packages"):
            resolve_component({"component": "planted_module.TEXT"}, key="loss")
    with pytest.raises(ConfigError, match="outside the allowed packages"):
        instantiate(node, key="loss")


def test_modules_that_do_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, monkeypatch, "import no_such_module_at_all\n")
    with allow_prefixes(["planted_module", "absent_package"]):
        with pytest.raises(ConfigError, match="importing 'planted_module' fails: No module named"):
            resolve_component({"component": "planted_module.x"}, key="loss")
        with pytest.raises(ConfigError, match="there is no module 'absent_package'"):
            resolve_component({"component": "absent_package.x"}, key="loss")


def test_optional_optimizers_are_allowed_by_their_exact_names() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4096))
    node = {"component": "bitsandbytes.optim.AdamW8bit", "lr": 1e-3}
    optimizer = instantiate(node, [parameter], key="optimizer")
    assert type(optimizer).__module__.startswith("bitsandbytes.")
    with pytest.raises(ConfigError, match="outside the allowed packages"):
        instantiate({"component": "bitsandbytes.optim.Adam"}, [parameter], key="optimizer")
    with pytest.raises(ConfigError, match=r"optimizer.lrr is not an argument .* did you mean 'lr'"):
        instantiate({**node, "lrr": 1}, [parameter], key="optimizer")


@pytest.mark.parametrize("path", sorted(OPTIONAL_COMPONENTS))
def test_a_missing_package_names_its_extra(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, package = path.rpartition(".")[0], path.partition(".")[0]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'qlora-builders\[{package}\]'"):
        instantiate({"component": path}, [], key="optimizer")
