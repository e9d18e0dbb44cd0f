// Starts reveal.js, and shrinks the slides that are too full for 1280 x 720.
const SMALLEST = 0.6;

function fits(slide) {
  const box = slide.getBoundingClientRect(), unit = box.width / 1280;
  return [...slide.querySelectorAll("*:not(aside, aside *)")].every(part => {
    const {right, bottom} = part.getBoundingClientRect();
    return right <= box.left + 1224 * unit && bottom <= box.top + 682 * unit
      && (part.localName !== "pre" || part.scrollWidth <= part.clientWidth + 1);
  });
}

function shrink(slide) {
  const size = parseFloat(getComputedStyle(slide).fontSize);
  for (let scale = 1; scale >= SMALLEST && !fits(slide); scale -= 0.04)
    slide.style.fontSize = `${size * scale}px`;
}

const deck = new Reveal({
  width: 1280, height: 720, margin: 0, center: false, hash: true, transition: "none",
  slideNumber: "c/t", defaultTiming: 60, plugins: [RevealNotes]});
const where = ({currentSlide}) => {
  document.getElementById("where").textContent = currentSlide.dataset.head || "";
};
deck.on("slidechanged", where);
deck.on("ready", where);
deck.initialize().then(async () => {
  const slides = document.querySelector(".slides");
  slides.classList.add("measuring");
  deck.layout();
  // Fonts are loaded when text first needs them: now. Others would be wider.
  slides.getBoundingClientRect();
  await document.fonts.ready;
  slides.querySelectorAll("section:not(.stack)").forEach(shrink);
  slides.classList.remove("measuring");
  document.body.dataset.fitted = "yes";
});
