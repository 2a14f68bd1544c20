"""What is measured of models beside each other: the base, the base in NF4, the base with its
adapter.

All models see the same rows, questions and documents, so the differences are taken of each of these
and then averaged. What makes one row harder than another drops out, and the standard error is that
of the difference rather than of two figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from qlora_builders.checkpoint import (
    adapter_plan,
    load_checkpoint,
    load_with_adapter,
    read_adapter,
    stored_dtype,
    stored_plan,
)
from qlora_builders.checkpoint.peft.read import NF4_BASE
from qlora_builders.data import Batch, TokenizedDataset
from qlora_builders.errors import ConfigError
from qlora_builders.models import ComponentRule, generate
from qlora_builders.modules import IGNORE_INDEX, CausalLM, sequence_log_probs
from qlora_builders.training.objectives import mean_and_error


@dataclass(frozen=True)
class Figure:
    """One number about a model.

    Attributes:
        value: the number.
        parts, weights: of every row, answer or document: what adds up to it; as for
            `mean_and_error`. Both are empty where it is no mean of such parts.
        is_share: the parts are right (1) or wrong (0).
    """

    value: float
    parts: Sequence[float] = ()
    weights: Sequence[float] = ()
    is_share: bool = False

    @property
    def error(self) -> float | None:
        """The standard error; None if there is none to tell. Of a share it is at least half the
        width of Wilson's interval for 0 of n (z = 1): n answers that are all wrong, or all alike,
        do not say that the next one is."""
        if not self.parts:
            return None
        error = mean_and_error(self.parts, self.weights)[1]
        if self.is_share:
            error = max(error, 0.5 / (len(self.parts) + 1))
        return error if math.isfinite(error) else None

    def minus(self, other: Figure) -> Figure:
        """The difference, paired by part; without an error where either has no parts."""
        value = self.value - other.value
        if not (self.parts and other.parts):
            return Figure(value)
        parts = [a - b for a, b in zip(self.parts, other.parts, strict=True)]
        return replace(self, value=value, parts=parts)


Figures = Mapping[str, Figure]


def mean_figure(parts: Sequence[float], weights: Sequence[float]) -> Figure:
    return Figure(mean_and_error(parts, weights)[0], parts, weights)


def share_figure(right: Sequence[bool]) -> Figure:
    return replace(mean_figure([float(one) for one in right], [1] * len(right)), is_share=True)


# ---- measuring ---------------------------------------------------------------------------------


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


# ---- telling -----------------------------------------------------------------------------------


def differences(models: Mapping[str, Figures]) -> list[dict[str, Any]]:
    """Each of the models and each one before it, for JSON."""

    def told(ours: Figure, theirs: Figure) -> dict[str, float | None]:
        difference = ours.minus(theirs)
        return {"difference": difference.value, "standard_error": difference.error}

    return [
        {
            "of": name,
            "from": before,
            "figures": {key: told(one, models[before][key]) for key, one in models[name].items()},
        }
        for before, name in combinations(models, 2)
    ]


def figure_table(figures: Figures) -> Table:
    """The figures of one model."""
    return comparison_table({"value": figures}, {})


def comparison_table(models: Mapping[str, Figures], against: Mapping[str, str]) -> Table:
    """A row per figure: every model, then every model minus the one named in `against`."""
    rows = {
        key: [cell(model[key]) for model in models.values()]
        + [cell(models[a][key].minus(models[b][key]), sign="+") for a, b in against.items()]
        for key in next(iter(models.values()))
    }
    told = any("±" in text for cells in rows.values() for text in cells)
    caption = "±: standard error" if told else None
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=caption)
    table.add_column("", overflow="fold")
    for column in [*models, *(f"{name}\n- {other}" for name, other in against.items())]:
        table.add_column(column, justify="right", no_wrap=True)
    for key, cells in rows.items():
        table.add_row(key, *cells)
    return table


def cell(figure: Figure, sign: str = "") -> str:
    """Two digits of the error, and of the value those that it leaves certain and two more."""
    value, error = figure.value, figure.error
    if error is None:
        return f"{value:{sign}.4f}"
    digits = min(8, max(0, 1 - math.floor(math.log10(error)))) if error else 4
    return f"{value:{sign}.{digits}f}\n± {error:.{digits}f}"


BASE, NF4, TUNED = "base", "base in NF4", "fine-tuned"


@dataclass(frozen=True)
class Candidate:
    """A model to be loaded when its turn comes.

    Attributes:
        against: the name of the candidate that it is compared with; None for the first.
    """

    name: str
    against: str | None
    load: Callable[[], CausalLM]


def find_candidates(
    path: str | Path,
    adapter: str | Path | None,
    *,
    quantize: str,
    dtype: torch.dtype | None,
    allow_base_mismatch: bool,
    **options: Any,
) -> list[Candidate]:
    """In the order of the table; what is not there to be compared is left out.

    The base in NF4 is what the adapter was trained on, without it: the same weights in the same
    NF4, bit for bit. Of an adapter on a plain base, or without an adapter, it is what `quantize`
    writes. Where the checkpoint itself holds NF4 there is no base in 16 bits.

    Args: as for `load_with_adapter`.

    Raises:
        CheckpointError: if either cannot be read.
        ConfigError: if there is nothing to compare.
    """
    stored = stored_plan(path, format=options["format"])
    nf4: Sequence[ComponentRule | dict[str, Any]] = stored or [NF4_BASE]
    base_dtype = dtype or stored_dtype(path, format=options["format"])
    trained_on = NF4 if stored else BASE
    if adapter is not None:
        info = read_adapter(adapter)
        rules = [ComponentRule.parse(r).frozen() for r in adapter_plan(info, quantize=quantize)[0]]
        if any(rule.base != "none" for rule in rules):
            nf4, trained_on = rules, NF4
        if dtype is None and info.base is not None:
            base_dtype = info.base.dtype
    elif stored:
        raise ConfigError(
            f"compare=true: {path} holds NF4 weights already, so without an adapter there is "
            "nothing to compare; set adapter.path, or checkpoint.dir to the 16-bit weights"
        )

    def base(rules: Sequence[ComponentRule | dict[str, Any]]) -> CausalLM:
        return load_checkpoint(path, rules, dtype=base_dtype, **options).eval()

    found = [] if stored else [Candidate(BASE, None, partial(base, []))]
    found.append(Candidate(NF4, None if stored else BASE, partial(base, nf4)))
    if adapter is not None:
        options_of_both = {"quantize": quantize, "dtype": dtype, **options}
        options_of_both["allow_base_mismatch"] = allow_base_mismatch
        tuned = partial(load_with_adapter, path, adapter, **options_of_both)
        found.append(Candidate(TUNED, trained_on, tuned))
    return found
