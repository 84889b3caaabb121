const key = (row, i) => { const text = row.cells[i].textContent, n = parseFloat(text); return Number.isNaN(n) ? text : n; };
for (const table of document.querySelectorAll("table.sortable"))
  table.tHead.addEventListener("click", (event) => {
    const th = event.target.closest("th");
    if (!th) return;
    const i = th.cellIndex, down = th.ariaSort === "ascending";
    for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
    th.ariaSort = down ? "descending" : "ascending";
    const rows = [...table.tBodies[0].rows].sort((a, b) => { const x = key(a, i), y = key(b, i); return (x > y) - (x < y); });
    table.tBodies[0].append(...(down ? rows.reverse() : rows));
  });
const zoomed = () => document.querySelector(".zoom[aria-pressed=true]");
const zoom = (button, on) => { button.ariaPressed = on; document.body.style.overflow = on ? "hidden" : ""; };
for (const button of document.querySelectorAll(".zoom"))
  button.addEventListener("click", () => zoom(button, button.ariaPressed !== "true"));
document.addEventListener("keydown", (event) => { if (["Escape", "Tab"].includes(event.key) && zoomed()) zoom(zoomed(), false); });
