"""Bad input of each kind is refused by `prepare`, before an accelerator is claimed, with its place and the remedy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.trainer.prepare.kit import chats, leftovers, run, sft, stage, tiny_model, write_jsonl

from trimtab_trainer import manifest
from trimtab_trainer.errors import BadConfiguration, BadData, InputMissing, StageError
from trimtab_trainer.prepare import weights

Stages = list[dict[str, Any]]
LONG = "very " * 100
SHORT = {"rollout": {"maxNewTokens": 16}}


def pair(i: int, **changes: Any) -> dict[str, Any]:
    return {"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"I do not know {i}, sorry.", **changes}


def ranking(i: int, *completions: str) -> dict[str, Any]:
    answers = completions or (f"It is {i}.", "Who knows?", "No.")
    return {"prompt": f"What is {i}?", "completions": answers, "ranks": list(range(len(answers)))}


def after_sft(folder: Path, rows: list[dict[str, Any]], kind: str, **fields: Any) -> Stages:
    """A chain of `sft` and a stage of type `kind` whose line 5 is the one that the test is about."""
    chat = write_jsonl(folder / "chat.jsonl", chats(20))
    data = write_jsonl(folder / "data.jsonl", rows)
    loss = "all" if kind == "ppo" else "completion"
    return [sft(chat.as_uri()), stage("next", kind, data.as_uri(), fromStage="chat", loss=loss, **fields)]


RECORDS = {
    "a pair without a difference": (
        pair(4, rejected="It is 4."),
        {"dpo": {}, "reward": {}},
        r"chosen and rejected are the same; remove the record: nothing is to be learnt from it$",
    ),
    "a pair that differs in what bears no loss": (
        pair(
            4,
            chosen=[{"role": "assistant", "content": "It is 4."}],
            rejected=[{"role": "assistant", "content": "It is 4.", "name": "judge"}],
        ),
        {"dpo": {}, "reward": {}},
        r"chosen and rejected are the same tokens; remove the record",
    ),
    "a pair whose difference is cut off": (
        pair(4, chosen=f"{LONG}yes", rejected=f"{LONG}no"),
        {"dpo": {"onTooLong": "truncate"}},
        r"chosen and rejected are the same tokens at maxLength = 64; remove the record",
    ),
    "a ranking of one completion": (
        ranking(4, "It is 4."),
        {"reward": {}},
        r"'completions' has 1 answer: there is nothing to compare; give two at least, or remove the record$",
    ),
    "a ranking of ties": (
        ranking(4) | {"ranks": [1, 1, 1]},
        {"reward": {}},
        r"all completions are ties; remove the record",
    ),
    "a pair longer than the context": (
        pair(4, chosen=LONG),
        {"dpo": {}, "reward": {}},
        r"\d+ tokens are more than maxLength = 64; raise maxLength, shorten it, or set onTooLong to truncate or drop$",
    ),
    "a prompt that leaves no room for its answer": (
        {"prompt": "very " * 50},
        {"ppo": {"ppo": SHORT}},
        r"\d+ tokens are more than maxLength = 64 less 16 for the answer; raise maxLength, lower rollout.maxNewTokens, "
        r"or shorten the prompt$",
    ),
    "a prompt without its reference": (
        {"prompt": "What is 4?"},
        {"ppo": {"ppo": {**SHORT, "verifier": {"numericAnswer": {}}}}},
        r"'answer' is missing; add 'answer' or remove the record$",
    ),
    "a reference in another field": (
        {"prompt": "What is 4?", "answer": "It is 4."},
        {"ppo": {"ppo": {**SHORT, "verifier": {"exactMatch": {"field": "number"}}}}},
        r"'number' is missing; add 'number' or remove the record$",
    ),
    "an empty reference": (
        {"prompt": "What is 4?", "answer": " "},
        {"ppo": {"ppo": {**SHORT, "verifier": {"exactMatch": {}}}}},
        r"'answer' is empty; fill it or remove the record$",
    ),
    "a reference that is no text": (
        {"prompt": "What is 4?", "answer": ["4"]},
        {"ppo": {"ppo": {**SHORT, "verifier": {"exactMatch": {}}}}},
        r"'answer' is a list, not text; write 'answer' as a string$",
    ),
    "a reference that is no number": (
        {"prompt": "What is 4?", "answer": "four"},
        {"ppo": {"ppo": {**SHORT, "verifier": {"numericAnswer": {}}}}},
        r"'answer' holds no number, which numericAnswer compares with; write the right number, or remove the record$",
    ),
}


@pytest.mark.parametrize(
    ("bad", "kind", "fields", "message"),
    [
        pytest.param(bad, kind, fields, message, id=f"{name} ({kind})")
        for name, (bad, kinds, message) in RECORDS.items()
        for kind, fields in kinds.items()
    ],
)
def test_a_bad_record_is_named_with_its_remedy(
    tmp_path: Path, bad: dict[str, Any], kind: str, fields: dict[str, Any], message: str
) -> None:
    good: Callable[[int], dict[str, Any]] = ranking if "completions" in bad else pair
    if kind == "ppo":
        good = lambda i: {"prompt": f"What is {i}?", "answer": i, "number": str(i)}  # noqa: E731
    rows = [bad if i == 4 else good(i) for i in range(9)]
    stages = after_sft(tmp_path, rows, kind, **fields)
    with pytest.raises(BadData, match=rf"^stage next: line 5 of file:\S+/data\.jsonl: {message}") as caught:
        run(tmp_path / "root", *stages)
    assert caught.value.stage == "next"
    if message.endswith("shorten the prompt$"):
        return
    dropping = [stages[0], {"onTooLong": "drop", **stages[1], "onInvalid": "drop", "maxDropped": 1}]
    found = run(tmp_path / "root", *dropping).stages[1]
    assert (found.records, found.dropped) == (8, 1)


@pytest.mark.parametrize("kind", ["reward", "dpo", "ppo"])
def test_a_stage_that_needs_a_model_does_not_start_from_random_weights(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": "What?"}] * 3 if kind == "ppo" else [pair(i) for i in range(3)]
    first = after_sft(tmp_path, rows, kind)[1] | {"fromStage": None}
    message = f"^stage next: a {kind} stage starts from a model, .*; give from, or model.uri$"
    with pytest.raises(BadConfiguration, match=message) as caught:
        run(tmp_path / "root", first)
    assert caught.value.stage == "next"
    assert leftovers(tmp_path / "root") == []
    model = {"uri": tiny_model(tmp_path / "model").as_uri()}
    assert run(tmp_path / "root", first, model=model).stages[0].records == 3


@pytest.mark.parametrize(
    ("role", "field"),
    [("rewardStage", "rewardFrom"), ("heldOutRewardStage", r"earlyStopping\.heldOutRewardFrom")],
)
def test_a_reward_model_of_another_tokenizer_is_refused(tmp_path: Path, role: str, field: str) -> None:
    root = tmp_path / "root"
    chat, policy = after_sft(tmp_path, [{"prompt": "What?"}] * 3, "ppo", **{role: "score"})
    digest = run(root, chat).stages[0].digest
    chosen = {"uri": (root / "prepared" / digest.removeprefix("sha256:")).as_uri(), "digest": digest}
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [pair(i) for i in range(9)])
    score = stage("score", "reward", pairs.as_uri(), loss="completion")
    apart = [score, policy | {"fromStage": None, "fromPrepared": chosen}]
    message = rf"tokenizer of {field} \(score\) is another one than the stage's: .*; start both from one model$"
    with pytest.raises(BadConfiguration, match=message) as caught:
        run(root, *apart, model={"uri": tiny_model(tmp_path / "model").as_uri()})
    assert caught.value.stage == "next"
    together = [chat, score | {"fromStage": "chat"}, policy]
    assert run(root, *together).stages[2].records == 3


LINEAR = "write it in RE2's syntax, which has no look-around and no back-references$"
UNMARKED = r"what counts is not marked; put it into a group \(\?P<answer>…\), the only one there is: write others as"
EXPRESSIONS = {
    "open bracket": ("regularExpression", "pattern", "(a", rf".*missing \): \(a; {LINEAR}"),
    "look-ahead": ("regularExpression", "pattern", "a(?=b)", rf".*\(\?=; {LINEAR}"),
    "back-reference": ("exactMatch", "answerPattern", r"(?P<answer>a)\1", rf".*\\1; {LINEAR}"),
    "no group": ("exactMatch", "answerPattern", "a+", UNMARKED),
    "a group without a name": ("numericAnswer", "answerPattern", "(a+)", UNMARKED),
    "a group too many": ("numericAnswer", "answerPattern", "(?P<answer>a)(?P<b>c)", UNMARKED),
}


SCHEMAS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown type": ({"type": "text"}, r"\.type: 'text' is not valid .*; correct the schema$"),
    "an unknown type below": (
        {"properties": {"a": {"type": "text"}}},
        r"\.properties\.a\.type: 'text' is not valid .*; correct the schema$",
    ),
    "another program's": ({"$schema": "https://example.com/mine"}, r": \$schema 'https://\S+' is no draft of JSON"),
    "a broken expression": ({"items": {"pattern": "(a"}}, rf": pattern: .*missing \): \(a; {LINEAR}"),
    "another file": ({"$ref": "https://example.com/schema"}, r": \$ref '.*' leads outside of it; copy what it names"),
    "a file below": ({"properties": {"a": {"$ref": "other.json"}}}, r": \$ref 'other.json' leads outside"),
    "nowhere": ({"items": {"$ref": "#/$defs/a"}}, r": \$ref '#/\$defs/a' leads nowhere; correct it$"),
    "itself": ({"$ref": "#"}, r": \$ref '#' leads to itself without an end; have it pass a property or an item$"),
    "itself in turns": (
        {
            "properties": {"a": {"$ref": "#/$defs/a"}},
            "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"not": {"$ref": "#/$defs/a"}}},
        },
        r": \$ref '#/\$defs/\w' leads to itself without an end",
    ),
    "names by expression": ({"patternProperties": {"(a+)+": {}}}, r": patternProperties is not supported here; name"),
    "two drafts": (
        {"items": {"$schema": "http://json-schema.org/draft-07/schema#"}},
        r": \$schema is not supported here; give it at the top only$",
    ),
}


@pytest.mark.parametrize("what", SCHEMAS)
def test_a_verifiers_broken_schema_is_refused(tmp_path: Path, what: str) -> None:
    schema, message = SCHEMAS[what]
    verifier = {"jsonSchema": {"schema": schema}}
    chat, policy = after_sft(tmp_path, [{"prompt": "What?"}] * 3, "ppo", ppo={**SHORT, "verifier": verifier})
    with pytest.raises(BadConfiguration, match=rf"^stage next: ppo\.verifier\.jsonSchema\.schema{message}") as caught:
        run(tmp_path / "root", chat, policy)
    assert caught.value.stage == "next"


@pytest.mark.parametrize("what", EXPRESSIONS)
def test_a_verifiers_broken_expression_is_refused(tmp_path: Path, what: str) -> None:
    kind, field, expression, message = EXPRESSIONS[what]
    verifier = {kind: {field: expression}}
    chat, policy = after_sft(
        tmp_path, [{"prompt": "What?", "answer": 1}] * 3, "ppo", ppo={**SHORT, "verifier": verifier}
    )
    with pytest.raises(BadConfiguration, match=rf"^stage next: ppo\.verifier\.{kind}\.{field}: {message}") as caught:
        run(tmp_path / "root", chat, policy)
    assert caught.value.stage == "next"
    assert not list((tmp_path / "root").rglob("references.json"))


@pytest.mark.parametrize("own", [{"tokenizerTrain": {}}, {"tokenizerUri": "file:///elsewhere"}])
def test_a_model_keeps_its_tokenizer_and_template(tmp_path: Path, own: dict[str, Any]) -> None:
    chat = write_jsonl(tmp_path / "chat.jsonl", chats(5))
    model = {"uri": tiny_model(tmp_path / "model").as_uri(), **own}
    with pytest.raises(BadConfiguration, match=r"keeps its tokenizer and template, .*; remove tokenizer$"):
        run(tmp_path / "root", sft(chat.as_uri()), model=model)


def test_a_result_that_writes_no_text_is_no_model_to_start_from(tmp_path: Path) -> None:
    chat = write_jsonl(tmp_path / "chat.jsonl", chats(5))
    folder = tiny_model(tmp_path / "model")
    model = {"uri": folder.as_uri(), "digest": manifest.seal(folder, "reward", {})}
    with pytest.raises(BadConfiguration, match="holds a reward, not a model; start from another stage's result"):
        run(tmp_path / "root", sft(chat.as_uri()), model=model)


def test_weights_of_four_bits_need_bitsandbytes_and_no_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = write_jsonl(tmp_path / "chat.jsonl", chats(5))
    quantized = sft(chat.as_uri(), lora={"quantization": "nf4"}, zeroStage=3)
    message = r"^stage chat: lora\.quantization: nf4 needs the package bitsandbytes, .*; use an image with it, or"
    with pytest.raises(BadConfiguration, match=message):
        run(tmp_path / "root", quantized)
    (tmp_path / "bitsandbytes.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadConfiguration, match=r"zeroStage 3 would shard what is packed; set zeroStage to 2$"):
        run(tmp_path / "root", quantized)
    assert run(tmp_path / "root", quantized | {"zeroStage": 2}).stages[0].records == 5


Tensors = dict[str, torch.Tensor]
NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


def put(name: str, at: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name][at] = value

    return change


def cast(name: str, dtype: torch.dtype) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


NAN, INF = float("nan"), float("inf")
FILE = r"model\.safetensors: tensor "
UNFIT: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "NaN": (put(UP, (63, 31), NAN), rf"{FILE}{UP} holds NaN at \[63, 31\], .*; restore the file"),
    "NaN in bf16": (put(UP, (0, 0), NAN, torch.bfloat16), rf"{FILE}{UP} holds NaN at \[0, 0\]"),
    "NaN in fp16": (put(NORM, (3,), NAN, torch.float16), rf"{FILE}{NORM} holds NaN at \[3\]"),
    "NaN in fp64": (put(NORM, (31,), NAN, torch.float64), rf"{FILE}{NORM} holds NaN at \[31\]"),
    "infinite": (put(NORM, (31,), -INF), rf"{FILE}{NORM} holds an infinite number at \[31\]"),
    "infinite in bf16": (put(UP, (7, 8), INF, torch.bfloat16), rf"{FILE}{UP} holds an infinite number at \[7, 8\]"),
    "of another shape": (
        lambda tensors: tensors.update({NORM: tensors[NORM][:16].clone()}),
        rf"{FILE}{NORM} is \[16\], config\.json makes it \[32\]; restore",
    ),
    "missing": (lambda tensors: tensors.pop(UP), rf"no \*\.safetensors holds {UP}; restore the files"),
    "of integers": (
        cast(UP, torch.int8),
        rf"{FILE}{UP} is I8, which can't be trained; give the model in F64, .* or BF16$",
    ),
    "of 8 bits": (cast(UP, torch.float8_e4m3fn), rf"{FILE}{UP} is F8_E4M3, which can't be trained"),
}


def refused(tmp_path: Path, folder: Path, message: str, *, sealed: bool = False) -> StageError:
    """Nothing is left behind, whether the folder is fetched or an artifact of another job."""
    chat = write_jsonl(tmp_path / "chat.jsonl", chats(5))
    model = {"uri": folder.as_uri()} | ({"digest": manifest.seal(folder, "model", {})} if sealed else {})
    with pytest.raises(InputMissing, match=f"^{folder.as_uri()}: {message}") as caught:
        run(tmp_path / "root", sft(chat.as_uri()), model=model)
    assert leftovers(tmp_path / "root") == []
    return caught.value


@pytest.mark.parametrize("what", UNFIT)
def test_weights_that_can_not_be_trained(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model(tmp_path / "model")
    change, message = UNFIT[what]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1000)  # no divisor of a tensor's size
    refused(tmp_path, folder, message, sealed=what == "NaN")


def test_finite_weights_of_any_size_pass(tmp_path: Path) -> None:
    """The largest and the smallest numbers of each format, and a scalar that the model does not want."""
    folder = tiny_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name, dtype in ((NORM, torch.float32), (UP, torch.bfloat16), ("lm_head.weight", torch.float16)):
        tensors[name] = tensors[name].to(dtype)
        limits = torch.finfo(dtype)
        tensors[name].view(-1)[:4] = torch.tensor([limits.max, limits.min, limits.tiny, -0.0], dtype=dtype)
    tensors["scale"] = torch.tensor(1.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights.check_weights(folder)


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    refused(tmp_path, folder, r"config\.json: the weights are quantised .*; give the model in F64, F32, F16 or BF16$")


def test_a_cut_file_and_a_header_that_claims_the_memory(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    refused(tmp_path, folder, r"model\.safetensors: damaged or not safetensors .*; restore the file")
    for claim in (2**63, 33 << 20):
        file.write_bytes(claim.to_bytes(8, "little") + whole[8:])
        error = refused(tmp_path, folder, r"model\.safetensors: its header claims [\d,]+ bytes, .*; restore the file")
        assert error.reason == "UnsafeInput"
