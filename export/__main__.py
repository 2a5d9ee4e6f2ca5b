"""`python -m resnet_export`: the same as `resnet-export`."""

import sys

from .cli import main

sys.exit(main())
