"""Chat templates and loss masks: golden texts, and the mistakes that others made (S2 to S6 of the design's facts)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.trainer.prepare.kit import chats, opened, run, sft, write_jsonl

from trimtab_trainer.data.encode import Encoded, EncoderSettings, Place, build_encoder
from trimtab_trainer.data.records import Conversation, Document, InvalidRecord, Message
from trimtab_trainer.data.store import PreparedData
from trimtab_trainer.data.tokenizer import find_control_tokens, load_tokenizer, train_tokenizer
from trimtab_trainer.errors import BadConfiguration, BadData
from trimtab_trainer.settings import Loss, SpecialTokens, TokenizerTraining

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = SpecialTokens(end_of_turn="<|im_end|>", additional=["<|im_start|>"])
LLAMA3 = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|start|>' + m.role + '<|stop|>\n\n' + m.content + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
LLAMA3_TOKENS = SpecialTokens(additional=["<|begin|>", "<|start|>", "<|stop|>"])
TEMPLATES = {"plain": (None, SpecialTokens()), "chatml": (CHATML, CHATML_TOKENS), "llama3": (LLAMA3, LLAMA3_TOKENS)}

TALK = Conversation(
    [
        Message("system", "Be kind."),
        Message("user", "Hi  there"),
        Message("assistant", "Hello\nyou"),
        Message("user", "Bye"),
        Message("assistant", " See you. "),
    ]
)
Encode = Callable[..., Encoded | InvalidRecord]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    texts = ["Hello there, be kind. See you. Bye you\n\nHi  there\nassistant user system"] * 3
    for name, (template, special) in TEMPLATES.items():
        training = TokenizerTraining(vocabulary_size=320, special_tokens=special, chat_template=template)
        train_tokenizer(iter(texts), training, root / name)
    return {name: root / name for name in TEMPLATES}


def encode(folder: Path, record: Any, loss: Loss = Loss.ASSISTANT, separator: int | None = None) -> Any:
    longest = 1 << 20 if separator is None else None
    encoder = build_encoder(EncoderSettings("stage chat", folder, loss, separator or 0, longest))
    found = encoder([(Place(0, 0, "x.jsonl", 3), record)])[0][1]
    return found if isinstance(found, InvalidRecord) else found[0]


def learnt(folder: Path, encoded: Encoded) -> list[str]:
    """Text of each run of loss-bearing tokens."""
    tokenizer = load_tokenizer(folder)
    runs = np.flatnonzero(np.diff(np.concatenate([[0], encoded.loss_mask, [0]])))
    return [str(tokenizer.decode(encoded.ids[a:b])) for a, b in runs.reshape(-1, 2)]


@pytest.mark.parametrize(("name", "end"), [("plain", "<|end|>"), ("chatml", "<|im_end|>"), ("llama3", "<|end|>")])
def test_s3_loss_is_on_assistant_turns_and_their_end_only(folders: dict[str, Path], name: str, end: str) -> None:
    folder = folders[name]
    assert learnt(folder, encode(folder, TALK)) == [f"Hello\nyou{end}", f" See you. {end}"]
    assert learnt(folder, encode(folder, TALK, Loss.COMPLETION)) == [f" See you. {end}"]


TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{{ m.get('thought', '') }}"
    "{%- generation -%}{{ m.content }}{%- endgeneration -%}{{ '<|im_end|>\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The tags leave the end of turn out, as some do, and what the answer was thought out from."""


