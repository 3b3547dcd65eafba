"""The page about this room: its example runs, its YAML is read, its names are all there are."""

import re
from pathlib import Path

import yaml

import capstan.recommendation
from capstan.recommendation import Adagrad, Adam, RowWiseAdagrad, Sgd
from capstan.recommendation.training_config import config_of

PAGE = (Path(__file__).parents[2] / "docs" / "recommendation.md").read_text()


def test_the_example_runs_and_learns(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(example, "docs/recommendation.md", "exec"), {})
    loss, counts = capsys.readouterr().out.split(maxsplit=1)
    assert float(loss) < 0.1  # labels follow from the item; guessing is 0.69
    assert "looked_up=200, applied=200" in counts
    assert "peak_in_flight=2" in counts


def test_the_yaml_is_a_configuration():
    (told,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    config = config_of(yaml.safe_load(told))
    assert {slot: settings.dim for slot, settings in config.slots.items()} == {
        "workclass": 8,
        "occupation": 16,
        "visited": 8,
    }


def test_the_state_of_each_optimizer_is_what_the_page_says():
    told = dict(re.findall(r"^\| `(Sgd|Adagrad|RowWiseAdagrad|Adam)[^`]*` \| ([^|]+) \|", PAGE, re.MULTILINE))
    floats = {"0 or D": (0, 8), "D": (8,), "1": (1,), "2 D": (16,)}
    optimizers = {
        "Sgd": (Sgd(), Sgd(momentum=0.9)),
        "Adagrad": (Adagrad(),),
        "RowWiseAdagrad": (RowWiseAdagrad(),),
    }
    for name, made in (optimizers | {"Adam": (Adam(),)}).items():
        assert tuple(each.state_floats(8) for each in made) == floats[told[name]]


def test_the_public_names_are_complete():
    expected = [
        "Adagrad",
        "Adam",
        "Bags",
        "EmbeddingTable",
        "Frequency",
        "HybridEmbedding",
        "LeastFrequent",
        "LeastRecent",
        "Lookup",
    ]
    expected += [
        "Probability",
        "RowWiseAdagrad",
        "Sgd",
        "StalenessCounts",
        "TableCounts",
        "TimeToLive",
        "read_bags",
    ]
    assert sorted(capstan.recommendation.__all__) == sorted(expected)
