"""What widths cost, in reports: the run's figures, the document, and the words."""

import pytest

from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.config import Budgets
from rdoq_onnx.model.cost_rows import Amount, parse_cost, preset
from rdoq_onnx.report.costs import amount, cost_report
from tests.allocation.test_costed import MACS, bops, measurement, percent
from tests.cost.test_tables import HEAD


def test_figures_of_a_budget():
    budgets = percent(40)
    allocation = allocate_bits(measurement(), budgets)
    report = cost_report(allocation, budgets)
    assert report is not None
    whole = 64 * sum(MACS)
    document = report.document()
    points = document.pop("frontier")
    assert document == {
        "source": "bops",
        "unit": "bit operations",
        "budget": pytest.approx(0.4 * whole),
        "spent": pytest.approx(bops(allocation)),
        "at_8_bits": whole,
        "bound": allocation.bound,
        "measured": None,
    }
    assert {"cost": report.spent, "predicted": allocation.predicted} in points
    assert sum(report.nodes.values()) == pytest.approx(report.spent)
    ((_, words),) = report.rows()
    assert words.endswith("% of 8 bits everywhere, of a budget of 19,661 bit operations")
    assert len(list(report.frontier_rows())) == len(points)


def test_without_a_budget_there_is_no_bound():
    allocation = allocate_bits(measurement(), Budgets(weight_bits=4))
    report = cost_report(allocation, Budgets(cost=preset("size")))
    assert report is not None
    assert (report.budget, report.bound, report.spent) == (None, None, allocation.weight_payload / 8)
    assert cost_report(allocation, Budgets()) is None


def test_files_that_say_nothing_of_8_bits():
    cost = parse_cost(f"{HEAD}.*,1-4,*,2\n", "t.csv")
    budgets = Budgets(cost=cost, budget=Amount(6))
    report = cost_report(allocate_bits(measurement(), budgets), budgets)
    assert report is not None
    assert report.at_8_bits is None
    assert report.rows()[0] == ("cost", "6, of a budget of 6")
    assert [share for share, *_ in report.frontier_rows()] == [""] * len(report.frontier)


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (9.625e9, "bit operations", "9.625 G bit operations"),
        (1234.5, "us", "1,234 µs"),
        (2e6, "", "2 M"),
        (0, "uJ", "0 uJ"),
    ],
)
def test_amounts(value, unit, words):
    assert amount(value, unit) == words
