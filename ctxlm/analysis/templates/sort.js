// A click on a column's name sorts its table: up first, then down; cells without a value stay last.
for (const table of document.querySelectorAll("table")) {
  const head = table.tHead && table.tHead.rows[0], body = table.tBodies[0];
  if (!head || !body || body.rows.length < 3 || table.matches(".simpletable") || table.querySelector("[colspan], [rowspan]")) continue;
  const read = (row, k) => row.cells[k] ? row.cells[k].textContent.trim() : "";
  const number = text => /^[-+−]?[\d.]/.test(text) ? parseFloat(text.replace(/,/g, "").replace("−", "-")) : NaN;
  [...head.cells].forEach((cell, k) => {
    if (!cell.textContent.trim() || ![...body.rows].some(row => read(row, k))) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...cell.childNodes);
    cell.append(button);
    button.addEventListener("click", () => {
      const down = cell.getAttribute("aria-sort") === "ascending";
      for (const other of head.cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map(row => ({row, text: read(row, k)}));
      const missing = rows.filter(item => item.text === "" || item.text === "–");
      const there = rows.filter(item => !missing.includes(item));
      const numeric = there.every(item => !Number.isNaN(number(item.text)));
      const order = (a, b) => numeric ? number(a.text) - number(b.text) : a.text.localeCompare(b.text, "en", {numeric: true});
      there.sort((a, b) => down ? order(b, a) : order(a, b));
      body.append(...[...there, ...missing].map(item => item.row));
    });
  });
}
// A field above a table of runs hides the rows that lack one of its words.
for (const table of document.querySelectorAll("table.runs")) {
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = "filter: words of a grid or a run";
  field.setAttribute("aria-label", "show only runs whose row has these words");
  const left = document.createElement("output"), rows = [...table.tBodies[0].rows];
  const count = () => left.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} runs`;
  table.parentNode.before(field, left);
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
    count();
  });
  count();
}
