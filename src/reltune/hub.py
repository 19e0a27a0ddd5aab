"""What the Hugging Face Hub has of a model that is no local directory, asked before torch and transformers are loaded."""

from __future__ import annotations

import os

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def hub_problem(name: str) -> str | None:
    """Why a model that is no local file or directory cannot be had; None where it was downloaded before, or may be.

    The Hub is asked once for its config.json. An answer that is late, or a fault of the server's, says nothing of the model: what loads it
    tries again.
    """
    if os.path.exists(name):
        return None
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    missing = f"{name!r} is no local directory"
    try:
        if try_to_load_from_cache(name, "config.json") is not None:
            return None
        if is_offline_mode():
            variable = next((variable for variable in OFFLINE if os.environ.get(variable)), OFFLINE[0])
            return (
                f"{missing} and was not downloaded before, and {variable} is set; check the path or id, or unset {variable} to load it "
                "from the Hugging Face Hub."
            )
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except (RepositoryNotFoundError, EntryNotFoundError, HFValidationError):
        return (
            f"{missing} and no model of the Hugging Face Hub that can be loaded; check the path or id, and your login if access is "
            "restricted."
        )
    except Exception as error:
        if type(error).__name__ in (
            "ConnectError",
            "ProxyError",
        ):  # of httpx, or of httpx2, whichever huggingface_hub has
            return (
                f"{missing} and was not downloaded before, and {constants.ENDPOINT} cannot be reached; check the path or id, and the "
                "network."
            )
    return None
