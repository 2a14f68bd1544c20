"""Parameters over ranks: a DTensor of FSDP2, its rows on this rank, and the whole of it.

Quantized weights are sharded and gathered as they are stored. FSDP2
(`torch.distributed.fsdp.fully_shard`) cuts a parameter [out, in] into rows. Rows of an NF4 weight
may begin inside a block, inside a group of scales or, where `in` is odd, inside a byte. So a shard
is *accounted for* as rows, which is what FSDP2 and DTensor need to know, but *holds* an even share
of the units of its format (`Format.unit`: of NF4 a whole group of scales, here):

    weight [5, 30000] on 2 ranks; a group is 256 blocks of 64 elements, which makes 10 groups

    rows           0      |      1      |      2      |      3      |      4
    FSDP2      ---------------- rank 0 ---------------|--------- rank 1 ----------
    groups      0  |  1   |  2   |  3   |  4   |  5   |  6   |  7   |  8   |  9 ..   cut short
    held       ------------- rank 0 -----------|------------- rank 1 -------------

Units are quantizations of their own, so a rank can quantize the elements that it will hold and get
the very bits of the unsharded weight. All ranks hold equally many, the last ones filled up with
zeros, so gathering is one concatenation per field: of any shape, on any number of ranks. Nothing
computes with a shard; what is gathered is a quantized tensor again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from qlora_builders.kernels import Format
from qlora_builders.tensor.quantized import DISPATCH_TABLE, QuantizedTensor, quantize

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

aten = torch.ops.aten


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this is a DTensor, without importing the type where nothing is distributed."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds."""
    return getattr(tensor, "_local_tensor", tensor)


def compute_device(model: nn.Module) -> torch.device:
    """Where it computes: parameters that are offloaded, or whole for a while, are elsewhere."""
    parameters = list(model.parameters())
    meshes = [parameter.device_mesh for parameter in parameters if is_sharded(parameter)]
    return torch.device(meshes[0].device_type) if meshes else parameters[0].device


