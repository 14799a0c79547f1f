"""MkDocs hook: a page of the site for each file of ``examples/``, which has no second copy.

A picture is a link to itself. And the build fails on a page that would fetch anything from
elsewhere.
"""

import ast
import json
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

EXAMPLES = Path(__file__).parent.parent / "examples"


def on_files(files, config):
    """Adds ``examples/NAME.md`` for every script and notebook."""
    for path in sorted(EXAMPLES.glob("*.py")) + sorted(EXAMPLES.glob("*.ipynb")):
        text = of_script(path) if path.suffix == ".py" else of_notebook(path)
        files.append(File.generated(config, f"examples/{path.stem}.md", content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to ``../examples/NAME.py``, as they are right in the repository, go to its page."""
    for path in EXAMPLES.iterdir():
        markdown = markdown.replace(f"](../examples/{path.name})", f"](examples/{path.stem}.md)")
    return markdown


def on_page_content(html, page, config, files):
    """A figure is a link to itself, as pages show it smaller than it is."""
    return re.sub(r'(<img\b[^>]*\bsrc="([^"]+\.png)"[^>]*>)', r'<a href="\2">\1</a>', html)


def on_post_page(output, page, config):
    """Raises on a resource (not a link) with an address."""
    fetched = re.search(
        r"""<(?:link|script|img|iframe|source)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>""",
        output,
    )
    if fetched:
        raise PluginError(f"{page.file.src_uri} would fetch {fetched[0]}; keep a copy in docs/.")
    return output


def of_script(path: Path) -> str:
    source = path.read_text()
    first, _, rest = ast.get_docstring(ast.parse(source)).partition("\n")
    body = source.split('"""', 2)[2].strip()
    return f"# {first.rstrip('.')}\n\n`examples/{path.name}`\n{rest}\n\n```python\n{body}\n```\n"


def of_notebook(path: Path) -> str:
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            parts.append(of_output(output))
    head, _, rest = "\n\n".join(parts).partition("\n")
    return f"{head}\n\nThe notebook `examples/{path.name}`.\n{rest}\n"


def of_output(output: dict) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = output["data"]
    if "image/png" in data:
        return f'<img alt="" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    return f"```text\n{''.join(data['text/plain'])}\n```"
