"""One step, its learning rate, one evaluation, and what stops a run."""

from __future__ import annotations

import math
import os
import random
import re
import signal
import statistics
from typing import Any

import peft
import pytest
import torch
from archs import TINY, tiny_arch
from peft.optimizers import create_loraplus_optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_builders import llama
from qlora_builders.config.compose import compose
from qlora_builders.console import StopRequest, stop_on_signal
from qlora_builders.data import Batch
from qlora_builders.errors import ConfigError, PlanError, TrainingError
from qlora_builders.modules import CausalLM
from qlora_builders.runs.loop import until_stopped
from qlora_builders.training.objectives import NextToken, mean_and_error
from qlora_builders.training.optimizers import (
    check_same_past,
    lora_plus_groups,
    lr_factor,
    trainable_parameters,
)
from qlora_builders.training.step import evaluate_objective, train_step

VOCAB = 31
LORA = [{"match": "layers.**", "kind": "lora", "rank": 2, "alpha": 4}]


def make_batch(rows: int, length: int, seed: int, trained_from: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :trained_from] = -100
    return Batch(ids, labels, list(range(seed * 10, seed * 10 + rows)))


def make_model(**options: float) -> CausalLM:
    torch.manual_seed(0)
    arch = tiny_arch(vocab_size=VOCAB, hidden_size=16, num_layers=1)
    return llama(arch, [LORA[0] | options], dtype=torch.float32)


def evaluate(model: CausalLM, batches: list[Batch]) -> tuple[float, int]:
    result = evaluate_objective(model, batches, NextToken())
    return result.loss, result.target_tokens


def test_every_target_token_weighs_the_same() -> None:
    short, long = make_batch(1, 4, seed=1), make_batch(2, 12, seed=2, trained_from=3)
    model = make_model()
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.0)
    expected, tokens = evaluate(model, [short, long])
    result = train_step(model, [short, long], optimizer, clip_grad_norm=None)
    assert tokens == result.target_tokens == 3 + 18
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.tokens == 4 + 24


def test_clipping_bounds_the_update_but_not_the_norm_reported() -> None:
    batch = make_batch(2, 8, seed=0)
    steps = {}
    for clip in (None, 1e-3):
        model = make_model()
        before = [p.detach().clone() for p in trainable_parameters(model)]
        optimizer = torch.optim.SGD(trainable_parameters(model), lr=1.0)
        norm = train_step(model, [batch], optimizer, clip_grad_norm=clip).grad_norm
        moved = [p - b for p, b in zip(trainable_parameters(model), before, strict=True)]
        steps[clip] = (norm, torch.cat([m.flatten() for m in moved]).norm().item())
    assert steps[None][0] == steps[1e-3][0] > 1e-3
    assert steps[None][1] == pytest.approx(steps[None][0], rel=1e-4)
    assert steps[1e-3][1] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_rows_and_changes_nothing(value: float) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=1.0)
    before = [p.detach().clone() for p in trainable_parameters(model)]
    good, bad = make_batch(2, 8, seed=0), make_batch(3, 8, seed=4)
    with torch.no_grad():
        model.model.embed_tokens.weight[bad.input_ids[0, 0]] = value
    good.input_ids[good.input_ids == bad.input_ids[0, 0]] = 0
    if bad.input_ids[0, 0] == 0:
        pytest.fail("pick another seed: token 0 stands in for the poisoned one")
    with pytest.raises(TrainingError, match=r"the loss is nan on rows \[40, 41, 42\]"):
        train_step(model, [good, bad], optimizer, clip_grad_norm=1.0)
    after = trainable_parameters(model)
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))


def test_evaluation_turns_dropout_off_and_the_mode_back() -> None:
    model = make_model(dropout=0.5)
    for module in model.modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.normal_(module.lora_B.weight)
    batch = make_batch(2, 8, seed=0)
    model.train()
    losses = {evaluate(model, [batch])[0] for _ in range(3)}
    assert len(losses) == 1
    assert model.training


