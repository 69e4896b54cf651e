"""Reading examples: unusable data is one error with file, rows and remedy, and without the text."""

import json
import sys

import pytest

from fedspine_edge.config import DataSettings
from fedspine_edge.data.examples import Example, split_holdout
from fedspine_edge.data.loading import find_labels, read_examples
from fedspine_edge.errors import DataError, MissingDependency

SECRET = "my very private sentence"


def from_text(tmp_path, content, name="data.csv", **options):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_examples(DataSettings(path=str(path), **options))


def test_csv_json_lines_and_parquet_give_the_same_examples(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    expected = [Example("a, b", 1, "c"), Example('say "x"\nagain', 0, "d")]
    options = {"text": "one", "text_pair": "two", "label": "y"}
    table = pyarrow.table({"y": [1, 0], "one": ["a, b", 'say "x"\nagain'], "two": ["c", "d"], "other": [1.5, 2.5]})
    parquet.write_table(table, tmp_path / "d.parquet")
    lines = "\n".join(json.dumps(row) for row in table.to_pylist()) + "\n\n"
    assert read_examples(DataSettings(path=str(tmp_path / "d.parquet"), **options)) == expected
    assert from_text(tmp_path, lines, "d.jsonl", **options) == expected
    text = '\ufeffone,two,y\n"a, b",c,1\n"say ""x""\nagain",d,0.0\n'
    assert from_text(tmp_path, text, **options) == expected


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        ("", "data.csv", ["data.csv", "empty"]),
        ("text,label\n", "data.csv", ["no examples"]),
        (f"sentence,label\n{SECRET},1\n", "data.csv", ["'text'", "sentence, label", "`text`"]),
        (f"{SECRET},1\n{SECRET},0\n", "data.csv", ["no column 'text'", "not shown"]),
        (f"text,label\n{SECRET},1\n{SECRET},{SECRET}\n", "data.csv", ["line 3", "not an integer"]),
        (f"text,label\n{SECRET},0.5\n", "data.csv", ["line 2", "not an integer"]),
        (f"text,label\n{SECRET},2\n", "data.csv", ["line 2", "label 2 is out of range", "0 to 1"]),
        (f"text,label\n{SECRET},-1\n", "data.csv", ["label -1 is out of range"]),
        ("text,label\n ,1\n", "data.csv", ["line 2", "'text' is empty"]),
        (f"text,label\n{SECRET}, and more,1\n", "data.csv", ["line 2", "more fields", "double quotes"]),
        (f'text,label\n"{SECRET},1\n', "data.csv", ["line 2", "not valid CSV"]),
        (b"text,label\n\xff\xfe,1\n", "data.csv", ["not UTF-8"]),
        (f"text;label\n{SECRET};1\n", "data.csv", ["separated by ';'", ".tsv"]),
        (f"text,label\n{SECRET}\n", "data.csv", ["line 2", "'label' is empty"]),
        (f"text,label\n{SECRET},\n", "data.csv", ["line 2", "'label' is empty"]),
        (f'{{"text": "{SECRET}", "label": 1}}\n{{"text": "{SECRET}", \n', "data.jsonl", ["line 2", "not valid JSON"]),
        (f'["{SECRET}"]\n', "data.jsonl", ["line 1", "not a JSON object"]),
        (f'{{"text": "{SECRET}", "label": true}}\n', "data.jsonl", ["line 1", "not an integer"]),
        (f'{{"text": "{SECRET}", "label": null}}\n', "data.jsonl", ["line 1", "'label' is empty"]),
        ('{"text": 5, "label": 1}\n', "data.jsonl", ["line 1", "int, not text"]),
        ("PAR1 not really", "data.parquet", ["not a readable Parquet"]),
        ("[" * 100_000 + "\n", "data.jsonl", ["line 1", "not valid JSON"]),
        (f'{{"text": "a", "label": 1{"0" * 400}}}\n', "data.jsonl", ["line 1", "not an integer"]),
        ("{}\n", "data.jsonl", ["line 1", "no column 'text'; the columns present are: none."]),
        ("text,label,text\na,1,b\n", "data.csv", ["more than one column is named 'text'"]),
        ("text,label,label\na,1,0\n", "data.csv", ["more than one column is named 'label'"]),
        ('{"text": "a", "label": 1, "text": "b"}\n', "data.jsonl", ["line 1", "more than one column is named 'text'"]),
        ('{"text": "a", "label": 1}\n{"text": "nice \\ud83d", "label": 1}\n', "data.jsonl", ["line 2", "surrogate"]),
        ('text\tlabel\n"a film\t1\nb film\t0\nc film"\t1\n', "data.tsv", ["line 2", "tabs and line breaks"]),
        ("text", "data.xlsx", ["unknown format '.xlsx'", ".parquet"]),
    ],
)
def test_unusable_file_names_row_and_remedy_without_text(tmp_path, content, name, expected):
    with pytest.raises(DataError) as caught:
        from_text(tmp_path, content, name)
    message = str(caught.value)
    assert all(word in message for word in expected), message
    assert SECRET not in message
    assert caught.value.remedy
    assert caught.value.__cause__ is None  # the original error may contain the row


