"""Loading of base models and tokenizers from Hugging Face folders, GGUF files and the hub.

Every failure is a `CheckpointError`, `UnknownArchitecture` or `ConfigError` that names the folder and the remedy.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn

from fedspine_edge.config import Task
from fedspine_edge.errors import CheckpointError, ConfigError, MissingDependency
from fedspine_edge.files import ADAPTER_CONFIG, LAYOUT, SENTENCEPIECE_MODELS, TOKENIZER, TOKENIZER_VOCABULARIES
from fedspine_edge.model.architecture import Architecture
from fedspine_edge.model.derive_spec import model_spec
from fedspine_edge.model.deterministic_init import uniform
from fedspine_edge.model.families import architecture_of
from fedspine_edge.model.layout import Layout
from fedspine_edge.model.precision import BaseDtype, compute_dtype
from fedspine_edge.model.prunable import PrunableModel
from fedspine_edge.model.weight_files import base_digest, check_finite, check_readable, weight_files

LOAD_FAILURES = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    ImportError,
    EOFError,
    struct.error,
    SafetensorError,
    StrictDataclassError,
)
"""Errors that transformers and safetensors raise for unusable files."""

_COMPUTED_TABLES = (
    "position_ids",
    "inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)
"""Suffixes of tensors in older checkpoints that models compute themselves."""

TRANSFORMERS_FOR_OLD_TORCH = "transformers>=5.15,<5.16"
"""Last releases that work with torch 2.5.0a0, NVIDIA's first build for JetPack 6."""


def load_base(
    path_or_id: str | Path,
    *,
    task: Task = "classification",
    num_labels: int = 2,
    labels: Sequence[str] | None = None,
    gguf_file: str | None = None,
    base_dtype: BaseDtype = "float32",
    seed: int = 0,
) -> PrunableModel:
    """Load an unpruned model.

    Args:
        path_or_id: Folder with config.json and safetensors, folder with one GGUF file, GGUF file, or hub id.
        task: "classification" (of texts) and "token_classification" (of words) have a head of `num_labels` classes;
            "causal_lm" keeps the model's head.
        num_labels: Number of classes, at least 2.
        labels: Names of the classes, for the config (default: LABEL_0, LABEL_1, ...).
        gguf_file: GGUF file of the folder, if there are several.
        base_dtype: Data type of the frozen weights: "float32", "bfloat16", "float16", "int8" or "int4"; see
            `PrunableModel.set_base_dtype`. The head is float32.
        seed: Seed for a new head, which is the same on every machine. A head of the right shape in the checkpoint is
            kept instead.

    Raises `CheckpointError` (missing, truncated, incomplete or non-finite files, or a folder that `save` wrote),
    `UnknownArchitecture`, `ConfigError` (task or number of labels).
    """
    transformers = require_transformers()
    folder, gguf_file = resolve(path_or_id, gguf_file)
    if (folder / LAYOUT).exists():
        raise CheckpointError(
            f"{folder} holds a model saved by this package, not a plain one.", remedy="Load it with load_model(folder)."
        )
    labelled = task != "causal_lm"
    if labelled and num_labels < 2:
        raise ConfigError(
            f"`num_labels` is {num_labels}; classification needs at least 2.", remedy="Count the classes of your data."
        )
    if labels is not None and len(labels) != num_labels:
        raise ConfigError(
            f"{len(labels)} label names, but `num_labels` is {num_labels}.", remedy="Pass one name for every class."
        )
    if gguf_file is None and (folder / ADAPTER_CONFIG).exists():
        raise CheckpointError(
            f"{folder} holds a PEFT adapter ({ADAPTER_CONFIG}) besides the base weights; the two would be mixed up.",
            remedy="Merge the adapter with PEFT's merge_and_unload and save the result, or move the adapter's files to "
            "another folder.",
        )
    config = _read_config(folder, gguf_file)
    architecture = architecture_of(config)
    architecture.check_config(config)
    _check_not_quantized(config, folder)
    head_modules = architecture.head_modules(task)
    if gguf_file is None:
        check_readable(weight_files(folder))
    digest = base_digest(folder, gguf_file)
    dtype = compute_dtype(base_dtype)
    settings: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    if labelled:
        config.num_labels = num_labels
        if task == "classification":
            config.problem_type = "single_label_classification"
        if labels is not None:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
    auto = auto_class(transformers, task)
    source: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    settings["ignore_mismatched_sizes"] = True  # reported by _prepare_head
    with quiet(transformers):
        try:
            module, info = auto.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **settings, **source
            )
        except LOAD_FAILURES as error:
            raise CheckpointError(
                f"the weights in {_source(folder, gguf_file)} cannot be loaded: {_first_line(error)}.",
                remedy="A truncated or damaged file is the usual cause; copy it again.",
            ) from error
    module.eval()
    prefixes = tuple(f"{name}." for name in head_modules)
    for name, parameter in module.named_parameters():  # buffers keep their dtype: RoPE's tables need it
        parameter.data = parameter.data.to(torch.float32 if name.startswith(prefixes) else dtype)
    _check_unexpected(module, architecture, info["unexpected_keys"], folder, gguf_file)
    if dtype != torch.float32 and gguf_file is None:
        _restore_head(module, architecture, prefixes, weight_files(folder))
    head = _prepare_head(module, architecture, head_modules, info, seed, _source(folder, gguf_file))
    check_finite(module, _source(folder, gguf_file))
    if task == "classification" and architecture.last_token_pools:
        module.config.pad_token_id = _pad_token(folder, gguf_file, module.config)
    module.config.use_cache = False  # training needs no KV cache; generate() enables it itself
    spec = model_spec(module, digest)
    model = PrunableModel(
        module,
        spec,
        Layout.full(spec),
        task=task,
        num_labels=num_labels if labelled else 0,
        head_names=head,
        folder=folder,
        gguf_file=gguf_file,
    )
    if not Path(path_or_id).expanduser().exists():
        model.base = str(path_or_id)  # a hub id; the name of its folder is a commit hash
    model.set_base_dtype(base_dtype)
    return model


