"""A compressed model behind HTTP: requests that come at the same time are answered in one batch.

pip install fastapi uvicorn
mixrank demo --out demo-output
python examples/serve.py demo-output/vit_fashion_mnist_keep45.safetensors --port 8000
curl -X POST --data-binary @image.png http://127.0.0.1:8000/classify
"""

from __future__ import annotations

import argparse
import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request

import mixrank
from mixrank.models import preprocessing
from mixrank.prepare import Prepare

MOST_BYTES = 10 * 2**20
BATCH = 16
WAIT_SECONDS = 0.005


class Batcher:
    """Images of waiting requests, answered together: a matrix product of many rows costs little more than of one."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.waiting = model, asyncio.Queue()

    async def answer(self, image: torch.Tensor) -> torch.Tensor:
        """The logits of one image ``[C, H, W]``."""
        future = asyncio.get_running_loop().create_future()
        await self.waiting.put((image, future))
        return await future

    async def run(self) -> None:
        """Answer until cancelled."""
        while True:
            asked = [await self.waiting.get()]
            deadline = asyncio.get_running_loop().time() + WAIT_SECONDS
            while len(asked) < BATCH:
                left = deadline - asyncio.get_running_loop().time()
                try:
                    asked.append(await asyncio.wait_for(self.waiting.get(), max(left, 0)))
                except TimeoutError:
                    break
            images = torch.stack([image for image, _ in asked])
            try:
                logits = await asyncio.to_thread(self.classify, images)
            except Exception as error:  # told to those who asked; the others go on
                for _, future in asked:
                    future.set_exception(error)
                continue
            for (_, future), row in zip(asked, logits, strict=True):
                if not future.cancelled():
                    future.set_result(row)

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, classes]``."""
        with torch.inference_mode():
            return self.model(images)


def app(file: Path) -> FastAPI:
    """The application that serves a checkpoint."""
    model = mixrank.load(file)
    prepare, batcher = Prepare(preprocessing(model)), Batcher(model)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.run())
        yield
        worker.cancel()

    served = FastAPI(lifespan=lifespan)

    @served.post("/classify")
    async def classify(request: Request) -> dict[str, Any]:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > MOST_BYTES:
                raise HTTPException(413, f"an image may have {MOST_BYTES} bytes")
        try:
            image = await asyncio.to_thread(prepare, io.BytesIO(bytes(data)))
        except Exception as error:  # decoders meet broken bytes with nearly any exception
            raise HTTPException(422, "this is no image that can be decoded") from error
        shares = (await batcher.answer(image)).softmax(-1)
        return {"class": int(shares.argmax()), "probability": float(shares.max())}

    return served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a checkpoint written by mixrank")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    uvicorn.run(app(args.file), host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
