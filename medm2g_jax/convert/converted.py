"""A converted folder: what `medm2g convert` writes and everything else reads.

    DIR/sd15/ clip/ vd/ optimus/            one folder a source (config.WEIGHT_FOLDERS), whole or absent
        weights.safetensors                 our names without the modality: "unet/down_0/res_0/conv_1/kernel"
        convert.json                        format, source files, licence, network sizes, a CRC-32 for every tensor
        tokenizers/clip ...                 copied, where the source has them
        README.md                           licence and what it forbids

Tensors keep the source's dtype, so that a round trip gives back every bit.
"""

import json
import resource
import shutil
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from medm2g_jax.convert.files import (
    FORMAT,
    Tensor,
    new_folder,
    open_tensors,
    read_json,
    write_safetensors,
)
from medm2g_jax.convert.rules import Step, outputs
from medm2g_jax.data import text
from medm2g_jax.errors import UserError

WEIGHTS, META = "weights.safetensors", "convert.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
# The command that makes each folder.
COMMANDS = {
    "sd15": "medm2g convert sd15 --from v1-5-pruned-emaonly.safetensors --to {}",
    "clip": "medm2g convert clip --from CLIP_VIT_L_14_FOLDER --to {}",
    "vd": "medm2g convert vd --from vd-four-flow-v1-0.pth --to {}",
    "optimus": "medm2g convert optimus --from optimus-vae.pth --bert BERT_FOLDER --gpt2 GPT2_FOLDER --to {}",
    "inception": "medm2g convert inception --from weights-inception-2015-12-05-6726825d.pth --to {}",
    "xrv": "medm2g convert xrv --from xrv.pt --to {}",
    "radimagenet": "medm2g convert radimagenet --from radimagenet_resnet50.pt --to {}",
    "rad_dino": "medm2g convert rad_dino --from RAD_DINO_FOLDER --to {}",
}
LICENCES = {
    "sd15": "CreativeML OpenRAIL-M",
    "clip": "MIT (OpenAI CLIP)",
    "vd": "MIT (Versatile Diffusion)",
    "optimus": "MIT (as published with Versatile Diffusion)",
    "bert-gpt2": "Apache-2.0 (BERT) and MIT (GPT-2)",
    "inception": "Apache-2.0 (TensorFlow's models)",
    "xrv": "Apache-2.0 (torchxrayvision)",
    "radimagenet": "RadImageNet's own terms, for research; read them there",
    "rad_dino": "Microsoft's own, on the model's card; read it there",
}
# What CreativeML OpenRAIL-M's Attachment A forbids, in short and in our words; the licence itself is what binds.
RESTRICTIONS = """\
CreativeML OpenRAIL-M lets you use, change and share these weights and what is made from them, under use restrictions
(its Attachment A) that must be passed on with every copy and every derived model. In short, not:
  - to provide medical advice and medical results interpretation   <- by name; this model is for research only
  - to break the law, or to exploit or harm minors
  - to spread verifiably false information, or personal data, with the aim of harming others
  - to defame, disparage or harass others, or to exploit a group's vulnerabilities
  - for fully automated decisions that touch a person's legal rights or create binding obligations
  - to discriminate against people by behaviour, personal traits or legally protected characteristics
  - for the administration of justice, law enforcement, immigration or asylum, such as predicting crime
The full text is the licence that came with the weights; this summary does not replace it."""


@dataclass(frozen=True)
class Converted:
    """One folder of converted weights, open for reading."""

    folder: Path
    meta: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    folder: Path
    tensors: int
    bytes: int
    seconds: float
    licence: str
    checked: str = ""  # what of it was read back
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {self.tensors} tensors, {self.bytes / 1e9:.3f} GB, {self.seconds:.1f} s, "
            f"peak resident memory {peak_memory() / 1e9:.2f} GB; licence: {self.licence}"
        ]
        lines += [f"read back: {self.checked}"] if self.checked else []
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines + (["", RESTRICTIONS, ""] if "OpenRAIL" in self.licence else []))


