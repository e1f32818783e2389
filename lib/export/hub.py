"""Pushing an artifact to the Hugging Face Hub: private unless the config says otherwise, all files in one commit.

Owns the repository, what may be overwritten there, and what to do where the Hub refuses. Must not know how artifacts
are made.

    python -c "from lib.export.hub import push; help(push)"
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, NamedTuple

from lib.config import HubSection
from lib.export.errors import ExportError
from lib.export.folder import MANIFEST, Artifact, check_artifact

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

TOKEN, REPO = "HF_TOKEN", "HF_REPO_ID"
CARD = "README.md"

_OWN = (".gitattributes", CARD, "LICENSE", "LICENSE.txt", "LICENSE.md")
"""Files that a repository has without anybody's weights in it."""

_WRITE = "make one with write permission on https://huggingface.co/settings/tokens"


class Pushed(NamedTuple):
    repo: str
    commit: str
    url: str


def check_push(settings: HubSection) -> tuple[str, str]:
    """Token and repository of a push; to be asked before anything is computed. Raises ExportError."""
    token, repo = os.environ.get(TOKEN, ""), settings.repo or os.environ.get(REPO, "")
    if not token:
        raise ExportError(
            f"export.hub.push needs a token of the Hub in the environment variable {TOKEN}: {_WRITE}. On Modal put it "
            f"into a secret, and that secret's name into modal.secrets"
        )
    if repo.count("/") != 1:
        raise ExportError(
            f"export.hub.push needs a repository, owner/name, in export.hub.repo or the environment variable {REPO} "
            f"(given: {repo!r})"
        )
    return token, repo


def push(artifact: Artifact, card: str, settings: HubSection) -> Pushed:
    """Upload an artifact whose files are what was written, with its card. Raises ExportError.

    A repository of an earlier push is brought to this artifact: what is not of it is deleted in the same commit. One
    that holds somebody else's files, or is public where `private` is asked for, is refused.
    """
    from httpx import HTTPError
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    token, repo = check_push(settings)
    check_artifact(artifact.folder)
    api = HfApi(token=token, endpoint=os.environ.get("HF_ENDPOINT"))
    names = [MANIFEST, *artifact.facts["files"]]
    try:
        api.create_repo(repo, private=settings.private, exist_ok=True)
        there = _files_there(api, repo, settings)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, str(artifact.folder / name)) for name in names
        ]
        operations.append(CommitOperationAdd(CARD, card.encode()))
        operations += [CommitOperationDelete(name) for name in there if name not in {*names, *_OWN}]
        origin = artifact.facts["origin"]
        done = api.create_commit(repo, operations, commit_message=f"{origin['run']}: {artifact.kind}")
    # HTTPError and OSError: refused, or not reached. ValueError: what the Hub said was wrong with the card or a file.
    except (HTTPError, OSError, ValueError) as error:
        raise ExportError(_refused(repo, error)) from None
    logger.info("export: %s pushed to %s (%s)", artifact.kind, repo, done.oid[:8])
    return Pushed(repo, done.oid, str(done.repo_url))


def _files_there(api: HfApi, repo: str, settings: HubSection) -> list[str]:
    about = api.model_info(repo)
    if settings.private and not about.private:
        raise ExportError(
            f"{repo} is there and public, and export.hub.private is true: choose another repository, make that one "
            f"private, or set export.hub.private: false to publish these weights"
        )
    there = [one.rfilename for one in about.siblings or []]
    strange = [name for name in there if name not in _OWN]
    if strange and MANIFEST not in there:
        raise ExportError(
            f"{repo} holds files that no export of this workbench put there ({', '.join(strange[:3])}): choose another "
            f"repository"
        )
    return there


def _refused(repo: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"the Hub does not know this {TOKEN} (401): {_WRITE}, and set it anew"
    if status == 403:
        return (
            f"this {TOKEN} may not write to {repo} (403): {_WRITE} for {repo.split('/')[0]}, or set {REPO} to a "
            f"repository of your own"
        )
    told = str(error).strip().splitlines() or ["no reason given"]
    return f"the Hub did not take the push to {repo}: {told[0]}. The artifact is on disk: run the same command again"
