"""Choose the precision of every linear layer under a memory budget; write the component plan.

    qlora plan bits=4.6 | budget=6GiB [checkpoint.dir=...] [data.train=...] [data.eval=...]

One pass over rows of `data.train` measures how much each layer's weight matters, every NF4 setting
is tried on every layer, and the plan is chosen that should change the model's predictions least.
Then it is measured on `data.eval`, beside every uniform setting that fits the budget. A uniform one
is written where it is as good: see `precision.decide`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import Any

from rich.table import Table
from torch import nn

from qlora_builders.analysis.precision import (
    PLAIN,
    SETTINGS,
    Choice,
    HeldOut,
    Measured,
    Options,
    choose,
    decide,
    measure_options,
    to_rules,
    total_bytes,
    total_loss,
    uniform_plans,
)
from qlora_builders.analysis.sensitivity import measure_sensitivity
from qlora_builders.checkpoint import load_checkpoint, read_arch, stored_plan
from qlora_builders.config.checks import in_bytes
from qlora_builders.config.entry import run_recipe
from qlora_builders.config.schema import PlanConfig
from qlora_builders.console import PlainConsole, plain_table, table_console
from qlora_builders.data import Batch, Batches, Tokenizer, check_token_range
from qlora_builders.errors import ConfigError
from qlora_builders.files.outputs import check_new, write_whole
from qlora_builders.models import LlamaArch, hf_name, linear_slots, llama, summarize
from qlora_builders.modules import CausalLM
from qlora_builders.runs import read_dataset
from qlora_builders.training.device import resolve_compute_dtype, resolve_device, resolve_dtype
from qlora_builders.visible import visible, visible_json

EVAL_BATCHES = 20  # at least, where there are as many rows: chance is judged by their spread


def main(cfg: PlanConfig) -> None:
    output, figures_file = Path(cfg.output), Path(cfg.output).with_suffix(".json")
    check_new(output, "output")
    if figures_file.exists():
        raise ConfigError(
            f"output={output}: its figures go to {figures_file}, which exists; choose another name"
        )
    base, format = cfg.checkpoint.dir, cfg.checkpoint.format
    if stored_plan(base, format=format):
        raise ConfigError(
            f"checkpoint.dir={base} is quantized already, and what that cost cannot be measured; "
            "give the 16-bit weights"
        )
    arch = read_arch(base, format=format)
    fixed, weights, budget = check_budget(cfg, arch)
    console = table_console()
    tokenizer = Tokenizer.from_dir(cfg.tokenizer.path or base)
    calibration, held_out = (
        read_dataset(source, tokenizer, cfg.data)
        for source in (cfg.data.train, cfg.data.eval)
        if source is not None  # which the config has made sure of
    )
    for data in (calibration, held_out):
        check_token_range(data, arch.vocab_size)
    device, dtype = resolve_device(cfg.device), resolve_dtype(cfg.dtype)
    load = partial(
        load_checkpoint,
        base,
        format=format,
        device=device,
        dtype=dtype,
        compute_dtype=resolve_compute_dtype(cfg.compute_dtype, device),
    )

    model = load()
    rows = partial(Batches, packing=cfg.data.packing, max_seq_len=cfg.data.max_seq_len)
    seeded = rows(calibration, batch_size=cfg.batch_size, seed=cfg.seed).of_epoch(0, device)
    options = measure(model, first_tokens(seeded, cfg.calibration_tokens), cfg.seed, console)
    plain = {slot: next(o for o in some if o.setting == PLAIN) for slot, some in options.items()}
    size = max(1, min(cfg.batch_size, len(held_out) // EVAL_BATCHES))
    compared = rows(held_out, batch_size=size, shuffle=False).of_epoch(0, device)
    reference = HeldOut(model, compared, seed=cfg.seed)
    unquantized = Measured("not quantized", plain, reference.figures(model))
    del model

    plans = {name: p for name, p in uniform_plans(options).items() if total_bytes(p) <= budget}
    plans["the plan"] = choose(options, budget)
    measured = []
    for name, choice in console.track(plans.items(), "comparing", len(plans)):
        candidate = load(to_rules(choice))
        assert sum(row.base_bytes for row in summarize(candidate)) == fixed + total_bytes(choice)
        measured.append(Measured(name, choice, reference.figures(candidate)))
        del candidate
    best, verdict = decide(measured[-1], measured[:-1], unquantized)

    rules = to_rules(best.choice, rank=cfg.rank, alpha=cfg.alpha or 2 * (cfg.rank or 1))
    console.print(plan_table(llama(arch, rules, device="meta", dtype=dtype), best.choice))
    comparison = [figures_of(one, fixed, weights) for one in (unquantized, *measured)]
    console.print(comparison_table(comparison))
    console.print(verdict)
    figures = {
        "checkpoint": base,
        "calibration": calibration.report.summary(),
        "held_out": held_out.report.summary(),
        "budget_bytes": fixed + budget,
        "written": best.name,
        "verdict": verdict,
        "comparison": comparison,
        "components": rules,
        "slots": {
            slot: {
                "chosen": best.choice[slot].setting.name,
                "options": {
                    o.setting.name: {"bytes": o.nbytes, "predicted_kl": o.loss} for o in some
                },
            }
            for slot, some in options.items()
        },
    }
    write_whole(figures_file, f"{visible_json(figures, indent=2)}\n".encode())
    about = f"qlora plan: {base} in {fixed + budget:,} bytes or less. Verdict: {verdict}. Use it "
    write_whole(output, to_yaml(f"{about}with components={output}", rules))  # where it is, all is
    console.print(f"wrote {output} and {figures_file}")


def quantizable(model: CausalLM) -> dict[str, nn.Module]:
    """The linear slots by name; a head that shares the embedding's weight cannot be quantized."""
    return {
        slot: model.get_submodule(hf_name(slot))
        for slot in linear_slots(model.spec.arch)
        if not (slot == "lm_head" and model.tie_word_embeddings)
    }


