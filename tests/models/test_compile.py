"""torch.compile and torch.export go through NF4 layers whole, and change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from archs import tiny_arch
from torch import Tensor, nn

from qlora_builders import llama
from qlora_builders.modules import CausalLM

PLAN = [
    {"match": "layers.**", "kind": "frozen_nf4"},
    {"match": "layers.*.*.{q,v,up,down}_proj", "kind": "qlora", "rank": 4, "alpha": 8},
]
# PyTorch's own deprecations, met while it traces
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning"),
]


on_each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
)


# DoRA, and a start whose frozen half the forward pass subtracts
VARIANT = {
    "match": "layers.*.*.{q,up}_proj",
    "use_dora": True,
    "init_lora_weights": "pissa",
}


def build(device: str, options: dict[str, Any]) -> CausalLM:
    torch.manual_seed(0)
    plan = [PLAN[0], PLAN[1] | options]
    model = llama(tiny_arch(attention_bias=True), plan, device=device, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
        if "magnitude" in name:
            nn.init.uniform_(parameter, 0.5, 1.0)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@on_each_device
@pytest.mark.parametrize("options", [{}, VARIANT])
def test_a_decoder_layer_compiles_whole_and_computes_the_same(
    device: str, options: dict[str, Any]
) -> None:
    model = build(device, options)
    layer = model.model.layers[0]
    torch.manual_seed(1)
    x = torch.randn(2, 10, 32, device=device)
    cos, sin = model.model.rotary(torch.arange(10, device=device)[None], torch.float32)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        output = run(leaf, cos, sin, None, None)
        output.square().sum().backward()
        assert leaf.grad is not None
        results.append((output.detach(), leaf.grad, gradients(layer)))
    (eager, eager_input, eager_grads), (output, input_grad, grads) = results
    torch.testing.assert_close(output, eager, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(input_grad, eager_input, rtol=1e-4, atol=1e-4)
    assert grads.keys() == eager_grads.keys()
    # lora_A and lora_B of four projections, or those and the magnitudes of two
    assert len(grads) == (6 if options else 8)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, eager_grads[name], rtol=1e-4, atol=1e-4)


@on_each_device
@pytest.mark.parametrize("options", [{}, VARIANT])
def test_the_model_exports(device: str, options: dict[str, Any]) -> None:
    model = build(device, options).eval()
    ids = torch.randint(
        model.spec.arch.vocab_size, (1, 9), generator=torch.Generator().manual_seed(0)
    )
    ids = ids.to(device)
    exported = torch.export.export(model, (ids,))
    torch.testing.assert_close(exported.module()(ids), model(ids), rtol=1e-5, atol=1e-5)
