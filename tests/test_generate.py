"""Sources on the wanted image's own grid: when they stand on its UNet's input channels, and when not.

A model of test size with random parameters, MRI alone: what is tested is what reaches the flow.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from micro import model_of

from medm2g_jax.errors import UserError
from medm2g_jax.generate import Request
from medm2g_jax.inference import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return model_of("mri", listing=("mri",))


def image(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape or (32, 32))


def test_a_given_source_on_the_grid_is_read_there_and_one_of_another_size_is_not(model):
    options = dict(prompts="none", guidance=1.0, eta=0.0)
    make = lambda given, **more: model.generate(given, ["mri:flair"], **(options | more))  # noqa: E731
    both = make({"mri:t1": image(1), "mri:t2": image(2)})
    assert both.pairs == dict.fromkeys(("mri:t1 -> mri:flair", "mri:t2 -> mri:flair"), "guide tokens, registered")
    assert not both.notes
    moved = make({"mri:t1": image(1), "mri:t2": image(3)})
    assert not np.allclose(both.samples["mri:flair"], moved.samples["mri:flair"], atol=1e-3)

    apart = [make({"mri:t1": image(1), "mri:t2": image(seed, 40, 40)}) for seed in (2, 3)]
    assert set(apart[0].pairs.values()) == {"guide tokens"}
    assert any("mri:t1 and mri:t2 differ in size" in note for note in apart[0].notes)
    off = make({"mri:t1": image(1), "mri:t2": image(2)}, register="none")
    assert set(off.pairs.values()) == {"guide tokens"} and not off.notes
    for other in (apart[1], off):  # V says nothing here, so nothing of the sources is left
        np.testing.assert_allclose(apart[0].latents["mri:flair"], other.latents["mri:flair"], atol=1e-5)
    alone = make({"mri:t2": image(2, 40, 40)})  # one source, whatever its size: the sample comes on its grid
    assert (
        alone.pairs == {"mri:t2 -> mri:flair": "guide tokens, registered"} and alone.samples["mri:flair"].shape[1] == 40
    )


def test_guidance_leaves_alone_what_reads_its_sources_on_its_grid(model):
    """It moves such a flow away from the null prompt, not from its sources; others from both."""
    out = {n: jnp.asarray(np.random.default_rng(5).normal(size=v.shape), v.dtype) for n, v in model.params.items()}
    loud = {n: v for n, v in out.items() if "/guide/out/" in n}  # V speaks
    louder = Model(model.model, model.params | loud, None, model.meta, model.defaults)

    def moved(**options):
        given = {"mri:t1": image(1)}
        a, b = (louder.generate(given, ["mri:t2"], guidance=g, eta=0.0, **options).latents for g in (1.0, 3.0))
        return not np.allclose(a["mri:t2"], b["mri:t2"], atol=1e-3)

    assert not moved(prompts="none") and moved() and moved(prompts="none", register="none")


def test_streams_made_together_stand_on_each_others_channels(model):
    options = dict(make=["mri:t1", "mri:t2"], prompts="none", eta=0.0, seed=3)
    together = model.generate({}, **options)
    assert set(together.pairs.values()) == {"guide tokens, registered"}
    apart = model.generate({}, register="none", **options)
    assert not np.allclose(together.latents["mri:t1"], apart.latents["mri:t1"], atol=1e-3)


def test_what_a_request_registers():
    request = Request(("mri:t1", "ct"), ("mri:t2", "mri"), registered_pairs=(("ct", "mri"), ("mri", "mri")))
    assert not request.registered("ct", "mri:t2")  # its guide was never trained
    options = dict(guide_pairs=(("ct", "mri"), ("mri", "mri")), registered_pairs=(("ct", "mri"), ("mri", "mri")))
    request = Request(("mri:t1", "ct"), ("mri:t2", "mri"), **options)
    assert request.registered("ct", "mri") and request.registered("mri:t1", "mri:t2")
    assert not request.registered("mri:t1", "mri")  # it may be the very one
    assert not request.registered("mri:t2", "mri:t2") and not request.registered("mri:t2", "ct")
    made = Request(("mri:t1", "ct"), ("mri:t2", "mri:pd"), register="made", **options)
    assert made.registered("mri:pd", "mri:t2") and not made.registered("ct", "mri:t2")
    assert not Request((), ("mri:t1", "mri:t2"), guides="none", **options).registered("mri:t1", "mri:t2")
    with pytest.raises(UserError, match="register='all': expected one of trained, made, none"):
        Request((), ("ct",), register="all")
