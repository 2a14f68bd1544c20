"""A stranger's --config-dir or pasted override runs nothing, reads and writes nothing unasked."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_builders import cli

G = "# @package _global_\n"
OURS = "qlora_builders.config.instantiate.instantiate"
TENSORBOARD = "qlora_builders.training.loggers.TensorBoardLogger"
DOUBLING = "\n".join(f"  a{i}: ${{optimizer.a{i + 1}}}${{optimizer.a{i + 1}}}" for i in range(40))
LISTS = "\n".join(f"  a{i}: [&x '${{optimizer.a{i + 1}}}', *x]" for i in range(40))
CHAIN = "\n".join(f"  a{i}: ${{optimizer.a{i + 1}}}" for i in range(2000))

# content of experiment/mine.yaml
EXPERIMENTS = {
    "our own factory": f"{G}loggers:\n- component: {OURS}\n  node: {{component: torch.hub.load, "
    "repo_or_dir: evil, model: pwn, source: local}\n  key: x\n  allow: [torch.]\n",
    "allow in a node": f"{G}optimizer: {{component: torch.hub.load, allow: [torch.]}}\n",
    "allow beside the nodes": f"{G}allow: [torch.]\n",
    "our command line": f"{G}loggers: [{{component: qlora_builders.cli.main, argv: [evil]}}]\n",
    "our writer": (
        f"{G}loggers: [{{component: qlora_builders.files.outputs.write_whole, path: OWNED}}]\n"
    ),
    "our process": f"{G}loggers: [{{component: qlora_builders.sweep.JobRunner}}]\n",
    "optimizer module": f"{G}optimizer: {{component: torch.optim.sgd.torch.load, f: evil.pt}}\n",
    "optimizer as logger": f"{G}loggers: [{{component: torch.optim.AdamW}}]\n",
    "logger as optimizer": f"{G}optimizer: {{component: {TENSORBOARD}}}\n",
    "another folder of a logger": f"{G}loggers: [{{component: {TENSORBOARD}, run_dir: OWNED}}]\n",
    "a file of a logger": f"{G}loggers: [{{component: {TENSORBOARD}, log_dir: OWNED}}]\n",
    "a config of a logger": f"{G}loggers: [{{component: {TENSORBOARD}, config: {{}}}}]\n",
    "a rule with a component": f"{G}components: [{{component: os.makedirs, name: OWNED}}]\n",
    "target": f"{G}optimizer: {{_target_: os.makedirs, name: OWNED}}\n",
    "target in a logger": f"{G}loggers: [{{_target_: os.makedirs, _args_: [OWNED]}}]\n",
    "recursive target": f"{G}optimizer: {{_recursive_: true, betas: {{_target_: os.getcwd}}}}\n",
    "arguments by position": f"{G}optimizer: {{_args_: [1]}}\n",
    "convert": f"{G}optimizer: {{_convert_: all}}\n",
    "python tag": f"{G}optimizer: {{lr: !!python/object/apply:os.makedirs [OWNED]}}\n",
    "python name": f"{G}optimizer: {{lr: !!python/name:os.system}}\n",
    "environment": f"{G}output_dir: ${{oc.env:SECRET}}\n",
    "environment with a default": f"{G}output_dir: ${{oc.env:NONE,x}}\n",
    "environment of hydra": f"{G}output_dir: ${{hydra:env.SECRET}}\n",
    "environment in two steps": f"{G}train: [oc.env]\noutput_dir: ${{${{train[0]}}:SECRET}}\n",
    "environment copied": f"{G}hydra: {{job: {{env_copy: [SECRET]}}}}\noutput_dir: a\n",
    "environment set": f"{G}hydra: {{job: {{env_set: {{LD_PRELOAD: evil.so}}}}}}\n",
    "search path": f"{G}hydra: {{searchpath: ['file:///tmp']}}\n",
    "place of hydra": "# @package hydra\nsearchpath: ['file:///tmp']\n",
    "another place": "# @package optimizer\ncomponent: os.makedirs\n",
    "two places": f"{G}# @package hydra\nrun: {{dir: OWNED}}\n",
    "created": f"{G}output_dir: ${{oc.create:'x'}}\n",
    "decoded": f"{G}training: {{seed: '${{oc.decode:\"1\"}}'}}\n",
    "relative to a node": f"{G}output_dir: ${{..data.train}}\n",
    "absolute defaults": f"{G}defaults: [/etc/passwd]\n",
    "defaults upwards": f"{G}defaults: [../../outside]\n",
    "defaults as a file": f"{G}defaults: ['file:///etc/passwd']\n",
    "defaults as a package": f"{G}defaults: ['pkg://evil']\n",
    "defaults of hydra": f"{G}defaults: [{{override /hydra/job_logging: colorlog}}]\n",
    "launcher of hydra": f"{G}defaults: [{{override hydra/launcher: joblib}}]\n",
    "defaults elsewhere": f"{G}defaults: [{{/optimizer@hydra: sgd}}]\n",
    "a choice upwards": f"{G}defaults: [{{override /optimizer: ../../outside}}]\n",
    "a choice of a secret": f"{G}defaults: [{{override /optimizer: '${{oc.env:SECRET}}'}}]\n",
    "dotted key": f"{G}training.seed: 3\n",
    "dotted argument": f"{G}optimizer: {{a.b: 3}}\n",
    "numbers as keys": f"{G}optimizer: {{1: 2}}\n",
    "key as text": f"{G}optimizer: {{'${{data.train}}': 1}}\n",
    "code of tasks": f"{G}lm_eval: {{tasks_dir: evil}}\n",
    "doubling text": f"{G}optimizer:\n{DOUBLING}\n  a40: x\n",
    "doubling lists": f"{G}optimizer:\n{LISTS}\n  a40: x\n",
    "long chain": f"{G}optimizer:\n{CHAIN}\n  a2000: x\n",
    "endless range": f"{G}components: [{{match: 'layers.[0-999999999].**', kind: linear}}]\n",
    "many choices": f"{G}components: [{{match: '{'{a,b}' * 40}', kind: linear}}]\n",
    "many stars": f"{G}components: [{{match: '{'*a' * 60}*b', kind: linear}}]\n",
    "long pattern": f"{G}components: [{{match: '{'*' * 5000}', kind: linear}}]\n",
    "endless tokens": f"{G}train: ['embed_tokens[0-99999999999]']\n",
}
SCHEMA = "training: {batch_size: 1}\nanything: else\n"
# other files of the folder -> their content, or what they link to
FOLDERS: dict[str, dict[str, str | Path]] = {
    "link to a file": {"experiment/mine.yaml": Path("/etc/passwd")},
    "link upwards": {"experiment/mine.yaml": Path("../../outside.yaml")},
    "link to a folder": {"experiment": Path("/etc")},
    "link to a folder inside": {"other/mine.yaml": G, "experiment": Path("other")},
    "link without end": {"experiment/mine.yaml": Path("/dev/zero")},
    "a shipped config": {"method/qlora.yaml": "name: mine\n", "experiment/mine.yaml": G},
    "a primary config": {"finetune.yaml": SCHEMA, "experiment/mine.yaml": G},
    "hydra's own": {"hydra/output/x.yaml": "dir: OWNED\n", "experiment/mine.yaml": G},
    "hydra's file": {"hydra.yaml": "run: {dir: OWNED}\n", "experiment/mine.yaml": G},
}
MINE = ["finetune", "--config-dir", "own", "experiment=mine"]
COMMANDS = {
    "search path": ["finetune", "hydra.searchpath=[file:///tmp]"],
    "added search path": ["finetune", "+hydra.searchpath=[file:///tmp]"],
    "placed group": ["finetune", "+optimizer@hydra=sgd"],
    "added group": ["finetune", "+hydra/launcher=x"],
    "removed": ["finetune", "~optimizer"],
    "our own package": ["finetune", "--allow", "qlora_builders", f"optimizer.component={OURS}"],
    "everything": ["finetune", "--allow", "", "optimizer.component=os.makedirs"],
    "escaped thrice": ["finetune", r"output_dir=\\\${oc.env:SECRET}"],
    "secret in a sweep": ["finetune", "--multirun", "optimizer.lr=1,2", "device=${oc.env:SECRET}"],
    "target in a sweep": ["finetune", "--multirun", "+optimizer._target_=a,b"],
    "component in a sweep": ["finetune", "--multirun", "optimizer.component=os.system,os.popen"],
    "parameters": ["finetune", "+optimizer.params=[]"],
    "private": ["finetune", "++optimizer.__class__=x"],
    "doubling": [
        "finetune",
        *(f"+optimizer.a{i}=${{optimizer.a{i + 1}}}${{optimizer.a{i + 1}}}" for i in range(20)),
    ],
}
PWN = "def pwn(*a, **k):\n    open('OWNED', 'w').write('x')\n"


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], str]:
    """Runs a command that has to be refused; returns what it says."""
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "hubconf.py").write_text(PWN)
    (tmp_path / "outside.yaml").write_text("component: torch.optim.SGD\nlr: 3.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "s3cr3t")

    def run(command: list[str]) -> str:
        before, environment = sorted(tmp_path.rglob("*")), dict(os.environ)
        loaded = set(sys.modules)
        assert cli.main([*command, "training.max_steps=1"]) == 2
        output = capsys.readouterr()
        assert output.err
        assert all(line.startswith("error: ") for line in output.err.splitlines()), output.err
        for text in ("s3cr3t", "root:"):
            assert text not in output.out + output.err
        assert sorted(tmp_path.rglob("*")) == before
        assert dict(os.environ) == environment
        assert not {"hubconf", "evil"} & (set(sys.modules) - loaded)
        return output.err

    return run


def test_the_tables_are_long() -> None:
    assert len(EXPERIMENTS) + len(FOLDERS) + len(COMMANDS) >= 60


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment(name: str, refused: Callable[[list[str]], str]) -> None:
    Path("own/experiment").mkdir(parents=True)
    Path("own/experiment/mine.yaml").write_text(EXPERIMENTS[name])
    refused(MINE)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder(name: str, refused: Callable[[list[str]], str]) -> None:
    for path, content in FOLDERS[name].items():
        file = Path("own") / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            file.symlink_to(content, target_is_directory=content.is_dir())
        else:
            file.write_text(content)
    refused(MINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command(name: str, refused: Callable[[list[str]], str]) -> None:
    refused(COMMANDS[name])
