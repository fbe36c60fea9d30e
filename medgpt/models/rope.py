"""Extend the rotary positions of a model beyond those that it was trained on."""

from transformers import PreTrainedConfig

from medgpt.config.base import ModelError
from medgpt.config.model import RopeScalingConfig


def scale_rope(hf_config: PreTrainedConfig, scaling: RopeScalingConfig, name: str) -> None:
    """Change the config of model `name` in place, as its export will carry it.

    Raises ConfigError if the model has no rotary positions, several kinds, or scaled ones.
    """
    text = hf_config.get_text_config()
    tree = text.to_dict()
    rope, positions = tree.get("rope_parameters"), tree.get("max_position_embeddings")
    if not rope or "rope_theta" not in rope or positions is None:
        kinds = "several kinds of rotary positions" if rope else "no rotary positions"
        raise ModelError(name, f"the model has {kinds}; leave out model.rope_scaling")
    if rope["rope_type"] != "default":
        raise ModelError(
            name,
            f"its rotary positions are already scaled ({rope['rope_type']}, {positions} "
            "positions); leave out model.rope_scaling",
        )
    original = scaling.original_positions or positions
    scaled = {**rope, "rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "yarn":
        scaled["original_max_position_embeddings"] = original
    text.rope_parameters = scaled
    text.max_position_embeddings = int(original * scaling.factor)
