"""Components by name: what is refused, and that nothing is imported before it is checked."""

from __future__ import annotations

import sys
from inspect import signature
from pathlib import Path

import pytest
import torch

from qlora_builders.config.instantiate import (
    GIVEN,
    TABLE,
    allow_prefixes,
    instantiate,
    resolve_component,
)
from qlora_builders.errors import ConfigError


def optimizer(**node: object) -> object:
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    node = {"component": "torch.optim.SGD", **node}
    return instantiate(node, "optimizer", [parameters], key="optimizer")


def test_instantiates_with_runtime_arguments() -> None:
    sgd = optimizer(lr=0.5, momentum=0.25)
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["lr"] == 0.5
    assert sgd.defaults["momentum"] == 0.25


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
        (
            ["torch.optim.SGD"],
            r"component=\['torch\.optim\.SGD'\] must be a dotted path",
        ),
        ("os.system", r"'os\.system' is no optimizer that a config may name; .*--allow PREFIX"),
        ("torch.hub.load", r"is no optimizer that a config may name; .*--allow PREFIX"),
        ("torch.optimizers.SGD", r"did you mean 'torch\.optim\.SGD'\?"),
        ("torch.optim.SGDD", r"did you mean 'torch\.optim\.SGD'\?"),
        ("torch.optim.adamw.AdamW", r"did you mean 'torch\.optim\.AdamW'\?"),
        ("AdamW", r"did you mean 'torch\.optim\.AdamW'\?|allowed: .*torch\.optim\.AdamW"),
        ("bitsandbytes.optim.adamw8bit", r"did you mean 'bitsandbytes\.optim\.AdamW8bit'\?"),
        ("torch.optim.SGD.step", "is no optimizer that a config may name"),
        ("torch.optim.", "is no optimizer that a config may name"),
        ("torch.optim.optimizer.torch.hub.load", "is no optimizer that a config may name"),
        ("qlora_builders.config.instantiate.instantiate", "is no optimizer that a config may name"),
        (
            "qlora_builders.training.loggers.WandbLogger",
            r"is a component of kind logger, and this is a place for kind optimizer",
        ),
    ],
)
def test_refused_paths(path: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_component({"component": path}, "optimizer", key="optimizer")


def test_an_optimizer_is_no_logger() -> None:
    node = {"component": "torch.optim.AdamW"}
    with pytest.raises(ConfigError, match=r"loggers\[0\].*is a component of kind optimizer, and"):
        resolve_component(node, "logger", key="loggers[0]")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("torch.optim.SGDD", r"'torch\.optim' has no 'SGDD'; did you mean 'SGD'\?"),
        ("torch.optim.zzzzzz", r"'torch\.optim' has no 'zzzzzz'$"),
        ("torch.optim.adamm.AdamW", r"'torch\.optim' has no 'adamm'; did you mean"),
        ("torch.optim.SGD.stepp", r"'torch\.optim\.SGD' has no 'stepp'; did you mean 'step'"),
        ("torch.optim.lr_scheduler", r"is a module, not a class or function"),
        ("torch.optim.", "is not a dotted path of public names"),
        ("torch.optim...os.system", "is not a dotted path of public names"),
        ("torch.optim.SGD.__init__", "is not a dotted path of public names"),
        ("torch.optim._functional.sgd", "is not a dotted path of public names"),
        ("torch.optim.optimizer.torch", "leads out of the allowed packages"),
        ("torch.optim.optimizer.torch.hub.load", r"optimizer\.torch is defined in 'torch'"),
        ("torch.optim.optimizer.functools.partial", "is defined in 'functools'"),
        ("torch.optim.optimizer.Any", "is defined in 'typing'"),
        ("torch.optimal.x", r"nor inside torch\.optim\.; did"),
    ],
)
def test_an_allowed_package_is_not_left(path: str, message: str) -> None:
    with allow_prefixes(["torch.optim"]), pytest.raises(ConfigError, match=message):
        resolve_component({"component": path}, "optimizer", key="optimizer")


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("", "is not a package, such as my_package"),
        (".", "is not a package"),
        ("torch..optim", "is not a package"),
        ("os; rm", "is not a package"),
        ("qlora_builders", "what configs may name of qlora_builders they may name without"),
        ("qlora_builders.config.", "allow a package of your own"),
    ],
)
def test_refused_prefixes(prefix: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message), allow_prefixes([prefix]):
        pass


