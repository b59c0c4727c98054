"""Advice about downloads from the Hugging Face hub that fail."""

from __future__ import annotations

from collections.abc import Iterator


def download_advice(error: BaseException) -> str:
    """Returns what to do about a download that failed, as the end of a sentence that names another way first."""
    from huggingface_hub import errors

    causes = list(_causes(error))
    if any(isinstance(cause, errors.RepositoryNotFoundError) for cause in causes):
        # The hub answers like this for gated and private repositories too.
        return "or check the name, accept the terms on its page if it is gated, and log in (`hf auth login`)"
    if any(isinstance(cause, errors.RevisionNotFoundError) for cause in causes):
        return "or type a revision that its page lists"
    if any(isinstance(cause, ConnectionError | TimeoutError) or _is_network_error(cause) for cause in causes):
        return "or run the same command again when the hub can be reached"
    return "or check its page on the hub"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and what caused it, as deep as it goes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_network_error(error: BaseException) -> bool:
    """Returns whether an error is one of the HTTP library's, which `huggingface_hub` does not wrap."""
    return any(kind.__name__ in ("TransportError", "gaierror") for kind in type(error).__mro__)
