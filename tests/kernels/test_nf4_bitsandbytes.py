"""`scale_format="bnb"` is bitsandbytes' nested format, compared with bitsandbytes itself."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_builders import NF4Tensor, to_nf4
from qlora_builders.config.shipped import demo_path
from qlora_builders.kernels.nf4_reference import NF4Format, dynamic_codebook

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((512, 512), (7, 13), (64, 64), (33, 100))


def weights(dtype: torch.dtype, shape: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(shape, generator=generator)
    outlier = normal.clone()
    outlier[0, 0] = 300
    student = torch.distributions.StudentT(torch.tensor(3.0)).sample(shape)
    return [weight.to(dtype) for weight in (normal, outlier, student, normal * 0.02)]


def test_the_scale_codebook_is_theirs() -> None:
    theirs = bnb.create_dynamic_map(signed=True, max_exponent_bits=7, total_bits=8)
    assert torch.equal(dynamic_codebook(), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", [64, 128])
def test_quantizing_gives_their_bits(
    dtype: torch.dtype, shape: tuple[int, int], block_size: int
) -> None:
    for weight in weights(dtype, shape):
        packed, state = bnb.quantize_4bit(
            weight, blocksize=block_size, quant_type="nf4", compress_statistics=True
        )
        ours = to_nf4(weight, block_size=block_size, scale_format="bnb")
        assert torch.equal(ours.codes, packed.flatten())
        assert torch.equal(ours.scale_groups[:, 0], state.state2.absmax)
        assert (ours.scale_groups[:, 1] == state.offset).all()
        assert torch.equal(ours.scales, state.absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantizing_their_buffers_gives_their_weights(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    for weight in weights(dtype, shape):
        packed, state = bnb.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=True
        )
        groups = torch.stack([state.state2.absmax, state.offset.expand_as(state.state2.absmax)], 1)
        format = NF4Format(scale_format="bnb")
        fields = packed.flatten(), state.absmax, groups
        ours = NF4Tensor(*fields, shape=shape, dtype=dtype, format=format)
        assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_our_default_format_is_at_least_as_accurate(dtype: torch.dtype) -> None:
    def error(weight: Tensor, decoded: Tensor) -> float:
        return ((decoded.double() - weight.double()).norm() / weight.double().norm()).item()

    generator = torch.Generator().manual_seed(1)
    shape = (1024, 1024)
    normal = torch.randn(shape, generator=generator)
    sparse = normal * (torch.rand(shape, generator=generator) < 0.1)
    student = torch.distributions.StudentT(torch.tensor(3.0)).sample(shape)
    for weight in (normal, torch.rand(shape, generator=generator) - 0.5, sparse, student):
        weight = weight.to(dtype)
        theirs = bnb.dequantize_4bit(
            *bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        )
        assert error(weight, to_nf4(weight).dequantize()) <= error(weight, theirs) * 1.00001


def test_trained_weights_are_at_least_as_accurate_in_all() -> None:
    """Single weights are within 0.05 % either way; over the demo base ours is the smaller error."""
    ours = theirs = 0.0
    for name, weight in load_file(demo_path("base") / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            continue
        packed = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        plain = weight.double()
        ours += (to_nf4(weight).dequantize().double() - plain).square().sum().item()
        theirs += (bnb.dequantize_4bit(*packed).double() - plain).square().sum().item()
    assert 0 < ours <= theirs
