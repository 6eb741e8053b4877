"""What the costs of adapters should be at most, beside other variants: the goals on the page of costs."""

from __future__ import annotations

from dataclasses import dataclass

FIGURES = {  # figure -> what it is, in the goals
    "step": "step time",
    "kept": "kept for backward",
    "eval": "eval forward",
    "flops": "FLOPs",
    "operators": "operators",
    "launches": "launches",
}


@dataclass(frozen=True)
class Goal:
    """At most ``limit`` times what another variant costs; in the tables whose name begins with ``table``."""

    variant: str
    figure: str
    against: str
    limit: float
    table: str = ""


_LORA, _WEIGHT_SPACE = ("lora", "flora"), ("liera", "liera(order=exp)", "superlora")
GOALS = (
    *(Goal(f"diffadapt:{m}", "step", "peft:lora", 1.03) for m in _LORA),
    *(Goal(f"diffadapt:{m}", "kept", "peft:lora", 1.0, t) for t in ("attention", "batch4") for m in _LORA),
    *(Goal(f"diffadapt:{m}", "kept", "peft:lora", 1.05, "conv") for m in _LORA),
    *(Goal(f"diffadapt:{m}", f, "peft:lora", 1.0) for f in ("flops", "operators", "launches") for m in _LORA),
    Goal("diffadapt:flora", "step", "lycoris:tucker-bypass", 1.0),
    Goal("diffadapt:1lora", "step", "floor", 1.05),
    Goal("diffadapt:1lora", "kept", "floor", 1.01),
    Goal("diffadapt:dora", "step", "peft:lora", 1.25),
    *(Goal(f"diffadapt:{m}", "step", f"naive:{m}", 0.7) for m in _WEIGHT_SPACE),
    *(Goal(f"diffadapt:{m}", "step", "peft:hira", 0.7) for m in _WEIGHT_SPACE),
    *(Goal(f"diffadapt:{m}", "step", "peft:lora", 1.6, "batch4") for m in _WEIGHT_SPACE),
    *(Goal(f"diffadapt:{m}", "kept", "peft:lora", 1.05) for m in (*_WEIGHT_SPACE, "loha", "lokr")),
    Goal("diffadapt:loha", "step", "peft:lora", 1.5),
    Goal("diffadapt:lokr", "step", "peft:lora", 1.2),
    *(Goal(f"merged:{m}", f, "floor", 1.0) for f in ("step", "eval") for m in _LORA),
)
SLACK = {"step": 0.02, "eval": 0.02}  # what two runs of the same model differ by
