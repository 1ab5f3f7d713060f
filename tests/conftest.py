"""For every test: one thread, because tensors this small are eight times faster so. The longest files come first."""

import gc
import os

import pytest
import torch
from hypothesis import settings

# The same generated cases in every run; `make test-all` takes hypothesis' own profile and so new ones.
settings.register_profile("same_cases", derandomize=True)
settings.load_profile("same_cases")

gc.disable()  # until the tests are collected: their imports make a million objects that stay


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "stories" not in item.path.parts)  # begun last, they would be waited for


def pytest_collection_finish() -> None:
    gc.enable()
    gc.freeze()  # Python never looks through these objects again


@pytest.fixture(autouse=True)
def small_numbers() -> None:
    """Training the tokenizer lets the processor take denormal numbers for 0, which hypothesis refuses in later tests."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start
