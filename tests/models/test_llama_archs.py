"""Arch rows against the sizes that their publishers state, and what an arch refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from archs import tiny_arch

from qlora_builders.errors import QLoRAError
from qlora_builders.models import LLAMA_ARCHS, get_arch, linear_slots, llama

# Parameters as the hub counts them: `total` of each repository's safetensors metadata, without the
# rotary buffers that the Llama 2 files also hold. Repositories: meta-llama/Llama-2-{7b,13b,70b}-hf,
# codellama/CodeLlama-{7b,13b,34b,70b}-hf, meta-llama/Meta-Llama-3-{8B,70B},
# meta-llama/Llama-3.1-{8B,70B,405B}, meta-llama/Llama-3.2-{1B,3B},
# meta-llama/Llama-3.3-70B-Instruct, TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T, and those
# named in families.py. A tied head is counted once, also where the files of Qwen3 hold it too.
PUBLISHED_PARAMETERS = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "codellama_7b": 6_738_546_688,
    "codellama_13b": 13_016_028_160,
    "codellama_34b": 33_743_970_304,
    "codellama_70b": 68_976_910_336,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_3_70b": 70_553_706_496,
    "tinyllama_1_1b": 1_100_048_384,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "smollm3_3b": 3_075_098_624,
    "mistral_7b": 7_248_023_552,
    "mistral_nemo_12b": 12_247_782_400,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "qwen2_5_72b": 72_706_203_648,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "granite3_3_2b": 2_533_539_840,
    "granite3_3_8b": 8_170_864_640,
}


@pytest.mark.parametrize("name", LLAMA_ARCHS)
def test_parameter_count(name: str) -> None:
    assert set(PUBLISHED_PARAMETERS) == set(LLAMA_ARCHS)
    model = llama(name, device="meta")
    parameters = list(model.parameters())  # a tied head counts once
    assert all(parameter.is_meta for parameter in parameters)
    assert sum(parameter.numel() for parameter in parameters) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", ["llama3_1_8b", "llama3_1_70b", "llama3_1_405b", "llama3_3_70b"])
def test_long_context_rows_scale_their_rope_by_8(name: str) -> None:
    scaling = LLAMA_ARCHS[name].rope_scaling
    assert scaling is not None
    assert (scaling.rope_type, scaling.factor) == ("llama3", 8.0)
    assert scaling.original_max_position_embeddings == 8192


def test_quantized_row_on_meta() -> None:
    model = llama(
        "llama3_2_1b",
        [{"match": "layers.**", "kind": "qlora", "rank": 8, "alpha": 16}],
        device="meta",
    )
    slots = [slot for slot in linear_slots(LLAMA_ARCHS["llama3_2_1b"]) if slot != "lm_head"]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(slots)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_get_arch_passes_an_arch_through() -> None:
    arch = tiny_arch()
    assert get_arch(arch) is arch


def test_unknown_name() -> None:
    with pytest.raises(QLoRAError, match=r"unknown arch 'llama3_8B'; did you mean 'llama3_8b'"):
        llama("llama3_8B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0; it must be an integer >= 1"),
        ({"vocab_size": "32"}, "vocab_size is '32'; it must be an integer >= 1"),
        ({"hidden_size": None}, "hidden_size is None; it must be an integer >= 1"),
        ({"num_kv_heads": 3}, "num_heads is 4 and num_kv_heads 3; the first must be a multiple"),
        ({"head_dim": 5}, "head_dim is 5; rotary embedding needs an even one"),
        ({"model_type": "lama"}, "model_type is 'lama'; did you mean 'llama'"),
        ({"hidden_act": "sillu"}, "hidden_act is 'sillu'; did you mean 'silu'"),
    ],
)
def test_impossible_arch(change: dict[str, Any], message: str) -> None:
    with pytest.raises(QLoRAError, match=message):
        tiny_arch(**change)
