"""Loading a model imports no package that only quantized weights need."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

CODE = """
import sys
from embedded import MODEL_FOLDER
from server.models.loading import load_model

load_model(MODEL_FOLDER, name="embedded", device="cpu", dtype="float32")
print("torchao" in sys.modules)
import torchao.quantization
"""


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
def test_a_model_in_full_precision_is_loaded_without_torchao_and_others_can_import_it() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
