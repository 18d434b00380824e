"""The server as clients see it: OpenAI's own, and those who send what they should not."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from moe_tools.checkpoint.loading import load, load_tokenizer
from moe_tools.serving.app import Limits
from tests.served import Running, running
from tests.tiny import passages

PROMPTS = [" ".join(text.split()[: 2 + 3 * index]) for index, text in enumerate(passages(8))]
"""Of different lengths."""


def greedy(folder: Path, prompt: str, new: int) -> str:
    """What the model says by itself."""
    model, tokenizer = load(folder, dtype=torch.float32), load_tokenizer(folder)
    given = tokenizer(prompt, return_tensors="pt")
    host: Any = model
    ids_BT = host.generate(
        given["input_ids"],
        attention_mask=given["attention_mask"],
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    new_tokens = ids_BT[0, given["input_ids"].shape[1] :]
    return str(tokenizer.decode(new_tokens, skip_special_tokens=True))


@pytest.fixture(scope="module")
def expected(folders: Path) -> list[str]:
    return [greedy(folders / "routed", prompt, 12) for prompt in PROMPTS]


def test_eight_at_once_get_what_the_model_says_to_each(
    served: Running, expected: list[str]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda prompt: served.completion(prompt, 12), PROMPTS))
    assert said == expected
    assert len(set(said)) > 4


def test_one_at_a_time_they_get_the_same(folders: Path, expected: list[str]) -> None:
    with running(folders / "routed", batching="off") as server, ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda prompt: server.completion(prompt, 12), PROMPTS))
    assert said == expected


def test_a_dense_model_is_served_too(folders: Path) -> None:
    with running(folders / "dense") as server:
        assert server.completion(PROMPTS[3], 12) == greedy(folders / "dense", PROMPTS[3], 12)
        assert "moe_tools_ffn_neurons" not in server.call("GET", "/metrics")[2]


def test_a_stream_is_the_same_text_in_pieces(served: Running, expected: list[str]) -> None:
    stream = served.openai.completions.create(
        model="tiny", prompt=PROMPTS[2], max_tokens=12, temperature=0, stream=True
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected[2]
    assert len(chunks) > 6
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]


def test_a_chat_goes_through_the_template(served: Running, folders: Path) -> None:
    turns: Any = [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5"}]
    said = served.openai.chat.completions.create(
        model="tiny", messages=turns, max_tokens=6, temperature=0
    )
    assert said.choices[0].message.content == greedy(folders / "routed", "w3 w4 w5 w0", 6)
    assert said.choices[0].finish_reason == "length"
    assert said.usage is not None
    assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (4, 6)


def test_a_streamed_chat_ends_as_openais_does(served: Running) -> None:
    ask = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "w3"}]}],
        "max_tokens": 4,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    status, headers, text = served.call("POST", "/v1/chat/completions", ask)
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    parts = [json.loads(event) for event in events[:-1]]
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert events[-1] == "[DONE]"
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert parts[-2]["choices"][0]["finish_reason"] == "length"
    assert parts[-1]["choices"] == [] and parts[-1]["usage"]["completion_tokens"] == 4
    ask["model"] = "tiny"
    stream = served.openai.chat.completions.create(**ask)  # type: ignore[call-overload]
    deltas = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    told = "".join(part["choices"][0]["delta"].get("content") or "" for part in parts[:-1])
    assert "".join(deltas) == told != ""


def test_a_stop_string_ends_a_text_before_it(served: Running, expected: list[str]) -> None:
    words = expected[4].split()
    done = served.openai.completions.create(
        model="tiny", prompt=PROMPTS[4], max_tokens=12, temperature=0, stop=[" ".join(words[3:5])]
    )
    stop = " ".join(words[3:5])
    assert done.choices[0].text == expected[4][: expected[4].index(stop)]
    assert done.choices[0].finish_reason == "stop"


def test_a_seed_gives_the_same_text_and_another_seed_another(served: Running) -> None:
    with ThreadPoolExecutor(6) as pool:
        ask = dict(temperature=1.5, new=16)
        said = list(
            pool.map(lambda seed: served.completion("w1 w2", seed=seed, **ask), [1, 1, 1, 2, 3, 4])
        )
    assert len({said[0], said[1], said[2]}) == 1
    assert len(set(said)) == 4


def test_greedy_and_sampled_requests_run_beside_each_other(
    served: Running, expected: list[str]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        noise = [pool.submit(served.completion, "w1", 24, temperature=2.0) for _ in range(4)]
        said = list(pool.map(lambda prompt: served.completion(prompt, 12), PROMPTS[:4]))
    assert said == expected[:4]
    assert len({each.result() for each in noise}) == 4


@pytest.mark.parametrize("name", ["tiny", None, "path"])
def test_a_model_is_known_by_its_name_its_path_and_no_name(
    served: Running, folders: Path, name: str | None
) -> None:
    name = str(folders / "routed") if name == "path" else name
    ask = {"prompt": "w1", "max_tokens": 1} | ({} if name is None else {"model": name})
    assert served.call("POST", "/v1/completions", ask)[0] == 200


def test_another_model_is_never_loaded(served: Running, folders: Path) -> None:
    for name in ("gpt2", str(folders / "dense"), ""):
        with pytest.raises(openai.NotFoundError, match="is not served here: 'tiny' is") as caught:
            served.openai.completions.create(model=name, prompt="w1")
        assert caught.value.code == "model_not_found"
    assert [each.id for each in served.openai.models.list()] == ["tiny"]
    assert served.openai.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        served.openai.models.retrieve("org/other")
    for path in ("/load_model", "/reset", "/v1/responses", "/docs"):
        status, _, body = served.call("POST", path, {})
        assert (status, body["error"]["type"]) == (404, "invalid_request_error")
    assert served.call("GET", "/v1/completions")[0] == 405


BAD: list[tuple[str, Any, str]] = [
    ("completions", b'{"prompt": "w1"', "the body is no JSON"),
    ("completions", b"\xff\xfe", "the body is no JSON"),
    ("completions", b"[" * 100_000, "the body is no JSON"),
    ("completions", b"[1]", "the body is list, and must be a JSON object"),
    ("completions", b"", "the body is no JSON"),
    ("completions", {}, "prompt is missing"),
    ("completions", {"prompt": 5}, "prompt is 5"),
    ("completions", {"prompt": ""}, "the prompt has no token"),
    ("completions", {"prompt": []}, "prompt holds 0 texts"),
    ("completions", {"prompt": ["w1", "w2"]}, "prompt is"),
    ("completions", {"prompt": [3, 99999]}, "token 99999 is outside the vocabulary"),
    ("completions", {"prompt": [3, -1]}, "token -1 is outside the vocabulary"),
    ("completions", {"prompt": [3, True]}, "prompt is"),
    ("completions", {"prompt": "w1", "max_tokens": -1}, "max_tokens is -1"),
    ("completions", {"prompt": "w1", "max_tokens": 0}, "max_tokens is 0"),
    ("completions", {"prompt": "w1", "max_tokens": 1.5}, "max_tokens is 1.5"),
    ("completions", {"prompt": "w1", "max_tokens": 10**30}, "max_tokens is 1"),
    ("completions", {"prompt": "w1", "n": 1000}, "n is 1000"),
    ("completions", {"prompt": "w1", "temperature": "x"}, "temperature is 'x'"),
    ("completions", {"prompt": "w1", "temperature": -1}, "temperature is -1"),
    ("completions", b'{"prompt": "w1", "temperature": NaN}', "temperature is nan"),
    ("completions", b'{"prompt": "w1", "temperature": 1e999}', "temperature is inf"),
    ("completions", {"prompt": "w1", "top_p": 0}, "top_p is 0"),
    ("completions", {"prompt": "w1", "seed": 1 << 64}, "seed is"),
    ("completions", {"prompt": "w1", "stop": [""]}, "stop is"),
    ("completions", {"prompt": "w1", "stop": ["w"] * 100}, "stop is"),
    ("completions", {"prompt": "w1", "stream": "yes"}, "stream is 'yes'"),
    ("completions", {"prompt": "w1", "echo": True}, "echo is True"),
    ("completions", {"prompt": "w1", "logit_bias": {"3": 5}}, "logit_bias is"),
    ("completions", {"prompt": "w1", "generation_config": "{}"}, "unknown field"),
    ("completions", {"prompt": "w1", "model": 5}, "model is 5"),
    ("completions", {"prompt": "w1 " * 500}, "a prompt of 500 tokens and 1 new ones exceed"),
    ("completions", {"prompt": "w1", "max_tokens": 500}, "1 tokens and 500 new ones exceed the"),
    ("chat/completions", {}, "messages is missing"),
    ("chat/completions", {"messages": []}, "messages is"),
    ("chat/completions", {"messages": ["w1"]}, "messages is"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "w1"}]}, "template refuses"),
    ("chat/completions", {"messages": [{"role": 1, "content": "w1"}]}, "messages is"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "messages is",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "w1"}], "tools": [{"type": "function"}]},
        "tools is",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": "w1"}], "response_format": {"type": "json"}},
        "response_format is",
    ),
    ("chat/completions", {"messages": [{"role": "user", "content": "w1 " * 500}]}, "exceed the"),
]


@pytest.mark.parametrize(("path", "body", "message"), BAD)
def test_what_is_wrong_is_said_in_openais_shape(
    served: Running, path: str, body: Any, message: str
) -> None:
    status, _, answer = served.call("POST", f"/v1/{path}", body)
    error = answer["error"]
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert message in error["message"]
    assert len(error["message"]) < 400
    assert set(error) == {"message", "type", "param", "code"}


def test_a_body_that_is_too_large_is_told_so(served: Running) -> None:
    large = {"prompt": "w1 " * 3_500_000}
    status, _, answer = served.call("POST", "/v1/completions", large)
    assert status == 413
    assert "4194304 are allowed" in answer["error"]["message"]
    connection = served.connect()  # and one that does not say its size
    pieces = (b"x" * 65536 for _ in range(160))
    connection.request("POST", "/v1/completions", pieces, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_who_lacks_the_key_gets_nothing_but_the_health(folders: Path) -> None:
    with running(folders / "dense", Limits(key="sesame ä")) as server:
        for headers in ({}, {"Authorization": "Bearer sesame"}, {"Authorization": "sesame"}):
            for path in ("/v1/models", "/metrics", "/nothing"):
                status, found, answer = server.call("GET", path, **headers)
                assert (status, found["www-authenticate"]) == (401, "Bearer")
                assert answer["error"]["code"] == "invalid_api_key"
        assert server.call("GET", "/health")[2] == {"status": "ok"}
        with pytest.raises(openai.AuthenticationError):
            server.completion("w1")


def test_who_has_the_key_is_served(folders: Path) -> None:
    with running(folders / "dense", Limits(key="sesame")) as server:
        assert server.client("sesame").models.list().data[0].id == "tiny"


def test_a_key_of_other_letters_and_a_line_end_is_known(folders: Path) -> None:
    with running(folders / "dense", Limits(key="sesame ä\n")) as server:
        said = "Bearer sesame ä".encode().decode("latin-1")
        assert server.call("GET", "/v1/models", Authorization=said)[0] == 200


@pytest.mark.parametrize("batching", ["on", "off"])
def test_a_temperature_near_zero_ends_nobody(folders: Path, batching: str) -> None:
    with running(folders / "routed", batching=batching) as server:
        ask = {"prompt": "w1", "max_tokens": 4}
        for temperature in (1e-38, 1e-320, 1e-5):
            said = server.call("POST", "/v1/completions", ask | {"temperature": temperature})
            assert said[0] == 200
        assert server.call("GET", "/health")[2] == {"status": "ok"}


@pytest.mark.parametrize("batching", ["on", "off"])
def test_who_finds_the_queue_full_comes_again(folders: Path, batching: str) -> None:
    limits = Limits(waiting=1)
    with running(folders / "routed", limits, slots=1, batching=batching) as server:
        ask = {"prompt": "w1", "max_tokens": 120, "temperature": 0}
        with ThreadPoolExecutor(8) as pool:
            done = list(pool.map(lambda _: server.call("POST", "/v1/completions", ask), range(8)))
        statuses = [status for status, _, _ in done]
        assert statuses.count(200) >= 2
        refused = [(headers, body) for status, headers, body in done if status != 200]
        assert refused
        for headers, body in refused:
            assert headers["retry-after"] == "2"
            assert body["error"]["code"] == "rate_limit_exceeded"
        assert statuses.count(429) == len(refused)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("batching", ["auto", "off"])
def test_a_client_that_leaves_ends_its_work(folders: Path, stream: bool, batching: str) -> None:
    with running(folders / "routed", slots=2, batching=batching) as server:
        ask = {"prompt": "w1", "max_tokens": 127, "stream": stream, "temperature": 0}
        connections = [server.connect() for _ in range(3)]  # at least one of them waits
        for connection in connections:
            connection.request("POST", "/v1/completions", json.dumps(ask))
        wait_for(lambda: server.metric("moe_tools_requests_waiting") >= 1)
        for connection in connections:
            connection.sock.close()
            connection.close()
        wait_for(lambda: server.metric("moe_tools_requests_running") == 0)
        wait_for(lambda: server.metric("moe_tools_requests_waiting") == 0)
        assert server.metric(LEFT) >= 1
        assert server.metric('moe_tools_tokens_total{kind="generated"}') < 3 * 127
        assert server.completion("w1 w2", 4)


LEFT = 'moe_tools_requests_total{endpoint="completions",status="499"}'


def wait_for(is_so: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_thirty_two_at_once_and_two_hundred_in_all_lose_nothing(
    served: Running, expected: list[str]
) -> None:
    before = {one for one in threading.enumerate()}
    with ThreadPoolExecutor(32) as pool:
        said = list(pool.map(lambda n: served.completion(PROMPTS[n % 8], 12), range(32)))
    assert said == [expected[n % 8] for n in range(32)]
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda n: served.completion(PROMPTS[n % 8], 3), range(168)))
    assert all(expected[n % 8].startswith(each) for n, each in enumerate(said))
    assert served.metric("moe_tools_requests_running") == 0
    assert served.metric("moe_tools_requests_waiting") == 0
    with suppress(AssertionError):  # threads of tokenizing stay for a while
        wait_for(lambda: set(threading.enumerate()) <= before, 1)
    more = {one.name for one in threading.enumerate() if one not in before}
    assert not {name for name in more if not name.startswith("AnyIO worker thread")}


def test_metrics_count_what_was_done(folders: Path) -> None:
    with running(folders / "routed") as server:
        server.completion("w1 w2 w3", 5)
        page = server.call("GET", "/metrics")
        assert page[1]["content-type"].startswith("text/plain; version=0.0.4")
        assert server.metric('moe_tools_tokens_total{kind="prompt"}') == 3
        assert server.metric('moe_tools_tokens_total{kind="generated"}') == 5
        assert server.metric('moe_tools_requests_total{endpoint="completions",status="200"}') == 1
        assert server.metric("moe_tools_time_to_first_token_seconds_count") == 1
        assert server.metric('moe_tools_request_ffn_sparsity_count{of="request"}') == 1
        assert 0 < server.metric("moe_tools_tokens_per_second") <= 0.5
        assert 0.2 < server.metric("moe_tools_ffn_sparsity") < 0.8


def test_no_client_brings_a_template_of_its_own(folders: Path) -> None:
    with running(folders / "routed") as server:
        ask: dict[str, Any] = {"messages": [{"role": "user", "content": "w1"}], "max_tokens": 1}
        for key in ("chat_template", "tools", "tokenize"):
            body = ask | {"chat_template_kwargs": {key: "{% for i in range(9) %}w5{% endfor %}"}}
            status, _, answer = server.call("POST", "/v1/chat/completions", body)
            assert status == 400
            assert "is not the template's to read" in answer["error"]["message"]


def test_a_list_of_mistakes_is_one_mistake(folders: Path) -> None:
    with running(folders / "dense") as server:
        began = time.monotonic()
        status, _, _ = server.call("POST", "/v1/completions", {"prompt": [True] * 300_000})
        assert status == 400
        assert time.monotonic() - began < 5
