"""Completion in a shell: of flags, fields and names, without importing anything slow."""

import subprocess
import sys
from dataclasses import fields

import pytest

from launch import choices, complete
from launch import config as cfg
from launch.reproduce import study_names
from tests.test_choices import ROOT


@pytest.mark.parametrize("kind", sorted(choices.KINDS))
def test_names_are_those_of_the_packages(kind):
    assert set(complete.names(kind)) == set(choices.KINDS[kind].things())


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("learned-opt-train --cfg.estimator=p", ["pes", "pes_analytic"]),
        ("/usr/bin/learned-opt-evaluate --suite=smo", ["smoke"]),
        ("learned-opt-train --cfg.validation=held", []),
        ("learned-opt-train --dry_run --cfg.wandb_mode=o", ["offline", "online"]),
        ("learned-opt-sweep --preset=velo_d", ["velo_digits"]),
        ("learned-opt-train --num=", []),
        ("learned-opt-train --cfg.init_from=c", ["controller"]),
        ("learned-opt-evaluate --optimizer=", ["controller", "per_parameter"]),
        ("learned-opt-sweep --vary=cfg.inner.h", ["cfg.inner.horizon="]),
        ("ls --cfg.estimator=p", []),
        ("learned-opt-train", []),
    ],
)
def test_values(line, found):
    flag = line.rpartition(" ")[2].partition("=")[0]
    assert complete.completions(line) == [f"{flag}={value}" for value in found]


def test_flags_fields_and_studies():
    assert "--cfg.estimator=" in complete.completions("learned-opt-train --cfg.e")
    assert complete.completions("learned-opt-train --cfg.inner.min") == ["--cfg.inner.min_horizon="]
    assert complete.completions("learned-opt-train --dry") == ["--dry_run"]
    assert complete.completions("learned-opt-sweep --ran") == ["--random="]
    assert "--cfg.task.batch_size=" in complete.completions("learned-opt-train --cfg.task.b")
    assert complete.completions("learned-opt-train --cfg.task=quadratic --cfg.task.") == [
        f"--cfg.task.{field.name}="
        for field in sorted(fields(cfg.task("quadratic")), key=lambda f: f.name)
    ]
    assert complete.completions("learned-opt-evaluate --opti") == ["--optimizer="]
    assert complete.completions("learned-opt-train --opti") == []
    assert complete.completions("learned-opt-reproduce ") == sorted(study_names())


def test_in_bash(tmp_path):
    """As bash calls it; what stands before the = stays."""
    (tmp_path / "learned-opt-complete").write_text(
        f'#!/bin/sh\ncd {ROOT} && exec {sys.executable} -X importtime -m launch.complete "$@"'
        f" 2> {tmp_path}/imported\n"
    )
    (tmp_path / "learned-opt-complete").chmod(0o755)
    done = subprocess.run(
        [
            "bash", "-c",
            f'PATH={tmp_path}:$PATH; eval "$(learned-opt-complete --script)"; '
            'COMP_LINE="learned-opt-train --cfg.meta=ad"; COMP_POINT=${#COMP_LINE}; '
            '_learned_opt_complete; echo "${COMPREPLY[@]}"; complete -p learned-opt-sweep',
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[0] == "adam adamw" and "_learned_opt_complete learned-opt-sweep" in lines[1]
    imported = (tmp_path / "imported").read_text()
    assert "launch.complete" not in imported or "jax" not in imported
    assert "launch.config" in imported
