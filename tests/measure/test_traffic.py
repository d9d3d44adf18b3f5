"""Traffic: every format that is read, and one error with file and line for every fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.measure.traffic import Room, read_traffic

ROOM = Room(kv=64, limit=128)
REQUESTS = {(10, 5): 2, (20, 1): 1}

LOGS = {
    "vllm.jsonl": '{"id": "a", "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}}\n'
    '{"usage": {"prompt_tokens": 10, "completion_tokens": 5}}\n\n{"prompt_tokens": 20, "completion_tokens": 1}\n',
    "spans.ndjson": '{"gen_ai.usage.input_tokens": 10, "gen_ai.usage.output_tokens": 5, "count": 2}\n'
    '{"input_tokens": 20, "output_tokens": 1}\n',
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,10,5\nt,10,5\nt,20,1\n",
    "burstgpt.csv": "Timestamp,Model,Request tokens,Response tokens\r\n5,ChatGPT,10,5\r\n6,a,10,5\r\n7,a,20,1\r\n",
    "counted.csv": "\ufeffprompt_tokens,completion_tokens,count\n10, 5 ,2\n20,1,1\n30,1,0\n",
}


@pytest.mark.parametrize("name", LOGS)
def test_read_traffic_of_a_log(tmp_path, name):
    (tmp_path / name).write_bytes(LOGS[name].encode())
    traffic = read_traffic(tmp_path / name, ROOM)
    assert {key: count for key, count in traffic.requests.items() if count} == REQUESTS
    assert traffic.has_answers


def test_read_traffic_of_a_histogram_has_prompts_alone(tmp_path):
    (tmp_path / "h.json").write_text('{"10": 3,\n "20": 1}')
    traffic = read_traffic(tmp_path / "h.json", ROOM)
    assert traffic.prompts == {10: 3, 20: 1}
    assert not traffic.has_answers


def test_read_traffic_of_two_histograms_combines_them(tmp_path):
    """An answer ends where the cache does."""
    data = {"prompt_tokens": {"10": 3, "60": 1}, "completion_tokens": {"2": 1, "40": 2}}
    (tmp_path / "h.json").write_text(json.dumps(data))
    traffic = read_traffic(tmp_path / "h.json", ROOM)
    assert traffic.requests == {(10, 2): 3, (10, 40): 6, (60, 2): 1, (60, 3): 2}
    assert traffic.copies == 3


HEADER = "prompt_tokens,completion_tokens\n"
GOOD = '{"prompt_tokens": 1, "completion_tokens": 1}\n'
FAULTS = {
    "empty.jsonl": ("", "", "no lines in the file"),
    "negative.jsonl": (GOOD + '{"prompt_tokens": -1, "completion_tokens": 1}', ":2:19", "`prompt_tokens`: found -1"),
    "fraction.jsonl": ('{"prompt_tokens": 1.5, "completion_tokens": 1}', ":1:19", "found 1.5, expected a whole number"),
    "nan.jsonl": ('{"prompt_tokens": 1, "completion_tokens": NaN}', ":1:43", "found NaN, expected a whole number"),
    "true.jsonl": ('{"prompt_tokens": true, "completion_tokens": 1}', ":1:19", "found true"),
    "text.jsonl": ('{"prompt_tokens": "7", "completion_tokens": 1}', ":1:19", 'found "7"'),
    "nothing.jsonl": ('{"prompt_tokens": 0, "completion_tokens": 1}', ":1:19", "expected a whole number from 1"),
    "unknown.jsonl": ('{"tokens": 7}', ":1:1", "no prompt length; accepted keys: prompt_tokens, "),
    "answers.jsonl": ('{"prompt_tokens": 7}', ":1:1", "no answer length; accepted keys: completion_tokens, "),
    "long.jsonl": (GOOD + '{"prompt_tokens": 60, "completion_tokens": 4}', ":2:1", "do not fit the largest kv bucket"),
    "uncounted.jsonl": ('{"prompt_tokens": 1, "completion_tokens": 1, "count": -2}', ":1:55", "`count`: found -2"),
    "empty.csv": ("", "", "no requests in the file"),
    "header.csv": (HEADER, "", "no requests in the file"),
    "columns.csv": ("a,b\n1,2\n", ":2", "no prompt length"),
    "cell.csv": (HEADER + "1,2\n3,x\n", ":3", '`completion_tokens`: found "x"'),
    "minus.csv": (HEADER + "-1,2\n", ":2", '`prompt_tokens`: found "-1"'),
    "short.csv": (HEADER + "1\n", ":2", "`completion_tokens`: found null"),
    "digits.csv": (HEADER + f"{'9' * 5000},1\n", ":2", "`prompt_tokens`: found "),
    "quote.csv": (HEADER + '1,"2\n', ":2", "not CSV: unexpected end of data"),
    "empty.json": ("{}", "", "no requests in the file"),
    "list.json": ("[1]", ":1", "not a mapping"),
    "zero.json": ('{"7": 0}', "", "no requests in the file"),
    "length.json": ('{"7": 1,\n "x": 1}', ":2: x", '`length`: found "x"'),
    "count.json": ('{"7": 1,\n "8": -1}', ":2: 8", "`count`: found -1"),
    "nan.yaml": ("7: .nan\n", ":1: 7", "`count`: found NaN"),
    "long.json": ('{"7": 1,\n "64": 1}', ":2: 64", "64 tokens do not fit the largest kv bucket 64"),
    "half.json": ('{"prompt_tokens": {"7": 1}}', ":1", "expected one histogram of prompts and one of answers"),
    "flat.json": ('{"prompt_tokens": 7, "completion_tokens": 1}', ":1: prompt_tokens", "found 7, expected a histogram"),
    "twice.json": ('{"7": 1,\n "7": 2}', ":2: 7", "key given twice"),
    "other.txt": ("7", "", "found the suffix '.txt'; accepted: .jsonl"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_read_traffic_names_file_and_line_of_a_fault(tmp_path, name):
    text, line, what = FAULTS[name]
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_traffic(path, ROOM)
    assert caught.value.where == f"{path}{line}"
    assert what in caught.value.what
    assert caught.value.fix


def test_read_traffic_of_a_request_that_is_too_long_says_what_would_fit(tmp_path):
    (tmp_path / "log.csv").write_text(HEADER + "60,4\n")
    for limit, fix in ((128, "use a larger kv bucket (the models take up to 128), or remove the request"),
                       (64, "remove the request")):  # fmt: skip
        with pytest.raises(InputError) as caught:
            read_traffic(tmp_path / "log.csv", Room(kv=64, limit=limit))
        assert caught.value.fix == fix


@pytest.mark.parametrize("name", ["none.jsonl", "none.csv", "none.json"])
def test_read_traffic_of_a_missing_file(name):
    with pytest.raises(InputError, match=r"cannot read|No such file"):
        read_traffic(Path(name), ROOM)
