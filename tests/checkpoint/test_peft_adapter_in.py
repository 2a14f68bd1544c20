"""Adapters that PEFT wrote, in our hands: its logits, for every way of naming targets and ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import Checkpoints, Logits, Reference, in_peft, quiet_peft, trained_in_peft

from qlora_builders.checkpoint import (
    adapter_plan,
    load_adapter,
    load_checkpoint,
    load_with_adapter,
    read_adapter,
)
from qlora_builders.errors import CheckpointError
from qlora_builders.modules import LoRALinear
from qlora_builders.tensor import NF4Tensor

pytestmark = [
    quiet_peft,
    # PEFT cannot merge a lora_bias into a layer without a bias; we can
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
    # PEFT takes its own lora_B.bias for a lora_B that was cut into shards
    pytest.mark.filterwarnings(r"ignore:Adapter 'default'. \d+ LoRA tensor.s. have invalid shape"),
]
# what PEFT says when it copies the base weight of an adapted head into the adapter, which is the
# very case that the tests with a head want
SAVES_THE_HEAD = "ignore:Setting `save_embedding_layers` to `True`"

CONFIGS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r".*layers\.1\..*\.(q|up)_proj"},
    "all_linear": {"target_modules": "all-linear"},
    "one_layer": {"target_modules": ["o_proj"], "layers_to_transform": [1]},
    "rank_pattern": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"layers.1.mlp.up_proj": 3, "k_proj": 2},
    },
    "alpha_pattern": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "alpha_pattern": {r"layers\.0\..*_proj": 3, "up_proj": 32},
    },
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns_and_rslora": {
        "target_modules": ["q_proj", "down_proj"],
        "use_rslora": True,
        "rank_pattern": {"down_proj": 9},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 1},
    },
    "saved_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved_norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "saved_layernorm": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "saved_embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved_slot": {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "lora_bias": {"target_modules": ["q_proj", "up_proj"], "lora_bias": True},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "dora_patterns": {
        "target_modules": ["q_proj", "up_proj", "lm_head"],
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"up_proj": 9},
        "modules_to_save": ["norm"],
    },
    "excluded": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["0.self_attn.k_proj"]},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.5},
}


@pytest.mark.filterwarnings(SAVES_THE_HEAD)
@pytest.mark.parametrize(
    ("variant", "quantize"), [("gqa", "auto"), ("biased", "auto"), ("gqa", "nf4")]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_we_give_pefts_logits(
    checkpoints: Checkpoints,
    reference: Reference,
    logits: Logits,
    tmp_path: Path,
    name: str,
    variant: str,
    quantize: str,
) -> None:
    path = checkpoints(variant)
    base = reference(path)
    if quantize == "nf4":
        bare = load_with_adapter(path, None, quantize="nf4", dtype=torch.float32)
        base.load_state_dict(bare.state_dict())
    theirs = trained_in_peft(base, **CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    ours = load_with_adapter(path, tmp_path, quantize=quantize, dtype=torch.float32)
    for slot, module in ours.named_modules():
        if isinstance(module, LoRALinear):
            in_nf4 = quantize == "nf4" and slot != "lm_head"
            assert isinstance(module.weight, NF4Tensor) == in_nf4
    # a slot that was saved was trained from the dequantized weight, and is plain here
    down = ours.model.layers[0].mlp.down_proj.weight
    assert name != "saved_slot" or not isinstance(down, NF4Tensor)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    assert (logits(theirs) - logits(base)).abs().max() > 0.1


def test_magnitudes_as_a_state_dict_names_them(
    checkpoints: Checkpoints, reference: Reference, logits: Logits, tmp_path: Path
) -> None:
    """In memory PEFT keeps them in a module; save_pretrained drops its `.weight`, others do not."""
    theirs = trained_in_peft(reference(checkpoints()), target_modules=["q_proj"], use_dora=True)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    names = [name for name in tensors if name.endswith(".lora_magnitude_vector")]
    assert len(names) == 2
    save_file(tensors | {f"{n}.weight": tensors.pop(n) for n in names}, file)
    assert not any(name.endswith("vector") for name in load_file(file))
    ours = load_with_adapter(checkpoints(), tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights of the model")
@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_that_peft_converted(
    checkpoints: Checkpoints, reference: Reference, logits: Logits, tmp_path: Path, use_rslora: bool
) -> None:
    """Its adapter belongs to a base that PEFT changed; what PEFT makes of it, to the original."""
    base = reference(checkpoints())
    pissa = {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"}
    start = in_peft(base, use_rslora=use_rslora, **pissa)
    start.peft_config["default"].init_lora_weights = True  # as PEFT's documentation has it
    start.save_pretrained(tmp_path / "start")
    theirs = trained_in_peft(base, use_rslora=use_rslora, **pissa)
    theirs.save_pretrained(
        tmp_path / "trained", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    ours = load_with_adapter(checkpoints(), tmp_path / "trained", dtype=torch.float32)
    assert ours.model.layers[0].self_attn.q_proj.rank == 8
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-3, atol=1e-3)
    assert (logits(theirs) - logits(base)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapter_is_widened(
    checkpoints: Checkpoints, reference: Reference, tmp_path: Path, dtype: torch.dtype
) -> None:
    theirs = trained_in_peft(reference(checkpoints()), target_modules=["q_proj"]).to(dtype)
    theirs.save_pretrained(tmp_path)
    ours = load_with_adapter(checkpoints(), tmp_path)
    own = ours.model.layers[1].self_attn.q_proj.lora_A.weight
    peft = theirs.base_model.model.model.layers[1].self_attn.q_proj.lora_A["default"].weight
    assert own.dtype == torch.float32
    assert torch.equal(own, peft.float())


def test_adapter_plan(checkpoints: Checkpoints, reference: Reference, tmp_path: Path) -> None:
    theirs = trained_in_peft(
        reference(checkpoints()),
        target_modules=r"model\.layers\.1\.self_attn\.q_proj|lm_head",
        rank_pattern={"lm_head": 2},
        use_rslora=True,
        modules_to_save=["norm", "down_proj"],
    )
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    info = read_adapter(tmp_path)
    assert info.base is None
    assert info.copies == {}
    adapter = {"alpha": 8, "use_rslora": True}
    head = {"match": "lm_head", "kind": "lora", "rank": 2, **adapter}
    q_proj = {"match": "layers.1.self_attn.q_proj", "rank": 4, **adapter}
    saved = [
        {"match": f"layers.{i}.mlp.down_proj", "kind": "linear", "trainable": True} for i in (0, 1)
    ]
    norms = [f"layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")]
    for quantize in ("auto", "none"):
        assert adapter_plan(info, quantize=quantize) == (
            [head, q_proj | {"kind": "lora"}, *saved],
            [*norms, "norm"],
        )
    assert adapter_plan(info, quantize="nf4") == (
        [
            {"match": "layers.**", "kind": "frozen_nf4"},
            head,
            q_proj | {"kind": "qlora"},
            *saved,
        ],
        [*norms, "norm"],
    )
    with pytest.raises(CheckpointError, match="quantize is 'nf5'; did you mean 'nf4'"):
        adapter_plan(info, quantize="nf5")


@pytest.mark.filterwarnings(SAVES_THE_HEAD)
def test_head_of_another_base_is_found_out(
    checkpoints: Checkpoints, reference: Reference, tmp_path: Path
) -> None:
    """PEFT stores the base weight of an adapted head; it must be ours."""
    base = reference(checkpoints())
    with torch.no_grad():
        base.lm_head.weight[0, 0] += 1
    trained_in_peft(base, target_modules=["q_proj", "lm_head"]).save_pretrained(tmp_path)
    assert read_adapter(tmp_path).copies == {"lm_head.base_layer.weight": "lm_head.weight"}
    with pytest.raises(CheckpointError, match=r"lm_head\.base_layer\.weight differs from lm_head"):
        load_with_adapter(checkpoints(), tmp_path, dtype=torch.float32)


@pytest.mark.filterwarnings(SAVES_THE_HEAD)
def test_head_in_lower_precision(
    checkpoints: Checkpoints, reference: Reference, tmp_path: Path
) -> None:
    """The copy is compared in the model's dtype."""
    trained_in_peft(reference(checkpoints()), target_modules=["lm_head"]).save_pretrained(tmp_path)
    load_with_adapter(checkpoints(), tmp_path, dtype=torch.bfloat16)


