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


@pytest.mark.parametrize(
    ("threads", "setting", "said"), [(1, None, False), (2, None, True), (2, "false", True), (2, "true", False)]
)
def test_unbound_workers_are_said(threads, setting, said, monkeypatch):
    if setting is None:
        monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    else:
        monkeypatch.setenv("OMP_PROC_BIND", setting)
    found = affinity.unbound_workers(threads)
    assert (found is not None and "set OMP_PROC_BIND=true" in found) == said


@needs_two
@pytest.mark.parametrize(("threads", "setting"), [(2, "true"), (2, "false"), (1, "true")])
def test_this_thread_is_bound_within_the_block_only(threads, setting, monkeypatch):
    monkeypatch.setenv("OMP_PROC_BIND", setting)
    before = os.sched_getaffinity(0)

    def interrupted() -> None:
        with affinity.bound(threads):
            wanted = {min(before)} if (threads, setting) == (2, "true") else before
            assert os.sched_getaffinity(0) == wanted
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.sched_getaffinity(0) == before


@needs_two
def test_workers_stay_apart_from_a_released_thread():
    """In a process of its own: OpenMP reads its settings once."""
    code = (
        "import os, torch; from mixrank_bench import affinity\n"
        "affinity.release(); everything = os.sched_getaffinity(0)\n"
        "known = set(os.listdir('/proc/self/task'))\n"
        "torch.set_num_threads(2); torch.ones(1 << 20).add_(1)\n"
        "created = set(os.listdir('/proc/self/task')) - known\n"
        "with affinity.bound(2):\n"
        "    assert any(not os.sched_getaffinity(0) & os.sched_getaffinity(int(one)) for one in created)\n"
        "assert os.sched_getaffinity(0) == everything and len(everything) > 1\n"
        "print('apart')"
    )
    environment = os.environ | {"OMP_PROC_BIND": "true"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "apart\n", done.stderr
