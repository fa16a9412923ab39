import dataclasses
import re

import pytest

from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES, Modality
from medm2g_jax.rounds import GROUPS, LISTINGS, graph, group_of, group_regex, members

DEFAULT, OTHER = graph(LISTINGS["default"]), graph(LISTINGS["text_mri"])

PLANS = {
    "image_vae": ("image_vae",),
    "align_text_ct": ("align_text_xray", "align_text_ct"),
    "align_ct_mri": ("align_text_xray", "align_text_ct", "align_ct_mri"),
    "ldm_text": ("text_vae", "align_text_xray", "align_text_ct", "ldm_text"),
    "ldm_xray": ("image_vae", "align_text_xray", "ldm_xray"),
    "ldm_ct": ("image_vae", "align_text_xray", "ldm_ct"),  # prompted by text, it needs no C_CT
    "ldm_mri": ("image_vae", "align_text_xray", "align_text_ct", "align_ct_mri", "ldm_mri"),
    "text_xray": (
        *("image_vae", "text_vae", "align_text_xray", "align_text_ct"),
        *("ldm_text", "ldm_xray", "text_xray"),
    ),
    "text_ct": (
        *("image_vae", "text_vae", "align_text_xray", "align_text_ct"),
        *("ldm_text", "ldm_xray", "ldm_ct", "text_xray", "text_ct"),
    ),
    "ct_mri": (
        *("image_vae", "text_vae", "align_text_xray", "align_text_ct", "align_ct_mri"),
        *("ldm_text", "ldm_xray", "ldm_ct", "ldm_mri", "text_xray", "text_ct", "ct_mri"),
    ),
}

OTHER_PLANS = {
    "ldm_text": ("text_vae", "align_text_xray", "align_text_mri", "ldm_text"),
    "ldm_mri": ("image_vae", "align_text_xray", "align_text_mri", "ldm_mri"),
    "ldm_ct": ("image_vae", "align_text_xray", "align_text_mri", "ldm_ct"),
    "text_mri": (
        *("image_vae", "text_vae", "align_text_xray", "align_text_mri"),
        *("ldm_text", "ldm_xray", "ldm_mri", "text_xray", "text_mri"),
    ),
    "ct_mri": (
        *("image_vae", "text_vae", "align_text_xray", "align_text_mri", "align_ct_mri"),
        *("ldm_text", "ldm_xray", "ldm_mri", "ldm_ct", "text_xray", "text_mri", "ct_mri"),
    ),
}

TRAINS = {
    "image_vae": {"image/vae"},
    "text_vae": {"text/vae"},
    "align_text_xray": {"text/clip", "xray/clip"},
    "align_text_ct": {"ct/clip"},
    "align_ct_mri": {"mri/clip"},
    "ldm_text": {"text/flow"},
    "ldm_xray": {"xray/flow"},
    "ldm_ct": {"ct/flow"},
    "ldm_mri": {"mri/flow"},
    "text_xray": {"text/guide", "xray/guide"},
    "text_ct": {"ct/guide"},
    "ct_mri": {"mri/guide"},
}

OWNERS = {
    "image_vae": {},
    "align_text_xray": {},  # it trains all it reads
    "align_text_ct": {"text/clip": "align_text_xray"},
    "align_ct_mri": {"ct/clip": "align_text_ct"},
    "ldm_text": {
        "text/vae": "text_vae",
        "text/clip": "align_text_xray",
        "xray/clip": "align_text_xray",
        "ct/clip": "align_text_ct",
    },
    "ldm_mri": {
        "image/vae": "image_vae",
        "text/clip": "align_text_xray",  # of the null prompt
        "ct/clip": "align_text_ct",
        "mri/clip": "align_ct_mri",
    },
    "text_ct": {
        "text/vae": "text_vae",
        "image/vae": "image_vae",
        "text/clip": "align_text_xray",
        "ct/clip": "align_text_ct",
        "text/flow": "ldm_text",
        "ct/flow": "ldm_ct",
        "text/guide": "text_xray",
    },
    "ct_mri": {
        "image/vae": "image_vae",
        "text/clip": "align_text_xray",
        "ct/clip": "align_text_ct",
        "mri/clip": "align_ct_mri",
        "ct/flow": "ldm_ct",
        "mri/flow": "ldm_mri",
        "ct/guide": "text_ct",
    },
}

