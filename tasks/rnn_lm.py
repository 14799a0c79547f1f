"""A recurrent language model."""

from dataclasses import dataclass

import flax.linen as nn

from tasks.arguments import check_count, check_name
from tasks.data.symbols import VOCABULARY
from tasks.initializers import orthogonal
from tasks.language_model import LanguageModel

CELLS = {"gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}


@dataclass(frozen=True)
class RecurrentLM(LanguageModel):
    """An embedding, a recurrent layer that starts at 0 in each window, and a linear output.

    Attributes:
      cell: gru or lstm.
      width: of the embedding.
      hidden_size: of the recurrent state.
    """

    cell: str = "gru"
    width: int = 16
    hidden_size: int = 32

    def __post_init__(self):
        super().__post_init__()
        check_count(width=self.width, hidden_size=self.hidden_size)
        check_name(CELLS, cell=self.cell)

    def module(self) -> nn.Module:
        return _Network(self.cell, self.width, self.hidden_size)


class _Network(nn.Module):
    cell: str
    width: int
    hidden_size: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, use_bias=False)(x)
        cell = CELLS[self.cell](self.hidden_size, recurrent_kernel_init=orthogonal)
        x = nn.RNN(cell)(x)
        return nn.Dense(VOCABULARY)(x)
