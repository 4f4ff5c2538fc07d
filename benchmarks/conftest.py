import pytest
import torch


@pytest.fixture(params=sorted({1, torch.get_num_threads()}), ids=lambda n: f"threads{n}")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
