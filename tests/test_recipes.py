"""The recipes: who trains, who is frozen, what a flow is told."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from micro import micro

from medm2g_jax import device, rounds
from medm2g_jax.config import stage_graph
from medm2g_jax.data import pipeline
from medm2g_jax.data.phantom.render import Phantom
from medm2g_jax.data.text import Tokenizers
from medm2g_jax.diffusion import ABAR, TIMES
from medm2g_jax.family import text_lengths
from medm2g_jax.modality import MODALITIES
from medm2g_jax.model import init_group, prompt_context
from medm2g_jax.nn.attention import context
from medm2g_jax.recipes import RIDGE, Recipe, recipe
from medm2g_jax.train import optim, results, sharding
from medm2g_jax.train.loop import Data
from medm2g_jax.train.state import create, make_eval_step, make_train_step

GRAPH = rounds.graph(rounds.LISTINGS["default"])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    source = Phantom(size=32, seed=0, train=48, val=12, test=4, pairs=GRAPH.pairs)
    texts = pipeline.texts(source, "train", 0)
    tokenizers = Tokenizers.train(texts, tmp_path_factory.mktemp("tokenizers"), 700)
    config = micro("text_ct")
    return Data(source, tokenizers, text_lengths(config.net), 32)


def fresh(init) -> dict[str, jax.Array]:
    """Parameters of the names and shapes that `init` makes, drawn with numpy: compiling `init` would take longer than
    the tests. What starts at zero, at one or as the identity does so here."""
    rng = np.random.default_rng(0)
    out = {}
    for name, x in jax.eval_shape(init, jax.random.key(0)).items():
        leaf = name.rpartition("/")[2]
        if "/guide/out/" in name or "/stream/" in name or leaf == "bias" or leaf.startswith("bias_"):
            value = np.zeros(x.shape)
        elif leaf == "scale" or leaf.startswith("scale_"):
            value = np.ones(x.shape)
        elif name.endswith(("/prompt_in/kernel", "/adapt/emb/kernel")):
            value = np.eye(*x.shape)
        elif leaf == "log_scale":
            value = np.float32(2.66)
        else:
            fan_in = np.prod(x.shape[:-1]) if leaf == "kernel" else 4.0
            value = rng.normal(size=x.shape) / np.sqrt(fan_in)
        out[name] = jnp.asarray(value, x.dtype)
    return out


class Bench:
    """One stage with fresh upstream parameters and one batch."""

    def __init__(self, data: Data, target: str, words: str = "tiny", **own):
        self.config = micro(target, words, **own)
        self.graph = stage_graph(self.config)
        self.stage = self.graph.stage(self.config.stage)
        self.model = results.build_model(
            self.config, data.vocab, {}, predict=results.predictions(self.config, self.stage.trains)
        )
        self.recipe: Recipe = recipe(self.config, self.model, self.graph)
        key = jax.random.key(0)
        everything = fresh(lambda k: init_group(self.model, k, [*self.stage.reads, *self.stage.trains]))
        self.trainable = fresh(self.recipe.init)
        self.frozen = {k: v for k, v in everything.items() if k not in self.trainable}
        self.batch = jax.tree.map(jnp.asarray, next(data.batches(self.recipe.rows, "train", 8, 0)))
        if self.recipe.start is not None:
            drawn, extra = self.recipe.start(self.frozen, [self.batch], key, data.empty)
            self.trainable |= drawn
            self.frozen |= extra

    def train(self, steps: int):
        tx = optim.make(self.config, self.trainable)
        step = jax.jit(make_train_step(self.recipe, self.config, tx))
        state = create(self.trainable, tx)
        for _ in range(steps):
            state, metrics = step(state, self.frozen, self.batch, jax.random.key(1))
        return state, metrics

    def prepared(self, batch=None):
        prepare = jax.jit(self.recipe.prepare)
        return prepare(self.frozen, batch or self.batch, jax.random.key(1), jnp.int32(300))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("image_vae", "tiny"),
        ("text_vae", "tiny"),
        ("align", "text_xray,tiny"),
        ("ldm", "text,tiny"),
        ("ldm", "mri,tiny"),
        ("text_xray", "tiny"),
        ("mri", "tiny,alone"),  # all of ct_mri: test_end_to_end
    ],
)
def test_every_trainable_parameter_changes_and_the_loss_falls(data, target, words):
    lr = 3e-3 if target == "align" else 1e-2  # at 1e-2 alignment's loss wanders: 2.45, 2.56, 2.38, 2.49
    bench = Bench(data, target, words, lr=lr, warmup=0.0, steps=100, weight_decay=0.0)
    first = bench.train(1)[1]["loss"]
    # V, f and the guides' keys get their first gradient once theta_c's output layer has left zero.
    state, metrics = bench.train(12)
    assert float(metrics["loss"]) < float(first)
    # A key's bias shifts all logits of a query alike, and a bias in front of a batch normalisation is taken out again:
    # their gradients are zero but for rounding.
    zero_gradient = re.compile(r".*/(k|key|c_attn)/bias$|.*/stream/embedding$|.*/position.*")
    still = [
        k for k, v in state.trainable.items() if np.array_equal(v, bench.trainable[k]) and not zero_gradient.match(k)
    ]
    assert not still
    assert set(state.trainable) == set(state.ema) == set(bench.trainable)


def test_a_single_flow_trains_at_the_times_that_its_config_names(data):
    """The same draw a row, spread by the table's function; held-out rows stand where they are put."""
    times, held_out = {}, jnp.int32(7)
    for name in TIMES:
        bench = Bench(data, "ldm", "xray,tiny", times=name)
        at = jax.jit(lambda frozen, batch, t, bench=bench: bench.recipe.prepare(frozen, batch, jax.random.key(1), t).t)
        times[name] = np.asarray(at(bench.frozen, bench.batch, None))
        assert set(np.asarray(at(bench.frozen, bench.batch, held_out))) == {7}
    spread = 1000 * np.asarray(TIMES["logit_normal"]((times["uniform"] + 0.5) / 1000))
    np.testing.assert_allclose(times["logit_normal"], spread, atol=3)
    assert np.abs(times["logit_normal"] - times["uniform"]).max() > 30


