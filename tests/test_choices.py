"""Things configure themselves: words in any order, nested, from presets and from outside."""

import dataclasses
import importlib
import os
import pkgutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from absl import flags

import launch
import learned_opt
from launch import choices, command_line, job, reproduce, suites
from launch import config as cfg
from launch.choices import KINDS
from meta_train.estimators import PES, HybridES
from tasks.data import load_images
from tests.systems import some_fast

ROOT = Path(__file__).parent.parent
THINGS = [(base, name) for base, kind in KINDS.items() for name in kind.things()]


def chosen(*words, base=None):
    """The configuration that these words make of ``base``."""
    node, rest = choices.take_words(["train", *words], "cfg")
    assert rest == ["train"]
    choices.check_plain(cfg.Config, node, "cfg")
    return choices.apply_words(base or cfg.Config(), node, "cfg")


def refused(*words, base=None):
    with pytest.raises(ValueError) as error:
        chosen(*words, base=base)
    return str(error.value)


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A module that is not part of the library."""
    (tmp_path / "mymod.py").write_text(
        textwrap.dedent(
            '''
            import dataclasses
            import jax, optax
            import jax.numpy as jnp
            from launch.config import Config, task
            from learned_opt import LearnedOptimizer, OptimizerConfig
            from meta_train.estimators import full_es
            from tasks import quadratic_family

            def bowl(dim=5, depth=1.0, data_dir=None):
                """A bowl.

                Args:
                  dim: of the bowl.
                  depth: how deep,
                    in all.
                """
                return quadratic_family(dim=dim)

            def needy(dim):
                return quadratic_family(dim=dim)

            @dataclasses.dataclass(frozen=True)
            class SignSGD(OptimizerConfig):
                """Sign descent."""
                rate: float = 0.01

                def make(self):
                    def bind(theta, num_steps):
                        return optax.with_extra_args_support(
                            optax.chain(optax.scale_by_sign(), optax.scale(-jnp.exp(theta["log"]))))
                    return LearnedOptimizer(lambda key: {"log": jnp.log(self.rate)}, bind)

            class NotADataclass(OptimizerConfig):
                pass

            NUMBERS = jnp.arange(3.0)

            def listed(sizes=[3, 2]):
                return quadratic_family(dim=sizes[0])

            def by_function(bend=jnp.sin):
                return quadratic_family()

            def varied(*sizes):
                return quadratic_family()

            def nesterov(learning_rate=0.1, momentum=0.5):
                return optax.sgd(learning_rate, momentum, nesterov=True)

            def no_task():
                return 5

            def no_optimizer():
                return optax.sgd(0.1)

            def wide_es(system, horizons, num_particles=8, sigma=0.5):
                return full_es(system, num_pairs=num_particles, horizons=horizons, sigma=sigma)

            def get_config():
                return Config(num_steps=7, task=task("quadratic", dim=4))
            '''
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("mymod", None)


def test_words_in_any_order():
    for words in (("task=quadratic", "task.dim=3"), ("task.dim=3", "task=quadratic")):
        config = chosen(*(f"--cfg.{word}" for word in words))
        assert config.task == cfg.task("quadratic", dim=3)
    assert chosen("--cfg.num_steps", "1e3", "-cfg.seed=1_0").num_steps == 1000
    assert chosen("--cfg.task.hidden_sizes=8").task.hidden_sizes == (8,)
    assert chosen("--cfg.task.hidden_sizes=(8, 4)").task.hidden_sizes == (8, 4)
    assert chosen("--cfg.task.standardize=true").task.standardize is True


def test_a_choice_brings_its_own_defaults():
    assert chosen("--cfg.optimizer=sgdm").optimizer.learning_rate == 0.1
    assert chosen("--cfg.optimizer=adam").optimizer.learning_rate == 1e-3
    assert chosen("--cfg.task=quadratic").task.batch_size == 1
    assert chosen("--cfg.optimizer=adam", "--cfg.optimizer.b2=0.99").optimizer.b2 == 0.99
    assert chosen("--cfg.estimator=artbp", "--cfg.estimator.alpha=3").estimator.alpha == 3
    assert chosen("--cfg.estimator=rtrl", "--cfg.estimator.max_bytes=5").estimator.max_bytes == 5


def test_nested_choices():
    words = ["estimator.base.sigma=0.5", "estimator=hybrid_es", "estimator.base=pes"]
    estimator = chosen(*(f"--cfg.{word}" for word in words)).estimator
    assert isinstance(estimator, HybridES) and estimator.base == PES(sigma=0.5)
    assert "--cfg.estimator.base.sigma must be a finite" in refused(
        "--cfg.estimator=hybrid_es", "--cfg.estimator.base=pes", "--cfg.estimator.base.sigma=-1"
    )


def test_what_a_preset_set_carries_over_where_it_fits():
    preset = cfg.Config(estimator=PES(num_particles=64, sigma=0.3, truncation=10))
    carried = chosen("--cfg.estimator=truncated_es", base=preset).estimator
    assert (carried.num_particles, carried.sigma, carried.truncation) == (64, 0.3, 10)
    assert chosen("--cfg.estimator=bptt", base=preset).estimator.num_particles == 64
    hybrid = chosen("--cfg.estimator=hybrid_es", base=preset).estimator
    assert hybrid.sigma == 0.3 and hybrid.base.truncation == 10 and hybrid.num_particles == 64
    back = chosen("--cfg.estimator=pes", base=dataclasses.replace(preset, estimator=hybrid))
    assert back.estimator == preset.estimator
    # A default of the old class is no choice of the preset's.
    assert chosen("--cfg.optimizer=sgdm", base=cfg.load_preset("demo")).optimizer.momentum == 0.9
    # Naming the class that is there already changes nothing.
    assert chosen("--cfg.estimator=pes", base=preset) == preset


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["num_stpes=3"], "Did you mean 'num_steps'?"),
        (["horizon=3"], "Did you mean --cfg.inner.horizon?"),
        (["sigma=1"], "--cfg.optimizer.FIELD, --cfg.estimator.FIELD"),
        (["num_steps=abc"], "--cfg.num_steps must be a whole number, got 'abc'."),
        (["num_steps=2.5"], "--cfg.num_steps must be a whole number, got '2.5'."),
        (["num_steps=0"], "--cfg.num_steps must be at least 1, got 0."),
        (["inner.horizon.x=3"], "--cfg.inner.horizon is a value and has no field 'x'"),
        (["inner=3"], "--cfg.inner has fields, set one of them: horizon, min_horizon"),
        (["inner.meta_loss=vaildation"], "Did you mean 'validation'?"),
        (["estimator=PES"], "Did you mean 'pes'?"),
        (["task=quadratic", "task.hidden_sizes=3"], "--cfg.task has no field 'hidden_sizes'"),
        (["estimator=tbptt", "estimator.sigma=1"], "no field 'sigma'; its fields are: num_par"),
        (["optimizer.num_tensors=9"], "--cfg.optimizer has no field 'num_tensors'"),
        (["task.hidden_sizes=(8.5,)"], "--cfg.task.hidden_sizes must be numbers in parentheses"),
        (["task.standardize=maybe"], "--cfg.task.standardize must be true or false, got 'maybe'"),
        (["estimator.sampler=gauss"], "--cfg.estimator.sampler must be one of"),
        (["estimator.num_particles=7"], "--cfg.estimator.num_particles must be even"),
        (
            ["meta.warmup=1000"],
            "--cfg.meta.warmup must be below --cfg.num_steps=1000, got 1000: the rate would still "
            "be rising at the end. Give --cfg.meta.warmup=100, or --cfg.num_steps=10000 or more.",
        ),
        (["meta=sgd", "meta.b1=0.5"], "--cfg.meta has no field 'b1'"),
        (
            ["inner.horizon=21"],
            "inner.horizon must be a multiple of the estimator's `truncation`",
        ),
        (["trains=network"], "--cfg.trains=network needs inner.horizon=1"),
        (
            ["trains=network", "inner.horizon=1", "estimator.truncation=1", "inner.scale=log"],
            "--cfg.inner.scale is for trains=optimizer, got log",
        ),
        (
            ["optimizer=reversible_mlp", "estimator=reversible", "inner.equal_runs=true"],
            "are not for a reversible estimator",
        ),
        (["validation=heldout"], "--cfg.validation must not be heldout, by which nothing may be"),
        (["validation=smok"], "Did you mean 'smoke'?"),
        (["inner.scale=logs"], "--cfg.inner.scale must be one of loss, log, got 'logs'"),
        (["task=no.such:thing"], "names the module 'no.such'"),
        (["task=mymod:nothing"], "mymod has no 'nothing'"),
        (["task=mymod:needy"], "argument `dim` has no default"),
        (["optimizer=mymod:NotADataclass"], "must be a frozen dataclass derived from"),
        (["task=mymod:NUMBERS"], "which must be a function or a TaskConfig dataclass"),
        (["task=mymod:listed"], "the default [3, 2], which could change; use a tuple"),
        (["task=mymod:by_function"], "as its default, which cannot be written to a file"),
        (["task=mymod:varied"], "which takes `*sizes`; the arguments are the fields"),
        (["task=mymod:"], "names 'mymod:', which must go on with a name after the colon"),
        (["task=mymod.py:bowl"], "as Python imports it: mymod, without .py"),
        (["meta.b1=1.5"], "--cfg.meta.b1 must be at least 0 and below 1, got b1=1.5"),
        (["meta.b2=1"], "--cfg.meta.b2 must be at least 0 and below 1"),
        (["meta.eps=nan"], "--cfg.meta.eps must be a finite number above 0"),
        (["meta=adamw", "meta.weight_decay=-1"], "--cfg.meta.weight_decay must be a finite number"),
        (["meta=sgd", "meta.momentum=-0.1"], "--cfg.meta.momentum must be at least 0 and below 1"),
        (["meta=rmsprop", "meta.decay=1"], "--cfg.meta.decay must be at least 0 and below 1"),
    ],
)
def test_wrong_words_are_named(words, message, outside):
    assert message in refused(*(f"--cfg.{word}" for word in words))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise RuntimeError('no\\ntable')", "cannot be imported: RuntimeError: no table."),
        ("import sys; sys.exit(0)", "cannot be imported: SystemExit: 0."),
        ("def f(:", r"cannot be imported: SyntaxError: .*\(faulty.py, line 1\)"),
        ("import no_such_package", "cannot be imported: ModuleNotFoundError: .*no_such_package"),
        ("raise ValueError('`x` must be a sentence.')", "`x` must be a sentence."),
    ],
)
def test_modules_that_cannot_be_imported_are_a_sentence(body, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "faulty.py").write_text(body)
    for flag, use in (
        ("--preset", lambda: cfg.load_preset("faulty")),
        ("--cfg.task", lambda: chosen("--cfg.task=faulty:f")),
        ("--suite", lambda: suites.find_suite("faulty:f")),
    ):
        with pytest.raises(ValueError, match=f"{flag} .*{message}"):
            use()
        sys.modules.pop("faulty", None)


@pytest.mark.parametrize("name", ["./x", "../x", "a/b.py", "", ".", "a..b", "a b", "1a", "x.py/y"])
def test_paths_are_no_names_of_modules(name):
    with pytest.raises(ValueError, match=r"--preset must be one of .* as Python imports it, got"):
        cfg.load_preset(name)
    with pytest.raises(ValueError, match=r"--cfg.task names the module .* not the path of a file"):
        chosen(f"--cfg.task={name}:f")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 3", "must return a launch.config.Config, got int"),
        ("return {}['x']", "called without arguments, ended: KeyError: 'x'."),
        ("raise SystemExit", "called without arguments, ended: SystemExit."),
    ],
)
def test_presets_that_are_none_are_a_sentence(body, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "faulty.py").write_text(f"def get_config(): {body}")
    with pytest.raises(ValueError, match=f"--preset=faulty: its `get_config`.*{message}"):
        cfg.load_preset("faulty")
    del sys.modules["faulty"]


def test_a_function_that_raises_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    body = "from tasks import Task\ndef f() -> Task:\n    return {}['x']\n"
    (tmp_path / "faulty.py").write_text(body)
    with pytest.raises(ValueError, match=r"The task faulty:f cannot be made: KeyError: 'x'."):
        chosen("--cfg.task=faulty:f").task.make()
    del sys.modules["faulty"]


def test_things_from_outside(outside):
    config = chosen(
        "--cfg.task.dim=3",
        "--cfg.task=mymod:bowl",
        "--cfg.optimizer=mymod:SignSGD",
        "--cfg.estimator=mymod:wide_es",
        "--cfg.estimator.sigma=0.1",
    )
    assert config.task.dim == 3 and config.estimator.population.size == 8
    assert choices.to_dict(config)["task"] == {"name": "mymod:bowl", "dim": 3, "depth": 1.0}
    assert cfg.read_config(choices.to_dict(config)) == config
    assert choices.field_words(type(config.task))["depth"] == "how deep, in all."
    assert cfg.load_preset("mymod").task == cfg.task("quadratic", dim=4)
    # Reading does not run what a file names.
    saved = choices.to_dict(config)
    sys.modules.pop("mymod")
    with pytest.raises(ValueError, match="Import mymod first"):
        cfg.read_config(saved)
    assert "mymod" not in sys.modules


@pytest.mark.parametrize(("base", "name"), THINGS, ids=[name for _, name in THINGS])
def test_every_thing_configures_itself(base, name):
    """Its defaults make it, go to JSON and back, and every field has words in the help."""
    thing = choices.thing(base, name)
    tree = choices.to_dict(thing)
    assert choices.thing_from_dict(base, tree) == thing
    younger = {key: value for key, value in tree.items() if key == "name"}
    assert choices.thing_from_dict(base, younger) == thing
    with pytest.raises(ValueError, match="written by a newer version"):
        choices.thing_from_dict(base, tree | {"from_the_future": 1})
    for line in choices.describe(thing, "cfg.thing"):
        assert line.words, line.flag
    with pytest.raises(dataclasses.FrozenInstanceError):
        thing.anything = 1


def test_every_field_is_explained():
    for line in choices.describe(cfg.Config(), "cfg"):
        assert line.words, line.flag


@pytest.mark.parametrize("name", [*cfg.preset_names(), *cfg.optimizer_presets()])
def test_presets(name):
    config = cfg.load_preset(name)
    assert cfg.read_config(choices.to_dict(config)) == config


@pytest.mark.parametrize("name", cfg.optimizer_presets())
def test_optimizers_take_the_task_of_their_preset(name):
    config = cfg.load_preset(name)
    task, optimizer = config.task.make(), config.optimizer.make()

    def begin(key):
        return optimizer.bind(optimizer.init(key), config.inner.horizon).init(task.init((), key))

    assert cfg.optimizer_presets()[name] in learned_opt.OPTIMIZERS
    assert jax.tree.leaves(jax.eval_shape(begin, jax.random.key(0)))


OLD = {
    "trains": "network",
    "seed": 3,
    "num_steps": 300,
    "task": {"name": "mlp", "batch_size": 18, "activation": "sigmoid", "dim": 10, "noise": 0.1},
    "optimizer": {"name": "sgdm", "hidden_sizes": [32, 32], "learning_rate": 0.01, "momentum": 0.8},
    "inner": {"horizon": 1, "min_horizon": 0},
    "estimator": {"name": "hybrid_es", "num_particles": 8, "truncation": 1, "sigma": 2.0,
                  "sampler": "normal", "guided_alpha": 0.5},
    "hybrid": {"base": "bptt", "refresh_every": 3, "mode": "select", "sigma": 0.0, "sampler": "",
               "replay_log": True},
    "meta": {"optimizer": "sgd", "learning_rate": 3.0},
}  # fmt: skip


def test_configurations_of_older_versions_are_read():
    """With one set of fields for all things of a kind, and without fields that came later."""
    config = cfg.read_config(OLD)
    assert config.task == cfg.task("mlp", batch_size=18, activation="sigmoid")
    assert config.optimizer == cfg.optimizer("sgdm", learning_rate=0.01, momentum=0.8)
    base = cfg.estimator("bptt", num_particles=8)
    assert config.estimator == HybridES(
        base=base, refresh_every=3, mode="select", sigma=2.0, replay_log=True
    )
    assert config.meta == cfg.meta_optimizer("sgd", learning_rate=3.0)
    plain = OLD | {"trains": "optimizer", "inner": {"horizon": 20}}
    plain["estimator"] = OLD["estimator"] | {"name": "guided_es", "num_particles": 4}
    assert cfg.read_config(plain).estimator == cfg.estimator(
        "guided_es", num_particles=4, truncation=1, sigma=2.0
    )


def test_contradictions_name_the_flag():
    saved = choices.to_dict(cfg.Config())
    config = cfg.Config(num_steps=2000, estimator=cfg.estimator("nres", sigma=0.1, chunk=4))
    assert cfg.contradictions(config, saved) == [
        "--cfg.estimator: the checkpoint has 'pes', this command 'nres'",
        "--cfg.estimator.sigma: the checkpoint has 0.01, this command 0.1",
    ]


def test_wrong_words_are_refused_before_anything_is_imported():
    """As seen from the modules that a refused command has imported."""
    code = """
