// Columns of text stand on the left, numbers on the right, and a click on a column's name sorts its table: up first, then
// down; cells without a value stay last.
for (const table of document.querySelectorAll("table:not(.simpletable)")) {
  const head = table.tHead && table.tHead.rows[0], body = table.tBodies[0];
  if (!head || !body || table.querySelector("[colspan], [rowspan]")) continue;
  const read = (row, k) => row.cells[k] ? row.cells[k].textContent.trim() : "";
  const missing = text => text === "" || text === "–";
  const number = text => /^[-+−]?[\d.]/.test(text) ? parseFloat(text.replace(/,/g, "").replace("−", "-")) : NaN;
  [...head.cells].forEach((cell, k) => {
    const words = [...body.rows].map(row => read(row, k)).filter(word => !missing(word));
    const long = words.some(word => word.length > 40);
    if (long || words.filter(word => Number.isNaN(number(word))).length * 2 > words.length)
      for (const row of table.rows) row.cells[k]?.classList.add("text", ...(long ? ["long"] : []));
    if (!cell.textContent.trim() || !words.length || body.rows.length < 3) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...cell.childNodes);
    cell.append(button);
    button.addEventListener("click", () => {
      const down = cell.getAttribute("aria-sort") === "ascending";
      for (const other of head.cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map(row => ({row, text: read(row, k)}));
      const present = rows.filter(item => !missing(item.text)), absent = rows.filter(item => missing(item.text));
      const numeric = present.every(item => !Number.isNaN(number(item.text)));
      const order = (a, b) => numeric ? number(a.text) - number(b.text) : a.text.localeCompare(b.text, "en", {numeric: true});
      present.sort((a, b) => down ? order(b, a) : order(a, b));
      body.append(...[...present, ...absent].map(item => item.row));
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
