"""The whole page, read back by an HTML parser."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from report_pages import Page, training_rows

from qlora_builders.config.compose import compose_tree, to_config
from qlora_builders.config.verbs import VERBS
from qlora_builders.errors import ConfigError
from qlora_builders.report import read_run, report_page, write_report

MakeRun = Callable[..., Path]
ATTACK = (
    "</script></style></title><script>alert(1)</script>"
    "<img src=x onerror='alert(2)'>\"&$x^2$\u2028\ud800\x00"
)
NAME = "a<b>&'\"onload=x $x^2$ {{ 7 * 7 }}\x1b"


def page_of(*paths: Path) -> Page:
    return Page(report_page([read_run(path) for path in paths]))


def test_every_chart_has_its_points(make_run: MakeRun) -> None:
    page = page_of(make_run("run"))
    tables = page.tables()
    known = ("Loss", "Learning rate", "Gradient norm", "Throughput", "Peak memory")
    for name in (*known, "target_tokens", "step_s", "eval_tokens"):  # the last ones are folded
        count = 2 if name == "eval_tokens" else 20
        assert len(tables[f"{name}: {count} of {count} points"]) == 1 + count
    losses = tables["Loss: 20 of 20 points"]
    assert losses[0] == ["step", "training", "evaluation"]
    assert [row[0] for row in losses[1:]] == [str(i) for i in range(1, 21)]
    expected = [3 * math.exp(-i / 20) for i in range(1, 21)]
    assert [float(row[1]) for row in losses[1:]] == pytest.approx(expected, rel=1e-3)
    assert [row[0] for row in losses[1:] if row[2]] == ["10", "20"]
    assert len(page.all("figure")) == 8
    assert len(page.all("svg")) == 9  # the loss is there in two sizes
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    described = [each["aria-label"] for each in page.all("div", role="img")]
    assert "Learning rate over step. Learning rate: last 0, from 0 to 0.00095" in described


def test_the_page_needs_nothing_else_and_runs_nothing(make_run: MakeRun) -> None:
    page = page_of(make_run("run"))
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert not {"script", "link", "img", "a", "iframe"} & {tag for tag, _ in page.elements}
    names = re.sub(r' xmlns(:xlink)?="http://www.w3.org/[^"]*"', "", page.source)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)|href=\"(?!#)", names)


def test_a_strangers_text_stays_text(make_run: MakeRun) -> None:
    rows = [
        {"step": 1, "loss": 1.0, ATTACK: 2.0},
        {"step": 2, "loss": math.nan, ATTACK: math.nan},
    ]
    allowed = ATTACK.replace("\ud800\x00", "")
    path = make_run(NAME, rows, {"data": {"train": allowed}, allowed: 1})
    sample = {"step": 0, "prompt": ATTACK, "reference": ATTACK, "answer": ATTACK}
    (path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    about = {"device": ATTACK, ATTACK: ATTACK, "total_steps": ATTACK, "first_step": ATTACK}
    about["skipped_rows"] = [ATTACK]
    (path / "environment.jsonl").write_text(json.dumps(about) + "\n")
    plain = page_of(make_run("plain", [{"step": 1, "loss": 1.0, "x": 2.0}], {"a": 1}))
    for page in (page_of(path), page_of(path, make_run(f"{NAME}2"))):
        extra = {tag for tag, _ in page.elements} - {tag for tag, _ in plain.elements}
        assert extra <= {"li", "i", "use", "details", "defs", "p"}
        assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
        assert page.text.count("<script>alert(1)</script>") >= 12  # as text
        assert "a<b>&'\"onload=x $x^2$ {{ 7 * 7 }}\ufffd" in page.text
        assert page.source.encode()
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", page.source)
        assert page.text.count("\ufffd\ufffd") >= 8
        for svg in re.findall("<svg.*?</svg>", page.source, re.DOTALL):
            assert not re.search("alert|onload", svg)


def test_long_values_are_cut(make_run: MakeRun) -> None:
    text = page_of(make_run("run", config={"data": {"train": "x" * 5000}})).text
    assert f"{'x' * 4000} ... (1,000 more characters)" in text
    assert "x" * 4001 not in text


@pytest.mark.parametrize("rows", [[], [{"step": 1}], [{"step": 1, "loss": math.nan}]])
def test_a_run_with_nothing_to_draw(make_run: MakeRun, rows: list[dict[str, float]]) -> None:
    page = page_of(make_run("run", rows))
    if len(rows) == 0 or "loss" not in rows[0]:
        assert "No step has been logged yet." in page.text
        assert page.all("svg") == []
    else:
        assert "loss is not finite at 1 of 1 steps, the first of them 1" in page.text


def test_several_runs_share_charts_and_tables(make_run: MakeRun) -> None:
    one = make_run("one", training_rows(20), {"optimizer": {"lr": 1e-3}})
    two = make_run("two", training_rows(40), {"optimizer": {"lr": 2e-3}})
    page = page_of(one, two)
    tables = page.tables()
    losses = tables["Loss: 40 of 40 points"]
    assert losses[0] == ["step", "one", "one (evaluation)", "two", "two (evaluation)"]
    assert [len([row for row in losses[1:] if row[i]]) for i in range(1, 5)] == [20, 2, 40, 2]
    assert tables["Learning rate: 40 of 40 points"][0] == ["step", "one", "two"]
    assert tables["Final figures"][0] == ["figure", "one", "two"]
    assert "2 runs" in page.text
    assert "one: stopped after step 20" in page.text
    assert tables["What differs from the defaults"] == [
        ["key", "one", "two", "default"],
        ["optimizer.lr", "0.001", "0.002", "0.0002"],
    ]


def test_runs_of_the_same_name_are_told_apart(make_run: MakeRun) -> None:
    paths = [make_run("a/x/run"), make_run("b/x/run"), make_run("other")]
    figures = page_of(*paths).tables()["Final figures"]
    assert figures[0][1:3] == ["a/x/run", "b/x/run"]


def test_a_long_run_stays_small_and_keeps_its_spike(make_run: MakeRun) -> None:
    rows = list(training_rows(100_000))
    rows[50_003]["loss"] = 77.0
    path = make_run("long", rows)
    text = report_page([read_run(path)])
    assert len(text.encode()) < 200_000
    assert "training: last 1.104, from 1.104 to 77;" in text


def test_many_runs_stay_small(make_run: MakeRun) -> None:
    run = read_run(make_run("run", training_rows(5_000)))
    assert len(report_page([run] * 12).encode()) < 1_000_000


def test_samples_before_and_after(make_run: MakeRun) -> None:
    path = make_run("run")
    rows = [
        {"step": step, "prompt": "2 + 2?", "reference": "4", "answer": answer}
        for step, answer in ((0, "fish"), (10, "5"), (20, "4!"))
    ]
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert page_of(path).tables()["1 answers"] == [
        ["prompt", "reference", "before", "after step 20"],
        ["2 + 2?", "4", "fish", "4!"],
    ]


def test_samples_show_who_said_what(make_run: MakeRun) -> None:
    path = make_run("run")
    messages = [{"role": "system", "content": "Count."}, {"role": "user", "content": "2 + 2?"}]
    row = {"step": 0, "messages": messages, "reference": "4", "answer": "5"}
    (path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    assert "system: Count.\nuser: 2 + 2?" in page_of(path).text


def test_the_config_shows_what_was_chosen_first(make_run: MakeRun) -> None:
    config = {
        "training": {"seed": 7, "batch_size": 8, "max_steps": None, "old_key": True},
        "output_dir": "elsewhere",
    }
    tables = page_of(make_run("run", config=config)).tables()
    assert tables["What differs from the defaults"] == [
        ["key", "run", "default"],
        ["training.old_key", "true", "–"],
        ["training.seed", "7", "0"],
    ]
    assert ["output_dir", "elsewhere"] in tables["The whole config.yaml"]


@pytest.mark.parametrize("verb", [name for name, row in VERBS.items() if row.trains])
def test_defaults_are_those_of_the_verb_that_ran(make_run: MakeRun, verb: str) -> None:
    config = asdict(to_config(compose_tree(verb)))
    page = page_of(make_run("run", config=config))
    assert "Every key has its default." in page.text


def test_what_is_logged_says_what_a_run_is(make_run: MakeRun) -> None:
    pairs = [{"step": 1, "loss": 0.6, "rewards/margins": 0.1}, {"step": 1, "eval_loss": 0.5}]
    one, two = make_run("pairs", pairs), make_run("tokens")
    page = page_of(one)
    assert "Reward margin" in page.text
    assert "nats per pair" in page.text
    assert ["perplexity, last", "–"] in page.tables()["Final figures"]
    assert "Reward" not in page_of(two).text
    assert "nats per token, or per pair" in page_of(one, two).text


def test_a_resumed_run_is_marked(make_run: MakeRun) -> None:
    path = make_run("run")
    lines = [{"first_step": 0, "device": "cpu"}, {"first_step": 12, "device": "cuda:0 H100"}]
    (path / "environment.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(path)
    dotted = [a for a in page.all("path") if "stroke-dasharray" in a.get("style", "")]
    assert len(dotted) == len(page.all("svg"))
    assert "run resumed after step 12" in page.text
    (path / "environment.jsonl").write_text('{"first_step": 1' + "0" * 400 + "}\n")
    beyond = [a for a in page_of(path).all("path") if "stroke-dasharray" in a.get("style", "")]
    assert beyond == []
    assert "cuda:0 H100" in page.text


def test_the_file_replaces_a_link_and_not_what_it_points_to(
    make_run: MakeRun, tmp_path: Path
) -> None:
    path = make_run("run")
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    (path / "report.html").symlink_to(precious)
    write_report([read_run(path)], path / "report.html")
    assert precious.read_text() == "keep me"
    assert (path / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert not list(path.glob(".report*"))


def test_a_page_that_cannot_be_written_names_the_file(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output=.*file/report.html: .*/file is a file, not a f"):
        write_report([read_run(make_run("run"))], tmp_path / "file" / "report.html")