def test_figures_of_all_batches_and_ranks_are_added_up() -> None:
    class Counting(NextToken):
        def sums(self, model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
            return super().sums(model, batch)[0], {"rows": float(len(batch.input_ids))}

    model, batches = llama(tiny_arch(), dtype=torch.float32), [make_batch(n, 5, n) for n in (1, 3)]
    count = sum(NextToken().count(batch) for batch in batches)
    result = evaluate_objective(model, batches, Counting(), gather=lambda part: [part, part])
    assert result.figures == {"rows": 2 * (1 + 3) / (2 * count)}


def test_nothing_to_evaluate_or_to_train_is_an_error() -> None:
    with pytest.raises(TrainingError, match="no token to evaluate on"):
        evaluate(make_model(), [])
    with pytest.raises(PlanError, match="the plan trains nothing; add a rule of kind 'lora'"):
        trainable_parameters(llama(tiny_arch()))


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
@pytest.mark.parametrize(
    ("first", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)], ids=["int", "term"]
)
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_asks_and_the_second_leaves(
    before: Any,
    first: signal.Signals,
    exit_code: int,
    second: signal.Signals,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A background job starts with SIGINT ignored; it can be stopped all the same."""
    outside = signal.signal(signal.SIGINT, before)
    try:
        with stop_on_signal() as stop:
            assert not stop
            os.kill(os.getpid(), first)
            assert stop
            assert "finishing this step, then saving" in capfd.readouterr().err
            assert stop.exit_code == exit_code
            at_once = KeyboardInterrupt if second == signal.SIGINT else SystemExit
            with pytest.raises(at_once) as caught:
                os.kill(os.getpid(), second)
            if second == signal.SIGTERM:
                assert caught.value.code == 143
            # while files and terminal are put in order, a third one ends it all
            assert signal.getsignal(first) == signal.getsignal(second) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is before
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, outside)


def test_batches_end_when_a_stop_is_asked_for_but_there_is_one() -> None:
    batches = [make_batch(1, 4, seed=seed) for seed in range(3)]
    stop = StopRequest()
    assert list(until_stopped(batches, stop)) == batches
    stop.signal_number = signal.SIGTERM
    assert list(until_stopped(batches, stop)) == batches[:1]


def test_the_default_optimizer_is_adamw_to_float32_rounding() -> None:
    """`fused` updates all parameters in one pass; its roundings differ from the plain loop's."""

    def losses(**options: Any) -> list[float]:
        model, batch = make_model(), make_batch(4, 16, seed=3)
        optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2, **options)
        return [train_step(model, [batch], optimizer, clip_grad_norm=1.0).loss for _ in range(30)]

    node = compose("finetune").optimizer
    assert node["component"] == "torch.optim.AdamW"
    assert node["fused"] is True
    plain = losses(foreach=False)
    assert plain[-1] < 0.99 * plain[0]
    torch.testing.assert_close(losses(fused=True), plain, rtol=1e-6, atol=0)


def test_equal_weights_give_the_usual_error_of_a_mean() -> None:
    values = [0.0, 1.0, 1.0, 0.5, -2.0]
    mean, error = mean_and_error(values, [1] * 5)
    assert mean == pytest.approx(statistics.mean(values))
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(5))


def test_rows_of_many_lengths_give_the_spread_of_repeated_draws() -> None:
    """The loss per token of 200 rows, drawn 2000 times."""
    draw = random.Random(0)

    def rows() -> tuple[list[float], list[int]]:
        lengths = [draw.randint(1, 60) for _ in range(200)]
        hardness = [draw.gauss(2, 0.5) for _ in lengths]
        return [h * n for h, n in zip(hardness, lengths, strict=True)], lengths

    found = [mean_and_error(*rows()) for _ in range(2000)]
    spread = statistics.stdev(mean for mean, _ in found)
    assert statistics.mean(error for _, error in found) == pytest.approx(spread, rel=0.05)
    assert statistics.mean(mean for mean, _ in found) == pytest.approx(2, abs=0.01)


def test_a_single_part_says_nothing_about_chance() -> None:
    assert mean_and_error([3.0], [2]) == (1.5, math.inf)


PLAN = [{"match": "layers.*.self_attn.{q,v}_proj", "kind": "qlora", "rank": 2, "alpha": 4}]


# ---- the learning rate over a run, and LoRA+ groups against PEFT's ------------------------------


