"""Loading Hugging Face directories: every layout, every kind of damage."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shared import Checkpoints, checkpoints, edit_json, edit_tensors, logits, reference
from torch import Tensor

from qlora_builders.checkpoint import load_checkpoint, read_arch
from qlora_builders.errors import CheckpointError, PlanError
from qlora_builders.modules import FrozenNF4Linear, LoRALinear
from qlora_builders.tensor import NF4Tensor, to_nf4

QLORA = {"match": "layers.**", "kind": "qlora", "rank": 4, "alpha": 8}
UP = "model.layers.1.mlp.up_proj.weight"


def stored_tensors(path: Path) -> dict[str, Tensor]:
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


# ---- what is loaded -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gqa", "tied", "biased", "linear_rope"])
@pytest.mark.parametrize("sharded", [False, True])
def test_plain_logits_equal_transformers(variant: str, sharded: bool) -> None:
    path = checkpoints(variant, sharded=sharded)
    assert (len(list(path.glob("*.safetensors"))) > 2) == sharded
    model = load_checkpoint(path, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(reference(path)), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(stored: torch.dtype, dtype: torch.dtype) -> None:
    """Each tensor is the stored one, cast once or quantized from that."""
    path = checkpoints("biased", stored, sharded=True)
    model = load_checkpoint(path, [QLORA], train=["norm"], dtype=dtype)
    expected = stored_tensors(path)
    checked = 0
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert parameter.dtype == torch.float32
            continue
        checked += 1
        if name == "model.norm.weight":
            assert parameter.requires_grad
            assert torch.equal(parameter, expected[name].float())
        elif isinstance(parameter, NF4Tensor):
            want = to_nf4(expected[name].to(dtype))
            assert parameter.dtype == dtype
            assert torch.equal(parameter.codes, want.codes), name
            assert torch.equal(parameter.scales, want.scales), name
            assert torch.equal(parameter.scale_groups, want.scale_groups), name
        else:
            assert parameter.dtype == dtype
            assert torch.equal(parameter, expected[name].to(dtype)), name
    assert checked == len(expected)


def test_plan_and_adapters() -> None:
    model = load_checkpoint(checkpoints(), [QLORA])
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert len(layers) == 14
    for layer in layers:
        assert isinstance(layer.weight, NF4Tensor)
        assert not layer.lora_B.weight.any()
        assert layer.lora_A.weight.std() > 0
        assert layer.lora_A.weight.requires_grad
    assert not any(parameter.is_meta for parameter in model.parameters())
    rule = {"match": "layers.*.mlp.*", "kind": "frozen_nf4", "block_size": 32}
    model = load_checkpoint(checkpoints("biased"), [rule | {"scale_format": "none"}])
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, FrozenNF4Linear)
    assert (layer.weight.format.block_size, layer.weight.format.scale_format) == (32, "none")
    assert layer.bias is not None


def test_adapter_init_is_seeded() -> None:
    path = checkpoints()  # writing it draws random numbers too
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = load_checkpoint(path, [QLORA])
        weights.append(model.model.layers[1].mlp.up_proj.lora_A.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_weights_do_not_depend_on_the_file(own_copy: Checkpoints) -> None:
    path = own_copy()
    model = load_checkpoint(path, dtype=torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    file = path / "model.safetensors"
    with file.open("r+b") as handle:  # in place: a mapping of the file would see it
        size = file.stat().st_size
        handle.seek(size // 2)
        handle.write(bytes(size - size // 2))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_loading_does_not_import_the_compiler() -> None:
    """It would take longer, and more memory, than a small model."""
    code = """
        import sys
        from qlora_builders import load_checkpoint
        rule = {"match": "layers.**", "kind": "qlora", "rank": 4, "alpha": 8}
        model = load_checkpoint(sys.argv[1], [rule])
        heavy = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "triton")
        print([name for name in heavy if name in sys.modules])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(checkpoints())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_arch_overrides_the_config() -> None:
    path = checkpoints()
    arch = replace(read_arch(path), rope_theta=1e6)
    assert load_checkpoint(path, arch=arch).spec.arch == arch


def test_tied_head(own_copy: Checkpoints) -> None:
    file = own_copy("tied") / "model.safetensors"
    embedding = load_file(file)["model.embed_tokens.weight"]
    path = edit_tensors(file, {"lm_head.weight": embedding.clone()})  # some writers store it twice
    for directory in (checkpoints("tied"), path):
        model = load_checkpoint(directory)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not model.lm_head.weight.is_meta


