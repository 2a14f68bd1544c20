"""Quantized weights as the plain tensors that files hold, and back, without changing a bit.

A layout names its parts by what they add to the weight's key `K`. The native one serves every type;
bitsandbytes' is NF4's alone. n elements, B blocks, G groups:

native       K.codes, K.scales, ...              the fields of the type, as they are
             K.nf4 (the name of the type)        uint8, JSON: version (1), shape, dtype, the options
                                                 of the format, and crc32 of the bytes of the
                                                 fields and of this JSON without its last member
bitsandbytes K                                   uint8 [ceil(n / 2), 1]; or the same bytes in
                                                 another dtype (`bnb_4bit_quant_storage`)
             K.absmax                            float32 [B], or uint8 [B] where nested
             K.quant_map                         float32 [16], the codebook
             K.nested_absmax, .nested_quant_map  float32 [G] and [256], where nested
             K.quant_state.bitsandbytes__nf4     uint8, JSON: quant_type, blocksize, dtype, shape;
                                                 where nested also nested_blocksize (256),
                                                 nested_dtype and nested_offset

bitsandbytes' nested scales are our `bnb` format. Its plain ones multiply as float32, ours (`none`)
rounded to the weight's dtype, which is the same for every scale that is the magnitude of such a
weight. Others, which bitsandbytes itself does not write, become `bnb` groups of one block with code
255, the codebook's 1.0: 1.0 * absmax + 0.0. Scales of any other format are written plain, decoded;
that is exact too.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_builders.files.reading import parse_json
from qlora_builders.kernels import NF4_CODEBOOK, NF4Format
from qlora_builders.kernels.nf4_reference import decode_scales, dynamic_codebook
from qlora_builders.tensor.nf4 import NF4Tensor
from qlora_builders.tensor.quantized import QUANTIZED_TYPES, QuantizedTensor

BNB_JSON = ".quant_state.bitsandbytes__nf4"
BNB_FP4_JSON = ".quant_state.bitsandbytes__fp4"
_BNB_PLAIN = {"", ".absmax", ".quant_map", BNB_JSON}
_BNB_NESTED = {*_BNB_PLAIN, ".nested_absmax", ".nested_quant_map"}
_BNB_NESTED_BLOCK = 256
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Stored:
    """What the JSON part of a weight says: `content` as it is written, the rest checked."""

    shape: torch.Size
    dtype: torch.dtype
    format: Any
    content: dict[str, Any]


# ---- native -------------------------------------------------------------------------------------


def native_suffixes() -> dict[str, type[QuantizedTensor]]:
    """What the JSON part adds to a weight's key, of each type."""
    return {f".{name}": cls for name, cls in QUANTIZED_TYPES.items()}


def pack_native(weight: QuantizedTensor) -> dict[str, Tensor]:
    """Suffix -> tensor; the fields are the weight's own memory."""
    fields = dict(zip(weight.tensor_fields, weight.fields, strict=True))
    head = {
        "version": 1,
        "shape": list(weight.shape),
        "dtype": _dtype_name(weight.dtype),
        **weight.format.options,
    }
    head["crc32"] = _checksum(weight.fields, head)
    parts = {f".{name}": field for name, field in fields.items()}
    return {**parts, f".{weight.format.name}": _json_tensor(head)}


def native_metadata(text: Tensor, suffix: str) -> Stored:
    """
    Args:
        text: the JSON part.
        suffix: its own.

    Raises:
        ValueError: if it is not what `pack_native` writes.
    """
    format_type = native_suffixes()[suffix].kernels.format_type
    options = format_type().options
    head = _read_json(text, {"version", "shape", "dtype", *options, "crc32"})
    if head["version"] != 1:
        raise ValueError(f"version is {head['version']!r}; this release reads version 1")
    for name, default in (*options.items(), ("crc32", 0)):
        if type(head[name]) is not type(default):
            kind = type(default).__name__
            raise ValueError(f"{name} is {head[name]!r}; it must be of type {kind}")
    format = format_type(**{name: head[name] for name in options})
    return Stored(_shape(head["shape"]), _dtype(head["dtype"]), format, head)


def unpack_native(parts: Mapping[str, Tensor]) -> QuantizedTensor:
    """
    Raises:
        ValueError: for parts that are missing, surplus, of a wrong shape or dtype, or damaged.
    """
    suffix = _native_suffix(parts) or "." + NF4Format.name
    cls = native_suffixes()[suffix]
    _check_names("parts missing", parts, {*(f".{field}" for field in cls.tensor_fields), suffix})
    stored = native_metadata(parts[suffix], suffix)
    weight = cls(
        *(parts[f".{name}"] for name in cls.tensor_fields),
        shape=stored.shape,
        dtype=stored.dtype,
        format=stored.format,
    )
    written = {k: v for k, v in stored.content.items() if k != "crc32"}
    if _checksum(weight.fields, written) != stored.content["crc32"]:
        raise ValueError("the checksum does not fit the stored codes and scales: damaged")
    return weight


