import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medm2g_jax.errors import UserError
from medm2g_jax.modality import KINDS, MODALITIES, Modality, adopt, centre, of_kind, register, split_stream


@pytest.fixture(autouse=True)
def registry():
    """Whatever a test registers is gone after it."""
    before = dict(MODALITIES)
    yield
    MODALITIES.clear()
    MODALITIES.update(before)


def test_the_four():
    assert tuple(MODALITIES) == ("text", "xray", "ct", "mri")
    assert centre().name == "text"
    assert of_kind("text") == ("text",) and of_kind("image") == ("xray", "ct", "mri")
    assert MODALITIES["ct"].window == (-1000.0, 400.0) and MODALITIES["ct"].unit == "HU"
    for m in MODALITIES.values():
        assert m.kind in KINDS
        assert (m.window is None) == (m.dicom == "") == (m.kind == "text")
        assert m.window is None or m.window[0] < m.window[1]


def test_streams_and_their_indices():
    streams = ("mri", "mri:t1", "mri:t2", "mri:pd", "mri:flair", "mri:t1ce")
    assert MODALITIES["mri"].streams == streams
    for i, stream in enumerate(streams):
        assert split_stream(stream) == ("mri", i)
    assert [split_stream(m) for m in ("text", "xray", "ct")] == [("text", 0), ("xray", 0), ("ct", 0)]


def test_the_window_is_applied_and_undone_in_arrays_of_both_kinds():
    hu = np.array([-2000.0, -1000.0, -300.0, 400.0, 3000.0], np.float32)
    ct = MODALITIES["ct"]
    for values, apply in ((hu, ct.normalise), (jnp.asarray(hu), jax.jit(ct.normalise))):
        out = apply(values)
        np.testing.assert_allclose(out, [-1, -1, 0, 1, 1], atol=1e-6)
        assert out.dtype == np.float32
        np.testing.assert_allclose(ct.in_unit(out), [-1000, -1000, -300, 400, 400], atol=1e-3)
    pet = Modality("pet", "image", "PET", window=(0.0, 20.0), unit="SUV", dicom="PT")
    np.testing.assert_allclose(pet.in_unit(np.float32([-1, 0.5])), [0, 15])


@pytest.mark.parametrize("stream", ("mri:t9", "mri:", "ct:t1", "pet", "", ":t1", "MRI"))
def test_unknown_streams_name_the_known(stream):
    with pytest.raises(UserError, match="known streams: text, xray, ct, mri, mri:t1") as error:
        split_stream(stream)
    assert repr(stream) in str(error.value)


def test_a_fifth_modality_is_a_value():
    pet = register(Modality("pet", "image", "PET", contrasts=("fdg",), window=(0.0, 20.0), unit="SUV", dicom="PT"))
    assert register(dataclasses.replace(pet)) == pet  # the same values again do no harm
    assert of_kind("image")[-1] == "pet" and split_stream("pet:fdg") == ("pet", 1)
    assert centre().name == "text"


@pytest.mark.parametrize(
    ("modality", "message"),
    (
        (Modality("2pet", "image", "PET"), "identifier"),
        (Modality("pet-ct", "image", "PET"), "identifier"),
        (Modality("pet", "volume", "PET"), "kind one of"),
        (Modality("ct", "image", "another CT"), "registered already"),
        (Modality("speech", "text", "speech", centre=True), "one centre, and 'text' is it"),
    ),
)
def test_what_cannot_be_registered(modality, message):
    before = dict(MODALITIES)
    with pytest.raises(UserError, match=message):
        register(modality)
    assert before == MODALITIES


def test_slices_may_share_a_grid_and_projections_do_not():
    ct, mri, xray, text = (MODALITIES[m] for m in ("ct", "mri", "xray", "text"))
    assert ct.shares_grid(mri) and mri.shares_grid(ct) and mri.shares_grid(mri) and xray.shares_grid(xray)
    assert not any(a.shares_grid(b) for a, b in ((ct, xray), (xray, mri), (text, ct), (ct, text), (text, text)))
    # A model of before `projection` was a field is taken as trained with what is registered here.
    record = dataclasses.asdict(xray)
    del record["projection"]
    adopt({"xray": record}, "model.json")
    assert MODALITIES["xray"] is xray
    with pytest.raises(UserError, match="projection False, the one registered here True"):
        adopt({"xray": record | {"projection": False}}, "model.json")
