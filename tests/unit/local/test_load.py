"""YAML is read as kubectl reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.manifests.load import InvalidManifest, load

HEAD = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\n"


def read(tmp_path: Path, text: str) -> list[dict[str, object]]:
    path = tmp_path / "m.yaml"
    path.write_text(text, encoding="utf-8")
    return [document.obj for document in load(path)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("2.5e+3", 2500.0),
        (".5", 0.5),
        ("12", 12),
        ("0x1f", 31),
        ("'1e-5'", "1e-5"),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("on", True),
        ("~", None),
        ("", None),
        ("4Gi", "4Gi"),
        (".inf", ".inf"),
    ],
)
def test_scalars(tmp_path: Path, text: str, value: object) -> None:
    (obj,) = read(tmp_path, f"{HEAD}value: {text}\n")
    assert obj["value"] == value
    assert type(obj["value"]) is type(value)


def test_several_documents_lists_and_the_default_namespace(tmp_path: Path) -> None:
    other = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: y, namespace: n}\n"
    listed = "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: ConfigMap, metadata: {name: z}}\n"
    objects = read(tmp_path, f"{HEAD}---\n---\n# nothing\n---\n{other}---\n{listed}")
    assert [obj["metadata"] for obj in objects] == [
        {"name": "x", "namespace": "default"},
        {"name": "y", "namespace": "n"},
        {"name": "z", "namespace": "default"},
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\nb: 2\n", ("m.yaml:2:", "not YAML")),
        ("a: 1\n\tb: 2\n", ("m.yaml:2:", "not YAML")),
        (f"{HEAD}a: 1\na: 2\n", ("m.yaml:5:1", "'a' stands twice")),
        (f"{HEAD}---\n- 1\n", ("m.yaml:5", "not an object")),
        ("kind: x\nmetadata: {name: y}\n", ("m.yaml:1", "apiVersion: Required value")),
        ("apiVersion: v1\nkind: x\n", ("metadata.name: Required value",)),
        ("", ("holds no object",)),
        (f"{HEAD}a: !!python/object/apply:os.system [id]\n", ("m.yaml:4", "not YAML")),
        (f"{HEAD}? [1, 2]\n: x\n", ("m.yaml:4", "a key must be a string")),
    ],
)
def test_what_is_no_manifest_names_the_line(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidManifest) as raised:
        read(tmp_path, text)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidManifest, match="No such file"):
        load(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidManifest, match="not UTF-8"):
        load(tmp_path / "binary.yaml")
