"""A step checkpoint holds all that a run needs, and says so when it no longer does."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from archs import tiny_arch

from qlora_builders import llama, load_checkpoint, save_checkpoint
from qlora_builders.checkpoint import load_with_adapter
from qlora_builders.errors import CheckpointError
from qlora_builders.files.folders import crc32
from qlora_builders.modules import CausalLM
from qlora_builders.runs import state
from qlora_builders.runs.folder import read_step
from qlora_builders.runs.state import (
    StepState,
    capture_step,
    load_step,
    random_state,
    write_step,
)
from qlora_builders.runs.state import set_random_state as set_state

ARCH = tiny_arch(vocab_size=31, hidden_size=16, intermediate_size=24)
QLORA = [{"match": "layers.**", "kind": "qlora", "rank": 2, "alpha": 4, "dropout": 0.3}]
FULL = [{"match": "**", "kind": "linear", "trainable": True}]
PLANS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "adapters": (QLORA, []),
    "dora": ([QLORA[0] | {"use_dora": True}], []),
    "pissa": ([QLORA[0] | {"use_dora": True, "init_lora_weights": "pissa_niter_2"}], []),
    "token rows": (QLORA, ["embed_tokens[3,7-9]"]),
    "adapters and whole parameters": (QLORA, ["norm", "embed_tokens"]),
    "whole weights": (FULL, ["norm", "embed_tokens"]),
    "a part of them": ([{"match": "**", "kind": "frozen_nf4"}, FULL[0] | {"match": "lm_head"}], []),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "fused adamw": partial(torch.optim.AdamW, fused=True),
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adafactor": torch.optim.Adafactor,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base") / "hf"
    save_checkpoint(llama(ARCH), path)
    return path


def make(base: Path, plan: str, optimizer: str = "adamw") -> tuple[CausalLM, Any]:
    components, train = PLANS[plan]
    model = load_checkpoint(base, components, train=train, compute_dtype=torch.float32)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model.train(), OPTIMIZERS[optimizer](trained, lr=1e-2)


def train(model: CausalLM, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Draws its data, so that every generator matters."""
    losses = []
    for _ in range(steps):
        seed = random.randrange(10**6) + int(np.random.randint(10**6))
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(ARCH.vocab_size, (2, 7), generator=generator)
        logits = model(ids)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def capture(
    model: CausalLM, optimizer: torch.optim.Optimizer, base: Path, **options: Any
) -> StepState:
    about = {"note": "x"}
    return capture_step(model, optimizer, step=4, about=about, base_model=str(base), **options)


def save(folder: Path, model: CausalLM, optimizer: torch.optim.Optimizer, base: Path) -> None:
    write_step(folder, capture(model, optimizer, base))


@pytest.mark.parametrize(
    ("plan", "optimizer"),
    [*((plan, "adamw") for plan in PLANS), *(("adapters", name) for name in OPTIMIZERS)],
)
def test_training_goes_on_bit_for_bit(
    base: Path, tmp_path: Path, plan: str, optimizer: str
) -> None:
    """Also from a copy that is written while training goes on: then its files are the same."""
    model, own = make(base, plan, optimizer)
    train(model, own, 4)
    save(tmp_path / "step_4", model, own, base)
    copy = capture(model, own, base, copied=True)
    expected = train(model, own, 4)
    write_step(tmp_path / "later", copy)
    files = sorted(file.name for file in (tmp_path / "step_4").iterdir())
    assert sorted(file.name for file in (tmp_path / "later").iterdir()) == files
    for name in files:
        if name.endswith(".safetensors"):
            later, at_once = ((tmp_path / f / name).read_bytes() for f in ("later", "step_4"))
            assert later == at_once
    assert read_step(tmp_path / "step_4") == (4, {"step": 4, "note": "x"})
    for folder in ("step_4", "later"):
        again, other = make(base, plan, optimizer)
        assert train(again, other, 1) != expected[:1]
        load_step(tmp_path / folder, again, other)
        assert train(again, other, 4) == expected


