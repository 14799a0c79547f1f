"""A policy in Gymnasium's own simulation, so that what is reported is not our simulator's."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from tasks.dynamics.mujoco_physics import EPISODE, make_environment

if TYPE_CHECKING:
    from tasks.dynamics.control import Control


class Returns(NamedTuple):
    """Of each rollout ``[policies, rollouts]``: the sum of its rewards, and how long it was."""

    total: jax.Array
    length: jax.Array


def gymnasium_returns(control: "Control", num_rollouts: int) -> Callable[[Any, Any], Returns]:
    """``(thetas, seed) -> Returns``, jittable: the policies act in JAX, Gymnasium simulates.

    Args:
      control: the environment and the policy.
      num_rollouts: of each policy; those of one number start alike, from ``seed`` plus it.

    ``thetas`` has a leading axis ``[policies]``, ``seed`` is an int32 scalar.

    Raises:
      ValueError: if the extra ``control`` is not installed.
    """
    act = control.acting()[0]
    num_observed = control.num_observed()
    environments: list[Any] = []
    ended = np.zeros(0, bool)

    def reset(seed, num):
        nonlocal ended
        while len(environments) < num:
            environments.append(make_environment(control.environment))
        ended = np.zeros(num, bool)
        starts = [environments[i].reset(seed=int(seed) + i % num_rollouts)[0] for i in range(num)]
        return np.stack(starts).astype(np.float32)

    def step(actions):
        """Observations, rewards, and which episodes were going on; those that ended stay so."""
        actions = np.asarray(actions)
        going = ~ended
        observations = np.zeros((len(actions), num_observed), np.float32)
        rewards = np.zeros(len(actions), np.float32)
        for i in np.flatnonzero(going):
            found = environments[i].step(actions[i].astype(np.float64))
            observations[i], rewards[i] = found[0], found[1]
            ended[i] = found[2] or found[3]
        return observations, rewards, going

    def returns(thetas, seed):
        num = jax.tree.leaves(thetas)[0].shape[0] * num_rollouts
        each = jax.tree.map(lambda x: jnp.repeat(x, num_rollouts, axis=0), thetas)
        observed = jax.ShapeDtypeStruct((num, num_observed), jnp.float32)
        numbers = jax.ShapeDtypeStruct((num,), jnp.float32)
        flags = jax.ShapeDtypeStruct((num,), jnp.bool_)
        call = partial(io_callback, ordered=True)
        start = call(lambda seed: reset(seed, num), observed, seed)
        seen = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (num, *jnp.shape(x))), control.nothing_seen()
        )

        def body(carry, _):
            observations, seen, total, length = carry
            actions, seen = jax.vmap(act)(each, seen, observations)
            observations, rewards, going = call(step, (observed, numbers, flags), actions)
            return (observations, seen, total + rewards, length + going), None

        zeros = jnp.zeros(num, jnp.float32)
        carry = (start, seen, zeros, jnp.zeros(num, jnp.int32))
        (_, _, total, length), _ = jax.lax.scan(body, carry, length=EPISODE)
        return Returns(total.reshape(-1, num_rollouts), length.reshape(-1, num_rollouts))

    return returns


class Trajectory(NamedTuple):
    """One episode: positions ``[T + 1, nq]``, rewards ``[T]``, frames ``[F, H, W, 3]`` or none."""

    positions: np.ndarray
    rewards: np.ndarray
    frames: list[np.ndarray]


def trajectory(
    control: "Control",
    theta: Any,
    seed: int,
    *,
    num_frames: int = 0,
    size: tuple[int, int] = (240, 320),
) -> Trajectory:
    """An episode of a policy in Gymnasium's simulation.

    Args:
      num_frames: images to render, spread over the episode; they need a renderer (the variable
        MUJOCO_GL: ``egl`` or ``osmesa`` where there is no screen).
      size: height and width of an image.
    """
    options = {"render_mode": "rgb_array", "height": size[0], "width": size[1]}
    environment = make_environment(control.environment, **(options if num_frames else {}))
    act = jax.jit(control.acting()[0])
    seen = control.nothing_seen()
    observation, _ = environment.reset(seed=seed)
    data = environment.unwrapped.data
    positions, rewards, frames = [data.qpos.copy()], [], []
    due = set(np.linspace(0, EPISODE - 1, num_frames, dtype=int).tolist())
    for step in range(EPISODE):
        if step in due:
            frames.append(environment.render())
        action, seen = act(theta, seen, observation.astype(np.float32))
        observation, reward, ended, _, _ = environment.step(np.asarray(action, np.float64))
        positions.append(data.qpos.copy())
        rewards.append(reward)
        if ended:
            break
    environment.close()
    return Trajectory(np.stack(positions), np.array(rewards), frames)
