# SPDX-License-Identifier: Apache-2.0
"""How layers are named in options."""

import pytest
from kvarn.layer_numbers import by_number


def test_numbers_and_ranges():
    assert by_number({0: "a", "2": "b", "4-6": "a", "8-8": "c"}) == {0: "a", 2: "b", 4: "a", 5: "a", 6: "a", 8: "c"}
    assert by_number({}) == {}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"1": "a", "0-2": "b"}, "names a layer twice"),
        ({1: "a", "1": "a"}, "names a layer twice"),
        ({"first": "a"}, "'first' is neither the number of a layer nor a range"),
        ({"-1": "a"}, "neither the number"),
        ({"1-": "a"}, "neither the number"),
        ([0], "no mapping"),
    ],
    ids=str,
)
def test_what_names_no_layers(given, reason):
    with pytest.raises(ValueError, match=reason):
        by_number(given)