def test_only_what_first_appears_trains_and_the_source_learns_through_the_frozen_flow(data):
    bench = Bench(data, "text_ct")
    assert all(re.match(rounds.group_regex(("ct/guide",)), k) for k in bench.trainable)
    assert any(k.startswith("text/unet/") and "/guide/" in k for k in bench.frozen)

    # theta_c of the frozen text flow is fresh here, so zero; as after an earlier round it is not.
    bench.frozen = {
        k: v + 0.1 if "/guide/out/kernel" in k and k.startswith("text/") else v for k, v in bench.frozen.items()
    }
    prepared = bench.prepared()

    def text_loss(trainable):
        return bench.recipe.losses["eps/text"](bench.recipe.features({**bench.frozen, **trainable}, prepared))

    grads = jax.jit(jax.grad(text_loss))(bench.trainable)
    assert float(jnp.abs(grads["ct/context/conv_in/kernel"]).max()) > 0
    assert float(jnp.abs(grads["ct/adapt/rows"]).max()) > 0


def test_a_new_guide_leaves_the_flow_a_single_flow(data):
    bench = Bench(data, "text_ct")
    params = {**bench.frozen, **bench.trainable}
    flow, prepared = bench.model.flows["ct"], bench.prepared()
    noised = prepared.noised["ct"]
    z_t, t = noised.z_t, noised.t
    prompt = prompt_context(flow.null(params), noised.given, 8)
    guide, _ = bench.model.flows["text"].source(params, *prepared.sources["text"])
    alone = flow.predict({k: v for k, v in params.items() if "/guide/" not in k}, z_t, t, prompt)
    assert np.array_equal(flow.predict(params, z_t, t, prompt, None), alone)
    np.testing.assert_allclose(flow.predict(params, z_t, t, prompt, guide), alone, atol=1e-5)


