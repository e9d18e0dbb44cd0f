"""The diagrams of the notebooks: `python -m data.evidence diagrams` draws them all again.

Coordinates are pixels of a panel 960 wide. A colour has the same meaning in every diagram.
"""

from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path

from lib.course.run import NOTEBOOKS
from lib.evaluate.scores import COLOURS
from lib.files import replacing

FOLDER = NOTEBOOKS / "diagrams"
WIDTH, SIZE, LEADING = 960, 15, 21  # of the panel, of text, from line to line
DARK = "#222222"
# Colour of an edge (and, pale, of what is inside), and its meaning.
KINDS = {"plain": ("#555555", ""), "trained": (COLOURS[0], "trained"),
         "frozen": ("#777777", "frozen"), "four": (COLOURS[1], "4 bits"),
         "eight": (COLOURS[2], "8 bits"), "loud": (COLOURS[3], ""),
         "loss": (COLOURS[4], "counts in the loss"), "new": (COLOURS[5], "new in the cache")}
NARROW = "fijlrt .,:;()[]|/'!I-"


def text_width(text: str, size: float = SIZE, *, bold: bool = False) -> float:
    """Rough width of a text in DejaVu Sans, pixels."""
    ems = sum(0.38 if c in NARROW else 0.93 if c in "mwMW" else 0.7 if c.isupper() else 0.62
              for c in text)
    return ems * size * (1.11 if bold else 1)


class Picture:
    """A panel to draw on. In texts, a line that starts with * is bold."""

    def __init__(self, title: str, words: str, height: int) -> None:
        self.title, self.words, self.height = title, words, height
        self.parts: list[str] = []
        self.meanings: dict[str, str] = {}  # of the kinds in use
        self.label(28, 40, f"*{title}", size=18)

    def _text(self, x: float, y: float, text: str, size: int, anchor: str) -> Iterator[str]:
        for i, line in enumerate(text.split("\n")):
            more = f' text-anchor="{anchor}"' * (anchor != "start")
            more += f' font-size="{size}"' * (size != SIZE) + ' font-weight="bold"' * (
                line[:1] == "*")
            yield (f'<text x="{x:g}" y="{y + i * LEADING:g}"{more}>'
                   f"{escape(line.removeprefix('*'), quote=False)}</text>")

    def label(self, x: float, y: float, text: str, *, size: int = SIZE, anchor: str = "start"
              ) -> None:
        """Lines of text, the first on the base line y."""
        self.parts += self._text(x, y, text, size, anchor)

    def box(self, x: float, y: float, w: float, h: float, text: str = "", kind: str = "plain",
            meaning: str = "") -> None:
        """A box with lines of text in its middle; `meaning` is for the legend."""
        colour, usual = KINDS[kind]
        if meaning := meaning or usual:
            self.meanings.setdefault(kind, meaning)
        inside = f'fill="{colour}" fill-opacity=".17"' if kind != "plain" else 'fill="none"'
        top = y + h / 2 - text.count("\n") * LEADING / 2 + 5.5
        lines = "".join(self._text(x + w / 2, top, text, SIZE, "middle")) if text else ""
        self.parts.append(f'<g><rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4" '
                          f'{inside} stroke="{colour}" stroke-width="1.6"/>{lines}</g>')

    def cells(self, x: float, y: float, w: float | Sequence[float], h: float, texts: Sequence[str],
              kinds: str | Sequence[str] = "plain", meaning: str = "") -> list[float]:
        """A row of boxes side by side; the middle of each."""
        middles = []
        widths = w if isinstance(w, Sequence) else [w] * len(texts)
        kinds = [kinds] * len(texts) if isinstance(kinds, str) else kinds
        for text, width, kind in zip(texts, widths, kinds, strict=True):
            self.box(x, y, width, h, text, kind, meaning if kind != "plain" else "")
            middles.append(x + width / 2)
            x += width
        return middles

    def arrow(self, *points: tuple[float, float], head: bool = True, colour: str = "#444444",
              width: float = 1.8, dashes: str = "") -> None:
        """A line through the points, with a head at the last one."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        more = ' marker-end="url(#head)"' * head + f' stroke-dasharray="{dashes}"' * bool(dashes)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" '
                          f'stroke-width="{width:g}"{more}/>')

    def arrows(self, *paths: str) -> None:
        """An arrow along each path, written as "x,y x,y"."""
        for path in paths:
            self.arrow(*((float(x), float(y)) for x, y in (at.split(",") for at in path.split())))

    def dot(self, x: float, y: float, fill: str = "#ffffff", *, radius: float = 6,
            sign: str = "") -> None:
        """A point of a plot, or a round sign."""
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{fill}" '
                          f'stroke="{DARK}" stroke-width="1.4"/>')
        if sign:
            self.label(x, y + 6, f"*{sign}", anchor="middle", size=18)

    def plus(self, x: float, y: float) -> None:
        """The sum of what arrives."""
        self.dot(x, y, radius=16, sign="+")

    def svg(self) -> str:
        """The file's text."""
        x, y, parts = 28.0, self.height - 32, self.parts
        for kind, meaning in self.meanings.items():
            colour = KINDS[kind][0]
            parts = [*parts, f'<rect x="{x:g}" y="{y}" width="18" height="16" rx="3" '
                     f'fill="{colour}" fill-opacity=".17" stroke="{colour}" stroke-width="1.6"/>',
                     *self._text(x + 26, y + 13, meaning, SIZE, "start")]
            x += 54 + text_width(meaning)
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
            f'width="{WIDTH}" height="{self.height}" role="img" fill="{DARK}" '
            f'font-family="DejaVu Sans, Arial, sans-serif" font-size="{SIZE}">',
            f"<title>{escape(self.title)}</title>", f"<desc>{escape(self.words)}</desc>",
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="9" '
            'markerHeight="9" markerUnits="userSpaceOnUse" orient="auto">'
            '<path d="M0 0L10 5L0 10z" fill="#444444"/></marker></defs>',
            f'<rect x="1" y="1" width="{WIDTH - 2}" height="{self.height - 2}" rx="12" '
            'fill="#ffffff" stroke="#bbbbbb"/>', *[p for p in parts if p], "</svg>", ""])


