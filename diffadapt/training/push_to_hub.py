"""Uploading a finished run to the hub, with `--push_to_hub`; nothing else in the package sends anything."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from diffadapt.training.options import TrainOptions

# States of training, images that are not results, and what an interrupted write left behind.
NOT_UPLOADED = ["checkpoint-*", "class_images/*", "logs/*", ".*", "**/.*"]


def check_hub(options: TrainOptions) -> None:
    """Checks before the first step that the upload can succeed.

    Raises:
        ValueError: there is no login, or the hub does not take the repository's name.
    """
    if options.push_to_hub and get_token() is None:
        raise ValueError("--push_to_hub needs a login: run `hf auth login`, or set HF_TOKEN")
    if options.hub_model_id is not None:
        try:
            validate_repo_id(options.hub_model_id)
        except HFValidationError as error:
            raise ValueError(f"--hub_model_id: {error}") from None


def push(options: TrainOptions) -> str:
    """Uploads the output folder without checkpoints.

    Returns:
        The address of the repository.

    Raises:
        OSError: the hub refuses; the result stays in the output folder.
    """
    output = Path(options.output_dir)
    try:
        api = HfApi()
        name = options.hub_model_id or output.resolve().name
        repository = api.create_repo(name, exist_ok=True, private=options.hub_private or None).repo_id
        address = api.upload_folder(
            repo_id=repository,
            folder_path=str(output),
            commit_message="End of training",
            ignore_patterns=NOT_UPLOADED,
        )
    except (OSError, HFValidationError) as error:
        raise OSError(
            f"the result is whole in {output}, but was not uploaded: {error}; later: hf upload "
            f"{options.hub_model_id or output.name} {output} --exclude 'checkpoint-*'"
        ) from error
    return str(address)
