"""Threads for numpy: order, one BLAS thread, exceptions."""

import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from rdoq_onnx.system.threads import workers


def blas_threads():
    return {i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"}


@pytest.mark.parametrize("threads", [1, 3, 0])
def test_results_are_in_the_order_of_the_items(threads):
    with workers(threads) as pool:
        assert pool.map(lambda k: k * k, range(50)) == [k * k for k in range(50)]
        assert pool.map(str, []) == []


def test_order_is_kept_if_a_later_item_finishes_first():
    second_done = threading.Event()

    def wait_for_the_other(item):
        if item == "first":
            assert second_done.wait(30)
        else:
            second_done.set()
        return item

    with workers(2) as pool:
        assert pool.map(wait_for_the_other, ["first", "second"]) == ["first", "second"]


def test_number_of_threads():
    barrier = threading.Barrier(3)
    with workers(3) as pool:
        # All three must run at once for the barrier to open.
        assert len(set(pool.map(lambda _: (barrier.wait(30), threading.get_ident())[1], range(3)))) == 3
    with workers(1) as pool:
        assert len(set(pool.map(lambda _: threading.get_ident(), range(10)))) == 1


def test_blas_runs_on_one_thread_inside():
    np.ones((2, 2)) @ np.ones((2, 2))
    before = blas_threads()
    assert before
    with workers(2) as pool:
        assert blas_threads() == {1}
        assert pool.map(lambda _: blas_threads(), range(4)) == [{1}] * 4
    assert blas_threads() == before


def test_exceptions_reach_the_caller():
    def fails(item):
        if item == 2:
            raise ValueError(f"item {item}")
        return item

    before = blas_threads()
    with pytest.raises(ValueError, match="item 2"), workers(2) as pool:
        pool.map(fails, range(5))
    assert blas_threads() == before
