"""Noise levels of a run: as schedulers space them, and lists of any kind."""

import math


def linear(steps):
    """Sigmas from 1 to 0 whose progress is 1 - sigma."""
    return [1 - i / steps for i in range(steps + 1)]


def shifted(steps, shift=5.0):
    """Sigmas as flow models with a shift space them."""
    return [shift * s / (1 + (shift - 1) * s) for s in linear(steps)]


def unshift(sigma, shift=5.0):
    return 1 - sigma / (shift - (shift - 1) * sigma)


def rising(steps):
    """As FlipSigmas makes them for a run that adds noise; the node lifts the first from 0."""
    return [1e-4, *linear(steps)[::-1][1:]]


RESTART = [1.0, 0.8, 0.6, 0.3, 0.8, 0.5, 0.2, 0.0]
LISTS = {
    "restart": RESTART,
    "two phases": rising(10) + linear(10)[1:],
    "restart of a slice": [0.5, 0.2, 0.5, 0.2, 0.0],
    "equal": [0.7] * 9,
    "repeated": [1.0, 0.8, 0.8, 0.8, 0.5, 0.5, 0.0],
    "repeated at the ends": [1.0, 1.0, 0.5, 0.0, 0.0],
    "many": linear(3000),
    "many rising": rising(1500),
    "many of a slice": linear(4000)[1000:3200],
    "many, close": [1 - i * 1e-7 for i in range(5000)],
    "not finite": [math.inf, 1.0, math.nan, 0.0],
    "below zero": [1.0, 0.0, -1.0],
}
