"""NNAdam against recorded updates of its authors' code and a NumPy transcription of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import learned_opt
from tests.published import check_recorded, check_transcription


def theta_of(published):
    """Ours, from the names of the authors' tree."""

    def of(*words):
        (name,) = [name for name in published if all(word in name.split("/") for word in words)]
        return jnp.asarray(published[name])

    names = ("lr", "beta1", "beta2", "epsilon")
    return {
        "params": {
            "hyperparameters": jnp.concatenate([of(f"per_layer_{x}").reshape(1) for x in names]),
            "start": {x: of("lstm_init_state", x) for x in ("hidden", "cell")},
            "lstm": {"kernel": of("rnn_params", "w"), "bias": of("rnn_params", "b")},
            "out": {
                "kernel": of("rnn_to_controls_params", "w"),
                "bias": of("rnn_to_controls_params", "b"),
            },
        }
    }


def test_recorded():
    """Of a theta whose LSTM does not move anything yet, so of the step alone."""
    check_recorded("nn_adam", learned_opt.nn_adam(), theta_of)


def log_size(x):
    return np.clip(np.log(1e-8 + abs(x)), -5, 5) * 0.5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def transcription(theta, shapes):
    """``rules(params, grads, t, loss) -> changes``, tensor by tensor in float64."""
    w = theta["params"]
    m, v = ({name: np.zeros(shape) for name, shape in shapes.items()} for _ in range(2))
    hyper = dict.fromkeys(shapes, w["hyperparameters"])
    hidden, cell = (dict.fromkeys(shapes, w["start"][x][0]) for x in ("hidden", "cell"))
    lowest = [0.1 * np.log(1e-8), -1, -1, 0.1 * np.log(1e-11)]
    highest = [0.1 * np.log(1e3), 0, 0, 0.1 * np.log(1e4)]

    def rules(params, grads, t, loss):
        changes = {}
        for name, shape in shapes.items():
            g, p, now = np.clip(grads[name], -1000, 1000), params[name], hyper[name]
            rate, other1, other2, eps = np.exp(10 * now)
            m[name] = (1 - other1) * m[name] + other1 * g
            v[name] = (1 - other2) * v[name] + other2 * g**2
            changes[name] = -rate * (1 + eps) * m[name] / (eps + np.sqrt(v[name] + 1e-10))
            x = {
                "is_scalar": 1.0 if len(shape) == 0 else -1.0,
                "is_bias": 1.0 if len(shape) == 1 else -1.0,
                "mean_gabs_mag": log_size(np.mean(abs(g))),
                "mean_rms": log_size(np.mean(v[name])),
                "mean_sign": np.sign(np.mean(v[name])),
                "var_rms": log_size(np.var(v[name])),
            }
            for letter, value in (("g", g), ("m", m[name]), ("p", p)):
                x[f"mean_{letter}_mag"] = log_size(np.mean(value))
                x[f"mean_{letter}_sign"] = np.sign(np.mean(value))
                x[f"var_{letter}"] = log_size(np.var(value))
            x |= dict(zip(("lr", "beta1", "beta2", "epsilon"), 0.2 * now, strict=True))
            x = np.array([x[key] for key in sorted(x)])
            assert len(x) == 19
            x = np.concatenate([x, hidden[name]]) @ w["lstm"]["kernel"] + w["lstm"]["bias"]
            i, candidate, f, o = np.split(x, 4)
            cell[name] = sigmoid(f + 1) * cell[name] + sigmoid(i) * np.tanh(candidate)
            hidden[name] = sigmoid(o) * np.tanh(cell[name])
            moves = hidden[name] @ w["out"]["kernel"] + w["out"]["bias"]
            hyper[name] = np.clip(now + 0.01 * moves, lowest, highest)
        return changes

    return rules


def test_transcription():
    optimizer = learned_opt.nn_adam(eps=0.1)
    theta = optimizer.init(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == 21896
    check_transcription(optimizer, transcription)


def test_hyperparameters_stay_in_their_range():
    """However far the LSTM would move them, and gradients count as at most 1000."""
    optimizer = learned_opt.nn_adam(output_scale=100.0)
    theta = optimizer.init(jax.random.key(0))
    theta["params"]["out"]["bias"] = jnp.array([1.0, -1.0, 1.0, -1.0])
    transform = optimizer.bind(theta, 10)
    params = jnp.ones(3)
    state = transform.init(params)
    _, state = transform.update(jnp.array([1e9, -1.0, 0.0]), state, params)
    stored = np.exp(10 * state.hyperparameters[0])
    np.testing.assert_allclose(stored, [1e3, np.exp(-10), 1, 1e-11], rtol=1e-4)
    np.testing.assert_allclose(state.means[0][0], [100, -0.1, 0], rtol=1e-5)


@pytest.mark.parametrize(
    "bad", [{"hidden_size": 0}, {"learning_rate": 1e-9}, {"b1": 1.0}, {"eps": 1e5}]
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must be"):
        learned_opt.nn_adam(**bad)


def test_needs_parameters():
    optimizer = learned_opt.nn_adam()
    transform = optimizer.bind(optimizer.init(jax.random.key(0)), 10)
    with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
        transform.update(jnp.ones(3), transform.init(jnp.ones(3)))
