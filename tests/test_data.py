"""Data through TFDS: the bundled digits, their copy, and data sets prepared elsewhere."""

import errno
import io
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from tasks.data import load_images
from tests.jobs import DAMAGES


def test_digits(tmp_path):
    data = load_images("digits", str(tmp_path))
    assert {k: v.shape for k, v in data.images.items()} == {
        "train": (1297, 8, 8, 1),
        "validation": (250, 8, 8, 1),
        "test": (250, 8, 8, 1),
    }
    assert list(tmp_path.glob("digits/1.0.0/*.array_record*"))
    # Every image of scikit-learn's set is there once, with its label.
    ours = {
        (image.tobytes(), int(label))
        for split in data.images
        for image, label in zip(
            np.asarray(data.images[split]), np.asarray(data.labels[split]), strict=True
        )
    }
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    theirs = {(i.tobytes(), int(t)) for i, t in zip(images, digits.target, strict=True)}
    assert ours == theirs


def test_batches_are_examples_of_their_split(tmp_path):
    data = load_images("digits", str(tmp_path))
    images, labels = data.batch(jax.random.key(0), "validation", 500)
    pool = {
        (i.tobytes(), int(t))
        for i, t in zip(
            np.asarray(data.images["validation"]),
            np.asarray(data.labels["validation"]),
            strict=True,
        )
    }
    back = np.round(np.asarray(images) * 255).astype(np.uint8)
    drawn = {(i.tobytes(), int(t)) for i, t in zip(back, np.asarray(labels), strict=True)}
    assert drawn <= pool and len(drawn) > 150


def cut_short(path, **arrays):
    """As on a full disk."""
    path.write_bytes(b"PK")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_copy_of_the_digits_is_theirs_or_unread(tmp_path, monkeypatch):
    """Read without TFDS; whatever is done to it, the same data come, and it is sound again."""
    sound = load_images("digits", str(tmp_path))
    copy = tmp_path / "digits.npz"
    archive = copy.read_bytes()

    def without_tfds(name, data_dir):
        raise AssertionError("TFDS was asked")

    with monkeypatch.context() as patched:
        patched.setattr("tasks.data.stored.read", without_tfds)
        load_images.cache_clear()
        jax.tree.map(np.testing.assert_array_equal, load_images("digits", str(tmp_path)), sound)
    with np.load(copy) as loaded:
        arrays = dict(loaded)

    def with_others(change):
        def damage(path):
            np.savez(path, **{name: change(array) for name, array in arrays.items()})

        return damage

    others = [with_others(np.flip), with_others(np.float64), with_others(np.ravel)]
    for damage in [*DAMAGES.values(), *others]:
        damage(copy)
        load_images.cache_clear()
        jax.tree.map(np.testing.assert_array_equal, load_images("digits", str(tmp_path)), sound)
        assert copy.read_bytes() == archive
    for in_its_place in (copy.mkdir, lambda: os.mkfifo(copy)):
        copy.rmdir() if copy.is_dir() else copy.unlink()
        in_its_place()
        load_images.cache_clear()
        jax.tree.map(np.testing.assert_array_equal, load_images("digits", str(tmp_path)), sound)
    copy.unlink()
    monkeypatch.setattr(np, "savez", cut_short)
    load_images.cache_clear()
    jax.tree.map(np.testing.assert_array_equal, load_images("digits", str(tmp_path)), sound)
    load_images.cache_clear()
    assert not copy.exists() and not list(tmp_path.glob("digits-*"))


def test_no_tensorflow_import(tmp_path):
    code = (
        "import sys; from tasks.data import load_images; "
        f"load_images('digits', {str(tmp_path)!r}); assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_processes_may_prepare_the_digits_together(tmp_path):
    code = f"from tasks.data import load_images; load_images('digits', {str(tmp_path)!r})"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in started:
        errors = process.communicate()[1]
        assert process.returncode == 0, errors


class Mnist(tfds.core.GeneratorBasedBuilder):
    """A small data set with the features, splits and encoding of TFDS's own MNIST."""

    VERSION = tfds.core.Version("3.0.1")
    pkg_dir_path = None

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(60), "test": self._generate_examples(20)}

    def _generate_examples(self, count):
        for i in range(count):
            png = io.BytesIO()
            Image.fromarray(np.full((28, 28), i, np.uint8)).save(png, "png")
            png.seek(0)
            yield i, {"image": png, "label": i % 10}


def test_prepared_dataset(tmp_path):
    Mnist(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    data = load_images("mnist", str(tmp_path))
    assert {k: v.shape[0] for k, v in data.labels.items()} == {
        "train": 50,
        "validation": 10,
        "test": 20,
    }
    # PNG files are decoded to what went in, with the right labels.
    values = np.asarray(data.images["train"])
    assert values.shape == (50, 28, 28, 1) and values.min(axis=(1, 2, 3)).tolist() == (
        values.max(axis=(1, 2, 3)).tolist()
    )
    np.testing.assert_array_equal(values[:, 0, 0, 0] % 10, data.labels["train"])


def test_absent_dataset_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError) as error:
        load_images("fashion_mnist", str(tmp_path))
    message = str(error.value)
    assert "'fashion_mnist'" in message and str(tmp_path) in message
    assert "tfds.builder('fashion_mnist'" in message and "array_record" in message


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_damage_to_a_prepared_dataset_is_named(tmp_path, name):
    """Every file, every kind of damage: one sentence with the folder, or the very same data."""
    if name == "mnist":
        Mnist(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    sound = load_images(name, str(tmp_path))
    copy = tmp_path / "digits.npz"
    copy.unlink(missing_ok=True)
    folder = tmp_path / name
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = 0
    for path in files:
        before = path.read_bytes()
        for damage in DAMAGES.values():
            damage(path)
            load_images.cache_clear()
            try:
                data = load_images(name, str(tmp_path))
            except ValueError as error:
                message = str(error)
                assert str(tmp_path) in message and message.startswith("`data")
                found += 1
            else:
                # Names of labels, and padding, are not read.
                for a, b in zip(*map(jax.tree.leaves, (data, sound)), strict=True):
                    np.testing.assert_array_equal(a, b)
            path.write_bytes(before)
            copy.unlink(missing_ok=True)
    assert found >= 4 * len(list(folder.rglob("*.array_record*")))
    for path in files:  # Emptied as a whole.
        path.unlink()
    load_images.cache_clear()
    with pytest.raises(ValueError, match="data"):
        load_images(name, str(tmp_path))
    load_images.cache_clear()
