"""The serving contract is closed, bounded and free of vLLM."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError
from tests.serving.configs import DIGEST, config_document

from trimtab_serving.config import ServeConfig


def test_round_trip_keeps_every_field() -> None:
    document = config_document(
        engine={"dtype": "bfloat16", "maxModelLen": 128, "args": {"maxNumSeqs": 4, "enablePrefixCaching": False}},
        cacheBytes=2**20,
        shutdownSeconds=5,
    )
    config = ServeConfig.model_validate(document)
    assert config.engine.args.max_num_seqs == 4
    assert config.engine.args.enable_prefix_caching is False
    written = config.model_dump_json(by_alias=True, exclude_none=True)
    assert ServeConfig.model_validate_json(written) == config


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        (("engine", "args", "trustRemoteCode"), {"engine": {"args": {"trustRemoteCode": True}}}),
        (("engine", "args", "maxNumSeqs"), {"engine": {"args": {"maxNumSeqs": 0}}}),
        (("engine", "args", "gpuMemoryUtilization"), {"engine": {"args": {"gpuMemoryUtilization": 1.5}}}),
        (("engine", "dtype"), {"engine": {"dtype": "float8"}}),
        (("servedModelName",), {"servedModelName": "--trust-remote-code"}),
        (("servedModelName",), {"servedModelName": "two words"}),
        (("model", "digest"), {"model": {"uri": "pvc://models/m", "digest": DIGEST[:-1]}}),
        (("port",), {"port": 0}),
        (("contractVersion",), {"contractVersion": 2}),
        (("unknown",), {"unknown": 1}),
    ],
)
def test_a_wrong_field_is_refused_by_name(place: tuple[str, ...], changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        ServeConfig.model_validate(config_document(**changes))
    assert [error["loc"] for error in caught.value.errors()] == [place]


def test_the_contract_loads_neither_torch_nor_vllm() -> None:
    code = "import sys, trimtab_serving.config; print(sorted({'torch', 'vllm', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
