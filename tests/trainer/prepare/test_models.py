"""Starting weights: what is refused, and what becomes of the rest."""

import json
import pickle
import struct
from pathlib import Path

import pytest
from tests.trainer.prepare.kit import TINY, chats, leftovers, opened, run, sft, tiny_model, write_jsonl

from trimtab_trainer import manifest
from trimtab_trainer.errors import BadConfiguration, InputMissing, StageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "chat.jsonl", chats(10)).as_uri()


def test_a_folder_is_copied_sealed_and_named_by_its_digest(folder: Path, data: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (folder / "logo.png").write_bytes(b"x")
    report = run(root, sft(data), model={"uri": folder.as_uri()})
    assert report.model is not None
    kept = root / "models" / report.model.digest[7:]
    assert report.model.uri == kept.as_uri()
    listed = manifest.verify(kept, report.model.digest)
    assert listed.kind == "model"
    assert "model.safetensors" in listed.files
    assert "logo.png" not in listed.files
    prepared = opened(root, report)
    assert prepared.model_config == json.loads((folder / "config.json").read_text())
    again = run(root, sft(data), model={"uri": folder.as_uri()})
    assert again.model == report.model
    assert again.stages[0].reused


def test_an_artifact_with_a_digest_is_verified_in_place(folder: Path, data: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    digest = manifest.seal(folder, "model", {})
    report = run(root, sft(data), model={"uri": folder.as_uri(), "digest": digest})
    assert report.model is not None
    assert (report.model.uri, report.model.digest) == (folder.as_uri(), digest)
    assert not (root / "models").exists()
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputMissing, match=r"model\.safetensors: its bytes differ from manifest\.json; restore"):
        run(root, sft(data), model={"uri": folder.as_uri(), "digest": digest})


def _config(folder: Path, **keys: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def _unsafe(folder: Path, what: str) -> None:
    if what in ("pytorch_model.bin", "optimizer.pt", "sub/data.pkl", "modeling_evil.py"):
        (folder / what).parent.mkdir(exist_ok=True)
        (folder / what).write_bytes(pickle.dumps({"x": 1}))
    elif what == "auto_map":
        _config(folder, auto_map={"AutoModel": "evil--repo.Model"})
    elif what == "nested":
        _config(folder, text_config={"deep": [{"_attn_implementation_internal": "evil/repo"}]})
    elif what == "tokenizer":
        (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.T", null]}}')
    elif what == "trust":
        (folder / "generation_config.json").write_text('{"trust_remote_code": true}')
    elif what == "link":
        (folder / "vocab.json").symlink_to("/etc/hostname")
    elif what == "cut":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8])
    elif what == "header":
        header = json.dumps({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    elif what == "shard":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../other.safetensors"}}')
    elif what == "config":
        (folder / "config.json").unlink()
    elif what == "json":
        (folder / "config.json").write_text("{")
    elif what == "weights":
        (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("what", "reason", "message"),
    [
        ("pytorch_model.bin", "UnsafeInput", r"pytorch_model\.bin: code and pickles are refused.*give a folder with"),
        ("optimizer.pt", "UnsafeInput", r"optimizer\.pt: code and pickles"),
        ("sub/data.pkl", "UnsafeInput", r"sub/data\.pkl: code and pickles"),
        ("modeling_evil.py", "UnsafeInput", r"modeling_evil\.py: code and pickles"),
        ("auto_map", "UnsafeInput", r"config\.json: the key 'auto_map' makes loading run code; use a model without"),
        ("nested", "UnsafeInput", r"config\.json: the key '_attn_implementation_internal'"),
        ("tokenizer", "UnsafeInput", r"tokenizer_config\.json: the key 'auto_map'"),
        ("trust", "UnsafeInput", r"generation_config\.json: the key 'trust_remote_code'"),
        ("link", "UnsafeInput", r"vocab\.json is a link that leads out of .*copy the file"),
        ("cut", "InputMissing", r"model\.safetensors: damaged or not safetensors.*restore"),
        ("header", "InputMissing", r"model\.safetensors: damaged or not safetensors.*restore"),
        ("shard", "InputMissing", r"index\.json names \.\./other\.safetensors, which is not there"),
        ("config", "InputMissing", r"no config\.json; give a model folder"),
        ("json", "InputMissing", r"config\.json: not JSON.*restore"),
        ("weights", "InputMissing", r"no \*\.safetensors; convert"),
    ],
)
def test_what_is_refused(folder: Path, data: str, tmp_path: Path, what: str, reason: str, message: str) -> None:
    _unsafe(folder, what)
    with pytest.raises(StageError, match=message) as caught:
        run(tmp_path / "root", sft(data), model={"uri": folder.as_uri()})
    assert caught.value.reason == reason
    assert leftovers(tmp_path / "root") == []


def test_random_weights_with_a_given_tokenizer(folder: Path, data: str, tmp_path: Path) -> None:
    report = run(tmp_path / "root", sft(data), model={"config": TINY, "tokenizerUri": folder.as_uri()})
    prepared = opened(tmp_path / "root", report)
    assert report.model is None
    assert (prepared.tokenizer_folder / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert not (prepared.tokenizer_folder / "config.json").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "give exactly one of uri and config"),
        ({"config": TINY}, "random weights need a tokenizer"),
        ({"uri": "FOLDER", "tokenizerTrain": {}}, "keeps its tokenizer and template"),
        ({"uri": "FOLDER", "revision": "main"}, r"only hf:// has revisions"),
        ({"uri": "FOLDER", "secretPath": "/x"}, "file:// takes no secret"),
    ],
)
def test_contradictions(folder: Path, data: str, tmp_path: Path, model: dict[str, object], message: str) -> None:
    given = {key: folder.as_uri() if value == "FOLDER" else value for key, value in model.items()}
    with pytest.raises(BadConfiguration, match=message):
        run(tmp_path / "root", sft(data), model=given or {"revision": None})


def test_rows_longer_than_the_model_are_refused(folder: Path, data: str, tmp_path: Path) -> None:
    _config(folder, max_position_embeddings=32)
    with pytest.raises(BadConfiguration, match="maxLength is 64, the model has 32 positions; lower maxLength"):
        run(tmp_path / "root", sft(data), model={"uri": folder.as_uri()})
