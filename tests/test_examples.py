"""The examples, each run as a program or as its parts, on the model and the images that ship with the package."""

from __future__ import annotations

import importlib.util
import io
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import mixrank
from mixrank.demo.run import batches, load_images, load_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def module_of(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_example_is_listed_and_tested():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"custom_model", "own_loader", "finetune", "serve"}
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}.py]({name}.py)" in listed for name in names)


def test_a_custom_model_is_built_again(tmp_path, capsys):
    assert module_of("custom_model").main(tmp_path) == 0
    assert "largest difference after loading: 0" in capsys.readouterr().out


@pytest.mark.slow
def test_an_own_loader_calibrates():
    result = module_of("own_loader").main()
    assert result.images == 300
    assert result.plan.keep <= 0.6


@pytest.mark.slow
def test_finetuning_wins_accuracy_back():
    result = module_of("finetune").main()
    assert result.after > result.before + 5


@pytest.mark.slow
def test_a_server_answers_many_requests_at_once_and_refuses_what_is_no_image(tmp_path):
    httpx = pytest.importorskip("httpx", reason="the extra examples is not installed")
    pytest.importorskip("fastapi", reason="the extra examples is not installed")
    model, images = load_model(), load_images()["test_images"][:24]
    mixrank.compress(model, batches(load_images()["calibration_images"][:200]), keep=0.6, energy="weight")
    mixrank.save(model, tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = model(batches(images)[0].images).argmax(-1).tolist()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / "serve.py"), str(tmp_path / "model.safetensors"), "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}/classify"
    try:
        with httpx.Client(trust_env=False, timeout=30) as client:
            for _ in range(120):
                try:
                    client.get(address)
                    break
                except httpx.ConnectError:
                    assert server.poll() is None, server.stderr.read()
                    time.sleep(0.5)

            def ask(image: torch.Tensor) -> dict:
                buffer = io.BytesIO()
                Image.fromarray(image.numpy()).save(buffer, "PNG")
                return client.post(address, content=buffer.getvalue()).raise_for_status().json()

            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(ask, images))
            refused = client.post(address, content=b"nonsense")
            large = client.post(address, content=bytes(11 * 2**20))
        assert [answer["class"] for answer in answers] == expected
        assert all(0.1 <= answer["probability"] <= 1 for answer in answers)
        assert (refused.status_code, large.status_code) == (422, 413)
    finally:
        server.terminate()
        server.communicate(timeout=30)
