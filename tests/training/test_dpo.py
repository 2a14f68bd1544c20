"""DPO against TRL's formula, written out here, and against autograd on dense logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from archs import tiny_arch
from torch import Tensor

from qlora_builders import llama
from qlora_builders.data import Example, collate
from qlora_builders.errors import PlanError
from qlora_builders.modules import CausalLM, adapters_disabled
from qlora_builders.training.objectives import DPO, check_reference
from qlora_builders.training.optimizers import trainable_parameters
from qlora_builders.training.step import evaluate_objective, train_step

ARCH = tiny_arch(vocab_size=41, hidden_size=16, intermediate_size=24)
PLAN = [{"match": "layers.**", "kind": "qlora", "rank": 2, "alpha": 4}]


def trl_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    loss_type: str,
    label_smoothing: float,
) -> Tensor:
    """As published with TRL's DPOTrainer: per pair, in float64."""
    logits = (chosen_logps - rejected_logps) - (ref_chosen_logps - ref_rejected_logps)
    if loss_type == "hinge":
        return torch.clamp(1 - beta * logits, min=0)
    right, wrong = (torch.log(1 / (1 + torch.exp(-sign * beta * logits))) for sign in (1, -1))
    return -right * (1 - label_smoothing) - wrong * label_smoothing


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize(
    ("loss_type", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0)]
)
def test_trls_formula_on_fixed_logits(beta: float, loss_type: str, label_smoothing: float) -> None:
    options: dict[str, Any] = {"loss_type": loss_type, "label_smoothing": label_smoothing}
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 10, 7, 13, generator=generator, dtype=torch.float64)
    ids = torch.randint(13, (10, 7, 1), generator=generator)
    logps = logits.log_softmax(-1).gather(-1, ids.expand(2, -1, -1, -1)).sum((2, 3))  # [2, 10]
    policy, reference = logps.float()
    policy.requires_grad_()
    loss, figures = DPO(beta, **options).sums_of(policy, reference, torch.ones(5))
    (grad,) = torch.autograd.grad(loss, policy)

    wide = logps[0].clone().requires_grad_()
    pairs = (wide[0::2], wide[1::2], logps[1, 0::2], logps[1, 1::2])
    expected = trl_loss(*pairs, beta=beta, **options).sum()
    (expected_grad,) = torch.autograd.grad(expected, wide)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-7)

    chosen, rejected = (beta * (pairs[i] - pairs[i + 2]).detach() for i in (0, 1))
    assert figures == pytest.approx(
        {
            "rewards/chosen": chosen.sum().item(),
            "rewards/rejected": rejected.sum().item(),
            "rewards/margins": (chosen - rejected).sum().item(),
            "rewards/accuracies": (chosen > rejected).sum().item(),
            "logps/chosen": pairs[0].sum().item(),
            "logps/rejected": pairs[1].sum().item(),
        },
        rel=1e-5,
        abs=1e-6,
    )


# ---- with a model -------------------------------------------------------------------------------


