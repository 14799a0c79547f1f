"""NAdamW, Lion and Muon under a schedule: against optax, and plain NumPy transcriptions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import learned_opt

SHAPES = [(5, 7), (7,), (), (2, 3, 4), (9, 2), (3, 3, 2, 4)]
STEPS, NUM_STEPS = 12, 20
VALUES = {
    "learning_rate": 0.03,
    "adam_learning_rate": 0.007,
    "decay": 1.7,
    "eps": 1e-3,
    "weight_decay": 0.02,
    "beta": 0.8,
    "b1": 0.7,
    "b2": 0.95,
}
POSITIVE = ("learning_rate", "adam_learning_rate", "decay", "eps", "weight_decay")
COUNTS = {"nadamw": 6, "lion": 5, "muon": 7}


def bound(name):
    """The optimizer of that name at ``VALUES``."""
    optimizer = learned_opt.OPTIMIZERS[name]()
    theta = optimizer.init(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == COUNTS[name]
    for key in theta["params"]:
        x = VALUES[key.partition("_")[2]]
        theta["params"][key] = jnp.log(x) if key.startswith("log_") else jnp.log(x / (1 - x))
    return optimizer.bind(theta, NUM_STEPS)


def problem():
    rng = np.random.default_rng(0)
    params = [rng.normal(size=shape) for shape in SHAPES]
    scales = 10.0 ** rng.integers(-3, 2, size=STEPS)
    return params, [[scale * rng.normal(size=shape) for shape in SHAPES] for scale in scales]


def trajectory(transform, params, grads):
    """Parameters after every step, a list of steps for each tensor."""

    @jax.jit
    def run(params, grads):
        def body(carry, grads):
            params, state = carry
            updates, state = transform.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(body, (params, transform.init(params)), grads)[1]

    return run([jnp.asarray(p) for p in params], [jnp.stack(g) for g in zip(*grads, strict=True)])


@pytest.mark.parametrize("name", COUNTS)
def test_numbers_are_those_of_optax(name):
    v = VALUES

    def rate(of):
        return lambda step: v[of] * (1 + step / NUM_STEPS) ** -v["decay"]

    theirs = {
        "nadamw": lambda: optax.nadamw(
            rate("learning_rate"), v["b1"], v["b2"], v["eps"], weight_decay=v["weight_decay"]
        ),
        "lion": lambda: optax.lion(
            rate("learning_rate"), v["b1"], v["b2"], weight_decay=v["weight_decay"]
        ),
        "muon": lambda: optax.contrib.muon(
            rate("learning_rate"),
            beta=v["beta"],
            weight_decay=v["weight_decay"],
            adam_learning_rate=rate("adam_learning_rate"),
            adam_b1=v["b1"],
            adam_b2=v["b2"],
            adam_weight_decay=v["weight_decay"],
        ),
    }[name]()
    found, expected = (trajectory(transform, *problem()) for transform in (bound(name), theirs))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def numpy_direction(kind, state, g, t):
    """One direction before weight decay and rate; ``t`` counts from 1, ``state`` is changed."""
    b1, b2, beta = VALUES["b1"], VALUES["b2"], VALUES["beta"]
    if kind == "lion":
        direction = np.sign(b1 * state["m"] + (1 - b1) * g)
        state["m"] = b2 * state["m"] + (1 - b2) * g
        return direction
    decay = beta if kind == "muon" else b1
    state["m"] = decay * state["m"] + (1 - decay) * g
    ahead = decay * state["m"] / (1 - decay ** (t + 1)) + (1 - decay) * g / (1 - decay**t)
    if kind != "muon":
        state["v"] = b2 * state["v"] + (1 - b2) * g**2
        eps = VALUES["eps"] if kind == "nadamw" else 1e-8
        return ahead / (np.sqrt(state["v"] / (1 - b2**t)) + eps)
    x = ahead / (np.sqrt(np.sum(ahead**2)) + 1e-8)
    for _ in range(5):
        # On the singular values: s <- 3.4445 s - 4.7750 s^3 + 2.0315 s^5.
        u, s, v = np.linalg.svd(x, full_matrices=False)
        x = u @ np.diag(3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5) @ v
    return np.sqrt(max(1, g.shape[1] / g.shape[0])) * x


@pytest.mark.parametrize("name", COUNTS)
def test_transcription(name, x64):
    params, grads = problem()
    found = trajectory(bound(name), params, grads)
    for i, p in enumerate(params):
        other = name == "muon" and p.ndim != 2
        kind = "adam of muon" if other else name
        rate = VALUES["adam_learning_rate" if other else "learning_rate"]
        state = {"m": np.zeros_like(p), "v": np.zeros_like(p)}
        for t in range(STEPS):
            direction = numpy_direction(kind, state, grads[t][i], t + 1)
            now = rate / (1 + t / NUM_STEPS) ** VALUES["decay"]
            p = p - now * (direction + VALUES["weight_decay"] * p)
            np.testing.assert_allclose(found[i][t], p, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "bad"),
    [(name, {"weight_decay": 0.0}) for name in COUNTS]
    + [("nadamw", {"eps": -1}), ("lion", {"b2": 1.0}), ("muon", {"beta": 0})]
    + [("muon", {"adam_learning_rate": np.inf}), ("lion", {"decay": "1"})],
)
def test_bad_arguments(name, bad):
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must be a finite number"):
        learned_opt.OPTIMIZERS[name](**bad)
