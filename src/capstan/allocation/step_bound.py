"""What a simulated step takes at least, without simulating it: candidates above the best are not tried."""

import numpy as np

from capstan.allocation.layout import Layout
from capstan.allocation.pair_seconds import Numbers, Seconds
from capstan.allocation.step_simulation import StepTask
from capstan.hardware import Cluster


class StepBounds:
    """Bounds over one network, whose matrices are converted once."""

    def __init__(self, cluster: Cluster) -> None:
        self._latency_s = np.array(cluster.latency_s)
        self._bandwidth = np.array(cluster.bandwidth_bytes_per_s)

    def seconds(self, layout: Layout, task: StepTask) -> float:
        """No schedule is faster, with any interfaces.

        pipeline[r] = max(one micro-batch there and back, M × the busiest device or link of replica r)
        sending[d] = sum over d's peers of share / bandwidth, which passes twice: shares, then sums
        step >= pipeline[r] + 2 sending of r's device in stage 0, which is the last one to be done
        step >= max of pipeline + max of sending in stage 0: sums wait for the last one's shares
        step >= M × compute[d] + 2 sending[d]
        """
        groups, many = layout.array, task.micro_batches
        compute_s = (np.array(task.forward_s) + np.array(task.backward_s))[groups]  # (stages, replicas)
        first, second = groups[:-1], groups[1:]
        one_s, busiest_s = compute_s.sum(axis=0), compute_s.max(axis=0)
        for source, target, size in (
            (first, second, task.message_bytes["forward"]),
            (second, first, task.message_bytes["backward"]),
        ):
            message_s = size / self._bandwidth[source, target]
            one_s = one_s + (message_s + self._latency_s[source, target]).sum(axis=0)
            busiest_s = np.maximum(busiest_s, message_s.max(axis=0, initial=0.0))
        sending_s = self._sending_s(groups, task)
        pipeline_s = np.maximum(one_s, many * busiest_s)
        return float(
            max(
                (pipeline_s + 2 * sending_s[0]).max(),
                pipeline_s.max() + sending_s[0].max(),
                (many * compute_s + 2 * sending_s).max(),
            )
        )

    def _sending_s(self, groups: Numbers, task: StepTask) -> Seconds:
        """(stages, replicas): the seconds in which each device sends every peer its share."""
        stages, replicas = groups.shape
        shares = np.broadcast_to(np.asarray(task.gradient_bytes, dtype=float), (stages,)) / replicas
        one, other = groups[:, :, None], groups[:, None, :]
        found: Seconds = (shares[:, None, None] / self._bandwidth[one, other]).sum(axis=2)
        return found
