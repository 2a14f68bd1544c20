"""What can fill a linear slot: Linear, FrozenNF4Linear, LoRALinear, and their state_dict hooks.

Every component computes in the dtype of its input and casts its parameters where they are used, so
one rule serves a bfloat16 base under float32 compute and float32 adapters under bfloat16 compute.

Shapes: in = in_features, out = out_features, r = rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.modules.cast_linear import cast_linear
from qlora_builders.tensor import NF4Tensor, linear_nf4, to_nf4
from qlora_builders.tensor.nf4_layouts import stored_parts, unpack


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` in the input's dtype, whatever the weight is stored as. [..., in] -> [..., out]"""
    if isinstance(weight, NF4Tensor):
        return linear_nf4(input, weight, bias)
    return cast_linear(input, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` that computes in its input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class FrozenNF4Linear(nn.Module):
    """A linear layer whose weight is stored in NF4 and never trained.

    Its `state_dict` holds a plain `weight` in `dtype`, so it is interchangeable with `nn.Linear`'s;
    loading quantizes. Saving and loading again gives the same bits.

    Args:
        in_features: size of the last input axis.
        out_features: size of the last output axis.
        bias: whether there is a bias; it is kept in `dtype` and frozen.
        dtype: dtype of the weight that the codes stand for.
        nf4_options: `block_size`, `scale_block_size`, `scale_format`, `scale_search` of `to_nf4`.
    """

    weight: Tensor
    bias: Tensor | None

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
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        _add_frozen_base(self, bias=bias, device=device, dtype=dtype)
        quantize_weight_(self, **nf4_options)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return _describe(self)


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update (https://arxiv.org/abs/2106.09685).

        y = x W^T + b + scaling * dropout(x) A^T B^T

    with scaling = alpha / rank, or alpha / sqrt(rank) with `use_rslora`
    (https://arxiv.org/abs/2312.03732). B starts at zero, so an untrained adapter changes nothing.

    Parameters: `weight` [out, in] (NF4 with `quantize_base`), `bias` [out],
    `lora_A.weight` [r, in] and `lora_B.weight` [out, r], both float32 and never quantized; with
    `lora_bias` also `lora_B.bias` [out], trained from zero and scaled like the rest of the update.

    Attributes:
        adapter_enabled: off, the layer is its base alone; see `adapters_disabled`.

    Args:
        rank: r >= 1.
        alpha: numerator of the scaling, > 0.
        dropout: probability of dropping an input of the adapter, in [0, 1).
        quantize_base: store `weight` in NF4.
        dtype: dtype of the base weight; None is torch's default dtype.
        nf4_options: as for `FrozenNF4Linear`; only with `quantize_base`.

    Raises:
        ValueError: for a rank, alpha or dropout out of range, or NF4 options on a plain base.
    """

    weight: Tensor
    bias: Tensor | None
    adapter_enabled = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        bias: bool = False,
        quantize_base: bool = False,
        use_rslora: bool = False,
        lora_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **nf4_options: Any,
    ) -> None:
        super().__init__()
        check_lora_options(rank=rank, alpha=alpha, dropout=dropout)
        if nf4_options and not quantize_base:
            names = ", ".join(sorted(nf4_options))
            raise ValueError(f"{names} need quantize_base=True; the base weight is not quantized")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.alpha = alpha
        self.use_rslora = use_rslora
        _add_frozen_base(self, bias=bias, device=device, dtype=dtype)
        if quantize_base:
            quantize_weight_(self, **nf4_options)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_A = Linear(in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = Linear(rank, out_features, bias=lora_bias, device=device, dtype=torch.float32)
        self.reset_lora_parameters()

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def reset_lora_parameters(self) -> None:
        """A as PEFT and the LoRA authors' code draw it, B zero."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        for parameter in self.lora_B.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)  # [n, in]
        if not self.adapter_enabled:
            output = linear(rows, self.weight, self.bias)  # [n, out]
            return output.view(*input.shape[:-1], self.out_features)
        down = self.lora_A(self.dropout(rows))  # [n, r]
        output = linear(rows, self.weight, self._whole_bias())  # [n, out]
        up = self.lora_B.weight.to(down.dtype).t()  # [r, out]
        output = output.addmm_(down, up, alpha=self.scaling)
        return output.view(*input.shape[:-1], self.out_features)

    def _whole_bias(self) -> Tensor | None:
        update = self.lora_bias_delta()
        if update is None or self.bias is None:
            return self.bias if update is None else update
        return self.bias.float() + update

    def lora_delta(self) -> Tensor:
        """scaling * B A, the float32 [out, in] update that merging adds to the weight."""
        return self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())

    def lora_bias_delta(self) -> Tensor | None:
        """What merging adds to the bias: float32 [out], or None without `lora_bias`."""
        bias = self.lora_B.bias
        return None if bias is None else self.scaling * bias.float()

    def extra_repr(self) -> str:
        return f"{_describe(self)}, rank={self.rank}, alpha={self.alpha}"


def check_lora_options(*, rank: int, alpha: float, dropout: float) -> None:
    """
    Raises:
        ValueError: naming the option, the value and the allowed range.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is {rank!r}; it must be an integer >= 1")
    if not 0 < alpha < math.inf:
        raise ValueError(
            f"alpha is {alpha!r}; it must be > 0 and finite (the update is scaled by alpha / rank)"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}; it must be in [0, 1)")


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
    adapters = {
        adapter
        for lora in module.modules()
        if isinstance(lora, LoRALinear)
        for adapter in (lora.lora_A, lora.lora_B)
    }
    layers = [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and layer not in adapters
        and not isinstance(layer.weight, NF4Tensor)
        and (filter_fn is None or filter_fn(name, layer))
    ]
    if not layers:
        raise ValueError("quantize_ selected no nn.Linear layer; check filter_fn")
    for name, layer in layers:
        _check_not_shared(module, name, layer)
    for name, layer in layers:
        try:
            quantize_weight_(layer, **nf4_options)
        except ValueError as error:
            raise ValueError(f"{_key(name, 'weight')}: {error}") from error
    return module


def quantize_weight_(module: nn.Module, **nf4_options: Any) -> None:
    """Replace `module.weight` by its NF4 form and register the state_dict hooks."""
    assert isinstance(module.weight, Tensor)
    module.weight = nn.Parameter(to_nf4(module.weight, **nf4_options), requires_grad=False)
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
    if isinstance(weight, NF4Tensor):
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
    """load_state_dict pre-hook: quantize a plain `weight` on arrival, with the module's options.

    An `NF4Tensor`, or the parts of one as files hold it (`tensor/nf4_layouts.py`), is taken as it
    is if it has the module's format and dtype, else dequantized and quantized anew. The weight goes
    to the module's device first (unless that is meta). A weight of the wrong shape is left to
    PyTorch, which reports it with both shapes.
    """
    key = prefix + "weight"
    own = module.weight
    if not isinstance(own, NF4Tensor):
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
    if isinstance(weight, NF4Tensor):
        if weight.nf4_format == own.nf4_format and weight.dtype == own.dtype:
            state_dict[key] = weight.to(device)
            return
        weight = weight.dequantize()
    try:
        if not weight.is_floating_point():
            raise ValueError(f"has dtype {weight.dtype}; a floating-point weight is needed")
        state_dict[key] = to_nf4(weight.to(device=device, dtype=own.dtype), **own.nf4_options)
    except ValueError as error:
        error_msgs.append(f"{key}: {error}")


def _add_frozen_base(
    module: Any, *, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> None:
    """`weight` and `bias` initialised as `nn.Linear` does it, frozen."""
    layer = nn.Linear(module.in_features, module.out_features, bias, device=device, dtype=dtype)
    module.weight = layer.weight.requires_grad_(False)
    module.register_parameter("bias", layer.bias.requires_grad_(False) if bias else None)


def _describe(module: Any) -> str:
    weight = "NF4" if isinstance(module.weight, NF4Tensor) else str(module.weight.dtype)
    return (
        f"in_features={module.in_features}, out_features={module.out_features}, "
        f"bias={module.bias is not None}, weight={weight}"
    )
