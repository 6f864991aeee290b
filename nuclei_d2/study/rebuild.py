"""The command that makes a model of a study again."""

import shlex

from nuclei_d2.config import load_config
from nuclei_d2.study.findings import Findings
from nuclei_d2.study.plan import Task, option_words


def rebuild_command(findings: Findings, task: Task, model: str) -> str:
    """One line that trains the model with its first seed, as the study did, and evaluates it.

    The decoder's settings and the score threshold, which the study chose on VAL, are given.
    Options that the config has already are left out.
    """
    run = findings.runs(task.name, model)[0]
    options = dict(zip(run.info["options"][::2], run.info["options"][1::2], strict=True))
    options["DATASETS.TEST"] = str((task.test[0],))
    for key, value in ((run.info.get("decoder") or {}).get("DECODER") or {}).items():
        options[f"MODEL.UNET.DECODER.{key}"] = str(value)
    if task.test[0] in run.tests:
        options["TEST.SCORE_THRESH_LABELS"] = str(run.tests[task.test[0]].score_threshold)
    config = run.info["config"]
    default = load_config(config)
    changed = load_config(config, option_words(options))
    words = ["python", "tools/train_net.py", "--config-file", config]
    if "iterations" not in run.info:
        words.append("--eval-only")
    for key, value in options.items():
        if _value(default, key) != _value(changed, key):
            words += [key, value]
    words += ["OUTPUT_DIR", f"output/{findings.study.name}/{task.name}/{model}"]
    return _folded(words)


def _value(cfg, key: str):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _folded(words: list[str], width: int = 96) -> str:
    """A command over several lines; an option and its value stay together."""
    parts = [shlex.join(words[:2]), shlex.join(words[2:4])]
    rest = words[4:]
    if rest[0].startswith("--"):
        parts.append(rest.pop(0))
    parts += [shlex.join(rest[k : k + 2]) for k in range(0, len(rest), 2)]
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1]) + len(part) >= width:
            lines.append(" ")
        lines[-1] = f"{lines[-1]} {part}" if lines[-1] else part
    return " \\\n".join(lines)
