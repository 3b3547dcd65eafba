"""An author's own variants of a question whose right answer is another.

Source: Gardner et al. 2020 (arXiv 2004.02709); HELM, `augmentations/contrast_sets_perturbation.py`.
"""

from dataclasses import dataclass, replace

from capstan.evaluation.instances import Instance
from capstan.evaluation.perturbations.perturbation import Perturbation, random_of


@dataclass(frozen=True, kw_only=True)
class ContrastSets(Perturbation):
    """One of an instance's variants, drawn; an instance without any stays and is left out."""

    name: str = "contrast_sets"
    is_robustness: bool = True
    changes_references: bool = True

    def apply(self, instance: Instance, seed: int | None = None) -> Instance:
        """The variant, its right answer with it."""
        changed, references = instance.input, instance.references
        if instance.contrasts:
            changed, references = instance.contrasts[
                random_of(instance, seed).choice(range(len(instance.contrasts)))
            ]
        return replace(
            instance, input=changed, references=references, perturbation=self.description(seed), contrasts=()
        )
