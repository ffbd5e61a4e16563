for (const pre of document.querySelectorAll(".cell_output .highlight-python pre")) splitLines(pre);

// Equation beside code: give the terms of an equation their classes before MathJax sets it, mark the code that computes
// them, and light both when one is pointed at or focused. Without JavaScript equation and code are there, unmarked.
for (const box of document.querySelectorAll(".lr-beside[data-terms]")) {
  const { number, tex, code } = JSON.parse(box.dataset.terms);
  const math = box.querySelector("div.math"), pre = box.querySelector("pre"), label = document.createElement("span");
  math.textContent = `\\[${tex}\\]`;
  label.textContent = number; // MathJax would leave room for it on both sides
  math.after(label);
  const long = ([[from, to]]) => to - from;
  const terms = code.map((places, k) => ({ places, k })).sort((a, b) => long(b.places) - long(a.places)); // inner ones last
  for (const { places, k } of terms) places.forEach(([from, to], i) => mark(pre, from, to, `lr-t${k}`, i === 0));

  const light = (event) => {
    box.querySelectorAll(".lr-lit").forEach((part) => part.classList.remove("lr-lit"));
    const name = event.target.closest(".lr-term")?.className.match(/lr-t\d+/)[0];
    if (name && !/out$/.test(event.type)) box.querySelectorAll("." + name).forEach((part) => part.classList.add("lr-lit"));
  };
  for (const type of ["pointerover", "pointerout", "focusin", "focusout"]) box.addEventListener(type, light);
}

// Each line in an element of its own, so that what does not fit continues below, indented. A shape such as "m n" stays whole.
function splitLines(pre) {
  const lines = [[]];
  for (const word of pre.querySelectorAll("span")) if (/^"[^"]{1,12}"$/.test(word.textContent)) word.classList.add("lr-whole");
  for (const child of [...pre.childNodes]) {
    const pieces = child.nodeType === Node.TEXT_NODE ? child.data.split(/(?<=\n)/).map((text) => new Text(text)) : [child];
    for (const piece of pieces) {
      lines.at(-1).push(piece);
      if (piece.textContent.endsWith("\n")) lines.push([]);
    }
  }
  pre.replaceChildren(...lines.map((parts) => {
    const line = document.createElement("span");
    line.append(...parts);
    line.className = "lr-line";
    line.style.setProperty("--in", line.textContent.search(/\S|$/) + 4 + "ch");
    return line;
  }));
}

// Wrap the letters from..to, which may lie in several of the highlighter's elements; the first place can be focused.
function mark(pre, from, to, name, stop) {
  const walker = document.createTreeWalker(pre, NodeFilter.SHOW_TEXT), whole = pre.textContent, parts = [];
  for (let start = 0; walker.nextNode(); start += walker.currentNode.length) {
    const node = walker.currentNode, a = Math.max(from - start, 0), b = Math.min(to - start, node.length);
    const indent = /\n\s*$/.test(whole.slice(0, start + a)) && !node.data.slice(a, b).trim();
    if (a < b && !indent) parts.push([node, a, b]);
  }
  parts.forEach(([node, a, b], i) => {
    const range = document.createRange(), span = document.createElement("span");
    range.setStart(node, a);
    range.setEnd(node, b);
    span.className = `lr-term ${name}`;
    if (stop && i === 0) span.tabIndex = 0;
    range.surroundContents(span);
  });
}