@pytest.mark.parametrize("kind", GIVEN)
def test_no_node_reaches_what_the_run_gives_or_is_private(kind: str) -> None:
    path = next(row.path for row in TABLE.values() if row.kind == kind)
    for name in GIVEN[kind]:
        with pytest.raises(ConfigError, match=rf"x\.{name} is given by the run; take it out"):
            resolve_component({"component": path, name: 1}, kind, key="x")
    for other in ("_target_", "__class__", "a.b", "a b", "", "lambda", 3, None, True):
        with pytest.raises(ConfigError, match=r"x: .* is not the name of an argument"):
            resolve_component({"component": path, other: 1}, kind, key="x")


def test_no_key_of_a_node_is_an_argument_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever `instantiate` and what it calls take, a component gets it from its node."""
    plant(tmp_path, monkeypatch, "def echo(**given):\n    return given\n")
    ours = {name for one in (instantiate, resolve_component) for name in signature(one).parameters}
    given = dict.fromkeys([*ours, "allow", "self", "path"], "theirs")
    with allow_prefixes(["planted_module"]):
        node = {"component": "planted_module.echo", **given}
        assert instantiate(node, "logger", [], {"run_dir": 1}, key="x") == {**given, "run_dir": 1}


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    (folder / "planted_module.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "planted_module", raising=False)


def test_nothing_is_imported_before_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, monkeypatch, "raise RuntimeError('imported')")
    with pytest.raises(ConfigError, match="is no logger that a config may name"):
        resolve_component({"component": "planted_module.Thing"}, "logger", key="loss")
    assert "planted_module" not in sys.modules


def test_prefix_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, monkeypatch, "def double(x):\n    return 2 * x\nTEXT = 'a'\n")
    node = {"component": "planted_module.double", "x": 4}
    with allow_prefixes(["planted_module"]):
        assert instantiate(node, "logger", key="loss") == 8
        with pytest.raises(ConfigError, match="is no logger that a config may name"):
            resolve_component({"component": "planted_module_2.double"}, "logger", key="loss")
        with pytest.raises(ConfigError, match="leads out of the allowed packages"):
            resolve_component({"component": "planted_module.TEXT"}, "logger", key="loss")
    with pytest.raises(ConfigError, match="is no logger that a config may name"):
        instantiate(node, "logger", key="loss")


def test_modules_that_do_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, monkeypatch, "import no_such_module_at_all\n")
    with allow_prefixes(["planted_module", "absent_package"]):
        with pytest.raises(ConfigError, match="importing 'planted_module' fails: No module named"):
            resolve_component({"component": "planted_module.x"}, "logger", key="loss")
        with pytest.raises(ConfigError, match="there is no module 'absent_package'"):
            resolve_component({"component": "absent_package.x"}, "logger", key="loss")


def test_optional_optimizers_are_named_exactly() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(4096))]
    node = {"component": "bitsandbytes.optim.AdamW8bit", "lr": 1e-3}
    optimizer = instantiate(node, "optimizer", [parameters], key="optimizer")
    assert type(optimizer).__module__.startswith("bitsandbytes.")
    with pytest.raises(ConfigError, match="is no optimizer that a config may name"):
        resolve_component({"component": "bitsandbytes.optim.Adam"}, "optimizer", key="optimizer")
    with pytest.raises(ConfigError, match=r"optimizer.lrr is not an argument .* did you mean 'lr'"):
        resolve_component({**node, "lrr": 1}, "optimizer", key="optimizer")


@pytest.mark.parametrize("path", [row.path for row in TABLE.values() if row.extra])
def test_a_missing_package_names_its_extra(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, extra = path.rpartition(".")[0], TABLE[path].extra
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'qlora-builders\[{extra}\]'"):
        resolve_component({"component": path}, "optimizer", key="optimizer")


@pytest.mark.parametrize("path", [p for p in TABLE if p.startswith("torch.")])
def test_every_optimizer_of_torch_steps_and_goes_on(path: str) -> None:
    """As a run needs it: steps without a closure, on matrices, with state that loads again."""
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizers = [
        instantiate({"component": path}, "optimizer", [[weight]], key="optimizer") for _ in "ab"
    ]
    weight.grad = torch.full_like(weight, 0.5)
    optimizers[0].step()
    assert weight.isfinite().all()
    assert (weight < 1).all()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    optimizers[1].step()
    assert weight.isfinite().all()
