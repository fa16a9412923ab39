"""The text autoencoder against transformers' BertModel and GPT2LMHeadModel, and cached against uncached decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from oracles_vae import BERT, GPT2, convert, fill, randomize, relative_error

from medm2g_jax.nn.text_vae import TextVAE, decode_greedy

transformers = pytest.importorskip("transformers")

SIZES = dict(
    bert_vocab=50, gpt2_vocab=40, width=32, layers=3, heads=4, ff=64, latent=24, bert_positions=16, gpt2_positions=20
)
BERT_IDS = np.array([[2, 7, 9, 13, 3, 0, 0], [2, 11, 5, 6, 8, 49, 3]], np.int32)


@pytest.fixture(scope="module")
def oracle():
    """(BertModel, its linear, GPT2LMHeadModel, memory, embed, our module, our parameters): the same numbers twice."""
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=50,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=16,
        )
    )
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=4, n_inner=64, n_positions=20)
    )
    linear, memory, embed = (torch.nn.Linear(i, o, bias=False) for i, o in ((32, 48), (24, 96), (24, 32)))
    for seed, module in enumerate((bert, gpt2, linear, memory, embed)):
        randomize(module, seed)
    vae = TextVAE(**SIZES)
    flat = {f"encoder/{k}": v for k, v in convert(bert.state_dict(), BERT).items()}
    flat |= {f"decoder/{k}": v for k, v in convert(gpt2.state_dict(), GPT2, conv1d=True).items()}
    for name, module in (("encoder/latent", linear), ("decoder/memory", memory), ("decoder/embed", embed)):
        flat[f"{name}/kernel"] = module.weight.detach().numpy().T
    return bert, linear, gpt2, memory, embed, vae, fill(vae, flat, BERT_IDS, BERT_IDS)


def test_encoder_equals_bert(oracle):
    bert, linear, *_, vae, params = oracle
    ids = torch.from_numpy(BERT_IDS).long()
    with torch.no_grad():
        mean, logvar = linear(bert(ids, attention_mask=(ids > 0).long()).pooler_output).chunk(2, dim=1)
    ours = jax.jit(lambda p, i: vae.apply(p, i, method="encode"))(params, BERT_IDS)
    assert relative_error(ours[0], mean) < 1e-5 and relative_error(ours[1], logvar) < 1e-5


def test_padding_changes_nothing(oracle):
    *_, vae, params = oracle
    encode = jax.jit(lambda p, i: vae.apply(p, i, method="encode")[0])
    np.testing.assert_allclose(encode(params, BERT_IDS[:1]), encode(params, BERT_IDS[:1, :5]), atol=1e-6)


def test_decoder_equals_gpt2_with_memory(oracle):
    """Memory as past keys and values, the same vector for both; embed added to inputs_embeds; positions from 1."""
    _, _, gpt2, memory, embed, vae, params = oracle
    rng = np.random.default_rng(3)
    z, ids = rng.normal(size=(2, 24)).astype(np.float32), rng.integers(0, 40, (2, 9)).astype(np.int32)
    zt, past = torch.from_numpy(z), transformers.DynamicCache()
    with torch.no_grad():
        for layer, chunk in enumerate(memory(zt).chunk(3, dim=1)):
            slot = chunk.reshape(2, 1, 4, 8).transpose(1, 2)  # b heads 1 e
            past.update(slot, slot, layer)
        expected = gpt2(
            inputs_embeds=gpt2.transformer.wte(torch.from_numpy(ids).long()) + embed(zt)[:, None],
            past_key_values=past,
            position_ids=torch.arange(1, 10)[None],
        ).logits
    ours = jax.jit(lambda p, z, i: vae.apply(p, z, i, method="logits"))(params, z, ids)
    assert relative_error(ours, expected) < 1e-5


def test_decode_greedy_equals_uncached_argmax(oracle):
    *_, vae, params = oracle
    length, z = 12, 3 * jax.random.normal(jax.random.key(0), (6, 24))
    logits = jax.jit(lambda z, ids: vae.apply(params, z, ids, method="logits"))
    ids, done = np.full((6, 1 + length), vae.pad), np.zeros(6, bool)
    ids[:, 0] = vae.bos
    fed = ids.copy()  # what the decoder reads: it goes on behind eos
    for i in range(length):
        fed[:, i + 1] = np.argmax(logits(z, fed.astype(np.int32))[:, i], axis=-1)
        ids[:, i + 1] = np.where(done, vae.pad, fed[:, i + 1])
        done |= fed[:, i + 1] == vae.eos
    decoded = np.asarray(decode_greedy(vae, params["params"], z, length))
    np.testing.assert_array_equal(decoded, ids[:, 1:])
    assert len(set(map(tuple, decoded))) > 1  # the latents do say something


def test_pad_after_eos(oracle):
    """An output layer that always says eos: eos, then pad."""
    *_, vae, params = oracle
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


def test_too_long_is_refused(oracle):
    *_, vae, params = oracle
    with pytest.raises(ValueError, match="20 positions, the memory's included"):
        vae.apply(params, jnp.zeros((1, 24)), jnp.zeros((1, 20), jnp.int32), method="logits")
    with pytest.raises(ValueError, match="20 positions"):
        decode_greedy(vae, params["params"], jnp.zeros((1, 24)), 20)
