"""What can be computed with an NF4Tensor: linear layers and products; everything else raises."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nf4_tensors import DTYPES, make, randn
from torch import Tensor, nn

from qlora_builders.kernels import NF4
from qlora_builders.tensor import linear_nf4, to_nf4

OUT, IN = 30, 70
make32 = partial(make, dtype=torch.float32)


# ---- F.linear -----------------------------------------------------------------------------------


LINEAR: dict[str, Callable[..., Tensor]] = {
    "positional": lambda x, w, b: F.linear(x, w, b),
    "bias by keyword": lambda x, w, b: F.linear(x, w, bias=b),
    "all by keyword": lambda x, w, b: F.linear(input=x, weight=w, bias=b),
    "linear_nf4": lambda x, w, b: linear_nf4(x, w, b),
}


def results(call: Callable[..., Tensor], weight: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    """The output of a layer, and the gradients of its input and bias, if it has one."""
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    output = call(leaves[0], weight, *leaves[1:])
    output.backward(randn(*output.shape, dtype=output.dtype, seed=3))
    grads = [leaf.grad for leaf in leaves if leaf is not None]
    assert None not in grads
    return [output.detach(), *grads]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("bias", [randn(OUT, seed=2), None], ids=["bias", "no bias"])
@pytest.mark.parametrize("spelling", LINEAR)
def test_linear_adds_the_bias_however_it_is_passed(spelling: str, bias: Tensor | None) -> None:
    x, weight = randn(4, IN), make32()
    assert torch.equal(LINEAR[spelling](x, weight, bias), F.linear(x, weight.dequantize(), bias))


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("input_dtype", [*DTYPES, torch.float64])
def test_linear_computes_in_the_inputs_dtype(
    input_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    x, weight = randn(4, IN, dtype=input_dtype), make(dtype=weight_dtype)
    bias = randn(OUT, dtype=weight_dtype, seed=2)
    expected = F.linear(x, weight.dequantize(input_dtype), bias.to(input_dtype))
    assert_equal([linear_nf4(x, weight, bias)], [expected])


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN), (2, 3, 4, IN), (0, IN), (1, 1, IN)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_equal_the_dense_layers_bit_for_bit(
    shape: tuple[int, ...], with_bias: bool
) -> None:
    weight, inputs = make32(), (randn(*shape), randn(OUT, seed=2) if with_bias else None)
    expected = results(F.linear, weight.dequantize(), *inputs)
    assert_equal(results(linear_nf4, weight, *inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_equal_the_dense_layers(dtype: torch.dtype) -> None:
    weight, x = make(), randn(5, IN, dtype=dtype)
    assert_equal(results(linear_nf4, weight, x), results(F.linear, weight.dequantize(dtype), x))


@pytest.mark.parametrize("spelling", ["positional", "linear_nf4"])
def test_autocast_equals_the_dense_layer_under_autocast(spelling: str) -> None:
    weight, inputs = make32(), (randn(5, IN), randn(OUT, seed=2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(LINEAR[spelling], weight, *inputs)
        assert_equal(got, results(F.linear, weight.dequantize(), *inputs))
    assert [tensor.dtype for tensor in got] == [torch.bfloat16, torch.float32, torch.float32]


def test_gradcheck_first_and_second_order() -> None:
    weight = make32(3, 4)
    x = randn(2, 4, dtype=torch.float64).requires_grad_()
    bias = randn(3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: linear_nf4(x, weight, b), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, b: linear_nf4(x, weight, b), (x, bias))


@pytest.mark.parametrize("call", [linear_nf4, F.linear])
def test_only_the_four_bit_weight_is_kept_for_backward(call: Callable[..., Tensor]) -> None:
    weight, saved = make(), []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = randn(6, IN, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call(x, weight, randn(OUT, dtype=torch.bfloat16).requires_grad_())
    assert [tensor.data_ptr() for tensor in saved] == [f.data_ptr() for f in weight.fields]
    output.sum().backward()


def test_no_dequantization_in_backward_when_only_the_bias_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bias = torch.zeros(OUT, requires_grad=True)
    output = linear_nf4(randn(4, IN), make32(), bias)
    monkeypatch.setattr(NF4, "_matmul_op", None)
    output.sum().backward()
    assert torch.equal(bias.grad, torch.full((OUT,), 4.0))


def test_wrong_inputs_are_errors() -> None:
    with pytest.raises(ValueError, match=r"got input \[4, 71\] and weight \[30, 70\]"):
        linear_nf4(randn(4, IN + 1), make32())
    with pytest.raises(
        NotImplementedError, match="a quantized tensor as its weight, not as input or bias"
    ):
        F.linear(make32(), randn(4, IN))
    with pytest.raises(NotImplementedError, match="not as input or bias"):
        F.linear(randn(4, IN), randn(OUT, IN), bias=make32(OUT))


def test_nn_linear_takes_an_nf4_weight() -> None:
    layer = nn.Linear(IN, OUT)
    weight = to_nf4(layer.weight)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    x = randn(4, IN)
    assert torch.equal(layer(x), F.linear(x, weight.dequantize(), layer.bias))


# ---- products -----------------------------------------------------------------------------------


PRODUCTS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "x @ w.t()": lambda w, rows, columns: randn(4, columns) @ w.t(),
    "x @ w.T": lambda w, rows, columns: randn(4, columns) @ w.T,
    "x @ w.mT": lambda w, rows, columns: randn(4, columns) @ w.mT,
    "x @ w": lambda w, rows, columns: randn(4, rows) @ w,
    "x @ w, 3-D": lambda w, rows, columns: randn(2, 4, rows) @ w,
    "w @ x": lambda w, rows, columns: w @ randn(columns, 4),
    "mm(x, w)": lambda w, rows, columns: torch.mm(randn(4, rows), w),
    "mm(x, w.t())": lambda w, rows, columns: torch.mm(randn(4, columns), w.t()),
    "mm(w, x)": lambda w, rows, columns: torch.mm(w, randn(columns, 4)),
    "addmm": lambda w, rows, columns: torch.addmm(randn(columns), randn(4, rows), w),
    "matmul": lambda w, rows, columns: torch.matmul(randn(4, rows), w),
    "t": lambda w, rows, columns: w.t(),
    "transpose": lambda w, rows, columns: w.transpose(0, 1),
    "permute": lambda w, rows, columns: w.permute(1, 0),
}


@pytest.mark.parametrize("shape", [(OUT, IN), (64, 64)])  # a square one might be transposed
@pytest.mark.parametrize("spelling", PRODUCTS)
def test_products_equal_those_of_the_dequantized_weight(
    spelling: str, shape: tuple[int, int]
) -> None:
    weight = make32(*shape)
    result = PRODUCTS[spelling](weight, *shape)
    assert type(result) is Tensor
    assert torch.equal(result, PRODUCTS[spelling](weight.dequantize(), *shape))


def test_matmul_gives_the_right_input_gradient() -> None:
    weight, x = make32(), randn(4, OUT).requires_grad_()
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
        call(make32())
    assert "use weight.dequantize() to get a plain tensor first" in str(raised.value)


# ---- torch.compile ------------------------------------------------------------------------------

# torch 2.13 warns about its own code while it compiles
torch_warns = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"
    ),
]


@pytest.mark.parametrize(
    ("call", "backend"),
    [  # forward and backward through AOTAutograd, with and without C++ at the end
        pytest.param(linear_nf4, "aot_eager", marks=torch_warns),
        pytest.param(F.linear, "aot_eager", marks=torch_warns),
        pytest.param(linear_nf4, "inductor", marks=[*torch_warns, pytest.mark.slow]),
    ],
)
def test_the_compiled_graph_equals_eager(call: Callable[..., Tensor], backend: str) -> None:
    def fn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.tanh(call(x * 2, weight, bias))

    torch.compiler.reset()
    compiled = torch.compile(fn, fullgraph=True, backend=backend)
    arguments = make(), randn(5, IN), randn(OUT, seed=2)
    got, expected = results(compiled, *arguments), results(fn, *arguments)
    if backend == "aot_eager":
        assert_equal(got, expected)
    torch.testing.assert_close(got, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_to_nf4_and_dequantize_compile() -> None:
    weight = randn(OUT, IN)
    torch.compiler.reset()
    compiled = torch.compile(lambda w: to_nf4(w).dequantize() * 2, fullgraph=True)
    assert torch.equal(compiled(weight), to_nf4(weight).dequantize() * 2)
