"""Pushes a published result to a repository on the Hub: one commit for each result, however often it is tried.

The commit's description names the result's manifest by its digest. That is how a later attempt, or the same run in a
re-created cluster, sees that there is nothing left to do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError

from tunewright_api.merge_run import MergeRun
from tunewright_api.run_config import TrainRun
from tunewright_api.v1alpha1.finetunejob import HubOutput
from tunewright_trainer import documents
from tunewright_trainer.errors import AccessDenied, InvalidConfiguration, Preempted, TrainerError
from tunewright_trainer.hub import MODEL_PREFIX, RETRY_SECONDS, Subject, connect, retried
from tunewright_trainer.publish import Published, output_files
from tunewright_trainer.transfer import Stop

DEFAULT_BRANCH = "main"
WEIGHTS = (".safetensors", ".safetensors.index.json")
CARD = "README.md"


def check(run: TrainRun | MergeRun, stop: Stop, *, retry_seconds: float = RETRY_SECONDS) -> None:
    """Make sure, before anything large is done, that the token may write where the result is to go.

    Raises:
        AccessDenied: There is no token, it is not valid, or it may not write there.
        HubUnavailable: The hub does not answer.
    """
    target = _target(run)
    subject = _subject(target)
    if get_token() is None:
        where = f"Secret {run.hub.secret_name} has none" if run.hub.secret_name else "hub.secretName names no Secret"
        raise AccessDenied(f"{subject.uri}: output.hub needs an access token (key `token`), and {where}")
    api = connect(run.hub)

    def call() -> None:
        try:
            api.auth_check(target.repository, write=True)
        except RepositoryNotFoundError:
            # It will be created, which takes a token of its owner.
            _check_owner(api, target, subject)

    retried(subject, run.hub, stop, call, retry_seconds=retry_seconds)


def _check_owner(api: HfApi, target: HubOutput, subject: Subject) -> None:
    token = api.whoami()
    owner = target.repository.partition("/")[0]
    known = [token["name"], *(organisation["name"] for organisation in token.get("orgs", ()))]
    if owner.lower() not in {name.lower() for name in known}:
        raise AccessDenied(
            f"{subject.uri}: the repository is not there, and the token's owner {token['name']} cannot create it under "
            f"{owner}: use one of {', '.join(known)}, or another token"
        )


def push(
    run: TrainRun | MergeRun,
    published: Published,
    fetch: Callable[[], Path],
    stop: Stop,
    say: Callable[[str], None],
    *,
    retry_seconds: float = RETRY_SECONDS,
) -> str:
    """Commit the folder that from_pretrained loads to the repository, unless the commit is there.

    Large files go up first, the commit that names them comes last: the branch never shows half a result. What is
    uploaded already is not sent again, neither the parts of a file after a broken connection nor, in the next attempt,
    whole files; the hub client sees to that.

    Args:
        run: With `hub_output`.
        published: The result in storage.
        fetch: Returns a local copy of the folder; called only when there is something to push.
        stop: Ends the waits.
        say: Told what a reader of the log should know.
        retry_seconds: Longest wait in all, per step.

    Returns:
        URL of the repository at the commit.

    Raises:
        AccessDenied: The token may not write there.
        InvalidConfiguration: The hub does not take the repository, the branch or the files.
        HubUnavailable: The hub does not answer.
    """
    target = _target(run)
    subject = _subject(target)
    branch = target.revision or DEFAULT_BRANCH
    api = connect(run.hub)

    def find() -> str | None:
        api.create_repo(target.repository, private=target.private, exist_ok=True)
        if branch != DEFAULT_BRANCH:
            api.create_branch(target.repository, branch=branch, exist_ok=True)
        return _find_commit(api, target.repository, branch, published.output.digest)

    def commit() -> str:
        # Looked for each time: the answer to a commit that was made may have got lost.
        return find() or _commit(api, run, published, folder)

    try:
        found = retried(subject, run.hub, stop, find, retry_seconds=retry_seconds)
        if found is None:
            folder = fetch()
            found = retried(subject, run.hub, stop, commit, retry_seconds=retry_seconds)
        else:
            say(f"{subject.uri} has the result already")
    except Preempted:
        raise
    except TrainerError as error:
        raise type(error)(
            f"not pushed: {error}. The result is published at {published.output.uri}: another attempt only pushes it"
        ) from None
    url = f"{api.endpoint}/{target.repository}/tree/{found}"
    say(f"pushed: {url}")
    return url


def _find_commit(api: HfApi, repository: str, branch: str, digest: str) -> str | None:
    commits = api.list_repo_commits(repository, revision=branch)
    return next((commit.commit_id for commit in commits if digest in commit.message), None)


def _commit(api: HfApi, run: TrainRun | MergeRun, published: Published, folder: Path) -> str:
    target = _target(run)
    branch = target.revision or DEFAULT_BRANCH
    files = output_files(folder)
    # New ones for each try: the client keeps in them what it saw the first time.
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, path) for name, path in files.items() if name != CARD
    ]
    if CARD in files:
        card = documents.card_on_hub(files[CARD].read_text(encoding="utf-8"), target.repository, target.revision)
        operations.append(CommitOperationAdd(CARD, card.encode()))
    # Weights of an earlier push beside the new ones: from_pretrained might load those.
    operations += [
        CommitOperationDelete(name)
        for name in api.list_repo_files(target.repository, revision=branch)
        if name.endswith(WEIGHTS) and name not in files
    ]
    run_key = published.manifest.run_key
    info = api.create_commit(
        target.repository,
        operations,
        revision=branch,
        commit_message=target.commit_message or f"Publish {run.name} (run {run_key})",
        commit_description=f"Run key {run_key}, manifest {published.output.digest}",
    )
    return info.oid


def _target(run: TrainRun | MergeRun) -> HubOutput:
    assert run.hub_output is not None
    return run.hub_output


def _subject(target: HubOutput) -> Subject:
    uri = f"{MODEL_PREFIX}{target.repository}"
    return Subject(uri, "repository", target.revision or DEFAULT_BRANCH, "output.hub.revision", InvalidConfiguration)
