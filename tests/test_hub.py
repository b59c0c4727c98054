"""Advice about failed downloads."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError

from trainer.core.hub import download_advice

httpx = pytest.importorskip(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])


def http_error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    response = httpx.Response(status, request=httpx.Request("GET", "http://127.0.0.1/owner/name"))
    return kind("refused", response=response)


def test_advice_fits_the_cause():
    wrapped = LocalEntryNotFoundError("not found in the cache")
    wrapped.__cause__ = httpx.ConnectError("Name or service not known")
    assert "when the hub can be reached" in download_advice(wrapped)
    assert "when the hub can be reached" in download_advice(TimeoutError())
    assert "hf auth login" in download_advice(http_error(GatedRepoError, 403))
    assert "revision" in download_advice(http_error(RevisionNotFoundError, 404))
    assert "its page" in download_advice(http_error(HfHubHTTPError, 500))