import sys
from launch import command_line
sys.argv = ["train", "--workdir=x", "--cfg.num_steps=abc"]
try:
    command_line.run(print)
finally:
    assert not {"jax", "flax", "numpy"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --cfg.num_steps must be")


# What takes long to import, and only training, evaluating or drawing needs.
SLOW = {"matplotlib", "optuna", "orbax", "scipy", "simpy", "skimage", "sklearn", "wandb"}


@pytest.mark.parametrize(
    ("name", "word", "also"),
    [
        ("train", "--help", {"tensorflow_datasets"}),
        ("evaluate", "--help", {"tensorflow_datasets"}),
        ("sweep", "--help", {"tensorflow_datasets"}),
        ("demo", "--help", {"tensorflow_datasets"}),
        ("train", "--dry_run", {"tensorflow_datasets"}),  # The digits are read from their copy.
        ("reproduce", "--list", {"jax", "numpy", "launch.studies.base"}),
    ],
)
def test_what_only_tells_neither_imports_what_is_slow_nor_compiles(name, word, also):
    load_images("digits")  # Once on a machine they are prepared, and copied.
    code = f"""
import sys
from launch import {name}
sys.argv = [{name!r}, {word!r}]
compiled = []
try:
    if {word!r} == "--dry_run":
        import jax
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, seconds, **more: compiled.append(event) if "compile_dur" in event else 0
        )
    {name}.cli()
finally:
    print(sorted({SLOW | also!r} & set(sys.modules)), compiled)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[] []" and len(done.stdout.splitlines()) > 20


def test_help_lists_every_field_with_its_words():
    text = " ".join(command_line.help_text(cfg.Config()).split())
    assert "!!python" not in text
    assert "--cfg.estimator.sigma=0.01" in text and "standard deviation of the perturb" in text
    assert "--cfg.task.hidden_sizes=(32,)" in text and "--workdir" in text


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("num_steps", "--cfg.num_steps"),
        ("wrokdir", "--workdir"),
        ("horizon", "--cfg.inner.horizon"),
    ],
)
def test_unknown_flags_say_what_was_meant(flag, meant):
    assert f"Did you mean {meant}?" in command_line._unknown_flag(flag, cfg.Config)


def test_every_flag_refuses_a_wrong_value_in_one_sentence(capsys):
    """Of every command: the flag, what it takes, what was given, and what may have been meant."""
    for module in pkgutil.iter_modules(launch.__path__):
        importlib.import_module(f"launch.{module.name}")
    own = [
        flag
        for module, known in flags.FLAGS.flags_by_module_dict().items()
        for flag in known
        if module.startswith("launch.")
    ]
    checked, others = set(), set()
    for flag in own:
        parser = flag.parser
        if isinstance(parser, flags.BooleanParser):
            cases = {"maybe": "true or false, got 'maybe'."}
        elif isinstance(parser, flags.IntegerParser):
            least = f" at least {parser.lower_bound}" if parser.lower_bound is not None else ""
            most = f" and at most {parser.upper_bound}" if parser.upper_bound is not None else ""
            wrong = ["2.5", "", "ten", *(["-1"] if least else []), *(["9" * 20] if most else [])]
            cases = {x: f"a whole number{least}{most}, got {x!r}." for x in wrong}
        elif isinstance(parser, flags.EnumParser):
            values = parser.enum_values
            wrong = values[0][:-1]
            said = f"one of {', '.join(values)}, got {wrong!r}. Did you mean {values[0]!r}?"
            cases = {wrong: said}
        else:
            others.add(flag.name)
            continue
        checked.add(flag.name)
        for wrong, said in cases.items():
            with pytest.raises(SystemExit) as ended:
                command_line.parse_flags(["command", f"--{flag.name}={wrong}"])
            assert ended.value.code == 2
            assert capsys.readouterr().err == f"error: --{flag.name} must be {said}\n"
    assert {"seeds", "trained_horizon", "from_step", "choose_by", "dry_run"} <= checked
    # Paths, and words that the commands check (below).
    assert others == {
        "baselines",
        "cases",
        "coordinator_address",
        "cores",
        "data_dir",
        "figure",
        "horizons",
        "import",
        "into",
        "metric",
        "optimizer",
        "optimizers",
        "out",
        "policy",
        "runs",
        "suite",
        "vary",
        "workdir",
    }


def _refused(function, *given):
    with pytest.raises(ValueError) as error:
        function(*given)
    return str(error.value)


def test_wrong_names_are_corrected(monkeypatch, tmp_path):
    """Every word on a command line that is a name."""
    from launch import benchmark, describe, evaluate, tuned_adam
    from launch.trained import check_folder

    (tmp_path / "mine" / "optimizer").mkdir(parents=True)
    (tmp_path / "mine" / "optimizer" / "theta.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for given, meant in (
        ("adm", "'adam'"),
        ("mine/optimzer", "'mine/optimizer'"),
        ("mine", "'mine/optimizer'"),
    ):
        for flag, or_a_name in (("--optimizer", False), ("NAME", True)):
            said = _refused(check_folder, flag, given, or_a_name)
            assert said.startswith(f"{flag} must be the folder of a trained optimizer")
            assert f"got {given!r}" in said and said.endswith(f"Did you mean {meant}?")
    assert "--suite=NAME" in _refused(check_folder, "--optimizer", "adam", False)
    check_folder("NAME", "adam", True)
    check_folder("--optimizer", "mine/optimizer", False)
    assert _refused(describe.describe, "adm").endswith("Did you mean 'adam'?")
    assert _refused(tuned_adam.missing, ["heldot"]).endswith("Did you mean 'heldout'?")
    assert _refused(tuned_adam.missing, ["wine_mpl"]).endswith("Did you mean 'wine_mlp'?")
    monkeypatch.setattr(evaluate, "required_workdir", lambda: tmp_path / "x")
    said = _refused(evaluate._suite, evaluate.EvaluationConfig(), "smok")
    assert said.startswith("--suite must be one of ") and said.endswith("Did you mean 'smoke'?")
    for words, said in ((["pess"], "Did you mean 'pes'?"), (["pes", ""], "got ''.")):
        monkeypatch.setattr(benchmark, "_CASES", SimpleNamespace(value=words))
        assert _refused(benchmark._check_flags).endswith(said)
    monkeypatch.setattr(benchmark, "_CASES", SimpleNamespace(value=["pes"]))
    monkeypatch.setattr(benchmark, "_CORES", SimpleNamespace(value=["1", "two"]))
    assert _refused(benchmark._check_flags).endswith("got 'two'.")
    assert _refused(reproduce.load_study, "table11").endswith("Did you mean 'table1'?")
    assert _refused(cfg.load_preset, "controler").endswith("Did you mean 'controller'?")


def test_long_values_are_shortened_in_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    text = command_line.help_text(cfg.load_preset("controller"))
    assert max(map(len, text.splitlines())) <= 120
    shown = next(line for line in text.splitlines() if "--cfg.task.names=" in line)
    assert shown.endswith(" ...") and len(shown) <= 90
    assert "launch.train --dry_run` shows the whole" in " ".join(text.split())


PLAIN = ("replay", "report", "reproduce", "benchmark", "describe", "tuned_adam", "zoo")


def test_help_is_of_one_style():
    """The module's own words, then our flags, with nothing of absl's; nothing slow is imported."""
    code = f"""
import contextlib, importlib, sys
from launch import command_line
for name in {PLAIN}:
    module = importlib.import_module("launch." + name)
    sys.argv = [name, "--help"]
    with contextlib.suppress(SystemExit):
        command_line.run_plain(module.main, module.__doc__)
    print("|")
print(sorted({{"jax", "wandb", "matplotlib", "tensorflow_datasets"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    *pages, slow = done.stdout.split("|\n")
    for name, page in zip(PLAIN, pages, strict=True):
        module = importlib.import_module(f"launch.{name}")
        assert page.startswith(f"{module.__doc__.strip()}\n\nFlags:\n\n")
        assert "--workdir" in page and "absl" not in page and "flagfile" not in page
    assert slow == "[]\n"


COMMANDS = ("train", "evaluate", "report", "sweep", "demo", "replay", "reproduce", "benchmark")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_an_unknown_flag_at_once(name, tmp_path):
    """Before anything slow is imported, and before anything is made; and it says what was meant."""
    code = f"""
import sys
from launch import {name}
sys.argv = [{name!r}, "--workdir={tmp_path}/job", "--wrokdir=x"]
try:
    {name}.cli()
finally:
    slow = {{"jax", "flax", "wandb", "matplotlib", "tensorflow_datasets"}}
    print(sorted(slow & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: unknown flag --wrokdir"), done.stderr
    assert "Did you mean --workdir?" in done.stderr and len(done.stderr.splitlines()) == 1
    assert done.stdout == "[]\n"
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("name", some_fast(COMMANDS, ("train", "benchmark")))
def test_output_that_nobody_reads_is_no_error(name):
    """As in ``... --help | head -1``."""
    read, write = os.pipe()
    os.close(read)
    code = f"import sys\nfrom launch import {name}\nsys.argv = [{name!r}, '--help']\n{name}.cli()"
    done = subprocess.run(
        [sys.executable, "-u", "-c", code],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_artbp_cuts_at_any_mean_length_above_one():
    cfg.estimator("artbp", truncation=1.01, alpha=1.01)
    for values in ({"truncation": 1.0}, {"alpha": 1.0}, {"truncation": float("nan")}):
        with pytest.raises(ValueError, match=f"`{next(iter(values))}` must be above 1, got"):
            cfg.estimator("artbp", **values)


def test_a_meta_optimizer_of_ones_own(outside):
    """A function of the rate: schedule, clipping and the mean of theta are around it."""
    assert chosen("--cfg.meta=mymod:nesterov").meta.learning_rate == 0.1
    words = ("meta=mymod:nesterov", "meta.learning_rate=2", "meta.schedule=cosine")
    config = chosen(*(f"--cfg.{word}" for word in (*words, "meta.clip_value=0.1")))
    with pytest.raises(ValueError, match="no field 'b1'"):
        chosen("--cfg.meta=mymod:nesterov", "--cfg.meta.b1=0.5")
    transform, theta = config.meta.make(10), np.zeros(2)
    expected = optax.chain(
        optax.clip(0.1), optax.sgd(optax.cosine_decay_schedule(2.0, 10), 0.5, nesterov=True)
    )
    states = [transform.init(theta), expected.init(theta)]
    for grad in np.random.default_rng(0).normal(size=(4, 2)):
        steps = [
            t.update(grad, s, theta) for t, s in zip((transform, expected), states, strict=True)
        ]
        np.testing.assert_array_equal(steps[0][0], steps[1][0])
        states = [state for _, state in steps]


ESTIMATORS = """
import jax, jax.numpy as jnp
from meta_train.estimators.base import GradientEstimator, checked

def made(init, estimate):
    return lambda system, horizons, num_particles=4: GradientEstimator(init, estimate)

def metrics():
    return {name: jnp.zeros(()) for name in ("loss", "finite", "grad_sq_norm")}

def start(theta, key):
    return jnp.arange(4)

grad = made(start, lambda theta, state, key: (theta[:1], state, metrics()))
nothing = made(start, lambda theta, state, key: (theta, state, {}))
state = made(start, lambda theta, state, key: (theta, state[:2], metrics()))
scalar = made(lambda theta, key: jnp.zeros(()), lambda theta, state, key: (theta, state, {}))
uneven = made(lambda theta, key: (jnp.zeros(4), jnp.zeros(3)), lambda theta, state, key: 0)
two = made(start, lambda theta, state, key: (theta, state))
few = made(start, lambda theta, state: (theta, state, metrics()))
raises = made(start, lambda theta, state, key: {}["a"])
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grad", r"must return a grad with .* of theta, got float32\[1\] for float32\[2\]"),
        ("nothing", "must return metrics with loss, finite, grad_sq_norm, got none"),
        ("state", r"must return a state with .*, got int32\[2\] for int32\[4\]"),
        ("scalar", r"leading particle axis, got one of shape \(\)"),
        ("uneven", "one leading particle axis, got axes of 3, 4"),
        ("two", r"must return `\(grad, state, metrics\)`, got a tuple of 2"),
        ("few", r"`estimator.estimate` must take \(theta, state, key\)"),
        ("raises", "--cfg.estimator cannot be used: KeyError"),
    ],
)
def test_estimators_that_are_none_are_refused_before(name, message, tmp_path, monkeypatch):
    """In one sentence, and with nothing written."""
    (tmp_path / "theirs.py").write_text(ESTIMATORS)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("theirs", None)
    base = cfg.Config(task=cfg.task("quadratic"), optimizer=cfg.optimizer("sgdm"))
    config = chosen(f"--cfg.estimator=theirs:{name}", "--cfg.num_devices=1", base=base)
    with pytest.raises(ValueError, match=message):
        job.build(config, None)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("task", "no_task", "mymod:no_task, given as the task, must return Task, got int"),
        ("optimizer", "no_optimizer", "must return LearnedOptimizer, got GradientTransform"),
    ],
)
def test_functions_that_return_something_else(kind, name, message, outside):
    config = chosen(f"--cfg.{kind}=mymod:{name}")
    with pytest.raises(ValueError, match=message):
        getattr(config, kind).make()
