"""What `shared` has, as fixtures, and a checkpoint to damage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import shared
from shared import Build, Checkpoints, Logits, Randomize, Reference


@pytest.fixture
def own_copy(tmp_path: Path) -> Checkpoints:
    """As `checkpoints`, a copy that the test may damage."""

    def copy(*args: Any, **kwargs: Any) -> Path:
        return Path(shutil.copytree(shared.checkpoints(*args, **kwargs), tmp_path / "checkpoint"))

    return copy


@pytest.fixture(scope="session")
def checkpoints() -> Checkpoints:
    return shared.checkpoints


@pytest.fixture(scope="session")
def reference() -> Reference:
    return shared.reference


@pytest.fixture(scope="session")
def logits() -> Logits:
    return shared.logits


@pytest.fixture(scope="session")
def randomize_adapters() -> Randomize:
    return shared.randomize_adapters


@pytest.fixture
def adapted() -> Build:
    return shared.adapted
