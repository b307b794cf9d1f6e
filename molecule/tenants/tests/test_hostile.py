"""What somebody hostile may try through nginx: other paths, other names, and bodies that LiteLLM might obey."""

from __future__ import annotations

import json
import secrets
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import pytest
import support
from service import ENGINE, GATEWAY, METRICS, counted, key, listening, settled, sql
from testinfra.host import Host

TRAP = "127.0.0.1:4999"  # where nobody may ever be led
MESSAGES = [{"role": "user", "content": "Say something."}]
REFUSED = (400, 401, 403, 404, 405, 413, 414, 422)


def send(request: bytes, name: str | None = support.NAME) -> tuple[int, str]:
    """Status and body of the answer to exactly these bytes over TLS; 0 where there is none."""
    context = ssl.create_default_context(cafile=str(support.INVENTORY / ".secrets" / "ca.crt"))
    context.check_hostname = name == support.NAME
    try:
        with (
            socket.create_connection((GATEWAY, 443), timeout=60) as plain,
            context.wrap_socket(plain, server_hostname=name) as connection,
        ):
            connection.sendall(request)
            with connection.makefile("rb") as reply:
                answer = reply.read().decode(errors="replace")
    except (ssl.SSLError, ConnectionError):
        return 0, ""
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]) if head else 0, body


def head(method: str, path: str, key: str | None, **headers: str) -> bytes:
    lines = {"Host": support.NAME, "Connection": "close", **headers}
    if key:
        lines["Authorization"] = f"Bearer {key}"
    said = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{said}\r\n".encode()


