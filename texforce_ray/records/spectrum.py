"""Artefacts in an image's spectrum: high frequencies, and grids, which are isolated peaks."""

from __future__ import annotations

import numpy as np

_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_TILE = 64  # pixels: the same resolution in frequency for images of all sizes
_HALF_NYQUIST = 0.25  # cycles per pixel
_COARSEST = 1 / 16  # cycles per pixel; coarser patterns are content
_INVISIBLE = (5 / 255) ** 2  # power: without it, noise in an empty image would be a large share
_PEAK = 8  # times the power around it
_REACH = 4  # bins on either side that a peak is compared with
# A drawing's edges are ridges in the spectrum, through its origin; they continue along one of
# these directions, which a peak does not.
_DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1), (1, 2), (2, 1), (1, -2), (2, -1))


def artefacts(image: np.ndarray) -> tuple[float, float]:
    """Strength of high frequencies and of grids in one image, uint8 [H, W, 3].

    Returns:
        high_frequency: the share of the luminance's power above half the Nyquist frequency, 0 to 1.
        grid: the contrast of periodic patterns with a period of at most 16 pixels: the root mean
            square of their luminance, 0 to 1; near 0 without a pattern.
    """
    power = _power(image.astype(np.float32) @ _LUMINANCE / 255)
    height, width = power.shape
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    share = power[radius > _HALF_NYQUIST].sum() / (power.sum() + _INVISIBLE)
    rows, columns = np.nonzero(radius >= _COARSEST)
    for direction in _DIRECTIONS:  # most bins drop out at once
        around = np.median(power[_line(rows, columns, direction, power.shape)], axis=0)
        peaks = power[rows, columns] > _PEAK * around
        rows, columns = rows[peaks], columns[peaks]
    return float(share), float(np.sqrt(power[rows, columns].sum()))


def _power(light: np.ndarray) -> np.ndarray:
    """Power spectrum of overlapping tiles, averaged (Welch); it adds up to the variance.

    float32 [H, W] to float64 [min(H, 64), min(W, 64)], in the FFT's order.
    """
    shape = height, width = min(_TILE, light.shape[0]), min(_TILE, light.shape[1])
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
    places = [_starts(size, tile) for size, tile in zip(light.shape, shape, strict=True)]
    tiles = np.lib.stride_tricks.sliding_window_view(light, shape)[np.ix_(*places)]
    tiles = tiles.reshape(-1, height, width)
    mean = (tiles * window).sum(axis=(1, 2), keepdims=True) / window.sum()
    spectra = np.fft.fft2((tiles - mean) * window)
    power: np.ndarray = (spectra.real**2 + spectra.imag**2).mean(axis=0)
    return power / (height * width * (window**2).sum())


def _starts(size: int, tile: int) -> np.ndarray:
    """Where tiles begin that cover `size` pixels and overlap by half or more: int64 [n]."""
    count = 1 + -(-2 * (size - tile) // tile)
    return np.linspace(0, size - tile, count).round().astype(np.int64)


def _line(
    rows: np.ndarray, columns: np.ndarray, direction: tuple[int, int], shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the bins on a line through each of N bins: int64 [9, N] each."""
    steps = np.arange(-_REACH, _REACH + 1)[:, None]
    down, across = (np.rint(steps * d / max(map(abs, direction))).astype(int) for d in direction)
    return (rows + down) % shape[0], (columns + across) % shape[1]
