"""Greedy decoding against transformers: alone, in batches of unlike prompts, and compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from archs import tiny_model
from transformers import LlamaForCausalLM

from qlora_builders import load_checkpoint, save_checkpoint
from qlora_builders.errors import QLoRAError
from qlora_builders.models import generate, generate_batch, max_steps
from qlora_builders.models.generation import next_tokens
from qlora_builders.modules import CausalLM

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]
# PyTorch's own deprecations, met while it traces
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generation") / "hf"
    save_checkpoint(tiny_model(max_position_embeddings=40), path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> CausalLM:
    return load_checkpoint(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def answers(checkpoint: Path) -> list[list[int]]:
    """Of transformers, one prompt at a time."""
    theirs = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    theirs.generation_config.eos_token_id = None
    return [
        theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


def rows(steps: list[list[int | None]]) -> list[list[int]]:
    return [[t for t in row if t is not None] for row in zip(*steps, strict=True)]


def test_transformers_tokens_alone_and_in_a_batch(
    model: CausalLM, answers: list[list[int]]
) -> None:
    ours = [list(generate(model, prompt, max_new_tokens=20)) for prompt in PROMPTS]
    assert ours == answers
    assert len({token for answer in answers for token in answer}) > 5
    assert rows(list(generate_batch(model, PROMPTS, max_new_tokens=20))) == answers


@pytest.mark.parametrize("count", [1, 3])
def test_the_compiled_step_gives_the_same_tokens(
    model: CausalLM, answers: list[list[int]], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph for all steps: a second one would be a recompilation, which fails here."""
    trace_only(monkeypatch)
    with torch._dynamo.config.patch(error_on_recompile=True):
        steps = list(generate_batch(model, PROMPTS[:count], max_new_tokens=20, compile=True))
    assert rows(steps) == answers[:count]


def test_prompts_of_many_lengths_share_few_graphs(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph for each length would end in an error after the eighth."""
    trace_only(monkeypatch)
    with torch._dynamo.config.patch(error_on_recompile=True):  # 17 to 32 positions
        for length in (1, 2, 16):
            list(generate(model, [1] * length, max_new_tokens=16, compile=True))
    with torch._dynamo.config.patch(recompile_limit=1):  # three sizes
        for length in (3, 17):
            list(generate(model, [1] * length, max_new_tokens=4, compile=True))


def trace_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile without the C++ compiler at the end."""
    compile_ = torch.compile

    def traced_only(function: object, **options: object) -> object:
        return compile_(function, **{**options, "backend": "aot_eager", "mode": None})  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "compile", traced_only)
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_compiled_kernels_give_the_same_tokens(
    model: CausalLM, answers: list[list[int]]
) -> None:
    torch._dynamo.reset()
    assert rows(list(generate_batch(model, PROMPTS, max_new_tokens=20, compile=True))) == answers


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 3])
def test_cuda_graphs_give_the_same_tokens(
    checkpoint: Path, answers: list[list[int]], count: int
) -> None:
    model = load_checkpoint(checkpoint, dtype=torch.float32, device="cuda").eval()
    steps = list(generate_batch(model, PROMPTS[:count], max_new_tokens=20, compile=True))
    assert rows(steps) == answers[:count]


def test_rows_stop_one_by_one(model: CausalLM, answers: list[list[int]]) -> None:
    stop = {answers[0][3]}
    wanted = [
        answer[: next((i for i, token in enumerate(answer) if token in stop), len(answer))]
        for answer in answers
    ]
    assert len({len(answer) for answer in wanted}) > 1
    options = {"max_new_tokens": 20, "stop_token_ids": stop}
    assert rows(list(generate_batch(model, PROMPTS, **options))) == wanted
    assert [list(generate(model, prompt, **options)) for prompt in PROMPTS] == wanted


def test_the_positions_end_with_the_longest_prompt(model: CausalLM) -> None:
    prompts = [[1] * 38, [2]]
    steps = list(generate_batch(model, prompts, max_new_tokens=20))
    assert len(steps) == max_steps(model.spec.arch, prompts, 20) == 2
    assert list(generate(model, [1] * 40, max_new_tokens=5)) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt has 0 tokens; allowed: 1 to 40"),
        ([1] * 41, "the prompt has 41 tokens; allowed: 1 to 40"),
        ([1, 61], "the prompt has token 61, but the model's vocabulary has 61 entries"),
    ],
)
def test_prompts_are_checked(model: CausalLM, prompt: list[int], message: str) -> None:
    with pytest.raises(QLoRAError, match=message):
        next(generate_batch(model, [[1], prompt], max_new_tokens=5))


def test_sampling_keeps_to_the_likeliest(model: CausalLM) -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [5.0, 0.0, 4.9, 0.0]])
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": 1.0, "generator": generator}
    drawn = torch.stack(
        [next_tokens(logits, top_k=2, top_p=None, **options) for _ in range(100)]
    )  # [100, b]
    assert [set(column) for column in drawn.t().tolist()] == [{1, 2}, {0, 2}]
    one = next_tokens(logits, top_k=None, top_p=0.1, **options)
    assert one.tolist() == [1, 0]
