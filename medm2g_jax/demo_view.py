"""What the page of `medm2g demo` shows, as HTML: results side by side, how far a request is, what went wrong.

Every text that somebody typed or a model wrote is escaped here, and nowhere else. Pictures are data in the page, so
that nothing of them stands in a file; each says in its text fields that it is synthetic.
"""

import base64
import html
import io
from collections.abc import Mapping

import numpy as np
from jaxtyping import Num
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medm2g_jax.data.marks import NOTE
from medm2g_jax.data.picture import Picture, normalised
from medm2g_jax.demo_desk import Able, Given, Made, Progress, Result
from medm2g_jax.demo_near import Found, Neighbour
from medm2g_jax.errors import UserError
from medm2g_jax.generate import Generated
from medm2g_jax.modality import MODALITIES, Modality, split_stream, stream_word
from medm2g_jax.train.log import duration

WARNING = "Synthetic. Not for clinical use."
NOT_MADE = "Images of these data, not made by the model. Not for clinical use."
FULL = "Full"
# Unit -> what radiologists look at values of it through: name -> window. `FULL`, the modality's own, is always there.
WINDOWS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "HU": {"Lung": (-1350.0, 150.0), "Soft tissue": (-160.0, 240.0), "Bone": (-250.0, 1000.0)}
}
_SIDE = 256  # pixels at least of a picture in the page
_OPPOSITE = dict(zip("LRAPHF", "RLPAFH", strict=True))