def check_budget(cfg: PlanConfig, arch: LlamaArch) -> tuple[int, int, int]:
    """(bytes of everything that is no slot, weights in slots, bytes that these may take), by a
    model without memory.

    Raises:
        ConfigError: if no plan is so small, or everything fits as it is.
    """
    model = llama(arch, device="meta", dtype=resolve_dtype(cfg.dtype))
    slots = [module.get_parameter("weight") for module in quantizable(model).values()]
    weights, most = sum(w.numel() for w in slots), sum(w.nbytes for w in slots)
    fixed = sum(row.base_bytes for row in summarize(model)) - most
    least = sum(min(s.nbytes(w.shape, w.dtype) for s in SETTINGS) for w in slots)
    if cfg.budget is None:
        assert cfg.bits is not None
        key, budget = f"bits={cfg.bits:g}", int(cfg.bits * weights / 8)
    else:
        key, budget = f"budget={cfg.budget}", in_bytes(cfg.budget, "memory") - fixed

    def needs(nbytes: int) -> str:
        bits, mib = 8 * nbytes / weights, (fixed + nbytes) / 2**20
        return f"bits={math.ceil(1000 * bits) / 1000} or budget={math.ceil(100 * mib) / 100}MiB"

    if budget < least:
        raise ConfigError(f"{key} is too small: the smallest plan has {needs(least)}")
    if budget >= most:
        raise ConfigError(f"{key} is too large: without quantization the base has {needs(most)}")
    return fixed, weights, budget


def measure(model: CausalLM, batches: Iterable[Batch], seed: int, console: PlainConsole) -> Options:
    """What every slot can be, with its bytes and the predicted KL divergence."""
    slots = quantizable(model)
    found = measure_sensitivity(model, slots, batches, seed=seed)
    weights = {slot: module.get_parameter("weight") for slot, module in slots.items()}
    options = measure_options(weights, lambda slot, *pair: found[slot].predicted_kl(*pair))
    return dict(console.track(options, "quantizing", len(weights)))


def first_tokens(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    """Until there are so many tokens."""
    for batch in batches:
        yield batch
        count -= batch.input_ids.numel()
        if count <= 0:
            return


def plan_table(model: CausalLM, choice: Choice) -> Table:
    """Slots as `inspect` groups them."""
    table = plain_table(["slot", "base"], ["parameters", "bits", "MiB", "predicted KL"])
    for row in summarize(model):
        chosen = {slot: choice[slot] for slot in row.slots if slot in choice}
        if chosen:
            figures = (f"{row.parameters:,}", f"{row.bits:.2f}", f"{row.base_bytes / 2**20:,.2f}")
            name = choice[row.slots[0]].setting.name
            table.add_row(row.name, name, *figures, f"{total_loss(chosen):.2e}")
    return table


def figures_of(one: Measured, fixed: int, weights: int) -> dict[str, Any]:
    return {
        "plan": one.name,
        "bits": 8 * total_bytes(one.choice) / weights,
        "bytes": fixed + total_bytes(one.choice),
        "predicted_kl": total_loss(one.choice),
        "kl": one.kl,
        "loss": one.loss,
        "perplexity": math.exp(one.loss),
    }


def comparison_table(rows: Sequence[dict[str, Any]]) -> Table:
    heads = ["bits", "MiB", "predicted KL", "KL", "loss", "perplexity"]
    table = plain_table(["layers in"], heads)
    for row in rows:
        sizes = (f"{row['bits']:.3f}", f"{row['bytes'] / 2**20:,.2f}")
        divergence = (f"{row['predicted_kl']:.2e}", f"{row['kl']:.2e}")
        losses = (f"{row['loss']:.5f}", f"{row['perplexity']:.4f}")
        table.add_row(row["plan"], *sizes, *divergence, *losses)
    return table


def to_yaml(about: str, rules: Sequence[dict[str, Any]]) -> bytes:
    lines = [
        *wrap(visible(about), width=100, initial_indent="# ", subsequent_indent="# "),
        "components:",
        *(f"  - {{{', '.join(f'{key}: {json.dumps(v)}' for key, v in r.items())}}}" for r in rules),
    ]
    return "".join(f"{line}\n" for line in lines).encode()


if __name__ == "__main__":
    sys.exit(run_recipe(main, "plan"))
