"""`qlora finetune --nproc-per-node N`: torchrun's elastic launch on this machine, with few words.

Several machines, or another rendezvous, are torchrun's own business:
    torchrun --nnodes 2 --nproc-per-node 8 ... -m qlora_builders.cli finetune KEY=VALUE ...
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_builders.distributed.ranks import LOST_PEER, USER_ERROR
from qlora_builders.files.outputs import how_to_go_on


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
    except ChildFailedError as error:
        named = [word for word in arguments if word.startswith("output_dir=")]
        run_dir = Path(named[-1].partition("=")[2]) if named else None
        return _report(error.failures, max_restarts, run_dir)
    except SignalException as error:
        return 128 + signal.SIGINT if error.sigval == signal.SIGINT else 0
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _report(failures: dict[int, Any], max_restarts: int, run_dir: Path | None = None) -> int:
    """One line about the rank that failed by itself; those that only lost a peer do not count."""
    aside = (LOST_PEER, -signal.SIGTERM)
    own = {rank: f for rank, f in failures.items() if f.exitcode not in aside} or failures
    rank, failure = min(own.items())
    if failure.exitcode == USER_ERROR:
        return USER_ERROR
    if failure.exitcode < 0:
        what = f"was killed by {signal.Signals(-failure.exitcode).name}"
        if failure.exitcode == -signal.SIGKILL:
            what += " (out of memory?)"
    else:
        what = f"failed with exit code {failure.exitcode}"
    how = f"; {how_to_go_on(run_dir)}" if run_dir else ""
    print(f"error: rank {rank} {what} after {max_restarts} restarts{how}", file=sys.stderr)
    return 1
