"""The border to Hydra: compose a configuration, hand over a plain dataclass, answer mistakes in one line.

Entry points call `main`; tests and other programs call `compose`. A primary file `configs/<name>.yaml` starts its defaults
list with `<name>_schema` (the dataclass, registered here), then its groups. Below `csm.cli` nobody sees a `DictConfig`.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from csm.redaction import without_secrets

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
_REPOSITORY = CONFIG_DIR.parent
_CODE_FOLDERS = tuple(str(_REPOSITORY / name) + os.sep for name in ("csm", "data_prep"))
_NOT_GROUPS = ("override ", "optional ")  # in a defaults list
Schema = TypeVar("Schema")


class UsageError(ValueError):
    """A command line that cannot be read: its one line goes to stderr, exit status 2."""


def compose(config_name: str, overrides: Sequence[str], schema: type[Schema]) -> Schema:
    """Compose `configs/<config_name>.yaml` with overrides such as `optim.lr=1e-4` into an object of `schema`.

    Raises:
        UsageError: an unknown key or choice, a wrong type, or a value the dataclass refuses; one line that names the key.
    """
    _register(config_name, schema)
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            config = hydra.compose(config_name, list(overrides))
        return _to_object(config, schema)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_explain(error, schema)) from error


def main(config_name: str, schema: type[Schema], task: Callable[[Schema], object], *, about: str, examples: Sequence[str] = ()) -> None:
    """Run `task(config)` under Hydra with the command line's overrides; `--multirun`, `--cfg job` and `--info` are Hydra's.

    Mistakes in the command line leave with status 2, bad input found by our code with status 1, each with one line on
    stderr; CSM_DEBUG=1 shows the traceback.

    Args:
        about: one or two sentences for `--help`.
        examples: command lines for `--help`, without the `python`.
    """
    arguments = sys.argv[1:]
    try:
        if "--help" in arguments or "-h" in arguments:
            print(help_text(config_name, schema, [a for a in arguments if not a.startswith("-")], about=about, examples=examples))
            return
        _register(config_name, schema)

        def run(config: DictConfig) -> object:
            # Caught here and not outside: Hydra prints a line of its own for exceptions that leave the task.
            try:
                _give_own_folder(config)
                return task(_to_object(config, schema))  # a number is what a sweeper makes small
            except (UsageError, OmegaConfBaseException) as error:
                _leave(error, _explain(error, schema), status=2)
            except KeyboardInterrupt:
                print("stopped by Ctrl-C", file=sys.stderr)
                sys.exit(130)
            except (ValueError, OSError, ImportError) as error:
                if not _is_ours(error):
                    raise
                _leave(error, str(error), status=1)

        os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors reach us instead of Hydra's own report
        if any(argument.startswith("hydra/launcher=") for argument in arguments):
            _let_launcher_talk()
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(run)()
    except (UsageError, HydraException, OmegaConfBaseException) as error:
        _leave(error, _explain(error, schema), status=2)
    except RuntimeError as error:
        if not type(error).__module__.startswith("submitit."):
            raise
        _leave(error, "a run of the sweep failed: " + " ".join(str(error).splitlines()[:3]), status=1)


def help_text(config_name: str, schema: type, overrides: Sequence[str] = (), *, about: str = "", examples: Sequence[str] = ()) -> str:
    """What `--help` prints: groups and their choices, then every key with its value and its comment in csm/config.py."""
    given = {override.split("=")[0] for override in overrides}
    required = OmegaConf.missing_keys(OmegaConf.structured(schema)) - given  # shown as what they are: yours to give
    config: Any = compose(config_name, [*overrides, *(f"{key}='<required>'" for key in sorted(required))], schema)
    lines = [*textwrap.wrap(about, 118), ""]
    lines += [f"  python {example}" for example in examples] + [""]
    groups = _groups(config_name)
    if groups:
        lines.append("Groups: group=choice picks a file of configs/<group>/.")
        lines += [f"  {group + '=':<12} {' '.join(choices)}" for group, choices in groups.items()]
        lines.append("")
    lines.append("Keys: key=value overrides one; the values shown are those this command line would run with.")
    for key, value, comment in _walk(config):
        shown = f"  {key}={_shown(value)}"
        lines.append(f"{shown:<52} # {comment}" if comment else shown)
    lines += ["", "--multirun key=a,b,c runs every combination; --cfg job prints the composed YAML; CSM_DEBUG=1 shows tracebacks."]
    return "\n".join(lines)


def known_keys(config: DictConfig) -> list[str]:
    """Every dotted key of a configuration, sections included."""
    keys: list[str] = []

    def visit(node: Any, prefix: str) -> None:
        for name, child in node.items_ex(resolve=False):
            keys.append(prefix + name)
            if isinstance(child, DictConfig):
                visit(child, f"{prefix}{name}.")

    visit(config, "")
    return keys


def _register(config_name: str, schema: type) -> None:
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)


def _to_object(config: DictConfig, schema: type[Schema]) -> Schema:
    """The dataclass of a composed configuration; `__post_init__` checks run here."""
    known = known_keys(OmegaConf.structured(schema))
    for key in known_keys(config):
        if key not in known:  # `+key=value` adds to any DictConfig
            raise UsageError(f"{key}: no such key{_did_you_mean(key, known)}; --help lists every key")
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UsageError(f"{missing[0]} is required: add {missing[0]}=<value> (--help lists every key)")
    try:
        built = OmegaConf.to_object(config)
    except ValueError as error:  # from __post_init__, already with key, value and what was expected
        raise UsageError(str(error)) from error
    assert isinstance(built, schema), f"{type(built)} composed, {schema} declared"
    return built


def _give_own_folder(config: DictConfig) -> None:
    """In a sweep, a run's `run_dir` is the folder that Hydra counts for it; a SLURM job that is queued again goes on there.

    Raises:
        UsageError: `run_dir` is given, which would be the folder of all of them; or several processes are asked for where
            runs take turns in this one.
    """
    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN or "run_dir" not in config:
        return
    num_processes = OmegaConf.select(config, "trainer.devices", default=1) * OmegaConf.select(config, "trainer.num_nodes", default=1)
    if num_processes > 1 and "SUBMITIT_EXECUTOR" not in os.environ:
        # Lightning starts further processes with this command line, the whole sweep, and only once in a process's life.
        raise UsageError(
            f"a sweep of runs with {num_processes} processes each needs hydra/launcher=slurm; here, start the runs one by one, from a shell"
        )
    if config.run_dir is not None:
        raise UsageError(f"run_dir={config.run_dir}: the runs of a sweep need a folder each; say hydra.sweep.dir={config.run_dir} instead")
    config.run_dir = os.path.join(hydra_config.sweep.dir, hydra_config.sweep.subdir)
    if config.resume is None and "SLURM_RESTART_COUNT" in os.environ:
        config.resume = "auto"


def _let_launcher_talk() -> None:
    """Let a launcher say what it started, which job_logging=none would hide."""
    logger = logging.getLogger("hydra_plugins")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.StreamHandler(sys.stdout))


def _groups(config_name: str) -> dict[str, list[str]]:
    """The groups named in a primary file's defaults list, with their choices."""
    primary = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / f"{config_name}.yaml"))
    assert isinstance(primary, dict)
    names = [next(iter(entry)) for entry in primary.get("defaults", []) if isinstance(entry, dict)]
    return {
        str(name): sorted(path.stem for path in (CONFIG_DIR / str(name)).glob("*.yaml"))
        for name in names
        if not str(name).startswith(_NOT_GROUPS)
    }


