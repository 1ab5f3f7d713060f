"""For every test: one thread, because tensors this small are eight times faster so. The longest files come first."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "stories" not in item.path.parts)  # begun last, they would be waited for


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
