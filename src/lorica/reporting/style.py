"""Style of tables and figures: colours, fonts, spacing of labels, and formats of numbers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal

INK, MUTED, RULE, PAPER = "#1f2933", "#5f6b76", "#d9dee3", "#ffffff"

# Okabe and Ito's colour-blind-safe palette, with a dark wine red instead of yellow, which is too light on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4a1540")
DASHES: tuple[tuple[int, tuple[float, ...]], ...] = ((0, ()), (0, (5, 2)), (0, (1.5, 1.5)))
FACTOR_COLOURS = {"A": "#2f6d9c", "B": "#f3cb80", "AB": "#4a1540", "R": "#009e73", "": "#eceff1"}
FACTOR_NAMES = {"A": "A", "B": "B", "AB": "A and B", "R": "R", "": "neither"}

# The position of a method in this list determines its colour, so that built-in methods look the same in every report.
# Other methods get a position from their name.
_FIXED_PLACES = (
    *("as-lora", "ffa-lora", "ro-lora", "la-lora", "fed-avg", "fedask", "random-lora"),
    *("fedsvd", "flex-lora", "flora", "fedex-lora", "lora-fair", "fedsa-lora", "het-lora"),
    *("fed-rac-lora", "deer", "fed-sb", "fedrot-lora", "galore-avg", "head-only"),
)

RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    # Names may contain dollar signs, which are not formulas.
    "text.parse_math": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.major.width": 0.8,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "lorica",
}


@dataclass(frozen=True)
class Look:
    """Colour and dashes of a method's lines. `text` is a shade of the colour that is dark enough for text."""

    colour: str
    dashes: tuple[int, tuple[float, ...]]

    @property
    def text(self) -> str:
        return _readable(self.colour)


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """A look per method, all different for up to 21 methods, and the same for a method in every figure.

    Only a method without a fixed position can change its look, if another method has taken its position.
    """
    count = len(COLOURS) * len(DASHES)
    places: dict[str, int] = {}
    names = sorted(set(methods))
    for name in [*(n for n in names if n in _FIXED_PLACES), *(n for n in names if n not in _FIXED_PLACES)]:
        fixed = name in _FIXED_PLACES
        place = _FIXED_PLACES.index(name) if fixed else zlib.crc32(name.encode()) % len(COLOURS)
        while place in places.values() and len(places) < count:
            place = (place + 1) % count
        places[name] = place
    return {name: Look(COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS)]) for name, place in places.items()}


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Least-squares positions closest to `values`, in the same order, at least `gap` apart and within the bounds.

    If the bounds are too narrow, the gap is kept and the upper bound is exceeded.
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    # With y_i = u_i + i·gap, the gaps require that u is non-decreasing: u is the isotonic regression of v_i − i·gap.
    blocks: list[list[float]] = []
    for rank, index in enumerate(order):
        blocks.append([values[index] - rank * gap])
        while len(blocks) > 1 and _mean(blocks[-2]) > _mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    levels = [_mean(block) for block in blocks for _ in block]
    top = max(low, high - (len(values) - 1) * gap)
    positions = [0.0] * len(values)
    for rank, index in enumerate(order):
        positions[index] = min(max(levels[rank], low), top) + rank * gap
    return positions


def shortened(text: str, most: int = 30) -> str:
    """The text or, if it is longer than `most` characters, its beginning and end around "…"."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - (most - most // 2 - 1) :]}"


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def percent(share: float | None, digits: int = 1) -> str:
    """0.894 as "89.4 %"; None as a dash."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def points(difference: float, digits: int = 1) -> str:
    """0.164 as "+16.4 points": a difference between two percentages is not a percentage."""
    text = f"{100 * difference:+.{digits}f}".replace("-", "−")
    return f"{text} points"


def rounded_up(value: float | None) -> str:
    """A cost to two decimals (two significant digits below 0.1), never rounded down: 2.991 is "3.00", 1e-5 is "1e-5".

    None is a dash, infinity "∞".
    """
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "∞"
    number = Decimal(repr(float(value)))
    if value >= 0.1 or value == 0:
        return f"{number.quantize(Decimal('0.01'), ROUND_CEILING):f}"
    upper = number.quantize(Decimal(1).scaleb(number.adjusted() - 1), ROUND_CEILING)
    return f"{float(upper):g}".replace("e-0", "e-")


def duration(seconds: float | None) -> str:
    """A time in a suitable unit: "3.5 ms", "0.05 s", "42 s", "3.5 min", "2.1 h"; None as a dash."""
    if seconds is None:
        return "–"
    for limit, divisor, unit in ((0.00995, 0.001, "ms"), (99.5, 1, "s"), (5970, 60, "min"), (math.inf, 3600, "h")):
        if seconds < limit:
            value = seconds / divisor
            return f"{value:.{0 if value >= 9.95 else 1 if value >= 0.95 else 2}f} {unit}"
    return "∞"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _readable(colour: str) -> str:
    """The colour, darkened until its contrast on white is 4.5:1 (WCAG AA)."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    while 1.05 / (_luminance(red, green, blue) + 0.05) < 4.5:
        red, green, blue = 0.97 * red, 0.97 * green, 0.97 * blue
    return "#" + "".join(f"{round(255 * part):02x}" for part in (red, green, blue))


def _luminance(red: float, green: float, blue: float) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
