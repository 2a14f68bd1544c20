"""Damaged adapter metadata: a typed error that names the file, or the very same adapter."""

from __future__ import annotations

import json
import random
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_builders.checkpoint import load_checkpoint, load_with_adapter, save_adapter
from qlora_builders.errors import CheckpointError
from qlora_builders.modules import LoRALinear

MUTATIONS = 300  # of each file, by the text and by the value
VALUES: list[Any] = [
    None, True, False, 0, -1, 7, 10**30, 0.5, float("nan"), float("inf"), "", "x", "(", [], {},
    [[]], [None], ["x"], {"x": 1}, {"": ""}, [1, 2], "q_proj", ["q_proj"], "LORA", {"q_proj": 3},
]  # fmt: skip


def damage_text(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text))
        kind = rng.randrange(4) if rng.random() < 0.3 else rng.randrange(3)
        if kind == 0:
            text = text[:at] + rng.choice(string.printable) + text[at + 1 :]
        elif kind == 1:
            text = text[:at] + text[at + rng.randint(1, 9) :]
        elif kind == 2:
            text = text[:at] + rng.choice('[]{}",:0e-\\\x00\u00e9') + text[at:]
        else:
            text = text[:at]
        text = text or "x"
    return text


def damage_value(text: str, rng: random.Random) -> str:
    """Another value, or none, somewhere in the object."""
    content = json.loads(text)
    node: Any = content
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.6:
            node = node[key]
            continue
        if rng.random() < 0.2:
            del node[key]
        else:
            node[key] = rng.choice(VALUES)
        return json.dumps(content)


@pytest.mark.filterwarnings("ignore:Possible (nested set|set):FutureWarning")
@pytest.mark.parametrize("damage", [damage_text, damage_value])
@pytest.mark.parametrize("name", ["adapter_config.json", "qlora_base.json"])
def test_damaged_metadata(
    checkpoints: Callable[..., Path],
    randomize_adapters: Callable[[nn.Module], None],
    tmp_path: Path,
    name: str,
    damage: Callable[[str, random.Random], str],
) -> None:
    plan = [
        {"match": "layers.**", "kind": "frozen_nf4"},
        {"match": "layers.*.self_attn.q_proj", "kind": "qlora", "rank": 4, "alpha": 8},
        {"match": "layers.1.mlp.up_proj", "kind": "qlora", "rank": 2, "alpha": 3},
    ]
    model = load_checkpoint(checkpoints(), plan, train=["norm"])
    randomize_adapters(model)
    save_adapter(model, tmp_path / "intact")
    expected = adapter_of(model)
    text = (tmp_path / "intact" / name).read_text()
    shutil.copytree(tmp_path / "intact", tmp_path / "damaged")
    rng = random.Random(f"{name} {damage.__name__}")
    refused = 0
    for _ in range(MUTATIONS):
        damaged = damage(text, rng)
        (tmp_path / "damaged" / name).write_text(damaged)
        loaded = message = None
        try:
            loaded = load_with_adapter(checkpoints(), tmp_path / "damaged")
        except CheckpointError as error:
            message = str(error)
        if loaded is None:
            assert message is not None
            assert str(tmp_path / "damaged") in message, damaged
            refused += 1
            continue
        got = adapter_of(loaded)
        assert got.keys() == expected.keys(), damaged
        assert all(torch.equal(got[key], expected[key]) for key in got), damaged
    assert refused > MUTATIONS / 3


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    """Everything that was trained, and how strongly it acts."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return trained | {
        f"{name}.scaling": torch.tensor(module.scaling)
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }
