"""Loads parts of a model folder from untrusted configs, matching weights by name.

Only entries that a class declares are passed on from its config, so that no entry can choose an
attention kernel, a quantizer or custom code. Tensors that are missing, unexpected or of another
shape raise an error that names them: such a part would fail at its first use, or worse, generate
noise. Weights may have the names of the original code.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from server.errors import ModelMismatch
from server.models.folder import GGUF, component_class, read_json
from server.models.gguf.file import load_gguf
from server.models.gguf.layers import in_shape, keep_in_blocks, whole_shape
from server.models.original_weights import as_diffusers
from server.models.sentencepiece_file import t5_tokenizer
from server.models.weight_files import NETWORK, TEXT_ENCODER, weight_files

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

NAMES_SHOWN = 3
OLD_ROPE = ("rope_theta", "rope_scaling")
TOKENIZER, SENTENCEPIECE = "tokenizer.json", "spiece.model"
"""Files of a tokenizer; the second is that of T5 in older folders, which lack the first."""

MIN_TOKENS = 3
"""Number of tokens of a prompt with one word: its own, and the start and end markers."""

_DRAWN = (nn.init.uniform_, nn.init.kaiming_uniform_, nn.init.normal_)
"""Functions that layers initialize their weights with."""


class _WithoutMemory(TorchFunctionMode):
    """Creates layers with weights on the meta device, while computed buffers get real values.

    If everything were created on torch's meta device, position tables, which no weight file
    contains, would be lost. Initial values of weights are not drawn: on the meta device, torch does
    that in Python, which takes a quarter of the time that a small model needs to load.
    """

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = kwargs | {"device": "meta"}
        elif func in _DRAWN:
            tensor: Tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def load_network(folder: Path, part: str, allowed: Sequence[Any], dtype: torch.dtype) -> Any:
    """Load a diffusers network, in inference mode on the CPU.

    Args:
        folder: model folder.
        part: name of the part in ``model_index.json`` and of its subfolder.
        allowed: classes that the folder may name.
        dtype: dtype of the weights.

    Raises:
        ModelMismatch: another class, or weights that do not match the config.
    """
    classes = {kind.__name__: kind for kind in allowed}
    kind = classes[component_class(folder, part, frozenset(classes))]
    return build_network(folder, part, kind, dtype)


def load_autoencoder(folder: Path, dtype: torch.dtype) -> Any:
    """Load the part ``vae``, in float32 instead of float16 if its config says ``force_upcast``.

    The autoencoder of Stable Diffusion XL overflows in float16, and so may those of its successors.

    Args:
        folder: model folder, which names an ``AutoencoderKL`` or an ``AutoencoderTiny``.
        dtype: dtype of the model.

    Raises:
        ModelMismatch: another class, or weights that do not match the config.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny

    upcast = read_json(folder, "vae/config.json").get("force_upcast", True)
    own = torch.float32 if upcast and dtype == torch.float16 else dtype
    return load_network(folder, "vae", [AutoencoderKL, AutoencoderTiny], own)


def build_network(
    folder: Path,
    part: str,
    kind: Any,
    dtype: torch.dtype,
    config: Mapping[str, Any] | None = None,
) -> Any:
    """Build a diffusers network of a known class; see :func:`load_network`.

    Args:
        folder: folder that contains it.
        part: name of its subfolder, or of a file with its weights.
        kind: class of the network.
        dtype: dtype of the weights.
        config: config of the network; by default that in the subfolder.
    """
    entries = read_json(folder, f"{part}/config.json") if config is None else config
    with _WithoutMemory():
        network = kind(**known_entries(entries, kind.__init__))
    called = f"{part} of model folder {str(folder)!r}"
    try:
        weights = as_diffusers(_weights_of(folder, part), network, called, dtype)
    except KeyError as error:
        raise ModelMismatch(f"{called} lacks the tensor {error}.") from None
    # Autoencoders of 2022 use older names for their attention layers.
    network._fix_state_dict_keys_on_load(weights)
    expected = network.state_dict()
    for name in weights.keys() & expected.keys():
        weights[name] = in_shape(weights[name], tuple(expected[name].shape))
    _check_tensors(
        folder,
        part,
        missing=[name for name in expected if name not in weights],
        unexpected=[name for name in weights if name not in expected],
        mismatched=[
            name
            for name, tensor in expected.items()
            if name in weights and whole_shape(weights[name]) != tensor.shape
        ],
    )
    keep_in_blocks(network, weights, dtype)
    cast = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }
    network.load_state_dict(cast, assign=True)
    _use_torch_attention(network)
    return network.eval().requires_grad_(requires_grad=False)


