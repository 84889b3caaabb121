const root = document.documentElement;
const keep = (theme) => { root.dataset.theme = theme; try { localStorage.setItem("matrigami-theme", theme); } catch { /* no storage: this page only */ } };
try { const theme = localStorage.getItem("matrigami-theme"); if (theme) root.dataset.theme = theme; } catch { /* as the system has it */ }
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
document.querySelector("#theme").addEventListener("click", () => keep(isDark() ? "light" : "dark"));
const slider = document.querySelector("#slider");
if (slider) {
  const frames = JSON.parse(document.querySelector("#frames").textContent);
  const show = () => {
    const frame = frames[slider.value];
    document.querySelector("#panels").innerHTML = frame.panels;
    document.querySelector("#value").textContent = frame.value;
    slider.setAttribute("aria-valuetext", frame.value);
    document.querySelector("#meaning").innerHTML = frame.meaning;
    document.querySelectorAll("[data-number]").forEach((cell) => { cell.textContent = frame.numbers[cell.dataset.number]; });
  };
  slider.addEventListener("input", show);
}
const go = (selector) => { const link = document.querySelector(selector); if (link) location.href = link.href; };
document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.matches("input")) return;
  if (event.key === "ArrowLeft") go("nav .previous");
  if (event.key === "ArrowRight") go("nav .next");
  if (event.key === "Home") go("nav .home");
  if (event.key === "d") document.querySelector("#theme").click();
});