def test_what_the_guide_is_made_of_changes_eps(data):
    bench = Bench(data, "ct_mri")
    params = {**bench.frozen, **bench.trainable}
    params = {k: v + 0.3 if "/guide/out/kernel" in k else v for k, v in params.items()}
    prepared = bench.prepared()
    z, t = {m: s.z for m, s in prepared.sources.items()}, prepared.sources["ct"].t
    noised = prepared.noised["ct"]

    def eps(params, source="mri", latent=None):
        guide, _ = bench.model.flows[source].source(params, z[source] if latent is None else latent, t)
        prompt = context(jnp.zeros((8, 1, 32)))
        return np.asarray(bench.model.flows["ct"].predict(params, noised.z_t, noised.t, prompt, guide))

    base = eps(params)
    moved = params | {"mri/adapt/rows": 3 * jnp.flip(params["mri/adapt/rows"], axis=1)}
    assert not np.allclose(eps(moved), base, atol=1e-4), "f_B"
    assert not np.allclose(eps(params, latent=jnp.flip(z["mri"], axis=1)), base, atol=1e-4), "the source's latent"
    assert not np.allclose(eps(params, source="ct", latent=z["mri"]), base, atol=1e-4), "the source's modality"


@pytest.mark.parametrize("words", ["text,tiny", "xray,tiny", "ct,tiny", "mri,tiny"])
def test_no_prompt_contains_its_own_target(data, words):
    """Changing x_A alone must leave A's prompt as it is."""
    bench = Bench(data, "ldm", words)
    target = bench.stage.subjects[0]
    changed = dict(bench.batch)
    changed[target] = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), bench.batch[target])
    before, after = bench.prepared(), bench.prepared(changed)
    assert not np.allclose(before.z_t, after.z_t), "the latent follows x_A"
    assert before.given and jax.tree.all(jax.tree.map(np.array_equal, before.given, after.given))


@pytest.mark.parametrize("target", ["text_xray", "ct_mri"])
def test_in_a_round_the_prompt_is_the_partner(data, target):
    bench = Bench(data, target, drop_prompt=0.0)
    a, b = bench.stage.subjects
    changed = dict(bench.batch)
    changed[a] = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), bench.batch[a])
    before, after = bench.prepared().noised, bench.prepared(changed).noised
    assert np.array_equal(before[a].given[b][0], after[a].given[b][0])
    assert not np.allclose(before[b].given[a][0], after[b].given[a][0])


def test_sources_on_the_grid_stand_in_their_slots_and_nothing_else_does(data):
    """At their own noise level, never the target's own stream, and nothing of a record that names no grid."""
    bench = Bench(data, "ct_mri", clean=0.5, alone=0.0, freeze="paper")
    assert {m: f.slots for m, f in bench.model.flows.items() if f.slots} == {"mri": bench.graph.slots("mri")}
    slots = bench.graph.slots("mri")
    prepare = jax.jit(bench.recipe.prepare)
    pair = prepare(bench.frozen, bench.batch, jax.random.key(1))
    about, others = bench.batch["about"], pair.others["mri"]
    assert pair.noised["ct"].registered is None
    near = np.asarray(pair.noised["mri"].registered).reshape(8, *others.source.z.shape[1:3], len(slots), -1)
    streams = ("mri", *(s for s in slots if s.startswith("mri:")))
    expected = np.zeros_like(near)
    z = np.asarray(others.source.z).reshape(8, -1, *others.source.z.shape[1:])
    t = np.asarray(pair.sources["ct"].t)
    for i in range(8):
        there = {streams[s]: z[i, k] for k, s in enumerate(about["others"]["mri"]["stream"][i]) if others.has[i, k]}
        there |= {"ct": pair.sources["ct"].z[i]} if about["partner"]["mri"][i] else {}
        assert streams[about["stream"]["mri"][i]] not in there
        for stream, latent in there.items():
            expected[i, ..., slots.index(stream), :-1] = latent
            expected[i, ..., slots.index(stream), -1] = 1.0 if pair.clean[i] else ABAR[t[i]] ** 0.5
    assert (expected[..., -1] > 0).any() and {*np.asarray(pair.clean)} == {True, False}
    np.testing.assert_allclose(near, expected, atol=1e-5)

    told = np.asarray(about["beside"]["ct"])
    assert told.any() and np.array_equal(pair.beside["ct"], told) and (told <= np.asarray(others.has)).all()

    nowhere = about | {"grid": jax.tree.map(jnp.zeros_like, about["grid"])}
    apart = prepare(bench.frozen, bench.batch | {"about": nowhere}, jax.random.key(1))
    assert not np.any(apart.noised["mri"].registered)
    np.testing.assert_array_equal(apart.others["mri"].source.z, others.source.z)  # V carries them all the same


