"""The text autoencoder against transformers' BertModel and GPT2LMHeadModel, and cached against uncached decoding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import torch
from flax.traverse_util import flatten_dict
from oracles_vae import BERT, GPT2, convert, fill

from medm2g_jax.nn.text_vae import TextVAE, decode_beam, decode_greedy

transformers = pytest.importorskip("transformers")

TINY = dict(
    bert_vocab=50, gpt2_vocab=40, width=32, layers=3, heads=4, ff=64, latent=24, bert_positions=16, gpt2_positions=20
)
FULL = dict(
    bert_vocab=28996, gpt2_vocab=50260, width=768, layers=12, heads=12, ff=3072, latent=768, bert_positions=512,
    gpt2_positions=1024,
)  # fmt: skip
BERT_IDS = np.array([[2, 7, 9, 13, 3, 0, 0], [2, 11, 5, 6, 8, 49, 3]], np.int32)


def both(sizes, seed=0):
    """(BertModel, its linear, GPT2LMHeadModel, memory, embed, our module, our parameters): the same numbers twice."""
    width, latent = sizes["width"], sizes["latent"]
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=sizes["bert_vocab"],
            hidden_size=width,
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            intermediate_size=sizes["ff"],
            max_position_embeddings=sizes["bert_positions"],
        )
    )
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=sizes["gpt2_vocab"],
            n_embd=width,
            n_layer=sizes["layers"],
            n_head=sizes["heads"],
            n_inner=sizes["ff"],
            n_positions=sizes["gpt2_positions"],
        )
    )
    linear, memory, embed = (
        torch.nn.Linear(i, o, bias=False)
        for i, o in ((width, 2 * latent), (latent, sizes["layers"] * width), (latent, width))
    )
    for i, module in enumerate((bert, gpt2, linear, memory, embed)):
        oracles.randomize(module, 5 * seed + i)
    vae = TextVAE(**sizes)
    flat = {f"encoder/{k}": v for k, v in convert(bert.state_dict(), BERT).items()}
    flat |= {f"decoder/{k}": v for k, v in convert(gpt2.state_dict(), GPT2, conv1d=True).items()}
    for name, module in (("encoder/latent", linear), ("decoder/memory", memory), ("decoder/embed", embed)):
        flat[f"{name}/kernel"] = module.weight.detach().numpy().T
    return bert, linear, gpt2, memory, embed, vae, fill(vae, flat, BERT_IDS, BERT_IDS)


@pytest.fixture(scope="module")
def tiny():
    return both(TINY)


@oracles.at_both_sizes(TINY, FULL)
def test_encoder_equals_bert(agree, size, seed):
    bert, linear, *_, vae, params = both(size, seed)
    ids = np.random.default_rng(seed).integers(1, size["bert_vocab"], (2, size["bert_positions"] // 2), np.int32)
    ids[0, ids.shape[1] // 2 :] = 0
    at = torch.from_numpy(ids).long()
    with torch.no_grad():
        mean, logvar = linear(bert(at, attention_mask=(at > 0).long()).pooler_output).chunk(2, dim=1)

    def encode(net, params, ids):
        return dict(zip(("mean", "logvar"), net.apply(params, ids, method="encode"), strict=True))

    agree(vae, encode, {"mean": mean, "logvar": logvar}, params, ids)


def test_padding_changes_nothing(tiny):
    *_, vae, params = tiny
    encode = jax.jit(lambda p, i: vae.apply(p, i, method="encode")[0])
    np.testing.assert_allclose(encode(params, BERT_IDS[:1]), encode(params, BERT_IDS[:1, :5]), atol=1e-6)


@oracles.at_both_sizes(TINY, FULL)
def test_decoder_equals_gpt2_with_memory(agree, size, seed):
    """Memory as past keys and values, the same vector for both; embed added to inputs_embeds; positions from 1."""
    _, _, gpt2, memory, embed, vae, params = both(size, seed)
    rng, n = np.random.default_rng(seed), size["gpt2_positions"] // 8
    z = rng.normal(size=(2, size["latent"])).astype(np.float32)
    ids = rng.integers(0, size["gpt2_vocab"], (2, n), np.int32)
    zt, past = torch.from_numpy(z), transformers.DynamicCache()
    with torch.no_grad():
        for layer, chunk in enumerate(memory(zt).chunk(size["layers"], dim=1)):
            slot = chunk.reshape(2, 1, size["heads"], -1).transpose(1, 2)  # b heads 1 e
            past.update(slot, slot, layer)
        logits = gpt2(
            inputs_embeds=gpt2.transformer.wte(torch.from_numpy(ids).long()) + embed(zt)[:, None],
            past_key_values=past,
            position_ids=torch.arange(1, n + 1)[None],
        ).logits
    agree(vae, lambda net, *args: {"logits": net.apply(*args, method="logits")}, {"logits": logits}, params, z, ids)


@oracles.at_both_sizes(TINY, FULL, seeds=1)
def test_decode_greedy_equals_uncached_argmax(jit, size, seed):
    *_, vae, params = both(size, seed)
    length, z = 12, 3 * jax.random.normal(jax.random.key(seed), (6, size["latent"]))
    logits = jit(lambda params, z, ids: vae.apply(params, z, ids, method="logits"))
    ids, done = np.full((6, 1 + length), vae.pad), np.zeros(6, bool)
    ids[:, 0] = vae.bos
    fed = ids.copy()  # what the decoder reads: it goes on behind eos
    for i in range(length):
        fed[:, i + 1] = np.argmax(logits(params, z, fed.astype(np.int32))[:, i], axis=-1)
        ids[:, i + 1] = np.where(done, vae.pad, fed[:, i + 1])
        done |= fed[:, i + 1] == vae.eos
    decoded = np.asarray(jit(lambda params, z: decode_greedy(vae, params["params"], z, length))(params, z))
    np.testing.assert_array_equal(decoded, ids[:, 1:])
    assert len(set(map(tuple, decoded))) > 1  # the latents do say something


def test_pad_after_eos(tiny):
    """An output layer that always says eos: eos, then pad."""
    *_, vae, params = tiny
    tree = jax.tree.map(jnp.asarray, params["params"])
    tree["decoder"]["ln_f"] = {"scale": jnp.zeros(32), "bias": tree["decoder"]["wte"]["embedding"][vae.eos] * 10}
    np.testing.assert_array_equal(decode_greedy(vae, tree, jnp.zeros((1, 24)), 3), [[39, 37, 37]])


def test_published_size_and_names():
    vae = TextVAE(bert_vocab=28996, gpt2_vocab=50260)
    flat = flatten_dict(
        jax.eval_shape(vae.init, jax.random.key(0), BERT_IDS, BERT_IDS)["params"], sep="/"
    )
    assert flat["encoder/latent/kernel"].shape == (768, 1536) and flat["decoder/memory/kernel"].shape == (768, 9216)
    assert flat["decoder/wte/embedding"].shape == (50260, 768)
    bert = 108_310_272  # bert-base-cased
    gpt2 = 124_439_808 + 3 * 768  # gpt2, three more rows
    assert sum(v.size for v in flat.values()) == bert + gpt2 + 768 * (1536 + 9216 + 768)


def test_too_long_is_refused(tiny):
    *_, vae, params = tiny
    with pytest.raises(ValueError, match="20 positions, the memory's included"):
        vae.apply(params, jnp.zeros((1, 24)), jnp.zeros((1, 20), jnp.int32), method="logits")
    with pytest.raises(ValueError, match="20 positions"):
        decode_greedy(vae, params["params"], jnp.zeros((1, 24)), 20)


def test_beams_find_the_likeliest_text_of_all(jit):
    """As many beams as there are beginnings search everything: brute force over all texts of three tokens. One beam is
    greedy."""
    vae = TextVAE(bert_vocab=9, gpt2_vocab=6, width=16, layers=1, heads=2, ff=32, latent=8, gpt2_positions=8)
    params = vae.init(jax.random.key(3), jnp.ones((1, 3), jnp.int32), jnp.zeros((1, 3), jnp.int32))["params"]
    params = jax.tree.map(lambda x: 3 * x, params)  # what came before shall matter, and texts shall not end at once
    words = params["decoder"]["wte"]["embedding"].at[vae.eos].set(0.0)
    params = params | {"decoder": params["decoder"] | {"wte": {"embedding": words}}}
    z = 0.3 * jax.random.normal(jax.random.key(4), (100, 8))  # many: the best often begins as the best
    length, vocab = 3, vae.gpt2_vocab
    texts = np.asarray(list(itertools.product(range(vocab), repeat=length)))
    ended = np.cumsum(texts == vae.eos, axis=1) - (texts == vae.eos)  # how many eos came before
    texts = texts[np.all((ended == 0) | (texts == vae.pad), axis=1)]  # after it pad alone
    over = np.cumsum(texts == vae.eos, axis=1) - (texts == vae.eos) > 0
    ids = np.concatenate([np.full((len(texts), 1), vae.bos), texts[:, :-1]], axis=1)
    logits = jit(lambda p, z, ids: vae.apply({"params": p}, z, ids, method="logits"))
    found = np.asarray(jit(lambda p, z: decode_beam(vae, p, z, length, vocab**length))(params, z))
    for row, ours in zip(z, found, strict=True):
        log = np.asarray(jax.nn.log_softmax(logits(params, jnp.tile(row, (len(texts), 1)), jnp.asarray(ids))))
        each = np.where(over, 0.0, np.take_along_axis(log, texts[..., None], axis=-1)[..., 0]).sum(1)
        score = each / np.maximum((texts != vae.pad).sum(1), 1)
        np.testing.assert_array_equal(ours, texts[score.argmax()])
    greedy = np.asarray(decode_greedy(vae, params, z, 5))
    np.testing.assert_array_equal(decode_beam(vae, params, z, 5, 1), greedy)


@pytest.mark.parametrize("beams", [2, 4])
def test_few_beams_go_on_from_what_each_text_itself_says(jit, beams):
    """A search in plain Python that keeps no cache: every beginning's own tokens are read anew at each step."""
    vae = TextVAE(bert_vocab=9, gpt2_vocab=12, width=16, layers=2, heads=2, ff=32, latent=8, gpt2_positions=10)
    params = vae.init(jax.random.key(3), jnp.ones((1, 3), jnp.int32), jnp.zeros((1, 3), jnp.int32))["params"]
    # What came before shall say more than the last token does.
    loud = lambda path, x: (30 if "attn" in jax.tree_util.keystr(path) else 2) * x  # noqa: E731
    params = jax.tree_util.tree_map_with_path(loud, params)
    z, length = jax.random.normal(jax.random.key(4), (12, 8)), 8
    logits = jit(lambda p, z, ids: jax.nn.log_softmax(vae.apply({"params": p}, z, ids, method="logits")))

    def costs(row, texts):
        """(beams, vocab): of the next token behind each text."""
        ids = np.full((beams, length), vae.pad)
        for i, text in enumerate(texts):
            ids[i, : len(text) + 1] = [vae.bos, *text][:length]
        log = logits(params, jnp.tile(row, (beams, 1)), jnp.asarray(ids))
        return np.asarray(log)[:, len(texts[0])]

    found = np.asarray(jit(lambda p, z: decode_beam(vae, p, z, length, beams))(params, z))
    for row, ours in zip(z, found, strict=True):
        kept = {(): 0.0}
        for _ in range(length):
            longer = {}
            for (text, total), step in zip(kept.items(), costs(row, [*kept]), strict=False):
                after = {vae.pad: 0.0} if vae.eos in text else dict(enumerate(step))
                longer |= {(*text, token): total + cost for token, cost in after.items()}
            kept = dict(sorted(longer.items(), key=lambda x: -x[1])[:beams])
        best = max(kept, key=lambda text: kept[text] / (np.asarray(text) != vae.pad).sum())
        np.testing.assert_array_equal(ours, best)
