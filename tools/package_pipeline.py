"""A trained pipeline's folder as the package carries it: half precision, and only what loading and its record need.

    python tools/package_pipeline.py my-emoji fastdiff/assets/emoji
    python tools/package_pipeline.py my-editor fastdiff/assets/emoji/edit --beside fastdiff/assets/emoji

--beside leaves out the parts that are equal to another folder's, the autoencoder of an editor, say.
"""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from fastdiff.files import read_json_object
from fastdiff.training.folder import write_json
from fastdiff.training.pipeline import write_pipeline

RECORD = ("training.json", "sampling.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--beside", type=Path)
    options = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(options.trained, local_files_only=True, dtype=torch.float16)
    options.out.mkdir(parents=True, exist_ok=True)
    write_pipeline(
        options.out, pipe.vae, pipe.unet, pipe.text_encoder, pipe.tokenizer, pipe.scheduler.config.prediction_type,
        kind=type(pipe).__name__,
    )  # fmt: skip
    # transformers loads weights in what the config says, diffusers in float32: a pipeline of both needs one dtype.
    config = options.out / "text_encoder" / "config.json"
    write_json(config, read_json_object(config) | {"dtype": "float32"})
    for name in RECORD:
        shutil.copyfile(options.trained / name, options.out / name)
    for part in ("vae", "text_encoder", "tokenizer", "unet") if options.beside else ():
        if same(options.out / part, options.beside / part):
            shutil.rmtree(options.out / part)
    files = [path for path in options.out.rglob("*") if path.is_file()]
    print(f"{options.out}: {sum(path.stat().st_size for path in files) / 1e6:.1f} MB in {len(files)} files")


def same(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same files."""
    names = sorted(path.name for path in folder.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (folder / name).read_bytes() == (other / name).read_bytes() for name in names
    )


if __name__ == "__main__":
    main()