CSS = """
.m2g { --m2g-line: var(--border-color-primary); --m2g-soft: var(--body-text-color-subdued); }
.m2g h1 { font-size: 1.35rem; margin: 0; letter-spacing: -.01em; }
.m2g-head { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem 1rem; }
.m2g-head p { margin: 0; color: var(--m2g-soft); flex: 1 1 16rem; }
.m2g-warning { color: #7c2d12; background: #ffedd5; border: 1px solid #fdba74; border-radius: 6px; padding: .1rem .6rem;
  font-weight: 600; font-size: .85rem; white-space: nowrap; }
.dark .m2g-warning { color: #fed7aa; background: #431407; border-color: #9a3412; }
.m2g-status { min-height: 1.8rem; font-size: .9rem; color: var(--m2g-soft); }
.m2g-bar { height: 4px; border-radius: 2px; background: var(--m2g-line); overflow: hidden; margin-top: .3rem; }
.m2g-bar div { height: 100%; background: var(--color-accent); transition: width .3s; }
.m2g-bar .m2g-unknown { width: 30%; animation: m2g-slide 1.4s ease-in-out infinite alternate; }
@keyframes m2g-slide { from { margin-left: 0; } to { margin-left: 70%; } }
@media (prefers-reduced-motion: reduce) { .m2g-bar .m2g-unknown { animation: none; } }
.m2g-error { color: #991b1b; background: #fee2e2; border: 1px solid #fca5a5; border-radius: 6px; padding: .4rem .7rem;
  overflow-wrap: anywhere; }
.dark .m2g-error { color: #fecaca; background: #450a0a; border-color: #991b1b; }
.m2g-row { margin-bottom: 1.1rem; }
.m2g-row h2 { font-size: .95rem; margin: 0 0 .45rem; font-weight: 600; }
.m2g-row h2 q { font-weight: 400; font-style: italic; }
.m2g-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 200px), 1fr)); gap: .8rem; }
.m2g-card { margin: 0; border: 1px solid var(--m2g-line); border-radius: 8px; overflow: hidden; min-width: 0;
  max-width: 340px; background: var(--background-fill-secondary); }
.m2g-card > header { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 .6rem; padding: .4rem .6rem;
  font-weight: 600; }
.m2g-card > header small { font-weight: 400; color: var(--m2g-soft); align-self: center; }
.m2g-wide { grid-column: span 2; max-width: 680px; }
@media (max-width: 640px) { .m2g-cards { grid-template-columns: 1fr 1fr; gap: .5rem; } }
.m2g-tiles { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 2px; background: #000; }
.m2g-tile { position: relative; background: #000; }
.m2g-tile img { display: block; width: 100%; height: auto; margin: 0; }
.m2g-tile span { position: absolute; color: #e5e7eb; font-size: .8rem; line-height: 1;
  text-shadow: 0 0 3px #000, 0 0 3px #000; }
.m2g-tile .m2g-left { top: 6px; left: 7px; } .m2g-tile .m2g-right { top: 6px; right: 7px; }
.m2g-tile .m2g-what { bottom: 0; left: 0; right: 0; padding: 3px 7px 4px; font-size: .68rem; background: #000a; }
.m2g-draws { display: grid; grid-template-columns: repeat(auto-fill, minmax(56px, 1fr)); gap: 2px; background: #000; }
.m2g-found { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: .9rem 1.4rem; }
.m2g-near { display: grid; grid-template-columns: repeat(4, 1fr); gap: .4rem; }
@media (max-width: 640px) { .m2g-near { grid-template-columns: 1fr 1fr; } }
.m2g-near figure { margin: 0; }
.m2g-near figcaption { font-size: .7rem; line-height: 1.35; color: var(--m2g-soft); margin-top: .2rem; overflow: hidden;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4; overflow-wrap: anywhere; }
.m2g-report { margin: 0; padding: .2rem .6rem .6rem; line-height: 1.45; overflow-wrap: anywhere; }
.m2g-report li { margin: .25rem 0 .25rem 1.1rem; }
.m2g-arrows { list-style: none; margin: 0; padding: .45rem .6rem; font-size: .8rem; display: grid; gap: .25rem; }
.m2g-arrows li { display: flex; flex-wrap: wrap; gap: .1rem .4rem; align-items: center; margin: 0; }
.m2g-chip { border-radius: 999px; padding: 0 .5rem; font-size: .72rem; font-weight: 600; }
.m2g-trained { color: #115e59; background: #ccfbf1; } .dark .m2g-trained { color: #99f6e4; background: #134e4a; }
.m2g-emergent { color: #6b21a8; background: #f3e8ff; } .dark .m2g-emergent { color: #e9d5ff; background: #581c87; }
.m2g-given { color: #1e3a8a; background: #dbeafe; } .dark .m2g-given { color: #bfdbfe; background: #1e3a8a; }
.m2g-notes { font-size: .82rem; color: var(--m2g-soft); margin: .5rem 0 0 1.1rem; }
.m2g-foot { font-size: .8rem; color: var(--m2g-soft); }
.m2g-found + .m2g-foot { margin-top: .6rem; }
.m2g-previews { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; }
.m2g-drop { overflow: hidden; }
.m2g-drop [data-testid="upload-text"] { font-size: 0; }
.m2g-drop [data-testid="upload-text"]::after { content: "Drop or click"; font-size: .78rem; }
.m2g-drop [data-testid="upload-text"] .or { display: none; }
.m2g-drop [data-testid="upload-icon"] { width: 18px; height: 18px; margin: 1.2rem 0 .2rem; }
.m2g-tools { align-items: center; }
.m2g-hint { color: var(--m2g-soft); text-align: center; padding: 3rem 1rem; border: 1px dashed var(--m2g-line);
  border-radius: 8px; }
"""


def escaped(text: object) -> str:
    """A text that nobody here wrote, as HTML shows it."""
    return html.escape(str(text), quote=True)


def _modality(stream: str) -> Modality:
    return MODALITIES[split_stream(stream)[0]]


def title_of(stream: str) -> str:
    """What stands above a stream's images: "MRI T2"."""
    word, _, contrast = stream_word(stream).partition(" ")
    return f"{word[:1].upper()}{word[1:]} {contrast.upper()}".strip()


def _named(stream: str) -> str:
    """A stream within a sentence: "report", "MRI T2"."""
    return title_of(stream) if _modality(stream).is_image else stream_word(stream)


def window_names(streams: tuple[str, ...]) -> tuple[str, ...]:
    """What values of some of these streams may be looked at through."""
    named = (name for s in streams for name in WINDOWS.get(_modality(s).unit, ()))
    return FULL, *dict.fromkeys(named)


