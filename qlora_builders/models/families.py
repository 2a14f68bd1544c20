"""Model families: what a config.json of each does not say, one row a family.

A family is a Llama with other defaults, and with keys that it does not have; what differs in the
modules themselves are fields of `LlamaArch`. Rows are those of transformers' config classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_builders.errors import QLoRAError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Family:
    """
    Attributes:
        architecture: transformers' class, as config.json names it.
        defaults: what a missing key of config.json stands for, where that is not as for a Llama.
        fixed: keys that the family does not read.
        only: keys with the one value of which models can be built so far.
    """

    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM"),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 2**17,
            "sliding_window": 4096,
        },
        fixed={"attention_bias": False, "mlp_bias": False},
        only={"sliding_window": None},
    ),
}


def family_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with all that its family says too.

    Raises:
        QLoRAError: for a family that cannot be built, or a key of one that has another value than
            it can have.
    """
    name = config.get("model_type", "llama")
    if not isinstance(name, str) or name not in FAMILIES:
        raise QLoRAError(f"model_type is {name!r}{did_you_mean(str(name), FAMILIES)}")
    family = FAMILIES[name]
    whole = {**family.defaults, **config, **family.fixed}
    for key, value in family.only.items():
        if whole.get(key) != value:
            shown = "null" if value is None else value
            raise QLoRAError(
                f"{key} is {whole.get(key)!r}; of {name} models only those with {key} {shown} "
                "can be built so far (a missing key is no null)"
            )
    return whole
