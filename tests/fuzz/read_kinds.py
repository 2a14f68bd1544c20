"""Each kind of file through its public door, as a flat summary of all that was read."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import good_folders as good
import numpy as np
import torch
from torch import nn

from qlora_builders.checkpoint import load_checkpoint, load_with_adapter, read_adapter
from qlora_builders.config.checks import flatten
from qlora_builders.config.compose import compose
from qlora_builders.config.schema import plan_rules
from qlora_builders.data import Tokenizer, build_dataset
from qlora_builders.models import LlamaArch, llama
from qlora_builders.modules import LoRALinear
from qlora_builders.report import read_run, write_report
from qlora_builders.report.run import layer_figures
from qlora_builders.runs.folder import find_start
from qlora_builders.runs.state import load_step
from qlora_builders.tensor import NF4Tensor
from qlora_builders.training.loggers import MetricsLog

Summary = dict[str, Any]

TEXTS = (
    "two red dresses", "what is it?\n\n 17 hats", "<|start|>user\nIt<|end|>", "é \U0001f600 \u202e",
    "a" * 300, " ", "It is {a: 1}.",
)  # fmt: skip
CHATS = (
    [{"role": "user", "content": "two hats"}],
    [
        {"role": "system", "content": "it is it"},
        {"role": "user", "content": " 12 dresses "},
        {"role": "assistant", "content": "green\n"},
        {"role": "user", "content": ""},
    ],
)


def _plain(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.dequantize() if isinstance(parameter, NF4Tensor) else parameter.detach()


def _of_model(model: nn.Module) -> Summary:
    found: Summary = {f"weight:{n}": _plain(p) for n, p in model.named_parameters()}
    return found | {f"arch.{k}": v for k, v in asdict(model.spec.arch).items()}


def plain_base(folder: Path) -> Summary:
    return _of_model(load_checkpoint(folder))


def nf4_base(folder: Path) -> Summary:
    return _of_model(load_checkpoint(folder, good.NF4))


def adapter(folder: Path) -> Summary:
    """Everything that was trained, and how strongly it acts."""
    model = load_with_adapter(folder.parent / "hf", folder)
    found: Summary = {f"weight:{n}": p for n, p in model.named_parameters() if p.requires_grad}
    return found | {
        f"scaling:{name}": module.scaling
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }


def adapter_alone(folder: Path) -> Summary:
    info = read_adapter(folder)
    return {f"rank:{n}": m.rank for n, m in info.modules.items()} | {"saved": info.saved}


def tokenizer(folder: Path) -> Summary:
    own = Tokenizer.from_dir(folder)
    found: Summary = {
        "bos": own.bos_token_id,
        "eos": own.eos_token_id,
        "pad": own.pad_token_id,
        "stop": own.stop_token_ids,
        "vocab_size": own.vocab_size,
    }
    for index, text in enumerate(TEXTS):
        ids = found[f"ids:{index}"] = own.encode(text)
        found[f"text:{index}"] = own.decode(ids)
    return found | {
        f"chat:{index}": own.render_chat(messages, add_generation_prompt=True)
        for index, messages in enumerate(CHATS)
    }


def rows(folder: Path, name: str) -> Summary:
    data = build_dataset(
        folder / name,
        Tokenizer.from_dir(folder),
        format=name.partition(".")[0],
        max_seq_len=64,
    )
    found: Summary = {}
    for example in data:
        found.setdefault(f"row:{example.row}", []).append(
            (example.input_ids.tolist(), example.labels.tolist())
        )
    return found


def experiment(folder: Path) -> Summary:
    cfg = compose("finetune", ["experiment=mine"], config_dir=folder)
    return flatten(asdict(cfg))


def rules(folder: Path) -> Summary:
    cfg = compose("inspect", [f"components={folder / 'rules.yaml'}"])
    model = llama(LlamaArch(**good.SIZES), plan_rules(cfg), device="meta")
    return {"components": cfg.components, "parameters": [n for n, _ in model.named_parameters()]}


def step(run: Path) -> Summary:
    """A run that goes on from its checkpoint."""
    model, optimizer = good.step_model(run.parent, run.name)
    start = find_start(run, resume=str(run / "checkpoints" / "step_4"), overwrite=False)
    assert start.folder is not None
    load_step(start.folder, model, optimizer)
    state = optimizer.state_dict()
    found: Summary = {"step": start.step}
    found |= {f"about.{k}": v for k, v in flatten(start.about).items()}
    found |= {f"weight:{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for index, values in state["state"].items():
        found |= {f"state:{index}.{key}": value for key, value in values.items()}
    for index, group in enumerate(state["param_groups"]):
        found |= {f"group:{index}.{key}": value for key, value in group.items()}
    name, keys, *position = np.random.get_state()
    found |= {"random:python": random.getstate(), "random:cpu": torch.get_rng_state()}
    return found | {"random:numpy": (name, keys.tolist(), *position)}


def metrics(run: Path) -> Summary:
    """A run that goes on from step 3 keeps what was logged until then."""
    folder = run / "again"
    folder.mkdir(exist_ok=True)
    log = MetricsLog(folder, step=3, source=run)
    log.write(step=4, loss=0.5)
    return {"evaluated": log.has_eval(2), "rows": log.path.read_text()}


def report(folder: Path) -> Summary:
    run = read_run(folder)
    page = folder.with_name("report.html")
    write_report([run], page)
    layers = layer_figures(run)
    found: Summary = {
        f"metric:{key}@{at}": value
        for key, (steps, values) in run.metrics.items()
        for at, value in zip(steps, values, strict=True)
    }
    found |= {f"config:{key}": value for key, value in run.config.items()}
    found |= {f"update:{key}": value for key, value in layers.updates.items()}
    found |= {"processes": list(run.processes), "samples": list(run.samples)}
    return found | {"notes": [*run.notes, *layers.notes], "page": page.read_text()[:15]}
