"""Hugging Face directories in and out, every layout and kind of damage; state_dicts; which reader a
directory gets."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from shared import (
    DTYPES,
    FROZEN,
    Checkpoints,
    assert_close,
    assert_same_bits,
    assert_same_files,
    checkpoints,
    dequantized,
    edit_json,
    edit_tensors,
    reference,
    refused,
    stored,
)
from torch import Tensor

from qlora_builders.checkpoint import (
    load_checkpoint,
    read_arch,
    read_tensors,
    save_checkpoint,
    stored_plan,
    tensor_files,
)
from qlora_builders.checkpoint.formats import detect_format
from qlora_builders.errors import CheckpointError, PlanError
from qlora_builders.models import llama
from qlora_builders.modules import FrozenNF4Linear, LoRALinear
from qlora_builders.tensor import NF4Tensor, to_nf4

QLORA = {"match": "layers.**", "kind": "qlora", "rank": 4, "alpha": 8}
UP = "model.layers.1.mlp.up_proj.weight"
LAYOUTS = ("gqa", "tied", "biased", "linear_rope")


def saved(path: Path, rules: tuple = (), *, source: Path | None = None, **options: Any) -> Path:
    """The checkpoint `source`, loaded under rules, in a folder of `path`."""
    save_checkpoint(load_checkpoint(source or checkpoints(), rules), path / "out", **options)
    return path / "out"


# ---- what is loaded -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", LAYOUTS)
@pytest.mark.parametrize("sharded", [False, True])
def test_plain_logits_equal_transformers(variant: str, sharded: bool) -> None:
    path = checkpoints(variant, sharded=sharded)
    assert (len(list(path.glob("*.safetensors"))) > 2) == sharded
    assert_close(load_checkpoint(path, dtype=torch.float32), reference(path))


@pytest.mark.parametrize("written", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(written: torch.dtype, dtype: torch.dtype) -> None:
    """Each tensor is the stored one, cast once or quantized from that."""
    path = checkpoints("biased", written, sharded=True)
    model = load_checkpoint(path, [QLORA], train=["norm"], dtype=dtype)
    expected = stored(path)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert parameter.dtype == torch.float32
            continue
        own = expected.pop(name)
        if name == "model.norm.weight":
            assert parameter.requires_grad
            assert torch.equal(parameter, own.float())
            continue
        assert parameter.dtype == dtype
        if isinstance(parameter, NF4Tensor):
            want = to_nf4(own.to(dtype))
            for field in NF4Tensor.tensor_fields:
                assert torch.equal(getattr(parameter, field), getattr(want, field)), name
        else:
            assert torch.equal(parameter, own.to(dtype)), name
    assert not expected


def test_plan_and_adapters() -> None:
    model = load_checkpoint(checkpoints(), [QLORA])
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert len(layers) == 14
    for layer in layers:
        assert isinstance(layer.weight, NF4Tensor)
        assert not layer.lora_B.weight.any()
        assert layer.lora_A.weight.std() > 0
        assert layer.lora_A.weight.requires_grad
    assert not any(parameter.is_meta for parameter in model.parameters())
    rule = {"match": "layers.*.mlp.*", "kind": "frozen_nf4", "block_size": 32}
    model = load_checkpoint(checkpoints("biased"), [rule | {"scale_format": "none"}])
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, FrozenNF4Linear)
    assert (layer.weight.format.block_size, layer.weight.format.scale_format) == (32, "none")
    assert layer.bias is not None


def test_adapter_init_is_seeded() -> None:
    path = checkpoints()  # writing it draws random numbers too
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = load_checkpoint(path, [QLORA])
        weights.append(model.model.layers[1].mlp.up_proj.lora_A.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_weights_do_not_depend_on_the_file(own_copy: Checkpoints) -> None:
    path = own_copy()
    model = load_checkpoint(path, dtype=torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    file = path / "model.safetensors"
    with file.open("r+b") as handle:  # in place: a mapping of the file would see it
        size = file.stat().st_size
        handle.seek(size // 2)
        handle.write(bytes(size - size // 2))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_loading_does_not_import_the_compiler() -> None:
    """It would take longer, and more memory, than a small model."""
    code = """
        import sys
        from qlora_builders import load_checkpoint
        rule = {"match": "layers.**", "kind": "qlora", "rank": 4, "alpha": 8}
        model = load_checkpoint(sys.argv[1], [rule])
        heavy = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "triton")
        print([name for name in heavy if name in sys.modules])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(checkpoints())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_arch_overrides_the_config() -> None:
    path = checkpoints()
    arch = replace(read_arch(path), rope_theta=1e6)
    assert load_checkpoint(path, arch=arch).spec.arch == arch