# PEFT does not tie what it saves: a trained embedding leaves the head of a tied model as it was
PEFT_UNTIES = "ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"


@pytest.mark.filterwarnings(PEFT_UNTIES)
def test_half_a_tied_pair_is_refused(
    checkpoints: Checkpoints, reference: Reference, tmp_path: Path
) -> None:
    base = reference(checkpoints("tied"))
    for saved, message in (
        ("embed_tokens", r"not in the file: lm_head\.weight"),
        ("lm_head", "to train both add 'embed_tokens'"),
    ):
        adapter = tmp_path / saved
        trained_in_peft(base, target_modules=["q_proj"], modules_to_save=[saved]).save_pretrained(
            adapter
        )
        with pytest.raises(CheckpointError, match=message):
            load_with_adapter(checkpoints("tied"), adapter)


@pytest.mark.filterwarnings(PEFT_UNTIES)
def test_tied_pair_that_came_apart_is_refused(
    checkpoints: Checkpoints, reference: Reference, tmp_path: Path
) -> None:
    both = trained_in_peft(
        reference(checkpoints("tied")),
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    )
    both.save_pretrained(tmp_path)
    components, patterns = adapter_plan(read_adapter(tmp_path))
    model = load_checkpoint(checkpoints("tied"), components, train=patterns)
    with pytest.raises(
        CheckpointError, match="lm_head and embed_tokens differ, but the model ties"
    ):
        load_adapter(model, tmp_path)