def test_cosine_with_warmup() -> None:
    factor = lr_factor("cosine", total_steps=20, warmup_steps=4, min_lr_ratio=0.1)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0
    assert factor(12) == pytest.approx(0.1 + 0.9 / 2)
    assert factor(20) == pytest.approx(0.1)
    assert factor(19) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 15 / 16)) / 2)


@pytest.mark.parametrize(("name", "middle"), [("linear", 0.5), ("constant", 1.0)])
def test_other_shapes(name: str, middle: float) -> None:
    factor = lr_factor(name, total_steps=10)
    assert (factor(0), factor(5)) == (1.0, middle)


def test_warmup_ratio_counts_whole_steps_and_steps_override_it() -> None:
    assert lr_factor("constant", total_steps=25, warmup_ratio=0.1)(0) == pytest.approx(1 / 3)
    assert lr_factor("constant", total_steps=25, warmup_ratio=0.1, warmup_steps=0)(0) == 1.0


def test_no_step_runs_at_zero() -> None:
    for name in ("cosine", "linear", "constant"):
        for total in (1, 2, 7):
            factor = lr_factor(name, total_steps=total, warmup_ratio=0.3)
            assert all(factor(step) > 0 for step in range(total))


@pytest.mark.parametrize(
    ("schedule", "total_steps", "done", "fits"),
    [
        ({"name": "cosine"}, 10, 4, True),
        ({"name": "cosine"}, 11, 4, False),
        ({"name": "cosine"}, 11, 1, True),  # the first step is the same
        ({"name": "cosine", "warmup_steps": 4}, 20, 4, True),
        ({"name": "cosine", "warmup_steps": 4}, 20, 6, False),
        ({"name": "constant", "warmup_steps": 2}, 20, 6, True),
        ({"name": "constant", "warmup_ratio": 0.5}, 20, 3, False),
    ],
)
def test_the_number_of_steps_may_change_if_no_step_done_is_touched(
    schedule: dict[str, Any], total_steps: int, done: int, fits: bool
) -> None:
    if fits:
        check_same_past(schedule, total_steps=total_steps, before=10, steps_done=done)
        return
    message = rf"cannot resume after step {done}: a run of {total_steps} steps has another learning"
    with pytest.raises(ConfigError, match=message):
        check_same_past(schedule, total_steps=total_steps, before=10, steps_done=done)


def test_fewer_steps_than_done_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"6 steps are done, but the run has only 5"):
        check_same_past({"name": "constant"}, total_steps=5, before=10, steps_done=6)
    check_same_past({"name": "constant"}, total_steps=6, before=10, steps_done=6)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_learning_rates_are_pefts() -> None:
    config = LlamaConfig(
        vocab_size=TINY["vocab_size"],
        hidden_size=TINY["hidden_size"],
        intermediate_size=TINY["intermediate_size"],
        num_hidden_layers=TINY["num_layers"],
        num_attention_heads=TINY["num_heads"],
        num_key_value_heads=TINY["num_kv_heads"],
    )
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(LlamaForCausalLM(config), lora)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0
    )
    wanted = rates(theirs, optimizer)
    ours = llama(tiny_arch(), PLAN)
    groups = lora_plus_groups(ours, lr=1e-3, ratio=16.0)
    assert rates(ours, torch.optim.AdamW(groups)) == wanted
    assert set(wanted.values()) == {1e-3, 16e-3}


def rates(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Learning rate by parameter, under the names that both libraries share."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        re.sub(r"^base_model\.model\.|\.default", "", names[parameter]): group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_what_trains_beside_adapters_is_in_the_first_group() -> None:
    model = llama(tiny_arch(), PLAN, train=["norm"])
    slow, fast = lora_plus_groups(model, lr=0.1, ratio=4)
    assert any(parameter is model.model.norm.weight for parameter in slow["params"])
    assert (len(slow["params"]), slow["lr"]) == (5, 0.1)
    assert (len(fast["params"]), fast["lr"]) == (4, 0.4)


def test_without_adapters_it_is_an_error() -> None:
    model = llama(tiny_arch(), train=["norm"])
    with pytest.raises(ConfigError, match=r"lora_plus_ratio=16 needs adapters to train"):
        lora_plus_groups(model, lr=0.1, ratio=16)
