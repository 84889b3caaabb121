"""Our files through `AutoModelForCausalLM.from_pretrained`: a quantiser that transformers knows.

`save` writes into the `config.json` of a model of transformers what its layers are. The quantiser
puts such layers into the empty model, lets transformers load the tensors, and decodes what is
encoded. The weights lie in a file of another name than `model.safetensors`, so that a transformers
that was not told about us says that it finds none, instead of loading half of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from matrigami.compress._codes import decoded_value, recipe_from_json
from matrigami.compress._folder import OURS, sha256
from matrigami.compress._grid import QuantizedMatrix
from matrigami.compress._layers import key_of, view_of
from matrigami.compress._shrink import resize
from matrigami.compress._skeleton import KINDS, exchanges
from matrigami.compress._waterfill import LatticeMatrix
from matrigami.nn import separate_, swap

METHOD = "matrigami"
"""The name of the method in `config.json`."""

SHARED = ("version", "separated", "structures", "sizes", "tensors", "sha256")
"""What `config.json` has of the description of a folder."""


class EncodedLayer(nn.Module):
    """The tensors of a layer, some of them encoded, under the names that they have in a file.

    Args:
        layer: The layer, which comes back with `decoded`.
        encoded: By the names of its tensors empty ones for those that they are stored as.
    """

    def __init__(self, layer: nn.Module, encoded: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.layer, self.encoded = (layer,), tuple(encoded)  # no child
        for name, parts in encoded.items():
            setattr(self, name, nn.Module())
            for key, t in parts.items():
                self.get_submodule(name).register_buffer(key, t)
        for key in getattr(layer, "__constants__", ()):  # sizes, which code of the model may read
            setattr(self, key, getattr(layer, key))
        for key, p in layer.named_parameters():
            if key not in encoded:
                self.register_parameter(key, nn.Parameter(p.detach(), requires_grad=False))

    def decoded(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The layer with its numbers."""
        (layer,) = self.layer
        for key, t in {**tensors, **dict(self.named_parameters())}.items():
            setattr(layer, key, nn.Parameter(t.detach().contiguous()))
        return layer

    def decode(self, tensor: str, value: QuantizedMatrix | LatticeMatrix | Tensor) -> Tensor:
        """The numbers of one tensor."""
        if isinstance(value, Tensor):
            return value
        view = view_of(self.layer[0], tensor)
        if view is None:
            kind = type(self.layer[0]).__name__
            raise TypeError(f"{tensor} of a {kind} is no matrix, and cannot be decoded.")
        return view.merge(value.dense().reshape(view.stack))


def config_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` says of a folder."""
    return {"quant_method": METHOD} | {key: manifest[key] for key in SHARED}


def register_transformers() -> None:
    """Teach transformers, 5.20 or newer, to load the folders that `mg.save` writes.

    Afterwards `AutoModelForCausalLM.from_pretrained(folder)` and its relatives give the numbers of
    `mg.load(folder)`: structured layers stay structured, quantised and sparse ones become dense.
    The folder holds no code; a structure of your own has to be imported first. Calling it again
    does nothing.

    Raises:
        ValueError: If transformers is not installed, or too old.
    """
    try:
        from transformers.quantizers.auto import (  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
            AUTO_QUANTIZER_MAPPING,
            register_quantization_config,
            register_quantizer,
        )
    except ImportError as error:
        raise ValueError(
            f"register_transformers(): {error}.\nInstall it: pip install transformers."
        ) from error
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(_config_class())
        register_quantizer(METHOD)(_quantizer_class())


def _config_class() -> type:
    """The class of our part of `config.json`."""
    from transformers.utils.quantization_config import (  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
        QuantizationConfigMixin,
    )

    class MatrigamiConfig(QuantizationConfigMixin):
        """What the layers of a folder are."""

        def __init__(self, quant_method: str = METHOD, **told: Any) -> None:
            self.quant_method = quant_method
            self.__dict__.update(told)

    return MatrigamiConfig


def _quantizer_class() -> type:
    """The class that transformers calls before and after it loads tensors."""
    from transformers.quantizers import HfQuantizer  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    class MatrigamiQuantizer(HfQuantizer):
        """Puts the layers in place before loading, and decodes after it."""

        dtype: torch.dtype | None = None

        def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
            """Called first: the type of the model."""
            self.dtype = dtype
            return dtype

        def update_attn_implementation(self, config: Any) -> Any:
            """Called before the files are looked for: names ours."""
            config.transformers_weights = OURS
            return config

        def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
            """Exchange the layers of the empty model."""
            prepared(model, vars(self.quantization_config), Path(options["checkpoint_files"][0]))

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            """Decode; the model is one like any other from here on."""
            finished(model, vars(self.quantization_config), self.dtype)
            self.remove_quantization_config(model)
            vars(model.config).pop("transformers_weights", None)
            return model

        def is_serializable(self) -> bool:
            """By `mg.save`."""
            return False

        @property
        def is_trainable(self) -> bool:
            """As any other model."""
            return True

    return MatrigamiQuantizer


def prepared(model: nn.Module, told: Mapping[str, Any], path: Path) -> None:
    """Structured, smaller and encoded layers in the place of dense ones; nothing is loaded.

    Raises:
        ValueError: If the file is not the one that was written, or the model has no such layers.
    """
    if told["sha256"] != sha256(path):
        raise ValueError(f"{path}: it is not the file that was written: its hash differs.")
    if names := told.get("separated"):
        separate_(model, names)
    structures = {name: recipe_from_json(found) for name, found in told["structures"].items()}
    resize(model, exchanges(model, structures, told["sizes"], str(path)))
    named = dict(model.named_modules())
    with safe_open(path, framework="pt") as file:
        encoded: dict[nn.Module, dict[str, dict[str, Tensor]]] = {}
        for name in told["tensors"]:
            place, _, tensor = name.rpartition(".")
            layer = named.get(place)
            if layer is None or (tensor != "weight" and view_of(layer, tensor) is None):
                raise ValueError(f"{path}: the model has no layer with a tensor {name}.")
            encoded.setdefault(layer, {})[tensor] = _parts_of(file, name)
    swap(model, {layer: EncodedLayer(layer, parts) for layer, parts in encoded.items()})


def _parts_of(file: Any, name: str) -> dict[str, Tensor]:
    """The shapes and types of what an encoded tensor is made of."""
    keys = [key for key in file.keys() if key.rpartition(".")[0] == name]  # noqa: SIM118
    return {key.rpartition(".")[2]: _blank(file.get_tensor(key)) for key in keys}


def _blank(t: Tensor) -> Tensor:
    """Only its shape and type."""
    return torch.empty_like(t, device="meta")


@torch.no_grad()
def finished(model: nn.Module, told: Mapping[str, Any], dtype: torch.dtype | None) -> None:
    """Dense layers in the place of encoded ones, of a type or that which they had."""
    found: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, EncodedLayer):
            tensors = {t: _decoded(module, t, key_of(name, t), told, dtype) for t in module.encoded}
            found[module] = module.decoded(tensors)
    swap(model, found)


def _decoded(
    module: EncodedLayer,
    tensor: str,
    name: str,
    told: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> Tensor:
    """One tensor of a layer, of a type or that which it had."""
    description = told["tensors"][name]
    parts = dict(module.get_submodule(tensor).named_buffers())
    value = decoded_value(name, description, parts)
    return module.decode(tensor, value).to(dtype or KINDS.get(description.get("dtype", "")))
