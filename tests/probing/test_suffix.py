"""What follows an Add loads and runs for networks whose operators infer shapes from sizes."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

import rdoq_onnx
from rdoq_onnx.probing.prefix import Prefix
from rdoq_onnx.probing.suffix import Suffix
from tests.cases import RUNTIME, Case


@pytest.fixture(scope="module", params=[4, 2], ids=["heads", "shared heads"])
def attention(request):
    """Attention of 3-D tensors: from a rank alone, shape inference gets its output's size wrong."""
    shared = request.param
    model = parser.parse_model(f"""<ir_version: 11, opset_import: ["": 23]>
    g (float[N, 5, 16] x) => (float[N, 5, 6] y) {{
        k = MatMul (x, wk) v = MatMul (x, wv) q = MatMul (x, wq)
        a = Attention <q_num_heads = 4, kv_num_heads = {shared}> (q, k, v) y = MatMul (a, wo) }}""")
    rng = np.random.default_rng(0)
    for name, width in {"wq": 16, "wk": 4 * shared, "wv": 4 * shared, "wo": 6}.items():
        weight = rng.standard_normal((16, width), np.float32) / 4
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    return model, {"x": rng.standard_normal((40, 5, 16), np.float32)}


def test_known_sizes_are_declared(attention):
    this = Case(*attention, widths=(2, 4))
    prefix = Prefix.of(this.network, ("y",), this.samples, this.batching, RUNTIME, 0)
    assert list(prefix.sizes["q"]) == [None, 5, 16]
    assert Suffix.of(prefix, "z", ["q"], RUNTIME).parameters == {"q": "s_z/q"}


@pytest.mark.parametrize("options", [{}, {"measure": "probe"}, {"effort": "best"}, {"weights_only": True}], ids=str)
def test_attention_of_3d_tensors(attention, options):
    model, samples = attention
    assert rdoq_onnx.quantize(model, samples, **options).report.sqnr_db > 25