def load_tokenizer(path_or_id: str | Path, *, gguf_file: str | None = None, padding: bool = True) -> Any:
    """Load the tokenizer of a model. A missing padding token is replaced by the end token.

    Args:
        path_or_id: Folder, GGUF file or hub id of the model.
        gguf_file: File within the folder, if it holds GGUF weights.
        padding: Whether a padding token is needed; otherwise the tokenizer is not changed.

    Raises `CheckpointError` if there is none or it cannot be read.
    """
    transformers = require_transformers()
    folder, gguf_file = resolve(path_or_id, gguf_file)
    if gguf_file is None and not any((folder / name).exists() for name in TOKENIZER_VOCABULARIES):
        raise CheckpointError(
            f"{folder} has no tokenizer.",
            remedy="Copy tokenizer.json and tokenizer_config.json of the base model into it.",
        )
    if gguf_file is None and needs_sentencepiece(folder) and importlib.util.find_spec("sentencepiece") is None:
        raise MissingDependency(
            f"the tokenizer in {folder} is a SentencePiece model, which needs the package sentencepiece.",
            remedy="pip install sentencepiece protobuf",
        )
    with quiet(transformers):
        try:
            source = {"gguf_file": gguf_file} if gguf_file else {}
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **source
            )
        except LOAD_FAILURES as error:
            if "trust_remote_code" in str(error):
                raise CheckpointError(
                    f"the tokenizer in {folder} needs Python code of that folder, which is not run.",
                    remedy="Save it as tokenizer.json with a tokenizer class of transformers, on a machine where you "
                    "trust its code.",
                ) from error
            raise CheckpointError(
                f"the tokenizer in {folder} cannot be read: {_first_line(error)}.",
                remedy="The folder needs tokenizer.json and tokenizer_config.json as Hugging Face writes them.",
            ) from error
    if padding and tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise CheckpointError(
                f"the tokenizer in {folder} has neither a padding nor an end token.",
                remedy='Set "pad_token" in its tokenizer_config.json.',
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def needs_sentencepiece(folder: Path) -> bool:
    """Return whether the tokenizer of a folder is a SentencePiece model without a tokenizer.json."""
    return not (folder / TOKENIZER).exists() and any((folder / name).exists() for name in SENTENCEPIECE_MODELS)


def resolve(path_or_id: str | Path, gguf_file: str | None = None) -> tuple[Path, str | None]:
    """Return (local folder, name of the GGUF file or None). A hub id is downloaded unless it is in the cache.

    Raises `CheckpointError`.
    """
    path = Path(path_or_id).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file.", remedy="Pass the folder of the model or a .gguf file.")
        path, gguf_file = path.parent, path.name
    if not path.is_dir():
        path = _download(str(path_or_id))
    if gguf_file is not None and not (path / gguf_file).is_file():
        raise CheckpointError(f"{path} has no file {gguf_file!r}.", remedy="Check the name in `gguf_file`.")
    if gguf_file is None and not (path / "config.json").exists():
        found = sorted(file.name for file in path.glob("*.gguf"))
        if len(found) > 1:
            raise CheckpointError(
                f"{path} holds several GGUF files: {', '.join(found)}.",
                remedy="Pass one of them: FOLDER/FILE.gguf.",
            )
        if not found and (path / ADAPTER_CONFIG).exists():
            raise CheckpointError(
                f"{path} holds a PEFT adapter without its base model.",
                remedy="Pass the folder of the base model; peft_format.load_adapter loads the adapter into it.",
            )
        if not found:
            raise CheckpointError(f"{path} has no config.json.", remedy="Pass a Hugging Face model folder.")
        gguf_file = found[0]
    return path, gguf_file


def _download(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise CheckpointError(f"model folder {name} does not exist.", remedy="Check the path.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except Exception as error:  # the hub client's errors share no base class
        if isinstance(error, GatedRepoError):
            why = "is available only to accounts that accepted its terms"
            remedy = f"Accept them at https://huggingface.co/{name}, then run: hf auth login"
        elif isinstance(error, RepositoryNotFoundError):
            why, remedy = (
                "does not exist on the hub",
                "Check the path or the id. For a private model, run first: hf auth login",
            )
        else:
            why = f"could not be downloaded from the hub ({type(error).__name__})"
            remedy = (
                f"Check the path, or download it on a machine with a network: hf download {name} --local-dir FOLDER"
            )
        raise CheckpointError(f"{name!r} is not a local folder and {why}.", remedy=remedy) from error


def auto_class(transformers: Any, task: Task) -> Any:
    """Return the auto class of transformers for a task."""
    names = {
        "classification": "AutoModelForSequenceClassification",
        "token_classification": "AutoModelForTokenClassification",
        "causal_lm": "AutoModelForCausalLM",
    }
    return getattr(transformers, names[task])


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Silence progress bars and transformers' report about new heads, which are intended."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader has its own progress bar
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def require_transformers() -> Any:
    """Import transformers and check that its models can be used with the installed torch.

    A release that requires a newer torch can be imported, but its models are missing. Raises `MissingDependency`, which
    names the extra or the version to install.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependency.of("transformers", extra="device", purpose="Loading a model") from error
    why = "" if transformers.is_torch_available() else "it requires a newer version"
    try:
        importlib.import_module("transformers.generation.utils")
    except (ImportError, AttributeError, NameError) as error:  # it uses a name that only a newer torch has
        why = why or f"{type(error).__name__}: {error}"
    if why:
        raise MissingDependency(
            f"transformers {transformers.__version__} does not work with torch {torch.__version__}: {why}.",
            remedy=f"Keep torch and install an older transformers: pip install '{TRANSFORMERS_FOR_OLD_TORCH}'",
        )
    return transformers


def _read_config(folder: Path, gguf_file: str | None) -> Any:
    transformers = require_transformers()
    if gguf_file is None:
        try:
            declared = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            family = declared.get("model_type")
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / 'config.json'} is damaged: {error}.",
                remedy="The folder needs config.json as Hugging Face writes it; copy it again.",
            ) from error
        if not isinstance(family, str):
            raise CheckpointError(
                f"{folder / 'config.json'} has no model_type.",
                remedy="Pass the folder of the model itself, with config.json as Hugging Face writes it.",
            )
        architecture_of(family)
    else:
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise MissingDependency.of("gguf", extra="demo", purpose="Reading a GGUF file") from error
    with quiet(transformers):
        try:
            source = {"gguf_file": gguf_file} if gguf_file else {}
            return transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **source
            )
        except LOAD_FAILURES as error:
            raise CheckpointError(
                f"the config in {_source(folder, gguf_file)} cannot be read: {_first_line(error)}.",
                remedy="A folder needs config.json as Hugging Face writes it; a GGUF file is truncated, damaged or of "
                "a kind that transformers does not read.",
            ) from error


def _prepare_head(
    module: nn.Module,
    architecture: Architecture,
    head_modules: tuple[str, ...],
    info: dict[str, Any],
    seed: int,
    where: Path,
) -> tuple[str, ...]:
    """Initialize the head modules that the checkpoint lacks, and return the names of all parameters of the head."""
    absent = {str(key) for key in info["missing_keys"]}
    absent |= {key if isinstance(key, str) else str(key[0]) for key in info["mismatched_keys"]}
    prefixes = [f"{name}." for name in head_modules]
    absent_elsewhere = sorted(name for name in absent if not any(name.startswith(prefix) for prefix in prefixes))
    if absent_elsewhere:
        raise CheckpointError(
            f"the weights in {where} have no tensor of the right shape for {len(absent_elsewhere)} parameters of the "
            f"{architecture.family} model, first {absent_elsewhere[0]!r}.",
            remedy="config.json and the weight files must belong together.",
        )
    fresh = tuple(prefix for prefix in prefixes if any(name.startswith(prefix) for name in absent))
    names = tuple(name for name, _ in module.named_parameters() if name.startswith(tuple(prefixes)))
    bound = (
        float(module.config.initializer_range) * 3.0**0.5
    )  # uniform, with the variance of the usual normal distribution
    with torch.no_grad():
        for name in names:
            parameter = module.get_parameter(name)
            if not name.startswith(fresh):
                continue
            if parameter.ndim < 2:  # a norm's weight starts at one
                parameter.fill_(1.0 if name.endswith(".weight") else 0.0)
            else:
                parameter.copy_(torch.from_numpy(uniform(seed, name, tuple(parameter.shape), bound)))
    return names


def _check_unexpected(
    module: nn.Module, architecture: Architecture, unexpected: Iterable[str], folder: Path, gguf_file: str | None
) -> None:
    """Raise `CheckpointError` for tensors of the transformer that the model has no parameter for.

    Tensors outside of it, such as heads of other tasks, and tables that models compute themselves are allowed.
    """
    if gguf_file is not None:
        names = _unused_gguf_tensors(module, folder / gguf_file)
    else:
        parts = {name for name, _ in module.get_submodule(architecture.backbone).named_children()} - {"pooler"}
        names = [name for name in unexpected if name.removeprefix(f"{architecture.backbone}.").split(".")[0] in parts]
        names = sorted(name for name in names if not name.endswith(_COMPUTED_TABLES))
    if names:
        raise CheckpointError(
            f"{_source(folder, gguf_file)} has {len(names)} weights that the {architecture.family} model of its config "
            f"has no place for, first {names[0]!r}. Without them it would be another model.",
            remedy="Check that config.json and the weight files belong together, or use another form of the model."
            if gguf_file is None
            else "Use the model's Hugging Face folder with safetensors instead.",
        )


def _unused_gguf_tensors(module: nn.Module, path: Path) -> list[str]:
    """Return the tensors of a GGUF file that transformers does not load into `module`."""
    import gguf
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    reader = gguf.GGUFReader(path)
    processor = TENSOR_PROCESSORS.get(module.config.model_type, TensorProcessor)(config=module.config.to_dict())
    mapped = get_gguf_hf_weights_map(module, processor)
    names = []
    for tensor in reader.tensors:
        if tensor.name in mapped or (tensor.name == "output.weight" and module.get_output_embeddings() is None):
            continue
        if tensor.name == "rope_freqs.weight" and (tensor.data == 1.0).all():  # no scaling
            continue
        names.append(tensor.name)
    return names


def _check_not_quantized(config: Any, folder: Path) -> None:
    """Raise `CheckpointError` for weights in a packed format. FP8 with scales is allowed; transformers dequantizes
    it."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    stated = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(getattr(stated.get("quant_method"), "value", stated.get("quant_method")))
    if method == "fp8":
        return
    bits = stated.get("bits") or (4 if stated.get("load_in_4bit") else 8 if stated.get("load_in_8bit") else None)
    raise CheckpointError(
        f"the model in {folder} is quantized ({method}{f', {bits} bits' if bits else ''}); it cannot be trained or "
        "pruned.",
        remedy="Use the model that it was made from. base_dtype='int8' or 'int4' keeps that one as small in memory.",
    )


def _restore_head(
    module: nn.Module, architecture: Architecture, prefixes: tuple[str, ...], files: Sequence[Path]
) -> None:
    """Restore the exact values of the head, which were rounded together with the base when they were loaded."""
    head = {name: p for name, p in module.named_parameters() if name.startswith(prefixes)}
    names = {alias: name for name in head for alias in (name, name.removeprefix(f"{architecture.backbone}."))}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for alias in names.keys() & set(tensors.keys()):
                parameter, value = head[names[alias]], tensors.get_tensor(alias)
                if value.shape == parameter.shape:  # otherwise the number of labels differs and the head is new
                    parameter.data = value.to(torch.float32, copy=True)


def _pad_token(folder: Path, gguf_file: str | None, config: Any) -> int:
    """Return the padding token; the classifier reads the last token that differs from it."""
    pad: Any = config.pad_token_id
    if gguf_file is None or pad is None:
        try:
            pad = load_tokenizer(folder, gguf_file=gguf_file).pad_token_id
        except CheckpointError:
            end = config.eos_token_id
            pad = pad if pad is not None else end[0] if isinstance(end, list) else end
    if pad is None or not 0 <= int(pad) < config.vocab_size:
        raise CheckpointError(
            f"{folder}: padding token {pad} is not one of the model's {config.vocab_size} tokens.",
            remedy="Set pad_token_id in config.json and pad_token in tokenizer_config.json to an existing token.",
        )
    return int(pad)


def _source(folder: Path, gguf_file: str | None) -> Path:
    return folder / (gguf_file or "")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:300]
