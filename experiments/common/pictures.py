"""Pictures of matplotlib as small files."""

import io
from pathlib import Path
from typing import Any

from PIL import Image


def save_picture(figure: Any, path: Path) -> None:
    """Writes a matplotlib figure as a PNG of 256 colours, a third of the bytes: a page of results has ten of them."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    # This method keeps the rare colours: others merge those of two lines.
    few = Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(path, "PNG", optimize=True)
