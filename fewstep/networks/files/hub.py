"""The hub of Hugging Face: what it is asked for, and one line for each way in which it does not give it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.errors import UserError
from fewstep.untrusted import text


def is_hub_id(address: str) -> bool:
    """Whether it has the form OWNER/NAME. A folder may have it, too."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", address) is not None


def expect_id(address: str, what: str) -> None:
    """ValueError unless `address`, at which no folder is, can be asked of the hub."""
    reason = no_id(address)
    if reason is not None:
        raise UserError(f"no {what} at '{address}': {reason}")


def no_id(address: str) -> str | None:
    """Why nothing can be asked of the hub by this name; None: it can. What looks like a path is a mistyped one."""
    folder = Path(address)
    if folder.exists() or not is_hub_id(address):
        return "there is no such folder, and it is no name on the hub (OWNER/NAME)"
    return f"there is no such folder in {folder.parent}" if folder.parent.is_dir() else None


@contextmanager
def asking(address: str) -> Iterator[None]:
    """Within, a failed download of `address` becomes a UserError of one line; other errors pass."""
    try:
        yield
    except Exception as error:  # the libraries wrap one in the other, and some of them are of the HTTP client
        message = _message(address, error)
        if message is None:
            raise
        raise UserError(message) from error


def folder_of(address: str, patterns: Sequence[str], what: str) -> Path:
    """A local folder, or the hub's files that match `patterns`, in its cache."""
    from huggingface_hub import snapshot_download

    if Path(address).is_dir():
        return Path(address)
    expect_id(address, what)
    with asking(address):
        return Path(snapshot_download(address, allow_patterns=list(patterns)))


def has_file(address: str, name: str) -> bool:
    """Whether the repository has the file; of one that is only in the cache, whether that has it. Other failures are raised."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hf_hub_download(address, name)
    except EntryNotFoundError:  # of the hub, or of the cache where the hub cannot be reached
        return False
    return True


def read_json(address: str, name: str) -> dict[str, Any] | None:
    """A json file of the repository; None where it has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with asking(address):
        try:
            return text.read_json(hf_hub_download(address, name), "Download it again")
        except LocalEntryNotFoundError:  # a subclass of the next, but without an answer of the hub
            raise
        except EntryNotFoundError:
            return None


def _message(address: str, error: BaseException) -> str | None:
    from huggingface_hub import constants, errors

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if has(errors.GatedRepoError):  # before the next, of which it is a kind
        page = f"{constants.ENDPOINT}/{address}"
        return f"'{address}' is gated: accept its terms at {page}, then log in here with: hf auth login"
    if has(errors.RepositoryNotFoundError):
        return f"there is no '{address}' here, and the hub knows none, or not for you (if it is private: hf auth login)"
    lost = (errors.EntryNotFoundError, errors.LocalEntryNotFoundError)
    failed = next((e for e in chain if isinstance(e, errors.HfHubHTTPError) and not isinstance(e, lost)), None)
    if failed is not None:
        return f"'{address}': the hub failed: {str(failed).strip().splitlines()[0]}. Try again later"
    if has(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) or _is_unreachable(chain):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        return f"there is no '{address}' here, nor in the hub's cache, and {why}. Download it where there is a network"
    if has(errors.EntryNotFoundError):
        return f"the hub's '{address}' lacks a file: {str(error).strip().splitlines()[0]}"
    return None


def _is_unreachable(chain: list[BaseException]) -> bool:
    """Whether the HTTP client, of whichever library the hub's uses, could not connect or got no answer in time."""
    names = {kind.__name__ for link in chain for kind in type(link).__mro__}
    return bool(names & {"ConnectionError", "ConnectError", "ConnectTimeout", "ReadTimeout", "TransportError"})
