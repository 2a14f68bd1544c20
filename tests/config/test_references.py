"""`${...}` in configs: which are taken, and that what they stand for is bounded beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from own_configs import write_own

from qlora_builders.config.compose import compose, compose_tree
from qlora_builders.config.own_files import check_references
from qlora_builders.errors import ConfigError


def check(tree: Any) -> None:
    check_references(tree, lambda path: "a.yaml: ")


@pytest.mark.parametrize(
    "text",
    [
        "${training.seed}",
        "runs/${method.name}-${ training.seed }_x",
        "${loggers[0].project}",
        "${demo:train.jsonl}",
        "${demo_eval:${data.train}}",
        "${now:%Y}",
        r"\${HOME:-/root} costs 5$",
        "a{b}$",
    ],
)
def test_taken(text: str) -> None:
    check({"output_dir": text})


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:HOME}",
        "${ oc.env : HOME}",
        "${hydra:runtime.cwd}",
        "${${method.name}:HOME}",
        "${method.${model.arch}}",
        "${demo:${oc.env:HOME}}",
        "${.seed}",
        "${training.seed",
        r"\\${oc.env:HOME}",
        r"\\\${oc.env:HOME}",
        r"\${a} ${oc.env:HOME}",
        "${nowhere:x}",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml: output_dir has a .* that is neither"):
        check({"output_dir": text})


def chain(length: int, width: int) -> dict[str, str]:
    return {f"a{i}": f"${{a{i + 1}}}" * width for i in range(length)} | {f"a{length}": "x"}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (chain(19, 2), "more than 1,000,000 characters; write out what is needed"),
        (chain(12, 4), "more than 1,000,000 characters"),
        (chain(2000, 1), r"more than 20 \$\{...\} that stand for each other"),
        (dict(reversed(chain(2000, 1).items())), r"more than 20 \$\{...\} that stand for each"),
        (chain(40, 2), r"more than 20 \$\{...\} that stand for each other"),
        ({"a": ["${b}"] * 2000, "b": ["x"] * 2000}, "more than 1,000,000 characters"),
        ({"a": "${b.c}" * 2000, "b": {"c": {"d": "x" * 2000}}}, "more than 1,000,000 characters"),
        ({"a": "${b.c}" * 11000, "b": "${d}", "d": {"c": 1}}, "more than 1,000,000 characters"),
        ({"a": "${b}", "b": "x${a}"}, "b: Recursive interpolation detected"),
        ({"a": {"b": "${a}"}}, r"a\.b: Recursive interpolation detected"),
    ],
)
def test_bounded(tree: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(tree)


def test_what_is_needed_fits() -> None:
    check(chain(9, 2) | {"rules": [{"rank": "${a}"}] * 900, "a": 16})


def test_over_files_and_overrides(tmp_path: Path) -> None:
    """A chain in several files, one of which is merged over another, or with overrides."""
    rows = [f"a{i}: ${{optimizer.a{i + 1}}}${{optimizer.a{i + 1}}}" for i in range(19)]
    first, second = rows[:9], rows[9:]
    lines = ["optimizer:", *(f"  {row}" for row in second), "  a0: {x: 1}"]
    optimizer = "\n".join([*first, "component: torch.optim.SGD"])
    write_own(tmp_path, {"optimizer/mine": optimizer, "experiment/mine": "\n".join(lines)})
    with pytest.raises(ConfigError, match=r"mine\.yaml: what the .* more than 1,000,000 char"):
        compose_tree("finetune", ["optimizer=mine", "experiment=mine"], config_dir=tmp_path)
    (tmp_path / "experiment" / "mine.yaml").unlink()
    overrides = ["+optimizer." + row.replace(": ", "=", 1) for row in second]
    compose("finetune", ["optimizer=mine", "optimizer.a9=1"], config_dir=tmp_path)
    with pytest.raises(ConfigError, match="more than 1,000,000 characters"):
        compose_tree("finetune", ["optimizer=mine", *overrides], config_dir=tmp_path)


def test_text_with_such_signs_is_taken_literally() -> None:
    assert compose("generate", [r"prompt=echo \${HOME:-x}"]).prompt == "echo ${HOME:-x}"
    with pytest.raises(ConfigError, match=r"write \\\$\{ for the characters themselves"):
        compose("generate", ["prompt=echo ${HOME:-x}"])


def test_a_file_that_nobody_chose_is_in_nobodys_way(tmp_path: Path) -> None:
    files = {"bad": "output_dir: ${oc.env:HOME}", "good": "training: {seed: 3}"}
    write_own(tmp_path, {f"experiment/{name}": line for name, line in files.items()})
    assert compose("finetune", ["experiment=good"], config_dir=tmp_path).training.seed == 3
    for default in ("bad", "/experiment/bad", "{/experiment: bad}", "{override /data: chat}, bad"):
        write_own(tmp_path, {"experiment/via": f"defaults: [{default}]"})
        with pytest.raises(ConfigError, match=r"experiment/bad\.yaml: output_dir has a "):
            compose("finetune", ["experiment=via"], config_dir=tmp_path)