def test_tied_head(own_copy: Checkpoints) -> None:
    file = own_copy("tied") / "model.safetensors"
    embedding = load_file(file)["model.embed_tokens.weight"]
    path = edit_tensors(file, {"lm_head.weight": embedding.clone()})  # some writers store it twice
    for directory in (checkpoints("tied"), path):
        model = load_checkpoint(directory)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not model.lm_head.weight.is_meta


def test_rotary_buffers_of_old_files_are_ignored(own_copy: Checkpoints) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load_checkpoint(edit_tensors(own_copy() / "model.safetensors", {name: torch.ones(8)}))


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({UP: None}, f"tensors missing: {UP}; not expected: none"),
        ({"model.surplus": torch.ones(2)}, "tensors missing: none; not expected: model.surplus"),
        ({UP: torch.ones(96, 63)}, f"{UP} has shape .*63.*; the model needs"),
        ({"model.norm.weight": torch.ones(65)}, "model.norm.weight has shape .*65"),
        ({UP: torch.ones(96, 64, dtype=torch.int8)}, f"{UP} has dtype torch.int8; expected float"),
        ({UP: torch.full((96, 64), torch.nan)}, f"model.safetensors: {UP}: .*NaN"),
        ({UP: torch.full((96, 64), torch.inf)}, f"model.safetensors: {UP}: .*(inf|Inf)"),
        # infinity in float16
        ({UP: 70_000 * torch.eye(96, 64)}, f"model.safetensors: {UP}: .*(inf|Inf)"),
    ],
)
def test_damaged_tensors(
    own_copy: Checkpoints, changes: dict[str, Tensor | None], message: str
) -> None:
    path = edit_tensors(own_copy() / "model.safetensors", changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path, [QLORA], dtype=torch.float16)
    assert str(path) in str(caught.value)


def test_many_missing_tensors_are_counted(own_copy: Checkpoints) -> None:
    file = own_copy() / "model.safetensors"
    path = edit_tensors(file, {name: None for name in load_file(file) if "layers.1" in name})
    refused(r"missing: (model[^,]*, ){7}\S+ and 1 more", load_checkpoint, path)


def test_untied_head_under_a_tying_config(own_copy: Checkpoints) -> None:
    head = {"lm_head.weight": torch.zeros(53, 64)}
    path = edit_tensors(own_copy("tied") / "model.safetensors", head)
    message = "lm_head.weight differs from model.embed_tokens.weight, but config.json ties them"
    refused(message, load_checkpoint, path)


def test_not_a_checkpoint(tmp_path: Path, own_copy: Checkpoints) -> None:
    refused(r"config\.json: missing", load_checkpoint, tmp_path)
    path = own_copy()
    intact = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").unlink()
    refused(r"neither model\.safetensors nor model\.safetensors", load_checkpoint, path)
    for content in (b"<html>not found</html>", intact[:-100]):
        (path / "model.safetensors").write_bytes(content)
        refused("cannot be read as safetensors", load_checkpoint, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({UP: "../x.safetensors"}, "points to '../x"),
        ({UP: "/etc/passwd"}, "points to '/etc/passwd'"),
        ({UP: ".."}, "shards missing"),
        ({UP: "x" * 999}, "shards missing: xxx"),
        ({UP: 3}, "points to 3"),
        ({UP: "gone.safetensors"}, "shards missing: gone.safetensors; download again"),
        ({UP: "model-00001-of-NN.safetensors"}, f"no tensor '{UP}', though .* names it here"),
        (None, "not a safetensors index: it has no weight_map"),
        ([1], "not a safetensors index"),
    ],
)
def test_bad_index(own_copy: Checkpoints, changes: Any, message: str) -> None:
    path = own_copy(sharded=True)
    file = path / "model.safetensors.index.json"
    weight_map = json.loads(file.read_text())["weight_map"]
    first = weight_map["model.embed_tokens.weight"]
    if isinstance(changes, dict):
        changes = weight_map | {k: first if "NN" in str(v) else v for k, v in changes.items()}
    edit_json(file, {"weight_map": changes})
    refused(message, load_checkpoint, path)


