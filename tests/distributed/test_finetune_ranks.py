"""The recipes on several ranks: the same losses and adapters as in one process, and resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from qlora_builders.cli import load_recipe, recipe_path
from qlora_builders.config.compose import compose

# Sums over ranks are added up in another order than sums over rows. Measured after 20 steps on 2 to
# 4 ranks: losses differ by 1.4e-7, adapters by 1.3e-6, gradient norms by 2.2e-7, and where all of
# the 114,534 weights train by 3.8e-6.
LOSS_BOUND = 1e-6  # relative
NORM_BOUND = 1e-5  # relative
WEIGHT_BOUND = 1e-5  # of the largest weight


def finetune(overrides: list[str], output_dir: Path, verb: str = "finetune") -> None:
    load_recipe(recipe_path(verb))(compose(verb, [*overrides, f"output_dir={output_dir}"]))


def rows(run: Path, key: str = "loss") -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in lines if key in row}


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    return load_file(file)


def assert_same_run(run: Path, alone: Path) -> None:
    for key in ("loss", "eval_loss", "grad_norm"):
        ours, theirs = rows(run, key), rows(alone, key)
        assert ours.keys() == theirs.keys()
        assert ours == pytest.approx(theirs, rel=NORM_BOUND if key == "grad_norm" else LOSS_BOUND)
    for key in ("target_tokens", "eval_tokens"):
        assert rows(run, key) == rows(alone, key)
    assert_same_weights(run, alone)


def assert_same_weights(run: Path, alone: Path) -> None:
    ours, theirs = weights(run), weights(alone)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        difference = (ours[name] - weight).abs().max()
        assert difference <= WEIGHT_BOUND * weight.abs().max(), name


@pytest.fixture(scope="module")
def alone(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    finetune(overrides, run)
    assert len(rows(run)) == 20
    return run


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("world_size", [2, slow(3), 4])
def test_a_run_does_not_depend_on_the_number_of_ranks(
    world_size: int, overrides: list[str], alone: Path, tmp_path: Path
) -> None:
    run_ranks(world_size, finetune, overrides, tmp_path / "run", join=False)
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.parametrize("device", [slow("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "compiled"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # met while it traces
@pytest.mark.filterwarnings("ignore:.*is deprecated.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
def test_one_rank_through_fsdp2_is_a_process_alone(
    name: str, device: str, overrides: list[str], tmp_path: Path
) -> None:
    options = {
        "float32": [],
        "bfloat16": ["training.dtype=bfloat16", "training.compute_dtype=bfloat16"],
        "compiled": ["training.compile=on"],
    }
    short = [*overrides, *options[name], f"device={device}", "training.max_steps=8"]
    finetune(short, tmp_path / "alone")
    run_ranks(1, finetune, short, tmp_path / "run", join=False)
    assert_same_run(tmp_path / "run", tmp_path / "alone")
    if device == "cpu":  # GPUs add up gradients in an order of the moment
        assert rows(tmp_path / "run") == rows(tmp_path / "alone")


@pytest.mark.parametrize(("before", "after"), [slow(2, 4), slow(4, 2), slow(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(
    before: int, after: int, overrides: list[str], alone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    if before == 1:
        shutil.copytree(alone, run)
    else:
        run_ranks(before, finetune, overrides, run, join=False)
    shutil.rmtree(run / "checkpoints/step_20")
    resumed = [*overrides, "training.resume=auto"]
    if after == 1:
        finetune(resumed, run)
    else:
        run_ranks(after, finetune, resumed, run, join=False)
    assert_same_run(run, alone)


VARIANTS = {
    "replicated": (2, ["distributed.shard=1"]),
    "packed": (3, ["data.packing=best_fit", "data.max_seq_len=80"]),
    "recomputed": (2, ["training.activation_checkpointing=full"]),
    "selective": (2, ["training.activation_checkpointing=selective"]),
    "replicated shards": (4, ["distributed.shard=2"]),
    "offloaded": (2, ["distributed.cpu_offload=true"]),
    "all at once": (
        4,
        [
            "distributed.shard=2",
            "distributed.cpu_offload=true",
            "training.activation_checkpointing=full",
            "training.compile=on",
        ],
    ),
    "norms train too": (2, ["train=[norm, embed_tokens]"]),
}


@pytest.mark.parametrize("name", [n if n == "packed" else slow(n) for n in VARIANTS])
def test_so_it_is_with_every_option(name: str, overrides: list[str], tmp_path: Path) -> None:
    world_size, options = VARIANTS[name]
    short = [*overrides, *options, "training.max_steps=8"]
    plain = [word for word in short if word not in options or word.startswith(("data.", "train="))]
    finetune(plain, tmp_path / "alone")
    run_ranks(world_size, finetune, short, tmp_path / "run", join=False)
    assert_same_run(tmp_path / "run", tmp_path / "alone")


@pytest.mark.parametrize("async_save", [slow("false"), "true"])
def test_full_training_is_saved_in_parts_and_resumed(
    async_save: str, overrides: list[str], tmp_path: Path
) -> None:
    full = [word for word in overrides if word != "method.rank=3"]
    full += ["method=full", "optimizer.lr=0.001", f"training.async_save={async_save}"]
    finetune(full, tmp_path / "alone")
    run_ranks(3, finetune, full, tmp_path / "run", join=False)
    files = {file.name for file in (tmp_path / "run/checkpoints/step_10").iterdir()}
    parts = {f"shard-{rank:05}-model-00001-of-00001.safetensors" for rank in (1, 2, 3)}
    assert files == parts | {"train_state.pt", "train_state.json", "manifest.json"}
    shutil.rmtree(tmp_path / "run/checkpoints/step_20")
    run_ranks(2, finetune, [*full, "training.resume=auto"], tmp_path / "run", join=False)
    assert_same_run(tmp_path / "run", tmp_path / "alone")


# Log-probabilities are sums of a hundred, so a reward has a larger absolute error than a loss.
REWARD_BOUND = 1e-5


def dpo(overrides: list[str], output_dir: Path) -> None:
    finetune(["experiment=demo_dpo", *overrides], output_dir, "dpo")


def test_preferences_do_not_depend_on_the_number_of_ranks(
    overrides: list[str], tmp_path: Path
) -> None:
    """Of 25 rows, 3 a batch, one is left for the last batch: the other rank has a stand-in."""
    options = [*overrides, "training.max_steps=10", "data.max_seq_len=100"]
    options += ["training.eval_every=null", "training.activation_checkpointing=full"]
    dpo(options, tmp_path / "alone")
    run_ranks(2, dpo, options, tmp_path / "run", join=False)
    for key in ("loss", "grad_norm", "target_tokens", "rewards/margins", "rewards/accuracies"):
        ours, theirs = rows(tmp_path / "run", key), rows(tmp_path / "alone", key)
        bound = {"loss": LOSS_BOUND, "rewards/margins": REWARD_BOUND}.get(key, NORM_BOUND)
        assert len(theirs) == 10
        assert ours == pytest.approx(theirs, rel=bound, abs=REWARD_BOUND)
    assert_same_weights(tmp_path / "run", tmp_path / "alone")
