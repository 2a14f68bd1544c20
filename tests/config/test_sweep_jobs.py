"""What --multirun makes of a command line: jobs, their names, and one error for all mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from qlora_builders.config.sweep import differences, job_name, plan_sweep, short_names, split
from qlora_builders.errors import ConfigError


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.seed=0,1"],
        ["training.seed=range(0,3)", "optimizer.lr=1e-4,2e-4", "training.epochs=2"],
        ["method.targets=[q_proj,v_proj],[q_proj]", "method.rank=choice(8,16)"],
        ["data.train=a.jsonl,b.jsonl", "data.eval=null,'x, y'"],
        ["method=qlora,lora", "+training.seed=1,2"],
        ["training.seed=1", "training.seed=2,3", "method.rank=4"],
        ["optimizer.betas=[0.9,0.99],[0.9,0.95]", "components=[{match: lm_head, kind: lora}],[]"],
    ],
)
def test_combinations_are_hydras(overrides: list[str]) -> None:
    parsed = OverridesParser.create().parse_overrides(overrides)
    (expected,) = BasicSweeper.split_arguments(parsed, None)
    found = [[word.lstrip("+") for word in words] for _, words in split(overrides)]
    assert [{*words} for words in found] == [
        {word.lstrip("+").replace("{match: ", "{match:") for word in words} for words in expected
    ]


def test_text_without_several_values_is_left_alone() -> None:
    words = ["checkpoint.dir=C:\\a (b) {c", "output_dir=a:b", "training.seed=0,1"]
    assert [job for _, job in split(words)] == [
        [*words[:2], "training.seed=0"],
        [*words[:2], "training.seed=1"],
    ]


def test_glob_is_for_groups() -> None:
    swept = [by_key["experiment"] for by_key, _ in split(["experiment=glob(demo*)"])]
    assert swept == ["demo_dpo", "demo_qlora"]


def test_names() -> None:
    assert job_name({"lr": "0.0001", "seed": "0"}) == "lr_0.0001+seed_0"
    assert job_name({"lr": "1e-05", "data": "chat"}) == "lr_1e-05+data_chat"
    paths = [job_name({"train": value}) for value in ("a/b.jsonl", "a b.jsonl")]
    assert len({*paths}) == 2
    assert [name[:-8] for name in paths] == ["train_b.jsonl-", "train_a-b.jsonl-"]
    assert len(job_name({"train": "a/"})) == len("train_a-") + 8
    long = [job_name({"targets": "x" * 300 + end}) for end in "ab"]
    assert len({*long}) == 2
    assert all(len(name) < 140 for name in long)
    keys = ["optimizer.lr", "components.0.rank", "components.1.rank", "method"]
    assert list(short_names(keys).values()) == ["lr", *keys[1:]]


def test_every_job_has_a_checked_config_and_a_path_of_its_own() -> None:
    words = ["method=lora,full", "training.seed=range(2)", "output_dir=runs/s", "device=cpu"]
    folder, jobs = plan_sweep("finetune", words)
    assert folder == Path("runs/s")
    assert [job.name for job in jobs] == [
        f"method_{method}+seed_{seed}" for method in ("lora", "full") for seed in (0, 1)
    ]
    assert [(job.cfg.method.name, job.cfg.training.seed) for job in jobs] == [
        ("lora", 0),
        ("lora", 1),
        ("full", 0),
        ("full", 1),
    ]
    assert jobs[0].swept == {"method": "lora", "training.seed": "0"}
    assert all(job.cfg.output_dir == str(folder / job.name) == str(job.path) for job in jobs)
    assert jobs[3].overrides == [
        "method=full",
        "training.seed=1",
        "device=cpu",
        "output_dir=runs/s/method_full+seed_1",
    ]


def test_default_folder_is_one_for_all_jobs() -> None:
    folder, jobs = plan_sweep("finetune", ["training.seed=0,1"])
    assert folder.parent == Path("runs")
    assert {job.path.parent for job in jobs} == {folder}


@pytest.mark.parametrize(
    ("verb", "output", "paths"),
    [
        ("evaluate", "output=e.json", ["e/batch_size_1.json", "e/batch_size_2.json"]),
        ("plan", "output=p.yaml", ["p/batch_size_1.yaml", "p/batch_size_2.yaml"]),
    ],
)
def test_verbs_that_write_a_file(verb: str, output: str, paths: list[str]) -> None:
    more = ["bits=4.6"] if verb == "plan" else []
    _, jobs = plan_sweep(verb, ["batch_size=1,2", output, *more])
    assert [str(job.path) for job in jobs] == paths
    assert [job.cfg.output for job in jobs] == paths


def test_everything_wrong_in_any_job_is_one_error() -> None:
    words = [
        "method=qlora,full",
        "method.rank=8,0",
        "training.epochs=0",
        "training.bach_size=4",
        "data.max_rows=1,x",
    ]
    with pytest.raises(ConfigError) as raised:
        plan_sweep("finetune", words)
    assert str(raised.value).splitlines() == [
        "unknown key 'training.bach_size'; did you mean 'training.batch_size'?",
        "training.epochs=0 must be >= 1",
        "data.max_rows: Value 'x' is not a whole number",
        "method.rank=0 must be >= 1",
        "method.rank=8 has no effect: method=full does not take it",
        "method.rank=0 has no effect: method=full does not take it",
    ]


@pytest.mark.parametrize(
    ("verb", "words", "message"),
    [
        ("merge", ["dtype=float16,bfloat16"], "qlora merge takes no --multirun; finetune, dpo, ev"),
        ("finetune", ["training.seed=1"], "--multirun needs a key with several values, such as"),
        ("finetune", ["training.seed=0,0"], "'training.seed=0,0' has 0 twice"),
        ("finetune", ["optimizer.lr=interval(0,1)"], "no list of values; write choice"),
        ("finetune", ["experiment=glob(zzz*)"], r"'experiment=glob\(zzz\*\)' matches nothing"),
        ("finetune", ["output_dir=a,b"], "output_dir cannot be swept: it names the folder"),
        ("finetune", ["data.train=a},b"], "cannot read the values of 'data.train=a},b': quote"),
        ("finetune", ["training.seed=0,1", "training.resume=x"], "resume=x is of one run; a swe"),
        ("finetune", ["optimizer.lrr=0,1"], "optimizer.lrr is not an argument of torch.optim.Ad"),
    ],
)
def test_mistakes(verb: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_sweep(verb, words)


def test_differences() -> None:
    before = {"training.seed": 0, "output_dir": "a", "training.resume": None}
    now = {"training": {"seed": 1, "resume": "auto"}, "output_dir": "b"}
    assert differences(before, now) == ["training.seed=1, was 0"]
