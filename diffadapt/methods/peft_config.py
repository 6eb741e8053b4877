"""A method of Hugging Face's PEFT by its type: ``peft:OFT(r=4)``. The arithmetic is PEFT's own."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from diffadapt.common.messages import did_you_mean
from diffadapt.methods.base import Method
from diffadapt.methods.site import LayerKind

if TYPE_CHECKING:
    from peft import PeftConfig

PREFIX = "peft:"
# what other keys of a configuration are chosen by diffadapt
_OURS = ("target_modules", "exclude_modules", "peft_type", "task_type", "modules_to_save")


@dataclass(frozen=True)
class PeftMethod(Method):
    """A PEFT type and the options of its configuration, by PEFT's own names.

    While attached, the layers are PEFT's wrappers; everything else is as with our own methods.
    """

    kinds: ClassVar[frozenset[LayerKind]] = frozenset({"linear", "conv", "embedding", "norm"})
    learning_rate: ClassVar[float] = 5e-4

    type: str = "LORA"
    options: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return PREFIX + self.type

    @property
    def settings(self) -> dict:
        return dict(self.options)

    @property
    def config(self) -> dict:
        return self.settings

    def configuration(self, targets: str) -> PeftConfig:
        """PEFT's configuration for the layers that match the pattern ``targets``.

        Raises: ValueError for an unknown option; ImportError with the remedy where PEFT is not installed.
        """
        cls = config_class(self.type)
        try:
            return cls(target_modules=targets, **self.options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.name}: {error}") from error


def parse_peft_spec(text: str) -> tuple[str, dict]:
    """Type and options of ``peft:OFT(r=4, coft=true)``; values are Python literals or bare words."""
    try:
        call = ast.parse(text.removeprefix(PREFIX).strip(), mode="eval").body
        if isinstance(call, ast.Name):
            return call.id, {}
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise ValueError("no type with options by name")
        return call.func.id, {str(item.arg): _literal(item.value) for item in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} is not a type of PEFT with options; write e.g. peft:OFT(r=4)") from error


def _literal(node: ast.expr) -> object:
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "none": None}.get(node.id.lower(), node.id)
    return ast.literal_eval(node)


def make_peft_method(kind: str, options: dict, given: dict) -> PeftMethod:
    """A method from a type, the options of its text and those given by name; ``rank`` is PEFT's ``r``.

    Raises: ValueError for an unknown type or option, naming near ones.
    """
    known = [name for name in config_class(kind.upper()).__dataclass_fields__ if name not in _OURS]
    own = {
        ("r" if key == "rank" and "r" in known else key): value for key, value in (given | options).items()
    }
    for option in own:
        if option not in known:
            raise ValueError(f"{PREFIX}{kind} has no option {option!r}{did_you_mean(option, known)}")
    method = PeftMethod(kind.upper(), own)
    method.configuration("none")
    return method


def config_class(kind: str) -> type[PeftConfig]:
    """The configuration of a PEFT type. Raises ImportError without PEFT, ValueError for no type."""
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise ImportError(f"{PREFIX}{kind} needs PEFT; install it with: pip install peft") from error
    types = {str(getattr(key, "value", key)): cls for key, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in types:
        raise ValueError(f"PEFT has no type {kind!r}{did_you_mean(kind, types)}")
    return types[kind]
