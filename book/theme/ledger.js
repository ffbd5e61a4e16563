// Sort and filter the ledger of claims. Without JavaScript the whole table is there.
// The address keeps what is chosen, as #find=galore&verdict=holds&sort=paper, so that a view can be linked.
document.addEventListener("DOMContentLoaded", () => {
  const table = document.querySelector("table[data-ledger]");
  if (!table) return;
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const names = heads.map((head) => head.textContent.trim());
  const text = (row, column) => row.cells[column].textContent.trim();
  const last = names.indexOf("verdict");

  const bar = document.createElement("div");
  bar.className = "lr-ledger";
  bar.setAttribute("role", "search");
  bar.setAttribute("aria-label", "Claims");
  bar.innerHTML =
    '<label>find <input type="search"></label>' +
    '<label>verdict <select><option value="">all</option></select></label>' +
    '<button type="button">show all</button><span role="status"></span>';
  const [search, select, reset, count] =
    ["input", "select", "button", "[role=status]"].map((s) => bar.querySelector(s));
  for (const verdict of [...new Set(rows.map((row) => text(row, last)))].sort()) select.add(new Option(verdict, verdict));
  table.closest(".lr-scroll").before(bar);

  let sorted = "";  // a column's name, after "-" if it falls
  const draw = () => {
    const words = search.value.toLowerCase().split(/\s+/);
    const column = names.indexOf(sorted.replace("-", "")), sign = sorted[0] === "-" ? -1 : 1;
    const order = column < 0 ? rows : [...rows].sort((a, b) => sign * text(a, column).localeCompare(text(b, column)));
    let shown = 0;
    for (const row of rows) {
      const whole = row.textContent.toLowerCase();
      row.hidden = !(words.every((w) => whole.includes(w)) && (!select.value || text(row, last) === select.value));
      shown += !row.hidden;
    }
    body.append(...order);
    heads.forEach((head, k) => {
      if (k === column) head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
    const by = column < 0 ? "" : `, by ${names[column]}${sign < 0 ? ", from the end" : ""}`;
    count.textContent = `${shown} of ${rows.length} claims${by}`;
    reset.hidden = shown === rows.length && column < 0;
  };
  const store = () => {
    draw();
    const kept = Object.entries({ find: search.value, verdict: select.value, sort: sorted }).filter(([, v]) => v);
    const fragment = new URLSearchParams(kept).toString();
    history.replaceState(null, "", fragment ? `#${fragment}` : location.href.split("#")[0]);
  };
  const restore = () => {
    const kept = new URLSearchParams(location.hash.slice(1));
    search.value = kept.get("find") ?? "";
    select.value = kept.get("verdict") ?? "";
    if (select.selectedIndex < 0) select.value = "";  // a verdict that does not exist
    sorted = kept.get("sort") ?? "";
    draw();
  };
  search.addEventListener("input", store);
  select.addEventListener("change", store);
  reset.addEventListener("click", () => {
    search.value = select.value = sorted = "";
    store();
    search.focus();
  });
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = names[column];
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      sorted = sorted === names[column] ? `-${names[column]}` : names[column];
      store();
    });
  });
  window.addEventListener("hashchange", restore);
  restore();
});
