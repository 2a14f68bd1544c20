"""Files of strangers: what tries to run code or to leave its directory is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlora_builders import cli
from qlora_builders.config.shipped import demo_path

BASE = Path(demo_path("base"))
TOUCH = "+optimizer.command='touch OWNED'"
# command lines that would create a file called OWNED if anything in them were run
COMMANDS: dict[str, list[str]] = {
    "component os": [
        "finetune",
        "optimizer.component=os.system",
        TOUCH,
    ],
    "component builtins": ["finetune", "optimizer.component=builtins.exec"],
    "component subprocess": ["finetune", "optimizer.component=subprocess.Popen"],
    "component through a module": [
        "finetune",
        "optimizer.component=torch.optim.sgd.torch.hub.load",
    ],
    "component private": ["finetune", "optimizer.component=torch.optim.__builtins__.eval"],
    "component of a relative path": ["finetune", "optimizer.component=torch.optim...os.system"],
    "logger": ["finetune", "loggers=[{component: os.makedirs, name: OWNED}]"],
    "hydra target": [
        "finetune",
        "+optimizer._target_=os.system",
        TOUCH,
    ],
    "environment": ["finetune", "training.seed=${oc.env:SECRET}"],
    "decode": ["finetune", "training.seed=${oc.decode:'1'}"],
    "unknown resolver": ["finetune", "output_dir=${python:print}"],
    "hydra keys": ["finetune", "hydra.run.dir=OWNED"],
    "group outside": ["finetune", "experiment=../../../../etc/passwd"],
    "yaml tag": ["finetune", "experiment=evil", "--config-dir=configs"],
    "yaml aliases": ["finetune", "experiment=bomb", "--config-dir=bombs"],
    "yaml in itself": ["finetune", "experiment=bomb", "--config-dir=circles"],
    "aliases in rules": ["inspect", "components=bombs/experiment/bomb.yaml"],
    "python script as data": ["finetune", "data.train=evil.py"],
    "pickled weights": ["generate", "checkpoint.dir=pickled", "prompt=hi"],
    "pickled adapter": ["generate", "adapter.path=pickled_adapter", "prompt=hi"],
    "meta pickle": ["generate", "checkpoint.dir=meta", "prompt=hi", "tokenizer.path=plain"],
    "index upwards": ["generate", "checkpoint.dir=index_up", "prompt=hi"],
    "index absolute": ["generate", "checkpoint.dir=index_absolute", "prompt=hi"],
    "index folder": ["generate", "checkpoint.dir=index_folder", "prompt=hi"],
    "template globals": ["generate", "checkpoint.dir=template_globals", "prompt=hi"],
    "template classes": ["generate", "checkpoint.dir=template_classes", "prompt=hi"],
    "template include": ["generate", "checkpoint.dir=template_include", "prompt=hi"],
    "template without end": ["generate", "checkpoint.dir=template_endless", "prompt=hi"],
    "resume outside": ["finetune", "training.resume=pickled", "output_dir=run"],
}
TEMPLATES = {
    "template_globals": "{{ cycler.__init__.__globals__.os.system('touch OWNED') }}",
    "template_classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "template_include": "{% include '/etc/passwd' %}",
    "template_endless": "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}"
    "{% endfor %}",
}
# nine lists of nine, each of the one before: 387 million values
BOMB = (
    "[&a0 [x], " + ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)) + "]"
)
INDEXES = {"index_up": "../secret", "index_absolute": "/secret", "index_folder": "plain/model"}


class Payload:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, ("touch OWNED",)


def copy_base(path: Path) -> Path:
    return Path(shutil.copytree(BASE, path))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    copy_base(folder / "plain")
    (folder / "configs" / "experiment").mkdir(parents=True)
    (folder / "configs" / "experiment" / "evil.yaml").write_text(
        "# @package _global_\ntraining:\n  seed: !!python/object/apply:os.system ['touch OWNED']\n"
    )
    for name, components in (("bombs", BOMB), ("circles", "&a [*a]")):
        (folder / name / "experiment").mkdir(parents=True)
        text = f"# @package _global_\ncomponents: {components}\n"
        (folder / name / "experiment" / "bomb.yaml").write_text(text)
    (folder / "evil.py").write_text("import os\nos.system('touch OWNED')\n")
    pickled = copy_base(folder / "pickled")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    (folder / "pickled_adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "pickled_adapter" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "pickled_adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))
    (folder / "meta").mkdir()
    params = {"dim": 64, "n_layers": 1, "n_heads": 4, "vocab_size": 32, "norm_eps": 1e-5}
    (folder / "meta" / "params.json").write_text(json.dumps(params))
    torch.save({"tok_embeddings.weight": Payload()}, folder / "meta" / "consolidated.00.pth")
    for name, target in INDEXES.items():
        checkpoint = copy_base(folder / name)
        (checkpoint / "model.safetensors").unlink()
        index = {"weight_map": {"model.norm.weight": f"{target}.safetensors"}}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, template in TEMPLATES.items():
        file = copy_base(folder / name) / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_refused(
    name: str,
    hostile: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(hostile)
    monkeypatch.setenv("SECRET", "7")
    before = sorted(hostile.rglob("*"))
    assert cli.main(COMMANDS[name]) == 2
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines), output.err
    assert "root:" not in output.out + output.err  # of /etc/passwd
    assert sorted(hostile.rglob("*")) == before


def test_code_that_a_checkpoint_names_is_never_imported(
    hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto_map` and its like say which Python file a model or tokenizer needs."""
    checkpoint = copy_base(tmp_path / "base")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((checkpoint / name).read_text())
        content |= {"auto_map": {"AutoModel": "evil.Model", "AutoTokenizer": ["evil.T", None]}}
        (checkpoint / name).write_text(json.dumps(content))
    shutil.copy(hostile / "evil.py", checkpoint)
    monkeypatch.chdir(tmp_path)
    words = [f"checkpoint.dir={checkpoint}", "prompt=hi", "max_new_tokens=1"]
    assert cli.main(["generate", *words]) == 0
    assert not (tmp_path / "OWNED").exists()