def test_a_share_of_an_open_flows_rows_is_guided_by_nobody(data):
    """Half of them by its prompt; the flow that is frozen is guided as ever, and held-out rows all are."""
    bench = Bench(data, "ct_mri", alone=1.0, batch=32, drop_prompt=0.9, freeze="paper")
    batch = jax.tree.map(jnp.asarray, next(data.batches(bench.recipe.rows, "train", 32, 0)))
    pair = jax.jit(bench.recipe.prepare)(bench.frozen, batch, jax.random.key(1))
    assert not np.any(pair.noised["mri"].registered) and not np.any(pair.others["mri"].has)
    assert not np.any(pair.partner["mri"]) and "ct" not in pair.partner
    prompted = np.asarray(pair.noised["mri"].given["ct"][1])
    assert 0.2 < prompted[np.asarray(batch["about"]["has"]["ct"])].mean() < 0.8
    held_out = bench.prepared(batch)
    assert np.any(held_out.noised["mri"].registered) and np.any(held_out.partner["mri"])


def test_a_known_flow_practises_with_its_earlier_partners(data):
    """In its rows of practice CT is told of the report and of no MRI; MRI learns nothing there."""
    bench = Bench(data, "ct_mri", alone=0.0, drop_prompt=1.0, rehearse=0.5, clean=1.0)
    batch = jax.tree.map(jnp.asarray, next(data.batches(bench.recipe.rows, "train", 16, 0)))
    about = batch["about"]
    practises = np.asarray(about["practises"]["ct"]["text"])
    assert 3 < practises.sum() < 13 and not np.any(about["has"]["mri"][practises])
    assert not np.any(about["grid"]["ct"]["partner"][practises]) and np.any(about["grid"]["ct"]["partner"])

    @jax.jit
    def run(batch):
        pair = bench.recipe.prepare(bench.frozen, batch, jax.random.key(1), jnp.int32(500))
        out = bench.recipe.features({**bench.frozen, **bench.trainable}, pair)
        return pair, out.predicted["ct"].prediction, out.predicted["mri"].prediction

    # theta_c says nothing at first, and the channels are zero: here both speak.
    rng = np.random.default_rng(1)
    for params in (bench.frozen, bench.trainable):
        loud = [n for n in params if re.match("ct/unet/(guide/|.*/guide/out/)", n)]
        params |= {n: jnp.asarray(rng.normal(size=params[n].shape), jnp.float32) for n in loud}
    pair, ct, mri = run(batch)
    counts = np.asarray(pair.counts["ct"]), np.asarray(pair.counts["mri"])
    assert counts[0][practises].all() and not counts[1][practises].any()
    given = np.asarray(pair.noised["ct"].given["text"][1])
    assert given[practises].any() and not given[~practises].any()
    other = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), about["earlier"])
    told = np.any(np.asarray(run(batch | {"about": about | {"earlier": other}})[1] != ct), axis=(1, 2, 3))
    assert told[practises & np.roll(practises, 1)].all() and not told[~practises].any()
    moved = np.any(np.asarray(run(batch | {"mri": jnp.roll(batch["mri"], 1, axis=0)})[1] != ct), axis=(1, 2, 3))
    assert moved[counts[1] & counts[0]].any() and not moved[practises].any()
    # Of the MRI's other contrasts CT is told of those beside it, on its grid and by V.
    beside, other = np.asarray(about["beside"]["ct"]), about["others"]["mri"]
    assert beside.any() and not beside[practises].any()
    slots = np.asarray(pair.noised["ct"].registered).reshape(*ct.shape[:3], len(bench.graph.slots("ct")), -1)
    assert ((slots[:, 0, 0, :, -1] > 0).sum(1) == (counts[1] & counts[0]) + beside.sum(1)).all()
    changed = about | {"others": {"mri": other | {"x": -other["x"]}}}
    told = np.any(np.asarray(run(batch | {"about": changed})[1] != ct), axis=(1, 2, 3))
    assert (told == beside.any(axis=1)).all()
    held_out = data.fixed(bench.recipe.rows, "val", 4)
    assert not held_out["about"]["practises"]["ct"]["text"].any()


