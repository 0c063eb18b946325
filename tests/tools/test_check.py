"""The check names every faulty row, passes what is right, counts what it says, and never ends in a traceback."""

from __future__ import annotations

import inspect
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markupsafe import escape

from fsdpsft.batch import Sample
from fsdpsft.data.batches.store_parts import BuildOptions
from fsdpsft.data.mask import proof as mask_check
from fsdpsft.data.mask.row_encoder import RowEncoder
from fsdpsft.data.rows.sources import resolve_sources
from fsdpsft.testing import CHATML, save_tiny_model, tiny_tokenizer
from fsdpsft.tools import proof as proofs
from fsdpsft.tools.check import main
from fsdpsft.tools.facts import length_histogram, show_sample
from fsdpsft.tools.proof import Group, Part, RowFinding, prove
from fsdpsft.tools.report import CLAIMS, NOTES, counted, ranges
from fsdpsft.tools.terminal import Style, samples_text, table, visible

# Drops the thoughts of all turns but the last, as Qwen 3's template does.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def chat(*turns: str, **last: Any) -> dict[str, Any]:
    """Messages that alternate between user and assistant; ``last`` is added to the last one."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    messages[-1] |= last
    return {"messages": messages}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def run(model: Path, cache: Path, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run the check on a file; the exit code, standard output and standard error."""

    def check(data: Path | str, *overrides: str, model: Path = model) -> tuple[int, str, str]:
        arguments = [f"data.train_files={data}", f"model.partial_pretrain={model}", f"data.cache_dir={cache}",
                     "data.train_batch_size=2", "data.num_workers=1", *overrides]  # fmt: skip
        code = main(arguments)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return check


def good(count: int) -> list[Any]:
    return [chat(f"What is {i} + 1?", f"The answer is {i + 1}.") for i in range(count)]


def test_right_data_passes_and_the_numbers_are_those_of_the_data(run, tmp_path: Path) -> None:
    rows = [*good(9), chat("What is 0 + 1?", "The answer is 1.")]
    code, out, _ = run(write(tmp_path / "a.jsonl", rows), f"check.html={tmp_path / 'page.html'}")
    assert code == 0
    assert "All 10 rows are proven" in out
    assert "10 rows (all of them), 10 replies, in" in out
    for claim in CLAIMS.values():
        assert f"✓ {claim}" in out
    tokenizer = tiny_tokenizer()
    whole = [tokenizer(tokenizer.apply_chat_template(r["messages"], tokenize=False))["input_ids"] for r in rows]
    tokens = sum(map(len, whole))
    columns = next(line.split() for line in out.splitlines() if line.startswith("  a "))
    assert columns[1:4] == ["10", "10", f"{tokens:,}"]
    assert columns[-3] == "1"  # the duplicate
    assert f"{tokens:,} tokens" in out
    assert "5 steps of 2 samples" in out
    assert "All 10 rows are proven" in (tmp_path / "page.html").read_text()


def test_a_stop_token_that_does_not_end_generation_fails_every_row(run, tmp_path: Path) -> None:
    wrong = save_tiny_model(tmp_path / "wrong")
    settings = json.loads((wrong / "generation_config.json").read_text())
    (wrong / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 0}))
    code, out, _ = run(write(tmp_path / "a.jsonl", good(5)), model=wrong)
    assert code == 1
    assert f"✗ {CLAIMS['stop_not_in_eos']}: fails in 5 rows" in out
    assert "a.jsonl: rows 0-4" in out
    assert "message 1: the turn ends with '<|im_end|>' (id 2), but generation stops at [0]" in out
    assert "(and 4 more like it)" in out
    assert "5 of 5 rows fail." in out


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\nAnswer: '"), "generation prompt ends in"),
        (CHATML.replace("+ '<|im_end|>\n'", "+ '\n'"), "does not end with a stop token"),
    ],
    ids=["another generation prompt", "no stop token"],
)
def test_a_wrong_template_fails_every_row(run, tmp_path: Path, template: str, reason: str) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(template)
    page = tmp_path / "page.html"
    code, out, _ = run(write(tmp_path / "a.jsonl", good(4)), f"data.chat_template={file}", f"check.html={page}")
    assert code == 1
    assert f"✗ {CLAIMS['refused']}: fails in 4 rows" in out
    assert "a.jsonl: rows 0-3" in out
    assert reason in out
    assert "4 of 4 rows fail and training would not start." in out
    assert "rows 0-3" in page.read_text()  # a page is written although there is nothing to tokenise


