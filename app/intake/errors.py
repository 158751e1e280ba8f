"""What can be wrong with the model, the text or the images that a request names."""

from __future__ import annotations

from app.shared.errors import ServiceError


class InputRefused(ServiceError):
    """The model or the data cannot be used. `path` is the field of the request that names it."""

    type = "input-refused"
    title = "The model or the data cannot be used"

    def __init__(self, path: str, detail: str) -> None:
        super().__init__(detail)
        self.path = path


class ModelRefused(InputRefused):
    type = "model-refused"
    title = "The model cannot be used"


class ModelNotFound(InputRefused):
    type = "model-not-found"
    title = "The model, revision or file does not exist"


class DatasetRefused(InputRefused):
    type = "dataset-refused"
    title = "The text or the images cannot be used"


class DatasetNotFound(InputRefused):
    type = "dataset-not-found"
    title = "The text or the set of images does not exist"


class HubUnreachable(InputRefused):
    """The hub did not answer, or failed: the same request may succeed later."""

    type = "hub-unreachable"
    title = "The model hub did not answer"