def _native_suffix(parts: Mapping[str, Tensor]) -> str | None:
    return next((suffix for suffix in native_suffixes() if suffix in parts), None)


def _checksum(fields: Iterable[Tensor], head: Mapping[str, Any]) -> int:
    value = 0
    for field in fields:
        value = zlib.crc32(tensor_bytes(field), value)
    return zlib.crc32(json.dumps(head).encode(), value)


# ---- bitsandbytes -------------------------------------------------------------------------------


def pack_bnb(weight: NF4Tensor) -> dict[str, Tensor]:
    """Suffix -> tensor. Codes are the weight's own memory; scales are decoded unless nested."""
    format = weight.format
    nested = format.scale_format == "bnb" and format.scale_block_size == _BNB_NESTED_BLOCK
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": format.block_size,
        "dtype": _dtype_name(weight.dtype),
        "shape": list(weight.shape),
    }
    parts = {"": weight.codes.view(-1, 1), ".quant_map": NF4_CODEBOOK}
    if nested and weight.numel():
        offset = weight.scale_groups[0, 1].item()
        state |= {"nested_blocksize": _BNB_NESTED_BLOCK, "nested_dtype": "float32"}
        state |= {"nested_offset": offset}
        parts[".absmax"] = weight.scales
        parts[".nested_absmax"] = weight.scale_groups[:, 0].contiguous()
        parts[".nested_quant_map"] = dynamic_codebook()
    else:
        parts[".absmax"] = decode_scales(
            weight.scales, weight.scale_groups, format=format, dtype=weight.dtype
        )
    return {**parts, BNB_JSON: _json_tensor(state)}


def bnb_metadata(text: Tensor, suffix: str = BNB_JSON) -> Stored:
    """
    Raises:
        ValueError: if it is not what bitsandbytes writes for NF4.
    """
    state = _read_json(text)
    nested = "nested_offset" in state
    keys = {"quant_type", "blocksize", "dtype", "shape"}
    if nested:
        keys |= {"nested_blocksize", "nested_dtype", "nested_offset"}
    _check_names("keys missing in the description", state, keys)
    for name, allowed in (
        ("quant_type", "nf4"),
        ("nested_blocksize", _BNB_NESTED_BLOCK),
        ("nested_dtype", "float32"),
    ):
        if state.get(name, allowed) != allowed:
            raise ValueError(f"{name} is {state[name]!r}; only {allowed!r} is read")
    format = NF4Format(block_size=state["blocksize"], scale_block_size=1, scale_format="bnb")
    offset = state.get("nested_offset", 0.0)
    if type(offset) is not float or torch.tensor(offset, dtype=torch.float32).item() != offset:
        raise ValueError(f"nested_offset is {offset!r}, which is no float32 number")
    return Stored(_shape(state["shape"]), _dtype(state["dtype"]), format, state)


def unpack_bnb(parts: Mapping[str, Tensor]) -> NF4Tensor:
    """Codes and scales are taken as they are.

    Raises:
        ValueError: for parts that are missing, surplus, of a wrong shape or dtype, or FP4.
    """
    if BNB_FP4_JSON in parts:
        raise ValueError("quantized to FP4; only NF4 is read (bnb_4bit_quant_type='nf4')")
    _check_names("parts missing", parts, _BNB_NESTED if ".nested_absmax" in parts else _BNB_PLAIN)
    stored = bnb_metadata(parts[BNB_JSON])
    nested = ".nested_absmax" in parts
    if nested != ("nested_offset" in stored.content):
        raise ValueError("nested_absmax and the nested_offset of quant_state must come together")
    if not torch.equal(parts[".quant_map"].cpu(), NF4_CODEBOOK):
        raise ValueError("quant_map is not the codebook of NF4")
    absmax = parts[".absmax"]
    if nested:
        fields, options = _nested_scales(
            absmax,
            parts[".nested_quant_map"],
            parts[".nested_absmax"],
            offset=stored.content["nested_offset"],
            dtype=stored.dtype,
        )
    else:
        fields, options = _plain_scales(absmax, stored.dtype)
    return NF4Tensor(
        _bnb_codes(parts[""], stored.shape.numel()),
        *fields,
        shape=stored.shape,
        dtype=stored.dtype,
        format=NF4Format(block_size=stored.format.block_size, **options),
    )


