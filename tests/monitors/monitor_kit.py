"""Seeded streams for the tests of the monitors, and what they are fed with."""

import random


def noisy(level, n, *, seed, sigma=0.05):
    """A value for each of n readings: `level(at)`, or a number, plus normal noise."""
    noise = random.Random(seed)
    return [(level(at) if callable(level) else level) + noise.gauss(0, sigma) for at in range(n)]


def feed(monitor, values, *, start=0, armed=True):
    """What the monitor said of each value."""
    return [monitor.read(value, at=start + i, armed=armed) for i, value in enumerate(values)]


def trips(signals):
    return [signal.at for signal in signals if signal and signal.level == "trip"]


def first_trip(signals):
    return next((signal for signal in signals if signal and signal.level == "trip"), None)