Draw = Callable[[Picture], None]
DIAGRAMS: dict[str, Callable[[], str]] = {}


def diagram(height: int, title: str) -> Callable[[Draw], Draw]:
    """Register what draws a diagram, by its name; its docstring is the description."""
    def register(draw: Draw) -> Draw:
        def drawn() -> str:
            picture = Picture(title, " ".join((draw.__doc__ or "").split()), height)
            draw(picture)
            return picture.svg()
        DIAGRAMS[draw.__name__] = drawn
        return draw
    return register


@diagram(430, "A LoRA layer: a thin path beside a frozen matrix")
def lora_path(p: Picture) -> None:
    """The input x goes through the frozen matrix W and, beside it, through A, then B, times alpha
    over r. The two results are added."""
    p.box(28, 165, 120, 60, "*x\n576 numbers")
    p.arrows("148,195 190,195 190,130 300,130", "420,130 810,130 810,178",
             "190,195 190,290 240,290", "380,290 500,290", "550,290 600,290",
             "716,290 810,290 810,213", "827,195 862,195")
    p.box(300, 70, 120, 120, "*W\n576 × 576", "frozen")
    p.label(436, 92, "331,776 numbers, which stay as they are")
    p.label(620, 152, "W x")
    p.box(240, 270, 140, 40, "*A", "trained")
    p.label(310, 334, "r × d_in = 16 × 576", anchor="middle")
    p.label(438, 278, "16 numbers", anchor="middle")
    p.box(500, 225, 50, 130, "*B", "trained")
    p.label(525, 377, "d_out × r = 576 × 16", anchor="middle")
    p.box(600, 262, 116, 56, "*× α / r\n= 32 / 16")
    p.label(822, 280, "(α / r) B A x")
    p.plus(810, 195)
    p.box(862, 165, 70, 60, "*y\n576")
    p.label(640, 352, "A and B: 18,432 numbers,\n5.6 % of W. B starts at zero,\n"
            "so at first nothing changes.")


def adapted(p: Picture, x: float, y: float, w: float, text: str) -> None:
    """A frozen matrix with its adapter."""
    p.box(x, y, w, 34, text, "frozen")
    p.box(x + w, y, 48, 34, "*A, B", "trained")


def readers(p: Picture, norm: float, w: float, end: float, texts: dict[float, str]) -> None:
    """The adapted matrices that read one norm's output, at their heights, up to `end`."""
    for y, text in texts.items():
        p.arrow((154, norm), (172, norm), (172, y), (190, y))
        adapted(p, 190, y - 17, w, text)
        p.arrow((238 + w, y), (end, y))


