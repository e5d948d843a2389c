"""Encoded pictures of other people."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import PIL.Image

# Others are not tried: EPS starts Ghostscript, and PSD, FITS and the rest are large parsers that no data set needs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Pillow's decoders raise SyntaxError and ValueError too for torn files.
DECODING = (OSError, SyntaxError, ValueError, MemoryError, PIL.Image.DecompressionBombError)


def open_picture(source: str | Path | IO[bytes]) -> PIL.Image.Image:
    """A picture of one of the usual formats, whatever its file is called; not decoded yet.

    Raises:
        OSError: for another format, and for whatever cannot be read; see also ``DECODING``.
        PIL.Image.DecompressionBombError: when it stands for more pixels than Pillow allows.
    """
    return PIL.Image.open(source, formats=FORMATS)
