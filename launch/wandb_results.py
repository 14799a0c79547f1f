"""What a finished job adds to its W&B run: curves as images, evaluations as a table, the export."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any


def send(workdir: Path, exported: Path, wandb: Any, run: Any) -> None:
    """Draws and sends; the job's own files stay as they are.

    Args:
      exported: the folder of what was trained; goes as an artifact, with its card as description.
      wandb, run: the module and the run; see ``Tracker.send``.
    """
    from launch.run_report import body  # With matplotlib, which only this needs.
    from launch.run_report.folder import read

    job = read(workdir, workdir.absolute().name, time.time())
    evaluated = [row for row in job.rows if any(name.startswith("eval/") for name in row)]
    names = ["step", *(n for n in job.metric_names() if n.startswith("eval/"))]
    rows = [[row.get(name) for name in names] for row in evaluated]
    with tempfile.TemporaryDirectory() as folder:
        images = body.images(job, Path(folder))
        found = {name: wandb.Image(str(path)) for name, path in images.items()}
        if rows:
            found["evaluations"] = wandb.Table(columns=names, data=rows)
        run.log(found, step=job.step)  # To the last row.
    card, facts = exported / "README.md", exported / "config.json"
    artifact = wandb.Artifact(
        f"{workdir.absolute().name}-{exported.name}",
        type=exported.name,
        description=card.read_text() if card.exists() else "",
        metadata=json.loads(facts.read_text())["training"] if facts.exists() else {},
    )
    for path in sorted(exported.iterdir()):  # Without the line that `add_dir` prints.
        artifact.add_file(str(path))
    run.log_artifact(artifact)
