import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

from guidance.linear_fit import LinearFit
from server.cli import app
from server.engine.cost_model import MAX_ROWS
from server.models.hosted import HostedModel
from server.models.inputs import RowInputs
from server.models.loading import load_model
from server.models.unet_model import UNetModel
from server.service import hosting
from server.settings import Settings
from tests.server.models.adapters import files
from tests.server.models.adapters.low_rank import changes
from tests.server.models.controls.tiny_controls import of_unet
from tests.server.models.image_prompts.tiny_image_prompts import put_adapter, put_encoder
from tests.server.process import PATIENCE_S, Forks

PROMPT = "a red circle"
TOO_LONG = "a" * 300
"""More characters than a file name may have."""


def weft(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture(scope="session")
def generate(thin_folder: Path) -> Callable[..., Result]:
    """Runs `weft generate` on a model of thin networks; arguments are what follows the prompt."""

    def run(*arguments: str) -> Result:
        return weft("generate", PROMPT, "--model", f"embedded={thin_folder}", *arguments)

    return run


def test_help_and_catalog_do_not_wait_for_torch() -> None:
    code = (
        "import sys; from server.cli import app\n"
        "for arguments in (['--help'], ['serve', '--help'], ['catalog'], ['catalog', '--json']):\n"
        "    try: app(arguments)\n"
        "    except SystemExit: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["False"] * 4


def test_the_help_of_serve_shows_the_defaults_of_the_settings() -> None:
    wide = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "250"}).output
    shown = dict(re.findall(r"--([a-z-]+) .*\[default: \((\w[^):]*)", wide))
    settings = Settings()
    for name in ("host", "port", "max-pending", "device", "dtype"):
        assert shown[name] == str(getattr(settings, name.replace("-", "_"))), name
    assert shown["row-budget"] == str(MAX_ROWS)
    assert shown["deterministic"] == shown["insecure"] == "off"
    assert not settings.deterministic
    assert not settings.insecure


@pytest.mark.parametrize("command", [[], ["serve"], ["generate"], ["catalog"]])
def test_flags_have_no_type_in_the_help(command: list[str]) -> None:
    wide = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "250"}).output
    assert re.search(r"--help +Show this message", wide)
    assert "<bool>" not in wide
    assert ("<str>" in wide) is (command in (["serve"], ["generate"]))


def test_the_catalog_lists_everything() -> None:
    shown = weft("catalog").output
    for name in ("samplers", "dpm_solver_pp", "karras", "cfg_plus_plus", "adaptive", "seg"):
        assert name in shown
    listed = json.loads(weft("catalog", "--json").output)
    assert set(listed) >= {"samplers", "spacings", "rules", "policies", "perturbations"}
    assert all(title in shown for title in listed.keys() - {"choices", "defaults"})


def test_generate_writes_the_file_with_its_settings(
    generate: Callable[..., Result], tmp_path: Path
) -> None:
    output = tmp_path / "out.png"
    arguments = ["--steps", "4", "--seed", "7", "--sampler", "unipc", "-o", str(output)]
    guidance = ["--guidance", "apg", "--scale", "3", "--policy", '{"name": "adaptive"}']
    done = generate(*arguments, *guidance, "--cache", "easy_cache")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(output)
    with Image.open(output) as picture:
        settings = json.loads(picture.text["weft"])  # type: ignore[attr-defined]
    assert settings["seed"] == 7
    assert settings["sampler"]["name"] == "unipc"
    assert settings["guidance"]["name"] == "apg"
    assert settings["guidance"]["scale"] == 3
    assert settings["guidance"]["policy"]["name"] == "adaptive"
    assert settings["cache"]["name"] == "easy_cache"


