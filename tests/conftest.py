"""Fixtures of the whole suite: a fixed seed, poisoned uninitialised memory, and reasons of skips on the terminal."""

import pytest
import torch

from adazeta_kernels.testing import poisoned_memory


def pytest_configure(config):
    # A skip nobody reads about is a test nobody has: always list reasons.
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield
