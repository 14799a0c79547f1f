"""What a finished job adds to its W&B run: curves as images, evaluations as a table, the export."""

import json
import tempfile
import time
from pathlib import Path

from meta_train.tracking import Tracker


def log(tracker: Tracker, workdir: Path, exported: Path) -> None:
    """Draws and sends; the job's own files stay as they are.

    Args:
      exported: the folder of what was trained; goes as an artifact, with its card as description.
    """
    from launch.run_report import body  # With matplotlib, which only this needs.
    from launch.run_report.folder import read

    job = read(workdir, workdir.absolute().name, time.time())
    evaluated = [row for row in job.rows if any(name.startswith("eval/") for name in row)]
    names = ["step", *(n for n in job.metric_names() if n.startswith("eval/"))]
    rows = [[row.get(name) for name in names] for row in evaluated]
    with tempfile.TemporaryDirectory() as folder:
        images = body.images(job, Path(folder))
        tracker.media(job.step, images, {"evaluations": (names, rows)} if rows else {})
    card, facts = exported / "README.md", exported / "config.json"
    tracker.artifact(
        exported,
        name=f"{workdir.absolute().name}-{exported.name}",
        kind=exported.name,
        description=card.read_text() if card.exists() else "",
        metadata=json.loads(facts.read_text())["training"] if facts.exists() else {},
    )
