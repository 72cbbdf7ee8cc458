"""The served document against the app: every endpoint answers as it is described, and nothing else."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from buffer.administration import DirectAdministration
from buffer.audit import Caller
from buffer.errors import StoreUnavailableError
from buffer.memory_store import MemoryAdapterFeed
from serving.api.errors import ErrorBody
from serving.settings import ServingSettings
from serving.tenants import Tenant, digest_of
from tests.buffer.samples import make_manifest
from tests.support.live_server import LiveServer, live_server

CLIENT, ADMIN = {"Authorization": "Bearer sk-client"}, {"Authorization": "Bearer sk-admin"}
JSON = {"content-type": "application/json"}
MESSAGES = [{"role": "user", "content": "hi"}]
ECHOED = {"prompt": "a b", "echo": True, "logprobs": 1, "prompt_logprobs": 1, "max_tokens": 0}
SCORED = {"messages": MESSAGES, "prompt_logprobs": 1, "max_tokens": 1}
GOOD_BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [{"prompt": "a"}, {"prompt": "a", "stream": True}, ECHOED],
    "/v1/chat/completions": [{"messages": MESSAGES}, {"messages": MESSAGES, "stream": True}, SCORED],
    "/v1/responses": [{"input": "a"}, {"input": MESSAGES, "stream": True}],
    "/tokenize": [{"prompt": "a"}, {"messages": MESSAGES, "return_token_strs": True}],
    "/detokenize": [{"tokens": [5, 6]}],
    "/admin/drafts/{route}/rollback": [{"reason": "worse"}],
    "/admin/drafts/{route}/pin": [{"reason": "compare", "version": 0}],
    "/admin/drafts/{route}/unpin": [{"reason": "compared"}],
    "/admin/learning/pause": [{}],
    "/admin/learning/resume": [{}],
    "/admin/capture": [{"rate": 0.0}],
    "/admin/drain": [{}],
    "/admin/undrain": [{}],
    "/admin/records/purge": [{"older_than_s": 1.0}],
}
UNKNOWN_NAMES: dict[str, dict[str, Any]] = {
    "/admin/learning/pause": {"route": "other"},
    "/admin/learning/resume": {"route": "other"},
    "/admin/drain": {"replica_id": "other"},
    "/admin/undrain": {"replica_id": "other"},
    "/admin/records/purge": {"route": "other"},
}
"""A name in the body where the path has none."""
BAD_QUERIES = {
    "/admin/drafts": "?events=-1",
    "/admin/drafts/{route}/{version}": "",
    "/admin/audit": "?lines=0",
}


@pytest.fixture(scope="module")
def keyed(tiny_pair: tuple[str, str]) -> Iterator[LiveServer]:
    """With keys, a queue of nothing, and one slot. The last test of this file closes its engine."""
    settings = ServingSettings(
        compile="off",
        target=tiny_pair[0],
        model_name="tiny",
        num_slots=1,
        max_seq_len=64,
        max_queued_requests=0,
        max_queued_prompt_tokens=1000,
        api_keys=(SecretStr("sk-client"),),
        admin_key=SecretStr("sk-admin"),
        tenants=(Tenant(name="acme", keys=(digest_of("sk-acme-1"),), isolated=True, routes=("law",)),),
    )
    with live_server(settings) as live:
        yield live


@pytest.fixture(scope="module")
def document(keyed: LiveServer) -> dict[str, Any]:
    described: dict[str, Any] = httpx.get(f"{keyed.url}/openapi.json").json()
    return described


Operation = tuple[str, str, dict[str, Any]]


def operations(document: dict[str, Any]) -> list[Operation]:
    """(method, path, what is said of it)"""
    return [
        (method, path, described)
        for path, methods in document["paths"].items()
        for method, described in methods.items()
    ]


class Asked:
    """Every answer of one server so far, each held to its description."""

    def __init__(self, server: LiveServer, document: dict[str, Any]) -> None:
        self._server, self._document = server, document
        self.statuses: defaultdict[tuple[str, str], set[int]] = defaultdict(set)

    def __call__(self, method: str, path: str, **request: Any) -> None:
        named = {"model_id": request.pop("model", "tiny"), "route": request.pop("route", "default")}
        url = self._server.url + path.format(**named, version=request.pop("version", 1))
        url += request.pop("query", "")
        answer = httpx.request(method, url, timeout=30, **request)
        self.statuses[method, path].add(answer.status_code)
        described = self._document["paths"][path][method]["responses"]
        assert str(answer.status_code) in described, (path, answer.status_code, answer.text)
        content = described[str(answer.status_code)]["content"]
        given, kinds = answer.headers["content-type"], set(content)
        assert given in kinds or given.partition(";")[0] in kinds, (path, given, kinds)
        if answer.status_code != 200:
            assert content["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
            ErrorBody.model_validate(answer.json())


def has_body(operation: Operation) -> bool:
    return "requestBody" in operation[2]


def key_of(path: str) -> dict[str, str]:
    return ADMIN if path.startswith("/admin") else CLIENT


def well_formed(ask: Asked, operation: Operation) -> None:
    method, path, _ = operation
    if not has_body(operation):
        ask(method, path, headers=key_of(path))
        return
    for body in GOOD_BODIES[path]:
        ask(method, path, headers=key_of(path), json=body)


def ill_formed(ask: Asked, operation: Operation, max_body_bytes: int) -> None:
    method, path, _ = operation
    ask(method, path)
    if not has_body(operation):
        ask(method, path, headers=CLIENT, model="other")
        if path in BAD_QUERIES:
            ask(method, path, headers=ADMIN, query=BAD_QUERIES[path], version="one")
            ask(method, path, headers=ADMIN, query="" if "{" in path else "?route=other", route="other")
        return
    for body in GOOD_BODIES[path]:
        unknown = UNKNOWN_NAMES.get(path, {} if path.startswith("/admin") else {"model": "other"})
        ask(method, path, headers=key_of(path), json=body | unknown, route="other")
        ask(method, path, headers=key_of(path), json=body | {"nonsense": 1})
    ask(method, path, headers=key_of(path) | JSON, content=b" " * (max_body_bytes + 1))


class Away(MemoryAdapterFeed):
    """A feed that cannot be reached."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("routes", "add_audit_line", "audit_log"):
            raise StoreUnavailableError("nobody answers; nothing was stored or changed")
        return super().__getattribute__(name)