def test_a_template_that_is_wrong_for_some_rows_has_just_these_named(run, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(CHATML.replace("message['content'] +", "message['content'] | replace('7', 'seven') +"))
    rows = good(20)  # answers 7 and 17, in rows 6 and 16; a 7 in the question, as in rows 7 and 17, does no harm
    code, out, _ = run(write(tmp_path / "a.jsonl", rows), f"data.chat_template={file}")
    assert code == 1
    assert "a.jsonl: rows 6, 16\n" in out


BAD = {
    2: "{broken",
    5: chat("hi", "there") | {"messages": [{"role": "wizard", "content": "x"}]},
    6: {"messages": []},
    9: chat("hi", "word " * 400),
}


def test_bad_rows_are_all_named_and_the_rest_is_still_proven(run, tmp_path: Path) -> None:
    rows: list[Any] = good(12)
    for index, row in BAD.items():
        rows[index] = row
    file = write(tmp_path / "a.jsonl", rows)
    code, out, _ = run(file, "data.max_length=300", "data.truncation=error")
    assert code == 1
    assert f"✗ {CLAIMS['refused']}: fails in 4 rows" in out
    assert "rows 2, 5-6, 9\n" in out
    assert "row 2 (line 3): broken JSON" in out
    assert "12 rows (all of them), 8 replies" in out
    assert "training would not start: " in out

    code, out, _ = run(
        file, "data.max_length=300", "data.truncation=error", "data.on_bad_row=skip", "data.max_bad_share=0.5"
    )
    assert code == 0
    assert "· 4 rows left out (data.on_bad_row=skip)" in out
    assert "All 12 rows but 4 that are left out are proven" in out
    assert "rows 2, 5-6, 9\n" in out
    assert "1 skipped: unknown role" in out

    code, out, _ = run(
        file, "data.max_length=300", "data.truncation=error", "data.on_bad_row=skip", "data.max_bad_share=0.1"
    )
    assert code == 1
    assert "more than data.max_bad_share=0.1 allows" in out


def test_a_row_without_a_trained_token_fails(run, tmp_path: Path) -> None:
    rows = [*good(3), chat("hi", "x", weight=0)]
    code, out, _ = run(write(tmp_path / "a.jsonl", rows))
    assert code == 1
    assert "a.jsonl: row 3\n" in out


def test_damaged_files_and_nothing_usable_are_findings_not_tracebacks(run, tmp_path: Path) -> None:
    torn = tmp_path / "torn.parquet"
    pq.write_table(pa.Table.from_pylist(good(50)), torn)
    torn.write_bytes(torn.read_bytes()[:-100])
    code, out, err = run(torn)
    assert code == 1
    assert "torn.parquet" in out + err
    code, out, _ = run(write(tmp_path / "junk.jsonl", ["{", chat("a", "b")["messages"], good(1)[0] | {"messages": 3}]))
    assert code == 1
    assert "fail" in out


def test_a_batch_larger_than_the_data_is_told_and_the_rest_still_shown(run, tmp_path: Path) -> None:
    code, out, _ = run(write(tmp_path / "a.jsonl", good(3)), "data.train_batch_size=256")
    assert code == 1
    assert "data.train_batch_size=256 is more than the 3 samples" in out
    assert f"✓ {CLAIMS['prompt_ids']}" in out


def test_validation_rows_are_proven_too(run, tmp_path: Path) -> None:
    held_out = write(tmp_path / "held.jsonl", [*good(2), {"messages": []}])
    code, out, _ = run(write(tmp_path / "a.jsonl", good(4)), f"data.val_files={held_out}")
    assert code == 1
    assert "held.jsonl: row 2\n" in out
    assert "7 rows (all of them), 6 replies" in out


def test_a_stated_sample_is_taken_at_equal_distances(run, tmp_path: Path) -> None:
    code, out, _ = run(write(tmp_path / "a.jsonl", good(30)), "check.rows=7")
    assert code == 0
    assert "7 rows (of 30, at equal distances), 7 replies" in out and "check.rows=all looks at all" in out
    assert "7 of 30 rows were looked at" in out
    for count, limit in ((30, 7), (10, 10), (1000, 1), (1001, 999), (5, 9)):
        chosen = [row for _, row in proofs._chosen(((0, i) for i in range(count)), limit, count)]  # type: ignore[misc]
        assert len(chosen) == len(set(chosen)) == min(limit, count)
        gaps = np.diff(chosen)
        assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("check.row=5", "unknown key check.row; did you mean check.rows?"),
        ("check.rows=many", "check.rows=many must be a whole number of at least 1"),
        ("check.samples=-1", "check.samples=-1 must be a whole number"),
        ("check.html=", "check.html needs a value"),
        ("check.html=/no/such/folder/page.html", "cannot be written"),
        ("check.html=/dev/null", "check.html=/dev/null is not a file but a folder, device or pipe"),
        ("check.html=/", "is not a file but a folder"),
        (f"check.html=/tmp/{'x' * 5000}.html", "cannot be written"),
        ("data.max_lenght=5", "unknown key data.max_lenght; did you mean data.max_length?"),
    ],
)
def test_wrong_settings_are_named(run, tmp_path: Path, argument: str, message: str) -> None:
    code, _, err = run(write(tmp_path / "a.jsonl", good(4)), argument)
    assert code == 1
    assert message in err


