"""A script for tests: runs of `qlora`, each in a process that can be killed at any point.

Reads JSON lines `{"argv": [...], "watch": RUN, "signals": {"event 7": signal}}`, answers each with
`{"code": exit code, "events": [...], "output": text}`. An event is a file that is opened, made,
renamed or removed in RUN, an fsync, a forward pass or an optimizer step; "event 7" is the eighth of
them, "optimizer 2" the third optimizer step of the process. Torch is imported once; a run is a fork
of that.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from qlora_builders import cli
from qlora_builders.modules.decoder import Decoder

FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove")


def watch(folder: str, signals: dict[str, int], log: Path) -> None:
    """Write down the events of this process from now on, and send it the signals."""
    counts: Counter[str] = Counter()
    file = log.open("w")

    def event(name: str) -> None:
        file.write(name + "\n")
        file.flush()
        for kind in ("event", name.partition(" ")[0]):
            number = counts[kind]
            counts[kind] += 1
            if f"{kind} {number}" in signals:
                os.kill(os.getpid(), signals[f"{kind} {number}"])

    def audit(name: str, args: tuple[Any, ...]) -> None:
        if name in FILE_EVENTS and folder in str(args[0]):
            event(f"{name} {args[0]}")

    def announced(function: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            event("fsync")
            function(descriptor)

        return call

    os.fsync = announced(os.fsync)  # type: ignore[assignment]
    sys.addaudithook(audit)

    def forward(module: Any, args: Any, output: Any) -> None:
        if isinstance(module, Decoder) and not args[0].is_meta:
            event("forward")

    def step(optimizer: Any, args: Any, kwargs: Any) -> None:
        if sum(len(group["params"]) for group in optimizer.param_groups) > 2:
            event("optimizer")

    # but for what preflight predicts a peak with: a model on meta, an optimizer of 1 or 2 tensors
    register_module_forward_hook(forward)
    register_optimizer_step_post_hook(step)


def run(argv: list[str], folder: str, signals: dict[str, int], log: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    watch(folder, signals, log)
    try:
        code = cli.main(argv)
    except SystemExit as error:
        code = int(error.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    torch.set_num_threads(1)
    for name in ("config.entry", "checkpoint", "report.charts"):
        importlib.import_module(f"qlora_builders.{name}")  # once for all runs
    for name in ("jinja2", "matplotlib.figure", "matplotlib.backends.backend_svg"):
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        task = json.loads(line)
        with tempfile.TemporaryDirectory() as temporary:
            log, output = Path(temporary) / "events", Path(temporary) / "output"
            child = os.fork()
            if child == 0:
                descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                run(task["argv"], task["watch"], task["signals"], log)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            answer = {
                "code": code,
                "events": log.read_text().splitlines(),
                "output": output.read_text(),
            }
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