def test_generate_draws_what_a_request_can_ask_for(
    generate: Callable[..., Result], thin_folder: Path, tmp_path: Path
) -> None:
    network = UNet2DConditionModel.from_pretrained(thin_folder / "unet")
    adapters, controls, shown = (tmp_path / name for name in ("adapters", "controls", "shown"))
    adapters.mkdir()
    files.saved(files.peft({"unet": changes(network, 2)}), adapters / "ink.safetensors")
    widths = [16, 32, 64, 128]
    control = of_unet(network, 1, conditioning_embedding_out_channels=widths)
    control.save_pretrained(controls / "depth")
    put_encoder(shown)
    put_adapter(network, shown, "style", 1)
    picture, output = tmp_path / "picture.png", tmp_path / "out.png"
    Image.fromarray(np.full((40, 40, 3), 200, np.uint8)).save(picture)
    read = json.dumps({"name": "depth", "image": str(picture), "end": 0.5})
    done = generate(
        *("--steps", "2", "--width", "64", "--height", "64", "-o", str(output)),
        *("--hires", "1.5", "--clip-skip", "1", "--set", 'variation={"seed": 3, "strength": 0.2}'),
        *("--adapters", str(adapters), "--adapter", "ink=0.5"),
        *("--controls", str(controls), "--control", read),
        *("--image-prompts", str(shown), "--image-prompt", f"style={picture}:0.5"),
    )
    assert done.exit_code == 0, done.output
    with Image.open(output) as drawn:
        settings = json.loads(drawn.text["weft"])  # type: ignore[attr-defined]
        assert drawn.size == (96, 96)
    assert settings["clip_skip"] == 1
    assert settings["variation"] == {"seed": 3, "strength": 0.2}
    assert settings["adapters"] == [{"name": "ink", "weight": 0.5}]
    assert [(one["name"], one["end"]) for one in settings["controls"]] == [("depth", 0.5)]
    assert [(one["name"], one["scale"]) for one in settings["image_prompts"]] == [("style", 0.5)]


