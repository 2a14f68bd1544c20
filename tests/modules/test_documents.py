"""Attention inside documents equals attention under the dense mask, in value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from qlora_builders.modules.attention import (
    Documents,
    attend_in_documents,
    document_attention,
    find_documents,
    make_block_mask,
)

IDS = torch.tensor(
    [[0] * 5 + [1] * 1 + [2] * 14, [7] * 20, [3] * 10 + [4] * 4 + [3] * 6], dtype=torch.int64
)


def inputs(
    num_heads: int = 4, num_kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(3, 20, heads, 16, generator=generator).to(dtype).transpose(1, 2)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    ]


def with_gradients(attend: object, tensors: list[Tensor]) -> list[Tensor]:
    assert callable(attend)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output = attend(*leaves)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    (output.float() * weights).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = find_documents(IDS).dense_mask()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def test_borders() -> None:
    documents = find_documents(IDS)
    assert documents.borders is not None
    assert documents.borders.tolist() == [
        [0, 0, 5],
        [0, 5, 6],
        [0, 6, 20],
        [1, 0, 20],
        [2, 0, 10],
        [2, 10, 14],
        [2, 14, 20],
    ]


def test_the_dense_mask_is_causal_inside_documents() -> None:
    mask = find_documents(torch.tensor([[1, 1, 2, 1]])).dense_mask()
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert mask[0, 0].int().tolist() == expected


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_dense_mask(num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> None:
    tensors = inputs(num_heads, num_kv_heads, dtype)
    documents = find_documents(IDS)
    got = with_gradients(lambda *t: attend_in_documents(*t, documents), tensors)
    expected = with_gradients(dense, tensors)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_block_mask_of_gpus_allows_the_same_pairs() -> None:
    """FlexAttention runs without a compiler here, which is slow but right."""
    mask = make_block_mask(find_documents(IDS).runs)
    q, k, v = inputs()
    got = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    torch.testing.assert_close(got, dense(q, k, v), rtol=1e-5, atol=1e-5)


def test_without_borders_or_a_block_mask_the_dense_mask_is_asked_for() -> None:
    q, k, v = inputs()
    assert attend_in_documents(q, k, v, Documents(find_documents(IDS).runs)) is None


def test_the_op_is_one_for_compilers() -> None:
    borders = find_documents(IDS).borders
    tensors = [tensor.clone().requires_grad_() for tensor in inputs()]
    torch.library.opcheck(document_attention, (*tensors, borders))
