"""Recurrent networks on long sequences: cells and layers."""

from ._cells import LEMCell as LEMCell
from ._layer import AbstractRecurrentLayer as AbstractRecurrentLayer
from ._rnn import (
    RNN as RNN,
    Bidirectional as Bidirectional,
    MultiHeadGRU as MultiHeadGRU,
)
