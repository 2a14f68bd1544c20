"""NF4Tensor: a 4-bit weight that has the shape, dtype and device of the weight it stands for.

The codes are stored data, not numbers to compute with. Moving or copying the tensor moves or
copies its fields bit for bit; asking for another dtype (`.to(torch.float32)`, `.float()`)
dequantizes; a linear layer dequantizes on the fly (`nf4_ops`). Anything else raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora_builders.errors import did_you_mean
from qlora_builders.kernels import (
    WEIGHT_DTYPES,
    dequantize_nf4,
    field_dtypes,
    field_shapes,
    quantize_nf4,
)
from qlora_builders.names import SCALE_FORMATS

# Filled by nf4_ops: aten op -> implementation, and torch function -> implementation.
# Both are called as implementation(func, args, kwargs).
DISPATCH_TABLE: dict[Any, Callable[[Any, tuple, dict], Any]] = {}
FUNCTION_TABLE: dict[Any, Callable[[Any, tuple, dict], Any]] = {}


class NF4Tensor(Tensor):
    """A weight in NF4; n elements, B = ceil(n / block_size), G = ceil(B / scale_block_size).

    | field        | dtype                     | shape            |
    |--------------|---------------------------|------------------|
    | codes        | uint8, two codes a byte   | [ceil(n / 2)]    |
    | scales       | uint8 (`none`: float32)   | [B]              |
    | scale_groups | float32                   | [G, 2] (`none`: [0, 2]) |

    `kernels/nf4_reference.py` defines what they mean. Build one with `to_nf4`; the constructor
    takes fields that exist already, from a checkpoint for instance.

    Raises:
        ValueError: for a field whose shape or dtype does not fit, or a bad dtype or option.
    """

    tensor_fields = ("codes", "scales", "scale_groups")
    format_fields = ("block_size", "scale_block_size", "scale_format")

    codes: Tensor
    scales: Tensor
    scale_groups: Tensor
    block_size: int
    scale_block_size: int
    scale_format: str
    scale_search: bool  # how plain weights that are copied in get their scales; see `to_nf4`

    @staticmethod
    def __new__(
        cls,
        codes: Tensor,
        scales: Tensor,
        scale_groups: Tensor,
        *,
        shape: torch.Size | tuple[int, ...],
        dtype: torch.dtype,
        block_size: int = 64,
        scale_block_size: int = 256,
        scale_format: str = "geometric",
        scale_search: bool = False,
    ) -> NF4Tensor:
        return Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=codes.device, requires_grad=False
        )

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        scale_groups: Tensor,
        *,
        shape: torch.Size | tuple[int, ...],
        dtype: torch.dtype,
        block_size: int = 64,
        scale_block_size: int = 256,
        scale_format: str = "geometric",
        scale_search: bool = False,
    ) -> None:
        self.codes = codes
        self.scales = scales
        self.scale_groups = scale_groups
        self.block_size = block_size
        self.scale_block_size = scale_block_size
        self.scale_format = scale_format
        self.scale_search = scale_search
        check_nf4_options(**self.nf4_options)
        _check_dtype(dtype)
        shapes = field_shapes(self.numel(), **self.nf4_format)
        dtypes = field_dtypes(scale_format)
        for name, shape_, dtype_ in zip(self.tensor_fields, shapes, dtypes, strict=True):
            field = getattr(self, name)
            if tuple(field.shape) != shape_ or field.dtype != dtype_:
                raise ValueError(
                    f"NF4Tensor {name} is {field.dtype} {list(field.shape)}, but a weight of shape "
                    f"{list(shape)} with {self.nf4_format} needs {dtype_} {list(shape_)}"
                )

    @property
    def nf4_format(self) -> dict[str, Any]:
        """`block_size`, `scale_block_size` and `scale_format`: what the fields mean."""
        return {name: getattr(self, name) for name in self.format_fields}

    @property
    def nf4_options(self) -> dict[str, Any]:
        """The format and `scale_search`: the keyword arguments of `to_nf4`."""
        return {**self.nf4_format, "scale_search": self.scale_search}

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes in memory: codes and scales."""
        return sum(getattr(self, name).nbytes for name in self.tensor_fields)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain weight, rounded to the weight's own dtype and then cast to `dtype` if given."""
        flat = dequantize_nf4(
            self.codes,
            self.scales,
            self.scale_groups,
            numel=self.numel(),
            **self.nf4_format,
            dtype=self.dtype,
            out_dtype=self.dtype if dtype is None else dtype,
        )
        return flat.view(self.shape)

    def map_fields(self, fn: Callable[[Tensor], Tensor]) -> NF4Tensor:
        """The same weight with `fn` applied to every field."""
        return self.with_fields(*(fn(getattr(self, name)) for name in self.tensor_fields))

    def with_fields(self, codes: Tensor, scales: Tensor, scale_groups: Tensor) -> NF4Tensor:
        return NF4Tensor(
            codes, scales, scale_groups, shape=self.shape, dtype=self.dtype, **self.nf4_options
        )

    def is_floating_point(self) -> bool:
        """False: `Module.to(dtype)` and `Module.half()` must leave a stored 4-bit weight alone."""
        return False

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return list(self.tensor_fields), {"dtype": self.dtype, **self.nf4_options}

    @staticmethod
    def __tensor_unflatten__(
        fields: dict[str, Any], context: dict[str, Any], outer_size: torch.Size, _stride: Any
    ) -> NF4Tensor:
        return NF4Tensor(**fields, shape=outer_size, **context)

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
                f"{func} is not defined on an NF4Tensor (arguments: {kinds}); "
                "use weight.dequantize() to get a plain tensor first"
            )
        return implementation(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"NF4Tensor(shape={list(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"block_size={self.block_size}, scale_block_size={self.scale_block_size}, "
            f"scale_format={self.scale_format!r}, scale_search={self.scale_search})"
        )


