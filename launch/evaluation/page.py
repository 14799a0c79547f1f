"""One HTML page with everything in it: tables that sort, curves under the mouse, no address."""

import html
from pathlib import Path
from typing import Any

from launch.evaluation.aggregates import LEAST_TASKS
from launch.evaluation.kept import whole
from meta_train import strict_json

TEMPLATE = Path(__file__).with_name("page.html")
# Of all pages that commands write.
STYLE = Path(__file__).with_name("page.css")
_PLACE, _STYLE_PLACE = "/*DATA*/", "/*STYLE*/"


def page(summary: dict[str, Any], title: str, about: list[str]) -> str:
    """The page.

    Args:
      summary: from ``report.summarize``.
      title: of the page.
      about: sentences below it.
    """
    more = {"title": title, "about": about, "least_tasks": LEAST_TASKS}
    text = strict_json.dumps(summary | more, separators=(",", ":"))
    template = TEMPLATE.read_text().replace(_STYLE_PLACE, STYLE.read_text())
    # What is in a script ends at the first "</", whatever it is in.
    return template.replace(_PLACE, text.replace("<", "\\u003c"))


def document(title: str, body: str) -> str:
    """A page of the same style around a ``body`` of HTML."""
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    )
    title, style = html.escape(title), STYLE.read_text()
    return (
        f"{head}<title>{title}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def write(summary: dict[str, Any], title: str, about: list[str], path: Path) -> None:
    """Writes it, whole or not at all."""
    whole(path, lambda file: file.write(page(summary, title, about)))
