"""MetaImage (.mha, .mhd) and NRRD (.nrrd, .nhdr) through SimpleITK, an extra.

A text header comes first, which may name other files, anywhere; it is read here, so that nothing but a file beside it
is opened and sizes are held to the limit before SimpleITK takes memory. Coordinates are ITK's, LPS.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from medm2g_jax.data.formats.content import check_count, opened, storable, unreadable, whole, written
from medm2g_jax.data.volume import LPS, Volume, checked
from medm2g_jax.errors import UserError

INSTALL = "pip install 'medm2g-jax[itk]'"
_HEADER = 2**16  # bytes of a header at most
_META = rb"(?im)^\s*(ElementDataFile)\s*[=:][ \t]*(.*?)\s*$"
_NRRD = rb"(?im)^\s*data ?file\s*:[ \t]*(.*?)\s*$"
_NO_ORIENTATION = "it states no orientation: taken as DICOM's, columns to the patient's left, rows to the back"


def read(path: epath.PathLike, most_voxels: int) -> Volume:
    """The volume in a file.

    Raises:
      UserError: SimpleITK is not installed, or the file is missing, damaged, too large, of no grey values, or names
        files elsewhere.
    """
    name = str(path)
    with opened(path) as file, whole(name, "MetaImage or NRRD"):
        start = file.read(_HEADER)
    others, oriented = _header(name, start)
    if elsewhere := [other for other in others if not _beside(Path(path), other)]:
        raise UserError(f"{name}: its values are in {elsewhere[0][:80]!a}; expected in itself, or in a file beside it")
    sitk = _sitk(name)
    reader = sitk.ImageFileReader()
    reader.SetFileName(name)
    with whole(name, "MetaImage or NRRD"):
        reader.ReadImageInformation()
        shape, channels = tuple(int(n) for n in reader.GetSize()), reader.GetNumberOfComponents()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelIDValue())
    if channels != 1 or "complex" in kind:
        raise UserError(f"{name}: voxels of {kind}; expected grey values")
    if len(shape) > 3:
        said = " x ".join(map(str, shape))
        raise UserError(f"{name}: {len(shape)}-D, {said}; expected one volume of three dimensions")
    check_count(name, shape, most_voxels)
    with whole(name, "MetaImage or NRRD"):
        image = reader.Execute()
        values = sitk.GetArrayFromImage(image).T
        dims = image.GetDimension()
        direction, spacing = np.reshape(image.GetDirection(), (dims, dims))[:3, :3], image.GetSpacing()[:3]
        affine = np.eye(4)
        n = min(dims, 3)
        affine[:n, :n] = direction[:n, :n] * spacing[:n]
        affine[:n, 3] = image.GetOrigin()[:n]
    values = values.reshape(shape + (1,) * (3 - len(shape)), order="F")
    notes = () if oriented and n == 3 else (_NO_ORIENTATION,)
    return checked(Volume(values, LPS @ affine, path=name, notes=notes))


def said(path: epath.PathLike) -> str:
    """What a file's header says, all fields. Not for people: others' files may name a patient.

    Raises:
      UserError: it is missing, damaged, or of another format.
    """
    with opened(path) as file, whole(str(path), "MetaImage or NRRD"):
        start = file.read(_HEADER)
    _header(str(path), start)
    end = b"\n\n" if start.startswith(b"NRRD") else b"ElementDataFile"
    return start.replace(b"\r\n", b"\n").partition(end)[0].decode("utf-8", "replace")


def check(path: epath.PathLike, volume: Volume) -> None:
    """Can a volume be written there?

    Raises:
      UserError: SimpleITK is not installed.
    """
    _sitk(str(path))


def _sitk(name: str) -> Any:
    try:
        import SimpleITK
    except ImportError:
        raise UserError(f"{name}: MetaImage and NRRD are read and written by SimpleITK; {INSTALL}") from None
    return SimpleITK


def _header(name: str, start: bytes) -> tuple[list[str], bool]:
    """(other files that are to hold the values, whether an orientation is stated)."""
    nrrd, files = start.startswith(b"NRRD000"), []
    if nrrd:
        text, end, _ = start.replace(b"\r\n", b"\n").partition(b"\n\n")
        files = re.findall(_NRRD, start)
        oriented = b"space directions" in text.lower()
    else:
        # Every line that some reader may take for the one that names the file, up to the one that all do.
        end = text = b""
        for match in re.finditer(_META, start):
            exact = match[1] == b"ElementDataFile"
            files += [] if exact and match[2] == b"LOCAL" else [match[2]]
            if exact:
                text, end = start[: match.start()], start[match.end() :]
                break
        oriented = re.search(rb"(?m)^\s*(TransformMatrix|Rotation|Orientation)\s*[=:]", text) is not None
    if not nrrd and b"DimSize" not in text or not end and len(start) == _HEADER:  # or a header without an end
        raise UserError(f"{name}: {'begins as none of' if start else 'empty, not one of'} MetaImage, NRRD")
    return [file.decode("latin-1") for file in files], oriented


def _beside(path: Path, data: str) -> bool:
    """Is it the plain name of one file in the header's folder, and no list, pattern or way out of it?"""
    plain = data == Path(data).name and data.isprintable() and "%" not in data and not data.upper().startswith("LIST")
    return plain and (path.parent / data).resolve().parent == path.parent.resolve()


def write(path: epath.PathLike, volume: Volume, notes: Mapping[str, str]) -> None:
    """.mha or .nrrd: HU as int16, whole numbers as they are, the rest float32; on the volume's affine, packed. Notes
    become fields of the header."""
    sitk = _sitk(str(path))
    values = storable(volume)
    affine = LPS @ volume.affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.T))
    image.SetSpacing([float(x) for x in spacing])
    image.SetDirection([float(x) for x in (affine[:3, :3] / spacing).ravel()])
    image.SetOrigin([float(x) for x in affine[:3, 3]])
    for key, note in notes.items():
        image.SetMetaData(re.sub(r"\W", "_", key), " ".join(note.split()))

    def save(part: epath.Path) -> None:
        try:
            sitk.WriteImage(image, str(part), True)
        except RuntimeError as error:
            raise unreadable(path, error) from error

    written(path, save)
