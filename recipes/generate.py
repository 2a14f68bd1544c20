"""Answer prompts with a checkpoint, or a checkpoint and an adapter.

qlora generate prompt="..." [checkpoint.dir=...] [adapter.path=...]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from qlora_builders.checkpoint import load_with_adapter
from qlora_builders.config.entry import run_recipe
from qlora_builders.config.schema import GenerateConfig
from qlora_builders.data import Tokenizer, encode_prompt
from qlora_builders.errors import DataError
from qlora_builders.models import generate_batch
from qlora_builders.training.device import resolve_compute_dtype, resolve_device, resolve_dtype


def main(cfg: GenerateConfig) -> None:
    prompts = list(read_prompts(cfg))
    device = resolve_device(cfg.device)
    tokenizer = Tokenizer.from_dir(cfg.tokenizer.path or cfg.checkpoint.dir)
    model = load_with_adapter(
        cfg.checkpoint.dir,
        cfg.adapter.path,
        quantize=cfg.quantize,
        format=cfg.checkpoint.format,
        device=device,
        dtype=None if cfg.dtype == "auto" else resolve_dtype(cfg.dtype),
        compute_dtype=resolve_compute_dtype(cfg.compute_dtype, device),
        allow_base_mismatch=cfg.adapter.allow_base_mismatch,
    )
    answer = partial(
        generate_batch,
        model,
        max_new_tokens=cfg.max_new_tokens,
        stop_token_ids=tokenizer.stop_token_ids,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        generator=torch.Generator(device).manual_seed(cfg.seed),
        compile=cfg.compile,
    )
    for start in range(0, len(prompts), cfg.batch_size):
        batch = prompts[start : start + cfg.batch_size]
        steps = answer([to_ids(prompt, cfg, tokenizer) for prompt in batch])
        if len(batch) == 1 and cfg.stream:
            show_prompt(batch[0], prompts)
            for text in stream_text((t for row in steps if (t := row[0]) is not None), tokenizer):
                print(text, end="", flush=True)
            print()
            continue
        rows = list(steps)
        for index, prompt in enumerate(batch):
            show_prompt(prompt, prompts)
            print(tokenizer.decode([t for row in rows if (t := row[index]) is not None]))


def show_prompt(prompt: str, prompts: Sequence[str]) -> None:
    """Before its answer, where there are several."""
    if len(prompts) > 1:
        print(f">>> {prompt}")


def read_prompts(cfg: GenerateConfig) -> Iterator[str]:
    if cfg.prompt is not None:
        yield cfg.prompt
    if cfg.prompts_file is not None:
        file = Path(cfg.prompts_file)
        try:
            prompts = [line for line in file.read_text("utf-8").splitlines() if line]
        except FileNotFoundError as error:
            raise DataError(f"prompts_file={file}: no such file") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 text: {error.reason} at {error.start}") from error
        if not prompts:
            raise DataError(f"{file}: holds no prompt; write one per line")
        yield from prompts


def to_ids(prompt: str, cfg: GenerateConfig, tokenizer: Tokenizer) -> list[int]:
    if not cfg.chat:
        return tokenizer.encode_prefix(prompt)
    messages = [{"role": "system", "content": cfg.system}] if cfg.system else []
    messages.append({"role": "user", "content": prompt})
    return encode_prompt(messages, tokenizer, plain=tokenizer.chat_template is None)


def stream_text(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Text as it becomes certain: a character may need several tokens to be complete."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text.removeprefix(shown)
            shown = text
    yield tokenizer.decode(ids).removeprefix(shown)


if __name__ == "__main__":
    sys.exit(run_recipe(main, "generate"))
