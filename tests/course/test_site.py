"""Site and slides: all links lead somewhere, nothing is remote, a browser draws both."""

import re
from pathlib import Path

import nbformat
import pytest
from browser import ask, needs_browser
from conftest import ROOT
from links import faults

from data.evidence.site import build_site, build_slides, deck_cells, shown_first
from lib.course.run import notebooks
from lib.errors import UserError
from lib.files import BUILD, read_json, verified

SITE = pytest.mark.parametrize("path", notebooks(), ids=[p.stem for p in notebooks()])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("web") / "site"
    build_site(out)
    return out


@pytest.fixture(scope="module")
def decks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("web") / "slides"
    build_slides(out)
    return out


@pytest.mark.parametrize("built", ["site", "decks"])
def test_links_lead_somewhere_and_nothing_is_remote(built: str, request: pytest.FixtureRequest
                                                    ) -> None:
    out = request.getfixturevalue(built)
    assert faults(out) == [] and verified(out) and "jupyter_execute" not in {
        path.name for path in out.parent.iterdir()}
    for path in [*out.rglob("*.html"), *out.rglob("searchindex.js")]:
        text = path.read_text(encoding="utf-8")
        for told in (ROOT.as_posix(), BUILD.as_posix(), "/tmp/", Path.home().as_posix() + "/"):
            assert told not in text, path


def test_the_site_has_every_claim_result_and_module(site: Path) -> None:
    def page(name: str) -> str:
        return (site / f"{name}.html").read_text(encoding="utf-8")

    claims = read_json(ROOT / "data" / "claims.json")
    for claim in claims:
        assert f"<h2>{claim['id']}: {claim['verdict']}<" in page("claims")
    assert len(claims) == 23
    for path in (ROOT / "data" / "results").rglob("*.json"):
        assert f">{path.stem}<" in re.sub(r"</?span[^>]*>", "", page("results")), path
    for path in (ROOT / "lib").rglob("[a-z]*.py"):
        room = path.parent.name if path.parent.name != "lib" else "ground"
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        assert f'id="module-{module}"' in page(f"lib-{room}")
    assert "From LoRA to the edge" in page("index") and "What this run made" in page("index")
    assert page("index").count("_images/front-") >= 4


@SITE
def test_pages_have_outputs_and_texts_for_figures(path: Path, site: Path) -> None:
    text = (site / f"{path.stem}.html").read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    figures = (len(re.findall(r'"image/(?:png|svg\+xml)"', path.read_text(encoding="utf-8")))
               + sum(cell.source.count("](diagrams/") for cell in cells))
    alts = re.findall(r'<img alt="([^"]+)" src="_images', re.sub(r'class="[^"]*" ', "", text))
    assert len(alts) == figures > 0 and "Figure" not in alts
    # Setup and solutions open on a click.
    solutions = path.read_text(encoding="utf-8").count("_solution(")
    assert solutions and text.count("<details") >= 4 + 3


def prose(text: str) -> int:
    """Words of a slide's Markdown, without formulas, pictures and the targets of links."""
    text = re.sub(r"(?s)\$\$.*?\$\$|\$.*?\$|!\[.*?\]\(.*?\)|\]\(.*?\)", " ", text)
    return len(re.findall(r"\w[\w.,'-]*", text))


@SITE
def test_a_deck_has_its_slides_and_prose_is_for_the_speaker(path: Path, decks: Path) -> None:
    deck = (decks / f"{path.stem}.slides.html").read_text(encoding="utf-8")
    notes = "".join(re.findall(r'(?s)<aside class="notes">.*?</aside>', deck))
    visible = re.sub(r'(?s)<aside class="notes">.*?</aside>', "", deck)
    assert "_solution" in notes and "_solution" not in re.sub(r"(?s)<style.*?</style>", "", visible)
    cells = nbformat.read(path, as_version=4).cells
    for cell in cells:
        if cell.cell_type == "markdown" and re.match(r"# |## |### Exercise", cell.source):
            assert cell.metadata.get("slide"), cell.source[:60]
    slides = [cell.metadata.slide for cell in cells if cell.metadata.get("slide")]
    assert max(map(prose, slides)) <= 40
    live = [cell for cell in deck_cells(cells) if cell.cell_type == "code"
            and cell.metadata.slideshow.slide_type != "notes"]
    assert 3 <= len(live) <= 12
    assert max(cell.source.count("\n") for cell in live) < 16


