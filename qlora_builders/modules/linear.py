"""Linear layers without an adapter (`lora.py` has `LoRALinear`), and quantized weights in modules:
swapping them in, and state_dicts that stay plain.

Every component computes in the dtype of its input and casts its parameters where they are used, so
one rule serves a bfloat16 base under float32 compute and float32 adapters under bfloat16 compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.tensor import Format, NF4Format, format_of, linear, plain, quantize
from qlora_builders.tensor.layouts import stored_parts, unpack
from qlora_builders.tensor.sharded import is_sharded


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
        (f"{name}.weight".removeprefix("."), layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and name.rpartition(".")[2] not in ("lora_A", "lora_B")
        and format_of(layer.weight) is None
        and (filter_fn is None or filter_fn(name, layer))
    ]
    if not layers:
        raise ValueError("quantize_ selected no nn.Linear layer; check filter_fn")
    for key, layer in layers:
        others = [
            f"{name}.{leaf}".removeprefix(".")
            for name, other in module.named_modules()
            for leaf, parameter in other.named_parameters(recurse=False)
            if parameter is layer.weight and other is not layer
        ]
        if others:
            raise ValueError(
                f"{key} is shared with {', '.join(others)}, which would keep the old weight; leave "
                "it out with filter_fn, or untie it first"
            )
    for key, layer in layers:
        try:
            quantize_weight_(layer, NF4Format(**nf4_options))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return module


def quantize_weight_(module: nn.Module, format: Format) -> None:
    """Replace `module.weight` by its quantized form and register the state_dict hooks."""
    assert isinstance(module.weight, Tensor)
    module.weight = nn.Parameter(quantize(module.weight, format), requires_grad=False)
    module.register_state_dict_post_hook(dequantize_state_dict)
    module.register_load_state_dict_pre_hook(quantize_state_dict)


def dequantize_state_dict(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any
) -> None:
    """state_dict post-hook: a plain `weight` in the weight's own dtype instead of the codes."""
    key = prefix + "weight"
    if key in state_dict:
        state_dict[key] = plain(state_dict[key])


def quantize_state_dict(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any
) -> None:
    """load_state_dict pre-hook: quantize a plain `weight` on arrival, into the module's format.

    A quantized one, or its parts as files hold them (`tensor/layouts.py`), is taken as it is if it
    has the module's format and dtype, else dequantized and quantized anew. The weight goes
    to the module's device first (unless that is meta). A weight of the wrong shape is left to
    PyTorch, which reports it with both shapes.
    """
    error_msgs: list[str] = others[-1]
    key = prefix + "weight"
    own: Any = module.weight
    format = format_of(own)
    if format is None or is_sharded(own):
        return  # the weight was replaced by a plain one, or sharded, since
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
    if own.means_the_same(weight):
        state_dict[key] = weight.to(device)
        return
    weight = plain(weight)
    try:
        if not weight.is_floating_point():
            raise ValueError(f"has dtype {weight.dtype}; a floating-point weight is needed")
        state_dict[key] = quantize(weight.to(device=device, dtype=own.dtype), format)
    except ValueError as error:
        error_msgs.append(f"{key}: {error}")
