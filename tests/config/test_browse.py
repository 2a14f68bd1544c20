"""`qlora configs ls / show / cp / validate`."""

from __future__ import annotations

from pathlib import Path

import pytest
from own_configs import write_own

from qlora_builders.config import browse
from qlora_builders.config.compose import compose, save_config
from qlora_builders.config.shipped import shipped_dir
from qlora_builders.errors import ConfigError


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert browse.main([]) == 0
    assert browse.main(["--help"]) == 0
    assert capsys.readouterr().out.count("usage: qlora configs ls") == 2


def test_ls(capsys: pytest.CaptureFixture[str]) -> None:
    assert browse.main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(shipped_dir("configs").rglob("*.yaml")))
    assert all(len(line.split()) > 2 for line in lines), "a config lacks its comment line"


@pytest.mark.parametrize("name", ["experiment/demo_qlora", "demo_qlora", "demo_qlora.yaml"])
def test_show(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert browse.main(["show", name]) == 0
    file = shipped_dir("configs") / "experiment" / "demo_qlora.yaml"
    assert capsys.readouterr().out == file.read_text("utf-8")


def test_cp_and_validate_the_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "experiment" / "mine.yaml"
    assert browse.main(["cp", "demo_qlora", str(copy)]) == 0
    how = f"use it with --config-dir {tmp_path} experiment=mine"
    assert capsys.readouterr().out == f"wrote {copy}; {how}\n"
    assert browse.main(["validate", "mine", "--config-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "1 valid: experiment/mine\n"
    with pytest.raises(ConfigError, match=r"mine\.yaml' exists; remove it"):
        browse.main(["cp", "demo_qlora", str(copy)])
    with pytest.raises(ConfigError, match=r"is not a file name that ends in \.yaml"):
        browse.main(["cp", "demo_qlora", str(tmp_path)])


def test_validate_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browse, "validate", lambda *_: [])  # test_compose validates each of them
    assert browse.main(["validate"]) == 0
    assert browse.main(["validate", "all"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second == f"{len(list(shipped_dir('configs').rglob('*.yaml')))} valid"


def test_cp_of_a_runs_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("training: {max_steps: 3}\n")
    copy = tmp_path / "mine" / "experiment" / "again.yaml"
    assert browse.main(["cp", str(tmp_path / "config.yaml"), str(copy)]) == 0
    assert copy.read_text() == "# @package _global_\ntraining: {max_steps: 3}\n"
    save_config(compose("finetune", ["training.epochs=2"]), tmp_path / "config.yaml")
    again = copy.with_name("a.yaml")
    assert browse.main(["cp", str(tmp_path / "config.yaml"), str(again)]) == 0
    assert again.read_text().count("# @package") == 1
    assert compose("finetune", ["experiment=a"], config_dir=tmp_path / "mine").training.epochs == 2
    capsys.readouterr()
    assert browse.main(["cp", "demo_qlora", str(tmp_path / "a.yaml")]) == 0
    assert "; to use it, move it to DIR/GROUP/NAME.yaml" in capsys.readouterr().out


def test_validate_finds_every_problem(tmp_path: Path) -> None:
    files = {
        "experiment/a": "training: {epochs: 0, sed: 0}\n",
        "experiment/b": "optimizer: {lrr: 1}\ndevice: x\n",
        "c": "a: 1\n",
    }
    write_own(tmp_path, files)
    with pytest.raises(ConfigError) as caught:
        browse.main(["validate", "a", "--config-dir", str(tmp_path)])
    problems = str(caught.value).splitlines()
    problems += browse.validate("experiment/b", tmp_path) + browse.validate("c", tmp_path)
    assert problems == [
        "experiment/a.yaml: unknown key 'training.sed'; did you mean 'training.seed'?",
        "experiment/a.yaml: training.epochs=0 must be >= 1",
        "experiment/b.yaml: device='x' is not allowed; allowed: auto, cpu, cuda, cuda:N",
        "experiment/b.yaml: optimizer.lrr is not an argument of torch.optim.AdamW;"
        " did you mean 'lr'?",
        "c.yaml: no command uses it; groups are method, optimizer, data, experiment",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["show", "demo_qlor"],
            "no single config is called 'demo_qlor'; did you mean 'demo_qlora'",
        ),
        (["shwo", "x"], "unknown command 'shwo'; did you mean 'show'"),
        (["show"], "qlora configs show: wrong number of arguments"),
        (["ls", "--nope"], "unrecognized arguments: --nope; see --help"),
    ],
)
def test_mistakes(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        browse.main(argv)


def test_short_name_of_two_configs(tmp_path: Path) -> None:
    write_own(tmp_path, {"data/same": "name: same\n", "method/same": "name: same\n"})
    with pytest.raises(ConfigError, match="it may be data/same or method/same"):
        browse.main(["show", "same", "--config-dir", str(tmp_path)])
