"""Loss, perplexity and exact match of a model, each with the parts that it is the mean of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from qlora_builders.data import Batch, TokenizedDataset
from qlora_builders.evaluation.figures import Figure, mean_figure, share_figure
from qlora_builders.models import generate
from qlora_builders.modules import IGNORE_INDEX, CausalLM, sequence_log_probs


@torch.no_grad()
def measure_rows(model: CausalLM, batches: Iterable[Batch]) -> dict[str, Figure]:
    """Loss, nats per target token, and perplexity; their parts are rows, packed ones as one."""
    losses: list[float] = []
    tokens: list[int] = []
    for batch in batches:
        hidden = model.model(batch.input_ids, document_ids=batch.document_ids)
        log_probs = sequence_log_probs(hidden, batch.labels, model.lm_head)
        losses += (-log_probs).tolist()
        tokens += (batch.labels[:, 1:] != IGNORE_INDEX).sum(1).tolist()
    loss = mean_figure(losses, tokens)
    perplexity = math.exp(loss.value)
    # a small change of the loss moves perplexity by itself times so much
    parts = [perplexity * part for part in losses]
    return {"loss": loss, "perplexity": Figure(perplexity, parts, tokens)}


def measure_answers(
    model: CausalLM, data: TokenizedDataset, count: int, *, max_new_tokens: int
) -> tuple[Figure, list[dict[str, Any]]]:
    """The share of greedy answers to the first `count` rows that are the reference, and all of
    them as `answer_rows` gives them."""
    answers = list(answer_rows(model, data, count, max_new_tokens=max_new_tokens))
    return share_figure([answer["right"] for answer in answers]), answers


def answer_rows(
    model: CausalLM, data: TokenizedDataset, count: int, *, max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """Greedy answers to the first rows, compared with the reference without outer white space.

    Dropout is off meanwhile, and no random number is drawn.
    """
    training = model.training
    model.eval()
    try:
        for index in range(0, len(data), data.per_row)[:count]:
            prompt = data.prompt_and_answer(index)
            reference = (prompt.reference or "").strip()
            stop = data.tokenizer.stop_token_ids
            tokens = generate(model, prompt.ids, max_new_tokens=max_new_tokens, stop_token_ids=stop)
            # layers compiled for training would be compiled again for each length of a sequence
            with torch.compiler.set_stance("force_eager"):
                answer = data.tokenizer.decode(list(tokens)).strip()
            right = answer == reference
            told = {"reference": reference, "answer": answer, "right": right}
            yield {"row": data[index].row, **prompt.asked, **told}
    finally:
        model.train(training)
