"""One voice for all ranks of a job: the first one prints, what the others have to say included."""

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from capstan.generation.model import Model
    from capstan.plans import Plan, Trace


class Ranks:
    """The ranks over which a model is divided, or this process alone."""

    def __init__(self, model: "Model") -> None:
        self._group = model.stage.group if model.stage is not None else None

    @property
    def is_first(self) -> bool:
        return self._group is None or self._group.is_first

    def say(self, text: str, *, err: bool = False) -> None:
        """Print on the first rank."""
        if self.is_first:
            typer.echo(text, err=err)

    def one_after_another(self, text: str) -> str:
        """What every rank gives; all must call it."""
        return text if self._group is None else "\n".join(self._group.gather(text))

    def accounts(self, plan: "Plan | None", trace: "Trace | None") -> dict[str, Any]:
        """Plan and trace of every rank, for JSON; nothing for a process alone. All must call it."""
        if self._group is None:
            return {}
        own = {"plan": plan.to_dict() if plan else None, "trace": trace.to_dict() if trace else None}
        return {"ranks": self._group.gather(own)}
