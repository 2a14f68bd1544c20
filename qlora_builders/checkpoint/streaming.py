"""Tensors from files into a model, read ahead by threads while the one before is quantized."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from qlora_builders.checkpoint.safetensors_io import LazyTensor

READERS = 2


def stream(
    tensors: Sequence[LazyTensor],
    consume: Callable[[LazyTensor, Tensor], None],
    *,
    transient: Callable[[LazyTensor], bool],
) -> None:
    """Call `consume` with every tensor, in the order given, in this thread.

    Others are loaded meanwhile: at most `READERS` of them, and only while all that is loaded and
    not consumed, this one included, is no larger than the largest tensor.

    Tensors that are `transient` (what `consume` keeps of them is other memory) are loaded into
    memory that is used again and again: a first touch takes five times as long as the reading,
    and what threads free, malloc keeps (200 MiB after loading a model of 375).
    """
    budget = max((tensor.nbytes for tensor in tensors), default=0)
    reused = {t.name for t in tensors if t.load_into is not None and transient(t)}
    size = max((tensor.nbytes for tensor in tensors if tensor.name in reused), default=0)
    buffers: list[Tensor] = []
    waiting = deque(tensors)
    loading: deque[tuple[LazyTensor, Future[Tensor], Tensor | None]] = deque()
    in_memory = 0

    def cost(tensor: LazyTensor) -> int:
        return size if tensor.name in reused else tensor.nbytes

    def start(pool: ThreadPoolExecutor, tensor: LazyTensor) -> None:
        if tensor.name not in reused:
            keep = None if transient(tensor) else tensor.map
            loading.append((tensor, pool.submit(keep or tensor.load), None))
            return
        assert tensor.load_into is not None
        buffer = buffers.pop() if buffers else _scratch(size)
        future = pool.submit(tensor.load_into, buffer[: tensor.nbytes])
        loading.append((tensor, future, buffer))

    with ThreadPoolExecutor(READERS) as pool:
        try:
            while waiting or loading:
                while (
                    waiting
                    and len(loading) <= READERS
                    and (not loading or in_memory + cost(waiting[0]) <= budget)
                ):
                    tensor = waiting.popleft()
                    in_memory += cost(tensor)
                    start(pool, tensor)
                tensor, future, buffer = loading.popleft()
                consume(tensor, future.result())
                del future
                in_memory -= cost(tensor)
                if buffer is not None:
                    buffers.append(buffer)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _scratch(nbytes: int) -> Tensor:
    """uint8 [nbytes] that goes back to the system when it is dropped."""
    return torch.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype=torch.uint8)
