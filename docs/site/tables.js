// Puts a field above each long table that keeps the rows which hold all the words typed into it.
// Without JavaScript the tables are whole.
(() => {
  const LONG = 20; // rows, about a screen

  const filter = (table) => {
    const rows = [...table.tBodies].flatMap((body) => [...body.rows]);
    if (rows.length < LONG || table.dataset.filtered) return;
    table.dataset.filtered = "yes";
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const field = document.createElement("input");
    field.type = "search";
    field.placeholder = `Filter ${rows.length} rows`;
    field.setAttribute("aria-label", field.placeholder);
    const count = document.createElement("output");
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      const kept = texts.map((text) => words.every((word) => text.includes(word)));
      rows.forEach((row, index) => { row.hidden = !kept[index]; });
      count.textContent = words.length ? `${kept.filter(Boolean).length} of ${rows.length} rows` : "";
    });
    const line = document.createElement("p");
    line.className = "table-filter";
    line.append(field, count);
    (table.closest(".md-typeset__scrollwrap") || table).before(line);
  };

  document.querySelectorAll("article table, body > table").forEach(filter);
})();
