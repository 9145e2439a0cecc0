"""What endpoints are told and what they say: addresses, and completions that become speech."""

from __future__ import annotations

import pytest

from endpoints.client import ChatClient
from endpoints.wire import completions_url, completions_urls, shown_url

# ----------------------------------------------------------------------------------------------------------- addresses

ADDRESSES = [  # (what people paste, where the requests go)
    ("http://h:1", "http://h:1/v1/chat/completions"),
    ("http://h:1/", "http://h:1/v1/chat/completions"),
    (" http://h:1/v1/ \n", "http://h:1/v1/chat/completions"),
    ("HTTP://h/v1", "http://h/v1/chat/completions"),
    ("http://[::1]:8000", "http://[::1]:8000/v1/chat/completions"),
    ("https://h/openai/v1", "https://h/openai/v1/chat/completions"),
    ("https://h/v1beta/openai/", "https://h/v1beta/openai/chat/completions"),
    ("https://h/api", "https://h/api/chat/completions"),
    ("http://h:1/v1/chat/completions", "http://h:1/v1/chat/completions"),
    ("http://h:1/api/chat/completions/", "http://h:1/api/chat/completions"),
    ("http://h/chat/completions", "http://h/chat/completions"),
    ("https://h/deployments/m/chat/completions?api-version=2", "https://h/deployments/m/chat/completions?api-version=2"),
    ("https://h/deployments/m?api-version=2", "https://h/deployments/m/chat/completions?api-version=2"),
    ("https://h?key=a,b@c", "https://h/v1/chat/completions?key=a,b@c"),
]


def test_addresses_as_people_paste_them():
    """Guards a complete address, or a path without /v1, that is rewritten into one that no server answers."""
    assert [completions_url(base) for base, _ in ADDRESSES] == [url for _, url in ADDRESSES]
    assert completions_urls("http://a, http://b/v1,http://a/v1,https://c?x=1,2") == [
        "http://a/v1/chat/completions", "http://b/v1/chat/completions", "https://c/v1/chat/completions?x=1,2"]
    assert shown_url("https://h/v1?key=secret") == "https://h/v1?…" and shown_url("http://h/v1") == "http://h/v1"


@pytest.mark.parametrize(
    "base, why",
    [
        ("", "http://"), ("localhost:8000", "http://"), ("ftp://h", "http://"), ("h/v1?key=secret", "http://"),
        ("http://", "host"), ("http://h:port", "port"), ("http://h:99999", "port"), ("http://h:0", "port"),
        ("http://[::1", "IPv6"), ("http://u:secret@h", "password"), ("http://secret@h?x=1", "password"),
        ("u:secret@h", "http://"), ("http://h h", "blank"), ("http://h?a=@b\nsecret", "blank"),
        ("http://h/v1#secret", "fragment"), ("http://a,b", "comma"), ("http://a:1,localhost:2", "port"),
    ],
)  # fmt: skip
def test_addresses_are_refused_by_their_cause(base, why):
    """Guards a typo in --simulator-url that shows as a connection error after two minutes; secrets that are echoed."""
    with pytest.raises(ValueError, match="base URL") as caught:
        ChatClient(base, "m", name="simulator")
    words = str(caught.value).partition("; it must look like")[0]
    assert words.startswith("--simulator-url: ") and why in words and "secret" not in words and "\n" not in words
