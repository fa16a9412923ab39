"""NIfTI-1 and -2 (.nii, .nii.gz, .hdr + .img), Analyze and MGH (.mgh, .mgz): headers by nibabel, values counted.

nibabel reads headers; values are read here, so that a header's word is held to the limit before anything is unpacked.
Extensions are passed over, since they may hold whole DICOM headers; `said` alone reads those that are comments. None of
these formats says what is in it or in which unit (`volume.ranged` does).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from medm2g_jax.data.formats.content import (
    check_count,
    opened,
    skip,
    storable,
    values_of,
    whole,
    written,
)
from medm2g_jax.data.volume import Volume, checked, orientation
from medm2g_jax.errors import UserError

_HEADER = 540  # bytes of the longest header, NIfTI-2's
_FAR = 2**26  # bytes before the values: of extensions, mostly; a gzip file may hold any number of them
_SAID = 2**16  # bytes in which `said` looks
_COMMENT = 6  # NIfTI's code of an extension that is one
_MM = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
_FLIP = "it states no orientation: taken as stored from the patient's right to the left, back to front, feet to head"


def read(path: epath.PathLike, most_voxels: int) -> Volume:
    """The volume in a file, or in a pair of them of which either may be named.

    Raises:
      UserError: the file is missing, damaged, too large, or holds no volume of grey values.
    """
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    name, path = str(path), _header_file(path)
    damage = "NIfTI, Analyze or MGH", HeaderDataError, WrapStructError
    with opened(path) as file, whole(name, *damage):
        header, is_single = _header(name, file.read(_HEADER))
    shape = tuple(int(n) for n in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise UserError(
            f"{name}: {len(shape)}-D, {' x '.join(map(str, shape))}; expected one volume of three dimensions: save the "
            "one you mean as a file of its own"
        )
    shape += (1,) * (3 - len(shape))
    check_count(name, shape, most_voxels)
    with whole(name, *damage):
        dtype, offset = header.get_data_dtype(), int(header.get_data_offset())
        scale = _scale(header)
        affine, notes = _geometry(header)
    if dtype.kind not in "iuf":
        raise UserError(f"{name}: voxels of {_kind(dtype)}; expected grey values")
    if not 0 <= offset <= _FAR:
        raise UserError(f"{name}: its values start at byte {offset}; expected 0 to {_FAR}")
    data = path if is_single else _beside(path, ".img")
    with opened(data) as file, whole(name, *damage):
        skip(file, offset)
        flat = values_of(name, file, int(np.prod(shape)), dtype, scale)
    return checked(Volume(flat.reshape(shape, order="F"), affine, path=name, notes=notes))


def _header_file(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path)
    return _beside(path, ".hdr") if path.name.lower().removesuffix(".gz").endswith(".img") else path


def _beside(path: epath.Path, suffix: str) -> epath.Path:
    """The other file of a pair, whose case and packing it may have."""
    packed = path.name[-3:] if path.name.lower().endswith(".gz") else ""
    stem = path.name[: len(path.name) - len(packed)][:-4]
    names = [stem + s + end for s in (suffix, suffix.upper()) for end in (packed, "", ".gz")]
    return next((found for n in names if (found := path.with_name(n)).exists()), path.with_name(names[0]))


def _header(name: str, raw: bytes) -> tuple[Any, bool]:
    """(nibabel's header, whether values are in the same file)."""
    import nibabel
    from nibabel.freesurfer.mghformat import MGHHeader
    from nibabel.spm2analyze import Spm2AnalyzeHeader

    sizes = {int.from_bytes(raw[:4], order) for order in ("little", "big")}
    if 348 in sizes and raw[344:348] in (b"n+1\0", b"ni1\0"):
        single = raw[344:347] == b"n+1"
        kind = nibabel.Nifti1Header if single else nibabel.nifti1.Nifti1PairHeader
        return kind(raw[:348]), single
    if 540 in sizes and raw[4:7] in (b"n+2", b"ni2"):
        single = raw[4:7] == b"n+2"
        kind = nibabel.Nifti2Header if single else nibabel.nifti2.Nifti2PairHeader
        return kind(raw[:540]), single
    if 348 in sizes and raw[344:347] != b"n+1":
        kind = Spm2AnalyzeHeader if Spm2AnalyzeHeader.may_contain_header(raw[:348]) else nibabel.AnalyzeHeader
        return kind(raw[:348]), False
    if raw[:4] == b"\0\0\0\1" and name.lower().endswith((".mgh", ".mgz")):
        return MGHHeader(raw), True
    raise UserError(f"{name}: {'begins as none of' if raw else 'empty, not one of'} NIfTI, Analyze, MGH")


def _scale(header: Any) -> tuple[float, float]:
    slope, inter = header.get_slope_inter() if hasattr(header, "get_slope_inter") else (None, None)
    slope, inter = (default if x is None else float(x) for x, default in ((slope, 1.0), (inter, 0.0)))
    if not np.isfinite([slope, inter]).all():
        raise ValueError("scale")
    return slope, inter


def _geometry(header: Any) -> tuple[Float[np.ndarray, "4 4"], tuple[str, ...]]:
    """(affine in mm, what is doubtful about it)."""
    notes: tuple[str, ...] = ()
    if hasattr(header, "get_affine"):  # MGH
        return np.asarray(header.get_affine(), np.float64), () if header["goodRASFlag"] else (_FLIP,)
    affine = np.asarray(header.get_best_affine(), np.float64)
    if not hasattr(header, "get_sform"):
        return affine, (_FLIP,)
    own, other = header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]
    if own is None and other is None:
        notes += (_FLIP,)
    elif own is not None and other is not None and _differ(own, other):
        notes += ("its sform and qform name different orientations; the sform is used",)
    unit = header.get_xyzt_units()[0]
    if (mm := _MM[unit]) != 1:
        affine[:3] *= mm
        notes += (f"its coordinates are in {unit}s, made millimetres",)
    return affine, notes


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    usable = all(np.isfinite(x).all() and np.linalg.norm(x[:3, :3], axis=0).all() for x in (a, b))
    return usable and orientation(np.asarray(a, np.float64)) != orientation(np.asarray(b, np.float64))


