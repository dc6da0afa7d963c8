"""The HTML report: complete, and drawn by a real browser without an error."""

import html
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper

from rdoq_onnx import cli
from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import MAX_BITS, Config
from rdoq_onnx.curves.curves import Curves
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.emission.emit import Emission
from rdoq_onnx.options import parse_pin
from rdoq_onnx.report.html_report import html_page, html_report
from rdoq_onnx.report.html_run import html_run
from rdoq_onnx.report.outcome import Outcome, make_report
from rdoq_onnx.report.result import Result
from rdoq_onnx.verification.additivity import Alone
from rdoq_onnx.verification.details import Details
from rdoq_onnx.verification.layer_outputs import LayerOutputs
from rdoq_onnx.verification.part_figures import PartFigures
from rdoq_onnx.verification.value_ranges import ValueRanges
from rdoq_onnx.verification.verify import Verification
from tests.conftest import ROOT

CNN, CALIBRATION = ROOT / "models" / "digits_cnn.onnx", ROOT / "models" / "digits_calib.npz"
PLOTS = ["frontier-weights", "frontier-activations", "map", "shares", "histogram", "sizes", "additivity", "layers"]
HOVER = """<script>setInterval(() => { if (document.documentElement.dataset.drawn) {
Plotly.Fx.hover("map", {xval: 3, yval: 0}, ["xy"]);
document.body.dataset.hover = document.querySelector("#map .hoverlayer").textContent; } }, 50)</script>"""


