"""The two families' real tokenizers, as folders that a hub snapshot has, without weights."""

import gzip
import pathlib
import shutil

DATA = pathlib.Path(__file__).parent / "data" / "tokenizers"
TEMPLATES = {"qwen3": "chat_template_instruct_2507.jinja", "olmo3": "chat_template_7b_instruct.jinja"}


def model_folders(root: pathlib.Path) -> pathlib.Path:
    """Unpacks root/FAMILY for both families from the repository's copies."""
    for family, template in TEMPLATES.items():
        folder = root / family
        folder.mkdir()
        with gzip.open(DATA / family / "tokenizer.json.gz") as packed:
            (folder / "tokenizer.json").write_bytes(packed.read())
        for name in ("tokenizer_config.json", "generation_config.json"):
            shutil.copy(DATA / family / name, folder)
        shutil.copy(DATA / family / template, folder / "chat_template.jinja")
    return root
