"""Which training instances a prompt shows: a draw that covers the labels, the same for all of a trial.

Source: HELM, `InContextLearningAdapter.sample_examples`; random calls are in its order, so draws are equal.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle

from capstan.evaluation.instances import Instance


def choose_examples(train: Sequence[Instance], *, count: int, trial: int, sample: bool) -> list[Instance]:
    """Draw `count` examples with `trial` as the seed.

    Labels, those with the most instances first and ties shuffled, are gone round in a circle; each time one
    of a label's instances is drawn without putting it back. Where labels do not suffice, instances without
    a right answer follow. Without `sample` it is the trial's slice of the training instances, in order.
    """
    wanted = min(len(train), count)
    if not sample:
        return list(train[wanted * trial : wanted * (trial + 1)])
    draw = random.Random(trial)
    unlabelled = [instance for instance in train if instance.first_correct is None]
    by_label: dict[str, list[Instance]] = defaultdict(list)
    for instance in train:
        if instance.first_correct is not None:
            by_label[instance.first_correct.text].append(instance)
    chosen: list[Instance] = []
    labels = _ordered_labels(by_label, draw)
    num_labelled = sum(map(len, by_label.values()))
    for label in cycle(labels):
        if len(chosen) == wanted or len(chosen) == num_labelled:
            break
        pool = by_label[label]
        if pool:
            chosen.append(pool.pop(draw.randrange(len(pool))))
    return chosen + draw.sample(unlabelled, wanted - len(chosen))


def _ordered_labels(by_label: dict[str, list[Instance]], draw: random.Random) -> list[str]:
    by_count: dict[int, list[str]] = defaultdict(list)
    for label, pool in sorted(by_label.items()):
        by_count[len(pool)].append(label)
    ordered = []
    for count in sorted(by_count, reverse=True):
        draw.shuffle(by_count[count])
        ordered += by_count[count]
    return ordered