def test_all_unusable_rows_are_reported_by_line_number(tmp_path):
    """Line numbers differ from records: quoted texts span several lines, and blank lines are skipped."""
    rows = [f'"{SECRET}\nsecond line",1', "", *["good,0"] * 2, *[f"{SECRET},"] * 300, f"{SECRET},7", f"a,{SECRET},1"]
    content = "\n".join(["text,label", *rows])
    with pytest.raises(DataError) as caught:
        from_text(tmp_path, content)
    lines = content.split("\n")
    first = lines.index(f"{SECRET},") + 1
    assert caught.value.message.endswith(
        "data.csv: 302 of 305 rows cannot be used: "
        f"column 'label' is empty (lines {', '.join(str(first + i) for i in range(5))} and 295 more); "
        f"label 7 is out of range (line {lines.index(f'{SECRET},7') + 1}); "
        f"more fields than the header (line {len(lines)})."
    )
    assert "Fill it in" in caught.value.remedy
    assert "`num_labels` is 2" in caught.value.remedy
    assert SECRET not in str(caught.value)


def test_every_format_reports_all_unusable_rows(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    rows = [{"text": "a", "label": 9}, {"text": "a", "label": 1}, {"text": None, "label": 1}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    lines = "\n".join(json.dumps(row) for row in rows)
    for read, unit in (
        (lambda: read_examples(DataSettings(path=str(tmp_path / "d.parquet"))), "row"),
        (lambda: from_text(tmp_path, lines, "d.jsonl"), "line"),
        (lambda: read_examples(rows), "row"),
    ):
        with pytest.raises(DataError, match=rf"2 of 3 rows .* range \({unit} 1\); .* empty \({unit} 3\)"):
            read()
    many = [("a", label) for label in range(2, 20)]
    with pytest.raises(DataError, match=r"18 of 18 rows .* label 6 .*; 13 more kinds of problems\."):
        read_examples(many)


def test_spaces_in_header_and_very_long_text_are_accepted(tmp_path):
    long = "word " * 40_000
    assert from_text(tmp_path, f"text , label\n{long},1\n") == [Example(long, 1)]


def test_missing_file_and_folder_raise(tmp_path):
    with pytest.raises(DataError, match=r"absent\.csv: does not exist"):
        read_examples(DataSettings(path=str(tmp_path / "absent.csv")))
    with pytest.raises(DataError, match="is a folder"):
        read_examples(DataSettings(path=str(tmp_path)))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependency, match=r"fedspine-edge\[data\]"):
        from_text(tmp_path, "x", "d.parquet")


def test_function_returns_items_and_errors_do_not_quote_data(tmp_path, monkeypatch):
    (tmp_path / "mydata.py").write_text(
        f"def good():\n    yield 'a', 1\n    yield 'b', 0\n"
        f"def pairs():\n    return [('a', 'b', 1)]\n"
        f"def broken():\n    raise KeyError('{SECRET}')\n"
        f"def mixed():\n    return [('a', 1), ('a', '{SECRET}', 1)]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert [e.label for e in read_examples(DataSettings(path="mydata:good"))] == [1, 0]
    assert read_examples(DataSettings(path="mydata:pairs")) == [Example("a", 1, "b")]
    for name, expected in (("broken", r"raised KeyError at mydata\.py:7"), ("mixed", "row 2: single texts and pairs")):
        with pytest.raises(DataError, match=expected) as caught:
            read_examples(DataSettings(path=f"mydata:{name}"))
        assert SECRET not in str(caught.value)
    with pytest.raises(DataError, match="cannot be imported"):
        read_examples(DataSettings(path="mydata:absent"))


def test_repr_of_example_hides_its_text():
    assert SECRET not in repr(Example(SECRET, 1, SECRET))


def test_split_holdout_is_disjoint_and_seeded():
    examples = [Example(str(i), 0) for i in range(20)]
    train, held = split_holdout(examples, 5, 3, where="x")
    assert len(held) == 5
    assert sorted(train + held, key=lambda e: int(e.text)) == examples
    assert split_holdout(examples, 5, 3, where="x") == (train, held)
    assert split_holdout(examples, 5, 4, where="x")[1] != held
    with pytest.raises(DataError, match="20 examples; holding out 20"):
        split_holdout(examples, 20, 0, where="x")


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (([SECRET, "b"], [1]), "2 words have 1 labels"),
        ((SECRET, [1]), "'text' is not a list"),
        (([SECRET], 1), "'label' is not a list"),
        (([SECRET, ""], [0, 1]), "'text' is empty"),
        (([SECRET], [7]), "label 7 is out of range"),
        (SECRET, "is a str, not words with labels"),
        ({"text": [SECRET]}, "no column 'label'"),
    ],
)
def test_unusable_words_raise_without_quoting_them(item, expected):
    with pytest.raises(DataError) as caught:
        read_examples([(["a"], [0]), item], task="token_classification")
    assert expected in str(caught.value)
    assert "row 2" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_examples_can_be_read_again():
    settings = DataSettings(path="", num_labels=3)
    for items, task in (
        ([(["a", "b"], [1, 2])], "token_classification"),
        ([("a", "b", 1)], "classification"),
        (["a"], "causal_lm"),
    ):
        examples = read_examples(items, settings, task)
        assert read_examples(examples, settings, task) == examples
    with pytest.raises(DataError, match="row 1: column 'text' is not a list"):
        read_examples([Example("a", 1)], settings, "token_classification")


