"""KServe's SDK with the session that our server uses: `python kserve_peer.py MODEL THREADS`; prints its address.

It speaks the same protocol with the same binary bodies, and does not batch.
"""

import asyncio
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

from kserve import InferOutput, InferResponse, Model, ModelServer

from resnet_export.runtime.sessions import session


class Classifier(Model):
    """One run per request, in a thread, so that the server goes on reading meanwhile."""

    def __init__(self, path, threads):
        super().__init__("net")
        self.session = session(path, "cpu", threads=threads)
        self.thread = ThreadPoolExecutor(1)
        self.ready = True

    async def get_input_types(self):
        spec = self.session.inputs[0]
        shape = [-1 if isinstance(dim, str) else dim for dim in spec.shape]
        return [{"name": spec.name, "datatype": {"uint8": "UINT8", "float32": "FP32"}[spec.dtype], "shape": shape}]

    async def get_output_types(self):
        return [{"name": "logits", "datatype": "FP32", "shape": [-1, self.session.outputs[0].shape[-1]]}]

    async def predict(self, payload, headers=None, response_headers=None):
        pixels = payload.inputs[0].as_numpy()
        logits = (await asyncio.get_running_loop().run_in_executor(self.thread, self.session.run, pixels))["logits"]
        output = InferOutput("logits", list(logits.shape), "FP32")
        output.set_data_from_numpy(logits, binary_data=True)
        return InferResponse(response_id=payload.id or "none", model_name="net", infer_outputs=[output])


if __name__ == "__main__":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    print(f"http://127.0.0.1:{port}", flush=True)
    # The address is all that anybody reads there; a pipe that is full would stop the log, and the server with it.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    model = Classifier(sys.argv[1], int(sys.argv[2]) or None)
    ModelServer(http_port=port, enable_grpc=False, workers=1, timeout_keep_alive=600).start([model])
