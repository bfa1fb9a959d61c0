"""A model behind FastAPI as people write it: one image a request, eager fp32 torch.

    python benchmarks/ways/plain_server.py RUN [async|threads]

``async`` computes in the event loop, one request after the other; ``threads`` in FastAPI's threads,
as many as come. Prints its port.
"""

import io
import socket
import sys

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image

import featcache

classifier = featcache.load_classifier(sys.argv[1], device="cpu")
backbone, classes = classifier.recipe.backbone, classifier.run.classes
model = classifier.as_network().eval()
mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.mean, backbone.std))
app = FastAPI()


def classify(data: bytes) -> dict:
    """Return the most probable class of an image file, and all probabilities."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = image.resize((backbone.image_size,) * 2, Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    with torch.inference_mode():
        probs = model(((pixels - mean) / std)[None]).softmax(1)[0]
    return {"pred": classes[int(probs.argmax())], "probs": probs.tolist()}


if sys.argv[2:] == ["threads"]:

    @app.post("/predict")
    def predict(file: UploadFile) -> dict:
        """Classify a file."""
        return classify(file.file.read())

else:

    @app.post("/predict")
    async def predict(file: UploadFile) -> dict:
        """Classify a file."""
        return classify(await file.read())


listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="critical")).run([listener])
