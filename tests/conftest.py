"""Shared by all tests: quiet TensorFlow, the data folder, models built once, randomised statistics."""

import os
import runpy
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
# TensorFlow turns oneDNN on by itself on newer processors only; without it a CPU has no channels-first convolution.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

from pathlib import Path

import hypothesis
import pytest

# The time that an example takes says nothing about the code where other programs share the machine.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def shared_data():
    """Folder with CIFAR-10, real weights and photos; tests that need it are skipped where it is missing."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("KERAS_RESNET_DATA", default))
    if not folder.is_dir():
        pytest.skip("no data folder: set KERAS_RESNET_DATA")
    return folder


@pytest.fixture(scope="session")
def cifar_test(shared_data):
    """CIFAR-10's test images of the data folder, and their labels."""
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    try:
        return runpy.run_path(str(shared_data / "cifar10.py"))["load"]("test_even")
    finally:
        # The reader lifts Pillow's limit for its own sheets; other tests need it.
        Image.MAX_IMAGE_PIXELS = limit


@pytest.fixture(autouse=True)
def no_open_name_scope():
    """A name scope of Keras that a test leaves open would name the variables of all later tests."""
    yield
    if "keras" in sys.modules:
        from keras.src.backend.common import global_state

        stack = global_state.get_global_attribute("name_scope_stack", [])
        left = [scope.name for scope in stack]
        stack.clear()
        assert not left, f"open name scopes: {left}"


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked slow too, and fail on skips that are not excused")
    excuse = "with --all: skips whose reason contains REASON are fine"
    parser.addoption("--excuse", action="append", default=[], metavar="REASON", help=excuse)


# Files that take longest come first, so that no worker is left with one of them at the end.
LONG_FILES = (
    "export/test_random_models.py",
    "export/test_random_models_odd.py",
    "training/test_replicas.py",
    "training/test_fit.py",
    "training/test_faults.py",
    "growth/test_grow.py",
    "export/test_verification.py",
    "export/test_outputs.py",
    "export/test_conversion.py",
    "export/test_onnx.py",
)


def _place(item):
    name = item.path.relative_to(Path(__file__).parent).as_posix()
    return LONG_FILES.index(name) if name in LONG_FILES else len(LONG_FILES)


def pytest_collection_modifyitems(config, items):
    items.sort(key=_place)
    if config.getoption("--all") or config.getoption("-m"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--all") and (unexcused := _unexcused(terminalreporter, config)):
        reasons = "; ".join(sorted(set(unexcused)))
        terminalreporter.write_line(f"--all: {len(unexcused)} skipped without an excuse (--excuse REASON): {reasons}", red=True)


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == 0 and session.config.getoption("--all") and _unexcused(reporter, session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _unexcused(reporter, config):
    skipped = reporter.stats.get("skipped", [])
    reasons = [report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr) for report in skipped]
    return [reason for reason in reasons if not any(excuse in reason for excuse in config.getoption("--excuse"))]