def window_of(modality: Modality, name: str) -> tuple[float, float]:
    """The window of that name of a modality's values; its own where its unit has none of that name."""
    return WINDOWS.get(modality.unit, {}).get(name, modality.window)


# --- pictures -------------------------------------------------------------------------------------------------------


def levels(values: Num[np.ndarray, "h w"], window: tuple[float, float]) -> np.ndarray:
    """Values as 8-bit grey, the window's ends black and white."""
    low, high = window
    share = (np.asarray(values, np.float32) - low) / (high - low)
    return np.round(share.clip(0, 1) * 255).astype(np.uint8)


def data_uri(grey: np.ndarray, note: str = NOTE) -> str:
    """8-bit grey as a PNG in the page."""
    picture = Image.fromarray(grey)
    if (least := min(grey.shape)) < _SIDE:  # browsers enlarge with a coarser filter
        times = -(-_SIDE // least)
        picture = picture.resize((grey.shape[1] * times, grey.shape[0] * times), Image.Resampling.BICUBIC)
    said, file = PngInfo(), io.BytesIO()
    said.add_text("Description", note)
    picture.save(file, "PNG", pnginfo=said)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def tile(grey: np.ndarray, alt: str, what: str, ends: tuple[str, str] = ("R", "L"), note: str = NOTE) -> str:
    """A picture with the letters of its two sides, and below in it what it is."""
    left, right = map(escaped, ends)
    return (
        f'<div class="m2g-tile"><img src="{data_uri(grey, note)}" alt="{escaped(alt)}">'
        f'<span class="m2g-left">{left}</span><span class="m2g-right">{right}</span>'
        f'<span class="m2g-what">{escaped(what)}</span></div>'
    )


def ends_of(picture: Picture | None) -> tuple[str, str]:
    """The letters at the left and the right of a picture; without an orientation R and L, as networks take it."""
    across = picture.orientation[1] if picture is not None and len(picture.orientation) > 1 else "L"
    return _OPPOSITE[across], across


def given_levels(given: Given, modality: Modality, name: str = FULL) -> np.ndarray:
    """What is given, as it is shown: through the window where it has values, else as somebody windowed it already."""
    if given.picture.span is None:
        return levels(given.picture.pixels, window_of(modality, name))
    return levels(normalised(given.picture, modality), (-1.0, 1.0))


# --- results --------------------------------------------------------------------------------------------------------


def results(result: Result, window: str = FULL) -> str:
    """All that was made, what it was made of beside it, and how."""
    many = len(result.rows) > 1
    titles = ("As asked for", "Left and right exchanged, same noise") if many else ("",)
    rows = "".join(_row(row, title, window) for row, title in zip(result.rows, titles, strict=True))
    order, took = result.rows[0].order, duration(result.seconds)
    draws = f", {order.draws} draws" if order.draws > 1 else ""
    how = f"Seed {order.seed}, {order.steps} steps of {order.sampler}, guidance {order.guidance:g}{draws}; {took}"
    return f'<div class="m2g m2g-results">{rows}<p class="m2g-foot">{escaped(how)}. {WARNING}</p></div>'


def _row(row: Made, title: str, window: str) -> str:
    given, made = row.order.given, row.made
    pictures = {s: v for s, v in given.items() if isinstance(v, Given)}
    words = [f"{escaped(title_of(s))}: <q>{escaped(v)}</q>" for s, v in given.items() if isinstance(v, str)]
    heads = [f"<b>{escaped(title)}</b>"] if title else []
    heads += words or ([] if pictures else ["Of nothing but noise"])
    cards = [_given_card(s, v, window) for s, v in pictures.items()]
    ends = ends_of(next((v.picture for v in pictures.values()), None))
    for stream in made.samples:
        card = _image_card if _modality(stream).is_image else _text_card
        cards.append(card(stream, made, window, ends))
    notes = "".join(f"<li>{escaped(note)}</li>" for note in made.notes)
    return (
        f'<section class="m2g-row"><h2>{" · ".join(heads)}</h2><div class="m2g-cards">{"".join(cards)}</div>'
        + (f'<ul class="m2g-notes">{notes}</ul>' if notes else "")
        + "</section>"
    )


def _card(stream: str, small: str, body: str, foot: str, wide: bool = False) -> str:
    head = f"<header>{escaped(title_of(stream))}<small>{small}</small></header>"
    more = " m2g-wide" if wide else ""
    return f'<article class="m2g-card{more}" data-stream="{escaped(stream)}">{head}{body}{foot}</article>'


def _given_card(stream: str, given: Given, window: str) -> str:
    modality, picture = _modality(stream), given.picture
    small = _range(modality, window) if picture.span is None else " x ".join(map(str, picture.pixels.shape))
    grey = given_levels(given, modality, window)
    shown = tile(grey, f"{title_of(stream)} that is given", "given", ends_of(picture), "Given to medm2g_jax.")
    chip = '<ul class="m2g-arrows"><li><span class="m2g-chip m2g-given">given</span></li></ul>'
    return _card(stream, escaped(small), f'<div class="m2g-tiles">{shown}</div>', chip)


def _range(modality: Modality, name: str) -> str:
    low, high = window_of(modality, name)
    return modality.unit if modality.relative else f"{low:g} to {high:g} {modality.unit}"


def _image_card(stream: str, made: Generated, window: str, ends: tuple[str, str]) -> str:
    modality = _modality(stream)
    over = window_of(modality, window)
    ends = ends if not modality.projection else ("R", "L")
    word, small = title_of(stream), escaped(_range(modality, window))
    one = lambda x, what, over=over: tile(levels(x, over), f"{word}, {what}", f"{what}, synthetic", ends)  # noqa: E731
    if made.draws == 1:
        body = f'<div class="m2g-tiles">{one(made.samples[stream][0], "generated")}</div>'
        return _card(stream, small, body, arrows(stream, made))
    low, high = modality.window
    quarter = (high - low) / 4
    unit = "of the range" if modality.relative else modality.unit
    tiles = one(made.mean(stream)[0], f"mean of {made.draws} draws")
    tiles += one(made.std(stream)[0], f"deviation, white {quarter:g} {unit}", (0.0, quarter))
    draws = "".join(
        f'<img src="{data_uri(levels(x, over))}" alt="{escaped(word)}, draw {n}, synthetic">'
        for n, x in enumerate(made.samples[stream], 1)
    )
    body = f'<div class="m2g-tiles">{tiles}</div><div class="m2g-draws">{draws}</div>'
    return _card(stream, small, body, arrows(stream, made), wide=True)


def _text_card(stream: str, made: Generated, window: str, ends: tuple[str, str]) -> str:
    texts = made.samples[stream]
    if made.draws == 1:
        body = f'<p class="m2g-report">{escaped(texts[0])}</p>'
    else:
        body = f'<ol class="m2g-report">{"".join(f"<li>{escaped(text)}</li>" for text in texts)}</ol>'
    return _card(stream, "synthetic", body, arrows(stream, made), wide=True)


def arrows(stream: str, made: Generated) -> str:
    """What led to a result, and which of it was trained on pairs."""
    rows = []
    for pair, how in made.pairs.items():
        source, _, target = pair.partition(" -> ")
        if target != stream:
            continue
        kind, why = kind_of(how)
        what = f"{escaped(title_of(source))} → {escaped(title_of(target))}"
        chip = f'<span class="m2g-chip m2g-{kind}" title="{escaped(how)}">{kind}</span>'
        rows.append(f"<li>{what} {chip} <small>{escaped(why)}</small></li>")
    return f'<ul class="m2g-arrows">{"".join(rows or ["<li>from noise alone</li>"])}</ul>'


def kind_of(how: str) -> tuple[str, str]:
    """(trained or emergent, why) of what `Generated.pairs` says of an arrow: contexts of trained pairs have all their
    tokens, others their pooled one, which alignment alone has taught."""
    ways = [part for part in how.split(", ") if part]
    if any(part.endswith("tokens") for part in ways):
        beside = " (prompt: aligned space)" if any(part.endswith("pooled") for part in ways) else ""
        grid = ", pixel by pixel" if "registered" in ways else ""
        return "trained", f"on pairs{grid}{beside}"
    return "emergent", "never seen as a pair: through the aligned space"


def nearest(found: Found, window: str = FULL) -> str:
    """What lies nearest in the aligned space, a row for each that asked and each stream."""
    rows = []
    for stream, made, neighbours in found.rows:
        target = title_of(neighbours[0].near.stream)
        asked = f"the {'generated' if made else 'given'} {_named(stream)}"
        tiles = "".join(_neighbour(one, window) for one in neighbours)
        title = f"<h2>{escaped(target)} nearest to {escaped(asked)}</h2>"
        rows.append(f'<div>{title}<div class="m2g-near">{tiles}</div></div>')
    foot = f"Cosines in the aligned space, among {found.among}; each with its own report. {NOT_MADE}"
    shown = f'<div class="m2g-found">{"".join(rows)}</div>'
    return f'<section class="m2g m2g-row">{shown}<p class="m2g-foot">{escaped(foot)}</p></section>'


def _neighbour(one: Neighbour, window: str) -> str:
    word, modality = title_of(one.near.stream), _modality(one.near.stream)
    what = f"{one.near.cosine:+.3f}"
    shown = tile(levels(one.image, window_of(modality, window)), f"{word}, cosine {what}", what, note=NOT_MADE)
    text = f'<figcaption title="{escaped(one.text)}">{escaped(one.text)}</figcaption>'
    return f'<figure data-near="{escaped(one.near.stream)}">{shown}{text}</figure>'


# --- the rest of the page -------------------------------------------------------------------------------------------


def head(able: Able) -> str:
    """What stands above everything."""
    makes = ", ".join(stream_word(m) for m in able.make)
    return (
        f'<div class="m2g m2g-head"><h1>medm2g_jax</h1><p>Any of {escaped(makes)} from any others</p>'
        f'<span class="m2g-warning" role="note">{WARNING}</span></div>'
    )


def foot(able: Able) -> str:
    """What stands below everything."""
    licences = "; ".join(able.licences)
    model = f"Model: {able.name}, {able.size} x {able.size} pixels" + (f", trained on: {licences}" if licences else "")
    marks = (
        "R and L are the patient's. “Trained”: the model saw pairs of these two; “emergent”: it never did. Every file "
        "says in itself that it is synthetic, and by which model and seed it was made."
    )
    return f'<div class="m2g m2g-foot"><p>{escaped(model)}.</p><p>{marks} {WARNING}</p></div>'


def hint(text: str) -> str:
    """What stands where results will be."""
    return f'<div class="m2g m2g-hint">{escaped(text)}</div>'


def status(progress: Progress) -> str:
    """How far a request is."""
    bar = '<div class="m2g-unknown"></div>'
    if progress.share is not None:
        bar = f'<div style="width:{100 * progress.share:.0f}%"></div>'
    return (
        f'<div class="m2g m2g-status" role="status"><span>{escaped(progress.text)}</span>'
        f'<div class="m2g-bar">{bar}</div></div>'
    )


def said(text: str) -> str:
    """One line of status."""
    return f'<div class="m2g m2g-status" role="status">{escaped(text)}</div>'


def problem(error: UserError) -> str:
    """What a user can mend."""
    return f'<div class="m2g"><div class="m2g-error" role="alert">{escaped(error)}</div></div>'


def previews(given: Mapping[str, Given]) -> str:
    """What is given, as the model reads it."""
    if not given:
        return ""
    shown = (
        tile(given_levels(v, _modality(s)), f"{title_of(s)} that is given", title_of(s), ends_of(v.picture), "")
        for s, v in given.items()
    )
    return f'<div class="m2g m2g-previews">{"".join(shown)}</div>'
