"""Sliders: find directions in what a model makes, calibrate what was trained, and say what is known about it."""

from .calibration import (
    Axis,
    Bench,
    Calibration,
    CalibrationConfig,
    Point,
    additivity,
    axis_along,
    axis_between,
    bake,
    calibrate,
)
from .card import SliderCard, card, from_metadata, random_strengths
from .directions import Directions, find_directions, name_of, poles
from .embedding import own_features
from .instant import Instant, Joining
from .pool import VARIATIONS, Pool, PoolBatches, Sampling, draw_pool, embedded, variations

__all__ = [
    "VARIATIONS",
    "Axis",
    "Bench",
    "Calibration",
    "CalibrationConfig",
    "Directions",
    "Instant",
    "Joining",
    "Point",
    "Pool",
    "PoolBatches",
    "Sampling",
    "SliderCard",
    "additivity",
    "axis_along",
    "axis_between",
    "bake",
    "calibrate",
    "card",
    "draw_pool",
    "embedded",
    "find_directions",
    "from_metadata",
    "name_of",
    "own_features",
    "poles",
    "random_strengths",
    "variations",
]
