"""The time left of a run: the estimate at first, then at the pace of the steps that ended."""

import pytest

from rdoq_onnx.system.outlook import Outlook

SECONDS = {"normalize": 9.0, "moments": 10.0, "taylor": 70.0, "second look": 10.0, "verify": 10.0}


def test_steps_that_end_count_no_more():
    outlook = Outlook(SECONDS)
    assert outlook.left() == 100
    assert outlook.left("taylor", 0.0, 5.0) == 100
    assert outlook.left("taylor", 0.5, 70.0) == 100  # half of it took 70 s, so the rest will
    outlook.ended("moments", 10.0)
    assert outlook.left() == pytest.approx(90)
    outlook.ended("clipping", 50.0)  # was not expected
    assert outlook.left() == pytest.approx(90)


def test_the_pace_is_that_of_the_steps_so_far():
    outlook = Outlook(SECONDS)
    outlook.ended("moments", 20.0)
    assert outlook.left() == pytest.approx(90 * (20 + 10) / (10 + 10))  # 10 s of the prior
    outlook.ended("taylor", 140.0)
    assert outlook.left() == pytest.approx(20 * (160 + 10) / (80 + 10))


def test_steps_of_each_budget_come_again():
    outlook = Outlook(SECONDS, budgets=3)
    assert outlook.left() == 140
    outlook.ended("moments", 10.0)
    outlook.ended("taylor", 70.0)
    outlook.ended("second look", 10.0)
    outlook.ended("verify", 10.0)
    assert outlook.left() == pytest.approx(40)
    for _ in range(3):
        outlook.ended("second look", 10.0)
        outlook.ended("verify", 10.0)
    assert outlook.left() == 0


def test_measuring_that_a_checkpoint_had_is_over():
    outlook = Outlook(SECONDS)
    outlook.ended("second look", 10.0)
    assert outlook.left() == pytest.approx(10)


def test_nothing_expected():
    assert Outlook({}).left("taylor", 0.5, 1.0) == 0


def test_tuning_is_ahead_after_the_second_look():
    outlook = Outlook({"observe": 10.0, "second look": 10.0, "tuning": 60.0, "verify": 5.0})
    for name in ("observe", "second look"):
        outlook.ended(name, 10.0)
    assert outlook.left() == pytest.approx(65)
    assert outlook.left("tuning", 0.5, 30.0) == pytest.approx(35)


def test_tuning_fills_the_time_that_the_run_should_take():
    outlook = Outlook({"observe": 10.0, "second look": 10.0, "tuning": 75.0, "verify": 5.0}, within=100.0)
    assert outlook.left() == 100
    outlook.ended("observe", 2.0)
    outlook.ended("clipping", 3.0)  # was not expected
    assert outlook.left() == pytest.approx(95)
    assert outlook.left("second look", 0.5, 4.0) == pytest.approx(91)
    outlook.ended("second look", 8.0)
    assert outlook.left("tuning", 0.25, 20.0) == pytest.approx(60 + 5 * (10 + 10) / (20 + 10))
    outlook.ended("tuning", 80.0)
    assert outlook.left() < 10


def test_a_run_that_is_late_is_told_what_it_still_has_to_do():
    outlook = Outlook({"observe": 10.0, "second look": 60.0, "tuning": 30.0, "verify": 20.0}, within=60.0)
    outlook.ended("observe", 10.0)
    assert outlook.left() == pytest.approx(80)