def test_solutions_are_shown_on_request(tmp_path: Path) -> None:
    build_slides(tmp_path / "out", solutions=True)
    deck = (tmp_path / "out" / "01_lora_math.slides.html").read_text(encoding="utf-8")
    assert "_solution" in re.sub(r'(?s)<aside class="notes">.*?</aside>', "", deck)
    assert "01_lora_math.slides.html" in (tmp_path / "out" / "index.html").read_text()


def test_a_deck_of_a_run_has_its_outputs_and_vectors(tmp_path: Path) -> None:
    for path in (ROOT / "notebooks").glob("0*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code" and any("image/png" in output.get("data", {})
                                                for output in cell.outputs):
                cell.outputs = [nbformat.v4.new_output("display_data", {
                    "image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg'/>"})]
        notebook.cells.insert(2, nbformat.v4.new_code_cell(
            "PROFILE = 'smoke'", metadata={"tags": ["injected-parameters"]}))
        nbformat.write(notebook, tmp_path / path.name)
    build_slides(tmp_path / "out", executed=tmp_path)
    deck = (tmp_path / "out" / "04_edge_serving.slides.html").read_text(encoding="utf-8")
    assert "data:image/svg+xml;base64,PHN2ZyB4" in deck and 'src="data:image/png' not in deck
    (tmp_path / "04_edge_serving.ipynb").unlink()
    advice = f"code of 04_edge_serving: .* run --only 04 --profile {tmp_path.name}"
    with pytest.raises(UserError, match=advice):
        build_slides(tmp_path / "none", executed=tmp_path)


def test_the_first_page_shows_a_figure_once(tmp_path: Path) -> None:
    """A run's outputs have it twice: as pixels, and as a drawing, which is shown."""
    notebook = nbformat.read(notebooks("02")[0], as_version=4)
    for output in (output for cell in notebook.cells if cell.metadata.get("front")
                   for output in cell.outputs if "image/png" in output.get("data", {})):
        output.data["image/svg+xml"] = "<svg xmlns='http://www.w3.org/2000/svg'/>"
    (tmp_path / "run").mkdir()
    nbformat.write(notebook, tmp_path / "run" / notebooks("02")[0].name)
    text = shown_first(tmp_path / "run", tmp_path)
    assert text.count("![") == text.count(".svg)") == len([*tmp_path.glob("front-*")]) > 0


def test_what_sphinx_cannot_build_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                              ) -> None:
    monkeypatch.setattr("data.evidence.site.NOTEBOOKS", tmp_path)
    with pytest.raises(UserError, match="Sphinx failed"):
        build_site(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_browser
def test_a_page_is_drawn(site: Path) -> None:
    width, formulas = ask(site / "01_lora_math.html", """return [
        document.documentElement.scrollWidth, document.querySelectorAll("mjx-container").length];
        """, ready="document.querySelector('mjx-container')")
    assert width <= 1280 and formulas > 50


@needs_browser
@SITE
def test_a_deck_is_drawn_and_nothing_is_cut_off(path: Path, decks: Path) -> None:
    formulas, slides, cut = ask(decks / f"{path.stem}.slides.html", """
        const cut = [];
        for (const slide of Reveal.getSlides()) {
            const at = Reveal.getIndices(slide);
            Reveal.slide(at.h, at.v);
            const broken = [...slide.querySelectorAll("img")].some(i => !i.naturalWidth);
            if (slide.scrollHeight > 721 || slide.scrollWidth > 1281 || broken)
                cut.push([at.h, at.v, slide.scrollWidth, slide.scrollHeight, broken]);
        }
        const formulas = document.querySelectorAll("mjx-container").length;
        return [formulas, Reveal.getTotalSlides(), cut];""",
        ready="window.Reveal && Reveal.isReady() && document.querySelector('mjx-container')")
    assert slides > 12 and formulas > 3 and cut == []
