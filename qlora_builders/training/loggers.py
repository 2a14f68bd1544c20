"""Where metrics go beside metrics.jsonl, on request: `loggers` in a config names these classes.

    loggers: [{component: qlora_builders.training.loggers.TensorBoardLogger}]

A logger of your own is a class with `log` and `close` that takes the same three arguments, and its
package is allowed with `--allow PACKAGE`. The constructor runs before the model is loaded, so that
a missing package is told at once; files and connections are opened by the first `log`, because only
then the run directory belongs to the run.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from qlora_builders.errors import optional_import


class Logger(Protocol):
    """Steps never go down within a process; a resumed run starts at its checkpoint's."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Loggers:
    """Several as one; closes all of them, whatever one of them raises."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = loggers

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for logger in self.loggers:
            logger.log(step, values)

    def close(self) -> None:
        errors = []
        for logger in self.loggers:
            try:
                logger.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


class TensorBoardLogger:
    """Event files in RUN/tensorboard; `tensorboard --logdir RUN` shows them.

    Args:
        run_dir: of the run.
        first_step: the step that the run goes on from; what was logged after it is hidden.
        config: of the run.

    Raises:
        ImportError: without the package tensorboard.
    """

    def __init__(self, *, run_dir: Path, first_step: int, config: Mapping[str, Any]) -> None:
        optional_import("tensorboard", "tensorboard")
        self.run_dir = run_dir
        self.first_step = first_step

    @cached_property
    def _writer(self) -> Any:
        module = optional_import("torch.utils.tensorboard", "tensorboard")
        purge = self.first_step + 1 if self.first_step else None
        return module.SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        if "_writer" in vars(self):
            self._writer.close()


class WandbLogger:
    """A Weights & Biases run, which sends metrics, config and machine data to its server.

    Args:
        run_dir: of the run; W&B's own files go to RUN/wandb.
        first_step: the step that the run goes on from, in the W&B run of the same directory.
        config: of the run.
        project, entity, name: as in `wandb.init`; None: W&B's own choice, the run directory's name.
        mode: "online", "offline" (written to the disk only) or "disabled"; None: online, unless
            W&B's own settings say otherwise.

    Raises:
        ImportError: without the package wandb.
    """

    def __init__(
        self,
        *,
        run_dir: Path,
        first_step: int,
        config: Mapping[str, Any],
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        mode: str | None = None,
    ) -> None:
        self._wandb = optional_import("wandb", "wandb")
        self.run_dir = run_dir
        self.first_step = first_step
        self._arguments = {
            "project": project,
            "entity": entity,
            "name": name or run_dir.name,
            "mode": mode,
            "config": dict(config),
        }

    @cached_property
    def _run(self) -> Any:
        id_file = self.run_dir / "wandb_run_id"
        if not self.first_step or not id_file.is_file():
            id_file.write_text(secrets.token_hex(4))
        settings = self._wandb.Settings(console="off", disable_git=True, disable_code=True)
        return self._wandb.init(
            dir=str(self.run_dir),
            id=id_file.read_text(),
            resume="allow",
            settings=settings,
            **self._arguments,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        if "_run" in vars(self):
            self._run.finish()
