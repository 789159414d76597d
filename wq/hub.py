"""Share a checkpoint on the Hub: one commit with everything, the card included."""

from __future__ import annotations

import os
from pathlib import Path

from wq import report
from wq.checkpoint import read_headers
from wq.errors import HubError, ModelError, WqError, first_line


def push(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    require_evaluation: bool = True,
    message: str | None = None,
) -> str:
    """Upload the checkpoint in `folder` to the Hub repo `org/name`, creating it, and return its address.

    One commit: the repo holds either what it held before or all of the new files. Raises ModelError for a folder that
    is no checkpoint or, with `require_evaluation`, has no measured figures to show; HubError when the Hub says no.
    """
    path = Path(folder)
    _check(path, require_evaluation)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(library_name="wq")
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=path, commit_message=message or "Upload a model quantized with wq"
        )
    except HFValidationError as error:
        raise HubError(f"{repo} is no repo id ({first_line(error)}). Use organisation/name.") from error
    except HfHubHTTPError as error:
        raise HubError(
            f"the Hub refused {repo} ({first_line(error)}). Check `hf auth whoami`, and that you may write there."
        ) from error
    except Exception as error:  # no connection, in the words of whichever library noticed
        raise HubError(f"the Hub could not be reached ({first_line(error)}). Nothing was published.") from error
    return str(made)


def _check(path: Path, require_evaluation: bool) -> None:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} is no checkpoint: it has no config.json.")
    try:
        read_headers(path)  # every shard is there and whole
    except WqError as error:
        raise ModelError(f"{path} cannot be shared: {error}") from error
    known = report.load(path)
    if require_evaluation and (known is None or not {"evaluation", "tasks"} & set(known)):
        raise ModelError(
            f"{path} has no measured figures for its card. Run `wq eval {path} --base BASE` first, or push without "
            "them by --no-eval."
        )
