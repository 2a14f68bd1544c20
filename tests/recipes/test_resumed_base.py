"""A resumed run has the base of the one that was stopped, and its folder for itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_runs import train
from safetensors.torch import load_file, save_file

from qlora_builders.files.folders import write_manifest
from qlora_builders.runs import loop, setup

Finetune = Callable[..., int]
SHORT = ("training.save_every=1", "training.keep_last=9")


@pytest.fixture(scope="module")
def trained(
    checkpoint: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Path]:
    """The folder of a run of a method and so many steps."""

    @cache
    def run(method: str, steps: int) -> Path:
        folder = tmp_path_factory.mktemp("trained") / "run"
        options = (f"method={method}", f"training.max_steps={steps}", *SHORT)
        assert train("finetune", checkpoint, rows, folder, *options) == 0
        return folder

    return run


@pytest.fixture
def base(checkpoint: Path, tmp_path: Path) -> Path:
    """The same in another place."""
    return Path(shutil.copytree(checkpoint, tmp_path / "base"))


@pytest.fixture
def finetune(base: Path, rows: Path, tmp_path: Path) -> Finetune:
    return partial(train, "finetune", base, rows, tmp_path / "run", "training.max_steps=3", *SHORT)


@pytest.fixture
def run(trained: Callable[[str, int], Path], tmp_path: Path) -> Path:
    """Stopped after step 2."""
    return stop(Path(shutil.copytree(trained("qlora", 3), tmp_path / "run")))


def stop(run: Path) -> Path:
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step_3")
    return run


def losses(run: Path) -> list[Any]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row.get("loss"), row.get("eval_loss")) for row in rows]


def reconfigure(base: Path, **changes: Any) -> None:
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def scale_weights(base: Path) -> None:
    file = base / "model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file)


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "rope_theta": (lambda b: reconfigure(b, rope_theta=2e4), "rope_theta of config.json: trained"),
    "eps": (lambda b: reconfigure(b, rms_norm_eps=1e-3), "rms_norm_eps of config.json: trained"),
    "dropout": (
        lambda b: reconfigure(b, attention_dropout=0.25),
        "attention_dropout of config.json: trained with 0.0, here 0.25",
    ),
    "weights": (scale_weights, "content of its weights: trained with "),
}


@pytest.mark.parametrize(
    ("method", "name"), [*(("qlora", name) for name in CHANGES), ("full", "weights")]
)
def test_another_base_is_refused_before_anything_is_touched(
    finetune: Finetune,
    trained: Callable[[str, int], Path],
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    method: str,
) -> None:
    shutil.copytree(trained(method, 2), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    change, message = CHANGES[name]
    change(base)
    capsys.readouterr()
    assert finetune(f"method={method}", "training.max_steps=2", "training.resume=auto") == 2
    error = capsys.readouterr().err
    assert f"error: checkpoint.dir={base}: {message}" in error
    assert error.splitlines()[0].endswith("start anew in another output_dir:")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_a_base_that_moved_goes_on_with_the_same_losses(
    finetune: Finetune, run: Path, base: Path, tmp_path: Path
) -> None:
    expected = losses(run)
    moved = base.rename(tmp_path / "moved")
    reconfigure(moved, max_position_embeddings=256, use_cache=False)
    assert finetune("training.resume=auto", f"checkpoint.dir={moved}", "checkpoint.format=hf") == 0
    assert losses(run) == expected


def test_an_older_checkpoint_knows_less(
    finetune: Finetune, run: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not its base, which is compared by the config then, nor the rates, which the config has."""
    for folder in (run / "checkpoints").iterdir():
        about = json.loads((folder / "train_state.json").read_text())
        del about["base"]
        (folder / "train_state.json").write_text(json.dumps(about))
        state = torch.load(folder / "train_state.pt", weights_only=True)
        del state["optimizer"]["param_groups"][0]["initial_lr"]
        torch.save(state, folder / "train_state.pt")
        (folder / "manifest.json").unlink()
        write_manifest(folder)
    assert finetune("training.resume=auto") == 2  # its base has moved
    assert "/base, but the checkpoint was trained with" in capsys.readouterr().err
    expected = losses(run)
    assert finetune("training.resume=auto", f"checkpoint.dir={checkpoint}") == 0
    assert losses(run) == expected


def test_a_run_that_finished_while_another_was_loading_is_kept(
    finetune: Finetune,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = setup.load_checkpoint

    def slowly(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(setup, "load_checkpoint", load)
        assert finetune("training.seed=5") == 0
        return load(*args, **options)

    monkeypatch.setattr(setup, "load_checkpoint", slowly)
    assert finetune() == 2
    assert "was used by another process while this one was loading" in capsys.readouterr().err
    assert "seed: 5" in (tmp_path / "run" / "config.yaml").read_text()
    assert (tmp_path / "run" / "adapter").is_dir()


def test_a_run_without_a_checkpoint_is_not_told_to_resume(
    finetune: Finetune, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal before the first step, and a disk that is full at the first checkpoint."""
    evaluate = loop.evaluate_objective

    def stopped(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "evaluate_objective", stopped)
        with pytest.raises(SystemExit):
            finetune()
    said = capsys.readouterr()
    nothing = "no checkpoint was written, so there is nothing to go on from; start again with"
    assert nothing in said.out
    assert "training.resume=auto" not in said.out + said.err

    def full(*args: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora_builders.runs.state.write_manifest", full)
    assert finetune("overwrite=true") == 2
    error = capsys.readouterr().err
    assert f"step_1: cannot be written: No space left on device. {nothing}" in error
    assert "training.resume=auto" not in error


def test_a_run_keeps_the_date_that_its_template_prints(
    base: Path, finetune: Finetune, tmp_path: Path
) -> None:
    template = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }} {{ strftime_now('%H%M%S%f') }}\n"
        "{{ m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant "
        "{{ strftime_now('%H%M%S%f') }}\n{% endif %}"
    )
    (base / "chat_template.jinja").write_text(template)
    assert finetune() == 0
    whole = losses(tmp_path / "run")
    stop(tmp_path / "run")
    assert finetune("training.resume=auto") == 0
    assert losses(tmp_path / "run") == whole
