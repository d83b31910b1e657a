"""What errors of servers and of fsspec's packages mean: to be tried again, absent or forbidden."""

from unclip_pl.utils.errors import UserError

REFUSALS = ("NoCredentialsError", "DefaultCredentialsError", "OfflineModeIsEnabled")
HIDDEN = ("RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError")
"""Why the hub says that a file is not there, though a token might show it."""


def refusal(url: str, error: Exception) -> UserError:
    """The sentence for what a server refused."""
    return UserError(
        f"{url} may not be read or written ({first_line(error)}): check the name of the bucket or "
        "repository and the credentials, which fsspec takes from the usual places."
    )


def is_refusal(error: Exception) -> bool:
    """Whether a server said that this will not do, however often it is asked."""
    if isinstance(error, PermissionError) or type(error).__name__ in REFUSALS:
        return True
    if str(error).startswith("Forbidden: "):  # an OSError of gcsfs without the status 403
        return True
    status = status_of(error) or status_of(error.__cause__)
    return status is not None and 400 <= status < 500 and status not in (408, 429)


def is_hidden(error: FileNotFoundError) -> bool:
    """Whether the hub says that an object is not there because its repository may not be seen."""
    return type(error.__cause__).__name__ in HIDDEN


def may_pass(cause: BaseException | None) -> bool:
    """Whether an object "is not there" only because the server failed: fsspec says so of HTTP."""
    if cause is None or isinstance(cause, LookupError):  # of fsspec's own tables of names
        return False
    status = status_of(cause)
    return status is None or status >= 500 or status in (408, 429)


def status_of(error: BaseException | None) -> int | None:
    """The status of a server's answer, where botocore, httpx, aiohttp and gcsfs keep it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for holder, name in ((response, "status_code"), (error, "status")):
        if isinstance(status := getattr(holder, name, None), int):
            return status
    if type(error).__module__.startswith("gcsfs"):
        code = str(getattr(error, "code", None))
        return int(code) if code.isdecimal() else None
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
