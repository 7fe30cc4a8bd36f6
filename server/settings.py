"""The operator's settings, from the environment (`WEFT_PORT=9000`) or the command line."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Collection, Iterable, Mapping
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from server.api_keys import ApiKey, keys_of
from server.json_list import json_list
from server.models.hub import HubModel
from server.models.quantization import Quantization, fetches_code, missing_package

__all__ = [
    "LOOPBACK_NAMES",
    "JobSettings",
    "Limits",
    "ResultSettings",
    "Settings",
    "StreamLimits",
]

CHECKPOINT = ".safetensors"
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#\s*@]+")

PROMPT_BYTES_CEILING = 8192
"""Two prompts of this size still fit a JPEG's EXIF block, which holds 64 KB."""


def _listed(value: Any) -> Any:
    """Accept `a,b` as well as `["a", "b"]` from the environment."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("["):
        return json_list(text)
    return [part.strip() for part in text.split(",") if part.strip()]


def _place(text: str) -> Path | HubModel:
    """Resolve what the operator named; an existing path precedes a model of the hub."""
    path = Path(text).expanduser()
    return path if os.path.exists(path) else HubModel.of(text) or path


def _name(place: Path | HubModel) -> str:
    if isinstance(place, HubModel):
        return place.name
    return place.stem if place.suffix == CHECKPOINT else place.resolve().name


def _without_nul(texts: tuple[str, ...]) -> tuple[str, ...]:
    for text in texts:
        if "\0" in text:
            raise ValueError(f"{text[:200]!r} has a NUL character, which no name or path has.")
    return texts


def _origins(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Check origins, and convert them to lower case, as browsers send them."""
    for text in texts:
        if text != "null" and not _ORIGIN.fullmatch(text):
            raise ValueError(
                f"{text[:200]!r} is not an origin as browsers send it; write each like "
                "'https://app.example', without a path or a slash at its end."
            )
    return tuple(text.lower() for text in texts)


def _folder(path: Path) -> Path:
    # Unlike pathlib, os.path treats a path that is too long as one that does not exist.
    if not os.path.isdir(path):
        raise ValueError(f"{str(path)[:200]!r} is not a folder.")
    return path


Folder = Annotated[Path, AfterValidator(_folder)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed), AfterValidator(_without_nul)]
Origins = Annotated[Names, AfterValidator(_origins)]
Keys = Annotated[tuple[ApiKey, ...], NoDecode, BeforeValidator(keys_of)]


class Limits(BaseModel):
    """Upper limits on a single request."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=200, ge=1, le=1000, description="Sampling steps.")
    images: int = Field(default=16, ge=1, le=256, description="Images in one request.")
    pixels: int = Field(
        default=1024 * 1024, ge=64 * 64, description="Width times height of an image."
    )
    prompt_bytes: int = Field(
        default=4096,
        ge=1,
        le=PROMPT_BYTES_CEILING,
        description="Length of a prompt in UTF-8 bytes.",
    )
    upload_pixels: int = Field(
        default=4096 * 2048, ge=64 * 64, description="Width times height of an uploaded image."
    )
    decode_s: float = Field(
        default=5,
        gt=0,
        le=600,
        description="Processor seconds that decoding an uploaded image may take.",
    )
    body_bytes: int = Field(default=32 * 2**20, ge=1024, description="Size of a request body.")


class StreamLimits(BaseModel):
    """Upper limits on live streams."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sessions: int = Field(default=16, ge=0, le=4096, description="Streams open at once.")
    sessions_per_key: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Streams open at once with the same API key. Default: no limit besides that "
        "for all.",
    )
    in_flight: int = Field(
        default=8, ge=1, le=64, description="Frames of one stream in the engine at once."
    )
    frame_bytes: int = Field(
        default=4 * 2**20, ge=1024, le=16 * 2**20, description="Size of one input frame as a file."
    )
    stall_s: float = Field(
        default=20, gt=0, le=600, description="Seconds that a client may take to receive a message."
    )
    idle_s: float = Field(
        default=600,
        gt=0,
        le=86400,
        description="Seconds without a message from the client and without a frame to it after "
        "which its stream ends.",
    )


