"""What a run leaves: the adapter or the weights, and a page."""

from __future__ import annotations

from pathlib import Path

from qlora_builders.checkpoint import save_adapter, save_checkpoint
from qlora_builders.config.schema import FinetuneConfig
from qlora_builders.distributed import whole_parameters
from qlora_builders.errors import QLoRAError
from qlora_builders.modules import CausalLM
from qlora_builders.report import read_run, write_report
from qlora_builders.runs.log import Log
from qlora_builders.runs.setup import Run
from qlora_builders.runs.state import has_adapters
from qlora_builders.training.device import resolve_dtype
from qlora_builders.training.optimizers import check_adapters_learned


def save_result(run: Run, model: CausalLM, log: Log) -> None:
    """adapter/ (PEFT layout) or model/ (Hugging Face layout).

    Raises:
        TrainingError: if the adapters have learned nothing.
    """
    check_adapters_learned(model, gather=run.ranks.gather)
    with whole_parameters(model, run.ranks, only_trained=has_adapters(model)):
        written = run.ranks.on_main(lambda: _save_trained(model, run.folder, run.cfg))
    log.progress.say(f"wrote {written}")


def show_result(run: Run, log: Log) -> None:
    """report.html; where it cannot be written, a line that says so: the result is there."""
    if run.ranks.is_main:
        log.progress.say(_report(run.folder))


def _save_trained(model: CausalLM, folder: Path, cfg: FinetuneConfig) -> Path:
    if has_adapters(model):
        save_adapter(model, folder / "adapter", base_model=cfg.checkpoint.dir)
        return folder / "adapter"
    dtype = resolve_dtype(cfg.training.dtype)
    save_checkpoint(model, folder / "model", dtype=dtype, companions=cfg.checkpoint.dir)
    return folder / "model"


def _report(folder: Path) -> str:
    try:
        return f"wrote {write_report([read_run(folder)], folder / 'report.html')}"
    except QLoRAError as error:
        return f"no report: {error}"
