"""The decoder: caches, documents and activation checkpointing change no result."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from tiny_decoder import VOCAB, build, ids
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_builders.models import llama
from qlora_builders.modules import (
    CausalLM,
    KVCache,
)
from qlora_builders.names import CHECKPOINTING_MODES

QLORA = [{"match": "layers.**", "kind": "qlora", "rank": 4, "alpha": 8}]


def cache_for(model: CausalLM, batch: int, max_seq_len: int = 16) -> KVCache:
    arch = model.spec.arch
    return KVCache(
        num_layers=arch.num_layers,
        batch_size=batch,
        num_kv_heads=arch.num_kv_heads,
        max_seq_len=max_seq_len,
        head_dim=arch.head_dim,
    )


class NoteResults(TorchDispatchMode):
    """Weak references to every tensor that an operation returns."""

    def __init__(self, results: list[weakref.ref[Tensor]]) -> None:
        super().__init__()
        self.results = results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = output if isinstance(output, (tuple, list)) else [output]
        self.results += [weakref.ref(t) for t in tensors if isinstance(t, Tensor)]
        return output


# ---- attention and feed-forward -----------------------------------------------------------------


def test_attention_dropout_acts_in_training_only() -> None:
    model = build(attention_dropout=0.5)
    x = ids()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


# ---- KV cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("components", [(), QLORA], ids=["plain", "qlora"])
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 7], [5, 1, 1, 3, 2], [1, 11]], ids=str)
@torch.no_grad()
def test_with_a_cache_the_logits_are_the_same(pieces: list[int], components: Any) -> None:
    model, x = build(components), ids()
    cache = cache_for(model, batch=2)
    outputs, start = [], 0
    for size in pieces:
        outputs.append(model(x[:, start : start + size], cache=cache))
        start += size
        assert cache.length == start
    torch.testing.assert_close(torch.cat(outputs, dim=1), model(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_full_cache_is_an_error() -> None:
    model = build()
    cache = cache_for(model, batch=2, max_seq_len=6)
    model(ids(seq=5), cache=cache)
    with pytest.raises(ValueError, match="holds 6 positions, but 7 are needed; make it larger"):
        model(ids(seq=2), cache=cache)
    assert cache.length == 5


def test_documents_and_a_cache_exclude_each_other() -> None:
    model = build()
    with pytest.raises(ValueError, match="document_ids cannot be combined with a KV cache"):
        model(ids(), document_ids=torch.zeros(2, 12, dtype=torch.long), cache=cache_for(model, 2))


@pytest.mark.parametrize("inputs", [ids()[0], ids().float(), ids()[None]])
def test_inputs_of_another_kind(inputs: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"input_ids are torch\..*; integers of shape \[batch, seq"
    ):
        build()(inputs)


@pytest.mark.parametrize("method", ["loss", "log_probs"])
def test_labels_of_another_shape(method: str) -> None:
    """Some of these would be broadcast."""
    model, x = build(), ids()
    for labels in (x[:, :3], x[:1], x[:, :-1], x[0]):
        with pytest.raises(
            ValueError, match=r"labels are of shape \[.*\] and input_ids of \[2, 12\]"
        ):
            getattr(model, method)(x, labels)
    with pytest.raises(ValueError, match="document_ids are of shape"):
        model(x, document_ids=x[:1])
    with pytest.raises(ValueError, match="position_ids are of shape"):
        model(x, position_ids=x[:, :5])
    assert model(x, position_ids=torch.arange(12)[None]).shape == (2, 12, VOCAB)


# ---- documents ----------------------------------------------------------------------------------


def test_each_document_is_as_if_it_were_alone() -> None:
    model, x = build(), ids()
    document_ids = torch.tensor([[0] * 5 + [1] * 7, [4] * 1 + [9] * 3 + [4] * 8])
    packed = model(x, document_ids=document_ids)
    for row, spans in enumerate([[(0, 5), (5, 12)], [(0, 1), (1, 4)]]):
        for start, end in spans:
            alone = model(x[row : row + 1, start:end])
            torch.testing.assert_close(packed[row : row + 1, start:end], alone)
    # without document_ids the second document would see the first
    assert not torch.isclose(packed[0, 5:], model(x)[0, 5:]).all(dim=-1).any()


def test_positions_restart_with_every_document() -> None:
    """Attention sees only distances, so the positions themselves are looked at."""
    model, seen = build(), []
    model.model.rotary.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [5, 3, 3, 3, 5, 5]])
    model(ids(seq=6), document_ids=documents)
    model(ids(seq=3))
    cache = cache_for(model, batch=2)
    model(ids(seq=2), cache=cache)
    model(ids(seq=2), cache=cache)
    assert seen == [[[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 1]], [[0, 1, 2]], [[0, 1]], [[2, 3]]]


def test_position_ids_override_the_default() -> None:
    model, x = build(), ids()
    counted = torch.arange(12)[None]
    assert torch.equal(model(x, position_ids=counted), model(x))
    torch.testing.assert_close(model(x, position_ids=counted + 20), model(x))  # relative
    assert not torch.allclose(model(x, position_ids=counted * 2), model(x), atol=1e-4)


# ---- dtypes and checkpointing -------------------------------------------------------------------


def test_activations_have_the_compute_dtype() -> None:
    arch = build().spec.arch
    model = llama(arch, QLORA, dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert model(ids()).dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert llama(arch, dtype=torch.bfloat16)(ids()).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", CHECKPOINTING_MODES[1:])
@pytest.mark.parametrize("documents", [True, False])
def test_activation_checkpointing_gives_identical_gradients(documents: bool, mode: str) -> None:
    options = [{**QLORA[0], "dropout": 0.3}]
    document_ids = torch.tensor([[0] * 5 + [1] * 7] * 2) if documents else None
    results = []
    for checkpointing in ("none", mode):
        model = build(options).train()
        model.model.activation_checkpointing = checkpointing
        torch.manual_seed(3)
        model(ids(), document_ids=document_ids).square().mean().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert len(results[0]) == 2 * 14
    for name, grad in results[0].items():
        assert grad is not None
        assert grad.any()
        assert torch.equal(grad, results[1][name]), name


def kept_bytes(mode: str, *, seq: int, num_layers: int) -> int:
    """What stays alive between a forward and its backward, parameters left out."""
    model, x = build(QLORA, num_layers=num_layers).train(), ids(seq=seq)
    model.model.activation_checkpointing = mode
    alive: list[weakref.ref[Tensor]] = []
    with NoteResults(alive):
        loss = model.loss(x, x)
    gc.collect()
    assert loss.requires_grad
    storages = [t.untyped_storage() for ref in alive if (t := ref()) is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_each_activation_checkpointing_mode_keeps_less_than_the_one_before() -> None:
    none, selective, full = (
        kept_bytes(mode, seq=40, num_layers=4) for mode in ("none", "selective", "full")
    )
    assert full < selective < none / 3
    attention = 2 * 40 * (32 + 4) * 4  # of a layer: the output and the log-sum-exp of 4 heads
    assert selective - full <= 4 * attention


def test_with_full_checkpointing_a_token_costs_its_layer_inputs() -> None:
    sizes = {
        (seq, layers): kept_bytes("full", seq=seq, num_layers=layers)
        for seq in (16, 32, 48)
        for layers in (2, 5)
    }
    for layers in (2, 5):
        assert sizes[48, layers] - sizes[32, layers] == sizes[32, layers] - sizes[16, layers]
    tokens, layer_input = 2 * 16, 32 * 4
    per_token = {n: (sizes[32, n] - sizes[16, n]) / tokens for n in (2, 5)}
    assert per_token[5] - per_token[2] == 3 * layer_input
    assert per_token[2] - 2 * layer_input < 3 * layer_input  # final norm, loss, cos and sin


def test_offloading_keeps_the_inputs_of_layers_in_host_memory() -> None:
    """On a GPU the copy is pinned; here it is a copy all the same."""
    model = build(QLORA)
    model.model.activation_checkpointing = "offload"
    inputs = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    loss = model(ids()).sum()
    gc.collect()
    assert [ref() for ref in inputs] == [None, None]
    loss.backward()