def test_a_step_checkpoint_is_an_adapter_or_a_model(base: Path, tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2, 3]])
    for plan in ("adapters", "whole weights"):
        folder = tmp_path / plan
        model, optimizer = make(base, plan)
        train(model, optimizer, 2)
        save(folder, model, optimizer, base)
        if plan == "adapters":
            other = load_with_adapter(base, folder, compute_dtype=torch.float32)
        else:
            other = load_checkpoint(folder, dtype=torch.float32)
        torch.testing.assert_close(other(ids), model.eval()(ids))


def test_generators_come_back() -> None:
    device = torch.device("cpu")
    np.random.standard_normal()  # leaves a second one for the next call
    state = random_state(device)
    draws = [(random.random(), np.random.standard_normal(), torch.rand(1).item()) for _ in "ab"]
    set_state(state, device)
    assert draws == [
        (random.random(), np.random.standard_normal(), torch.rand(1).item()) for _ in "ab"
    ]


@pytest.mark.gpu
def test_the_generator_of_the_gpu_comes_back() -> None:
    device = torch.device("cuda")
    state = random_state(device)
    draw = torch.rand(3, device=device)
    set_state(state, device)
    assert torch.equal(torch.rand(3, device=device), draw)


class Opaque:
    pass


def test_an_optimizer_that_could_not_be_restored_is_found_out_when_it_is_saved(
    base: Path, tmp_path: Path
) -> None:
    model, optimizer = make(base, "adapters")
    optimizer.state[optimizer.param_groups[0]["params"][0]]["hook"] = Opaque()
    with pytest.raises(CheckpointError, match="the optimizer keeps state that cannot be restored"):
        save(tmp_path / "step_4", model, optimizer, base)
    assert list(tmp_path.iterdir()) == []


