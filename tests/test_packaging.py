"""The wheel: built, installed away from the checkout, and used from other folders."""

import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from packaging.requirements import Requirement
from safetensors.numpy import load_file

import learned_opt

ROOT = Path(__file__).parent.parent
PACKAGES = ("launch", "learned_opt", "meta_train", "tasks")
BASE = {"flax", "jax", "numpy", "optax", "safetensors"}
COMMANDS = {
    f"learned-opt-{name}"
    for name in ("train", "evaluate", "demo", "replay", "reproduce", "report", "sweep")
} | {"learned-opt-benchmark", "learned-opt-describe", "learned-opt-rollout", "learned-opt-complete"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is packed: building leaves files in the folder it builds."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    return folder


@pytest.fixture(scope="module")
def contents(source):
    """Every file of the packages, noted before they are built."""
    return {
        path.relative_to(source).as_posix()
        for package in PACKAGES
        for path in (source / package).rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def wheel(source, contents, tmp_path_factory):
    """Built with the setuptools that is here, which must be as new as ``pyproject.toml`` asks."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--check-build-dependencies", "-w", folder, source)
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [x for x in archive.namelist() if x.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A virtual environment that holds the wheel, and sees the other packages of this one."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip("--python", folder / "bin/python", "install", wheel)
    site = sysconfig.get_path("purelib", "venv", {"base": str(folder)})
    others = [path for path in sys.path if path.endswith("-packages")]
    Path(site, "others.pth").write_text("\n".join(others))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def run(installed, home, tmp_path):
    """Runs a program of the environment, by default from a folder where nothing else is."""

    def run(program, *words, cwd=tmp_path):
        ours = ("PYTHONPATH", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")  # Of this test process.
        env = {name: value for name, value in os.environ.items() if name not in ours}
        return subprocess.run(
            [installed / "bin" / program, *words],
            cwd=cwd,
            env=env | {"HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def pip(*words):
    """Without a network, and with nothing but what is named."""
    words = [sys.executable, "-m", "pip", *words, "--no-deps", "--no-index", "--quiet"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(wheel, contents):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == contents
    assert {f"{package}/py.typed" for package in PACKAGES} < packed


def test_what_it_requires(metadata):
    """The base is what `learned_opt.load` needs; each extra is asked for by name."""
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    assert {x.name for x in requirements if x.marker is None} == BASE
    assert set(metadata.get_all("Provides-Extra")) == {"control", "dev", "docs", "search", "train"}
    assert all(x.marker is None or "extra ==" in str(x.marker) for x in requirements)


def test_the_extras_are_what_the_packages_import(source, metadata):
    """Every package that the code imports is of the base or of `train`, by its own name."""
    named = {
        normal(Requirement(text).name)
        for text in metadata.get_all("Requires-Dist")
        if not re.search("dev|docs", text.partition(";")[2])
    }
    known = importlib.metadata.packages_distributions()
    pattern = re.compile(r"^\s*(?:import|from) ([a-z]\w*)", re.M)
    modules = {
        module
        for package in PACKAGES
        for path in (source / package).rglob("*.py")
        for module in pattern.findall(path.read_text())
    }
    outside = {module: known[module] for module in modules & known.keys() - set(PACKAGES)}
    assert len(outside) > 10
    unnamed = {m: d for m, d in outside.items() if not named & {normal(name) for name in d}}
    assert not unnamed


def test_the_version_and_every_command(run, metadata, installed):
    """Those of the library; commands can be imported, and are there."""
    code = """
import importlib.metadata, learned_opt
print(learned_opt.__version__, learned_opt.__file__)
for script in importlib.metadata.distribution("learned-opt").entry_points:
    assert callable(script.load())
    print(script.name)
"""
    done = run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    version, file, *names = done.stdout.split()
    assert version == metadata["Version"]
    assert ROOT not in Path(file).parents
    assert set(names) == COMMANDS
    for name in COMMANDS:
        assert os.access(installed / "bin" / name, os.X_OK)


USE = """
import jax, jax.numpy as jnp, optax
import learned_opt
optimizer, theta = learned_opt.load({path!r})
tx = optimizer.bind(theta, num_steps=10)
params = {{"w": jnp.ones(3)}}
state = tx.init(params)
for _ in range(10):
    value = jnp.sum(params["w"] ** 2) / 2
    updates, state = tx.update(params, state, params, value=value)
    params = optax.apply_updates(params, updates)
print(float(jnp.sum(params["w"] ** 2)))
"""


def test_train_load_and_evaluate(run, tmp_path):
    """From an empty folder; then from one where the user has packages of the same names."""
    done = run(
        "learned-opt-train",
        "--workdir=job",
        "--cfg.num_steps=20",
        "--cfg.task=quadratic",
        "--cfg.task.dim=3",
        "--cfg.optimizer=sgdm",
        "--cfg.optimizer.learning_rate=0.05",
        "--cfg.estimator.num_particles=4",
        "--cfg.estimator.truncation=4",
        "--cfg.inner.horizon=8",
        "--cfg.eval_every=0",
        "--cfg.log_every=1",
    )
    assert done.returncode == 0, done.stderr
    job = tmp_path / "job"
    rows = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 20
    first, last = (
        load_file(job / name / "theta.safetensors") for name in ("optimizer_initial", "optimizer")
    )
    assert all(np.all(first[key] != last[key]) for key in first)
    origin = json.loads((job / "optimizer/config.json").read_text())["training"]["provenance"]
    assert origin["command"][0] == "learned-opt-train" and origin["commit"] is None

    done = run("python", "-c", USE.format(path="job/optimizer"))
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout) < 3

    theirs = tmp_path / "theirs"
    for package in PACKAGES:
        (theirs / package).mkdir(parents=True)
        (theirs / package / "__init__.py").write_text("raise RuntimeError('not this one')")
    done = run(
        "learned-opt-evaluate",
        f"--optimizer={job}/optimizer",
        "--workdir=evaluated",
        "--horizons=5",
        "--seeds=2",
        "--cfg.task=mlp",  # Its images are written and read by TFDS.
        "--cfg.task.hidden_sizes=()",
        "--cfg.task.batch_size=4",
        cwd=theirs,
    )
    assert done.returncode == 0, done.stderr
    assert "Task: mlp" in done.stdout and "sgdm" in done.stdout
    assert any((theirs / "evaluated").iterdir())

    done = run(
        "learned-opt-sweep",
        "--workdir=swept",
        "--vary=cfg.optimizer.learning_rate=0.05,0.1",
        "--cfg.num_steps=1",
        "--cfg.task=quadratic",
        "--cfg.optimizer=sgdm",
        "--cfg.estimator.num_particles=4",
        "--cfg.estimator.truncation=4",
        "--cfg.inner.horizon=8",
        "--cfg.eval_every=0",
        cwd=theirs,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrote sweep.csv" in done.stdout


BASE_ONLY = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {hidden!r}
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


def test_the_base_is_enough_to_use_a_trained_optimizer(run, tmp_path):
    """Where nothing can be imported but the five packages and what they themselves need."""
    theta = learned_opt.mlp_optimizer(hidden_sizes=(4,)).init(jax.random.key(0))
    learned_opt.save(tmp_path / "optimizer", "mlp", {"hidden_sizes": [4]}, theta)
    base = needed(BASE)
    owners = importlib.metadata.packages_distributions()
    hidden = {top for top, names in owners.items() if not base & {normal(x) for x in names}}
    hidden -= set(PACKAGES)
    assert {"sklearn", "tensorflow_datasets", "wandb", "matplotlib", "tqdm"} <= hidden
    only = BASE_ONLY.format(hidden=hidden)

    paths = ("optimizer", *learned_opt.available())
    done = run("python", "-c", only + "".join(USE.format(path=path) for path in paths))
    assert done.returncode == 0, done.stderr
    sizes = done.stdout.split()
    assert len(sizes) == len(paths) and all(float(size) < 3 for size in sizes)

    # What needs more says how to get it.
    code = "import tasks, meta_train\ntasks.quadratic_family()\ntasks.mlp_classifier('digits')"
    nowhere = f"import os; os.environ['TFDS_DATA_DIR'] = {str(tmp_path)!r}\n"  # Nor a copy.
    done = run("python", "-c", only + nowhere + code)
    assert "ImportError: the data set 'digits'" in done.stderr, done.stderr
    assert "pip install '.[train]'" in done.stderr
    code = "sys.argv = ['learned-opt-train', '--help']\nfrom launch.train import cli\ncli()"
    done = run("python", "-c", only + code)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "pip install '.[train]'" in done.stderr


def normal(name):
    """A distribution's name as indexes compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(names):
    """The distributions of those names and all that they require here, extras they ask for too."""
    found, rest = set(), [Requirement(name) for name in names]
    while rest:
        asked = rest.pop()
        for extra in ["", *asked.extras]:
            if (asked.name, extra) not in found:
                found.add((asked.name, extra))
                for text in importlib.metadata.requires(asked.name) or []:
                    more = Requirement(text)
                    if more.marker is None or more.marker.evaluate({"extra": extra}):
                        rest.append(more)
    return {normal(name) for name, _ in found}