def test_a_page_replaces_a_file_behind_a_link_and_nothing_else(run, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", good(4))
    (tmp_path / "old.html").write_text("old")
    (tmp_path / "link.html").symlink_to("old.html")
    code, _, _ = run(data, f"check.html={tmp_path / 'link.html'}")
    assert code == 0 and (tmp_path / "link.html").is_symlink()
    assert "<!doctype html>" in (tmp_path / "old.html").read_text()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device.html").symlink_to("pipe")
    code, _, err = run(data, f"check.html={tmp_path / 'device.html'}")
    assert code == 1 and "is not a file" in err
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_the_headline_says_no_more_than_the_notes(run, tmp_path: Path) -> None:
    """Thoughts that the template drops, and replies trained after a rewritten history, are not proven."""
    rows = [chat("a?", "b", reasoning_content="so")] * 3 + [chat("a?", "b")]
    page = tmp_path / "page.html"
    data = write(tmp_path / "a.jsonl", rows)
    code, out, _ = run(data, f"check.html={page}")
    assert code == 1 and "3 of 4 rows fail" in out
    code, out, _ = run(data, "data.may_drop=[reasoning]", f"check.html={page}")
    headline = "All 4 rows can be trained on, with limits: 3 parts of rows are not printed by the template."
    claim = f"{CLAIMS['text_missing']}: not for 3 rows, see below"
    assert code == 0 and headline in out and f"· {claim}" in out
    assert "not printed by the chat template, so not learnt from (data.may_drop): 3 reasoning" in out
    for part in (f"<h1>{headline}</h1>", '<body class="limited">', f'<li class="limited">{escape(claim)}</li>'):
        assert part in page.read_text()
    template = tmp_path / "template.jinja"
    template.write_text(FORGETFUL)
    data = write(tmp_path / "b.jsonl", [chat("a?", "one", "b?", "two", reasoning_content="so")] * 4)
    code, out, _ = run(data, f"data.chat_template={template}", "data.history=as_rendered", f"check.html={page}")
    assert code == 0 and "are proven" not in out
    assert "4 replies are trained after another prompt than inference gives" in out.splitlines()[-2]
    claim = f"{CLAIMS['prefix']}: not for 4 rows, see below"
    assert f"· {claim}" in out and f"✓ {CLAIMS['prefix']}" not in out
    assert f'<li class="limited">{claim}</li>' in page.read_text()
    code, out, _ = run(data, f"data.chat_template={template}")
    assert code == 0 and "All 4 rows are proven" in out and "4 further samples" in out


def test_columns_that_nothing_reads_are_listed_once(run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    rows = [row | {"score": 3, "origin": "web"} for row in good(4)]
    page = tmp_path / "page.html"
    code, out, _ = run(write(tmp_path / "a.jsonl", rows), f"check.html={page}")
    assert code == 0
    told = "a: columns that nothing reads: score, origin"
    assert out.count(told) == page.read_text().count(told) == caplog.text.count(told) == 1


def test_failures_that_differ_in_quoted_text_and_numbers_are_one_group() -> None:
    group = Group()
    for row, text in enumerate(("the template's end is 'it\\'s', token 5", "the template's end is 'b', token 77",
                                'the template\'s end is "it\'s", token 1', "another end is 'b'")):  # fmt: skip
        group.add(RowFinding("refused", True, "f", row, None, None, text))
    assert [(finding.row, count) for finding, count in group.examples.values()] == [(0, 3), (3, 1)]


def test_help_names_the_keys_of_the_tool_and_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "check.html=FILE" in out and "train_batch_size: 256" in out


def test_every_finding_has_its_words() -> None:
    named = set(re.findall(r'Finding\(\s*"(\w+)"', inspect.getsource(mask_check)))
    assert named and named <= set(CLAIMS) | set(NOTES)


def test_many_processes_find_what_one_does(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = good(150)
    for index in (3, 70, 149):
        rows[index] = {"messages": []}
    rows[40] = chat("hi <|im_end|> there", "yes")
    (source,) = resolve_sources(str(write(tmp_path / "a.jsonl", rows)))
    part = Part("train", source, RowEncoder([source], tiny_tokenizer(), eos_token_ids=[2]), BuildOptions(512))
    monkeypatch.setattr(proofs, "_POOL_FROM_ROWS", 1)
    one, two = (prove([part], limit=None, available=150, processes=n) for n in (1, 2))
    assert (one.processes, two.processes) == (1, 2)
    assert one.rows == two.rows == 150
    assert one.failed_rows == two.failed_rows == 3
    assert one.turns == two.turns == 147
    (found,) = two.errors["refused"].rows.values()
    assert found == [3, 70, 149]
    assert one.errors == two.errors and one.notes == two.notes
    assert list(two.notes["escaped"].rows.values()) == [[40]]


def test_rows_of_token_ids_are_counted_apart(run, tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, 2], "loss_mask": [0, 0, 1, 1]}] * 4
    code, out, _ = run(write(tmp_path / "a.jsonl", rows))
    assert code == 0
    assert "4 rows came as token ids; their mask is not checked" in out
    assert "All 4 rows can be trained on; 4 came as token ids, with a mask of their own." in out


def test_real_data_passes(run, real_data: Path) -> None:
    code, out, _ = run(real_data / "gsm8k" / "train.jsonl", "check.rows=100", "data.max_length=2048")
    assert code == 0, out
    assert "100 of 7,473 rows were looked at" in out
    glaive = real_data / "sharegpt" / "glaive_toolcall_en_demo.json"
    code, out, _ = run(glaive, "check.rows=40", "data.chat_template=chatml", "data.max_length=65536")
    assert code == 0, out
    assert "40 of 300 rows" in out


# ---------------------------------------------------------------------------------------------------- what is shown


def test_trained_tokens_are_marked_and_nothing_acts_on_the_terminal(run, tmp_path: Path) -> None:
    rows = [chat("hi \x1b[31m\u202e", "fine\nday 🎉")] * 2
    _, out, _ = run(write(tmp_path / "a.jsonl", rows), "check.samples=1")
    assert "hi \\u001b[31m\\u202e<|im_end|>" in out
    assert "⟦fine\n  │ day 🎉<|im_end|>⟧" in out
    assert "\x1b" not in out


def test_pieces_are_whole_characters_and_spell_the_sample() -> None:
    tokenizer = tiny_tokenizer()
    text = "<|im_start|>user\nword 日本🎉 end<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    weights = np.zeros(len(ids), np.float32)
    weights[-4:] = 0.5
    special = {i: tokenizer.convert_ids_to_tokens(i) for i in (0, 1, 2)}
    sample = Sample(np.array(ids, np.uint32), weights, 0)
    shown = show_sample(sample, "here", lambda part: tokenizer.decode(part), special, most=10_000)
    assert "".join(piece.text for piece in shown.pieces) == text
    assert [i for piece in shown.pieces for i in piece.ids] == ids
    assert "🎉" in {piece.text for piece in shown.pieces}
    assert [piece.text for piece in shown.pieces if piece.special] == ["<|im_start|>", "<|im_end|>"]
    assert shown.trained_tokens == sum(len(p.ids) for p in shown.pieces if p.weight == 0.5) == 4
    assert (shown.opening, shown.opening_tokens) == ((), 0)
    short = shown.shortened(6)
    assert (len(short.pieces), short.gap_at) == (6, 3)
    assert short.omitted == len(ids) - sum(len(p.ids) for p in short.pieces)
    cut = show_sample(sample, "here", lambda part: tokenizer.decode(part), special, most=8)
    assert cut.omitted == len(ids) - 8 and sum(len(p.ids) for p in cut.pieces) == 8
    assert f"… {cut.omitted} tokens …" in samples_text([cut], Style(colour=False))


def test_a_sample_with_tools_opens_at_its_first_trained_token() -> None:
    ids, weights = np.arange(1000, dtype=np.uint32), np.zeros(1000, np.float32)
    weights[900:905] = 1
    for most in (3000, 200):
        shown = show_sample(Sample(ids, weights, 0), "here", lambda part: "x" * len(part), {}, most)
        first = next(at for at, piece in enumerate(shown.pieces) if piece.weight > 0)
        assert (first, shown.pieces[0].ids, shown.opening_tokens) == (40, (860,), 860)
        assert [i for piece in shown.opening for i in piece.ids] == list(range(max(860 - most, 0), 860))
    text = samples_text([shown.shortened(100)], Style(colour=False))
    assert "… 860 tokens before …" in text and "⟦xxxxx⟧" in text


def test_a_long_prompt_is_folded_away_on_the_page(run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    data = write(tmp_path / "a.jsonl", [chat("word " * 300, "yes")] * 2)
    code, out, _ = run(data, "data.max_length=4096", "check.samples=1", f"check.html={page}")
    assert code == 0
    (before,) = re.findall(r"… ([\d,]+) tokens before …", out)
    text = page.read_text()
    assert text.count(f"<details><summary>{before} tokens before</summary>") == 1
    folded, _, shown = text.partition("<details>")[2].partition("</details>")
    assert 'class="t"' in shown and 'class="t"' not in folded


def test_colours_only_where_there_is_a_terminal() -> None:
    assert Style(colour=True).trained("x") == "\x1b[30;42mx\x1b[0m"
    assert Style(colour=False).trained("x") == "⟦x⟧"
    assert visible("a\tb\nc\x00\x9b") == "a\tb\nc\\u0000\\u009b"


def test_lengths_fall_into_bins_of_a_round_width() -> None:
    found = length_histogram(np.array([1, 40, 41, 80, 1000], np.int32))
    assert found.width == 40  # 25 bins; 32 of them would need 31.25
    assert found.counts[:3] == (2, 2, 0) and found.counts[-1] == 1 and len(found.counts) == 25
    assert (found.median, found.percentile_95, found.longest) == (41, 1000, 1000)
    assert length_histogram(np.array([1], np.int32)).counts == (1,)


def test_counts_have_their_plural() -> None:
    assert [counted(n, "step") for n in (0, 1, 2.5, 1234567)] == ["0 steps", "1 step", "2.5 steps", "1,234,567 steps"]


def test_numbers_are_named_as_ranges() -> None:
    assert ranges([5, 0, 1, 2, 9, 10], most=9) == "rows 0-2, 5, 9-10"
    assert ranges(range(0, 20, 2), most=3) == "rows 0, 2, 4 and 7 more, the last 18"
    assert table([["a", "bb"], ["ccc", "1"]]) == "  a    bb\n  ccc   1\n"
