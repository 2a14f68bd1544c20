"""lm_eval's own `hf` model on transformers' Llama gives the same answers, for the same weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra lm-eval; see CONTRIBUTING.md")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_builders import save_checkpoint
from qlora_builders.checkpoint import load_with_adapter
from qlora_builders.config.shipped import demo_path
from qlora_builders.data import Tokenizer
from qlora_builders.errors import DataError, QLoRAError
from qlora_builders.evaluation.harness_model import HarnessModel
from qlora_builders.modules import CausalLM

BASE = Path(demo_path("base"))
WORDS = ["three", "blue", "cups", "to", "Lima", "by", "Monday,", "please.", "Nadia", "Jansen"]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    """The demo base in NF4."""
    return load_with_adapter(BASE, None, quantize="nf4", compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(BASE)


@pytest.fixture(scope="module")
def ours(model: CausalLM, tokenizer: Tokenizer) -> HarnessModel:
    return HarnessModel(model, tokenizer, batch_size=3)


@pytest.fixture(scope="module")
def theirs(model: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> HFLM:
    path = tmp_path_factory.mktemp("dequantized") / "hf"
    save_checkpoint(model, path)
    hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return HFLM(pretrained=hf, tokenizer=AutoTokenizer.from_pretrained(BASE), batch_size=2)


def instances(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def test_likelihoods(ours: HarnessModel, theirs: HFLM) -> None:
    draw = random.Random(0)
    pairs = [(text(draw, n), " " + text(draw, m)) for n, m in [(1, 1), (9, 4), (30, 12), (3, 2)]]
    question = text(draw, 8)
    pairs += [(question, choice) for choice in (" a", " b", " the", " Monday")]
    pairs += [
        (question + "  ", "and"),  # white space at the end of a context
        ("", text(draw, 5)),
        ("<|begin_of_text|>" + text(draw, 4), " three"),  # as a chat template writes it
        (text(draw, 900), " " + text(draw, 3)),  # more than 1024 tokens
    ]
    requests = instances("loglikelihood", *pairs)
    with pytest.warns(UserWarning, match="1 requests are too long for the model's 1024 positions"):
        found = ours.loglikelihood(requests, disable_tqdm=True)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for (a, a_greedy), (b, b_greedy) in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-4)
        assert a_greedy == b_greedy


def test_what_is_greedy(ours: HarnessModel, theirs: HFLM) -> None:
    options = {"until": [], "max_gen_toks": 2, "do_sample": False}
    context = "Please send two green"
    (answer,) = ours.generate_until(instances("generate_until", (context, options)))
    requests = instances("loglikelihood", (context, answer), (context, answer + "!"))
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in expected] == [True, False]


def test_the_same_input_runs_once(
    ours: HarnessModel, model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    forward = model.model.forward

    def count(ids: torch.Tensor, **options: Any) -> torch.Tensor:
        shapes.append(len(ids))
        return forward(ids, **options)

    monkeypatch.setattr(model.model, "forward", count)
    choices = [("What comes after one?", choice) for choice in (" a", " b", " c", " d")]
    ours.loglikelihood(instances("loglikelihood", *choices), disable_tqdm=True)
    assert shapes == [1]


def test_rolling_likelihoods(ours: HarnessModel, theirs: HFLM) -> None:
    draw = random.Random(1)
    texts = [(text(draw, n),) for n in (1, 40, 700, 2000)]  # the last two take several windows
    requests = instances("loglikelihood_rolling", *texts)
    found = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)
    assert ours.loglikelihood_rolling(instances("loglikelihood_rolling", ("",))) == pytest.approx(
        theirs.loglikelihood_rolling(instances("loglikelihood_rolling", ("",))), rel=1e-5
    )


def test_greedy_answers(ours: HarnessModel, theirs: HFLM) -> None:
    draw = random.Random(2)
    prompts = [text(draw, n) for n in (2, 25, 6, 11, 18)]
    options = [
        {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
        {"until": ["\n\n", " by", "<|eot_id|>"], "max_gen_toks": 40, "temperature": 0.0},
        {"until": "y", "max_gen_toks": 30},
        {"until": [], "max_gen_toks": 7, "num_beams": 1},
    ]
    requests = instances("generate_until", *[(p, dict(o)) for o in options for p in prompts])
    found = ours.generate_until(requests, disable_tqdm=True)
    assert found == theirs.generate_until(requests, disable_tqdm=True)
    assert len(set(found)) > 10


def test_a_prompt_without_room_is_cut_at_its_beginning(ours: HarnessModel, theirs: HFLM) -> None:
    prompt = text(random.Random(3), 900)
    requests = instances("generate_until", (prompt, {"until": [], "max_gen_toks": 20}))
    with pytest.warns(UserWarning, match="too long"):
        found = ours.generate_until(requests, disable_tqdm=True)
    assert found == theirs.generate_until(requests, disable_tqdm=True)


def test_it_stops_where_every_answer_has_met_its_string(
    ours: HarnessModel, model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ("Please send two green bowls to Oslo.", {"until": [], "max_gen_toks": 100})
    (whole,) = ours.generate_until(instances("generate_until", request))
    assert len(whole) > 20
    steps = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *args, **kw: (steps.append(1), forward(*args, **kw))[1]
    )
    request[1]["until"] = [whole[8:11]]
    (cut,) = ours.generate_until(instances("generate_until", request))
    assert cut == whole.partition(whole[8:11])[0]
    assert len(steps) < 20


@pytest.mark.parametrize("top_k", [9, 0])
def test_sampling_is_seeded_by_lm_eval(ours: HarnessModel, top_k: int) -> None:
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "top_k": top_k}
    requests = instances("generate_until", *[("Please send", dict(options))] * 4)
    answers = []
    for _ in range(2):
        torch.manual_seed(1234)  # as simple_evaluate does
        answers.append(ours.generate_until(requests, disable_tqdm=True))
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1


@pytest.mark.parametrize("prompt", [True, False])
def test_chat(ours: HarnessModel, theirs: HFLM, prompt: bool) -> None:
    chat = [
        {"role": "user", "content": "Two cups. "},
        {"role": "assistant", "content": "- city: A"},
    ]
    history = chat[:1] if prompt else chat
    found = ours.apply_chat_template(history, add_generation_prompt=prompt)
    assert found == theirs.apply_chat_template(history, add_generation_prompt=prompt)
    assert ours.tok_encode(found) == theirs.tok_encode(found)
    assert ours.tok_encode(found).count(ours.prefix_token_id) == 1


def test_mistakes(
    ours: HarnessModel, model: CausalLM, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def generate(**options: Any) -> None:
        ours.generate_until(instances("generate_until", ("a", options)))

    with pytest.raises(QLoRAError, match=r"length_penalty, which is not supported; supported: un"):
        generate(until=[], length_penalty=2.0, num_beams=1)
    with pytest.raises(QLoRAError, match=r"num_beams, which is not supported"):
        generate(until=[], num_beams=4)
    with pytest.raises(
        QLoRAError, match=r"max_gen_toks=1024 leaves no room for a prompt in the mo"
    ):
        generate(until=[], max_gen_toks=1024)
    with pytest.raises(QLoRAError, match=r"the continuation has 0 tokens; allowed: 1 to 1024"):
        ours.loglikelihood(instances("loglikelihood", ("a", "")), disable_tqdm=True)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "tokenizer.json").write_bytes((BASE / "tokenizer.json").read_bytes())
    nameless = HarnessModel(model, Tokenizer.from_dir(bare))
    with pytest.raises(QLoRAError, match="names neither a BOS nor an EOS token to begin with"):
        _ = nameless.prefix_token_id
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        nameless.apply_chat_template([{"role": "user", "content": "a"}])
