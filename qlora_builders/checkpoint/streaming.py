"""Tensors from files into a model, read ahead by threads while the one before is quantized."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from qlora_builders.checkpoint.tensor_files import LazyTensor

READERS = 2


def stream(
    tensors: Sequence[LazyTensor],
    consume: Callable[[LazyTensor, Tensor], None],
    *,
    transient: Callable[[LazyTensor], bool],
) -> None:
    """Call `consume` with every tensor, in the order given, in this thread.

    Others are loaded meanwhile: at most `READERS` of them, and only while all that is loaded and
    not consumed, this one included, is no larger than the largest tensor. Tensors that are
    `transient` (what `consume` keeps of them is other memory) are pages of their file.
    """
    budget = max((tensor.nbytes for tensor in tensors), default=0)
    waiting = deque(tensors)
    loading: deque[tuple[LazyTensor, Future[Tensor]]] = deque()
    in_memory = 0
    with ThreadPoolExecutor(READERS) as pool:
        try:
            while waiting or loading:
                while (
                    waiting
                    and len(loading) <= READERS
                    and (not loading or in_memory + waiting[0].nbytes <= budget)
                ):
                    tensor = waiting.popleft()
                    in_memory += tensor.nbytes
                    mapped = tensor.map if tensor.mappable or transient(tensor) else None
                    loading.append((tensor, pool.submit(mapped or tensor.load)))
                tensor, future = loading.popleft()
                consume(tensor, future.result())
                del future
                in_memory -= tensor.nbytes
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
