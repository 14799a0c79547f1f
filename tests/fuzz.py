"""Malformed input by the thousand: refused in a sentence, at once, and nothing is touched.

    python -m tests.fuzz [--count=100000] [--seed=0] [--kinds=rows,words,...]

Every input follows from the seed and its number, which a failure names. Wrong is: an error that is
no ``ValueError`` (or, of words, no exit code 2), an input that takes longer than ten seconds, a
file that changed, and anything run, connected to or unpickled.
"""

import argparse
import contextlib
import io
import json
import math
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags

import learned_opt
from launch import choices, command_line, loop, train, workdir
from launch import config as cfg
from launch.loop import Outcome
from learned_opt import load_published, weights
from meta_train import checkpoint, devices, tracking
from meta_train.estimators.hybrid import replay
from tests import jobs

SECONDS = 10
DEEP = "[" * 100_000
JUNK = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(10**30), 0.5, -0.0, 1e308, math.inf, math.nan,
    "", "a", "None", "nan", "1e999", "\0", "\ud800", "é" * 300, "x" * 5_000, "../../../etc/passwd",
    "/dev/zero", "os:abort", "os:system", "os:getcwd", "builtins:exec", "subprocess:Popen",
    "sys:exit", "quadratic", "sgdm", "pes", "hybrid_es", "adam", "mlp", [], [[]], [None], {}, [0],
    [1, 2], [10**9] * 3, list(range(5_000)), {"": {}}, {"name": "mlp"}, {"name": "os:abort"},
    {"name": None}, {"name": ["sgdm"]},
]  # fmt: skip
PIECES = [
    b"", b"\0", b"\xff\xfe", b"\n", b"{}", b"[]", b"null", b"NaN", b"-Infinity", b'"', b"\\",
    b"9" * 5_000, b"-1", b"1e999", b"{" * 2_000, DEEP.encode(), b'{"step": 1}\n', b'{"step": -1}\n',
    b'{"step": true}\n', b'{"step": 3, "meta_loss": "x"}\n', b"\x93NUMPY", b"\x80\x04.", b"PK\3\4",
]  # fmt: skip
# What reading must never do.
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen")
FORBIDDEN += ("socket.connect", "pickle.find_class", "ctypes.dlopen", "webbrowser.open")
_watching = False


def _audit(event: str, arguments: tuple) -> None:
    if _watching and event in FORBIDDEN:
        raise AssertionError(f"ran {event}{arguments!r}"[:300])


@contextlib.contextmanager
def watched():
    """Inside, whatever runs something fails."""
    global _watching
    _watching = True
    try:
        yield
    finally:
        _watching = False


sys.addaudithook(_audit)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to three faults."""
    for _ in range(rng.randint(1, 3)):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        kind = rng.randrange(6)
        if kind == 0 and data:
            place = rng.randrange(len(data))
            data = data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        elif kind == 1:
            data = data[:a]
        elif kind == 2:
            data = data[:a] + data[b:]
        elif kind == 3:
            data = data[:b] + data[a:b][:1000] + data[b:]
        elif kind == 4:
            data = data[:a] + rng.randbytes(rng.randint(1, 16)) + data[a:]
        else:
            data = data[:a] + rng.choice(PIECES) + data[a:]
    return data


def mutated_tree(tree, rng: random.Random):
    """JSON values with one to three faults."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.randint(1, 3)):
        places = [(tree, key) for key in tree] if isinstance(tree, dict) else []
        for container, key in places:  # (Grows.)
            child = container[key]
            if isinstance(child, dict):
                places += [(child, name) for name in child]
            elif isinstance(child, list):
                places += [(child, i) for i in range(len(child))][:50]
        if not places:
            return rng.choice(JUNK)
        container, key = rng.choice(places)
        kind = rng.randrange(4)
        if kind == 0 and isinstance(container, dict):
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(("", "name", "x", "__class__", str(key) + "s"))] = rng.choice(JUNK)
        elif kind == 2 and isinstance(container, dict):
            container[key] = container[rng.choice(list(container))]
            tree = json.loads(json.dumps(tree))
        else:
            container[key] = json.loads(json.dumps(rng.choice(JUNK)))
    return tree


