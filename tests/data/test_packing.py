"""Best-fit rows, packed batches by number, and the losses of documents that share a row."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_builders import LlamaArch, llama
from qlora_builders.data import Batches, Example, Tokenizer, build_dataset, collate, collate_packed
from qlora_builders.data.batches import best_fit
from qlora_builders.errors import DataError
from qlora_builders.modules import next_token_loss, num_target_tokens

CPU = torch.device("cpu")
ARCH = LlamaArch(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


def example(length: int, row: int) -> Example:
    ids = torch.randint(1, 50, (length,), generator=torch.Generator().manual_seed(row))
    labels = ids.clone()
    labels[: length // 3] = -100
    return Example(ids, labels, row)


# ---- rows ---------------------------------------------------------------------------------------


def naive_best_fit(lengths: list[int], capacity: int, order: list[int]) -> list[list[int]]:
    """Looks at every row."""
    rows: list[list[int]] = []
    for index in sorted(order, key=lambda i: -lengths[i]):
        room = [capacity - sum(lengths[i] for i in row) for row in rows]
        fits = [(r, number) for number, r in enumerate(room) if r >= lengths[index]]
        if fits:
            rows[min(fits)[1]].append(index)
        else:
            rows.append([index])
    return rows


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=40),
    st.integers(20, 30),
    st.randoms(use_true_random=False),
)
def test_best_fit_is_best_fit_and_loses_nothing(lengths, capacity, random) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)
    rows = best_fit(lengths, capacity, order=order)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in row) for row in rows]
    assert max(loads) <= capacity
    naive = naive_best_fit(lengths, capacity, order)
    assert sorted(loads) == sorted(sum(lengths[i] for i in row) for row in naive)
    # so that every epoch has the same number of rows, whatever its order
    assert len(rows) == len(best_fit(lengths, capacity, order=range(len(lengths))))


def test_the_fullest_row_with_room_is_taken() -> None:
    assert best_fit([6, 5, 3, 4, 2], 10, order=range(5)) == [[0, 3], [1, 2, 4]]


# ---- batches ------------------------------------------------------------------------------------


def test_documents_of_a_row_are_numbered_and_their_first_tokens_masked() -> None:
    a, b, c = (Example(torch.arange(1, n + 1), torch.arange(1, n + 1), n) for n in (2, 3, 4))
    batch = collate_packed([[a, b], [c]], pad_token_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 1, 2, 3], [1, 2, 3, 4, 9]]
    assert batch.labels.tolist() == [[-100, 2, -100, 2, 3], [-100, 2, 3, 4, -100]]
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]
    assert batch.rows == [2, 3, 4]
    assert a.labels.tolist() == [1, 2]  # the example itself is left alone
    assert batch.to("meta").document_ids.device.type == "meta"
    with pytest.raises(DataError, match="a row of no examples"):
        collate_packed([[a], []], pad_token_id=9)


@pytest.fixture
def dataset(make_tokenizer: Callable[..., Tokenizer], tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    lines = [{"prompt": "a" * (n % 7), "completion": "word " * (n % 5 + 1)} for n in range(40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return build_dataset(file, make_tokenizer(), format="instruct", max_seq_len=32)


def make_batches(dataset, **options) -> Batches:
    return Batches(
        dataset, **({"batch_size": 3, "packing": "best_fit", "max_seq_len": 32} | options)
    )


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_every_epoch_has_every_example_once_in_an_order_of_its_own(dataset, packing: str) -> None:
    batches = make_batches(dataset, packing=packing)
    epochs = [[batch.rows for batch in batches.of_epoch(epoch, CPU)] for epoch in range(3)]
    for rows in epochs:
        assert len(rows) == batches.per_epoch
        assert sorted(itertools.chain(*rows)) == list(range(40))
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [
        b.rows for b in make_batches(dataset, packing=packing, seed=1).of_epoch(0, CPU)
    ]
    unshuffled = make_batches(dataset, packing=packing, shuffle=False)
    assert [b.rows for b in unshuffled.of_epoch(0, CPU)] == [
        b.rows for b in unshuffled.of_epoch(1, CPU)
    ]


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_a_batch_is_a_function_of_its_number(dataset, packing: str) -> None:
    """In any order, across epochs, from another process: so a run resumes by counting."""
    batches, count = make_batches(dataset, packing=packing), 2 * 7
    expected = [batch.rows for step in range(1, 8) for batch in batches.of_step(step, 2, CPU)]
    for number in reversed(range(count)):
        assert make_batches(dataset, packing=packing).batch(number).rows == expected[number]
        assert batches.batch(number).rows == expected[number]


def test_the_summary_says_how_full_the_rows_are(dataset) -> None:
    batches = make_batches(dataset)
    total = dataset.report.tokens
    full = 100 * total / (batches.rows_per_epoch * 32)
    assert full > 90
    assert batches.summary().endswith(
        f"packed into {batches.rows_per_epoch} rows of 32 tokens, {full:.1f} % full"
    )
    assert "packed" not in make_batches(dataset, packing="none").summary()


# ---- losses -------------------------------------------------------------------------------------


def test_a_document_has_the_loss_and_gradient_it_has_alone() -> None:
    torch.manual_seed(0)
    model = llama(
        ARCH, [{"match": "layers.**", "kind": "lora", "rank": 2, "alpha": 4}], dtype=torch.float32
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    examples = [example(length, row) for row, length in enumerate((3, 9, 17, 5, 12))]
    packed = collate_packed(
        [[examples[i] for i in row] for row in ([2, 4, 0], [1, 3])], pad_token_id=0
    )

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        trained = [p for p in model.parameters() if p.requires_grad]
        return list(torch.autograd.grad(loss, trained))

    logits = model(packed.input_ids, document_ids=packed.document_ids)
    total = torch.tensor(0.0)
    for number, (row, document) in zip(
        packed.rows, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)], strict=True
    ):
        alone = collate([examples[number]], pad_token_id=0)
        expected = next_token_loss(model(alone.input_ids), alone.labels)
        here = packed.document_ids[row] == document
        own = next_token_loss(logits[row, here][None], packed.labels[row, here][None])
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
        assert num_target_tokens(packed.labels[row, here][None]) == num_target_tokens(alone.labels)
        total = total + expected
    whole = next_token_loss(logits, packed.labels)
    torch.testing.assert_close(whole, total, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(whole), gradients(total), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    # the test would notice a leak: without the ids the losses are others
    leaking = next_token_loss(model(packed.input_ids), packed.labels)
    assert abs(leaking.item() / total.item() - 1) > 1e-3
