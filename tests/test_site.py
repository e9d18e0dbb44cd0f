"""The site: all links lead somewhere, nothing is remote, the search finds."""

import json
from urllib.parse import unquote, urldefrag

import pytest
from browser import ask, needs_browser
from conftest import ROOT
from links import Links, faults

from lib import site
from lib.artifacts import BUILD, read_json, verified
from lib.course import notebooks
from lib.scratch import _HOST

RESULTS = ROOT / "data" / "results"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("web") / "site"
    site.build(out)
    return out


def index(built):
    text = (built / "search_index.js").read_text(encoding="utf-8")
    return json.loads(text.removeprefix("const PAGES = ").removesuffix(";\n"))


def test_all_links_lead_somewhere_and_nothing_is_remote(built):
    assert faults(built) == []
    assert verified(built)


@pytest.mark.parametrize(("page", "fault"), [
    ("<script src='https://cdn.example/x.js'></script>", "loads https"),
    ("<link href='//fonts.example/f.css' rel='stylesheet'>", "loads //"),
    ("<style>@import 'https://fonts.example/f.css';</style>", "loads https"),
    ("<p style='background: url(https://a.example/b.png)'>", "loads https"),
    ("<script type='module'>import x from 'https://cdn.example/x';</script>", "loads https"),
    ("<img src='gone.png'>", "no file gone.png"),
    ("<a href='gone.html'>", "no file gone.html"),
    ("<a href='#gone'>", "no anchor #gone"),
    ("<meta http-equiv='refresh' content='0; url=gone.html'>", "no file gone.html"),
    ("<p id='a'><p id='a'><a href='#a'>", "2 anchor #a"),
])
def test_the_link_checker_can_fail(page, fault, tmp_path):
    (tmp_path / "a.html").write_text(f"<p id='here'><a href='a.html#here'>{page}")
    assert len(faults(tmp_path)) == 1 and fault in faults(tmp_path)[0]


def test_nothing_tells_where_it_was_built(built):
    for path in [*built.rglob("*.html"), *built.rglob("*.js")]:
        text = path.read_text(encoding="utf-8")
        for told in (ROOT.as_posix(), BUILD.as_posix(), _HOST):
            assert told not in text, (path, told)
    page = (built / "reference" / "lib" / "artifacts.html").read_text(encoding="utf-8")
    assert "Path(&#39;build&#39;)" in page and "Path(&#39;.&#39;)" in page


def test_it_has_the_notebooks_with_their_outputs(built):
    for path in notebooks():
        page = (built / f"{path.stem}.html").read_text(encoding="utf-8")
        pictures = path.read_text(encoding="utf-8").count('"image/png"')
        assert page.count("data:image/png;base64,") == pictures > 0
        assert page.count("jp-OutputArea-output") > 5
        # The words below a figure are its text alternative, so all have one.
        assert 'alt="Figure"' not in page and "No description" not in page
        assert f"href=\"{path.stem}.html\"" in (built / "index.html").read_text(encoding="utf-8")


def test_it_has_the_results_and_every_claim(built):
    home = (built / "index.html").read_text(encoding="utf-8")
    assert "merged, GGUF Q8_0, served" in home and "<table>" in home
    links = Links((built / "results.html").read_text(encoding="utf-8")).links
    for path in RESULTS.rglob("*.json"):
        name = f"results/{path.relative_to(RESULTS).as_posix()}"
        assert name in links and (built / name).read_bytes() == path.read_bytes()
    claims = (built / "claims.html").read_text(encoding="utf-8")
    for claim in read_json(ROOT / "data" / "claims.json"):
        assert f">{claim['id']}: {claim['verdict']}<" in claims


def test_it_has_the_reference(built):
    for path in (ROOT / "lib").glob("[!_]*.py"):
        assert (built / "reference" / "lib" / f"{path.stem}.html").is_file()
    page = (built / "reference" / "lib" / "lora.html").read_text(encoding="utf-8")
    assert 'id="count_adapter"' in page


def test_the_search_knows_all_pages(built):
    entries = index(built)
    pages = {urldefrag(e["url"])[0] for e in entries}
    assert pages >= {f"{p.stem}.html" for p in notebooks()} | {
        "index.html", "claims.html", "results.html", "INSTRUCTORS.html",
        "reference/lib/pareto.html"}
    for entry in entries:
        url, fragment = urldefrag(entry["url"])
        ids = Links((built / url).read_text(encoding="utf-8")).ids if "hypervolume" in (
            entry["title"] + entry["text"]).lower() else [unquote(fragment)]
        assert not fragment or unquote(fragment) in ids
    found = [e["url"] for e in entries if "hypervolume" in (e["title"] + e["text"]).lower()]
    assert "reference/lib/pareto.html#hypervolume" in found
    assert any(url.startswith("05_coa_lora_pareto.html#") for url in found)


ASK = """return [document.querySelectorAll("#found h3 a").length,
  [...document.querySelectorAll("#found h3 a")].map(link => link.getAttribute("href")),
  document.querySelectorAll("#found img").length, document.querySelectorAll("mark").length];"""


@needs_browser
def test_the_search_finds_in_a_browser(built):
    count, links, _, marks = ask(built / "search.html", ASK, query="?q=hypervolume+front")
    assert count > 1 and marks >= count
    assert any(link.startswith("05_coa_lora_pareto.html#") for link in links)
    assert ask(built / "search.html", ASK, query="?q=nowhereinthecourse")[0] == 0
    # What is asked for is shown as text.
    assert ask(built / "search.html", ASK, query="?q=%3Cimg+src%3Dx%3E")[2] == 0


@needs_browser
@pytest.mark.parametrize("name", ["index", "01_lora_math", "04_edge_serving", "claims"])
def test_no_page_is_wider_than_the_window(name, built):
    wide, drawn = ask(built / f"{name}.html", """return [
      document.documentElement.scrollWidth - innerWidth,
      [...document.querySelectorAll("math")].filter(m => !m.getBoundingClientRect().width).length];
    """)
    assert wide <= 0 and drawn == 0
