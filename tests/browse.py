"""Looks at pages in headless Chromium: overflow, broken links, requests, errors. `make browse`.

  python tests/browse.py FOLDER_OR_PAGE ... [--shots=FOLDER]

Of each page, 1280 and 390 pixels wide: the page itself must not scroll sideways, whatever in it
does; nothing but files may be asked for, and every one must be there; links within the folder and
their anchors must lead somewhere; the console must say no error. Needs `pip install playwright` and
a Chromium, at /usr/bin/chromium or as CHROMIUM says.
"""

import os
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

from playwright.sync_api import sync_playwright

WIDTHS = (1280, 390)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--allow-file-access-from-files",
]
LOOK = """() => {
  const inner = ["auto", "scroll", "hidden", "clip"];
  const wide = document.scrollingElement.scrollWidth - window.innerWidth;
  const outside = [...document.querySelectorAll("body *")].filter(e => {
    const box = e.getBoundingClientRect();
    if (box.right <= window.innerWidth + 1 || !box.width || !box.height) return false;
    for (let p = e.parentElement; p; p = p.parentElement)
      if (inner.includes(getComputedStyle(p).overflowX)) return false;
    return true;
  }).map(e => e.tagName + "." + e.className);
  const links = [...document.querySelectorAll("a[href]")].map(e => e.href);
  return {wide, outside, links, text: document.body.innerText.length};
}"""


def look(browser, page_path: Path, width: int, shots: Path | None) -> tuple[list[str], set[str]]:
    """What is wrong with a page at a width, and the links it has."""
    wrong: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(300_000)  # For busy machines.
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda r: wrong.append(f"not there: {r.url[:200]}"))
    own = ("file:", "data:", "blob:")
    page.on("request", lambda r: r.url.startswith(own) or wrong.append(f"asks for {r.url}"))
    page.goto(page_path.as_uri())
    page.wait_for_timeout(150)
    found = page.evaluate(LOOK)
    if found["wide"] > 0:
        wrong.append(f"{found['wide']} pixels too wide: {', '.join(found['outside'][:5])}")
    if found["text"] < 100:
        wrong.append("there is nothing on it")
    if shots:
        shots.mkdir(parents=True, exist_ok=True)
        name = f"{page_path.parent.name}_{page_path.stem}_{width}.png"
        page.screenshot(path=shots / name, full_page=width == max(WIDTHS))
    page.close()
    return wrong, set(found["links"])


def broken(links: set[str], ids: dict[Path, set[str]], browser) -> list[str]:
    """Links to files that are not there, or to anchors that are not in them."""
    found = []
    for link in sorted(links):
        parts = urlparse(link)
        if parts.scheme != "file":
            continue
        path = Path(unquote(parts.path))
        if not path.exists():
            found.append(f"broken link {link}")
        elif parts.fragment and path.suffix == ".html":
            if path not in ids:
                page = browser.new_page(java_script_enabled=False)
                page.goto(path.as_uri())
                ids[path] = {e.get_attribute("id") for e in page.query_selector_all("[id]")}
                page.close()
            if unquote(parts.fragment) not in ids[path] | {"__skip", "__top"}:
                found.append(f"no such place {link}")
    return found


def main(words: list[str]) -> int:
    shots = next((Path(w.partition("=")[2]) for w in words if w.startswith("--shots=")), None)
    given = [Path(word).absolute() for word in words if not word.startswith("--")]
    if not given:
        print((__doc__ or "").strip())
        return 2
    pages = [p for g in given for p in (sorted(g.rglob("*.html")) if g.is_dir() else [g])]
    count, ids = 0, {}
    with sync_playwright() as playwright:
        program = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        for path in pages:
            if path.name == "404.html":  # Its links are of a server's root.
                continue
            said = []
            for width in WIDTHS:
                wrong, links = look(browser, path, width, shots)
                said += [f"{width}: {text}" for text in wrong]
            said += broken(links, ids, browser)
            count += bool(said)
            print(f"{'WRONG' if said else 'fine '} {path}", *said, sep="\n    ", flush=True)
        browser.close()
    print(f"{len(pages)} pages, {count} with faults")
    return 1 if count or not pages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