def _explain(error: Exception, schema: type) -> str:
    """One line for a mistake in the command line or a YAML file, naming the key and close matches."""
    text = str(error)
    cause = error.__cause__
    if isinstance(error, UsageError):
        return text
    if "submitit" in text and "launcher" in text:
        return "hydra/launcher=slurm needs the plug-in hydra-submitit-launcher: pip install 'hydra-submitit-launcher>=1.2,<2'"
    if "hydra/sweeper/optuna" in text:
        return "hydra/sweeper=learning_rate needs the plug-in hydra-optuna-sweeper: pip install 'hydra-optuna-sweeper>=1.3,<2'"
    choices = re.search(r"Could not find '([^']+)'\s+Available options in '([^']+)':\s*(.*)", text, re.DOTALL)
    if choices:
        options = choices.group(3).split("Config search path")[0].split()
        got = choices.group(1).removeprefix(choices.group(2) + "/")
        return f"{choices.group(2)}={got}: no such choice{_did_you_mean(got, options)}; there are: {', '.join(options)}"
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"No match in the defaults list[^']*for '([^']+)'", text)
    if isinstance(cause, OmegaConfBaseException) and "could not be converted" in str(cause):
        key = re.search(r"full_key: (\S+)", str(cause))
        return f"{key.group(1) if key else text.splitlines()[0]}: {str(cause).splitlines()[0]}"
    if unknown:
        name = unknown.group(1).split("@")[0]
        return f"{name}: no such key{_did_you_mean(name, known_keys(OmegaConf.structured(schema)))}; --help lists every key"
    lines = [line.strip() for line in f"{text}\n{cause or ''}".splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("object_type", "full_key", "reference_type", "See https"))]
    return "; ".join(dict.fromkeys(lines[:4]))


def _did_you_mean(got: str, known: Sequence[str]) -> str:
    tail = got.rsplit(".", 1)[-1]
    close = [key for key in known if key.rsplit(".", 1)[-1] == tail]  # the right name in the wrong section
    close += [key for key in difflib.get_close_matches(got, known, n=2, cutoff=0.7) if key not in close]
    return f" (did you mean {' or '.join(close[:3])}?)" if close else ""


def _leave(error: BaseException, message: str, *, status: int) -> NoReturn:
    if os.environ.get("CSM_DEBUG") == "1":
        traceback.print_exception(error)
    if "SUBMITIT_EXECUTOR" in os.environ:  # a job of a sweep: only an exception reaches the process that waits for it
        raise UsageError(" ".join(message.split())) from None
    print("error: " + without_secrets(" ".join(message.split())), file=sys.stderr)
    sys.exit(status)


def _is_ours(error: BaseException) -> bool:
    """Whether our code raised it, as an answer to bad input; from anywhere else it is a defect and keeps its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_CODE_FOLDERS)


def _walk(config: Any, prefix: str = "") -> list[tuple[str, Any, str]]:
    """(dotted key, value, comment) of every leaf, in the order of the dataclasses."""
    comments = _comments(type(config))
    rows: list[tuple[str, Any, str]] = []
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            rows += _walk(value, f"{prefix}{item.name}.")
        else:
            rows.append((prefix + item.name, value, comments.get(item.name, "")))
    return rows


def _comments(schema: type) -> dict[str, str]:
    """The comment beside each field in its source."""
    lines = inspect.getsource(schema).splitlines()
    found = (re.match(r"\s{4}(\w+): .*?  # (.*)$", line) for line in lines)
    return {match.group(1): match.group(2) for match in found if match}


def _shown(value: Any) -> str:
    """A value as the command line would take it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(_shown(item) for item in value) + "]"
    if isinstance(value, str) and re.search(r"[\s,:]", value):
        return f"'{value}'"
    return str(value)
