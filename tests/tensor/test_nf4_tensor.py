"""NF4Tensor as a stored weight: what it says it is, and that moving or copying loses no bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from nf4_tensors import assert_same, make
from torch import Tensor, nn

from qlora_builders.tensor import NF4Format, NF4Tensor, to_nf4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def saved_and_loaded(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---- what it is ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(30, 70), (1, 1), (64, 64), (129,), (128256 // 64, 2), (0, 8)])
def test_it_has_the_shape_dtype_and_device_of_the_weight(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = make(*shape, dtype=dtype)
    assert (tuple(weight.shape), weight.dtype) == (shape, dtype)
    assert weight.device == torch.device("cpu")
    assert weight.stride() == torch.empty(shape).stride()
    assert not weight.requires_grad
    decoded = weight.dequantize()
    assert (tuple(decoded.shape), decoded.dtype, type(decoded)) == (shape, dtype, Tensor)


def test_bytes_are_those_of_codes_and_scales() -> None:
    geometric = make(512, 512)
    blocks = 512 * 512 // 64
    assert geometric.nbytes == 512 * 512 // 2 + blocks + blocks // 256 * 8
    assert geometric.nbytes * 8 / geometric.numel() < 4.13
    assert make(512, 512, scale_format="none").nbytes * 8 / 512**2 == 4.5


def test_repr_names_shape_dtype_and_options_and_decodes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = make(scale_format="none", block_size=32)
    monkeypatch.setattr(NF4Tensor, "dequantize", None)
    assert repr(weight) == (
        "NF4Tensor(shape=[30, 70], dtype=torch.bfloat16, device=cpu, block_size=32, "
        "scale_block_size=256, scale_format='none', scale_search=False)"
    )


def test_quantizing_does_not_touch_or_alias_the_weight() -> None:
    weight = torch.randn(8, 64, requires_grad=True)
    before = weight.detach().clone()
    quantized = to_nf4(weight)
    assert torch.equal(weight, before)
    assert not quantized.requires_grad
    assert weight.requires_grad


# ---- casts dequantize, moves do not -------------------------------------------------------------


CASTS: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]] = {
    "to(dtype)": (lambda w: w.to(torch.float32), torch.float32),
    "to(dtype=)": (lambda w: w.to(dtype=torch.float16), torch.float16),
    "to(own dtype)": (lambda w: w.to(torch.bfloat16), torch.bfloat16),
    "to(device, dtype)": (lambda w: w.to("cpu", torch.float32), torch.float32),
    "to(other)": (lambda w: w.to(torch.ones(1, dtype=torch.float64)), torch.float64),
    "float": (lambda w: w.float(), torch.float32),
    "double": (lambda w: w.double(), torch.float64),
    "half": (lambda w: w.half(), torch.float16),
    "bfloat16": (lambda w: w.bfloat16(), torch.bfloat16),
    "type": (lambda w: w.type(torch.float32), torch.float32),
    "type_as": (lambda w: w.type_as(torch.ones(1)), torch.float32),
    "dequantize": (lambda w: w.dequantize(), torch.bfloat16),
}


@pytest.mark.parametrize("spelling", CASTS)
def test_every_cast_dequantizes(spelling: str) -> None:
    cast, dtype = CASTS[spelling]
    weight = make()
    plain = cast(weight)
    assert type(plain) is Tensor
    assert plain.dtype == dtype
    assert torch.equal(plain, weight.dequantize().to(dtype))


def test_casts_of_a_float32_weight_all_give_plain_tensors() -> None:
    weight = make(dtype=torch.float32)
    for plain in (weight.float(), weight.to(torch.float32), weight.half(), weight.bfloat16()):
        assert type(plain) is Tensor
    assert torch.equal(weight.float(), weight.dequantize())


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "clone": lambda w: w.clone(),
    "torch.clone": torch.clone,
    "clone(memory_format)": lambda w: w.clone(memory_format=torch.contiguous_format),
    "contiguous": lambda w: w.contiguous(),
    "cpu": lambda w: w.cpu(),
    "to(device)": lambda w: w.to("cpu"),
    "to(device=)": lambda w: w.to(device=torch.device("cpu"), non_blocking=True),
    "to(device, copy)": lambda w: w.to("cpu", copy=True),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "torch.save": saved_and_loaded,
    "multiprocessing": lambda w: pickle.loads(ForkingPickler.dumps(w)),
}


@pytest.mark.parametrize("scale_format", ["geometric", "none"])
@pytest.mark.parametrize("spelling", COPIES)
def test_copies_keep_every_bit_and_option(spelling: str, scale_format: str) -> None:
    weight = make(block_size=32, scale_block_size=7, scale_format=scale_format)
    assert_same(COPIES[spelling](weight), weight)
    parameter = nn.Parameter(weight, requires_grad=False)
    assert_same(COPIES[spelling](parameter), weight)


@pytest.mark.parametrize("spelling", ["clone", "to(device, copy)", "deepcopy"])
def test_copies_own_their_memory(spelling: str) -> None:
    weight = make()
    duplicate = COPIES[spelling](weight)
    for name in NF4Tensor.tensor_fields:
        assert getattr(duplicate, name).data_ptr() != getattr(weight, name).data_ptr()


def test_moving_to_where_it_is_already_copies_nothing() -> None:
    weight = make()
    assert weight.to("cpu") is weight
    assert weight.detach().codes.data_ptr() == weight.codes.data_ptr()


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_parameter_stays_a_frozen_parameter(copied: Callable[[Any], Any]) -> None:
    parameter = copied(nn.Parameter(make(), requires_grad=False))
    assert isinstance(parameter, nn.Parameter)
    assert isinstance(parameter, NF4Tensor)
    assert not parameter.requires_grad


def test_two_references_stay_one_tensor_when_saved_together() -> None:
    weight = make()
    loaded = saved_and_loaded({"a": weight, "b": weight.detach()})
    assert loaded["a"].codes.data_ptr() == loaded["b"].codes.data_ptr()


# ---- modules ------------------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.norm = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to("cpu"),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.bfloat16(),
        lambda m: m.cpu(),
        copy.deepcopy,
    ],
)
def test_module_casts_and_moves_leave_the_weight_alone(move: Callable[[nn.Module], Any]) -> None:
    weight = make()
    moved = move(Holder(weight.clone()))
    assert_same(moved.weight, weight)
    assert isinstance(moved.weight, nn.Parameter)
    assert [name for name, _ in moved.named_parameters()] == ["weight", "norm"]


def test_module_half_still_casts_the_plain_parameters() -> None:
    assert Holder(make()).half().norm.dtype == torch.float16


# ---- meta ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_format", ["geometric", "none"])
def test_meta_and_to_empty(scale_format: str) -> None:
    meta = to_nf4(torch.empty(30, 70, device="meta"), scale_format=scale_format, block_size=32)
    assert meta.is_meta
    assert meta.dequantize().is_meta
    module = Holder(meta).to_empty(device="cpu")
    real = make(dtype=torch.float32, scale_format=scale_format, block_size=32)
    for name in NF4Tensor.tensor_fields:
        assert getattr(module.weight, name).device.type == "cpu"
    with torch.no_grad():
        module.weight.copy_(real)
    assert_same(module.weight, real)


def test_moving_to_meta_keeps_type_and_options() -> None:
    moved = make(block_size=128).to("meta")
    assert isinstance(moved, NF4Tensor)
    assert (moved.device.type, moved.format.block_size) == ("meta", 128)
    assert all(getattr(moved, name).is_meta for name in NF4Tensor.tensor_fields)


def test_empty_like_moves_every_field() -> None:
    empty = torch.empty_like(make(block_size=32), device="meta")
    assert isinstance(empty, NF4Tensor)
    assert empty.format.block_size == 32
    assert all(getattr(empty, name).is_meta for name in NF4Tensor.tensor_fields)
    plain = torch.empty_like(make(), dtype=torch.float32)
    assert type(plain) is Tensor
    assert (tuple(plain.shape), plain.dtype) == ((30, 70), torch.float32)


# ---- errors -------------------------------------------------------------------------------------


REQUIRES_GRAD: dict[str, Callable[[NF4Tensor], Any]] = {
    "Parameter": nn.Parameter,
    "Parameter(requires_grad)": lambda w: nn.Parameter(w, requires_grad=True),
    "requires_grad_()": lambda w: w.requires_grad_(),
    "requires_grad_(True)": lambda w: w.requires_grad_(True),
    "requires_grad_(requires_grad=)": lambda w: w.requires_grad_(requires_grad=True),
    "assignment": lambda w: setattr(w, "requires_grad", True),
    "Module": lambda w: Holder(w).requires_grad_(True),
}


@pytest.mark.parametrize("spelling", REQUIRES_GRAD)
def test_gradients_cannot_be_asked_for(spelling: str) -> None:
    with pytest.raises(ValueError, match=r"an NF4 weight cannot be trained.*LoRALinear"):
        REQUIRES_GRAD[spelling](make())


def test_gradients_may_be_declined() -> None:
    weight = make()
    weight.requires_grad = False
    assert weight.requires_grad_(False) is weight
    assert not weight.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 48}, "block_size is 48; allowed: 32, 64, 128"),
        ({"block_size": "64"}, "block_size is '64'; allowed"),
        ({"scale_block_size": 0}, "scale_block_size is 0; it must be an integer >= 1"),
        ({"scale_block_size": 1.5}, r"scale_block_size is 1\.5"),
        ({"scale_format": "geometrc"}, "'geometrc'; did you mean 'geometric'"),
        ({"scale_format": None}, "scale_format is None; "),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_nf4(torch.zeros(4, 64), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64, torch.bool])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"dtype {dtype}; allowed: torch.float32, torch.bfloat16"):
        to_nf4(torch.zeros(4, 64, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (2, 3, 4)])
def test_other_ranks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="use 1-D or 2-D"):
        to_nf4(torch.zeros(shape))


def test_an_nf4_tensor_is_not_quantized_twice() -> None:
    with pytest.raises(ValueError, match="NF4Tensor already"):
        to_nf4(make())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_refused(bad: float, dtype: torch.dtype) -> None:
    weight = torch.zeros(40, 70, dtype=dtype)
    weight[39, 69] = weight[0, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite elements; repair the checkpoint"):
        to_nf4(weight)


def test_the_constructor_checks_its_fields() -> None:
    weight = make(dtype=torch.float32)
    fields = {name: getattr(weight, name) for name in NF4Tensor.tensor_fields}
    same = NF4Tensor(**fields, shape=(30, 70), dtype=torch.float32)
    assert_same(same, weight)
    with pytest.raises(ValueError, match=r"codes is torch.uint8 \[1050\], but a weight of shape"):
        NF4Tensor(**fields, shape=(30, 71), dtype=torch.float32)
    wrong = {**fields, "scales": fields["scales"].float()}
    with pytest.raises(ValueError, match=r"scales is torch.float32 \[33\].*needs torch.uint8"):
        NF4Tensor(**wrong, shape=(30, 70), dtype=torch.float32)
    with pytest.raises(ValueError, match="scale_groups is"):
        NF4Tensor(
            **fields, shape=(30, 70), dtype=torch.float32, format=NF4Format(scale_block_size=2)
        )
    with pytest.raises(ValueError, match=r"cannot stand for dtype torch\.float64"):
        NF4Tensor(**fields, shape=(30, 70), dtype=torch.float64)
    with pytest.raises(TypeError, match=r"takes codes, scales, scale_groups, .*; got 0 fields and"):
        NF4Tensor(**fields, shape=(30, 70), dtype=torch.float32, block_size=64)
    with pytest.raises(TypeError, match=r"got 2 fields and no names"):
        NF4Tensor(weight.codes, weight.scales, shape=(30, 70), dtype=torch.float32)
    with pytest.raises(ValueError, match="block_size is 63"):
        NF4Tensor(**fields, shape=(30, 70), dtype=torch.float32, format=NF4Format(block_size=63))


@pytest.mark.gpu
def test_pinning_and_moving_to_cuda_and_back_keep_every_bit() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    weight = make()
    pinned = weight.pin_memory()
    assert pinned.is_pinned()
    assert_same(pinned, weight)
    for moved in (weight.cuda(), weight.to("cuda"), pinned.to("cuda", non_blocking=True)):
        assert moved.device.type == "cuda"
        assert all(getattr(moved, name).is_cuda for name in NF4Tensor.tensor_fields)
        assert torch.equal(moved.dequantize().cpu(), weight.dequantize())
        assert_same(moved.cpu(), weight)
