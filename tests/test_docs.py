"""Pages that are generated are what their generator makes."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_settings_page_is_current():
    generator = runpy.run_path(str(DOCS / "generate.py"))
    assert (DOCS / "settings.md").read_text() == generator["page"](), "run: python docs/generate.py"
