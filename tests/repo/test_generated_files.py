"""Generated files are committed byte for byte as the generator writes them."""

from pathlib import Path

from trimtab_operator.api import generate as api
from trimtab_operator.chart import generate as chart

ROOT = Path(__file__).parents[2]
EXPECTED = {**api.outputs(), **chart.outputs()}
FOLDERS = ("crds", "helm/trimtab/templates/crds", "helm/trimtab/presets")
"""Hold nothing but generated files."""


def test_every_generated_file_is_up_to_date() -> None:
    assert {Path(name).parts[0] for name in EXPECTED} == {"crds", "helm", "docs"}
    stale = [name for name, text in EXPECTED.items() if (ROOT / name).read_bytes() != text.encode()]
    assert stale == [], "run `make generate` and commit the result"


def test_nothing_else_lies_among_the_generated_files() -> None:
    present = {str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).iterdir()}
    assert present == {name for name in EXPECTED if str(Path(name).parent) in FOLDERS}
