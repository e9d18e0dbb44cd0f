"""The diagrams: the files are what the code draws, readable as text, and no text is too long."""

from xml.etree import ElementTree

import pytest

from data.evidence.diagrams import DIAGRAMS, FOLDER, SIZE, WIDTH, text_width


@pytest.mark.parametrize("name", DIAGRAMS)
def test_a_diagram_is_up_to_date_and_its_texts_fit(name: str) -> None:
    text = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert text == DIAGRAMS[name]() and len(text.encode()) < 12_000
    assert {path.stem for path in FOLDER.iterdir()} == {*DIAGRAMS}
    root, svg = ElementTree.fromstring(text), "{http://www.w3.org/2000/svg}"
    assert root.findtext(f"{svg}title") and len(root.findtext(f"{svg}desc")) > 80
    for group in (root, *root.iter(f"{svg}g")):
        room = WIDTH - 28 if group is root else float(group.find(f"{svg}rect").get("width"))
        for line in group.findall(f"{svg}text"):
            width = text_width(line.text, float(line.get("font-size", SIZE)),
                               bold=line.get("font-weight") == "bold")
            share = {None: 1, "middle": 0.5, "end": 0}[line.get("text-anchor")]
            used = float(line.get("x")) + share * width if group is root else width
            assert used <= room, line.text
