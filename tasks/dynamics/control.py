"""Control: a policy in a MuJoCo environment of Gymnasium, as an unrolled system.

Theta is the policy's; an episode is one of the environment, with Gymnasium's own model files,
starts, frame skip, rewards and termination, simulated by MJX, and the loss of a step is minus its
reward. There is no gradient through the physics: contacts and joint limits make it jump, so a
derivative of a step is refused, and every estimator that only evaluates the loss can be used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tasks.arguments import check_counts, check_flag, check_names
from tasks.base import Dynamics, Task, TaskConfig
from tasks.dynamics.gymnasium_rollouts import gymnasium_returns
from tasks.dynamics.mujoco_physics import (
    ENVIRONMENTS,
    Body,
    gymnasium_model,
    observe,
    physics,
    reward_of,
)
from tasks.dynamics.policies import POLICIES, Normalization, normalized


def no_derivative(name: str, function: Callable) -> Callable:
    """``function``, which raises a ``ValueError`` when a derivative of it is asked for."""
    refusing = jax.custom_jvp(function)

    @refusing.defjvp
    def refuse(primals, tangents):
        raise ValueError(
            f"`{name}` has no derivative to use: the physics jumps at contacts and joint limits, "
            "and its derivative is not that of the mean return; use an estimator that only "
            "evaluates the loss, such as `pes`, `nres`, `full_es` or `truncated_es`."
        )

    return refusing


class ControlState(NamedTuple):
    """Where an episode is.

    Attributes:
      body: the state of the physics; after the end of the episode, that of the end.
      alive: bool scalar, whether the episode goes on.
      seen: the policy's statistics of observations; ``()`` without normalization.
    """

    body: Body
    alive: jax.Array
    seen: Any


@dataclass(frozen=True)
class Control(TaskConfig):
    """A MuJoCo environment of Gymnasium and a policy for it; theta is the policy's.

    Attributes:
      environment: swimmer, hopper or half_cheetah.
      policy: linear (without bias, from zero), or mlp (tanh).
      hidden_sizes: of the policy mlp.
      normalize: whether the policy sees observations less their running mean over their running
        standard deviation, both of the episode so far (ARS V2 keeps those of all episodes, which
        are no state of an episode).
    """

    environment: str = "swimmer"
    policy: str = "linear"
    hidden_sizes: tuple[int, ...] = (32, 32)
    normalize: bool = False

    def __post_init__(self):
        check_names(ENVIRONMENTS, environment=self.environment)
        check_names(POLICIES, policy=self.policy)
        check_counts(hidden_sizes=self.hidden_sizes)
        check_flag(normalize=self.normalize)

    def make(self, data_dir: str | None = None) -> Task:
        raise ValueError(
            "`task`=control is no inner problem of an optimizer but a policy's; set trains=policy."
        )

    def dynamics(self) -> Dynamics:
        """The system, and the first theta.

        Raises:
          ValueError: if the extra is not installed.
        """
        model, frame_skip = gymnasium_model(self.environment)
        environment = ENVIRONMENTS[self.environment]
        simulate = physics(self.environment, bool(jax.config.values["jax_enable_x64"]))
        act, init_theta = self.acting()
        duration = frame_skip * model.opt.timestep
        rest = np.array(model.qpos0)
        noise = environment.start_noise

        def init(theta, key, horizon):
            del theta, horizon
            key_positions, key_velocities = jax.random.split(key)
            qpos = rest + jax.random.uniform(key_positions, rest.shape, minval=-noise, maxval=noise)
            if environment.normal_velocities:
                qvel = noise * jax.random.normal(key_velocities, (model.nv,))
            else:
                qvel = jax.random.uniform(key_velocities, (model.nv,), minval=-noise, maxval=noise)
            body = Body(qpos, qvel, jnp.zeros(model.nv))
            return ControlState(body, jnp.array(True), self.nothing_seen())

        def step(theta, state, key):
            del key
            action, seen = act(theta, state.seen, observe(environment, state.body))
            body = simulate(state.body, action)
            reward, ends = reward_of(environment, duration, state.body, body, action)
            if environment.healthy is None:
                return ControlState(body, state.alive, seen), -reward
            # After its end an episode rests where it ended, at no reward.
            new = ControlState(body, state.alive & ~ends, seen)
            kept = jax.tree.map(partial(jnp.where, state.alive), new, state)
            return kept, jnp.where(state.alive, -reward, 0.0)

        def evaluate(theta, num_episodes, seed):
            one = jax.tree.map(lambda x: x[None], theta)
            found = gymnasium_returns(self, num_episodes)(one, seed)
            return {"return": found.total.mean(), "episode_length": found.length.mean()}

        return Dynamics(
            init_theta, init, no_derivative(self.environment, step), evaluate, "minus reward"
        )

    def acting(self) -> tuple[Callable, Callable[[jax.Array], Any]]:
        """``(theta, seen, observation) -> (action, seen)``, and ``key -> theta``."""
        model, _ = gymnasium_model(self.environment)
        policy = POLICIES[self.policy](num_actions=model.nu, hidden_sizes=self.hidden_sizes)

        def act(theta, seen, observation):
            if self.normalize:
                seen, observation = normalized(seen, observation)
            return policy.apply(theta, observation), seen

        return act, lambda key: policy.init(key, jnp.zeros(self.num_observed()))

    def nothing_seen(self) -> Any:
        """The policy's statistics of observations at the start of an episode."""
        return Normalization.start(self.num_observed()) if self.normalize else ()

    def num_observed(self) -> int:
        """Numbers in an observation."""
        model, _ = gymnasium_model(self.environment)
        return model.nq - ENVIRONMENTS[self.environment].hidden + model.nv
