"""Files of pictures and volumes: one table, suffix -> how it is read and written. A new format is one file here and one
row."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from etils import epath

from medm2g_jax.data.formats import array, dicom, dicom_out, itk, nifti, raster
from medm2g_jax.data.picture import Picture
from medm2g_jax.data.volume import MOST_VOXELS, Volume, check_modality, plane_of, ranged, slices
from medm2g_jax.errors import UserError
from medm2g_jax.modality import Modality


class Format(NamedTuple):
    """How files of one suffix are read and written.

    Attributes:
      name: what people call it.
      read: (path, most pixels or voxels) -> picture or volume. Raises UserError, which names the file, for whatever is
        wrong with it.
      write: (path, picture, notes); its pixels as they are, notes (name -> text) in the file's own text fields. None
        where pictures are not written.
      write_volume: likewise, of a volume.
      check: (path, volume); raises UserError where one on this volume's grid cannot be written there. None: none is
        refused.
      said: (path) -> all that the file's text fields say, for `data.marks`; None where there are none. Raises
        UserError.
    """

    name: str
    read: Callable[[epath.PathLike, int], Picture | Volume]
    write: Callable[[epath.PathLike, Picture, Mapping[str, str]], None] | None = None
    write_volume: Callable[[epath.PathLike, Volume, Mapping[str, str]], None] | None = None
    check: Callable[[epath.PathLike, Volume], None] | None = None
    said: Callable[[epath.PathLike], str] | None = None


_DICOM = Format("DICOM", dicom.read, dicom_out.write_picture, dicom_out.write, check=dicom_out.check, said=dicom.said)
_NIFTI = Format("NIfTI", nifti.read, write_volume=nifti.write, said=nifti.said)
_ANALYZE, _MGH = (Format(name, nifti.read, said=nifti.said) for name in ("Analyze", "MGH"))
_JPEG = Format("JPEG", raster.read, raster.write_jpeg, said=raster.said)
_TIFF = Format("TIFF", raster.read, raster.write_tiff, said=raster.said)
FORMATS: dict[str, Format] = {
    ".png": Format("PNG", raster.read, raster.write_png, said=raster.said),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".dcm": _DICOM,
    ".dicom": _DICOM,
    ".ima": _DICOM,
    ".nii": _NIFTI,
    ".nii.gz": _NIFTI,
    ".hdr": _ANALYZE,
    ".img": _ANALYZE,
    ".img.gz": _ANALYZE,
    ".mgh": _MGH,
    ".mgz": _MGH,
    ".mha": Format("MetaImage", itk.read, write_volume=itk.write, check=itk.check, said=itk.said),
    ".mhd": Format("MetaImage", itk.read, said=itk.said),
    ".nrrd": Format("NRRD", itk.read, write_volume=itk.write, check=itk.check, said=itk.said),
    ".nhdr": Format("NRRD", itk.read, said=itk.said),
    ".npy": Format("NumPy", array.read, write_volume=array.write),
}
NAMES = " or ".join(dict.fromkeys(f.name for f in FORMATS.values()))  # for messages


def format_of(name: str) -> Format | None:
    """The format of a file of this name; None where there is none. The longest suffix decides, in any case."""
    words = name.lower().rsplit(".", 2)  # suffixes have two words at most
    found = FORMATS.get(f".{words[-2]}.{words[-1]}") if len(words) > 2 else None
    return found or (FORMATS.get(f".{words[-1]}") if len(words) > 1 else None)


def format_at(path: epath.PathLike) -> Format:
    """The format of what is at a path, by its name, or by its content where it is DICOM.

    Raises:
      UserError: there is none.
    """
    found = format_of(str(path))
    if found is None and dicom.is_dicom(path):  # many have a name without a suffix; a folder may hold a series
        found = FORMATS[".dcm"]
    if found is None:
        raise UserError(f"{path}: of no format that is read here; expected a name that ends in {', '.join(FORMATS)}")
    return found


def read(path: epath.PathLike, most_pixels: int, modality: Modality | None = None) -> Picture:
    """The one picture in a file; of a volume of one slice that slice, in radiological convention.

    Args:
      modality: what it is taken for; with it a file that says it is something else is an error, and values in a
        scanner's own unit get a range (`volume.ranged`).

    Raises:
      UserError: of no known format, missing, broken, of more than `most_pixels` pixels, or of several slices; names the
        file.
    """
    image = load(path, most_pixels)
    if isinstance(image, Volume):
        plane = plane_of(image)
        if min(image.values.shape) > 1:
            count = {p: len(slices(image, p)) for p in ("axial", "coronal", "sagittal")}
            raise UserError(
                f"{path}: a volume ({', '.join(f'{n} {p}' for p, n in count.items())} slices); expected one picture: "
                "choose slices of it in Python, medm2g_jax.data.formats.pictures(PATH, MODALITY)[NUMBER], give a file "
                "of one slice, or make a volume of it with medm2g translate"
            )
        (image,) = slices(ranged(image, modality), plane)
    check_modality(image, modality)
    return image


def load(path: epath.PathLike, most: int) -> Picture | Volume:
    """What is in a file, whichever it is.

    Args:
      most: pixels or voxels.

    Raises:
      UserError: of no known format, missing, broken, or of more pixels; names the file.
    """
    return format_at(path).read(path, most)


def read_volume(path: epath.PathLike, most_voxels: int = MOST_VOXELS) -> Volume:
    """The volume in a file.

    Raises:
      UserError: of no known format, missing, broken, of more than `most_voxels` voxels, or a picture that does not say
        where it lies; names the file.
    """
    image = load(path, most_voxels)
    if isinstance(image, Picture):
        raise UserError(f"{path}: one picture, which does not say where it lies in the patient; expected a volume")
    return image


def pictures(
    path: epath.PathLike, modality: Modality | None = None, plane: str = "axial", most_voxels: int = MOST_VOXELS
) -> list[Picture]:
    """All slices of a volume's file, as a modality's pictures.

    Raises:
      UserError: see `read_volume`, `volume.ranged` and `volume.slices`.
    """
    return slices(ranged(read_volume(path, most_voxels), modality), plane)


def write_volume(path: epath.PathLike, volume: Volume, notes: Mapping[str, str]) -> None:
    """Write a volume on its own grid, in the format that the name asks for; notes (name -> text) go into the file's own
    text fields.

    Raises:
      UserError: no such format, or one that is not written here.
    """
    _writer(path).write_volume(path, volume, notes)


def check_volume(path: epath.PathLike, volume: Volume) -> None:
    """Can a volume on this one's grid be written there, as far as its format goes? Before minutes of making it.

    Raises:
      UserError: no such format, one that is not written here, or what it cannot hold.
    """
    found = _writer(path)
    if found.check is not None:
        found.check(path, volume)


def _writer(path: epath.PathLike) -> Format:
    """The format that a volume is written in under a name."""
    found = format_of(str(path)) or (None if epath.Path(path).suffix else _DICOM)  # a folder of slices
    if found is None or found.write_volume is None:
        able = ", ".join(suffix for suffix, format in FORMATS.items() if format.write_volume)
        what = found.name if found else f"{epath.Path(path).suffix!r}"
        raise UserError(
            f"{path}: volumes are not written as {what}; expected a name that ends in {able}, or in none of these: a "
            "folder of DICOM"
        )
    return found