@diagram(440, "One transformer block, and the seven matrices that get an adapter")
def attention_block(p: Picture) -> None:
    """Above: norm, then q_proj, k_proj and v_proj, the attention, o_proj; the result is added to
    the input. Below: norm, then gate_proj and up_proj, their product, down_proj; the result is
    added again. All seven matrices have an adapter A, B."""
    p.box(28, 68, 40, 32, "*x")
    p.arrows("68,84 879,84", "119,84 119,145", "574,165 620,165", "823,165 895,165 895,101",
             "911,84 932,84 932,244 48,244 48,278 879,278", "119,278 119,327", "576,347 606,347",
             "844,347 895,347 895,295", "911,278 945,278")
    p.label(500, 77, "residual: x itself goes past the layers", anchor="middle")
    p.box(84, 145, 70, 40, "norm")
    readers(p, 165, 160, 440, {125: "q_proj  576 × 576", 165: "k_proj  192 × 576",
                               205: "v_proj  192 × 576"})
    p.box(440, 108, 134, 114, "*attention\ntakes in what\nearlier tokens\nsay")
    adapted(p, 620, 148, 155, "o_proj  576 × 576")
    p.plus(895, 84)
    p.box(84, 327, 70, 40, "norm")
    readers(p, 347, 190, 460, {325: "gate_proj  1536 × 576", 369: "up_proj  1536 × 576"})
    p.box(460, 306, 116, 82, "*product\nSiLU(gate)\n× up")
    adapted(p, 606, 330, 190, "down_proj  576 × 1536")
    p.plus(895, 278)
    p.label(872, 266, "to the next of 30 blocks", anchor="end")
    p.label(932, 421, "shapes: d_out × d_in", anchor="end")


@diagram(450, "NF4: 4-bit codes, a scale a block, a second scale for the scales")
def nf4_blocks(p: Picture) -> None:
    """A row of weights is cut into blocks of 64. Each weight becomes a 4-bit code, each block
    keeps one scale in 8 bits, and 256 scales share a second scale of 32 bits: 4.127 bits a
    weight."""
    blocks = [(".08 −.02 .00 .05 −.11 … .03", "14 5 7 12 0 … 10", ".11", "1"),
              (".01 −.03 .05 .00 −.02 … .04", "9 2 15 7 3 … 14", ".05", "2")]
    for y, text in ((111, "weights"), (187, "codes"), (262, "scales"), (338, "second\nscale")):
        p.label(28, y, text)
    for x, (weights, codes, top, number) in zip((116, 456), blocks, strict=True):
        p.label(x + 154, 78, f"block {number}: 64 weights", anchor="middle")
        for middle in p.cells(x, 88, 44, 34, weights.split()):
            p.arrow((middle, 122), (middle, 164))
        p.cells(x, 164, 44, 34, codes.split(), "four")
        p.box(x, 238, 308, 36, f"largest magnitude of the block: {top}", "eight")
    p.label(782, 180, "…", anchor="middle", size=18)
    p.label(868, 78, "block 256", anchor="middle")
    p.box(804, 88, 128, 34, "64 weights")
    p.arrow((868, 122), (868, 164))
    p.box(804, 164, 128, 34, "64 codes", "four")
    p.box(804, 238, 128, 36, "scale 256", "eight")
    for x in (270, 610, 868):
        p.arrow((x, 198), (x, 238), head=False, dashes="4 4")
        p.arrow((x, 274), (x, 318), head=False, dashes="4 4")
    p.box(116, 318, 816, 36, "one float32 number (32 bits) that 256 scales share")
    p.label(116, 386, "*4 + 8 / 64 + 32 / (64 × 256) = 4.127 bits a weight")
    p.label(932, 386, "one float32 a block: 4.5", anchor="end")


