"""What changes during the training, as functions of the tokens seen."""


def learning_rate(tokens: int, *, peak: float, total: int, warmup: int, decay_share: float) -> float:
    """Linear rise over `warmup` tokens, constant, linear fall to zero over the last `decay_share` of `total`.

    >>> [learning_rate(t, peak=1.0, total=100, warmup=10, decay_share=0.2) for t in (5, 50, 90, 100)]
    [0.5, 1.0, 0.5, 0.0]

    Args:
        tokens: Seen at the end of the step; so the first step moves already and the last one hardly.
    """
    rise = min(1.0, tokens / warmup) if warmup else 1.0
    decay = decay_share * total
    fall = min(1.0, (total - tokens) / decay) if decay else 1.0
    return peak * min(rise, fall)


def ramp(tokens: int, *, final: float, total: int) -> float:
    """Linear from zero to `final` over the whole training.

    >>> ramp(25, final=2.0, total=100)
    0.5
    """
    return final * min(1.0, tokens / total)
