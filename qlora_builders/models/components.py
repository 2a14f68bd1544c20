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
from qlora_builders.modules import (
    FrozenLinear,
    FrozenNF4Linear,
    Linear,
    LoRALinear,
    check_lora_options,
    stored_rank,
)
from qlora_builders.tensor import QUANTIZED_TYPES, Format

_MOST_RULES = 10_000  # the largest Llama has 883 slots
# What the weight is stored as, and what trains on it, with its options. A quantized base has those
# of its format, a plain weight alone `trainable`.
BASES: dict[str, type[Format] | None] = {
    "none": None,
    **{name: cls.kernels.format_type for name, cls in QUANTIZED_TYPES.items()},
}
ADAPTERS = {
    "none": (),
    "lora": (
        *("rank", "alpha", "dropout", "use_rslora", "lora_bias", "use_dora"),
        "init_lora_weights",
    ),
}
# kind -> (base, adapter)
KINDS = {
    "linear": ("none", "none"),
    "frozen_nf4": ("nf4", "none"),
    "lora": ("none", "lora"),
    "qlora": ("nf4", "lora"),
}
_PARTS = ("match", "kind", "base", "adapter")
# annotation of an option -> its types; True is an int to isinstance. Strings are checked by value.
_TYPES: dict[Any, tuple[tuple[type, ...], str]] = {
    "int | None": ((int,), "an integer"),
    "float | None": ((int, float), "a number"),
    "bool | None": ((bool,), "true or false"),
}


def takes(base: str, adapter: str) -> tuple[str, ...]:
    """The options of a rule with this base and adapter."""
    if base == adapter == "none":
        return ("trainable",)
    format_type = BASES[base]
    return (*ADAPTERS[adapter], *(() if format_type is None else format_type().options))


