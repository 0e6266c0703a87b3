"""Bytes as text, and text as bytes: one way of both for every command. MB and GB are powers of ten."""

from __future__ import annotations

import math

from graftc.diagnostics import fail

_UNITS = {"": 1, "b": 1, "k": 1e3, "kb": 1e3, "m": 1e6, "mb": 1e6, "g": 1e9, "gb": 1e9, "t": 1e12, "tb": 1e12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


def read_size(text: str | int, site: str) -> int:
    """Bytes from `8GB`, `512MiB` or a plain number. Raises GraftError (G590) for anything else.

    >>> read_size("1.5GB", "--memory"), read_size("2 KiB", "--memory")
    (1500000000, 2048)
    """
    if isinstance(text, int):
        return text
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(number) :].strip().lower()
    try:
        size = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        size = -1.0
    if not (math.isfinite(size) and size > 0):
        fail("G590", f"`{text}` is no size", site=site, wanted="bytes: 8GB, 512MiB, 1000000",
             found=text)  # fmt: skip
    return int(size)


def size_text(size: int) -> str:
    """`1.50 GB`; without the space, `read_size` and a shell read it as one word.

    >>> size_text(1_500_000_000), size_text(2_100)
    ('1.50 GB', '0.01 MB')
    """
    return f"{size / 1e9:.2f} GB" if size >= 5e8 else f"{math.ceil(size / 1e4) / 100:.2f} MB"
