"""Changed files of every kind that the product reads, drawn with seeds.

Every case is an error that names the file, or reads as the sound file does, or reads as something
else for a reason that a rule of `explain.py` proves. Warnings are errors here too.

    pytest -m fuzz -n auto tests/fuzz                       6,000 cases, the same every time
    FUZZ_CASES=50000 FUZZ_SEED=1 pytest -m fuzz ...         more of them, and others
    FUZZ_CASE=hf.config:17 pytest -m fuzz tests/fuzz        the one that a failure named
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from fuzz_known import KNOWN
from fuzz_run import run_cases
from good_folders import write_good_folders
from kinds import KINDS

pytestmark = pytest.mark.fuzz

CASES = int(os.environ.get("FUZZ_CASES", "6000"))
FIRST = int(os.environ.get("FUZZ_SEED", "0")) * 1_000_000
PER_TEST = 50
LEAST_TYPED = 0.2  # of the cases of a test, where the reader is not tolerant


def chunks() -> Iterator[tuple[str, Sequence[int]]]:
    one = os.environ.get("FUZZ_CASE")
    if one:
        name, _, seed = one.partition(":")
        yield name, [int(seed)]
        return
    tests = CASES / PER_TEST / sum(kind.weight for kind in KINDS.values())
    done = 0.0
    for name, kind in KINDS.items():
        first, done = round(done), done + tests * kind.weight
        for index in range(round(done) - first):
            start = FIRST + index * PER_TEST
            yield name, range(start, start + PER_TEST)
        # what is known to be wrong is in the job, wherever it was found
        extra = [s for kind, s in KNOWN if kind == name and s >= (round(done) - first) * PER_TEST]
        if extra and not FIRST:
            yield name, extra


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("datasets")  # before processes are forked, so that they need not
    path = tmp_path_factory.mktemp("good")
    write_good_folders(path)
    return path


@pytest.mark.parametrize(
    ("name", "seeds"),
    list(chunks()),
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_fuzz(name: str, seeds: Sequence[int], good: Path, tmp_path: Path) -> None:
    found = run_cases(name, KINDS[name], seeds, good, tmp_path / "scratch")
    known = {seed for seed in seeds if (name, seed) in KNOWN}
    mended = sorted(known - found.failures.keys())
    assert not mended, f"no longer wrong, remove from KNOWN: {name} {mended}"
    failures = {seed: text for seed, text in found.failures.items() if seed not in known}
    report = "\n\n".join(f"FUZZ_CASE={name}:{seed}\n{text}" for seed, text in failures.items())
    assert not failures, f"{len(failures)} of {len(seeds)} cases fail:\n\n{report}"
    if len(seeds) == PER_TEST and not KINDS[name].tolerant:
        assert found.counts["typed"] + len(known) >= LEAST_TYPED * PER_TEST, found.counts


def test_the_cases_of_the_job() -> None:
    drawn = list(chunks())
    if "FUZZ_CASE" not in os.environ:
        full = [len(seeds) for _, seeds in drawn if len(seeds) == PER_TEST]
        assert sum(full) == CASES // PER_TEST * PER_TEST
    if CASES >= 6000 and "FUZZ_CASE" not in os.environ:
        assert {name for name, _ in drawn} == KINDS.keys()
