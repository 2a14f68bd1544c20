"""NF4 weights under FSDP2 (`torch.distributed.fsdp.fully_shard`): sharded and gathered in 4 bits.

FSDP2 cuts a parameter [out, in] into rows. Rows of an NF4 weight may begin inside a block, inside a
group of scales or, where `in` is odd, inside a byte. So a shard is *accounted for* as rows, which
is what FSDP2 and DTensor need to know, but *holds* an even share of whole scale groups:

    weight [5, 30000] on 2 ranks; a group is 256 blocks of 64 elements, which makes 10 groups

    rows           0      |      1      |      2      |      3      |      4
    FSDP2      ---------------- rank 0 ---------------|--------- rank 1 ----------
    groups      0  |  1   |  2   |  3   |  4   |  5   |  6   |  7   |  8   |  9 ..   cut short
    held       ------------- rank 0 -----------|------------- rank 1 -------------

Whole groups are an NF4 quantization of their own, so a rank can quantize the elements that it will
hold and get the very bits of the unsharded weight. All ranks hold equally many groups, the last
ones filled up with zeros, so gathering is one concatenation per field: of any shape, on any number
of ranks. Nothing computes with a shard; what is gathered is an `NF4Tensor` again.

Fields of a shard: g groups of u = scale_block_size blocks of b = block_size elements.
    codes        uint8   [g u b / 2]
    scales       uint8   [g u]        (float32 for `none`, which has no groups: u = 1)
    scale_groups float32 [g, 2]       (`none`: [0, 2])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlora_builders.kernels import field_shapes
from qlora_builders.tensor.nf4_tensor import DISPATCH_TABLE, NF4Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

aten = torch.ops.aten


class NF4Shard(Tensor):
    """What one rank holds of an NF4 weight: the local tensor of a DTensor. FSDP2 makes it.

    Attributes:
        weight_shape: of the whole weight; `shape` is that of the rows which FSDP2 accounts for.
        nf4_options: of the whole weight.
    """

    tensor_fields = NF4Tensor.tensor_fields

    codes: Tensor
    scales: Tensor
    scale_groups: Tensor
    weight_shape: torch.Size
    nf4_options: dict[str, Any]

    @staticmethod
    def __new__(
        cls,
        *fields: Tensor,
        shape: Sequence[int],
        dtype: torch.dtype,
        weight_shape: torch.Size,
        nf4_options: dict[str, Any],
    ) -> NF4Shard:
        shard = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=fields[0].device, requires_grad=False
        )
        for name, field in zip(cls.tensor_fields, fields, strict=True):
            setattr(shard, name, field)
        shard.weight_shape = weight_shape
        shard.nf4_options = nf4_options
        return shard

    @property
    def fields(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.tensor_fields]

    @property
    def num_groups(self) -> int:
        return self.scales.numel() // _blocks_per_group(self.nf4_options)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes in memory: codes and scales."""
        return sum(field.nbytes for field in self.fields)

    def with_shape(self, shape: Sequence[int]) -> NF4Shard:
        """The same data, accounted for as another number of rows."""
        return self.map_fields(lambda field: field, shape=shape)

    def map_fields(
        self, fn: Callable[[Tensor], Tensor], *, shape: Sequence[int] | None = None
    ) -> NF4Shard:
        return NF4Shard(
            *map(fn, self.fields),
            shape=self.shape if shape is None else shape,
            dtype=self.dtype,
            weight_shape=self.weight_shape,
            nf4_options=self.nf4_options,
        )

    @torch.no_grad()
    def take_groups_(self, weight: NF4Tensor, first: int) -> None:
        """Take over `weight`'s groups from `first` on; zeros where it has no more."""
        for name, field in zip(self.tensor_fields, self.fields, strict=True):
            per_group = field.shape[0] // self.num_groups
            source = getattr(weight, name)[first * per_group :][: field.shape[0]]
            field[: source.shape[0]].copy_(source)
            field[source.shape[0] :].zero_()

    # One argument: with the five that FSDP2 also knows it insists, where rows are uneven, on inputs
    # that have the shape of the padded rows (torch 2.11 to 2.13), which no 4-bit storage has.
    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], NF4Shard | None]:
        """What to gather. A rank that holds everything gathers nothing but has to name a tensor."""
        if mesh.size() == 1:
            return (self.codes[:1],), self
        return tuple(field for field in self.fields if field.numel()), None

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: Sequence[Tensor],
        complete: NF4Shard | None,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[NF4Tensor, tuple[Tensor, ...]] | None:
        """The whole weight as views of what was gathered; nothing is copied or decoded.

        `complete` is a copy where the shard is offloaded: its memory, which FSDP2 is told of, frees
        and allocates again, is then filled again.
        """
        if out is None:
            gathered = all_gather_outputs if complete is None else complete.fields
            copied = complete is not None and complete is not self
            return self.whole(gathered), tuple(gathered) if copied else ()
        if complete is None:
            return None  # its fields are views of what FSDP2 has filled again
        for name, field in zip(self.tensor_fields, self.trimmed(complete.fields), strict=True):
            if complete is self:
                setattr(out, name, field)
            else:
                filled = getattr(out, name)
                with torch.autograd._unsafe_preserve_version_counter(filled):
                    filled.copy_(field)
        return None

    def whole(self, gathered: Sequence[Tensor]) -> NF4Tensor:
        """The weight whose fields, concatenated over all ranks, are `gathered`."""
        fields = self.trimmed(gathered)
        return NF4Tensor(*fields, shape=self.weight_shape, dtype=self.dtype, **self.nf4_options)

    def trimmed(self, gathered: Sequence[Tensor]) -> list[Tensor]:
        """Without the padding; `scale_groups`, which is not gathered where it is empty, added."""
        shapes = field_shapes(self.weight_shape.numel(), **_format(self.nf4_options))
        empty = torch.empty(0, 2, device=gathered[0].device)
        fields = [*gathered, empty][: len(shapes)]
        return [field[: shape[0]] for field, shape in zip(fields, shapes, strict=True)]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        implementation = _SHARD_OPS.get(func)
        if implementation is None:
            raise NotImplementedError(
                f"{func} is not defined on one rank's part of an NF4 weight; "
                "gather the whole with qlora_builders.tensor.gather_nf4(parameter)"
            )
        return implementation(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"NF4Shard(shape={list(self.shape)} of {list(self.weight_shape)}, dtype={self.dtype}, "
            f"device={self.device}, {self.num_groups} groups)"
        )


