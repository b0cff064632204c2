"""One thread count, one seed and fresh compiler caches for every test."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    without_gpu = pytest.mark.skip(reason="needs a CUDA device, and there is none")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(without_gpu)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pytest_addoption(parser):
    parser.addoption("--build-folder", help="CMake's build folder, for the test of weak symbols")
