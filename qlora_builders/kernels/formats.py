"""A quantized format as one value, and its kernels as `torch.library` ops.

A format says how many plain tensors hold a weight, of which shapes and dtypes, and with which
options. Kernels are functions on those tensors: quantize, dequantize and matmul, with one signature
for every format and backend. Each is an op, so that `torch.compile` and `torch.export` see one
opaque call whose output shape is known; on the meta device that is all there is, and models can be
built without memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOT_FINITE = "the weight has NaN or infinite elements; repair the checkpoint"

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a quantized weight is stored as. Subclasses add their options as fields and check them.

    Attributes:
        name: of the type, in rules, files and ops.
        tensor_fields: names of the tensors that hold a weight.
        stored_options: those options that say what the tensors mean. The others are how plain
            weights get their codes: they change the codes, never what codes stand for.
    """

    name: ClassVar[str]
    tensor_fields: ClassVar[tuple[str, ...]]
    stored_options: ClassVar[tuple[str, ...]] = ()

    def field_shapes(self, shape: Sequence[int]) -> tuple[Shape, ...]:
        """Shapes of the tensors that hold a weight of `shape`."""
        raise NotImplementedError

    def field_dtypes(self) -> tuple[torch.dtype, ...]:
        raise NotImplementedError

    def unit(self, shape: Sequence[int]) -> Shape:
        """The smallest part of a weight of `shape` that can be quantized by itself; all fields are
        concatenations of those of the units. Ranks share a weight out in units."""
        raise NotImplementedError

    @property
    def needs_whole(self) -> bool:
        """Whether the codes of a unit depend on the other units."""
        return False

    @property
    def options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def stored(self) -> dict[str, Any]:
        """The options that say what stored codes mean."""
        return {name: getattr(self, name) for name in self.stored_options}

    @property
    def identity(self) -> str:
        """For hashes of contents."""
        return f"{self.name} {self.stored}"


