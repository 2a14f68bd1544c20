"""Tied heads: the head stays the embedding, however the model is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_decoder import VOCAB, build, ids
from torch import Tensor, nn

from qlora_builders.models import llama
from qlora_builders.modules import CausalLM


def tied(**options: Any) -> CausalLM:
    return build(tie_word_embeddings=True, **options)


def is_tied(model: CausalLM) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_is_the_embedding() -> None:
    model = tied()
    assert is_tied(model)
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert not is_tied(build())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("with_head", [False, True])
def test_a_tied_model_loads_with_or_without_the_head(with_head: bool, assign: bool) -> None:
    state = {key: value + 1 for key, value in tied().state_dict().items()}
    if not with_head:
        del state["lm_head.weight"]
    model = tied()
    model.load_state_dict(state, strict=True, assign=assign)
    assert is_tied(model)
    assert torch.equal(model.lm_head.weight, state["model.embed_tokens.weight"])
    assert ("lm_head.weight" in state) is with_head  # the caller's dict is not changed


def test_a_tied_model_loads_inside_another_module() -> None:
    outer = nn.ModuleDict({"llm": tied()})
    state = outer.state_dict()
    del state["llm.lm_head.weight"]
    outer.load_state_dict(state, strict=True, assign=True)
    assert is_tied(outer["llm"])


@pytest.mark.parametrize(
    "head",
    [torch.zeros(VOCAB, 32), torch.zeros(3, 32), torch.zeros(VOCAB, 32, dtype=torch.bfloat16)],
    ids=["values", "shape", "dtype"],
)
def test_a_head_that_differs_from_its_embedding_is_an_error(head: Tensor) -> None:
    model = tied()
    state = {**model.state_dict(), "lm_head.weight": head}
    with pytest.raises(
        RuntimeError,
        match=r"lm_head\.weight differs from model\.embed_tokens\.weight, but the model ties them",
    ):
        model.load_state_dict(state)


def test_a_missing_embedding_is_reported() -> None:
    state = tied().state_dict()
    del state["model.embed_tokens.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"model\.embed_tokens\.weight"'):
        tied().load_state_dict(state)


def test_an_untied_model_needs_its_head() -> None:
    state = build().state_dict()
    del state["lm_head.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"lm_head\.weight"'):
        build().load_state_dict(state)


def test_tying_survives_meta() -> None:
    arch = tied().spec.arch
    model = llama(arch, device="meta", dtype=torch.float32)
    assert is_tied(model)
    state = tied().state_dict()
    model.load_state_dict(state, assign=True)
    assert is_tied(model)
    torch.testing.assert_close(model(ids()), tied()(ids()))


def test_tie_weights_after_replacing_the_embedding() -> None:
    model = tied()
    model.model.embed_tokens.weight = nn.Parameter(torch.randn(VOCAB, 32))
    assert not is_tied(model)
    model.tie_weights()
    assert is_tied(model)
    untied = build()
    untied.tie_weights()
    assert not is_tied(untied)