def make_model(*, learned: bool = False, **options: Any) -> CausalLM:
    torch.manual_seed(0)
    model = llama(ARCH, [PLAN[0] | options], compute_dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if learned and "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_batch(pairs: int = 4, seed: int = 0, per_row: int = 2) -> Any:
    """Answers of 1 to 5 tokens after prompts of 2 to 7; the two of a pair share the prompt."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    examples = []
    for row in range(pairs):
        prompt = torch.randint(41, (draw(2, 8),), generator=generator)
        for _ in range(2):
            answer = torch.randint(41, (draw(1, 6),), generator=generator)
            labels = torch.cat([torch.full_like(prompt, -100), answer])
            examples.append(Example(torch.cat([prompt, answer]), labels, row))
    return collate(examples, pad_token_id=0, per_row=per_row)


def dense_logps(model: CausalLM, batch: Any) -> Tensor:
    """One sequence at a time, without padding: [2 p]."""
    sums = []
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        length = int((labels != -100).nonzero().max()) + 1
        logs = model(ids[None, :length])[0, :-1].log_softmax(-1)
        trained = (labels[1:length] != -100).nonzero().squeeze(1)
        sums.append(logs[trained, ids[1:length][trained]].sum())
    return torch.stack(sums)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_gradients_equal_autograd_on_dense_logits(mode: str) -> None:
    model, batch = make_model(learned=True), make_batch()
    model.model.activation_checkpointing = mode
    objective = DPO(beta=0.5)
    loss, _ = objective.sums(model, batch)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.model.activation_checkpointing = "none"
    with torch.no_grad(), adapters_disabled(model):
        reference = dense_logps(model, batch)
    policy = dense_logps(model, batch)
    pairs = (policy[0::2], policy[1::2], reference[0::2], reference[1::2])
    expected = trl_loss(*pairs, beta=0.5, loss_type="sigmoid", label_smoothing=0.0).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(grads) == sorted(trained)
    for name in trained:
        expected_grad = model.get_parameter(name).grad
        torch.testing.assert_close(grads[name], expected_grad, rtol=1e-4, atol=1e-6, msg=name)


def test_before_the_first_step_it_is_log_2_exactly() -> None:
    """Dropout or not: B is zero, so policy and reference agree in every bit."""
    for dtype in (torch.float32, torch.bfloat16):
        model, batch = make_model(dropout=0.3), make_batch()
        model.model.compute_dtype = dtype
        loss, figures = DPO().sums(model.train(), batch)
        assert loss.item() / 4 == torch.tensor(math.log(2)).item()
        rewards = [value for key, value in figures.items() if key.startswith("rewards")]
        assert rewards == [0.0] * 4


def test_the_reference_is_the_base_and_stays_so() -> None:
    batch, model = make_batch(), make_model()
    base = llama(ARCH, [{"match": "layers.**", "kind": "frozen_nf4"}], compute_dtype=torch.float32)
    base.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    expected = base.log_probs(batch.input_ids, batch.labels)
    frozen = {k: v.clone() for k, v in model.state_dict().items() if "lora_" not in k}
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    for _ in range(3):
        train_step(model, [batch], optimizer, clip_grad_norm=1.0, objective=DPO())
    with torch.no_grad(), adapters_disabled(model):
        reference = model.log_probs(batch.input_ids, batch.labels)
    assert torch.equal(reference, expected)
    assert not torch.equal(model.log_probs(batch.input_ids, batch.labels), expected)
    state = model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in frozen.items())


def test_no_gradient_reaches_the_reference() -> None:
    """Two forward passes; the graph of the step holds the second one only."""
    model, modes = make_model(), []
    model.model.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    DPO().sums(model, make_batch())
    assert modes == [False, True]


def test_every_pair_weighs_the_same_however_a_step_is_cut() -> None:
    """One batch, or two; or five ranks' parts, of which the last has only a stand-in."""
    whole = make_batch(4)
    results = []
    for parts in (1, 2, 5):
        model = make_model(learned=True)
        batches = [whole.part(rank, parts) for rank in range(parts)]
        optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.0)
        results.append(
            train_step(model, batches, optimizer, clip_grad_norm=None, objective=DPO(0.5))
        )
    first = results[0]
    for other in results[1:]:
        assert other.loss == pytest.approx(first.loss, rel=1e-6)
        assert other.grad_norm == pytest.approx(first.grad_norm, rel=1e-5)
        assert other.target_tokens == first.target_tokens
        assert dict(other.figures) == pytest.approx(dict(first.figures), rel=1e-5)
    stand_in = whole.part(4, 5)
    assert stand_in.labels.eq(-100).all()
    assert stand_in.labels.shape[0] == 2
    assert DPO().count(stand_in) == 0


def test_it_learns_and_evaluation_changes_nothing() -> None:
    model, batch = make_model(), make_batch(8)
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    objective = DPO(beta=1.0)
    before = evaluate_objective(model, [batch], objective)
    assert before.loss == pytest.approx(math.log(2), rel=1e-7)
    for _ in range(10):
        train_step(model, [batch], optimizer, clip_grad_norm=1.0, objective=objective)
    weights = [p.detach().clone() for p in trainable_parameters(model)]
    after = evaluate_objective(model.train(), [batch], objective)
    assert after.loss < before.loss / 2
    assert after.figures["rewards/margins"] > 0
    assert after.figures["rewards/accuracies"] == 1
    assert after.target_tokens == int((batch.labels != -100).sum())
    assert model.training
    for weight, now in zip(weights, trainable_parameters(model), strict=True):
        assert torch.equal(weight, now)


@pytest.mark.parametrize(
    ("plan", "train", "name"),
    [
        ([*PLAN, {"match": "lm_head", "kind": "linear", "trainable": True}], [], "lm_head.weight"),
        (PLAN, ["embed_tokens[3,4]"], r"model\.embed_tokens\.token_adapter\.\w+"),
        (PLAN, ["norm"], r"model\.norm\.weight"),
        (PLAN, ["layers.*.*norm"], r"model\.layers\.0\.input_layernorm\.weight and 3 more"),
    ],
)
def test_a_base_that_trains_is_no_reference(plan: Any, train: list[str], name: str) -> None:
    check_reference(make_model())
    model = llama(ARCH, plan, train=train)
    with pytest.raises(PlanError, match=f"dpo trains adapters only: .* trains {name} of the base"):
        check_reference(model)
