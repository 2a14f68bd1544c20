"""Tensors that are spread over ranks: each rank writes its part, and any number of ranks read them.

Files are those of torch.distributed.checkpoint's safetensors writer, `shard-00002-model-...` that
of rank 1. Their headers say where each part lies in the whole, so there is no other metadata; in
DCP's own format that is a pickle. DCP is imported where it is used: it takes torch._dynamo with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from qlora_builders.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

_FILES = "shard-*.safetensors"


def has_parts(directory: Path) -> bool:
    return any(directory.glob(_FILES))


def write_parts(
    directory: Path, tensors: Mapping[str, Tensor], group: ProcessGroup | None = None
) -> None:
    """Write what this rank holds of `tensors`, DTensors among them. All ranks must call it.

    Args:
        directory: on a file system that all ranks share.
        group: of the messages; by default the one of the run.

    Raises:
        CheckpointError: on all ranks, if one cannot write.
    """
    from torch.distributed import checkpoint as dcp

    writer = dcp.HuggingFaceStorageWriter(str(directory), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except dcp.CheckpointException as error:
        causes = [f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items()]
        raise CheckpointError(f"{directory}: cannot be written: {'; '.join(causes)}") from error


def stored_parts(directory: Path) -> dict[str, TensorStorageMetadata]:
    """Shape (`size`) and dtype (`properties.dtype`) of every whole tensor, by name.

    Raises:
        CheckpointError: if a file is damaged.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        stored = dcp.HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
    except Exception as error:  # of safetensors and of all that may be missing in a header
        raise CheckpointError(f"{directory}/{_FILES}: cannot be read: {error!r}") from error
    return {
        name: tensor for name, tensor in stored.items() if isinstance(tensor, TensorStorageMetadata)
    }


@torch.no_grad()
def read_parts(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors`, which may be sharded in another way than what is stored; ranks do not wait
    for each other.

    Raises:
        CheckpointError: if one is not stored, or not with that shape.
    """
    from torch.distributed import checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(directory))
    stored = stored_parts(directory)
    for name, tensor in tensors.items():
        if name not in stored:
            raise CheckpointError(f"{directory}: {name} is missing")
        if stored[name].size != tensor.shape:
            raise CheckpointError(
                f"{directory}: {name} has shape {list(stored[name].size)}; "
                f"the model needs {list(tensor.shape)}"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is taken for a single process
        try:
            dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
        except dcp.CheckpointException as error:
            raise CheckpointError(f"{directory}/{_FILES}: cannot be read: {error}") from error
