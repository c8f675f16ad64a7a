"""Records are what they were when the format was fixed, byte for byte: every preset, head_dim, encoder and target."""

import kvarn
import pytest
from cases import ENCODERS, EVERY_PRESET, TARGETS, first_difference, golden
from kvarn import reference

KEPT = golden.load()


def check(layout, preset, head_dim, encoder, record, who):
    digest, whole = KEPT[preset, head_dim, encoder]
    if f"{golden.fnv1a64(record.tobytes()):016x}" != digest:
        ours = golden.record(reference, preset, head_dim, encoder)
        against = "the reference is changed too" if whole and whole != ours.tobytes() else "the reference still agrees"
        difference = first_difference(layout, record, ours)
        pytest.fail(f"{who} {encoder}: not the golden record ({against}); against the reference: {difference}")
    assert whole is None or record.tobytes() == whole


def test_every_preset_has_its_record():
    kept = {preset for (preset, head_dim, encoder), (_, whole) in KEPT.items() if whole and encoder == "weighted"}
    assert kept == set(EVERY_PRESET)


@pytest.mark.parametrize("encoder", [*ENCODERS, "feedback"])
def test_reference_makes_the_golden_records(encoder):
    for preset, head_dim, name in KEPT:
        if name == encoder:
            record = golden.record(reference, preset, head_dim, encoder)
            check(reference.Layout(preset, head_dim, 1), preset, head_dim, encoder, record, "reference")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("preset", "head_dim"), sorted({key[:2] for key in KEPT}))
def test_kernels_make_the_golden_records(preset, head_dim, target):
    for encoder in (name for *shape, name in KEPT if shape == [preset, head_dim]):
        record = golden.record(kvarn, preset, head_dim, encoder, target=target)
        check(kvarn.Layout(preset, head_dim, 1), preset, head_dim, encoder, record, target)
