"""Recurrent networks on long sequences: cells, layers and a classifier."""

from ._cells import LEMCell as LEMCell
from ._classifier import (
    Classification as Classification,
    ResidualClassifier as ResidualClassifier,
    mean_and_max as mean_and_max,
    mean_and_std as mean_and_std,
)
from ._layer import AbstractRecurrentLayer as AbstractRecurrentLayer
from ._rnn import (
    RNN as RNN,
    Bidirectional as Bidirectional,
    MultiHeadGRU as MultiHeadGRU,
)
