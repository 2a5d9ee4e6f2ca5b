#!/usr/bin/env python
"""The command `resnet-train` from a checkout; see `keras_resnet/training/cli.py`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resnet_export.train import main

if __name__ == "__main__":
    main()
