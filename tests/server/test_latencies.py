"""A histogram counts each time in the bucket with the least bound that is not below it."""

from server.latencies import Latencies


def test_a_time_counts_up_to_its_bound_and_above_the_last_bound_without_one() -> None:
    times = Latencies((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 1.0, 7.0):
        times.add(seconds)
    assert times.counts == [2, 2, 1]
    assert times.total_s == 0.05 + 0.1 + 0.5 + 1.0 + 7.0


def test_two_histograms_share_nothing() -> None:
    one, other = Latencies((0.1,)), Latencies((0.1,))
    one.add(0.05)
    assert other.counts == [0, 0]
