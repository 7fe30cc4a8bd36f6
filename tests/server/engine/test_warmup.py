import torch

from server.engine.warmup import row_budget_of, sweep


def test_the_budget_is_the_smallest_batch_near_the_best_rate():
    assert row_budget_of({2: 50, 4: 90, 8: 97, 16: 100, 32: 99}) == 8
    assert row_budget_of({2: 50}) == 2


def test_the_sweep_measures_a_real_model(model):
    with torch.inference_mode():
        rates = sweep(model)
    assert 2 in rates
    assert all(rate > 0 for rate in rates.values())


class Cramped:
    """The real model on a device whose memory ends at four rows."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def evaluate(self, x, t, inputs):
        if len(x) > 4:
            raise torch.OutOfMemoryError("no room")
        return self._model.evaluate(x, t, inputs)


def test_the_sweep_ends_where_memory_does(model):
    with torch.inference_mode():
        assert max(sweep(Cramped(model))) <= 4  # type: ignore[arg-type]
