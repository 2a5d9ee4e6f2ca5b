#!/usr/bin/env python
"""Compares the zoo with the reference implementations that are installed, under shared random weights.

Both networks get the same numbers, made from a seed and the reference's own parameter names, batch-norm statistics included;
torch's are saved by torch and read back like any user's file. The extra `peers` brings the references.
"""

import functools
import importlib.util
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "zoo" / "fixtures"
BAR = 1e-4

TORCHVISION = [
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
    *(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")),
]
TIMM = [
    *(
        "resnet18",
        "resnet26",
        "resnet200",
        "resnet18d",
        "resnet34d",
        "resnet50c",
        "resnet50d",
        "resnet50s",
        "resnet26t",
        "resnet50t",
    ),
    *("resnetv2_18", "resnetv2_34d", "resnetv2_50", "resnetv2_101", "resnetv2_50d", "resnetv2_50t", "resnetv2_50d_gn"),
    *(
        "resnext50_32x4d",
        "resnext50d_32x4d",
        "resnext101_32x4d",
        "wide_resnet50_2",
        "resnetblur18",
        "resnetblur50",
        "resnetblur50d",
    ),
    *("seresnet18", "seresnet34", "seresnet50", "seresnet152d", "seresnext50_32x4d", "seresnext101_32x8d"),
    *("resnetrs50", "resnetrs101", "resnetrs152", "resnetrs200", "resnetv2_50x1_bit", "resnetv2_50x3_bit", "resnetv2_101x1_bit"),
    *("resnetv2_101x3_bit", "resnetv2_152x2_bit", "resnetv2_152x4_bit", "vgg11", "vgg16_bn"),
]
# Our name -> what keras.applications calls it.
KERAS = {
    **{f"resnet{depth}_v1": f"ResNet{depth}" for depth in (50, 101, 152)},
    **{f"resnetv2_{depth}_keras": f"ResNet{depth}V2" for depth in (50, 101, 152)},
    **{"vgg16": "VGG16", "vgg19": "VGG19"},
}
# Our name -> arguments of KerasHub's backbone.
KERAS_HUB = {
    "resnet18": {"stackwise_num_blocks": [2, 2, 2, 2], "block_type": "basic_block", "use_pre_activation": False},
    "resnet34": {"stackwise_num_blocks": [3, 4, 6, 3], "block_type": "basic_block", "use_pre_activation": False},
    "resnet50": {"stackwise_num_blocks": [3, 4, 6, 3], "block_type": "bottleneck_block", "use_pre_activation": False},
    "resnetv2_50": {"stackwise_num_blocks": [3, 4, 6, 3], "block_type": "bottleneck_block", "use_pre_activation": True},
}
# Options that both sides have; without any the logits are compared.
DILATED = [("resnet50", 16), ("resnet50", 8), ("resnet18", 8), ("resnet50d", 8), ("resnetv2_50", 8), ("resnetv2_50d", 16)]
FEATURES = ["resnet18", "resnet50d", "resnetv2_50", "seresnext50_32x4d"]


def cases():
    """`(peer, our name, options)` of every comparison."""
    yield from (("torchvision", name, {}) for name in TORCHVISION)
    yield from (("timm", name, {}) for name in TIMM)
    yield from (("timm", name, {"output_stride": stride}) for name, stride in DILATED)
    yield from (("timm", name, {"features_only": True}) for name in FEATURES)
    yield from (("keras", name, {}) for name in KERAS)
    yield from (("keras_hub", name, {}) for name in KERAS_HUB)
    if installed("torch"):
        import torch_cifar

        yield from (("torch", name, torch_cifar.OPTIONS.get(name, {})) for name in torch_cifar.NETWORKS)


def torch_peer(module, seed, folder, stages=False, **gain):
    """Fills a torch module from the seed, saves it, and returns its forward pass (or timm's stage outputs) and the file."""
    import torch

    from keras_resnet.weights.synthetic import values

    state = {
        name: torch.from_numpy(values(name, tuple(tensor.shape), seed, True, **gain)) if tensor.is_floating_point() else tensor
        for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(state)
    module.eval()
    path = Path(folder) / "state.pth"
    torch.save(state, path)

    def forward(x):
        x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
        with torch.no_grad():
            if stages:
                outputs = module.forward_intermediates(x, intermediates_only=True)
                return [np.moveaxis(output.numpy(), 1, -1) for output in outputs]
            return module(x).numpy()

    return forward, path


def keras_peer(model, seed, folder):
    """Likewise for a Keras model; the file is an `.npz` of `layer/variable` names."""
    from keras_resnet.weights.matching import variables_of
    from keras_resnet.weights.synthetic import values

    arrays = {"/".join(name): variable for name, variable in variables_of(model).items()}
    for name, variable in arrays.items():
        variable.assign(values(name, tuple(variable.shape), seed, False))
    path = Path(folder) / "state.npz"
    np.savez(path, **{name: np.asarray(variable) for name, variable in arrays.items()})
    return functools.partial(model.predict, verbose=0), path


def reference(peer, name, options, classes, size, seed, folder):
    """The peer's network: `(forward, path of its weights, our extra options)`."""
    if peer == "torchvision":
        import torchvision

        return *torch_peer(getattr(torchvision.models, name)(num_classes=classes), seed, folder), {}
    if peer == "timm":
        import timm

        stages = "features_only" in options
        module = timm.create_model(name, num_classes=classes, **({} if stages else options))
        return *torch_peer(module, seed, folder, stages), {}
    if peer == "torch":
        import torch_cifar

        gain = {"gain": torch_cifar.GAINS[name]} if name in torch_cifar.GAINS else {}
        return *torch_peer(torch_cifar.NETWORKS[name](classes), seed, folder, **gain), {}
    import keras

    if peer == "keras":
        build = getattr(keras.applications, KERAS[name])
        model = build(weights=None, classes=classes, classifier_activation=None, input_shape=(size, size, 3))
        return *keras_peer(model, seed, folder), {}
    import keras_hub

    stem = {"input_conv_filters": [64], "input_conv_kernel_sizes": [7]}
    stacks = {"stackwise_num_filters": [64, 128, 256, 512], "stackwise_num_strides": [1, 2, 2, 2]}
    model = keras_hub.models.ResNetBackbone(**stem, **stacks, **KERAS_HUB[name], image_shape=(None, None, 3))
    return *keras_peer(model, seed, folder), {"include_top": False}


def compare(peer, name, options, classes, size, seed):
    """`(largest relative difference, reference outputs)` of one network at one size.

    The difference is max |Δ| over max |reference|, per output.
    """
    import keras

    import keras_resnet as kr
    from keras_resnet.weights.synthetic import images

    with tempfile.TemporaryDirectory() as folder:
        forward, path, extra = reference(peer, name, options, classes, size, seed, folder)
        # The reference goes before ours comes: the largest has 0.9 billion parameters.
        x = images(size, seed)
        expected = forward(x)
        del forward
        ours = {"include_preprocessing": False, "input_shape": (size, size, 3), **extra, **options}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = kr.create_model(name, weights=path, num_classes=classes, **ours)
    found = model.predict(x, verbose=0)
    if isinstance(found, dict):
        expected, found = dict(zip(found, expected, strict=True)), dict(found)
    else:
        expected, found = {"logits": expected}, {"logits": found}
    keras.backend.clear_session()
    return max(np.abs(found[key] - expected[key]).max() / np.abs(expected[key]).max() for key in expected), expected


@click.group()
def main():
    """Compare the zoo with torchvision, timm, keras.applications, KerasHub and the CIFAR networks of `torch_cifar.py`.

    Example: scripts/parity.py run --only "resnet*" --sizes 64,97
    """


def installed(peer):
    """Whether a peer can be imported."""
    return importlib.util.find_spec(peer) is not None


def chosen(only, peers):
    """The cases that match, of installed peers; those left out are said."""
    import fnmatch

    for peer in peers:
        if not installed(peer):
            click.echo(f"{peer} is not installed and left out; `pip install 'keras-resnet-export[peers]'` brings it", err=True)
    for peer in peers:
        # Loaded behind TensorFlow, a torch built for CUDA crashes the interpreter.
        if peer in TORCH_PEERS and installed(peer):
            importlib.import_module(peer)
    return [case for case in cases() if case[0] in peers and installed(case[0]) and fnmatch.fnmatch(case[1], only)]


TORCH_PEERS = ("torchvision", "timm", "torch")
PEERS = (*TORCH_PEERS, "keras", "keras_hub")


@main.command()
@click.option("--only", default="*", help="Names of our variants, shell-style.")
@click.option("--peer", "peers", multiple=True, type=click.Choice(PEERS), help="Reference; all by default.")
@click.option(
    "--sizes",
    default="",
    help="Sides of the images, comma-separated; by default 64 and 97, for CIFAR 32 and 41, for VGG 224 and 225.",
)
@click.option("--seed", default=0, help="Of weights, statistics and images.")
@click.option("--classes", default=1000, help="Logits.")
@click.option("--json", "as_json", type=click.Path(dir_okay=False), help="Write the figures there too.")
def run(only, peers, sizes, seed, classes, as_json):
    """Compare live with every installed reference."""
    rows = []
    for peer, name, options in chosen(only, peers or PEERS):
        for size in sizes_for(name, sizes):
            difference, _ = compare(peer, name, options, classes, size, seed)
            rows.append({"peer": peer, "model": name, "options": options, "size": size, "difference": float(difference)})
            text = " ".join(f"{key}={value}" for key, value in options.items())
            click.echo(f"{peer:12} {name:22} {text:18} {size:4} {difference:9.2e} {'' if difference <= BAR else 'OVER THE BAR'}")
    if as_json:
        Path(as_json).write_text(json.dumps({"seed": seed, "bar": BAR, "rows": rows}, indent=1))
    # NaN first: both sides may have overflowed, and then nothing was compared.
    worst = max((row["difference"] for row in rows), key=lambda difference: (np.isnan(difference), difference), default=np.nan)
    click.echo(f"{len(rows)} comparisons, largest |Δ| / max |logit| {worst:.2e}, bar {BAR:.0e}")
    sys.exit(0 if rows and worst <= BAR else 3)


def sizes_for(name, sizes):
    """Sides to compare at: one even, one odd."""
    if sizes:
        return [int(size) for size in sizes.split(",")]
    if name.startswith("vgg"):
        return [224, 225]
    from keras_resnet.models.registry import config_of

    return [32, 41] if config_of(name).input_size == 32 else [64, 97]


# Small enough for a fast test, and every kind of block, stem and shortcut once.
RECORDED = [
    ("torchvision", "resnet18", {}),
    ("torchvision", "resnet50", {}),
    ("torchvision", "resnext50_32x4d", {}),
    ("torchvision", "vgg11_bn", {}),
    ("timm", "resnet26t", {}),
    ("timm", "resnet50s", {}),
    ("timm", "resnet18d", {"output_stride": 8}),
    ("timm", "resnetv2_18", {}),
    ("timm", "resnetv2_50d", {"output_stride": 16}),
    ("timm", "resnetv2_50d_gn", {}),
    ("timm", "resnetblur18", {}),
    ("timm", "seresnet18", {}),
    ("timm", "resnetrs50", {}),
    ("timm", "resnetv2_50x1_bit", {}),
    ("keras", "resnet50_v1", {}),
    ("keras", "resnetv2_50_keras", {}),
    ("keras_hub", "resnet18", {}),
]
RECORDED_CLASSES = 20


@main.command()
@click.option("--seed", default=1, help="Of weights, statistics and images.")
def record(seed):
    """Write the fixtures that the fast tests replay: reference outputs only, the rest is made from the seed."""
    FIXTURES.mkdir(parents=True, exist_ok=True)
    arrays, rows = {}, []
    for peer, name, options in RECORDED:
        for size in sizes_for(name, "64,97" if not name.startswith("vgg") else ""):
            difference, expected = compare(peer, name, options, RECORDED_CLASSES, size, seed)
            key = f"case{len(rows)}"
            arrays[key] = next(iter(expected.values())).astype("float32")
            rows.append({"key": key, "peer": peer, "model": name, "options": options, "size": size, "seed": seed})
            click.echo(f"{peer:12} {name:22} {size:4} {difference:9.2e}")
    np.savez_compressed(FIXTURES / "parity.npz", **arrays)
    (FIXTURES / "parity.json").write_text(json.dumps({"classes": RECORDED_CLASSES, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
