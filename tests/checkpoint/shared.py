"""What the tests of checkpoints share: tiny Llama checkpoints written by transformers, models and
logits to compare with, plans, changes to files, equal bits."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from qlora_builders.checkpoint import load_checkpoint, stored_plan
from qlora_builders.errors import CheckpointError
from qlora_builders.modules import CausalLM, LoRALinear
from qlora_builders.tensor import NF4Tensor

disable_progress_bar()

Checkpoints = Callable[..., Path]
Reference = Callable[[Path], LlamaForCausalLM]
Logits = Callable[[nn.Module], Tensor]
Build = Callable[..., CausalLM]
Randomize = Callable[[nn.Module], None]

# of tiny models, as transformers names them
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True, "vocab_size": 53},
    "biased": {
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 12,
        "rope_parameters": LLAMA3 | {"rope_theta": 500_000.0},
    },
    # every width is a multiple of 64: bitsandbytes' CPU kernel decodes others wrongly
    "wide": {"intermediate_size": 128, "attention_bias": True},
    "wide_tied": {"intermediate_size": 128, "attention_bias": True, "tie_word_embeddings": True},
    "linear_rope": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    },
}
COMPANIONS = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"model_max_length": 64}',
    "chat_template.jinja": "{{ messages }}",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FROZEN = {"match": "layers.**", "kind": "frozen_nf4"}
# every kind of adapter and base
QLORA = [
    {"match": "layers.**", "kind": "qlora", "rank": 4, "alpha": 8},
    {"match": "layers.1.**", "kind": "qlora", "rank": 3, "alpha": 5, "use_rslora": True},
    {"match": "layers.*.mlp.up_proj", "kind": "frozen_nf4"},
    {"match": "layers.0.self_attn.k_proj", "kind": "lora", "rank": 2, "alpha": 2},
]
_FOLDERS = tempfile.TemporaryDirectory()


@functools.cache
def checkpoints(
    variant: str = "gqa", dtype: torch.dtype = torch.float32, sharded: bool = False
) -> Path:
    """A directory that tests must not change."""
    torch.manual_seed(0)
    sizes = SIZES | {"rms_norm_eps": 1e-5, "bos_token_id": 5, "eos_token_id": [6, 7]}
    model = LlamaForCausalLM(LlamaConfig(**sizes | VARIANTS[variant])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name:
                parameter += 1
    path = Path(tempfile.mkdtemp(dir=_FOLDERS.name))
    model.to(dtype).save_pretrained(path, max_shard_size="60KB" if sharded else "1GB")
    for name, text in COMPANIONS.items():
        (path / name).write_text(text)
    return path


def reference(path: Path) -> LlamaForCausalLM:
    """A checkpoint directory as transformers loads it, in float32."""
    model, info = LlamaForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys")), info
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of any Llama here for the same 2 x 24 tokens, in float32."""
    ids = torch.randint(53, (2, 24), generator=torch.Generator().manual_seed(1))
    output = model.eval()(ids)
    return getattr(output, "logits", output).float()


def assert_close(a: nn.Module, b: nn.Module, *, rtol: float = 1e-5, atol: float = 2e-5) -> None:
    """Their logits."""
    torch.testing.assert_close(logits(a), logits(b), rtol=rtol, atol=atol)


def stored(path: Path) -> dict[str, Tensor]:
    """All tensors of a directory."""
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def as_stored(path: Path, **options: Any) -> CausalLM:
    """Loaded under the plan that keeps quantized weights as they are."""
    return load_checkpoint(path, stored_plan(path), **options)


def dequantized(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if isinstance(tensor, NF4Tensor) else tensor


def refused(message: str, function: Callable, *args: Any, **options: Any) -> str:
    with pytest.raises(CheckpointError, match=message) as caught:
        function(*args, **options)
    return str(caught.value)


def randomize_adapters(model: nn.Module) -> None:
    """B starts at zero, which would hide an adapter from every comparison."""
    torch.manual_seed(2)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_A.weight, std=0.15)
            for parameter in module.lora_B.parameters():
                nn.init.normal_(parameter, std=0.15)
            if module.lora_magnitude_vector is not None:
                nn.init.uniform_(module.lora_magnitude_vector, 1.0, 3.0)


def adapted(variant: str = "gqa", plan: list = QLORA, **options: Any) -> CausalLM:
    model = load_checkpoint(checkpoints(variant), plan, **{"dtype": torch.float32} | options)
    randomize_adapters(model)
    return model.eval()


# PEFT asks transformers for an attribute that transformers renamed
DEPRECATED = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
quiet_peft = pytest.mark.filterwarnings(DEPRECATED)


def in_peft(model: LlamaForCausalLM, **config: Any) -> PeftModel:
    """A copy with adapters."""
    options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | config
    return get_peft_model(copy.deepcopy(model), LoraConfig(**options))


def trained_in_peft(model: LlamaForCausalLM, **config: Any) -> PeftModel:
    """As training would leave it: all that trains is random."""
    return randomized(in_peft(model, **config))


def randomized(model: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.15 * torch.randn_like(parameter)
    return model.eval()


def edit_json(file: Path, changes: dict[str, Any]) -> Path:
    """None removes a key. Gives the folder."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return file.parent


def edit_tensors(file: Path, changes: dict[str, Tensor | None]) -> Path:
    """None removes a tensor. Gives the folder."""
    tensors = load_file(file) | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, file)
    return file.parent


def assert_same_bits(a: nn.Module, b: nn.Module, *, quantized: int) -> None:
    """Of all parameters, so many of them quantized."""
    theirs = dict(b.named_parameters())
    for name, parameter in a.named_parameters():
        other = theirs.pop(name)
        assert (type(parameter), parameter.dtype) == (type(other), other.dtype), name
        if isinstance(parameter, NF4Tensor):
            quantized -= 1
            assert parameter.format == other.format, name
            for field in NF4Tensor.tensor_fields:
                assert torch.equal(getattr(parameter, field), getattr(other, field)), (name, field)
        else:
            assert torch.equal(parameter, other), name
    assert not theirs
    assert quantized == 0


def assert_same_files(a: Path, b: Path) -> None:
    """The same tensors in both safetensors files."""
    before, after = load_file(a), load_file(b)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
