"""The residual multilayer perceptron of the studies.

Source: Bachmann et al. (2023), arXiv:2306.13575; Qiu et al. (2024), arXiv:2406.06248.

Shapes: b = examples, f = features of an example.
"""

from jaxtyping import Float
from torch import Tensor, nn

from matrigami.studies._config import RunConfig
from matrigami.studies.models._base import Makers, Network, all_macs, refuse_text
from matrigami.studies.tasks import Shape


class MLP(Network):
    """Input layer, GELU, residual blocks, head.

    Args:
        config: Width, and the number of blocks.
        shape: Sizes of the task.
        make: Makes its layers.

    Raises:
        ValueError: If the task is a text.
    """

    def __init__(self, config: RunConfig, shape: Shape, make: Makers) -> None:
        super().__init__()
        refuse_text("mlp", shape)
        self.width = config.width
        self.embed = make.outer(shape.features, self.width)
        self.blocks = nn.ModuleList([make.block(self.width) for _ in range(config.depth)])
        self.head = make.head(self.width, shape.outputs, zero_init=True)

    def forward(self, x: Float[Tensor, "b f"]) -> Float[Tensor, "b outputs"]:
        """Outputs of a batch."""
        x = nn.functional.gelu(self.embed(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def macs(self) -> int:
        """Multiply-adds of one forward pass of one example, in linear layers."""
        return all_macs(self)
