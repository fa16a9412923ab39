"""Every default and preset, once. `configs/*.py` only name a stage.

    get_config("text_ct", "tiny")           # configs/text_ct.py:tiny
    get_config("ldm", "ct,sd15,paper")      # configs/ldm.py:ct,sd15,paper
    get_config("ct_mri", "tiny,alone")      # that round and nothing but what it stands on
    get_config("finetune", "report,lora")   # configs/finetune.py:report,lora

Presets: `tiny` trains in minutes on two CPU cores (64 px, 8x8x4 latents); `base` is for one GPU of 24 GB (256 px,
32x32x4 latents, UNets of 100 M); `sd15` is the paper's geometry and hyper-parameters. The variant `paper` switches back
every choice that goes beyond the printed method; `tiny,long` trains for hours what `tiny` trains for minutes.

A stage's own fields (batch, steps, lr ...) stand at the top level of its config. `config.stages.<name>` holds the same
fields for each upstream stage it may have to train first; the fields in `rounds.SHARED` are handed to all of them.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from medm2g_jax import rounds
from medm2g_jax.errors import UserError
from medm2g_jax.modality import MODALITIES

PRESETS = ("tiny", "base", "sd15")
VARIANTS = ("paper", "long")
WEIGHT_FOLDERS = ("sd15", "clip", "vd", "optimus")
_ALL = tuple(f"{kind}/{group}" for kind in ("image", "text") for group in ("vae", "clip", "flow"))
_BEGIN = {"tiny": _ALL, "base": ("image/vae",), "sd15": _ALL}  # what converted weights begin

_PIXELS = {"tiny": 64, "base": 256, "sd15": 512}  # a side

# --- what all stages of a run root agree on -------------------------------------------------------------------------


# Sizes of the networks. `tiny`: measured to train in minutes on two cores; `base`: 256 px with Stable Diffusion's own
# autoencoder, UNets of 100 M, everything else to match, for one GPU of 24 GB; `sd15`: SD-1.5, CLIP-L, Versatile
# Diffusion.
_SD_VAE = dict(channels=(128, 256, 512, 512), layers=2, groups=32, latent=4, patch=1, mid_attention=True, colours=3)
_NETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        width=64,  # of the space that prompts and guides share
        # A token of the shared space has about 1 / sqrt(width) a feature, which says little to layers made for 1, and
        # most of it in few directions: a fresh flow reads it whitened at first (`recipes`). Not where weights begin it
        # that read it as it is (VD).
        loud_prompts=True,
        image_vae=dict(channels=(64,), layers=0, groups=8, latent=4, patch=8, mid_attention=False, colours=1),
        image_unet=dict(channels=(48, 96), attention=(False, True), layers=1, heads=4, groups=8),
        text_vae=dict(width=64, layers=2, heads=4, ff=256, latent=64, bert_positions=64, gpt2_positions=64),
        text_unet=dict(
            channels=(48, 96), attention=(False, True), layers=1, heads=4, groups=8, positions=4, latent=64
        ),
        clip_text=dict(width=64, layers=2, heads=4, ff=256, length=36),
        clip_image=dict(width=64, layers=2, heads=4, ff=256, patch=16, image=64),
        image_context=dict(heads=4, channels=(32, 64), stride=2),
        text_context=dict(heads=4, tokens=4),
        adapt=4,  # K, rows of f_B
        projector=128,  # width of the visual-invariant projector
        vocabulary=1024,  # at most, for tokenizers trained on the data at hand
        bert_length=36,
        gpt2_length=36,
        report_words=60,  # longer reports are cut
    ),
    "base": dict(
        width=512,
        loud_prompts=True,
        image_vae=_SD_VAE,
        image_unet=dict(
            channels=(128, 256, 384, 512), attention=(True, True, True, False), layers=2, heads=8, groups=32
        ),
        text_vae=dict(width=512, layers=6, heads=8, ff=2048, latent=256, bert_positions=256, gpt2_positions=256),
        text_unet=dict(
            channels=(128, 192, 256, 320),
            attention=(True, True, True, False),
            layers=2,
            heads=8,
            groups=32,
            positions=4,
            latent=256,
        ),
        clip_text=dict(width=512, layers=6, heads=8, ff=2048, length=128),
        clip_image=dict(width=512, layers=8, heads=8, ff=2048, patch=16, image=224),
        image_context=dict(heads=8, channels=(64, 128, 256), stride=4),
        text_context=dict(heads=8, tokens=4),
        adapt=8,
        projector=1024,
        vocabulary=16384,
        bert_length=192,
        gpt2_length=192,
        report_words=100,
    ),
    "sd15": dict(
        width=768,
        loud_prompts=False,
        image_vae=_SD_VAE,
        image_unet=dict(
            channels=(320, 640, 1280, 1280), attention=(True, True, True, False), layers=2, heads=8, groups=32
        ),
        text_vae=dict(width=768, layers=12, heads=12, ff=3072, latent=768, bert_positions=512, gpt2_positions=1024),
        text_unet=dict(
            channels=(320, 640, 1280, 1280),
            attention=(True, True, True, False),
            layers=2,
            heads=8,
            groups=32,
            positions=4,
            latent=768,
        ),
        clip_text=dict(width=768, layers=12, heads=12, ff=3072, length=77),
        clip_image=dict(width=1024, layers=24, heads=16, ff=4096, patch=14, image=224),
        image_context=dict(heads=12, channels=(128, 256, 512), stride=4),
        text_context=dict(heads=12, tokens=4),
        adapt=16,
        projector=1280,
        vocabulary=50000,
        bert_length=256,
        gpt2_length=192,
        report_words=100,
    ),
}


def _shared(preset: str, variant: str, listing: tuple[str, ...]) -> ConfigDict:
    tiny = preset == "tiny"
    net = _NETS[preset]
    if variant == "paper":
        net = net | dict(loud_prompts=False)
    elif variant == "long":
        net = net | dict(image_vae=net["image_vae"] | dict(latent=8))  # finer, and harder to generate: worth hours
    return ConfigDict(
        dict(
            preset=preset,
            variant=variant,
            listing=listing,
            seed=0,
            weights="",  # folder of converted weights; "" = start fresh
            begin=_BEGIN[preset],  # what of them, where they are given: "KIND/GROUP"
            image_size=_PIXELS[preset],
            schedule="scaled_linear",  # of the noise, a name in diffusion.SCHEDULES
            net=net,
            data=dict(
                source="phantom",  # or manifest:PATH, tfds:NAME; several with "+" between them
                weights=(),  # share of training rows of each of several; (): by size
                accept="",  # fingerprint of data that may take the place of others under a begun run; never compared
                template_text=False,  # take texts written from metadata for reports
                range="",  # of 16-bit images, as in "xray=0:4095,mri:t2=0:1200"; found over the whole set if not said
                most_pixels=2**26,  # of one image
                # Take all images of one row as on one grid, where the row does not say ("registered" in a manifest).
                registered=False,
                # The phantom's subjects. Train and validation are shared out among the listing's pairs.
                train=6000 if tiny and variant != "long" else 60000,
                val=384,
                test=1000,
            ),
        )
    )


# --- what a stage has for itself ------------------------------------------------------------------------------------

_OPTIMIZER = dict(
    steps=0,
    batch=32,
    lr=0.0,
    lr_adapt=0.0,  # of f_B's free rows
    optimizer="adamw",  # "adam": weight decay inside the gradient, as the paper's words have it
    b1=0.9,
    b2=0.99,
    weight_decay=0.01,
    warmup=0.05,  # share of the steps
    final_lr=0.02,  # cosine down to this share of lr
    clip=1.0,  # global norm
    ema=0.985,  # reached after a ramp (1 + step) / (10 + step)
    accumulate=1,  # micro-batches a step
    remat=False,
    log_every=25,
    eval_every=0,  # 0: at the end only
    eval_rows=64,  # held-out rows that the loss is measured on, at most; 0: it is not, and the last step counts as best
    checkpoint_every=100,
    show_every=0,  # steps between two drawings of the stage's samples and figures, same noise; 0: at the end only
    keep=2,
)

# What the larger presets change of it.
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "base": dict(b2=0.99, ema=0.999, remat=True, log_every=50, eval_every=2000, checkpoint_every=1000),
    "sd15": dict(
        b2=0.999, weight_decay=1e-4, ema=0.9999, remat=True, log_every=50, eval_every=2000, checkpoint_every=1000
    ),
}
_VERB_SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": dict(
        image_vae=dict(steps=1800, lr=4e-3, batch=8, log_every=100, checkpoint_every=600),
        text_vae=dict(steps=700, lr=3e-3, batch=32),
        align=dict(steps=800, lr=2e-3, batch=48),
        ldm=dict(steps=1200, lr=4e-3, batch=16),
        ldm_text=dict(steps=1500, lr=3e-3, batch=32),
        round=dict(steps=1100, lr=5e-3, lr_adapt=5e-3, batch=16),
        tune_full=dict(steps=300, lr=1e-3, lr_adapt=1e-3, batch=16),
        tune_guide=dict(steps=300, lr=2e-3, lr_adapt=2e-3, batch=16),
        tune_lora=dict(steps=300, lr=2e-3, batch=16),
    ),
    "base": dict(  # to start from; nothing has been trained at this size yet
        image_vae=dict(steps=60_000, lr=1e-4, batch=16),
        text_vae=dict(steps=20_000, lr=2e-4, batch=64),
        align=dict(steps=10_000, lr=1e-4, batch=128),
        ldm=dict(steps=100_000, lr=1e-4, batch=64),
        ldm_text=dict(steps=50_000, lr=1e-4, batch=256),
        round=dict(steps=20_000, lr=1e-4, lr_adapt=1e-3, batch=64),
        tune_full=dict(steps=5000, lr=2e-5, lr_adapt=1e-4, batch=32),
        tune_guide=dict(steps=5000, lr=5e-5, lr_adapt=1e-4, batch=32),
        tune_lora=dict(steps=5000, lr=1e-4, batch=32),
    ),
    "sd15": dict(
        image_vae=dict(steps=100_000, lr=2e-5, batch=64),
        text_vae=dict(steps=50_000, lr=5e-5, batch=64),
        align=dict(steps=20_000, lr=1e-5, batch=256),
        ldm=dict(steps=200_000, lr=2e-5, batch=256),
        ldm_text=dict(steps=200_000, lr=5e-5, batch=1024),
        round=dict(steps=50_000, lr=1e-5, lr_adapt=1e-3, batch=256),
        tune_full=dict(steps=10_000, lr=1e-5, lr_adapt=1e-4, batch=64),
        tune_guide=dict(steps=10_000, lr=1e-5, lr_adapt=1e-4, batch=64),
        tune_lora=dict(steps=10_000, lr=1e-4, batch=64),
    ),
}


# What `long` changes of `tiny`: two to three hours on two cores. It made the model in the box.
_LONG: dict[str, dict[str, Any]] = dict(
    image_vae=dict(steps=6000),
    text_vae=dict(steps=2500),
    align=dict(steps=2000, batch=96),
    ldm=dict(steps=6000),
    ldm_text=dict(steps=6000),
    ldm_mri=dict(steps=3000),  # trains on in ct_mri
    round=dict(steps=2400),
)


def _stage(name: str, preset: str, variant: str, listing: tuple[str, ...]) -> dict:
    """A stage's own fields. lr, batch of `sd15`: the paper's (section 4); steps and `tiny`: measured here.

    On two cores half the batch takes less than half the time, and all but alignment, whose negatives are the batch,
    learn more a second from many small steps. Flows that share sizes, batch and steps share a compiled program.
    """
    tiny, paper = preset == "tiny", variant == "paper"
    verb = name.split("_")[0] if name.split("_")[0] in ("align", "ldm") else "vae" if name.endswith("_vae") else "round"
    sizes, tune = _VERB_SIZES[preset], rounds.tuned(name)
    verb = f"tune_{tune[1]}" if tune else verb
    own = _OPTIMIZER | _SIZES[preset] | (sizes[name] if name in sizes else sizes[verb])
    for key in (verb, name) if variant == "long" else ():
        own |= _LONG[key] if key in _LONG else {}
    if paper:
        own |= dict(optimizer="adam", weight_decay=1e-4)
    if name == "image_vae":
        own |= dict(loss=dict(l1=1.0, mse=10.0, kl=1e-3))
    elif name == "text_vae":
        # A KL this strong gives latents that stand the sampler's noise: 3e-3 loses a quarter of the findings.
        own |= dict(loss=dict(ce=1.0, kl=0.05))
    elif verb == "align":
        if tiny and name == f"align_{listing[0]}":
            own |= dict(steps=2 * own["steps"])  # the centre trains here alone; what it mixes up no flow tells apart
        own |= dict(
            loss=dict(contrast=1.0, invariant=0.3 if tiny else 1.0),
            barlow_lambda=0.0051,
            crop=0.9 if tiny else 0.6,  # least area of a view: at 0.6 a lesion's level is learned last
        )
    elif verb == "ldm":
        own |= dict(
            loss=dict(eps=1.0),  # squared error of what is predicted
            # A name in diffusion.PREDICTIONS; rounds take it from the flow they stand on. "auto", measured
            # (docs/quality.md): eps where converted weights begin the flow, which learned that; else z0.
            predict="eps" if paper else "auto",
            min_snr=0.0,  # the most that z0's error may count at a time, in signal over noise; 0: all times alike
            # How the noise levels of training rows are spread, a name in diffusion.TIMES.
            times="uniform" if paper or preset == "sd15" or name == "ldm_text" else "logit_normal",
            drop_prompt=0.1,
            unprompted=0.1,  # share of rows from records without the prompt's streams, where the data have some
        )
    else:
        if tiny and not paper and _on_grid(name, listing):
            own |= dict(steps=own["steps"] * 4 // 3)
        if paper:
            own |= dict(lr_adapt=own["lr"])
        own |= dict(
            # Without the prompt (Eq. 6 prints none) the guide has to carry the partner.
            drop_prompt=1.0 if paper else 0.7,
            clean=0.0 if paper else 0.75,  # share of rows whose source is clean (translation); the rest share t
            loss=dict(eps=1.0, contrast=0.0 if paper else 0.1),
            contrast_tau=0.07,
            min_snr=0.0,
            # Of the known partner nothing trains ("paper"), all of its guide ("partner_open"), or, where it may have
            # sources on its grid, its flow ("auto"), which then practises with its earlier partners in a share of rows.
            freeze="paper" if paper else "auto",
            rehearse=0.5 if variant == "long" else 0.25,
            # What theta_c's queries, keys and values are at first: those of the flow's prompt attention, or "fresh".
            guide_init="fresh" if paper else "prompt",
            others=0 if paper else 3,  # other contrasts of a modality, at most, that guide it beside the partner
            # Sources on the target's grid stand on its UNet's input channels too (beyond the paper).
            register=not paper,
            # What else of a new modality trains: "flow" its UNet too, "guide" nothing; "auto": "flow" where it may have
            # sources on its grid.
            open="guide" if paper else "auto",
            alone=0.0 if paper else 0.1,  # share of an open flow's rows without any source, so that it forgets nothing
        )
    if tune:
        # Held out before the first step and six times on the way: the best is kept, never worse than the start.
        own |= dict(eval_every=max(1, own["steps"] // 6), warmup=0.1, clean=1.0, alone=0.0, rehearse=0.0)
        own |= dict(weight_decay=0.0)  # it would shrink what has no gradient here: V and f of what is made
        own["loss"] = dict(eps=1.0)
        if tiny and tune[1] == "full" and not paper and _on_grid(rounds.TASKS[tune[0]].round, listing):
            own |= dict(lr=4e-3, lr_adapt=4e-3)  # as its single flow; at it the others forget
        # streams="mri:t1,mri:t2": of a modality with some here no others; make="mri:pd": the one stream that is made.
        own |= dict(streams="", make="")
        own |= dict(rank=8) if tune[1] == "lora" else {}
        # Undersample k-space of the source (MRI): its factor, and what is kept: the low frequencies, or lines that get
        # sparser outwards.
        own |= dict(accelerate=1, keep_lines="block") if rounds.TASKS[tune[0]].accelerated else {}
    return own


def _on_grid(name: str, listing: tuple[str, ...]) -> bool:
    """Is this a round in which a flow may have sources on its own grid?"""
    stages = rounds.graph(listing, register=listing).stages
    return name in stages and bool(stages[name].registered)


# --- the words after the colon --------------------------------------------------------------------------------------


def default_preset() -> tuple[str, str]:
    """(preset, reason): `sd15` where MEDM2G_SD_WEIGHTS names a folder of converted weights, else `tiny`."""
    weights = weights_folder()
    if not weights:
        return "tiny", "MEDM2G_SD_WEIGHTS is not set"
    missing = [f for f in WEIGHT_FOLDERS if not (Path(weights) / f).is_dir()]
    if missing:
        raise UserError(
            f"MEDM2G_SD_WEIGHTS={weights}: no folder {missing[0]}/ in it; expected {', '.join(WEIGHT_FOLDERS)}. "
            f"Make it with `medm2g convert {missing[0]} --from FILE --to {weights}`, unset the variable, or name a "
            "preset after the colon"
        )
    return "sd15", f"MEDM2G_SD_WEIGHTS={weights}"


def _listing(word: str, alone: bool = False) -> tuple[str, ...] | None:
    """The listing that a word names, None where it names none; `alone`: a round's name is that round, no listing."""
    if word in rounds.LISTINGS and not alone:
        return rounds.LISTINGS[word]
    if word in MODALITIES and not alone:
        return None  # a modality on its own is meant with `alone` only
    listing = tuple(word.split("+"))
    try:
        for name in listing:
            rounds.members(name)
    except UserError:
        return None
    return listing


