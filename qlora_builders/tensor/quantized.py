"""Quantized weights: tensors that have the shape, dtype and device of the weight they stand for.

What they hold are plain tensors, their fields. Those are stored data, not numbers to compute with:

- ops on the stored data keep the fields bit for bit (detach, clone, device moves, pin, copy_);
- casts dequantize, whatever way they are spelled (`.to(torch.float32)`, `.float()`);
- products dequantize and then do what was asked, so `x @ w.t()` is right and never silently
  transposed. `quantized_linear` is what training uses: only the fields are kept for backward.

Anything else raises. A type declares its format and its kernels, and all of this is its own, with
`state_dict` hooks (`modules/linear.py`), sharding (`sharded.py`) and a layout in files
(`layouts.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Self, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_builders.kernels import WEIGHT_DTYPES, Format, Kernels
from qlora_builders.kernels.products import cast_linear

aten = torch.ops.aten
# asked here, because torch 2.11 cannot compile the question
_AUTOCAST_DEVICES = {d for d in ("cpu", "cuda") if torch.amp.is_autocast_available(d)}

Implementation = Callable[[Any, tuple, dict], Any]
# aten op -> implementation, and torch function -> implementation, for all quantized types.
# Both are called as implementation(func, args, kwargs).
DISPATCH_TABLE: dict[Any, Implementation] = {}
FUNCTION_TABLE: dict[Any, Implementation] = {}
# name -> type
QUANTIZED_TYPES: dict[str, type[QuantizedTensor]] = {}


class QuantizedTensor(Tensor):
    """A weight whose fields `kernels` can decode; subclasses name theirs and annotate the fields.

    The constructor takes fields that exist already, from a checkpoint for instance; `quantize`
    makes them.

    Args:
        fields: in the order of `tensor_fields`, or by name.
        shape, dtype: of the weight.
        format: the default one if None.

    Raises:
        ValueError: for a field whose shape or dtype does not fit, or a bad dtype.
    """

    kernels: ClassVar[Kernels]
    tensor_fields: ClassVar[tuple[str, ...]]
    title: ClassVar[str]  # in messages: "NF4"

    format: Any  # an instance of the type's own Format

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.kernels.format_type.name
        cls.tensor_fields = cls.kernels.format_type.tensor_fields
        cls.title = name.upper()
        QUANTIZED_TYPES[name] = cls
        # for torch.load(weights_only=True)
        torch.serialization.add_safe_globals([cls, cls.kernels.format_type])

    @staticmethod
    def __new__(
        cls,
        *fields: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
        format: Format | None = None,
        **named_fields: Tensor,
    ) -> Self:
        format = cls.kernels.format_type() if format is None else format
        check_dtype(cls, dtype)
        given = dict(zip(cls.tensor_fields, fields, strict=False)) | named_fields
        if set(given) != set(cls.tensor_fields) or len(fields) + len(named_fields) != len(given):
            raise TypeError(
                f"{cls.__name__} takes {', '.join(cls.tensor_fields)}, shape, dtype and "
                f"format; got {len(fields)} fields and {', '.join(named_fields) or 'no names'}"
            )
        shapes, dtypes = format.field_shapes(shape), format.field_dtypes()
        for name, shape_, dtype_ in zip(cls.tensor_fields, shapes, dtypes, strict=True):
            field = given[name]
            if tuple(field.shape) != shape_ or field.dtype != dtype_:
                raise ValueError(
                    f"{cls.__name__} {name} is {field.dtype} {list(field.shape)}, but a weight of "
                    f"shape {list(shape)} with {format} needs {dtype_} {list(shape_)}"
                )
        device = given[cls.tensor_fields[0]].device
        weight = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=device, requires_grad=False
        )
        weight.format = format
        for name, field in given.items():
            setattr(weight, name, field)
        return weight

    @property
    def fields(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.tensor_fields)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes in memory, of all fields."""
        return sum(field.nbytes for field in self.fields)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain weight, rounded to the weight's own dtype and then cast to `dtype` if given."""
        return self.kernels.dequantize(
            self.fields,
            format=self.format,
            shape=self.shape,
            dtype=self.dtype,
            out_dtype=self.dtype if dtype is None else dtype,
        )

    def with_fields(self, fields: Iterable[Tensor]) -> Self:
        """The same weight of other fields, on another device for instance."""
        return type(self)(*fields, shape=self.shape, dtype=self.dtype, format=self.format)

    def map_fields(self, fn: Callable[[Tensor], Tensor]) -> Self:
        return self.with_fields(map(fn, self.fields))

    def means_the_same(self, other: Tensor) -> bool:
        """Whether equal fields of the other would stand for the same weight."""
        return (
            isinstance(other, type(self))
            and self.dtype == other.dtype
            and self.format.stored == other.format.stored
        )

    def is_floating_point(self) -> bool:
        """False: `Module.to(dtype)` and `Module.half()` must leave a stored weight alone."""
        return False

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return list(self.tensor_fields), {"dtype": self.dtype, "format": self.format}

    @classmethod
    def __tensor_unflatten__(
        cls, fields: dict[str, Any], context: dict[str, Any], outer_size: torch.Size, _stride: Any
    ) -> Self:
        return cls(**fields, shape=outer_size, **context)

    def _stable_hash_for_caching(self) -> str:
        """What a compiled graph may depend on; torch.compile's on-disk cache asks for it."""
        return repr(self)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        implementation = FUNCTION_TABLE.get(func)
        if implementation is not None:
            return implementation(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        implementation = DISPATCH_TABLE.get(func)
        if implementation is None:
            kinds = ", ".join(type(arg).__name__ for arg in args)
            raise NotImplementedError(
                f"{func} is not defined on an {cls.__name__} (arguments: {kinds}); "
                "use weight.dequantize() to get a plain tensor first"
            )
        return implementation(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        options = "".join(f", {name}={value!r}" for name, value in self.format.options.items())
        return (
            f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, "
            f"device={self.device}{options})"
        )


def quantize(weight: Tensor, format: Format) -> QuantizedTensor:
    """A plain weight as the type that has this format.

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16, a weight that is not 1-D
            or 2-D, and one with NaN or infinity.
    """
    cls = QUANTIZED_TYPES[format.name]
    if isinstance(weight, QuantizedTensor):
        name = type(weight).__name__
        raise ValueError(f"the weight is an {name} already; dequantize() it to quantize it anew")
    check_dtype(cls, weight.dtype)
    if weight.dim() not in (1, 2):
        raise ValueError(f"cannot quantize a weight of shape {list(weight.shape)}; use 1-D or 2-D")
    weight = weight.detach()
    fields = cls.kernels.quantize(weight, format=format)
    return cls(*fields, shape=weight.shape, dtype=weight.dtype, format=format)


def check_dtype(cls: type[QuantizedTensor], dtype: torch.dtype) -> None:
    if dtype not in WEIGHT_DTYPES:
        allowed = ", ".join(str(allowed) for allowed in WEIGHT_DTYPES)
        raise ValueError(
            f"an {cls.title} weight cannot stand for dtype {dtype}; allowed: {allowed}"
        )


def plain(weight: Tensor) -> Tensor:
    """The weight itself, or what its codes stand for, in its own dtype."""
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


def is_quantized(weight: object) -> TypeGuard[QuantizedTensor]:
    """Whether this is a whole weight that is stored quantized; `format_of` knows shards too."""
    return isinstance(weight, QuantizedTensor)


def _register(table: dict[Any, Implementation], *ops: Any) -> Callable[..., Implementation]:
    def decorator(implementation: Implementation) -> Implementation:
        for op in ops:
            table[op] = implementation
        return implementation

    return decorator


# ---- linear -------------------------------------------------------------------------------------


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` in the input's dtype, whatever the weight is stored as. [..., in] -> [..., out]"""
    if isinstance(weight, QuantizedTensor):
        return quantized_linear(input, weight, bias)
    return cast_linear(input, weight, bias)


def quantized_linear(input: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with a quantized weight, in the input's dtype (or autocast's).

    Output and input gradient equal those of F.linear on `weight.dequantize(input.dtype)`; only the
    stored fields are kept for backward. On CPUs the gradient of a weight of more than two million
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
            f"linear_{weight.format.name} takes an input [..., in] and a weight [out, in]; got "
            f"input {list(input.shape)} and weight {list(weight.shape)}"
        )
    device = input.device.type
    if device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        input = input.to(torch.get_autocast_dtype(device))
    if bias is not None and bias.dtype != input.dtype:
        bias = bias.to(input.dtype)
    # rows as they are: what adds to a view in place makes autograd copy the whole (CopySlices)
    rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    output = weight.kernels.matmul(
        rows,
        weight.fields,
        bias,
        format=weight.format,
        shape=weight.shape,
        transposed=True,
        dtype=weight.dtype,
    )
    return output if input.dim() == 2 else output.view(*input.shape[:-1], output.shape[-1])


@_register(FUNCTION_TABLE, F.linear)
def _linear(func: Any, args: tuple, kwargs: dict) -> Tensor:
    return _checked_linear(*args, **kwargs)


def _checked_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(input, QuantizedTensor) or not isinstance(weight, QuantizedTensor):
        raise NotImplementedError(
            "F.linear takes a quantized tensor as its weight, not as input or bias"
        )
    return quantized_linear(input, weight, bias)


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
    return func(*map(plain, args), **kwargs)


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
    weight: QuantizedTensor = args[0]
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
            f"an {args[0].title} weight cannot be trained: its codes have no gradient. Use "
            "requires_grad=False (nn.Parameter(weight, requires_grad=False)) and train an adapter "
            "on top (LoRALinear)"
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
def _fieldwise(func: Any, args: tuple, kwargs: dict) -> QuantizedTensor:
    kwargs.pop("memory_format", None)
    weight: QuantizedTensor = args[0]
    return weight.map_fields(lambda field: func(field, *args[1:], **kwargs))


DISPATCH_TABLE[aten.is_pinned.default] = lambda func, args, kwargs: all(map(func, args[0].fields))


@_register(DISPATCH_TABLE, aten.empty_like.default)
def _empty_like(func: Any, args: tuple, kwargs: dict) -> Tensor:
    weight: QuantizedTensor = args[0]
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
    if not isinstance(destination, QuantizedTensor):
        return func(destination, source.dequantize(), *rest)
    if not destination.means_the_same(source):
        moved = plain(source).to(device=destination.device, dtype=destination.dtype)
        source = quantize(moved, destination.format)
    for target, field in zip(destination.fields, source.fields, strict=True):
        func(target, field, *rest)
    return destination
