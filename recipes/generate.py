"""Answer prompts with a checkpoint, or a checkpoint and an adapter.

qlora generate prompt="..." [checkpoint.dir=...] [adapter.path=...]
qlora generate prompts_file=rows.jsonl output=answers.jsonl
qlora generate interactive=true
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any

import torch

from qlora_builders.checkpoint import load_with_adapter, read_adapter, read_arch
from qlora_builders.config.entry import run_recipe
from qlora_builders.config.schema import GenerateConfig
from qlora_builders.console import PlainConsole
from qlora_builders.data import Prompt, Tokenizer, encode_prompt, read_prompts, row_to_prompt
from qlora_builders.errors import ConfigError, DataError, QLoRAError, counted
from qlora_builders.files.outputs import check_new, growing
from qlora_builders.models import LlamaArch, check_prompt, generate_batch, max_steps
from qlora_builders.training.device import resolve_compute_dtype, resolve_device, resolve_dtype
from qlora_builders.visible import say, visible, visible_json

Answer = Callable[..., Iterator[list[int | None]]]
RESULTS = ("answer", "reference", "num_tokens", "finish_reason")


def main(cfg: GenerateConfig) -> None:
    if cfg.output is not None:
        check_new(Path(cfg.output), "output", grows=True)
    device = resolve_device(cfg.device)
    tokenizer = Tokenizer.from_dir(cfg.tokenizer.path or cfg.checkpoint.dir)
    if cfg.interactive and tokenizer.chat_template is None:
        raise ConfigError(
            "interactive=true needs a chat template, and the tokenizer has none: put a "
            "chat_template.jinja beside its tokenizer.json, or ask with prompt='...'"
        )
    arch = read_arch(cfg.checkpoint.dir, format=cfg.checkpoint.format)
    if cfg.adapter.path is not None:
        read_adapter(cfg.adapter.path)
    prompts = [] if cfg.interactive else find_prompts(cfg, tokenizer, arch)
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
    elif cfg.output is None:
        print_answers(answer, prompts, cfg, tokenizer)
    else:
        write_answers(answer, prompts, cfg, tokenizer, arch)


def find_prompts(cfg: GenerateConfig, tokenizer: Tokenizer, arch: LlamaArch) -> list[Prompt]:
    options: dict[str, Any] = {"chat": cfg.chat, "system": cfg.system}
    if cfg.prompts_file is None:
        prompts = [row_to_prompt({"prompt": cfg.prompt}, tokenizer, **options)]
    else:
        names = asdict(cfg.data.columns)
        prompts = read_prompts(cfg.prompts_file, tokenizer, columns=names, **options)
    for prompt in prompts:
        try:
            check_prompt(arch, prompt.ids)
        except QLoRAError as error:
            raise QLoRAError(f"{prompt.where}{error}") from error
    return prompts


def print_answers(
    answer: Answer, prompts: Sequence[Prompt], cfg: GenerateConfig, tokenizer: Tokenizer
) -> None:
    for batch in batches(prompts, cfg.batch_size):
        steps = answer([prompt.ids for prompt in batch])
        if len(batch) == 1 and cfg.stream:
            show_prompt(batch[0], prompts)
            print_answer(steps, tokenizer)
            continue
        for prompt, tokens in zip(batch, columns(steps, len(batch)), strict=True):
            show_prompt(prompt, prompts)
            print(visible(tokenizer.decode(tokens)))


def write_answers(
    answer: Answer,
    prompts: Sequence[Prompt],
    cfg: GenerateConfig,
    tokenizer: Tokenizer,
    arch: LlamaArch,
) -> None:
    """A row for each, as soon as its batch is answered."""
    assert cfg.output is not None
    total = ceil(len(prompts) / cfg.batch_size)
    console = PlainConsole(stderr=True)
    with growing(Path(cfg.output)) as write:
        for batch in console.track(batches(prompts, cfg.batch_size), "answering", total):
            ids = [prompt.ids for prompt in batch]
            limit = max_steps(arch, ids, cfg.max_new_tokens)
            for prompt, tokens in zip(batch, columns(answer(ids), len(batch)), strict=True):
                row = to_result(prompt, tokens, limit, tokenizer)
                write(f"{visible_json(row)}\n".encode())
    say(f"wrote {cfg.output} ({counted(len(prompts), 'answer')})")


def to_result(
    prompt: Prompt, tokens: Sequence[int], limit: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """A row of `output`; `limit` tokens are as many as there could be.

    The row's own columns come first; one that has the name of a result gives way to it.
    """
    row = {k: v for k, v in prompt.others.items() if k not in RESULTS}
    row |= prompt.asked | {"answer": tokenizer.decode(tokens)}
    if prompt.reference is not None:
        row["reference"] = prompt.reference
    row["num_tokens"] = len(tokens)
    row["finish_reason"] = "stop" if len(tokens) < limit else "length"
    return row


def batches(prompts: Sequence[Prompt], size: int) -> Iterator[Sequence[Prompt]]:
    return (prompts[start : start + size] for start in range(0, len(prompts), size))


def columns(steps: Iterable[Sequence[int | None]], count: int) -> list[list[int]]:
    """The tokens of each of `count` answers that are generated side by side."""
    rows = list(steps)
    return [[t for row in rows if (t := row[i]) is not None] for i in range(count)]


def show_prompt(prompt: Prompt, prompts: Sequence[Prompt]) -> None:
    """Before its answer, where there are several."""
    if len(prompts) > 1:
        print(f">>> {visible(prompt.last_message)}")


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
            print(visible(text.removeprefix(shown)), end="", flush=True)
            shown = text
    print(visible(tokenizer.decode(ids).removeprefix(shown)))
    return ids


def converse(answer: Answer, cfg: GenerateConfig, tokenizer: Tokenizer, arch: LlamaArch) -> None:
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


if __name__ == "__main__":
    sys.exit(run_recipe(main, "generate"))
