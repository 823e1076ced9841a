"use strict";
// Sorts by any column (stable, rows without a value last), filters by words and by selectors.
(() => {
  const table = document.getElementById("results");
  const headers = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const measured = [...body.rows];
  const tools = document.getElementById("tools");
  const filter = document.getElementById("filter");
  const sortBox = document.getElementById("sort");
  const selects = [...tools.querySelectorAll("select[data-field]")];
  const text = new Map(measured.map((row) => [row, [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase()]));
  const inWords = new Intl.Collator(undefined, { numeric: true });

  const value = (row, column, isNumber) => {
    const cell = row.cells[column];
    const raw = cell.dataset.sort ?? (isNumber ? "" : cell.textContent);
    return raw === "" ? null : isNumber ? Number(raw) : raw;
  };

  const sort = (column, direction) => {
    const isNumber = headers[column].dataset.kind === "number";
    const sign = direction === "descending" ? -1 : 1;
    const keyed = [...body.rows].map((row) => [value(row, column, isNumber), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (isNumber ? a - b : inWords.compare(a, b));
    });
    body.append(...keyed.map(([, row]) => row));
    headers.forEach((header, i) => header.setAttribute("aria-sort", i === column ? direction : "none"));
    sortBox.value = String(column);
  };

  const asMeasured = () => {
    body.append(...measured);
    headers.forEach((header) => header.setAttribute("aria-sort", "none"));
  };

  const matches = (row) => selects.every(({ dataset, value: wanted }) => {
    const found = row.getAttribute(`data-${dataset.field}`);
    return wanted.startsWith("!") && dataset.field === "status" ? found !== wanted.slice(1) : !wanted || found === wanted;
  });

  const show = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of measured) {
      row.hidden = !(matches(row) && words.every((word) => text.get(row).includes(word)));
      shown += !row.hidden;
    }
    document.getElementById("shown").value = `${shown} of ${measured.length} rows`;
  };

  const turn = (column) => sort(column, headers[column].getAttribute("aria-sort") === "ascending" ? "descending" : "ascending");

  headers.forEach((header, column) => header.firstElementChild.addEventListener("click", () => turn(column)));
  document.getElementById("reverse").addEventListener("click", () => sortBox.value !== "" && turn(Number(sortBox.value)));
  sortBox.addEventListener("change", () => (sortBox.value === "" ? asMeasured() : sort(Number(sortBox.value), "ascending")));
  tools.addEventListener("input", show);
  tools.addEventListener("submit", (event) => event.preventDefault());
  tools.addEventListener("reset", () => setTimeout(() => { asMeasured(); show(); }));
  show();
})();