def test_generate_reads_reference_images_from_files(
    generate: Callable[..., Result], tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    Image.fromarray(np.full((40, 40, 3), 200, np.uint8)).save(picture)
    two = ("--reference-image", str(picture)) * 2
    done = generate(*two, "-o", str(tmp_path / "out.png"))
    assert done.exit_code == 2
    assert "model 'embedded' does not read reference images" in done.output.replace("\n", " ")


def test_generate_evaluates_the_model_for_its_own_image_alone(
    generate: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timing forwards of many sizes, as a server does when it starts, would take seconds."""
    rows: list[int] = []
    evaluate = UNetModel.evaluate

    def counted(model: UNetModel, x: Tensor, t: Tensor, inputs: RowInputs) -> Tensor:
        rows.append(len(x))
        return evaluate(model, x, t, inputs)

    monkeypatch.setattr(UNetModel, "evaluate", counted)
    arguments = ["--steps", "3", "--guidance", "cfg", "-n", "2", "-o", str(tmp_path / "out.png")]
    done = generate(*arguments)
    assert done.exit_code == 0, done.output
    # Both images in every forward, each with its two predictions.
    assert rows == [4, 4, 4]


def test_generate_loads_the_model_of_its_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def noted(folder: Path, *, name: str, **options: Any) -> HostedModel:
        loaded.append(name)
        return load_model(folder, name=name, **options)

    monkeypatch.setattr(hosting, "load_model", noted)
    done = weft("generate", PROMPT, "--steps", "1", "-o", str(tmp_path / "out.png"))
    assert done.exit_code == 0, done.output
    assert loaded == ["embedded"]


def test_generate_says_what_has_no_effect(generate: Callable[..., Result], tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    arguments = ["--steps", "1", "--guidance", "none", "--negative", "blue", "-o", str(output)]
    done = generate(*arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(output)
    assert "negative_prompt has no effect: guidance 'none' evaluates only" in done.stderr


def test_several_pictures_are_told_apart_by_seed(
    generate: Callable[..., Result], tmp_path: Path
) -> None:
    start = tmp_path / "start.png"
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(start)
    output = tmp_path / "many.webp"
    done = generate(
        *("--steps", "2", "--seed", "7", "-n", "2", "-o", str(output)),
        *("--image", str(start), "--strength", "0.5"),
    )
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in tmp_path.glob("*.webp")) == ["many-7.webp", "many-8.webp"]
    with Image.open(tmp_path / "many-7.webp") as picture:
        assert picture.size == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "foo"], "sampler 'foo' is unknown; allowed are: ddim,"),
        (["--steps", "0"], "steps is 0; it must be at least 1."),
        (["--guidance", "{"], "'{' is not valid JSON"),
        (["--scale", "nan"], "guidance.scale is nan; it must be a finite number."),
        (
            ["-o", "x.gif"],
            "output is 'x.gif'; the file must end in one of: .png, .jpg, .jpeg, .webp.",
        ),
        (["-o", "no/such/x.png"], "but that folder does not exist."),
        (["--image", "none.png"], "'none.png' is not a file."),
        (["--reference", "none.png"], "'none.png' is not a file."),
        (["--image", TOO_LONG], "aaa' is not a file."),
        (["-o", f"{TOO_LONG}.png"], ", which cannot be written: File name too long."),
        (["--vae", f"x={TOO_LONG}"], "allowed is `name=path`"),
        (["--adapters", TOO_LONG], "aaa' is not a folder."),
        (["--model", TOO_LONG], "' cannot be read: File name too long."),
        (["--adapter", "ink=strong"], "--adapter is 'ink=strong'; after the = a number is needed."),
        (["--dtype", "int8"], "dtype is 'int8'; it must be one of 'auto', 'float32'"),
        (["--model", "/none"], "model folder '/none' has no model_index.json"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_answered_in_one_sentence(arguments: list[str], message: str) -> None:
    done = weft("generate", PROMPT, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])  # noqa: S104
def test_an_open_port_needs_a_decision(host: str) -> None:
    done = weft("serve", "--host", host)
    assert done.exit_code == 2
    assert "other machines can reach; set WEFT_API_KEYS, or pass --insecure" in done.stderr


WEFT = "from server.cli import main; main()"


def test_a_server_without_its_model_ends(forks: Forks, tmp_path: Path) -> None:
    arguments = ["serve", "--port", "0", "--model", str(tmp_path / "none")]
    with forks.begun(tmp_path / "log", WEFT, *arguments) as process:
        assert process.wait(PATIENCE_S) == 1
    assert "the models could not be loaded" in (tmp_path / "log").read_text()


INTERRUPTED = """
import sys
from pathlib import Path

from server.cli import main
from server.engine.engine import Engine

flag = Path(sys.argv.pop(1))
warm_up = Engine._warm_up


def marked(self):
    flag.touch()
    while True:
        warm_up(self)


Engine._warm_up = marked
main()
"""
"""`weft generate` that never finishes warming up, and creates a file when it begins to."""


IMPORTING = """
import signal
import sys

from server.cli import main


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch.storage":
            signal.raise_signal(signal.{number})


sys.meta_path.insert(0, Finder)
main()
"""
"""`weft` that gets the signal to end while it imports torch."""


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_a_command_that_is_still_importing(number: str, status: int) -> None:
    command = [sys.executable, "-c", IMPORTING.format(number=number), "serve", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert "terminate called" not in done.stderr


def test_ctrl_c_ends_a_command_that_is_still_loading(forks: Forks, tmp_path: Path) -> None:
    flag, output, log = (tmp_path / name for name in ("loading", "out.png", "log"))
    arguments = [str(flag), "generate", PROMPT, "-o", str(output)]
    with forks.begun(log, INTERRUPTED, *arguments) as process:
        until = time.monotonic() + PATIENCE_S
        while not flag.exists():
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
    said = log.read_text()
    assert "Traceback" not in said
    assert "terminate called" not in said
    assert not output.exists()


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = weft("serve", "--port", str(port), "--model", str(tmp_path / "none"))
    assert refused.exit_code == 2
    said = f"port is {port}, which cannot be used on 127.0.0.1: address already in use;"
    assert said in refused.stderr


def test_linear_guidance_is_fitted_and_then_used(thin_folder: Path, tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns("weft")
    model = shutil.copytree(thin_folder, tmp_path / "model", ignore=left_out)
    run = ["--model", str(model), "--steps", "3", "--sampler", "ddim", "--guidance", "apg"]
    policy = ["--policy", '{"name": "linear_adaptive", "every": 3, "stop": 1.0}']
    generate = ["generate", PROMPT, *run, *policy, "--seed", "1", "-o", str(tmp_path / "out.png")]
    refused = weft(*generate)
    assert refused.exit_code == 2
    [command] = re.findall(r"`weft (linear-ag .*?)`", refused.output)
    assert "--steps 3 --every 3 --sampler ddim" in command
    options = shlex.split(command.replace("PATH", str(model)))
    fitted = weft(*options, "--runs", "2", "--chunk", "2")
    assert fitted.exit_code == 0, fitted.output
    file = Path(fitted.stdout.strip())
    assert file.parent == model / "weft"
    assert LinearFit.load(file).runs == 2
    made = weft(*generate)
    assert made.exit_code == 0, made.output
    again = weft(*generate)
    assert again.exit_code == 2
    assert "which exists; choose another, or pass --force" in again.stderr


def test_what_linear_guidance_cannot_be_fitted_to_is_said() -> None:
    refused = weft("linear-ag", "--guidance", "none", "--runs", "1")
    assert refused.exit_code == 2
    assert "makes one prediction only" in refused.output
