"""Pages that are generated are what their generator makes."""

import re
import runpy
import shutil
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_settings_page_is_current():
    generator = runpy.run_path(str(DOCS / "generate.py"))
    assert (DOCS / "settings.md").read_text() == generator["page"](), "run: python docs/generate.py"


def test_the_results_are_what_the_studies_found():
    """Pages, and the figures in them; nothing in them says where they were made."""
    generator = runpy.run_path(str(DOCS / "results.py"))
    for page, text in generator["pages"]().items():
        assert page.read_text("utf-8") == text, "run: python docs/results.py"
        for figure in re.findall(r"\]\((\S+\.svg)\)", text):
            assert (page.parent / figure).is_file()
    for numbers in (DOCS / "results").glob("*/study.json"):
        assert not re.search(r"/(tmp|home|root|work|Users)/", numbers.read_text("utf-8"))


def test_a_figure_of_the_results_is_drawn_from_its_numbers(tmp_path):
    generator = runpy.run_path(str(DOCS / "results.py"))
    kept = DOCS / "results" / "gqa-against-mha"
    shutil.copy(kept / "study.json", tmp_path)
    generator["figures"](tmp_path)
    for file in tmp_path.glob("*.svg"):
        assert file.read_bytes() == (kept / file.name).read_bytes(), "run: python docs/results.py"
