"""Linear layers without an adapter; `lora.py` has `LoRALinear`.

Every component computes in the dtype of its input and casts its parameters where they are used, so
one rule serves a bfloat16 base under float32 compute and float32 adapters under bfloat16 compute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.modules.quantize import quantize_weight_
from qlora_builders.tensor import Format, NF4Format, format_of, linear


class Linear(nn.Linear):
    """`nn.Linear` that computes in its input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class FrozenLinear(nn.Module):
    """A linear layer whose weight is stored quantized and never trained.

    Its `state_dict` holds a plain `weight` in `dtype`, so it is interchangeable with `nn.Linear`'s;
    loading quantizes. Saving and loading again gives the same bits.

    Args:
        bias: whether there is a bias; it is kept in `dtype` and frozen.
        dtype: of the weight that the codes stand for.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        format: Format,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        add_frozen_base(self, bias=bias, format=format, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return describe_linear(self)


class FrozenNF4Linear(FrozenLinear):
    """`FrozenLinear` in NF4.

    Args:
        nf4_options: `block_size`, `scale_block_size`, `scale_format`, `scale_search` of `to_nf4`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        **nf4_options: Any,
    ) -> None:
        format = NF4Format(**nf4_options)
        super().__init__(in_features, out_features, bias, format=format, device=device, dtype=dtype)


def add_frozen_base(
    module: Any,
    *,
    bias: bool,
    format: Format | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """`weight` and `bias` initialised as `nn.Linear` does it, frozen, in a format or plain.

    Returns:
        The weight as it was before it was quantized.
    """
    layer = nn.Linear(module.in_features, module.out_features, bias, device=device, dtype=dtype)
    module.weight = original = layer.weight.requires_grad_(False)
    module.register_parameter("bias", layer.bias.requires_grad_(False) if bias else None)
    if format is not None:
        quantize_weight_(module, format)
    return original


def describe_linear(module: Any) -> str:
    format = format_of(module.weight)
    return (
        f"in_features={module.in_features}, out_features={module.out_features}, "
        f"bias={module.bias is not None}, "
        f"weight={module.weight.dtype if format is None else format.name.upper()}"
    )
