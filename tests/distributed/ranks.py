"""Run a function on several processes that talk through gloo."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qlora_builders.distributed import join_ranks

SECONDS = 240  # to wait for ranks before they count as hung

# Processes are forked from a server that has imported torch once.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "qlora_builders.checkpoint",
        "qlora_builders.config.compose",
        "qlora_builders.data",
        "qlora_builders.distributed",
        "matplotlib.figure",
    ]
)


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, join: bool = True
) -> list[Any]:
    """What `function(ranks, *args)` returns on each of `world_size` ranks.

    It has to be importable, and what it returns is saved with torch.save. Without `join` it is
    called as `function(*args)` and has to join the ranks itself.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            _context.Process(
                target=_run, args=(rank, world_size, store.port, folder, function, args, join)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            deadline = time.monotonic() + SECONDS
            for process in processes:
                process.join(deadline - time.monotonic())
            errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
            assert not errors, "\n".join(errors)
            codes = [process.exitcode for process in processes]
            assert codes == [0] * world_size, f"exit codes {codes}"
            return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(world_size)]
        finally:
            for process in processes:
                process.kill()


def _run(
    rank: int,
    world_size: int,
    port: int,
    folder: Path,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    join: bool,
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is the parent's
    }
    try:
        with join_ranks("cpu") if join else nullcontext() as ranks:
            result = function(ranks, *args) if join else function(*args)
            torch.save(result, folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # the others may wait for this one forever
