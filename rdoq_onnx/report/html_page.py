"""The templates of the HTML report; html_report.py and html_run.py fill in @NAME@."""

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
button, input { font: inherit; color: var(--text); background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: 6px 12px; white-space: nowrap } button { cursor: pointer }
section, .card { background: var(--card); border: 1px solid var(--line); border-radius: 12px }
section { padding: 18px 20px; margin: 18px 0 }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin-top: 18px }
.card { padding: 14px 16px; display: flex; flex-direction: column }
.card b { font-size: 25px; line-height: 1.25; white-space: nowrap; font-variant-numeric: tabular-nums }
.card small, small { color: var(--soft) }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 8px 24px }
.pair > * { min-width: 0 }
figure { margin: 0; min-width: 0 }
.scroll { overflow: auto; max-height: 460px; border: 1px solid var(--line); border-radius: 8px; margin: 6px 0;
  scrollbar-width: thin; scrollbar-color: var(--soft) transparent }
.scroll::-webkit-scrollbar { width: 10px; height: 10px }
.scroll::-webkit-scrollbar-thumb { background: var(--soft); border-radius: 5px; border: 2px solid var(--card) }
.wide::before { content: "scroll sideways for more columns →"; position: sticky; left: 0; display: inline-block;
  padding: 3px 10px; color: var(--accent); font-size: 12.5px }
.tools { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 8px }
.tools input { flex: 1 1 150px; min-width: 0 }
.tools output { color: var(--soft); font-size: 13px; align-self: center }
nav { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; margin: 18px 0 0; position: sticky; top: 0;
  z-index: 2; background: var(--back); padding: 8px 0 } nav span { color: var(--soft) }
nav button[aria-pressed=true] { background: var(--accent); border-color: var(--accent); color: var(--back) }
.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(230px, 100%), 1fr)); gap: 6px 18px;
  margin: 8px 0; padding: 0; list-style: none; font-size: 13.5px } .key b { margin-right: 6px }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 5px 10px; border-bottom: 1px solid var(--line); vertical-align: top }
th { position: sticky; top: 0; background: var(--card); color: var(--soft); font-weight: 600; white-space: nowrap }
[data-name] th { cursor: pointer } [data-name] th:hover { color: var(--text) }
th[aria-sort=ascending]::after { content: " ↑" } th[aria-sort=descending]::after { content: " ↓" }
tr:last-child td { border-bottom: 0 }
li code span, pre span { white-space: nowrap } li code { overflow-wrap: anywhere }
code, pre { font: 12.5px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace }
td code { white-space: nowrap } [data-name] td { white-space: nowrap }
[data-name=float] td:last-child, [data-name=budgets] td:last-child { white-space: normal; min-width: 220px }
.pairs td:first-child { min-width: 110px }
.pairs td code { white-space: pre-wrap; overflow-wrap: anywhere }
pre { overflow: auto; background: var(--back); border-radius: 8px; padding: 10px 12px; white-space: pre-wrap }
footer { color: var(--soft); font-size: 13px; padding: 4px 0 32px }
@media (max-width: 900px) { .cards { grid-template-columns: 1fr 1fr } }
@media (max-width: 600px) { main, header { padding-left: 10px; padding-right: 10px } section { padding: 14px 12px }
  .tools input { flex-basis: 100% } .card b { font-size: 20px }
  [data-name] td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 130px; max-width: 45vw } }
</style>
</head>
<body>
<header><div><h1>@TITLE@</h1><span>@PATHS@</span></div><button id="theme" type="button">Light / dark</button></header>
<main>
@BUDGETS@
@RUNS@
<section><h2>Reproduce</h2>@COMMAND@<h3>Versions</h3>@VERSIONS@</section>
<footer>rdoq-onnx @VERSION@</footer>
</main>
<script>@PLOTLY@</script>
<script type="application/json" id="figures">@FIGURES@</script>
<script>@SCRIPT@</script>
</body>
</html>
"""

# Names of elements start with @BEFORE@, which is another for each run.
RUN = """<div class="cards">@CARDS@</div>

@ADVICE@
<section><h2>Rate and distortion</h2>
<p>Predicted distortion over the budget: mixed widths, and one width everywhere. The budget of the other side is
fixed.</p>
<div class="pair">@FRONTIERS@</div></section>
<section><h2>Quality layer by layer</h2>
<p>SQNR of each layer's output in the emitted model against the float model, with all layers in front quantized as well.
A step down shows where the error arises; later layers may average it out again.</p>@OUTPUTS@
<ul class="key"><li><b>10 dB</b>the error has 1/10 of the signal's power; classifiers of ten classes change answers</li>
<li><b>20 dB</b>1/100, a relative error of 10&nbsp;%; below it classifiers of a thousand classes change answers</li>
<li><b>30 dB</b>1/1000, a relative error of 3&nbsp;%; hardly to be told from float</li>
<li><b>40 dB</b>1/10,000, a relative error of 1&nbsp;%</li></ul></section>
<section><h2>Bits per channel</h2>
<p>Layers in graph order, the channels of each from wide to narrow. Hover over a channel for its index, width and
distortion.</p><div id="@BEFORE@map"></div></section>
<section><h2>Where bits and distortion go</h2>
<p>Size of each layer's weights, and the share of the distortion that these and the layer's input activation cause.</p>
<div id="@BEFORE@shares"></div></section>
<section><h2>Does additivity hold?</h2>
<p>By additivity, the distortion of the whole network is the sum over its parts. Here each part was quantized alone, and
all of them at once.</p>@ADDITIVITY@</section>
<section class="pair"><figure><h2>Widths</h2><div id="@BEFORE@histogram"></div></figure>
<figure><h2>Size</h2><div id="@BEFORE@sizes"></div></figure></section>
<section><h2>Layers and activations</h2>
<p>Ranges are those of the values in float, and of the values that the integers stand for: what lies beyond is clipped.
The last column is the option that fixes this width in the next run; change the number as needed.</p>
@LAYERS@</section>
<section><h2>Left in float, and other notes</h2>@FLOAT@</section>
<section><h2>Settings</h2>@SETTINGS@</section>
"""