@dataclass(frozen=True, kw_only=True)
class ComponentRule:
    """One rule of a plan; None leaves an option at the component's default.

    Attributes:
        match: pattern of slot names without the leading `model.`; see `slot_patterns`.
        base, adapter: what the weight is stored as (`none`, `nf4`, ...), and what trains on it
            (`none`, `lora`); a rule that gives one of them leaves the other at `none`.
        kind: shorthand for both: `linear`, `frozen_nf4`, `lora` (plain base) or `qlora` (NF4 base).
            Rules of either spelling are equal; empty where no kind says the same.
        rank, alpha: of the adapter; both needed.
        dropout, use_rslora, lora_bias, use_dora, init_lora_weights: of the adapter; see
            `LoRALinear`.
        block_size, scale_block_size, scale_format, scale_search: of the NF4 base; see `to_nf4`.
        trainable: train the weight itself, in float32; `linear` only.

    Raises:
        PlanError: for an unknown kind, base or adapter, a kind that contradicts them, an option
            that they do not take, a missing or bad value.
    """

    match: str
    kind: str = ""
    base: str = ""
    adapter: str = ""
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
        if not all(isinstance(getattr(self, part), str) for part in _PARTS):
            said = ", ".join(f"{part} {getattr(self, part)!r}" for part in _PARTS[1:])
            raise PlanError(
                f"{where}, {said}: match and kind must be strings, and so must base and adapter"
            )
        try:
            self._resolve_kind()
            self._check_types()
            if self.adapter == "lora":
                self._check_lora()
            _ = self.format
        except ValueError as error:
            raise PlanError(f"{where}: {error}") from error

    def _resolve_kind(self) -> None:
        """All three are set, whichever of them were given."""
        for part, known in (("kind", KINDS), ("base", BASES), ("adapter", ADAPTERS)):
            value = getattr(self, part)
            if value and value not in known:
                raise PlanError(f"unknown {part} {value!r}{did_you_mean(value, known)}")
        if not (self.kind or self.base or self.adapter):
            raise PlanError("kind missing, or base and adapter")
        if self.kind:
            base, adapter = KINDS[self.kind]
            for part, value in (("base", base), ("adapter", adapter)):
                if getattr(self, part) not in ("", value):
                    raise PlanError(
                        f"kind {self.kind!r} has {part} {value!r}, which {part} "
                        f"{getattr(self, part)!r} contradicts; drop one of them"
                    )
        else:
            base, adapter = self.base or "none", self.adapter or "none"
        kind = next((name for name, parts in KINDS.items() if parts == (base, adapter)), "")
        for part, value in (("kind", kind), ("base", base), ("adapter", adapter)):
            object.__setattr__(self, part, value)

    def _check_types(self) -> None:
        taken = takes(self.base, self.adapter)
        annotations = {f.name: f.type for f in fields(self)}
        for name, value in self.options.items():
            if name not in taken:
                listed = ", ".join(taken) or "no options"
                raise PlanError(f"{self._said} does not take {name!r}; it takes {listed}")
            types, wanted = _TYPES.get(annotations[name], ((type(value),), ""))
            if type(value) not in types:
                raise PlanError(f"{name} is {value!r}; it must be {wanted}")

    def _check_lora(self) -> None:
        if self.rank is None or self.alpha is None:
            raise PlanError(f"{self._said} needs rank and alpha")
        given = {"dropout": 0.0} | self._given(ADAPTERS["lora"])
        given.pop("use_rslora", None)
        check_lora_options(**given, quantize_base=self.base != "none")

    @property
    def _said(self) -> str:
        return f"kind {self.kind!r}" if self.kind else f"{self.name!r}"

    @property
    def name(self) -> str:
        """For tables: the kind, or "mxfp4", "mxfp4 + lora"."""
        adapter = "" if self.adapter == "none" else f" + {self.adapter}"
        return self.kind or self.base + adapter

    @property
    def format(self) -> Format | None:
        """Of the base; None where that is plain."""
        format_type = BASES[self.base]
        if format_type is None:
            return None
        return format_type(**self._given(format_type().options))

    @property
    def options(self) -> dict[str, Any]:
        """The options that were given, without what they are options of."""
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {k: v for k, v in given if v is not None and k not in _PARTS}

    def _given(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if name in names}

    @property
    def spelled(self) -> dict[str, Any]:
        """The mapping that `parse` takes: by kind where there is one, as releases before bases and
        adapters read it."""
        parts = {"kind": self.kind} if self.kind else {"base": self.base, "adapter": self.adapter}
        return {"match": self.match, **parts, **self.options}

    @property
    def trains(self) -> bool:
        return self.adapter != "none" or bool(self.trainable)

    @property
    def stored_rank(self) -> int | None:
        """The rank in an adapter file; None without an adapter."""
        return None if self.rank is None else stored_rank(self.rank, self.init_lora_weights)

    def frozen(self) -> ComponentRule:
        """The rule for the same base alone: no adapter, and nothing that trains."""
        kept = {*takes(self.base, "none")} - {"trainable"}
        return ComponentRule(match=self.match, base=self.base, **self._given(kept))

    @classmethod
    def of_format(cls, match: str, format: Format) -> ComponentRule:
        """A frozen base of this format."""
        return cls(match=match, base=format.name, **format.options)

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
        missing = [] if "match" in rule else ["match"]
        if not {"kind", "base", "adapter"} & set(rule):
            missing.append("kind")
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
            raise PlanError(f"rule of {rule._said}: {error}") from error
        plan.update(dict.fromkeys(matched, rule))
    _check_dora(plan.values())
    return plan


def _check_dora(rules: Iterable[ComponentRule]) -> None:
    """PEFT's files have one switch for all adapters."""
    dora = {bool(rule.use_dora): rule for rule in rules if rule.adapter != "none"}
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
    shape: dict[str, Any] = {"in_features": in_features, "out_features": out_features, "bias": bias}
    shape["device"], format = device, rule.format
    if rule.adapter == "none":
        if format is None:
            dtype = torch.float32 if rule.trains else dtype
            return Linear(**shape, dtype=dtype).requires_grad_(rule.trains)
        if rule.base == "nf4":  # has a public layer of its own
            return FrozenNF4Linear(**shape, dtype=dtype, **rule.options)
        return FrozenLinear(**shape, format=format, dtype=dtype)
    try:
        options = rule._given(ADAPTERS[rule.adapter])
        return LoRALinear(**shape, quantize_base=format or False, dtype=dtype, **options)
    except ValueError as error:
        raise PlanError(f"rule {rule.match!r}: {error}") from error