def test_repeated_columns_that_are_not_used_are_accepted(tmp_path):
    assert from_text(tmp_path, "id,text,label,id\n1,a,0,2\n") == [Example("a", 0)]
    assert from_text(tmp_path, '{"x": 1, "text": "a \\ud83d\\ude00", "label": 0, "x": 2}', "d.jsonl")[0].text == "a 😀"


def test_python_texts_with_half_a_surrogate_pair_raise():
    with pytest.raises(DataError, match="row 2: column 'text' contains half of a surrogate pair"):
        read_examples([("good", 1), ("good \ud83d", 0)])
    with pytest.raises(DataError, match="surrogate"):
        read_examples([(["good", "\udc00"], [0, 1])], task="token_classification")


NAMED = "text,label\ngood film,positive\nbad film,negative\n" + "fine,positive\npoor,negative\n" * 2


def test_label_names_are_read_by_their_index(tmp_path):
    labels = ("negative", "positive")
    assert [e.label for e in from_text(tmp_path, NAMED, labels=labels)] == [1, 0, 1, 0, 1, 0]
    assert [e.label for e in from_text(tmp_path, "text,label\na,1\nb,negative\n", labels=labels)] == [1, 0]
    with pytest.raises(DataError) as caught:
        from_text(tmp_path, f"text,label\na,negative\nb,{SECRET}\n", labels=labels)
    assert "line 3: the label in column 'label' is not in `labels`" in str(caught.value)
    assert SECRET not in str(caught.value)
    with pytest.raises(DataError, match=r"not an integer.\n.*names given as `labels`"):
        from_text(tmp_path, NAMED.splitlines()[0] + "\ngood,positive\n")
    words = read_examples(
        [(["Ada", "lives", "in", "Rome"], ["B-PER", "O", -100, "B-LOC"])],
        DataSettings(path="", labels=("O", "B-PER", "B-LOC")),
        "token_classification",
    )
    assert words[0].word_labels == (1, 0, -100, 2)
    with pytest.raises(DataError, match="label -100 is out of range"):
        read_examples([("a", -100)])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (NAMED, ("negative", "positive")),
        ("text,label\na,1\nb,0\n", ()),
        (NAMED + "a,1\n", ()),  # numbers and names
        ("text,label\n" + "".join(f"a,{SECRET} {i}\n" for i in range(6)), ()),  # the texts themselves
        ("text,label\na,x\nb,x\nc,x\n", ()),  # one class
        (NAMED + ",positive\nb,\n", ("negative", "positive")),  # rows without text or label
    ],
)
def test_find_labels_returns_names_but_never_texts(tmp_path, content, expected):
    (tmp_path / "data.csv").write_text(content)
    assert find_labels(str(tmp_path / "data.csv"), DataSettings(path="")) == expected


def test_find_labels_limits_the_number_of_names(tmp_path):
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(f"a,name{i}\n" for i in range(3000)))
    with pytest.raises(DataError, match="more than 1,000 different texts"):
        find_labels(str(tmp_path / "data.csv"), DataSettings(path=""))


def test_skip_bad_rows_counts_and_names_them(tmp_path, caplog):
    (tmp_path / "data.csv").write_text(f"text,label\ngood,1\n,0\n{SECRET},7\nbad,0\n")
    settings = DataSettings(path=str(tmp_path / "data.csv"))
    assert [e.text for e in read_examples(settings, skip_bad_rows=True)] == ["good", "bad"]
    assert "skipped rows: 2 of 4 rows" in caplog.text
    assert "line 3" in caplog.text
    assert SECRET not in caplog.text
    with pytest.raises(DataError, match="2 of 4 rows"):
        read_examples(settings)
    (tmp_path / "data.csv").write_text("text,label\n,0\n")
    with pytest.raises(DataError, match="line 2: column 'text' is empty"):
        read_examples(settings, skip_bad_rows=True)
