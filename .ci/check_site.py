"""Checks the built site: links, images and anchors lead somewhere, nothing is fetched from elsewhere, and
all math is MathML.

python .ci/check_site.py build/site
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LEFT_OVER = re.compile(r"\$[^$\n]*[\\_^][^$\n]*\$|\\[a-zA-Z]+")  # LaTeX that is still there


class Page(HTMLParser):
    """What a page offers (anchors), asks for (links, resources), and shows outside code."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.text: list[str] = []
        self.equations = 0
        self._silent = 0
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.anchors.add(given["id"] or "")
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        if tag in ("img", "script", "source", "iframe") and given.get("src"):
            self.resources.append(given["src"] or "")
        if tag == "link" and given.get("href") and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.resources.append(given["href"] or "")
        self.equations += tag == "math"
        self._silent += tag in ("code", "pre", "script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.text.append(data)


def check(site: Path) -> list[str]:
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    wrong = [] if pages else [f"{site}: no page"]
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for target in page.links + page.resources:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.resources and parts.scheme != "data":
                    wrong.append(f"{name}: fetches {target}")
                continue
            base = site.resolve() if parts.path.startswith("/") else path.parent
            found = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            if found.is_dir():
                found /= "index.html"
            if not found.exists() or site.resolve() not in found.parents:
                wrong.append(f"{name}: {target} leads nowhere")
            elif found in pages and parts.fragment and unquote(parts.fragment) not in pages[found].anchors:
                wrong.append(f"{name}: {target} has no such anchor")
        wrong += [
            f"{name}: {left} was not rendered" for text in page.text for left in LEFT_OVER.findall(text)
        ]
    equations = sum(page.equations for page in pages.values())
    print(f"{len(pages)} pages, {equations} equations, {len(wrong)} faults")
    return wrong


if __name__ == "__main__":
    faults = check(Path(sys.argv[1]))
    print("\n".join(faults))
    sys.exit(bool(faults))
