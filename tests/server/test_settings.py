import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from server.engine.client import Client
from server.environment import refusal
from server.models.hub import HubModel
from server.settings import Settings

KEY = "a-key-of-the-test-suite"


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "weft.example"])  # noqa: S104
def test_an_open_address_needs_keys_or_a_decision(host: str) -> None:
    with pytest.raises(ValidationError, match="which other machines can reach"):
        Settings(host=host)
    assert Settings(host=host, insecure=True).hosts == ("127.0.0.1", "localhost", "::1", host)
    assert Settings.model_validate({"host": host, "api_keys": (SecretStr(KEY),)}).hosts == ("*",)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_nothing(host: str) -> None:
    assert Settings(host=host).loopback


def test_the_environment_takes_lists_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_API_KEYS", f"{KEY}, {KEY}2")
    monkeypatch.setenv("WEFT_ALLOWED_HOSTS", '["x.example", "y.example"]')
    monkeypatch.setenv("WEFT_LIMITS__STEPS", "7")
    settings = Settings()
    assert [digest_of(KEY), digest_of(f"{KEY}2")] == [key.digest for key in settings.api_keys]
    assert settings.hosts == ("x.example", "y.example")
    assert settings.limits.steps == 7


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ('[""]', "key 1 is empty; a key has 16 to 256"),
        (f"{KEY}, ,", "key 2 is empty"),
        (f'["{KEY}", "tiny"]', "key 2 has 4 characters"),
        ("x" * 257, "key 1 has 257 characters"),
        ('["       padded       "]', "key 1 has characters that an HTTP header cannot carry"),
        ('["schlüssel-schlüssel"]', "key 1 has characters that an HTTP header cannot carry"),
        (
            f'[{{"key": "{KEY}", "weight": 0}}]',
            r"api_keys: key 1 has the weight 0; it must be at least 0\.01\.$",
        ),
        (
            f'[{{"key": "{KEY}", "shares": 2}}]',
            "key 1 has the field `shares`, which is unknown; allowed are key, name, ",
        ),
        (f'[{{"{KEY}": 1}}]', "key 1 has no `key`, which is required"),
        (f'[{{"key": "{KEY}", "{KEY}": 2}}]', "key 1 has a field, which is unknown; allowed are"),
        (
            f'[{{"key": ["{KEY}"]}}]',
            r"key 1 has a `key` that is not allowed; it must be a string\.$",
        ),
        (f'[{{"key": "{KEY}", "name": "a b"}}]', "the name 'a b'; it must be 1 to 64 letters"),
        (f'[{{"key": "{KEY}", "images": 1.5}}]', "the images 1.5; it must be a whole number"),
        (f'[{{"key": "{KEY}", "priority": "low"}}]', "'low'; it must be one of 'interactive', 'ba"),
        ("[5]", "key 1 is 5; it must be a string or an object"),
        (
            f'["{KEY}"',
            "it begins with . but is not a JSON list: Expecting ',' delimiter at character",
        ),
        ("[" * 100_000, "it begins with . but is not a JSON list: it is nested too deeply"),
        ('[{"key": "tiny"}]', "key 1 has 4 characters"),
        (f'["{KEY}2", {{"key": "{KEY}", "name": "key-1"}}]', "2 keys have the name 'key-1'"),
        (f"sha256:{'0' * 63}", "key 1 begins with 'sha256:'; 64 hexadecimal digits must follow"),
    ],
)
def test_a_key_that_is_easily_guessed_or_never_sent_is_refused(
    monkeypatch: pytest.MonkeyPatch, keys: str, reason: str
) -> None:
    monkeypatch.setenv("WEFT_API_KEYS", keys)
    with pytest.raises(ValidationError) as refused:
        Settings()
    assert re.search(reason, refusal(refused.value))
    for said in (str(refused.value), refusal(refused.value)):
        assert KEY not in said
        assert "tiny" not in said


def test_a_key_may_be_given_by_its_hash_alone() -> None:
    (key,) = Settings.model_validate({"api_keys": [f"sha256:{digest_of(KEY).hex()}"]}).api_keys
    assert key.opens_for(KEY)
    assert not key.opens_for(f"{KEY}x")
    assert not key.opens_for("")


def test_a_key_may_say_what_its_holder_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"key": KEY, "name": "art", "weight": 2, "images": 8, "device_s": 60}
    monkeypatch.setenv("WEFT_API_KEYS", json.dumps([entry, f"{KEY}2"]))
    first, second = Settings().api_keys
    assert first.opens_for(KEY)
    assert first.client == Client("art", weight=2, max_images=8, max_device_s=60)
    assert second.client == Client("key-2")