class JobSettings(BaseModel):
    """Durable jobs, `/v1/predictions`; off unless `folder` or `database` is given."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    folder: Path | None = Field(
        default=None,
        description="Folder in which jobs survive the end of the process: an SQLite database and "
        "their pictures. `/v1/predictions` needs this or `database`.",
    )
    database: SecretStr | None = Field(
        default=None,
        description="URL of a PostgreSQL database for the jobs instead, such as "
        "`postgresql://user:password@host/name`; several servers may share it.",
    )
    pictures: str | None = Field(
        default=None,
        description="Storage for the pictures of jobs: a path, or a URL for fsspec such as "
        "`s3://bucket/jobs`. Default: a subfolder of `folder`.",
    )
    running: int = Field(
        default=32,
        ge=1,
        le=4096,
        description="Jobs given to the engine at once, with keys taking turns; others wait.",
    )
    waiting: int = Field(
        default=1000,
        ge=1,
        le=1_000_000,
        description="Jobs of one key that may wait; one more gets status 429.",
    )
    attempts: int = Field(
        default=3,
        ge=1,
        le=100,
        description="Maximum number of attempts at a job, if the process ends while it runs, "
        "memory runs out, or its images cannot be stored.",
    )
    keep_s: float = Field(
        default=86400,
        gt=0,
        description="Seconds for which a job and its pictures are kept after its end.",
    )
    webhook_secret: SecretStr | None = Field(
        default=None,
        description="Signs webhooks: `whsec_` and the base64 of 24 to 64 bytes, such as "
        "`whsec_$(openssl rand -base64 32)`. Without it no webhooks are accepted.",
    )
    webhook_private: bool = Field(
        default=False,
        description="Allow webhooks to private and loopback addresses.",
    )

    @property
    def on(self) -> bool:
        """Whether durable jobs are on."""
        return self.folder is not None or self.database is not None

    @property
    def place_of_jobs(self) -> Path:
        """The folder of jobs, as an absolute path."""
        return (self.folder or Path()).expanduser().absolute()

    @property
    def place_of_pictures(self) -> str:
        """Storage of pictures: a path, or a URL for fsspec."""
        return self.pictures or str(self.place_of_jobs / "pictures")

    @model_validator(mode="after")
    def _find_places(self) -> Self:
        if self.database is not None:
            scheme, _, rest = self.database.get_secret_value().partition("://")
            if scheme not in ("postgresql", "postgres"):
                raise ValueError("database must be a URL that begins with postgresql://.")
            if "@" in re.split("[/?]", rest.partition("@")[2])[0]:
                # Errors would name the host, which begins within the password then.
                raise ValueError("database has more than one @; write it as %40 in the password.")
            if self.folder is None and self.pictures is None:
                raise ValueError("database is set without storage for pictures; set pictures.")
        return self

    @model_validator(mode="after")
    def _need_packages(self) -> Self:
        needed = [("jobs", "sqlalchemy"), ("jobs", "alembic")]
        if self.database is not None:
            needed.append(("postgresql", "psycopg"))
        lacking = {extra: None for extra, module in needed if self.on and not find_spec(module)}
        if lacking:
            raise ValueError(
                "durable jobs are on, but packages that they need are not installed; install them "
                f"with: pip install 'weft[{','.join(lacking)}]'."
            )
        return self

    @model_validator(mode="after")
    def _check_secret(self) -> Self:
        if self.webhook_secret is None:
            return self
        prefix, _, encoded = self.webhook_secret.get_secret_value().partition("_")
        try:
            size = len(base64.b64decode(encoded, validate=True)) if prefix == "whsec" else 0
        except ValueError:
            size = 0
        if not 24 <= size <= 64:
            raise ValueError(
                "webhook_secret must be whsec_ and the base64 of 24 to 64 bytes, for example "
                "whsec_ and the output of `openssl rand -base64 32`."
            )
        return self


class ResultSettings(BaseModel):
    """Images that responses return as URLs, with `"response_format": "url"`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    place: str | None = Field(
        default=None,
        description="Storage for the images behind URLs: a path, or a URL for fsspec. Default: the "
        "subfolder `results` of `WEFT_JOBS__FOLDER`, or without that a temporary folder, which is "
        "deleted when the process ends.",
    )
    keep_s: float = Field(
        default=3600,
        ge=1,
        le=365 * 86400,
        description="Seconds for which an image can be fetched at its URL.",
    )
    total_bytes: int = Field(
        default=2**30,
        ge=2**20,
        description="Maximum bytes of all images behind URLs; beyond it the oldest images of the "
        "key with the most bytes are deleted early.",
    )
    base_url: str | None = Field(
        default=None,
        pattern="^https?://[^/]",
        description="Beginning of URLs, such as `https://images.example`, if a proxy gives this "
        "server another address. Default: the address that the request was sent to.",
    )


