"""Threads on processors of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mixrank_bench import affinity

needs_two = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two processors to bind to"
)


def test_one_thread_is_left_alone():
    assert affinity.bind_workers(1) == []
    before = os.sched_getaffinity(0)
    with affinity.bound(1):
        assert os.sched_getaffinity(0) == before


@needs_two
def test_this_thread_is_bound_within_the_block_only():
    before = os.sched_getaffinity(0)

    def interrupted() -> None:
        with affinity.bound(2):
            assert os.sched_getaffinity(0) == {min(before)}
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.sched_getaffinity(0) == before


@needs_two
def test_workers_are_found_and_bound_apart():
    """In a process of its own: the workers come up once."""
    code = (
        "import os, torch; from mixrank_bench import affinity\n"
        "first, second = sorted(os.sched_getaffinity(0))[:2]\n"
        "torch.set_num_threads(1)\n"
        "(worker,) = affinity.bind_workers(2)\n"
        "assert worker != os.getpid() and os.sched_getaffinity(worker) == {second}\n"
        "assert torch.get_num_threads() == 1 and len(os.sched_getaffinity(0)) > 1\n"
        "print('bound')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "bound\n", done.stderr
