from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from server.settings import Settings


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "weft.example"])  # noqa: S104
def test_an_open_address_needs_keys_or_a_decision(host: str) -> None:
    with pytest.raises(ValidationError, match="which other machines can reach"):
        Settings(host=host)
    assert Settings(host=host, insecure=True).hosts == ("127.0.0.1", "localhost", "::1", host)
    assert Settings(host=host, api_keys=(SecretStr("secret"),)).hosts == ("*",)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_nothing(host: str) -> None:
    assert Settings(host=host).loopback


def test_the_environment_takes_lists_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_API_KEYS", "a, b")
    monkeypatch.setenv("WEFT_ALLOWED_HOSTS", '["x.example", "y.example"]')
    monkeypatch.setenv("WEFT_LIMITS__STEPS", "7")
    settings = Settings()
    assert [key.get_secret_value() for key in settings.api_keys] == ["a", "b"]
    assert settings.hosts == ("x.example", "y.example")
    assert settings.limits.steps == 7


def test_a_key_is_not_printed() -> None:
    assert "hunter2" not in repr(Settings(api_keys=(SecretStr("hunter2"),)))


def test_models_are_named_by_folder_or_by_choice(tmp_path: Path) -> None:
    folder, embedded = tmp_path / "sd15", tmp_path / "embedded"
    assert Settings().model_folders(embedded) == {"embedded": embedded}
    assert Settings(models=(str(folder), f"big={folder}")).model_folders(embedded) == {
        "sd15": folder,
        "big": folder,
    }


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    settings = Settings(models=(str(tmp_path / "a" / "x"), str(tmp_path / "b" / "x")))
    with pytest.raises(ValueError, match="two models named 'x'"):
        settings.model_folders(tmp_path)


def test_the_largest_request_fits_the_queue() -> None:
    with pytest.raises(ValidationError, match=r"max_pending is 4; it must be at least"):
        Settings(max_pending=4)
