"""What changes during the training, as functions of the tokens seen."""

import math


def learning_rate(tokens: int, *, peak: float, end: int, warmup: int, decay: float, kind: str = "linear") -> float:
    """Linear rise over `warmup` tokens, constant, fall over the last `decay` tokens before `end`.

    >>> [learning_rate(t, peak=1.0, end=100, warmup=10, decay=20.0) for t in (5, 50, 90, 100)]
    [0.5, 1.0, 0.5, 0.0]

    Args:
        tokens: Seen at the end of the step; so the first step moves already and the last one hardly.
        end: Tokens that will have been seen when the training ends.
        kind: linear or cosine to zero; constant does not fall.
    """
    rise = min(1.0, tokens / warmup) if warmup else 1.0
    left = min(1.0, max(0.0, end - tokens) / decay) if decay else 1.0
    fall = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[kind]
    return peak * min(rise, fall)


def interpolate(tokens: int, *, start: float, final: float, over: float) -> float:
    """Linear from `start` to `final` over the first `over` tokens, then constant.

    >>> interpolate(25, start=0.0, final=2.0, over=100.0)
    0.5
    """
    return final if tokens >= over else start + (final - start) * tokens / over
