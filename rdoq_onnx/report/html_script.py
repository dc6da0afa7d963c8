"""The script of the HTML report: draws plots in light and dark, switches runs, adds search, sorting and CSV."""

SCRIPT = r"""
const figures = JSON.parse(document.getElementById("figures").textContent);
const root = document.documentElement;
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const narrow = window.matchMedia("(max-width: 600px)");
function template(theme) {
  const [text, grid, back] = theme === "dark" ? ["#c3cad6", "#2b3240", "#1a1f28"] : ["#3a4252", "#e7eaef", "#ffffff"];
  const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, tickcolor: grid, ticks: "outside", ticklen: 4 };
  return { layout: { font: { color: text, family: "system-ui, sans-serif", size: narrow.matches ? 11 : 12.5 },
    xaxis: axis, yaxis: axis, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: back, bordercolor: grid, font: { color: text }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: text } } };
}
async function show(theme) {
  root.dataset.theme = theme;
  const dragmode = window.matchMedia("(pointer: coarse)").matches ? false : "zoom";
  for (const [name, { data, layout }] of Object.entries(figures)) {
    if (document.getElementById(name).closest("[hidden]")) continue;  // of no size: drawn once it is shown
    await Plotly.react(name, data, { ...layout, dragmode, template: template(theme) },
      { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] });
  }
  root.dataset.drawn = Math.round(performance.now());
}
document.getElementById("theme").onclick = () => show(root.dataset.theme === "dark" ? "light" : "dark");
dark.onchange = event => show(event.matches ? "dark" : "light");

const tabs = [...document.querySelectorAll("nav [data-tab]")];
function press(chosen) {
  for (const tab of tabs) tab.setAttribute("aria-pressed", tab === chosen);
  for (const run of document.querySelectorAll("[data-run]")) run.hidden = run.dataset.run !== chosen.dataset.tab;
}
for (const tab of tabs) tab.onclick = () => { press(tab); show(root.dataset.theme); mark(); };
if (tabs.length) press(tabs[0]);

const boxes = [...document.querySelectorAll(".scroll")];
function mark() { for (const box of boxes) box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1); }
const quoted = text => /[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
const plain = row => [...row.cells].map(cell => quoted(cell.textContent)).join(",");
const value = (row, column) => row.cells[column].textContent;
function compare(a, b) {  // numbers by size, before words; empty ones last
  const [x, y] = [parseFloat(a.replaceAll(",", "")), parseFloat(b.replaceAll(",", ""))];
  if (a === "" || b === "") return (a === "") - (b === "");
  if (isNaN(x) !== isNaN(y)) return isNaN(x) - isNaN(y);
  return isNaN(x) ? a.localeCompare(b) : x - y;
}
function equip(box) {
  const table = box.querySelector("table"), body = table.tBodies[0], rows = [...body.rows];
  const head = [...table.tHead.rows[0].cells], tools = document.createElement("div");
  const csv = () => [table.tHead.rows[0], ...[...body.rows].filter(row => !row.hidden)].map(plain).join("\n") + "\n";
  tools.className = "tools";
  tools.innerHTML = "<input type='search' placeholder='Search' aria-label='Search the table'>" +
    "<output></output><button type='button'>Copy CSV</button><button type='button'>Save CSV</button>";
  const [search, count, copy, save] = tools.children;
  search.oninput = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
    count.textContent = words.length ? `${rows.filter(row => !row.hidden).length} of ${rows.length}` : "";
  };
  copy.onclick = async () => {
    await navigator.clipboard.writeText(csv());
    count.textContent = "copied";
  };
  save.onclick = () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    link.download = `${box.dataset.name}.csv`;
    link.click();
    URL.revokeObjectURL(link.href);
  };
  head.forEach((cell, column) => {
    cell.tabIndex = 0;
    cell.onclick = () => {
      const down = cell.getAttribute("aria-sort") === "ascending", sign = down ? -1 : 1;
      for (const other of head) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      const order = (a, b) => value(a, column) && value(b, column) ? sign : 1;  // empty cells stay last
      body.append(...rows.sort((a, b) => order(a, b) * compare(value(a, column), value(b, column))));
    };
    cell.onkeydown = event => { if (event.key === "Enter") cell.onclick(); };
  });
  box.before(tools);
}
document.querySelectorAll("[data-name]").forEach(equip);
window.addEventListener("resize", mark);
mark();
show(dark.matches ? "dark" : "light");
"""
