"""Answer prompts with a checkpoint, or a checkpoint and an adapter.

qlora generate prompt="..." [checkpoint.dir=...] [adapter.path=...]
qlora generate prompts_file=rows.jsonl output=answers.jsonl
qlora generate interactive=true
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from qlora_builders.checkpoint import load_with_adapter, read_arch
from qlora_builders.config.entry import run_recipe
from qlora_builders.config.schema import GenerateConfig
from qlora_builders.data import Prompt, Tokenizer, encode_prompt, read_prompts, row_to_prompt
from qlora_builders.errors import ConfigError, DataError, QLoRAError
from qlora_builders.models import LlamaArch, check_prompt, generate_batch, max_steps
from qlora_builders.outputs import check_writable, write_whole
from qlora_builders.training.device import resolve_compute_dtype, resolve_device, resolve_dtype


def main(cfg: GenerateConfig) -> None:
    if cfg.output is not None:
        check_output(Path(cfg.output))
    device = resolve_device(cfg.device)
    tokenizer = Tokenizer.from_dir(cfg.tokenizer.path or cfg.checkpoint.dir)
    if cfg.interactive and tokenizer.chat_template is None:
        raise ConfigError(
            "interactive=true needs a chat template, and the tokenizer has none: put a "
            "chat_template.jinja beside its tokenizer.json, or ask with prompt='...'"
        )
    prompts = [] if cfg.interactive else find_prompts(cfg, tokenizer)
    arch = read_arch(cfg.checkpoint.dir, format=cfg.checkpoint.format)
    check_prompts(prompts, arch)
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
    if cfg.interactive:
        converse(answer, cfg, tokenizer, arch)
        return
    results: list[dict[str, Any]] = []
    for start in range(0, len(prompts), cfg.batch_size):
        batch = prompts[start : start + cfg.batch_size]
        ids = [prompt.ids for prompt in batch]
        steps = answer(ids)
        if len(batch) == 1 and cfg.stream:
            show_prompt(batch[0], prompts)
            answers = [print_answer(steps, tokenizer)]
        else:
            rows = list(steps)
            answers = [[t for row in rows if (t := row[i]) is not None] for i in range(len(batch))]
            for prompt, tokens in zip(batch, answers, strict=True):
                show_prompt(prompt, prompts)
                print(tokenizer.decode(tokens))
        limit = max_steps(arch, ids, cfg.max_new_tokens)
        for prompt, tokens in zip(batch, answers, strict=True):
            results.append(to_result(prompt, tokens, limit, tokenizer))
    if cfg.output is not None:
        lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in results]
        write_whole(Path(cfg.output), "".join(lines).encode("utf-8", "replace"))
        print(f"wrote {cfg.output}")


def check_output(path: Path) -> None:
    check_writable(path, "output")
    if path.exists():
        raise ConfigError(f"output={path} exists; choose another name")


def find_prompts(cfg: GenerateConfig, tokenizer: Tokenizer) -> list[Prompt]:
    if cfg.prompts_file is None:
        row = {"prompt": cfg.prompt}
        return [row_to_prompt(row, tokenizer, chat=cfg.chat, system=cfg.system)]
    columns = asdict(cfg.data.columns)
    return read_prompts(
        cfg.prompts_file, tokenizer, chat=cfg.chat, system=cfg.system, columns=columns
    )


def check_prompts(prompts: Sequence[Prompt], arch: LlamaArch) -> None:
    for prompt in prompts:
        try:
            check_prompt(arch, prompt.ids)
        except QLoRAError as error:
            raise QLoRAError(f"{prompt.where}{error}") from error


def show_prompt(prompt: Prompt, prompts: Sequence[Prompt]) -> None:
    """Before its answer, where there are several."""
    if len(prompts) > 1:
        print(f">>> {prompt.last_message}")


def print_answer(
    steps: Iterable[Sequence[int | None]], tokenizer: Tokenizer, *, stream: bool = True
) -> list[int]:
    """Print text as it becomes certain: a character may need several tokens to be complete."""
    ids: list[int] = []
    shown = ""
    for (token,) in steps:
        assert token is not None
        ids.append(token)
        text = tokenizer.decode(ids) if stream else ""
        if not text.endswith("\ufffd"):
            print(text.removeprefix(shown), end="", flush=True)
            shown = text
    print(tokenizer.decode(ids).removeprefix(shown))
    return ids


def converse(
    answer: Callable[..., Iterator[list[int | None]]],
    cfg: GenerateConfig,
    tokenizer: Tokenizer,
    arch: LlamaArch,
) -> None:
    """Answer line by line, each with all that was said before."""
    if sys.stdin.isatty():
        with suppress(ImportError):  # some Pythons are built without it
            import_module("readline")  # so that input() edits lines, of any length
    messages = [{"role": "system", "content": cfg.system}] if cfg.system else []
    try:
        while (line := read_line()) is not None:
            messages.append({"role": "user", "content": line})
            ids = encode_prompt(messages, tokenizer, plain=False)
            if len(ids) >= arch.max_position_embeddings:
                raise QLoRAError(
                    f"the conversation has {len(ids)} tokens, which leaves no room for an answer "
                    f"in the model's {arch.max_position_embeddings} positions; start a new one"
                )
            tokens = print_answer(answer([ids]), tokenizer, stream=cfg.stream)
            messages.append({"role": "assistant", "content": tokenizer.decode(tokens)})
    except KeyboardInterrupt:
        print()


def read_line() -> str | None:
    """What the user says next; None at the end of the input."""
    is_terminal = sys.stdin.isatty()
    try:
        while True:
            line = input(">>> " if is_terminal else "")
            if line.strip():
                return line
    except EOFError:
        if is_terminal:
            print()
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"stdin: not UTF-8 text: {error.reason} at {error.start}") from error


def to_result(
    prompt: Prompt, tokens: Sequence[int], limit: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """A row of `output`; `limit` tokens are as many as there could be."""
    row = prompt.asked | {"answer": tokenizer.decode(tokens)}
    if prompt.reference is not None:
        row["reference"] = prompt.reference
    row["num_tokens"] = len(tokens)
    row["finish_reason"] = "stop" if len(tokens) < limit else "length"
    return row


if __name__ == "__main__":
    sys.exit(run_recipe(main, "generate"))