class Backend(Protocol):
    """The kernels of one format on one kind of device, plain functions of a module.

    `quantize` raises ValueError for NaN or infinity. `dequantize` rounds to the weight's own
    `dtype` and then casts to `out_dtype`. `matmul` is `input @ W.T + bias` (transposed) or
    `input @ W` in the input's dtype, for input [n, in] (transposed) or [n, out]. `shape` is the
    weight's.
    """

    def quantize(self, weight: Tensor, *, format: Any) -> tuple[Tensor, ...]: ...

    def dequantize(
        self,
        fields: Sequence[Tensor],
        *,
        format: Any,
        shape: Sequence[int],
        dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> Tensor: ...

    def matmul(
        self,
        input: Tensor,
        fields: Sequence[Tensor],
        bias: Tensor | None,
        *,
        format: Any,
        shape: Sequence[int],
        transposed: bool,
        dtype: torch.dtype,
    ) -> Tensor: ...


def decoded_matmul(dequantize: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The `matmul` of a backend that decodes the whole weight for it."""

    def matmul(
        input: Tensor, fields: Sequence[Tensor], bias: Tensor | None, *, transposed: bool, **of: Any
    ) -> Tensor:
        weight = dequantize(fields, out_dtype=input.dtype, **of)
        return F.linear(input, weight, bias) if transposed else input @ weight

    return matmul


_library = torch.library.Library("qlora_builders", "DEF")
MATMUL_OPS: set[Any] = set()  # of all formats


class Kernels:
    """The kernels of a format behind ops. Its methods are those of `Backend`.

    Args:
        format_type: what the ops' option arguments make.
        choose: (device, format, dtypes) -> the fastest backend that takes them.
    """

    def __init__(self, format_type: type[Format], choose: Callable[..., Backend]) -> None:
        self.format_type = format_type
        self._format = functools.cache(format_type)  # checking its options costs microseconds
        self._choose = choose
        names = format_type.tensor_fields
        options = {f.name: f"{f.type} {f.name}" for f in dataclasses.fields(format_type)}
        stored = [options[name] for name in format_type.stored_options]
        tensors = [f"Tensor {name}" for name in names]
        self._quantize_op = self._define(
            "quantize",
            ["Tensor weight"],
            [*options.values()],
            f"({', '.join('Tensor' for _ in names)})",
        )
        self._dequantize_op = self._define(
            "dequantize",
            tensors,
            ["int[] shape", *stored, "ScalarType dtype", "ScalarType out_dtype"],
        )
        self._matmul_op = self._define(
            "matmul",
            ["Tensor input", *tensors, "Tensor? bias"],
            ["int[] shape", "bool transposed", *stored, "ScalarType dtype"],
        )
        torch.library.register_autograd(
            self._matmul_op.default.name(),
            self._matmul_backward,
            setup_context=_keep_for_backward,
            lib=_library,
        )
        MATMUL_OPS.add(self._matmul_op.default)

    def _define(
        self, kernel: str, arguments: list[str], keywords: list[str], returns: str = "Tensor"
    ) -> Any:
        name = f"{kernel}_{self.format_type.name}"
        both = ", ".join(arguments + ["*"][: len(keywords)] + keywords)
        _library.define(f"{name}({both}) -> {returns}")
        for key in ("CPU", "CUDA"):
            _library.impl(name, getattr(self, f"_{kernel}"), key)
        fake = getattr(self, f"_{kernel}_fake")
        torch.library.register_fake(f"qlora_builders::{name}", fake, lib=_library)
        return getattr(torch.ops.qlora_builders, name)

    def quantize(self, weight: Tensor, *, format: Format) -> tuple[Tensor, ...]:
        return tuple(self._quantize_op(weight, **format.options))

    def dequantize(self, fields: Sequence[Tensor], *, format: Format, **others: Any) -> Tensor:
        decoded: Tensor = self._dequantize_op(*fields, **others, **format.stored)
        return decoded

    def matmul(
        self,
        input: Tensor,
        fields: Sequence[Tensor],
        bias: Tensor | None = None,
        *,
        format: Format,
        **others: Any,
    ) -> Tensor:
        product: Tensor = self._matmul_op(input, *fields, bias, **others, **format.stored)
        return product

    # ---- what the ops run -----------------------------------------------------------------------

    def _quantize(self, weight: Tensor, **options: Any) -> tuple[Tensor, ...]:
        format = self._format(**options)
        return self._choose(weight.device, format, weight.dtype).quantize(weight, format=format)

    def _dequantize(self, *fields: Tensor, **options: Any) -> Tensor:
        format = self._take_format(options)
        backend = self._choose(fields[0].device, format, options["dtype"], options["out_dtype"])
        return backend.dequantize(fields, format=format, **options)

    def _matmul(self, input: Tensor, *rest: Any, **options: Any) -> Tensor:
        *fields, bias = rest
        format = self._take_format(options)
        backend = self._choose(input.device, format, options["dtype"], input.dtype)
        return backend.matmul(input, fields, bias, format=format, **options)

    def _take_format(self, options: dict[str, Any]) -> Format:
        names = self.format_type.stored_options
        return self._format(**{name: options.pop(name) for name in names})

    # ---- shapes alone ---------------------------------------------------------------------------

    def _quantize_fake(self, weight: Tensor, **options: Any) -> tuple[Tensor, ...]:
        format = self._format(**options)
        held = zip(format.field_shapes(weight.shape), format.field_dtypes(), strict=True)
        return tuple(weight.new_empty(shape, dtype=dtype) for shape, dtype in held)

    def _dequantize_fake(self, *fields: Tensor, **options: Any) -> Tensor:
        return fields[0].new_empty(options["shape"], dtype=options["out_dtype"])

    def _matmul_fake(self, input: Tensor, *rest: Any, **options: Any) -> Tensor:
        out_features, in_features = options["shape"]
        return input.new_empty(
            input.shape[0], out_features if options["transposed"] else in_features
        )

    # ---- gradients ------------------------------------------------------------------------------

    def _matmul_backward(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """x W^T and x W are each other's gradient, so derivatives of any order work."""
        options = {**ctx.options, "transposed": not ctx.options["transposed"]}
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = self._matmul_op(grad, *ctx.saved_tensors, None, **options)
        if ctx.needs_input_grad[-1]:
            grad_bias = grad.sum(0)
        return grad_input, *(None for _ in self.format_type.tensor_fields), grad_bias


def _keep_for_backward(
    ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs[1:-1])  # the stored fields, nothing decoded
    ctx.options = keyword_only_inputs