def test_only_the_only_key_may_unload_models_unless_a_key_says_otherwise() -> None:
    def unloads(*keys: Any) -> list[bool]:
        return [key.unloads for key in Settings.model_validate({"api_keys": keys}).api_keys]

    assert unloads(KEY) == [True]
    assert unloads({"key": KEY, "unload": False}) == [False]
    assert unloads(f"{KEY}1", {"key": f"{KEY}2"}, {"key": f"{KEY}3", "unload": True}) == [
        False,
        False,
        True,
    ]


def test_keys_are_kept_as_hashes_alone() -> None:
    settings = Settings.model_validate({"api_keys": [KEY]})
    assert KEY not in repr(settings)
    assert KEY not in repr(settings.model_dump())


def test_models_are_named_by_folder_or_by_choice(tmp_path: Path) -> None:
    folder, embedded = tmp_path / "sd15", {"embedded": tmp_path / "model", "two": tmp_path / "two"}
    assert Settings().model_folders(embedded) == embedded
    assert Settings(models=(str(folder), f"big={folder}")).model_folders(embedded) == {
        "sd15": folder,
        "big": folder,
    }


def test_models_of_the_hub_and_checkpoints_have_names_too(tmp_path: Path) -> None:
    file = tmp_path / "dream.v2.safetensors"
    file.touch()
    settings = Settings(models=("org/tiny@v1", str(file), f"mine={file}"))
    assert settings.named_folders() == {
        "tiny": HubModel("org/tiny", "v1"),
        "dream.v2": file,
        "mine": file,
    }


def test_a_folder_of_models_is_hosted_whole(tmp_path: Path) -> None:
    for name in ("b", "a", "named"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").touch()
    (tmp_path / "no-model").mkdir()
    chosen = f"named={tmp_path / 'elsewhere'}"
    settings = Settings(models=(chosen,), models_folder=tmp_path)
    assert list(settings.model_folders({}).items()) == [
        ("named", tmp_path / "elsewhere"),
        ("a", tmp_path / "a"),
        ("b", tmp_path / "b"),
    ]


def test_an_empty_folder_of_models_leaves_the_embedded_one(tmp_path: Path) -> None:
    embedded = {"embedded": tmp_path / "embedded"}
    assert Settings(models_folder=tmp_path).model_folders(embedded) == embedded
    with pytest.raises(ValueError, match="which is not a folder"):
        Settings(models_folder=tmp_path / "none").model_folders(embedded)


@pytest.mark.parametrize("field", ["models", "vaes", "tiny_vaes"])
def test_a_path_that_is_none_is_refused(field: str) -> None:
    with pytest.raises(ValidationError, match="has a NUL character"):
        Settings.model_validate({field: ["x=a\0b"]})
    settings = Settings(models=("a" * 300,))
    assert settings.named_folders() == {"a" * 300: Path("a" * 300)}


@pytest.mark.parametrize("text", ["*", "https://app.example/", "https://app.example/page", "app"])
def test_an_origin_that_no_browser_sends_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="is not an origin as browsers send it"):
        Settings.model_validate({"allowed_origins": text})


def test_origins_of_pages_files_and_programs_are_taken() -> None:
    told = "https://App.example:8443, null, app://obsidian.md, tauri://localhost, http://[::1]:5001"
    settings = Settings.model_validate({"allowed_origins": told})
    assert settings.allowed_origins == tuple(told.lower().split(", "))


def test_two_models_of_one_name_are_refused(tmp_path: Path) -> None:
    settings = Settings(models=(str(tmp_path / "a" / "x"), str(tmp_path / "b" / "x")))
    with pytest.raises(ValueError, match="two models named 'x'"):
        settings.model_folders({})


def test_the_largest_request_fits_the_queue() -> None:
    with pytest.raises(ValidationError, match=r"max_pending is 4; it must be at least"):
        Settings(max_pending=4)


def test_weights_are_quantised_for_all_models_or_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.settings.missing_package", {}.get)
    monkeypatch.setattr("server.settings.fetches_code", {}.get)
    settings = Settings(quantize=("int8", "flux=nf4", "small=none"))
    assert [settings.quantization_of(name) for name in ("sdxl", "flux", "small")] == [
        "int8",
        "nf4",
        "none",
    ]
    assert Settings().quantization_of("sdxl") == "none"
    with pytest.raises(ValidationError, match="quantize has 'flux=int4'; allowed are none, int8"):
        Settings(quantize=("flux=int4",))


def test_compiled_blocks_and_equal_bits_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="compile and deterministic are both on"):
        Settings(compile=True, deterministic=True)


def test_a_quantization_whose_package_is_missing_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.models.quantization.find_spec", {}.get)
    with pytest.raises(ValidationError, match=r"needs bitsandbytes; .* 'weft\[quantized\]'"):
        Settings(quantize=("nf4",))


def test_a_package_that_would_fetch_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.models.quantization.find_spec", lambda name: name)
    with pytest.raises(ValidationError, match="fetches code from a hub"):
        Settings(quantize=("nf4",))
    assert Settings(quantize=("int8",)).quantization_of("any") == "int8"
