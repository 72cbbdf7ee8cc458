"""Who may do what."""

import pytest

from serving.api.keys import KeyRing, realm_of


@pytest.mark.parametrize(
    ("path", "realm"),
    [
        ("/health", "open"),
        ("/metrics", "open"),
        ("/v1/models", "client"),
        ("/v1", "client"),
        ("/tokenize", "client"),
        ("/admin/status", "admin"),
        ("/v1beta", "open"),
    ],
)
def test_a_path_asks_for_the_key_of_its_realm(path: str, realm: str) -> None:
    assert realm_of(path) == realm


def test_every_client_key_opens_the_api_and_no_other_does() -> None:
    ring = KeyRing(["one", "two"], admin_key="root")
    assert ring.opens("client", "Bearer one") and ring.opens("client", "bearer two")
    for wrong in (None, "", "Bearer", "Bearer ", "Bearer three", "one", "Basic one", "Bearer root"):
        assert not ring.opens("client", wrong)


def test_only_the_admin_key_opens_admin() -> None:
    ring = KeyRing(["one"], admin_key="root")
    assert ring.opens("admin", "Bearer root")
    assert not ring.opens("admin", "Bearer one")


def test_without_keys_the_api_is_open_and_admin_is_shut() -> None:
    ring = KeyRing()
    assert ring.opens("client", None)
    assert not ring.opens("admin", None) and not ring.opens("admin", "Bearer ")


def test_keys_are_not_kept_in_the_clear() -> None:
    assert "sk-secret" not in str(vars(KeyRing(["sk-secret"], admin_key="sk-secret")))
