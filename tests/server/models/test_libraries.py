"""Loading a model imports no package that only quantized weights need."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.server.process import PATIENCE_S, Forks

CODE = """
from server.models.loading import load_model

load_model(MODEL_FOLDER, name="embedded", device="cpu", dtype="float32")
print("torchao" in sys.modules, flush=True)
import torchao.quantization
"""


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
def test_a_model_in_full_precision_is_loaded_without_torchao_and_others_can_import_it(
    forks: Forks, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with forks.begun(log, CODE) as process:
        assert process.wait(PATIENCE_S) == 0, log.read_text()
    assert log.read_text().splitlines()[0] == "False"
