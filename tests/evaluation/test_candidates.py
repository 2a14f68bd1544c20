"""Which models are compared, and that they are what their names say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from archs import tiny_arch

from qlora_builders import llama, save_adapter, save_checkpoint
from qlora_builders.checkpoint import load_checkpoint
from qlora_builders.checkpoint.base_record import BASE_FILE
from qlora_builders.errors import ConfigError
from qlora_builders.evaluation import Candidate, find_candidates
from qlora_builders.modules import CausalLM, adapters_disabled

ARCH = tiny_arch(vocab_size=40, hidden_size=64, intermediate_size=96, head_dim=16)
IDS = torch.tensor([[1, 5, 9, 20, 3]])
ADAPTER = {"rank": 4, "alpha": 8}
QLORA = [
    {"match": "layers.**", "kind": "frozen_nf4", "block_size": 32},
    {"match": "layers.*.mlp.*", "kind": "qlora", "block_size": 128, **ADAPTER},
    {"match": "layers.0.self_attn.q_proj", "kind": "linear", "trainable": True},
    {"match": "lm_head", "kind": "lora", **ADAPTER},
]
LORA = [{"match": "layers.*.mlp.*", "kind": "lora", **ADAPTER}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base") / "hf"
    save_checkpoint(llama(ARCH), path)
    return path


def trained(base: Path, path: Path, rules: list[dict[str, object]], **options: object) -> Path:
    """An adapter whose every trained weight has moved."""
    model = load_checkpoint(base, rules, **options)  # type: ignore[arg-type]
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    save_adapter(model, path)
    return path


def find(base: Path, adapter: Path | None, **changed: object) -> list[Candidate]:
    options = {"quantize": "auto", "format": "auto", "dtype": None, "allow_base_mismatch": False}
    return find_candidates(base, adapter, **(options | {"compute_dtype": torch.float32} | changed))  # type: ignore[arg-type]


def names(found: list[Candidate]) -> list[tuple[str, str | None]]:
    return [(one.name, one.against) for one in found]


def logits(model: CausalLM) -> torch.Tensor:
    assert not model.training
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize("train", [[], ["norm", "embed_tokens"]])
def test_base_in_nf4_is_what_the_adapter_was_trained_on(
    base: Path, tmp_path: Path, train: list[str]
) -> None:
    adapter = trained(base, tmp_path / "adapter", QLORA, train=train)
    found = find(base, adapter)
    assert names(found) == [("base", None), ("base in NF4", "base"), ("fine-tuned", "base in NF4")]
    plain, quantized, tuned = (one.load() for one in found)
    assert not any(p.requires_grad for p in quantized.parameters())
    expected = load_checkpoint(base, QLORA, compute_dtype=torch.float32).eval()
    with adapters_disabled(expected), torch.no_grad():
        # the head and the weight that trains are float32 masters of the same bfloat16 values
        torch.testing.assert_close(logits(quantized), expected(IDS), rtol=0, atol=0)
    assert torch.equal(
        logits(plain), logits(load_checkpoint(base, compute_dtype=torch.float32).eval())
    )
    for other in (plain, tuned):
        assert not torch.allclose(logits(quantized), logits(other), atol=1e-3)
    weight = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(quantized.get_parameter(weight).codes, tuned.get_parameter(weight).codes)


def test_the_dtype_is_the_adapters(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "adapter", QLORA, dtype=torch.float32)
    weight = "model.layers.1.mlp.up_proj.weight"
    dtypes = {one.load().get_parameter(weight).dtype for one in find(base, adapter)}
    assert dtypes == {torch.float32}
    dtypes = {
        one.load().get_parameter(weight).dtype for one in find(base, adapter, dtype=torch.bfloat16)
    }
    assert dtypes == {torch.bfloat16}


def test_an_adapter_on_a_plain_base_is_compared_with_that(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "adapter", LORA)
    found = find(base, adapter)
    assert names(found) == [("base", None), ("base in NF4", "base"), ("fine-tuned", "base")]
    nf4 = load_checkpoint(base, [{"match": "layers.**", "kind": "frozen_nf4"}]).eval()
    assert torch.equal(
        found[1].load().get_parameter("model.layers.0.mlp.up_proj.weight").codes,
        nf4.get_parameter("model.layers.0.mlp.up_proj.weight").codes,
    )
    assert names(find(base, adapter, quantize="nf4"))[-1] == ("fine-tuned", "base in NF4")
    (adapter / BASE_FILE).unlink()  # as PEFT writes it
    assert names(find(base, adapter))[-1] == ("fine-tuned", "base")


def test_without_an_adapter_the_base_is_compared_with_itself(base: Path) -> None:
    found = find(base, None)
    assert names(found) == [("base", None), ("base in NF4", "base")]
    assert not torch.equal(logits(found[0].load()), logits(found[1].load()))


def test_a_checkpoint_in_nf4_has_no_base_in_16_bits(base: Path, tmp_path: Path) -> None:
    stored = tmp_path / "nf4"
    rules = [{"match": "layers.**", "kind": "frozen_nf4", "block_size": 32}]
    save_checkpoint(load_checkpoint(base, rules), stored, format="nf4")
    adapter = trained(stored, tmp_path / "adapter", LORA)
    found = find(stored, adapter)
    assert names(found) == [("base in NF4", None), ("fine-tuned", "base in NF4")]
    expected = load_checkpoint(stored, rules, compute_dtype=torch.float32).eval()
    assert torch.equal(logits(found[0].load()), logits(expected))
    with pytest.raises(ConfigError, match="holds NF4 weights already, so without an adapter there"):
        find(stored, None)


def test_a_pissa_adapter_is_one_for_the_base_as_it_was(base: Path, tmp_path: Path) -> None:
    rules = [{**LORA[0], "kind": "qlora", "init_lora_weights": "pissa"}]
    adapter = trained(base, tmp_path / "adapter", rules)
    assert json.loads((adapter / BASE_FILE).read_text())["components"]
    quantized = find(base, adapter)[1].load()
    expected = load_checkpoint(base, [{"match": "layers.*.mlp.*", "kind": "frozen_nf4"}])
    weight = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(quantized.get_parameter(weight).codes, expected.get_parameter(weight).codes)
