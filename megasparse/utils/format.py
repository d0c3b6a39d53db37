"""Numbers as people read them: counts, FLOPs, bytes, seconds and shares, for the console and the report.

Every function takes a number or None and returns a short string; what is not a finite number becomes ``MISSING``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MISSING = "n/a"

_DECIMAL = ("", "K", "M", "B", "T")
_FLOPS = ("FLOPs", "KFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs", "ZFLOPs")
_BYTES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def finite(value: Any) -> float | None:
    """`value` as a float, or None where it is not a finite number (booleans are no numbers)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def format_count(value: Any) -> str:
    """Parameters or tokens with three digits: 124400000 -> `124 M`."""
    return _scaled(value, 1000.0, _DECIMAL)


def format_flops(value: Any) -> str:
    """Floating-point operations with three digits: 3.2e15 -> `3.20 PFLOPs`."""
    return _scaled(value, 1000.0, _FLOPS)


def format_bytes(value: Any) -> str:
    """Bytes in powers of 1,024: 3221225472 -> `3.00 GiB`."""
    return _scaled(value, 1024.0, _BYTES)


def format_integer(value: Any) -> str:
    """A whole number with separators: 12345 -> `12,345`."""
    number = finite(value)
    return MISSING if number is None else f"{number:,.0f}"


def format_decimal(value: Any, digits: int = 3) -> str:
    """A fixed number of decimals, for losses."""
    number = finite(value)
    return MISSING if number is None else f"{number:.{digits}f}"


def format_compact(value: Any) -> str:
    """Four significant digits, for learning rates and norms."""
    number = finite(value)
    return MISSING if number is None else f"{number:.4g}"


def format_share(value: Any) -> str:
    """A fraction as a percentage: 0.274 -> `27.4 %`."""
    number = finite(value)
    if number is None:
        return MISSING
    percent = 100.0 * number
    if 0.0 < abs(percent) < 0.1:
        return f"{percent:.2g} %"
    return f"{percent:.1f} %".replace(".0 %", " %")


def format_factor(value: Any) -> str:
    """A ratio: 3.6512 -> `3.65x`."""
    number = finite(value)
    return MISSING if number is None else f"{number:.3g}x"


def format_seconds(value: Any) -> str:
    """A duration with its two largest units: 5025 -> `1 h 24 min`."""
    number = finite(value)
    if number is None:
        return MISSING
    if number == 0.0:
        return "0 s"
    if number < 1.0:
        return f"{1000.0 * number:.3g} ms"
    if number < 59.95:
        return f"{number:.1f} s"
    seconds = round(number)
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    minutes = round(number / 60.0)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(number / 3600.0)
    return f"{hours // 24} d {hours % 24:02d} h"


def format_phase(name: Any) -> str:
    """The name of a phase in words: `ultra_sparse` -> `ultra-sparse`."""
    return str(name).replace("_", "-")


def divide(numerator: Any, denominator: Any) -> float | None:
    """The quotient, or None where it is undefined."""
    above, below = finite(numerator), finite(denominator)
    return None if above is None or not below else above / below


def _scaled(value: Any, base: float, units: tuple[str, ...]) -> str:
    number = finite(value)
    if number is None:
        return MISSING
    index = 0
    # 999.5 would round to a fourth digit, so it already belongs to the next unit.
    while abs(number) >= 0.9995 * base and index < len(units) - 1:
        number /= base
        index += 1
    if index == 0:
        return f"{number:,.0f} {units[0]}".strip()
    digits = 2 if abs(number) < 9.995 else 1 if abs(number) < 99.95 else 0
    return f"{number:.{digits}f} {units[index]}"


def describe_kernel(row: Mapping[str, Any]) -> str:
    """A row of the plan's table of kernels: `12 x mlp.up 768 x 3072, blocks of 64: cpu, dense above density 80 %`."""
    unit, limit = row.get("block_size"), finite(row.get("break_even"))
    units = "single weights" if unit == 1 else f"blocks of {unit}"
    shape = f"{row.get('count')} x {row.get('layer')} {row.get('in')} -> {row.get('out')}, {units}"
    kernel = f"{row.get('kernel')} at density {format_share(row.get('density'))}"
    return f"{shape}: {kernel}" + (f", dense above {format_share(limit)}" if limit is not None else "")
