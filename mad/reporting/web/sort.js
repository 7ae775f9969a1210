// A click on a heading of a `table.sorts` sorts its first body by that column: numbers by data-v, the largest first; empty ones last.
"use strict";
for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => row.cells[column].dataset.v ?? row.cells[column].textContent.trim();
  heads.forEach((head, column) => {
    head.onclick = () => {
      const rows = [...table.tBodies[0].rows];
      const numeric = rows.every((row) => !Number.isNaN(Number(value(row, column))));
      const falls = numeric ? head.ariaSort !== "descending" : head.ariaSort === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.ariaSort = falls ? "descending" : "ascending";
      rows.sort((a, b) => {
        const [x, y] = [value(a, column), value(b, column)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return (falls ? -1 : 1) * (numeric ? x - y : x.localeCompare(y));
      });
      table.tBodies[0].append(...rows);
    };
  });
}
