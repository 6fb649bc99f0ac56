"""`python -m trimtab_serving.probe FILE`: ready is what has answered.

The startup probe of a serving pod. It makes a completion of one token inside the pod and looks at the answer:
`/health` says nothing about the weights. Exit code 0: answered; 1: not yet, or wrong; the message says which.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import sys
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from trimtab_serving.config import ServeConfig
from trimtab_serving.launch import listen_address, read_config
from trimtab_trainer.errors import StageError

TIMEOUT_SECONDS = 20
"""Of the whole exchange; the pod's `timeoutSeconds` is longer."""

PROMPT = "1"


def main(argv: list[str]) -> int:
    """Probe the server of the configuration that `argv[0]` names."""
    if len(argv) != 1:
        print("usage: python -m trimtab_serving.probe FILE", file=sys.stderr)
        return 2
    try:
        config = read_config(Path(argv[0]))
        url = completions_url(listen_address(), config.port)
        fault = fault_of(config, ask(config, url))
    except StageError as error:
        fault = error.message
    except (OSError, HTTPException, ValueError) as error:  # URLError, a timeout and a reset are OSErrors
        fault = f"no answer yet: {error}"
    if fault is not None:
        print(fault, file=sys.stderr)
        return 1
    print("answered")
    return 0


def completions_url(address: str, port: int) -> str:
    """Where the pod reaches its own server; the wildcard address is reached on localhost."""
    ip = ipaddress.ip_address(address)
    if ip.is_unspecified:
        ip = ipaddress.ip_address("127.0.0.1" if ip.version == 4 else "::1")
    host = f"[{ip}]" if ip.version == 6 else str(ip)
    return f"http://{host}:{port}/v1/completions"


def ask(config: ServeConfig, url: str) -> Any:
    """The server's answer to a completion of one token, parsed. Raises what urllib and json raise."""
    body = {"model": config.served_model_name, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 1}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310 - always http
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=TIMEOUT_SECONDS) as answer:
        return json.load(answer)


def fault_of(config: ServeConfig, answer: Any) -> str | None:
    """What is wrong with the answer: another model, no token, or a log-probability that is not a number."""
    try:
        model = answer["model"]
        tokens = answer["usage"]["completion_tokens"]
        log_probability = answer["choices"][0]["logprobs"]["token_logprobs"][0]
    except (KeyError, IndexError, TypeError):
        return f"the answer is no completion: {json.dumps(answer)[:300]}"
    if model != config.served_model_name:
        return f"the server answers as {model!r}, expected {config.served_model_name!r}"
    if tokens != 1 or not isinstance(log_probability, float) or not math.isfinite(log_probability):
        return f"{tokens} tokens, log-probability {log_probability}: the weights give no numbers"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
