"""How much a model's predictions change when the weight of a linear slot does.

To second order, changing weights by dW moves the predictions by a KL divergence of 1/2 dW' F dW per
predicted token, with F the Fisher information: the second moment of the gradients that tokens drawn
from the model itself would give (Martens, https://arxiv.org/abs/1412.1193). Of F we keep the
diagonal, factored as in K-FAC (https://arxiv.org/abs/1503.05671): for a slot with inputs x_t and
gradients g_t with respect to its outputs,

    F[ij, ij] = sum_t g_ti^2 x_tj^2 / tokens  ~  outputs[i] * inputs[j].

`inputs` is a mean over positions weighted by |g_t|^2: first tokens have huge activations in Llamas
and next to no gradient. Rounding errors of neighbouring weights are as good as independent, so what
is off the diagonal adds little.

Shapes: in, out = features of a slot; n = positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_builders.errors import TrainingError
from qlora_builders.modules import (
    IGNORE_INDEX,
    CausalLM,
    chunked_next_token_loss,
    log_probabilities,
    num_target_tokens,
    trained_rows,
)
from qlora_builders.training.objectives import Batch

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Sensitivity:
    """The diagonal of a slot's Fisher information, per predicted token: outer(outputs, inputs)."""

    inputs: Tensor  # float32 [in], squared inputs
    outputs: Tensor  # float32 [out], squared gradients, summed over positions, per predicted token

    def predicted_kl(self, weight: Tensor, changed: Tensor) -> float:
        """KL divergence in nats per predicted token if `weight` [out, in] became `changed`.

        A few rows at a time, so no float32 copy of a weight is made.
        """
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        for start in range(0, len(weight), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            squares = (weight[rows].float() - changed[rows].float()).square_()
            total += (squares @ self.inputs).double() @ self.outputs[rows].double()
        return 0.5 * total.item()


class _Sums:
    """Running sums of one slot, float64: a long calibration adds small numbers to large ones."""

    inputs: Any = 0.0  # tensor [in], squared inputs weighted by |g|^2
    outputs: Any = 0.0  # tensor [out], squared gradients

    def add(self, input: Tensor, grad: Tensor) -> None:
        x, g = input.flatten(0, -2).float().square(), grad.flatten(0, -2).float().square()
        self.inputs = self.inputs + (g.sum(1) @ x).double()
        self.outputs = self.outputs + g.sum(0).double()

    def sensitivity(self, name: str, tokens: int) -> Sensitivity:
        total = self.outputs.sum()
        if not (torch.isfinite(total) and torch.isfinite(self.inputs).all()):
            raise TrainingError(
                f"{name}: a gradient of the calibration is not finite; try compute_dtype=float32"
            )
        weighted = self.inputs / total if total > 0 else self.inputs
        return Sensitivity(weighted.float(), (self.outputs / tokens).float())


def measure_sensitivity(
    model: CausalLM, slots: Mapping[str, nn.Module], batches: Iterable[Batch], *, seed: int
) -> dict[str, Sensitivity]:
    """Run the calibration `batches` forward and backward once; no weight gets a gradient.

    In memory beside the model: what backward needs of one batch, and two vectors per slot.

    Args:
        model: with plain, frozen weights.
        slots: name -> linear layer of the model.
        seed: fixes the tokens drawn from the model.

    Raises:
        TrainingError: if the batches hold no target token, or a prediction or a gradient is not
            finite.
    """
    sums = {name: _Sums() for name in slots}
    tokens = 0
    training = model.training
    model.eval()
    with _hooks(model, slots, sums):
        for batch in batches:
            hidden = model.model(batch.input_ids, document_ids=batch.document_ids)
            generator = torch.Generator(hidden.device).manual_seed(seed + tokens)
            labels = _drawn_labels(model.lm_head, hidden.detach(), batch.labels, generator)
            chunked_next_token_loss(hidden, labels, model.lm_head).backward()
            tokens += num_target_tokens(labels)
    model.train(training)
    if tokens == 0:
        raise TrainingError("nothing to measure on: the calibration data has no target tokens")
    return {name: one.sensitivity(name, tokens) for name, one in sums.items()}


@contextmanager
def _hooks(
    model: CausalLM, slots: Mapping[str, nn.Module], sums: Mapping[str, _Sums]
) -> Iterator[None]:
    """Every slot's inputs meet the gradients of its outputs in `sums`."""

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                input = inputs[0].detach()
                output.register_hook(lambda grad: sums[name].add(input, grad))

        return hook

    def start_graph(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output.requires_grad_()  # all weights are frozen: gradients begin here

    with ExitStack() as hooks:
        for name, module in slots.items():
            hooks.enter_context(module.register_forward_hook(watch(name)))
        hooks.enter_context(model.model.embed_tokens.register_forward_hook(start_graph))
        yield


def _drawn_labels(
    head: nn.Module, hidden: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """`labels` [b, s] with every target replaced by a token drawn from the model's prediction."""
    replaced = labels.clone()
    predictions = log_probabilities(head, trained_rows(hidden, labels)[0])
    drawn = [draw_tokens(log_probs, generator) for log_probs in predictions]
    if drawn:
        replaced[:, 1:][labels[:, 1:] != IGNORE_INDEX] = torch.cat(drawn)
    return replaced


def draw_tokens(log_probs: Tensor, generator: torch.Generator) -> Tensor:
    """[c]: one token of each row's distribution [c, vocab]."""
    return torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]
