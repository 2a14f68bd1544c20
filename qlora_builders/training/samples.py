"""Answers of the model to rows of its data: to look at, and to count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from qlora_builders.files.outputs import append_rows
from qlora_builders.models import generate
from qlora_builders.modules import CausalLM

SAMPLES_FILE = "samples.jsonl"


_MAX_NEW_TOKENS = 128


class Answerable(Protocol):
    """What is needed of a dataset."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def per_row(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...
    def prompt_and_answer(self, index: int) -> Any: ...


def answer_rows(
    model: CausalLM, data: Answerable, count: int, *, max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """Greedy answers to the first rows, compared with the reference without outer white space.

    Dropout is off meanwhile, and no random number is drawn.
    """
    training = model.training
    model.eval()
    try:
        yield from _answers(model, data, count, max_new_tokens)
    finally:
        model.train(training)


def _answers(
    model: CausalLM, data: Answerable, count: int, max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    for index in range(0, len(data), data.per_row)[:count]:
        prompt = data.prompt_and_answer(index)
        reference = prompt.reference.strip()
        tokens = generate(
            model,
            prompt.ids,
            max_new_tokens=max_new_tokens,
            stop_token_ids=data.tokenizer.stop_token_ids,
        )
        # layers compiled for training would be compiled again for each length of a sequence
        with torch.compiler.set_stance("force_eager"):
            answer = data.tokenizer.decode(list(tokens)).strip()
        yield {
            "row": data[index].row,
            **prompt.asked,
            "reference": reference,
            "answer": answer,
            "right": answer == reference,
        }


def add_samples(
    run_dir: Path | None, step: int, model: CausalLM, data: Answerable, count: int
) -> None:
    """Append the model's answers after `step` to the run's samples.jsonl.

    Args:
        run_dir: None on ranks that only take part in the forward passes.
    """
    rows = list(answer_rows(model, data, count, max_new_tokens=_MAX_NEW_TOKENS))
    if run_dir is not None:
        append_rows(run_dir / SAMPLES_FILE, [{"step": step, **row} for row in rows])
