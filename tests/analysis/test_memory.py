"""Predicted bytes against those of real steps; and the pieces of the prediction."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.optim as bnb_optim
import pytest
import torch
from archs import tiny_arch

from qlora_builders import llama
from qlora_builders.analysis.memory import (
    OptimizerMemory,
    Phase,
    gradient_bytes,
    largest_that_fits,
    predict_phases,
    probe_optimizer,
    weight_terms,
)
from qlora_builders.analysis.memory_trace import MemoryTracer
from qlora_builders.modules import CausalLM, loss

ARCH = tiny_arch(
    vocab_size=3000,
    hidden_size=128,
    intermediate_size=320,
    num_layers=4,
    head_dim=32,
    max_position_embeddings=512,
)
QLORA = {"match": "layers.**", "kind": "qlora", "rank": 8, "alpha": 16}
PLANS: dict[str, list[dict[str, Any]]] = {
    "qlora": [QLORA],
    "lora": [{"match": "layers.*.self_attn.*", "kind": "lora", "rank": 8, "alpha": 16}],
    "full": [{"match": "**", "kind": "linear", "trainable": True}],
    "last layers": [{**QLORA, "match": "layers.[2-3].**"}],
    "mixed": [QLORA, {**QLORA, "match": "layers.1.**", "rank": 64, "dropout": 0.1}],
    "head": [QLORA, {"match": "lm_head", "kind": "linear", "trainable": True}],
}
DYNAMIC = ("activations", "temporaries", "loss chunk", "gradients")
NOTHING = OptimizerMemory(state=0.0, temporary_of_all=0.0, temporary_of_one=0.0)


def build(plan: str, device: str, checkpointing: str = "none", **options: Any) -> CausalLM:
    train = ["**"] if plan == "full" else []
    model = llama(ARCH, PLANS[plan], train=train, device=device, **options)
    model.model.activation_checkpointing = checkpointing
    return model


def predict(model: CausalLM, device_type: str = "cpu", **sizes: Any) -> dict[str, Phase]:
    sizes = {"batch_size": 2, "seq_len": 96, **sizes}
    phases = predict_phases(model, NOTHING, device_type=device_type, **sizes)
    return {phase.name: phase for phase in phases}


@pytest.mark.parametrize("chunk", [1 << 25, 24 * ARCH.vocab_size])  # one chunk, eight of them
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("plan", ["qlora", "full", "mixed", "head"])
def test_a_step_allocates_what_is_predicted(
    plan: str, checkpointing: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted while a real step runs. The prediction traced one layer of each kind, on meta."""
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", chunk)
    model = build(plan, "cpu", checkpointing, compute_dtype=torch.float32).train()
    ids = torch.randint(ARCH.vocab_size, (2, 96))
    model.loss(ids, ids).backward()  # scratch buffers are there from now on
    model.zero_grad(set_to_none=True)
    plain = [p for p in model.parameters() if not hasattr(p, "codes")]
    with MemoryTracer(plain) as tracer:
        tracer.begin("step")
        model.loss(ids, ids).backward()
        tracer.begin("done")
    meta = build(plan, "meta", checkpointing, compute_dtype=torch.float32)
    phases = predict(meta)
    predicted = max(
        sum(phases[name].terms.get(term, 0) for term in DYNAMIC) for name in ("forward", "backward")
    )
    assert predicted == pytest.approx(tracer.segments["step"].peak, rel=0.015)


@pytest.mark.parametrize("plan", PLANS)
def test_layers_traced_once_give_what_all_layers_give(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(plan, "meta")
    once = predict(model)
    for index, layer in enumerate(model.model.layers):  # now no two are alike
        monkeypatch.setattr(layer, "extra_repr", lambda index=index: str(index))
    assert predict(model) == once


def test_memory_grows_along_a_line() -> None:
    model = build("qlora", "meta", "full")
    peaks = [predict(model, "cuda", seq_len=n)["backward"].peak for n in (1024, 2048, 3072)]
    assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=1e-3)


def test_gradients_of_earlier_batches_are_there_all_along() -> None:
    model = build("full", "meta")
    total = sum(parameter.nbytes for parameter in model.parameters())
    phases = predict(model, "cuda", accumulate=True)
    assert [phases[n].terms["gradients"] for n in ("forward", "backward")] == [total, total]


def test_offloaded_inputs_wait_elsewhere() -> None:
    kept = {
        mode: predict(build("qlora", "meta", mode), "cuda")["forward"].terms["activations"]
        for mode in ("full", "offload")
    }
    one_input = 2 * 96 * ARCH.hidden_size * 2  # bfloat16
    assert kept["full"] - kept["offload"] == 4 * one_input