def is_nf4_shard(parameter: Tensor) -> bool:
    """Whether a parameter is a DTensor whose whole is an NF4 weight."""
    return isinstance(getattr(parameter, "_local_tensor", None), NF4Shard)


def held_elements(parameter: DTensor) -> tuple[int, int]:
    """(start, stop): which elements of the flattened weight this rank holds."""
    shard = _local(parameter)
    per_group = _blocks_per_group(shard.nf4_options) * shard.nf4_options["block_size"]
    start = _shard_rank(parameter) * shard.num_groups * per_group
    numel = shard.weight_shape.numel()
    return min(start, numel), min(start + shard.num_groups * per_group, numel)


def shard_nbytes(weight: NF4Tensor, num_ranks: int) -> int:
    """Bytes that each of `num_ranks` ranks holds of a weight, padding included."""
    rows = -(-weight.shape[0] // num_ranks)
    on_meta = weight.map_fields(lambda field: field.to("meta"))
    return _zero_shard(on_meta, rows, weight.shape, weight.shape).nbytes


def shard_nf4(parameter: DTensor, weight: NF4Tensor) -> DTensor:
    """What takes the place of `parameter`: this rank's share of `weight`, bit for bit.

    Args:
        parameter: a sharded NF4 weight, on meta for instance.
        weight: the whole weight, in any format and on any device; or the quantization of this
            rank's `held_elements` alone, in the format of `parameter`.

    Raises:
        ValueError: if `weight` is neither.
    """
    old = _local(parameter)
    start, stop = held_elements(parameter)
    whole = weight.shape == old.weight_shape
    if not whole and (weight.numel() != stop - start or weight.nf4_options != old.nf4_options):
        raise ValueError(f"{old} with {old.nf4_options} cannot hold {weight}")
    num_ranks = parameter.device_mesh.size(_shard_axis(parameter))
    rows = -(-old.weight_shape[0] // num_ranks)
    shard = _zero_shard(weight, rows, old.shape, old.weight_shape)
    shard.take_groups_(weight, _shard_rank(parameter) * shard.num_groups if whole else 0)
    return with_local(parameter, shard)


def with_local(parameter: DTensor, local: Tensor) -> DTensor:
    """A DTensor that is sharded as `parameter` is, of what this rank holds.

    `from_local` would move it to the mesh's device, from where it may be offloaded.
    """
    spec = parameter._spec
    assert spec.tensor_meta is not None
    meta = spec.tensor_meta._replace(dtype=local.dtype)
    return type(parameter)(local, replace(spec, tensor_meta=meta), requires_grad=False)


def gather_nf4(parameter: DTensor) -> NF4Tensor:
    """The whole weight on every rank, gathered in 4 bits. All ranks must call it."""
    shard, axis = _local(parameter), _shard_axis(parameter)
    num_ranks = parameter.device_mesh.size(axis)
    group = parameter.device_mesh.get_group(axis)
    return shard.whole([_gather(field, num_ranks, group) for field in shard.fields])


def _gather(field: Tensor, num_ranks: int, group: Any) -> Tensor:
    gathered = field.new_empty(num_ranks * field.shape[0], *field.shape[1:])
    torch.distributed.all_gather(list(gathered.chunk(num_ranks)), field, group=group)
    return gathered


def _local(parameter: DTensor) -> NF4Shard:
    shard = parameter._local_tensor
    assert isinstance(shard, NF4Shard)
    return shard


def _shard_axis(parameter: DTensor) -> int:
    """The axis of the mesh that shards; others replicate."""
    return next(i for i, placement in enumerate(parameter.placements) if placement.is_shard())


def _shard_rank(parameter: DTensor) -> int:
    return parameter.device_mesh.get_local_rank(_shard_axis(parameter))


def _format(nf4_options: dict[str, Any]) -> dict[str, Any]:
    return {name: nf4_options[name] for name in NF4Tensor.format_fields}


def _blocks_per_group(nf4_options: dict[str, Any]) -> int:
    return 1 if nf4_options["scale_format"] == "none" else nf4_options["scale_block_size"]


# ---- what FSDP2 does to a weight: chunk it, and copy a chunk into padded memory -----------------


def _zero_shard(
    weight: NF4Tensor, rows: int, shape: Sequence[int], weight_shape: torch.Size
) -> NF4Shard:
    """A shard of `shape`, filled with zeros.

    Args:
        weight: gives format, dtype and device.
        rows: of the chunks that FSDP2 cuts the whole weight into.
    """
    num_shards = -(-weight_shape[0] // rows)
    blocks = _blocks_per_group(weight.nf4_options)
    num_groups = -(-weight_shape.numel() // (weight.block_size * blocks * num_shards))
    per_group = (blocks * weight.block_size // 2, blocks, int(weight.scale_format != "none"))
    fields = [
        field.new_zeros(num_groups * count, *field.shape[1:])
        for field, count in zip(
            (weight.codes, weight.scales, weight.scale_groups), per_group, strict=True
        )
    ]
    return NF4Shard(
        *fields,
        shape=shape,
        dtype=weight.dtype,
        weight_shape=weight_shape,
        nf4_options=weight.nf4_options,
    )


def _split(func: Any, args: tuple, kwargs: dict) -> list[NF4Shard]:
    weight, rows, dim = (*args, *kwargs.values(), 0)[:3]
    if dim != 0:
        raise NotImplementedError(f"an NF4 weight is sharded along dim 0, not {dim}")
    shards = []
    for index, start in enumerate(range(0, weight.shape[0], rows)):
        length = min(rows, weight.shape[0] - start)
        shard = _zero_shard(weight, rows, (length, *weight.shape[1:]), weight.shape)
        shard.take_groups_(weight, index * shard.num_groups)
        shards.append(shard)
    return shards


def _as_strided(func: Any, args: tuple, kwargs: dict) -> NF4Tensor:
    weight, size, stride = args[:3]
    if tuple(size) != tuple(weight.shape) or tuple(stride) != weight.stride():
        raise NotImplementedError("an NF4 weight has one view only: its own shape")
    return weight.map_fields(lambda field: field)


DISPATCH_TABLE[aten.split.Tensor] = _split
DISPATCH_TABLE[aten.as_strided.default] = _as_strided
DISPATCH_TABLE[aten.new_zeros.default] = lambda func, args, kwargs: _zero_shard(
    args[0], args[1][0], args[1], args[0].shape
)


# ---- what FSDP2 and DTensor do to a shard -------------------------------------------------------


def _fieldwise(func: Any, args: tuple, kwargs: dict) -> NF4Shard:
    kwargs.pop("memory_format", None)
    if kwargs.pop("dtype", args[0].dtype) not in (None, args[0].dtype):
        raise NotImplementedError("a shard of an NF4 weight keeps its dtype; gather it first")
    return args[0].map_fields(lambda field: func(field, *args[1:], **kwargs))


def _narrow(func: Any, args: tuple, kwargs: dict) -> NF4Shard:
    shard, dim, start, stop = args[:4]
    if dim != 0 or start != 0:
        raise NotImplementedError("only leading rows of a shard of an NF4 weight can be named")
    rows = min(stop, shard.shape[0])
    return shard.with_shape((rows, *shard.shape[1:]))


def _view(func: Any, args: tuple, kwargs: dict) -> NF4Shard:
    return args[0].with_shape(torch.empty(args[0].shape, device="meta").view(args[1]).shape)


def _copy_(func: Any, args: tuple, kwargs: dict) -> NF4Shard:
    destination, source = args[:2]
    if not isinstance(source, NF4Shard) or not isinstance(destination, NF4Shard):
        raise NotImplementedError("only a shard can be copied into a shard of an NF4 weight")
    for target, field in zip(destination.fields, source.fields, strict=True):
        func(target, field, *args[2:], **kwargs)
    return destination


_SHARD_OPS: dict[Any, Callable[[Any, tuple, dict], Any]] = {
    **dict.fromkeys(
        (
            aten.detach.default,
            aten.alias.default,
            aten.clone.default,
            aten.empty_like.default,
            aten._to_copy.default,
            aten._pin_memory.default,
        ),
        _fieldwise,
    ),
    aten.is_pinned.default: lambda func, args, kwargs: all(map(func, args[0].fields)),
    aten.new_empty.default: lambda func, args, kwargs: args[0].codes.new_empty(args[1]),
    aten.new_zeros.default: lambda func, args, kwargs: args[0].map_fields(
        torch.zeros_like, shape=args[1]
    ),
    aten.slice.Tensor: _narrow,
    aten.view.default: _view,
    aten.copy_.default: _copy_,
}
