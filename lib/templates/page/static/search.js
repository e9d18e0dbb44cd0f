// Looks the words of ?q= up in PAGES (search_index.js). All of them must occur.
const asked = new URLSearchParams(location.search).get("q") || "";
const words = asked.toLowerCase().split(/\s+/).filter(Boolean);
const times = (text, word) => text.toLowerCase().split(word).length - 1;
// A word in a title weighs as much as ten in the text.
const weight = page => words.reduce(
  (sum, word) => sum + 10 * times(page.title, word) + times(page.text, word), 0);
const found = !words.length ? [] : PAGES
  .filter(page => words.every(word => times(page.title + " " + page.text, word)))
  .sort((a, b) => weight(b) - weight(a));

function marked(text) {
  const from = Math.max(0, text.toLowerCase().indexOf(words[0]) - 80);
  const part = document.createElement("p"), piece = text.slice(from, from + 240);
  const escaped = words.map(word => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  for (const bit of piece.split(new RegExp(`(${escaped.join("|")})`, "i"))) {
    const hit = words.includes(bit.toLowerCase());
    part.append(hit ? Object.assign(document.createElement("mark"), {textContent: bit}) : bit);
  }
  return part;
}

document.querySelectorAll("input[name=q]").forEach(box => { box.value = asked; });
const list = document.getElementById("found");
list.append(words.length ? `${found.length} found for "${asked}"` : "Type a word above.");
for (const page of found.slice(0, 50)) {
  const head = document.createElement("h3");
  head.append(Object.assign(document.createElement("a"),
    {href: page.url, textContent: page.title}));
  list.append(head, marked(page.text));
}
