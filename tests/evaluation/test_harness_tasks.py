"""qlora evaluate lm_eval.tasks=...: tasks from local files, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_builders import cli
from qlora_builders.checkpoint import load_with_adapter
from qlora_builders.config.shipped import demo_path
from qlora_builders.data import Tokenizer

BASE = Path(demo_path("base"))
REASON = "needs the extra lm-eval; see CONTRIBUTING.md"
QUESTIONS = [
    {"question": "Two red cups to Oslo. City:", "choices": ["Oslo", "Lima", "Rome"], "answer": 0},
    {"question": "Six plates to Lima. Number:", "choices": ["two", "six", "ten"], "answer": 1},
    {"question": "One bowl to Rome. Item:", "choices": ["cup", "plate", "bowl"], "answer": 2},
    {"question": "Ten lamps to Bonn. Item:", "choices": ["lamp", "desk", "bowl"], "answer": 0},
]
COMMON = {"dataset_path": "json", "test_split": "test"}
PICK = {
    "task": "pick",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
PROSE = {
    "task": "prose",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [
        {
            "metric": "byte_perplexity",
            "aggregation": "weighted_perplexity",
            "higher_is_better": False,
        }
    ],
}
WRITE = {
    "task": "write",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
CODE = {**PICK, "task": "code", "unsafe_code": True}
GONE = {**PICK, "task": "gone", "dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}
SPLIT = {**PICK, "task": "split", "test_split": "dev"}


def write_tasks(folder: Path, *tasks: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    files = {"data_files": {"test": str(rows)}, "cache_dir": str(folder / "cache")}
    for task in tasks:
        # YAML holds JSON
        content = json.dumps({**COMMON, "dataset_kwargs": files, **task})
        (folder / f"{task['task']}.yaml").write_text(content)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval", reason=REASON)
    return write_tasks(
        tmp_path_factory.mktemp("tasks") / "mine", PICK, PROSE, WRITE, CODE, GONE, SPLIT
    )


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval without its 14,000 tasks, which take seconds to read."""
    tasks = pytest.importorskip("lm_eval.tasks", reason=REASON)
    whole = tasks.TaskManager
    monkeypatch.setattr(
        tasks, "TaskManager", lambda **options: whole(**{**options, "include_defaults": False})
    )


def evaluate(*options: str) -> int:
    return cli.main(["evaluate", "compute_dtype=float32", "data.eval=null", *options])


