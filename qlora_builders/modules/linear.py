"""Frozen linear layers, and the state_dict hooks of quantized weights; LoRALinear is in `lora.py`.

Every component computes in the dtype of its input and casts its parameters where they are used, so
one rule serves a bfloat16 base under float32 compute and float32 adapters under bfloat16 compute.

Shapes: in = in_features, out = out_features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.modules.cast_linear import cast_linear
from qlora_builders.tensor import Format, NF4Format, QuantizedTensor, quantize, quantized_linear
from qlora_builders.tensor.layouts import stored_parts, unpack


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` in the input's dtype, whatever the weight is stored as. [..., in] -> [..., out]"""
    if isinstance(weight, QuantizedTensor):
        return quantized_linear(input, weight, bias)
    return cast_linear(input, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` that computes in its input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class FrozenLinear(nn.Module):
    """A linear layer whose weight is stored quantized and never trained.

    Its `state_dict` holds a plain `weight` in `dtype`, so it is interchangeable with `nn.Linear`'s;
    loading quantizes. Saving and loading again gives the same bits.

    Args:
        in_features: size of the last input axis.
        out_features: size of the last output axis.
        bias: whether there is a bias; it is kept in `dtype` and frozen.
        format: of the weight.
        dtype: dtype of the weight that the codes stand for.
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
        add_frozen_base(self, bias=bias, device=device, dtype=dtype)
        quantize_weight_(self, format)

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


# ---- quantized weights in modules ---------------------------------------------------------------


def quantize_(
    module: nn.Module,
    filter_fn: Callable[[str, nn.Linear], bool] | None = None,
    **nf4_options: Any,
) -> nn.Module:
    """Quantize the weights of `nn.Linear` layers in place, in a model that somebody else built.

    Parameters are replaced, modules are not; the layers get the state_dict hooks of
    `FrozenNF4Linear`, so the model's state_dict stays a plain one. The adapters of a `LoRALinear`
    are never selected.

    Args:
        module: any module; returned.
        filter_fn: (fully qualified name, layer) -> whether to quantize; None quantizes them all.
        nf4_options: `block_size`, `scale_block_size`, `scale_format`, `scale_search` of `to_nf4`.

    Raises:
        ValueError: if no layer is selected, or a selected weight is shared with another module (a
            tied head), or holds NaN or infinity; the message names the layer.
    """
    layers = [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and name.rpartition(".")[2] not in ("lora_A", "lora_B")
        and not isinstance(layer.weight, QuantizedTensor)
        and (filter_fn is None or filter_fn(name, layer))
    ]
    if not layers:
        raise ValueError("quantize_ selected no nn.Linear layer; check filter_fn")
    for name, layer in layers:
        _check_not_shared(module, name, layer)
    for name, layer in layers:
        try:
            quantize_weight_(layer, NF4Format(**nf4_options))
        except ValueError as error:
            raise ValueError(f"{_key(name, 'weight')}: {error}") from error
    return module


def quantize_weight_(module: nn.Module, format: Format) -> None:
    """Replace `module.weight` by its quantized form and register the state_dict hooks."""
    assert isinstance(module.weight, Tensor)
    module.weight = nn.Parameter(quantize(module.weight, format), requires_grad=False)
    module.register_state_dict_post_hook(dequantize_state_dict)
    module.register_load_state_dict_pre_hook(quantize_state_dict)


def _check_not_shared(module: nn.Module, name: str, layer: nn.Linear) -> None:
    others = [
        _key(other_name, key)
        for other_name, other in module.named_modules()
        for key, parameter in other.named_parameters(recurse=False)
        if parameter is layer.weight and other is not layer
    ]
    if others:
        raise ValueError(
            f"{_key(name, 'weight')} is shared with {', '.join(others)}, which would keep the old "
            "weight; leave it out with filter_fn, or untie it first"
        )


def _key(module_name: str, parameter_name: str) -> str:
    """The parameter's state_dict key; the root module's name is empty."""
    return f"{module_name}.{parameter_name}" if module_name else parameter_name


def dequantize_state_dict(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
) -> None:
    """state_dict post-hook: a plain `weight` in the weight's own dtype instead of the codes."""
    key = prefix + "weight"
    weight = state_dict.get(key)
    if isinstance(weight, QuantizedTensor):
        state_dict[key] = weight.dequantize()


def quantize_state_dict(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """load_state_dict pre-hook: quantize a plain `weight` on arrival, into the module's format.

    A quantized one, or its parts as files hold them (`tensor/layouts.py`), is taken as it is if it
    has the module's format and dtype, else dequantized and quantized anew. The weight goes
    to the module's device first (unless that is meta). A weight of the wrong shape is left to
    PyTorch, which reports it with both shapes.
    """
    key = prefix + "weight"
    own = module.weight
    if not isinstance(own, QuantizedTensor):
        return  # the weight was replaced by a plain one since
    parts = stored_parts(state_dict, key)
    if len(parts) > 1:
        for suffix in parts:
            del state_dict[key + suffix]
        state_dict[key] = own  # replaced below, or never used
        try:
            state_dict[key] = unpack(parts)
        except ValueError as error:
            error_msgs.append(f"{key}: {error}")
    weight = state_dict.get(key)
    if not isinstance(weight, Tensor) or weight.shape != own.shape:
        return
    device = weight.device if own.is_meta else own.device
    if isinstance(weight, QuantizedTensor):
        if own.means_the_same(weight):
            state_dict[key] = weight.to(device)
            return
        weight = weight.dequantize()
    try:
        if not weight.is_floating_point():
            raise ValueError(f"has dtype {weight.dtype}; a floating-point weight is needed")
        state_dict[key] = quantize(weight.to(device=device, dtype=own.dtype), own.format)
    except ValueError as error:
        error_msgs.append(f"{key}: {error}")


def add_frozen_base(
    module: Any, *, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> None:
    """`weight` and `bias` initialised as `nn.Linear` does it, frozen."""
    layer = nn.Linear(module.in_features, module.out_features, bias, device=device, dtype=dtype)
    module.weight = layer.weight.requires_grad_(False)
    module.register_parameter("bias", layer.bias.requires_grad_(False) if bias else None)


def describe_linear(module: Any) -> str:
    own = module.weight
    weight = own.title if isinstance(own, QuantizedTensor) else str(own.dtype)
    return (
        f"in_features={module.in_features}, out_features={module.out_features}, "
        f"bias={module.bias is not None}, weight={weight}"
    )
