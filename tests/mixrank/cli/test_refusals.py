"""What the commands say when they cannot do what is asked, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixrank import checkpoint

IMAGES_PER_CLASS = 6


@pytest.mark.parametrize("keep", ["0", "-0.5", "1.5", "nan"])
def test_keep_outside_its_range(world, tmp_path: Path, keep: str) -> None:
    message = world.refused(*world.compress(tmp_path / "m.safetensors", keep=keep))
    assert "--keep must be above 0 and at most 1" in message
    assert not list(tmp_path.iterdir())


def test_no_budget_or_two(world, tmp_path: Path) -> None:
    wanted = "exactly one of --keep, --max-bytes and --max-macs"
    assert wanted in world.refused(*world.compress(tmp_path / "m.safetensors", keep=None))
    assert wanted in world.refused(*world.compress(tmp_path / "m.safetensors", "--max-bytes", "100"))


@pytest.mark.parametrize(
    "budget", [["--keep", "0.001"], ["--max-bytes", "10"], ["--max-macs", "10"]], ids=["keep", "bytes", "macs"]
)
def test_budget_below_what_is_possible(world, tmp_path: Path, budget: list[str]) -> None:
    message = world.refused(*world.compress(tmp_path / "m.safetensors", *budget, keep=None))
    assert "must be at least" in message
    assert not list(tmp_path.iterdir())


def test_smallest_possible_keep_is_possible(world, tmp_path: Path) -> None:
    message = world.refused(*world.compress(tmp_path / "m.safetensors", keep="0.001"))
    smallest = message.split("at least ")[1].split()[0]
    assert world.invoke(*world.compress(tmp_path / "m.safetensors", keep=smallest)).exit_code == 0


def test_folder_without_images(world, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = world.refused(*world.compress(tmp_path / "m.safetensors", images=tmp_path / "empty"))
    assert "empty" in message
    assert "no image" in message
    missing = world.refused(*world.compress(tmp_path / "m.safetensors", images=tmp_path / "absent"))
    assert "absent" in missing
    assert not (tmp_path / "m.safetensors").exists()


@pytest.fixture
def spoiled(world, tmp_path: Path) -> Path:
    """The flat folder with one more file that is no image."""
    folder = tmp_path / "spoiled"
    folder.mkdir()
    for path in world.flat.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return folder


def test_undecodable_image_is_skipped_and_counted(world, spoiled: Path, tmp_path: Path) -> None:
    result_file = tmp_path / "m.json"
    result = world.invoke(*world.compress(tmp_path / "m.safetensors", "--json", str(result_file), images=spoiled))
    assert result.exit_code == 0, result.output
    images = json.loads(result_file.read_text())["images"]
    assert images["calibration"] == 2 * IMAGES_PER_CLASS
    assert len(images["calibration_skipped"]) == 1
    assert "broken.png" in images["calibration_skipped"][0]
    assert "broken.png" in result.stdout


def test_undecodable_image_is_an_error_when_strict(world, spoiled: Path, tmp_path: Path) -> None:
    message = world.refused(*world.compress(tmp_path / "m.safetensors", "--strict", images=spoiled))
    assert "broken.png" in message
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "truncated", "foreign", "text"])
@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_bad_checkpoints(world, tmp_path: Path, command: str, kind: str) -> None:
    path = tmp_path / "bad.safetensors"
    whole = world.checkpoint.read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "foreign":
        save_file({"weight": torch.zeros(2, 2)}, path)
    elif kind != "missing":
        path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"not a checkpoint"}[kind])
    more = ["--images", str(world.flat), "--quiet"] if command == "evaluate" else []
    assert "bad.safetensors" in world.refused(command, str(path), *more)


LABELS = {
    "column": "name,label\ncat0.png,0\n",
    "number": "file,label\ncat0.png,cat\n",
    "unlabelled": "file,label\ncat0.png,0\n",
    "range": None,
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_that_do_not_match(world, tmp_path: Path, kind: str) -> None:
    labels, out = tmp_path / "wrong.csv", tmp_path / "m.safetensors"
    text = LABELS[kind] or world.labels.read_text().replace(",1", ",7")
    labels.write_text(text)
    message = world.refused(*world.compress(out, "--eval-images", str(world.flat), "--labels", str(labels)))
    assert {"column": "file", "number": "'cat'", "unlabelled": "11", "range": "7"}[kind] in message
    assert not out.exists()


def test_labels_need_their_images(world, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    assert "--eval-images" in world.refused(*world.compress(out, "--labels", str(world.labels)))
    missing = ["--eval-images", str(world.flat), "--labels", str(tmp_path / "absent.csv")]
    assert "absent.csv" in world.refused(*world.compress(out, *missing))


@pytest.mark.parametrize("option", ["--out", "--json", "--report"])
def test_outputs_that_cannot_be_written(world, tmp_path: Path, option: str) -> None:
    def attempt(place: Path) -> str:
        files = {"--out": str(tmp_path / "m.safetensors")} | {option: str(place)}
        arguments = world.compress(Path(files.pop("--out")), *(word for pair in files.items() for word in pair))
        return world.refused(*arguments)

    assert "does not exist" in attempt(tmp_path / "absent" / "file")
    assert "is a folder" in attempt(tmp_path)
    if Path("/proc/sys").is_dir():
        assert "cannot be written" in attempt(Path("/proc/sys/file"))
    assert not list(tmp_path.iterdir())


def test_two_outputs_of_one_name(world, tmp_path: Path) -> None:
    out = tmp_path / "m"
    assert "name the same file" in world.refused(*world.compress(out, "--json", str(out)))


def test_inputs_are_never_overwritten(world) -> None:
    before = {path: path.read_bytes() for path in (world.weights, world.labels, world.root / "half.json")}
    scored = ["--eval-images", str(world.flat), "--labels", str(world.labels)]
    for arguments in (
        world.compress(world.weights),
        world.compress(world.root / "m", *scored, "--json", str(world.labels)),
        ["evaluate", str(world.checkpoint), "--images", str(world.flat), "--json", str(world.checkpoint)],
        ["report", str(world.root / "half.json"), "--out", str(world.root / "half.json")],
    ):
        assert "would overwrite an input" in world.refused(*arguments)
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--model-args", "{"], "not JSON"),
        (["--model-args", "[1]"], "JSON object"),
        (["--weights", "absent.pth"], "absent.pth"),
        (["--model", "no_such_model"], "no_such_model"),
        (["--step", "0"], "--step"),
        (["--limit", "0"], "--limit"),
        (["--batch-size", "-1"], "--batch-size"),
        (["--draws", "0"], "--draws"),
        (["--augment", "-1"], "--augment must be at least 0"),
        (["--shrink", "much"], "--shrink must be a number or one of auto, oas, measured, got much"),
        (["--shrink", "auto", "--held-out", "0"], "needs images that are held out"),
        (["--weighting", "token", "--weighting-level", "2"], "takes no level"),
        (["--weighting-level", "2"], "--weighting-level belongs to --weighting, which is missing"),
        (["--sequential", "--factors", "fisher"], "sequential=True takes"),
        (["--min-rank", "20", "--max-rank", "10"], "is above max_rank"),
        (["--form", "sparse", "--split-qkv"], "split_qkv is of low ranks"),
        (["--form", "auto", "--augment", "1"], "must be one view each"),
        (["--gradient-power", "2"], "gradient_power must be above 0 and at most 1, but it was 2.0"),
    ],
)
def test_other_bad_arguments(world, tmp_path: Path, more: list[str], word: str) -> None:
    assert word in world.refused(*world.compress(tmp_path / "m.safetensors", *more))
    assert not list(tmp_path.iterdir())


def test_interrupt_ends_with_its_status(world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupt)
    result = world.invoke(*world.compress(tmp_path / "m.safetensors", "--json", str(tmp_path / "m.json")))
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file(world, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = world.refused("report", str(world.root / "half.json"), "--out", str(page))
    assert "No space left on device" in message
    assert page.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("command", ["compress", "sweep", "compensate", "evaluate", "inspect", "report", "demo"])
def test_help_has_an_example(world, command: str) -> None:
    result = world.invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Example: mixrank {command}" in " ".join(result.stdout.split())


def test_process_prints_one_sentence_and_no_traceback(world, tmp_path: Path) -> None:
    result = world.run_process("inspect", str(tmp_path / "absent.safetensors"))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "absent.safetensors" in result.stderr
    assert result.stderr.count("\n") == 1


def test_process_compresses_nothing_with_a_wrong_keep(world, tmp_path: Path) -> None:
    result = world.run_process(*world.compress(tmp_path / "m.safetensors", keep="2"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --keep must be above 0")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_process_stops_at_ctrl_c(world, tmp_path: Path) -> None:
    """A model that is never ready stands for the long work, so that the signal always arrives in its middle."""
    arguments = world.compress(tmp_path / "m.safetensors")
    # A shell that starts the tests in the background lets them, and what they start, ignore the signal.
    code = (
        "import signal, sys, time, mixrank.models\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def wait(*_, **__):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(100)\n"
        "mixrank.models.create_model = wait\n"
        "from mixrank.cli import main\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted" in errors
    assert not list(tmp_path.iterdir())


def test_help_does_not_wait_for_what_it_does_not_need() -> None:
    code = "import sys, mixrank.cli; sys.exit(bool({'timm', 'torchvision', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
