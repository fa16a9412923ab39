"""Reports made from an image (the paper's table 1): are they nearer to the true ones than what needs no generator?

Measured on the same test records, words by `report_figures`, findings where the source has a labeller: the report by
prompt and guide, and by the guide alone; beside the training report that is most frequent, the one of the nearest
training image in the aligned space, another test subject's, and the text autoencoder, which no sample can pass.
"""

from collections.abc import Sequence

import jax
import numpy as np

from medm2g_jax.data.pipeline import read_streams
from medm2g_jax.data.source import Source, labeller
from medm2g_jax.evaluate.baselines import constant_report, nearest_report
from medm2g_jax.evaluate.figures import Figure
from medm2g_jax.evaluate.metrics import report_figures, text_figures
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
    cleaning: str,
) -> list[Figure]:
    """Figures of reports made from the one stream `given`, of `rows` test records that have both.

    Args:
      cleaning: of both texts, a row of `data.clean.CLEANINGS`.
    """
    (image,) = given
    held = read_streams(source, (image, text), "test", rows, seed)
    x, real, word = np.stack(held[image]), held[text], MODALITIES[text].word
    reads = labeller(source)
    task = f"{stream_word(image)} -> {word}"

    def measured(name: str, made: Sequence[str]) -> list[Figure]:
        figures = report_figures(name, real, made, cleaning, seed=seed)
        own = [f for f in figures if f.task == name or name == task]  # what it says of the real ones is said once
        return own + text_figures(name, real, made, reads, seed=seed)

    z = jax.jit(lambda p, ids: model.model.encode(p, text, ids))(model.params, model.ids(real))
    out = measured(f"{word} -> {word}", model.decode(text, z))
    out += measured(task, samples(model, {image: x}, [text], rows, seed)[text])
    out += measured(f"{task}, guide alone", samples(model, {image: x}, [text], rows, seed, prompts="none")[text])
    order = np.random.default_rng(seed + 1).permutation(rows)
    out += measured(f"another subject's {word}", [real[i] for i in order])
    train = read_streams(source, (image, text), "train", PAIRS, seed)
    if not train:
        print(f"  no training record holds {image} and {text}: no report to answer with", flush=True)
        return out
    out += measured(f"the most frequent training {word}", constant_report(train[text], rows))
    seen, asked = (model.embedded(image, some) for some in (np.stack(train[image]), x))
    return out + measured(f"{task} of the nearest training image", nearest_report(train[text], seen, asked))