class Rows:
    """``metrics.jsonl``."""

    share = 0.44

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"
        rows = [
            {"step": i, "meta_loss": 1.0 / i, "nonfinite_count": 0, "time/wall_seconds": 0.5 * i}
            for i in range(1, 6)
        ]
        self.sound = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        (folder / "checkpoints" / "5").mkdir(parents=True)
        (folder / "optimizer").mkdir()
        flags.FLAGS.mark_as_parsed()

    def one(self, rng: random.Random) -> None:
        data = mutated(self.sound, rng)
        self.path.write_bytes(data)
        kept, _ = tracking.whole_rows(data, 4)
        assert tracking.whole_rows(kept, 4) == (kept, True)
        rows = tracking.read_rows(self.path)
        assert all(isinstance(row["step"], int) for row in rows)
        assert tracking.last_row(self.path) == (rows[-1] if rows else {})
        assert train.ending(jobs.SMALL, self.path.parent, Outcome(5, False, None))
        tracker = tracking.Tracker(
            self.path.parent, config={}, run_id="a", start_step=4, num_steps=5, project="",
            mode="disabled",
        )  # fmt: skip
        tracker.log({"step": 5, "meta_loss": 0.5, "time/wall_seconds": tracker.seconds()})
        tracker.close()
        for path in self.path.parent.glob("metrics.jsonl.*"):
            path.unlink()
        assert [row["step"] for row in tracking.read_rows(self.path)][-1] == 5


class Words:
    """Flags and ``--cfg`` words."""

    share = 0.25

    def __init__(self, folder: Path):
        del folder
        self.paths = [f"--{path}" for path in choices.plain_paths(cfg.Config, "cfg")]
        fields = ("name", "sigma", "hidden_sizes", "learning_rate", "x", "")
        parts = ("task", "optimizer", "estimator", "meta")
        self.paths += [f"--cfg.{part}.{name}" for part in parts for name in fields]
        self.paths += ["--workdir", "--dry_run", "--preset", "--cfg", "--cfg.", "-", "--", "stray"]
        self.sound = ["--cfg.task=quadratic", "--cfg.estimator.sigma=0.1", "--cfg.num_steps=50"]

    def one(self, rng: random.Random) -> None:
        words = rng.sample(self.sound, rng.randint(0, 2))
        for _ in range(rng.randint(1, 3)):
            value = rng.choice(
                [str(junk) for junk in JUNK] + ["(1,2)", "(", "1_0", "((1,),)", DEEP]
            )
            word = f"{rng.choice(self.paths)}={value}"
            if rng.random() < 0.5:
                word = mutated(word.encode(errors="replace"), rng).decode(errors="replace")
            words.append(word)
        try:
            with contextlib.redirect_stderr(io.StringIO()), command_line.messages(cfg.Config):
                node, rest = choices.take_words(words, "cfg")
                choices.check_plain(cfg.Config, node, "cfg")
                command_line.check_known(rest, cfg.Config)
                choices.apply_words(cfg.Config(), node, "cfg")
        except SystemExit as error:
            assert error.code == 2


class Configs:
    """The configuration in a file."""

    share = 0.15

    def __init__(self, folder: Path):
        del folder
        self.sound = [choices.to_dict(jobs.SMALL), choices.to_dict(cfg.load_preset("four_tasks"))]

    def one(self, rng: random.Random) -> None:
        tree = mutated_tree(rng.choice(self.sound), rng)
        with contextlib.suppress(ValueError):
            cfg.read_config(tree)
        with contextlib.suppress(ValueError):
            cfg.contradictions(jobs.SMALL, tree)
        part = tree.get("task") if isinstance(tree, dict) else tree
        with contextlib.suppress(ValueError):
            cfg.read_task(part, "the file")


class Weights:
    """Trained optimizers, their digests made to fit, and files of other libraries."""

    share = 0.12

    def __init__(self, folder: Path):
        self.folder = folder
        optimizer = learned_opt.OPTIMIZERS["sgdm"]()
        theta = optimizer.init(jax.random.key(0))
        learned_opt.save(folder / "sgdm", "sgdm", {}, theta, training={"horizon": 5})
        self.config = json.loads((folder / "sgdm" / "config.json").read_text())
        self.weights = (folder / "sgdm" / "theta.safetensors").read_bytes()

    def one(self, rng: random.Random) -> None:
        path = self.folder / "sgdm"
        config, theta = self.config, self.weights
        if rng.random() < 0.7:
            config = mutated_tree(config, rng)
        if rng.random() < 0.5:
            theta = mutated(theta, rng)
        if isinstance(config, dict) and isinstance(config.get("sha256"), dict):
            digest = checkpoint.hashlib.sha256(theta).hexdigest()
            config["sha256"]["theta.safetensors"] = digest
            with contextlib.suppress(ValueError, TypeError):
                config["sha256"]["config.json"] = weights._config_digest(config)
        text = json.dumps(config, indent=2).encode() + b"\n"
        if rng.random() < 0.1:
            text = mutated(text, rng)
        (path / "config.json").write_bytes(text)
        (path / "theta.safetensors").write_bytes(theta)
        before = jobs.contents(path)
        with contextlib.suppress(ValueError):
            learned_opt.load(path)
        file = self.folder / "foreign.state"
        file.write_bytes(theta if rng.random() < 0.5 else mutated(b"\x81\xa1a\x93\1\2\3", rng))
        with contextlib.suppress(ValueError):
            load_published(rng.choice(("small_fc", "celo2")), file)
        assert jobs.contents(path) == before