def test_rotary_buffers_of_old_files_are_ignored(own_copy: Checkpoints) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load_checkpoint(edit_tensors(own_copy() / "model.safetensors", {name: torch.ones(8)}))


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({UP: None}, f"tensors missing: {UP}; not expected: none"),
        ({"model.surplus": torch.ones(2)}, "tensors missing: none; not expected: model.surplus"),
        ({UP: torch.ones(96, 63)}, f"{UP} has shape .*63.*; the model needs"),
        ({"model.norm.weight": torch.ones(65)}, "model.norm.weight has shape .*65"),
        ({UP: torch.ones(96, 64, dtype=torch.int8)}, f"{UP} has dtype torch.int8; expected float"),
        ({UP: torch.full((96, 64), torch.nan)}, f"model.safetensors: {UP}: .*NaN"),
        ({UP: torch.full((96, 64), torch.inf)}, f"model.safetensors: {UP}: .*(inf|Inf)"),
    ],
)
def test_damaged_tensors(
    own_copy: Checkpoints, changes: dict[str, Tensor | None], message: str
) -> None:
    path = edit_tensors(own_copy() / "model.safetensors", changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path, [QLORA])
    assert str(path) in str(caught.value)


def test_value_too_large_for_the_dtype(own_copy: Checkpoints) -> None:
    """70000 is infinity in float16."""
    file = own_copy() / "model.safetensors"
    weight = load_file(file)[UP]
    weight[3, 4] = 70_000
    path = edit_tensors(file, {UP: weight})
    with pytest.raises(CheckpointError, match=f"{UP}: "):
        load_checkpoint(path, [QLORA], dtype=torch.float16)


def test_untied_head_under_a_tying_config(own_copy: Checkpoints) -> None:
    path = edit_tensors(
        own_copy("tied") / "model.safetensors", {"lm_head.weight": torch.zeros(53, 64)}
    )
    message = "lm_head.weight differs from model.embed_tokens.weight, but config.json ties them"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_many_missing_tensors_are_counted(own_copy: Checkpoints) -> None:
    file = own_copy() / "model.safetensors"
    path = edit_tensors(file, {name: None for name in load_file(file) if "layers.1" in name})
    with pytest.raises(CheckpointError, match=r"missing: (model[^,]*, ){7}\S+ and 1 more"):
        load_checkpoint(path)


def test_not_a_checkpoint(tmp_path: Path, own_copy: Checkpoints) -> None:
    with pytest.raises(CheckpointError, match="no such directory; give a local checkpoint dir"):
        load_checkpoint("meta-llama/Llama-3.1-8B")
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        load_checkpoint(tmp_path)
    path = own_copy()
    intact = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors"):
        load_checkpoint(path)
    for content in (b"<html>not found</html>", intact[:-100]):
        (path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({UP: "../x.safetensors"}, "points to '../x"),
        ({UP: "/etc/passwd"}, "points to '/etc/passwd'"),
        ({UP: ".."}, "shards missing"),
        ({UP: "x" * 999}, "shards missing: xxx"),
        ({UP: 3}, "points to 3"),
        ({UP: "gone.safetensors"}, "shards missing: gone.safetensors; download again"),
        ({UP: "model-00001-of-NN.safetensors"}, f"no tensor '{UP}', though .* names it here"),
        (None, "not a safetensors index: it has no weight_map"),
        ([1], "not a safetensors index"),
    ],
)
def test_bad_index(own_copy: Checkpoints, changes: Any, message: str) -> None:
    path = own_copy(sharded=True)
    file = path / "model.safetensors.index.json"
    weight_map = json.loads(file.read_text())["weight_map"]
    first = weight_map["model.embed_tokens.weight"]
    if isinstance(changes, dict):
        changes = weight_map | {k: first if "NN" in str(v) else v for k, v in changes.items()}
    edit_json(file, {"weight_map": changes})
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_missing_shard(own_copy: Checkpoints) -> None:
    path = own_copy(sharded=True)
    next(path.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"shards missing: model-00002-of-\d+\.safetensors"):
        load_checkpoint(path)


def test_plan_that_does_not_fit() -> None:
    with pytest.raises(PlanError, match="the layers are 0 to 1"):
        load_checkpoint(checkpoints(), [QLORA | {"match": "layers.2.**"}])
