"""Translate failures of the Hub: huggingface_hub's exceptions as errors with a fix."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import HostError, SourceError, reason

NETWORK = "connect to the network, set HF_ENDPOINT to a mirror, or give the checkpoint as a folder"


@contextmanager
def hub_errors(where: str, repo: str, revision: str) -> Iterator[None]:
    """Raise our errors for those of the Hub and of the connection to it."""
    from huggingface_hub import errors  # here, because it is slow to import and most sources are not on the Hub

    try:
        yield
    except errors.GatedRepoError as error:
        fix = f"accept the terms on the page of {repo}, then set HF_TOKEN"
        raise SourceError("access to this model is restricted", where=where, fix=fix) from error
    except errors.RevisionNotFoundError as error:
        fix = "use a branch, tag or commit of that repository"
        raise SourceError(f"no such revision: {revision!r}", where=where, fix=fix) from error
    except errors.RepositoryNotFoundError as error:
        fix = "check the name; for a private model set HF_TOKEN to a token that may read it"
        raise SourceError(f"no such repository, or no access: {repo}", where=where, fix=fix) from error
    except errors.HfHubHTTPError as error:
        raise _http_error(error.response.status_code if error.response is not None else None, where) from error
    except errors.LocalEntryNotFoundError as error:
        raise _no_connection(error, where) from error
    except json.JSONDecodeError as error:
        raise SourceError(f"a file of the repository is not JSON: {error}", where=where) from error
    except (OSError, _transport_error()) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free space, or set HF_HUB_CACHE to a folder on another disk"
            raise HostError("no space left for the download", where=where, fix=fix) from error
        raise _no_connection(error, where) from error
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:  # over the answer's fields
        fix = "check HF_ENDPOINT, and proxies on the way to it"
        raise HostError("the Hub's answer is not one of a Hub", where=where, fix=fix) from error


def _http_error(status: int | None, where: str) -> SourceError | HostError:
    if status in (401, 403):
        fix = "set HF_TOKEN to a valid token, or unset it"
        return SourceError(f"the Hub rejects the token (HTTP {status})", where=where, fix=fix)
    answer = f"HTTP {status}" if status is not None else "no HTTP status"
    return HostError(f"error of the Hub: {answer}", where=where, fix="try again later")


def _no_connection(error: BaseException, where: str) -> HostError:
    while error.__cause__ is not None:
        error = error.__cause__
    return HostError(f"no connection to the Hub: {reason(error)}", where=where, fix=NETWORK)


def _transport_error() -> type[Exception]:
    """Return the exception of this huggingface_hub's HTTP client for connections that fail."""
    from huggingface_hub import errors  # here, as above

    bases = errors.HfHubHTTPError.__mro__
    client_error = next((base for base in bases if base.__name__ == "HTTPError"), OSError)
    return client_error if issubclass(client_error, Exception) else OSError
