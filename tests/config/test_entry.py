"""run_recipe: options, exit codes and what is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from omegaconf import OmegaConf
from own_configs import write_own

from qlora_builders.config.entry import BROKEN_PIPE, run_recipe
from qlora_builders.config.instantiate import resolve_component
from qlora_builders.config.schema import FinetuneConfig
from qlora_builders.config.sections import knobs
from qlora_builders.config.verbs import VERBS
from qlora_builders.errors import DataError, optional_import


def never(cfg: Any) -> NoReturn:
    raise AssertionError(f"main was called with {cfg}")


def test_main_gets_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    assert run_recipe(seen.append, "finetune", ["training.seed=5"]) == 0
    monkeypatch.setattr(sys, "argv", ["finetune.py", "training.seed=6"])
    assert run_recipe(seen.append, "finetune") == 0
    assert [cfg.training.seed for cfg in seen] == [5, 6]
    assert isinstance(seen[0], FinetuneConfig)


@pytest.mark.parametrize("verb", VERBS)
def test_help_lists_every_key(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_recipe(never, verb, ["nonsense", "--help"]) == 0
    text = capsys.readouterr().out
    below = dict(re.findall(r"^  ([\w.]+)=(?! ).*\n(.*)", text, re.MULTILINE))
    assert knobs(VERBS[verb].root).keys() <= below.keys()
    assert all(meaning.startswith(" " * 6) for meaning in below.values())
    assert f"usage: qlora {verb}" in text
    assert "examples:" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_help_shows_presets_and_groups(capsys: pytest.CaptureFixture[str]) -> None:
    run_recipe(never, "finetune", ["-h"])
    text = capsys.readouterr().out
    assert "method=       full | lora | qlora" in text
    assert "  optimizer.lr=0.0002\n      highest learning rate, per step\n" in text
    assert "  optimizer.betas=[0.9,0.999]\n      decay" in text
    assert "  optimizer.fused=true\n      update" in text
    assert "--nproc-per-node N" in text
    assert "\0" not in text
    assert "training.batch_size=8\n" in text
    assert "data.eval=${demo_eval:${data.train}}" in text
    assert "data.train_on=assistant\n" in text
    run_recipe(never, "plan", ["-h"])
    text = capsys.readouterr().out
    assert "data.train_on=all\n" in text  # of plan.yaml, not of the schema
    assert "--multirun" in text
    assert "--nproc-per-node" not in text


def test_print_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_recipe(never, "finetune", ["--print-config", "training.seed=9"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert printed.training.seed == 9
    assert "${" not in OmegaConf.to_yaml(printed)


def test_one_line_per_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_recipe(never, "finetune", ["training.batch_size=0", "device=gpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "error: training.batch_size=0 must be >= 1\n"
        "error: device='gpu' is not allowed; allowed: auto, cpu, cuda, cuda:N\n"
    )


def test_arguments_of_components_are_in_the_same_error(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["optimizer.lrr=1", "loggers=[{component: os.system}]", "training.sed=3"]
    assert run_recipe(never, "finetune", argv) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("error: unknown key 'training.sed'; did you mean 'training.seed'?")
    assert second.startswith("error: optimizer.lrr is not an argument of torch.optim.AdamW; did ")
    assert third.startswith("error: loggers[0].component='os.system' is no logger that a config m")


def test_errors_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    def no_data(cfg: FinetuneConfig) -> None:
        raise DataError(f"{cfg.data.train}: no such file")

    def no_extra(_: FinetuneConfig) -> None:
        optional_import("a_package_that_is_not_there", "data")

    assert run_recipe(no_data, "finetune", ["data.train=x.jsonl"]) == 2
    assert capsys.readouterr().err == "error: x.jsonl: no such file\n"
    assert run_recipe(no_extra, "finetune", []) == 2
    assert "pip install 'qlora-builders[data]'" in capsys.readouterr().err


def test_bugs_keep_their_traceback() -> None:
    def broken_import(_: FinetuneConfig) -> None:
        import a_package_that_is_not_there  # noqa: F401

    def broken(_: FinetuneConfig) -> None:
        raise ZeroDivisionError

    with pytest.raises(ModuleNotFoundError):
        run_recipe(broken_import, "finetune", [])
    with pytest.raises(ZeroDivisionError):
        run_recipe(broken, "finetune", [])


def test_out_of_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch calls it, of GPUs."""

    def fail(error: Exception) -> int:
        def main(_: FinetuneConfig) -> NoReturn:
            raise error

        return run_recipe(main, "finetune", [])

    assert fail(OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has")) == 2
    assert capsys.readouterr().err.startswith(
        "error: out of memory: 2.50 GiB were asked for; see `"
    )
    assert fail(MemoryError()) == 2
    assert "error: out of memory: more was asked for than there is" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="shapes"):
        fail(RuntimeError("shapes cannot be multiplied"))


def test_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: FinetuneConfig) -> None:
        raise KeyboardInterrupt

    assert run_recipe(interrupted, "finetune", []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_allow_lasts_for_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_optimizers.py").write_text("def lion(params, lr):\n    return lr\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_optimizers", raising=False)
    lion = "component: my_optimizers.lion\nlr: 1e-4\n"
    own = write_own(tmp_path / "configs", {"optimizer/lion": lion})
    calls: list[Any] = []

    def main(cfg: FinetuneConfig) -> None:
        calls.append(resolve_component(cfg.optimizer, "optimizer", key="optimizer")[1])

    argv = ["--config-dir", str(own), "optimizer=lion"]
    assert run_recipe(main, "finetune", argv) == 2
    assert run_recipe(main, "finetune", [*argv, "--allow", "my_optimizers"]) == 0
    assert calls == [{"lr": 1e-4}]


def test_a_reader_that_leaves_is_no_error() -> None:
    """As in `qlora finetune --print-config | head -1`."""
    command = [sys.executable, "-m", "qlora_builders.cli", "finetune", "--print-config"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (BROKEN_PIPE, b"")