def test_a_share_in_host_memory_leaves_what_computes() -> None:
    model = build("full", "meta")
    here, offloaded = (
        predict(model, "cuda", num_shards=2, cpu_offload=on, accumulate=True)
        for on in (False, True)
    )
    for name, phase in offloaded.items():
        assert phase.terms.get("activations") == here[name].terms.get("activations")
        assert not phase.terms.keys() & {*weight_terms(model), "optimizer state"}
    assert offloaded["forward"].terms["gathered weights"] > 0
    layers = [gradient_bytes(layer) for layer in model.model.layers]
    gradients = [offloaded[name].terms["gradients"] for name in ("forward", "backward")]
    assert gradients == [0, max(layers)]
    assert offloaded["optimizer step"].peak < here["optimizer step"].peak
    assert predict(model, "cpu", num_shards=2) == predict(
        model, "cpu", num_shards=2, cpu_offload=True
    )


def test_weights_by_component() -> None:
    model = build("head", "cpu")
    terms = weight_terms(model)
    assert sum(terms.values()) == sum(parameter.nbytes for parameter in model.parameters())
    assert terms["lm_head"] == 4 * 3000 * 128
    assert terms["embedding"] == 2 * 3000 * 128
    assert terms["adapters"] == 4 * sum(
        p.numel() for name, p in model.named_parameters() if "lora_" in name
    )


@pytest.mark.parametrize(
    ("build_optimizer", "state", "temporaries"),
    [
        (lambda p: torch.optim.AdamW(p, fused=True), 8, (0, 0)),
        (lambda p: torch.optim.AdamW(p, foreach=True), 8, (4, 0)),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True), 4, (0, 0)),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0, (0, 0)),
        (lambda p: bnb_optim.AdamW8bit(p), 2 + 8 / 256, (0, 0)),  # and two scales per 256
        (lambda p: bnb_optim.PagedAdamW8bit(p), 2 + 8 / 256, (0, 0)),
    ],
)
def test_optimizers_are_measured(
    build_optimizer: Any, state: int, temporaries: tuple[int, int]
) -> None:
    memory = probe_optimizer(build_optimizer)
    assert memory.state == pytest.approx(state, abs=0.01)
    assert (memory.temporary_of_all, memory.temporary_of_one) == pytest.approx(temporaries)


@pytest.mark.parametrize(("limit", "step", "largest"), [(1000, 1, 90), (1000, 64, 64), (99, 1, 0)])
def test_the_largest_that_fits(limit: int, step: int, largest: int) -> None:
    asked = []

    def peak(n: int) -> int:
        asked.append(n)
        return 100 + 10 * n if n < 1000 else 10**9

    assert largest_that_fits(peak, limit, step=step) == largest
    assert len(asked) <= 6
    assert largest_that_fits(lambda n: n * n, 10_000) == 100


@pytest.fixture(scope="module")
def bench() -> Any:
    path = Path(__file__).parents[2] / "scripts" / "bench_memory.py"
    spec = importlib.util.spec_from_file_location("bench_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("plan", "seq"), [("qlora", 64), ("lora", 192)])
def test_resident_memory_is_as_predicted(bench: Any, tmp_path: Path, plan: str, seq: int) -> None:
    """In a process of its own. 15 %, as what torch imports differs between its versions."""
    path = str(tmp_path / "checkpoint")
    arch = tiny_arch(
        vocab_size=16000,
        hidden_size=768,
        intermediate_size=2048,
        num_layers=4,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        max_position_embeddings=512,
    )
    bench.save_checkpoint(llama(arch), path)
    setting = bench.Setting("own", plan, seq)
    measured = bench.run_alone(path, setting)
    predicted = bench.predict(path, setting)
    assert predicted["peak_mib"] == pytest.approx(measured["peak_mib"], rel=0.15)
    assert predicted["load_mib"] == pytest.approx(measured["load_mib"], rel=0.15)


@pytest.mark.parametrize("arch", ["llama3_1_70b", "llama3_1_405b"])
def test_shares_add_up_to_the_whole(arch: str) -> None:
    model = llama(arch, [{"match": "layers.**", "kind": "frozen_nf4"}], device="meta")
    whole = sum(weight_terms(model).values())
    assert whole == sum(p.nbytes for p in model.parameters())
    for num_shards in (2, 4, 8, 16, 64):
        shares = num_shards * sum(weight_terms(model, num_shards).values())
        assert shares == whole  # these sizes divide; else the last share is filled up


def test_what_ranks_share_and_what_each_has() -> None:
    alone, shared = (
        {name: phase.terms for name, phase in predict(build("qlora", "meta"), **sizes).items()}
        for sizes in ({}, {"num_shards": 2})
    )
    backward, of_two = alone["backward"], shared["backward"]
    assert of_two["gradients"] == backward["gradients"] // 2
    assert backward["mlp"] / 2 <= of_two["mlp"] < backward["mlp"]  # whole groups of scales
    assert of_two["activations"] == backward["activations"]
    model = build("qlora", "meta")
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    assert of_two["gathered weights"] == 3 * layer + sum(
        p.nbytes for p in (*model.model.norm.parameters(), *model.lm_head.parameters())
    )
