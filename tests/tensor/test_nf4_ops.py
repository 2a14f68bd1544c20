"""What can be computed with an NF4Tensor: linear layers and products; everything else raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_builders.kernels import NF4
from qlora_builders.tensor import NF4Tensor, linear_nf4, to_nf4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUT, IN = 30, 70


def make(dtype: torch.dtype = torch.float32, *shape: int) -> NF4Tensor:
    generator = torch.Generator().manual_seed(0)
    return to_nf4(torch.randn(shape or (OUT, IN), generator=generator).to(dtype))


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- F.linear -----------------------------------------------------------------------------------


LINEAR: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "positional": lambda x, w, b: F.linear(x, w, b),
    "bias by keyword": lambda x, w, b: F.linear(x, w, bias=b),
    "all by keyword": lambda x, w, b: F.linear(input=x, weight=w, bias=b),
    "linear_nf4": lambda x, w, b: linear_nf4(x, w, b),
}


@pytest.mark.parametrize("spelling", LINEAR)
def test_linear_adds_the_bias_however_it_is_passed(spelling: str) -> None:
    x, weight, bias = randn(4, IN), make(), randn(OUT, seed=2)
    assert torch.equal(LINEAR[spelling](x, weight, bias), F.linear(x, weight.dequantize(), bias))


def test_linear_without_bias() -> None:
    x, weight = randn(4, IN), make()
    assert torch.equal(F.linear(x, weight), F.linear(x, weight.dequantize()))
    assert torch.equal(F.linear(x, weight, None), F.linear(x, weight.dequantize()))


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("input_dtype", [*DTYPES, torch.float64])
def test_linear_computes_in_the_inputs_dtype(
    input_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    x, weight = randn(4, IN, dtype=input_dtype), make(weight_dtype)
    bias = randn(OUT, dtype=weight_dtype, seed=2)
    output = linear_nf4(x, weight, bias)
    assert output.dtype == input_dtype
    assert torch.equal(output, F.linear(x, weight.dequantize(input_dtype), bias.to(input_dtype)))


def dense_copy(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN), (2, 3, 4, IN), (0, IN), (1, 1, IN)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_equal_the_dense_layers_bit_for_bit(
    shape: tuple[int, ...], with_bias: bool
) -> None:
    weight = make()
    x, bias = dense_copy(randn(*shape), randn(OUT, seed=2))
    dense_x, dense_bias = dense_copy(x, bias)
    output = linear_nf4(x, weight, bias if with_bias else None)
    expected = F.linear(dense_x, weight.dequantize(), dense_bias if with_bias else None)
    assert torch.equal(output, expected)
    grad = randn(*output.shape, seed=3)
    output.backward(grad)
    expected.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, dense_x.grad)
    if with_bias:
        assert bias.grad is not None
        assert torch.equal(bias.grad, dense_bias.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_equal_the_dense_layers(dtype: torch.dtype) -> None:
    weight = make(torch.bfloat16)
    (x,) = dense_copy(randn(5, IN, dtype=dtype))
    (dense_x,) = dense_copy(x)
    grad = randn(5, OUT, dtype=dtype, seed=3)
    linear_nf4(x, weight).backward(grad)
    F.linear(dense_x, weight.dequantize(dtype)).backward(grad)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, dense_x.grad)


def test_gradcheck_first_and_second_order() -> None:
    weight = make(torch.float32, 3, 4)
    x = randn(2, 4, dtype=torch.float64).requires_grad_()
    bias = randn(3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: linear_nf4(x, weight, b), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, b: linear_nf4(x, weight, b), (x, bias))


@pytest.mark.parametrize("call", [linear_nf4, F.linear])
def test_only_the_four_bit_weight_is_kept_for_backward(call: Callable[..., Tensor]) -> None:
    weight, saved = make(torch.bfloat16), []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = randn(6, IN, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call(x, weight, randn(OUT, dtype=torch.bfloat16).requires_grad_())
    fields = [getattr(weight, name).data_ptr() for name in weight.tensor_fields]
    assert [tensor.data_ptr() for tensor in saved] == fields
    output.sum().backward()


def test_no_dequantization_in_backward_when_only_the_bias_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bias = torch.zeros(OUT, requires_grad=True)
    output = linear_nf4(randn(4, IN), make(), bias)
    monkeypatch.setattr(NF4, "_matmul_op", None)
    output.sum().backward()
    assert torch.equal(bias.grad, torch.full((OUT,), 4.0))


@pytest.mark.parametrize("spelling", ["positional", "linear_nf4"])
def test_autocast_equals_the_dense_layer_under_autocast(spelling: str) -> None:
    weight = make(torch.float32)
    x, bias = dense_copy(randn(5, IN), randn(OUT, seed=2))
    dense_x, dense_bias = dense_copy(x, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = LINEAR[spelling](x, weight, bias)
        expected = F.linear(dense_x, weight.dequantize(), dense_bias)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    grad = randn(5, OUT, dtype=torch.bfloat16, seed=3)
    output.backward(grad)
    expected.backward(grad)
    assert x.grad is not None
    assert (x.grad.dtype, bias.grad.dtype) == (torch.float32, torch.float32)
    assert torch.equal(x.grad, dense_x.grad)
    assert torch.equal(bias.grad, dense_bias.grad)


def test_wrong_input_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"got input \[4, 71\] and weight \[30, 70\]"):
        linear_nf4(randn(4, IN + 1), make())


def test_an_nf4_input_or_bias_is_an_error() -> None:
    with pytest.raises(
        NotImplementedError, match="a quantized tensor as its weight, not as input or bias"
    ):
        F.linear(make(), randn(4, IN))
    with pytest.raises(NotImplementedError, match="not as input or bias"):
        F.linear(randn(4, IN), randn(OUT, IN), bias=make(torch.float32, OUT))


def test_nn_linear_takes_an_nf4_weight() -> None:
    layer = nn.Linear(IN, OUT)
    weight = to_nf4(layer.weight)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    x = randn(4, IN)
    assert torch.equal(layer(x), F.linear(x, weight.dequantize(), layer.bias))


# ---- products -----------------------------------------------------------------------------------


PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "x @ w.t()": lambda w: randn(4, IN) @ w.t(),
    "x @ w.T": lambda w: randn(4, IN) @ w.T,
    "x @ w.mT": lambda w: randn(4, IN) @ w.mT,
    "x @ w": lambda w: randn(4, OUT) @ w,
    "x @ w, 3-D": lambda w: randn(2, 4, OUT) @ w,
    "w @ x": lambda w: w @ randn(IN, 4),
    "mm(x, w)": lambda w: torch.mm(randn(4, OUT), w),
    "mm(x, w.t())": lambda w: torch.mm(randn(4, IN), w.t()),
    "mm(w, x)": lambda w: torch.mm(w, randn(IN, 4)),
    "addmm": lambda w: torch.addmm(randn(IN), randn(4, OUT), w),
    "matmul": lambda w: torch.matmul(randn(4, OUT), w),
    "t": lambda w: w.t(),
    "transpose": lambda w: w.transpose(0, 1),
    "permute": lambda w: w.permute(1, 0),
}


@pytest.mark.parametrize("spelling", PRODUCTS)
def test_products_equal_those_of_the_dequantized_weight(spelling: str) -> None:
    weight = make()
    result, expected = PRODUCTS[spelling](weight), PRODUCTS[spelling](weight.dequantize())
    assert type(result) is Tensor
    assert torch.equal(result, expected)


def test_a_square_weight_is_not_silently_transposed() -> None:
    weight, x = make(torch.float32, 64, 64), randn(4, 64)
    plain = weight.dequantize()
    assert torch.equal(x @ weight, x @ plain)
    assert torch.equal(x @ weight.t(), x @ plain.t())
    assert not torch.equal(x @ weight, x @ weight.t())


def test_matmul_gives_the_right_input_gradient() -> None:
    weight = make()
    (x,) = dense_copy(randn(4, OUT))
    (x @ weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.dequantize().sum(1).expand(4, OUT))


UNDEFINED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "add": (lambda w: w + 1, r"aten\.add\.Tensor .*\(arguments: NF4Tensor, int\)"),
    "mul": (lambda w: randn(OUT, IN) * w, r"aten\.mul\.Tensor .*\(arguments: Tensor, NF4Tensor\)"),
    "index": (lambda w: w[0], r"aten\.select\.int "),
    "view": (lambda w: w.view(IN, OUT), r"aten\.view\.default "),
    "reshape": (lambda w: w.reshape(-1), r"aten\.view\.default "),
    "equal": (lambda w: torch.equal(w, w), r"aten\.equal\.default "),
    "sum": (lambda w: w.sum(), r"aten\.sum\.default "),
    "zero_": (lambda w: w.zero_(), r"aten\.zero_\.default "),
    "normal_": (lambda w: nn.init.normal_(w), r"aten\.normal_\.default "),
    "cat": (lambda w: torch.cat([w, w]), r"aten\.cat\.default "),
}


@pytest.mark.parametrize("name", UNDEFINED)
def test_anything_else_names_the_op_and_what_to_do(name: str) -> None:
    call, message = UNDEFINED[name]
    with pytest.raises(NotImplementedError, match=message) as raised:
        call(make())
    assert "use weight.dequantize() to get a plain tensor first" in str(raised.value)


# ---- torch.compile ------------------------------------------------------------------------------

# torch 2.13 warns about its own code while it compiles
_OWN_WARNINGS = (
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning",
)


def torch_warns(test: Callable[..., None]) -> Callable[..., None]:
    for warning in _OWN_WARNINGS:
        test = pytest.mark.filterwarnings(warning)(test)
    return test


def _layer_gradients(
    fn: Callable[..., Tensor], weight: Tensor, x: Tensor, bias: Tensor
) -> list[Tensor]:
    x, bias = dense_copy(x, bias)
    output = fn(x, weight, bias)
    output.square().sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    return [output.detach(), x.grad, bias.grad]


@torch_warns
@pytest.mark.parametrize("call", [linear_nf4, F.linear])
def test_the_traced_graph_equals_eager(call: Callable[..., Tensor]) -> None:
    """fullgraph=True, forward and backward, through AOTAutograd; no C++ compilation."""

    def fn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.tanh(call(x * 2, weight, bias))

    torch.compiler.reset()
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    arguments = make(torch.bfloat16), randn(5, IN), randn(OUT, seed=2)
    for got, want in zip(
        _layer_gradients(compiled, *arguments), _layer_gradients(fn, *arguments), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.slow
@torch_warns
def test_inductor_equals_eager() -> None:
    def fn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.tanh(linear_nf4(x * 2, weight, bias))

    torch.compiler.reset()
    compiled = torch.compile(fn, fullgraph=True)
    arguments = make(torch.bfloat16), randn(5, IN), randn(OUT, seed=2)
    for got, want in zip(
        _layer_gradients(compiled, *arguments), _layer_gradients(fn, *arguments), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.slow
@torch_warns
def test_to_nf4_and_dequantize_compile() -> None:
    weight = randn(OUT, IN)
    torch.compiler.reset()
    compiled = torch.compile(lambda w: to_nf4(w).dequantize() * 2, fullgraph=True)
    assert torch.equal(compiled(weight), to_nf4(weight).dequantize() * 2)
