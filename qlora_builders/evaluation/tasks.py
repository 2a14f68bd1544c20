"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

A task may run Python of its own: through `!function` in its YAML file, and through jinja templates
that no sandbox holds. That of the tasks inside the package comes with installing it; a folder of
tasks is as trusted as a script, so its name is taken from whoever runs the command and no config.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from qlora_builders.data import Tokenizer
from qlora_builders.errors import ConfigError, did_you_mean, nearest, optional_import
from qlora_builders.evaluation.measure import Figure
from qlora_builders.modules import CausalLM
from qlora_builders.training.device import set_seed

EXTRA = "lm-eval"
_SEED = 1234  # lm_eval's own
# of what lm_eval returns
_KEPT = ("results", "versions", "n-shot", "n-samples", "higher_is_better")


@dataclass(frozen=True)
class Tasks:
    """Tasks by name, to run on any number of models.

    Attributes:
        num_fewshot: solved examples before each question; None: as each task says, or none.
        limit: documents of each task; None: all.
        apply_chat_template: ask as a user in the tokenizer's chat template.
    """

    names: Sequence[str]
    manager: Any  # lm_eval's TaskManager
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False

    def measure(
        self, model: CausalLM, tokenizer: Tokenizer, *, batch_size: int
    ) -> tuple[dict[str, Figure], dict[str, Any]]:
        """Every metric as a figure, its parts being documents; and lm_eval's own results.

        Raises:
            QLoRAError: see `HarnessModel`.
        """
        # lm_eval is an extra
        from qlora_builders.evaluation.harness_model import HarnessModel

        lm_eval = optional_import("lm_eval", EXTRA)
        loaded = self.manager.load(list(self.names))
        for task in loaded["tasks"].values():
            self._set_fewshot(task)
        set_seed(_SEED)
        found = lm_eval.evaluate(
            lm=HarnessModel(model, tokenizer, batch_size=batch_size),
            task_dict=loaded,
            limit=self.limit,
            apply_chat_template=self.apply_chat_template,
            fewshot_as_multiturn=self.apply_chat_template,
            bootstrap_iters=0,  # Figure has the errors that can be paired
        )
        for metrics in found["results"].values():  # without the errors that it has not computed
            for key in [key for key in metrics if "_stderr," in key]:
                del metrics[key]
        kept = {key: found[key] for key in _KEPT}
        plain = json.dumps(kept, default=lm_eval.utils.handle_non_serializable)
        return dict(_figures(found)), json.loads(plain)

    def _set_fewshot(self, task: Any) -> None:
        """As `lm_eval.simple_evaluate` does, which would run git and pip for every model too."""
        given = task.get_config("num_fewshot")
        if given is None or (given > 0 and self.num_fewshot is not None):
            task.set_config(key="num_fewshot", value=self.num_fewshot or 0)
        task.set_fewshot_seed(seed=_SEED)


def _figures(found: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """By task, metric and filter."""
    for task, metrics in found["results"].items():
        samples = found["samples"].get(task, [])  # a group has none
        for key, value in metrics.items():
            metric, comma, filter_name = key.partition(",")
            if comma and isinstance(value, Real):
                label = f"{task} {metric}" + f" ({filter_name})" * (filter_name != "none")
                parts = [s.get(metric) for s in samples if s["filter"] == filter_name]
                numbers = [float(part) for part in parts if isinstance(part, Real)]
                figure = Figure(float(value))
                mean = math.fsum(numbers) / len(numbers) if numbers else math.nan
                if len(numbers) == len(parts) and abs(mean - figure.value) < 1e-9:
                    figure = Figure(figure.value, numbers, [1] * len(numbers))
                yield label, figure


def find_tasks(tasks: Sequence[str], tasks_dir: str | Path | None, **options: Any) -> Tasks:
    """The tasks of these names, from a folder of YAML files or from inside lm_eval.

    Each is loaded once, with its documents, so that what is wrong with it shows before a model is.

    Args:
        tasks_dir: searched first; its tasks may run Python, so name only folders that you trust.
        options: those of `Tasks`.

    Raises:
        ConfigError: if the folder is missing, there is no such task, it cannot be loaded, or it is
            one that runs code which a model has written.
        ImportError: if lm_eval is not installed.
    """
    manager_class = optional_import("lm_eval.tasks", EXTRA).TaskManager
    if tasks_dir is None:
        manager = manager_class()
    elif not Path(tasks_dir).is_dir():
        raise ConfigError(f"lm_eval.tasks_dir={tasks_dir} is not a folder")
    else:
        manager = manager_class(include_path=str(tasks_dir), include_defaults=False)
        if not set(tasks) <= set(manager.all_subtasks):  # lm_eval's 14,000 take seconds to read
            manager = manager_class(include_path=str(tasks_dir))
    for name in tasks:
        if name not in manager.task_index:  # lm_eval would take a path too, of any folder
            raise ConfigError(f"lm_eval.tasks: {_no_task(name, manager.task_index, tasks_dir)}")
        try:
            loaded = manager.load([name])["tasks"]
        except Exception as error:  # a task is somebody's code
            text = f"{type(error).__name__}: {error}"
            raise ConfigError(f"lm_eval.tasks: {name!r} cannot be loaded: {text}") from error
        if any(getattr(one, "UNSAFE_CODE", False) for one in loaded.values()):
            raise ConfigError(
                f"lm_eval.tasks: {name!r} runs code that the model writes, which evaluate does "
                "not; merge the adapter and use lm_eval itself"
            )
    return Tasks(tasks, manager, **options)


def _no_task(name: str, index: Mapping[str, Any], tasks_dir: str | Path | None) -> str:
    if tasks_dir is None:
        near = nearest(name, index)
        return f"lm_eval has no task {name!r}" + (f"; did you mean {near!r}?" if near else "")
    folder, paths = Path(tasks_dir).resolve(), {key: one.yaml_path for key, one in index.items()}
    own = [k for k, path in paths.items() if path and folder in Path(path).resolve().parents]
    hint = did_you_mean(name, own) if own else "; no *.yaml file in that folder holds a task"
    return f"neither {tasks_dir} nor lm_eval has a task {name!r}{hint}"
