"""Stored numbers of tokens as arrays with a row per token, and moving those rows about."""

import math

import numpy as np
from jaxtyping import Int, Shaped

Rows = dict[tuple[str, str], Shaped[np.ndarray, "token ..."]]
"""Stored numbers of some tokens: (place, array) -> values."""


def scatter_rows(
    target: Shaped[np.ndarray, "token ..."],
    where: Int[np.ndarray, " row"],
    rows: Shaped[np.ndarray, "row ..."],
) -> None:
    """target[where] = rows, each row as plain bytes: faster than number by number."""
    kind = np.dtype((np.void, math.prod(target.shape[1:]) * target.itemsize))
    source = np.ascontiguousarray(rows).reshape(len(rows), -1).view(kind)
    target.reshape(len(target), -1).view(kind)[where, 0] = source[:, 0]
