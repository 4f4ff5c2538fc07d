"""Base models in a GGUF file: read by ``transformers`` into plain numbers, once, and kept as a folder in our cache."""

from __future__ import annotations

import hashlib
import re
import struct
from pathlib import Path

from adazeta.errors import UserError

SUFFIX = ".gguf"


def gguf_file(name: str | Path) -> Path | None:
    """Return the GGUF file that ``name`` is, or that a folder without config.json holds; None if there is none.

    Raises:
        UserError: a folder with several.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix.lower() == SUFFIX:
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() == SUFFIX)
    if len(found) > 1:
        raise UserError(f"{name} holds several GGUF files ({', '.join(file.name for file in found)}): name one of them")
    return found[0] if found else None


def gguf_folder(path: Path, say=lambda line: None) -> Path:
    """Return a GGUF file's model as a Hugging Face folder of float32 numbers, which is made once and kept in our cache.

    A file that is another one by now, by its time and size, is read again.

    Raises:
        UserError: transformers knows no such model or cannot read the file, or a full disk.
    """
    from adazeta.assets import cache_dir, check_folder, install

    path = path.resolve()
    about = path.stat()
    which = hashlib.sha256(f"{path}\n{about.st_size}\n{about.st_mtime_ns}".encode()).hexdigest()[:16]
    stem = re.sub(r"[^\w.-]", "_", path.stem, flags=re.ASCII)[:100]
    folder = cache_dir() / "gguf" / f"{stem}-{which}"
    if not folder.exists():
        say(f"reading {path.name} into a folder of plain numbers, once")
        install(folder, {"made_from": str(path)}, lambda target: convert(path, target))
        size = sum(file.stat().st_size for file in folder.iterdir())
        say(f"model: {folder}, {size / 1e6:,.1f} MB")
    check_folder(folder, again=f"delete {folder}")
    return folder


def convert(path: Path, target: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer of a GGUF file into the folder ``target``.

    Raises:
        UserError: transformers knows no such model, or cannot read the file.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from adazeta.base_models import told_in_one_line

    from_file, how = {"gguf_file": path.name, "trust_remote_code": False}, {}
    if hasattr(transformers, "GgufConfig"):  # otherwise it may keep the file's blocks, if it finds a kernel for them
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with told_in_one_line(f"{path} cannot be read as a language model"):
        try:
            read, found = AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=torch.float32, output_loading_info=True, local_files_only=True, **from_file, **how
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **from_file)
        except struct.error as error:
            raise ValueError("it is cut off or damaged") from error
        except Exception as error:  # tokenizers raise just this
            raise ValueError(str(error)) from error
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"it lacks {len(missing)} weights ({', '.join(missing[:3])}{', ...' * (len(missing) > 3)})"
            )
        # The config carries a quantization_config that transformers refuses to save; the weights are plain by now.
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            plain = type(read)(config)
        plain.load_state_dict(read.state_dict(), assign=True)
        plain.tie_weights()
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)