def _subject(target: str, words: list[str], listing: tuple[str, ...], alone: bool, given: str | None) -> str:
    """Which of the words is the pair or modality that configs/align.py or configs/ldm.py is asked for."""
    fits = {}
    named = (_listing(word, alone) for word in words)
    for one in (listing, *rounds.LISTINGS.values(), *filter(None, named)):
        names = (s for s in rounds.graph(one).stages if s.startswith(f"{target}_"))
        fits |= dict.fromkeys(s.removeprefix(f"{target}_") for s in names)
    subject = next((w for w in words if w in fits), None)
    if subject is None:
        raise UserError(
            f"configs/{target}.py needs one of {', '.join(sorted(fits))} after the colon, as in "
            f"configs/{target}.py:{sorted(fits)[0]},tiny; found {given!r}"
        )
    return subject


def _only(name: str, listing: tuple[str, ...]) -> tuple[str, ...]:
    """The listing of `alone`: the one round or modality that is named."""
    if _listing(name, alone=True) is not None:
        return (name,)
    if len(listing) == 1:
        return listing
    raise UserError(f"{name} is no round; beside `alone` name the one that is meant: configs/{name}.py:ct_mri,alone")


def _one_of(words: list[str], table: Mapping[str, Any], given: str | None) -> str:
    """The word that is in the table, taken out of the list."""
    found = [w for w in words if w in table]
    if len(found) != 1:
        raise UserError(
            f"configs/finetune.py needs one of {', '.join(rounds.TASKS)} and one of {', '.join(rounds.HOWS)} after the "
            f"colon, as in configs/finetune.py:report,lora; found {given!r}"
        )
    words.remove(found[0])
    return found[0]


