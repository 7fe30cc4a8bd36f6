"""The rule fulfils the contract of a rule, and does what its paper says."""

from dataclasses import replace

import torch
from weft_scheduled_cfg import ScheduledCFG

from guidance import CFG, RULES
from guidance.testing import check_rule, combine, rows_for


def test_it_keeps_the_promises_of_a_rule() -> None:
    check_rule(ScheduledCFG(), ScheduledCFG(scale=7.5, power=2.0), ScheduledCFG(scale=1.0))


def test_of_power_zero_it_is_cfg() -> None:
    rows = rows_for(CFG(scale=6.0), 3)
    ours, plain = combine(ScheduledCFG(scale=6.0, power=0.0), rows), combine(CFG(scale=6.0), rows)
    torch.testing.assert_close(ours.denoised, plain.denoised)


def test_its_mean_over_the_run_is_the_scale() -> None:
    rule, steps = ScheduledCFG(scale=5.0, power=2.0), 2000
    rows = rows_for(rule, steps)
    # The same predictions at every step, which differ by 1, so that the push is the scale minus 1.
    rows = replace(
        rows,
        cond=torch.ones_like(rows.cond),
        others=torch.zeros_like(rows.others),
        progress=(torch.arange(steps, dtype=torch.float64) / steps).view(-1, 1, 1, 1),
    )
    found = combine(rule, rows).denoised[:, 0, 0, 0]
    assert found[0] == 1
    assert abs(float(found.mean()) - 5) < 0.01


def test_weft_finds_it_once_it_is_installed() -> None:
    assert ScheduledCFG in RULES
