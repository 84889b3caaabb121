"""A model with other parameters, as a function of them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def called_with(model: nn.Module, parameters: Mapping[str, Tensor], *inputs: Any) -> Any:
    """What a model gives with other parameters; its own are not touched.

    As `torch.func.functional_call` with tied parameters, but for modules that the model has in two
    places: there torch puts a tensor in the place of the parameter, and leaves it there.

    Args:
        model: The model.
        parameters: Tensors by the names of `model.named_parameters()`; the others stay.
        inputs: What the model is called with.

    Examples:
        >>> import torch
        >>> half = nn.Linear(1, 1, bias=False)
        >>> model = nn.Sequential(half, half)
        >>> called_with(model, {"0.weight": torch.tensor([[3.0]])}, torch.ones(1))
        tensor([9.])
        >>> half.weight is model[1].weight and isinstance(half.weight, nn.Parameter)
        True
    """
    first = {id(p): name for name, p in model.named_parameters()}
    every = {
        f"{prefix}.{key}" if prefix else key: parameters[first[id(p)]]
        for prefix, module in model.named_modules()
        for key, p in module.named_parameters(recurse=False, remove_duplicate=False)
        if first[id(p)] in parameters
    }
    return functional_call(model, every, inputs, tie_weights=False)