@diagram(420, "Which tokens have a label, and where each is predicted")
def label_mask(p: Picture) -> None:
    """The tokens of a prompt, an answer, the end token and padding. The labels of prompt and
    padding are -100, those of the answer and the end token are their ids. The scores at one
    place are compared with the label of the next."""
    tokens = ["…", "Response", ":", "⏎", "Har", "bor", "win", "…", "seals", ".", "<|im_end|>",
              "pad", "pad"]
    ids = ["…", "14212", "42", "198", "25520", "3259", "4726", "…", "19468", "30", "2", "0", "0"]
    widths, learned = [36, 86, 50, 52, 64, 58, 58, 36, 64, 50, 98, 58, 58], range(4, 11)
    labels = [text if i in learned else "…" if not i else "-100" for i, text in enumerate(ids)]
    for y, text in ((119, "tokens"), (155, "ids"), (209, "shift\nby one"), (290, "labels")):
        p.label(28, y, text)
    middles = p.cells(108, 96, widths, 36, tokens)
    p.cells(108, 132, widths, 36, ids)
    kinds = ["loss" if i in learned else "plain" for i in range(len(ids))]
    p.cells(108, 266, widths, 36, labels, kinds)
    for i in learned:
        p.arrow((middles[i - 1], 168), (middles[i - 1], 200), (middles[i], 232), (middles[i], 266))
    for start, end, text in ((0, 4, "prompt"), (4, 10, "answer"), (10, 11, "end token"),
                             (11, 13, "padding")):
        left, right = 108 + sum(widths[:start]) + 3, 108 + sum(widths[:end]) - 3
        p.arrow((left, 88), (right, 88), head=False, width=3)
        p.label((left + right) / 2, 80, text, anchor="middle")
    p.label(108, 336, "What the model says at a place is compared with the label of the next "
            "place.\n-100: no loss. The end token has a label, so the model learns to stop.")


@diagram(450, "One training step of QLoRA")
def training_step(p: Picture) -> None:
    """A batch goes forward through the frozen 4-bit base and the adapter; the loss is that of the
    answer's tokens; the backward pass gives gradients for A and B alone; the optimizer moves
    these; the next batch follows."""
    p.box(28, 105, 150, 100, "*batch\nexamples: ids\nand labels")
    p.arrows("178,155 230,155", "670,155 738,155", "835,205 835,290", "738,328 672,328",
             "576,290 576,220", "480,328 103,328 103,205")
    p.box(230, 72, 440, 166)
    p.label(450, 95, "*model: each layer has both", anchor="middle")
    p.box(248, 110, 222, 110, "*base\n106,168,320 weights\nin the layers: they stay", "four",
          "4 bits, frozen")
    p.label(485, 170, "+", anchor="middle", size=18)
    p.box(500, 110, 152, 110, "*A and B\n4,884,480\nnumbers", "trained")
    p.label(704, 145, "forward", anchor="middle")
    p.box(738, 105, 194, 100, "*loss\nof the answer's\ntokens alone", "loss")
    p.label(845, 252, "backward")
    p.box(738, 290, 194, 76, "*gradients\nfor A and B alone", "trained")
    p.box(480, 290, 192, 76, "*optimizer: Adam\nmoves A and B a little", "trained")
    p.label(588, 264, "update")
    p.label(115, 318, "next step, another batch")
    p.label(28, 398, "The backward pass goes through the base as well, but its weights get no "
            "gradient.")


@diagram(450, "Three ways from base and adapter to one file")
def merge_routes(p: Picture) -> None:
    """Route original adds the adapter to the original weights, route dequantized to the decoded
    4-bit weights, route through_4bit to the 4-bit weights, which rounds the sum again. The
    first two are quantised once, at the end."""
    rows = [("original", "*W\noriginal, 16 bits", "frozen", "*W + (α / r) B A\n16 bits", "plain",
             "E is gone"),
            ("dequantized", "*W₄\nin 16 bits", "four", "*W₄ + (α / r) B A\n16 bits", "plain",
             "as trained"),
            ("through_4bit", "*W₄\nin NF4", "four", "*W₄ + (α / r) B A\nrounded to NF4", "four",
             "most is lost")]
    for x, text in ((246, "base"), (420, "adapter"), (578, "sum"), (735, "against training")):
        p.label(x, 76, text, anchor="middle")
    for y, (name, base, kind, merged, into, differs) in zip((88, 188, 288), rows, strict=True):
        p.label(28, y + 42, f"*{name}")
        p.box(166, y, 160, 74, base, kind)
        p.plus(346, y + 37)
        p.box(366, y + 15, 108, 44, "(α / r) B A", "trained")
        p.arrow((474, y + 37), (498, y + 37))
        p.box(498, y, 168, 74, merged, into)
        p.arrow((666, y + 37), (804, y + 37))
        p.label(735, y + 27, differs, anchor="middle")
    p.box(804, 88, 128, 174, "*served file\nquantised\nonce: GGUF\nor LLM.int8", "eight",
          "8 bits (or other types)")
    p.box(804, 288, 128, 74, "*served file\nas it is", "four")
    p.label(28, 396, "W₄ = W + E: the 4-bit base that the adapter was trained on, and E its "
            "rounding error.")


