"""Run a function on several processes that talk through gloo."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 180  # to wait for ranks before they count as hung

# Processes are forked from a server that has imported torch once.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed.fsdp", "qlora_builders.checkpoint"])


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns on each of `world_size` ranks.

    It has to be importable, and what it returns is saved with torch.save.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            _context.Process(target=_run, args=(rank, world_size, folder, function, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(SECONDS)
            errors = [path.read_text() for path in sorted(folder.glob("*.error"))]
            assert not errors, "\n".join(errors)
            codes = [process.exitcode for process in processes]
            assert codes == [0] * world_size, f"exit codes {codes}"
            return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(world_size)]
        finally:
            for process in processes:
                process.kill()


def _run(
    rank: int, world_size: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    try:
        torch.save(function(*args), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # the others may wait for this one forever
    dist.destroy_process_group()
