"""What a page links to and loads, for tests of pages that must work without a network."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

# What a browser fetches by itself. A link (a href) is fetched only by a reader.
LOADING = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"),
           ("source", "src"), ("video", "src"), ("audio", "src"), ("object", "data"),
           ("embed", "src"), ("image", "href")}


class Links(HTMLParser):
    """Addresses, identifiers and styles of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.styles: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        for name, value in attrs:
            value = value or ""
            if name in ("id", "name") and tag != "input":
                self.ids.append(value) if name == "id" else None
            elif name == "style":
                self.styles.append(value)
            elif (tag, name) in LOADING:
                self.loads.append(value)
            elif (tag, name) in (("a", "href"), ("form", "action")):
                self.links.append(value)
            elif tag == "meta" and name == "content" and "url=" in value:
                self.links.append(value.partition("url=")[2])

    def handle_data(self, data):
        if self.inside == "style":
            self.styles.append(data)
        elif self.inside == "script":
            self.loads += re.findall(r"""(?:from|import\()\s*["'](http[^"']+)""", data)


def style_loads(css: str) -> list[str]:
    """Addresses in a style sheet, other than embedded data."""
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)
    found = re.findall(r"""@import\s+["']([^"']+)|url\(\s*["']?([^"')\s]+)""", css)
    return [a or b for a, b in found if not (a or b).startswith(("data:", "#"))]


def faults(folder: Path) -> list[str]:
    """Links and assets of a folder's pages and styles that are remote, missing or unanchored."""
    pages = {path: Links(path.read_text(encoding="utf-8"))
             for path in sorted(folder.resolve().rglob("*.html"))
             if "_static" not in path.parts}  # templates of the theme
    folder, found = folder.resolve(), []
    for path, page in pages.items():
        where = path.relative_to(folder)
        loads = page.loads + [u for css in page.styles for u in style_loads(css)]
        found += [f"{where}: loads {u}" for u in loads
                  if urlsplit(u).scheme not in ("", "data") or u.startswith("//")]
        for url in loads + page.links:
            if url.startswith("//") or urlsplit(url).scheme:
                continue
            local, fragment = urldefrag(url)
            local = local.partition("?")[0]
            target = (path.parent / unquote(local)).resolve() if local else path.resolve()
            if not target.is_file():
                found.append(f"{where}: no file {url}")
            elif fragment:
                # As browsers look it up: first as it stands, then decoded.
                ids = pages[target].ids
                count = ids.count(fragment) or ids.count(unquote(fragment))
                found += [f"{where}: {count or 'no'} anchor {url}"] if count != 1 else []
    for path in folder.rglob("*.css"):
        found += [f"{path.relative_to(folder)}: loads {u}"
                  for u in style_loads(path.read_text(encoding="utf-8"))
                  if not (path.parent / u).is_file()]
    return found
