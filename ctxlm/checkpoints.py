"""What a run goes on from when it was killed: states beside it, the latest two, gone once the run is written."""

import json
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctxlm.files import atomic
from ctxlm.progress import say

KEPT = 2
"""So many steps are kept: should the latest be damaged, the one before is gone on from."""
SLOW, SHARE = 1.0, 0.02
"""A state that takes more than so many seconds to write may take this share of the time, and no more."""


class Checkpoints:
    """States of one piece of work by step, as `<folder>/<step>.safetensors`.

    A state is nested dictionaries, lists and numbers, with tensors anywhere among them. Nothing is unpickled.
    """

    def __init__(self, folder: Path, key: str):
        """`key` says what the states depend on: those of another key are not gone on from."""
        self.folder, self.key = folder, key
        self.took, self.written = 0.0, time.monotonic()

    def save(self, step: int, state: Any) -> None:
        """Keep a state, and of the earlier ones the latest, unless writing it took too long a share of the time.

        A full disk is said, and stops nothing.
        """
        began = time.monotonic()
        if self.took > max(SLOW, SHARE * (began - self.written)):
            return
        tensors: dict[str, Tensor] = {}
        places: dict[int, str] = {}
        head = {"key": self.key, "state": json.dumps(_taken_apart(state, tensors, places)), "sum": _checksum(tensors)}
        try:
            with atomic(self._path(step)) as path:
                save_file(tensors, path, head)
        except (OSError, SafetensorError) as error:
            say(f"{self.folder} cannot be written to ({error}): if this run is stopped, it begins anew")
            return
        for old in self._paths()[KEPT:]:
            old.unlink(missing_ok=True)
        self.written = time.monotonic()
        self.took = self.written - began

    def load(self, device: torch.device | str = "cpu") -> Any:
        """The latest state that is whole, its tensors on `device`; None where there is none to go on from.

        Those that cannot be gone on from are deleted, so that none is taken for a later one.
        """
        for path in self._paths():
            try:
                with safe_open(path, "pt", str(device)) as file:
                    head = file.metadata()
                    if head["key"] != self.key:
                        say("The checkpoint here is of other parameters, code or data: this run begins anew")
                        break
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if head["sum"] != _checksum(tensors):
                    raise ValueError("its content is another")
                return _put_together(json.loads(head["state"]), tensors)
            except (OSError, SafetensorError, LookupError, TypeError, ValueError):
                say(f"Checkpoint {path.name} is damaged and not gone on from")
        self.clear()
        return None

    def clear(self) -> None:
        """Forget them all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:04}.safetensors"

    def _paths(self) -> list[Path]:
        """The latest first."""
        return sorted(self.folder.glob("[0-9]*.safetensors"), reverse=True)


def _checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 of all their bytes: after a power failure a file may be whole in length alone."""
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy(), found)
    return str(found)


def _taken_apart(value: Any, tensors: dict[str, Tensor], places: dict[int, str]) -> Any:
    """`value` as JSON has it; its tensors go to `tensors`, one that occurs twice a single time (`places`, by id)."""
    if isinstance(value, Tensor):
        name = places.setdefault(id(value), str(len(places)))
        tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):  # JSON's own have no numbers as keys, which an optimiser's state has
        return {"dict": [[key, _taken_apart(own, tensors, places)] for key, own in value.items()]}
    if isinstance(value, list | tuple):
        return [_taken_apart(own, tensors, places) for own in value]
    return value


def _put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_put_together(own, tensors) for own in value]
    if isinstance(value, dict) and "tensor" in value:
        return tensors[value["tensor"]]
    return {key: _put_together(own, tensors) for key, own in value["dict"]} if isinstance(value, dict) else value
