"""Optimisers that watch the forward passes of a model: what they see enters their steps."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from matrigami.curvature import ModelWatch
from matrigami.operators import BlockView
from matrigami.optim._method import State
from matrigami.optim._optimizer import MatrixOptimizer, listed
from matrigami.optim._plan import planned, views_of
from matrigami.optim.distributed import Update


class WatchingOptimizer(MatrixOptimizer):
    """A `MatrixOptimizer` with an estimator of what layers see.

    Every `statistics_every` steps the batches of one are watched; `direction` finds the moments in
    the state that it is given, as `A_now`, `B_now`. A subclass makes the estimator, and calls
    `watch`. Without one nothing is watched.
    """

    estimator: ModelWatch | None = None
    _names: Mapping[str, Tensor] = {}
    _outside: Sequence[Tensor] = ()
    _warned = False

    def watch(self, estimator: ModelWatch) -> None:
        """Watch the weights that take this method by an estimator, from now on."""
        self.register_load_state_dict_post_hook(_resume)
        self.estimator, self._names = estimator, {}
        self._estimate_more(estimator, [p for p, view in self.matrices() if view is not None])
        self.defaults["watching"] = True
        self._look(self.param_groups[0]["clock"])

    @property
    def reads_gradients_only(self) -> bool:
        """Unless a model is watched."""
        return self.estimator is None

    def matrices(self) -> list[tuple[Tensor, BlockView | None]]:
        """Every parameter with its view."""
        groups = self.param_groups
        return [pair for g in groups for pair in zip(g["params"], g["views"], strict=True)]

    def visible(self, chosen: list[Tensor]) -> list[Tensor]:
        """Which of some weights can be watched."""
        return chosen

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch does; weights of the model that is watched are watched, of others it warns."""
        if self.estimator is not None and "views" not in param_group:
            param_group |= self._views_of(self.estimator.model, param_group["params"])
        super().add_param_group(param_group)
        if self.estimator is not None:
            group = self.param_groups[-1]
            pairs = zip(group["params"], group["views"], strict=True)
            self._estimate_more(self.estimator, [p for p, view in pairs if view is not None])

    def _views_of(self, model: nn.Module, parameters: Any) -> dict[str, Any]:
        """What the plan of a model knows of parameters; nothing if one is not of it."""
        known = {row.parameter: row for row in planned(model, type(self), self.defaults).rows}
        given = [p[1] if isinstance(p, tuple) else p for p in listed(parameters)]
        if any(p not in known for p in given):
            return {}
        return views_of([known[p] for p in given])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of an optimiser that watches a model would watch nothing.

        Raises:
            ValueError: If the original does.
        """
        name = type(self).__name__
        if state.get("defaults", {}).get("watching"):
            raise ValueError(
                f"copy of {name}: it watches a model; the copy would watch nothing.\n"
                f"Make another {name} of the copied model, and load the state_dict of this one."
            )
        super().__setstate__(state)

    def taken(self, gradients: Collection[Tensor]) -> dict[Tensor, State]:
        """What was seen since the last step, for those parameters of which something was."""
        if self.estimator is None:
            return {}
        self._expect_a_pass(self.estimator, gradients)
        sides = [f"{side}_now" for side in self.estimator.sides]
        found = self.estimator.take()
        return {self._names[n]: dict(zip(sides, Ms, strict=True)) for n, Ms in found.items()}

    def _updates(
        self, gradients: dict[Tensor, Tensor], observed: Mapping[Tensor, State] | None = None
    ) -> list[Update]:
        """Those of what was observed since the last step; then look at the next batches."""
        observed = {**(observed or {}), **self.taken(gradients)}
        self._expect_all_inside(gradients, observed)
        updates = super()._updates(gradients, observed)
        self._look(self.param_groups[0]["clock"])
        return updates

    def _estimate_more(self, estimator: ModelWatch, chosen: list[Tensor]) -> None:
        """Watch some more weights, and know their names."""
        names = {id(p): name for name, p in estimator.model.named_parameters()}
        self._outside = [*self._outside, *(p for p in chosen if id(p) not in names)]
        chosen = self.visible([p for p in chosen if id(p) in names])
        estimator.extend(chosen)
        self._names = {**self._names, **{names[id(p)]: p for p in chosen}}

    def _expect_a_pass(self, estimator: ModelWatch, gradients: Collection[Tensor]) -> None:
        """Say so, once, if the model, or some of its weights, are trained without being seen."""
        if estimator.clock is None or self._warned or estimator.rejected:
            return
        unseen = [n for n, p in self._names.items() if p in gradients and n not in estimator.names]
        self._warned = bool(unseen)
        if unseen:
            what = f"no call of the layers of {', '.join(unseen[:8])}"
            warnings.warn(
                f"{type(self).__name__} saw "
                f"{what if estimator.seen else 'no forward pass of its model'} in "
                "training mode before this step: its curvature stays as it is. "
                "Call the model itself, not a part of it, and its layers as modules.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _expect_all_inside(
        self, gradients: Collection[Tensor], observed: Collection[Tensor]
    ) -> None:
        """Say so, at their first step, of weights that the model has not and nobody told of."""
        unknown = [p for p in self._outside if p in gradients and p not in observed]
        self._outside = [p for p in self._outside if p not in gradients]
        if unknown and self.estimator is not None:
            name, model = type(self).__name__, type(self.estimator.model).__name__
            warnings.warn(
                f"{name} watches a {model}; weights of shapes "
                f"{', '.join(str(tuple(p.shape)) for p in unknown[:8])} are not of it. "
                "What their layers see is not known, and their steps are those without it. "
                f"Give {name} a model that holds them, or their group 'views': [None, ...] for "
                "Adam.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _look(self, clock: int) -> None:
        """Watch the batches of the step after this one, if its turn has come."""
        if self.estimator is None:
            return
        if clock % self.param_groups[0]["statistics_every"]:
            self.estimator.stop()
        else:
            self.estimator.start(clock)


def _resume(optimizer: Any) -> None:
    """After a state was loaded, watch the batches that it would have watched."""
    optimizer._look(optimizer.param_groups[0]["clock"])
