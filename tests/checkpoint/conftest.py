"""Tiny Llama checkpoints written by transformers, once per session, and models to compare with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from shared import QLORA, SIZES, Build, Checkpoints, Logits, Randomize, Reference
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from qlora_builders.checkpoint import load_checkpoint
from qlora_builders.modules import CausalLM, LoRALinear

disable_progress_bar()

VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True, "vocab_size": 53},
    "biased": {
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 12,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "linear_rope": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    },
}
COMPANIONS = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"model_max_length": 64}',
    "chat_template.jinja": "{{ messages }}",
}


def build_reference(variant: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            **SIZES,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 5,
            "eos_token_id": [6, 7],
        }
        | VARIANTS[variant]
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name:
                parameter += 1
    return model


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """(variant, dtype, sharded) -> a directory that tests must not change."""
    written: dict[tuple, Path] = {}

    def checkpoint(
        variant: str = "gqa", dtype: torch.dtype = torch.float32, sharded: bool = False
    ) -> Path:
        key = (variant, dtype, sharded)
        if key not in written:
            path = tmp_path_factory.mktemp(variant)
            model = build_reference(variant).to(dtype)
            model.save_pretrained(path, max_shard_size="60KB" if sharded else "1GB")
            for name, text in COMPANIONS.items():
                (path / name).write_text(text)
            written[key] = path
        return written[key]

    return checkpoint


@pytest.fixture
def own_copy(checkpoints: Checkpoints, tmp_path: Path) -> Checkpoints:
    """As `checkpoints`, a copy that the test may damage."""

    def copy(*args: Any, **kwargs: Any) -> Path:
        return Path(shutil.copytree(checkpoints(*args, **kwargs), tmp_path / "checkpoint"))

    return copy


@pytest.fixture(scope="session")
def reference() -> Reference:
    """A checkpoint directory as transformers loads it, in float32."""

    def load(path: Path) -> LlamaForCausalLM:
        model, info = LlamaForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys")), info
        return model.eval()

    return load


@pytest.fixture(scope="session")
def logits() -> Logits:
    """The logits of any Llama here for the same 2 x 24 tokens, in float32."""
    ids = torch.randint(53, (2, 24), generator=torch.Generator().manual_seed(1))

    def run(model: nn.Module) -> Tensor:
        with torch.no_grad():
            output = model.eval()(ids)
        return getattr(output, "logits", output).float()

    return run


@pytest.fixture(scope="session")
def randomize_adapters() -> Randomize:
    """B starts at zero, which would hide an adapter from every comparison."""

    def randomize(model: nn.Module) -> None:
        torch.manual_seed(2)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                nn.init.normal_(module.lora_A.weight, std=0.15)
                for parameter in module.lora_B.parameters():
                    nn.init.normal_(parameter, std=0.15)
                if module.lora_magnitude_vector is not None:
                    nn.init.uniform_(module.lora_magnitude_vector, 1.0, 3.0)

    return randomize


@pytest.fixture
def adapted(checkpoints: Checkpoints, randomize_adapters: Randomize) -> Build:
    def build(variant: str = "gqa", plan: list = QLORA, **options: object) -> CausalLM:
        model = load_checkpoint(checkpoints(variant), plan, **{"dtype": torch.float32} | options)
        randomize_adapters(model)
        return model.eval()

    return build
