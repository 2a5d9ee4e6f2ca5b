"""The generated table is current."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_models_is_current():
    made = runpy.run_path(str(ROOT / "scripts" / "models.py"))["document"]()
    kept = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert made == kept, "run scripts/models.py"
