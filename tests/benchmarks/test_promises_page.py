"""The page of promises keeps lines that are not measured again."""

from benchmarks.promises.page import line, page
from benchmarks.promises.promise import Outcome, Promise
from benchmarks.real_server import Served


def promise(claim: str) -> Promise:
    def measure(_: Served) -> Outcome:
        raise NotImplementedError

    return Promise(claim, "so", "0", "nothing", measure)


FIRST, SECOND, THIRD = promise("First."), promise("Second."), promise("Third.")
KEPT, BROKEN = Outcome("0 found", kept=True), Outcome("9 found", kept=False)


def test_lines_that_are_measured_again_replace_their_own_and_others_stay() -> None:
    before = page(
        (SECOND, THIRD), [line(one, KEPT, BROKEN, 0.5) for one in (SECOND, THIRD)], before=""
    )
    after = page(
        (FIRST, SECOND), [line(one, BROKEN, BROKEN, 7.0) for one in (FIRST,)], before=before
    )
    assert after.splitlines()[-4:] == [
        "| promise | how it is measured | target | figure | kept | defence removed | figure then "
        "| load |",
        "|---|---|---|---|---|---|---|---|",
        "| First. | so | 0 | 9 found | **no** | nothing | 9 found | 7.0 |",
        "| Second. | so | 0 | 0 found | yes | nothing | 9 found | 0.5 |",
    ]


def test_a_control_that_notices_nothing_is_said_aloud() -> None:
    assert "| 0 found (**not noticed**) |" in line(FIRST, KEPT, KEPT, 0.0)
