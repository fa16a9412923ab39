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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medm2g_jax.convert.files import (
    FORMAT,
    Tensor,
    new_folder,
    open_tensors,
    read_json,
    write_safetensors,
)
from medm2g_jax.convert.rules import Step, outputs
from medm2g_jax.errors import UserError

WEIGHTS, META = "weights.safetensors", "convert.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "special_tokens_map.json",
)
# The command that makes each folder.
COMMANDS = {
    "sd15": "medm2g convert sd15 --from v1-5-pruned-emaonly.safetensors --to {}",
    "clip": "medm2g convert clip --from CLIP_VIT_L_14_FOLDER --to {}",
    "vd": "medm2g convert vd --from vd-four-flow-v1-0.pth --to {}",
    "optimus": "medm2g convert optimus --from optimus-vae.pth --bert BERT_FOLDER --gpt2 GPT2_FOLDER --to {}",
}
LICENCES = {
    "sd15": "CreativeML OpenRAIL-M",
    "clip": "MIT (OpenAI CLIP)",
    "vd": "MIT (Versatile Diffusion)",
    "optimus": "MIT (as published with Versatile Diffusion)",
    "bert-gpt2": "Apache-2.0 (BERT) and MIT (GPT-2)",
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

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.tensors} tensors, {self.bytes / 1e9:.3f} GB, {self.seconds:.1f} s, "
            f"peak resident memory {peak_memory() / 1e9:.2f} GB; licence: {self.licence}"
        )


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
) -> Summary:
    """Write the folder to/part, whole or not at all.

    Args:
      meta: "source", "licence", "net" and what else is worth knowing.
      tokenizers: name -> the folder its files are copied from.
    """
    began = time.time()
    made = outputs(steps)
    if len(made) != len(steps):
        raise ValueError(f"{part}: two steps of one name")
    sources = sorted({f"{step.tensor.file.parent.name}/{step.tensor.file.name}" for step in steps})
    with new_folder(Path(to) / part) as folder:
        prints = write_safetensors(folder / WEIGHTS, made, {"format": "pt", "medm2g": part})
        size = sum(step.tensor.nbytes for step in steps)
        for name, source in (tokenizers or {}).items():
            copy_tokenizer(source, folder / "tokenizers" / name)
        record = {"format": FORMAT, "part": part, **meta, "sources": sources, "tensors": len(made), "bytes": size}
        (folder / "README.md").write_text(card(record), encoding="utf-8")
        (folder / META).write_text(json.dumps(record | {"crc32": prints}, indent=1), encoding="utf-8")
    return Summary(Path(to) / part, len(made), size, time.time() - began, record["licence"])


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


def copy_tokenizer(source: Path, to: Path) -> bool:
    """Copy the tokenizer's files that are there; were there any?"""
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
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
    tensors = open_tensors(folder / WEIGHTS)
    if set(tensors) != set(meta.get("crc32", ())):
        raise UserError(f"{folder}: {WEIGHTS} and {META} name other tensors; delete {folder} and convert again")
    return Converted(folder, meta, tensors)
