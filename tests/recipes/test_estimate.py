"""What `qlora estimate` prints, and what it refuses. The figures: tests/training/test_memory.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qlora_builders import cli
from qlora_builders.analysis.memory import CPU_COMPILE_BYTES

TERMS = {"embedding", "attention", "mlp", "norms", "lm_head", "adapters", "optimizer state"}
TERMS |= {"activations", "gradients", "temporaries"}


def estimate(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    assert cli.main(["estimate", *overrides]) == 0
    return capsys.readouterr().out


def test_columns_add_up_to_their_sums(capsys: pytest.CaptureFixture[str]) -> None:
    output = estimate(capsys, "model.arch=llama3_1_405b", "device=cuda", "method.rank=8")
    rows = re.findall(r"^ (\S.*?) {2,}(.*)$", output, re.MULTILINE)
    table = {name: [cell.replace(",", "") for cell in cells.split()] for name, cells in rows}
    assert table.keys() >= TERMS
    sums = [float(cell) for cell in table.pop("sum")]
    columns = [cells for name, cells in table.items() if name != "MiB at the peak of"]
    for phase, total in enumerate(sums):
        cells = [column[phase] for column in columns]
        parts = sum(float(cell) for cell in cells if cell != "-")
        assert parts == pytest.approx(total, abs=0.05 * len(cells))
    assert 190_000 < sums[0] < 215_000  # 405B parameters of 4.13 bits, and two 16-bit matrices
    assert "8 x 512 tokens on cuda, computed in bfloat16" in output


def test_what_is_in_host_memory_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("model.arch=llama3_1_8b", "device=cuda")
    on_gpu = estimate(capsys, *given)
    offloaded = estimate(capsys, *given, "distributed.cpu_offload=true")
    peaks = [
        float(re.findall(r"^peak ([\d.]+) GiB", text, re.M)[0]) for text in (on_gpu, offloaded)
    ]
    assert peaks[1] < peaks[0] - 3  # 8B parameters of 4.13 bits, three layers and the head are left
    assert "gradients and optimizer is in host memory" in offloaded
    assert "host memory" not in on_gpu


def test_compiling_takes_memory_on_cpus(capsys: pytest.CaptureFixture[str]) -> None:
    runtimes = []
    for mode in ("auto", "on"):
        options = ("model.arch=tinyllama_1_1b", "device=cpu", f"training.compile={mode}")
        found = re.search(r"^ runtime .* ([\d.]+)", estimate(capsys, *options), re.MULTILINE)
        assert found is not None
        runtimes.append(float(found[1]))
    assert runtimes[1] - runtimes[0] == CPU_COMPILE_BYTES / 2**20


def test_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("model.arch=llama3_2_1b", "device=cuda", "training.batch_size=1", "method=lora")
    output = estimate(capsys, *common, "memory=6GiB")
    fits = re.search(r"into 6GiB fit 1 x ([\d,]+) tokens, or ([\d,]+) x 512", output)
    assert fits is not None
    longest, largest = (int(group.replace(",", "")) for group in fits.groups())
    assert longest % 64 == 0
    for key, value, inside in (
        ("data.max_seq_len", longest, True),
        ("data.max_seq_len", longest + 64, False),
        ("training.batch_size", largest, True),
        ("training.batch_size", largest + 1, False),
    ):
        peak = re.search(r"peak ([\d.]+) GiB", estimate(capsys, *common, f"{key}={value}"))
        assert peak is not None
        assert (float(peak[1]) <= 6.0) == inside
    assert "does not fit: 2." in estimate(capsys, *common, "memory=1GiB")


TWO = "model.arch=llama3_1_70b ranks=2 training.batch_size=2 data.max_seq_len=1024"
OFFLOAD = "training.activation_checkpointing=offload components=[{match:lm_head,kind:frozen_nf4}]"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        # 70B on two cards of 24 GB: it fits, as the page on several processes says
        (
            f"{TWO} device=cuda {OFFLOAD}",
            [
                "peak 21.66 GiB in backward of each rank: 1 x 1024 tokens on cuda",
                "gathered weights",
            ],
        ),
        ("model.arch=tinyllama_1_1b device=cuda memory=80GiB", ["(the model has 2,048 positions)"]),
        ("checkpoint.dir={config} device=cpu method=full", ["tokens on cpu", "heap holes"]),
    ],
)
def test_what_is_said(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: str,
    shown: list[str],
) -> None:
    """Of a checkpoint only its config is read."""
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    output = estimate(capsys, *words.replace("{config}", str(tmp_path)).split())
    assert all(text in output for text in shown)
