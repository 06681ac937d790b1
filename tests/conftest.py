"""Set before anything imports train_gpt: one thread, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, that is, on import
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as DETERMINISTIC=1 has it; read once
torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """A test draws the same numbers alone and in the whole suite."""
    torch.manual_seed(0)
    yield


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A folder with tiny shards: see `support.write_dataset`."""
    from support import write_dataset

    return write_dataset(tmp_path / "shards")


@pytest.fixture(scope="session")
def minified() -> str:
    """The program as the submission holds it; making it takes seconds."""
    import train_gpt

    source = Path(train_gpt.__file__).read_text()
    return train_gpt.minify(train_gpt.specialized(source, train_gpt.Config()))
