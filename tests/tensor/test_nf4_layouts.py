"""NF4 weights as the plain tensors of files: every bit comes back, every damage is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from nf4_tensors import DTYPES, assert_same, make, randn
from torch import Tensor

from qlora_builders.tensor.layouts import (
    BNB_JSON,
    pack_bnb,
    pack_native,
    tensor_bytes,
    unpack,
    unpack_bnb,
    unpack_native,
)

FORMATS = [
    {},
    {"scale_format": "none"},
    {"scale_format": "bnb"},
    {"scale_format": "bnb", "scale_block_size": 7},
    {"block_size": 32, "scale_block_size": 3, "scale_search": True},
    {"block_size": 4096},
]
SHAPES = ((64, 64), (300, 100), (7, 13), (1, 1), (5,))


def bnb_parts(packed: Tensor, state: bnb.QuantState) -> dict[str, Tensor]:
    return {"": packed, **{f".{k}": v for k, v in state.as_dict(packed=True).items()}}


def edit_json(parts: dict[str, Tensor], suffix: str, **changes: Any) -> dict[str, Tensor]:
    content = json.loads(bytes(tensor_bytes(parts[suffix])))
    content = {k: v for k, v in (content | changes).items() if v is not None}
    return parts | {suffix: as_tensor(json.dumps(content))}


def as_tensor(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_gives_back_every_bit(
    shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    original = make(*shape, dtype=dtype, **options)
    assert_same(unpack(pack_native(original)), original)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bitsandbytes_layout_keeps_codes_and_values(
    shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    original = make(*shape, dtype=dtype, **options)
    parts = pack_bnb(original)
    back = unpack(parts)
    assert torch.equal(back.codes, original.codes)
    assert torch.equal(back.dequantize(), original.dequantize())
    again = pack_bnb(back)
    assert parts.keys() == again.keys()
    assert all(torch.equal(parts[suffix], again[suffix]) for suffix in parts)
    assert_same(unpack(again), back)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_bitsandbytes_reads_ours_with_equal_values(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    original = make(128, 128, dtype=dtype, **options)
    parts = {f"weight{suffix}": tensor for suffix, tensor in pack_bnb(original).items()}
    packed = parts.pop("weight")
    state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
    state.shape = torch.Size([original.numel()])  # its CPU kernel wants whole blocks in a row
    theirs = bnb.dequantize_4bit(packed, state)
    assert torch.equal(theirs.view(original.shape), original.dequantize())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_we_read_bitsandbytes_with_equal_values(
    nested: bool, dtype: torch.dtype, storage: torch.dtype
) -> None:
    packed, state = bnb.quantize_4bit(
        randn(130 * 96, dtype=dtype),
        quant_type="nf4",
        compress_statistics=nested,
        quant_storage=storage,
    )
    assert packed.dtype == storage
    ours = unpack_bnb(bnb_parts(packed, state))
    assert ours.format.scale_format == ("bnb" if nested else "none")
    assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state).view(-1))
    parts = pack_bnb(ours)
    for name, tensor in state.as_dict(packed=True).items():
        assert torch.equal(parts[f".{name}"], tensor), name
    assert torch.equal(parts[""].view(-1), packed.view(-1).view(torch.uint8))


def test_plain_scales_that_the_dtype_cannot_hold_are_not_rounded() -> None:
    """Such files exist if a tool quantized float32 weights and wrote another dtype beside them."""
    packed, state = bnb.quantize_4bit(randn(64 * 64), quant_type="nf4", compress_statistics=False)
    state.dtype = torch.bfloat16
    parts = bnb_parts(packed, state)
    ours = unpack_bnb(parts)
    assert ours.dtype == torch.bfloat16
    assert not torch.equal(state.absmax.bfloat16().float(), state.absmax)
    assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state).view(-1))
    assert torch.equal(pack_bnb(ours)[".absmax"], state.absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nested_scales_of_another_machine_stay_exact(dtype: torch.dtype) -> None:
    """Its codebook may differ from ours in the last bit."""
    packed, state = bnb.quantize_4bit(
        randn(300 * 96, dtype=dtype), quant_type="nf4", compress_statistics=True
    )
    ones = state.state2.code.view(torch.int32) + 1
    state.state2.code = torch.where(
        state.state2.code == 0, state.state2.code, ones.view(torch.float32)
    )
    ours = unpack_bnb(bnb_parts(packed, state))
    theirs = bnb.dequantize_4bit(packed, state).view(-1)
    assert torch.equal(ours.dequantize(), theirs)
    assert torch.equal(unpack_bnb(pack_bnb(ours)).dequantize(), theirs)


# ---- damage -------------------------------------------------------------------------------------

BNB_PARTS = pack_bnb(make(64, 64, scale_format="bnb"))
NATIVE_PARTS = pack_native(make(64, 64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_type": "fp4"}, "quant_type is 'fp4'; only 'nf4' is read"),
        ({"blocksize": 63}, "block_size is 63; allowed: 32, 64"),
        ({"blocksize": 128}, "NF4Tensor scales is"),
        ({"blocksize": "64"}, "block_size is '64'"),
        ({"dtype": "int8"}, "dtype is 'int8'; allowed: float32, bfloat16, float16"),
        ({"shape": [64, 63]}, "holds 2048 bytes of codes; 4032 weights need 2016"),
        ({"shape": [2**40, 64]}, "sizes must be integers from 1 to"),
        ({"shape": [64.0, 64]}, "sizes must be integers from 1 to"),
        ({"shape": 4096}, "shape is 4096; expected one or two sizes"),
        ({"nested_blocksize": 128}, "nested_blocksize is 128; only 256 is read"),
        ({"nested_dtype": "float16"}, "nested_dtype is 'float16'"),
        ({"nested_offset": 0.1}, "nested_offset is 0.1, which is no float32 number"),
        ({"nested_offset": "1"}, "nested_offset is '1'"),
        ({"nested_offset": None}, "not expected: .*nested_blocksize"),
        ({"extra": 1}, r"not expected: \['extra'\]"),
    ],
)
def test_bitsandbytes_description_is_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_bnb(edit_json(BNB_PARTS, BNB_JSON, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({".absmax": None}, r"parts missing: \['\.absmax'\]; not expected: none"),
        ({".nested_absmax": None}, r"not expected: \['\.nested_quant_map'\]"),
        ({".SCB": torch.zeros(3)}, r"not expected: \['\.SCB'\]"),
        ({".quant_map": torch.zeros(16)}, "quant_map is not the codebook"),
        ({".nested_quant_map": torch.zeros(256)}, "nested_quant_map is not a codebook of 256 asc"),
        ({".nested_absmax": torch.tensor([torch.nan])}, "nested_absmax has NaN"),
        ({".nested_absmax": torch.ones(2)}, "scale_groups is torch.float32 .*2, 2"),
        ({".absmax": torch.zeros(64)}, "NF4Tensor scales is torch.float32"),
        ({".quant_state.bitsandbytes__fp4": torch.zeros(1)}, "quantized to FP4; only NF4 is read"),
        ({BNB_JSON: as_tensor("[1]")}, "the description is list"),
        ({BNB_JSON: as_tensor("{")}, "not JSON"),
        ({BNB_JSON: torch.zeros(3)}, "the description is torch.float32"),
    ],
)
def test_bitsandbytes_parts_are_checked(change: dict[str, Any], message: str) -> None:
    parts = {k: v for k, v in (BNB_PARTS | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        unpack_bnb(parts)


def test_nested_and_plain_descriptions_are_not_mixed_up() -> None:
    plain = pack_bnb(make(64, 64, scale_format="none"))
    for parts, other in ((plain, BNB_PARTS), (BNB_PARTS, plain)):
        with pytest.raises(ValueError, match="must come together"):
            unpack_bnb(parts | {BNB_JSON: other[BNB_JSON]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version is 2; this release reads version 1"),
        ({"block_size": 65}, "block_size is 65"),
        ({"block_size": 64.0}, "block_size is 64.0; it must be of type int"),
        ({"scale_search": 1}, "scale_search is 1; it must be of type bool"),
        ({"scale_format": "bnb"}, "checksum"),
        ({"dtype": "float16"}, "checksum"),
        ({"scale_block_size": 255}, "checksum"),
        ({"shape": [32, 128]}, "checksum"),
        ({"crc32": 1}, "checksum"),
        ({"crc32": None}, r"missing in the description: \['crc32'\]"),
    ],
)
def test_native_description_is_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_native(edit_json(NATIVE_PARTS, ".nf4", **change))


@pytest.mark.parametrize("field", [".codes", ".scales", ".scale_groups"])
def test_one_changed_bit_is_noticed(field: str) -> None:
    damaged = NATIVE_PARTS[field].clone()
    damaged.view(torch.uint8).view(-1)[-1] ^= 1
    with pytest.raises(ValueError, match="checksum does not fit the stored codes and scales"):
        unpack_native(NATIVE_PARTS | {field: damaged})


@pytest.mark.parametrize("unpack_layout", [unpack_native, unpack_bnb])
def test_parts_of_the_other_layout_are_refused(unpack_layout: Callable) -> None:
    parts = BNB_PARTS if unpack_layout is unpack_native else NATIVE_PARTS
    with pytest.raises(ValueError, match="parts missing: "):
        unpack_layout(parts)
