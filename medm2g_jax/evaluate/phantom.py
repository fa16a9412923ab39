"""What a round has learnt, measured on data whose findings are known exactly: the phantom.

For every pair of the report and an imaging modality whose guides are trained (section 3.5):

    image from report   lesion side (and kind, size, level) by a probe trained on real images, on test subjects with a
                        lesion: prompt and guide; prompt emptied, so that only the guide carries the report; the same
                        with shuffled reports; between the commonest answer and the probe's accuracy on real images
    report from image   finding F1, prompt and guide and guide alone, between the best constant report and the text
                        autoencoder's own reconstructions, beside another subject's report
    denoising loss      held out, prompt emptied, with the true source, a shuffled one, and none

For a model of more than one imaging modality also all of them from one report: those that trained guides link are made
jointly, beside each made on its own. Others share the report alone: made together they are bit for bit what they are
made one by one, so they are measured once and called independent.

All of it is phantom, not evidence for clinical performance.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from medm2g_jax.arrays import Params
from medm2g_jax.data.open import source_of
from medm2g_jax.data.source import Source, labeller, labels
from medm2g_jax.diffusion import denoising_loss
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.figures import Figure, Reference
from medm2g_jax.evaluate.judge import Reads
from medm2g_jax.evaluate.metrics import METRICS, text_figures
from medm2g_jax.evaluate.probes import as_indices, finding_figures, train_probe
from medm2g_jax.evaluate.rows import Row
from medm2g_jax.evaluate.samples import samples
from medm2g_jax.inference import Model
from medm2g_jax.modality import MODALITIES, centre, stream_word
from medm2g_jax.model import null_context
from medm2g_jax.nn.attention import mask
from medm2g_jax.recipes import EVAL_TIMES

PROBE_SUBJECTS = 4000
CONSTANTS = 12  # reports that the best constant one is chosen from


def labelled_source(shared: Mapping[str, Any], path: str) -> Source:
    """The data set that a model was trained on, as `shared` of its model.json names it.

    Raises:
      UserError: nobody knows exactly what there is to find in its records.
    """
    source = source_of(shared)
    if labels(source) is None:
        raise UserError(
            f"{path} was trained on {shared['data']['source']}, whose findings have no exact labels to judge by; "
            "expected a model trained on data that has them, as --config.data.source=phantom"
        )
    return source


def _training(source: Source, m: str) -> list[int]:
    """Training subjects of which m may be seen."""
    records = enumerate(source.records)
    return [i for i, r in records if r.split == "train" and m in r.streams][:PROBE_SUBJECTS]


def images_of(model: Model, source: Source, m: str, indices: np.ndarray) -> Float[np.ndarray, "n h w 1"]:
    """An unstated contrast is drawn once and for all."""
    seed = model.meta["shared"]["seed"]
    return np.stack([source.read(int(i), m, np.random.default_rng([seed, int(i)])) for i in indices])


def reader(model: Model, source: Source, m: str, seed: int) -> Reads:
    """Reads images of m: the probe, trained on real ones."""
    train, labels_of = np.asarray(_training(source, m)), labels(source)
    found = [labels_of(int(i)) for i in train]
    return train_probe(lambda i: images_of(model, source, m, i), found, train, seed)


def _words(streams: Sequence[str]) -> str:
    return " + ".join(MODALITIES[m].word for m in streams)


class Bench:
    """One evaluation: the model, the test subjects, the probes, and the figures so far."""

    def __init__(self, model: Model, source: Source, rows: int, seed: int, reads: Callable[[str], Reads] | None = None):
        self.model, self.source, self.seed = model, source, seed
        self.trained = {tuple(p) for p in model.meta["pairs"]["guide"]}
        self.labels_of, self.labeller = labels(source), labeller(source)
        test = [i for i, r in enumerate(source.records) if r.split == "test"]
        lesions = [i for i in test if self.labels_of(i).kind != "none"]
        if len(lesions) < rows:
            raise UserError(f"--rows={rows}: {source.name} holds {len(lesions)} test subjects with a lesion")
        self.indices = np.asarray(lesions[:rows])
        self.target = as_indices([self.labels_of(int(i)) for i in self.indices])
        self.figures: list[Figure] = []
        # Each is trained, and measured, once a modality.
        self.probe, self.side_from_report = functools.cache(self._probe), functools.cache(self._side_from_report)
        self._reads = reads or functools.partial(reader, model, source, seed=seed)

    @functools.cached_property
    def reports(self) -> list[str]:
        rng = np.random.default_rng(self.seed)
        return [self.source.read(int(i), centre().name, rng) for i in self.indices]

    def add(self, *figures: Figure) -> None:
        """Keep them, but for those that are there: what several rows stand on is measured, and told, in the first."""
        known = {(f.task, f.metric) for f in self.figures}
        self.figures += [f for f in figures if (f.task, f.metric) not in known]

    def reports_and_images(self, images: Sequence[str], row: Row) -> None:
        """All that reports and these modalities have to do with each other, each part as a row."""
        word = MODALITIES[centre().name].word
        for image in images:
            other = stream_word(image)
            self._row(row, f"{word} -> {other}", lambda m=image: self.image_from_report(m))
            self._row(row, f"{other} -> {word}", lambda m=image: self.report_from_image(m))
            self._row(row, f"{word} <-> {other}, denoising", lambda m=image: self.denoising(m))
        every = [m for m in self.model.modalities if MODALITIES[m].is_image]
        if len(every) > 1:
            self._row(row, f"{word} -> {_words(every)}", lambda: self.together(every))
            self._row(row, f"nothing -> {_words(every)}", lambda: self.from_nothing(every))

    def _row(self, row: Row, name: str, part: Callable[[], None]) -> None:
        before = len(self.figures)

        def measure() -> list[Figure]:
            part()
            return self.figures[before:]

        self.figures[before:] = row(f"findings: {name}", measure)

    # --- reading images ----------------------------------------------------------------------------------------

    def images(self, m: str, indices: np.ndarray) -> Float[np.ndarray, "n h w 1"]:
        return images_of(self.model, self.source, m, indices)

    def _probe(self, m: str):
        """(reads images of m, {metric: what it reaches on real ones})."""
        read = self._reads(m)
        figures = self._judged(f"real {stream_word(m)}", read(self.images(m, self.indices)), {})
        self.add(*figures)
        return read, {f.metric: Reference(f.value, "the probe on real images") for f in figures}

    def _judged(self, task: str, read: Mapping[str, np.ndarray], ceilings: Mapping[str, Reference]) -> list[Figure]:
        return finding_figures(task, self.target, read, ceilings, self.seed)

    def score(self, task: str, m: str, x: np.ndarray) -> dict[str, np.ndarray]:
        """Judge images (n h w 1) of the test subjects; returns what was read in them."""
        reads, ceilings = self.probe(m)
        read = reads(x)
        self.add(*self._judged(task, read, ceilings))
        return read

    # --- generation --------------------------------------------------------------------------------------------

    def generate(self, given: dict[str, Any], make: list[str], **options: Any) -> dict[str, Any]:
        return samples(self.model, given, make, len(self.indices), self.seed, **options)

    def _side_from_report(self, m: str) -> np.ndarray:
        """The side read in m made from the report, on its own, prompt and guide; measured once."""
        text = centre().name
        made = self.generate({text: self.reports}, [m])[m]
        return self.score(f"{MODALITIES[text].word} -> {MODALITIES[m].word}", m, made)["side"]

    def image_from_report(self, m: str) -> None:
        text = centre().name
        task = f"{MODALITIES[text].word} -> {MODALITIES[m].word}, guide alone"
        self.side_from_report(m)
        self.score(task, m, self.generate({text: self.reports}, [m], prompts="none")[m])
        shuffled = [self.reports[i] for i in np.random.default_rng(self.seed + 1).permutation(len(self.reports))]
        self.score(f"shuffled {task}", m, self.generate({text: shuffled}, [m], prompts="none")[m])

    def report_from_image(self, m: str) -> None:
        text = centre().name
        x, word = self.images(m, self.indices), MODALITIES[text].word
        floor, autoencoder = self._constant_report, self._reconstruction
        several = self.model.usual_best_of((m,), (text,))
        best = {f", best of {several}": dict(best_of=several)} if several > 1 else {}  # what `generate` gives
        for how, options in ({"": {}} | best | {", guide alone": dict(prompts="none")}).items():
            made = self.generate({m: x}, [text], **options)[text]
            task = f"{MODALITIES[m].word} -> {word}{how}"
            ends = dict(floor=floor, autoencoder=autoencoder)
            self.add(*text_figures(task, self.reports, made, self.labeller, seed=self.seed, **ends))

    @functools.cached_property
    def _constant_report(self) -> tuple[str, list[list[str]]]:
        """The floor of generated reports: one for all, of those that state the most frequent findings together."""
        text = centre().name
        train, rng = _training(self.source, text), np.random.default_rng(self.seed)
        of = {i: self.labels_of(i) for i in train}
        common = [found for found, _ in Counter(f for f in of.values() if f.kind != "none").most_common(CONSTANTS)]
        first = [next(i for i in train if of[i] == found) for found in common]
        constants = [self.source.read(i, text, rng) for i in first]
        others = rng.permutation(train)[: len(self.reports)]
        reports = [self.source.read(int(i), text, rng) for i in others]
        task = f"another subject's {MODALITIES[text].word}"
        self.add(*text_figures(task, self.reports[: len(reports)], reports, self.labeller, seed=self.seed))
        return "the best constant report", [[c] * len(self.reports) for c in constants]

    @functools.cached_property
    def _reconstruction(self) -> list[Figure]:
        """The ceiling of generated reports: through the text autoencoder and back."""
        g, text = self.model, centre().name
        z = jax.jit(lambda p, x: g.model.encode(p, text, x))(g.params, g.ids(self.reports))
        word = MODALITIES[text].word
        again = g.decode(text, z)
        figures = text_figures(f"{word} -> {word}", self.reports, again, self.labeller, seed=self.seed)
        self.add(*figures)
        return figures

    def denoising(self, m: str) -> None:
        """Held-out loss of each flow of the pair, prompt emptied, clean source: true, shuffled, none."""
        g, text = self.model, centre().name
        inputs = {text: g.ids(self.reports), m: self.images(m, self.indices)}
        n = len(self.indices)
        order = np.random.default_rng(self.seed + 2).permutation(n)
        empty = g.ids([""])
        for source, target in ((text, m), (m, text)):
            loss = jax.jit(lambda p, a, b, k, t, s=source, f=target: _loss_of(g.model, p, s, f, a, b, k, t, empty))

            def mean(chosen, on: bool, source=source, target=target, loss=loss) -> float:
                given = jax.tree.map(lambda x: x[chosen], inputs[source])
                values = [
                    loss(g.params, (given, jnp.asarray(on)), inputs[target], jax.random.key(i), jnp.int32(t))
                    for i, t in enumerate(EVAL_TIMES)
                ]
                return float(np.mean(values))

            task = f"{MODALITIES[source].word} -> {MODALITIES[target].word}, guide alone"
            floor = Reference(mean(slice(None), False), "no source")
            for name, chosen in ((task, slice(None)), (f"shuffled {task}", order)):
                self.add(
                    Figure(
                        task=name,
                        metric="denoising loss",
                        protocol="fixed noise",
                        value=mean(chosen, True),
                        n=n,
                        seed=self.seed,
                        floor=floor,
                    )  # fmt: skip
                )

    def together(self, images: list[str]) -> None:
        """All imaging modalities from one report: what guides link jointly, and each on its own."""
        text = centre().name
        groups = self.model.request((text,), tuple(images)).groups()
        alone = {m: self.side_from_report(m) for m in images}
        sides = dict(alone)
        for group in (g for g in groups if len(g) > 1):
            made = self.generate({text: self.reports}, list(group))
            for m in group:
                others = _words([o for o in group if o != m])
                task = f"{MODALITIES[text].word} -> {MODALITIES[m].word}, jointly with {others}"
                sides[m] = self.score(task, m, made[m])["side"]
            self._agreement(group, "jointly", sides)
            self._agreement(group, "each on its own", alone)
        if len(groups) > 1:
            print(
                f"  no trained guide links {' with '.join(_words(g) for g in groups)}: from one report they are made "
                "independently of each other, whether together or one by one",
                flush=True,
            )
            how = ", ".join(f"{_words(g)} {'jointly' if len(g) > 1 else 'independently'}" for g in groups)
            self._agreement(images, how if len(groups) < len(images) else "each on its own", sides)

    def from_nothing(self, images: Sequence[str]) -> None:
        """All imaging modalities with nothing given: do they agree more when made jointly than when one by one?"""
        read = {}
        for how, groups in (("jointly", [list(images)]), ("one by one", [[m] for m in images])):
            made: dict[str, Any] = {}
            for group in groups:
                made |= self.generate({}, group)
            read[how] = {m: self.probe(m)[0](made[m]) for m in images}
        for a, b in itertools.combinations(images, 2):
            for name in ("side", "kind"):
                for how, reads in read.items():
                    task = f"nothing -> {_words((a, b))}, {how}"
                    pair = reads[a][name], reads[b][name]
                    floor = Reference(0.0, "independent of each other")
                    self.add(METRICS["kappa"].figure(task, f"{name} kappa", *pair, seed=self.seed, floor=floor))

    def _agreement(self, images: Sequence[str], how: str, sides: Mapping[str, np.ndarray]) -> None:
        """Whether all show the same side, and whether it is the report's."""
        task = f"{MODALITIES[centre().name].word} -> {_words(images)}, {how}"
        reads = [sides[m] for m in images]
        measured = METRICS["agree"].figure
        self.add(
            measured(task, "same side", reads, seed=self.seed),
            measured(task, "same side, the report's", [*reads, self.target["side"]], seed=self.seed),
        )


def _loss_of(model, params: Params, source: str, target: str, given, x, key, t, empty):
    given, on = given
    params = {**params, **model.null(params, empty)}
    flow = model.flows[target]
    z0 = model.encode(params, target, x)
    b = z0.shape[0]
    eps = jax.random.normal(key, z0.shape)
    times = jnp.full((b,), t)
    guide, _ = model.flows[source].source(params, model.encode(params, source, given), jnp.zeros_like(times))
    guide = mask(guide, jnp.broadcast_to(on, (b,)))
    z_t = flow.process.add_noise(z0, times, eps)
    prediction = flow.predict(params, z_t, times, null_context(flow.null(params), b), guide)
    return denoising_loss(flow.process.target(z0, times, eps), prediction)
