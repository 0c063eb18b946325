"""Train from Python: one process, the same settings as on the command line, the final metrics as the result.

python examples/library_use.py demo/model demo/data/train.parquet /tmp/library_use trainer.total_training_steps=20
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM

from fsdpsft import load_config, train


def main() -> None:
    """Fine-tune the model of the first argument on the file of the second, into the folder of the third."""
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    model_path, data, folder, *overrides = sys.argv[1:]
    config = load_config(
        [
            f"data.train_files={data}",
            f"model.partial_pretrain={model_path}",
            f"trainer.default_local_dir={folder}",
            "data.train_batch_size=32",
            "optim.lr=1e-3",
            *overrides,
        ]
    )
    metrics = train(config)
    print(metrics)
    print(AutoModelForCausalLM.from_pretrained(folder).num_parameters(), "parameters in", folder)


if __name__ == "__main__":
    main()