class Settings(BaseSettings):
    """Everything that an operator can configure."""

    model_config = SettingsConfigDict(
        env_prefix="WEFT_",
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        # A refused key must not be printed.
        hide_input_in_errors=True,
    )

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on.")

    models: Names = Field(
        default=(),
        description="Models, each `path` or `name=path` of a folder or a `.safetensors` "
        "checkpoint, or `org/name@revision` of the Hugging Face hub, loaded at start-up; the "
        "embedded models if empty.",
    )
    models_folder: Path | None = Field(
        default=None,
        description="A folder of model folders: each subfolder with a `model_index.json` is hosted "
        "under its own name, after those of `models`, and loaded when a request names it.",
    )
    cache: Path = Field(
        default=Path("~/.cache/weft"),
        description="Folder for converted single-file checkpoints and for compiled blocks.",
    )
    memory_gib: float | None = Field(
        default=None,
        gt=0,
        description="Memory for the weights of all loaded models and for their CUDA graphs, in "
        "GiB; beyond it the least recently used models are unloaded, and graphs released. Default: "
        "the free memory of the device, on a GPU all but a tenth of it.",
    )
    load_s: float = Field(
        default=300,
        gt=0,
        le=3600,
        description="Seconds that a request waits for its model to be loaded.",
    )
    device: str = Field(default="auto", description="Device: `auto`, `cpu`, `cuda` or `cuda:N`.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto",
        description="Precision of the models; `auto` is float32 on a CPU, and on a GPU bfloat16 "
        "for families that need its range and float16 for the others.",
    )
    vaes: Names = Field(
        default=(),
        description="Autoencoders that replace models' own, each `name=path` of a `.safetensors` "
        "file, by diffusers' names or the original ones, or of a folder in the diffusers layout.",
    )
    tiny_vaes: Names = Field(
        default=(),
        description="Tiny autoencoders beside models' own, each `name=path` as in `vaes`, for "
        "requests with the `autoencoder` `tiny`.",
    )
    denoisers: Names = Field(
        default=(),
        description="U-Nets or transformers that replace models' own, each `name=path` of a "
        "`.safetensors` or `.gguf` file, by diffusers' names or the original ones.",
    )
    quantize: Names = Field(
        default=(),
        description="Quantisation of weights: `int8`, `fp8` or `nf4` for all models, or "
        "`name=int8` for one, `name=none` to leave it as it is. Needs the extra `quantized`.",
    )
    offload: Literal["auto", "none", "text", "all"] = Field(
        default="auto",
        description="The parts of a model that stay in host memory and are copied to the GPU block "
        "by block as it runs: `text` for its text encoders, `all` for the denoiser too. `auto` "
        "takes the first of `none`, `text` and `all` that fits; on a CPU it is `none`.",
    )
    adapters: Folder | None = Field(
        default=None,
        description="Folder with LoRA files, `NAME.safetensors`, or folders that peft saved, that "
        "requests may name in `adapters`.",
    )
    adapter_bytes: int = Field(
        default=2 * 2**30,
        ge=0,
        description="Memory for loaded adapters of all models, in bytes.",
    )
    embeddings: Folder | None = Field(
        default=None,
        description="Folder with textual inversion embeddings, `NAME.safetensors`, that prompts "
        "may name.",
    )
    controls: Folder | None = Field(
        default=None,
        description="Folder with ControlNets, each a folder in the diffusers layout or, for "
        "models with a U-Net, a file `NAME.safetensors`, that requests "
        "may name in `controls`.",
    )
    control_bytes: int = Field(
        default=8 * 2**30,
        ge=0,
        description="Memory for loaded ControlNets of all models, in bytes.",
    )
    image_prompts: Folder | None = Field(
        default=None,
        description="Folder with IP-Adapters, `NAME.safetensors`, that requests may name in "
        "`image_prompts`, and the image encoders that they read, each a folder.",
    )
    image_prompt_bytes: int = Field(
        default=8 * 2**30,
        ge=0,
        description="Memory for loaded IP-Adapters and image encoders of all models, in bytes.",
    )
    deterministic: bool = Field(
        default=False,
        description="Make every image bit-identical whatever else is in its batch. All forward "
        "passes then have the same number of rows, which also slows down a single image: the "
        "smallest number with most of the best throughput is chosen at start-up, or the number in "
        "`WEFT_ROW_BUDGET`, which also keeps the bits after a restart. Images that need more rows "
        "at once have larger passes.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the repeated blocks of denoisers in the background, in separate "
        "processes; passes run eagerly until that is done. Needs a C++ compiler, and works neither "
        "with `deterministic` nor for models that are quantised or streamed from host memory.",
    )
    cuda_graphs: Literal["auto", "off"] = Field(
        default="auto",
        description="Whether forward passes on an NVIDIA GPU are recorded as CUDA graphs and "
        "replayed: `auto` records those that this makes faster, with up to an eighth of the memory "
        "for each model.",
    )
    row_budget: int | None = Field(
        default=None,
        ge=2,
        le=1024,
        description="Maximum rows in one forward pass of the denoiser (default 128). Each pass "
        "has as many as the waiting work and the measured cost of a pass suggest.",
    )
    live_tick_s: float = Field(
        default=0.1,
        gt=0,
        le=10,
        description="Maximum estimated seconds of one pass while frames of live streams are "
        "running.",
    )
    max_pending: int = Field(
        default=1024,
        ge=1,
        le=65536,
        description="Maximum images queued or running, except frames of live streams; requests "
        "beyond it get status 429.",
    )
    max_pending_s: float = Field(
        default=300,
        ge=1,
        le=86400,
        description="Maximum estimated device seconds that these images need; requests beyond it "
        "get status 429. Clients with nothing queued or running are served anyway.",
    )
    max_pending_bytes: int = Field(
        default=4 * 2**30,
        ge=2**20,
        description="Maximum bytes that these images need, estimated from the sizes of their "
        "latents, uploads and results; requests beyond it get status 429.",
    )
    decode_processes: int = Field(
        default=2,
        ge=1,
        le=64,
        description="Uploaded images decoded at once, each in its own process.",
    )
    limits: Limits = Limits()
    streams: StreamLimits = StreamLimits()
    jobs: JobSettings = JobSettings()
    results: ResultSettings = ResultSettings()

    api_keys: Keys = Field(
        default=(),
        description="Accepted bearer keys, each of 16 to 256 characters, or `sha256:` and the 64 "
        "hexadecimal digits of its SHA-256, or an object with `key`, `name`, `weight`, `images`, "
        "`device_s`, `priority` and `unload`. Without keys, anyone who can reach the port is "
        "served.",
    )
    insecure: bool = Field(
        default=False,
        description="Allow a non-loopback address without API keys, open to the whole network.",
    )
    allowed_hosts: Names | None = Field(
        default=None,
        description="Accepted values of the `Host` header, `*` for any. Default: the loopback "
        "names and `host`; any, if keys are set and the address is not loopback.",
    )
    allowed_origins: Origins = Field(
        default=(),
        description="Origins of other web pages that may call the API, e.g. `https://app.example`.",
    )
    max_connections: int = Field(
        default=512,
        ge=1,
        le=65536,
        description="Maximum open connections; beyond it the one that has waited longest for the "
        "rest of a request is closed, or the new one gets status 429.",
    )
    headers_s: float = Field(
        default=10,
        gt=0,
        le=3600,
        description="Seconds within which the headers of a request must arrive.",
    )
    write_s: float = Field(
        default=30,
        gt=0,
        le=3600,
        description="Seconds after which a client that does not read its response is dropped.",
    )
    body_s: float = Field(
        default=60, gt=0, le=3600, description="Seconds within which a request body must arrive."
    )
    bodies_bytes: int = Field(
        default=256 * 2**20,
        ge=1024,
        description="Bytes of large request bodies, over 64 KiB each, that may be in memory at "
        "once; a request with one more gets status 429.",
    )
    drain_s: float = Field(
        default=30,
        ge=0,
        le=3600,
        description="Seconds from the signal that stops the server to the end of its process, at "
        "least about 3. Running requests may finish until 3 seconds before the end; then they get "
        "status 503.",
    )
    lame_duck_s: float = Field(
        default=1,
        ge=0,
        le=600,
        description="Minimum seconds from SIGTERM until the listener closes, in which `/readyz` "
        "and new requests get status 503, so that load balancers notice.",
    )

    @model_validator(mode="after")
    def _guard_the_door(self) -> Self:
        if not (self.loopback or self.api_keys or self.insecure):
            raise ValueError(
                f"host is {self.host!r}, which other machines can reach; set WEFT_API_KEYS, "
                "or pass --insecure to serve without keys."
            )
        return self

    @model_validator(mode="after")
    def _check_compile(self) -> Self:
        if self.compile and self.deterministic:
            raise ValueError(
                "compile and deterministic are both on, but an image's bits would depend on "
                "whether its blocks were compiled by then; turn one of them off."
            )
        return self

    @model_validator(mode="after")
    def _check_quantize(self) -> Self:
        for entry in self.quantize:
            kind, kinds = entry.rpartition("=")[2], get_args(Quantization)
            if kind not in kinds:
                raise ValueError(
                    f"quantize has {entry[:80]!r}; allowed are {', '.join(kinds)}, alone or after "
                    "`name=`."
                )
            if package := missing_package(kind):
                raise ValueError(
                    f"quantize has {entry[:80]!r}, which needs {package}; install it with: "
                    "pip install 'weft[quantized]'."
                )
            if fetches_code(kind):
                raise ValueError(
                    f"quantize has {entry[:80]!r}, for which bitsandbytes fetches code from a hub "
                    "while the package kernels is installed; uninstall kernels."
                )
        return self

    @model_validator(mode="after")
    def _check_networks(self) -> Self:
        autoencoder = ".safetensors file or of a folder in the diffusers layout"
        for field, entries, place in (
            ("vaes", self.vaes, autoencoder),
            ("tiny_vaes", self.tiny_vaes, autoencoder),
            ("denoisers", self.denoisers, ".safetensors or .gguf file"),
        ):
            for entry in entries:
                name, _, path = entry.partition("=")
                if not name or not path or not os.path.exists(path):
                    raise ValueError(
                        f"{field} has {entry[:200]!r}; allowed is `name=path`, with the name of a "
                        f"model and the path of a {place}."
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

    @model_validator(mode="after")
    def _let_one_body_in(self) -> Self:
        if self.bodies_bytes < self.limits.body_bytes:
            raise ValueError(
                f"bodies_bytes is {self.bodies_bytes}; it must be at least limits.body_bytes, "
                f"which is {self.limits.body_bytes}."
            )
        return self

    @property
    def memory_bytes(self) -> float:
        """``memory_gib`` in bytes; infinite without it."""
        return inf if self.memory_gib is None else self.memory_gib * 2**30

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK_NAMES

    @property
    def place_of_results(self) -> str | None:
        """Storage of results: a path, or a URL for fsspec; None for a temporary folder."""
        if self.results.place is None and self.jobs.folder is not None:
            return str(self.jobs.place_of_jobs / "results")
        return self.results.place

    @property
    def hosts(self) -> tuple[str, ...]:
        """Accepted values of the `Host` header; `*` accepts any."""
        if self.allowed_hosts is not None:
            return self.allowed_hosts
        if self.api_keys and not self.loopback:
            return ("*",)
        return (*LOOPBACK_NAMES, self.host)

    def quantization_of(self, model: str) -> Quantization:
        """Quantization of a model's weights, by the model's name."""
        kinds = self._quantizations()
        return kinds.get(model, kinds.get("", "none"))

    def vae_of(self, model: str) -> Path | None:
        """The autoencoder that replaces a model's own, by the model's name."""
        return _paths(self.vaes).get(model)

    def tiny_vae_of(self, model: str) -> Path | None:
        """The tiny autoencoder beside a model's own, by the model's name."""
        return _paths(self.tiny_vaes).get(model)

    def denoiser_of(self, model: str) -> Path | None:
        """The file of the denoiser that replaces a model's own, by the model's name."""
        return _paths(self.denoisers).get(model)

    def unknown_models(self, models: Collection[str]) -> list[tuple[str, str]]:
        """Names in settings of single models that no model has, each with its field."""
        named = {
            "quantize": self._quantizations(),
            "vaes": _paths(self.vaes),
            "tiny_vaes": _paths(self.tiny_vaes),
            "denoisers": _paths(self.denoisers),
        }
        return [
            (field, name)
            for field, of_models in named.items()
            for name in of_models
            if name and name not in models
        ]

    def _quantizations(self) -> dict[str, Any]:
        """Quantization by name of the model; the empty name stands for all others."""
        parts = [entry.rpartition("=") for entry in self.quantize]
        return {name: kind for name, _, kind in parts}

    def model_folders(self, embedded: Mapping[str, Path]) -> dict[str, Path | HubModel]:
        """Folder or hub model of each hosted model by name; the first is the default.

        Args:
            embedded: folders of the embedded models, which are hosted if no others are given.

        Raises:
            ValueError: two models have one name, or the folder of models is not a folder.
        """
        folders = self.named_folders()
        for folder in self.found_folders():
            folders.setdefault(folder.name, folder)
        return folders or dict(embedded)

    def named_folders(self) -> dict[str, Path | HubModel]:
        """Folder or hub model of each model in `models`, by name.

        Raises:
            ValueError: two models have one name.
        """
        folders: dict[str, Path | HubModel] = {}
        for entry in self.models:
            name, separator, path = entry.partition("=")
            place = _place(path if separator else entry)
            name = name if separator else _name(place)
            if name in folders:
                raise ValueError(
                    f"models has two models named {name!r}; write `name=path` to rename one."
                )
            folders[name] = place
        return folders

    def found_folders(self) -> list[Path]:
        """The model folders that are in `models_folder` now, in order of their names.

        Raises:
            ValueError: `models_folder` is not a folder.
        """
        if self.models_folder is None:
            return []
        if not os.path.isdir(self.models_folder):
            raise ValueError(
                f"models_folder is {str(self.models_folder)[:200]!r}, which is not a folder."
            )
        return sorted(index.parent for index in self.models_folder.glob("*/model_index.json"))


def _paths(entries: Iterable[str]) -> dict[str, Path]:
    """Paths by name, from entries `name=path`."""
    return {name: Path(path) for name, _, path in (one.partition("=") for one in entries)}
