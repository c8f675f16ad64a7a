# SPDX-License-Identifier: Apache-2.0
"""How layers are named in options."""

import pytest
from kvarn.layer_numbers import as_option, by_number


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


def test_the_option_has_ranges_and_no_defaults():
    chosen = dict(enumerate("abbcacc"))
    assert as_option(chosen, "a") == {"1-2": "b", "3": "c", "5-6": "c"}
    assert as_option({7: "b", 1: "b"}, "a") == {"1": "b", "7": "b"}
    assert as_option(chosen, "d") == {"0": "a", "1-2": "b", "3": "c", "4": "a", "5-6": "c"}
    assert as_option(dict.fromkeys(range(3), "a"), "a") == {}
    assert by_number(as_option(chosen, "d")) == chosen
