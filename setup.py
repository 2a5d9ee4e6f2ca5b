"""Packaging: two import packages, `keras_resnet` and `resnet_export` (folder `export/`), one distribution."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "keras_resnet" / "_version.py").read_text()).group(1)

LINUX_X86 = 'sys_platform == "linux" and platform_machine == "x86_64"'
REQUIRES = [
    "tensorflow>=2.21",
    "keras>=3.15",
    "tf2onnx>=1.17",
    # The first version that knows opset 23.
    "onnx>=1.18",
    # Copies of models keep their types from this version on; `quantize --fp16` needs them.
    "onnx-ir>=0.1.15",
    # 1.27 on Linux declares CUDA extras that cannot be installed and does not import without CUDA 13.
    f"onnxruntime-gpu>=1.26,!=1.27.*; {LINUX_X86}",
    'onnxruntime>=1.26; sys_platform != "linux" or platform_machine != "x86_64"',
    "click>=8.1",
    "rich>=13",
    "numpy>=2.3",
    "pillow>=10",
    "safetensors>=0.5",
    "lazy-loader>=0.5",
]
SERVE = [
    # Below 1.0.1 a malformed `Host` reaches the application (CVE-2026-48710).
    "starlette>=1.0.1",
    "uvicorn>=0.40",
    "orjson>=3.10",
    "httptools>=0.6.3",
    'uvloop>=0.19; sys_platform != "win32"',
    "prometheus-client>=0.20",
]
EXTRAS = {
    "gpu": ["onnxruntime-gpu[cuda,cudnn]>=1.28"],
    # TensorFlow 2.21 is built for CUDA 12; 1.26 is the last onnxruntime-gpu that is.
    "train-gpu": ["tensorflow[and-cuda]>=2.21,<2.22", "onnxruntime-gpu[cuda,cudnn]==1.26.*"],
    "serve": SERVE,
    # `serving/grpc_core.py` is checked with grpcio from 1.80 on.
    "grpc": ["grpcio>=1.80", "protobuf>=6.31.1", *SERVE],
    "cluster": ["ray[serve,data]>=2.60", *SERVE],
    "data": ["tensorflow-datasets>=4.9"],
    "train": ["pyyaml>=6", "matplotlib>=3.8"],
    "tensorboard": ["tensorboard>=2.18"],
    "demo": ["matplotlib>=3.8", "scikit-learn>=1.4"],
    "batch": ["pyarrow>=20"],
    "client": ["httpx>=0.27"],
    "docs": ["sphinx>=8", "furo>=2024.8", "myst-nb>=1.3", "sphinx-click>=6"],
    "backends": ["jax>=0.4.30", "torch>=2.4"],
    "peers": [
        "onnxscript>=0.3",
        "torch>=2.4",
        "torchvision>=0.19",
        "timm>=1.0",
        "keras-hub>=0.20",
        "openvino>=2024.4",
        "nncf>=3.0",
    ],
}
EXTRAS["dev"] = sorted(
    {
        "pytest>=8",
        "pytest-xdist>=3.5",
        "pytest-cov>=5",
        "hypothesis>=6.100",
        "selenium>=4.20",
        "schemathesis>=4",
        "ruff>=0.12",
        "mypy>=2.0",
        "pre-commit>=4",
        "build>=1.2",
    }.union(*(EXTRAS[name] for name in ("demo", "train", "tensorboard", "serve", "grpc", "client", "batch", "docs")))
)

setup(
    name="keras-resnet-export",
    version=VERSION,
    description="Residual networks for Keras that start as the identity, and verified ONNX and SavedModel export",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["keras_resnet", "keras_resnet.*"])
    + ["resnet_export"]
    + ["resnet_export." + name for name in find_packages("export")],
    package_dir={"resnet_export": "export"},
    package_data={
        "keras_resnet": ["py.typed", "*.pyi", "weights/data/*"],
        "resnet_export": ["py.typed", "*.pyi", "serving/page/*"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["resnet-export = resnet_export.cli:main", "resnet-train = resnet_export.train:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
