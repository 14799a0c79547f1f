"""One HTML page with everything in it: tables that sort, curves under the mouse, no address."""

from pathlib import Path
from typing import Any

from launch.evaluation.kept import whole
from meta_train import strict_json

TEMPLATE = Path(__file__).with_name("page.html")
_PLACE = "/*DATA*/"


def page(summary: dict[str, Any], title: str, about: list[str]) -> str:
    """The page.

    Args:
      summary: from ``report.summarize``.
      title: of the page.
      about: sentences below it.
    """
    text = strict_json.dumps(summary | {"title": title, "about": about}, separators=(",", ":"))
    # What is in a script ends at the first "</", whatever it is in.
    return TEMPLATE.read_text().replace(_PLACE, text.replace("<", "\\u003c"))


def write(summary: dict[str, Any], title: str, about: list[str], path: Path) -> None:
    """Writes it, whole or not at all."""
    whole(path, lambda file: file.write(page(summary, title, about)))