# What the networks' parameters are called, and the group each belongs to.
NAMES = {
    "image/vae/encoder/down_0/res_0/conv_1/kernel": "image/vae",
    "image/vae/quant/bias": "image/vae",
    "text/vae/decoder/h_0/attn/c_attn/kernel": "text/vae",
    "text/vae/encoder/embeddings/word/embedding": "text/vae",
    "text/clip/layer_0/attn/q/kernel": "text/clip",
    "ct/clip/patch/kernel": "ct/clip",
    "ct/prompt_in/kernel": "ct/flow",
    "ct/null/token": "ct/flow",
    "ct/unet/conv_in/kernel": "ct/flow",
    "ct/unet/time/linear_1/bias": "ct/flow",
    "ct/unet/down_1/attn_0/prompt/q/kernel": "ct/flow",
    "ct/unet/down_1/attn_0/ff/out/kernel": "ct/flow",
    "ct/unet/down_1/attn_0/guide/q/kernel": "ct/guide",
    "ct/unet/down_1/attn_0/guide/norm/scale": "ct/guide",
    "ct/unet/guide/kernel": "ct/grid",
    "text/unet/mid/attn_0/guide/out/bias": "text/guide",
    "text/unet/up_0/res_1/fc_2/kernel": "text/flow",
    "mri/unet/stream/embedding": "mri/flow",
    "mri/context/stream/embedding": "mri/guide",
    "ct/context/conv_in/kernel": "ct/guide",
    "ct/adapt/rows": "ct/guide",
    "ct/adapt/embed/kernel": "ct/guide",
    "ct/projector/linear_0/kernel": None,
    "pair/text_ct/log_scale": None,
    "null/tokens": None,
}


@pytest.mark.parametrize(("graph_", "plans"), ((DEFAULT, PLANS), (OTHER, OTHER_PLANS)))
def test_plans(graph_, plans):
    for name, plan in plans.items():
        assert graph_.plan(name) == plan
    assert graph_.plan("ct_mri") == tuple(graph_.stages)  # the last round stands on everything


def test_each_stage_trains_what_first_appears():
    assert {name: set(stage.trains) for name, stage in DEFAULT.stages.items()} == TRAINS
    assert DEFAULT.modalities == ("text", "xray", "ct", "mri") and OTHER.modalities == ("text", "xray", "mri", "ct")
    assert OTHER.stages["text_mri"].trains == ("mri/guide",) and OTHER.stages["text_mri"].new == ("mri",)
    assert OTHER.stages["ct_mri"].trains == ("ct/guide",) and OTHER.stages["align_ct_mri"].trains == ("ct/clip",)


@pytest.mark.parametrize("listing", LISTINGS.values())
def test_every_group_is_trained_once_and_before_it_is_read(listing):
    g = graph(listing)
    trained = [group for stage in g.stages.values() for group in stage.trains]
    assert len(trained) == len(set(trained)) == 2 + 3 * 4
    for name, stage in g.stages.items():
        assert set(stage.reads) - set(stage.trains) == set(g.owners(name))
        assert all(group in g.stages[owner].trains for group, owner in g.owners(name).items())
        assert set(g.owners(name).values()) <= set(g.plan(name)[:-1])


def test_owners():
    for name, owners in OWNERS.items():
        assert DEFAULT.owners(name) == owners
    other = OTHER.owners("ct_mri")
    assert (other["mri/guide"], other["mri/clip"], other["ct/clip"], other["ct/flow"]) == (
        "text_mri",
        "align_text_mri",
        "align_ct_mri",
        "ldm_ct",
    )
    assert "ct/guide" not in other


