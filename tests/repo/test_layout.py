"""The shape of the repository: small modules, plain folders around the packages, nothing of one machine."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("operator", "trainer-image", "serving", "cli")

USUAL_LINES = 300
MOST_LINES = 400
SHARE_OF_USUAL = 0.9

# Assembled from parts so that this file does not match itself.
FORBIDDEN = {
    "a path of one machine": r"(?<![\w.$}/-])/(?:work|root|home/[a-z]\w*)/(?=[\w.])",
    "the address of a package index": r"\b(?:pypi\.[o]rg|python[h]osted\.org|(?:proxy|sum)\.[g]olang\.org)\b",
    "an option with an index address": r"--(?:extra-)?index-[u]rl|--find-[l]inks|\bGOPROXY\W+https?:",
    "a private key": r"-----BEGIN (?:[A-Z]+ )?PRIVATE [K]EY-----",
}


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def offences(text: str) -> list[str]:
    """Describe what may not stand in a committed file, each as line and finding."""
    return [
        f"line {number}: {what}: {found[0]}"
        for number, line in enumerate(text.splitlines(), 1)
        for what, pattern in FORBIDDEN.items()
        if (found := re.search(pattern, line))
    ]


def lengths() -> dict[str, int]:
    modules = [path for path in tracked() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in FOLDERS]
    return {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules}


def test_no_module_is_long_and_few_are_longer_than_usual() -> None:
    lines = lengths()
    assert lines
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
    longer = {name: count for name, count in lines.items() if count > USUAL_LINES}
    assert len(longer) <= (1 - SHARE_OF_USUAL) * len(lines), longer


def test_the_folders_around_the_packages_are_plain() -> None:
    """A package named operator at the root would hide the standard library's."""
    assert [folder for folder in FOLDERS if (ROOT / folder / "__init__.py").exists()] == []
    assert all(list((ROOT / folder).glob("trimtab*/__init__.py")) for folder in FOLDERS)


def test_no_lock_file_with_an_index_address_is_committed() -> None:
    assert [path.name for path in tracked() if path.name in ("uv.lock", "poetry.lock", "pdm.lock")] == []


def test_no_committed_file_names_a_machine_an_index_or_a_key() -> None:
    found = {}
    for path in tracked():
        content = path.read_bytes()
        if b"\0" not in content and (bad := offences(content.decode())):
            found[str(path.relative_to(ROOT))] = bad
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "data = '/ro" + "ot/.cache/x'",
        "see /wo" + "rk/shared",
        "/ho" + "me/alice/src",
        "--index-" + "url https://example.org",
        "https://py" + "pi.org/simple",
        'GOPROXY": "htt' + "ps://example.org",
        "-----BEGIN RSA PRIVATE " + "KEY-----",
    ],
)
def test_the_search_finds_what_it_forbids(line: str) -> None:
    assert offences(line)


@pytest.mark.parametrize(
    "line", ["${ROOT}/" + "work/x", "tests/" + "work/plan", "https://example.org/root/x", "a/home/b", "GOPROXY=off"]
)
def test_the_search_leaves_ordinary_text_alone(line: str) -> None:
    assert offences(line) == []
