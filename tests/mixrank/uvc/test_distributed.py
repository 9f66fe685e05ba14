"""Two processes that share the steps of a run: the same model on both, and that of one process with both batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from mixrank.models import create_model
from mixrank.uvc.data import TensorData
from mixrank.uvc.options import UVCOptions
from mixrank.uvc.run import compress_uvc_

BATCH = 16


def run(rank: int, processes: int, folder: str, learning_rate: float = 1e-4) -> None:
    """One process; what it ends with goes to a file."""
    torch.set_num_threads(1)
    folder = Path(folder)
    if processes > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes
        )
    torch.manual_seed(0)
    args = {"img_size": 32, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 3}
    model = create_model("vit_tiny_patch16_224", args=args)
    kinds, labels = torch.randn(3, 3, 32, 32), torch.arange(96) % 3
    images = kinds[labels] + torch.randn(96, 3, 32, 32)
    data = TensorData(images, labels, BATCH // processes, rank=rank, processes=processes)
    options = UVCOptions(epochs=3, learning_rate=learning_rate, ema=0.9)
    state = folder / f"{processes}.state"
    try:
        result = compress_uvc_(model, data, options=options, state=state)
        torch.save((model.state_dict(), result.blocks, result.history), folder / f"{processes}_{rank}.pt")
    except Exception as error:
        (folder / f"{processes}_{rank}.error").write_text(str(error))
    finally:
        if processes > 1:
            torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    torch.multiprocessing.spawn(run, (2, str(folder)), nprocs=2)
    torch.multiprocessing.spawn(run, (1, str(folder)), nprocs=1)
    return folder


def test_both_processes_end_with_the_same_bits(folder):
    first, second = (torch.load(folder / f"2_{rank}.pt") for rank in (0, 1))
    assert first[1:] == second[1:]
    assert all(torch.equal(value, second[0][name]) for name, value in first[0].items())


def test_two_processes_do_what_one_does_with_the_whole_batch(folder):
    several, alone = (torch.load(folder / name) for name in ("2_0.pt", "1_0.pt"))
    assert several[1] == alone[1]  # the same heads, columns and neurons of the same blocks
    losses = [[entry["loss"] for entry in history if "loss" in entry] for history in (several[2], alone[2])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for name, value in alone[0].items():
        # Adam divides by the root of tiny numbers, so that rounding shows in single weights.
        assert (several[0][name] - value).norm() <= 1e-2 * value.norm() + 1e-4


def test_a_loss_that_is_not_finite_ends_all_processes(tmp_path):
    torch.multiprocessing.spawn(run, (2, str(tmp_path), 1e12), nprocs=2)
    messages = [(tmp_path / f"2_{rank}.error").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert "the loss was not finite at step" in messages[0]
