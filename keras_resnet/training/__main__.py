"""`python -m keras_resnet.training` is `resnet-train`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="resnet-train")
