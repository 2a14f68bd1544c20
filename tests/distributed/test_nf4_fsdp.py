"""NF4 weights under fully_shard: bits, bytes and gradients against the unsharded module."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

from qlora_builders import FrozenNF4Linear, LoRALinear, to_nf4
from qlora_builders.distributed import Ranks, make_mesh
from qlora_builders.names import SCALE_FORMATS
from qlora_builders.tensor import gather
from qlora_builders.tensor.sharded import (
    QuantizedShard,
    held_elements,
    is_quantized_shard,
    shard_quantized,
)

# odd widths begin rows inside a byte; few rows leave ranks without any; scale groups straddle rows
SHAPES = [(7, 33), (3, 1000), (1, 5), (129, 64)]
OPTIONS: list[dict[str, Any]] = [
    *({"scale_format": name, "scale_block_size": 3, "block_size": 32} for name in SCALE_FORMATS),
    {"scale_format": "geometric", "scale_block_size": 256, "block_size": 64},
]


def make_layers(shape: tuple[int, int], nf4: dict[str, Any]) -> nn.Sequential:
    """Quantized, adapted on NF4, adapted on plain: four dtypes in one group."""
    out_features, in_features = shape
    torch.manual_seed(0)
    layers = nn.Sequential(
        FrozenNF4Linear(in_features, out_features, bias=True, dtype=torch.float32, **nf4),
        LoRALinear(
            out_features, in_features, 2, 4, quantize_base=True, dtype=torch.bfloat16, **nf4
        ),
        LoRALinear(in_features, 5, 2, 4, dtype=torch.float16),
    )
    for parameter in layers.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return layers


def assert_same_weight(a: Any, b: Any) -> None:
    assert (a.shape, a.dtype, a.format) == (b.shape, b.dtype, b.format)
    assert all(map(torch.equal, a.fields, b.fields))


def train_sharded(ranks: Ranks) -> None:
    mesh = make_mesh(ranks, "cpu")
    for shape, options in zip(SHAPES, OPTIONS, strict=True):
        layers = make_layers(shape, options)
        whole = copy.deepcopy(layers)
        fully_shard(layers, mesh=mesh)
        for name in "01":
            weight = layers.get_parameter(f"{name}.weight")
            assert is_quantized_shard(weight)
            assert weight.shape == whole.get_parameter(f"{name}.weight").shape
            assert_same_weight(gather(weight), whole.get_parameter(f"{name}.weight"))
        x = torch.randn(4, shape[1])
        for _ in range(2):  # the second time FSDP2 fills the tensors of the first
            output = layers(x)
            assert torch.equal(output, whole(x))
            output.square().sum().backward()
            whole(x).square().sum().backward()
        for ours, theirs in zip(layers.parameters(), whole.parameters(), strict=True):
            assert ours.requires_grad == theirs.requires_grad
            if theirs.requires_grad:
                torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
        norms = [
            nn.utils.clip_grad_norm_([p for p in m.parameters() if p.requires_grad], 1.0)
            for m in (layers, whole)
        ]
        torch.testing.assert_close(norms[0].full_tensor(), norms[1])


@pytest.mark.parametrize("world_size", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_sharded_layer_computes_and_trains_like_the_whole(world_size: int) -> None:
    run_ranks(world_size, train_sharded)


def reassemble(ranks: Ranks) -> None:
    mesh = make_mesh(ranks, "cpu")
    for shape, options in itertools.product(SHAPES, OPTIONS):
        torch.manual_seed(1)
        weight = torch.randn(shape, dtype=torch.bfloat16)
        whole = to_nf4(weight, **options)
        # from meta, with memory for this rank's part alone, as a checkpoint is loaded
        layers = nn.Sequential(FrozenNF4Linear(shape[1], shape[0], device="meta", **options))
        fully_shard(layers, mesh=mesh)
        meta = layers.get_parameter("0.weight")
        layers[0].weight = nn.Parameter(shard_quantized(meta, whole), requires_grad=False)
        assert_same_weight(gather(layers[0].weight), whole)
        if options["scale_format"] != "bnb":  # its offset is the mean over the whole weight
            start, stop = held_elements(meta)
            part = to_nf4(weight.flatten()[start:stop], **whole.nf4_options)
            assert_same_weight(gather(shard_quantized(meta, part)), whole)
        other = to_nf4(weight.half(), block_size=128, scale_block_size=5)
        assert_same_weight(gather(shard_quantized(meta, other)), other)
        assert torch.equal(layers(torch.eye(shape[1])), whole.dequantize(torch.float32).T)
        layers.reshard()
        # a state_dict of shards, into memory that holds something else
        state = {key: value.clone() for key, value in layers.state_dict().items()}
        layers.to_empty(device="cpu").load_state_dict(state)
        assert_same_weight(gather(layers[0].weight), whole)
        assert torch.equal(layers(torch.eye(shape[1])), whole.dequantize(torch.float32).T)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_shards_are_the_bits_of_the_unsharded_weight(world_size: int) -> None:
    run_ranks(world_size, reassemble)


class CountingAllGather:
    """FSDP2's all-gather, with the bytes that every rank puts in."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, async_op: bool) -> Any:
        self.sizes.append(input_tensor.nbytes)
        chunks = list(output_tensor.chunk(group.size()))
        return dist.all_gather(chunks, input_tensor, group=group, async_op=async_op)


