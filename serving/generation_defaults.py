"""The sampling defaults that a model brings with it, in its generation_config.json.

Invariant: what is returned would pass as a request's own fields.
"""

from typing import Any

from pydantic import ValidationError
from transformers import GenerationConfig

from serving.api.request_schema import GenerationBody
from serving.models.errors import UnsupportedModelError, refusing
from serving.models.model_files import find_model

_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def generation_defaults(name: str) -> dict[str, Any]:
    """Those that the file sets; none for a model without the file. Raises UnsupportedModelError."""
    source = find_model(name).source
    with refusing(name, "has a generation_config.json that cannot be read"):
        try:
            config = GenerationConfig.from_pretrained(source)
        except OSError:
            return {}
    found = {field: value for field in _FIELDS if (value := getattr(config, field, None)) is not None}
    try:
        GenerationBody.model_validate(found)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        field = fault["loc"][0]
        raise UnsupportedModelError(
            f"model {name!r} has {field}={found[str(field)]!r} in its generation_config.json, so no request "
            f"could leave it out: {fault['msg']}. Correct it, or set serving.generation_config='none'"
        ) from None
    return found
