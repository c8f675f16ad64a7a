"""Tiny models with random weights, and what the tests of kvarn.hf share."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    import kvarn

    if request.param == "cuda" and (missing := kvarn.cuda_missing()):
        pytest.skip(missing)
    return request.param