def test_s3_generation_tags_choose_within_the_turns_and_never_lose_the_end(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(folders["chatml"])
    tokenizer.chat_template = TAGGED
    tokenizer.save_pretrained(tmp_path / "tagged")
    tagged = encode(tmp_path / "tagged", TALK)
    plain = encode(folders["chatml"], TALK)
    assert tagged.ids.tolist() == plain.ids.tolist()
    assert tagged.loss_mask.tolist() == plain.loss_mask.tolist()
    assert learnt(tmp_path / "tagged", encode(tmp_path / "tagged", TALK, Loss.COMPLETION)) == [" See you. <|im_end|>"]
    thought = [Message("assistant", "Hello\nyou", extra={"thought": "Be kind. "}), *TALK.messages[3:]]
    marked = [*TALK.messages[:2], thought[0], thought[1], Message("assistant", "See", train=False)]
    assert learnt(tmp_path / "tagged", encode(tmp_path / "tagged", Conversation(marked))) == ["Hello\nyou<|im_end|>"]


def test_s3_tools_and_their_results_bear_no_loss(folders: dict[str, Path]) -> None:
    talk = Conversation([*TALK.messages[:3], Message("tool", "See you"), Message("assistant", "Bye")])
    assert learnt(folders["chatml"], encode(folders["chatml"], talk)) == ["Hello\nyou<|im_end|>", "Bye<|im_end|>"]


def test_s3_all_means_everything_but_what_is_marked(folders: dict[str, Path]) -> None:
    marked = Conversation([*TALK.messages[:3], Message("user", "Bye", train=False), TALK.messages[4]])
    encoded = encode(folders["plain"], marked, Loss.ALL)
    assert learnt(folders["plain"], encoded) == [
        "<|system|>Be kind.<|end|><|user|>Hi  there<|end|><|assistant|>Hello\nyou<|end|>",
        "<|assistant|> See you. <|end|>",
    ]


def test_s3_a_turn_marked_not_to_train_bears_no_loss(folders: dict[str, Path]) -> None:
    marked = Conversation([*TALK.messages[:2], Message("assistant", "No", train=False), *TALK.messages[3:]])
    assert learnt(folders["chatml"], encode(folders["chatml"], marked)) == [" See you. <|im_end|>"]
    nothing = encode(folders["chatml"], Conversation([TALK.messages[1], Message("assistant", "No", train=False)]))
    assert isinstance(nothing, InvalidRecord)
    assert "no turn bears loss" in nothing.cause


def test_s4_the_end_token_bears_loss_even_where_it_is_the_padding(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folders["chatml"])
    tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "same")
    encoded = encode(tmp_path / "same", TALK)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoded.loss_mask[np.flatnonzero(encoded.ids == end)].tolist() == [False, False, True, False, True]
    control = find_control_tokens(load_tokenizer(tmp_path / "same"), "x")
    assert control.end_of_turn == end
    assert len({control.document_separator, control.end_of_turn, control.padding}) == 3


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_s5_the_whole_conversation_is_tokenized_once(folders: dict[str, Path], name: str) -> None:
    tokenizer = load_tokenizer(folders[name])
    encoded = encode(folders[name], TALK)
    messages = [message.for_template() for message in TALK.messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert encoded.ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
    if name == "llama3":
        assert np.count_nonzero(encoded.ids == tokenizer.convert_tokens_to_ids("<|begin|>")) == 1


def test_s5_a_doubled_start_token_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folders["llama3"])
    tokenizer.bos_token = "<|begin|>"
    tokenizer.chat_template = "<|begin|>" + LLAMA3
    tokenizer.save_pretrained(tmp_path / "twice")
    with pytest.raises(BadConfiguration, match="start token twice"):
        encode(tmp_path / "twice", TALK)


def test_s5_a_token_across_the_boundary_is_no_target(folders: dict[str, Path], tmp_path: Path) -> None:
    """After "assistant\\n" an answer that starts with a line break may merge with it; the prompt never ends so."""
    training = TokenizerTraining(vocabulary_size=300, special_tokens=CHATML_TOKENS, chat_template=CHATML)
    train_tokenizer(iter(["a\n\nb\n\nc\n\n"] * 50), training, tmp_path / "merging")
    record = Conversation([Message("user", "q"), Message("assistant", "\n\nyes")])
    encoded = encode(tmp_path / "merging", record)
    tokenizer = load_tokenizer(tmp_path / "merging")
    first = int(np.flatnonzero(encoded.loss_mask)[0])
    messages = [{"role": "user", "content": "q"}]
    prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    assert tokenizer.decode(encoded.ids[:first]) == prompt + "\n"  # the merged token holds a character of each


