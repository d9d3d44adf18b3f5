"""Work in a thread: its result, its error, and its end with the block."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.errors import HostError
from pipeline.progress import no_progress
from pipeline.stages.background import Background


def test_results_come_in_order_of_the_work():
    order = []

    def work(name):
        return lambda progress: order.append(name) or name

    with Background() as background:
        pending = [background.start(work(name)) for name in "ab"]
        assert [one() for one in pending] == ["a", "b"]
    assert order == ["a", "b"]


def test_error_is_raised_by_check_and_by_the_result():
    def fail(_progress):
        raise HostError("no space", where="disk")

    with Background() as background:
        background.check()
        pending = background.start(fail)
        with pytest.raises(HostError, match="no space"):
            pending()
        with pytest.raises(HostError, match="no space"):
            background.check()


def test_work_ends_with_the_block():
    """Ctrl-C during a build waited until all shards were written."""
    begun, ended = threading.Event(), threading.Event()

    def endless(progress):
        begun.set()
        try:
            while True:
                progress("shard", 0, 1)
                time.sleep(0.01)
        finally:
            ended.set()

    with Background() as background:
        background.start(endless)
        waiting = background.start(lambda progress: progress("shard", 0, 1))
        begun.wait()
    assert ended.is_set()
    with pytest.raises(HostError, match="cancelled"):
        waiting()


def test_callback_of_work_that_goes_on_is_silent():
    with Background() as background:
        assert background.start(lambda progress: progress("shard", 1, 2) or progress is not no_progress)()
