"""MuJoCo environments of Gymnasium: what their classes say, and their physics in MJX.

MuJoCo, MJX and Gymnasium are the extra ``control``; importing this module needs none of them.
"""

import contextlib
import importlib
import io
import logging
import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

EPISODE = 1000  # Steps, after which Gymnasium ends an episode of any of these.


class Environment(NamedTuple):
    """What Gymnasium's class of an environment says beside its model file.

    Attributes:
      id: in Gymnasium's registry.
      threshold: the return from which its registry calls the task solved.
      hidden: leading positions that are not observed.
      control_cost: of an action's squared norm, each step.
      start_noise: of the start: positions are uniform within it.
      normal_velocities: whether starting velocities are normal with that standard deviation,
        rather than uniform.
      speed_limit: observed velocities are clipped to it.
      healthy: None, or ``(qpos, qvel) -> bool``: the first state without it ends the episode, and
        each one with it is worth 1.
    """

    id: str
    threshold: float
    hidden: int
    control_cost: float
    start_noise: float
    normal_velocities: bool = False
    speed_limit: float = math.inf
    healthy: Callable[[jax.Array, jax.Array], jax.Array] | None = None


def _upright(qpos: jax.Array, qvel: jax.Array) -> jax.Array:
    """Whether the hopper stands: its height, its angle, and no value beyond 100."""
    others = jnp.concatenate([qpos[2:], qvel])
    return jnp.all(jnp.abs(others) < 100) & (qpos[1] > 0.7) & (jnp.abs(qpos[2]) < 0.2)


ENVIRONMENTS = {
    "swimmer": Environment("Swimmer-v5", 360.0, 2, 1e-4, 0.1),
    "hopper": Environment("Hopper-v5", 3800.0, 1, 1e-3, 5e-3, speed_limit=10.0, healthy=_upright),
    "half_cheetah": Environment("HalfCheetah-v5", 4800.0, 1, 0.1, 0.1, normal_velocities=True),
}

# What to look for, and its name among packages.
NEEDED = {"gymnasium": "gymnasium", "mujoco": "mujoco", "mujoco.mjx": "mujoco-mjx"}


def missing() -> list[str]:
    """The packages of the extra that are not installed."""
    absent = []
    for module, package in NEEDED.items():
        parent = module.partition(".")[0]
        if find_spec(parent) is None or find_spec(module) is None:
            absent.append(package)
    return absent


def check_installed() -> None:
    """Raises ``ValueError`` unless the extra is installed."""
    if absent := missing():
        raise ValueError(
            f"control needs MuJoCo, MJX and Gymnasium ({', '.join(absent)} missing); install them "
            "in the folder of the repository with `make setup EXTRAS=control`, or `pip install "
            "'.[control]'`."
        )


def load_mjx() -> ModuleType:
    """``mujoco.mjx``, without its remarks on a back end that we do not use."""
    check_installed()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return importlib.import_module("mujoco.mjx")
    finally:
        logging.disable(before)


@cache
def gymnasium_model(environment: str) -> tuple[Any, int]:
    """The ``mujoco.MjModel`` of Gymnasium's own environment, and its frame skip."""
    made = make_environment(environment).unwrapped
    return made.model, made.frame_skip


def make_environment(environment: str, **options: Any) -> Any:
    """Gymnasium's environment, with its limit of 1,000 steps; ``options`` are its own.

    Raises:
      ValueError: if the extra is not installed.
    """
    check_installed()
    gymnasium = importlib.import_module("gymnasium")
    return gymnasium.make(ENVIRONMENTS[environment].id, disable_env_checker=True, **options)


class Body(NamedTuple):
    """The state of the physics: positions, velocities, and where the constraint solver starts."""

    qpos: jax.Array
    qvel: jax.Array
    warm_start: jax.Array


Physics = Callable[[Body, jax.Array], Body]

# Of MJX's line search, which does not stop when it has converged: it runs as many iterations as
# the model allows, 50, where a piecewise quadratic along a line of this few pieces needs fewer.
LINE_SEARCH = {"swimmer": 6, "hopper": 50, "half_cheetah": 50}


@cache
def physics(environment: str, x64: bool, line_search: int | None = None) -> Physics:
    """``(body, controls) -> body``: the physics of one step of the environment, by MJX.

    The classical Runge-Kutta method is written out as a loop over stages here, with ``mjx.forward``
    in it once where ``mjx.step`` has it four times: it compiles in a third of the time.

    Args:
      x64: whether in double precision, which must be JAX's at the time.
      line_search: iterations of the solver's line search; None: those of ``LINE_SEARCH``.
    """
    mjx = load_mjx()
    mujoco = importlib.import_module("mujoco")
    model, frame_skip = gymnasium_model(environment)
    if line_search is None:
        line_search = LINE_SEARCH[environment]
    with jax.ensure_compile_time_eval():
        of_mjx = mjx.put_model(model)
        of_mjx = of_mjx.replace(opt=of_mjx.opt.replace(ls_iterations=line_search))
        blank = mjx.make_data(model)
    timestep = model.opt.timestep

    def data(body, controls):
        return blank.replace(
            qpos=body.qpos, qvel=body.qvel, qacc_warmstart=body.warm_start, ctrl=controls
        )

    def euler(body, controls):
        after = mjx.step(of_mjx, data(body, controls))
        return Body(after.qpos, after.qvel, after.qacc_warmstart)

    def runge_kutta(body, controls):
        start = body

        def stage(carry, numbers):
            body, velocity, acceleration = carry
            share, ahead = numbers
            found = mjx.forward(of_mjx, data(body, controls))
            velocity += share * body.qvel
            acceleration += share * found.qacc
            moved = Body(
                start.qpos + ahead * timestep * body.qvel,
                start.qvel + ahead * timestep * found.qacc,
                found.qacc_warmstart,
            )
            return (moved, velocity, acceleration), None

        zeros = jnp.zeros_like(body.qvel)
        shares = jnp.array([1 / 6, 1 / 3, 1 / 3, 1 / 6], body.qpos.dtype)
        aheads = jnp.array([0.5, 0.5, 1.0, 0.0], body.qpos.dtype)
        (last, velocity, acceleration), _ = jax.lax.scan(
            stage, (body, zeros, zeros), (shares, aheads)
        )
        return Body(
            start.qpos + timestep * velocity,  # Slides and hinges alone: positions add up.
            start.qvel + timestep * acceleration,
            last.warm_start,
        )

    substep = runge_kutta if model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4 else euler

    def step(body, controls):
        return jax.lax.fori_loop(0, frame_skip, lambda _, b: substep(b, controls), body)

    del x64  # Of the arrays made above.
    return jax.jit(step)  # Traced once, however many programs have it.


def observe(environment: Environment, body: Body) -> jax.Array:
    """Gymnasium's observation: positions but the hidden ones, then velocities."""
    speeds = jnp.clip(body.qvel, -environment.speed_limit, environment.speed_limit)
    return jnp.concatenate([body.qpos[environment.hidden :], speeds])


def reward_of(
    environment: Environment, duration: float, before: Body, after: Body, action: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gymnasium's reward of a step that took ``duration`` seconds, and whether the episode ends."""
    speed = (after.qpos[0] - before.qpos[0]) / duration
    reward = speed - environment.control_cost * jnp.sum(jnp.square(action))
    if environment.healthy is None:
        return reward, jnp.array(False)
    healthy = environment.healthy(after.qpos, after.qvel)
    return reward + healthy, ~healthy