def test_s6_truncation_that_leaves_no_label_drops_the_record(tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "end"}]}
    data = write_jsonl(tmp_path / "a.jsonl", [*chats(5), long])
    fields = {"onTooLong": "truncate", "maxLength": 32}
    with pytest.raises(BadData, match=r"line 6 of \S+/a\.jsonl: no label is left of it at maxLength = 32; raise"):
        run(tmp_path / "root", sft(data.as_uri(), **fields))
    report = run(tmp_path / "root", sft(data.as_uri(), maxDropped=1, **fields))
    assert (report.stages[0].records, report.stages[0].dropped) == (5, 1)
    prepared = opened(tmp_path / "root", report)
    assert prepared.info.dropped_by_cause == {"no label left after the cut": 1}
    assert all(prepared.row(0, i).loss_mask.any() for i in range(prepared.rows(0)))


def test_s2_packing_keeps_records_whole_and_apart(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", chats(40))
    apart = opened(tmp_path, run(tmp_path, sft(data.as_uri(), packing=False)))
    packed = opened(tmp_path, run(tmp_path, sft(data.as_uri(), packing=True, maxLength=100)))
    assert packed.rows(0) < apart.rows(0) == 40
    assert _segments(packed) == _segments(apart)


def _segments(prepared: PreparedData) -> dict[int, tuple[list[int], list[bool]]]:
    found = {}
    for i in range(prepared.rows(0)):
        row, start = prepared.row(0, i), 0
        for record, length in zip(row.record_ids, row.segment_lengths, strict=True):
            part = slice(start, start + length)
            found[record] = (row.input_ids[part].tolist(), row.loss_mask[part].tolist())
            assert not row.loss_mask[start]
            start += length
    return found


def test_control_tokens_in_a_text_stay_text(folders: dict[str, Path]) -> None:
    forged = encode(folders["plain"], Conversation([Message("user", "x<|end|>"), Message("assistant", "y")]))
    assert isinstance(forged, InvalidRecord)
    assert "'<|end|>'" in forged.cause
    tokenizer = load_tokenizer(folders["plain"])
    separator = tokenizer.convert_tokens_to_ids("<|document|>")
    document = encode(folders["plain"], Document("a <|document|> b"), separator=separator)
    assert np.count_nonzero(document.ids == separator) == 1
    assert document.ids[-1] == separator
    assert document.loss_mask[1:].all()


def test_a_template_that_is_not_prefix_stable_is_refused(tmp_path: Path) -> None:
    last_only = (
        "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    train_tokenizer(
        iter(["some text"]), TokenizerTraining(vocabulary_size=300, chat_template=last_only), tmp_path / "t"
    )
    single = encode(tmp_path / "t", Conversation([Message("user", "a"), Message("assistant", "b")]))
    assert isinstance(single, Encoded)
    with pytest.raises(
        BadConfiguration, match=r"line 3 of x\.jsonl: the chat template of stage chat is not prefix-stable"
    ):
        encode(tmp_path / "t", TALK)


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages[0].content.nothing.at_all }}", "UndefinedError"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no control token after an answer"),
    ],
)
def test_a_template_that_fails_is_named_with_its_error(tmp_path: Path, template: str, cause: str) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", chats(3))
    model = {"config": {"model_type": "llama"}, "tokenizerTrain": {"vocabularySize": 300, "chatTemplate": template}}
    with pytest.raises(BadConfiguration, match=rf"the chat template of stage chat .*{cause}"):
        run(tmp_path / "root", sft(data.as_uri()), model=model)


def test_a_missing_template_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folders["plain"])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(BadConfiguration, match="stage chat has no chat template"):
        encode(tmp_path / "bare", TALK)
