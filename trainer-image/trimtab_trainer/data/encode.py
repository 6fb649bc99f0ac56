"""From records to token ids and loss masks, with all cores, in the order of the files."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from trimtab_trainer.data.records import (
    NO_LABEL,
    Conversation,
    Document,
    InvalidRecord,
    Label,
    Record,
    conversations_of,
    labels_of,
    texts_of,
)
from trimtab_trainer.data.template import ChatTemplate, Rendered
from trimtab_trainer.data.tokenizer import load_tokenizer
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.settings import Loss

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

BATCH_RECORDS = 256
BATCH_CHARACTERS = 2 << 20
"""A batch that goes to a worker ends at one of the two; its tokens need many times the memory of its text."""
BYTES_A_WORKER = 8 << 20
"""A worker starts in seconds (it imports transformers), so each must have enough to do."""


class Place(NamedTuple):
    """Where a record stands: numbers of its data set and file, the file's name, and the line."""

    source: int
    file: int
    name: str
    line: int

    def __str__(self) -> str:
        return f"line {self.line} of {self.name}"


Item = tuple[Place, Record | InvalidRecord]


@dataclass(frozen=True)
class Encoded:
    """A text as token ids, int32 [T], with the mask of the tokens that bear loss, bool [T]."""

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    label: Label = NO_LABEL


Result = tuple[Place, tuple[Encoded, ...] | InvalidRecord]
"""A record has one text; a ranking has one for each answer, the best first; a task's record one a wording."""


class Encoder(Protocol):
    """Turns a batch of records into tokens, in order; what is wrong with a record stands in its place.

    Running text that is cut into pieces gives one result for each of them.
    """

    def __call__(self, items: Sequence[Item]) -> list[Result]:
        """Encode `items`."""


@dataclass(frozen=True)
class EncoderSettings:
    """What a worker needs to build its encoder."""

    name: str
    """Whose tokenizer it is, for messages."""
    tokenizer: Path
    loss: Loss
    separator: int
    """Id of the token that ends running text."""
    longest: int | None = None
    """Most tokens of a text, where conversations are learnt from; None: running text only, whole."""
    prompts: bool = False
    """Conversations are cut before their last answer, for the model to give one."""


def build_encoder(settings: EncoderSettings) -> Encoder:
    """Load the tokenizer; raises what `load_tokenizer` and `ChatTemplate` raise."""
    from tokenizers import Tokenizer  # see train_tokenizer

    tokenizer = load_tokenizer(settings.tokenizer)

    def backend() -> Tokenizer:
        made = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        # Without a post-processor offsets are exact (some trim the space in front of a word), and nothing is added.
        made.post_processor = None
        made.no_truncation()
        made.no_padding()
        return made

    added = tokenizer("").input_ids
    start = [tokenizer.bos_token_id] if added[:1] == [tokenizer.bos_token_id] else []
    documents = _DocumentEncoder(backend(), start, settings.separator, settings.longest)
    if settings.longest is None:
        return documents
    template = ChatTemplate(tokenizer, settings.name)
    render = template.render_prompt if settings.prompts else partial(template.render, loss=settings.loss)
    chats = _ChatEncoder(backend(), template.name, render, tokenizer.bos_token_id, settings.longest)
    return _EitherEncoder(documents, chats)


class _EitherEncoder:
    """Running text to one encoder, all else to another one; runs of the same kind go together."""

    def __init__(self, documents: Encoder, chats: Encoder) -> None:
        self._documents, self._chats = documents, chats

    def __call__(self, items: Sequence[Item]) -> list[Result]:
        results: list[Result] = []
        for is_text, run in groupby(items, lambda item: isinstance(item[1], Document)):
            results += (self._documents if is_text else self._chats)(list(run))
        return results


class _DocumentEncoder:
    """Start token (where the tokenizer adds one), text, separator. Names of control tokens in the text stay text."""

    def __init__(self, backend: Tokenizer, start: list[int], separator: int, longest: int | None) -> None:
        self._backend, self._start, self._separator, self._longest = backend, start, separator, longest
        backend.encode_special_tokens = True

    def __call__(self, items: Sequence[Item]) -> list[Result]:
        texts = [item.text for _, item in items if isinstance(item, Document)]
        encodings = iter(self._backend.encode_batch_fast(texts, add_special_tokens=False))
        results: list[Result] = []
        for place, item in items:
            pieces = [item] if isinstance(item, InvalidRecord) else self._pieces(next(encodings))
            results += ((place, piece) for piece in pieces)
        return results

    def _pieces(self, encoding: Encoding) -> Iterator[tuple[Encoded, ...]]:
        ids = np.array([*self._start, *encoding.ids, self._separator], dtype=np.int32)
        size = self._longest or len(ids)
        for first in range(0, len(ids), size):
            piece = ids[first : first + size]
            if first == 0 or len(piece) > 1:  # a last token alone would be no target: nothing stands before it
                yield (Encoded(piece, np.ones(len(piece), dtype=np.bool_)),)