def post(body: dict[str, Any] | bytes, key: str, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content_Type": "application/json", **headers, "Content_Length": str(len(data))}
    return send(head("POST", path, key, **headers) + data)


def plain(name: str = "ci", team: str = "research") -> int:
    """The status of a request as it should be."""
    return post({"model": "tiny", "messages": MESSAGES, "max_tokens": 4}, key(team, name))[0]


def processes(gateway: Host) -> str:
    """All of LiteLLM's, which change when one has died."""
    return gateway.check_output("pgrep --uid litellm --full uvicorn --list-name | sort")


# --- paths ----------------------------------------------------------------------------------------------------

ADMIN = [
    *("/key/generate", "/key/list", "/key/info", "/key/delete", "/team/new", "/team/list", "/user/new", "/user/list"),
    *("/spend/logs", "/global/spend/report", "/model/new", "/model/info", "/v1/model/info", "/config/yaml"),
    *("/get/config/callbacks", "/config/update", "/credentials", "/health", "/health/liveliness", "/metrics"),
    *(
        "/ui",
        "/ui/",
        "/sso/key/generate",
        "/login",
        "/mcp",
        "/mcp/",
        "/mcp-rest/tools/list",
        "/mcp-rest/test/connection",
    ),
    *("/", "/routes", "/openapi.json", "/docs", "/redoc", "/test", "/active/callbacks", "/debug/asyncio-tasks"),
    *("/cache/ping", "/queue/chat/completions", "/utils/token_counter", "/audit", "/organization/list"),
    *("/v1/files", "/v1/batches", "/v1/assistants", "/v1/mcp/server", "/v1/agents", "/v1/messages", "/v1/rerank"),
    *("/openai/v1/chat/completions", "/vllm/v1/models", "/anthropic/v1/messages", "/chat/completions", "/models"),
]
DISGUISED = [
    *("//key/generate", "/v1/../key/generate", "/v1/%2e%2e/key/generate", "/v1/..%2fkey/generate"),
    *("/v1/models/../../key/list", "/v1/models%2f..%2f..%2fkey/list", "/v1/models/..;/key/list", "/key%2fgenerate"),
    *("/%6bey/list", "/key/list%00", "/key/list%20", "/key/list/", "/./key/list", "/v1//../key/list", "/KEY/LIST"),
    *("/v1/models/%2e%2e/%2e%2e/key/list", "/v1/models%00/key/list", "/v1\\..\\key\\list"),
    *("/.llmfleet/1/key/list", "/.llmfleet/1/v1/models", "/.llmfleet/1//key/list"),
    *(
        f"https://{support.NAME}/key/list",
        "/v1/chat/completions/../../key/list",
        "/v1/models/tiny",
        "/%c0%ae%c0%ae/key",
    ),
]


def logged(gateway: Host, mark: str) -> list[dict[str, str]]:
    lines = gateway.run("grep -F %s /var/log/nginx/llmfleet.access.log", mark).stdout.splitlines()
    return [json.loads(line) for line in lines]


def entries(gateway: Host) -> list[str]:
    """How many teams, keys, users and models LiteLLM has."""
    return [
        sql(gateway, f'SELECT count(*) FROM "LiteLLM_{table}"')  # noqa: S608
        for table in ("TeamTable", "VerificationToken", "UserTable", "ProxyModelTable")
    ]


@pytest.mark.parametrize("who", ["nobody", "tenant", "administrator"])
def test_administration_is_closed(gateway: Host, who: str) -> None:
    """nginx itself answers: the way to LiteLLM is in its log, and it says that none was taken."""
    given = {"nobody": None, "tenant": key(), "administrator": support.secret("litellm_master_key")}[who]
    expected = {404, 400} if who == "tenant" else {401, 400, 429}
    mark, before = f"closed-{secrets.token_hex(4)}", entries(gateway)
    found: dict[str, int] = {}
    for path in [*ADMIN, *DISGUISED]:
        for method in ("GET", "POST"):
            body = "" if method == "GET" else '{"key_alias": "mine", "team_id": "mine"}'
            headers = {"Content_Type": "application/json", "Content_Length": str(len(body)), "X_Request_Id": mark}
            status, _ = send(head(method, path, given, **headers) + body.encode())
            found[f"{method} {path}"] = status
    wrong = {what: status for what, status in found.items() if status not in expected}
    assert not wrong
    assert [line["path"] for line in logged(gateway, mark) if line["upstream"]] == []
    assert entries(gateway) == before


def test_upgrade_and_tunnel_lead_nowhere(gateway: Host) -> None:
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade, close", "Sec_WebSocket_Version": "13"}
    assert send(head("GET", "/v1/realtime", key(), **upgrade, Sec_WebSocket_Key="x" * 22 + "=="))[0] == 404
    assert send(f"CONNECT {TRAP} HTTP/1.1\r\nHost: {TRAP}\r\n\r\n".encode())[0] in (0, 400, 405)
    for method in ("TRACE", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert send(head(method, "/v1/models", key()))[0] == 405


def test_other_names_lead_nowhere() -> None:
    """CVE-2026-49468 was a Host header that made LiteLLM ask for no key."""
    for host in ("localhost", "127.0.0.1:4000", "evil.example", "", f"{support.NAME}@localhost", "llm.example.test/ui"):
        assert send(head("GET", "/v1/models", None, Host=host))[0] in (0, 400, 401, 429)
        assert send(head("GET", "/key/list", support.secret("litellm_master_key"), Host=host))[0] in (0, 400, 401, 429)
    assert send(head("GET", "/v1/models", key()), "evil.example")[0] == 0
    assert send(head("GET", f"http://{TRAP}/key/list", key()))[0] in (0, 400)
    forwarded = {"X_Forwarded_Host": "localhost", "X_Forwarded_Prefix": "/key", "X_Original_URL": "/key/list"}
    status, body = send(head("GET", "/v1/models", key(), **forwarded, X_Rewrite_URL="/key/list"))
    assert (status, [model["id"] for model in json.loads(body)["data"]]) == (200, ["tiny"])


def test_two_requests_in_one_are_two(gateway: Host) -> None:
    """A length that nginx and LiteLLM read differently would bring a second request past nginx."""
    inner = "GET /key/list HTTP/1.1\r\nHost: localhost\r\n\r\n"
    length, chunked = f"Content-Length: {len(inner)}\r\n", "Transfer-Encoding: chunked\r\n"
    begin = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {support.NAME}\r\nAuthorization: Bearer {key()}\r\n"
    for lengths in (
        length + chunked,
        chunked + length,
        "Content-Length: 0\r\n" + length,
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding : chunked\r\n" + length,
        "Transfer-Encoding: chunked, identity\r\n",
    ):
        status, body = send(f"{begin}{lengths}Connection: close\r\n\r\n0\r\n\r\n{inner}".encode())
        assert status in REFUSED or status == 501
        assert "total_count" not in body


# --- bodies ---------------------------------------------------------------------------------------------------


@pytest.fixture
def trap(gateway: Host) -> Iterator[None]:
    """Something on the gateway that nobody may be led to."""
    with listening(gateway, int(TRAP.rpartition(":")[2])) as asked:
        yield
        assert asked() == ""
        support.fetch(gateway, f"http://{TRAP}/seen")
        support.wait_until(lambda: "GET /seen" in asked(), 30)


URL = f"http://{TRAP}/v1"
ELSEWHERE = {"api_base": URL, "base_url": URL, "api_key": "sk-x", "model": "openai/x"}
# What LiteLLM knows for those who call it from Python, for administrators, or for other providers; values for each.
VALUES: dict[str, list[Any]] = {
    **{name: [URL] for name in ("api_base", "base_url", "deployment_url", "s3_endpoint_url", "langfuse_host", "proxy")},
    **{name: [ELSEWHERE, {"stream": True, "custom_llm_provider": 7}] for name in ("litellm_params", "extra_body")},
    **{name: [[ELSEWHERE]] for name in ("context_window_fallbacks", "content_policy_fallbacks")},
    "fallbacks": [[ELSEWHERE], ["second"], [{"tiny": ["second"]}], [f"openai/{URL}"], {}, "second", [[[]]]],
    "router_settings_override": [{"fallbacks": [ELSEWHERE], "num_retries": 99}],
    "model_list": [[{"model_name": "tiny", "litellm_params": ELSEWHERE}]],
    "user_config": [{"model_list": [{"model_name": "tiny", "litellm_params": ELSEWHERE}]}],
    "custom_llm_provider": ["openai", "bedrock", "ollama", "", None, 7],
    "api_key": ["sk-anything", "", None, 5],
    "mock_response": ["free", {"content": "free"}],
    "mock_tool_calls": [[{}]],
    **{name: [True] for name in ("mock_timeout", "mock_testing_fallbacks", "mock_testing_rate_limit_error")},
    **{name: [True] for name in ("no-log", "caching", "disable_fallbacks", "specific_deployment", "rust")},
    **{name: [0, -1] for name in ("input_cost_per_token", "output_cost_per_token", "ttl", "stream_timeout")},
    "base_model": ["free"],
    "model_info": [{"input_cost_per_token": 0, "output_cost_per_token": -9}],
    "metadata": [
        ELSEWHERE,
        "{",
        [1],
        {"\x00": "\x00"},
        {"tags": ["x", 5]},
        json.dumps({"tags": ["x"]}),
        {"model_info": {"input_cost_per_token": 0}},
        {"user_api_key_alias": "apps/chat", "user_api_key_team_id": "apps", "user_api_key_spend": -5},
        {"user_api_key": "x", "user_api_key_hash": "x", "spend_logs_metadata": {"x": "y" * 9999}},
    ],
    "litellm_metadata": [ELSEWHERE, json.dumps(ELSEWHERE), {"user_api_key_team_id": "apps"}],
    **{name: [["langfuse"]] for name in ("callbacks", "success_callback", "litellm_disabled_callbacks")},
    **{name: ["x"] for name in ("logger_fn", "litellm_logging_obj", "cache_key", "organization", "prompt_id", "id")},
    **{name: ["../x\x00", 5] for name in ("litellm_call_id", "litellm_trace_id", "litellm_session_id")},
    **{name: [False] for name in ("turn_off_message_logging", "ssl_verify")},
    "cache": [{"no-store": True}, "x"],
    "extra_headers": [{"Host": TRAP, "Authorization": "Bearer x"}],
    "headers": [{"Host": TRAP, "Authorization": "Bearer x"}, "x"],
    "timeout": [1e-9, -1, "x"],
    "num_retries": [10**6, -1],
    "max_retries": [10**6, -1],
    "cooldown_time": [1e9],
    "weights": [{}],
    "guardrails": [["x"]],
    "vector_store_ids": [["x"]],
    "tags": [["x"], "x" * 10**5, [{"a": 1}], [None]],
    "user": ["'; DROP TABLE x; --", "a\x00b", "\ud800", "x" * 10**5, {"a": 1}, -1, "\u202e\U0001f4a9"],
    "tools": [
        [{"type": "mcp", "server_url": URL, "server_label": "x", "require_approval": "never"}],
        [{"type": "function", "function": {"name": "\x00", "parameters": {"$ref": URL}}}],
    ],
    "functions": [[{}]],
    "web_search_options": [{}],
    "response_format": [{"type": "json_schema", "json_schema": {"$ref": URL}}],
    "messages": [
        *([], None, "x", [7], [{"role": "x" * 9999}], [{"role": "user", "content": "\x00\ud800"}]),
        *([{"role": "user", "content": {"a": []}}], [{"role": "user"}]),
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"{URL}/x.png"}}]}],
        [{"role": "user", "content": [{"type": "file", "file": {"file_id": f"{URL}/x.pdf"}}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": URL, "format": "wav"}}]}],
    ],
    "max_tokens": [-1, 0, 10**9, 10**30, 1e308, "many", [4], True, float("nan")],
    "stream": ["yes", 1, [], None],
    "temperature": [-1, 1e308, float("inf"), "hot"],
    "logit_bias": [{"x": 9}],
    "stop": [["x" * 9999] * 99],
    "top_logprobs": [10**9],
    "seed": [2**70],
    "additional_drop_params": [["max_tokens"], ["stream"], ["stream_options"]],
    "service_tier": ["\x00"],
    "model": [
        *("tiny\x00", " tiny", "TINY", "hosted_vllm/tiny", f"tiny@{ENGINE}:8000", "*", "all-team-models"),
        *("no-default-models", "x" * 10**5, f"openai/{URL}", "../second", "'; --", ["second"], {}),
    ],
}
TOGETHER: list[dict[str, Any]] = [
    ELSEWHERE | {"model": "tiny"},
    {"mock_timeout": True, "timeout": 0.01},
    {"stream": True, "additional_drop_params": ["stream_options"]},
    *({"stream": True, "stream_options": each} for each in ({"include_usage": False}, None, [], "x", {"x": URL})),
]


def spent(gateway: Host) -> float:
    query = "SELECT sum(spend) FROM \"LiteLLM_VerificationToken\" WHERE key_alias IN ('research/ci', 'apps/chat')"
    return float(sql(gateway, query))


def tokens(gateway: Host) -> tuple[float, int]:
    """What vLLM has counted, and what LiteLLM has written down of requests that were answered."""
    kinds = ("prompt", "generation")
    query = """SELECT coalesce(sum(total_tokens), 0) FROM "LiteLLM_SpendLogs" WHERE status = 'success'"""
    return (
        sum(support.metric(gateway, url, f"vllm:{kind}_tokens_total") for url in METRICS.values() for kind in kinds),
        int(sql(gateway, query)),
    )


@pytest.mark.long
@pytest.mark.usefixtures("trap")
def test_bodies_that_want_more(gateway: Host) -> None:
    """They are answered by the engine for the price that it has, or refused, and nobody else is hurt."""
    before, costs = settled(lambda: spent(gateway)), counted(gateway)
    counts, running = tokens(gateway), processes(gateway)
    for fields in [*({name: value} for name, values in VALUES.items() for value in values), *TOGETHER]:
        status, answer = post({"model": "tiny", "messages": MESSAGES, "max_tokens": 4, **fields}, key())
        print(status, json.dumps(fields)[:120], "" if status == 200 else answer[:200])
        assert status in (*REFUSED, 200, 429)
        assert "free" not in answer
        assert plain("chat", "apps") == 200, fields
    recorded = settled(lambda: spent(gateway)) - before
    cost = {model: now - costs[model] for model, now in counted(gateway).items()}
    assert cost["second"] == 0
    assert recorded == pytest.approx(cost["tiny"], rel=0.001)
    by_vllm, by_litellm = (now - then for now, then in zip(tokens(gateway), counts, strict=True))
    assert by_litellm == by_vllm
    assert processes(gateway) == running


def test_model_is_the_one_that_nginx_and_litellm_both_read() -> None:
    """The key of research/ci may not use the model second."""
    ask = json.dumps({"messages": MESSAGES, "max_tokens": 4})[1:]
    for begin in ('{"model": "tiny", "model": "second", ', '{"model": "second", "model\\u0000": "tiny", '):
        assert post((begin + ask).encode(), key())[0] in (401, 403)
    fine = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4}
    for query in ("model=second", "completion_model=second", "user_model=second", f"api_base={URL}", "api-version=x"):
        status, answer = post(fine, key(), f"/v1/chat/completions?{query}")
        assert status in (401, 403, 404, 400) or json.loads(answer)["model"] == "tiny"
    master = support.secret("litellm_master_key")
    for name in ("x-litellm-api-key", "api-key", "x-api-key", "x-goog-api-key", "Ocp-Apim-Subscription-Key"):
        assert post({**fine, "model": "second"}, key(), **{name: master})[0] in (401, 403)
    assert post(fine, key(), **{"x-litellm-timeout": "0.00001", "x-litellm-tags": "x" * 999})[0] == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/v1/responses"])
