"""Which precision each linear slot gets when all of them together may take so many bytes.

A setting is what a slot's weight can be stored as. Each costs bytes and a loss; losses of slots add
up. `choose` minimizes their sum under a budget, `uniform_plans` are the plans that need no choice,
and `to_rules` writes either as rules of the component plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_builders.errors import CheckpointError
from qlora_builders.tensor import to_nf4

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
