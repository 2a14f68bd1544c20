"""Which precision each linear slot gets when all of them together may take so many bytes.

A setting is what a slot's weight can be stored as. Each costs bytes and a loss; losses of slots add
up. `choose` minimizes their sum under a budget, `uniform_plans` are the plans that need no choice,
and `to_rules` writes either as rules of the component plan.

Plans are compared on held-out data by their loss and their distance from the unquantized model,
with what is chance of it. The loss answers what perplexity asks, but on text that a model does not
know well some changes of its weights lower it by luck. The KL divergence from the unquantized model
knows no luck. At every position one token y is drawn from the unquantized model's prediction p, and
for a plan's prediction q

    r - 1 - log r,  r = q(y) / p(y),

has the divergence for its mean, is never negative and hardly noisy
(http://joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora_builders.analysis.sensitivity import draw_tokens
from qlora_builders.errors import CheckpointError, TrainingError
from qlora_builders.modules import IGNORE_INDEX, CausalLM, log_probabilities, trained_rows
from qlora_builders.tensor import to_nf4
from qlora_builders.training.objectives import Batch, mean_and_error

_UNITS = 1 << 16
_ADAPTED = {"frozen_nf4": "qlora", "linear": "lora"}


@dataclass(frozen=True)
class Setting:
    """A component for a frozen weight: a kind without an adapter, and its NF4 options."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """ "nf4 32 search": block size, then what is not the default."""
        if self.kind == "linear":
            return self.kind
        words = ["nf4", str(self.options["block_size"])]
        words += ["search"] if self.options.get("scale_search") else []
        format = self.options.get("scale_format")
        return " ".join([*words, f"scale_format={format}"] if format else words)

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes of a weight as it is stored: codes, scales and groups, or elements."""
        weight = torch.empty(*shape, dtype=dtype, device="meta")
        return weight.nbytes if self.kind == "linear" else to_nf4(weight, **self.options).nbytes


def _nf4(block_size: int, **options: Any) -> Setting:
    return Setting("frozen_nf4", {"block_size": block_size, **options})


PLAIN = Setting("linear")
# The second is what everybody means by NF4. Searched scales cost no bytes, so the other block sizes
# have them; float32 scales cost more than halving the blocks does, and `bnb` ones what ours do.
SETTINGS = (
    _nf4(32, scale_search=True),
    _nf4(64),
    _nf4(64, scale_search=True),
    _nf4(128, scale_search=True),
    _nf4(256, scale_search=True),
    _nf4(32, scale_search=True, scale_format="none"),
    _nf4(64, scale_search=True, scale_format="none"),
    PLAIN,
)


@dataclass(frozen=True)
class Option:
    """A setting for one slot: what it takes and what it is predicted to cost."""

    setting: Setting
    nbytes: int
    loss: float  # any unit; those of all slots are added up


Options = dict[str, Sequence[Option]]  # slot -> what it can be
Choice = dict[str, Option]


def measure_options(
    weights: Mapping[str, torch.Tensor],
    predict: Callable[[str, torch.Tensor, torch.Tensor], float],
) -> Iterator[tuple[str, list[Option]]]:
    """(slot, options), one slot and one quantized weight at a time.

    Args:
        weights: slot -> plain weight [out, in].
        predict: (slot, weight, what it is stored as) -> loss.

    Raises:
        CheckpointError: for a weight with NaN or infinity.
    """
    for slot, weight in weights.items():
        options = []
        for setting in SETTINGS:
            loss = 0.0
            if setting != PLAIN:
                try:
                    stored = to_nf4(weight, **setting.options).dequantize()
                except ValueError as error:
                    raise CheckpointError(f"{slot}.weight: {error}") from error
                loss = predict(slot, weight, stored)
            options.append(Option(setting, setting.nbytes(weight.shape, weight.dtype), loss))
        yield slot, options


def total_bytes(choice: Mapping[str, Option]) -> int:
    return sum(option.nbytes for option in choice.values())


def total_loss(choice: Mapping[str, Option]) -> float:
    return sum(option.loss for option in choice.values())


def smallest(options: Options) -> Choice:
    """The least bytes, and of equal ones the least loss."""
    return {slot: min(some, key=lambda o: (o.nbytes, o.loss)) for slot, some in options.items()}


def uniform_plans(options: Options) -> dict[str, Choice]:
    """One NF4 setting for all decoder layers, and a head of its own in 16 bits or in NF4 too."""

    def with_setting(setting: Setting) -> Choice:
        return {
            slot: next(option for option in some if option.setting == setting)
            for slot, some in options.items()
        }

    plans, head = {}, {k: v for k, v in with_setting(PLAIN).items() if k == "lm_head"}
    for setting in SETTINGS[:-1]:  # the last is PLAIN
        everywhere = with_setting(setting)
        if head:
            plans[f"{setting.name}, head too"] = everywhere
        plans[setting.name] = everywhere | head
    return plans


