"""How many wait in front of something that is busy for a part of the time: convex in the load alone, which is what makes bounds possible.

For `c` servers at utilisation `u` and Poisson arrivals of equal jobs the mean number of waiting jobs is close to

    u ** sqrt(2 * (c + 1)) / (2 * (1 - u))

It is exact for one server (M/D/1, Pollaczek-Khinchine). For more it is Sakasegawa's approximation of M/M/c (An approximation formula
L_q = alpha * rho^beta / (1 - rho), Annals of the Institute of Statistical Mathematics 29, 1977), halved because service times are constant
(the M/G/c correction by Lee and Longton, 1959). Arrivals that are more or less variable make it so many times as much as the squared
coefficient of variation of the times between them says (Allen and Cunneen's approximation of G/G/c; 1 for Poisson).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

_STEPS = 60


def exponent(servers: float) -> float:
    """The power of the utilisation in the formula, for a number of servers (at least 1)."""
    return math.sqrt(2.0 * (max(servers, 1.0) + 1.0))


def waiting(load: float, power: float) -> float:
    """Mean number of waiting jobs at a utilisation in [0, 1)."""
    return float(0.5 * load**power / (1.0 - load))


def waiting_all(load: Array, power: Array) -> Array:
    """`waiting`, for arrays."""
    result: Array = 0.5 * load**power / (1.0 - load)
    return result


def slope(load: Array, power: Array) -> Array:
    """Derivative of `waiting` by the load; what rounding has brought below 0 is 0."""
    load = np.maximum(load, 0.0)
    rest = 1.0 - load
    result: Array = 0.5 * load ** (power - 1.0) * (power * rest + load) / (rest * rest)
    return result


def conjugate(price: Array, power: Array, limit: Array) -> tuple[Array, Array]:
    """The load in [0, limit] that maximises `price * load - waiting(load)`, and that maximum (the convex conjugate).

    The difference is concave, so bisection on its slope finds the maximum; what is left of the interval changes the value by less than
    rounding does.
    """
    low, high = np.zeros_like(price), limit.copy()
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        rising = slope(middle, power) < price
        low, high = np.where(rising, middle, low), np.where(rising, high, middle)
    load = np.where(price <= 0, 0.0, np.where(slope(limit, power) <= price, limit, 0.5 * (low + high)))
    return load, price * load - waiting_all(load, power)