def held_rows(parameter: DTensor) -> tuple[int, int]:
    """(start, stop): the rows of a plain parameter that FSDP2 gives this rank."""
    rows = parameter.shape[0]
    size = -(-rows // parameter.device_mesh.size(_shard_axis(parameter)))  # as torch.chunk cuts
    start = min(_shard_rank(parameter) * size, rows)
    return start, min(start + size, rows)


def held_bytes(parameter: Tensor, num_ranks: int) -> int:
    """Bytes that each of `num_ranks` ranks holds of a whole parameter once FSDP2 has sharded it.

    They are the same on every rank: the last ones are filled up. On meta nothing is allocated.
    """
    rows = -(-parameter.shape[0] // num_ranks)
    if isinstance(parameter, QuantizedTensor):
        return _zero_shard(_on_meta(parameter), rows, parameter.shape, "meta").nbytes
    return rows * parameter.shape[1:].numel() * parameter.dtype.itemsize


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or of a sharded one the whole on every rank; all ranks must call it."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor.detach()
    return gather(sharded) if is_quantized_shard(sharded) else sharded.full_tensor()


@torch.no_grad()
def copy_whole_(parameter: Tensor, whole: Tensor) -> None:
    """`parameter.copy_(whole)`, of which a rank takes what it holds."""
    if not is_sharded(parameter):
        parameter.copy_(whole)
        return
    start, stop = held_rows(parameter)
    local_part(parameter).copy_(whole[start:stop])


# ---- shards of quantized weights ----------------------------------------------------------------


class QuantizedShard(Tensor):
    """What one rank holds of a quantized weight: the local tensor of a DTensor. FSDP2 makes it.

    Attributes:
        fields: this rank's share of each field of the whole.
        like: the whole on meta; `shape` is that of the rows which FSDP2 accounts for.
    """

    fields: tuple[Tensor, ...]
    like: QuantizedTensor

    @staticmethod
    def __new__(
        cls, *fields: Tensor, shape: Sequence[int], like: QuantizedTensor
    ) -> QuantizedShard:
        shard = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=like.dtype, device=fields[0].device, requires_grad=False
        )
        shard.fields, shard.like = fields, like
        return shard

    @property
    def format(self) -> Format:
        format: Format = self.like.format
        return format

    @property
    def num_units(self) -> int:
        return self.fields[0].shape[0] // _rows_of_a_unit(self.like)[0]

    @property
    def unit_elements(self) -> int:
        return math.prod(self.format.unit(self.like.shape))

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes in memory."""
        return sum(field.nbytes for field in self.fields)

    def map_fields(
        self, fn: Callable[[Tensor], Tensor], *, shape: Sequence[int] | None = None
    ) -> QuantizedShard:
        shape = self.shape if shape is None else shape
        return QuantizedShard(*map(fn, self.fields), shape=shape, like=self.like)

    def with_shape(self, shape: Sequence[int]) -> QuantizedShard:
        """The same data, accounted for as another number of rows."""
        return QuantizedShard(*self.fields, shape=shape, like=self.like)

    @torch.no_grad()
    def take_units_(self, weight: QuantizedTensor, first: int) -> None:
        """Take over `weight`'s units from `first` on; zeros where it has no more."""
        sizes = _rows_of_a_unit(self.like)
        for field, whole, size in zip(self.fields, weight.fields, sizes, strict=True):
            source = whole[first * size :][: field.shape[0]]
            field[: source.shape[0]].copy_(source)
            field[source.shape[0] :].zero_()

    # One argument: with the five that FSDP2 also knows it insists, where rows are uneven, on inputs
    # that have the shape of the padded rows (torch 2.11 to 2.13), which no 4-bit storage has.
    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], QuantizedShard | None]:
        """What to gather. A rank that holds everything gathers nothing but has to name a tensor."""
        if mesh.size() == 1:
            return (self.fields[0][:1],), self
        return tuple(field for field in self.fields if field.numel()), None

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: Sequence[Tensor],
        complete: QuantizedShard | None,
        param_dtype: torch.dtype,
        *,
        out: Any = None,
    ) -> tuple[QuantizedTensor, tuple[Tensor, ...]] | None:
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
        for name, field in zip(out.tensor_fields, self.trimmed(complete.fields), strict=True):
            if complete is self:
                setattr(out, name, field)
            else:
                filled = getattr(out, name)
                with torch.autograd._unsafe_preserve_version_counter(filled):
                    filled.copy_(field)
        return None

    def whole(self, gathered: Sequence[Tensor]) -> QuantizedTensor:
        """The weight whose fields, concatenated over all ranks, are `gathered`."""
        return self.like.with_fields(self.trimmed(gathered))

    def trimmed(self, gathered: Sequence[Tensor]) -> list[Tensor]:
        """Without the padding; fields that are empty, which are not gathered, added."""
        every, left = len(gathered) == len(self.fields), iter(gathered)
        shapes = self.format.field_shapes(self.like.shape)
        return [
            next(left)[: shape[0]]
            if every or own.numel()
            else gathered[0].new_empty(shape, dtype=own.dtype)
            for own, shape in zip(self.fields, shapes, strict=True)
        ]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        implementation = _SHARD_OPS.get(func)
        if implementation is None:
            raise NotImplementedError(
                f"{func} is not defined on one rank's part of a quantized weight; "
                "gather the whole with qlora_builders.tensor.gather(parameter)"
            )
        return implementation(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"QuantizedShard({type(self.like).__name__}, shape={list(self.shape)} of "
            f"{list(self.like.shape)}, dtype={self.dtype}, device={self.device}, "
            f"{self.num_units} units)"
        )


def is_quantized_shard(parameter: Tensor) -> bool:
    """Whether a parameter is a DTensor whose whole is quantized."""
    return isinstance(getattr(parameter, "_local_tensor", None), QuantizedShard)


