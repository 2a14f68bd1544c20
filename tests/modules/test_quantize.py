"""quantize_: NF4 weights in a model that somebody else built."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from archs import tiny_model
from torch import Tensor, nn

from qlora_builders.modules import LoRALinear, quantize_
from qlora_builders.tensor import NF4Tensor


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 64), nn.ReLU(), nn.Linear(64, 30, bias=False))


def test_it_replaces_parameters_not_modules() -> None:
    model = mlp()
    layers, plain = list(model), {k: v.clone() for k, v in model.state_dict().items()}
    assert quantize_(model, block_size=32, scale_format="none") is model
    assert list(model) == layers
    for index in (0, 2):
        weight = model[index].weight
        assert isinstance(weight, NF4Tensor)
        assert not weight.requires_grad
        assert (weight.format.block_size, weight.format.scale_format) == (32, "none")
    assert model[0].bias.requires_grad
    assert torch.equal(model[0].bias, plain["0.bias"])


def test_the_model_computes_with_the_dequantized_weights() -> None:
    model, dense = quantize_(mlp()), mlp()
    dense.load_state_dict(model.state_dict())
    x = torch.randn(5, 70)
    assert torch.equal(model(x), dense(x))


def test_the_state_dict_stays_plain_and_loads_back_bit_for_bit() -> None:
    model = quantize_(mlp())
    state = model.state_dict()
    assert all(type(value) is Tensor for value in state.values())
    other = quantize_(mlp())
    for parameter in other.parameters():
        with torch.no_grad():
            parameter.copy_(torch.ones(parameter.shape))
    other.load_state_dict(state)
    assert torch.equal(other[0].weight.codes, model[0].weight.codes)
    assert torch.equal(other[2].weight.codes, model[2].weight.codes)


def test_the_filter_sees_names_and_layers() -> None:
    model, seen = nn.ModuleDict({"a": mlp(), "b": nn.Linear(8, 8)}), {}

    def choose(name: str, layer: nn.Linear) -> bool:
        seen[name] = layer
        return name == "a.2"

    quantize_(model, choose)
    assert seen == {"a.0": model["a"][0], "a.2": model["a"][2], "b": model["b"]}
    quantized = [n for n, p in model.named_parameters() if isinstance(p, NF4Tensor)]
    assert quantized == ["a.2.weight"]


def test_a_second_call_takes_only_what_is_left() -> None:
    model = quantize_(mlp(), lambda name, layer: name == "0")
    codes = model[0].weight.codes
    quantize_(model)
    assert model[0].weight.codes is codes
    assert isinstance(model[2].weight, NF4Tensor)


def test_a_lone_layer_and_a_shared_module() -> None:
    assert isinstance(quantize_(nn.Linear(8, 8)).weight, NF4Tensor)
    layer = nn.Linear(8, 8)
    model = quantize_(nn.Sequential(layer, layer))
    assert model[0].weight is model[1].weight
    assert isinstance(layer.weight, NF4Tensor)


def test_adapters_are_never_selected() -> None:
    model = nn.Sequential(nn.Linear(8, 8), LoRALinear(8, 8, 2, 4.0))
    quantize_(model)
    quantized = [n for n, p in model.named_parameters() if isinstance(p, NF4Tensor)]
    assert quantized == ["0.weight"]


def test_it_serves_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    quantize_(model, lambda name, layer: name != "lm_head")
    dense = transformers.LlamaForCausalLM(config).eval()
    dense.load_state_dict(model.state_dict())
    ids = torch.randint(64, (2, 9))
    assert isinstance(model.model.layers[1].mlp.up_proj.weight, NF4Tensor)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense(ids).logits)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_names_the_layer(bad: float) -> None:
    model = nn.ModuleDict({"up": mlp(), "down": mlp()})
    with torch.no_grad():
        model["down"][2].weight[3, 4] = bad
    with pytest.raises(ValueError, match=r"down\.2\.weight: the weight has NaN or infinite"):
        quantize_(model)
    with pytest.raises(ValueError, match=r"^weight: the weight has NaN"):
        quantize_(model["down"][2])


def test_selecting_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"selected no nn\.Linear layer; check filter_fn"):
        quantize_(mlp(), lambda name, layer: False)
    with pytest.raises(ValueError, match="selected no"):
        quantize_(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("options", [{"block_size": 1}, {"scale_format": "x"}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"0\.weight: (block_size|scale_format) is"):
        quantize_(mlp(), **options)


def test_a_tied_head_is_refused_and_the_model_left_as_it_was() -> None:
    model = tiny_model(tie_word_embeddings=True)
    with pytest.raises(
        ValueError, match=r"lm_head\.weight is shared with model\.embed_tokens\.weight.*filter_fn"
    ):
        quantize_(model)
    assert not any(isinstance(p, NF4Tensor) for p in model.parameters())
    quantize_(model, lambda name, layer: name != "lm_head")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, NF4Tensor)