def measured(output: Path, *options: str) -> dict[str, Any]:
    assert evaluate(f"output={output}", *options) == 0
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ([], {}),
        (["lm_eval.num_fewshot=2"], {"num_fewshot": 2}),
        (["lm_eval.limit=3"], {"limit": 3}),
        (
            ["lm_eval.apply_chat_template=true", "lm_eval.num_fewshot=1"],
            {"apply_chat_template": True, "num_fewshot": 1},
        ),
    ],
)
def test_figures_are_those_of_lm_evals_own_model(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    same: dict[str, Any],
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = ["pick", "prose", "write"]
    given = [f"lm_eval.tasks_dir={folder}", f"lm_eval.tasks=[{','.join(names)}]", *options]
    found = measured(tmp_path / "ours.json", *given)["tasks"]
    table = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    hf = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    expected = simple_evaluate(
        model=HFLM(pretrained=hf, tokenizer=AutoTokenizer.from_pretrained(BASE)),
        tasks=names,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        **same,
    )
    for task, metric in (("pick", "acc"), ("prose", "byte_perplexity"), ("write", "exact_match")):
        value = found["results"][task][f"{metric},none"]
        assert value == pytest.approx(expected["results"][task][f"{metric},none"], rel=1e-5)
        error = expected["results"][task][f"{metric}_stderr,none"]
        (row,) = (index for index, line in enumerate(table) if line.startswith(f"{task} {metric} "))
        assert float(table[row].split()[-1]) == pytest.approx(value, abs=0.005)
        if error != "N/A":
            assert float(table[row + 1].split()[-1]) == pytest.approx(error, rel=0.05)
    for key in ("n-samples", "n-shot", "versions", "higher_is_better"):
        assert found[key] == expected[key]


def test_from_python(folder: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from qlora_builders.evaluation.harness_model import HarnessModel

    model = HarnessModel(load_with_adapter(BASE, None), Tokenizer.from_dir(BASE), batch_size=2)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model=model, tasks=["pick"], task_manager=manager)
    assert found is not None
    assert len(found["samples"]["pick"]) == len(QUESTIONS)


def test_compared(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"lm_eval.tasks_dir={folder}", "lm_eval.tasks=[pick,prose]", "compare=true"]
    found = measured(tmp_path / "both.json", *given)
    values = {
        name: model["tasks"]["results"]["prose"]["byte_perplexity,none"]
        for name, model in found["models"].items()
    }
    (pair,) = found["differences"]
    assert pair["figures"]["prose byte_perplexity"] == {
        "difference": values["base in NF4"] - values["base"],
        "standard_error": None,
    }
    assert pair["figures"]["pick acc"]["standard_error"] >= 0
    assert "prose byte_perplexity" in capsys.readouterr().out


@pytest.mark.usefixtures("few")
def test_a_group_is_shown_with_its_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tasks(tmp_path / "tasks", PICK, {**PICK, "task": "again"})
    metric = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = {"group": "both", "task": ["pick", "again"], "aggregate_metric_list": [metric]}
    (folder / "both.yaml").write_text(json.dumps(group))
    given = ["lm_eval.tasks=[both]", f"lm_eval.tasks_dir={folder}"]
    found = measured(tmp_path / "group.json", *given)
    values = [found["tasks"]["results"][name]["acc,none"] for name in ("pick", "again", "both")]
    assert values[0] == values[1] == values[2]
    assert found["standard_errors"]["both acc"] is None
    assert f"both acc {values[2]:.4f}" in " ".join(capsys.readouterr().out.split())


def test_few_shots_limit_and_chat(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_builders.evaluation.harness_model import HarnessModel

    asked: list[str] = []
    generate = HarnessModel.generate_until

    def listen(self: HarnessModel, requests: list[Any], **options: Any) -> list[str]:
        asked.extend(request.args[0] for request in requests)
        return generate(self, requests, **options)

    monkeypatch.setattr(HarnessModel, "generate_until", listen)
    given = [f"lm_eval.tasks_dir={folder}", "lm_eval.tasks=[write]", "lm_eval.limit=1"]
    found = measured(tmp_path / "one.json", *given)
    assert asked == [QUESTIONS[0]["question"]]
    assert found["tasks"]["n-samples"]["write"]["effective"] == 1
    measured(tmp_path / "two.json", *given, "lm_eval.num_fewshot=2")
    assert asked[1].count("City:") + asked[1].count("Number:") + asked[1].count("Item:") == 3
    measured(tmp_path / "chat.json", *given, "lm_eval.apply_chat_template=true")
    question = QUESTIONS[0]["question"]
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert asked[2] == (
        f"<|begin_of_text|>{turn.format('user')}{question}<|eot_id|>{turn.format('assistant')}"
    )


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lm_eval.tasks=[pikc]"], "has a task 'pikc'; did you mean 'pick'?"),
        (["lm_eval.tasks=[zzzz]"], "has a task 'zzzz'; allowed: code, gone, pick, prose, split, "),
        (["lm_eval.tasks=[FOLDER/pick.yaml]"], "has a task 'FOLDER/pick.yaml'; "),
        (
            ["lm_eval.tasks=[pick]", "lm_eval.tasks_dir=nowhere"],
            "tasks_dir=nowhere is not a folder",
        ),
        (
            ["lm_eval.tasks=[code]"],
            "'code' runs code that the model writes, which evaluate does not",
        ),
        (["lm_eval.tasks=[gone]"], "lm_eval.tasks: 'gone' cannot be loaded: FileNotFoundError: "),
        (["lm_eval.tasks=[split]"], "lm_eval.tasks: 'split' cannot be loaded: KeyError: 'dev'"),
        (["lm_eval.tasks=[a]", "lm_eval.tasks_dir=EMPTY"], "no *.yaml file in that folder holds a"),
    ],
)
def test_mistakes(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    def fill(text: str) -> str:
        return text.replace("FOLDER", str(folder)).replace("EMPTY", str(tmp_path))

    assert evaluate(f"lm_eval.tasks_dir={folder}", *map(fill, options)) == 2
    captured = capsys.readouterr()
    assert fill(message) in captured.err
    assert captured.out == ""


@pytest.mark.slow
def test_a_task_of_lm_eval_is_named_if_it_is_near(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("lm_eval.tasks=[hellaswagg]") == 2
    assert "lm_eval has no task 'hellaswagg'; did you mean 'hellaswag'?" in capsys.readouterr().err


# ---- code ---------------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks and a config that names it, in which any code would create OWNED."""
    monkeypatch.chdir(tmp_path)
    folder = write_tasks(tmp_path / "tasks", {**PICK, "task": "evil"})
    file = folder / "evil.yaml"
    file.write_text(file.read_text().replace('"{{question}}"', "!function evil.ask"))
    (folder / "evil.py").write_text(
        "open('OWNED', 'w').close()\ndef ask(doc):\n    return doc['question']\n"
    )
    (tmp_path / "configs" / "data").mkdir(parents=True)
    config = {"lm_eval": {"tasks": ["evil"], "tasks_dir": str(folder)}}
    (tmp_path / "configs" / "data" / "theirs.yaml").write_text(
        f"# @package _global_\n{json.dumps(config)}\n"
    )
    return folder


def test_no_config_file_names_a_folder_of_code(
    hostile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--config-dir=configs", "data=theirs") == 2
    message = f"lm_eval.tasks_dir={hostile} is in a config file, but code runs from there"
    assert message in capsys.readouterr().err
    assert not Path("OWNED").exists()


@pytest.mark.usefixtures("few")
def test_the_command_line_may(hostile: Path) -> None:
    assert evaluate("lm_eval.tasks=[pick]", f"lm_eval.tasks_dir={hostile}") == 2
    assert evaluate(f"lm_eval.tasks=[{hostile}/evil.yaml]") == 2
    assert not Path("OWNED").exists()  # searching a folder runs nothing
    given = ["--config-dir=configs", "data=theirs", f"lm_eval.tasks_dir={hostile}"]
    assert evaluate(*given) == 0
    assert Path("OWNED").exists()


def test_the_extra_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert evaluate("lm_eval.tasks=[hellaswag]") == 2
    assert "pip install 'qlora-builders[lm-eval]'" in capsys.readouterr().err
