"""Templates: read back, those filled from a preset cost what the preset does."""

import numpy as np
import pytest

from rdoq_onnx.cost.tables import node_costs
from rdoq_onnx.cost.template import template
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.cost_rows import parse_cost, preset
from tests.cost.test_tables import NETWORK, SIZES


def test_an_empty_one_asks_for_each_cost():
    text = template(NETWORK, {}, None)
    assert text.startswith("layer,weight_bits,activation_bits,cost\nfirst,0,*,0\nfirst,2,2,\n")
    assert text.count("\nthird,") == 1 + 3 * 3
    with pytest.raises(ConfigError, match="line 3: cost ''"):
        parse_cost(text, "t.csv")


def test_one_filled_from_a_preset_costs_the_same():
    read = parse_cost(template(NETWORK, SIZES, preset("bops")), "t.csv", interpolated=True)
    for own, known in zip(node_costs(NETWORK, SIZES, read), node_costs(NETWORK, SIZES, preset("bops")), strict=True):
        assert np.allclose(own.cost[2:9, 2:9], known.cost[2:9, 2:9])
        assert (own.cost[0] == 0).all()


def test_rows_of_a_file_are_written_as_they_are():
    rows = 'layer,weight_bits,activation_bits,cost_us\n.*,0,*,0\n"a,b",1-8,1-8,2.5\nfirst,float,float,7\n'
    assert template(NETWORK, {}, parse_cost(rows, "t.csv")) == rows


def test_units_that_are_no_names_stay_out_of_the_head():
    assert template(NETWORK, SIZES, preset("size")).startswith("layer,weight_bits,activation_bits,cost_bytes\n")
    assert template(NETWORK, SIZES, preset("bops")).startswith("layer,weight_bits,activation_bits,cost\n")
