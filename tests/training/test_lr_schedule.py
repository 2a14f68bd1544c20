from __future__ import annotations

import math
from typing import Any

import pytest

from qlora_builders.errors import ConfigError
from qlora_builders.training.optimizers import check_same_past, lr_factor


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
