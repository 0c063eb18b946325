"""The tokenizer that transformers builds against the file it comes from."""

from __future__ import annotations

from pathlib import Path

from tokenizers import normalizers

from fsdpsft.data.mask.spans import folder_disagrees
from fsdpsft.testing import tiny_tokenizer


def test_other_ids_than_the_folders_own_file(tmp_path: Path) -> None:
    tokenizer, file = tiny_tokenizer(), tmp_path / "tokenizer.json"
    assert folder_disagrees(tokenizer, file) is None
    file.write_text(tokenizer.backend_tokenizer.to_str())
    assert folder_disagrees(tokenizer, file) is None
    other = tiny_tokenizer().backend_tokenizer
    other.normalizer = normalizers.Lowercase()
    file.write_text(other.to_str())
    warning = folder_disagrees(tokenizer, file)
    assert warning is not None and str(file) in warning and "part at token 0" in warning
