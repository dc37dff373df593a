"""The devices that tests here run on: the CPU, so that their bodies are right, and a GPU if there is one."""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU that torch finds")
    return request.param
