"""The memory that training a preset takes, counted: `python -m b2diffurl.bench.memory --config FILE:PRESET [...]`.

Nothing is fetched: a hub's model of a preset has its published geometry here.
"""

import pathlib
import tempfile

from ..families import load_family, memory
from ..run.command import run_main
from . import geometries


def table(config):
    """A line for each part, in GiB."""
    with tempfile.TemporaryDirectory() as folder:
        if not pathlib.Path(config.pretrained.model).is_dir():
            geometries.write(pathlib.Path(folder), config.pretrained.model)
            config.pretrained.model = folder
        family, rows = load_family(config), {}
        for config.train.gradient_checkpointing in (False, True):
            how = ", gradient_checkpointing" if config.train.gradient_checkpointing else ""
            sizes = memory.count(family, config)
            rows |= {"weights": sizes["weights"], "LoRA and AdamW": sizes["lora"]}
            rows[f"activations per transition{how}"] = sizes["activations"]
    return "\n".join(f"{name:<52}{size / 2**30:8.2f} GiB" for name, size in rows.items())


if __name__ == "__main__":
    run_main(lambda config: print(table(config)))
