"""The YAML: what is shared, what is refused and how that is said."""

import pytest

from capstan.errors import CapstanError
from capstan.recommendation import Adagrad, Adam
from capstan.recommendation.training_config import config_of, read_config, row_optimizer

BASE = {"label": "y", "slots": {"a": None}}


def test_slots_have_what_embedding_says_unless_they_say_otherwise():
    shared = {"dim": 4, "optimizer": {"kind": "adam"}}
    config = config_of(
        {"label": "y", "embedding": shared, "slots": {"a": None, "b": {"dim": 8, "column": "c"}}}
    )
    assert (config.slots["a"].dim, config.slots["b"].dim) == (4, 8)
    assert config.slots["b"].optimizer == {"kind": "adam"}
    assert config.columns == ["y", "a", "c"]
    assert config_of({"label": "y", "embedding": shared, "slots": ["a"]}).slots["a"].dim == 4


def test_an_optimizer_is_made_from_plain_data():
    assert row_optimizer({}) == Adagrad()
    assert row_optimizer({"kind": "adam", "betas": [0.5, 0.9]}) == Adam(betas=(0.5, 0.9))


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([], "it is list"),
        ({"slots": ["a"]}, "label: Field required"),
        ({"label": "y", "slots": {}}, "names no slots"),
        (BASE | {"slots": {"a": {"dim": 0}}}, "slots.a.dim.*greater than or equal to 1.*'0'"),
        (BASE | {"slots": {"a": {"dims": 8}}}, "slots.a.dims.*not permitted"),
        (BASE | {"slots": {"a": {"pooling": "max"}}}, "slots.a.pooling.*'sum', 'mean' or 'sqrt'"),
        (BASE | {"slots": {"a": {"optimizer": {"kind": "ftrl"}}}}, "no optimizer 'ftrl'"),
        (
            BASE | {"slots": {"a": {"optimizer": {"kind": "sgd", "lrate": 1}}}},
            "no setting of sgd 'lrate'.*lr, momentum",
        ),
        (BASE | {"slots": {"a": {"optimizer": {"kind": "sgd", "lr": "fast"}}}}, "must be numbers"),
        (BASE | {"network": {"dense": [3]}}, "names no dense columns"),
        (BASE | {"network": {"top": [0]}}, "network.top.0"),
        (BASE | {"optimizer": {"kind": "lamb"}}, "optimizer.kind"),
        (BASE | {"embedding": 3}, "embedding must be settings"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(told, message):
    with pytest.raises(CapstanError, match=message):
        config_of(told)


def test_files_that_are_not_yaml_are_named(tmp_path):
    path = tmp_path / "table.yaml"
    with pytest.raises(CapstanError, match="table.yaml cannot be read"):
        read_config(path)
    path.write_text("label: [")
    with pytest.raises(CapstanError, match="table.yaml is not YAML"):
        read_config(path)
