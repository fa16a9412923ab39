"""Pictures that a run leaves behind: labelled grids of grey images, drawn with PIL. Axial slices and films follow the
radiological convention (patient left on the image's right), which `mark_sides` writes onto the picture."""

from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

SYNTHETIC = "generated images are synthetic - not for clinical use"
_INK, _PAPER, _GREY = 20, 255, 110


def to_uint8(x: Float[np.ndarray, "..."]) -> np.ndarray:
    """[-1, 1] -> 0..255."""
    return np.uint8(np.clip((np.asarray(x, np.float32) + 1) * 127.5, 0, 255).round())


def tile(x: Float[np.ndarray, "h w 1"], side: int, mark_sides: bool = True) -> Image.Image:
    """One image as a square tile of `side` pixels, R and L in its upper corners."""
    picture = Image.fromarray(to_uint8(x[..., 0])).resize((side, side), Image.Resampling.BICUBIC)
    if mark_sides:
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(9, side // 12))
        draw.text((3, 1), "R", fill=200, font=font)
        draw.text((side - 4, 1), "L", fill=200, font=font, anchor="ra")
    return picture


def grid(
    path: epath.Path,
    rows: Sequence[tuple[str, Sequence[np.ndarray | None]]],
    captions: Sequence[str] = (),
    title: str = "",
    side: int = 128,
    foot: str = SYNTHETIC,
) -> None:
    """Write a PNG: one labelled row of images after the other, a caption under each column.

    Args:
      rows: (label, images (h w 1) in [-1, 1]); one None leaves its place empty.
      captions: of the columns, wrapped.
      foot: what stands below.
    """
    font, small = ImageFont.load_default(14), ImageFont.load_default(11)
    columns = max(len(images) for _, images in rows)
    margin, gap, head = 120, 4, 26 if title else 6
    wrapped = [_wrap(c, small, side) for c in captions]
    below = 16 + 13 * max((len(w) for w in wrapped), default=0)
    size = (margin + columns * (side + gap), head + len(rows) * (side + gap) + below + 4)
    sheet = Image.new("L", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((6, 5), title, fill=_INK, font=font)
    for i, (label, images) in enumerate(rows):
        y = head + i * (side + gap)
        for k, line in enumerate(_wrap(label, small, margin - 10)):
            draw.text((6, y + 4 + 13 * k), line, fill=_INK, font=small)
        for j, image in enumerate(images):
            if image is not None:
                sheet.paste(tile(image, side), (margin + j * (side + gap), y))
    for j, lines in enumerate(wrapped):
        for k, line in enumerate(lines):
            draw.text(
                (margin + j * (side + gap), head + len(rows) * (side + gap) + 13 * k), line, fill=_INK, font=small
            )
    draw.text((6, size[1] - 16), foot, fill=_GREY, font=small)
    with path.open("wb") as f:
        sheet.save(f, format="PNG")


def _wrap(text: str, font, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
