"""Ways to find a direction, one module a finder, all ending in the same kind of Direction."""

from __future__ import annotations

from steer_runtime.directions.finders.random import controls
from steer_runtime.directions.finders.recipe import OPENVLA_ALPHA, Recipe, of_neurons
from steer_runtime.directions.finders.token import CLUSTER_SIZE, from_neurons, from_words
from steer_runtime.directions.finders.word import dense_from_words

__all__ = [
    "CLUSTER_SIZE",
    "OPENVLA_ALPHA",
    "Recipe",
    "controls",
    "dense_from_words",
    "from_neurons",
    "from_words",
    "of_neurons",
]