@pytest.mark.usefixtures("trap")
def test_other_paths_obey_no_more(gateway: Host, path: str) -> None:
    costs, running = counted(gateway), processes(gateway)
    text = {"prompt": "Say something.", "max_tokens": 4, "input": "Say something.", "max_output_tokens": 4}
    for fields in (
        {},
        ELSEWHERE | {"model": "tiny"},
        {"mock_response": "free"},
        {"litellm_params": ELSEWHERE},
        {"extra_body": ELSEWHERE},
        {"fallbacks": [ELSEWHERE]},
        {"fallbacks": ["second"]},
        {"previous_response_id": "resp_../../x"},
        {"tools": [{"type": "mcp", "server_url": URL, "server_label": "x", "require_approval": "never"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": f"{URL}/x.png"}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": f"{URL}/x.pdf"}]}]},
        {"user": "\x00", "metadata": {"a": "\x00"}},
        {"background": True, "store": True},
    ):
        status, answer = post({"model": "tiny", **text, **fields}, key(), path)
        print(status, path, json.dumps(fields)[:100], "" if status == 200 else answer[:200])
        assert status in (*REFUSED, 200, 500), (fields, answer[:500])
        assert "free" not in answer
        assert plain("chat", "apps") == 200
    assert counted(gateway)["second"] == costs["second"]
    assert processes(gateway) == running


def test_body_that_is_no_json() -> None:
    for body in (
        b"",
        b"\x00" * 1000,
        b"\xff\xfe{",
        b"[" * 200_000,
        b'{"model": "tiny"' + b" " * 1000,
        b"null",
        b'"tiny"',
        b"[]",
        b'{"model": "tiny", "messages": ' + b"[" * 400 + b"]" * 400 + b"}",
        b'{"__proto__": {"model": "second"}, "constructor": 1}',
    ):
        assert post(body, key())[0] in REFUSED
    assert post(b"model=tiny&messages=x", key(), Content_Type="application/x-www-form-urlencoded")[0] in REFUSED
    assert plain() == 200