def browse(page: str, folder: Path) -> tuple[str, list[str]]:
    """(the document once drawn, what the browser's console says) of a page; skips where there is no browser."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    path = folder / "page.html"
    path.write_text(page)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom"]
    logged = ["--enable-logging=stderr", "--virtual-time-budget=9000", f"--user-data-dir={folder / 'browser'}"]
    done = subprocess.run([browser, *options, *logged, path.as_uri()], capture_output=True, text=True, check=True)
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


def made_up(layers: int, channels: int, name: str = "block.{}/Conv") -> Result:
    """A run on a network of so many depthwise layers, its figures drawn at random."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for k in range(layers):
        weights.append(numpy_helper.from_array(np.ones((channels, 1, 1, 1), np.float32), f"w{k}"))
        nodes.append(helper.make_node("Conv", [f"a{k}", f"w{k}"], [f"z{k}"], name=name.format(k), group=channels))
        nodes.append(helper.make_node("Tanh", [f"z{k}"], [f"a{k + 1}"]))
    ends = [helper.make_tensor_value_info(n, 1, ["N", channels, 1, 1]) for n in ("a0", f"a{layers}")]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], weights))
    config = Config(weight_bits=3, activation_bits=5)
    network = analyse(model, config.selection)
    count, tensors = layers * channels, len(network.activations)
    distortion = rng.lognormal(-9, 2, (count + tensors, 1)) * 4.0 ** -np.arange(MAX_BITS + 1)
    distortion[count:, 0] = np.inf
    distortion[[count + k for k, a in enumerate(network.activations) if a.fusion], :MAX_BITS] = np.inf
    elements = np.array([1] * count + [channels] * tensors)
    curves = Curves(np.arange(MAX_BITS + 1), elements, distortion)
    unused: dict[str, object] = {f.name: None for f in fields(Measurement)}
    measurement = Measurement(**unused | {"network": network, "curves": curves, "layers": (), "probed": {}})  # type: ignore[arg-type]
    allocation = allocate_bits(measurement, config.budgets)
    alone = Alone(tuple(rng.lognormal(-4, 1, layers)), tuple(rng.lognormal(-4, 1, tensors)), 4)
    ranges = ValueRanges((((-1.25, 1.5), (-1.0, 1.0)),) * layers, (((0.0, 6.0), (0.0, 5.5)),) * tensors)
    report = make_report(
        Outcome(
            "in.onnx",
            model,
            Samples("made up", {"a0": np.zeros(9)}),
            Emission(model, "packed", {}, {}),
            allocation,
            Verification((PartFigures("y", "y", 30.0, 29.0),), (1e-3,), 0.0, {}, {}, 4),
            LayerOutputs(tuple(rng.uniform(10, 40, layers)), 4),
            (1e-3,),
            (),
            {"all": 1.0},
        )
    )
    return Result(model, report, allocation, config, Details(alone, ranges))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a real run through the command line."""
    folder = tmp_path_factory.mktemp("report")
    options = [
        "--bits",
        "4",
        "--calibration",
        CALIBRATION,
        "--samples",
        "8",
        "--effort",
        "fast",
        "--threads",
        "1",
        "--exclude",
        "/3/Conv",
        "--quiet",
    ]
    cli.main([str(CNN), str(folder / "out.onnx"), *map(str, options), "--report", str(folder / "out.html")])
    return (folder / "out.html").read_text()


def test_page_is_drawn_by_a_browser(page: str, tmp_path: Path) -> None:
    document, console = browse(page, tmp_path)
    assert console == []
    assert 'data-drawn="' in document
    for name in PLOTS:
        drawn = document.split(f'id="{name}"', 1)[1].split("</section>", 1)[0]
        assert '<svg class="main-svg"' in drawn, name


def test_a_broken_page_would_be_noticed(page: str, tmp_path: Path) -> None:
    document, console = browse(page.replace('"heatmap"', "heatmap"), tmp_path)
    assert console
    assert 'data-drawn="' not in document


def test_page_needs_nothing_but_itself(page: str) -> None:
    own = page.replace(re.search(r"<script>.*?</script>", page, re.DOTALL)[0], "")  # type: ignore[index]  # plotly
    assert not re.search(r"""(src|href)=|url\(|https?://""", own)


def test_page_describes_the_run(page: str) -> None:
    for text in (
        "output SQNR",
        "bits per weight",
        "a batch of 1<",
        "times the float model&#x27;s",
        "figures rest on",
        "measured at once",
        "left in float: excluded by --exclude",
        "onnxruntime",
        "&quot;/3/Conv&quot;",
        "<span>--samples</span> <span>8</span>",
        "prefers-color-scheme: dark",
    ):
        assert text in page, text


@pytest.mark.parametrize("name", ["block.{}/Conv", "a b{}", "odd({}", "c{}[0:2]"])
def test_lines_of_layers_can_be_pasted(name: str) -> None:
    made = made_up(2, 3, name)
    typed = re.findall(r"<code>--pin ([^<]+)</code>", html_report(made, "out.onnx"))
    pins = tuple(parse_pin(shlex.split(html.unescape(text))[0]) for text in typed)
    assert len(pins) == 2 + sum(not a.fusion for a in made.curves.network.activations)
    again = allocate_bits(made.curves, Config(pins=pins).budgets)
    for before, bits in zip(made.allocation.layer_bits, again.layer_bits, strict=True):
        assert set(bits.tolist()) == {round(before.mean())}
    assert again.activation_bits == made.allocation.activation_bits


CLICKS = """<script>setInterval(() => { if (document.documentElement.dataset.drawn && !document.body.dataset.out) {
const box = document.querySelector("[data-name=layers]");
const names = () => [...box.querySelectorAll("tbody tr:not([hidden])")]
  .map(row => row.cells[0].textContent).join(" ");
const press = column => box.querySelectorAll("th")[column].click();
const out = {}, search = box.previousElementSibling.querySelector("input");
press(5); out.up = names(); press(5); out.down = names();
search.value = "CONV block.1"; search.dispatchEvent(new Event("input")); out.found = names();
const kept = []; URL.createObjectURL = blob => { kept.push(blob); return "#"; };
const saved = HTMLAnchorElement.prototype; saved.click = function () { out.file = this.download; };
box.previousElementSibling.querySelectorAll("button")[1].click();
document.body.dataset.out = "none";
kept[0].text().then(text => { out.csv = text; document.body.dataset.out = JSON.stringify(out); }); } }, 50)</script>"""


def test_tables_are_sorted_searched_and_saved(tmp_path: Path) -> None:
    made = made_up(12, 3)
    document, console = browse(html_report(made, "out.onnx") + CLICKS, tmp_path)
    assert console == []
    out = json.loads(html.unescape(re.search(r'data-out="([^"]*)"', document)[1]))  # type: ignore[index]
    by_sqnr = np.argsort(np.round([layer.sqnr_db for layer in made.report.layers], 1), kind="stable")
    layers = [f"block.{k}/Conv" for k in by_sqnr]
    assert out["up"].split()[:12] == layers
    assert out["down"].split()[:12] == layers[::-1]
    assert sorted(out["found"].split()) == ["block.1/Conv", "block.10/Conv", "block.11/Conv"]
    head, *rows = out["csv"].splitlines()
    assert out["file"] == "layers.csv"
    assert head.startswith("name,kind,channels,bits,input bits,output SQNR,float range,quantized range,")
    assert [row.split(",")[0] for row in rows] == out["found"].split()
    assert all(",-1.25 to 1.5,-1 to 1," in row for row in rows)


SECOND = """<script>setInterval(() => { const drawn = document.querySelector("#run1-map .main-svg");
if (document.documentElement.dataset.drawn && !drawn) document.querySelectorAll("nav button")[1].click(); }, 200)
</script>"""


def test_several_budgets_on_one_page(tmp_path: Path) -> None:
    runs = [html_run(made_up(3, 4), f"out{b}.onnx", b, k) for k, b in enumerate(("3", "<6>"))]
    page = html_page(runs, "rdoq-onnx", {"0.5": "no widths fit"})
    document, console = browse(page, tmp_path)
    assert console == []
    drawn = {name: '<svg class="main-svg"' in _after(document, name) for name in ("budgets", "run0-map", "run1-map")}
    assert drawn == {"budgets": True, "run0-map": True, "run1-map": False}
    assert '<article data-run="0">' in document
    for text in ("out3.onnx", "out&lt;6&gt;.onnx", "none: no widths fit"):
        assert text in document
    document, console = browse(page + SECOND, tmp_path)
    assert console == []
    assert '<svg class="main-svg"' in _after(document, "run1-map")
    assert '<article data-run="1">' in document
    assert '<article data-run="0" hidden' in document


def _after(document: str, name: str) -> str:
    """The section of a document from the element `name` on."""
    return document.split(f'id="{name}"', 1)[1].split("</section>", 1)[0]


MEASURE = """<script>setInterval(() => { if (!document.documentElement.dataset.drawn) return;
const cut = [];
for (const svg of document.querySelectorAll(".main-svg")) { const box = svg.getBoundingClientRect();
  for (const text of svg.querySelectorAll("text")) { const t = text.getBoundingClientRect();
    const beyond = Math.max(box.left - t.left, t.right - box.right, box.top - t.top, t.bottom - box.bottom);
    if (t.width && beyond > 1) cut.push(text.textContent); } }
const boxes = [...document.querySelectorAll(".scroll")].map(box => [box.scrollWidth > box.clientWidth + 1,
  getComputedStyle(box, "::before").content.includes("sideways")]);
parent.postMessage(JSON.stringify({ cut, boxes, page: document.scrollingElement.scrollWidth,
  theme: document.documentElement.dataset.theme }), "*"); }, 300)</script>"""
FRAME = """<body><iframe src="inner.html" style="border:0;width:{}px;height:900px"></iframe>
<script>onmessage = event => document.body.dataset.out = event.data</script>"""


@pytest.mark.parametrize("width", [400, 1400])
def test_page_fits(page: str, tmp_path: Path, width: int) -> None:
    (tmp_path / "inner.html").write_text(page + MEASURE)
    document, console = browse(FRAME.format(width), tmp_path)
    assert console == []
    out = json.loads(html.unescape(re.search(r'data-out="([^"]*)"', document)[1]))  # type: ignore[index]
    assert out["cut"] == []
    assert out["page"] <= width
    assert len(out["boxes"]) >= 4
    assert all(wide == told for wide, told in out["boxes"])
    assert any(wide for wide, _ in out["boxes"])


def test_26000_channels(tmp_path: Path) -> None:
    page = html_report(made_up(26, 1000), "out.onnx")
    assert len(page.encode()) < 8e6
    document, console = browse(page + HOVER, tmp_path)
    assert console == []
    assert re.search(r'data-hover="block\.0/Conv \(1 of 4\)channel \d+: \d bits, δ \d', document)


def test_names_are_text_and_no_markup(tmp_path: Path) -> None:
    page = html_report(made_up(2, 3, "</script><script>alert({})</script>@PLOTLY@"), "<b>.onnx", "x > y")
    document, console = browse(page, tmp_path)
    assert console == []
    assert 'data-drawn="' in document
    assert "<script>alert" not in page
    assert "&lt;b&gt;.onnx" in page


def test_without_plotly_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        cli.main([str(CNN), str(tmp_path / "out.onnx"), "--report", str(tmp_path / "out.html")])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "rdoq-onnx: error: --report needs plotly, which is not installed: pip install 'rdoq-onnx[report]'\n"
    )


def test_options_in_hints_are_code_with_their_values() -> None:
    made = made_up(2, 3)
    advice = ("use more --samples (256 now) or --effort best for <it>; --pin '.*=8' or --exclude a/b.", "none here")
    page = html_report(replace(made, report=replace(made.report, advice=advice)), "folder/out.onnx")
    codes = [re.sub("</?span>", "", code) for code in re.findall("<code>(.*?)</code>", page.split("<h2>Hints")[1])[:4]]
    assert codes == ["--samples", "--effort best", "--pin &#x27;.*=8&#x27;", "--exclude a/b"]
    assert "</code> for &lt;it&gt;; <code>" in page
    assert "<li>none here</li>" in page
    assert "folder/<wbr>out.onnx" in page
