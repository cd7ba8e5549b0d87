"""An operator of the FiftyOne App: `api_schemas.adapters.fiftyone.apply_explanations` as a form."""

from __future__ import annotations

import typing
from typing import Any

from fiftyone import operators
from fiftyone.operators import types

from api_schemas.adapters.fiftyone import apply_explanations
from api_schemas.client import URL
from api_schemas.options import Method, Verify


class ApplyExplanations(operators.Operator):  # type: ignore[misc]
    """Asks for every sample of the target view, at once or delegated."""

    @property
    def config(self) -> Any:
        return operators.OperatorConfig(
            name="apply_explanations",
            label="Explain with camserve",
            description="Predictions and their evidence: heatmaps, regions and peaks",
            allow_delegated_execution=True,
            dynamic=True,
        )

    def resolve_input(self, ctx: Any) -> Any:
        """The form; what is left empty is the service's own choice."""
        inputs = types.Object()
        address = ctx.secret("CAMSERVE_URL") or URL
        inputs.str("url", label="Service", default=address, required=True)
        inputs.str("field", label="Field", default="camserve", required=True)
        inputs.enum("method", typing.get_args(Method), label="Method", default="gradcam")
        inputs.str("model", label="Model", description="Empty: the service's first")
        inputs.str("layer", label="Layer", description="Empty: the model's target layer")
        inputs.float("threshold", label="Regions from", default=0.5, min=0, max=1)
        inputs.enum("verify", typing.get_args(Verify), label="Test the maps", default="false")
        ctx.target_view()  # FiftyOne then adds the choice of samples
        return types.Property(inputs, view=types.View(label="Explain with camserve"))

    def execute(self, ctx: Any) -> dict[str, int]:
        """Fill the fields; how many samples there were, and how many failed."""
        samples = ctx.target_view()
        names = ("model", "method", "layer", "threshold", "verify")
        given = {name: ctx.params.get(name) for name in names}
        options: Any = {name: value for name, value in given.items() if value not in (None, "")}
        failed = apply_explanations(
            samples,
            ctx.params.get("url") or URL,
            field=ctx.params.get("field") or "camserve",
            api_key=ctx.secret("CAMSERVE_API_KEY"),
            on_progress=lambda done, total: ctx.set_progress(done / (total or done)),
            **options,
        )
        if not ctx.delegated:
            ctx.ops.reload_dataset()
        return {"samples": len(samples), "failed": len(failed)}

    def resolve_output(self, ctx: Any) -> Any:  # noqa: ARG002 - FiftyOne gives it
        """What is told when it is done."""
        outputs = types.Object()
        outputs.int("samples", label="Samples")
        outputs.int("failed", label="Of these failed: FIELD_error says why")
        return types.Property(outputs)


def register(plugin: Any) -> None:
    """What FiftyOne calls to learn of the operators."""
    plugin.register(ApplyExplanations)
