"""The Hugging Face Hub, to which an exported folder may go."""

from pathlib import Path

from huggingface_hub import HfApi

from anyo_lightning.errors import InputError


def check_hub(repository: str) -> None:
    """Refuse, before anything is computed, a repository that nothing could be uploaded to.

    Args:
        repository: Such as `me/my-recommender`.

    Raises:
        InputError: It is no name of a repository, or the hub cannot be reached or knows no user here.
    """
    try:
        HfApi().repo_exists(repository)  # looks at the name first
        HfApi().whoami()
    except Exception as error:  # of huggingface_hub, httpx and the system, without a common class
        raise InputError(
            f"Expected --push_to_hub to name a repository such as me/my-recommender on a hub that can be reached and "
            f"where you are logged in (hf auth login), got {repository}: {_reason(error)}"
        ) from error


def push(folder: Path, repository: str) -> None:
    """Upload a folder; a repository that is not there is made, private.

    Args:
        folder: Its content.
        repository: As `check_hub` takes it.

    Raises:
        InputError: The upload has failed; the folder stays.
    """
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of anyo-lightning")
    except Exception as error:  # as above
        raise InputError(
            f"Expected an upload to {repository}, got: {_reason(error)}; {folder} is complete and can be uploaded by "
            f"hf upload"
        ) from error


def _reason(error: Exception) -> str:
    """The first sentence of what a library says."""
    return " ".join(str(error).split())[:200] or type(error).__name__