@diagram(430, "LLM.int8: loud columns are multiplied separately")
def int8_outliers(p: Picture) -> None:
    """Columns of x with a magnitude of 6.0 or more are multiplied in 16 bits; all others are
    rounded to 8 bits with a scale for each row and multiplied in 8 bits. The two results are
    added."""
    p.label(160, 116, "*x", anchor="middle")
    rows = ["0.3 1.2 −0.7 9.1 0.5 −1.4", "−0.8 0.1 0.9 8.4 −0.2 0.6", "1.1 −0.5 0.4 7.7 0.0 0.8",
            "0.2 0.7 −1.3 0.3 1.0 −0.1"]
    for i, row in enumerate(rows):
        p.cells(28, 128 + 36 * i, 45, 36, row.split(), ["plain"] * 3 + ["loud"] + ["plain"] * 2,
                "outlier column")
    p.label(28, 310, "rows: tokens\ncolumns: features")
    p.arrows("298,164 324,164 324,128 350,128", "186,272 186,282 350,282",
             "796,128 846,128 846,188", "796,282 846,282 846,222", "863,205 894,205")
    p.box(350, 84, 206, 88, "*quiet columns\nrounded to INT8,\none scale per row (token)", "eight")
    p.label(573, 134, "×", anchor="middle", size=18)
    p.box(590, 84, 206, 88, "*W in INT8\none scale per row\n(output feature)", "eight")
    p.box(350, 238, 206, 88, "*columns with 6.0\nor more, in any token:\nthey stay in 16 bits",
          "loud")
    p.label(573, 288, "×", anchor="middle", size=18)
    p.box(590, 238, 206, 88, "*their weights\ndecoded from INT8\nto 16 bits", "eight")
    p.label(856, 146, "8 bits,\n× scales")
    p.label(856, 280, "16 bits")
    p.plus(846, 205)
    p.box(894, 185, 38, 40, "*y")
    p.label(350, 362, "What is spared the rounding is the activation: no weight escapes INT8.")


@diagram(440, "Prefill and decode: how often the weights are read")
def prefill_decode(p: Picture) -> None:
    """Prefill takes all tokens of the prompt in one pass over the weights and fills the KV cache.
    Decode makes one pass over all weights for each token of the answer, reads the cache and
    adds to it."""
    p.label(112, 78, "*prefill: one pass for the prompt")
    p.label(446, 78, "*decode: one pass for each token of the answer")
    for y, text in ((117, "in"), (198, "weights"), (274, "out"), (336, "KV cache")):
        p.label(28, y, text)
    passes = [(112, 286, ["Give", "a", "…", "diagnosis"], "*all weights\nread once", "Har"),
              (446, 138, ["Har"], "*all weights\nagain", "bor"),
              (620, 138, ["bor"], "*all weights\nagain", "win"),
              (794, 138, ["win"], "*all weights\nagain", "ch")]
    for i, (x, w, tokens, weights, out) in enumerate(passes):
        middle = x + w / 2
        for at in p.cells(x if not i else middle - 34, 94, [54, 54, 54, 124] if not i else [68],
                          36, tokens):
            p.arrow((at, 130), (at, 164))
        p.box(x, 164, w, 56, weights, "frozen", "weights, frozen")
        p.arrow((middle, 220), (middle, 250))
        p.box(middle - 34, 250, 68, 36, out)
        if i < 3:
            gap = x + w + 14
            p.arrow((middle + 34, 268), (gap, 268), (gap, 112), (passes[i + 1][0] + 35, 112))
        old = 4 + i - 1 if i else 0
        count = 4 + i - old
        p.cells(x + (i > 0) * 3, 318, 19, 26, [""] * (old + count),
                ["plain"] * old + ["new"] * count)
    p.label(28, 380, "KV cache: a key and a value for each token, in each block. A pass reads the "
            "old ones, adds its own.")


