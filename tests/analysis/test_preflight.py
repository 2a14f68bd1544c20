"""What looks wrong before a run is said, with what to do, and nothing else is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qlora_builders import LLAMA_ARCHS, llama, load_checkpoint
from qlora_builders.analysis import preflight
from qlora_builders.analysis.preflight import (
    busy_elsewhere,
    check_positions,
    check_run,
    free_memory,
    load_warnings,
    lr_warnings,
    memory_warnings,
    rank_warnings,
    stop_warnings,
    token_warnings,
)
from qlora_builders.config.schema import FinetuneConfig
from qlora_builders.config.shipped import demo_path
from qlora_builders.data import Batches, TokenizedDataset, Tokenizer, build_dataset
from qlora_builders.errors import DataError
from qlora_builders.modules import CausalLM
from qlora_builders.training.optimizers import lora_plus_groups, trainable_parameters

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
    assert lines[:2] == [f"train {data.summary()}", f"eval {data.summary()}"]
    assert re.fullmatch(r"predicted peak: 0\.\d\d GiB, by qlora estimate's reckoning", lines[2])
    assert len(lines) == 3


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
    [(9e-6, "may learn nothing"), (2e-4, None), (1e-2, None), (0.3, "may diverge")],
)
def test_learning_rates_of_adapters(model: CausalLM, lr: float, expected: str | None) -> None:
    found = list(lr_warnings(adamw(model, lr), model))
    assert len(found) == (expected is not None)
    assert all(
        expected in text and f"optimizer.lr is {lr:g}; for adapters" in text for text in found
    )


def test_learning_rates_of_preferences_are_lower(model: CausalLM) -> None:
    assert list(lr_warnings(adamw(model, 1e-6), model))
    assert not list(lr_warnings(adamw(model, 1e-6), model, preferences=True))
    assert list(lr_warnings(adamw(model, 9e-8), model, preferences=True))


@pytest.mark.parametrize(("hidden_size", "high"), [(512, "0.008"), (4096, "0.001")])
def test_narrow_layers_take_higher_learning_rates(hidden_size: int, high: str) -> None:
    arch = replace(LLAMA_ARCHS["llama3_1_8b"], hidden_size=hidden_size, num_layers=1)
    rule = {"match": "layers.**", "kind": "lora", "rank": 2, "alpha": 4}
    wide = llama(arch, [rule], device="meta")
    (warning,) = lr_warnings(adamw(wide, 0.01), wide)
    expected = f"for adapters of layers {hidden_size} wide, 1e-05 to {high} is usual"
    assert expected in warning


def test_learning_rates_of_weights_and_other_optimizers() -> None:
    arch = replace(LLAMA_ARCHS["llama3_1_8b"], num_layers=1)
    whole = llama(arch, train=["**"], device="meta")
    (warning,) = lr_warnings(adamw(whole, 5e-3), whole)
    assert "for whole weights of layers 4096 wide, 1e-07 to 0.0001 is usual" in warning
    assert not list(lr_warnings(torch.optim.SGD(whole.parameters(), lr=5e-1), whole))


def test_lora_plus_is_judged_by_its_lower_learning_rate(model: CausalLM) -> None:
    groups = lora_plus_groups(model, lr=2e-3, ratio=1000)
    assert not list(lr_warnings(torch.optim.AdamW(groups), model))


def test_a_rank_above_the_weights(model: CausalLM) -> None:
    assert not list(rank_warnings(model))
    arch = model.spec.arch
    rank = arch.hidden_size + 1
    rules = [
        {"match": "layers.*.mlp.*", "kind": "lora", "rank": 4, "alpha": 8},
        {"match": "layers.*.self_attn.o_proj", "kind": "lora", "rank": rank, "alpha": 8},
    ]
    size = arch.hidden_size
    (warning,) = rank_warnings(llama(arch, rules, device="meta"))
    assert warning == (
        "adapters of a higher rank than their weight can have, which only costs: "
        f"{arch.num_layers} x o_proj (rank {rank}, {size} x {size}); lower the rank to the smaller "
        "size of the weight at most"
    )


def test_a_schedule_that_warms_up_is_judged_by_its_top(model: CausalLM) -> None:
    optimizer = adamw(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 100)
    assert optimizer.param_groups[0]["lr"] == 0
    assert not list(lr_warnings(optimizer, model))


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


@pytest.mark.parametrize(
    ("others", "threads", "advice"),
    [(0, 4, None), (2, 4, None), (3, 4, "set OMP_NUM_THREADS=1"), (6, 1, ": a step .*; stop the")],
)
def test_a_machine_that_others_use(
    monkeypatch: pytest.MonkeyPatch, others: int, threads: int, advice: str | None
) -> None:
    monkeypatch.setattr(preflight, "busy_elsewhere", lambda: others)
    monkeypatch.setattr(preflight.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = list(load_warnings(torch.device("cpu")))
    assert len(found) == (advice is not None)
    assert all(re.search(f"{others} threads of other .* 4 cores.*{advice}", line) for line in found)
    assert not list(load_warnings(torch.device("cuda")))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_of_others_are_counted() -> None:
    loop = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    processes = [subprocess.Popen(loop, stdout=subprocess.PIPE) for _ in range(3)]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        assert busy_elsewhere() >= 3
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_step_that_cannot_fit(
    model: CausalLM, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "free_memory", lambda device: 2**30)
    cfg = FinetuneConfig()
    cfg.training.batch_size, cfg.data.packing, cfg.data.max_seq_len = 4096, "best_fit", 512
    rows = batches(data(ROW))
    *_, warning = check_run(cfg, model, rows, None, adamw(model), "off")
    assert warning.startswith("warning: a step is predicted to take ")


def test_used_tokens_only(model: CausalLM, data: Data) -> None:
    dataset = data(ROW)
    unused = next(i for i in range(len(dataset.input_ids) + 1000) if i not in dataset.input_ids)
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[unused] = 0
    assert not np.isin(unused, dataset.input_ids)
    assert not list(token_warnings(dataset, model))
