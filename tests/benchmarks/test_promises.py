"""The negative control of the promises takes away defences that exist."""

import subprocess
import sys


def test_each_weakness_names_a_defence_of_the_server() -> None:
    command = [sys.executable, "-c", "from benchmarks.promises.weak import weaken; weaken()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