def choose(options: Options, budget: int) -> Choice:
    """The plan of least predicted loss in at most `budget` bytes; the same one every time.

    Dynamic programming over the bytes that are left beside the smallest plan, counted in units: up
    to 2^16 bytes that is exact, beyond that a slot's bytes are rounded up to a 2^16th of them. A
    uniform plan that is better for that is taken.

    Raises:
        AssertionError: if the smallest plan is over the budget; callers check that first.
    """
    least = smallest(options)
    left = budget - total_bytes(least)
    assert left >= 0
    unit = -(-left // _UNITS) or 1
    units = left // unit
    losses = torch.zeros(units + 1, dtype=torch.float64)  # [b]: of the slots so far in b units
    picks = []
    for slot, some in options.items():
        longer, pick = torch.full_like(losses, torch.inf), torch.zeros(units + 1, dtype=torch.int8)
        for index, option in enumerate(some):
            used = _units(option, least[slot], unit)
            if used <= units:
                loss = losses[: units + 1 - used] + option.loss
                better = loss < longer[used:]
                longer[used:] = torch.where(better, loss, longer[used:])
                pick[used:][better] = index
        losses = longer
        picks.append(pick)
    choice: Choice = {}
    for slot, pick in zip(reversed(options), reversed(picks), strict=True):
        choice[slot] = options[slot][int(pick[units])]
        units -= _units(choice[slot], least[slot], unit)
    choice = {slot: choice[slot] for slot in options}
    fitting = [plan for plan in uniform_plans(options).values() if total_bytes(plan) <= budget]
    return min([choice, *fitting], key=total_loss)


def _units(option: Option, least: Option, unit: int) -> int:
    return -(-(option.nbytes - least.nbytes) // unit)


# ---- rules --------------------------------------------------------------------------------------


def to_rules(
    choice: Mapping[str, Option], *, rank: int | None = None, alpha: float | None = None
) -> list[dict[str, Any]]:
    """Component rules that give every slot its setting: the commonest one for all layers, then
    those that differ, with equal layers and projections in one rule.

    Args:
        rank, alpha: of an adapter on every projection of the decoder layers; None: no adapters.
    """
    layers = {slot: option.setting for slot, option in choice.items() if slot != "lm_head"}
    settings = list(layers.values())
    commonest = max(dict.fromkeys(settings), key=settings.count)
    # {setting: {projection: [layer, ...]}}
    differing: dict[Setting, dict[str, list[int]]] = {}
    for slot, setting in layers.items():
        if setting != commonest:
            _, index, projection = slot.split(".", 2)
            differing.setdefault(setting, {}).setdefault(projection, []).append(int(index))
    num_layers = 1 + max(int(slot.split(".")[1]) for slot in layers)
    rules = [("layers.**", commonest)]
    for setting, where in differing.items():
        rules += [(match, setting) for match in _patterns(where, num_layers)]
    adapter = {} if rank is None else {"rank": rank, "alpha": alpha}
    written = []
    for match, setting in rules:
        kind = _ADAPTED[setting.kind] if adapter else setting.kind
        written.append({"match": match, "kind": kind, **adapter, **setting.options})
    head = choice.get("lm_head")
    if head is not None and head.setting != PLAIN:
        written.append({"match": "lm_head", "kind": head.setting.kind, **head.setting.options})
    return written


def _patterns(where: Mapping[str, list[int]], num_layers: int) -> Iterator[str]:
    """{"mlp.up_proj": [0, 1], "mlp.down_proj": [0, 1]} -> "layers.[0-1].mlp.{up,down}_proj"."""
    together: dict[tuple[int, ...], list[str]] = {}
    for projection, layers in where.items():
        together.setdefault(tuple(layers), []).append(projection)
    for indices, projections in together.items():
        names = [name.split(".")[1] for name in projections]
        parts = {name.split(".")[0] for name in projections}
        part = parts.pop() if len(parts) == 1 else "*"
        yield f"layers.{_layers(indices, num_layers)}.{part}.{_alternatives(names)}"


def _layers(layers: Sequence[int], num_layers: int) -> str:
    if len(layers) == num_layers:
        return "*"
    if len(layers) > 1 and layers[-1] - layers[0] == len(layers) - 1:
        return f"[{layers[0]}-{layers[-1]}]"
    return _alternatives([str(layer) for layer in layers])


def _alternatives(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else "{" + ",".join(names) + "}"


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
