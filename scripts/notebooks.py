"""Execute the notebooks in docs/notebooks and store their outputs in them.

The notebooks read the environment variables `CIFAR10_NPZ` (an `.npz` file with CIFAR-10), `PHOTOS` (a folder of photos) and
`TRITON_PYTHON` (an interpreter that has tritonclient).
"""

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
TIMEOUT = 900  # seconds for one cell


def execute(path):
    """Run a notebook in a new kernel.

    Args:
        path: The notebook, which is not changed.

    Returns:
        The notebook with its new outputs, without what libraries log to standard error.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", record_timing=False, coalesce_streams=True).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK", help="Notebooks to execute; by default all.")
    paths = parser.parse_args().notebooks or sorted(FOLDER.glob("*.ipynb"))
    if missing := [str(path) for path in paths if not path.is_file()]:
        parser.error(f"no such file: {', '.join(missing)}")
    for path in paths:
        nbformat.write(execute(path), path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