def count_bytes(ranks: Ranks) -> list[tuple[int, int, list[int]]]:
    found = []
    mesh = make_mesh(ranks, "cpu")
    for scale_format in SCALE_FORMATS:
        layer = FrozenNF4Linear(512, 1024, scale_format=scale_format)  # 8192 blocks, 32 groups
        whole = layer.weight.nbytes
        fully_shard(layer, mesh=mesh)
        held = layer.weight._local_tensor.nbytes
        counter = CountingAllGather()
        layer.set_custom_all_gather(counter)
        layer(torch.zeros(1, 512))
        found.append((whole, held, counter.sizes))
    return found


def test_a_rank_holds_and_sends_its_share_of_the_4_bit_bytes() -> None:
    for found in run_ranks(4, count_bytes):
        for scale_format, (whole, held, sent) in zip(SCALE_FORMATS, found, strict=True):
            bits = 4 + (32 / 64 if scale_format == "none" else 8 / 64 + 64 / (64 * 256))
            assert whole == 1024 * 512 * bits / 8
            assert held * 4 == whole
            assert sent == [held]


def gather_alone(ranks: Ranks, offloaded: bool) -> tuple[bool, int]:
    """(Whether the whole weight is this rank's own shard, bytes of its codes after it is freed.)"""
    if offloaded:  # FSDP2 takes a copy to its device and asks that
        original = QuantizedShard.fsdp_pre_all_gather
        QuantizedShard.fsdp_pre_all_gather = lambda self, mesh: original(self.clone(), mesh)
    layer, x = FrozenNF4Linear(512, 96), torch.randn(3, 512, requires_grad=True)
    output = layer(x)
    (expected,) = torch.autograd.grad(output.square().sum(), x)
    fully_shard(layer, mesh=make_mesh(ranks, "cpu"))
    for _ in range(2):
        again = layer(x)
        assert torch.equal(again, output)
        assert torch.equal(torch.autograd.grad(again.square().sum(), x)[0], expected)
        layer.unshard()
        codes = layer.weight.codes
        layer.reshard()
    shared = codes.data_ptr() == layer.weight._local_tensor.fields[0].data_ptr()
    return shared, codes.untyped_storage().nbytes()


def test_one_rank_copies_only_what_is_offloaded_and_frees_it() -> None:
    assert run_ranks(1, gather_alone, False) == [(True, 512 * 96 // 2)]
    assert run_ranks(1, gather_alone, True) == [(False, 0)]


def refuse(ranks: Ranks) -> None:
    layer = FrozenNF4Linear(64, 8)
    whole = layer.weight
    fully_shard(layer, mesh=make_mesh(ranks, "cpu"))
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: layer.weight + 1, "gather the whole with qlora_builders.tensor.gather"),
        (
            lambda: shard_quantized(layer.weight, to_nf4(torch.zeros(9))),
            r"QuantizedShard\(.*\) with .* cannot hold NF4Tensor\(shape=\[9\]",
        ),
        (lambda: torch.chunk(whole, 2, dim=1), "sharded along dim 0, not 1"),
        (lambda: layer.to(torch.float32), "keeps its dtype"),
    ]
    for call, message in calls:
        with pytest.raises((ValueError, NotImplementedError), match=message):
            call()


def test_what_a_shard_cannot_do_is_refused() -> None:
    run_ranks(1, refuse)