@diagram(440, "A request, from the client and back")
def server_request(p: Picture) -> None:
    """A client's request reaches the front end, which checks it, refuses it or has its prompt
    rendered, and waits for a slot. llama.cpp, a process of its own, computes the answer in its
    slots, with the base model and the adapters. The answer streams back."""
    p.box(28, 146, 136, 88, "*client\nOpenAI format")
    p.arrows("164,168 252,168", "560,245 668,245", "560,301 668,301",
             "800,344 800,384 96,384 96,234")
    p.label(208, 159, "request", anchor="middle")
    p.arrow((252, 212), (164, 212), colour=COLOURS[3])
    p.label(208, 234, "refused", anchor="middle")
    p.box(252, 70, 324, 274)
    p.label(414, 96, "*front end", anchor="middle")
    for i, text in enumerate(("host, key and page admitted?", "every field known and valid?",
                              "prompt rendered: nothing lost?", "wait for a free slot")):
        p.box(268, 112 + 56 * i, 292, 42, f"{i + 1}  {text}")
    p.label(621, 236, "template", anchor="middle")
    p.label(621, 323, "request", anchor="middle")
    p.box(668, 70, 264, 274)
    p.label(800, 96, "*llama.cpp, its own process", anchor="middle")
    p.cells(684, 112, 58, 42, ["slot 1", "slot 2", "slot 3", "slot 4"])
    p.label(800, 178, "requests computed together", anchor="middle")
    p.box(684, 194, 232, 58, "*base model\none GGUF file", "frozen")
    p.cells(684, 260, 116, 42, ["adapter 1", "adapter 2"], "trained")
    p.label(800, 328, "scales: by request", anchor="middle")
    p.label(112, 375, "the answer, piece by piece through the front end:  data: …   data: …   "
            "data: [DONE]")


@diagram(470, "CoA-LoRA: the layer's format sets a small matrix between A and B")
def coa_adapter(p: Picture) -> None:
    """The format and the place of a layer go through a small network to an r by r matrix U. The
    adapter of the layer is alpha over r times B (I + U) A. With U at zero it is plain LoRA.
    Gates that are not learned shut a quarter of the rank in layers above 2 bits."""
    p.label(28, 78, "the layer's format, 5 fields")
    p.label(466, 78, "its place")
    p.cells(28, 88, [58, 98, 98, 62, 64], 36, ["bits", "scale bits", "scale type", "block",
                                               "group"])
    p.cells(466, 88, [64, 56], 36, ["depth", "kind"])
    p.box(626, 60, 306, 70, "*gate: diag(g − 1), not learned\ng is 1; 0 for the last 4 of 16\n"
          "components if not 2 bits", "frozen")
    p.arrows("88,124 88,158", "84,355 112,355 112,316 150,316", "290,316 344,316",
             "468,316 522,316", "662,316 706,316", "790,316 838,316 838,338",
             "112,355 112,396 300,396", "512,396 838,396 838,372", "855,355 888,355")
    p.arrow((526, 124), (526, 141), (88, 141), head=False)
    x, y = 28.0, 158
    for w, text, kind in ((116, "embeddings\n7 × 8 = 56", "trained"), (98, "LayerNorm", "trained"),
                          (96, "linear\n56 → 128", "trained"), (62, "SiLU", "plain"),
                          (114, "linear, from 0\n128 → 256", "trained"), (64, "× 0.1", "plain")):
        p.box(x, y, w, 54, text, kind)
        p.arrow((x + w, 185), (x + w + 22, 185))
        x += w + 22
    p.plus(x + 16, 185)
    p.arrow((x + 16, 130), (x + 16, 168))
    p.arrow((x + 33, 185), (x + 58, 185))
    p.box(x + 58, 158, 84, 54, "*U\n16 × 16")
    p.arrow((x + 100, 212), (x + 100, 240), (406, 240), (406, 286))
    p.label(424, 264, "U = 0: plain LoRA.")
    p.label(28, 240, "blue above: θ, 40,864 trained numbers")
    p.box(28, 330, 56, 50, "*x")
    p.box(150, 290, 140, 52, "*A\n16 × d_in", "trained")
    p.box(344, 286, 124, 60, "*I + U\n16 × 16")
    p.box(522, 290, 140, 52, "*B\nd_out × 16", "trained")
    p.box(706, 294, 84, 44, "× α / r")
    p.box(300, 372, 212, 48, "W, rounded to its format", "frozen")
    p.plus(838, 355)
    p.box(888, 332, 44, 46, "*y")


