"""What can be done with an NF4Tensor: moving, copying, and being the weight of a linear layer.

Three groups, all called as implementation(func, args, kwargs):
- ops on the stored data keep the fields bit for bit (detach, clone, device moves, pin, copy_);
- casts dequantize, whatever way they are spelled;
- products dequantize and then do what was asked, so `x @ w.t()` is right and never silently
  transposed. `linear_nf4` is the one that training should use: it saves the 4-bit weight only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_builders.kernels import matmul_nf4
from qlora_builders.tensor.nf4_tensor import DISPATCH_TABLE, FUNCTION_TABLE, NF4Tensor, to_nf4

aten = torch.ops.aten
# asked here, because torch 2.11 cannot compile the question
_AUTOCAST_DEVICES = {d for d in ("cpu", "cuda") if torch.amp.is_autocast_available(d)}
Implementation = Callable[[Any, tuple, dict], Any]


def _register(table: dict[Any, Implementation], *ops: Any) -> Callable[..., Implementation]:
    def decorator(implementation: Implementation) -> Implementation:
        for op in ops:
            table[op] = implementation
        return implementation

    return decorator


# ---- linear -------------------------------------------------------------------------------------


def linear_nf4(input: Tensor, weight: NF4Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with an NF4 weight, in the input's dtype (or autocast's).

    Output and input gradient equal those of F.linear on `weight.dequantize(input.dtype)`; only the
    4-bit weight is kept for backward. On CPUs the gradient of a weight of more than two million
    elements is added up in another order.

    Args:
        input: [..., in_features], any float dtype.
        weight: [out_features, in_features].
        bias: [out_features], cast to the input's dtype.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if weight.dim() != 2 or input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_nf4 takes an input [..., in] and a weight [out, in]; got input "
            f"{list(input.shape)} and weight {list(weight.shape)}"
        )
    device = input.device.type
    if device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        input = input.to(torch.get_autocast_dtype(device))
    if bias is not None and bias.dtype != input.dtype:
        bias = bias.to(input.dtype)
    output = matmul_nf4(
        input.reshape(-1, input.shape[-1]),
        weight.codes,
        weight.scales,
        weight.scale_groups,
        bias,
        shape=weight.shape,
        transposed=True,
        dtype=weight.dtype,
        **weight.nf4_format,
    )
    return output.view(*input.shape[:-1], output.shape[-1])


@_register(FUNCTION_TABLE, F.linear)
def _linear(func: Any, args: tuple, kwargs: dict) -> Tensor:
    return _call_linear(*args, **kwargs)


def _call_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(input, NF4Tensor) or not isinstance(weight, NF4Tensor):
        raise NotImplementedError("F.linear takes an NF4Tensor as its weight, not as input or bias")
    return linear_nf4(input, weight, bias)


@_register(
    DISPATCH_TABLE,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.mm.default,
    aten.addmm.default,
    aten.linear.default,
)
def _dequantize_and_call(func: Any, args: tuple, kwargs: dict) -> Tensor:
    plain = [arg.dequantize() if isinstance(arg, NF4Tensor) else arg for arg in args]
    return func(*plain, **kwargs)


# ---- casts --------------------------------------------------------------------------------------


@_register(FUNCTION_TABLE, Tensor.to)
def _to(func: Any, args: tuple, kwargs: dict) -> Tensor:
    weight, *rest = args
    copy = kwargs.pop("copy", False)
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*rest, **kwargs)
    if dtype is not None:
        return weight.dequantize(dtype).to(device, non_blocking=non_blocking)
    if device is None or device == weight.device:
        return weight.clone() if copy else weight
    return weight.map_fields(lambda field: field.to(device, non_blocking=non_blocking))


_CASTS = {
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
}


@_register(FUNCTION_TABLE, *_CASTS)
def _cast(func: Any, args: tuple, kwargs: dict) -> Tensor:
    return args[0].dequantize(_CASTS[func])


@_register(DISPATCH_TABLE, aten._to_copy.default)
def _to_copy(func: Any, args: tuple, kwargs: dict) -> Tensor:
    weight: NF4Tensor = args[0]
    dtype = kwargs.pop("dtype", None)
    if dtype is not None and dtype != weight.dtype:
        return func(weight.dequantize(dtype), **kwargs)
    kwargs.pop("memory_format", None)
    return weight.map_fields(lambda field: func(field, **kwargs))


# ---- stored data --------------------------------------------------------------------------------


@_register(FUNCTION_TABLE, Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _requires_grad(func: Any, args: tuple, kwargs: dict) -> Any:
    if kwargs.get("requires_grad", args[1] if len(args) > 1 else True):
        raise ValueError(
            "an NF4 weight cannot be trained: its codes have no gradient. Use requires_grad=False "
            "(nn.Parameter(weight, requires_grad=False)) and train an adapter on top (LoRALinear)"
        )
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


# the first dispatch of any subclass has torch import its distributed tensors: 1 s, 50 MiB, which
# wrapping a weight in nn.Parameter (a detach) need not cost
@_register(FUNCTION_TABLE, Tensor.detach)
@_register(
    DISPATCH_TABLE,
    aten.detach.default,
    aten.alias.default,
    aten.clone.default,
    aten._pin_memory.default,
)
def _fieldwise(func: Any, args: tuple, kwargs: dict) -> NF4Tensor:
    kwargs.pop("memory_format", None)
    return args[0].map_fields(lambda field: func(field, *args[1:], **kwargs))


@_register(DISPATCH_TABLE, aten.is_pinned.default)
def _is_pinned(func: Any, args: tuple, kwargs: dict) -> bool:
    return all(func(getattr(args[0], name)) for name in NF4Tensor.tensor_fields)


@_register(DISPATCH_TABLE, aten.empty_like.default)
def _empty_like(func: Any, args: tuple, kwargs: dict) -> Tensor:
    weight: NF4Tensor = args[0]
    dtype = kwargs.pop("dtype", None)
    kwargs.pop("memory_format", None)
    if dtype is not None and dtype != weight.dtype:
        device = kwargs.pop("device", weight.device)
        return torch.empty(weight.shape, dtype=dtype, device=device, **kwargs)
    return weight.map_fields(lambda field: func(field, **kwargs))


@_register(DISPATCH_TABLE, aten.copy_.default)
def _copy_(func: Any, args: tuple, kwargs: dict) -> Tensor:
    destination, source, *rest = args
    if destination.shape != source.shape:
        raise ValueError(
            f"cannot copy a weight of shape {list(source.shape)} into one of shape "
            f"{list(destination.shape)}"
        )
    if not isinstance(destination, NF4Tensor):
        return func(destination, source.dequantize(), *rest)
    if not isinstance(source, NF4Tensor) or not _same_format(destination, source):
        plain = source.dequantize() if isinstance(source, NF4Tensor) else source
        plain = plain.to(device=destination.device, dtype=destination.dtype)
        source = to_nf4(plain, **destination.nf4_options)
    for name in NF4Tensor.tensor_fields:
        func(getattr(destination, name), getattr(source, name), *rest)
    return destination


def _same_format(a: NF4Tensor, b: NF4Tensor) -> bool:
    return a.dtype == b.dtype and a.nf4_format == b.nf4_format
