"""Plans compared on held-out data: their loss, how far they are from the unquantized model, and
whether a difference is more than chance.

The loss answers what perplexity asks, but on text that a model does not know well some changes of
its weights lower it by luck. The KL divergence from the unquantized model knows no luck. At every
position one token y is drawn from the unquantized model's prediction p, and for a plan's
prediction q

    r - 1 - log r,  r = q(y) / p(y),

has the divergence for its mean, is never negative and hardly noisy
(http://joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_builders.analysis.precision import Choice
from qlora_builders.analysis.sensitivity import draw_tokens
from qlora_builders.errors import TrainingError
from qlora_builders.modules import IGNORE_INDEX, CausalLM, log_probabilities, trained_rows
from qlora_builders.training.objectives import Batch, mean_and_error

STANDARD_ERRORS = 2.0  # a smaller difference is a tie: 1 in 40 such wins would be luck


@dataclass(frozen=True)
class Figures:
    """Of one batch: sums over its target tokens, and their number."""

    loss: float
    kl: float
    tokens: int


@dataclass(frozen=True)
class Measured:
    """A plan and its figures on held-out data, in the same batches for every plan."""

    name: str
    choice: Choice
    figures: Sequence[Figures]

    loss = property(lambda self: self.mean("loss"))  # nats per target token
    kl = property(lambda self: self.mean("kl"))  # the same

    def mean(self, name: str) -> float:
        return sum(getattr(f, name) for f in self.figures) / sum(f.tokens for f in self.figures)


class HeldOut:
    """Held-out batches, and a token for each target that the unquantized model draws there.

    Memory: 12 bytes per target token beside the batches.

    Raises:
        TrainingError: if the data has no target tokens.
    """

    def __init__(self, model: CausalLM, batches: Iterable[Batch], *, seed: int) -> None:
        self.batches = list(batches)
        self.drawn: list[tuple[Tensor, Tensor]] = []  # [n] tokens and [n] their log p, per batch
        for index, batch in enumerate(self.batches):
            generator = torch.Generator(batch.input_ids.device).manual_seed(seed + index)
            tokens, log_p = [batch.labels.new_empty(0)], [torch.empty(0, device=generator.device)]
            for log_probs in log_probabilities(model.lm_head, _rows(model, batch)):
                tokens.append(draw_tokens(log_probs, generator))
                log_p.append(_at(log_probs, tokens[-1]))
            self.drawn.append((torch.cat(tokens), torch.cat(log_p)))
        if not any(len(tokens) for tokens, _ in self.drawn):
            raise TrainingError("nothing to compare on: the held-out data has no target tokens")

    def figures(self, model: CausalLM) -> list[Figures]:
        """Of every batch, for the model that a plan gives."""
        found = []
        for batch, (tokens, log_p) in zip(self.batches, self.drawn, strict=True):
            targets = batch.labels[:, 1:][batch.labels[:, 1:] != IGNORE_INDEX]
            loss, kl, start = 0.0, 0.0, 0
            for log_probs in log_probabilities(model.lm_head, _rows(model, batch)):
                part = slice(start, start + len(log_probs))
                loss -= _at(log_probs, targets[part]).double().sum().item()
                log_r = (_at(log_probs, tokens[part]) - log_p[part]).double()
                kl += (log_r.expm1() - log_r).sum().item()
                start = part.stop
            found.append(Figures(loss, kl, len(targets)))
        return found


@torch.no_grad()
def _rows(model: CausalLM, batch: Batch) -> Tensor:
    model.eval()
    hidden = model.model(batch.input_ids, document_ids=batch.document_ids)
    return trained_rows(hidden, batch.labels)[0]


def _at(log_probs: Tensor, tokens: Tensor) -> Tensor:
    return log_probs.gather(1, tokens[:, None])[:, 0]


def paired_difference(ours: Measured, theirs: Measured, name: str) -> tuple[float, float]:
    """(mean `loss` or `kl` of ours - theirs, its standard error over the batches)."""
    pairs = list(zip(ours.figures, theirs.figures, strict=True))
    differences = [getattr(a, name) - getattr(b, name) for a, b in pairs]
    return mean_and_error(differences, [a.tokens for a, _ in pairs])


def decide(
    plan: Measured, uniform: Sequence[Measured], unquantized: Measured
) -> tuple[Measured, str]:
    """The one to use, and why.

    `plan`, if its loss is lower than that of the best uniform setting by more than chance; also if
    the losses are alike but it is closer to the unquantized model than any uniform setting is.
    """
    if not uniform:
        return plan, "no uniform setting fits the budget: the plan is written"
    best = min(uniform, key=lambda one: one.loss)
    closest = min(uniform, key=lambda one: one.kl)
    loss, loss_error = paired_difference(plan, best, "loss")
    kl, kl_error = paired_difference(plan, closest, "kl")
    figures = (
        f"the plan has loss {loss:+.5f} (standard error {loss_error:.5f}) beside {best.name!r} "
        f"and KL {kl:+.1e} ({kl_error:.0e}) beside {closest.name!r}"
    )
    if loss < -STANDARD_ERRORS * loss_error:
        return plan, f"better than uniform, and written: {figures}"
    luck, luck_error = paired_difference(best, unquantized, "loss")
    if luck < -STANDARD_ERRORS * luck_error:
        figures += (
            f"; {best.name!r} is even better than the unquantized model, which is luck on text "
            "that this model does not know: another data.eval would say more"
        )
    if loss > STANDARD_ERRORS * loss_error:
        return best, f"worse than uniform, which is written: {figures}"
    if kl < -STANDARD_ERRORS * kl_error:
        return plan, f"as good as uniform, closer to the unquantized model, and written: {figures}"
    return best, f"uniform is as good, and is written: {figures}"
