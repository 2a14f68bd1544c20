"""Random tiny models of every family: transformers' logits, gradients, texts and folders."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_builders import llama, load_checkpoint, save_checkpoint
from qlora_builders.checkpoint.formats.hf import config_arch
from qlora_builders.errors import CheckpointError, PlanError
from qlora_builders.models import FAMILIES, generate_batch, linear_slots
from qlora_builders.modules import CausalLM

CASES = 25
EVERYTHING = [{"match": "**", "kind": "linear", "trainable": True}]


def random_config(family: str, seed: int) -> dict[str, Any]:
    """By transformers' names: sizes, biases, RoPE and windows by chance, short enough to count."""
    rng = random.Random(f"{family}:{seed}")
    heads, head_dim = rng.choice([2, 4, 6]), rng.choice([6, 8, 12])
    layers = rng.choice([1, 2, 3, 5])
    factors = [[round(rng.uniform(1, 4), 2) for _ in range(head_dim // 2)] for _ in range(2)]
    original = rng.choice([12, 64])
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": rng.choice([31, 61, 97]),
        "hidden_size": heads * head_dim,
        "intermediate_size": rng.choice([17, 48, 80]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([1, 2, heads]),
        "max_position_embeddings": 64,
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-3]),
        "tie_word_embeddings": rng.random() < 0.4,
        "rope_parameters": rng.choice(
            [
                {"rope_type": "default"},
                {"rope_type": "linear", "factor": 2.5},
                {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original},
                {
                    "rope_type": "longrope",
                    "short_factor": factors[0],
                    "long_factor": factors[1],
                    "original_max_position_embeddings": 64,
                },
            ]
        )
        | {"rope_theta": rng.choice([1e4, 5e5])},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }
    if family != "phi3":
        config["head_dim"] = head_dim
        config["hidden_size"] = rng.choice([24, 36, 48])
    if family in ("llama", "qwen3", "smollm3", "granite", "olmo2"):
        config["attention_bias"] = rng.random() < 0.5
    if family in ("llama", "smollm3", "granite"):
        config["mlp_bias"] = rng.random() < 0.3
    window = rng.choice([None, 3, 8])
    if FAMILIES[family].windows == "all":
        config["sliding_window"] = window
    elif FAMILIES[family].windows is not None:
        config["use_sliding_window"] = window is not None
        config["sliding_window"] = window or 4
        if family != "smollm3":
            config["max_window_layers"] = rng.choice([0, 1])
    if family == "smollm3":
        config["no_rope_layers"] = rng.choice([None, [rng.choice([0, 1]) for _ in range(layers)]])
    if family == "phi3":
        config["rope_parameters"] = rng.choice(
            [
                {"rope_type": "default", "partial_rotary_factor": rng.choice([0.5, 1.0])},
                {
                    "rope_type": "longrope",
                    "short_factor": factors[0],
                    "long_factor": factors[1],
                    "partial_rotary_factor": 1.0,
                },
            ]
        )
        if config["rope_parameters"]["rope_type"] == "default" and head_dim == 6:
            config["rope_parameters"]["partial_rotary_factor"] = 0.67  # 4 of 6
        config["original_max_position_embeddings"] = 32
    if family == "granite":
        for name in FAMILIES[family].keys:
            config[name] = rng.choice([0.3, 1.0, 2.0])
    return config


def reference(family: str, seed: int) -> PreTrainedModel:
    """transformers' model with every parameter random: biases and norms too."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**random_config(family, seed))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name:
                parameter += 1
    return model


def saved(family: str, seed: int, folder: Path) -> tuple[PreTrainedModel, Path]:
    model = reference(family, seed)
    model.save_pretrained(folder)
    return model, folder


def all_trained(path: Path) -> CausalLM:
    return load_checkpoint(path, components=EVERYTHING, train=["**"], dtype=torch.float32)


def tokens(model: PreTrainedModel, *shape: int) -> Tensor:
    return torch.randint(model.config.vocab_size, shape)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    scale = max(1.0, float(wanted.detach().abs().max()))
    assert (got - wanted).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("seed", range(CASES))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_gradients_and_the_saved_folder(family: str, seed: int, tmp_path: Path) -> None:
    theirs, path = saved(family, seed, tmp_path / "theirs")
    own = all_trained(path)
    ids = tokens(theirs, 2, 20)
    wanted, got = theirs(ids).logits, own(ids)
    assert_close(got, wanted)
    weight = torch.randn_like(wanted)
    (wanted * weight).sum().backward()
    (got * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in own.named_parameters()}
    assert gradients.keys() == {name for name, _ in theirs.named_parameters()}
    largest = max(float(parameter.grad.abs().max()) for parameter in theirs.parameters())
    for name, parameter in theirs.named_parameters():
        scale = float(parameter.grad.abs().max())  # of k_proj.bias nothing but rounding, at times
        difference = (gradients[name] - parameter.grad).abs().max()
        assert difference <= 1e-5 * scale + 1e-6 * largest, name

    save_checkpoint(own, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
    )
    assert type(again) is type(theirs)
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert config_arch(tmp_path / "ours") == config_arch(path)


@pytest.mark.parametrize("seed", range(CASES))
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_in_a_batch_of_unlike_prompts(family: str, seed: int, tmp_path: Path) -> None:
    """Each step's logits in a cache, with rows of their own length, are those of the whole text."""
    _, path = saved(family, seed, tmp_path)
    own = load_checkpoint(path, dtype=torch.float32).eval()
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]
    steps = list(generate_batch(own, prompts, max_new_tokens=12))
    for prompt, answer in zip(prompts, zip(*steps, strict=True), strict=True):
        text = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            logits = own(text)[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (logits.max(1).values - chosen).abs().max() <= 1e-4  # a tie may go either way


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_are_their_documents_alone(family: str, seed: int, tmp_path: Path) -> None:
    _, path = saved(family, seed, tmp_path)
    own = all_trained(path)
    documents = [torch.randint(31, (length,)) for length in (13, 2, 7)]
    ids = torch.cat(documents)[None]
    lengths = torch.tensor([len(document) for document in documents])
    document_ids = torch.arange(3).repeat_interleave(lengths)[None]
    packed = own(ids, document_ids=document_ids)
    alone = torch.cat([own(document[None]) for document in documents], dim=1)
    assert_close(packed, alone)
    packed.square().sum().backward()
    gradients = [p.grad.clone() for p in own.parameters()]
    own.zero_grad()
    alone.square().sum().backward()
    for got, parameter in zip(gradients, own.parameters(), strict=True):
        assert_close(got, parameter.grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_qlora_is_the_dense_model_on_dequantized_weights(family: str, tmp_path: Path) -> None:
    _, path = saved(family, 0, tmp_path)
    plan = [{"match": "layers.**", "kind": "qlora", "rank": 4, "alpha": 8, "block_size": 32}]
    own = load_checkpoint(path, components=plan, dtype=torch.float32)
    dense = llama(own.spec.arch, dtype=torch.float32)
    weights = {n: t for n, t in own.state_dict().items() if "lora_" not in n}
    dense.load_state_dict(weights)
    ids = torch.randint(31, (2, 20))
    assert_close(own(ids), dense(ids))
    trained = [name for name, p in own.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * (len(linear_slots(own.spec.arch)) - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_and_a_surplus_tensor(family: str, tmp_path: Path) -> None:
    model, path = saved(family, 1, tmp_path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in model.state_dict() if ".layers.0." in name]:
        save_file({key: t for key, t in tensors.items() if key != name}, file)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            load_checkpoint(path)
    surplus = "model.layers.0.self_attn.other.weight"
    save_file(tensors | {surplus: torch.ones(2)}, file)
    with pytest.raises(CheckpointError, match="other"):
        load_checkpoint(path)


def test_head_norms_train_when_named(tmp_path: Path) -> None:
    _, path = saved("qwen3", 3, tmp_path)
    own = load_checkpoint(path, components=EVERYTHING[:0], train=["layers.*.self_attn.*_norm"])
    trained = [name for name, p in own.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * own.spec.arch.num_layers
    with pytest.raises(PlanError, match="q_norm"):
        llama("llama3_2_1b", train=["layers.0.self_attn.q_norm"], device="meta")
