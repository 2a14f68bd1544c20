"""Saving and loading an adapter: seconds, and memory above what was resident.

    python scripts/bench_adapter.py CHECKPOINT_DIR [--rank 16] [--repeats 5]

Prints one JSON line. The model is loaded as QLoRA, with adapters on all seven projections.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qlora_builders import load_adapter, load_checkpoint, save_adapter

MIB = 2**20


def resident() -> int:
    """Bytes of this process in memory that belong to it alone: mapped files do not count."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


@contextmanager
def peak_above() -> Iterator[Callable[[], int]]:
    """Sampled every half millisecond; the function gives the bytes above the start."""
    start = peak = resident()
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.0005):
            peak = max(peak, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: peak - start
    finally:
        stop.set()
        thread.join()
        peak = max(peak, resident())


def measure(action: Callable[[], object], repeats: int) -> dict[str, float]:
    seconds, bytes_above = [], []
    for _ in range(repeats):
        with peak_above() as above:
            started = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - started)
        bytes_above.append(above())
    return {
        "median_s": round(statistics.median(seconds), 4),
        "max_s": round(max(seconds), 4),
        "peak_mib": round(max(bytes_above) / MIB, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    plan = [{"match": "layers.**", "kind": "qlora", "rank": arguments.rank, "alpha": 32}]
    model = load_checkpoint(arguments.checkpoint, plan)
    folder = Path(tempfile.mkdtemp(dir=arguments.checkpoint.parent))
    adapter = folder / "adapter"
    try:
        results = {
            "save": measure(lambda: save_adapter(model, adapter), arguments.repeats),
            "load": measure(lambda: load_adapter(model, adapter), arguments.repeats),
        }
        size = (adapter / "adapter_model.safetensors").stat().st_size
    finally:
        shutil.rmtree(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        json.dumps(
            {
                "parameters": parameters,
                "rank": arguments.rank,
                "adapter_mib": round(size / MIB, 1),
                **results,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