def test_plan_that_does_not_fit() -> None:
    with pytest.raises(PlanError, match="the layers are 0 to 1"):
        load_checkpoint(checkpoints(), [QLORA | {"match": "layers.2.**"}])


# ---- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", LAYOUTS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
@pytest.mark.parametrize("with_companions", [False, True])
def test_transformers_gives_our_logits(
    tmp_path: Path, variant: str, max_shard_bytes: int, with_companions: bool
) -> None:
    """Without companions config.json is ours alone."""
    source, out = checkpoints(variant), tmp_path / "out"
    model = load_checkpoint(source, [FROZEN], dtype=torch.float32)
    companions = source if with_companions else None
    save_checkpoint(model, out, max_shard_bytes=max_shard_bytes, companions=companions)
    assert (out / "model.safetensors.index.json").exists() == (max_shard_bytes < 10**9)
    assert_close(reference(out), model)
    assert read_arch(out) == read_arch(source)


def test_plain_round_trip_is_exact(tmp_path: Path) -> None:
    source = checkpoints("biased", torch.bfloat16)
    assert_same_files(
        source / "model.safetensors", saved(tmp_path, source=source) / "model.safetensors"
    )


def test_tied_head_is_written_once(tmp_path: Path) -> None:
    assert "lm_head.weight" not in stored(saved(tmp_path, source=checkpoints("tied")))


@pytest.mark.parametrize(
    ("dtype", "norm", "others"),
    [(None, torch.float32, torch.bfloat16), (torch.float16, torch.float16, torch.float16)],
)
def test_dtype(
    tmp_path: Path, dtype: torch.dtype | None, norm: torch.dtype, others: torch.dtype
) -> None:
    model = load_checkpoint(checkpoints(), [FROZEN], train=["norm"])
    save_checkpoint(model, tmp_path / "out", dtype=dtype)
    tensors = stored(tmp_path / "out")
    assert tensors.pop("model.norm.weight").dtype == norm  # it trains, so its own is wider
    assert {tensor.dtype for tensor in tensors.values()} == {others}
    named = json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"]
    assert f"torch.{named}" == str(others)


def test_companions(tmp_path: Path) -> None:
    source = checkpoints()
    out = saved(tmp_path, companions=source)
    names = {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
    }  # fmt: skip
    for name in names:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert {file.name for file in out.iterdir()} == names | {"config.json", "model.safetensors"}
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (5, [6, 7])
    assert "dtype" not in config  # the source's: it would contradict torch_dtype


