"""``python -m fsdpsft.config`` writes ``conf/train.yaml`` anew from the schema."""

import sys

from fsdpsft.config.yaml_file import CONF_DIR, render

(CONF_DIR / "train.yaml").write_text(render(), encoding="utf-8")
sys.stdout.write(f"{CONF_DIR / 'train.yaml'}\n")