def test_prompts_never_hold_the_target():
    assert {m: DEFAULT.prompts(m) for m in DEFAULT.modalities} == {
        "text": ("xray", "ct"),
        "xray": ("text",),
        "ct": ("text",),
        "mri": ("ct", "mri"),  # the second: another contrast
    }
    assert {m: OTHER.prompts(m) for m in OTHER.modalities} == {
        "text": ("xray", "mri"),
        "xray": ("text",),
        "mri": ("text", "mri"),
        "ct": ("mri",),
    }
    for g in (DEFAULT, OTHER):
        for m in g.modalities:
            assert g.prompts(m) and (m not in g.prompts(m) or MODALITIES[m].contrasts)


def test_partner_open_trains_the_known_partner_on():
    g = graph(LISTINGS["default"], "partner_open")
    assert g.stages["text_xray"].trains == DEFAULT.stages["text_xray"].trains
    assert set(g.stages["text_ct"].trains) == {"text/guide", "ct/guide"}
    assert set(g.stages["ct_mri"].trains) == {"ct/guide", "mri/guide"}
    # The partner starts from what its last round made of it; everything else is as before.
    assert g.owners("text_ct")["text/guide"] == "text_xray" and g.owners("ct_mri")["ct/guide"] == "text_ct"
    assert {n: s.trains for n, s in g.stages.items() if s.verb != "round"} == {
        n: s.trains for n, s in DEFAULT.stages.items() if s.verb != "round"
    }
    assert g.plan("ct_mri") == DEFAULT.plan("ct_mri")
    with pytest.raises(UserError, match="one of auto, paper, partner_open"):
        graph(LISTINGS["default"], "open")


def test_sources_on_the_grid_and_flows_that_train_on():
    listing = LISTINGS["default"]
    g = graph(listing, register=listing)
    assert {n: dict(s.registered) for n, s in g.stages.items() if s.registered} == {"ct_mri": {"mri": ("ct", "mri")}}
    added = {n: set(s.trains) - set(DEFAULT.stages[n].trains) for n, s in g.stages.items()}
    assert {n: groups for n, groups in added.items() if groups} == {"ct_mri": {"mri/grid"}}
    # Both directions where both train; an X-ray is on no slice's grid, a report on none.
    alone = graph(("ct_mri",), register=("ct_mri",)).stages["ct_mri"]
    assert alone.registered == {"ct": ("mri",), "mri": ("ct", "mri")}
    assert not graph(("xray_ct",), register=("xray_ct",)).stages["xray_ct"].registered
    assert graph(("ct_mri",), contrasts=False, register=("ct_mri",)).stages["ct_mri"].registered["mri"] == ("ct",)
    # The order of the slots is the listing's and the registry's, whatever the round.
    assert g.slots("mri") == ("ct", "mri:t1", "mri:t2", "mri:pd", "mri:flair", "mri:t1ce")
    assert g.slots("ct") == ("mri", "mri:t1", "mri:t2", "mri:pd", "mri:flair", "mri:t1ce")
    assert g.slots("text") == g.slots("xray") == ()

    opened = dataclasses.replace(g, opened=("ct_mri",))
    assert opened.stages["ct_mri"].trains == ("mri/flow", "mri/guide", "mri/grid")
    assert opened.owners("ct_mri") == g.owners("ct_mri") and opened.plan("ct_mri") == g.plan("ct_mri")
    other = dataclasses.replace(graph(LISTINGS["text_mri"], register=("text_mri",)), opened=("text_mri",))
    assert other.owners("text_mri")["mri/flow"] == "ldm_mri" and other.owners("ct_mri")["mri/flow"] == "text_mri"
    assert other.plan("ct_mri") == OTHER.plan("ct_mri")
    both = graph(listing, "partner_open", register=listing)
    both = dataclasses.replace(both, opened=("ct_mri",)).stages["ct_mri"]
    assert set(both.trains) == {f"{m}/{group}" for m in ("ct", "mri") for group in ("flow", "guide", "grid")}