@diagram(460, "One round of the search for good configurations")
def search_round(p: Picture) -> None:
    """Left: evaluated configurations by bits and loss; the front are those that no other beats.
    Right, a round: a Gaussian process predicts the loss, climbs from points of the front
    propose candidates, five are chosen by expected gain and evaluated, and the next round
    starts."""
    front = [(84, 120), (124, 186), (196, 240), (286, 286), (346, 300)]
    p.arrows("60,318 376,318", "60,318 60,80", "662,128 694,128", "813,184 813,232",
             "694,288 662,288", "543,232 543,184")
    p.label(218, 342, "bits a weight: known exactly", anchor="middle")
    p.label(72, 84, "log of the loss")
    p.box(240, 240, 46, 26, "", "loud", "area gained")
    steps = [front[0]]
    for x, y in front[1:]:
        steps += [(x, steps[-1][1]), (x, y)]
    p.arrow(*steps, (372, 300), head=False, dashes="5 4")
    for x, y in ((150, 150), (176, 128), (240, 176), (268, 206), (320, 232), (346, 246)):
        p.dot(x, y)
    for x, y in front:
        p.dot(x, y, DARK)
    p.arrow((240, 232), (240, 300), head=False, colour=COLOURS[3], width=2.5)
    p.dot(240, 266, COLOURS[3])
    for x, fill, text in ((196, DARK, "front: none beats it"), (400, "#ffffff", "beaten"),
                          (500, COLOURS[3], "candidate and its likely loss")):
        p.dot(x, 436, fill)
        p.label(x + 14, 441, text)
    boxes = [(424, 72, "*1  predict\nGaussian process: log loss\nfrom each layer's error"
              "\ntimes its sensitivity"),
             (694, 72, "*2  climb from the front\n5 climbs of up to 6 steps,\na step changes "
              "one field\nin up to 32 layers"),
             (694, 232, "*3  choose 5\nby the area that each is\nexpected to add; two may\nfill "
              "empty segments"),
             (424, 232, "*4  evaluate\nloss on a fixed batch,\nbits by counting; what\nnone "
              "beats is the front")]
    for x, y, text in boxes:
        p.box(x, y, 238, 112, text)
    p.label(556, 214, "next round")
    p.label(424, 376, "Each of the 40 segments of bits keeps a front of its own,\n"
            "so every budget stays covered.")


@diagram(430, "Chance has two sources")
def two_sources(p: Picture) -> None:
    """A grid of training runs by test examples, each cell right or wrong. Other examples would
    give another score, and so would another training run. The interval must count both."""
    rows = ["111011110111", "101111010110", "111111110111"]
    p.arrows("150,86 582,86", "128,100 128,208")
    p.label(150, 77, "*source 1: which examples you test on")
    p.label(28, 230, "*source 2: which training run you got")
    for i, row in enumerate(rows):
        p.label(28, 124 + 36 * i, f"seed {i}")
        p.cells(150, 100 + 36 * i, 36, 36, row, ["plain" if c == "1" else "loud" for c in row],
                "wrong answer (0); right is 1")
        p.label(596, 124 + 36 * i, f"{row.count('1')} of {len(row)}")
    p.label(690, 77, "*the interval of the score")
    for y, half, text in ((126, 42, "one run, examples alone"),
                          (192, 96, "both sources counted")):
        p.label(811, y - 18, text, anchor="middle")
        p.arrow((811 - half, y), (811 + half, y), head=False, width=5,
                colour=COLOURS[3] if half < 50 else DARK)
        p.dot(811, y, DARK, radius=5)
    p.label(28, 287, "*variance of the mean  =")
    p.box(262, 250, 310, 64, "variance of the 3 runs' means\n÷ 3 runs")
    p.label(592, 288, "+", anchor="middle", size=18)
    p.box(612, 250, 320, 64, "variance of the 12 examples' means\n÷ 12 examples")
    p.label(28, 352, "More examples shrink the second part alone, more runs the first. With few "
            "runs the interval is\nwider still: Student's t takes 4.3 standard errors for three "
            "runs, instead of 1.96.")


def write_diagrams(folder: Path = FOLDER) -> None:
    """Write every diagram."""
    folder.mkdir(exist_ok=True)
    for name, drawn in DIAGRAMS.items():
        with replacing(folder / f"{name}.svg") as part:
            part.write_text(drawn(), encoding="utf-8")
