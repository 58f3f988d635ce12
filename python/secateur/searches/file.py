"""The checkpoint file of a search: its history, and the models that are still needed."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import InvalidArgument
from ..families.registry import family_of
from ..files import container
from ..surgery.structure import Structure
from .result import Round

if TYPE_CHECKING:
    pass


_KIND = "search"


@dataclass(frozen=True)
class SearchFile:
    """The checkpoint: the history and, with fine-tuning, the models that are still needed."""

    path: Path
    settings: Mapping[str, Any]
    origin: Mapping[str, Any]

    def of_round(self, number: int) -> Path:
        """Return the path of the checkpoint for one round's training."""
        return self.path.with_name(f"{self.path.stem}.round{number}.safetensors")

    def write(self, history: Iterable[Round], models: Mapping[int, nn.Module], dense: nn.Module) -> None:
        """Write the rounds, and the models by the number of their round."""
        tensors: dict[str, Tensor] = {}
        shapes = {}
        for number, model in sorted(models.items()):
            tensors |= {f"{number}.{name}": value for name, value in model.state_dict().items()}
            shapes[str(number)] = structure_of(model, dense).to_dict()
        header = {
            "settings": self.settings,
            "origin": self.origin,
            "history": [asdict(row) for row in history],
            "models": shapes,
        }
        container.write(self.path, _KIND, header, tensors)

    def read(self, dense: nn.Module) -> tuple[list[Round], dict[int, nn.Module]]:
        """Return the history and the models; nothing is changed.

        Raises:
            InvalidArgument: the file is damaged, or belongs to another search.
        """
        header, tensors = container.read(self.path, _KIND)
        with container.understood("resume: expected the file of this search"):
            return self._matched(dense, header, tensors)

    def _matched(
        self, dense: nn.Module, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[list[Round], dict[int, nn.Module]]:
        # As they would come back from JSON.
        mine = json.loads(json.dumps({"settings": self.settings, "origin": self.origin}))
        for what in ("settings", "origin"):
            for name, value in mine[what].items():
                found = header[what].get(name)
                if found != value:
                    shown = "others" if what == "origin" else f"{found!r} where it is {value!r} now"
                    raise InvalidArgument(f"resume: expected the file of this search, got one with {name}: {shown}")
        models = {}
        for number, shape in header["models"].items():
            state = {n.removeprefix(f"{number}."): t for n, t in tensors.items() if n.startswith(f"{number}.")}
            models[int(number)] = rebuilt(dense, Structure.from_dict(shape), state)
        return [Round(**row) for row in header["history"]], models


def structure_of(model: nn.Module, dense: nn.Module) -> Structure:
    """Return the structure of a model that was made from the dense one."""
    return Structure.of(model, family_of(model).inspect(model), dict(dense.named_parameters()))


def rebuilt(dense: nn.Module, structure: Structure, state: Mapping[str, Tensor]) -> nn.Module:
    """Rebuild a model from a file: copy the dense model, apply the structure, then set its values."""
    model = copy.deepcopy(dense)
    structure.apply(model)
    model.load_state_dict(state)
    return model
