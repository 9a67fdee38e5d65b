"""The networks of official pickles as inert records.

`torch_utils.persistence` of StyleGAN 2 ADA and StyleGAN 3 stores a module as (class name, attributes, source text);
`tfutil.Network` of progressive GAN and `dnnlib.tflib.network.Network` of StyleGAN 1 store (build function, arguments,
components, variables, source text). The source text, which the original programs execute, is dropped unread.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lightning_modules.pickled_tensors import NUMPY, TENSORS, ArrayRecord, DictRecord, TensorRecord, nested_storage
from lightning_modules.safe_pickle import Constructor, Record, read_pickle, text_keys

LONGEST_NAME = 300


@dataclass(frozen=True)
class ModuleRecord:
    """A torch module: the name of its class and its attributes."""

    class_name: str
    attributes: dict[str, Any]

    def child(self, *names: str) -> ModuleRecord | None:
        """Give the module at this path, if there is one."""
        module: Any = self
        for name in names:
            module = dict_of(module.attributes.get("_modules"), "_modules").get(name)
            if type(module) is not ModuleRecord:
                return None
        return module if type(module) is ModuleRecord else None

    def tensors(self) -> dict[str, Tensor]:
        """Read all parameters and buffers: dotted name -> tensor.

        Raises:
            ValueError: if a parameter is no tensor, or a module occurs twice (or contains itself).
        """
        state: dict[str, Tensor] = {}
        waiting: list[tuple[str, Any]] = [("", self)]
        seen: set[int] = set()
        while waiting:
            prefix, module = waiting.pop()
            if type(module) is not ModuleRecord or id(module) in seen or len(prefix) > LONGEST_NAME:
                raise ValueError(f"{prefix[:LONGEST_NAME]!a} is not a module, occurs twice, or lies too deep")
            seen.add(id(module))
            for group in ("_parameters", "_buffers"):
                for name, record in dict_of(module.attributes.get(group), group).items():
                    if type(record) is TensorRecord:
                        state[prefix + name] = record.read()
                    elif record is not None:
                        raise ValueError(f"{(prefix + name)[:LONGEST_NAME]!a} is not a tensor")
            children = dict_of(module.attributes.get("_modules"), "_modules")
            waiting += [(f"{prefix}{name}.", child) for name, child in children.items()]
        return state


def module_record(meta: Any) -> ModuleRecord:
    """Take what `torch_utils.persistence` stores of a module."""
    meta = dict_of(meta, "the description of a persistent object")
    if meta.get("type") != "class" or type(meta.get("class_name")) is not str:
        raise ValueError("a persistent object is not the instance of a class")
    return ModuleRecord(meta["class_name"], dict_of(meta.get("state"), "the state of a persistent object"))


class NetworkRecord(Record):
    """A network of the TensorFlow programs."""

    def __init__(self) -> None:
        self.function = ""
        self.arguments: dict[str, Any] = {}
        self.components: dict[str, Any] = {}
        self.variables: dict[str, npt.NDArray[Any]] = {}

    def set_state(self, state: Any) -> None:
        """Take the state of version 2 (progressive GAN) or 3 (StyleGAN 1)."""
        state = dict_of(state, "the state of a network")
        if state.get("version") not in (2, 3):
            raise ValueError("the version of a network is neither 2 (progressive GAN) nor 3 (StyleGAN 1)")
        self.function = text_keys([state.get("build_func_name")])[0]
        self.arguments = dict_of(state.get("static_kwargs"), "static_kwargs")
        self.components = dict_of(state.get("components", {}), "components")
        for name, value in state.get("variables", ()):
            if type(value) not in (ArrayRecord, int, float):
                raise ValueError("a variable is not an array")
            array = value.value if type(value) is ArrayRecord else np.asarray(value, np.float32)
            self.variables[text_keys([name])[0]] = array


def text_set(items: Any = ()) -> set[str]:
    """Make a set of texts, the only ones that occur."""
    return set(text_keys(list(items)))


OFFICIAL: dict[str, Constructor] = {
    **NUMPY,
    **TENSORS,
    "builtins set": text_set,
    "dnnlib.util EasyDict": DictRecord,
    "dnnlib.tflib.network Network": NetworkRecord,
    "tfutil Network": NetworkRecord,
    "torch.storage _load_from_bytes": nested_storage,
    "torch_utils.persistence _reconstruct_persistent_obj": module_record,
}


def read_network_pickle(data: bytes) -> Any:
    """Read a network pickle.

    Raises:
        ValueError: as `read_pickle`, and for bytes behind the end.
    """
    stream = io.BytesIO(data)
    content = read_pickle(stream, OFFICIAL)
    if stream.tell() != len(data):
        raise ValueError(f"byte {stream.tell()}: {len(data) - stream.tell()} bytes follow the end of the pickle")
    return content


def dict_of(value: Any, what: str) -> dict[str, Any]:
    """Let a dict pass."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is a {type(value).__name__}, but should be a dict")
    return value