def _nested_scales(
    codes: Tensor, codebook: Tensor, largest: Tensor, *, offset: float, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """As they are; decoded if their codebook is not bit for bit ours. bitsandbytes computes it with
    torch, whose last bits differ between processors."""
    _check_finite("nested_absmax", largest)
    _check_finite("nested_quant_map", codebook)
    if codebook.numel() != 256 or not (codebook[1:] > codebook[:-1]).all():
        raise ValueError("nested_quant_map is not a codebook of 256 ascending values")
    if torch.equal(codebook.cpu(), dynamic_codebook()):
        groups = torch.stack([largest, torch.full_like(largest, offset)], dim=1)
        return (codes, groups), {"scale_format": "bnb", "scale_block_size": _BNB_NESTED_BLOCK}
    if codes.dtype != torch.uint8 or largest.numel() != -(-codes.numel() // _BNB_NESTED_BLOCK):
        raise ValueError(f"{codes.numel()} scales of {codes.dtype} in {largest.numel()} groups")
    spread = largest.repeat_interleave(_BNB_NESTED_BLOCK)[: codes.numel()]
    return _plain_scales(codebook[codes.int()] * spread + offset, dtype)


def _plain_scales(
    absmax: Tensor, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    _check_finite("absmax", absmax)
    if torch.equal(absmax.to(dtype).float(), absmax):
        return (absmax, absmax.new_empty(0, 2)), {"scale_format": "none"}
    groups = torch.stack([absmax, torch.zeros_like(absmax)], dim=1)
    codes = torch.full_like(absmax, 255, dtype=torch.uint8)
    return (codes, groups), {"scale_format": "bnb", "scale_block_size": 1}


def _bnb_codes(packed: Tensor, numel: int) -> Tensor:
    codes = packed.contiguous().view(-1).view(torch.uint8)
    needed = -(-numel // 2)
    if not needed <= codes.numel() < needed + packed.dtype.itemsize:
        raise ValueError(f"holds {codes.numel()} bytes of codes; {numel} weights need {needed}")
    return codes[:needed]


# ---- both ---------------------------------------------------------------------------------------


def stored_parts(state: Mapping[str, Any], key: str) -> dict[str, Tensor]:
    """Suffix -> tensor for what `state` holds of the weight `key`, the weight itself included."""
    return {
        name.removeprefix(key): tensor
        for name, tensor in state.items()
        if name == key or name.startswith(key + ".")
    }


def unpack(parts: Mapping[str, Tensor]) -> QuantizedTensor:
    """From either layout; errors as there."""
    return unpack_native(parts) if _native_suffix(parts) else unpack_bnb(parts)


def _check_names(subject: str, given: Iterable[str], expected: Iterable[str]) -> None:
    missing, surplus = sorted({*expected} - {*given}), sorted({*given} - {*expected})
    if missing or surplus:
        raise ValueError(f"{subject}: {missing or 'none'}; not expected: {surplus or 'none'}")


def _check_finite(name: str, scales: Tensor) -> None:
    if scales.dtype != torch.float32 or scales.dim() != 1:
        raise ValueError(f"{name} is {scales.dtype} {list(scales.shape)}; expected float32 [n]")
    if not torch.isfinite(scales).all():
        raise ValueError(f"{name} has NaN or infinite elements")


def _json_tensor(content: Mapping[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8, device="cpu")


def _read_json(text: Tensor, keys: set[str] | None = None) -> dict[str, Any]:
    if text.dtype != torch.uint8 or text.dim() != 1:
        raise ValueError(f"the description is {text.dtype} {list(text.shape)}; expected uint8 [n]")
    content = parse_json(bytes(tensor_bytes(text)))
    if not isinstance(content, dict):
        raise ValueError(f"the description is {type(content).__name__}, expected a JSON object")
    if keys is not None:
        _check_names("keys missing in the description", content, keys)
    return content


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements of a plain tensor, row-major; a view of its memory where it can be one."""
    plain = tensor.detach().cpu().contiguous()
    # not view(-1): a tensor of one element may be contiguous with any stride
    flat = plain.as_strided((plain.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data


def _shape(value: Any) -> torch.Size:
    if not isinstance(value, list) or len(value) not in (1, 2):
        raise ValueError(f"shape is {value!r}; expected one or two sizes")
    if any(type(size) is not int or not 0 < size < 2**31 for size in value):
        raise ValueError(f"shape is {value!r}; sizes must be integers from 1 to 2^31 - 1")
    return torch.Size(value)


def _dtype(name: Any) -> torch.dtype:
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"dtype is {name!r}; allowed: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
