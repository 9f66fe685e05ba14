"""The command line: what it writes, and what it says when it cannot."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from mixrank import checkpoint
from mixrank.cli import app
from mixrank.models import create_model

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": 2, "num_classes": 2}
SUMMARY = {"top1", "parameters", "bytes", "macs", "images_per_second"}
IMAGES_PER_CLASS = 6


@dataclasses.dataclass(frozen=True)
class World:
    """Everything the commands read: weights, images without and with classes, labels, a checkpoint."""

    root: Path
    weights: Path
    flat: Path
    tree: Path
    labels: Path
    checkpoint: Path

    def compress(self, out: Path, *more: str, images: Path | None = None, keep: str | None = "0.5") -> list[str]:
        arguments = ["compress", "--model", ARCHITECTURE, "--weights", str(self.weights), "--quiet"]
        arguments += ["--model-args", json.dumps(MODEL_ARGS), "--images", str(images or self.flat), "--out", str(out)]
        return [*arguments, *([] if keep is None else ["--keep", keep]), *more]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> World:
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    model = create_model(ARCHITECTURE, args=MODEL_ARGS)
    save_file(model.state_dict(), root / "weights.safetensors")
    generator = np.random.default_rng(0)
    rows = []
    for label, name in enumerate(("cat", "dog")):
        (root / "tree" / name).mkdir(parents=True)
        (root / "flat").mkdir(exist_ok=True)
        for index in range(IMAGES_PER_CLASS):
            image = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            image.save(root / "tree" / name / f"{index}.png")
            image.save(root / "flat" / f"{name}{index}.png")
            rows.append((f"{name}{index}.png", label))
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *rows])
    made = World(
        root,
        root / "weights.safetensors",
        root / "flat",
        root / "tree",
        root / "labels.csv",
        root / "half.safetensors",
    )
    result = CliRunner().invoke(app, made.compress(made.checkpoint, "--json", str(root / "half.json")))
    assert result.exit_code == 0, result.output
    return made


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The model is too small for more, and on a busy machine a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def refused(result) -> str:
    """The one sentence of a command that refused its input."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mixrank", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_compress_writes_checkpoint_json_and_report(world: World, tmp_path: Path) -> None:
    out, result_file, page = tmp_path / "m.safetensors", tmp_path / "m.json", tmp_path / "m.html"
    more = ["--eval-images", str(world.flat), "--labels", str(world.labels), "--json", str(result_file)]
    result = invoke(*world.compress(out, *more, "--report", str(page)))
    assert result.exit_code == 0, result.output
    for word in ("dense", "compressed", "parameters", "MB", "GMACs", "top-1", "images/s"):
        assert word in result.stdout

    data = json.loads(result_file.read_text())
    assert data["dense"].keys() >= SUMMARY
    assert data["compressed"].keys() >= SUMMARY
    assert {"plan", "layers", "options", "versions", "times", "images"} <= data.keys()
    assert {"mixrank", "torch", "timm", "triton", "python", "cpu", "threads"} <= data["versions"].keys()
    assert {"load", "calibrate", "decompose", "allocate", "apply", "speed", "save"} <= data["times"].keys()
    assert data["compressed"]["parameters"] == data["plan"]["parameters_after"]
    assert data["compressed"]["parameters"] <= 0.5 * data["dense"]["parameters"]
    assert data["compressed"]["bytes"] < data["dense"]["bytes"]
    assert data["compressed"]["macs"] < data["dense"]["macs"]
    assert data["images"]["calibration"] == data["images"]["evaluation"] == 2 * IMAGES_PER_CLASS
    assert data["images"]["calibration_skipped"] == []
    assert 0 <= data["compressed"]["top1"] <= 100
    assert len(data["layers"]) == len(data["plan"]["layers"]) == 8
    assert "<svg" in page.read_text()

    model = checkpoint.load(out)
    assert sum(parameter.numel() for parameter in model.parameters()) == data["compressed"]["parameters"]
    assert {path.name for path in tmp_path.iterdir()} == {"m.safetensors", "m.json", "m.html"}


