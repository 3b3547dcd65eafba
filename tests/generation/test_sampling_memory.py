"""What sampling holds is foreseen for the device that does it."""

from collections.abc import Callable
from pathlib import Path

from capstan.generation.model import open_model
from capstan.generation.planning.batching import Length, shape_for
from capstan.generation.planning.memory import extent_of, workspace_of
from capstan.generation.planning.placement import Placement


def test_more_is_foreseen_for_sampling_on_a_gpu_than_on_a_processor(
    model_folder: Callable[[str], Path],
) -> None:
    lengths, rows = [Length(prompt=3, new=4)], 100_000
    shape = shape_for(lengths, slots=1, batches=1, chunk_tokens=3)
    workspaces = []
    for device_type in ("cpu", "cuda"):
        model = open_model(model_folder("llama"), device_type=device_type)
        placement = Placement(
            weights=dict.fromkeys(model.manifest.placeable, "device"),
            cache=("device",) * model.num_layers,
            activations="device",
            host_attention=0.0,
        )
        workspaces.append(workspace_of(model, placement, shape, extent_of(shape, lengths), logit_rows=rows))
    # Sorting holds its keys and values twice there: at least 16 bytes a logit more, 20 were measured.
    assert workspaces[1] - workspaces[0] >= 20 * rows * model.meta_model.vocabulary_size
