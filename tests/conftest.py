"""Fixtures of the whole suite: seed, cache, threads, poisoned uninitialised memory; and reasons of skips are shown."""

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


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Neither find nor leave anything in the user's cache: a test that fetches a model does so everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAZETA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="module")
def _threads_as_before():
    """Commands and tests set the number of threads; products round by it, so the next module must not inherit it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield
