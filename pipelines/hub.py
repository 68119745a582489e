"""From a checkpoint's name to a local folder: a path, or a model hub's id that is fetched.

Belongs here: finding files. Does not belong here: what must lie in them.
"""

from __future__ import annotations

from pathlib import Path


class CheckpointError(FileNotFoundError):
    """A checkpoint, or a file of it, is missing; the message names it and the command that fetches or makes it."""


def local_folder(what: str, option: str, checkpoint: str, names: tuple[str, ...] = ()) -> Path:
    """Return the folder of `checkpoint`, a local path or a hub id; a local path may be missing.

    Args:
        what: who needs it, for the error, e.g. "scorer 'clip'".
        option: the configuration's option that names it.
        names: the files to fetch from the hub; empty: all.

    Raises:
        CheckpointError: it is a hub id that cannot be had.
    """
    folder = Path(checkpoint)
    if folder.is_absolute() or checkpoint.startswith(".") or folder.exists():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(checkpoint, allow_patterns=list(names) or None))
    except Exception as error:
        # The hub's client raises many unrelated types: network, authorisation, unknown names, offline mode.
        raise CheckpointError(
            f"{what}: {checkpoint!r} is neither a local folder nor to be had from the hub ({type(error).__name__}: {error}); "
            f"run `hf download {checkpoint} --local-dir FOLDER` where the hub can be reached and set {option} to FOLDER"
        ) from error
