"""The masked CRC32-C with which TensorFlow's files check their bytes. Needs the package google-crc32c."""

from __future__ import annotations

import google_crc32c


def masked_crc32c(data: bytes) -> int:
    """The CRC32-C of `data`, rotated and shifted, so that a CRC of data that holds CRCs is no weaker; 32 bits."""
    crc: int = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