def _use_torch_attention(network: nn.Module) -> None:
    """Make a network use torch's own attention, whatever the environment says.

    ``DIFFUSERS_ATTN_BACKEND`` may name other backends; some run code from a hub or attend to
    padding.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    for module in network.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = AttentionBackendName.NATIVE


def load_text_encoder(folder: Path, part: str, kind: Any, dtype: torch.dtype) -> Any:
    """Load a text encoder of transformers, in inference mode on the CPU.

    Args:
        folder: model folder.
        part: name of the part in ``model_index.json`` and of its subfolder.
        kind: class that the folder must name.
        dtype: dtype of the weights.

    Raises:
        ModelMismatch: another class, or weights that do not match the config.
    """
    component_class(folder, part, frozenset({kind.__name__}))
    return build_encoder(folder, part, kind, dtype)


def build_encoder(folder: Path, part: str, kind: Any, dtype: torch.dtype) -> Any:
    """Build an encoder of transformers of a known class; see :func:`load_text_encoder`."""
    config = read_json(folder, f"{part}/config.json")
    encoder, found = _of_default_type(kind, dtype).from_pretrained(
        folder / part,
        variant=weight_files(folder, part, TEXT_ENCODER).variant,
        config=_config_of_text(config, kind.config_class),
        dtype=dtype,
        attn_implementation="sdpa" if kind._supports_sdpa else "eager",
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    _check_tensors(
        folder,
        part,
        missing=found["missing_keys"],
        unexpected=found["unexpected_keys"],
        mismatched=[entry[0] for entry in found["mismatched_keys"]],
    )
    return encoder.eval().requires_grad_(requires_grad=False)


def load_tokenizer(folder: Path, part: str, kind: Any, positions: int) -> Any:
    """Load a tokenizer of transformers, with a ``model_max_length`` that the text encoder accepts.

    Args:
        folder: model folder.
        part: name of the part in ``model_index.json`` and of its subfolder.
        kind: class of the tokenizer.
        positions: number of positions of the text encoder. A larger ``model_max_length``, such as
            the placeholder for no limit, is lowered to it.

    Raises:
        ModelMismatch: another class, no vocabulary, or a ``model_max_length`` that leaves no room
            for a word.
    """
    component_class(folder, part, frozenset({kind.__name__, f"{kind.__name__}Fast"}))
    _check_vocabulary(folder, part, kind)
    name = f"{part}/tokenizer_config.json"
    config = read_json(folder, name) if (folder / name).exists() else {}
    longest = config.get("model_max_length", positions)
    is_count = isinstance(longest, int | float) and not isinstance(longest, bool)
    if not is_count or not longest >= MIN_TOKENS:
        raise ModelMismatch(
            f"{name} of model folder {str(folder)!r} has the model_max_length "
            f"{str(longest)[:40]!r}; a whole number of at least {MIN_TOKENS} is needed."
        )
    if (folder / part / SENTENCEPIECE).is_file() and not (folder / part / TOKENIZER).is_file():
        tokenizer = t5_tokenizer(folder, f"{part}/{SENTENCEPIECE}", kind)
    else:
        tokenizer = kind.from_pretrained(folder / part, local_files_only=True)
    tokenizer.model_max_length = int(min(longest, positions))
    return tokenizer


def _check_vocabulary(folder: Path, part: str, kind: Any) -> None:
    """Refuse a tokenizer without files, for which transformers would make an empty vocabulary."""
    own = sorted(name for name in kind.vocab_files_names.values() if name != TOKENIZER)
    if (folder / part / TOKENIZER).is_file():
        return
    if own and all((folder / part / one).is_file() for one in own):
        return
    alternative = f", or {' and '.join(own)}" if own else ""
    raise ModelMismatch(
        f"model folder {str(folder)!r} has no vocabulary of its {part}; "
        f"{part}/{TOKENIZER} is needed{alternative}."
    )


def known_entries(config: Mapping[str, Any], constructor: Callable[..., Any]) -> dict[str, Any]:
    """The entries of a config that its class declares as parameters; all others are ignored."""
    declared = signature(constructor).parameters
    return {name: value for name, value in config.items() if name in declared and name != "self"}


def _config_of_text(config: Mapping[str, Any], kind: Any) -> Any:
    """Build a config of transformers, including nested ones."""
    declared = signature(kind.__init__).parameters
    entries = known_entries(config, kind.__init__)
    # Configs from before transformers 5 have the rotary embedding's parameters under these names.
    if "rope_parameters" in declared:
        entries |= {name: config[name] for name in OLD_ROPE if name in config}
    for name, nested in kind.sub_configs.items():
        # Configs from before transformers 4.52 have the text model's entries at the top level.
        own = config.get(name, config if name == "text_config" else None)
        if isinstance(own, dict):
            entries[name] = _config_of_text(own, nested)
    return kind(**entries)


def check_loaded(folder: Path, modules: Mapping[str, nn.Module]) -> None:
    """Refuse networks with parameters or buffers that were never given a value.

    Raises:
        ModelMismatch: a parameter or a buffer is still on torch's meta device.
    """
    for part, module in modules.items():
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        _check_tensors(folder, part, missing=[k for k, v in tensors.items() if v.is_meta])


def _of_default_type(kind: Any, dtype: torch.dtype) -> Any:
    """Subclass a class of transformers so that loading does not change torch's default dtype.

    The default dtype is shared by all threads: noise drawn by another thread in the meantime would
    be rounded to it, so that loading a model would change an image.
    """

    def init_context(cls: Any, _: torch.dtype, *given: Any) -> Any:
        return super(made, cls).get_init_context(torch.get_default_dtype(), *given)

    def init(self: Any, *given: Any, **named: Any) -> None:
        super(made, self).__init__(*given, **named)
        # Still on the meta device; weights are converted to the dtype of their parameter.
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)

    same = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    made = type(
        kind.__name__,
        (kind,),
        {**same, "get_init_context": classmethod(init_context), "__init__": init},
    )
    return made


def _weights_of(folder: Path, part: str) -> dict[str, Tensor]:
    if (folder / part).is_file():
        return load_file(folder / part)
    weights: dict[str, Tensor] = {}
    for name in weight_files(folder, part, NETWORK).names:
        file = folder / part / name
        if file.parent != folder / part or not file.is_file():
            raise ModelMismatch(
                f"model folder {str(folder)!r} has no {part}/{name[:80]}; weights are "
                "expected there as safetensors."
            )
        weights |= load_gguf(file) if file.suffix == GGUF else load_file(file)
    return weights


def _check_tensors(
    folder: Path,
    part: str,
    *,
    missing: Sequence[str] = (),
    unexpected: Sequence[str] = (),
    mismatched: Sequence[str] = (),
) -> None:
    for names, what in (
        (missing, "lacks"),
        (unexpected, "has, beyond what its config describes,"),
        (mismatched, "has in another shape than its config describes"),
    ):
        if names:
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            raise ModelMismatch(
                f"{part} of model folder {str(folder)!r} {what} the "
                f"{'tensor' if len(names) == 1 else 'tensors'} "
                f"{', '.join(sorted(names)[:NAMES_SHOWN])}{more}."
            )
