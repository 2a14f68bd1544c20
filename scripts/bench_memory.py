"""Predicted against measured peak memory of training on a CPU; the last line printed is JSON.

usage: python scripts/bench_memory.py [--checkpoint DIR] [--only NAME]

Every setting runs in a process of its own: three optimizer steps on random tokens, and the peak of
resident memory (Linux) over what the process had after its imports, in the environment that
`qlora finetune` has. Checkpoints of random weights are written to a temporary folder; --checkpoint
adds settings on one of your own.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_builders import LlamaArch, llama, load_checkpoint, save_checkpoint
from qlora_builders.analysis.memory import predict_phases, probe_optimizer
from qlora_builders.checkpoint import read_arch
from qlora_builders.data import Batch
from qlora_builders.training.device import bound_heap, compile_layers
from qlora_builders.training.optimizers import trainable_parameters
from qlora_builders.training.step import train_step

MIB = 2**20
TARGETS = "layers.*.*.{q,k,v,o,gate,up,down}_proj"
PLANS: dict[str, list[dict[str, Any]]] = {
    "full": [{"match": "**", "kind": "linear", "trainable": True}],
    "lora": [{"match": TARGETS, "kind": "lora", "rank": 8, "alpha": 16}],
    "lora attention": [{"match": "layers.*.self_attn.*", "kind": "lora", "rank": 64, "alpha": 16}],
    "qlora": [{"match": TARGETS, "kind": "qlora", "rank": 8, "alpha": 16}],
    "qlora last": [
        {"match": "layers.**", "kind": "frozen_nf4"},
        {"match": "layers.[4-5].**", "kind": "qlora", "rank": 8, "alpha": 16},
    ],
    "qlora dropout": [{"match": TARGETS, "kind": "qlora", "rank": 8, "alpha": 16, "dropout": 0.1}],
    "qlora lm_head": [
        {"match": TARGETS, "kind": "qlora", "rank": 8, "alpha": 16},
        {"match": "lm_head", "kind": "linear", "trainable": True},
    ],
}
COMMON: dict[str, Any] = {
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
ARCHS = {
    "deep": LlamaArch(
        vocab_size=8000, hidden_size=512, intermediate_size=1536, num_layers=6, **COMMON
    ),
    "vocab": LlamaArch(
        vocab_size=128256,
        hidden_size=512,
        intermediate_size=1536,
        num_layers=2,
        tie_word_embeddings=True,
        **COMMON,
    ),
}


@dataclass(frozen=True)
class Setting:
    arch: str
    plan: str
    seq: int
    batch: int = 1
    checkpointing: str = "none"
    compute_dtype: str = "float32"
    compiled: bool = False
    documents: int = 0  # of each row; 0: rows are not packed


SETTINGS = [
    Setting("deep", "qlora", 256),
    Setting("deep", "qlora", 512, batch=2),
    Setting("deep", "qlora", 1536, checkpointing="full"),
    Setting("deep", "qlora", 1536, checkpointing="selective"),
    Setting("deep", "full", 256),
    Setting("deep", "full", 512, batch=2, checkpointing="full"),
    Setting("deep", "lora", 512),
    Setting("deep", "lora attention", 1024),
    Setting("deep", "qlora", 2048),
    Setting("deep", "qlora", 256, compute_dtype="bfloat16"),
    Setting("deep", "qlora dropout", 512),
    Setting("deep", "qlora last", 1024),
    Setting("deep", "qlora lm_head", 512),
    Setting("deep", "qlora", 1024, documents=3),
    Setting("deep", "qlora", 2048, documents=1, checkpointing="selective"),
    Setting("deep", "qlora", 1024, compiled=True),
    Setting("vocab", "qlora", 128),
    Setting("vocab", "lora", 1024, checkpointing="full"),
]
OWN_SETTINGS = [
    Setting("own", "qlora", 512),
    Setting("own", "qlora", 512, compiled=True),
    Setting("own", "qlora", 512, checkpointing="selective"),
    Setting("own", "qlora", 512, checkpointing="full"),
    Setting("own", "qlora", 2048, checkpointing="full"),
    Setting("own", "lora", 512),
    Setting("own", "qlora lm_head", 256, batch=2),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint")
    parser.add_argument("--only", default="", help="part of a setting's line")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.checkpoint, Setting(**json.loads(args.measure)))))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for setting in SETTINGS + (OWN_SETTINGS if args.checkpoint else []):
            if args.only not in str(setting):
                continue
            path = args.checkpoint if setting.arch == "own" else f"{folder}/{setting.arch}"
            if not Path(path).exists():
                save_checkpoint(llama(ARCHS[setting.arch]), path)
            measured = run_alone(path, setting)
            predicted = predict(path, setting)
            error = predicted["peak_mib"] / measured["peak_mib"] - 1
            results.append(
                {**asdict(setting), **predicted, "measured": measured, "error": round(error, 3)}
            )
            print(
                f"{setting.arch:6} {setting.plan:15} {setting.compute_dtype:9} "
                f"{setting.batch} x {setting.seq:<5} checkpointing {setting.checkpointing:10}"
                f"{'compiled ' if setting.compiled else ''}"
                f"{f'documents {setting.documents} ' if setting.documents else ''}"
                f"load {predicted['load_mib']:7,.0f} ({measured['load_mib']:7,.0f})  "
                f"peak {predicted['peak_mib']:7,.0f} ({measured['peak_mib']:7,.0f}) MiB  "
                f"{error:+.1%}",
                flush=True,
            )
    worst = max(abs(result["error"]) for result in results)
    print(json.dumps({"worst_error": worst, "torch": torch.__version__, "settings": results}))


def predict(path: str, setting: Setting) -> dict[str, Any]:
    model = llama(
        read_arch(Path(path)),
        PLANS[setting.plan],
        train=train_patterns(setting),
        device="meta",
        compute_dtype=getattr(torch, setting.compute_dtype),
    )
    model.model.activation_checkpointing = setting.checkpointing
    load, *step = predict_phases(
        model,
        probe_optimizer(lambda parameters: torch.optim.AdamW(parameters, fused=True)),
        device_type="cpu",
        batch_size=setting.batch,
        seq_len=setting.seq,
        compiled=setting.compiled,
    )
    peak = max(load, *step, key=lambda phase: phase.peak)
    return {"load_mib": load.peak / MIB, "peak_mib": peak.peak / MIB, "terms": peak.terms}


def run_alone(path: str, setting: Setting) -> dict[str, float]:
    command = [sys.executable, __file__, "--checkpoint", path]
    command += ["--measure", json.dumps(asdict(setting))]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def measure(path: str, setting: Setting) -> dict[str, float]:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory_mib("VmRSS")
    model = load_checkpoint(
        path,
        PLANS[setting.plan],
        train=train_patterns(setting),
        compute_dtype=getattr(torch, setting.compute_dtype),
    )
    load = memory_mib("VmHWM") - before
    model.model.activation_checkpointing = setting.checkpointing
    bound_heap(model)
    compile_layers(model, "on" if setting.compiled else "off", num_tokens=0)
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-4, fused=True)
    ids = torch.randint(model.spec.arch.vocab_size, (setting.batch, setting.seq))
    documents = None
    if setting.documents:
        documents = (torch.arange(setting.seq) * setting.documents // setting.seq).expand_as(ids)
    model.train()
    for _ in range(3):
        batch = Batch(ids, ids, rows=list(range(setting.batch)), document_ids=documents)
        train_step(model, [batch], optimizer, clip_grad_norm=1.0)
    return {"load_mib": load, "peak_mib": memory_mib("VmHWM") - before}


def train_patterns(setting: Setting) -> list[str]:
    return ["**"] if setting.plan == "full" else []


def memory_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 2**10
    raise RuntimeError(f"no {field} in /proc/self/status; this script needs Linux")


if __name__ == "__main__":
    main()