def test_every_endpoint_answers_as_described_and_every_description_comes_true(
    keyed: LiveServer, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, context = Asked(keyed, document), keyed.parts.context
    keyed.feed.publish(make_manifest(1), b"weights")
    for operation in operations(document):
        well_formed(ask, operation)
        ill_formed(ask, operation, context.limits.max_body_bytes)
    generating = [path for path in GOOD_BODIES if path.startswith("/v1")]
    with monkeypatch.context() as patched:
        patched.setattr(context, "request_timeout_s", 0.0)
        for path in generating:
            ask("post", path, headers=CLIENT, json=GOOD_BODIES[path][0])
    keyed.wait_until_idle()
    for path in generating:
        ask("post", path, headers=CLIENT | {"X-Everdraft-Route": "law"}, json=GOOD_BODIES[path][0])
    place = context.admission.admit(1, 1)
    for path in generating:
        ask("post", path, headers=CLIENT, json=GOOD_BODIES[path][0])
    place.release()
    with monkeypatch.context() as patched:
        caller = Caller("somebody", "somewhere")
        away = DirectAdministration(Away(), keyed.store, "t", caller)
        patched.setattr(context, "administration", lambda _: away)
        for operation in operations(document):
            if operation[1].startswith("/admin"):
                well_formed(ask, operation)
    keyed.parts.engine.close()
    for operation in operations(document):
        if operation[1] in (*generating, "/health", "/ready"):
            well_formed(ask, operation)
    for method, path, described in operations(document):
        expected = {int(status) for status in described["responses"]} - {500}
        assert ask.statuses[method, path] == expected, (method, path)


def test_the_framework_s_own_refusals_are_not_in_it(document: dict[str, Any]) -> None:
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])
    for _, path, described in operations(document):
        assert "422" not in described["responses"], path
        assert "500" in described["responses"], path


def test_what_needs_a_key_says_so_and_an_open_endpoint_does_not(
    document: dict[str, Any], server: LiveServer
) -> None:
    assert document["components"]["securitySchemes"]["bearer"] == {"type": "http", "scheme": "bearer"}
    guarded = {path for _, path, described in operations(document) if described.get("security")}
    assert guarded == {
        path for path in document["paths"] if path.startswith(("/v1", "/admin", "/tok", "/detok"))
    }
    without_keys = httpx.get(f"{server.url}/openapi.json").json()
    guarded = {path for _, path, d in operations(without_keys) if d.get("security")}
    assert guarded == {path for path in document["paths"] if path.startswith("/admin")}
    assert "401" not in without_keys["paths"]["/v1/models"]["get"]["responses"]


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            node = list(node.values())
        if isinstance(node, list):
            for item in node:
                yield from references(item)

    named = {reference.rpartition("/")[2] for reference in references(document)}
    assert named and named <= set(document["components"]["schemas"])