def said(path: epath.PathLike) -> str:
    """What a file's description and comments say. Not for people: others' files may name a patient.

    Raises:
      UserError: it is missing or damaged.
    """
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    name, path = str(path), _header_file(path)
    with opened(path) as file, whole(name, "NIfTI, Analyze or MGH", HeaderDataError, WrapStructError):
        raw = file.read(_SAID)
        header, _ = _header(name, raw[:_HEADER])
        if "descrip" not in header.keys():  # MGH
            return ""
        words, at = [header["descrip"].item()], len(header.binaryblock) + 4
        order = "little" if header.endianness == "<" else "big"
        while raw[at - 4 : at - 3] and at + 8 <= len(raw):
            size, code = (int.from_bytes(raw[n : n + 4], order) for n in (at, at + 4))
            if size < 8 or size % 16:  # the values already
                break
            words += [raw[at + 8 : at + size]] if code == _COMMENT else []
            at += size
    return "\n".join(word.decode("utf-8", "replace") for word in words)


def _kind(dtype: np.dtype) -> str:
    return "colours" if dtype.names else {"c": "complex numbers"}.get(dtype.kind, str(dtype))


def write(path: epath.PathLike, volume: Volume, notes: Mapping[str, str]) -> None:
    """.nii or .nii.gz, by the name: HU as int16, whole numbers as they are, the rest float32; on the volume's affine.
    Notes become its description and a comment."""
    import nibabel

    values = storable(volume)
    image = nibabel.Nifti1Image(values, volume.affine, dtype=values.dtype)
    image.header.set_xyzt_units("mm")
    image.set_sform(volume.affine, code=1)
    square = np.abs(_cosines(volume.affine) - np.eye(3)).max() < 1e-4
    image.set_qform(volume.affine if square else None, code=1 if square else 0)  # a qform holds right angles only
    image.header.set_slope_inter(1, 0)
    image.header["descrip"] = notes.get("Description", "").encode("ascii", "replace")[:79]
    words = "\n".join(f"{key}: {note}" for key, note in notes.items())
    if words:
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", words.encode()))
    content = image.to_bytes()
    if str(path).lower().endswith(".gz"):
        import gzip

        content = gzip.compress(content, 6, mtime=0)
    written(path, lambda part: part.write_bytes(content))


def _cosines(affine: np.ndarray) -> np.ndarray:
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return axes.T @ axes
