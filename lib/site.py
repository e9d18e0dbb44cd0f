"""The course as a static site: notebooks, results, claims, reference, and a search."""

import html
import json
import re
import shutil
from pathlib import Path, PurePath
from typing import Any
from unittest import mock

from lib.artifacts import BUILD, ROOT, read_json, writing
from lib.course import NOTEBOOKS, notebooks, read_notebook
from lib.pages import TEMPLATES, notebook_page, relinked, text_page

RESULTS, CLAIMS = ROOT / "data" / "results", ROOT / "data" / "claims.json"
CARD, PICTURE = "data/adapters/README.md", "data/results/picture.png"
# Where a part of a page begins that one can look for: headings, names of the reference.
PARTS = re.compile(r'<(?=h[23] id="|section id="|div id="[^"]*" class="classattr")')
SCRIPTS = "<script src='search_index.js'></script><script src='search.js'></script>"


def build(out: Path) -> int:
    """Write the site; the number of its pages."""
    with writing(out) as part:
        results = [path.relative_to(RESULTS) for path in sorted(RESULTS.rglob("*.json"))]
        for path in results:
            (part / "results" / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(RESULTS / path, part / "results" / path)
        shutil.copyfile(CLAIMS, part / "claims.json")
        shutil.copyfile(ROOT / PICTURE, part / "picture.png")
        shutil.copyfile(TEMPLATES / "page" / "static" / "search.js", part / "search.js")
        made = {path.stem: notebook_page(read_notebook(path), nav=nav()) for path in notebooks()}
        texts = {path.stem: path.read_text(encoding="utf-8") for path in guides()} | {
            "index": (ROOT / "README.md").read_text(encoding="utf-8").replace(
                PICTURE, "picture.png").replace(CARD, "CARD.md"),
            # Without the header, which is for programs.
            "CARD": (ROOT / CARD).read_text(encoding="utf-8").split("---\n", 2)[2],
            "results": results_text(results), "claims": claims_text(results)}
        made |= {name: text_page(text, nav=nav()) for name, text in texts.items()}
        made["search"] = text_page("# Search\n\n<div id='found'></div>", nav=nav(),
                                   scripts=SCRIPTS)
        for name, text in made.items():
            (part / f"{name}.html").write_text(relinked(with_contents(text), made.keys()),
                                              encoding="utf-8")
        reference(part / "reference")
        found = sorted(part.rglob("*.html"))
        entries = [entry for path in found if path.stem != "search"
                   for entry in sections(path, path.relative_to(part).as_posix())]
        (part / "search_index.js").write_text(f"const PAGES = {json.dumps(entries)};\n",
                                              encoding="utf-8")
    return len(found)


def guides() -> list[Path]:
    """The pages of text beside the notebooks."""
    return sorted(NOTEBOOKS.glob("*.md"))


def nav() -> str:
    """Links to all pages, and the search box."""
    names = {path.stem: path.stem.lower().replace("_", " ")
             for path in [*notebooks(), *guides()]} | {
        "results": "results", "claims": "claims", "reference/lib": "reference"}
    links = "".join(f"<a href='{page}.html'>{name}</a>" for page, name in names.items())
    return (f"<nav><a href='index.html'><b>From LoRA to the edge</b></a>{links}"
            "<form action='search.html'><input name='q' type='search' placeholder='Search' "
            "aria-label='Search'></form></nav>")


def with_contents(text: str) -> str:
    """A page with the list of its sections below the title."""
    heads = re.findall(r'<h2 id="([^"]+)">(.*?)<a class="anchor-link"', text, re.DOTALL)
    if not heads:
        return text
    links = "".join(f"<li><a href=\"#{where}\">{head}</a>" for where, head in heads)
    return text.replace("</h1>", f"</h1><div class='contents'><ol>{links}</ol></div>", 1)


def results_text(results: list[Path]) -> str:
    """The index of the stored results in Markdown."""
    rows = ["# Stored results\n", "What the notebooks and the claims are made of. Each file "
            "names the command that made it.\n",
            "| file | made by | on | seconds |", "|---|---|---|---|"]
    for path in results:
        kept = read_json(RESULTS / path)
        rows.append(f"| [{path.as_posix()}](results/{path.as_posix()}) | `{kept['command']}` "
                    f"| {kept['made']} | {kept['piece_seconds']:,.0f} |")
    return "\n".join(rows)


def claims_text(results: list[Path]) -> str:
    """The ledger of claims in Markdown, each with its evidence."""
    names = {f"data/results/{path.as_posix()}": f"results/{path.as_posix()}" for path in results}
    text = ["# Claims\n", "T: the tutorial, P: the paper. [As JSON](claims.json).\n"]
    for claim in read_json(CLAIMS):
        evidence = ", ".join(f"[{e}]({names[e]})" if e in names else f"`{e}` (not made yet)"
                             for e in claim["evidence"])
        said, found, method = (html.escape(claim[key], quote=False)
                               for key in ("claim", "finding", "method"))
        text.append(f"## {claim['id']}: {claim['verdict']}\n\n> {said}\n\n"
                    f"{found}\n\n*Method:* {method}\n\n"
                    f"*Number:* {number(claim)}\n\n*Evidence:* {evidence}\n\n*Commands:* "
                    + ", ".join(f"`{command}`" for command in claim["command"]) + "\n")
    return "\n".join(text)


def number(claim: dict[str, Any]) -> str:
    """A claim's value, unit and interval."""
    if claim["value"] is None:
        return "none"
    ends = claim["interval"] and " to ".join(f"{end:.4g}" for end in claim["interval"])
    return f"{claim['value']:.4g} {claim['unit']}" + (f" ({ends})" if ends else "")


def reference(out: Path) -> None:
    """The library's reference from its docstrings."""
    import pdoc

    pdoc.render.configure(docformat="google", show_source=False,
                          template_directory=TEMPLATES / "reference")
    # It shows what constants are: the same on every machine, in pages and in its search.
    with mock.patch.object(PurePath, "__repr__", _shown):
        pdoc.pdoc("lib", output_directory=out)
    for path in out.rglob("*.html"):
        path.write_text(without_dead_links(path.read_text(encoding="utf-8")), encoding="utf-8")


def _shown(path: PurePath) -> str:
    for place, name in ((BUILD, "build"), (ROOT, ".")):
        if path.is_relative_to(place):
            path = name / path.relative_to(place)
    return f"Path({path.as_posix()!r})"


def without_dead_links(text: str) -> str:
    """A page whose inherited docstrings link no names that it does not show."""
    ids = set(re.findall(r' id="([^"]+)"', text))
    return re.sub(r'<a href="#([^"]+)">(.*?)</a>',
                  lambda link: link[0 if link[1] in ids else 2], text, flags=re.DOTALL)


def sections(path: Path, url: str) -> list[dict[str, str]]:
    """A page's parts for the search: where each is, its title, its words.

    The pages are our own and whole, so patterns do; parsing them takes minutes.
    """
    text = path.read_text(encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", text, re.DOTALL)
    if title is None:  # a redirection
        return []
    name = plain(title[1]).removesuffix(" API documentation")
    text = re.sub(r"<(script|style|nav|head)\b.*?</\1>", " ", text, flags=re.DOTALL)
    text = re.sub(r"<div class=.(?:contents|jp-\w+Prompt)\b.*?</div>", " ", text, flags=re.DOTALL)
    found = []
    for number, part in enumerate(PARTS.split(text)):
        where = re.match(r'(\w+) id="([^"]+)"', part) if number else None
        own = (plain("<" + part.partition("</h")[0]) if where and where[1][0] == "h" else
               html.unescape(where[2]) if where else "")
        found.append({"url": f"{url}#{html.unescape(where[2])}" if where else url,
                      "title": f"{name}: {own}" if own else name, "text": plain("<" + part)})
    return found


def plain(text: str) -> str:
    """The words of HTML."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).replace("¶", " ").split())
