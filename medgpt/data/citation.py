"""The publication that a medical fact or rule is based on."""

from pydantic import BaseModel, ConfigDict


class Citation(BaseModel):
    """A guideline or textbook."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    title: str
    publisher: str
    year: int
