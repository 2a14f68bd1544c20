"""NF4, the 4-bit type of the QLoRA paper; `kernels/nf4_reference.py` defines what fields mean."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qlora_builders.kernels import NF4, NF4Format
from qlora_builders.tensor.quantized import QuantizedTensor, quantize, quantized_linear


class NF4Tensor(QuantizedTensor):
    """A weight in NF4; n elements, B = ceil(n / block_size), G = ceil(B / scale_block_size).

    | field        | dtype                     | shape            |
    |--------------|---------------------------|------------------|
    | codes        | uint8, two codes a byte   | [ceil(n / 2)]    |
    | scales       | uint8 (`none`: float32)   | [B]              |
    | scale_groups | float32                   | [G, 2] (`none`: [0, 2]) |

    Build one with `to_nf4`.
    """

    kernels = NF4

    format: NF4Format
    codes: Tensor
    scales: Tensor
    scale_groups: Tensor

    @property
    def nf4_options(self) -> dict[str, Any]:
        """The keyword arguments of `to_nf4` that made it."""
        return self.format.options

    def __setstate__(self, state: dict[str, Any]) -> None:
        """`torch.save` of releases before formats wrote each option by itself."""
        if "format" not in state:
            options = {name: state.pop(name) for name in NF4Format().options if name in state}
            state["format"] = NF4Format(**options)
        self.__dict__.update(state)


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
    format = NF4Format(
        block_size=block_size,
        scale_block_size=scale_block_size,
        scale_format=scale_format,
        scale_search=scale_search,
    )
    quantized = quantize(weight, format)
    assert isinstance(quantized, NF4Tensor)
    return quantized


def linear_nf4(input: Tensor, weight: NF4Tensor, bias: Tensor | None = None) -> Tensor:
    """`quantized_linear` of an NF4 weight."""
    return quantized_linear(input, weight, bias)
