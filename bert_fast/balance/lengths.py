"""Lengths like those of MLPerf's Wikipedia, for benchmarks and plans without data."""

from __future__ import annotations

import numpy as np

# length: P(L <= length) of the 16,279,552 sequences of Wikipedia at most 512 tokens long; the rest are 512.
_CDF = {
    4: 0.0, 16: 0.00319, 32: 0.03592, 48: 0.10347, 64: 0.17587, 80: 0.23854, 96: 0.28971, 112: 0.33245, 128: 0.36941,
    160: 0.43173, 192: 0.48339, 224: 0.52764, 256: 0.56629, 288: 0.60034, 320: 0.63080, 352: 0.65843, 384: 0.68360,
    416: 0.70665, 448: 0.72798, 480: 0.74772, 511: 0.76565,
}  # fmt: skip
_RESOLUTION = 2**16
_CHUNK = 2**24


def wikipedia_like(count: int, seed: int = 0, out: np.ndarray | None = None) -> np.ndarray:
    """Independent draws, uint16 [count]: mean 256, 23.4 % at 512. Filled into `out` chunk by chunk if given."""
    quantiles = (np.arange(_RESOLUTION) + 0.5) / _RESOLUTION
    table = np.ceil(np.interp(quantiles, list(_CDF.values()), list(_CDF)))
    table[quantiles >= _CDF[511]] = 512
    table = np.maximum(table, 5).astype(np.uint16)
    rng = np.random.default_rng(seed)
    out = np.empty(count, np.uint16) if out is None else out
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        out[start : start + size] = table[rng.integers(0, _RESOLUTION, size, dtype=np.uint16)]
    return out
