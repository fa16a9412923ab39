"""Reports made from an image (the paper's table 1): are they nearer to the true ones than what needs no generator?

Measured on the same test records, words by `report_figures`, findings where the source has a labeller: the report by
prompt and guide, one draw and, as `generate` has it, the best of several, and by the guide alone; beside the training
report that is most frequent, one of the sentences that most of them have, the one of the nearest training image in the
aligned space, another test subject's, and the text autoencoder, which no sample can pass.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from medm2g_jax.data.pipeline import read_streams, records_with
from medm2g_jax.data.source import Source, labeller
from medm2g_jax.evaluate.baselines import constant_report, nearest_report, template_report
from medm2g_jax.evaluate.figures import Figure
from medm2g_jax.evaluate.judge import NEAREST, ahead
from medm2g_jax.evaluate.metrics import public_figures, report_figures, text_figures
from medm2g_jax.evaluate.rows import Row
from medm2g_jax.evaluate.samples import samples
from medm2g_jax.inference import Model
from medm2g_jax.modality import MODALITIES, stream_word

PAIRS = 4000  # training pairs that baselines choose from


def reports_from(
    model: Model,
    source: Source,
    given: Sequence[str],
    text: str,
    rows: int,
    seed: int,
    *,
    row: Row,
    cleaning: str,
    protocols: Sequence[str] = (),
) -> list[Figure]:
    """Figures of reports made from the one stream `given`, of `rows` test records that have both.

    Args:
      row: measures each row, or takes it up (`rows.Rows`).
      cleaning: of both texts, a row of `data.clean.CLEANINGS`.
      protocols: public evaluators whose figures are wanted as well; they take the texts as they are.
    """
    (image,) = given
    held = read_streams(source, (image, text), "test", rows, seed)
    subjects = [source.records[i].subject for i in records_with(source, (image, text), "test", rows, seed)]
    x, real, word = np.stack(held[image]), held[text], MODALITIES[text].word
    reads = labeller(source)
    task = f"{stream_word(image)} -> {word}"

    out: list[Figure] = []

    def add(name: str, answer: Callable[[], Sequence[str]]) -> None:
        def measured() -> list[Figure]:
            made = answer()
            figures = report_figures(name, real, made, cleaning, seed=seed, subjects=subjects)
            own = [f for f in figures if f.task == name or name == task]  # what it says of the real ones is said once
            for protocol in protocols:
                own += public_figures(protocol, name, real, made, seed=seed, subjects=subjects)
            return own + text_figures(name, real, made, reads, seed=seed, subjects=subjects)

        out.extend(row(name if name.startswith(task) else f"{task}: {name}", measured))

    encode = jax.jit(lambda p, ids: model.model.encode(p, text, ids))
    beside = f", beside {stream_word(image)}"
    add(f"{word} -> {word}{beside}", lambda: model.decode(text, encode(model.params, model.ids(real))))
    add(task, lambda: samples(model, {image: x}, [text], rows, seed)[text])
    several = model.usual_best_of((image,), (text,))
    if several > 1:  # what `generate` gives
        best = lambda: samples(model, {image: x}, [text], rows, seed, best_of=several)[text]  # noqa: E731
        add(f"{task}, best of {several}", best)
    add(f"{task}, guide alone", lambda: samples(model, {image: x}, [text], rows, seed, prompts="none")[text])
    order = np.random.default_rng(seed + 1).permutation(rows)
    add(f"another subject's {word}{beside}", lambda: [real[i] for i in order])
    train = read_streams(source, (image, text), "train", PAIRS, seed)
    if not train:
        print(f"  no training record holds {image} and {text}: no report to answer with", flush=True)
        return out
    add(f"{task} by the most frequent training {word}", lambda: constant_report(train[text], rows))
    usual = lambda: template_report(train[text], rows)  # noqa: E731
    add(f"{task} by the sentences of most training {word}s", usual)
    vectors = lambda some: model.embedded(image, some)  # noqa: E731
    near = lambda: nearest_report(train[text], vectors(np.stack(train[image])), vectors(x))  # noqa: E731
    add(f"{task}{NEAREST}", near)
    for sentence in ahead(out):
        print(f"  {sentence}", flush=True)
    return out
