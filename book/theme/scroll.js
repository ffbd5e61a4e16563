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
