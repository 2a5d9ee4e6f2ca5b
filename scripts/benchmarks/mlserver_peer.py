"""MLServer with the session that our server uses: `python mlserver_peer.py MODEL ROWS THREADS DELAY`; prints its address.

It speaks the same protocol in JSON only, and batches by rows.
"""

import asyncio
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse, MetadataModelResponse, MetadataTensor

from resnet_export.runtime.sessions import session

MODEL, ROWS, THREADS, DELAY = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None, float(sys.argv[4])


class Classifier(MLModel):
    """One run per batch, in a thread, so that the server goes on reading meanwhile."""

    async def load(self):
        self.session = session(MODEL, "cpu", threads=THREADS)
        self.thread = ThreadPoolExecutor(1)
        return True

    async def metadata(self):
        spec = self.session.inputs[0]
        datatype = {"uint8": "UINT8", "float32": "FP32"}[spec.dtype]
        shape = [-1 if isinstance(dim, str) else dim for dim in spec.shape]
        return MetadataModelResponse(
            name="net", platform="onnx", inputs=[MetadataTensor(name=spec.name, datatype=datatype, shape=shape)]
        )

    async def predict(self, payload):
        pixels = NumpyCodec.decode_input(payload.inputs[0]).astype(self.session.inputs[0].dtype)
        logits = (await asyncio.get_running_loop().run_in_executor(self.thread, self.session.run, pixels))["logits"]
        return InferenceResponse(model_name="net", outputs=[NumpyCodec.encode_output("logits", logits)])


async def serve(ports):
    """Serve until told to end."""
    http, grpc, metrics = ports
    settings = Settings(
        host="127.0.0.1",
        http_port=http,
        grpc_port=grpc,
        metrics_port=metrics,
        parallel_workers=0,
        load_models_at_startup=False,
        gzip_enabled=False,
        logging_settings={"version": 1},
    )
    batching = {"max_batch_size": ROWS, "max_batch_time": DELAY} if ROWS > 1 else {}
    await MLServer(settings).start([ModelSettings(name="net", implementation=Classifier, **batching)])


if __name__ == "__main__":
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    print(f"http://127.0.0.1:{ports[0]}", flush=True)
    # The address is all that anybody reads there; a pipe that is full would stop the log, and the server with it.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    asyncio.run(serve(ports))
