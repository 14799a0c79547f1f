"""The model card of a trained optimizer: the facts it was given, and what they do not say."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

# Listed first, and also where nobody recorded them.
_ALWAYS = ("task", "horizon", "estimator", "seed")
_UNITS = {"horizon": "inner steps", "truncation": "inner steps", "num_particles": "inner runs"}


def model_card(
    name: str,
    arguments: Mapping[str, Any],
    num_parameters: int,
    training: Mapping[str, Any],
    moves_without_gradient: bool,
) -> str:
    """Markdown with what is known of the training, a snippet to use it, and its limits.

    Args:
      name, arguments: which optimizer it is.
      num_parameters: numbers in theta.
      training: facts, JSON values by name; ``task`` a name or a mapping that has one.
      moves_without_gradient: as in ``LearnedOptimizer``.
    """
    task, horizon = _task_words(training.get("task")), training.get("horizon")
    facts = dict.fromkeys(_ALWAYS) | dict(training)
    provenance = facts.pop("provenance", None)
    return "\n".join(
        [
            f"# Learned optimizer `{name}`",
            "",
            f"{num_parameters:,} meta-parameters; arguments `{_json(dict(arguments))}`.",
            "",
            "```python",
            "import learned_opt",
            "",
            'optimizer, theta = learned_opt.load("PATH_OF_THIS_FOLDER")',
            f"tx = optimizer.bind(theta, num_steps={horizon or 1000})  # an optax transformation",
            "# updates, state = tx.update(grads, state, params, value=loss)",
            "```",
            "",
            "## Training",
            "",
            *[f"- {key}: {_text(key, value)}" for key, value in facts.items()],
            "",
            *_provenance(provenance),
            "## Limits",
            "",
            f"- Meta-trained on {task or 'a task that was not recorded'}, in runs "
            f"of {f'{horizon} steps' if horizon else 'a length that was not recorded'}. On other "
            "tasks, networks or batch sizes, and in longer runs, it may be worse than Adam or "
            "diverge: compare it with Adam at its best learning rate, on a test split, before use.",
            "- Losses seen in meta-training are of the very task it was trained on, and are no "
            "measure of how well the trained network generalizes.",
            "- Some optimizers read the loss: give it to each update, as above (`value=loss`). "
            "`python -m launch.describe PATH_OF_THIS_FOLDER` says whether this one does.",
            _MOVES if moves_without_gradient else _RESTS,
            "- Gradients and parameters must be real; updates have the types of the parameters, "
            "and the state is float32 or wider.",
            "",
        ]
    )


_MOVES = (
    "- A parameter whose gradient is exactly 0 moves all the same, so unused rows of an embedding "
    "drift: `learned_opt.mask_zero_gradients(tx)` holds them still."
)
_RESTS = "- A parameter that never had a gradient other than 0 does not move."


def _provenance(found: Any) -> list[str]:
    """A section with the command to paste, and what it ran with; nothing where it is unknown."""
    if not isinstance(found, Mapping) or not found.get("command"):
        return []
    versions = found.get("versions") or {}
    return [
        "## Provenance",
        "",
        "```",
        shlex.join(map(str, found["command"])),
        "```",
        "",
        "repeats the job, in a new `--workdir`. It ran with:",
        "",
        f"- commit: {found.get('commit') or 'an installed package'}",
        *[f"- {package}: {version}" for package, version in versions.items()],
        "",
        "The whole configuration is in `config.json`, under `training.provenance.config`.",
        "",
    ]


def _task_name(task: Any) -> str | None:
    return task.get("name") if isinstance(task, Mapping) else task


def _task_words(task: Any) -> str | None:
    """A task by its name, a mixture by how many it is of."""
    if isinstance(task, Mapping) and task.get("tasks"):
        return f"{len(task['tasks'])} tasks"
    name = _task_name(task)
    return f"`{name}`" if name else None


def _text(key: str, value: Any) -> str:
    if key == "init_from" and not value:
        return "nothing, theta was drawn"
    if key == "began_from":
        on = _task_words(value.get("task")) or "a task that was not recorded"
        return f"an optimizer trained on {on}; all that is known of it is in `config.json`"
    if value is None:
        return "not recorded"
    if key == "task" and isinstance(value, Mapping) and value.get("tasks"):
        names = f": {', '.join(value['names'])}" if value.get("names") else ""
        return f"{_task_words(value)}{names}; each with its arguments in `config.json`"
    if key == "task" and isinstance(value, Mapping):
        rest = [f"{field} {_json(x)}" for field, x in value.items() if field != "name"]
        return ", ".join([f"`{_task_name(value) or 'not recorded'}`", *rest])
    text = f"`{value}`" if isinstance(value, str) else _json(value)
    return f"{text} {_UNITS[key]}" if key in _UNITS else text


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)
