"""What a run leaves to look at, `qlora report` on it, and what `qlora estimate` prints before."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from recipe_runs import metrics, train

from qlora_builders import cli
from qlora_builders.analysis.memory import CPU_COMPILE_BYTES
from qlora_builders.report import find_runs

TINY = ("training.max_steps=6", "training.batch_size=4", "training.eval_every=3")


@pytest.fixture(scope="module")
def run(checkpoint: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "lr=1e-2"
    assert train("finetune", checkpoint, rows, path, *TINY, "training.samples=2") == 0
    return path


def test_a_finished_run_has_its_page(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "finished, step 6 of 6" in page
    for heading in ("Loss", "Adapter update", "Quantization error", "Samples", "Environment"):
        assert re.search(f"<h[23]>{heading}", page)
    assert "Loss: 7 of 7 points" in page
    assert "eval_tokens: 3 of 3 points" in page


def test_a_run_says_where_it_ran_and_what_it_answered(run: Path) -> None:
    (about,) = map(json.loads, (run / "environment.jsonl").read_text().splitlines())
    assert (about["first_step"], about["total_steps"]) == (0, 6)
    assert about["device"].startswith(("cpu (", "cuda:"))
    assert {"torch", "python", "qlora_builders", "command", "started"} <= about.keys()
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    order = [(sample["step"], sample["row"]) for sample in samples]
    assert order == [(0, 0), (0, 1), (6, 0), (6, 1)]
    assert (samples[0]["prompt"], samples[0]["reference"]) == ("what comes after one", "two")


def test_samples_change_no_loss(checkpoint: Path, rows: Path, run: Path, tmp_path: Path) -> None:
    assert train("finetune", checkpoint, rows, tmp_path / "run", *TINY) == 0
    assert metrics(tmp_path / "run", "loss") == metrics(run, "loss")
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_a_folder_of_runs_stands_for_them(run: Path, tmp_path: Path) -> None:
    for name in ("b", "a", "no_run"):
        (tmp_path / name).mkdir()
    for name in ("b", "a"):
        (tmp_path / name / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    assert find_runs(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert find_runs(run) == [run]
    assert find_runs(tmp_path / "no_run") == [tmp_path / "no_run"]
    assert find_runs(tmp_path / "nowhere") == [tmp_path / "nowhere"]
    assert cli.main(["report", str(tmp_path), f"output={tmp_path / 'both.html'}"]) == 0
    assert (tmp_path / "both.html").is_file()


def test_the_command_takes_folders_and_keys(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "report.html").unlink()
    assert cli.main(["report", str(run)]) == 0  # a folder with a = in its name
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
    other = tmp_path / "a 'quoted', {odd} name"
    other.mkdir()
    (other / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(run), str(other)]) == 0
    assert (tmp_path / "report.html").is_file()  # neither run's own is replaced
    output = tmp_path / "new" / "both.html"
    assert cli.main(["report", str(run), str(other), f"output={output}"]) == 0
    page = output.read_text()
    assert "2 runs" in page
    assert "{odd} name: stopped after step 1" in page
    capsys.readouterr()
    assert cli.main(["report", "--help"]) == 0
    assert "usage: qlora report RUN [RUN ...] [OPTION ...]" in capsys.readouterr().out


def test_inspect_shows_what_quantization_costs(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lines(*overrides: str) -> list[str]:
        assert cli.main(["inspect", *overrides]) == 0
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    here = f"checkpoint.dir={checkpoint}"
    exception = "components=[{match: layers.1.mlp.up_proj, kind: linear}]"
    shown = lines(here, exception)
    (up,) = (line for line in shown if line.startswith("layers.0.mlp.up_proj qlora 16"))
    (plain,) = (line for line in shown if line.startswith("layers.1.mlp.up_proj linear - "))
    (down,) = (line for line in shown if line.startswith("layers.0-1.mlp.down_proj"))
    assert 8 < float(up.split()[-1].rstrip("%")) < 11
    assert plain.endswith(" -")
    whole, worst = re.fullmatch(r".* ([\d.]+)% \(([\d.]+)%\)", down).groups()  # type: ignore[union-attr]
    assert 8 < float(whole) <= float(worst) < 11
    for overrides in (("method=lora", here), ("model.arch=llama3_2_1b", here)):
        assert not any("error" in line for line in lines(*overrides))


# ---- estimate; the figures: tests/analysis/test_memory.py

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
