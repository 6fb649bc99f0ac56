"""Generated files are committed byte for byte as the generator writes them."""

from pathlib import Path

from trimtab_operator.api.generate import outputs

ROOT = Path(__file__).parents[2]


def test_every_generated_file_is_up_to_date() -> None:
    expected = outputs()
    assert {Path(name).parts[0] for name in expected} == {"crds", "helm", "docs"}
    stale = [name for name, text in expected.items() if (ROOT / name).read_bytes() != text.encode()]
    assert stale == [], "run `make generate` and commit the result"


def test_nothing_else_lies_among_the_generated_files() -> None:
    expected = outputs()
    folders = {(ROOT / name).parent for name in expected if name.endswith(".yaml")}
    present = {str(path.relative_to(ROOT)) for folder in folders for path in folder.iterdir()}
    assert present == {name for name in expected if name.endswith(".yaml")}
