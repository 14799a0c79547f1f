"""RNN-MLP against a NumPy transcription of its authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import learned_opt
from tests.published import check_transcription

DECAYS = np.array([0.5, 0.9, 0.99, 0.999, 0.9999])
TIMESCALES = np.array([1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000])


def log_size(x):
    return np.clip(np.log(1e-8 + abs(x)), -5, 5)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def transcription(theta, shapes):
    """``rules(params, grads, t, loss) -> changes``, tensor by tensor in float64."""
    w = theta["params"]
    m, v = ({name: np.zeros((*shape, 5)) for name, shape in shapes.items()} for _ in range(2))
    hidden, cell = (dict.fromkeys(shapes, w["start"][x][0]) for x in ("hidden", "cell"))
    from_mlp = dict.fromkeys(shapes, w["from_mlp"])
    whole = {"from_lstm": w["from_lstm"], "mean": 0.0, "var": 0.0, "size": 0.01}

    def rules(params, grads, t, loss):
        whole["mean"] = 0.9 * whole["mean"] + 0.1 * loss
        whole["var"] = 0.9 * whole["var"] + 0.1 * (whole["mean"] - loss) ** 2
        c = 1 / (1 - 0.9 ** (t + 1) + 1e-8)
        train, valid = (
            np.clip((x - c * whole["mean"]) / np.sqrt(c * whole["var"] + 1e-8), -5, 5)
            for x in (loss, 0.0)
        )
        limit = 10 * whole["size"] / (1 - 0.99 ** (t + 1))
        grads = {name: np.clip(g, -limit, limit) for name, g in grads.items()}
        mean_square = np.mean([np.mean(g**2) for g in grads.values()])
        whole["size"] = 0.99 * whole["size"] + 0.01 * np.sqrt(1e-8 + mean_square)

        changes, told = {}, []
        for name, shape in shapes.items():
            g, p = grads[name], params[name]
            m[name] = DECAYS * m[name] + (1 - DECAYS) * g[..., None]
            v[name] = DECAYS * v[name] + (1 - DECAYS) * g[..., None] ** 2
            x = {"from_lstm": whole["from_lstm"], "from_mlp": from_mlp[name]}
            for words, value in (("ms", m[name]), ("v", p)):
                x[f"mean_{words}_mag"] = log_size(np.mean(value))
                x[f"mean_{words}_sign"] = np.sign(np.mean(value))
                x[f"var_{words}"] = log_size(np.var(value))
            x["mean_rms"], x["var_rms"] = log_size(np.mean(v[name])), log_size(np.var(v[name]))
            x["mean_sign"] = np.sign(np.mean(v[name]))
            x["norm_weight"], x["g_norm"] = (log_size(np.sqrt(np.sum(y**2))) for y in (p, g))
            x["is_scalar"] = -1.0 if shape else 1.0
            for j, size in enumerate((*shape, 1, 1, 1, 1)[:4]):
                x[f"shape_{j}"] = np.log(size) - 1
            x["train_loss_feat"], x["valid_loss_feat"] = train, valid
            x = np.concatenate([np.atleast_1d(x[key]) for key in sorted(x)])
            assert len(x) == 52
            x = np.concatenate([x, hidden[name]]) @ w["lstm"]["kernel"] + w["lstm"]["bias"]
            i, candidate, f, o = np.split(x, 4)
            cell[name] = sigmoid(f + 1) * cell[name] + sigmoid(i) * np.tanh(candidate)
            hidden[name] = sigmoid(o) * np.tanh(cell[name])
            told.append(hidden[name] @ w["to_lstm"]["kernel"] + w["to_lstm"]["bias"])
            to_mlp = hidden[name] @ w["to_mlp"]["kernel"] + w["to_mlp"]["bias"]

            flat_m, flat_v = m[name].reshape(-1, 5), v[name].reshape(-1, 5)
            flat_g, flat_p = g.reshape(-1, 1), p.reshape(-1, 1)
            root = 1 / np.sqrt(flat_v + 1e-6)
            own = [flat_g, flat_p, np.log(abs(flat_p) + 1e-8), flat_m, flat_v, flat_m * root, root]
            x = np.concatenate(own, axis=1)
            x = x / np.sqrt(1e-5 + np.mean(x**2, axis=0))
            time = np.sin(t / (TIMESCALES * np.pi))
            size = np.log(np.sqrt(np.sum(p**2)) + 1e-8), np.log(p.size)
            rest = np.concatenate([time, [np.log(len(shapes)) - 1, *size], to_mlp])
            x = np.concatenate([x, np.tile(rest, (p.size, 1))], axis=1)
            assert x.shape[1] == 54
            for layer in range(3):
                x = x @ w["network"][f"kernel_{layer}"] + w["network"][f"bias_{layer}"]
                x = np.maximum(x, 0) if layer < 2 else x
            changes[name] = (-0.001 * x[:, 0] * np.exp(0.001 * x[:, 1])).reshape(shape)
            from_mlp[name] = np.mean(x[:, 2:], axis=0)
        whole["from_lstm"] = np.mean(told, axis=0)
        return changes

    return rules


def test_transcription():
    optimizer = learned_opt.rnn_mlp_optimizer()
    theta = optimizer.init(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == 35799
    # Three networks in a row, whose noisy weights amplify roundings.
    check_transcription(optimizer, transcription, single=1e-4)


def test_needs_the_loss():
    optimizer = learned_opt.rnn_mlp_optimizer(4, (3,))
    transform = optimizer.bind(optimizer.init(jax.random.key(0)), 10)
    params = jnp.ones(3)
    for given in ((params, transform.init(params)), (params, transform.init(params), params)):
        with pytest.raises(ValueError, match=r"RNN-MLP .*\(grads, state, params, value=loss\)"):
            transform.update(*given)


@pytest.mark.parametrize(
    "bad", [{"hidden_size": 0}, {"mlp_sizes": ()}, {"step_mult": 0.0}, {"exp_mult": -1}]
)
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must be"):
        learned_opt.rnn_mlp_optimizer(**bad)