def test_another_model_or_optimizer_is_refused(base: Path, tmp_path: Path) -> None:
    save(tmp_path / "step_4", *make(base, "adapters"), base)
    model = make(base, "adapters")[0]
    few = torch.optim.AdamW(list(model.parameters())[:1])
    for given, message in (
        (make(base, "adapters and whole parameters"), "parameters of the model that are not in"),
        (make(base, "whole weights"), "neither model.safetensors nor"),
        ((model, few), "train_state.pt: does not fit the optimizer"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_step(tmp_path / "step_4", *given)


def test_whole_weights_of_another_shape_or_name_are_refused(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step_4"
    model, optimizer = make(base, "whole weights")
    save(folder, model, optimizer, base)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(3, 2))
    message = r"safetensors: lm_head.weight has shape \[31, 16\]; the model needs \[3, 2\]"
    with pytest.raises(CheckpointError, match=message):
        load_step(folder, model, optimizer)
    model.extra = torch.nn.Linear(2, 2, bias=False)
    del model.lm_head
    with pytest.raises(CheckpointError, match=r"step_4: extra.weight is missing, which the model"):
        load_step(folder, model, optimizer)


def first(state: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = state["state"][0]
    return values


UNFIT: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "shape": ("adamw", lambda s: first(s).update(exp_avg=torch.zeros(2, 3)), "'exp_avg'.*shape"),
    "scalar": ("adamw", lambda s: first(s).update(exp_avg_sq=torch.tensor(1.0)), r"shape \[\]"),
    "missing": ("fused adamw", lambda s: first(s).pop("exp_avg"), r"\['exp_avg'\] is missing"),
    "type": ("adamw", lambda s: first(s).update(exp_avg="x"), "'exp_avg'"),
    "a parameter": ("adamw", lambda s: s["state"].pop(3), r"\['state'\]\[3\]\['step'\] is missing"),
    "momentum": ("sgd", lambda s: first(s).update(momentum_buffer=torch.zeros(1)), "momentum_buf"),
    "factor": ("adafactor", lambda s: first(s).update(row_var=torch.zeros(7, 1)), "'row_var'"),
    "lr": ("adamw", lambda s: s["param_groups"][0].update(lr="x"), "lr is 'x', not a finite"),
    "no lr": ("adamw", lambda s: s["param_groups"][0].pop("lr"), "KeyError..lr"),
    "betas": ("adamw", lambda s: s["param_groups"][0].update(betas=3), "betas is int, not tuple"),
    "eps": ("adamw", lambda s: s["param_groups"][0].update(eps=float("nan")), "eps is nan"),
    "groups": ("adamw", lambda s: s.update(param_groups=[]), "."),
    "options": ("adamw", lambda s: s["param_groups"][0].pop("betas"), "betas"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_state_that_does_not_fit_the_optimizer_is_refused(
    base: Path, tmp_path: Path, name: str
) -> None:
    """Not found out by the first step, with an error of torch's."""
    optimizer, change, message = UNFIT[name]
    model, own = make(base, "adapters", optimizer)
    train(model, own, 1)
    save(tmp_path / "step_4", model, own, base)
    file = tmp_path / "step_4" / "train_state.pt"
    state = torch.load(file, weights_only=True)
    change(state["optimizer"])
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_step(tmp_path / "step_4", *make(base, "adapters", optimizer))
    assert str(file) in str(caught.value)


# ---- damage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "step_4"
    save(folder, *make(base, "adapters"), base)
    return folder


@pytest.fixture
def step(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "step_4"))


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "adapter_config.json", "train_state.pt", "train_state.json"],
)
def test_any_damage_to_any_file_is_noticed(step: Path, name: str) -> None:
    file = step / name
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"step_4: {name} is missing"):
        read_step(step)
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=rf"{name} has [\d,]+ bytes, but [\d,]+ were written"):
        read_step(step)
    draw = random.Random(name)
    for _ in range(20):
        broken = bytearray(content)
        broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=rf"{name} is not what was written \(CRC-32\)"):
            read_step(step)
    file.write_bytes(content)
    assert read_step(step)[0] == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "manifest.json: missing; expected the list of a checkpoint's files"),
        ("", "manifest.json: not JSON: Expecting value"),
        ("[" * 10**5, "manifest.json: not JSON that can be read: nested too deeply"),
        ("[]", "manifest.json: holds list, expected an object"),
        ("{}", "manifest.json: files is NoneType; expected an object"),
        ('{"files": []}', "manifest.json: files is list; expected an object"),
        ('{"files": {"a": 1}}', "manifest.json: a is 1; expected an object"),
        ('{"files": {"a": {"bytes": true, "crc32": ""}}}', "bytes of a is True; expected int"),
        ('{"files": {"a": {"bytes": 1, "crc32": 7}}}', "crc32 of a is 7; expected str"),
        ('{"files": {"a": {"bytes": 1, "crc32": ""}}}', "a is missing"),
        ('{"files": {"a": {}, "a": {}}}', "manifest.json: not JSON: key 'a' appears twice"),
        ('{"files": {}}', "manifest.json does not list adapter_config.json"),
        *(
            (json.dumps({"files": {name: {}}}), r"is no name of a file beside it")
            for name in ("../../etc/passwd", "/etc/passwd", "", ".", "..", "a/b", "a\0", "\ud800")
        ),
        (json.dumps({"files": {"x" * 300: {"bytes": 1, "crc32": ""}}}), "File name too long"),
    ],
)
def test_a_broken_manifest_is_an_error(step: Path, text: str | None, message: str) -> None:
    file = step / "manifest.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_step(step)
    for other in step.iterdir():
        other.unlink()
    file.write_text('{"files": {}}')  # over nothing it is no checkpoint
    with pytest.raises(CheckpointError, match=r"train_state.json: missing; expected a step"):
        read_step(step)


def test_checksums_are_the_usual_ones(good: Path, tmp_path: Path) -> None:
    listed = json.loads((good / "manifest.json").read_text())["files"]
    assert {*listed, "manifest.json"} == {file.name for file in good.iterdir()}
    for name, entry in listed.items():
        content = (good / name).read_bytes()
        assert entry == {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    content = random.Random(0).randbytes(3 * 2**20 + 7)  # read in pieces
    (tmp_path / "file").write_bytes(content)
    assert crc32(tmp_path / "file") == f"{zlib.crc32(content):08x}"


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    """torch.save hides it; what it hides is what a user has to know."""
    with pytest.raises(OSError, match="No space left on device"):
        state._save_state({"a": torch.zeros(10**5)}, Path("/dev/full"))
