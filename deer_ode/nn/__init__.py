"""Recurrent networks on long sequences: cells, layers and a classifier."""

from ._cells import LEMCell as LEMCell
from ._classifier import (
    Classification as Classification,
    ResidualClassifier as ResidualClassifier,
)
from ._layer import AbstractRecurrentLayer as AbstractRecurrentLayer
from ._rnn import (
    RNN as RNN,
    Bidirectional as Bidirectional,
    MultiHeadGRU as MultiHeadGRU,
)
