"""Numbers and tokens as people read them; the same rules as `static/base.js`, for what is rendered ahead."""

import math

Real = int | float
"""JSON writes whole numbers without a point, so both occur everywhere."""


def number(value: Real | None, digits: int = 3) -> str:
    """Significant digits, no exponent in the usual range.

    >>> number(0.98765), number(1234567.0), number(0.00012), number(None), number(12.0)
    ('0.988', '1.2e6', '1.2e-4', '–', '12')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e5 or size < 10.0**-digits:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{float(f'{value:.{digits}g}'):.10g}"


def percent(value: Real | None, digits: int = 0) -> str:
    """A share in percent.

    >>> percent(0.1234), percent(0.1234, 1), percent(None)
    ('12%', '12.3%', '–')
    """
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}%"


def count(value: Real) -> str:
    """A whole number with separators.

    >>> count(1234567)
    '1,234,567'
    """
    return f"{value:,.0f}"


def duration(seconds: Real) -> str:
    """Time in the two largest units.

    >>> duration(0.25), duration(7.26), duration(75), duration(3700), duration(180000)
    ('0.2 s', '7.3 s', '1 min 15 s', '1 h 1 min', '50 h 0 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(n_bytes: Real) -> str:
    """Bytes in decimal units.

    >>> size(512), size(1_500_000), size(2_340_000_000)
    ('512 B', '1.5 MB', '2.34 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            return f"{number(n_bytes)} {unit}"
        n_bytes /= 1000
    return f"{number(n_bytes)} TB"


def following(text: str) -> str:
    r"""A token as it continues a text: its space stays a space, line breaks become visible.

    >>> following(" Austin"), following("\n")
    (' Austin', '⏎')
    """
    return text.replace("\r\n", "⏎").replace("\n", "⏎").replace("\t", "⇥")


def shown(text: str) -> str:
    r"""A token with the characters one cannot see made visible.

    >>> shown(" Austin"), shown("a\nb")
    ('·Austin', 'a⏎b')
    """
    text = following(text)
    stripped = text.strip(" ")
    start = len(text) - len(text.lstrip(" "))
    return "·" * start + stripped + "·" * (len(text) - start - len(stripped))
