"""The step checkpoints of a run, written at once or while it trains on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from types import TracebackType

import torch

from qlora_builders.distributed import whole_parameters
from qlora_builders.modules import CausalLM
from qlora_builders.runs.folder import add_step, remove_old_steps
from qlora_builders.runs.log import Log
from qlora_builders.runs.setup import Data, Run
from qlora_builders.runs.state import StepState, capture_step, has_adapters


class Checkpoints:
    """Saves what trains, the optimizer and the generators after a step.

    With `training.async_save` a copy is made and a thread writes it; the next save waits until it
    has done, so there is one copy at a time. All ranks have to do the same.
    """

    def __init__(
        self, run: Run, data: Data, model: CausalLM, optimizer: torch.optim.Optimizer, log: Log
    ) -> None:
        self._run, self._data, self._log = run, data, log
        self._model, self._optimizer = model, optimizer
        self._apart = run.cfg.training.async_save
        self._ranks = run.ranks.apart() if self._apart else run.ranks
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[None] | None = None

    def save(self, step: int) -> None:
        """
        Raises:
            CheckpointError: if this checkpoint, or the one before in the background, cannot be
                written.
        """
        self.finish()
        run = self._run
        run.ranks.on_main(self._log.metrics.sync)
        gathered = (
            whole_parameters(self._model, run.ranks, only_trained=True)
            if has_adapters(self._model)
            else nullcontext()
        )
        with gathered:
            state = capture_step(
                self._model,
                self._optimizer,
                step=step,
                about=self._data.about,
                base_model=run.cfg.checkpoint.dir,
                is_main=run.ranks.is_main,
                copied=self._apart,
            )
        if self._apart:
            self._pending = self._thread.submit(self._write, state)
        else:
            self._write(state)

    def finish(self) -> None:
        """Wait for what is being written.

        Raises:
            CheckpointError: if it cannot be.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self.finish()

    def _write(self, state: StepState) -> None:
        run, ranks = self._run, self._ranks
        add_step(run.folder, state, on_main=ranks.on_main, group=ranks.group)
        ranks.on_main(lambda: remove_old_steps(run.folder, run.cfg.training.keep_last))