def absolute(path: str) -> str:
    """A path as it stands from any working directory: what is recorded is read again from others."""
    return path if not path or "://" in path else os.path.abspath(os.path.expanduser(path))


def weights_folder() -> str:
    """The folder of converted weights that MEDM2G_SD_WEIGHTS names; "" where it names none."""
    return absolute(os.environ.get("MEDM2G_SD_WEIGHTS", ""))


def get_config(target: str, words: str | None = "", listing: str | tuple[str, ...] = "default") -> ConfigDict:
    """The config of one stage.

    Args:
      target: a stage ("text_ct"), or "align" / "ldm", whose pair or modality is then one of the words.
      words: comma-separated, any order: a preset, a variant (VARIANTS), a listing, and for "align"/"ldm" their subject.
        A listing is a name in rounds.LISTINGS, rounds joined by "+" ("text_ct+ct_mri"), or `alone`: the stage's own
        round, or modality, as the only one.
      listing: a name in rounds.LISTINGS, or a tuple of rounds; words come first.

    Raises:
      UserError: an unknown word; names those that fit.
    """
    rest = [w.strip() for w in (words or "").split(",") if w.strip()]
    presets = [w for w in dict.fromkeys(rest) if w in PRESETS]
    if len(presets) > 1:
        raise UserError(f"two presets after the colon of the config, {' and '.join(presets)}: name one")
    preset = presets[0] if presets else ""
    variants = [w for w in dict.fromkeys(rest) if w in VARIANTS]
    if len(variants) > 1:
        raise UserError(f"two variants after the colon of the config, {' and '.join(variants)}: name one")
    variant = variants[0] if variants else ""
    alone = "alone" in rest
    rest = [w for w in rest if w not in (*PRESETS, *VARIANTS, "alone")]
    tuple_ = rounds.LISTINGS[listing] if isinstance(listing, str) else tuple(listing)
    subject = ""
    if target == "finetune":
        task, how = (_one_of(rest, table, words) for table in (rounds.TASKS, rounds.HOWS))
        target = rounds.tune_name(task, how)
    if target in ("align", "ldm"):
        subject = _subject(target, rest, tuple_, alone, words)
        rest.remove(subject)
    named = None
    for word in list(rest):
        if (found := _listing(word, alone)) is not None:
            rest.remove(word)
            named = tuple_ = found
    if rest:
        raise UserError(
            f"unknown word {rest[0]!r} after the colon of the config; presets: {', '.join(PRESETS)}; variants: "
            f"{', '.join(VARIANTS)}; "
            f"listings: {', '.join(rounds.LISTINGS)}, alone, or rounds joined by +"
        )
    name = f"{target}_{subject}" if subject else target
    if alone and named is None:
        tuned = rounds.tuned(target)
        tuple_ = _only(subject or (rounds.TASKS[tuned[0]].round if tuned else target), tuple_)
    elif subject and named is None and name not in rounds.graph(tuple_).stages:
        # a pair that only another listing has selects it
        tuple_ = next((lst for lst in rounds.LISTINGS.values() if name in rounds.graph(lst).stages), tuple_)
    reason = "named after the colon"
    if not preset:
        preset, reason = default_preset()
    if variant == "long" and preset != "tiny":
        raise UserError(f"the variant long is of the preset tiny, not of {preset}; name both: tiny,long")
    graph = rounds.graph(tuple_, tune=name if rounds.tuned(name) else "")
    graph.stage(name)
    config = _shared(preset, variant, tuple_)
    config.stage = name
    config.preset_reason = reason
    config.update(_stage(name, preset, variant, tuple_))
    config.stages = ConfigDict()
    plan = graph.plan(name)
    if rounds.tuned(name) and variant != "paper":  # later rounds train on what it adapts: ct_mri the flow of `ct`
        plan = stage_graph(config).plan(name)
    config.stages = ConfigDict({s: _stage(s, preset, variant, tuple_) for s in plan if s != name})
    if preset != "tiny":
        config.weights = weights_folder()
    data = absolute(os.environ.get("MEDM2G_DATA", ""))
    config.data_reason = "MEDM2G_DATA is not set"
    if data:
        config.data.source, config.data_reason = f"manifest:{data}", f"MEDM2G_DATA={data}"
    config.upstream = "train"  # a missing upstream stage: "train" it, "init" it afresh, or "require" it
    config.upstream_dirs = ()  # run roots and exported models in which finished stages are looked for
    # Handed down to upstream stages, never compared.
    config.dtype = "auto"  # of activations: bfloat16 on accelerators, float32 on CPU
    # Latents of images kept in RUN/latents, so that no step encodes: "on", "off", or "auto" (`train.latents.chosen`).
    config.latents = "auto"
    # Stages of a small preset that stand on none of each other train at once on a CPU: "auto" or "off" (`beside.pays`).
    config.side_by_side = "auto"
    config.mesh = dict(data=-1, fsdp=1, tensor=1)  # -1: all devices that the others leave
    # Sampling, and the unconditional half of guidance: "cond" leaves the guide out of it, "both" keeps it (CoDi).
    config.sample = dict(
        steps=20 if preset == "tiny" else 50,
        sampler="ddim",  # a name in diffusion.SAMPLERS
        spacing="auto",  # of its times, a name in diffusion.SPACINGS
        eta=1.0,
        guidance=1.0 if preset == "tiny" and variant != "paper" else 2.0,  # more makes tiny's opacities masses
        guide="both" if variant == "paper" else "cond",
        best_of_text=1 if variant == "paper" else 4,  # of so many reports the one that agrees best with the image
        rows=64 if preset == "tiny" else 8,  # held-out records that a stage's numbers stand on
    )
    return config