def test_equal_runs_write_equal_checkpoints(world: World, tmp_path: Path) -> None:
    out = tmp_path / "again.safetensors"
    assert invoke(*world.compress(out)).exit_code == 0
    assert out.read_bytes() == world.checkpoint.read_bytes()


@pytest.mark.parametrize(
    "more",
    [
        ["--factors", "svd", "--ranks", "uniform"],
        ["--energy", "output", "--no-centre", "--split-qkv", "--dtype", "bfloat16"],
        ["--limit", "5", "--seed", "3", "--batch-size", "2", "--step", "4"],
    ],
    ids=["svd-uniform", "output-split", "limit"],
)
def test_compress_takes_every_strategy(world: World, tmp_path: Path, more: list[str]) -> None:
    out, result_file = tmp_path / "m.safetensors", tmp_path / "m.json"
    result = invoke(*world.compress(out, *more, "--json", str(result_file)))
    assert result.exit_code == 0, result.output
    data = json.loads(result_file.read_text())
    assert data["compressed"]["parameters"] <= 0.5 * data["dense"]["parameters"]
    assert data["images"]["calibration"] == (5 if "--limit" in more else 2 * IMAGES_PER_CLASS)
    assert data["dense"]["top1"] is None


@pytest.mark.parametrize(("option", "key"), [("--max-bytes", "bytes"), ("--max-macs", "macs")])
def test_other_budgets_hold(world: World, tmp_path: Path, option: str, key: str) -> None:
    limit = int(0.6 * json.loads((world.root / "half.json").read_text())["dense"][key])
    result_file = tmp_path / "m.json"
    arguments = world.compress(tmp_path / "m.safetensors", option, str(limit), "--json", str(result_file), keep=None)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result_file.read_text())["compressed"][key] <= limit


def test_evaluate_measures_a_checkpoint(world: World, tmp_path: Path) -> None:
    result_file = tmp_path / "e.json"
    result = invoke(
        "evaluate", str(world.checkpoint), "--images", str(world.tree), "--json", str(result_file), "--quiet"
    )
    assert result.exit_code == 0, result.output
    assert "top-1" in result.stdout
    data = json.loads(result_file.read_text())
    before = json.loads((world.root / "half.json").read_text())
    for key in ("parameters", "bytes", "macs"):
        assert data["dense"][key] == before["dense"][key]
        assert data["compressed"][key] == before["compressed"][key]
    assert data["dense"]["top1"] is None
    assert data["dense"]["images_per_second"] > 0
    assert 0 <= data["compressed"]["top1"] <= 100
    assert data["plan"] == before["plan"]


def test_evaluate_without_labels_measures_speed_only(world: World, tmp_path: Path) -> None:
    result_file = tmp_path / "e.json"
    arguments = ["--images", str(world.flat), "--limit", "4", "--json", str(result_file), "--quiet"]
    result = invoke("evaluate", str(world.checkpoint), *arguments)
    assert result.exit_code == 0, result.output
    assert "top-1 needs labels" in result.stdout
    data = json.loads(result_file.read_text())
    assert data["compressed"]["top1"] is None
    assert data["images"]["evaluation"] == 4


def test_inspect_shows_the_plan(world: World) -> None:
    result = invoke("inspect", str(world.checkpoint))
    assert result.exit_code == 0, result.output
    assert ARCHITECTURE in result.stdout
    assert "blocks.1.mlp.fc2" in result.stdout
    header = json.loads(invoke("inspect", str(world.checkpoint), "--json").stdout)
    assert header["architecture"] == ARCHITECTURE
    assert header["args"] == MODEL_ARGS
    assert header["plan"] == json.loads((world.root / "half.json").read_text())["plan"]
    assert header["file_bytes"] == world.checkpoint.stat().st_size


