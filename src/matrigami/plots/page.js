const key = (row, i) => { const text = row.cells[i].textContent, n = parseFloat(text); return Number.isNaN(n) ? text : n; };
for (const table of document.querySelectorAll("table.sortable"))
  table.tHead.addEventListener("click", (event) => {
    const th = event.target.closest("th"), i = th.cellIndex, down = th.ariaSort === "ascending";
    for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
    th.ariaSort = down ? "descending" : "ascending";
    const rows = [...table.tBodies[0].rows].sort((a, b) => { const x = key(a, i), y = key(b, i); return (x > y) - (x < y); });
    table.tBodies[0].append(...(down ? rows.reverse() : rows));
  });
