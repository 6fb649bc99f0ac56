"""Make the quickstart's data from what every Python installation carries.

Running text for `pretrain`: the topics of `pydoc_data` and the docstrings of the standard library, each docstring under
its qualified name and signature. Question and answer pairs for `sft`: what a function or class does, answered by the
first paragraph of its docstring. A tenth of the answers is held out: no training file contains them, compared by
normalised text.

    python examples/quickstart/make_data.py FOLDER
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_SHARE = 10
"""One answer in so many is held out."""
LONGEST_ANSWER = 240
"""Characters; a longer first paragraph makes no answer."""
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "turtledemo"}
QUESTIONS = ("What does {} do?", "What is {} for?", "Explain {}.")


@dataclass(frozen=True)
class Entry:
    """A documented function, class or module: dotted name, signature with parentheses, cleaned docstring."""

    name: str
    signature: str
    docstring: str

    @property
    def answer(self) -> str:
        """First paragraph on one line."""
        return " ".join(self.docstring.split("\n\n")[0].split())

    @property
    def question(self) -> str:
        """One of three wordings, chosen by the name."""
        return QUESTIONS[number_of(self.name) % len(QUESTIONS)].format(self.name + self.signature)

    @property
    def document(self) -> str:
        """The entry as running text."""
        return f"{self.name}{self.signature}\n\n{self.docstring}"


def number_of(text: str) -> int:
    """A number that depends on the text only, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def normalised(text: str) -> str:
    """Lower-case words and numbers, single spaces: what two texts are compared by."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def entries() -> Iterator[Entry]:
    """Every documented definition of the standard library, in the order of file and line."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED.intersection(parts) or any(part.startswith(("_", "test_")) for part in parts if part != "__init__"):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        yield from definitions(tree, ".".join(part for part in parts if part != "__init__"))


def definitions(node: ast.AST, prefix: str) -> Iterator[Entry]:
    """The node's own docstring, then those of the public definitions inside it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = inspect.cleandoc(ast.get_docstring(node) or "")
        signature = ""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            signature = f"({', '.join(a.arg for a in node.args.args if a.arg not in ('self', 'cls'))})"
        if docstring.isascii() and len(docstring) >= 20:
            yield Entry(prefix, signature, docstring)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield from definitions(child, f"{prefix}.{child.name}")


def is_answer(entry: Entry) -> bool:
    """Whether the first paragraph reads as an answer: a sentence of prose, neither code nor a signature."""
    answer = entry.answer
    return (
        20 <= len(answer) <= LONGEST_ANSWER
        and answer.endswith(".")
        and answer[0].isupper()
        and not re.search(r">>>|->|[{}<>=|\\]|\*\*", answer)
    )


class LeakFinder:
    """Finds held-out answers in running text; looks closer only where an answer's first three words occur."""

    def __init__(self, answers: set[str]) -> None:
        self._by_start: dict[tuple[str, ...], list[str]] = {}
        for answer in answers:
            self._by_start.setdefault(tuple(answer.split()[:3]), []).append(answer)

    def in_text(self, text: str) -> bool:
        """Whether the normalised text holds one of the answers."""
        words = normalised(text).split()
        padded = f" {' '.join(words)} "
        starts = {tuple(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words))}
        return any(f" {answer} " in padded for start in starts for answer in self._by_start.get(start, ()))


def write_jsonl(path: Path, records: list[dict[str, object]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def conversation(entry: Entry) -> dict[str, object]:
    """One record of `sft` in OpenAI's chat format."""
    return {
        "messages": [
            {"role": "user", "content": entry.question},
            {"role": "assistant", "content": entry.answer},
        ]
    }


def make(folder: Path) -> dict[str, int]:
    """Write the files into `folder`; returns the number of records in each."""
    folder.mkdir(parents=True, exist_ok=True)
    by_document: dict[str, Entry] = {}
    for entry in entries():
        by_document.setdefault(normalised(entry.docstring), entry)
    distinct = list(by_document.values())

    by_answer: dict[str, Entry] = {}
    for entry in filter(is_answer, distinct):
        by_answer.setdefault(normalised(entry.answer), entry)
    held_out = {text for text in by_answer if number_of(text) % HELD_OUT_SHARE == 0}
    train = [entry for text, entry in by_answer.items() if text not in held_out]
    test = [entry for text, entry in by_answer.items() if text in held_out]

    texts = [entry.document for entry in distinct] + [topics[name] for name in sorted(topics)]
    leaks = LeakFinder(held_out)
    clean = [text for text in texts if not leaks.in_text(text)]
    validation = [text for text in clean if number_of(text) % 50 == 0]
    running = [text for text in clean if number_of(text) % 50 != 0]

    files: dict[str, list[dict[str, object]]] = {
        "pretrain.jsonl": [{"text": text} for text in running],
        "pretrain-heldout.jsonl": [{"text": text} for text in validation],
        "sft.jsonl": [conversation(entry) for entry in train],
        "sft-heldout.jsonl": [conversation(entry) for entry in test],
    }
    for name, records in files.items():
        write_jsonl(folder / name, records)
    return {name: len(records) for name, records in files.items()}


def main() -> None:
    """Command line: one argument, the folder."""
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: {sys.argv[0]} FOLDER")
    for name, count in make(Path(sys.argv[1])).items():
        print(f"{name}: {count} records")


if __name__ == "__main__":
    main()
