"""The files of a volume that is translated: what one is of, what can be made of it, where that can be written.

All of it is asked before a model is loaded.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from medm2g_jax.data import formats
from medm2g_jax.data.volume import Volume, check_modality, stack
from medm2g_jax.data.write import probe, unwritable
from medm2g_jax.errors import UserError
from medm2g_jax.loading import described, makes
from medm2g_jax.modality import MODALITIES, Modality, split_stream
from medm2g_jax.volumes import Cut, Translated, opened


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """What is to be translated into what, and where to.

    Attributes:
      volume: what is given.
      source, target: streams.
      outputs: (option, path) of each volume that is to be written: of the mean, and, where it is wanted, of the
        deviation.
    """

    volume: Volume
    source: str
    target: str
    outputs: tuple[tuple[str, str], ...]

    def write(self, made: Translated) -> list[str]:
        """Write what was made; returns the paths.

        Raises:
          UserError: it cannot be written after all.
        """
        for (option, path), volumes, about in zip(self.outputs, (made.mean, made.std), made.about, strict=False):
            try:
                epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
                formats.write_volume(path, volumes[self.target], about)
            except OSError as error:
                raise unwritable(path, error, option) from error
        return [path for _, path in self.outputs]


def asked(
    model: str,
    given: str,
    output: str,
    *,
    source: str | None = None,
    target: str | None = None,
    plane: str = "axial",
    draws: int = 1,
    uncertainty: str | None = None,
    overwrite: bool = False,
) -> Asked:
    """What a command line asks for, looked at before a model is loaded.

    Args:
      model: where the model is.
      given, output, uncertainty: files, or folders of DICOM.
      source, target: streams, None for what the file says and for the one that there is.

    Raises:
      UserError: it cannot be done; says why.
    """
    outputs = _outputs(output, uncertainty, draws)
    _, meta = described(model)
    volume = formats.read_volume(given)
    stack(volume, plane)  # is there such a plane?
    source = source_stream(volume, source)
    target = target_stream(meta, source, target)
    for option, path in outputs:
        _check_output(option, path, volume, overwrite)
    return Asked(volume, source, target, outputs)


def source_stream(volume: Volume, said: str | None) -> str:
    """What a volume is of: what was said, else what its file says.

    Raises:
      UserError: nothing does, or not which contrast; what was said is no stream of slices, or not what the file says.
    """
    flat = [m for m in MODALITIES.values() if m.is_image and not m.projection]
    if said is not None:
        if _of(said) not in flat:
            raise UserError(f"--from {said}: no slices of a volume; expected one of {_streams(flat)}")
        check_modality(volume, _of(said))
        return said
    found = [m for m in flat if m.dicom == volume.modality]
    if not found:
        raise UserError(f"{volume.path}: does not say what it is of; say it, --from one of {_streams(flat)}")
    if found[0].contrasts:
        raise UserError(
            f"{volume.path}: {found[0].word}, and not which contrast; say it, --from one of {_streams(found)} (the "
            "bare name where nobody knows)"
        )
    return found[0].name


def _of(stream: str) -> Modality:
    return MODALITIES[split_stream(stream)[0]]


def _streams(modalities: Sequence[Modality]) -> str:
    return ", ".join(s for m in modalities for s in (*m.streams[1:], m.name))


def target_stream(meta: Mapping[str, Any], source: str, said: str | None) -> str:
    """What is made of a volume: what was said, else the one thing that the model was trained to make of it: another
    modality, or, of a model of one modality, another contrast.

    Args:
      meta: what the model's model.json says.

    Raises:
      UserError: it makes none or several, or not what was said; names what it makes.
    """
    own, pairs = _of(source), {tuple(pair) for pair in meta["pairs"]["guide"]}
    makable = [MODALITIES[m] for m in makes(meta) if MODALITIES[m].shares_grid(own)]
    if said is not None:
        if _of(said) not in makable:
            raise UserError(f"--to {said}: this model makes no slices of it, but {_streams(makable) or 'of nothing'}")
        if said == source:
            raise UserError(f"--to {said}: given and wanted are the same")
        return said
    trained = [m for m in makable if (own.name, m.name) in pairs]
    others = [s for m in trained if m is not own for s in m.streams[1:] or m.streams]
    contrasts = [s for s in own.streams[1:] if own in trained and source not in (own.name, s)]
    able = others or contrasts
    if len(able) != 1:
        made = f"of {source} this model makes {', '.join(able) or 'nothing that lies on its slices'}"
        raise UserError(f"--to: {made}{'; say which' if able else ''}")
    return able[0]


def _check_output(option: str, path: str, volume: Volume, overwrite: bool) -> None:
    """Can a volume on this one's grid be written there? Leaves nothing behind."""
    formats.check_volume(path, volume)
    if (found := formats.format_of(path)) is not None and found.said is None:
        raise UserError(f"{option} {path}: {found.name} holds no word that it is synthetic; name another format")
    if volume.path and Path(path).resolve() == Path(volume.path).resolve():
        raise UserError(f"{option} {path}: the file that is given; name another")
    if Path(path).is_file() and not overwrite:
        raise UserError(f"{option} {path}: is there already; name another, or add --overwrite")
    probe(epath.Path(path).parent, option)


def _outputs(output: str, uncertainty: str | None, draws: int) -> tuple[tuple[str, str], ...]:
    if uncertainty is None:
        return (("-o", output),)
    if draws < 2:
        raise UserError(f"--uncertainty {uncertainty}: how far draws differ; ask for several, --draws 8")
    if Path(uncertainty).resolve() == Path(output).resolve():
        raise UserError(f"--uncertainty {uncertainty}: the name of the output; name another")
    return ("-o", output), ("--uncertainty", uncertainty)


def of_given(model: str, given: Mapping[str, Any], plane: str, form: str | None) -> tuple[dict[str, list], Cut | None]:
    """`opened`, before a model is loaded: only its modalities are registered.

    Args:
      model: where it is.
      form: in which what is made is to be written; where that is a volume's, a file of one slice is one.
    """
    described(model)
    return opened(given, plane, single=form not in (None, "png"))


def form_of(cut: Cut | None) -> str:
    """The form, of `data.write.FORMS`, of what was made of a volume where none is asked for: that of its file."""
    if cut is None:
        return "png"
    name = cut.source.path
    found = formats.format_at(name).name if name else "NIfTI"
    return {"DICOM": "dicom", "MetaImage": "mha", "NRRD": "nrrd"}.get(found, "nifti")
