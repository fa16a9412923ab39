"""`medm2g evaluate`: what a round has learnt, measured on the phantom, each figure between its floor and its ceiling.

For the newest round of a run whose pair holds the report (section 3.5):

    image from report   lesion side (and kind, size, level) by a probe trained on real images, on test subjects with a
                        lesion: prompt and guide; prompt emptied, so that only the guide carries the report; the same
                        with shuffled reports; beside chance and the probe's accuracy on real images
    report from image   finding F1, prompt and guide and guide alone, beside the best constant report, a random report
                        and the text autoencoder's own reconstructions
    eps loss            held out, prompt emptied, with the true source, a shuffled one, and none

For a model of more than one imaging modality also joint generation: all of them made from the report in one go beside
each made on its own. Intervals are Wilson's, 95 %. All of it is phantom, not evidence for clinical performance.
"""

import json
import time
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from scipy.stats import binomtest

from medm2g_jax import rounds
from medm2g_jax.arrays import Params
from medm2g_jax.data.phantom.render import Phantom
from medm2g_jax.data.phantom.report import finding_f1, write
from medm2g_jax.diffusion import denoising_loss
from medm2g_jax.errors import UserError
from medm2g_jax.evaluate.probes import as_indices, train_probe
from medm2g_jax.loading import Model, load
from medm2g_jax.modality import MODALITIES, centre
from medm2g_jax.model import null_context
from medm2g_jax.nn.attention import mask
from medm2g_jax.recipes import EVAL_TIMES

PROBE_SUBJECTS = 4000
CHUNK = 100  # samples generated at a time


def measure(path: str, rows: int = 200, seed: int = 0) -> dict[str, Any]:
    """Measure the model at `path`, print the table, and write it to evaluation.json beside the round's result."""
    began = time.time()
    model = load(path)
    shared = model.meta["shared"]
    if shared["data"]["source"] != "phantom":
        raise UserError(
            f"{path} was trained on {shared['data']['source']}; its findings have no exact labels to judge by"
        )
    graph = rounds.graph(shared["listing"])
    d = shared["data"]
    source = Phantom(
        size=model.size, seed=shared["seed"], train=d["train"], val=d["val"], test=d["test"], pairs=graph.pairs
    )
    print(
        f"{path}: round {model.meta['stage']}; {rows} test subjects with a lesion; phantom, {model.size} px, "
        f"{model.meta['rounds']} trained",
        flush=True,
    )
    bench = _Bench(model, source, rows, seed)
    text = centre().name
    for image in [m for m in model.modalities if (text, m) in bench.trained]:
        bench.image_from_report(image)
        bench.report_from_image(image)
        bench.eps(image)
    images = [m for m in model.modalities if MODALITIES[m].kind == "image"]
    if len(images) > 1:
        bench.joint(images)
    bench.table["seconds"] = round(time.time() - began, 1)
    print(f"{bench.table['seconds']:.0f} s. Phantom only: not evidence for clinical performance.")
    folder = epath.Path(path) if (epath.Path(path) / "model.json").exists() else epath.Path(path) / model.meta["stage"]
    (folder / "evaluation.json").write_text(json.dumps(bench.table, indent=1))
    return bench.table


