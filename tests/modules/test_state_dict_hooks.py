"""The state_dict hooks: plain weights out, quantized on the way in, and no bit changes between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_builders.modules import FrozenNF4Linear, LoRALinear
from qlora_builders.tensor import NF4Tensor, to_nf4
from qlora_builders.tensor.layouts import pack_bnb, pack_native, stored_parts, unpack

IN, OUT = 70, 30
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def frozen(dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.ModuleDict:
    return nn.ModuleDict({"proj": FrozenNF4Linear(IN, OUT, True, dtype=dtype, **options)})


def qlora(dtype: torch.dtype = torch.bfloat16, **options: Any) -> nn.ModuleDict:
    layer = LoRALinear(IN, OUT, 4, 8.0, bias=True, quantize_base=True, dtype=dtype, **options)
    return nn.ModuleDict({"proj": layer})


def plain_frozen(dtype: torch.dtype = torch.bfloat16) -> nn.ModuleDict:
    return nn.ModuleDict({"proj": nn.Linear(IN, OUT, dtype=dtype)})


def plain_lora(dtype: torch.dtype = torch.bfloat16) -> nn.ModuleDict:
    return nn.ModuleDict({"proj": LoRALinear(IN, OUT, 4, 8.0, bias=True, dtype=dtype)})


PAIRS = [(frozen, plain_frozen), (qlora, plain_lora)]
NF4 = [frozen, qlora]
Build = Callable[..., nn.ModuleDict]


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert isinstance(a, NF4Tensor)
    assert isinstance(b, NF4Tensor)
    assert (a.dtype, a.format) == (b.dtype, b.format)
    for name in NF4Tensor.tensor_fields:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def weight(dtype: torch.dtype = torch.bfloat16, seed: int = 3) -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "build_plain"), PAIRS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_and_nf4_builds_load_each_other_strictly(
    build: Build, build_plain: Build, dtype: torch.dtype
) -> None:
    plain, model, back = build_plain(dtype), build(dtype), build_plain(dtype)
    model.load_state_dict(plain.state_dict(), strict=True)
    assert_same_bits(model["proj"].weight, to_nf4(plain["proj"].weight))
    assert torch.equal(model["proj"].bias, plain["proj"].bias)
    state, expected = model.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert type(state[key]) is Tensor
        assert (state[key].shape, state[key].dtype) == (value.shape, value.dtype)
    back.load_state_dict(state, strict=True)
    assert torch.equal(back["proj"].weight, model["proj"].weight.dequantize())


@pytest.mark.parametrize("build", NF4)
def test_looking_at_the_model_never_dequantizes(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = build(), []
    original = NF4Tensor.dequantize

    def counting(self: NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
        calls.append(self.shape)
        return original(self, dtype)

    monkeypatch.setattr(NF4Tensor, "dequantize", counting)
    names = {name for name, _ in model.named_parameters()}
    assert "proj.weight" in names
    assert sum(p.numel() for p in model.parameters()) > IN * OUT
    assert sum(p.nbytes for p in model.parameters()) > 0
    assert repr(model)
    copy.deepcopy(model)
    model.to("cpu").to(torch.float16)
    assert calls == []
    model.state_dict()
    assert calls == [(OUT, IN)]  # so the counter counts


# ---- in -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("build", NF4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"block_size": 32, "scale_block_size": 5}, {"scale_format": "none"}], ids=str
)
def test_three_passes_change_no_bit(
    build: Build, dtype: torch.dtype, options: dict[str, Any], assign: bool
) -> None:
    first = build(dtype, **options)
    first_state = {key: value.clone() for key, value in first.state_dict().items()}
    state = first_state
    for _ in range(3):
        model = build(dtype, **options)
        model.load_state_dict(state, strict=True, assign=assign)
        assert_same_bits(model["proj"].weight, first["proj"].weight)
        state = model.state_dict()
        for key, value in first_state.items():
            assert torch.equal(value.view(torch.uint8), state[key].view(torch.uint8)), key


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_float_dtype_is_quantized_in_the_modules_dtype(
    source: torch.dtype, assign: bool
) -> None:
    model = frozen(torch.bfloat16, block_size=128)
    model.load_state_dict(
        {"proj.weight": weight(source), "proj.bias": torch.zeros(OUT, dtype=torch.bfloat16)},
        assign=assign,
    )
    assert_same_bits(model["proj"].weight, to_nf4(weight(source).bfloat16(), block_size=128))
    assert isinstance(model["proj"].weight, nn.Parameter)
    assert not model["proj"].weight.requires_grad


def test_an_nf4_weight_of_the_same_format_is_taken_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = to_nf4(weight())
    model = frozen()
    monkeypatch.setattr(NF4Tensor, "dequantize", None)
    model.load_state_dict({"proj.weight": source, "proj.bias": torch.zeros(OUT)})
    assert_same_bits(model["proj"].weight, source)


@pytest.mark.parametrize("assign", [False, True])
def test_an_nf4_weight_of_another_format_is_requantized(assign: bool) -> None:
    source = to_nf4(weight(torch.float32), block_size=32)
    model = frozen()
    state = {"proj.weight": source, "proj.bias": torch.zeros(OUT)}
    model.load_state_dict(state, assign=assign)
    assert_same_bits(model["proj"].weight, to_nf4(source.dequantize().bfloat16()))


LAYOUTS = {"native": pack_native, "bitsandbytes": pack_bnb}
STORED = [
    {},
    {"scale_format": "none", "block_size": 128},
    {"scale_format": "bnb"},
    {"scale_format": "bnb", "scale_block_size": 1},
]


def stored_state(model: nn.ModuleDict, pack: Callable) -> dict[str, Tensor]:
    """The state_dict as a file would hold it: codes and scales under names of their own."""
    state = model.state_dict()
    del state["proj.weight"]
    parts = pack(model["proj"].weight)
    return state | {f"proj.weight{suffix}": tensor for suffix, tensor in parts.items()}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", STORED, ids=str)
@pytest.mark.parametrize("build", NF4)
def test_stored_codes_load_strictly(
    build: Build, options: dict[str, Any], layout: str, assign: bool
) -> None:
    source = build(**options)
    state = stored_state(source, LAYOUTS[layout])
    taken = unpack(stored_parts(state, "proj.weight"))
    model = build(**taken.nf4_options)
    before = dict(state)
    model.load_state_dict(state, strict=True, assign=assign)
    assert state.keys() == before.keys()
    assert_same_bits(model["proj"].weight, taken)
    dequantized = source["proj"].weight.dequantize()
    assert torch.equal(model["proj"].weight.dequantize(), dequantized)
    default = build()
    default.load_state_dict(state, strict=True, assign=assign)
    same_format = taken.format == default["proj"].weight.format
    assert_same_bits(default["proj"].weight, taken if same_format else to_nf4(dequantized))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stored_codes_load_from_meta(layout: str) -> None:
    source = frozen(scale_format="bnb")
    with torch.device("meta"):
        model = frozen(scale_format="bnb")
    model.load_state_dict(stored_state(source, LAYOUTS[layout]), strict=True, assign=True)
    assert_same_bits(model["proj"].weight, source["proj"].weight)


def test_damaged_stored_codes_are_named() -> None:
    state = stored_state(frozen(), pack_native)
    state["proj.weight.scales"][0] += 1
    with pytest.raises(RuntimeError, match=r"proj\.weight: the checksum does not fit"):
        frozen().load_state_dict(state)
    state = stored_state(frozen(scale_format="bnb"), pack_bnb)
    del state["proj.weight.absmax"]
    with pytest.raises(RuntimeError, match=r"proj\.weight: parts missing: \['\.absmax'\]"):
        frozen().load_state_dict(state)


@pytest.mark.parametrize("build", NF4)
def test_from_meta(build: Build) -> None:
    source = build().state_dict()
    expected = build()
    expected.load_state_dict(source)
    with torch.device("meta"):
        meta = build()
    assert all(p.is_meta for p in meta.parameters())
    for loaded in (copy.deepcopy(meta).to_empty(device="cpu"), meta):
        loaded.load_state_dict(source, strict=True, assign=loaded is meta)
        assert all(p.device.type == "cpu" for p in loaded.parameters())
        assert_same_bits(loaded["proj"].weight, expected["proj"].weight)


def test_a_copy_of_a_module_loads_into_itself() -> None:
    original = frozen()
    before = original["proj"].weight.clone()
    duplicate = copy.deepcopy(original)
    state = {"proj.weight": weight(), "proj.bias": torch.ones(OUT)}
    duplicate.load_state_dict(state)
    assert_same_bits(duplicate["proj"].weight, to_nf4(weight()))
    assert_same_bits(original["proj"].weight, before)


def test_the_callers_dict_is_not_changed() -> None:
    state = {"proj.weight": weight(), "proj.bias": torch.ones(OUT)}
    tensors = dict(state)
    frozen().load_state_dict(state)
    assert list(state) == list(tensors)
    assert all(state[key] is tensors[key] for key in state)


def test_a_weight_replaced_by_a_plain_one_loads_and_saves_plainly() -> None:
    model = frozen()
    model["proj"].weight = nn.Parameter(torch.zeros(OUT, IN), requires_grad=False)
    state = {"proj.weight": weight(torch.float32), "proj.bias": torch.ones(OUT)}
    model.load_state_dict(state)
    assert torch.equal(model.state_dict()["proj.weight"], state["proj.weight"])


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("build", NF4)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proj.weight": None}, r'Missing key\(s\) in state_dict: "proj\.weight"'),
        ({"proj.bias": None}, r'Missing key\(s\) in state_dict: "proj\.bias"'),
        ({"proj.wieght": weight()}, r'Unexpected key\(s\) in state_dict: "proj\.wieght"'),
        (
            {"proj.weight": torch.zeros(IN, OUT)},
            r"size mismatch for proj\.weight: .*\[70, 30\].*\[30, 70\]",
        ),
        (
            {"proj.weight": torch.full((OUT, IN), torch.nan)},
            r"proj\.weight: the weight has NaN or infinite elements; repair the checkpoint",
        ),
        (
            {"proj.weight": torch.zeros(OUT, IN, dtype=torch.int8)},
            r"proj\.weight: has dtype torch\.int8; a floating-point weight is needed",
        ),
    ],
)
def test_errors_name_the_key(
    build: Build, change: dict[str, Tensor | None], message: str, assign: bool
) -> None:
    state: dict[str, Any] = {**build().state_dict(), **change}
    state = {key: value for key, value in state.items() if value is not None}
    model = build()
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state, strict=True, assign=assign)
