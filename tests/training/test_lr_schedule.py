from __future__ import annotations

import math

import pytest

from qlora_builders.errors import ConfigError
from qlora_builders.training.lr_schedule import lr_factor


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


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"lr_schedule.name is 'cosin'; did you mean 'cosine'\?"):
        lr_factor("cosin", total_steps=3)
