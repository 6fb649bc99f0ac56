"""A sealed model, served by a real vLLM and asked with OpenAI's client. One server for the whole module."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from tests.serving.artifact import END_OF_TURN, SEPARATOR
from tests.serving.server import MODEL, Server, running
from transformers import AutoTokenizer, LlamaForCausalLM

ON = {"ignore_eos": True}
"""Go on past the end of turn: random weights end where they like."""
QUESTION = [{"role": "user", "content": "What does str.title do?"}]
ANSWER = {"role": "assistant", "content": "It returns a titled copy."}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("serving")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def tokenizer(server: Server) -> Any:
    return AutoTokenizer.from_pretrained(server.model)


def reference(server: Server, ids: list[int]) -> list[float]:
    """Log-probability of each token but the first, by transformers."""
    model = LlamaForCausalLM.from_pretrained(server.model, dtype=torch.float32)
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [scores[i, token].item() for i, token in enumerate(ids[1:])]


def test_the_model_is_named(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_chat_and_completion_answer_with_the_artifact_s_digest(client: OpenAI, server: Server) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=5, temperature=0, extra_body=ON)
    text = client.completions.create(model=MODEL, prompt="def", max_tokens=5, temperature=0, extra_body=ON)
    for answer in (chat, text):
        assert answer.model == MODEL
        assert answer.usage.completion_tokens == 5
        assert answer.choices[0].finish_reason == "length"
        assert answer.system_fingerprint == server.digest


def test_the_chat_template_of_the_artifact_is_used(client: OpenAI, tokenizer: Any) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=5, temperature=0, extra_body=ON)
    rendered = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    text = client.completions.create(model=MODEL, prompt=rendered, max_tokens=5, temperature=0, extra_body=ON)
    assert chat.usage.prompt_tokens == text.usage.prompt_tokens == len(tokenizer(rendered).input_ids)
    assert chat.choices[0].message.content == text.choices[0].text


def test_streams_end_with_done(server: Server) -> None:
    asked = {
        "/v1/chat/completions": {"messages": QUESTION},
        "/v1/completions": {"prompt": "def"},
    }
    for path, prompt in asked.items():
        body = {"model": MODEL, "max_tokens": 5, "stream": True, **ON, **prompt}
        with httpx.stream("POST", server.url + path, json=body, timeout=60) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        last = json.loads(lines[-2].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"


def test_the_end_of_turn_of_the_generation_config_ends_an_answer(client: OpenAI, tokenizer: Any) -> None:
    """`stop_reason` tells which token it was: the end of turn by its number, the tokenizer's own end by null."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    expected = {END_OF_TURN: ("stop", end, 1), SEPARATOR: ("stop", None, 1), "a": ("length", None, 3)}
    for token, outcome in expected.items():
        likely = {str(tokenizer.convert_tokens_to_ids(token)): 100}
        answer = client.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=3, temperature=0, logit_bias=likely
        )
        choice = answer.choices[0]
        assert (choice.finish_reason, choice.stop_reason, answer.usage.completion_tokens) == outcome, token


def test_log_probabilities_of_a_given_text(client: OpenAI, server: Server, tokenizer: Any) -> None:
    """`echo` with `logprobs` and no new token: OpenAI's own words for it, the prompt as text or as tokens."""
    text = tokenizer.apply_chat_template([*QUESTION, ANSWER], tokenize=False)
    ids = tokenizer(text).input_ids
    for prompt in (text, ids):
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=0, echo=True, logprobs=0)
        logprobs = answer.choices[0].logprobs
        assert logprobs.token_logprobs[0] is None
        assert logprobs.token_logprobs[1:] == pytest.approx(reference(server, ids), abs=1e-4)
        spans = zip(logprobs.text_offset, logprobs.tokens, strict=True)
        assert all(text[offset:].startswith(token) for offset, token in spans)
        assert answer.choices[0].text == text


def test_log_probabilities_of_an_answer_in_a_chat(client: OpenAI, server: Server, tokenizer: Any) -> None:
    """The server renders its own template; the answer starts where the prompt of the question alone ends."""
    question = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=1)
    scored = client.chat.completions.create(
        model=MODEL,
        messages=[*QUESTION, ANSWER],
        max_tokens=1,
        extra_body={"prompt_logprobs": 0, "add_generation_prompt": False},
    )
    start = question.usage.prompt_tokens
    text = tokenizer.apply_chat_template([*QUESTION, ANSWER], tokenize=False)
    ids = tokenizer(text).input_ids
    entries = scored.prompt_logprobs[start:]
    assert [int(token) for entry in entries for token in entry] == ids[start:]
    found = [entry[str(token)]["logprob"] for entry, token in zip(entries, ids[start:], strict=True)]
    assert found == pytest.approx(reference(server, ids)[start - 1 :], abs=1e-4)
    assert tokenizer.decode(ids[start:]) == ANSWER["content"] + END_OF_TURN


@pytest.mark.parametrize(
    "path",
    [
        "/invocations",
        "/docs",
        "/openapi.json",
        "/tokenize",
        "/detokenize",
        "/server_info",
        "/load",
        "/version",
        "/ping",
        "/collective_rpc",
        "/sleep",
        "/v1/load_lora_adapter",
        "/v1/chat/completions/batch",
        "/v1/completions/render",
        "/generative_scoring",
        "/scale_elastic_ep",
        "/v1/responses",
        "/v1/messages",
        "/%69nvocations",
        "/v1/models/",
        "/v1/../invocations",
    ],
)
def test_everything_else_is_closed(server: Server, path: str) -> None:
    for method in ("GET", "POST"):
        answer = httpx.request(
            method, server.url + path, json={"model": MODEL, "prompt": "a"} if method == "POST" else None
        )
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "NotFoundError"


def test_a_wrong_request_is_the_client_s_error(server: Server) -> None:
    wrong: list[tuple[int, dict[str, Any]]] = [
        (404, {"model": "another", "prompt": "a"}),
        (400, {"model": MODEL, "prompt": "a " * 2000}),
        (400, {"model": MODEL, "prompt": "a", "prompt_logprobs": 1000}),
    ]
    for status, body in wrong:
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


def test_health_and_metrics(server: Server) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    ended = {
        sample.labels["finished_reason"]: sample.value
        for sample in samples
        if sample.name == "vllm:request_success_total" and sample.labels["model_name"] == MODEL
    }
    assert ended["length"] >= 1
    assert ended["abort"] == 0


def test_a_server_that_is_told_to_stop_ends_its_answers(server: Server) -> None:
    """The last test: the server is gone afterwards."""
    started = threading.Barrier(5, timeout=60)
    ends: list[tuple[str, int, str]] = []

    def ask() -> None:
        body = {"model": MODEL, "prompt": "def", "max_tokens": 400, "stream": True, **ON}
        counted = {"stream_options": {"include_usage": True}}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body | counted, timeout=90) as answer:
            lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
            next(lines)
            started.wait()
            *_, finish, usage, end = lines
        tokens = json.loads(usage)["usage"]["completion_tokens"]
        ends.append((json.loads(finish)["choices"][0]["finish_reason"], tokens, end))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    started.wait()
    assert ends == []
    assert server.terminate() == 0
    for thread in threads:
        thread.join(timeout=60)
    assert ends == [("length", 400, "[DONE]")] * 4