class Checkpoints:
    """The record and the arrays of a checkpoint, its digests made to fit, and the replay log."""

    share = 0.04

    def __init__(self, folder: Path):
        self.workdir, build = folder / "job", loop.build
        loop.build = jobs.toy
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                jobs.run(self.workdir, num_steps=4, eval_every=0)
        finally:
            loop.build = build
        self.like = devices.host_like(jax.eval_shape(jobs.toy(jobs.SMALL).init))
        for path in (self.workdir / "checkpoints").iterdir():
            if path.name != "4":
                shutil.rmtree(path)
        self.step = self.workdir / "checkpoints" / "4"
        self.files = {
            path: path.read_bytes()
            for path in self.step.rglob("*")
            if path.is_file() and path.name != checkpoint.DIGESTS
        }
        self.log = folder / "replay.log"
        head = replay._saved(replay.np.zeros(3, replay.np.float32))
        numbers = [2, 1, 1, 0, 1, len(head), replay.zlib.crc32(head)]
        record = replay._saved(replay.np.array([*numbers, replay._own(numbers)], replay.np.int64))
        self.sound_log = (record + head) * 3

    def one(self, rng: random.Random) -> None:
        for path, data in self.files.items():
            path.write_bytes(data)
        record = self.step / "job" / "metadata"
        if rng.random() < 0.7:
            tree = mutated_tree(json.loads(self.files[record]), rng)
            record.write_text(json.dumps(tree))
        else:
            path = rng.choice(list(self.files))
            path.write_bytes(mutated(self.files[path], rng))
        for folder in (self.step / "job", self.step / "state", self.step):
            (folder / checkpoint.DIGESTS).unlink(missing_ok=True)
            checkpoint.write_digests(folder)
        if rng.random() < 0.1:
            digests = self.step / checkpoint.DIGESTS
            digests.write_bytes(mutated(digests.read_bytes(), rng))
        before = jobs.contents(self.workdir)
        with contextlib.suppress(ValueError):
            workdir.find_start(self.workdir)
        with contextlib.suppress(ValueError):
            workdir.find_start(self.workdir, self.like)
        with contextlib.suppress(ValueError):
            workdir.refuse_contradictions(jobs.SMALL, {"decides": {}, "rounds": {}}, self.workdir)
        assert jobs.contents(self.workdir) == before
        self.log.write_bytes(mutated(self.sound_log, rng))
        like = replay.Message(
            *(jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct((3,), "float32")) * 2
        )
        with contextlib.suppress(ValueError):
            list(replay.read_log(self.log, like))
        replay.ReplayLog(self.log, 1).close()


KINDS: dict[str, Callable] = {
    kind.__name__.lower(): kind for kind in (Rows, Words, Configs, Weights, Checkpoints)
}


def _too_long(number, frame):
    del number, frame
    raise TimeoutError(f"it took longer than {SECONDS} s")


def fuzz(kind: str, count: int, folder: Path, seed: int = 0, most: int = 5) -> list[str]:
    """Tries that many inputs of a kind; what went wrong, at most so many times."""
    subject, failures = KINDS[kind](folder), []
    previous = signal.signal(signal.SIGALRM, _too_long)
    try:
        for number in range(count):
            rng = random.Random(f"{kind} {seed} {number}")
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                with watched(), contextlib.redirect_stderr(io.StringIO()):
                    subject.one(rng)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                where = "".join(traceback.format_exception(error)[-4:])
                failures.append(f"{kind}, seed {seed}, number {number}: {where}")
                if len(failures) >= most:
                    break
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, previous)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="inputs, of all kinds")
    parser.add_argument("--seed", type=int, default=0, help="which of them")
    parser.add_argument("--kinds", default=",".join(KINDS), help="what to try, with commas")
    given = parser.parse_args()
    failures = []
    for kind in given.kinds.split(","):
        count = max(1, round(given.count * KINDS[kind].share))
        with tempfile.TemporaryDirectory() as folder:
            found = fuzz(kind, count, Path(folder), given.seed)
        print(f"{kind}: {count:,} inputs, {len(found)} failures", flush=True)
        failures += found
    print("\n\n".join(failures))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
