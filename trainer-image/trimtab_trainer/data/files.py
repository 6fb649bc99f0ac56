"""Read JSONL, JSON, CSV, TSV, Parquet and plain text, gzipped or not, as a stream of (line, row).

What is wrong with one line is yielded in its place as an `InvalidRecord`; what is wrong with the file is raised.
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from trimtab_trainer.data.records import InvalidRecord
from trimtab_trainer.errors import BadData, InputMissing

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
LINE_LIMIT = 1 << 28
"""Bytes of one line; more is a file of another kind."""
ARRAY_LIMIT = 1 << 30
"""Bytes of a JSON array, which has to be read whole."""
FLAN_COLUMNS = ("input", "target", "rationale")

Row = dict[str, Any]
Rows = Iterator[tuple[int, Row | InvalidRecord]]


@dataclass(frozen=True)
class DataFile:
    """A local file, and the name by which messages call it."""

    path: Path
    name: str

    @property
    def suffix(self) -> str:
        """The suffix that tells the container, without `.gz`; empty when it is none of `SUFFIXES`."""
        return container_suffix(self.name)

    @property
    def gzipped(self) -> bool:
        """Whether the bytes are compressed."""
        return self.name.lower().endswith(".gz")


def container_suffix(name: str) -> str:
    """`.jsonl` of `x/data.JSONL.gz`; empty for a file that is no data file."""
    stem = name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if stem.endswith(suffix)), "")


def read_rows(file: DataFile, columns: frozenset[str] = frozenset()) -> Rows:
    """Rows of a file with their line numbers, counted from 1 (JSON arrays and Parquet: the record's number).

    `columns`: names that tell the header of a CSV or TSV, besides those of the known formats.

    Raises:
        InputMissing: the file is not there or may not be read.
        BadData: the file as a whole is unusable; the message names it, the cause and the remedy.
    """
    with _stream(file) as stream:
        if file.suffix == ".parquet":
            yield from _parquet(file, stream)
        elif file.suffix == ".txt":
            yield 1, {"text": _text(file, b"".join(line for _, line in _lines(file, stream)))}
        elif file.suffix in (".csv", ".tsv"):
            yield from _separated(file, stream, columns)
        elif file.suffix == ".json":
            yield from _json(file, stream)
        elif file.suffix == ".jsonl":
            yield from _json_lines(_lines(file, stream))
        else:
            raise BadData(f"{file.name}: not a data file; give {', '.join(SUFFIXES)}, each also as .gz")


@contextmanager
def _stream(file: DataFile) -> Iterator[IO[bytes]]:
    try:
        if file.path.stat().st_size == 0:
            raise BadData(f"{file.name} is empty; write at least one record")
        with cast(IO[bytes], gzip.open(file.path)) if file.gzipped else file.path.open("rb") as stream:
            yield stream
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise InputMissing(f"{file.name}: {error.strerror} ({file.path}); check the data's uri") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadData(f"{file.name}: the gzip stream is cut off or damaged ({error}); copy the file again") from error


def _lines(file: DataFile, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := stream.readline(LINE_LIMIT + 1):
        number += 1
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise BadData(f"{file.name} is UTF-16 (byte order mark at its start); save it as UTF-8")
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) > LINE_LIMIT:
            raise BadData(f"line {number} of {file.name} is longer than {LINE_LIMIT >> 20} MiB; split the record")
        yield number, line
    if not number:
        raise BadData(f"{file.name} is empty once decompressed; write at least one record")


def _decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        cause = f"not UTF-8 (byte 0x{line[error.start]:02x} in column {error.start + 1})"
        raise InvalidRecord(cause, "save the file as UTF-8") from error


def _text(file: DataFile, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadData(
            f"line {line} of {file.name}: not UTF-8 (byte 0x{content[error.start]:02x}); save the file as UTF-8"
        ) from error


def _json_lines(lines: Iterator[tuple[int, bytes]]) -> Rows:
    for number, line in lines:
        try:
            text = _decode(line)
            if text.strip():
                yield number, _json_object(text)
        except InvalidRecord as error:
            yield number, error


def _json_object(text: str) -> Row:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidRecord(f"not JSON: {error.msg} in column {error.colno}", "write one JSON object a line") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRecord(f"not JSON: {error}", "write one JSON object a line") from error
    return _require_object(value)


def _require_object(value: Any) -> Row:
    if not isinstance(value, dict):
        raise InvalidRecord(
            f"a JSON {type(value).__name__}, not an object", 'write an object such as {"messages": […]}'
        )
    return value


def _json(file: DataFile, stream: IO[bytes]) -> Rows:
    """A JSON array of objects, or JSON lines under the name `.json`."""
    lines = _lines(file, stream)
    read: list[bytes] = []
    for item in lines:
        read.append(item[1])
        if stripped := item[1].strip():
            break
    else:
        raise BadData(f"{file.name} holds blank lines only; write at least one record")
    if not stripped.startswith(b"["):
        yield from _json_lines(iter([item]))
        yield from _json_lines(lines)
        return
    size = sum(map(len, read))
    for _, line in lines:
        read.append(line)
        if (size := size + len(line)) > ARRAY_LIMIT:
            raise BadData(f"{file.name}: a JSON array of more than {ARRAY_LIMIT >> 30} GiB; write it as JSON lines")
    try:
        values = json.loads(_text(file, b"".join(read)))
    except json.JSONDecodeError as error:
        raise BadData(f"line {error.lineno} of {file.name}: not JSON: {error.msg}; correct it") from error
    except (ValueError, RecursionError) as error:
        raise BadData(f"{file.name}: not JSON: {error}; correct it") from error
    for number, value in enumerate(values, 1):
        try:
            yield number, _require_object(value)
        except InvalidRecord as error:
            yield number, error


def _separated(file: DataFile, stream: IO[bytes], columns: frozenset[str]) -> Rows:
    """CSV and TSV with a header; a TSV of three columns without one is FLAN chain-of-thought, which quotes nothing."""
    lines = ((number, _text_line(file, number, line)) for number, line in _lines(file, stream))
    delimiter = "\t" if file.suffix == ".tsv" else ","
    number, first = next(lines)
    header = [name.strip().lower() for name in next(csv.reader([first], delimiter=delimiter))]
    known = {*_COLUMNS, *map(str.lower, columns)}
    named = not known.isdisjoint(header)
    if delimiter == "\t" and len(header) == len(FLAN_COLUMNS) and not named:
        yield from _flan(number, first)
        for number, line in lines:
            yield from _flan(number, line)
        return
    if not named:
        found = ", ".join(header)[:200]
        raise BadData(f"line 1 of {file.name}: not a header ({found}); name the columns, such as prompt,completion")
    reader = csv.reader((line for _, line in lines), delimiter=delimiter, strict=True)
    before = csv.field_size_limit(LINE_LIMIT)
    try:
        while True:
            start = reader.line_num + 2
            fields = next(reader, None)
            if fields is None:
                return
            if len(fields) == len(header):
                yield start, dict(zip(header, fields, strict=True))
            elif fields:
                cause = f"{len(fields)} fields, expected {len(header)} ({', '.join(header)})"
                yield start, InvalidRecord(cause, "quote fields that hold the delimiter")
    except csv.Error as error:
        raise BadData(f"line {reader.line_num + 1} of {file.name}: {error}; quote the field correctly") from error
    finally:
        csv.field_size_limit(before)


_COLUMNS = frozenset(
    {"text", "prompt", "completion", "instruction", "input", "output", "target", "rationale", "chosen", "rejected"}
)


def _text_line(file: DataFile, number: int, line: bytes) -> str:
    try:
        return _decode(line)
    except InvalidRecord as error:
        raise BadData(f"line {number} of {file.name}: {error.cause}; {error.remedy}") from error


def _flan(number: int, line: str) -> Rows:
    text = line.rstrip("\r\n")
    if not text:
        return
    fields = text.split("\t")
    if len(fields) != len(FLAN_COLUMNS):
        yield number, InvalidRecord(f"{len(fields)} fields, expected 3 (input, target, rationale)", "separate by tabs")
        return
    # FLAN's files write a line break as a backslash and an n.
    yield number, dict(zip(FLAN_COLUMNS, (field.replace("\\n", "\n") for field in fields), strict=True))


def _parquet(file: DataFile, stream: IO[bytes]) -> Rows:
    import pyarrow as pa  # not needed for any other container
    import pyarrow.parquet as pq

    with tempfile.TemporaryFile() as plain:
        if file.gzipped:
            shutil.copyfileobj(stream, plain)
        try:
            number = 0
            for batch in pq.ParquetFile(plain if file.gzipped else stream).iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (pa.ArrowException, OSError) as error:
            raise BadData(f"{file.name}: not a readable Parquet file ({error}); write it again") from error
        if not number:
            raise BadData(f"{file.name} holds no rows; write at least one record")
