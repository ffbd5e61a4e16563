// Sort and filter the ledger of claims. Without JavaScript the whole table is there.
document.addEventListener("DOMContentLoaded", () => {
  const table = document.querySelector("table[data-ledger]");
  if (!table) return;
  const body = table.tBodies[0], rows = [...body.rows];
  const text = (row, column) => row.cells[column].textContent.trim();

  const bar = document.createElement("div");
  bar.className = "lr-ledger";
  bar.innerHTML =
    '<label>find <input type="search"></label>' +
    '<label>verdict <select><option value="">all</option></select></label>' +
    '<span role="status"></span>';
  const [search, select, count] = ["input", "select", "[role=status]"].map((s) => bar.querySelector(s));
  for (const verdict of [...new Set(rows.map((row) => text(row, 4)))].sort()) select.add(new Option(verdict, verdict));
  table.closest(".lr-scroll").before(bar);

  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of rows) {
      const whole = row.textContent.toLowerCase();
      row.hidden = !(words.every((w) => whole.includes(w)) && (!select.value || text(row, 4) === select.value));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} claims`;
  };
  search.addEventListener("input", filter);
  select.addEventListener("change", filter);
  filter();

  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      rows.sort((a, b) => (up ? 1 : -1) * text(a, column).localeCompare(text(b, column)));
      body.append(...rows);
    });
  });
});
