"""The component plan: which kind of layer fills each linear slot of a model, and how it is built.

A plan is an ordered list of rules; the last rule that matches a slot decides it. A slot that no
rule matches is a frozen `linear`. Nothing is silent: a rule that matches no slot, an unknown kind
or option, and an option that the kind does not take are errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from qlora_builders.errors import PlanError, did_you_mean
from qlora_builders.models.slot_patterns import match_names
from qlora_builders.modules import FrozenNF4Linear, Linear, LoRALinear, check_lora_options
from qlora_builders.modules.lora_init import DEFAULT, stored_rank
from qlora_builders.tensor import check_nf4_options

_NF4_OPTIONS = ("block_size", "scale_block_size", "scale_format", "scale_search")
_NF4_DEFAULTS = {"block_size": 64, "scale_block_size": 256, "scale_format": "geometric"}
_LORA_OPTIONS = (
    "rank", "alpha", "dropout", "use_rslora", "lora_bias", "use_dora", "init_lora_weights"
)  # fmt: skip
KINDS: dict[str, tuple[str, ...]] = {
    "linear": ("trainable",),
    "frozen_nf4": _NF4_OPTIONS,
    "lora": _LORA_OPTIONS,
    "qlora": _LORA_OPTIONS + _NF4_OPTIONS,
}
_MOST_RULES = 10_000  # the largest Llama has 883 slots
_INTEGERS = ("rank", "block_size", "scale_block_size")
_NUMBERS = ("alpha", "dropout")
_SWITCHES = ("use_rslora", "lora_bias", "use_dora", "trainable", "scale_search")


@dataclass(frozen=True, kw_only=True)
class ComponentRule:
    """One rule of a plan; None leaves an option at the component's default.

    Attributes:
        match: pattern of slot names without the leading `model.`; see `slot_patterns`.
        kind: `linear`, `frozen_nf4`, `lora` (plain base) or `qlora` (NF4 base).
        rank, alpha: of the adapter; both needed by `lora` and `qlora`.
        dropout, use_rslora, lora_bias, use_dora, init_lora_weights: of the adapter; see
            `LoRALinear`.
        block_size, scale_block_size, scale_format, scale_search: of the NF4 base; see `to_nf4`.
        trainable: train the weight itself, in float32; `linear` only.

    Raises:
        PlanError: for an unknown kind, an option the kind does not take, a missing or bad value.
    """

    match: str
    kind: str
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    use_rslora: bool | None = None
    lora_bias: bool | None = None
    use_dora: bool | None = None
    init_lora_weights: str | None = None
    block_size: int | None = None
    scale_block_size: int | None = None
    scale_format: str | None = None
    scale_search: bool | None = None
    trainable: bool | None = None

    def __post_init__(self) -> None:
        where = f"rule {self.match!r}"
        if not isinstance(self.match, str) or not isinstance(self.kind, str):
            raise PlanError(f"{where}, kind {self.kind!r}: match and kind must be strings")
        if self.kind not in KINDS:
            raise PlanError(f"{where}: unknown kind {self.kind!r}{did_you_mean(self.kind, KINDS)}")
        allowed = KINDS[self.kind]
        for name in self.options:
            if name not in allowed:
                raise PlanError(
                    f"{where}: kind {self.kind!r} does not take {name!r}; "
                    f"it takes {', '.join(allowed)}"
                )
        for names, types, wanted in (
            (_INTEGERS, (int,), "an integer"),
            (_NUMBERS, (int, float), "a number"),
            (_SWITCHES, (bool,), "true or false"),
        ):
            for name in names:
                value = getattr(self, name)
                if value is not None and type(value) not in types:  # True is an int to isinstance
                    raise PlanError(f"{where}: {name} is {value!r}; it must be {wanted}")
        try:
            if "rank" in allowed:
                if self.rank is None or self.alpha is None:
                    raise PlanError(f"kind {self.kind!r} needs rank and alpha")
                check_lora_options(
                    rank=self.rank,
                    alpha=self.alpha,
                    dropout=self.dropout or 0.0,
                    lora_bias=bool(self.lora_bias),
                    use_dora=bool(self.use_dora),
                    init_lora_weights=DEFAULT
                    if self.init_lora_weights is None
                    else self.init_lora_weights,
                    quantize_base=self.kind == "qlora",
                )
            nf4 = {name: value for name, value in self.options.items() if name in _NF4_OPTIONS}
            check_nf4_options(**{**_NF4_DEFAULTS, **nf4})
        except ValueError as error:
            raise PlanError(f"{where}: {error}") from error

    @property
    def options(self) -> dict[str, Any]:
        """The options that were given, without `match` and `kind`."""
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {k: v for k, v in given if v is not None and k not in ("match", "kind")}

    @property
    def trains(self) -> bool:
        return self.kind in ("lora", "qlora") or bool(self.trainable)

    @property
    def stored_rank(self) -> int | None:
        """The rank in an adapter file; None without an adapter."""
        return None if self.rank is None else stored_rank(self.rank, self.init_lora_weights)

    def frozen(self) -> ComponentRule:
        """The rule for the same base alone: no adapter, and nothing that trains."""
        kind = {"lora": "linear", "qlora": "frozen_nf4"}.get(self.kind, self.kind)
        kept = {k: v for k, v in self.options.items() if k in KINDS[kind] and k != "trainable"}
        return ComponentRule(match=self.match, kind=kind, **kept)

    @classmethod
    def parse(cls, rule: ComponentRule | Mapping[str, Any]) -> ComponentRule:
        """A rule from the mapping that YAML gives.

        Raises:
            PlanError: for a missing or unknown key, with the nearest spelling.
        """
        if isinstance(rule, ComponentRule):
            return rule
        if not isinstance(rule, Mapping):
            raise PlanError(
                f"rule {rule!r} is not a mapping; write {{match: ..., kind: {' | '.join(KINDS)}}}"
            )
        known = [f.name for f in fields(cls)]
        where = f"rule {rule.get('match', dict(rule))!r}"
        for key in rule:
            if key not in known:
                raise PlanError(f"{where}: unknown option {key!r}{did_you_mean(str(key), known)}")
        missing = [key for key in ("match", "kind") if key not in rule]
        if missing:
            raise PlanError(f"{where}: {' and '.join(missing)} missing")
        return cls(**rule)


def resolve(
    rules: Iterable[ComponentRule | Mapping[str, Any]], slots: Sequence[str]
) -> dict[str, ComponentRule]:
    """Decide every slot: slot name -> the rule that fills it.

    Raises:
        PlanError: for a bad rule, one with an alternative that matches no slot, or a plan with DoRA
            in some adapters only.
    """
    plan = {slot: ComponentRule(match=slot, kind="linear") for slot in slots}
    parsed = [ComponentRule.parse(rule) for rule in rules]
    if len(parsed) > _MOST_RULES:
        raise PlanError(f"{len(parsed):,} rules; at most {_MOST_RULES:,}, so write patterns")
    for rule in parsed:
        try:
            matched = match_names(rule.match, slots)
        except PlanError as error:
            raise PlanError(f"rule of kind {rule.kind!r}: {error}") from error
        plan.update(dict.fromkeys(matched, rule))
    _check_dora(plan.values())
    return plan


def _check_dora(rules: Iterable[ComponentRule]) -> None:
    """PEFT's files have one switch for all adapters."""
    dora = {bool(rule.use_dora): rule for rule in rules if rule.kind in ("lora", "qlora")}
    if len(dora) > 1:
        raise PlanError(
            f"rule {dora[True].match!r} has use_dora and rule {dora[False].match!r} has not; an "
            "adapter file is DoRA as a whole, so set it in all of the plan's adapters or in none"
        )


def build_linear(
    rule: ComponentRule,
    in_features: int,
    out_features: int,
    *,
    bias: bool,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> nn.Module:
    """The layer that `rule` asks for. A weight that trains is a float32 master whatever `dtype`."""
    options = rule.options
    if rule.kind == "linear":
        dtype = torch.float32 if rule.trains else dtype
        layer = Linear(in_features, out_features, bias, device=device, dtype=dtype)
        return layer.requires_grad_(rule.trains)
    if rule.kind == "frozen_nf4":
        return FrozenNF4Linear(
            in_features, out_features, bias, device=device, dtype=dtype, **options
        )
    try:
        return LoRALinear(
            in_features,
            out_features,
            bias=bias,
            quantize_base=rule.kind == "qlora",
            device=device,
            dtype=dtype,
            **options,
        )
    except ValueError as error:
        raise PlanError(f"rule {rule.match!r}: {error}") from error
