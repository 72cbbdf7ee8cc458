"""Who may do what."""

import pytest

from serving.api.keys import KeyRing, Realm, realm_of


@pytest.mark.parametrize(
    ("path", "realm"),
    [
        ("/health", "open"),
        ("/metrics", "open"),
        ("/v1/models", "client"),
        ("/v1", "client"),
        ("/tokenize", "client"),
        ("/tokenizer_info", "client"),
        ("/admin/status", "admin"),
        ("/v1beta", "open"),
    ],
)
def test_a_path_asks_for_the_key_of_its_realm(path: str, realm: str) -> None:
    assert realm_of(path) == realm


def test_every_client_key_opens_the_api_and_no_other_does() -> None:
    ring = KeyRing(["key-one1", "key-two2"], admin_key="key-root")
    assert ring.opens("client", "Bearer key-one1") and ring.opens("client", "bearer key-two2")
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer key-3",
        "key-one1",
        "Basic key-one1",
        "Bearer key-root",
    ):
        assert not ring.opens("client", wrong)


def test_only_the_admin_key_opens_admin() -> None:
    ring = KeyRing(["key-one1"], admin_key="key-root")
    assert ring.opens("admin", "Bearer key-root")
    assert not ring.opens("admin", "Bearer key-one1")


def test_without_keys_the_api_is_open_and_admin_is_shut() -> None:
    ring = KeyRing()
    assert ring.opens("client", None)
    assert not ring.opens("admin", None) and not ring.opens("admin", "Bearer ")


def test_keys_are_not_kept_in_the_clear() -> None:
    assert "sk-secret" not in str(vars(KeyRing(["sk-secret"], admin_key="sk-secret")))


@pytest.mark.parametrize(
    "key", ["", "       ", "1234567", " 12345678", "12345678\n", "schlüssel", "two words"]
)
def test_a_ring_takes_no_key_that_guards_nothing(key: str) -> None:
    for given in ({"api_keys": [key]}, {"admin_key": key}):
        with pytest.raises(ValueError) as refused:
            KeyRing(**given)  # type: ignore[arg-type]
        assert not key.strip() or key not in str(refused.value)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer \t", "bearer", "Basic ", "\xff"])
@pytest.mark.parametrize("realm", ["client", "admin"])
def test_no_header_that_carries_no_key_opens_anything(realm: Realm, header: str | None) -> None:
    assert not KeyRing(["key-one1"], admin_key="key-root").opens(realm, header)
