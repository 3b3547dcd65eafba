"""What cannot be trained together, said before anything is exchanged."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from capstan.data_parallel.algorithm import Algorithm
from capstan.errors import UsageError


def require_trainable(
    model: nn.Module,
    optimizer: Optimizer | None,
    algorithm: Algorithm,
    *,
    bucket_bytes: int,
    patience_s: float,
) -> None:
    """Refuse models, optimizers and algorithms that do not fit each other.

    Raises:
        UsageError: says what was found, and what to do.
    """
    if isinstance(model, DistributedDataParallel | DataParallel) or hasattr(model, "algorithm_state"):
        raise UsageError(
            f"The model is wrapped already, by {type(model).__name__}. Wrap the model itself, once."
        )
    if not isinstance(algorithm, Algorithm):
        raise UsageError(
            f"An algorithm is a name or an Algorithm, found {type(algorithm).__name__}: {algorithm!r}."
        )
    if bucket_bytes < 1:
        raise UsageError(f"A bucket needs at least a byte, found bucket_bytes={bucket_bytes}.")
    if not patience_s > 0:
        raise UsageError(f"Waiting for another rank takes some time, found patience_s={patience_s}.")
    trained = [each for each in model.parameters() if each.requires_grad]
    if not trained:
        raise UsageError("No parameter of the model is trained: nothing is to be exchanged.")
    for name, each in model.named_parameters():
        if each.is_meta:
            raise UsageError(
                f"The parameter {name} is on the meta device, without values. Load weights first."
            )
        if each.requires_grad and not each.dtype.is_floating_point:
            raise UsageError(
                f"The parameter {name} is {each.dtype}; gradients of real floating-point numbers are "
                "exchanged. Keep complex numbers as pairs, and view them with torch.view_as_complex."
            )
    for name, each in model.named_modules():
        if isinstance(each, nn.Embedding | nn.EmbeddingBag) and each.sparse:
            raise UsageError(
                f"The layer {name or 'itself'} has sparse gradients, which are not exchanged. Make it with "
                "sparse=False."
            )
    if optimizer is None:
        if algorithm.needs_optimizer:
            raise UsageError(
                f"{algorithm.name} works around the optimizer's step: wrap(model, optimizer, …)."
            )
        return
    if not isinstance(optimizer, Optimizer):
        raise UsageError(f"Wanted a torch optimizer, found {type(optimizer).__name__}: {optimizer!r}.")
    moved = {id(each) for group in optimizer.param_groups for each in group["params"]}
    if not moved & {id(each) for each in trained}:
        raise UsageError(
            "The optimizer moves none of the model's parameters. Make it from this model's parameters()."
        )
