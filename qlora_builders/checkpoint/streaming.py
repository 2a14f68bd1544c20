"""Tensors from files into a model, read ahead by threads while the one before is quantized."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from qlora_builders.checkpoint.safetensors_io import LazyTensor

READERS = 2


def stream(
    tensors: Sequence[LazyTensor],
    consume: Callable[[LazyTensor, Tensor], None],
    *,
    readers: int = READERS,
) -> None:
    """Call `consume` with every tensor, in the order given, in this thread.

    Others are loaded meanwhile: at most `readers` of them, and only while all that is loaded and
    not consumed, this one included, is no larger than the largest tensor.
    """
    budget = max((tensor.nbytes for tensor in tensors), default=0)
    waiting = deque(tensors)
    loading: deque[tuple[LazyTensor, Future[Tensor]]] = deque()
    in_memory = 0
    with ThreadPoolExecutor(readers) as pool:
        try:
            while waiting or loading:
                while (
                    waiting
                    and len(loading) <= readers
                    and (not loading or in_memory + waiting[0].nbytes <= budget)
                ):
                    tensor = waiting.popleft()
                    in_memory += tensor.nbytes
                    loading.append((tensor, pool.submit(tensor.load)))
                tensor, future = loading.popleft()
                consume(tensor, future.result())
                del future
                in_memory -= tensor.nbytes
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
