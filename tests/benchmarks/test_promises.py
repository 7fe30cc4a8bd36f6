"""The negative control of the promises removes defenses that exist."""

from pathlib import Path

from tests.server.process import PATIENCE_S, Forks


def test_each_weakness_names_a_defence_of_the_server(forks: Forks, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with forks.begun(log, "from benchmarks.promises.weak import weaken; weaken()") as process:
        assert process.wait(PATIENCE_S) == 0, log.read_text()
