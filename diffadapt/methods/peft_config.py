"""A method of Hugging Face's PEFT by its type: `peft:OFT(r=4)`. The arithmetic is PEFT's own."""

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
# options of PEFT's configurations that diffadapt sets itself
_RESERVED_OPTIONS = ("target_modules", "exclude_modules", "peft_type", "task_type", "modules_to_save")
_BARE_WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class PeftMethod(Method):
    """A PEFT type and the options of its configuration, by PEFT's own names.

    While attached, the layers are PEFT's wrappers; everything else works as with diffadapt's own methods.
    """

    kinds: ClassVar[frozenset[LayerKind]] = frozenset({"linear", "conv", "embedding", "norm"})
    learning_rate: ClassVar[float] = 5e-4
    library: ClassVar[str] = "peft"

    type: str = "LORA"
    options: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The type with its prefix, e.g. `peft:OFT`."""
        return PREFIX + self.type

    @property
    def settings(self) -> dict:
        return dict(self.options)

    @property
    def config(self) -> dict:
        return self.settings

    def configuration(self, targets: str) -> PeftConfig:
        """PEFT's configuration for the layers whose names match the pattern `targets`.

        Raises:
            ValueError: an option is unknown.
            ImportError: PEFT is not installed; says the remedy.
        """
        cls = config_class(self.type)
        try:
            return cls(target_modules=targets, **self.options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.name}: {error}") from error


def parse_peft_spec(text: str) -> tuple[str, dict]:
    """Splits `peft:OFT(r=4, coft=true)` into type and options; values are Python literals or bare words.

    Raises:
        ValueError: the text has another form.
    """
    try:
        call = ast.parse(text.removeprefix(PREFIX).strip(), mode="eval").body
        if isinstance(call, ast.Name):
            return call.id, {}
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise ValueError("no type with options by name")
        options = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
        return call.func.id, options
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} is not a type of PEFT with options; write e.g. peft:OFT(r=4)") from error


def _literal(node: ast.expr) -> object:
    if isinstance(node, ast.Name):
        return _BARE_WORDS.get(node.id.lower(), node.id)
    return ast.literal_eval(node)


def make_peft_method(peft_type: str, spec_options: dict, default_options: dict) -> PeftMethod:
    """Makes a method from a PEFT type; the option `rank` is PEFT's `r` where the type has that.

    Args:
        peft_type: the type's name in any case, e.g. `OFT`.
        spec_options: options set with the type.
        default_options: options for those that `spec_options` leaves out.

    Raises:
        ValueError: the type or an option is unknown; names near ones.
    """
    known_options = [
        name for name in config_class(peft_type.upper()).__dataclass_fields__ if name not in _RESERVED_OPTIONS
    ]
    options = {}
    for option, value in (default_options | spec_options).items():
        peft_option = "r" if option == "rank" and "r" in known_options else option
        options[peft_option] = value
    for option in options:
        if option not in known_options:
            raise ValueError(
                f"{PREFIX}{peft_type} has no option {option!r}{did_you_mean(option, known_options)}"
            )
    method = PeftMethod(peft_type.upper(), options)
    method.configuration("none")  # PEFT checks the values
    return method


def config_class(peft_type: str) -> type[PeftConfig]:
    """The class of a PEFT type's configuration.

    Raises:
        ImportError: PEFT is not installed; says the remedy.
        ValueError: the type is unknown.
    """
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise ImportError(f"{PREFIX}{peft_type} needs PEFT; install it with: pip install peft") from error
    classes = {}
    for key, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        classes[str(getattr(key, "value", key))] = cls  # PeftType members, or text that plug-ins registered
    if peft_type not in classes:
        raise ValueError(f"PEFT has no type {peft_type!r}{did_you_mean(peft_type, classes)}")
    return classes[peft_type]
