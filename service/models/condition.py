"""The condition of a module tree, and what a request changed in it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)

PARAMETERS_CHANGED = "parameters changed in place"

Hooks = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Condition:
    """Everything about a module tree that a request must leave as it found it.

    hooks:      the ids of the hooks of each module, and of each parameter's own gradient hooks. A
                model may own some (`weight_norm` does), so the proof is equality, not emptiness.
    training:   the mode of each module.
    frozen:     `requires_grad` of each parameter.
    parameters: the version counter of each parameter: in-place writes raise it.
    buffers:    likewise of each buffer, running statistics above all.
    gradients:  the names of parameters that hold a `.grad`.
    """

    hooks: Hooks
    training: tuple[bool, ...]
    frozen: tuple[bool, ...]
    parameters: tuple[int, ...]
    buffers: tuple[int, ...]
    gradients: tuple[str, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Condition:
        parameters = list(module.named_parameters())
        return cls(
            hooks=hooks_of(module),
            training=tuple(each.training for each in module.modules()),
            frozen=tuple(p.requires_grad for _, p in parameters),
            parameters=tuple(p._version for _, p in parameters),
            buffers=tuple(b._version for b in module.buffers()),
            gradients=tuple(name for name, p in parameters if p.grad is not None),
        )

    def faults(self, after: Condition) -> list[str]:
        """What differs in `after`, as words for the log; empty where the replica is clean."""
        found = {
            "hooks left or removed": self.hooks != after.hooks,
            "training mode changed": self.training != after.training,
            "requires_grad changed": self.frozen != after.frozen,
            PARAMETERS_CHANGED: self.parameters != after.parameters,
            "buffers changed in place": self.buffers != after.buffers,
            "gradients left": self.gradients != after.gradients,
        }
        return [fault for fault, is_so in found.items() if is_so]


def hooks_of(module: nn.Module) -> Hooks:
    """The ids of all hooks: one tuple a module, then one a parameter."""
    return (
        *(
            tuple(hook for table in _HOOK_TABLES for hook in list(getattr(each, table)))
            for each in module.modules()
        ),
        *(tuple(parameter._backward_hooks or ()) for parameter in module.parameters()),
    )
