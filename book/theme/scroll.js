// A phone shows some tables as cards; to a screen reader they stay tables.
window.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table:is(.lr-wide, .lr-notation, .claims)")) {
    table.setAttribute("role", "table");
    for (const [parts, role] of [["thead, tbody", "rowgroup"], ["tr", "row"], ["th", "columnheader"], ["td", "cell"]])
      table.querySelectorAll(parts).forEach((part) => part.setAttribute("role", role));
  }
});

// A formula wider than its column scrolls; only what has the focus can be scrolled by keyboard.
window.addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  const mark = () => {
    for (const box of document.querySelectorAll("div.math"))
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
  };
  mark();
  window.addEventListener("resize", mark);
});