def test_a_known_flow_trains_on_where_it_gets_sources_on_its_grid_and_practises_what_it_knew():
    listing = LISTINGS["default"]
    auto = dataclasses.replace(graph(listing, "auto", register=listing), opened=("ct_mri",))
    stage = auto.stages["ct_mri"]
    assert set(stage.trains) == {"mri/flow", "mri/guide", "mri/grid", "ct/flow", "ct/grid"}  # neither V_CT nor theta_c
    assert stage.earlier == {"ct": ("text",)} and set(stage.registered) == {"ct", "mri"}
    assert {"text/vae", "text/clip", "text/guide", "ct/guide"} <= set(stage.reads) and "text/flow" not in stage.reads
    assert auto.owners("ct_mri")["text/guide"] == "text_xray" and auto.owners("ct_mri")["ct/flow"] == "ldm_ct"
    assert not any(s.earlier for n, s in auto.stages.items() if n != "ct_mri")
    # Not where the round is closed, or nobody knew anybody; a contrast is known as well.
    assert graph(listing, "auto", register=listing).stages["ct_mri"].trains == ("mri/guide", "mri/grid")
    alone = dataclasses.replace(graph(("ct_mri",), "auto", register=("ct_mri",)), opened=("ct_mri",))
    assert not alone.stages["ct_mri"].earlier
    other = LISTINGS["text_mri"]
    other = dataclasses.replace(graph(other, "auto", register=other), opened=("text_mri", "ct_mri")).stages["ct_mri"]
    assert other.earlier == {"mri": ("text",)} and other.contrasts == ("mri",) and "mri/grid" in other.reads
    init = dataclasses.replace(auto, absent=("text_ct",))
    assert not init.stages["ct_mri"].earlier


def test_trained_pairs():
    assert DEFAULT.trained_pairs(("text", "xray"), ("text_xray",)) == {
        "prompt": (("xray", "text"), ("ct", "text"), ("text", "xray")),
        "guide": (("text", "xray"), ("xray", "text")),
    }
    everything = DEFAULT.trained_pairs(DEFAULT.modalities, DEFAULT.listing)
    assert set(everything["guide"]) == {
        *(("text", "xray"), ("xray", "text"), ("text", "ct"), ("ct", "text"), ("ct", "mri"), ("mri", "ct")),
        ("mri", "mri"),  # another contrast
    }
    assert set(everything["prompt"]) == {
        *(("xray", "text"), ("ct", "text"), ("text", "xray"), ("text", "ct"), ("ct", "mri"), ("mri", "mri")),
    }
    assert not {("xray", "mri"), ("mri", "xray"), ("text", "mri"), ("xray", "ct")} & set(everything["guide"])
    assert DEFAULT.trained_pairs((), ()) == {"prompt": (), "guide": ()}
    printed = graph(LISTINGS["default"], contrasts=False)
    assert ("mri", "mri") not in printed.trained_pairs(printed.modalities, printed.listing)["guide"]


ALONE = {  # listing -> (stages, what they train)
    ("ct_mri",): {
        "image_vae": {"image/vae"},
        "align_ct_mri": {"ct/clip", "mri/clip"},
        "ldm_ct": {"ct/flow"},
        "ldm_mri": {"mri/flow"},
        "ct_mri": {"ct/guide", "mri/guide"},
    },
    ("mri",): {
        "image_vae": {"image/vae"},
        "align_mri": {"mri/clip"},
        "ldm_mri": {"mri/flow"},
        "mri": {"mri/guide"},
    },
    ("ct",): {"image_vae": {"image/vae"}, "ldm_ct": {"ct/flow"}},
    ("xray", "mri"): {
        "image_vae": {"image/vae"},
        "align_mri": {"mri/clip"},
        "ldm_xray": {"xray/flow"},
        "ldm_mri": {"mri/flow"},
        "mri": {"mri/guide"},
    },
}


