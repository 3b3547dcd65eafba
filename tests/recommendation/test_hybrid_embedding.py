"""What a lookup reads, what is in flight, and that torch's training is the off position."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

from capstan.errors import DoesNotFit, InputError, TimeoutExpired, UsageError
from capstan.recommendation import Adagrad, Adam, EmbeddingTable, HybridEmbedding, LeastRecent, Sgd

DIM, IDS, SAMPLES = 8, 60, 32


def batches(count, seed=0):
    generator = np.random.default_rng(seed)
    for _ in range(count):
        cuts = np.sort(generator.integers(0, 80, SAMPLES - 1))
        bags = {
            "item": (generator.integers(0, IDS, 80), np.r_[0, cuts, 80]),
            "user": generator.integers(0, IDS, SAMPLES),
        }
        yield bags, torch.from_numpy(generator.integers(0, 2, SAMPLES).astype(np.float32))


def layer(optimizer=None, **options):
    tables = {
        name: EmbeddingTable(
            DIM, capacity=IDS, name=name, initial=(-1, 1), optimizer=optimizer or Adagrad(lr=0.1)
        )
        for name in ("item", "user")
    }
    return HybridEmbedding(tables, pooling={"item": "mean"}, **options)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2 * DIM, 16), nn.ReLU(), nn.Linear(16, 1))


def trained(embedding, count=30, *, prefetches=False):
    """Losses, and rows of every ID at the end."""
    dense = network()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    losses = []
    told = list(batches(count))
    for number, (batch, labels) in enumerate(told, start=1):
        out = dense(torch.cat(list(embedding(batch).values()), 1))[:, 0]
        if prefetches and number < count:
            embedding.prefetch(told[number][0])
        loss = nn.functional.binary_cross_entropy_with_logits(out, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        embedding.step()
        losses.append(loss.item())
    embedding.close()
    return losses, {name: table.rows_of(np.arange(IDS)) for name, table in embedding.tables.items()}


def test_synchronous_training_is_torchs():
    dense = network()
    ids = np.arange(IDS)
    bags = {}
    for name, table in layer().tables.items():
        rows = torch.from_numpy(np.stack([table.initial_row(each)[:DIM] for each in ids]))
        bags[name] = nn.EmbeddingBag.from_pretrained(
            rows, freeze=False, mode="mean" if name == "item" else "sum"
        )
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    rows = torch.optim.Adagrad([each.weight for each in bags.values()], lr=0.1)
    losses = []
    for batch, labels in batches(30):
        item = bags["item"](*map(torch.from_numpy, (batch["item"][0], batch["item"][1][:-1])))
        user = bags["user"](torch.from_numpy(batch["user"])[:, None])
        loss = nn.functional.binary_cross_entropy_with_logits(dense(torch.cat([item, user], 1))[:, 0], labels)
        optimizer.zero_grad()
        rows.zero_grad()
        loss.backward()
        optimizer.step()
        rows.step()
        losses.append(loss.item())
    ours, final = trained(layer())
    # Sums of at most 80 terms in another order, 30 times: 2^-24 x 80 x 30 = 1.4e-4 at worst, and a
    # hundredth of it as rounding goes.
    assert ours == pytest.approx(losses, abs=2e-6)
    for name, bag in bags.items():
        seen = final[name].any(axis=1)
        assert seen.all()
        assert final[name] == pytest.approx(bag.weight.detach().numpy(), abs=1e-5)


@pytest.mark.parametrize("mode", ["hybrid", "async"])
def test_staleness_of_one_is_synchronous_training_bit_for_bit(mode):
    losses, rows = trained(layer())
    late_losses, late_rows = trained(layer(mode=mode, staleness=1))
    assert late_losses == losses
    assert all(np.array_equal(rows[name], late_rows[name]) for name in rows)


def simulated(staleness, count=30):
    """Training that keeps each update back by hand until τ - 1 further batches were looked up."""
    dense, embedding = network(), layer()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    waiting, losses = [], []
    for batch, labels in batches(count):
        while len(waiting) > staleness - 1:
            for slot, (lookup, gradient) in waiting.pop(0).items():
                embedding.tables[slot].apply_gradients(lookup, gradient)
        outputs = embedding(batch)
        lookups = {slot: lookup for slot, (_, lookup) in embedding._open.found.items()}
        loss = nn.functional.binary_cross_entropy_with_logits(
            dense(torch.cat(list(outputs.values()), 1))[:, 0], labels
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        waiting.append(
            {slot: (lookups[slot], each.numpy()) for slot, each in embedding._open.gradients.items()}
        )
        embedding.discard()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("staleness", [2, 5])
def test_a_hybrid_lookup_reads_the_updates_up_to_tau_batches_ago_and_no_later_one(staleness):
    losses, _ = trained(layer(mode="hybrid", staleness=staleness))
    assert losses == simulated(staleness)
    assert losses != trained(layer())[0]


@pytest.mark.parametrize("mode", ["sync", "hybrid", "async"])
@pytest.mark.parametrize("staleness", [1, 2, 7])
@pytest.mark.parametrize("path", ["numpy", "raw", "unused", "evaluated", "abandoned", "prefetched"])
def test_never_more_than_tau_batches_are_in_flight_on_any_path(mode, staleness, path):
    if mode == "sync" and staleness > 1:
        with pytest.raises(UsageError, match="synchronous training is 1"):
            layer(mode=mode, staleness=staleness)
        return
    embedding = layer(mode=mode, staleness=staleness)
    if path == "raw":
        embedding.pooling["item"] = "raw"
    in_flight, update_rows = [], embedding._update_rows
    gate = threading.Event()

    def slow(batch):
        gate.wait(0.002)
        in_flight.append(embedding.staleness_counts.in_flight)
        update_rows(batch)

    embedding._update_rows = slow
    told = [batch for batch, _ in batches(20)]
    for number, batch in enumerate(told):
        outputs = embedding(batch)
        if path == "prefetched" and staleness > 1 and number < 19:
            embedding.prefetch(told[number + 1])
        in_flight.append(embedding.staleness_counts.in_flight)
        if path == "abandoned" and number % 3 == 0:
            continue
        (outputs["user"] if path == "unused" else outputs["item"]).sum().backward()
        embedding.step()
        if path == "evaluated" and number % 4 == 0:
            with torch.no_grad():
                embedding(batch)
    embedding.close()
    counts = embedding.staleness_counts
    assert max(in_flight) == counts.peak_in_flight <= staleness
    assert counts.in_flight == 0
    assert counts.looked_up == 20 == counts.applied + counts.discarded
    if mode == "hybrid" and path == "numpy":
        assert counts.peak_in_flight == staleness


@pytest.mark.parametrize("staleness", [2, 5])
def test_a_prefetched_batch_reads_what_it_would_have_read_later(staleness):
    losses, rows = trained(layer(mode="hybrid", staleness=staleness), prefetches=True)
    later_losses, later_rows = trained(layer(mode="hybrid", staleness=staleness))
    assert losses == later_losses
    assert all(np.array_equal(rows[name], later_rows[name]) for name in rows)


def test_prefetching_out_of_order_is_named():
    embedding = layer(mode="hybrid", staleness=2)
    (first, _), (second, _) = batches(2)
    with pytest.raises(UsageError, match="between forward and step"):
        embedding.prefetch(first)
    out = embedding(first)
    embedding.prefetch(second)
    with pytest.raises(UsageError, match="takes one batch"):
        embedding.prefetch(second)
    out["item"].sum().backward()
    embedding.step()
    with pytest.raises(UsageError, match="the same object"):
        embedding(first)
    embedding(second)
    with pytest.raises(UsageError, match="staleness of 2 or more"):
        layer().prefetch(first)


def test_a_slot_that_the_loss_does_not_use_is_not_updated():
    embedding = layer(optimizer=Adam())
    batch, _ = next(batches(1))
    outputs = embedding(batch)
    before = {name: table.rows_of(np.arange(IDS)) for name, table in embedding.tables.items()}
    outputs["user"].sum().backward()
    embedding.step()
    assert np.array_equal(embedding.tables["item"].rows_of(np.arange(IDS)), before["item"])
    assert not np.array_equal(embedding.tables["user"].rows_of(np.arange(IDS)), before["user"])
    assert (embedding.tables["item"].updates, embedding.tables["user"].updates) == (0, 1)


def test_raw_pooling_gives_every_id_its_row_and_cuts_none():
    table = EmbeddingTable(4, capacity=100, optimizer=Sgd(lr=1.0))
    embedding = HybridEmbedding({"item": table}, pooling="raw")
    ids = np.array([5, 6, 5, *range(20)])
    rows = embedding({"item": (ids, [0, 3, 3, 23])})["item"]
    assert rows.shape == (23, 4)
    before = table.rows_of([5, 6])
    rows.backward(torch.arange(23.0)[:, None].expand(23, 4))
    embedding.step()
    # 5 is at 0, 2 and 8, 6 at 1 and 9
    assert (before - table.rows_of([5, 6]))[:, 0] == pytest.approx([10, 10], abs=1e-5)


def test_evaluation_sees_everything_trained_and_inserts_nothing():
    embedding = layer(mode="hybrid", staleness=8)
    for batch, _ in batches(3):
        embedding(batch)["user"].sum().backward()
        embedding.step()
    embedding.eval()
    out = embedding({"item": [10**9], "user": [10**9]})
    assert not out["item"].any()
    assert not out["user"].requires_grad
    assert embedding.staleness_counts.in_flight == 0
    assert 10**9 not in embedding.tables["item"].state_dict()["ids"]


def test_a_state_dict_has_what_was_in_flight_and_goes_on_as_before(tmp_path):
    first, second = (layer(optimizer=Adam(lr=0.05), mode="hybrid", staleness=4) for _ in range(2))
    trained(first, 7)
    torch.save(first.state_dict(), tmp_path / "rows.pt")
    second.load_state_dict(torch.load(tmp_path / "rows.pt", weights_only=True))
    assert trained(first, 5)[0] == trained(second, 5)[0]
    with pytest.raises(InputError, match="slots here are item, user, but other"):
        second.set_extra_state({"other": {}})


def test_an_error_in_the_background_surfaces_and_stays():
    embedding = layer(mode="hybrid", staleness=2)

    def fail(*_):
        raise OSError("the disk is gone")

    embedding.tables["item"].apply_gradients = fail
    with pytest.raises(OSError, match="the disk is gone"):
        trained(embedding)
    with pytest.raises(OSError, match="the disk is gone"):
        embedding.flush()
    with pytest.raises(OSError, match="the disk is gone"):
        embedding.close()


@pytest.mark.parametrize("mode", ["sync", "hybrid", "async"])
def test_a_lookup_that_fails_is_an_error_and_leaves_nothing_in_flight(mode):
    table = EmbeddingTable(1, capacity=2, optimizer=Sgd(lr=1.0))
    embedding = HybridEmbedding({"a": table}, mode=mode)
    for ids in ([1], [1, 2, 3], [1, 2]):
        try:
            out = embedding({"a": ids})["a"]
        except DoesNotFit:
            assert ids == [1, 2, 3]
            continue
        out.sum().backward()
        embedding.step()
    embedding.close()
    assert table.rows_of([1])[0] == table.initial_row(1)[0] - np.float32(1) - np.float32(1)
    counts = embedding.staleness_counts
    assert (counts.looked_up, counts.applied, counts.in_flight) == (2, 2, 0)


def test_waiting_for_the_background_has_a_bound():
    embedding = layer(mode="hybrid", staleness=1, patience_s=0.05)
    gate = threading.Event()
    embedding._update_rows = lambda batch: gate.wait()
    batch, _ = next(batches(1))
    embedding(batch)["item"].sum().backward()
    embedding.step()
    with pytest.raises(TimeoutExpired, match="patience_s"):
        embedding(batch)
    gate.set()


def test_every_gradient_is_checked_and_one_that_is_not_finite_changes_nothing():
    embedding = layer()
    for number, (batch, _) in enumerate(batches(6)):
        out = embedding(batch)
        before = {name: table.rows_of(np.arange(IDS)) for name, table in embedding.tables.items()}
        scale = float("nan") if number in (3, 5) else 1.0
        (out["item"].sum() + scale * out["user"][0, 0]).backward()
        if number in (3, 5):
            with pytest.raises(InputError, match="slot 'user' is not finite"):
                embedding.step()
            embedding.discard()
            assert all(
                np.array_equal(before[name], table.rows_of(np.arange(IDS)))
                for name, table in embedding.tables.items()
            )
        else:
            embedding.step()
    assert embedding.staleness_counts.discarded == 2


def test_calls_in_the_wrong_order_are_named():
    embedding = layer()
    with pytest.raises(UsageError, match="nothing to apply"):
        embedding.step()
    batch, _ = next(batches(1))
    out = embedding(batch)
    with pytest.raises(UsageError, match="nothing to apply"):
        embedding.step()
    out["item"].sum().backward(retain_graph=True)
    with pytest.raises(UsageError, match=r"Call step\(\), or discard"):
        embedding(batch)
    embedding.step()
    with pytest.raises(UsageError, match="updated already"):
        out["item"].sum().backward()


def test_two_backwards_before_a_step_add_up():
    one, two = layer(optimizer=Sgd(lr=1.0)), layer(optimizer=Sgd(lr=1.0))
    batch, _ = next(batches(1))
    out = one(batch)["item"]
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    (two(batch)["item"] * 2).sum().backward()
    for each in (one, two):
        each.step()
    assert np.array_equal(
        one.tables["item"].rows_of(np.arange(IDS)), two.tables["item"].rows_of(np.arange(IDS))
    )


def test_rows_evicted_in_flight_drop_their_gradients_and_no_other():
    table = EmbeddingTable(1, capacity=3, eviction=LeastRecent(), optimizer=Sgd(lr=1.0))
    embedding = HybridEmbedding({"a": table}, mode="hybrid", staleness=3)
    for ids in ([1, 2, 3], [4, 3], [3, 5]):
        embedding({"a": ids})["a"].sum().backward()
        embedding.step()
    embedding.close()
    assert table.counts.late == 2  # 1 and 2 went when 4 and 5 came
    expected = [table.initial_row(each)[0] - np.float32(times) for each, times in ((3, 3), (4, 1), (5, 1))]
    assert table.rows_of([3, 4, 5])[:, 0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "hybird"}, "Did you mean 'hybrid'"),
        ({"staleness": 0, "mode": "hybrid"}, "staleness=0"),
        ({"pooling": "max"}, "no pooling 'max'"),
        ({"pooling": {"itme": "sum"}}, "Did you mean 'item'"),
    ],
)
def test_settings_that_are_not_there_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        HybridEmbedding({"item": EmbeddingTable(4, capacity=4)}, **options)


def test_one_table_cannot_serve_two_slots():
    table = EmbeddingTable(4, capacity=4)
    with pytest.raises(UsageError, match="a table of its own"):
        HybridEmbedding({"a": table, "b": table})


def test_a_model_with_the_layer_in_it_can_be_moved_cast_and_counted():
    embedding = layer()
    model = nn.ModuleDict({"embedding": embedding, "dense": network()}).to("cpu").float()
    batch, _ = next(batches(1))
    assert model["embedding"](batch)["item"].dtype == torch.float32
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"dense"}