def peak_memory() -> int:
    """Of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def write(
    to: Path,
    part: str,
    steps: Sequence[Step],
    meta: Mapping[str, Any],
    tokenizers: Mapping[str, Path] | None = None,
    notes: Sequence[str] = (),
) -> Summary:
    """Write the folder to/part, whole or not at all, and load it again as a run will.

    Args:
      meta: "source", "licence", "net" and what else is worth knowing.
      tokenizers: name -> the folder its files are copied from, where it has some.
      notes: what the user should know besides.

    Raises:
      UserError: a tokenizer that does not load or belongs to another network, or it cannot be written.
    """
    began = time.time()
    made = outputs(steps)
    if len(made) != len(steps):
        raise ValueError(f"{part}: two steps of one name")
    given = {name: Path(source) for name, source in (tokenizers or {}).items()}
    there = {name: source for name, source in given.items() if tokenizer_files(source)}
    for name, source in there.items():
        check_tokenizer(source, name, part, meta["vocab"][name])
    sources = sorted({f"{step.tensor.file.parent.name}/{step.tensor.file.name}" for step in steps})
    with new_folder(Path(to) / part) as folder:
        prints = write_safetensors(folder / WEIGHTS, made, {"format": "pt", "medm2g": part})
        size = sum(step.tensor.nbytes for step in steps)
        for name, source in there.items():
            copy_tokenizer(source, folder / "tokenizers" / name)
        record = {"format": FORMAT, "part": part, **meta, "sources": sources, "tensors": len(made), "bytes": size}
        (folder / "README.md").write_text(card(record), encoding="utf-8")
        (folder / META).write_text(json.dumps(record | {"crc32": prints}, indent=1), encoding="utf-8")
        _load_again(folder, part, {step.name: step.shape for step in steps})
    for name in given.keys() - there.keys():
        at = Path(to) / part / "tokenizers" / name
        notes = [*notes, f"no {name} tokenizer in {given[name]}; a run needs its files in {at}"]
    checked = ", ".join([f"{len(made)} tensors", *(f"{name} tokenizer" for name in there)])
    return Summary(
        Path(to) / part, len(made), size, time.time() - began, record["licence"], checked, tuple(dict.fromkeys(notes))
    )


def check_tokenizer(folder: Path, name: str, part: str, vocab: int) -> None:
    """Does the tokenizer in a folder load, and has its network a row for each of its ids?

    Raises:
      UserError: it does not, or it has another number of ids than the network (of sd15, which may have more: more).
    """
    size = text.load_one(epath.Path(folder), name).get_vocab_size()
    if size > vocab or (size < vocab and part != "sd15"):
        raise UserError(
            f"{folder}: its {name} tokenizer has {size} ids, its network rows for {vocab}; bring the tokenizer that "
            "the network was trained with"
        )


def _load_again(folder: Path, part: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Read a folder that was just written as a run reads it: every tensor's shape and bytes, every tokenizer."""
    found = _open(folder)
    for name, shape in shapes.items():
        tensor = found.tensors[name]
        data = np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data
        if tensor.shape != tuple(shape) or zlib.crc32(data) != found.meta["crc32"][name]:
            raise UserError(f"{folder}: {name} does not read back as it was written; is the disk sound? Convert again")
    for path in (folder / "tokenizers").glob("*"):
        check_tokenizer(path, path.name, part, found.meta["vocab"][path.name])


def card(record: Mapping[str, Any]) -> str:
    """README.md of a converted folder."""
    lines = [
        f"# {record['source']}, converted for medm2g_jax",
        "",
        f"Licence: {record['licence']}. Made by `medm2g convert` from {', '.join(record['sources'])}.",
        "Not for clinical use.",
    ]
    if "OpenRAIL" in record["licence"]:
        lines += ["", "## Use restrictions", "", RESTRICTIONS]
    return "\n".join(lines) + "\n"


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in a folder. tokenizer_config.json and the like alone are no tokenizer."""
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return found if any(p.name in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt") for p in found) else []


def copy_tokenizer(source: Path, to: Path) -> bool:
    """Copy the tokenizer's files that are there; were there any?"""
    found = tokenizer_files(source)
    if found:
        to.mkdir(parents=True, exist_ok=True)
    for path in found:
        shutil.copyfile(path, to / path.name)
    return bool(found)


def exists(weights: str | Path, part: str) -> bool:
    """Is there a finished conversion of this part?"""
    return (Path(weights) / part / META).is_file()


def read(weights: str | Path, part: str) -> Converted:
    """The converted folder weights/part.

    Raises:
      UserError: it is not there (names the command that makes it), damaged, or of another format.
    """
    folder = Path(weights) / part
    if not (folder / META).is_file():
        command = COMMANDS[part].format(weights)
        raise UserError(f"{folder}: no converted weights there; make them with\n  {command}")
    meta = read_json(folder / META)
    if meta.get("format") != FORMAT:
        raise UserError(
            f"{folder / META}: format {meta.get('format')}, this version reads {FORMAT}; delete {folder} and make it "
            f"again with\n  {COMMANDS[part].format(weights)}"
        )
    return _open(folder)


def _open(folder: Path) -> Converted:
    meta, tensors = read_json(folder / META), open_tensors(folder / WEIGHTS)
    if set(tensors) != set(meta.get("crc32") or ()):
        raise UserError(f"{folder}: {WEIGHTS} and {META} name other tensors; delete {folder} and convert again")
    return Converted(folder, meta, tensors)