@pytest.mark.parametrize("listing", ALONE)
def test_a_listing_of_the_modalities_one_has(listing):
    g = graph(listing)
    assert {name: set(stage.trains) for name, stage in g.stages.items()} == ALONE[listing]
    assert g.centre == () and not any("text" in group for s in g.stages.values() for group in (*s.trains, *s.reads))
    assert g.plan(g.last)[-1] == list(g.stages)[-1] == g.last
    for name, stage in g.stages.items():
        assert set(stage.reads) - set(stage.trains) == set(g.owners(name))


def test_prompts_and_contrasts_of_what_one_has():
    assert graph(("ct_mri",)).prompts("ct") == ("mri",) and graph(("ct_mri",)).prompts("mri") == ("ct", "mri")
    assert graph(("ct",)).prompts("ct") == () and graph(("mri",)).prompts("mri") == ("mri",)
    assert DEFAULT.stages["ct_mri"].contrasts == ("mri",) and DEFAULT.stages["text_ct"].contrasts == ()
    assert OTHER.stages["text_mri"].contrasts == ("mri",) and OTHER.stages["ct_mri"].contrasts == ()
    assert graph(("text",)).centre == () and DEFAULT.centre == ("text",)


def test_groups_cover_all_names_and_no_name_twice():
    owners = {name.split("/")[0] for name in NAMES}
    groups = [f"{owner}/{g}" for owner in owners for g in GROUPS]
    for name, group in NAMES.items():
        assert group_of(name) == group
        assert [g for g in groups if re.match(group_regex((g,)), name)] == ([group] if group else [])
    # Of one owner's name, never of one that begins alike.
    assert not re.match(group_regex(("ct/flow",)), "ct2/unet/conv_in/kernel")
    assert not re.match(group_regex(("ct/flow",)), "pet/ct/unet/conv_in/kernel")


def test_several_groups_in_one_regex_and_none():
    regex = re.compile(group_regex(("ct/guide", "image/vae")))
    assert {group for name, group in NAMES.items() if regex.match(name)} == {"ct/guide", "image/vae"}
    assert sum(regex.match(n) is not None for n in NAMES) == sum(g in ("ct/guide", "image/vae") for g in NAMES.values())
    assert not any(re.match(group_regex(()), name) for name in (*NAMES, ""))


def test_a_fifth_modality_joins_by_its_round(monkeypatch):
    monkeypatch.setitem(MODALITIES, "pet_fdg", Modality("pet_fdg", "image", "PET", window=(0.0, 20.0)))
    assert members("ct_pet_fdg") == ("ct", "pet_fdg") and members("pet_fdg_ct") == ("pet_fdg", "ct")
    g = graph(("text_xray", "text_ct", "ct_pet_fdg"))
    assert g.stages["ct_pet_fdg"].trains == ("pet_fdg/guide",) and g.prompts("pet_fdg") == ("ct",)
    assert g.plan("ct_pet_fdg")[-4:] == ("ldm_pet_fdg", "text_xray", "text_ct", "ct_pet_fdg")


@pytest.mark.parametrize("name", ("pet", "text_pet", "ct_ct", "_ct", "text_xray_ct", ""))
def test_unknown_rounds(name):
    with pytest.raises(UserError, match="unknown round"):
        members(name)


@pytest.mark.parametrize("ask", ("stage", "owners", "plan"))
def test_a_stage_of_another_listing_names_those_there_are(ask):
    with pytest.raises(UserError, match="unknown stage 'text_mri'.*align_text_xray"):
        getattr(DEFAULT, ask)("text_mri")
