"""On which devices the tests of kvarn.hf run: the CPU, and with `-m gpu` a GPU."""

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    import kvarn

    if request.param == "cuda" and (missing := kvarn.cuda_missing()):
        pytest.skip(missing)
    return request.param
