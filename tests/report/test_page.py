"""The whole page, read back by an HTML parser."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from report_pages import Page, training_rows

from qlora_builders.errors import ConfigError
from qlora_builders.report import read_run, report_page, write_report

MakeRun = Callable[..., Path]
ATTACK = (
    "</script></style><script>alert(1)</script><img src=x onerror='alert(2)'>\"&\u2028\ud800\x00"
)


def page_of(*paths: Path) -> Page:
    text = report_page([read_run(path) for path in paths])
    return Page(text.encode("utf-8", "replace").decode())


def test_every_chart_has_its_points(make_run: MakeRun) -> None:
    page = page_of(make_run("run"))
    headings = re.findall(r"Loss|Learning rate|Gradient norm|Throughput|Peak memory", page.text)
    assert {"Loss", "Learning rate", "Gradient norm", "Throughput", "Peak memory"} <= set(headings)
    curves = {curve["data-name"]: curve for curve in page.curves()}
    for name in ("training", "Learning rate", "Gradient norm", "Throughput", "Peak memory"):
        assert curves[name]["data-x"].split() == [str(i) for i in range(1, 21)]
        assert curves[name]["d"].count("L") == 19
    assert curves["evaluation"]["data-x"] == "10 20"
    losses = [float(value) for value in curves["training"]["data-y"].split()]
    assert losses == pytest.approx([3 * math.exp(-i / 20) for i in range(1, 21)], rel=1e-4)
    assert len(page.all("svg")) == len(page.all("figure")) == 8  # three of them folded
    assert len({a["id"] for _, a in page.elements if "id" in a}) == sum(
        "id" in a for _, a in page.elements
    )


def test_the_page_needs_nothing_else(make_run: MakeRun) -> None:
    page = page_of(make_run("run"))
    urls = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster") or "url(" in value
    ]
    assert urls == ["data:,"]
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"//.*", "", page.source))


def test_only_our_script_may_run(make_run: MakeRun) -> None:
    page = page_of(make_run("run"))
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert f"script-src 'sha256-{digest}'" in policy["content"]
    assert policy["content"].startswith("default-src 'none'")
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval", "fetch", "document.write"):
        assert word not in script


def test_a_strangers_text_stays_text(make_run: MakeRun, tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 1.0, ATTACK: 2.0},
        {"step": 2, "loss": math.nan, ATTACK: 3.0},
    ]
    config = {"data": {"train": ATTACK}, ATTACK.replace("\ud800\x00", ""): 1}
    config["data"]["train"] = ATTACK.replace("\ud800\x00", "")
    path = make_run("a<b>&'\"onload=x", rows, config)
    sample = {"step": 0, "prompt": ATTACK, "reference": ATTACK, "answer": ATTACK}
    (path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    about = {"device": ATTACK, ATTACK: ATTACK, "total_steps": ATTACK, "first_step": ATTACK}
    (path / "environment.jsonl").write_text(json.dumps(about) + "\n")
    plain = page_of(make_run("plain", rows=[{"step": 1, "loss": 1.0, "x": 2.0}]))
    page = page_of(path)
    known = {"html", "head", "body", "table", "script", "svg", "details"}
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements} | known | {"td"}
    assert len(page.all("script")) == 1
    assert page.all("img") == []
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    assert page.text.count("<script>alert(1)</script>") >= 6  # as text


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
    names = [curve["data-name"] for curve in page.curves()]
    assert names.count("one") == names.count("two") == 8
    assert names.count("one (evaluation)") == 1
    assert "2 runs" in page.text
    assert "one: stopped after step 20" in page.text
    rows = re.sub(r"\s*\n\s*", "\n", page.text)
    assert "\noptimizer.lr\n0.001\n0.002\n0.0002\n" in rows


def test_runs_of_the_same_name_are_told_apart(make_run: MakeRun) -> None:
    paths = [make_run("a/x/run"), make_run("b/x/run"), make_run("other")]
    names = {curve["data-name"] for curve in page_of(*paths).curves()}
    assert {"a/x/run", "b/x/run"} <= names


def test_a_long_run_stays_small_and_keeps_its_spike(make_run: MakeRun) -> None:
    rows = list(training_rows(100_000))
    rows[50_003]["loss"] = 77.0
    path = make_run("long", rows)
    text = report_page([read_run(path)])
    assert len(text.encode()) < 500_000
    page = Page(text)
    (curve,) = (c for c in page.curves() if c["data-name"] == "training")
    assert "77" in curve["data-y"].split()


def test_many_runs_stay_small(make_run: MakeRun) -> None:
    run = read_run(make_run("run", training_rows(5_000)))
    assert len(report_page([run] * 12).encode()) < 2_000_000


def test_samples_before_and_after(make_run: MakeRun) -> None:
    path = make_run("run")
    rows = [
        {"step": step, "prompt": "2 + 2?", "reference": "4", "answer": answer}
        for step, answer in ((0, "fish"), (10, "5"), (20, "4!"))
    ]
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = re.sub(r"\s*\n\s*", "\n", page_of(path).text)
    assert "prompt\nreference\nbefore\nafter step 20\n2 + 2?\n4\nfish\n4!\n" in text
    assert "fish\n5" not in text


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
    text = re.sub(r"\s*\n\s*", "\n", page_of(make_run("run", config=config)).text)
    chosen, _, everything = text.partition("The whole config.yaml")
    assert "\ntraining.seed\n7\n0\n" in chosen
    assert "\ntraining.old_key\ntrue\n–\n" in chosen
    assert "training.batch_size" not in chosen
    assert "output_dir" not in chosen
    assert "\noutput_dir\nelsewhere\n" in everything


def test_a_resumed_run_is_marked(make_run: MakeRun) -> None:
    path = make_run("run")
    lines = [{"first_step": 0, "device": "cpu"}, {"first_step": 12, "device": "cuda:0 H100"}]
    (path / "environment.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(path)
    assert len(page.all("path", **{"class": "mark"})) == len(page.all("svg"))
    assert "run resumed after step 12" in page.text
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
