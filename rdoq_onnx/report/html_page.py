"""The template of the HTML report; html_report.py fills in @NAME@."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@ · rdoq-onnx</title>
<style>
:root { --back: #f6f7f9; --card: #fff; --text: #1c2230; --soft: #5d6677; --line: #e2e6ec; --accent: #2f6fe4;
  color-scheme: light }
:root[data-theme=dark] { --back: #12151b; --card: #1a1f28; --text: #e6e9ef; --soft: #9aa4b5; --line: #2b3240;
  --accent: #78a9ff; color-scheme: dark }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif }
main, header { max-width: 1180px; margin: 0 auto; padding: 0 20px }
header { padding-top: 28px; display: flex; gap: 16px; align-items: flex-start; justify-content: space-between }
h1 { font-size: 26px; margin: 0; line-height: 1.2; overflow-wrap: anywhere }
h2 { font-size: 19px; margin: 0 0 4px } h3 { font-size: 15px; margin: 10px 0 0; font-weight: 600 }
p, header span { color: var(--soft); margin: 4px 0 10px; overflow-wrap: anywhere }
button { font: inherit; color: var(--text); background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 6px 12px; cursor: pointer; white-space: nowrap }
section, .card { background: var(--card); border: 1px solid var(--line); border-radius: 12px }
section { padding: 18px 20px; margin: 18px 0 }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin-top: 18px }
.card { padding: 14px 16px; display: flex; flex-direction: column }
.card b { font-size: 25px; line-height: 1.25; font-variant-numeric: tabular-nums }
.card small, small { color: var(--soft) }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 8px 24px }
.pair > * { min-width: 0 }
figure { margin: 0; min-width: 0 }
.scroll { overflow: auto; max-height: 460px; border: 1px solid var(--line); border-radius: 8px }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 5px 10px; border-bottom: 1px solid var(--line); vertical-align: top }
th { position: sticky; top: 0; background: var(--card); color: var(--soft); font-weight: 600; white-space: nowrap }
tr:last-child td { border-bottom: 0 }
code, pre { font: 12.5px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace }
td code { white-space: nowrap }
.scroll td:last-child { min-width: 200px } .pair td:first-child { white-space: nowrap }
.pair td { overflow-wrap: anywhere } .pair td code { white-space: pre-wrap }
pre { overflow: auto; background: var(--back); border-radius: 8px; padding: 10px 12px; white-space: pre-wrap;
  overflow-wrap: anywhere }
footer { color: var(--soft); font-size: 13px; padding: 4px 0 32px }
@media (max-width: 600px) { main, header { padding-left: 10px; padding-right: 10px } section { padding: 14px 12px }
  .cards { grid-template-columns: 1fr 1fr } .card b { font-size: 20px } }
</style>
</head>
<body>
<header><div><h1>@TITLE@</h1><span>@PATHS@</span></div><button id="theme" type="button">Light / dark</button></header>
<main>
<div class="cards">@CARDS@</div>

@ADVICE@
<section><h2>Rate and distortion</h2>
<p>Predicted distortion over the budget: mixed widths, and one width everywhere. The budget of the other side is
fixed.</p>
<div class="pair">@FRONTIERS@</div></section>
<section><h2>Bits per channel</h2>
<p>Layers in graph order, the channels of each from wide to narrow. Hover over a channel for its index, width and
distortion.</p><div id="map"></div></section>
<section><h2>Where bits and distortion go</h2>
<p>Size of each layer's weights, and the share of the distortion that these and the layer's input activation cause.</p>
<div id="shares"></div></section>
<section><h2>Does additivity hold?</h2>
<p>By additivity, the distortion of the whole network is the sum over its parts. Here each part was quantized alone, and
all of them at once.</p>@ADDITIVITY@</section>
<section class="pair"><figure><h2>Widths</h2><div id="histogram"></div></figure>
<figure><h2>Size</h2><div id="sizes"></div></figure></section>
<section><h2>Layers and activations</h2>
<p>The last column is the option that fixes this width in the next run; change the number as needed.</p>
@LAYERS@</section>
<section><h2>Left in float, and other notes</h2>@FLOAT@</section>
<section><h2>Reproduce this run</h2>@COMMAND@<div class="pair"><figure><h3>Settings</h3>@SETTINGS@</figure>
<figure><h3>Versions</h3>@VERSIONS@</figure></div></section>
<footer>rdoq-onnx @VERSION@</footer>
</main>
<script>@PLOTLY@</script>
<script type="application/json" id="figures">@FIGURES@</script>
<script>
const figures = JSON.parse(document.getElementById("figures").textContent);
const root = document.documentElement;
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function template(theme) {
  const [text, grid, back] = theme === "dark" ? ["#c3cad6", "#2b3240", "#1a1f28"] : ["#3a4252", "#e7eaef", "#ffffff"];
  const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, tickcolor: grid, ticks: "outside", ticklen: 4 };
  return { layout: { font: { color: text, family: "system-ui, sans-serif", size: 12.5 }, xaxis: axis, yaxis: axis,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: back, bordercolor: grid, font: { color: text }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: text } } };
}
async function show(theme) {
  root.dataset.theme = theme;
  const dragmode = window.matchMedia("(pointer: coarse)").matches ? false : "zoom";
  for (const [name, { data, layout }] of Object.entries(figures)) {
    await Plotly.react(name, data, { ...layout, dragmode, template: template(theme) },
      { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] });
  }
  root.dataset.drawn = Math.round(performance.now());
}
document.getElementById("theme").onclick = () => show(root.dataset.theme === "dark" ? "light" : "dark");
dark.onchange = event => show(event.matches ? "dark" : "light");
show(dark.matches ? "dark" : "light");
</script>
</body>
</html>
"""
