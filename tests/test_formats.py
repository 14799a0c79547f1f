"""Published theta files, sound and damaged; the real ones where they are."""

import os
import pickle
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

import learned_opt
from learned_opt import formats
from tests import published
from tests.systems import leaves_equal

SMALL = {  # Arguments that make every theta small.
    "small_fc": {"hidden_sizes": (3, 3)},
    "star": {"hidden_sizes": (3, 3)},
    "celo": {"hidden_size": 3},
    "celo_adam": {"hidden_size": 3},
    "celo2": {"hidden_size": 3},
    "celo2_base": {"hidden_size": 3},
    "velo": {"hidden_size": 3, "num_networks": 2},
    "velo_s": {"hidden_size": 3, "num_networks": 2},
}
FILES = [(kind, name) for kind in ("HAIKU", "PYLO") for name in getattr(formats, kind)]


def theta_of(name):
    optimizer = learned_opt.OPTIMIZERS[name](**SMALL[name])
    shapes = jax.eval_shape(optimizer.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def theirs(kind, name, theta):
    """Theta in their names and layouts, from the authors' own tables of features."""
    flat = {
        key.removeprefix("params/"): x
        for key, x in flatten_dict(jax.tree.map(np.asarray, theta), sep="/").items()
    }
    arrays = {}
    for ours, source in getattr(formats, kind)[name].items():
        if source is None:
            continue
        x = np.swapaxes(flat[ours], -1, -2) if source.transposed else flat[ours]
        x = x[None] if source.first else x
        sizes = [1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3] if len(source.keys) > 1 else [len(x)]
        pieces = np.split(x, np.cumsum(sizes)[:-1], axis=-2) if len(sizes) > 1 else [x]
        arrays |= {key: np.ascontiguousarray(x) for key, x in zip(source.keys, pieces, strict=True)}
    return arrays


def nested(arrays):
    """As Haiku nests them: a module's name may have a slash."""
    found = {}
    for key, x in arrays.items():
        module, _, array = key.rpartition("/")
        if key.startswith("rnn_params/"):
            found.setdefault("rnn_params", {}).setdefault(module[11:], {})[array] = x
        else:
            found |= {key: x}
    rnn = found.pop("rnn_params", None)
    tree = unflatten_dict(found, sep="/")
    return tree if rnn is None else tree | {"rnn_params": rnn}


def write(path, kind, arrays):
    if kind == "PYLO":
        safetensors.numpy.save_file(arrays, path)
    else:
        path.write_bytes(flax.serialization.msgpack_serialize(nested(arrays)))
    return path


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_there_and_back(kind, name, tmp_path):
    theta = theta_of(name)
    file = write(tmp_path / "file", kind, theirs(kind, name, theta))
    optimizer, found = learned_opt.load_published(name, file, **SMALL[name])
    if kind == "PYLO" and name == "small_fc":  # Their decays are in no file.
        theta["params"] |= {
            key: 0 * x for key, x in theta["params"].items() if key.endswith("_decays")
        }
    assert leaves_equal(found, theta)
    assert jax.tree.structure(found) == jax.tree.structure(
        jax.eval_shape(optimizer.init, jax.random.key(0))
    )


def test_tuple_of_google(tmp_path):
    theta = theta_of("small_fc")
    tree = nested(theirs("HAIKU", "small_fc", theta))
    (tmp_path / "file").write_bytes(flax.serialization.to_bytes((tree, "a name", 7)))
    found = learned_opt.load_published("small_fc", tmp_path / "file", **SMALL["small_fc"])[1]
    assert leaves_equal(found, theta)


def test_velo_of_pylo_in_two_files_with_what_it_mixed_last(tmp_path):
    theta = theta_of("velo")
    arrays = theirs("PYLO", "velo", theta)
    bank = {key: x for key, x in arrays.items() if "_weights_" in key or "_bias_" in key}
    rest = {key: x for key, x in arrays.items() if key not in bank}
    bank |= {"input_weights": np.ones((4, 30), np.float32), "hidden_bias.0": np.ones(4)}
    files = [write(tmp_path / str(i), "PYLO", part) for i, part in enumerate((rest, bank))]
    found = learned_opt.load_published("velo", *files, **SMALL["velo"])[1]
    assert leaves_equal(found, theta)
    with pytest.raises(ValueError, match=r"holds no whole theta of 'velo' \(.* is missing\)"):
        learned_opt.load_published("velo", files[0], **SMALL["velo"])
    other = write(tmp_path / "other", "HAIKU", theirs("HAIKU", "velo", theta))
    with pytest.raises(ValueError, match=r"^`paths` must be one or more files of one format"):
        learned_opt.load_published("velo", files[0], other, **SMALL["velo"])


def test_damaged_files(tmp_path):
    """One sentence each, whatever is wrong."""
    file, name = tmp_path / "file", "celo2"
    arrays = theirs("HAIKU", name, theta_of(name))
    sound = write(file, "HAIKU", arrays).read_bytes()
    pylo = write(file, "PYLO", theirs("PYLO", name, theta_of(name))).read_bytes()

    def tree(**changes):
        return flax.serialization.msgpack_serialize(nested(arrays | changes))

    key = "ff_mod_stack/~/w1"
    cases = [
        (b"", "is damaged"),
        (b"text", "is damaged"),
        (sound[: len(sound) // 2], "is damaged"),
        (pylo[: len(pylo) // 2], "is damaged"),
        (pylo[:20], "is damaged"),
        (flax.serialization.msgpack_serialize({}), "is missing"),
        (flax.serialization.msgpack_serialize([1, 2]), "it is no dictionary"),
        (tree(**{key: np.full((3, 3), np.nan, np.float32)}), r"w1' is not finite"),
        (tree(**{key: np.ones((3, 3), int)}), "w1' holds no floats"),
        (tree(**{key: "text"}), "w1' holds no floats"),
        (tree(**{key: np.ones((3, 4), np.float32)}), r"`arguments` .* \(3, 4\) .* \(3, 3\)"),
        (tree(**{"ff_mod_stack/~/w0__1": np.ones(3, np.float32)}), "do not fit each other"),
        (tree(more=np.ones(3, np.float32)), "'more' is no part of it"),
        (pickle.dumps({"a": 1}), "is a pickle, .* save its arrays as safetensors"),
        (pickle.dumps({"a": 1}, protocol=2), "is a pickle"),
        (b"PK\3\4", "is a pickle, or an archive"),
    ]
    for contents, message in cases:
        file.write_bytes(contents)
        with pytest.raises(ValueError, match=message) as caught:
            learned_opt.load_published(name, file, hidden_size=3)
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    (tmp_path / "old.pkl").write_bytes(pickle.dumps({"a": 1}, protocol=0))
    with pytest.raises(ValueError, match="is a pickle"):
        learned_opt.load_published(name, tmp_path / "old.pkl")
    for missing in (tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"):
            learned_opt.load_published(name, missing)
    with pytest.raises(ValueError, match=r"^`name` must be one of .*'celo2'.*, got 'mlp'"):
        learned_opt.load_published("mlp", file)
    with pytest.raises(ValueError, match="there is no 'celo' in that format"):
        learned_opt.load_published("celo", write(file, "PYLO", {"a": np.ones(3)}))
    with pytest.raises(ValueError, match="must be one or more files"):
        learned_opt.load_published(name)


@pytest.mark.parametrize("name", ["celo", "celo_adam"])
def test_real_files(name):
    """They load, are what the recordings hold, and make an update."""
    recordings = published.recorded(name)
    beside = Path(os.environ.get("LEARNED_OPT_PEER_UPDATES", published.BESIDE)).parent / "celo"
    optimizer, theta = learned_opt.load_published(name, beside / f"{name}_theta.state")
    expected = unflatten_dict(formats.theta_of(name, recordings[3]), sep="/")
    assert leaves_equal(theta, jax.tree.map(jnp.asarray, expected))
    published.check_recorded(name, optimizer, lambda _: theta)
    other = {"celo": "celo_adam", "celo_adam": "celo"}[name]
    with pytest.raises(ValueError, match=f"holds no whole theta of '{other}'"):
        learned_opt.load_published(other, beside / f"{name}_theta.state")


def test_layouts():
    """PyTorch's layers are [outputs, inputs], and Celo2's are not layers of PyTorch's."""
    shapes = {
        name: {key: x.shape for key, x in theirs("PYLO", name, theta_of(name)).items()}
        for name in ("small_fc", "celo2", "velo")
    }
    small, celo2, velo = shapes.values()
    assert small["network.input.weight"] == (3, 39) and small["network.output.weight"] == (2, 3)
    assert celo2["w0.3"] == (3, 3) and celo2["w0.4"] == (1, 3) and celo2["dense_w.1"] == (3, 3)
    assert velo["mix_layer1.weight"] == (3, 30) and velo["lstm.linear.weight"] == (12, 6)
    assert velo["rnn_to_controls.weight"] == (2, 3) and velo["step_size.weight"] == (1, 3)
    assert velo["input_weights_"] == (2, 4, 30) and velo["output_weights_"] == (2, 3, 4)
    assert velo["lstm_init_state.1"] == (1, 3) and velo["hidden_bias_.0"] == (2, 4)
