"""The models that evaluate compares: the base, the base in NF4, and the base with its adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora_builders.checkpoint import (
    adapter_plan,
    load_checkpoint,
    load_with_adapter,
    read_adapter,
    stored_dtype,
    stored_plan,
)
from qlora_builders.checkpoint.peft.read import NF4_BASE
from qlora_builders.errors import ConfigError
from qlora_builders.models import ComponentRule
from qlora_builders.modules import CausalLM

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