def test_report_is_drawn_from_the_json(world: World, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = invoke("report", str(world.root / "half.json"), "--out", str(page))
    assert result.exit_code == 0, result.output
    assert page.read_text().count("<svg") == 4


@pytest.mark.parametrize("keep", ["0", "-0.5", "1.5", "nan"])
def test_keep_outside_its_range(world: World, tmp_path: Path, keep: str) -> None:
    message = refused(invoke(*world.compress(tmp_path / "m.safetensors", keep=keep)))
    assert "--keep must be above 0 and at most 1" in message
    assert not list(tmp_path.iterdir())


def test_no_budget_or_two(world: World, tmp_path: Path) -> None:
    wanted = "exactly one of --keep, --max-bytes and --max-macs"
    assert wanted in refused(invoke(*world.compress(tmp_path / "m.safetensors", keep=None)))
    assert wanted in refused(invoke(*world.compress(tmp_path / "m.safetensors", "--max-bytes", "100")))


@pytest.mark.parametrize(
    "budget", [["--keep", "0.001"], ["--max-bytes", "10"], ["--max-macs", "10"]], ids=["keep", "bytes", "macs"]
)
def test_budget_below_what_is_possible(world: World, tmp_path: Path, budget: list[str]) -> None:
    message = refused(invoke(*world.compress(tmp_path / "m.safetensors", *budget, keep=None)))
    assert "must be at least" in message
    assert not list(tmp_path.iterdir())


def test_smallest_possible_keep_is_possible(world: World, tmp_path: Path) -> None:
    message = refused(invoke(*world.compress(tmp_path / "m.safetensors", keep="0.001")))
    smallest = message.split("at least ")[1].split()[0]
    assert invoke(*world.compress(tmp_path / "m.safetensors", keep=smallest)).exit_code == 0


def test_folder_without_images(world: World, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(invoke(*world.compress(tmp_path / "m.safetensors", images=tmp_path / "empty")))
    assert "empty" in message
    assert "no image" in message
    missing = refused(invoke(*world.compress(tmp_path / "m.safetensors", images=tmp_path / "absent")))
    assert "absent" in missing
    assert not (tmp_path / "m.safetensors").exists()


@pytest.fixture
def spoiled(world: World, tmp_path: Path) -> Path:
    """The flat folder with one more file that is no image."""
    folder = tmp_path / "spoiled"
    folder.mkdir()
    for path in world.flat.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return folder


def test_undecodable_image_is_skipped_and_counted(world: World, spoiled: Path, tmp_path: Path) -> None:
    result_file = tmp_path / "m.json"
    result = invoke(*world.compress(tmp_path / "m.safetensors", "--json", str(result_file), images=spoiled))
    assert result.exit_code == 0, result.output
    images = json.loads(result_file.read_text())["images"]
    assert images["calibration"] == 2 * IMAGES_PER_CLASS
    assert len(images["calibration_skipped"]) == 1
    assert "broken.png" in images["calibration_skipped"][0]
    assert "broken.png" in result.stdout


def test_undecodable_image_is_an_error_when_strict(world: World, spoiled: Path, tmp_path: Path) -> None:
    message = refused(invoke(*world.compress(tmp_path / "m.safetensors", "--strict", images=spoiled)))
    assert "broken.png" in message
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "truncated", "foreign", "text"])
@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_bad_checkpoints(world: World, tmp_path: Path, command: str, kind: str) -> None:
    path = tmp_path / "bad.safetensors"
    whole = world.checkpoint.read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind == "foreign":
        save_file({"weight": torch.zeros(2, 2)}, path)
    elif kind != "missing":
        path.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"not a checkpoint"}[kind])
    more = ["--images", str(world.flat), "--quiet"] if command == "evaluate" else []
    assert "bad.safetensors" in refused(invoke(command, str(path), *more))


