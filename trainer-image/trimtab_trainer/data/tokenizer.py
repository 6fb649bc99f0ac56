"""Tokenizers: train one, load one safely, and name its three control tokens."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab_trainer.data.template import ChatTemplate, control_tokens
from trimtab_trainer.errors import BadConfiguration, BadData, InputMissing
from trimtab_trainer.manifest import file_sha256
from trimtab_trainer.settings import SpecialTokens, TokenizerTraining

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""All that makes a tokenizer, in the Hub's layout."""

_TRAINING_BATCH = 1000
_SEPARATOR_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<|document|>")


@dataclass(frozen=True)
class ControlTokens:
    """Ids of the tokens that are never text. They differ wherever the tokenizer has three such tokens."""

    document_separator: int
    end_of_turn: int
    padding: int


def train_tokenizer(texts: Iterator[str], settings: TokenizerTraining, folder: Path) -> None:
    """Train a byte-level BPE tokenizer and save it in `folder`, ready for `AutoTokenizer.from_pretrained`.

    The same texts in the same order give the same files. The vocabulary can stay smaller than asked for when the texts
    have too few pairs to merge. The document separator is the end of sequence, as fits a base model.

    Raises:
        BadConfiguration: two special tokens are the same.
        BadData: there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast  # loads for seconds; a reused result does not need it

    special = settings.special_tokens
    names = [special.document_separator, special.end_of_turn, special.padding, *special.additional]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadConfiguration(f"specialTokens: {', '.join(twice)} stands for two tokens; give each its own name")
    counter = _Counter(texts)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary_size,
        special_tokens=names,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(counter.batches(), trainer)
    if not counter.characters:
        raise BadData("no text to train the tokenizer on; check the data of the first stage")
    build: Any = PreTrainedTokenizerFast  # its constructor is not typed
    tokenizer = build(
        tokenizer_object=backend,
        eos_token=special.document_separator,
        pad_token=special.padding,
        additional_special_tokens=[special.end_of_turn, *special.additional],
        clean_up_tokenization_spaces=False,
        chat_template=settings.chat_template or plain_chat_template(special),
    )
    tokenizer.save_pretrained(folder)


def plain_chat_template(special: SpecialTokens) -> str:
    """Jinja: each turn is its role's token `<|ROLE|>`, or `ROLE: ` where there is none, the text, the end of turn."""
    roles = ("system", "user", "assistant", "tool")
    markers = {role: f"<|{role}|>" if f"<|{role}|>" in special.additional else f"{role}: " for role in roles}
    table = ", ".join(f"{role!r}: {marker!r}" for role, marker in markers.items())
    return (
        f"{{%- set marker = {{{table}}} -%}}"
        "{%- for message in messages -%}"
        "{%- if message.role not in marker -%}{{- raise_exception('unknown role ' ~ message.role) -}}{%- endif -%}"
        f"{{{{- marker[message.role] ~ message.content ~ {special.end_of_turn!r} -}}}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- marker['assistant'] -}}{%- endif -%}"
    )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from local files, never with code of its own.

    Raises:
        InputMissing: there is no `tokenizer.json`.
        BadConfiguration: the files make no fast tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # see train_tokenizer

    if not (folder / "tokenizer.json").is_file():
        raise InputMissing(f"{folder}: no tokenizer.json; give a folder with a Hugging Face fast tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the files come from outside; any error in them is theirs
        raise BadConfiguration(
            f"{folder}: the tokenizer can't be loaded ({type(error).__name__}: {error}); restore its files"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BadConfiguration(
            f"{folder}: {type(tokenizer).__name__} gives no character offsets; give a tokenizer.json"
        )
    return tokenizer


def find_control_tokens(tokenizer: PreTrainedTokenizerFast, name: str) -> ControlTokens:
    """Choose document separator, end of turn and padding of any tokenizer.

    End of turn: what the chat template writes after an answer. Separator: the end of sequence, or where a chat model
    made that its end of turn, a well-known separator, or the start token. Padding: the tokenizer's own, or another
    control token where that would be one of the first two.
    """
    control = control_tokens(tokenizer)
    if not control:
        raise BadConfiguration(f"{name} has no special tokens; a document separator is needed")
    end_of_turn = ChatTemplate(tokenizer, name).end_of_turn if tokenizer.chat_template else tokenizer.eos_token
    candidates = [tokenizer.eos_token, *(n for n in _SEPARATOR_NAMES if n in control), tokenizer.bos_token]
    present = [token for token in candidates if token]
    separator = next((token for token in present if token != end_of_turn), end_of_turn or control[0])
    end_of_turn = end_of_turn or separator
    fallbacks = [tokenizer.pad_token, tokenizer.unk_token, *control]
    padding = next((token for token in fallbacks if token and token not in (separator, end_of_turn)), separator)
    vocabulary = tokenizer.get_vocab()
    return ControlTokens(vocabulary[separator], vocabulary[end_of_turn], vocabulary[padding])


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, byte for byte, and nothing else."""
    target.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def tokenizer_digest(folder: Path) -> str:
    """`sha256:…` over names and bytes of the tokenizer's files; equal along a chain of stages."""
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in sorted(TOKENIZER_FILES) if (folder / name).is_file()]
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


class _Counter:
    """Groups texts for the trainer, which is several times faster that way, and counts what went by."""

    def __init__(self, texts: Iterator[str]) -> None:
        self.characters = 0
        self._texts = texts

    def batches(self) -> Iterator[list[str]]:
        batch: list[str] = []
        for text in self._texts:
            self.characters += len(text)
            batch.append(text)
            if len(batch) == _TRAINING_BATCH:
                yield batch
                batch = []
        if batch:
            yield batch