def format_of(parameter: Tensor) -> Format | None:
    """Of a quantized weight, whole or sharded; None for a plain one."""
    held = local_part(parameter)
    return held.format if isinstance(held, QuantizedTensor | QuantizedShard) else None


def held_elements(parameter: DTensor) -> tuple[int, int]:
    """(start, stop): which elements of the flattened weight this rank holds."""
    shard = _local(parameter)
    size = shard.num_units * shard.unit_elements
    start = _shard_rank(parameter) * size
    numel = shard.like.numel()
    return min(start, numel), min(start + size, numel)


def quantize_held(parameter: DTensor, elements: Tensor) -> QuantizedTensor:
    """This rank's `held_elements`, flat, as `shard_quantized` takes them."""
    shard = _local(parameter)
    part = elements.view(-1, *shard.format.unit(shard.like.shape)[1:])
    return quantize(part.to(parameter.dtype), shard.format)


def shard_quantized(parameter: DTensor, weight: QuantizedTensor) -> DTensor:
    """What takes the place of `parameter`: this rank's share of `weight`, bit for bit.

    Args:
        parameter: a sharded quantized weight, on meta for instance.
        weight: the whole weight, in any format and on any device; or the quantization of this
            rank's `held_elements` alone, in the format of `parameter`.

    Raises:
        ValueError: if `weight` is neither.
    """
    old = _local(parameter)
    start, stop = held_elements(parameter)
    whole = weight.shape == old.like.shape
    if not whole and (weight.numel() != stop - start or weight.format != old.format):
        raise ValueError(f"{old} with {old.format} cannot hold {weight}")
    num_ranks = parameter.device_mesh.size(_shard_axis(parameter))
    like = _on_meta(weight) if whole else old.like
    rows = -(-like.shape[0] // num_ranks)
    shard = _zero_shard(like, rows, old.shape, weight.device)
    shard.take_units_(weight, _shard_rank(parameter) * shard.num_units if whole else 0)
    return with_local(parameter, shard)


def with_local(parameter: DTensor, local: Tensor) -> DTensor:
    """A DTensor that is sharded as `parameter` is, of what this rank holds.

    `from_local` would move it to the mesh's device, from where it may be offloaded.
    """
    spec = parameter._spec
    assert spec.tensor_meta is not None
    meta = spec.tensor_meta._replace(dtype=local.dtype)
    return type(parameter)(local, replace(spec, tensor_meta=meta), requires_grad=False)


def gather(parameter: DTensor) -> QuantizedTensor:
    """The whole weight on every rank, gathered as it is stored. All ranks must call it."""
    shard, axis = _local(parameter), _shard_axis(parameter)
    num_ranks = parameter.device_mesh.size(axis)
    group = parameter.device_mesh.get_group(axis)
    return shard.whole([_gather(field, num_ranks, group) for field in shard.fields])


def _gather(field: Tensor, num_ranks: int, group: Any) -> Tensor:
    gathered = field.new_empty(num_ranks * field.shape[0], *field.shape[1:])
    torch.distributed.all_gather(list(gathered.chunk(num_ranks)), field, group=group)
    return gathered


def _local(parameter: DTensor) -> QuantizedShard:
    shard = parameter._local_tensor
    assert isinstance(shard, QuantizedShard)
    return shard


def _shard_axis(parameter: DTensor) -> int:
    """The axis of the mesh that shards; others replicate."""
    return next(i for i, placement in enumerate(parameter.placements) if placement.is_shard())


def _shard_rank(parameter: DTensor) -> int:
    return parameter.device_mesh.get_local_rank(_shard_axis(parameter))


def _rows_of_a_unit(weight: QuantizedTensor) -> list[int]:
    """Of each field."""
    return [shape[0] for shape in weight.format.field_shapes(weight.format.unit(weight.shape))]


def _on_meta(weight: QuantizedTensor) -> QuantizedTensor:
    return weight.map_fields(lambda field: field.to("meta"))


# ---- what FSDP2 does to a weight: chunk it, and copy a chunk into padded memory -----------------


def _zero_shard(
    like: QuantizedTensor, rows: int, shape: Sequence[int], device: torch.device | str
) -> QuantizedShard:
    """A shard of `shape`, filled with zeros.

    Args:
        like: the whole weight, on meta.
        rows: of the chunks that FSDP2 cuts it into.
    """
    num_shards = -(-like.shape[0] // rows)
    unit_elements = math.prod(like.format.unit(like.shape)) or 1
    num_units = -(-like.numel() // (unit_elements * num_shards))
    fields = [
        field.new_zeros(num_units * size, *field.shape[1:], device=device)
        for field, size in zip(like.fields, _rows_of_a_unit(like), strict=True)
    ]
    return QuantizedShard(*fields, shape=shape, like=like)


def _split(func: Any, args: tuple, kwargs: dict) -> list[QuantizedShard]:
    weight, rows, dim = (*args, *kwargs.values(), 0)[:3]
    if dim != 0:
        raise NotImplementedError(f"a quantized weight is sharded along dim 0, not {dim}")
    like, shards = _on_meta(weight), []
    for index, start in enumerate(range(0, weight.shape[0], rows)):
        length = min(rows, weight.shape[0] - start)
        shard = _zero_shard(like, rows, (length, *weight.shape[1:]), weight.device)
        shard.take_units_(weight, index * shard.num_units)
        shards.append(shard)
    return shards


def _as_strided(func: Any, args: tuple, kwargs: dict) -> QuantizedTensor:
    weight, size, stride = args[:3]
    if tuple(size) != tuple(weight.shape) or tuple(stride) != weight.stride():
        raise NotImplementedError("a quantized weight has one view only: its own shape")
    return weight.map_fields(lambda field: field)


DISPATCH_TABLE[aten.split.Tensor] = _split
DISPATCH_TABLE[aten.as_strided.default] = _as_strided
DISPATCH_TABLE[aten.new_zeros.default] = lambda func, args, kwargs: _zero_shard(
    _on_meta(args[0]), args[1][0], args[1], args[0].device
)


# ---- what FSDP2 and DTensor do to a shard -------------------------------------------------------


def _fieldwise(func: Any, args: tuple, kwargs: dict) -> QuantizedShard:
    kwargs.pop("memory_format", None)
    if kwargs.pop("dtype", args[0].dtype) not in (None, args[0].dtype):
        raise NotImplementedError("a shard of a quantized weight keeps its dtype; gather it first")
    return args[0].map_fields(lambda field: func(field, *args[1:], **kwargs))


def _narrow(func: Any, args: tuple, kwargs: dict) -> QuantizedShard:
    shard, dim, start, stop = args[:4]
    if dim != 0 or start != 0:
        raise NotImplementedError("only leading rows of a shard of a quantized weight can be named")
    rows = min(stop, shard.shape[0])
    return shard.with_shape((rows, *shard.shape[1:]))


def _view(func: Any, args: tuple, kwargs: dict) -> QuantizedShard:
    return args[0].with_shape(torch.empty(args[0].shape, device="meta").view(args[1]).shape)


def _copy_(func: Any, args: tuple, kwargs: dict) -> QuantizedShard:
    destination, source = args[:2]
    if not isinstance(source, QuantizedShard) or not isinstance(destination, QuantizedShard):
        raise NotImplementedError("only a shard can be copied into a shard of a quantized weight")
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
    aten.is_pinned.default: DISPATCH_TABLE[aten.is_pinned.default],
    aten.new_empty.default: lambda func, args, kwargs: args[0].fields[0].new_empty(args[1]),
    aten.new_zeros.default: lambda func, args, kwargs: args[0].map_fields(
        torch.zeros_like, shape=args[1]
    ),
    aten.slice.Tensor: _narrow,
    aten.view.default: _view,
    aten.copy_.default: _copy_,
}