def test_what_a_fine_tune_practises_stands_on_the_grid_where_it_lies_there(data):
    """CT goes on being made from MRI, of its stated contrast, by V and on its input channels."""
    bench = Bench(data, "finetune", "tiny,ct,full", alone=0.0, rehearse=0.5, clean=1.0)
    batch = jax.tree.map(jnp.asarray, next(data.batches(bench.recipe.rows, "train", 16, 0)))
    about, slots = batch["about"], bench.graph.slots("ct")
    pair = jax.jit(bench.recipe.prepare)(bench.frozen, batch, jax.random.key(1))
    practises = np.asarray(about["practises"]["ct"]["mri"])
    assert len({*np.asarray(about["earlier_stream"]["mri"])[practises].tolist()}) > 2
    assert 3 < practises.sum() < 13 and np.array_equal(pair.earlier["mri"].guides["ct"], practises)
    z = pair.earlier["mri"].source.z
    expected = np.zeros((*z.shape[:3], len(slots), z.shape[-1] + 1), np.float32)
    for i in np.flatnonzero(practises):
        stream = MODALITIES["mri"].streams[about["earlier_stream"]["mri"][i]]
        if stream != "mri":  # it is the contrast that is stated
            drawn = data.source.read(int(about["record"][i]), stream, np.random.default_rng(0))
            np.testing.assert_array_equal(about["earlier"]["mri"][i], drawn)
        place = slots.index(stream)
        expected[i, ..., place, :-1], expected[i, ..., place, -1] = z[i], 1
    np.testing.assert_array_equal(pair.noised["ct"].registered, expected.reshape(*z.shape[:3], -1))
    off = about | {"grid": jax.tree.map(jnp.zeros_like, about["grid"])}
    apart = jax.jit(bench.recipe.prepare)(bench.frozen, batch | {"about": off}, jax.random.key(1))
    assert not np.any(apart.noised["ct"].registered) and np.array_equal(apart.earlier["mri"].source.z, z)
    # The best of a fine-tune is held to what it practises as well, evenly among the rest.
    held_out, some = (data.fixed(bench.recipe.rows, "val", n, practise=True) for n in (8, 4))
    flags = held_out["about"]["practises"]["ct"]["mri"]
    assert flags.tolist() == [False, True] * 4 and not held_out["about"]["has"]["text"][flags].any()
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:4], y), held_out, some)
    assert not data.fixed(bench.recipe.rows, "val", 8)["about"]["practises"]["ct"]["mri"].any()


def test_rounds_without_a_source_on_a_grid_are_what_they_were(data):
    for target in ("text_xray", "text_ct"):
        plain, off = Bench(data, target), Bench(data, target, register=False, open="guide")
        assert plain.trainable.keys() == off.trainable.keys() and plain.recipe.rows == off.recipe.rows
        assert not any(f.slots for f in plain.model.flows.values())
    printed = Bench(data, "ct_mri", "tiny,paper")
    assert printed.stage.trains == ("mri/guide",) and "mri/unet/guide/kernel" not in printed.trainable


def test_f_starts_as_rows_of_the_prompt_encoders_tokens(data):
    bench = Bench(data, "text_xray")
    tokens = np.asarray(bench.model.flows["xray"].prompt(bench.frozen, bench.batch["xray"]).tokens).reshape(-1, 32)
    for row in np.asarray(bench.trainable["xray/adapt/rows"]):
        assert np.abs(tokens - row).max(1).min() < 1e-5


def test_a_fresh_flow_hears_all_that_prompts_say_about_equally(data):
    """ZCA whitening of the tokens of rows that have a prompt, of mean square 1; `paper` reads them as they are."""
    bench = Bench(data, "ldm", "ct,tiny")
    about = bench.batch["about"]
    tokens = np.asarray(bench.model.flows["text"].prompt(bench.frozen, about["prompt"]["text"]).tokens, np.float64)
    there = np.asarray(about["present"]["text"])
    assert 0 < there.sum() < len(there)
    tokens = tokens[there].reshape(-1, 32)
    second = tokens.T @ tokens / len(tokens)
    whitening = np.linalg.inv(scipy.linalg.sqrtm(second + RIDGE * np.trace(second) / 32 * np.eye(32)))
    kernel = np.asarray(bench.trainable["ct/prompt_in/kernel"])
    np.testing.assert_allclose(kernel / np.trace(kernel), whitening / np.trace(whitening), atol=1e-4)
    assert np.mean((tokens @ kernel) ** 2) == pytest.approx(1.0, rel=1e-3)
    printed = Bench(data, "ldm", "ct,tiny,paper")
    np.testing.assert_array_equal(printed.trainable["ct/prompt_in/kernel"], np.eye(32))


