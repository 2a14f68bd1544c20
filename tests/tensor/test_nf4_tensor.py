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
from nf4_tensors import DTYPES, assert_same, make, randn
from torch import Tensor, nn

from qlora_builders import FrozenNF4Linear
from qlora_builders.tensor import NF4Format, NF4Tensor, to_nf4


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


CASTS: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype | None]] = {
    "to(dtype)": (lambda w: w.to(torch.float32), torch.float32),
    "to(dtype=)": (lambda w: w.to(dtype=torch.float16), torch.float16),
    "to(own dtype)": (lambda w: w.to(w.dtype), None),
    "to(device, dtype)": (lambda w: w.to("cpu", torch.float32), torch.float32),
    "to(other)": (lambda w: w.to(torch.ones(1, dtype=torch.float64)), torch.float64),
    "float": (lambda w: w.float(), torch.float32),
    "double": (lambda w: w.double(), torch.float64),
    "half": (lambda w: w.half(), torch.float16),
    "bfloat16": (lambda w: w.bfloat16(), torch.bfloat16),
    "type": (lambda w: w.type(torch.float16), torch.float16),
    "type_as": (lambda w: w.type_as(torch.ones(1).half()), torch.float16),
    "dequantize": (lambda w: w.dequantize(), None),
}


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spelling", CASTS)
def test_every_cast_dequantizes(spelling: str, own: torch.dtype) -> None:
    cast, dtype = CASTS[spelling]
    weight = make(dtype=own)
    plain = cast(weight)
    assert type(plain) is Tensor
    assert plain.dtype == (dtype or own)
    assert torch.equal(plain, weight.dequantize().to(plain.dtype))


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
    for copied, field in zip(duplicate.fields, weight.fields, strict=True):
        assert copied.data_ptr() != field.data_ptr()


