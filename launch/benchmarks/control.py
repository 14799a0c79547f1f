"""Environment steps a second of a population of policies, against bare MJX and against Gymnasium.

    python -m launch.benchmark --cases=control

The three take turns in one process on the same cores: a population of linear policies, each in its
own Swimmer. ``ours`` is the unrolled system that estimators see; ``mjx`` is ``mjx.step`` as it
comes, with the same policies, under ``vmap``, ``scan`` and the same compiler's flags;
``gymnasium`` is its vectorized environment with the policies in NumPy: the whole population in
this process (``sync``), or an environment in each of as many processes as there are cores
(``async``), whichever is faster. Times are of the wall, medians of the rounds. On an accelerator
larger populations of ours follow.
"""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from tasks.dynamics import mujoco_physics
from tasks.dynamics.control import Control
from tasks.dynamics.mujoco_physics import ENVIRONMENTS

POPULATION, STEPS, ROUNDS = 64, 50, 5
LARGER = (1024, 16_384)
LIMITS = {"mjx": 0.9, "gymnasium": 2.0}


def policies(control: Control, population: int = POPULATION) -> Any:
    """Weights of standard deviation .3, one set a member of the population."""
    spec = jax.eval_shape(control.acting()[1], jax.random.key(0))
    return jax.tree.map(
        lambda x: 0.3 * jax.random.normal(jax.random.key(1), (population, *x.shape)), spec
    )


def ours(control: Control, population: int = POPULATION) -> tuple[Callable, Any]:
    """``states -> states`` after ``STEPS`` steps, and the first states."""
    dynamics, thetas = control.dynamics(), policies(control, population)
    key = jax.random.key(0)

    def run(states):
        def step(states, _):
            return jax.vmap(lambda t, s: dynamics.step(t, s, key))(thetas, states)

        return jax.lax.scan(step, states, length=STEPS)

    keys = jax.random.split(key, population)
    return run, jax.vmap(lambda t, k: dynamics.init(t, k, STEPS))(thetas, keys)


def bare_mjx(control: Control) -> tuple[Callable, Any]:
    """The same by ``mjx.step``, its whole data carried."""
    mjx = mujoco_physics.load_mjx()
    model, frame_skip = mujoco_physics.gymnasium_model(control.environment)
    environment, thetas = ENVIRONMENTS[control.environment], policies(control)
    of_mjx, act = mjx.put_model(model), control.acting()[0]
    duration = frame_skip * model.opt.timestep

    def one(theta, data):
        before = mujoco_physics.Body(data.qpos, data.qvel, data.qacc_warmstart)
        action, _ = act(theta, (), mujoco_physics.observe(environment, before))
        data = data.replace(ctrl=action)
        data = jax.lax.fori_loop(0, frame_skip, lambda _, d: mjx.step(of_mjx, d), data)
        after = mujoco_physics.Body(data.qpos, data.qvel, data.qacc_warmstart)
        return data, mujoco_physics.reward_of(environment, duration, before, after, action)[0]

    def run(datas):
        return jax.lax.scan(lambda d, _: jax.vmap(one)(thetas, d), datas, length=STEPS)

    bodies = ours(control)[1].body
    blank = mjx.make_data(model)
    datas = jax.vmap(lambda body: blank.replace(qpos=body.qpos, qvel=body.qvel))(bodies)
    return run, datas


class Turn(NamedTuple):
    """``STEPS`` steps of ``num`` environments."""

    run: Callable[[], Any]
    num: int
    compile_seconds: float = 0.0
    close: Callable[[], Any] = lambda: None


def compiled(make: Callable[..., tuple[Callable, Any]], control: Control, *population: int) -> Turn:
    run, start = make(control, *population)
    began = time.perf_counter()
    program = jax.jit(run).lower(start).compile()
    seconds = time.perf_counter() - began
    num = population[0] if population else POPULATION
    return Turn(lambda: jax.block_until_ready(program(start)), num, seconds)


def gymnasiums(control: Control, mode: str, num: int) -> Turn:
    """Its vectorized environment: ``sync``, in this process, or ``async``, one in each."""
    import gymnasium

    weights = np.asarray(jax.tree.leaves(policies(control))[0], np.float64)[:num]
    environments = gymnasium.make_vec(
        ENVIRONMENTS[control.environment].id,
        num_envs=num,
        vectorization_mode=mode,
        vector_kwargs={"context": "spawn"} if mode == "async" else {},
    )
    observations, _ = environments.reset(seed=0)

    def run():
        nonlocal observations
        for _ in range(STEPS):
            actions = np.einsum("ni,nij->nj", observations, weights)
            observations = environments.step(actions.astype(np.float32))[0]

    return Turn(run, num, close=environments.close)


def lines() -> list[dict[str, Any]]:
    """One line a simulator, then one a limit."""
    control = Control("swimmer")
    turns = {
        "ours": compiled(ours, control),
        "mjx": compiled(bare_mjx, control),
        "gymnasium, sync": gymnasiums(control, "sync", POPULATION),
    }
    cores = len(os.sched_getaffinity(0))
    if cores > 1:
        turns["gymnasium, async"] = gymnasiums(control, "async", cores)
    if jax.default_backend() != "cpu":
        turns |= {f"ours, {num:,}": compiled(ours, control, num) for num in LARGER}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for index in range(ROUNDS + 1):
        for name, turn in turns.items():
            began = time.perf_counter()
            turn.run()
            if index:
                seconds[name].append(time.perf_counter() - began)
    for turn in turns.values():
        turn.close()
    rates = {name: turns[name].num * STEPS / float(np.median(s)) for name, s in seconds.items()}
    rows: list[dict[str, Any]] = [
        {
            "simulator": name,
            "environments": turn.num,
            "steps_per_second": round(rates[name]),
            "compile_seconds": round(turn.compile_seconds, 1),
        }
        for name, turn in turns.items()
    ]
    best = {
        "mjx": rates["mjx"],
        "gymnasium": max(rate for name, rate in rates.items() if name.startswith("gymnasium")),
    }
    return rows + [
        {
            "gate": f"our environment steps per second over those of {name}, at least",
            "value": float(f"{rates['ours'] / best[name]:.3g}"),
            "limit": limit,
            "holds": bool(rates["ours"] >= limit * best[name]),
        }
        for name, limit in LIMITS.items()
    ]