class _Bench:
    """One evaluation: the model, the test subjects, the probes, and the table that fills."""

    def __init__(self, model: Model, source: Phantom, rows: int, seed: int):
        self.model, self.source, self.seed = model, source, seed
        self.trained = {tuple(p) for p in model.meta["pairs"]["guide"]}
        test = [i for i, r in enumerate(source.records) if r.split == "test"]
        lesions = [i for i in test if source.labels(i).kind != "none"]
        if len(lesions) < rows:
            raise UserError(f"--rows={rows}: the phantom holds {len(lesions)} test subjects with a lesion")
        self.indices = np.asarray(lesions[:rows])
        self.labels = [source.labels(int(i)) for i in self.indices]
        self.target = as_indices(self.labels)
        rng = np.random.default_rng(seed)
        self.reports = [source.read(int(i), centre().name, rng) for i in self.indices]
        self.probes: dict[str, Any] = {}
        self.table: dict[str, Any] = {}

    # --- reading images ----------------------------------------------------------------------------------------

    def _train(self, m: str) -> list[int]:
        """Training subjects of which m may be seen."""
        records = enumerate(self.source.records)
        return [i for i, r in records if r.split == "train" and m in r.streams][:PROBE_SUBJECTS]

    def images(self, m: str, indices: np.ndarray) -> np.ndarray:
        return self.source.images(indices, m)

    def probe(self, m: str):
        if m not in self.probes:
            train = np.asarray(self._train(m))
            labels = [self.source.labels(int(i)) for i in train]
            # Contrast is drawn anew for every image of a modality that has several.
            self.probes[m] = train_probe(lambda i: self.images(m, i), labels, train, self.seed)
            self.score(f"{MODALITIES[m].word}: real images (ceiling)", m, self.images(m, self.indices))
        return self.probes[m]

    def score(self, name: str, m: str, x: np.ndarray) -> dict[str, np.ndarray]:
        """Judge images (n h w 1) of the test subjects, print and keep a row."""
        read = (self.probes.get(m) or self.probe(m))(x)
        out, parts = {}, []
        for field in ("side", "kind", "size", "level", "cardiomegaly"):
            right = int((read[field] == self.target[field]).sum())
            n = len(self.indices)
            low, high = binomtest(right, n).proportion_ci(method="wilson")
            out[field] = dict(share=right / n, low=low, high=high)
            parts.append(f"{field} {right / n:.2f}" + (f" [{low:.2f}, {high:.2f}]" if field == "side" else ""))
        lesion = float((read["kind"] != 0).mean())
        self.table[name] = out | {"lesion seen": lesion}
        print(f"  {name}: {', '.join(parts)}; a lesion seen in {lesion:.2f}", flush=True)
        return read

    # --- generation --------------------------------------------------------------------------------------------

    def generate(self, given: dict[str, Any], make: list[str], **options: Any) -> dict[str, Any]:
        """In chunks of the same size, so that one executable does it; images in [-1, 1], (n h w 1)."""
        n = len(self.indices)
        parts: dict[str, list] = {m: [] for m in make}
        for start in range(0, n, CHUNK):
            chosen = [min(i, n - 1) for i in range(start, start + CHUNK)]
            keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(self.seed), i))(
                jnp.arange(start, start + CHUNK)
            )
            request = self.model.request(tuple(given), tuple(make), **options)
            inputs = {
                s: self.model.ids([v[i] for i in chosen]) if isinstance(v, list) else v[np.asarray(chosen)]
                for s, v in given.items()
            }
            d = self.model.defaults
            z = self.model.sample(request, inputs, keys, d["guidance"], d["eta"])
            for m in make:
                parts[m] += list(self.model.decode(m, z[m]))
        return {m: np.stack(p[:n]) if not isinstance(p[0], str) else p[:n] for m, p in parts.items()}

    def image_from_report(self, m: str) -> None:
        word, text = MODALITIES[m].word, centre().name
        self.probe(m)
        print(f"  {word} from the report, by chance: side 0.50, kind 0.33, size 0.50, level 0.33")
        made = self.generate({text: self.reports}, [m])[m]
        self.score(f"{word} from the report, prompt and guide", m, made)
        made = self.generate({text: self.reports}, [m], prompts="none")[m]
        self.score(f"{word} from the report, guide alone", m, made)
        shuffled = [self.reports[i] for i in np.random.default_rng(self.seed + 1).permutation(len(self.reports))]
        made = self.generate({text: shuffled}, [m], prompts="none")[m]
        self.score(f"{word} from a shuffled report, guide alone", m, made)

    def report_from_image(self, m: str) -> None:
        word, text = MODALITIES[m].word, centre().name
        x = self.images(m, self.indices)
        found = {
            f"report from the {word}, prompt and guide": self.generate({m: x}, [text])[text],
            f"report from the {word}, guide alone": self.generate({m: x}, [text], prompts="none")[text],
        }
        train = self._train(text)
        rng = np.random.default_rng(self.seed)
        # The constant report that states the most frequent findings together is the best that looks at no image.
        common = Counter(self.source.labels(i) for i in train if self.source.labels(i).kind != "none").most_common(12)
        constants = [write(labels, rng) for labels, _ in common]
        best = max(constants, key=lambda c: finding_f1(self.reports, [c] * len(self.reports)))
        found["the best constant report (floor)"] = [best] * len(self.reports)
        others = rng.permutation(train)[: len(self.reports)]
        found["a random subject's report (floor)"] = [self.source.read(int(i), text, rng) for i in others]
        found["the text autoencoder's reconstruction (ceiling)"] = self._reconstructed()
        for name, texts in found.items():
            f1 = finding_f1(self.reports, texts)
            self.table[f"{name}, finding F1"] = f1
            print(f"  {name}: finding F1 {f1:.3f}", flush=True)

    def _reconstructed(self) -> list[str]:
        g, text = self.model, centre().name
        z = jax.jit(lambda p, x: g.model.encode(p, text, x))(g.params, g.ids(self.reports))
        return g.decode(text, z)

    def eps(self, m: str) -> None:
        """Held-out eps loss of each flow of the pair, prompt emptied, clean source: true, shuffled, none."""
        g, text = self.model, centre().name
        inputs = {text: g.ids(self.reports), m: self.images(m, self.indices)}
        order = np.random.default_rng(self.seed + 2).permutation(len(self.indices))
        for source, target in ((text, m), (m, text)):
            loss = jax.jit(lambda p, a, b, k, t, s=source, f=target: _eps_of(g.model, p, s, f, a, b, k, t, g.ids([""])))
            means = {}
            for name, chosen in (("true", slice(None)), ("shuffled", order), ("none", None)):
                given = jax.tree.map(lambda x, c=chosen: x[slice(None) if c is None else c], inputs[source])
                on = jnp.asarray(chosen is not None)
                values = [
                    loss(g.params, (given, on), inputs[target], jax.random.key(i), jnp.int32(t))
                    for i, t in enumerate(EVAL_TIMES)
                ]
                means[name] = float(np.mean(values))
            name = f"eps loss, {MODALITIES[source].word} -> {MODALITIES[target].word}, guide alone"
            self.table[name] = means
            print(f"  {name}: " + ", ".join(f"{k} source {v:.4f}" for k, v in means.items()), flush=True)

    def joint(self, images: list[str]) -> None:
        """All imaging modalities from the report: jointly, and each on its own."""
        text = centre().name
        together = self.generate({text: self.reports}, images)
        apart = {m: self.generate({text: self.reports}, [m])[m] for m in images}
        for name, made in (("jointly", together), ("independently", apart)):
            sides = {}
            for m in images:
                self.probe(m)
                sides[m] = self.score(f"{MODALITIES[m].word} made {name} from the report", m, made[m])["side"]
            read = np.stack(list(sides.values()))
            agree = (read == read[0]).all(0)
            right = agree & (read[0] == self.target["side"])
            row = dict(agree=float(agree.mean()), agree_and_match=float(right.mean()))
            self.table[f"all {len(images)} made {name}: side"] = row
            print(
                f"  made {name}: all {len(images)} show the same side in {row['agree']:.3f}, and the report's in "
                f"{row['agree_and_match']:.3f}",
                flush=True,
            )


def _eps_of(model, params: Params, source: str, target: str, given, x, key, t, empty):
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
    return denoising_loss(eps, flow.process.split(prediction, z_t, times)[1])
