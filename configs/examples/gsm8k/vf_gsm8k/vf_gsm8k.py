"""vf-gsm8k: word problems with a number as the answer, in the form of an environment of the `verifiers` package.

It runs offline on the 48 problems beside it; `load_environment(dataset="openai/gsm8k")` takes the real ones from the
Hugging Face Hub. It is an ordinary environment: after `pip install` of this folder it is found by its name.
"""

import json
import re
from pathlib import Path

import verifiers as vf
from datasets import Dataset, load_dataset

SYSTEM = "Solve the problem step by step. End with the answer, a number and nothing else, in \\boxed{}."
BOXED = re.compile(r"\\boxed\{\s*\$?\s*(-?[\d,]*\d(?:\.\d+)?)\s*\}")


def load_environment(dataset="", problems="problems.jsonl"):
    """`dataset` = a Hub set with GSM8K's columns and splits (openai/gsm8k); "" = the file `problems` beside this."""
    if dataset:
        train, held_out = from_hub(dataset, "train"), from_hub(dataset, "test")
    else:
        train, held_out = from_file(Path(__file__).parent / problems, "train", "eval")
    rubric = vf.Rubric(funcs=[correct, one_box], weights=[0.9, 0.1])
    return vf.SingleTurnEnv(dataset=train, eval_dataset=held_out, system_prompt=SYSTEM, rubric=rubric)


def correct(completion, answer, **_):
    """1 where the answer stands in a box, and no other number in any."""
    return 1.0 if boxed(said(completion)) == answer else 0.0


def one_box(completion, **_):
    """1 where there is one box with a number, and no other."""
    text = said(completion)
    return 1.0 if text.count("\\boxed{") == 1 and boxed(text) is not None else 0.0


def said(completion):
    """The last message's text after the thoughts; "" where those were never finished."""
    message = completion[-1]
    text = (message["content"] if isinstance(message, dict) else message.content) or ""
    text = text.rpartition("</think>")[2]
    return "" if text.lstrip().startswith("<think>") else text


def boxed(text):
    """The number in the boxes, without commas and trailing zeros; None where there is none, or where they differ.

    Whoever takes the last of several boxes pays for guessing.
    """
    found = {str(float(number.replace(",", ""))).removesuffix(".0") for number in BOXED.findall(text)}
    return found.pop() if len(found) == 1 else None


def from_file(path, *splits):
    """A data set for each split of a file with lines {question, answer, split}."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Dataset.from_list([row for row in rows if row["split"] == split]) for split in splits]


def from_hub(name, split):
    """GSM8K's own rows: the answer is what follows ####."""
    rows = load_dataset(name, "main", split=split)
    return rows.map(lambda row: {"answer": row["answer"].rpartition("####")[2].strip().replace(",", "")})
