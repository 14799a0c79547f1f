"""The recurrent network of VeLO and Celo that looks at tensors, not at parameters."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from learned_opt.initializers import fan_in_normal
from learned_opt.progress import NUM_PROGRESS, LossAverages, init_averages, progress
from learned_opt.recurrent import LSTM, InitialState, LSTMState


class Controller(nn.Module):
    """``x <- W_2 x + max over tensors of relu(W_1 x)``, an LSTM, and two linear heads.

    Attributes:
      hidden_size: of all layers.
      num_controls: numbers that come out for a tensor beside its rate; 0: no such head.
    """

    hidden_size: int
    num_controls: int

    def setup(self):
        dense = partial(nn.Dense, kernel_init=fan_in_normal)
        # The authors' code computes a layer and overwrites it. It counts, and is in their files.
        self.overwritten, self.pooled, self.own = (dense(self.hidden_size) for _ in range(3))
        self.initial_state = InitialState(self.hidden_size)
        self.lstm = LSTM(self.hidden_size)
        self.rate = dense(1)
        if self.num_controls:
            self.controls = dense(self.num_controls)

    def start(self, num_tensors: int) -> LSTMState:
        return self.initial_state(num_tensors)

    def __call__(
        self, inputs: jax.Array, state: LSTMState | None = None
    ) -> tuple[jax.Array | None, jax.Array, LSTMState]:
        """``[tensors, inputs]`` to controls ``[tensors, num_controls]``, rates ``[tensors]``."""
        if state is None:
            state = self.start(len(inputs))
        self.overwritten(inputs)
        pooled = jnp.max(jax.nn.relu(self.pooled(inputs)), axis=0, keepdims=True)
        state = self.lstm(self.own(inputs) + pooled, state)
        controls = self.controls(state.hidden) if self.num_controls else None
        return controls, self.rate(state.hidden)[:, 0], state


class SchedulerState(NamedTuple):
    """State of a scheduler.

    Attributes:
      steps: int32 scalar, updates done.
      averages: of the loss.
      lstm: of one tensor: all see, and do, the same.
    """

    steps: jax.Array
    averages: LossAverages
    lstm: LSTMState


class Scheduler(NamedTuple):
    """Celo's: a multiplier of the step, ``0.1 exp(rate)``, from progress and loss alone.

    The authors' has it for every tensor, from equal inputs and states: this is one of them.
    """

    controller: Controller

    def init(self, key: jax.Array) -> Any:
        """Weights, a Flax module's variables."""
        return self.controller.init(key, jnp.zeros((1, NUM_PROGRESS)))

    def start(self, weights: Any, dtype: Any) -> SchedulerState:
        """Before the first step, in that type."""
        lstm: Any = self.controller.apply(weights, 1, method="start")
        lstm = jax.tree.map(lambda x: x.astype(dtype), lstm)
        return SchedulerState(jnp.zeros([], jnp.int32), init_averages(dtype), lstm)

    def advance(
        self, weights: Any, state: SchedulerState, loss: jax.Array, num_steps: Any
    ) -> tuple[jax.Array, SchedulerState]:
        """The multiplier of this step."""
        features, averages = progress(state.averages, loss, state.steps, num_steps)
        out: Any = self.controller.apply(weights, features[None], state.lstm)
        _, rates, lstm = out
        return 0.1 * jnp.exp(rates[0]), SchedulerState(state.steps + 1, averages, lstm)


def state_dtype(params: Any) -> Any:
    """Of what is remembered of no single tensor: float64 if a parameter is."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(params))
