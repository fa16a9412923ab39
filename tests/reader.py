"""What README and docs leave to the reader: files, folders and sets of the names that stand there, small ones."""

import json
import shutil
from pathlib import Path

import look_alikes
import nibabel
import numpy as np
import oracles
import published
import torch
from dicom_files import dataset, save, series
from oracles_extractors import Inception, randomised
from PIL import Image
from safetensors.torch import save_file
from test_convert_text import TEXT, compvis, optimus_state
from test_text_unet import torch_text_unet

from medm2g_jax.convert import captions
from medm2g_jax.data.phantom.render import Phantom
from medm2g_jax.data.text import Tokenizers
from medm2g_jax.modality import MODALITIES

AFFINE = np.diag([-4.0, -4.0, 5.0, 1.0])
FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")


def write(root: Path) -> None:
    """All of it."""
    source = Phantom(size=64, seed=3, train=0, val=0, test=6)
    pixels = {s: source.images(range(6), s)[..., 0] for s in ("ct", "xray", "mri:t1", "mri:t2", "mri:flair")}
    _pictures(root, pixels)
    _volumes(root, pixels)
    _manifests(root, source, pixels)
    (root / "reports.txt").write_text("large mass in the left upper lung .\nno mass .\n")
    look_alikes.mimic_cxr(root / "DOWNLOADED")
    _weights(root)


def _grey(x: np.ndarray) -> Image.Image:
    return Image.fromarray(np.uint8(127.5 * (x + 1)))


def _pictures(root: Path, pixels: dict) -> None:
    (root / "scans").mkdir()
    for n, image in enumerate(pixels["ct"]):
        _grey(image).save(root / "scans" / f"{n}.png")
    for name in ("film.png", "a.png", "b.png"):
        _grey(pixels["ct"][0]).save(root / name)
    _grey(pixels["mri:t2"][0]).save(root / "t2.png")
    values = np.int16(MODALITIES["ct"].in_unit(pixels["ct"][0]))
    save(dataset(values, RescaleSlope=1, RescaleIntercept=0), root / "slice.dcm")


def _volumes(root: Path, pixels: dict) -> None:
    voxels = {s: np.int16(500 * (x + 1)).transpose(2, 1, 0) for s, x in pixels.items()}
    for name, stream in (("t1", "mri:t1"), ("t2", "mri:t2"), ("mr", "mri:t2")):
        nibabel.save(nibabel.Nifti1Image(voxels[stream], AFFINE), root / f"{name}.nii.gz")
    for study in range(12):  # of pixels of its own, or it is left out
        folder = root / "STUDIES" / f"p{study}"
        folder.mkdir(parents=True)
        for contrast in ("t1", "flair"):
            shifted = np.roll(voxels[f"mri:{contrast}"], study, axis=0)
            nibabel.save(nibabel.Nifti1Image(shifted, AFFINE), folder / f"{contrast}.nii.gz")
    mr = dict(Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    series(root / "head", voxels["mri:t2"], np.diag([4.0, 4.0, 5.0, 1.0]), **mr)


def _manifests(root: Path, source: Phantom, pixels: dict) -> None:
    """DIR: the phantom's streams, of which every second row has no CT. XRAY: films with findings and a report."""
    rows = []
    for folder in ("DIR", "XRAY"):
        (root / folder).mkdir()
    for n in range(6):
        images = {s: f"{n}_{s.replace(':', '_')}.png" for s in ("ct", "xray", "mri:t1", "mri:t2")}
        for stream, name in images.items():
            _grey(pixels[stream][n]).save(root / "DIR" / name)
        if n % 2:
            del images["ct"]  # which is to be made
        text = source.read(n, "text", np.random.default_rng(n))
        split = ("train", "test", "test")[n % 3]
        rows.append(dict(id=f"p{n}", subject=f"p{n}", split=split, images=images, text=text, license="CC0"))
    (root / "DIR" / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rng, rows = np.random.default_rng(0), []
    films = Phantom(size=64, seed=4, train=0, val=0, test=96)  # an audit wants 30 to train on
    for n, film in enumerate(films.images(range(96), "xray")[..., 0]):
        _grey(film).save(root / "XRAY" / f"{n}.png")
        names = dict(id=f"x{n}", subject=f"x{n}", split="test" if n % 3 else "train", images={"xray": f"{n}.png"})
        info = {finding: int(rng.integers(2)) for finding in FINDINGS}
        rows.append(names | dict(text=films.read(n, "text", rng), info=info, license="CC0"))
    (root / "XRAY" / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _weights(root: Path) -> None:
    """Published layouts at small width, of random weights, under the names that docs/weights.md has."""
    import transformers

    tokenizers = Tokenizers.train(captions.captions(300), root / "tokenizers", published.VOCAB)
    parts = published.diffusers_folder(root / "sd")
    save_file(published.compvis_state(parts), root / "v1-5-pruned-emaonly.safetensors")
    clip = published.clip(tokenizers.sizes["clip"])
    tower = {k.removeprefix("text_model."): v for k, v in parts["text_encoder"].state_dict().items()}
    clip.text_model.load_state_dict(tower, strict=False)  # as SD-1.5 has CLIP's
    clip.save_pretrained(root / "CLIP_VIT_L_14_FOLDER")
    text = oracles.scramble(torch_text_unet(**TEXT | dict(latent=24)), 5)
    state = {f"model.diffusion_model.unet_text.{k}": v for k, v in compvis(text, "text").items()}
    time = {k: state.pop(k) for k in [*state] if k.startswith("model.diffusion_model.unet_text.time_embed.")}
    state |= {k.replace("unet_text.", ""): v for k, v in time.items()}
    image = {k: v for k, v in compvis(published.unet(), "image").items() if not k.startswith("time_embed.")}
    torch.save(state | {f"model.diffusion_model.unet_image.{k}": v for k, v in image.items()},
               root / "vd-four-flow-v1-0.pth")  # fmt: skip
    sizes = dict(num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=48)
    bert = transformers.BertConfig(vocab_size=tokenizers.sizes["bert"], hidden_size=32, **sizes)
    gpt2 = dict(n_embd=32, n_layer=2, n_head=4, n_inner=64, n_positions=48)
    bert = transformers.BertModel(bert)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=tokenizers.sizes["gpt2"], **gpt2))
    torch.save(optimus_state(bert, gpt2), root / "optimus-vae.pth")
    bert.save_pretrained(root / "BERT_FOLDER")
    gpt2.save_pretrained(root / "GPT2_FOLDER")
    folders = {"clip": "CLIP_VIT_L_14_FOLDER", "bert": "BERT_FOLDER", "gpt2": "GPT2_FOLDER"}
    for name, folder in folders.items():
        shutil.copytree(root / "tokenizers" / name, root / folder, dirs_exist_ok=True)
    torch.save(randomised(Inception()).state_dict(), root / "weights-inception-2015-12-05-6726825d.pth")
