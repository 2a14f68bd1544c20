"""Choosing the precision of linear slots under a budget, and writing the choice as rules."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from archs import tiny_arch

from qlora_builders.analysis import precision
from qlora_builders.analysis.precision import (
    PLAIN,
    SETTINGS,
    Choice,
    Option,
    Options,
    choose,
    measure_options,
    smallest,
    to_rules,
    total_bytes,
    total_loss,
    uniform_plans,
)
from qlora_builders.errors import CheckpointError
from qlora_builders.models import linear_slots, resolve
from qlora_builders.tensor import to_nf4

SHAPES = {"q_proj": (32, 32), "k_proj": (16, 32), "up_proj": (88, 32), "lm_head": (61, 32)}


def slots(num_layers: int, head: bool) -> list[str]:
    arch = tiny_arch(num_layers=num_layers)
    return [slot for slot in linear_slots(arch) if head or slot != "lm_head"]


def random_options(names: list[str], seed: int) -> Options:
    """Real sizes; losses that fall with bytes, but not in every slot in the same order."""
    rng = random.Random(seed)
    options = {}
    for name in names:
        shape = SHAPES.get(name.rpartition(".")[2], (32, 48))
        weight = 10 ** rng.uniform(-3, 0)
        options[name] = [
            Option(
                setting,
                setting.nbytes(shape, torch.bfloat16),
                0.0 if setting == PLAIN else weight * rng.uniform(0.5, 1),
            )
            for setting in SETTINGS
        ]
    return options


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
@pytest.mark.parametrize("shape", [(48, 32), (3, 7), (1, 1)])
def test_bytes_are_those_stored(setting, shape) -> None:  # type: ignore[no-untyped-def]
    weight = torch.randn(*shape, dtype=torch.bfloat16)
    stored = weight if setting == PLAIN else to_nf4(weight, **setting.options)
    assert setting.nbytes(shape, torch.bfloat16) == stored.nbytes


def test_names_differ() -> None:
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)


def test_options_are_measured_on_what_would_be_stored() -> None:
    weight = torch.randn(16, 64, dtype=torch.bfloat16)
    seen = []

    def predict(slot: str, weight: torch.Tensor, changed: torch.Tensor) -> float:
        seen.append(changed)
        return (weight - changed).float().square().sum().item()

    ((slot, options),) = measure_options({"lm_head": weight}, predict)
    assert slot == "lm_head"
    assert [option.setting for option in options] == list(SETTINGS)
    quantized = [setting for setting in SETTINGS if setting != PLAIN]
    for setting, changed in zip(quantized, seen, strict=True):
        assert torch.equal(changed, to_nf4(weight, **setting.options).dequantize())
    by_name = {option.setting.name: option for option in options}
    assert by_name["nf4 64 search"].loss < by_name["nf4 64"].loss
    assert by_name["nf4 64 search"].nbytes == by_name["nf4 64"].nbytes
    assert by_name["linear"].loss == 0


def test_a_weight_with_nan_is_named() -> None:
    weight = torch.full((4, 64), torch.nan)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight: .*NaN"):
        list(measure_options({"layers.0.mlp.up_proj": weight}, lambda *_: 0.0))


@pytest.mark.parametrize("seed", range(20))
def test_choice_is_the_best_of_all(seed: int) -> None:
    names = ["layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.mlp.up_proj"]
    options = random_options(names, seed)
    least, most = total_bytes(smallest(options)), sum(o[-1].nbytes for o in options.values())
    budget = random.Random(seed).randint(least, most)
    choice = choose(options, budget)
    assert list(choice) == names
    assert total_bytes(choice) <= budget
    everything = (
        dict(zip(names, one, strict=True)) for one in itertools.product(*options.values())
    )
    best = min(total_loss(one) for one in everything if total_bytes(one) <= budget)
    assert total_loss(choice) == pytest.approx(best)


def test_coarse_units_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    options = random_options(slots(8, True), seed=2)
    budget = total_bytes(smallest(options)) + 20_000
    exact = choose(options, budget)
    monkeypatch.setattr(precision, "_UNITS", 1 << 12)
    coarse = choose(options, budget)
    assert total_bytes(coarse) <= budget
    assert total_loss(exact) <= total_loss(coarse) <= 1.05 * total_loss(exact)


@pytest.mark.parametrize("head", [False, True])
def test_uniform_plans_are_feasible_and_never_better(head: bool) -> None:
    options = random_options(slots(3, head), seed=7)
    plans = uniform_plans(options)
    assert len(plans) == (len(SETTINGS) - 1) * (2 if head else 1)
    for plan in plans.values():
        budget = total_bytes(plan)
        choice = choose(options, budget)
        assert total_bytes(choice) <= budget
        assert total_loss(choice) <= total_loss(plan)
    settings = {name: {o.setting for o in plan.values()} for name, plan in plans.items()}
    if head:
        assert settings["nf4 64"] == {SETTINGS[1], PLAIN}
        assert plans["nf4 64"]["lm_head"].setting == PLAIN
        assert settings["nf4 64, head too"] == {SETTINGS[1]}
    else:
        assert settings["nf4 64"] == {SETTINGS[1]}


def test_the_same_choice_every_time() -> None:
    options = random_options(slots(4, True), seed=3)
    budget = total_bytes(smallest(options)) + 5000
    assert choose(options, budget) == choose(options, budget)


# ---- rules --------------------------------------------------------------------------------------


def random_choice(names: list[str], seed: int) -> Choice:
    """Layers that are mostly alike, as plans are."""
    rng = random.Random(seed)
    options = random_options(names, seed)
    return {
        name: options[name][rng.choice([2, 2, 2, rng.randrange(len(SETTINGS))])] for name in names
    }


@pytest.mark.parametrize("seed", range(30))
def test_rules_give_every_slot_its_setting(seed: int) -> None:
    names = slots(num_layers=1 + seed % 6, head=bool(seed % 2))
    choice = random_choice(names, seed)
    plan = resolve(to_rules(choice), slots(1 + seed % 6, head=True))
    for name, option in choice.items():
        assert plan[name].kind == option.setting.kind
        assert plan[name].options == option.setting.options
    adapted = resolve(to_rules(choice, rank=4, alpha=8), slots(1 + seed % 6, head=True))
    for name, option in choice.items():
        if name == "lm_head":
            assert adapted[name].options == option.setting.options
            continue
        assert adapted[name].kind == ("lora" if option.setting == PLAIN else "qlora")
        assert adapted[name].options == {"rank": 4, "alpha": 8, **option.setting.options}


def test_equal_layers_and_projections_share_a_rule() -> None:
    names = slots(8, head=True)
    options = random_options(names, seed=0)
    nf4, plain = SETTINGS[2], PLAIN
    kept = [f"layers.{i}.self_attn.{p}" for i in (0, 1, 2) for p in ("k_proj", "v_proj")]
    kept += ["layers.0.mlp.down_proj", "layers.7.mlp.down_proj"]
    kept += [f"layers.{i}.self_attn.o_proj" for i in range(8)] + ["lm_head"]
    choice = {
        name: next(o for o in options[name] if o.setting == (plain if name in kept else nf4))
        for name in names
    }
    assert to_rules(choice) == [
        {"match": "layers.**", "kind": "frozen_nf4", "block_size": 64, "scale_search": True},
        {"match": "layers.[0-2].self_attn.{k_proj,v_proj}", "kind": "linear"},
        {"match": "layers.*.self_attn.o_proj", "kind": "linear"},
        {"match": "layers.{0,7}.mlp.down_proj", "kind": "linear"},
    ]