def test_theta_c_starts_as_the_prompts_attention_but_for_what_it_says(data):
    """Queries, keys, values and norm of every site; nothing of a known flow, nothing where the config says fresh."""
    bench, site = Bench(data, "text_ct"), "unet/mid/attn_0"
    for leaf, of in (("q/kernel", ""), ("k/kernel", ""), ("v/kernel", ""), ("scale", "_norm"), ("bias", "_norm")):
        own = f"ct/{site}/guide/{'norm/' if of else ''}{leaf}"
        np.testing.assert_array_equal(bench.trainable[own], bench.frozen[f"ct/{site}/prompt{of}/{leaf}"])
    assert not np.any(bench.trainable[f"ct/{site}/guide/out/kernel"])
    kernel = f"text/{site}/guide/q/kernel"
    assert kernel in bench.frozen and np.any(bench.frozen[kernel] != bench.frozen[kernel.replace("guide", "prompt")])
    printed = Bench(data, "text_ct", "tiny,paper")
    kernel = f"ct/{site}/guide/q/kernel"
    assert np.any(printed.trainable[kernel] != printed.frozen[kernel.replace("guide", "prompt")])


def test_a_term_of_weight_zero_is_not_traced(data):
    bench = Bench(data, "text_xray", "tiny,paper")
    loss, terms = make_eval_step(bench.recipe, bench.config)(
        bench.trainable, bench.frozen, bench.batch, jax.random.key(0), jnp.int32(100)
    )
    assert sorted(terms) == ["eps/text", "eps/xray"] and float(loss) == pytest.approx(
        float(sum(terms.values())), rel=1e-6
    )


def test_flows_of_equal_sizes_are_one_program(data):
    """To the compilation cache, whose key is the program: names of parameters and of the modality are not in it."""
    texts = []
    for words in ("ct,tiny", "xray,tiny"):
        bench = Bench(data, "ldm", words)
        tx = optim.make(bench.config, bench.trainable)
        step = device.jit(make_train_step(bench.recipe, bench.config, tx), donate_argnums=0)
        arguments = create(bench.trainable, tx), bench.frozen, bench.batch, jax.random.key(1)
        texts += [step.lower(*arguments).as_text(), device.jit(bench.recipe.init).lower(jax.random.key(0)).as_text()]
    assert texts[0] == texts[2] and texts[1] == texts[3]


def test_accumulated_micro_steps_count_one_ema_step(data):
    bench = Bench(data, "ldm", "xray,tiny", accumulate=2)
    state, _ = bench.train(1)
    assert all(np.array_equal(v, bench.trainable[k]) for k, v in state.trainable.items())
    assert all(np.array_equal(v, bench.trainable[k]) for k, v in state.ema.items())
    state, _ = bench.train(2)
    assert not np.array_equal(state.ema["xray/unet/conv_in/kernel"], bench.trainable["xray/unet/conv_in/kernel"])


@pytest.mark.parametrize(
    "shapes",
    [
        ((8, 1, 1), (2, 2, 2), (1, 4, 2)),
        pytest.param(((8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 4, 2), (1, 8, 1)), marks=pytest.mark.full),
    ],
    ids=["three", "five"],
)
def test_every_mesh_gives_the_same_loss_and_smaller_shards(data, shapes):
    bench = Bench(data, "text_ct")
    params = {**bench.frozen, **bench.trainable}
    t, key = jnp.int32(300), jax.random.key(1)
    evaluate = jax.jit(make_eval_step(bench.recipe, bench.config))
    single = float(evaluate(params, {}, bench.batch, key, t)[0])
    held = {}
    for shape in shapes:
        mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)))
        placed = {k: jax.device_put(v, sharding.param_sharding(k, v.shape, mesh)) for k, v in params.items()}
        loss = evaluate(placed, {}, sharding.put_batch(bench.batch, mesh), key, t)[0]
        assert float(loss) == pytest.approx(single, rel=1e-5), shape
        held[shape] = sum(v.addressable_shards[0].data.nbytes for v in placed.values())
    assert held[(8, 1, 1)] > held[(2, 2, 2)] > held[(1, 4, 2)]
    assert len(shapes) == 3 or held[(8, 1, 1)] > held[(4, 2, 1)] > max(held[(2, 2, 2)], held[(1, 8, 1)])