def test_moving_to_where_it_is_already_copies_nothing() -> None:
    weight = make()
    assert weight.to("cpu") is weight
    assert weight.detach().codes.data_ptr() == weight.codes.data_ptr()


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_parameter_stays_a_frozen_parameter(copied: Callable[[Any], Any]) -> None:
    parameter = copied(nn.Parameter(make(), requires_grad=False))
    assert isinstance(parameter, nn.Parameter)
    assert_same(parameter, make())
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
        (
            {"scale_format": "bnb", "scale_search": True},
            "scale_search cannot be combined with scale_format 'bnb'",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_nf4(torch.zeros(4, 64), **options)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        *(
            (torch.zeros(4, 64, dtype=dtype), f"dtype {dtype}; allowed: torch.float32, torch.bf")
            for dtype in (torch.float64, torch.int64, torch.complex64, torch.bool)
        ),
        (torch.zeros(()), "use 1-D or 2-D"),
        (torch.zeros(2, 3, 4), "use 1-D or 2-D"),
        (make(), "NF4Tensor already"),
    ],
)
def test_other_weights_are_refused(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_nf4(weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_refused(bad: float, dtype: torch.dtype) -> None:
    weight = torch.zeros(40, 70, dtype=dtype)
    weight[39, 69] = weight[0, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite elements; repair the checkpoint"):
        to_nf4(weight)


FIELDS = dict(zip(NF4Tensor.tensor_fields, make(dtype=torch.float32).fields, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shape": (30, 71)}, ValueError, r"codes is torch.uint8 \[1050\], but a weight of shape"),
        (
            {"scales": FIELDS["scales"].float()},
            ValueError,
            r"scales is torch.float32 \[33\].*needs torch.uint8",
        ),
        ({"format": NF4Format(scale_block_size=2)}, ValueError, "scale_groups is"),
        ({"dtype": torch.float64}, ValueError, r"cannot stand for dtype torch\.float64"),
        ({"block_size": 64}, TypeError, r"takes codes, scales, scale_groups, .*; got 0 fields and"),
    ],
)
def test_the_constructor_checks_its_fields(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {**FIELDS, "shape": (30, 70), "dtype": torch.float32}
    assert_same(NF4Tensor(**arguments), make(dtype=torch.float32))
    with pytest.raises(error, match=message):
        NF4Tensor(**arguments | changes)
    with pytest.raises(TypeError, match=r"got 2 fields and no names"):
        NF4Tensor(FIELDS["codes"], FIELDS["scales"], shape=(30, 70), dtype=torch.float32)


# ---- copy_: bits between equal formats, else a new quantization ---------------------------------


def test_copy_between_equal_formats_copies_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    source, destination = make(seed=1), make(seed=2)
    monkeypatch.setattr(NF4Tensor, "dequantize", None)
    codes = destination.codes
    assert destination.copy_(source) is destination
    assert_same(destination, source)
    assert destination.codes is codes  # in place


@pytest.mark.parametrize(
    "source",
    [
        *(randn(30, 70).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)),
        make(seed=1, block_size=64),
        make(seed=1, block_size=32, scale_format="none"),
        make(seed=1, block_size=32, scale_block_size=3, dtype=torch.float32),
    ],
    ids=repr,
)
def test_copy_from_anything_else_quantizes_with_the_destinations_options(source: Tensor) -> None:
    options = {"block_size": 32, "scale_block_size": 3}
    destination = make(seed=2, **options)
    plain = source.dequantize() if isinstance(source, NF4Tensor) else source
    destination.copy_(source)
    assert_same(destination, to_nf4(plain.bfloat16(), **options))


def test_copy_into_a_plain_tensor_dequantizes() -> None:
    weight, plain = make(), torch.zeros(30, 70)
    plain.copy_(weight)
    assert torch.equal(plain, weight.dequantize().float())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (make(70, 30), r"shape \[70, 30\] into one of shape \[30, 70\]"),
        (torch.zeros(70, 30), r"shape \[70, 30\] into one of shape \[30, 70\]"),
        (torch.full((30, 70), torch.nan), "NaN or infinite"),
    ],
    ids=["NF4", "plain", "NaN"],
)
def test_copy_refuses_and_changes_nothing(source: Tensor, message: str) -> None:
    destination = make()
    with pytest.raises(ValueError, match=message):
        destination.copy_(source)
    assert_same(destination, make())


# ---- scale_search: less error for the same bits -------------------------------------------------


def error(weight: Tensor, decoded: Tensor) -> float:
    return ((decoded.double() - weight.double()).norm() / weight.double().norm()).item()


@pytest.mark.parametrize("scale_format", ["geometric", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normal_weights_lose_five_percent_of_their_error(
    dtype: torch.dtype, scale_format: str
) -> None:
    weight = randn(512, 512, seed=0, dtype=dtype)
    plain = to_nf4(weight, scale_format=scale_format)
    searched = to_nf4(weight, scale_format=scale_format, scale_search=True)
    assert searched.nbytes == plain.nbytes
    assert error(weight, searched.dequantize()) < 0.95 * error(weight, plain.dequantize())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_changes_no_bit_with_or_without_another_search(dtype: torch.dtype) -> None:
    normal, tiny = randn(40, 100, seed=0), torch.finfo(dtype).tiny
    outlier = normal.clone()
    outlier[3, 3] = 400
    for weight in (normal, outlier, normal * tiny, normal * tiny * 16, torch.zeros(5, 64)):
        first = to_nf4(weight.to(dtype), block_size=32, scale_search=True)
        for search in (True, False):
            second = to_nf4(first.dequantize(), block_size=32, scale_search=search)
            assert all(map(torch.equal, first.fields, second.fields))
            assert torch.equal(second.dequantize(), first.dequantize())


def test_a_module_searches_when_it_loads() -> None:
    weight = randn(64, 128)
    layer = FrozenNF4Linear(128, 64, dtype=torch.float32, scale_search=True)
    layer.load_state_dict({"weight": weight})
    expected = to_nf4(weight, scale_search=True).dequantize()
    assert torch.equal(layer.state_dict()["weight"], expected)
    assert not torch.equal(expected, to_nf4(weight).dequantize())


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
