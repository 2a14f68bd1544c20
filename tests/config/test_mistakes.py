"""Every mistake in an override or in a file of one's own has a readable message."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_builders.config.compose import compose
from qlora_builders.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.bach_size=2"], r"unknown key 'training\.bach_size'; .*'training\.batch_size'"),
        (["training.learning_rate=1"], r"'training\.learning_rate'; it is 'optimizer\.lr' here"),
        (["r=8"], r"unknown key 'r'; it is 'method\.rank' here"),
        (["batch_size=2"], r"unknown key 'batch_size'; did you mean 'training\.batch_size'\?"),
        (["+training.foo=1"], r"unknown key 'training\.foo'"),
        (["++foo=1"], r"unknown key 'foo'"),
        (["xxxxxxxx=1"], r"unknown key 'xxxxxxxx'; 'qlora finetune --help' lists the keys"),
        (["hydra.run.dir=x"], r"unknown key 'hydra\.run\.dir'"),
        (["training={bach:2}"], r"unknown key 'training\.bach'; .*'training\.batch_size'"),
        (["data.columns.promt=q"], r"did you mean 'data\.columns\.prompt'\?"),
        (["metod=qlora"], r"unknown key 'metod'; did you mean 'method'\?"),
        (["method=qlroa"], r"method=qlroa: no such config; did you mean 'qlora'\?"),
        (["method=null"], r"method=null: no such config; did you mean 'full'"),
        (["training.seed.x=1"], r"unknown key 'training\.seed\.x'"),
        (["components.0.rank=4"], r"components: takes a list, such as \[a,b\]"),
        (["output_dir=${output_dir}"], r"output_dir: Recursive interpolation detected"),
        (["experiment=demo_qlor"], r"no such config; did you mean 'demo_qlora'\?"),
        (["optimizer=zzz"], r"optimizer=zzz: no such config; allowed: adamw, adamw_8bit, "),
        (["training.batch_size=abc"], r"training\.batch_size: Value 'abc' is not a whole number"),
        (["training.batch_size=null"], r"training\.batch_size: null is not allowed here"),
        (["output_dir=null"], r"output_dir: null is not allowed here"),
        (["training.batch_size=1,2"], r"has several values; write \[1,2\] for a list"),
        (["components=[{match:layers.[0-1].**,kind:linear}]"], r"cannot read the override .*quote"),
        (["training.batch_size"], r"'training\.batch_size' is not KEY=VALUE"),
        (["~training.seed=1"], r"keys cannot be removed; write training\.seed=null"),
        (["data.eval=${foo}"], r"data\.eval: Interpolation key 'foo' not found"),
        (["device=gpu", "training.epochs=0"], r"epochs=0 must be >= 1\ndevice='gpu' is not"),
        (["method=full", "method.rank=4"], r"method\.rank=4 has no effect: method=full"),
        (
            ["experiment=llama3_2_1b_qlora_1x8gb"],
            r"checkpoint\.dir is required.*\ndata\.train is requi",
        ),
        (["data=chat"], r"data\.train is required: the demo file has instruct rows"),
    ],
)
def test_mistakes(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose("finetune", overrides)


def problems(verb: str, overrides: list[str], config_dir: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        compose(verb, overrides, config_dir=config_dir)
    return str(raised.value).splitlines()


def test_every_kind_of_mistake_is_in_one_error() -> None:
    overrides = [
        "training.bach_size=2",
        "training.max_steps=ten",
        "method=full",
        "method.rank=4",
        "optimizer=adamv",
        "training.seed",
        "device=gpu",
        "training.epochs=0",
    ]
    assert problems("finetune", overrides) == [
        "unknown key 'training.bach_size'; did you mean 'training.batch_size'?",
        "optimizer=adamv: no such config; did you mean 'adamw'?",
        "'training.seed' is not KEY=VALUE, such as training.batch_size=8; "
        "put quotes around a value with spaces",
        "training.max_steps: Value 'ten' is not a whole number",
        "training.epochs=0 must be >= 1",
        "device='gpu' is not allowed; allowed: auto, cpu, cuda, cuda:N",
    ]
    overrides.remove("optimizer=adamv")  # which may have set anything
    assert problems("finetune", overrides)[-1] == (
        "method.rank=4 has no effect: method=full does not take it"
    )


@pytest.mark.parametrize(
    ("verb", "overrides", "message"),
    [
        ("generate", ["temprature=0.7", "top_k=5", "prompt=a"], "did you mean 'temperature'"),
        ("generate", ["temperature=warm", "top_k=5", "prompt=a"], "temperature: Value 'warm'"),
        ("evaluate", ["data.evl=x", "data=text"], "unknown key 'data.evl'; did you mean"),
        ("merge", ["adapter.pth=x", "output_dir=y"], "unknown key 'adapter.pth'; did you mean"),
        ("finetune", ["experiment=min", "training.eval_every=5", "data.train=x"], "experiment=min"),
        ("generate", ["promt=a"], "did you mean 'prompt'"),
    ],
)
def test_what_follows_from_a_mistake_is_no_other_one(
    verb: str, overrides: list[str], message: str
) -> None:
    (problem,) = problems(verb, overrides)
    assert message in problem


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
    return folder


def test_own_configs(tmp_path: Path) -> None:
    own = tmp_path / "it's, mine"
    write(own, "experiment/mine", "# @package _global_\ntraining: {max_steps: 3}\n")
    write(own, "optimizer/rms", "component: torch.optim.RMSprop\nlr: 1e-3\n")
    cfg = compose("finetune", ["experiment=mine", "optimizer=rms"], config_dir=own)
    assert cfg.training.max_steps == 3
    assert cfg.optimizer == {"component": "torch.optim.RMSprop", "lr": 1e-3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {max_steps: 3}\n", r"mine\.yaml: unknown key 'experiment'; .*'# @package _glo"),
        ("# @package _global_\ntraining: {max_stps: 3}\n", r"mine\.yaml: .*'training\.max_steps'"),
        ("# @package _global_\ntraining: {max_steps: x}\n", r"mine\.yaml: training\.max_steps: Va"),
        ("# @package _global_\ntraining: [a: }\n", r"mine\.yaml, line 2: not valid YAML: "),
        (
            "# @package _global_\ndefaults:\n  - override /method: qlroa\n",
            r"method=qlroa: no such config; did you mean 'qlora'",
        ),
        (
            "# @package _global_\ndefaults:\n  - override /metod: qlora\n",
            r"mine\.yaml: unknown group 'metod'; did you mean 'method'",
        ),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    own = write(tmp_path, "experiment/mine", text)
    with pytest.raises(ConfigError, match=message):
        compose("finetune", ["experiment=mine"], config_dir=own)


def test_all_mistakes_of_a_file_are_in_one_error(tmp_path: Path) -> None:
    text = (
        "# @package _global_\ntraining: {max_stps: 3, seed: x, epochs: 0}\ndata: {format: chatt}\n"
    )
    own = write(tmp_path, "experiment/mine", text)
    write(tmp_path, "method/mine", "name: qlora\nrnak: 4\ntargets: q_proj\n")
    found = problems("finetune", ["method=mine", "experiment=mine", "training.epoch=2"], own)
    assert found == [
        "unknown key 'training.epoch'; did you mean 'training.epochs'?",
        "method/mine.yaml: unknown key 'method.rnak'; did you mean 'method.rank'?",
        "method/mine.yaml: method.targets: takes a list, such as [a,b]",
        "experiment/mine.yaml: unknown key 'training.max_stps'; did you mean 'training.max_steps'?",
        "experiment/mine.yaml: training.seed: Value 'x' is not a whole number",
        "data.format='chatt' is not allowed; allowed: chat, instruct, text, preference; did you "
        "mean 'chat'?",
    ]


def test_config_dir_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'nowhere' is not a folder"):
        compose("finetune", config_dir="nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match="loop cannot be used: Too many levels"):
        compose("finetune", config_dir=tmp_path / "loop")
    (tmp_path / "loop").unlink()
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    with pytest.raises(ConfigError, match="is no file that can be read; take it out"):
        compose("finetune", config_dir=tmp_path)
    (tmp_path / "loop.yaml").unlink()
    own = write(tmp_path, "method/qlora", "name: mine\n")
    with pytest.raises(ConfigError, match="has the name of a shipped config; rename it"):
        compose("finetune", config_dir=own)