LABELS = {
    "column": "name,label\ncat0.png,0\n",
    "number": "file,label\ncat0.png,cat\n",
    "unlabelled": "file,label\ncat0.png,0\n",
    "range": None,
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_that_do_not_match(world: World, tmp_path: Path, kind: str) -> None:
    labels, out = tmp_path / "wrong.csv", tmp_path / "m.safetensors"
    text = LABELS[kind] or world.labels.read_text().replace(",1", ",7")
    labels.write_text(text)
    message = refused(invoke(*world.compress(out, "--eval-images", str(world.flat), "--labels", str(labels))))
    assert {"column": "file", "number": "'cat'", "unlabelled": "11", "range": "7"}[kind] in message
    assert not out.exists()


def test_labels_need_their_images(world: World, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    assert "--eval-images" in refused(invoke(*world.compress(out, "--labels", str(world.labels))))
    assert "has no labels" in refused(invoke(*world.compress(out, "--eval-images", str(world.flat))))
    missing = ["--eval-images", str(world.flat), "--labels", str(tmp_path / "absent.csv")]
    assert "absent.csv" in refused(invoke(*world.compress(out, *missing)))


@pytest.mark.parametrize("option", ["--out", "--json", "--report"])
def test_outputs_that_cannot_be_written(world: World, tmp_path: Path, option: str) -> None:
    def attempt(place: Path) -> str:
        files = {"--out": str(tmp_path / "m.safetensors")} | {option: str(place)}
        arguments = world.compress(Path(files.pop("--out")), *(word for pair in files.items() for word in pair))
        return refused(invoke(*arguments))

    assert "does not exist" in attempt(tmp_path / "absent" / "file")
    assert "is a folder" in attempt(tmp_path)
    if Path("/proc/sys").is_dir():
        assert "cannot be written" in attempt(Path("/proc/sys/file"))
    assert not list(tmp_path.iterdir())


def test_two_outputs_of_one_name(world: World, tmp_path: Path) -> None:
    out = tmp_path / "m"
    assert "name the same file" in refused(invoke(*world.compress(out, "--json", str(out))))


def test_inputs_are_never_overwritten(world: World) -> None:
    before = {path: path.read_bytes() for path in (world.weights, world.labels, world.root / "half.json")}
    scored = ["--eval-images", str(world.flat), "--labels", str(world.labels)]
    for arguments in (
        world.compress(world.weights),
        world.compress(world.root / "m", *scored, "--json", str(world.labels)),
        ["evaluate", str(world.checkpoint), "--images", str(world.flat), "--json", str(world.checkpoint)],
        ["report", str(world.root / "half.json"), "--out", str(world.root / "half.json")],
    ):
        assert "would overwrite an input" in refused(invoke(*arguments))
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
    ],
)
def test_other_bad_arguments(world: World, tmp_path: Path, more: list[str], word: str) -> None:
    assert word in refused(invoke(*world.compress(tmp_path / "m.safetensors", *more)))
    assert not list(tmp_path.iterdir())


def test_interrupt_ends_with_its_status(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupt)
    result = invoke(*world.compress(tmp_path / "m.safetensors", "--json", str(tmp_path / "m.json")))
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = refused(invoke("report", str(world.root / "half.json"), "--out", str(page)))
    assert "No space left on device" in message
    assert page.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("command", ["compress", "evaluate", "inspect", "report", "demo"])
def test_help_has_an_example(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Example: mixrank {command}" in " ".join(result.stdout.split())


def test_process_prints_one_sentence_and_no_traceback(world: World, tmp_path: Path) -> None:
    result = run_process("inspect", str(tmp_path / "absent.safetensors"))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "absent.safetensors" in result.stderr
    assert result.stderr.count("\n") == 1


def test_process_compresses_nothing_with_a_wrong_keep(world: World, tmp_path: Path) -> None:
    result = run_process(*world.compress(tmp_path / "m.safetensors", keep="2"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --keep must be above 0")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_process_stops_at_ctrl_c(world: World, tmp_path: Path) -> None:
    """A model that is never ready stands for the long work, so that the signal always arrives in its middle."""
    arguments = world.compress(tmp_path / "m.safetensors")
    code = (
        "import sys, time, mixrank.models\n"
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