def tasks_config(words: str | None, tasks: Mapping[str, Mapping[str, Any]]) -> ConfigDict:
    """What `medm2g evaluate` measures: the row of `tasks` that `words` names."""
    name = words or "phantom"
    if name not in tasks:
        raise UserError(f"unknown task {name!r} after the colon of the config; tasks: {', '.join(tasks)}")
    empty = dict(findings=False, synthesis=(), regression=0, reports=(), cleaning="none", sets=(), readers={})
    empty |= dict(joint=(), space=(), protocols=(), paper="", published="")
    return ConfigDict(dict(task=name, rows=200, seed=0) | empty | tasks[name])


def stage_config(config: ConfigDict, name: str) -> ConfigDict:
    """The config with which `main` runs stage `name` of this config's plan: a copy; shared and handed-down fields are
    the same, the stage's own come from `config.stages.<name>`."""
    if name == config.stage:
        return config
    out = config.copy_and_resolve_references()
    with out.unlocked():
        own = out.stages[name]
        for field in stage_own_fields(config):
            del out[field]
        out.update(own)
        out.stage = name
        plan = rounds.graph(config.listing).plan(name)
        out.stages = ConfigDict({s: own for s, own in out.stages.items() if s in plan and s != name})
    return out


def stage_graph(config: ConfigDict, absent: tuple[str, ...] = ()) -> rounds.Graph:
    """The graph of the config's listing; only rounds say who of them is frozen. absent: see rounds.Graph."""
    freeze = config.freeze if "freeze" in config else "paper" if config.variant == "paper" else "auto"
    contrasts = bool(config.others) if "others" in config else config.variant != "paper"

    def says(name: str, field: str) -> Any:
        """A round's own field, whichever stage asks: who trains what must look the same from all of them."""
        if name == config.stage:
            return config[field]
        own = config.stages[name] if name in config.stages else None
        return own[field] if own else _stage(name, config.preset, config.variant, config.listing)[field]

    register = tuple(r for r in config.listing if says(r, "register"))
    tune = config.stage if rounds.tuned(config.stage) else ""
    graph = rounds.graph(config.listing, freeze, absent, contrasts, register, tune)
    opened = []
    for stage in graph.stages.values():
        if stage.name in config.listing and stage.verb == "round":
            how = says(stage.name, "open")
            near = stage.name in register and graph.near(stage.name)
            opened += [stage.name] if how == "flow" or (how == "auto" and near) else []
    return dataclasses.replace(graph, opened=tuple(opened), practise=bool(tune and config.rehearse))


def stage_own_fields(config: ConfigDict) -> list[str]:
    """The top-level fields that say something of config.stage alone."""
    return [f for f in _stage(config.stage, config.preset, config.variant, config.listing) if f in config]
