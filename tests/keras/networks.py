"""Keras models as users write them. Imports Keras: only by the tests of `make test-keras`."""

from typing import Any

import keras
from keras import layers

from tidemill.tasks.training.models import Inputs


def functional(inputs: Inputs, dropout: float = 0.3) -> keras.Model:
    """Numbers beside embedded ids, with all that Keras keeps beside weights: statistics, and the state of random numbers.

    A Dropout without a seed draws from torch's random numbers, one with a seed from its own.
    """
    numbers = keras.Input((inputs.numbers,))
    ids = keras.Input((len(inputs.buckets) + sum(one.length for one in inputs.sequences),), dtype="int64")
    size = 1 + max([*inputs.buckets, *(one.buckets for one in inputs.sequences)])
    h = layers.Concatenate()([numbers, layers.Flatten()(layers.Embedding(size, 4)(ids))])
    h = layers.Dropout(dropout, seed=3)(layers.BatchNormalization()(h))
    h = layers.Dropout(dropout)(layers.Dense(16, activation="relu")(h))
    return keras.Model([numbers, ids], layers.Dense(inputs.outputs)(h))


def sequential(inputs: Inputs) -> keras.Model:
    """Has no weights before it is called; one layer is frozen."""
    return keras.Sequential(
        [
            layers.Dense(16, activation="relu", trainable=False),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Dense(inputs.outputs),
        ]
    )


class Subclassed(keras.Model):
    """Of a class that Keras does not know, with a layer that is used twice."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.first, self.again = layers.Dense(8), layers.Dense(8, activation="tanh")
        self.drop, self.last = layers.Dropout(0.2), layers.Dense(inputs.outputs)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.last(self.drop(self.again(self.again(self.first(x))), training=training))


def narrow(inputs: Inputs) -> keras.Model:
    """Wants one number more than there are."""
    numbers = keras.Input((inputs.numbers + 1,))
    return keras.Model(numbers, layers.Dense(inputs.outputs)(numbers))
