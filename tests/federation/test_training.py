"""Each algorithm against its definition in one process; masked gradients; planned bytes; losses, quorum."""

import itertools
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from capstan.errors import InputError, UsageError
from capstan.federation.cut_line import CutReceiver, CutSender
from capstan.federation.job import SplitJob
from capstan.federation.members import CutNetwork, DeviceData, flat_state, set_flat_state, weighted_mean
from capstan.federation.schedule import ALGORITHMS, Settings, epoch_iterations
from capstan.federation.sparsifiers import RandomTopK, Threshold, TopK
from capstan.federation.traffic import DOWN, UP
from capstan.federation.wire import Wire

DENSE = Wire(sparsifier=None, value_type="float32")
WIDTH = 12


def network(norm=False, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CutNetwork(
            bottom=nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU()),
            top=nn.Sequential(nn.Linear(WIDTH, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.ReLU()),
            head=nn.Linear(8, 3),
            num_classes=3,
        )


def devices(sizes=(10, 7, 12), batches=(4, 3, 5), seed=1):
    rng = np.random.default_rng(seed)
    made = []
    for size, batch in zip(sizes, batches, strict=True):
        labels = rng.integers(0, 3, size)
        inputs = rng.standard_normal((size, 6)) + labels[:, None]
        made.append(
            DeviceData(
                inputs=torch.tensor(inputs, dtype=torch.float32),
                labels=torch.tensor(labels),
                batch_size=batch,
            )
        )
    return made


def whole(cut):
    return nn.Sequential(deepcopy(cut.bottom), deepcopy(cut.top), deepcopy(cut.head))


def weights_of(job):
    """The network as it is trained, in the order of `whole`."""
    shared, top = list(job.shared_parts), job.top
    parts = [shared[0], top, shared[1]] if job.settings.algorithm == "u-shaped" else [*shared, top]
    return torch.cat([flat_state(part) for part in parts])


def train_one(model, optimiser, inputs, labels):
    optimiser.zero_grad()
    F.cross_entropy(model(inputs), labels).backward()
    optimiser.step()


def iterations_of(job):
    return epoch_iterations(job.sizes.num_samples, job.sizes.batch_sizes, job.settings, job.epoch)


def samples_of(job, batches):
    pairs = [job.devices[batch.device].batch(torch.from_numpy(batch.rows)) for batch in batches]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


# float32 has 24 bits; sums in another order are off by some 1e-7 of weights of about 1 a step.
CLOSE = {"rtol": 0, "atol": 1e-6}


@pytest.mark.parametrize("algorithm", ["joint", "u-shaped"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_joint_dense_training_equals_the_uncut_network_at_every_step(algorithm, momentum):
    # Devices of different batch sizes, equally many batches: so all momenta see every step.
    cut = network(norm=True)
    job = SplitJob(
        network=cut,
        devices=devices((8, 6, 10), (4, 3, 5)),
        wire=DENSE,
        settings=Settings(algorithm=algorithm, momentum=momentum),
    )
    model = whole(cut)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)

    def compare(iteration):
        train_one(model, optimiser, *samples_of(job, iteration.batches))
        torch.testing.assert_close(weights_of(job), flat_state(model), **CLOSE)

    before = weights_of(job)
    for _ in range(3):
        assert job.run_epoch(compare).iterations == 2
    assert not torch.allclose(weights_of(job), before, atol=1e-3)


def test_sequential_dense_training_equals_the_uncut_network_on_one_device_after_the_other():
    cut = network()
    job = SplitJob(
        network=cut, devices=devices(), wire=DENSE, settings=Settings(algorithm="split", momentum=0.0)
    )
    model = whole(cut)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)

    def compare(iteration):
        train_one(model, optimiser, *samples_of(job, iteration.batches))
        active = job.devices[iteration.batches[0].device].parts
        torch.testing.assert_close(
            torch.cat([flat_state(active), flat_state(job.top)]), flat_state(model), **CLOSE
        )

    for _ in range(2):
        job.run_epoch(compare)


@pytest.mark.parametrize("algorithm", ["fedavg", "splitfed-v1"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_splitfed_v1_and_fedavg_are_federated_averaging_of_the_uncut_network(algorithm, momentum):
    cut = network()
    job = SplitJob(
        network=cut,
        devices=devices(),
        wire=DENSE,
        settings=Settings(algorithm=algorithm, momentum=momentum, fraction_train=0.6),
    )
    model = whole(cut)
    for _ in range(3):
        states, local = [], {}
        for iteration in iterations_of(job):
            (batch,) = iteration.batches
            if batch.device not in local:
                copied = deepcopy(model)
                local[batch.device] = (
                    copied,
                    torch.optim.SGD(copied.parameters(), lr=0.05, momentum=momentum),
                )
            train_one(*local[batch.device], *samples_of(job, [batch]))
        assert len(local) == 2
        states = [(len(job.devices[each].data.labels), flat_state(local[each][0])) for each in local]
        set_flat_state(model, weighted_mean(states))
        job.run_epoch()
        torch.testing.assert_close(weights_of(job), flat_state(model), **CLOSE)


def test_splitfed_v2_is_one_top_and_an_average_of_bottoms():
    cut = network()
    job = SplitJob(
        network=cut, devices=devices(), wire=DENSE, settings=Settings(algorithm="splitfed-v2", momentum=0.0)
    )
    bottom, top = deepcopy(cut.bottom), nn.Sequential(deepcopy(cut.top), deepcopy(cut.head))
    orders = set()
    for _ in range(3):
        local = {}
        for iteration in iterations_of(job):
            (batch,) = iteration.batches
            mine = local.setdefault(batch.device, deepcopy(bottom))
            optimiser = torch.optim.SGD([*mine.parameters(), *top.parameters()], lr=0.05)
            train_one(nn.Sequential(mine, top), optimiser, *samples_of(job, [batch]))
        orders.add(tuple(local))
        sizes = {0: 10, 1: 7, 2: 12}
        set_flat_state(bottom, weighted_mean((sizes[each], flat_state(local[each])) for each in local))
        job.run_epoch()
        expected = torch.cat([flat_state(bottom), flat_state(top)])
        torch.testing.assert_close(weights_of(job), expected, **CLOSE)
    assert len(orders) > 1


class Line:
    """Both ends of a line across the cut."""

    def __init__(self, wire):
        self._sender, self._receiver = CutSender(wire, 0, 0), CutReceiver(wire, 0)

    def forward(self, values, step):
        rows, width = values.shape
        return self._receiver.receive(self._sender.send(values, step), step, rows=rows, width=width)

    def backward(self, gradient, step):
        return self._sender.gradient(self._receiver.answer(gradient, step), step)


def line(wire):
    return Line(wire)


@pytest.mark.parametrize("sparsifier", [TopK(keep=0.25), TopK(keep=0.1, per="tensor"), Threshold(above=0.5)])
def test_the_gradient_on_the_support_is_that_of_the_masked_network(sparsifier):
    torch.manual_seed(0)
    bottom, top, inputs = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3), torch.randn(5, 6)
    labels = torch.tensor([0, 1, 2, 0, 1])
    cut = line(Wire(sparsifier=sparsifier, value_type="float32"))
    activations = bottom(inputs)
    received = cut.forward(activations, 0).requires_grad_()
    F.cross_entropy(top(received), labels).backward()
    activations.backward(cut.backward(received.grad, 0))
    split = [each.grad.clone() for each in (*bottom.parameters(), *top.parameters())]

    mask = torch.zeros(5 * WIDTH)
    mask[torch.from_numpy(sparsifier.choose(activations.detach().numpy(), np.random.default_rng(0)))] = 1
    bottom.zero_grad()
    top.zero_grad()
    F.cross_entropy(top(mask.view(5, WIDTH) * bottom(inputs)), labels).backward()
    for ours, autograds in zip(split, (*bottom.parameters(), *top.parameters()), strict=True):
        torch.testing.assert_close(ours, autograds.grad, rtol=0, atol=1e-7)


def test_a_gradient_of_its_own_top_k_and_a_dense_one_come_back():
    torch.manual_seed(0)
    values, gradient = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    dense = line(Wire(downlink="dense", value_type="float32"))
    dense.forward(values, 0)
    assert torch.equal(dense.backward(gradient, 0), gradient)
    own = line(
        Wire(sparsifier=TopK(keep=0.25), downlink="top-k", value_type="float32", has_error_feedback=True)
    )
    sent = []
    for step in range(2):
        own.forward(values, step)
        sent.append(own.backward(gradient, step))
        assert int((sent[-1] != 0).sum()) == 4 * 3
    # The second time what was left out the first time is added.
    kept = sent[1] != 0
    torch.testing.assert_close(sent[1][kept], (2 * gradient - sent[0])[kept], rtol=1e-6, atol=0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("index", ["elias-fano", "bitmap", "packed"])
@pytest.mark.parametrize("value_type", ["float32", "float16", "int8"])
@pytest.mark.parametrize("downlink", ["support", "top-k", "dense"])
@pytest.mark.covering(2)
def test_bytes_are_those_of_the_plan(algorithm, index, value_type, downlink):
    job = SplitJob(
        network=network(),
        devices=devices(),
        wire=Wire(sparsifier=TopK(keep=0.3), index=index, value_type=value_type, downlink=downlink),
        settings=Settings(algorithm=algorithm, fraction_train=0.6),
    )
    for epochs in (2, 1):
        before, plan = job.ledger.traffic, job.forecast(epochs)
        counts = [job.run_epoch() for _ in range(epochs)]
        assert plan.is_exact
        assert job.ledger.traffic - before == plan.traffic
        assert sum(each.samples for each in counts) == plan.samples
        assert sum(each.iterations for each in counts) == plan.iterations


@pytest.mark.parametrize("every", [1, 2, None])
def test_rarer_averages_send_fewer_weights_as_planned(every):
    job = SplitJob(network=network(), devices=devices(), settings=Settings(average_every=every))
    plan = job.forecast(2)
    for _ in range(2):
        job.run_epoch()
    assert job.ledger.traffic == plan.traffic
    # Batches in an epoch: 3 a device, averaged after each, after the second and last, or after the last.
    averages = {1: 3, 2: 2, None: 1}[every]
    assert job.ledger.traffic.of("weights").on(UP) == 2 * averages * 3 * 4 * (7 * WIDTH)


def test_sizes_that_values_decide_are_said_to_be_estimates():
    for wire in (Wire(index="rice"), Wire(sparsifier=Threshold(above=0.5))):
        job = SplitJob(network=network(), devices=devices(), wire=wire)
        assert not job.forecast(1).is_exact
        job.run_epoch()
        assert job.ledger.traffic.of("values").on(UP) > 0


def test_labels_of_a_u_shaped_network_never_leave():
    job = SplitJob(network=network(), devices=devices(), settings=Settings(algorithm="u-shaped"))
    job.run_epoch()
    assert not job.ledger.traffic.of("labels").links
    assert job.ledger.traffic.of("values").on(DOWN) > 0


def test_the_same_seed_trains_the_same_weights():
    def trained(seed):
        job = SplitJob(
            network=network(),
            devices=devices(),
            wire=Wire(sparsifier=RandomTopK(keep=0.3, alpha=0.2)),
            settings=Settings(seed=seed, loss_rate=0.2, quorum=0.5),
        )
        job.run_epoch()
        return weights_of(job)

    torch.manual_seed(5)
    first = trained(3)
    torch.manual_seed(6)
    assert torch.equal(trained(3), first)
    assert not torch.equal(trained(4), first)


def test_an_iteration_goes_on_with_its_quorum_and_is_skipped_below_it():
    def run(quorum):
        job = SplitJob(
            network=network(),
            devices=devices((20,) * 4, (2,) * 4),
            settings=Settings(loss_rate=0.4, quorum=quorum),
        )
        return job.run_epoch()

    often, always = run(0.5), run(1.0)
    assert often.lost_batches == always.lost_batches > 0
    assert often.skipped_iterations < always.skipped_iterations <= always.iterations == 10
    # A lost device loses the batch in flight, nothing else.
    assert run(0.01).samples == 80 - 2 * often.lost_batches


def test_a_device_that_comes_back_gets_the_current_bottom():
    job = SplitJob(
        network=network(),
        devices=devices((20,) * 4, (2,) * 4),
        wire=DENSE,
        settings=Settings(loss_rate=0.5, quorum=0.01, momentum=0.0),
    )
    seen = []

    def note(iteration):
        arrived = [
            each.device
            for each in iteration.batches
            if job.exchange.members[each.device].version == job.exchange.version - 1
        ]
        seen.append(arrived)

    job.run_epoch(note)
    assert any(
        device not in now and device in later for now, later in itertools.pairwise(seen) for device in later
    )
    assert all(member.version >= 0 for member in job.exchange.members)


def test_devices_may_have_bottoms_of_their_own():
    own = devices()
    torch.manual_seed(0)
    bottom = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, WIDTH))
    own[1] = DeviceData(inputs=own[1].inputs, labels=own[1].labels, batch_size=3, bottom=bottom)
    job = SplitJob(network=network(), devices=own)
    plan = job.forecast(2)
    job.run_epoch()
    job.run_epoch()
    assert job.ledger.traffic == plan.traffic
    assert not torch.equal(flat_state(job.devices[1].parts), flat_state(nn.ModuleList([bottom])))
    assert 0 <= job.accuracy(own[1].inputs, own[1].labels, device=1) <= 1


def test_it_learns_and_is_judged_as_it_was_trained():
    job = SplitJob(
        network=network(), devices=devices((40,) * 3, (8,) * 3), wire=Wire(sparsifier=TopK(keep=0.3))
    )
    losses = [job.run_epoch().loss for _ in range(8)]
    assert losses[-1] < losses[0]
    (test,) = devices((300,), (1,), seed=9)
    # Three classes; guessing gives a third.
    assert job.accuracy(test.inputs, test.labels) > 0.5
    pieces = torch.cat([job.outputs(each) for each in test.inputs.split(50)])
    # float32 sums of a dozen values of about 1; the scale of half precision is that of each piece.
    torch.testing.assert_close(job.outputs(test.inputs), pieces, rtol=0, atol=1e-2)


def test_what_cannot_be_trained_is_refused():
    cut, data = network(), devices()
    headless = CutNetwork(bottom=cut.bottom, top=cut.top, num_classes=3)
    with pytest.raises(UsageError, match="ends on the devices"):
        SplitJob(network=headless, devices=data, settings=Settings(algorithm="u-shaped"))
    with pytest.raises(UsageError, match="Did you mean 'splitfed-v2'"):
        Settings(algorithm="splitfed-v3x")
    with pytest.raises(UsageError, match="Quorum"):
        Settings(algorithm="split", loss_rate=0.1)
    wrong = DeviceData(inputs=data[0].inputs, labels=data[0].labels + 3, batch_size=2)
    with pytest.raises(InputError, match="Labels must be"):
        SplitJob(network=cut, devices=[wrong])
    with pytest.raises(InputError, match="one each"):
        DeviceData(inputs=data[0].inputs, labels=data[1].labels, batch_size=2)
    wider = nn.Linear(6, WIDTH + 1)
    odd = DeviceData(inputs=data[0].inputs, labels=data[0].labels, batch_size=2, bottom=wider)
    topless = CutNetwork(bottom=cut.bottom, top=nn.Identity(), num_classes=3)
    with pytest.raises(InputError, match="one width"):
        SplitJob(network=topless, devices=[*data, odd])
    own = DeviceData(inputs=data[0].inputs, labels=data[0].labels, batch_size=2, bottom=cut.bottom)
    with pytest.raises(UsageError, match="cannot have a bottom"):
        SplitJob(network=cut, devices=[own], settings=Settings(algorithm="fedavg"))
    narrow = DeviceData(inputs=data[0].inputs[:, :5], labels=data[0].labels, batch_size=2)
    with pytest.raises(InputError, match="does not go with samples of the shape"):
        SplitJob(network=cut, devices=[narrow])
    with pytest.raises(InputError, match="whole numbers"):
        DeviceData(inputs=data[0].inputs, labels=data[0].labels.float(), batch_size=2)
    with pytest.raises(UsageError, match="tensors"):
        DeviceData(inputs=data[0].inputs.numpy(), labels=data[0].labels, batch_size=2)
    with pytest.raises(InputError, match="at least one sample"):
        SplitJob(network=cut, devices=data).accuracy(data[0].inputs[:0], data[0].labels[:0])
    with pytest.raises(InputError, match="nothing to train on"):
        SplitJob(network=cut, devices=[])
