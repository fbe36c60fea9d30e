"""Ray Train's trainer without the two processes that this project has no use for.

Each Ray process wakes a hundred times a second and imports libraries for seconds when it starts;
on a machine whose cores all train, both are taken from the training.
"""

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

# workers read their streams themselves; when the controller dies, the command that started it
# fails, and with its job Ray gives the placement group back
UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)


class LeanTrainer(TorchTrainer):
    def _create_default_callbacks(self) -> list:
        """Ray Train has no setting for it."""
        return [one for one in super()._create_default_callbacks() if not isinstance(one, UNUSED)]