def test_config_is_the_models_and_not_the_companions(tmp_path: Path) -> None:
    source = checkpoints("biased")
    arch = replace(read_arch(source), rope_theta=1e6, rope_scaling=None)
    model = load_checkpoint(source, arch=arch)
    save_checkpoint(model, tmp_path / "out", companions=source)
    assert model.spec.arch == read_arch(tmp_path / "out") == arch


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("hf", "has LoRA adapters; write them with save_adapter"),
        ("gguf", "format is 'gguf'; allowed: bnb-4bit, hf, native, nf4"),
    ],
)
def test_what_is_not_written(tmp_path: Path, format: str, message: str) -> None:
    refused(message, saved, tmp_path, (QLORA,), format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("existing", [False, True])
def test_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    model = load_checkpoint(checkpoints())
    out = tmp_path / "out"
    if existing:
        save_checkpoint(model, out)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    written = []
    write_file = tensor_files.write_file

    def full_disk(tensors: list, file: Path) -> None:
        if written:
            raise OSError("no space left on device")
        written.append(file)
        write_file(tensors, file)

    monkeypatch.setattr(tensor_files, "write_file", full_disk)
    with pytest.raises(CheckpointError, match="out: cannot be written: no space left"):
        save_checkpoint(model, out, max_shard_bytes=30_000)
    assert written  # it failed halfway, not at the start
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert after == before
    assert list(tmp_path.iterdir()) == ([out] if existing else [])


def test_existing_checkpoint_is_replaced(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_bytes=30_000)
    names = sorted(file.name for file in saved(tmp_path).iterdir())
    assert names == ["config.json", "model.safetensors"]


# ---- state_dict ---------------------------------------------------------------------------------

PLAN = [
    {"match": "layers.**", "kind": "qlora", "rank": 4, "alpha": 8},
    {"match": "layers.0.mlp.*", "kind": "frozen_nf4", "block_size": 32},
    {"match": "layers.1.mlp.*", "kind": "frozen_nf4", "scale_format": "none"},
]
PLAIN_PLAN = [
    {"match": "layers.**", "kind": "lora", "rank": 4, "alpha": 8},
    {"match": "layers.*.mlp.*", "kind": "linear"},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("variant", ["biased", "tied"])
def test_three_round_trips(variant: str, dtype: torch.dtype, assign: bool) -> None:
    first = load_checkpoint(checkpoints(variant), PLAN, dtype=dtype)
    model = first
    for _ in range(3):
        state = model.state_dict()
        assert not any(isinstance(tensor, NF4Tensor) for tensor in state.values())
        model = llama(first.spec.arch, PLAN, dtype=dtype, device="meta" if assign else "cpu")
        model.load_state_dict(state, strict=True, assign=assign)
        assert_same_bits(first, model, quantized=14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["biased", "tied"])
def test_same_state_dict_loads_into_the_plain_build(variant: str, dtype: torch.dtype) -> None:
    quantized = load_checkpoint(checkpoints(variant), PLAN, dtype=dtype)
    plain = llama(quantized.spec.arch, PLAIN_PLAN, dtype=dtype)
    plain.load_state_dict(quantized.state_dict(), strict=True)
    own = dict(plain.named_parameters())
    assert set(own) == {name for name, _ in quantized.named_parameters()}
    for name, parameter in quantized.named_parameters():
        assert torch.equal(own[name], dequantized(parameter)), name


# ---- formats ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in each format that we write."""
    path = tmp_path_factory.mktemp("formats")
    model = load_checkpoint(checkpoints(), [FROZEN])
    for format in ("hf", "nf4", "bnb-4bit"):
        save_checkpoint(model, path / format, format=format)
    return {format: path / format for format in ("hf", "nf4", "bnb-4bit")}


def test_detected(directories: dict[str, Path]) -> None:
    for format, path in directories.items():
        assert detect_format(path) == format
        assert read_arch(path) == read_arch(path, format=format) == read_arch(directories["hf"])
        names = {name for name, t in read_tensors(path).items() if t.quantized}
        assert len(names) == (0 if format == "hf" else 14)
        assert len(stored_plan(path)) == len(names)

    shapes = [
        {name: (t.shape, t.dtype) for name, t in read_tensors(path).items()}
        for path in directories.values()
    ]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("hf", "format is 'hf', but the directory is 'nf4'"),
        ("bnb4bit", "format is 'bnb4bit'; did you mean 'bnb-4bit'"),
        ("meta", r"params\.json: missing; expected .* Meta's layout"),
    ],
)
def test_override(directories: dict[str, Path], format: str, message: str) -> None:
    load_checkpoint(directories["nf4"], [FROZEN], format="nf4")
    refused(message, load_checkpoint, directories["nf4"], [FROZEN], format=format)


@pytest.mark.parametrize("read", [read_arch, read_tensors, load_checkpoint])
def test_not_a_directory(tmp_path: Path, read: Callable) -> None:
    for format in ("auto", "meta"):
        with pytest.raises(CheckpointError, match="no such directory; give a local checkpoint dir"):
            read(tmp_path / "gone", format=format)
