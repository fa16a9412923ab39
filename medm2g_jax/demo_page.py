"""The page of `medm2g demo`: which components it has and what they do, in gradio, an extra.

Importing this file imports gradio, which reads its environment then (`demo.ENVIRONMENT`).
"""

import functools
from collections.abc import Iterator
from typing import Any

import gradio as gr

from medm2g_jax import demo_desk, demo_view
from medm2g_jax.demo_desk import Able, Desk, Given, Order, Result
from medm2g_jax.demo_near import Found
from medm2g_jax.errors import UserError
from medm2g_jax.limits import CHOICES, MAX_SEED
from medm2g_jax.modality import MODALITIES, split_stream, stream_word

FAULT = "this went wrong inside the program; what is known of it stands where medm2g demo was started"


def looks() -> dict[str, Any]:
    """Theme and styles; fonts of the system, since named ones would come from a font server."""
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    mono = ("ui-monospace", "Menlo", "Consolas", "monospace")
    theme = gr.themes.Base(
        primary_hue="teal", neutral_hue="slate", radius_size="sm", spacing_size="sm", font=fonts, font_mono=mono
    )
    return dict(theme=theme, css=demo_view.CSS)


def page(desk: Desk) -> Any:
    """The page of a desk, as gradio's Blocks."""
    able, first = desk.able, desk.able.first()
    with gr.Blocks(title="medm2g_jax", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as blocks:
        gr.HTML(demo_view.head(able))
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                fields = _fields(able, first)
                with gr.Row():
                    go = gr.Button("Make", variant="primary", elem_id="make", min_width=100)
                    stop = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel", min_width=100)
                settings = _settings(able, first)
            with gr.Column(scale=5, min_width=320):
                status = gr.HTML(demo_view.said("starting"), elem_id="status")
                with gr.Row(elem_classes="m2g-tools"):
                    plain = dict(interactive=False, size="md", scale=2)
                    swap = gr.Button("Exchange left and right", min_width=220, elem_id="swap", **plain)
                    near = gr.Button("What lies nearest", min_width=170, elem_id="near", **plain)
                    window = gr.Radio(
                        [demo_view.FULL],
                        value=demo_view.FULL,
                        show_label=False,
                        container=False,
                        visible=False,
                        scale=3,
                        min_width=360,
                        elem_id="window",
                    )
                shown = gr.HTML(demo_view.hint("What is made appears here."), elem_id="results")
                downloads = _downloads()
                neighbours = gr.HTML("", elem_id="neighbours")
        gr.HTML(demo_view.foot(able))
        kept = gr.State(None)

        inputs = {**fields, **settings}
        buttons = [go, swap, near, stop]
        outputs = [status, shown, kept, window, neighbours, *buttons, *downloads.values()]
        tell = functools.partial(_told, downloads=tuple(downloads))

        def first_result(chosen: str, before: Result | None) -> Iterator[tuple]:
            yield from tell(desk.first(), chosen, before, ours=True)

        def make(tab: gr.Request, chosen: str, before: Result | None, *values: Any) -> Iterator[tuple]:
            steps = _asked(desk, dict(zip(inputs, values, strict=True)), tab.session_hash)
            yield from tell(steps, chosen, before)

        def exchange(tab: gr.Request, chosen: str, before: Result) -> Iterator[tuple]:
            yield from tell(_exchanged(desk, before, tab.session_hash), chosen, before)

        def retrieve(tab: gr.Request, chosen: str, before: Result) -> Iterator[tuple]:
            yield from tell(desk.nearest(before, tab.session_hash), chosen, before)

        def cancel(tab: gr.Request) -> None:
            desk.cancel(tab.session_hash)

        quiet = dict(show_progress="hidden", api_visibility="private")
        own = dict(outputs=outputs, concurrency_limit=None, trigger_mode="once", **quiet)
        asked = [window, kept, *inputs.values()]
        blocks.load(first_result, [window, kept], **own)
        go.click(make, asked, **own)
        for name in able.texts():
            fields[name].submit(make, asked, **own)
        swap.click(exchange, [window, kept], **own)
        near.click(retrieve, [window, kept], **own)
        stop.click(cancel, queue=False, **quiet)
        window.change(_looked_at, [kept, window], [shown], queue=False, **quiet)
        _wire_drops(able, fields, quiet)
    return blocks


def _fields(able: Able, first: Order) -> dict[str, Any]:
    """What is given and wanted: name -> component."""
    fields: dict[str, Any] = {}
    for name in able.texts():
        fields[name] = gr.Textbox(
            first.given.get(name, ""),
            label=f"{stream_word(name).capitalize()} that is given (empty: none)",
            placeholder=demo_desk.EXAMPLE,
            lines=3,
            max_lines=8,
            max_length=demo_desk.MOST_TEXT,
            elem_id=f"text-{name}",
        )
    if able.images():
        gr.HTML('<div class="m2g m2g-foot">Images that are given: PNG, JPEG, TIFF, DICOM or NIfTI</div>')
    with gr.Row():
        for name in able.images():
            modality = MODALITIES[name]
            with gr.Column(min_width=96):
                fields[f"file {name}"] = gr.File(
                    label=modality.word, height=104, elem_id=f"drop-{name}", elem_classes="m2g-drop", min_width=90
                )
                fields[f"stream {name}"] = gr.Dropdown(
                    [(demo_view.title_of(s).partition(" ")[2] or "any", s) for s in modality.streams],
                    value=modality.streams[0],
                    show_label=False,
                    container=False,
                    visible=len(modality.streams) > 1,
                    min_width=90,
                )
    for name in able.images():
        fields[f"slice {name}"] = gr.Slider(
            0, 1, 0, step=1, label=f"{MODALITIES[name].word}: axial slice, from the feet up", visible=False
        )
    fields["previews"] = gr.HTML("", elem_id="previews")
    fields["make"] = gr.CheckboxGroup(
        [(_choice(s), s) for m in able.make for s in MODALITIES[m].streams],
        value=list(first.make),
        label="Make",
        elem_id="wanted",
    )
    return fields


def _choice(stream: str) -> str:
    bare = MODALITIES[split_stream(stream)[0]].contrasts and ":" not in stream
    return demo_view.title_of(stream) + (", any" if bare else "")


def _settings(able: Able, first: Order) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    with gr.Accordion("Sampling", open=False, elem_id="sampling"):
        with gr.Row():
            settings["seed"] = gr.Number(first.seed, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
            settings["draws"] = gr.Slider(1, demo_desk.MOST_DRAWS, 1, step=1, label="Draws (mean and deviation)")
        with gr.Row():
            settings["steps"] = gr.Slider(1, demo_desk.MOST_STEPS, first.steps, step=1, label="Steps")
            settings["guidance"] = gr.Slider(0, 10, first.guidance, step=0.1, label="Guidance (1: none)")
        with gr.Row():
            settings["sampler"] = gr.Dropdown(list(CHOICES["sample.sampler"]), value=first.sampler, label="Sampler")
            settings["eta"] = gr.Slider(0, 1, first.eta, step=0.05, label="eta of ddim (0: no noise)")
        settings["guides"] = gr.Radio(
            [("trained pairs", "trained"), ("all, emergent ones too", "all"), ("none", "none")],
            value=first.guides,
            label="Guides",
        )
    return settings


def _downloads() -> dict[str, Any]:
    words = {"png": "PNG", "dicom": "DICOM", "nifti": "NIfTI", "json": "JSON record"}
    with gr.Row():
        return {
            form: gr.DownloadButton(
                word, interactive=False, visible=form != "nifti", size="sm", min_width=80, elem_id=f"download-{form}"
            )
            for form, word in words.items()
        }


def _wire_drops(able: Able, fields: dict[str, Any], quiet: dict[str, Any]) -> None:
    """A file that is dropped is looked at at once, and what it is of is no more wanted; a text that is wanted is not
    given."""
    names = able.images()
    drops = [fields[f"{what} {name}"] for name in names for what in ("file", "stream", "slice")]

    def dropped(make: list[str], *values: Any) -> tuple:
        given, error, slices = {}, "", []
        for name, (path, stream, number) in zip(names, _triples(values), strict=True):
            count = 1
            try:
                if path is not None:
                    count = demo_desk.slices_of(path, MODALITIES[name])
                    given[stream] = demo_desk.read(path, stream, able.ranges, _number(number, count))
            except UserError as wrong:
                error += demo_view.problem(wrong)
            slices.append(_slider(count, number))
        return demo_view.previews(given) + error, [s for s in make if s not in given], *slices

    outputs = [fields["previews"], fields["make"], *(fields[f"slice {name}"] for name in names)]
    for name in names:
        for event in (
            fields[f"file {name}"].change,
            fields[f"stream {name}"].input,
            fields[f"slice {name}"].release,
        ):
            event(dropped, [fields["make"], *drops], outputs, **quiet)

    for name in able.texts():

        def written(make: list[str], name: str = name) -> Any:
            word = stream_word(name).capitalize()
            wanted = name in make
            label = f"{word}: to be written, so it is not given" if wanted else f"{word} that is given (empty: none)"
            return gr.update(interactive=not wanted, label=label)

        fields["make"].change(written, [fields["make"]], [fields[name]], queue=False, **quiet)


def _triples(values: tuple) -> Iterator[tuple]:
    return zip(values[::3], values[1::3], values[2::3], strict=True)


def _number(number: float | None, count: int) -> int | None:
    """The slice that a slider stands for; None, the middle one, where it is another file's."""
    return int(number) if number and number < count else None


def _slider(count: int, number: float | None) -> Any:
    chosen = _number(number, count)
    return gr.update(maximum=max(1, count - 1), value=count // 2 if chosen is None else chosen, visible=count > 1)


# --- what a request does to the page --------------------------------------------------------------------------------


def _asked(desk: Desk, values: dict[str, Any], whose: str) -> Iterator[Any]:
    able = desk.able
    make = tuple(values["make"] or ())
    given: dict[str, str | Given] = {}
    for name in able.texts():
        text = (values[name] or "").strip()
        if text and name not in make:
            given[name] = text
    for name in able.images():
        if (path := values[f"file {name}"]) is not None:
            stream, number = values[f"stream {name}"], values[f"slice {name}"]
            count = demo_desk.slices_of(path, MODALITIES[name])
            given[stream] = demo_desk.read(path, stream, able.ranges, _number(number, count))
    whole = {name: _whole(name, values[name]) for name in ("seed", "draws", "steps")}
    numbers = {name: values[name] for name in ("guidance", "eta", "sampler", "guides")}
    yield from desk.make(Order(given, make, **numbers, **whole), whose=whose)


def _whole(name: str, value: Any) -> int:
    if value is None or value != int(value):
        raise UserError(f"{name}: expected a whole number, found {'nothing' if value is None else value}")
    return int(value)


def _exchanged(desk: Desk, before: Result, whose: str) -> Iterator[Any]:
    yield from desk.make(demo_desk.mirrored(before.rows[0].order), before, whose)


def _told(
    steps: Iterator[Any], window: str, before: Result | None, downloads: tuple[str, ...], ours: bool = False
) -> Iterator[tuple]:
    """What the page shows of a request, while it runs and when it is done: values for `page`'s outputs.

    Args:
      before: the result that is on the page, and stays there where this request gives none.
      ours: nobody has asked for it, and nobody cancels it.
    """
    same = gr.skip()
    rest = (same,) * len(downloads)
    busy = *(gr.update(interactive=False) for _ in range(3)), gr.update(interactive=not ours)
    step = None
    try:
        for step in steps:
            if isinstance(step, demo_desk.Progress):
                yield demo_view.status(step), *(same,) * 4, *busy, *rest
            elif isinstance(step, Found):
                found = demo_view.nearest(step, window)
                yield demo_view.said("done"), *(same,) * 3, found, *_idle(before), *rest
            elif step is not None:
                yield _arrived(step, window, downloads)
        if not isinstance(step, Result | Found):
            yield demo_view.said("ready" if ours else "cancelled"), *(same,) * 4, *_idle(before), *rest
    except UserError as error:
        yield demo_view.problem(error), *(same,) * 4, *_idle(before), *rest
    except Exception:  # a fault of ours: the page can be used again, and the traceback is for the terminal
        yield demo_view.problem(UserError(FAULT)), *(same,) * 4, *_idle(before), *rest
        raise
    finally:
        steps.close()


def _arrived(result: Result, window: str, downloads: tuple[str, ...]) -> tuple:
    row = result.rows[0]
    names = demo_view.window_names((*row.order.given, *row.order.make))
    window = window if window in names else demo_view.FULL
    files = (
        gr.update(value=result.files.get(form), interactive=form in result.files, visible=form in result.files)
        for form in downloads
    )
    chosen = gr.update(choices=list(names), value=window, visible=len(names) > 1)
    said = demo_view.said(f"done in {result.seconds:.1f} s")
    return said, demo_view.results(result, window), result, chosen, "", *_idle(result), *files


def _idle(result: Result | None) -> tuple:
    """The buttons to make, to exchange sides, to find what lies nearest and to cancel, while nothing runs."""
    has_side = result is not None and demo_desk.has_side(result.rows[0].order)
    able = True, has_side, result is not None, False
    return tuple(gr.update(interactive=one) for one in able)


def _looked_at(kept: Result | None, window: str) -> Any:
    return gr.skip() if kept is None else demo_view.results(kept, window)