class _ChatEncoder:
    """Each conversation of a record is rendered whole and tokenized once; the mask follows from character offsets."""

    def __init__(
        self,
        backend: Tokenizer,
        name: str,
        render: Callable[[Conversation], Rendered],
        start: int | None,
        longest: int,
    ) -> None:
        self._backend, self._name, self._render_one, self._start = backend, name, render, start
        self._longest = longest

    def __call__(self, items: Sequence[Item]) -> list[Result]:
        rendered = [(place, self._render(place, item)) for place, item in items]
        texts = [text.text for _, item in rendered if not isinstance(item, InvalidRecord) for _, text, _ in item]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        return [
            (
                place,
                item if isinstance(item, InvalidRecord) else tuple(self._fit(*each, next(encodings)) for each in item),
            )
            for place, item in rendered
        ]

    def _fit(self, conversation: Conversation, rendered: Rendered, label: Label, encoding: Encoding) -> Encoded:
        """Tokens and mask, with as many of the few-shot examples as `longest` has room for."""
        while len(encoding.ids) > self._longest and conversation.examples:
            conversation = conversation.with_fewer_examples()
            rendered = self._render_one(conversation)
            encoding = self._backend.encode(rendered.text, add_special_tokens=False)
        return self._finish(rendered, label, encoding)

    def _render(
        self, place: Place, item: Record | InvalidRecord
    ) -> list[tuple[Conversation, Rendered, Label]] | InvalidRecord:
        if isinstance(item, InvalidRecord):
            return item
        try:
            conversations = conversations_of(item)
            rendered = [self._render_one(each) for each in conversations]
            return list(zip(conversations, rendered, labels_of(item), strict=True))
        except InvalidRecord as error:
            return error
        except BadConfiguration as error:
            raise BadConfiguration(f"{place}: {error.message}") from error

    def _finish(self, rendered: Rendered, label: Label, encoding: Encoding) -> Encoded:
        ids = np.array(encoding.ids, dtype=np.int32)
        if self._start is not None and ids[:2].tolist() == [self._start, self._start]:
            raise BadConfiguration(f"the chat template of {self._name} writes the start token twice; write it once")
        first, last = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        starts, ends = np.array(rendered.spans, dtype=np.int64).T
        # A token that begins before a span is one that the generation prompt would not have ended with: no target.
        span = np.searchsorted(starts, first, side="right") - 1
        return Encoded(ids, (span >= 0) & (last <= ends[span]) & (last > first), label)


def encode_all(settings: EncoderSettings, items: Iterator[Item], size: int) -> Iterator[Result]:
    """Encode records, in order, with constant memory.

    Args:
        settings: for each worker's encoder.
        items: records with their places.
        size: bytes of all files, from which the number of workers follows; little data starts none.
    """
    batches = _batches(items)
    workers = min(available_cores(), size // BYTES_A_WORKER)
    if workers <= 1:
        encoder = build_encoder(settings)
        for batch in batches:
            yield from encoder(batch)
        return
    # Not fork: this process may hold threads of tokenizers or Arrow. Workers fork from a server that has imported all.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers.models.auto.tokenization_auto"])
    with ProcessPoolExecutor(workers, context, _start_worker, (settings,)) as pool:
        yield from _in_order(pool, batches, 3 * workers)


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += _characters(item[1])
        if len(batch) == BATCH_RECORDS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(record: Record | InvalidRecord) -> int:
    return 0 if isinstance(record, InvalidRecord) else sum(map(len, texts_of(record)))


def _in_order(pool: ProcessPoolExecutor, batches: Iterator[list[Item]], window: int) -> Iterator[Result]:
    """Results in the order of the batches, at most `window` batches ahead."""
    pending: deque[Future[list[Result]]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_work, batch))
            if len(pending) >= window:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


_encoder: Encoder | None = None


def _start_worker(settings: EncoderSettings) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # One worker a core; threads of their own would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global _encoder
    _encoder = build_encoder(settings)


def _end_with_parent() -> None:
    """Also when it is killed and can't say so; the kernel would only tell of the server's end."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("no worker")
    parent.join()
    os._exit(1)


def _work(batch: list[Item]) -> list[Result]:
    if _encoder is None:
        raise RuntimeError("a worker without its encoder")
    return _encoder(batch)


def available_cores() -> int:
    """Cores that this process may use: its affinity, and the CPU limit of its container (cgroup v2)."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