def check_nf4_options(
    *, block_size: int, scale_block_size: int, scale_format: str, scale_search: bool = False
) -> None:
    """
    Raises:
        ValueError: for a block size that is not a power of two from 32 to 4096, a scale block
            size that is not positive, an unknown scale format, or scale_search with "bnb".
    """
    if block_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ValueError(
            f"block_size is {block_size!r}; allowed: 32, 64, 128, 256, 512, 1024, 2048, 4096"
        )
    if not isinstance(scale_block_size, int) or scale_block_size < 1:
        raise ValueError(f"scale_block_size is {scale_block_size!r}; it must be an integer >= 1")
    if scale_format not in SCALE_FORMATS:
        raise ValueError(
            f"scale_format is {scale_format!r}{did_you_mean(str(scale_format), SCALE_FORMATS)}"
        )
    if scale_search and scale_format == "bnb":
        raise ValueError("scale_search cannot be combined with scale_format 'bnb'")


def to_nf4(
    weight: Tensor,
    *,
    block_size: int = 64,
    scale_block_size: int = 256,
    scale_format: str = "geometric",
    scale_search: bool = False,
) -> NF4Tensor:
    """Quantize a weight to NF4.

    Args:
        weight: 1-D or 2-D, float32, bfloat16 or float16, any size, on any device (meta too).
        block_size: elements per scale.
        scale_block_size: scales per group; unused by `scale_format="none"`.
        scale_format: "geometric" (8-bit scales, 4.13 bits a parameter), "none" (float32 scales,
            4.5 bits a parameter) or "bnb" (bitsandbytes' nested scales, 4.13 bits).
        scale_search: choose the scale of each block by least squared error. Takes several times as
            long, costs no bits and lowers the error on normal weights by 6 %.

    Raises:
        ValueError: for another dtype or rank, a bad option, or a weight with NaN or infinity.
    """
    options: dict[str, Any] = {
        "block_size": block_size,
        "scale_block_size": scale_block_size,
        "scale_format": scale_format,
        "scale_search": scale_search,
    }
    check_nf4_options(**options)
    if isinstance(weight, NF4Tensor):
        raise ValueError("the weight is an NF4Tensor already; dequantize() it to quantize it anew")
    _check_dtype(weight.dtype)
    if weight.dim() not in (1, 2):
        raise ValueError(f"cannot quantize a weight of shape {list(weight.shape)}; use 1-D or 2-D")
    weight = weight.detach()
    return NF4Tensor(
        *quantize_nf4(weight, **options), shape=weight.shape, dtype=weight.dtype, **options
    )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in WEIGHT_DTYPES:
        allowed = ", ".join(str(allowed) for allowed in WEIGHT_DTYPES)
        raise ValueError(f"an NF4 weight cannot stand for dtype {dtype}; allowed: {allowed}")
