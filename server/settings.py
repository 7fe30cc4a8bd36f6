"""What an operator may set, by environment (`WEFT_PORT=9000`) or command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

__all__ = ["LOOPBACK_NAMES", "Limits", "Settings"]

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")

PROMPT_BYTES_CEILING = 8192
"""Two prompts of this size still fit a JPEG's EXIF block, which holds 64 KB."""


def _listed(value: Any) -> Any:
    """Take `a,b` as well as `["a", "b"]` from the environment."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("["):
        return json.loads(text)
    return [part.strip() for part in text.split(",") if part.strip()]


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_listed)]


class Limits(BaseModel):
    """The most that one request may ask for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=200, ge=1, le=1000, description="Sampler steps.")
    images: int = Field(default=16, ge=1, le=256, description="Images in one request.")
    pixels: int = Field(default=1024 * 1024, ge=64 * 64, description="Pixels of one image.")
    prompt_bytes: int = Field(
        default=4096, ge=1, le=PROMPT_BYTES_CEILING, description="Bytes of a prompt in UTF-8."
    )
    upload_pixels: int = Field(
        default=4096 * 2048, ge=64 * 64, description="Pixels of a picture that is sent in."
    )
    body_bytes: int = Field(default=32 * 2**20, ge=1024, description="Bytes of a request's body.")


class Settings(BaseSettings):
    """Everything an operator may set."""

    model_config = SettingsConfigDict(
        env_prefix="WEFT_", env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on.")

    models: Names = Field(
        default=(),
        description="Model folders, `path` or `name=path`; none means the embedded model.",
    )
    device: str = Field(default="auto", description="`auto`, `cpu`, `cuda`, `cuda:1`.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="Of the model; `auto` is float32 on a CPU and float16 on a GPU."
    )
    deterministic: bool = Field(
        default=False,
        description="Bit-identical images whatever else is in the batch, at some speed.",
    )
    row_budget: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Model rows a tick; measured at start when not given.",
    )
    max_pending: int = Field(
        default=256, ge=1, le=65536, description="Images waiting or under way before 429."
    )
    limits: Limits = Limits()

    api_keys: Secrets = Field(
        default=(), description="Bearer keys; with none, everybody who reaches the port is served."
    )
    insecure: bool = Field(
        default=False, description="Listen beyond loopback without keys, knowing what that means."
    )
    allowed_hosts: Names | None = Field(
        default=None,
        description="Names a request may address in `Host`, `*` for any; by default the loopback "
        "names and `host`, or any where others must show a key.",
    )
    allowed_origins: Names = Field(
        default=(),
        description="Origins of other web pages that may call, e.g. `https://app.example`.",
    )
    drain_s: float = Field(
        default=30,
        ge=0,
        le=3600,
        description="Seconds that work under way gets when the server stops.",
    )

    @model_validator(mode="after")
    def _guard_the_door(self) -> Self:
        if not (self.loopback or self.api_keys or self.insecure):
            raise ValueError(
                f"host is {self.host!r}, which others can reach; set WEFT_API_KEYS, "
                "or allow it with --insecure."
            )
        return self

    @model_validator(mode="after")
    def _let_one_request_in(self) -> Self:
        if self.max_pending < self.limits.images:
            raise ValueError(
                f"max_pending is {self.max_pending}; it must be at least limits.images, which is "
                f"{self.limits.images}."
            )
        return self

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK_NAMES

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names that a request may address in `Host`; `*` stands for any."""
        if self.allowed_hosts is not None:
            return self.allowed_hosts
        if self.api_keys and not self.loopback:
            return ("*",)
        return (*LOOPBACK_NAMES, self.host)

    def model_folders(self, embedded: Path) -> dict[str, Path]:
        """Folder of each hosted model by name, the first being the default.

        Args:
            embedded: folder of the built-in model, hosted when no other is named.
        """
        if not self.models:
            return {"embedded": embedded}
        folders: dict[str, Path] = {}
        for entry in self.models:
            name, separator, path = entry.partition("=")
            folder = Path(path if separator else entry).expanduser()
            name = name if separator else folder.resolve().name
            if name in folders:
                raise ValueError(
                    f"models names {name!r} twice; write `name=path` to tell them apart."
                )
            folders[name] = folder
        return folders
