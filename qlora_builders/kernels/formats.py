"""A quantized format as one value, and its kernels as `torch.library` ops.

A format says how many plain tensors hold a weight, of which shapes and dtypes, and with which
options. Kernels are functions on those tensors: quantize, dequantize and matmul, with one signature
for every format and backend. Each is an op, so that `torch.compile` and `torch.export` see one
opaque call whose output shape is known; on the meta device that is all there is, and models can be
built without memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
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
        return {field.name: getattr(self, field.name) for field in fields(self)}

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
    `input @ W` in the input's dtype, for input [n, in] (transposed) or [n, out].
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


_library = torch.library.Library("qlora_builders", "DEF")
_SCHEMA_TYPES = {"int": "int", "str": "str", "bool": "bool"}
MATMUL_OPS: set[Any] = set()  # of all formats


class Kernels:
    """The kernels of a format behind ops, which choose the backend.

    Args:
        format_type: what the ops' option arguments make.
        choose: (device, format, dtypes) -> the fastest backend that takes them.
    """

    def __init__(self, format_type: type[Format], choose: Callable[..., Any]) -> None:
        self.format_type = format_type
        self._choose = choose
        names, name = format_type.tensor_fields, format_type.name
        self._num_fields = len(names)
        kinds = {f.name: _SCHEMA_TYPES[str(f.type)] for f in fields(format_type)}
        every = [f"{kind} {option}" for option, kind in kinds.items()]
        stored = [f"{kinds[option]} {option}" for option in format_type.stored_options]
        tensors = [f"Tensor {field}" for field in names]
        self._quantize_op = self._define(
            f"quantize_{name}", ["Tensor weight"], every, ["Tensor"] * len(names)
        )
        self._dequantize_op = self._define(
            f"dequantize_{name}",
            tensors,
            ["int[] shape", *stored, "ScalarType dtype", "ScalarType out_dtype"],
            ["Tensor"],
        )
        self._matmul_op = self._define(
            f"matmul_{name}",
            ["Tensor input", *tensors, "Tensor? bias"],
            ["int[] shape", "bool transposed", *stored, "ScalarType dtype"],
            ["Tensor"],
        )
        torch.library.register_autograd(
            f"qlora_builders::matmul_{name}",
            self._matmul_backward,
            setup_context=_keep_for_backward,
            lib=_library,
        )
        MATMUL_OPS.add(self._matmul_op.default)

    def _define(
        self, name: str, arguments: list[str], keywords: list[str], returns: list[str]
    ) -> Any:
        both = ", ".join([*arguments, *(["*", *keywords] if keywords else [])])
        result = returns[0] if len(returns) == 1 else f"({', '.join(returns)})"
        _library.define(f"{name}({both}) -> {result}")
        kernel = name.partition("_")[0]
        for key in ("CPU", "CUDA"):
            _library.impl(name, getattr(self, f"_{kernel}"), key)
        fake = getattr(self, f"_{kernel}_fake")
        torch.library.register_fake(f"qlora_builders::{name}", fake, lib=_library)
        return getattr(torch.ops.qlora_builders, name)

    def quantize(self, weight: Tensor, *, format: Format) -> tuple[Tensor, ...]:
        """As `Backend.quantize`, of the device that the weight is on; so are the others."""
        made = self._quantize_op(weight, **format.options)
        return made if isinstance(made, tuple) else tuple(made)

    def dequantize(
        self,
        fields: Sequence[Tensor],
        *,
        format: Format,
        shape: Sequence[int],
        dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> Tensor:
        decoded: Tensor = self._dequantize_op(
            *fields, shape=shape, dtype=dtype, out_dtype=out_dtype, **format.stored
        )
        return decoded

    def matmul(
        self,
        input: Tensor,
        fields: Sequence[Tensor],
        bias: Tensor | None = None,
        *,
        format: Format,
        shape: Sequence[int],
        transposed: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        product: Tensor = self._matmul_op(
            input,
            *fields,
            bias,
            shape=shape,
            transposed=transposed,
            dtype=dtype,
            **format.stored,
        )
        return product

    # ---- what the ops run -----------------------------------------------------------------------

    def _quantize(self, weight: Tensor, **options: Any) -> tuple[Tensor, ...]:
        format = self.format_type(**options)
        backend = self._choose(weight.device, format, weight.dtype)
        made: tuple[Tensor, ...] = backend.quantize(weight, format=format)
        return made

    def _dequantize(
        self,
        *fields: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
        out_dtype: torch.dtype,
        **stored: Any,
    ) -> Tensor:
        format = self.format_type(**stored)
        backend = self._choose(fields[0].device, format, dtype, out_dtype)
        decoded: Tensor = backend.dequantize(
            fields, format=format, shape=shape, dtype=dtype, out_dtype=out_dtype
        )
        return decoded

    def _matmul(
        self,
        input: Tensor,
        *rest: Any,
        shape: Sequence[int],
        transposed: bool,
        dtype: torch.dtype,
        **stored: Any,
    ) -> Tensor:
        *fields, bias = rest
        format = self.format_type(**stored)
        backend = self._choose(input.device, format, dtype, input.dtype)
        product: Tensor = backend.matmul(
            input, fields, bias, format=format, shape=shape, transposed=transposed, dtype=dtype
        )
        return product

    def _quantize_fake(self, weight: Tensor, **options: Any) -> tuple[Tensor, ...]:
        format = self.format_type(**options)
        shapes, dtypes = format.field_shapes(weight.shape), format.field_dtypes()
        return tuple(
            weight.new_empty(shape, dtype=dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        )

    def _dequantize_fake(
        self, *fields: Tensor, shape: Sequence[int], out_dtype: torch.dtype, **options: Any
    ) -> Tensor:
        return fields[0].new_empty(shape, dtype=out_dtype)

    def _matmul_fake(
        self, input: Tensor, *rest: Any, shape: Sequence[int], transposed: bool, **options: Any
    ) -> Tensor:
        return input.new_empty(input.shape[0], shape[0] if transposed else shape[1])

    def _matmul_backward(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """x W^T and x W are each other's gradient, so derivatives of any order work."""
        options = {**ctx.options, "transposed": not ctx.options["transposed"]}
        nones = [None] * self._num_fields  # saved_tensors may be asked once: it may recompute
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = self._matmul_op(grad, *ctx.saved_tensors, None, **options)
        if ctx.needs_input_grad[-1]:
            grad_bias = grad.sum(0)
        return grad_input, *nones, grad_bias


def _keep_for_backward(
    ctx: Any, inputs: tuple, keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs[1:-1])  # the stored fields, nothing decoded
    ctx.options = keyword_only_inputs
