"""What looks wrong before a run is said, with what to do, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qlora_builders import llama, load_checkpoint, preflight
from qlora_builders.config.schema import FinetuneConfig
from qlora_builders.config.shipped import demo_path
from qlora_builders.data import Batches, TokenizedDataset, Tokenizer, build_dataset
from qlora_builders.errors import DataError
from qlora_builders.modules import CausalLM
from qlora_builders.preflight import (
    check_positions,
    check_run,
    free_memory,
    lr_warnings,
    memory_warnings,
    stop_warnings,
    token_warnings,
)
from qlora_builders.training.loop import trainable_parameters

BASE = Path(demo_path("base"))
Data = Callable[..., TokenizedDataset]


@pytest.fixture
def model() -> CausalLM:
    plan = [{"match": "layers.**", "kind": "qlora", "rank": 4, "alpha": 8}]
    return load_checkpoint(BASE, plan, compute_dtype=torch.float32)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    def build(*rows: dict[str, str], max_seq_len: int = 64) -> TokenizedDataset:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = Tokenizer.from_dir(BASE)
        return build_dataset(file, tokenizer, format="instruct", max_seq_len=max_seq_len)

    return build


ROW = {"prompt": "two red dresses", "completion": "- quantity: 2"}


def batches(dataset: TokenizedDataset) -> Batches:
    return Batches(dataset, batch_size=2, packing="none", max_seq_len=256, seed=0, shuffle=False)


def adamw(model: CausalLM, lr: float = 2e-4) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable_parameters(model), lr=lr)


def test_a_sane_run_has_no_warning(model: CausalLM) -> None:
    dataset = build_dataset(
        demo_path("train.jsonl"), Tokenizer.from_dir(BASE), format="instruct", max_seq_len=256
    )
    data = batches(dataset)
    lines = check_run(FinetuneConfig(), model, data, data, adamw(model), "off")
    assert lines == [f"train {data.summary()}", f"eval {data.summary()}"]


def test_rows_longer_than_the_positions(model: CausalLM, data: Data) -> None:
    dataset = data(ROW, {"prompt": "word " * 600, "completion": "x"}, max_seq_len=4096)
    assert len(dataset[1].input_ids) > model.spec.arch.max_position_embeddings
    with pytest.raises(
        DataError, match=r"rows\.jsonl, line 2: has \d+ tokens, but .* data\.max_seq_len"
    ):
        check_positions(dataset, model.spec.arch.max_position_embeddings)
    check_positions(data(ROW), model.spec.arch.max_position_embeddings)


def test_answers_that_never_end(data: Data) -> None:
    cut = data({"prompt": "a", "completion": "word " * 90}, max_seq_len=16)
    (warning,) = stop_warnings(cut)
    assert "no example is trained to end (in '" in warning
    assert "data.max_seq_len" in warning
    assert not list(stop_warnings(data(ROW)))
    cut.tokenizer.stop_token_ids = []
    (warning,) = stop_warnings(cut)
    assert "add eos_token to its tokenizer_config.json" in warning


def test_tokens_that_nobody_trained(model: CausalLM, data: Data) -> None:
    dataset = data(ROW, ROW)
    assert not list(token_warnings(dataset, model))
    token = int(dataset.input_ids[1])
    count = int((dataset.input_ids == token).sum())
    weight = model.get_parameter("model.embed_tokens.weight")
    with torch.no_grad():
        weight[token] = 1e-5
    (warning,) = token_warnings(dataset, model)
    name = repr(dataset.tokenizer.token(token))
    assert f"1 tokens have an embedding that was never trained: {name} ({count} tim" in warning
    assert f"train_tokens=[{token}], or use a chat template" in warning
    rule = {"match": "layers.**", "kind": "lora", "rank": 2, "alpha": 4}
    rows = llama(model.spec.arch, [rule], train=[f"embed_tokens[{token}]"])
    rows.model.embed_tokens.weight.copy_(weight)
    assert not list(token_warnings(dataset, rows))
    weight.requires_grad_()
    assert not list(token_warnings(dataset, model))


@pytest.mark.parametrize(
    ("lr", "expected"),
    [(1e-7, "may learn nothing"), (2e-4, None), (1e-2, None), (0.3, "may diverge")],
)
def test_learning_rates_of_adapters(model: CausalLM, lr: float, expected: str | None) -> None:
    found = list(lr_warnings(adamw(model, lr)))
    assert len(found) == (expected is not None)
    assert all(
        expected in text and f"optimizer.lr is {lr:g}; for adapters" in text for text in found
    )


def test_learning_rates_of_weights_and_other_optimizers(model: CausalLM) -> None:
    weights = [torch.nn.Parameter(torch.zeros(1025, 1025))]
    (warning,) = lr_warnings(torch.optim.AdamW(weights, lr=5e-3))
    assert "for whole weights, 1e-08 to 0.001 is usual: the run may diverge" in warning
    assert not list(lr_warnings(torch.optim.SGD(weights, lr=5e-1)))


def test_a_schedule_that_warms_up_is_judged_by_its_top(model: CausalLM) -> None:
    optimizer = adamw(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 100)
    assert optimizer.param_groups[0]["lr"] == 0
    assert not list(lr_warnings(optimizer))


def test_memory(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_memory(torch.device("cpu"))
    assert free is None or 0 < free < 2**50
    weights = sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(preflight, "free_memory", lambda device: 3 * 2**30)
    assert not list(memory_warnings(model, weights + 3 * 2**30))
    (warning,) = memory_warnings(model, weights + 5 * 2**30)
    assert "a step is predicted to take 5.0 GiB beside the weights, but cpu has 3.0 GiB" in warning
    monkeypatch.setattr(preflight, "free_memory", lambda device: None)
    assert not list(memory_warnings(model, 2**60))


def test_a_step_that_cannot_fit(
    model: CausalLM, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "free_memory", lambda device: 2**30)
    cfg = FinetuneConfig()
    cfg.training.batch_size, cfg.data.packing, cfg.data.max_seq_len = 4096, "best_fit", 512
    rows = batches(data(ROW))
    _, warning = check_run(cfg, model, rows, None, adamw(model), "off")
    assert warning.startswith("warning: a step is predicted to take ")


def test_used_tokens_only(model: CausalLM, data: Data) -> None:
    dataset = data(ROW)
    unused = next(i for i in range(len(dataset.input_ids) + 1000) if i not in dataset.input_ids)
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[unused] = 0
    assert not np.isin(unused, dataset.input_ids)
    assert not list(token_warnings(dataset, model))
