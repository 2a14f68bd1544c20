"""The processes of a run: launching them, and how they agree on small things.

`qlora finetune --nproc-per-node N` is torchrun's elastic launch on this machine, with few words.
Several machines, or another rendezvous, are torchrun's own business:
    torchrun --nnodes 2 --nproc-per-node 8 ... -m qlora_builders.cli finetune KEY=VALUE ...

Tensors travel through FSDP2 and DTensor; what is said here are counts, losses, paths and errors.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from qlora_builders.errors import QLoRAError
from qlora_builders.files.outputs import how_to_go_on

USER_ERROR = 2  # the exit code of everything that a user can put right
LOST_PEER = 3  # of a rank that stops because another one did

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run, and on its machine.

    All ranks must call `apart`, `gather` and `on_main`, in the same order.

    Attributes:
        launched: by torchrun or a launcher like it, be it alone.
        restarts: how often the launcher has started the run again after a failure.
        group: of what is said here; None is that of the run.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launched: bool = False
    restarts: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this one reports and writes."""
        return self.rank == 0

    def apart(self) -> Ranks:
        """The same ranks on a line of their own, for a thread beside the one that trains."""
        return replace(self, group=dist.new_group(backend="gloo")) if self.size > 1 else self

    def seed_step(self, seed: int, step: int) -> None:
        """Other dropout on every rank, and after a resume the same.

        The main rank draws on from one step to the next, as a process alone does, and checkpoints
        have its generators; what the others draw is a function of the step.
        """
        if not self.is_main:
            digest = hashlib.sha256(f"{seed}/{step}/{self.rank}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "big"))

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def on_main(self, function: Callable[[], T]) -> T:
        """What `function()` gives on the main rank, on every rank; its errors too."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except (QLoRAError, OSError) as error:
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        value, raised = outcome
        if raised is not None:
            raise raised
        return value


def with_ranks(main: Callable[[Any, Ranks], T]) -> Callable[[Any], T]:
    """`main(cfg, ranks)` as a recipe's `main(cfg)`."""

    @functools.wraps(main)
    def run(cfg: Any) -> T:
        with join_ranks(cfg.device) as ranks:
            return main(cfg, ranks)

    return run


@contextmanager
def join_ranks(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun or `qlora finetune --nproc-per-node` started, for a while; else one.

    Args:
        device: as in the config; decides between NCCL and gloo.
    """
    if "RANK" not in os.environ:
        yield Ranks()
        return
    environ = os.environ  # https://docs.pytorch.org/docs/stable/elastic/run.html
    ranks = Ranks(
        rank=int(environ["RANK"]),
        size=int(environ["WORLD_SIZE"]),
        local_rank=int(environ.get("LOCAL_RANK", 0)),
        launched=True,
        restarts=int(environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
    )
    backend = "gloo"
    if device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank)
        backend = "cpu:gloo,cuda:nccl"  # Python objects never wait for the GPU
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun keeps the store, and in it the addresses of ranks that died before a restart
    store = dist.PrefixStore(f"restart {ranks.restarts}", store)
    with _one_voice(ranks):
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        with _one_voice(ranks):
            yield ranks
        dist.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def _one_voice(ranks: Ranks) -> Iterator[None]:
    """An error that several ranks come to is raised by one; the others leave without a word.

    A rank that another one has left says so in a line instead of a traceback.
    """
    try:
        yield
    except QLoRAError as error:
        store = dist.distributed_c10d._get_default_store()
        digest = hashlib.sha256(str(error).encode()).hexdigest()
        if store.add(f"qlora_builders/{digest}", 1) > 1:
            raise SystemExit(USER_ERROR) from None
        raise
    except RuntimeError as error:
        # NCCL raises a class of its own, gloo a RuntimeError that names its file
        lost = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
        if ranks.size > 1 and lost:
            print(f"rank {ranks.rank}: lost another rank", flush=True)
            raise SystemExit(LOST_PEER) from None
        raise


def launch(arguments: Sequence[str], *, nproc_per_node: int, max_restarts: int = 0) -> int:
    """Run `python ARGUMENTS` once per rank; returns the exit code of the whole.

    A rank that fails takes the others down; then all are started again, up to `max_restarts` times.
    What a rank had to say itself is not repeated.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    threads = max(1, (os.cpu_count() or 1) // nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # seconds that ranks have, after Ctrl-C or SIGTERM, to finish a step and save
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc_per_node,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        max_restarts=max_restarts,
    )
    logging.disable()  # what torch's launcher logs is summed up below
    try:
        elastic_launch(config, sys.executable)(*arguments)
        return 0
    except ChildFailedError as error:
        failures = error.failures
    except SignalException as error:
        return 128 + signal.SIGINT if error.sigval == signal.SIGINT else 0
    finally:
        logging.disable(logging.NOTSET)
    # one line about the rank that failed by itself; those that only lost a peer do not count
    aside = (LOST_PEER, -signal.SIGTERM)
    own = {rank: f for rank, f in failures.items() if f.exitcode not in aside} or failures
    rank, failure = min(own.items())
    if failure.exitcode == USER_ERROR:
        return USER_ERROR
    what = f"failed with exit code {failure.exitcode}"
    if failure.exitcode < 0:
        what = f"was killed by {signal.Signals(-failure.exitcode).name}"
    if failure.exitcode == -signal.SIGKILL:
        what += " (out of memory?)"
    named = [word for word in arguments if word.startswith("output_dir=")]
    how = f"; {how_to_go_on(Path(named[-1].partition('=')[2]))}" if named else ""
    print(f"error: rank {rank} {what} after {max_restarts} restarts{how}", file=sys.stderr)
    return 1
