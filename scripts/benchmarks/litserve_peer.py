"""LitServe with the session that our server uses: `python litserve_peer.py MODEL ROWS THREADS DELAY`; prints its address.

Its environment needs python-multipart as well.
"""

import socket
import sys

import litserve
import numpy as np
from fastapi import Request

from resnet_export.runtime.sessions import session


class Classifier(litserve.LitAPI):
    """One picture of pixels per request, as the file of a form: LitServe reads no other bytes."""

    def setup(self, device):
        self.session = session(sys.argv[1], "cpu", threads=int(sys.argv[3]) or None)
        self.spec = self.session.inputs[0]

    def decode_request(self, request: Request):
        return np.frombuffer(request["image"].file.read(), self.spec.dtype).reshape(self.spec.shape[1:])

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, x):
        return self.session.run(x)["logits"]

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"logits": output.tolist()}


if __name__ == "__main__":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    api = Classifier(max_batch_size=int(sys.argv[2]), batch_timeout=float(sys.argv[4]))
    # It is stopped now and then, and must not take that for clients that are too slow.
    server = litserve.LitServer(api, accelerator="cpu", timeout=False)
    print(f"http://127.0.0.1:{port}", flush=True)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error", timeout_keep_alive=600)
