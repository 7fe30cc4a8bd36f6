"""The messages for operators about settings that cannot be used."""

import socket

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.environment import unknown_variables


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("WEFT_LIMITS__STEPS", "0", "limits.steps is '0'; it must be at least 1."),
        ("WEFT_PORT", "tcp://10.0.0.1:8000", "port is 'tcp://10.0.0.1:8000'; it must be a whole"),
        ("WEFT_LIMITS__PIXLES", "9", "limits.pixles is not a known field (did you mean pixels?)"),
        ("WEFT_HOST", "0.0.0.0", "host is '0.0.0.0', which other machines can reach; set"),  # noqa: S104
        ("WEFT_LIMITS", "steps=9", "WEFT_LIMITS is not valid JSON; it must be an object of"),
        ("WEFT_LIMITS", "[" * 100_000, "WEFT_LIMITS is not valid JSON; it must be an object of"),
        ("WEFT_API_KEYS", "[5", "api_keys: it begins with [ but is not a JSON list: Expecting"),
        (
            "WEFT_MODELS",
            "[" * 100_000,
            "models: it begins with [ but is not a JSON list: it is nest",
        ),
    ],
)
def test_a_setting_that_is_not_allowed_is_refused_in_one_sentence(
    variable: str, value: str, sentence: str
) -> None:
    refused = CliRunner().invoke(app, ["serve"], env={variable: value})
    assert refused.exit_code == 2
    assert refused.stderr.startswith(sentence)
    assert refused.stderr.count("\n") == 1


def test_variables_that_only_look_like_settings_are_named() -> None:
    environ = {
        "HOME": "/root",
        "WEFT_PORT": "8000",
        "WEFT_LIMITS__STEPS": "9",
        "WEFT_API_KEY": "that of a client",
        "WEFT_MAX_CONECTIONS": "9",
        "WEFT_SERVICE_HOST": "10.0.0.1",
    }
    assert list(unknown_variables(environ)) == [
        "WEFT_MAX_CONECTIONS is set, but there is no such setting; did you mean "
        "WEFT_MAX_CONNECTIONS?",
        "WEFT_SERVICE_HOST is set, but there is no such setting.",
    ]


def test_the_log_names_a_variable_that_is_no_setting(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused = CliRunner().invoke(app, ["serve", "--port", port], env={"WEFT_API_KEYZ": "x"})
    assert refused.exit_code == 2
    assert "WEFT_API_KEYZ is set, but there is no such setting; did you mean" in caplog.text
